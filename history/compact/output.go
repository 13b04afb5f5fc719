package compact

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// windowOf numbers the window (a, b] of a width in ms, aligned to the epoch, that
// t lies in.
func windowOf(t, width int64) int64 {
	w := t / width
	if t%width <= 0 {
		w--
	}
	return w
}

// bounds are the first and last ms of windows first to last.
func bounds(first, last, width int64) (mint, maxt int64) {
	mint, maxt = math.MinInt64, math.MaxInt64
	if first >= math.MinInt64/width {
		mint = first*width + 1
	}
	if last < math.MaxInt64/width {
		maxt = (last + 1) * width
	}
	return mint, maxt
}

// outputs cuts what a merge gives into blocks: by windows of time, by size, and
// large tenants apart. Blocks are made as files in a folder and put into the
// object store when they are full, without which nothing of them is visible.
type outputs struct {
	objects object.Store
	dir     string // for files; the caller's
	width   int64  // of windows, in ms
	level   index.Level
	// A block is closed when it has maxBytes. A tenant of at least ownBytes gets
	// blocks of its own.
	maxBytes, ownBytes int64
	now                func() time.Time
	entropy            io.Reader // for ids
	writer             chunkfmt.WriterOptions
	beat               func(ctx context.Context) error // now and then
	memcached          *memcached.Client               // where recent pages are written ahead; may be nil
	logger             *slog.Logger

	name    string               // of the tenant
	shared  map[int64]*output    // being written, by window
	own     map[int64]*output    // of a large tenant
	large   bool                 // the tenant is one
	done    []index.CompactedRow // of the blocks that are in the object store
	samples int64                // written
	bytes   int64                // of the blocks
}

// output is a block that is being written.
type output struct {
	window int64
	row    index.CompactedRow
	file   *os.File
	buf    *bufio.Writer
	w      *chunkfmt.Writer
}

// tenant implements sink.
func (o *outputs) tenant(ctx context.Context, tenant string, sizeBytes int64) error {
	if err := o.closeAll(ctx, o.own); err != nil {
		return err
	}
	o.name, o.large = tenant, sizeBytes >= o.ownBytes && len(o.done) < maxOwn
	if o.large {
		return nil
	}
	// A tenant that would not fit goes to the next block rather than to both.
	for _, w := range slices.Sorted(maps.Keys(o.shared)) {
		if out := o.shared[w]; out.w.Size()+sizeBytes > o.maxBytes {
			if err := o.close(ctx, o.shared, out); err != nil {
				return err
			}
		}
	}
	return nil
}

// series implements sink.
func (o *outputs) series(ctx context.Context, s *chunkfmt.Series, sums *chunkfmt.Summaries) error {
	if err := o.beat(ctx); err != nil {
		return err
	}
	mint, maxt := times(s)
	if sums != nil && len(sums.Gone) > 0 {
		for _, w := range []*rollup.Windows{&sums.Short, &sums.Long} {
			if n := w.Len(); n > 0 {
				mint, maxt = min(mint, w.End[0]), max(maxt, w.End[n-1])
			}
		}
	}
	first, last := windowOf(mint, o.width), windowOf(maxt, o.width)
	if first == last {
		return o.add(ctx, first, s, sums)
	}
	for w := first; w <= last; w++ {
		part := within(s, w, o.width)
		of := summariesWithin(sums, w, o.width)
		if len(part.Floats.T)+len(part.Histograms.T)+len(part.FloatHistograms.T)+len(part.Exemplars) == 0 && (of == nil || len(of.Gone) == 0) {
			// Years may be empty.
			if next := after(s, w, o.width); next > w+1 && (sums == nil || len(sums.Gone) == 0) {
				w = next - 1
			}
			continue
		}
		if err := o.add(ctx, w, part, of); err != nil {
			return err
		}
	}
	return nil
}

func (o *outputs) add(ctx context.Context, window int64, s *chunkfmt.Series, sums *chunkfmt.Summaries) error {
	open := o.shared
	if o.large {
		open = o.own
	}
	out := open[window]
	if out != nil && out.w.Full(o.maxBytes) {
		if err := o.close(ctx, open, out); err != nil {
			return err
		}
		out = nil
	}
	if out == nil {
		var err error
		if out, err = o.create(window); err != nil {
			return err
		}
		if o.large {
			out.row.Tenant = o.name
		}
		open[window] = out
	}
	err := error(nil)
	if sums != nil {
		err = out.w.AddSummarised(o.name, s, sums)
	} else {
		err = out.w.Add(o.name, s)
	}
	if err != nil {
		return fmt.Errorf("block %s of window %d: %w", out.row.Block, window, err)
	}
	o.samples += int64(len(s.Floats.T) + len(s.Histograms.T) + len(s.FloatHistograms.T))
	return nil
}

func (o *outputs) create(window int64) (*output, error) {
	id, err := ulid.New(ulid.Timestamp(o.now()), o.entropy)
	if err != nil {
		return nil, fmt.Errorf("new block id: %w", err)
	}
	f, err := os.Create(filepath.Join(o.dir, id.String()+".block"))
	if err != nil {
		return nil, fmt.Errorf("file of a new block: %w", err)
	}
	out := &output{window: window, file: f, buf: bufio.NewWriterSize(f, fileBuffer)}
	_, end := bounds(window, window, o.width)
	out.row = index.CompactedRow{BlockRef: index.BlockRef{Block: id, Object: history.ObjectKey(id)}, Level: o.level, End: end}
	w := o.writer
	w.Level = int(o.level)
	out.w = chunkfmt.NewWriter(out.buf, w)
	return out, nil
}

// fileBuffer is how much of a block is written to its file at a time, in bytes.
const fileBuffer = 256 << 10

// close finishes a block and puts it into the object store.
func (o *outputs) close(ctx context.Context, open map[int64]*output, out *output) (err error) {
	delete(open, out.window)
	defer func() { err = errors.Join(err, out.discard()) }()
	summary, err := out.w.Close()
	if err == nil {
		err = out.buf.Flush()
	}
	if err != nil {
		return fmt.Errorf("write block %s: %w", out.row.Block, err)
	}
	if err := o.put(ctx, out, summary.Size); err != nil {
		return fmt.Errorf("put block %s: %w", out.row.Block, err)
	}
	if err := history.WriteAhead(ctx, o.memcached, out.row.Object, out.file, summary, o.now()); err != nil {
		o.logger.Warn("new block not written ahead", "block", out.row.Block, "err", err)
	}
	out.row.ObjectSize = summary.Size
	o.bytes += summary.Size
	o.done = append(o.done, out.row)
	return nil
}

// beatEvery is how often beat is called while a block is put, which may take longer
// than a lease.
const beatEvery = 10 * time.Second

func (o *outputs) put(ctx context.Context, out *output, sizeBytes int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- o.objects.Put(ctx, out.row.Object, out.file, sizeBytes) }() // put waits for it
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-tick.C:
			if err := o.beat(ctx); err != nil {
				cancel(err)
				return errors.Join(err, <-done)
			}
		}
	}
}

// discard removes the file.
func (o *output) discard() error {
	return errors.Join(o.file.Close(), os.Remove(o.file.Name()))
}

func (o *outputs) closeAll(ctx context.Context, open map[int64]*output) error {
	for _, w := range slices.Sorted(maps.Keys(open)) {
		if err := o.close(ctx, open, open[w]); err != nil {
			return err
		}
	}
	return nil
}

// finish puts away what is open.
func (o *outputs) finish(ctx context.Context) error {
	return errors.Join(o.closeAll(ctx, o.own), o.closeAll(ctx, o.shared))
}

// abandon removes the files of what is open.
func (o *outputs) abandon() error {
	var errs []error
	for _, open := range []map[int64]*output{o.own, o.shared} {
		for w, out := range open {
			errs = append(errs, out.discard())
			delete(open, w)
		}
	}
	return errors.Join(errs...)
}

// times are those of the first and last sample or exemplar.
func times(s *chunkfmt.Series) (mint, maxt int64) {
	mint, maxt = math.MaxInt64, math.MinInt64
	for _, t := range [][]int64{s.Floats.T, s.Histograms.T, s.FloatHistograms.T} {
		if n := len(t); n > 0 {
			mint, maxt = min(mint, t[0]), max(maxt, t[n-1])
		}
	}
	if n := len(s.Exemplars); n > 0 {
		mint, maxt = min(mint, s.Exemplars[0].Ts), max(maxt, s.Exemplars[n-1].Ts)
	}
	return mint, maxt
}

// within is what a series has in a window; it shares memory with s.
func within(s *chunkfmt.Series, window, width int64) *chunkfmt.Series {
	mint, maxt := bounds(window, window, width)
	out := &chunkfmt.Series{Labels: s.Labels, Metadata: s.Metadata, Family: s.Family}
	from, to := find(s.Floats.T, mint, maxt)
	out.Floats = chunkfmt.Floats{T: s.Floats.T[from:to], ST: part(s.Floats.ST, from, to), V: s.Floats.V[from:to]}
	from, to = find(s.Histograms.T, mint, maxt)
	out.Histograms = chunkfmt.Histograms{T: s.Histograms.T[from:to], ST: part(s.Histograms.ST, from, to), H: s.Histograms.H[from:to]}
	from, to = find(s.FloatHistograms.T, mint, maxt)
	out.FloatHistograms = chunkfmt.FloatHistograms{
		T: s.FloatHistograms.T[from:to], ST: part(s.FloatHistograms.ST, from, to), H: s.FloatHistograms.H[from:to],
	}
	from = sort.Search(len(s.Exemplars), func(i int) bool { return s.Exemplars[i].Ts >= mint })
	to = sort.Search(len(s.Exemplars), func(i int) bool { return s.Exemplars[i].Ts > maxt })
	out.Exemplars = s.Exemplars[from:to]
	return out
}

// summariesWithin is what of a series' windows lies in a window of a block; it shares
// memory with sums.
func summariesWithin(sums *chunkfmt.Summaries, window, width int64) *chunkfmt.Summaries {
	if sums == nil {
		return nil
	}
	mint, maxt := bounds(window, window, width)
	cut := func(w *rollup.Windows) rollup.Windows { return w.Slice(find(w.End, mint, maxt)) }
	out := &chunkfmt.Summaries{Short: cut(&sums.Short), Long: cut(&sums.Long)}
	for _, g := range history.Overlap(sums.Gone, []chunkfmt.Range{{MinT: mint, MaxT: maxt}}) {
		if has(&out.Short, g) || has(&out.Long, g) {
			out.Gone = append(out.Gone, g)
		}
	}
	return out
}

// after is the first window behind the given one in which a series has anything.
func after(s *chunkfmt.Series, window, width int64) int64 {
	_, maxt := bounds(window, window, width)
	next := int64(math.MaxInt64)
	for _, t := range [][]int64{s.Floats.T, s.Histograms.T, s.FloatHistograms.T} {
		if i := sort.Search(len(t), func(i int) bool { return t[i] > maxt }); i < len(t) {
			next = min(next, t[i])
		}
	}
	if i := sort.Search(len(s.Exemplars), func(i int) bool { return s.Exemplars[i].Ts > maxt }); i < len(s.Exemplars) {
		next = min(next, s.Exemplars[i].Ts)
	}
	return windowOf(next, width)
}

// find gives the indexes of the times in mint to maxt.
func find(t []int64, mint, maxt int64) (from, to int) {
	from = sort.Search(len(t), func(i int) bool { return t[i] >= mint })
	to = sort.Search(len(t), func(i int) bool { return t[i] > maxt })
	return from, max(from, to)
}

func part(t []int64, from, to int) []int64 {
	if t == nil {
		return nil
	}
	return t[from:to]
}

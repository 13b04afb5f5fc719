package transfer

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/fileutil"
	tsdbindex "github.com/prometheus/prometheus/tsdb/index"
	"github.com/prometheus/prometheus/tsdb/tombstones"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// ExportOptions of an Export. History, Tenant and Dir are needed.
type ExportOptions struct {
	History    *history.History
	Tenant     string
	MinT, MaxT int64 // of samples, ms, inclusive

	// Selectors are sets of matchers. Series that match all of one of them are
	// exported; none: all series.
	Selectors [][]*labels.Matcher

	// External are labels that go into the meta.json of each block, where Thanos
	// looks for them: only series that have all of them are exported, without them.
	External map[string]string

	Dir   string        // that the blocks are put in; it is made if it isn't there, and has to be empty
	Range time.Duration // of a block, aligned to the epoch; default 1 day

	// Report is called for each block that is there; it may be nil.
	Report func(Exported)
}

// Exported is a block that was written.
type Exported struct {
	Dir              string
	MinTime, MaxTime int64 // ms
	Series, Samples  uint64

	// Done is the share of the time that is exported, 0 to 1.
	Done float64
}

// ExportResult counts what was written.
type ExportResult struct {
	Blocks          int
	Series, Samples uint64 // series once for each block that has it
	// Gone says that of some of the time there are only summaries of windows, which
	// aren't exported.
	Gone bool
}

const (
	defaultExportRange = 24 * time.Hour
	minExportRange     = 2 * time.Hour
	// maxExportRange is what Prometheus compacts to at the most.
	maxExportRange = 31 * 24 * time.Hour
	// openBlocks is how many are begun at the same time: a week of the shortest.
	openBlocks = 84
)

// Validate reports what is missing or impossible.
func (o *ExportOptions) Validate() error {
	switch {
	case o.History == nil || o.Tenant == "" || o.Dir == "":
		return errors.New("export: a history, a tenant and a directory are needed")
	case o.MinT > o.MaxT:
		return fmt.Errorf("export: from %d to %d ms", o.MinT, o.MaxT)
	case o.Range < minExportRange || o.Range > maxExportRange || o.Range%minExportRange != 0:
		return fmt.Errorf("export: blocks of %s: a multiple of %s up to %s is possible", o.Range, minExportRange, maxExportRange)
	}
	return nil
}

// Export writes what history has of a tenant in a time as blocks of Prometheus.
// What ingesters have not flushed yet isn't in it, nor are exemplars and metadata,
// which such blocks can't hold. A block is there whole or not at all.
func Export(ctx context.Context, o ExportOptions) (*ExportResult, error) {
	if o.Range == 0 {
		o.Range = defaultExportRange
	}
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Report == nil {
		o.Report = func(Exported) {}
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("export: %s is not empty: blocks of an earlier export would be there twice", o.Dir)
	}
	e := &exporter{o: &o, width: o.Range.Milliseconds()}
	var external []*labels.Matcher
	for _, name := range slices.Sorted(maps.Keys(o.External)) {
		m, err := labels.NewMatcher(labels.MatchEqual, name, o.External[name])
		if err != nil {
			return nil, fmt.Errorf("export: %w", err)
		}
		external = append(external, m)
	}
	for _, ms := range o.Selectors {
		e.selectors = append(e.selectors, slices.Concat(ms, external))
	}
	if len(o.Selectors) == 0 {
		e.selectors = [][]*labels.Matcher{external}
	}
	all, err := o.History.Snapshot(ctx, o.Tenant, o.MinT, o.MaxT, nil, time.Time{})
	if err != nil {
		return nil, err
	}
	if e.result.Gone, err = all.Gone(ctx); err != nil {
		return nil, err
	}
	// Pages are best read once: a pass goes as far as a page may, or to where too
	// many blocks would be open.
	pass := e.width
	for _, w := range []int64{history.Window, (24 * time.Hour).Milliseconds()} {
		if w%e.width == 0 && w/e.width <= openBlocks {
			pass = max(pass, w)
		}
	}
	mint, maxt := int64(math.MaxInt64), int64(math.MinInt64)
	for _, b := range all.Blocks {
		mint, maxt = min(mint, b.Ranges[0].MinT), max(maxt, b.Ranges[len(b.Ranges)-1].MaxT)
	}
	mint, maxt = max(mint, o.MinT), min(maxt, o.MaxT)
	for start := floor(mint, pass); start <= maxt; start += pass {
		from, to := max(start, mint), min(start+pass-1, maxt)
		if !slices.ContainsFunc(all.Blocks, func(b history.Block) bool { return b.Overlaps(from, to) }) {
			continue // years may be empty
		}
		e.share = float64(to-mint+1) / float64(maxt-mint+1)
		if err := e.pass(ctx, from, to); err != nil {
			return &e.result, err
		}
	}
	return &e.result, nil
}

func floor(t, width int64) int64 {
	d := t - t%width
	if t%width < 0 {
		d -= width
	}
	return d
}

type exporter struct {
	o         *ExportOptions
	width     int64               // ms
	selectors [][]*labels.Matcher // at least one
	open      []*blockWriter      // ascending by time
	share     float64
	result    ExportResult

	// Of the series at hand.
	encode chunks.Iterator
	metas  []chunks.Meta
	record []byte
}

// pass exports the samples of mint to maxt, both included.
func (e *exporter) pass(ctx context.Context, mint, maxt int64) (err error) {
	snap, err := e.o.History.Snapshot(ctx, e.o.Tenant, mint, maxt, nil, time.Time{})
	if err != nil {
		return err
	}
	symbols, err := e.symbols(ctx, snap)
	if err != nil || symbols == nil {
		return err
	}
	defer func() {
		for _, b := range e.open {
			err = errors.Join(err, b.abandon())
		}
		e.open = nil
	}()
	var last *labels.Labels // up to which all series are written
	for {
		from := last
		last, err = e.write(ctx, snap, mint, maxt, from, symbols)
		if err == nil {
			break
		}
		if !errors.Is(err, object.ErrNotExist) || last == from {
			return err
		}
		// Compaction has replaced a block, and some time has passed since: what replaced
		// it has the rest.
		if snap, err = e.o.History.Snapshot(ctx, e.o.Tenant, mint, maxt, nil, time.Now()); err != nil {
			return err
		}
	}
	for len(e.open) > 0 {
		b := e.open[0]
		done, err := b.close(ctx)
		if err != nil {
			return err
		}
		e.open = e.open[1:]
		done.Done = e.share
		e.result.Blocks++
		e.result.Series += done.Series
		e.result.Samples += done.Samples
		e.o.Report(done)
	}
	return nil
}

// write adds the series of a snapshot that come behind a given one to blocks; nil: all. It
// returns the last one that it has added, also with an error.
func (e *exporter) write(ctx context.Context, snap *history.Snapshot, mint, maxt int64, behind *labels.Labels, symbols []string) (*labels.Labels, error) {
	done := behind
	if behind != nil {
		snap = snap.Only(func(ls labels.Labels) bool {
			// A series that is new since has strings that the index doesn't have.
			known := true
			ls.Range(func(l labels.Label) {
				for _, s := range []string{l.Name, l.Value} {
					_, ok := slices.BinarySearch(symbols, s)
					known = known && ok
				}
			})
			return known && labels.Compare(e.exported(ls), *behind) > 0
		})
	}
	var sets []*history.SeriesSet // those that stand at a series
	for _, ms := range e.selectors {
		set, err := snap.SelectOrdered(ctx, ms, mint, maxt, e.exported)
		if err != nil {
			return done, err
		}
		if set.Next(ctx) {
			sets = append(sets, set)
		} else if err := set.Err(); err != nil {
			return done, err
		}
	}
	var buf history.Buffer
	for len(sets) > 0 {
		s := slices.MinFunc(sets, func(a, b *history.SeriesSet) int {
			return labels.Compare(e.exported(a.At().Labels), e.exported(b.At().Labels))
		}).At()
		runs, err := s.Runs(&buf)
		if err != nil {
			return done, err
		}
		if err := e.series(s.Labels, chunkfmt.Merge(runs...), symbols); err != nil {
			return done, fmt.Errorf("series %s: %w", s.Labels, err)
		}
		key := e.exported(s.Labels)
		done = &key
		left := sets[:0]
		for _, set := range sets {
			if !labels.Equal(set.At().Labels, s.Labels) || set.Next(ctx) {
				left = append(left, set)
			} else if err := set.Err(); err != nil {
				return done, err
			}
		}
		sets = left
	}
	return done, nil
}

// exported are the labels of a series in the blocks. That external labels aren't among
// them changes the order of series, which an index has to have.
func (e *exporter) exported(ls labels.Labels) labels.Labels {
	if len(e.o.External) == 0 {
		return ls
	}
	b := labels.NewBuilder(ls)
	for name := range e.o.External {
		b.Del(name)
	}
	return b.Labels()
}

// symbols are all strings in the labels of the series in a snapshot, with which an
// index begins; nil if there are no series.
func (e *exporter) symbols(ctx context.Context, snap *history.Snapshot) ([]string, error) {
	some := false
	set := map[string]struct{}{"": {}}
	for _, ms := range e.selectors {
		series, err := snap.Series(ctx, ms, snap.MinT, snap.MaxT)
		if err != nil {
			return nil, err
		}
		some = some || len(series) > 0
		for _, ls := range series {
			ls.Range(func(l labels.Label) { set[l.Name], set[l.Value] = struct{}{}, struct{}{} })
		}
	}
	if !some {
		return nil, nil
	}
	return slices.Sorted(maps.Keys(set)), nil
}

// series adds a series to the blocks that it has samples for.
func (e *exporter) series(ls labels.Labels, s *chunkfmt.Series, symbols []string) error {
	ls = e.exported(ls)
	it := &samples{s: s}
	for {
		t := it.peek()
		if t == math.MaxInt64 {
			return nil
		}
		start := floor(t, e.width)
		it.until = start + e.width
		i, ok := slices.BinarySearchFunc(e.open, start, func(b *blockWriter, start int64) int {
			return int(max(-1, min(1, b.meta.MinTime-start)))
		})
		if !ok {
			b, err := e.create(start, symbols)
			if err != nil {
				return err
			}
			e.open = slices.Insert(e.open, i, b)
		}
		if err := e.add(e.open[i], ls, it); err != nil {
			return err
		}
	}
}

// blockWriter writes a block, series by series. Until it is closed their chunks are in a
// file of its own: Prometheus's writers take 20 MiB for buffers, and so there is one of
// them at a time, however many blocks are begun.
type blockWriter struct {
	parent, tmp string
	external    map[string]string
	symbols     []string
	meta        tsdb.BlockMeta
	file        *os.File
	buf         *bufio.Writer
}

// seriesFile has the series of a block that is being written: each with the number of its labels,
// these, the number of its chunks, and of each chunk times, encoding, size and bytes.
const (
	seriesFile   = "series.tmp"
	seriesBuffer = 64 << 10 // bytes
)

func (e *exporter) create(start int64, symbols []string) (*blockWriter, error) {
	id, err := ulid.New(ulid.Now(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("id of a block: %w", err)
	}
	b := &blockWriter{
		// Prometheus removes what has such a name.
		parent: e.o.Dir, tmp: filepath.Join(e.o.Dir, id.String()+".tmp-for-creation"), external: e.o.External, symbols: symbols,
		meta: tsdb.BlockMeta{
			ULID: id, MinTime: start, MaxTime: start + e.width, Version: 1,
			Compaction: tsdb.BlockMetaCompaction{Level: 1, Sources: []ulid.ULID{id}},
		},
	}
	if err := os.Mkdir(b.tmp, 0o755); err != nil {
		return nil, err
	}
	if b.file, err = os.Create(filepath.Join(b.tmp, seriesFile)); err != nil {
		return nil, errors.Join(err, b.abandon())
	}
	b.buf = bufio.NewWriterSize(b.file, seriesBuffer)
	return b, nil
}

// add adds the samples that it gives next to a block.
func (e *exporter) add(b *blockWriter, ls labels.Labels, it *samples) error {
	series := &storage.SeriesEntry{
		Lset: ls, SampleIteratorFn: func(chunkenc.Iterator) chunkenc.Iterator { return it },
	}
	e.encode = storage.NewSeriesToChunkEncoder(series).Iterator(e.encode)
	e.metas = e.metas[:0]
	for e.encode.Next() {
		e.metas = append(e.metas, e.encode.At())
	}
	if err := e.encode.Err(); err != nil {
		return err
	}
	text := func(s string) { e.record = append(binary.AppendUvarint(e.record, uint64(len(s))), s...) }
	e.record = binary.AppendUvarint(e.record[:0], uint64(ls.Len())) //nolint:gosec // not negative
	ls.Range(func(l labels.Label) {
		text(l.Name)
		text(l.Value)
	})
	e.record = binary.AppendUvarint(e.record, uint64(len(e.metas)))
	for _, m := range e.metas {
		e.record = binary.AppendVarint(binary.AppendVarint(e.record, m.MinTime), m.MaxTime)
		data := m.Chunk.Bytes()
		e.record = binary.AppendUvarint(binary.AppendUvarint(e.record, uint64(m.Chunk.Encoding())), uint64(len(data)))
		e.record = append(e.record, data...)
	}
	if _, err := b.buf.Write(e.record); err != nil {
		return err
	}
	st := &b.meta.Stats
	st.NumSeries++
	st.NumChunks += uint64(len(e.metas))
	for _, m := range e.metas {
		n := uint64(m.Chunk.NumSamples()) //nolint:gosec // not negative
		st.NumSamples += n
		switch m.Chunk.Encoding() {
		case chunkenc.EncXOR, chunkenc.EncXOR2:
			st.NumFloatSamples += n
		default:
			st.NumHistogramSamples += n
		}
	}
	return nil
}

// write puts the series into the files of a block.
func (b *blockWriter) write(ctx context.Context) (err error) {
	if err := b.buf.Flush(); err != nil {
		return err
	}
	if _, err := b.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	cw, err := chunks.NewWriter(filepath.Join(b.tmp, "chunks"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cw.Close()) }()
	iw, err := tsdbindex.NewWriter(ctx, filepath.Join(b.tmp, "index"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, iw.Close()) }()
	for _, s := range b.symbols {
		if err := iw.AddSymbol(s); err != nil {
			return err
		}
	}
	r := &seriesReader{r: bufio.NewReaderSize(b.file, seriesBuffer)}
	for n := range b.meta.Stats.NumSeries {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		ls, metas := r.next()
		if r.err != nil {
			return fmt.Errorf("%s: %w", seriesFile, r.err)
		}
		if err := cw.WriteChunks(metas...); err != nil {
			return err
		}
		if err := iw.AddSeries(storage.SeriesRef(n), ls, metas...); err != nil { //nolint:gosec // below 2^32
			return err
		}
	}
	return nil
}

// seriesReader reads a series file. Its first error sticks.
type seriesReader struct {
	r       *bufio.Reader
	err     error
	builder labels.ScratchBuilder
	metas   []chunks.Meta
	data    []byte // of the chunks
}

func (r *seriesReader) uvarint() uint64 {
	if r.err != nil {
		return 0
	}
	var v uint64
	v, r.err = binary.ReadUvarint(r.r)
	return v
}

func (r *seriesReader) varint() int64 {
	if r.err != nil {
		return 0
	}
	var v int64
	v, r.err = binary.ReadVarint(r.r)
	return v
}

// bytes appends a length and as many bytes to dst.
func (r *seriesReader) bytes(dst []byte) []byte {
	n := r.uvarint()
	if r.err != nil {
		return dst
	}
	at := len(dst)
	dst = slices.Grow(dst, int(n))[:at+int(n)] //nolint:gosec // this process has written it
	_, r.err = io.ReadFull(r.r, dst[at:])
	return dst
}

// next gives a series; its chunks are good until the next call.
func (r *seriesReader) next() (labels.Labels, []chunks.Meta) {
	r.builder.Reset()
	for range r.uvarint() {
		name := string(r.bytes(nil))
		r.builder.Add(name, string(r.bytes(nil)))
	}
	r.metas, r.data = r.metas[:0], r.data[:0]
	for range r.uvarint() {
		m := chunks.Meta{MinTime: r.varint(), MaxTime: r.varint()}
		encoding := chunkenc.Encoding(r.uvarint()) //nolint:gosec // a byte
		at := len(r.data)
		if r.data = r.bytes(r.data); r.err != nil {
			break
		}
		if m.Chunk, r.err = chunkenc.FromData(encoding, r.data[at:len(r.data):len(r.data)]); r.err != nil {
			break
		}
		r.metas = append(r.metas, m)
	}
	return r.builder.Labels(), r.metas
}

// thanosMeta is what Thanos adds to meta.json.
type thanosMeta struct {
	Version    int               `json:"version"`
	Labels     map[string]string `json:"labels"`
	Downsample struct {
		Resolution int64 `json:"resolution"`
	} `json:"downsample"`
	Source string `json:"source"`
}

// close finishes the block and gives it its name.
func (b *blockWriter) close(ctx context.Context) (_ Exported, err error) {
	if err := b.write(ctx); err != nil {
		return Exported{}, fmt.Errorf("block %s: %w", b.meta.ULID, err)
	}
	err = errors.Join(b.file.Close(), os.Remove(b.file.Name()))
	b.file = nil
	meta := struct {
		tsdb.BlockMeta
		Thanos *thanosMeta `json:"thanos,omitempty"`
	}{BlockMeta: b.meta}
	if len(b.external) > 0 {
		meta.Thanos = &thanosMeta{Version: 1, Labels: b.external, Source: "epimetheus"}
	}
	var raw []byte
	if err == nil {
		raw, err = json.MarshalIndent(meta, "", "\t")
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(b.tmp, metaFile), raw, 0o644) //nolint:gosec // as Prometheus's
	}
	if err == nil {
		_, err = tombstones.WriteFile(slog.New(slog.DiscardHandler), b.tmp, tombstones.NewMemTombstones())
	}
	dir := filepath.Join(b.parent, b.meta.ULID.String())
	if err == nil {
		err = fileutil.Replace(b.tmp, dir)
	}
	if err != nil {
		return Exported{}, fmt.Errorf("block %s: %w", b.meta.ULID, err)
	}
	return Exported{
		Dir: dir, MinTime: b.meta.MinTime, MaxTime: b.meta.MaxTime, Series: b.meta.Stats.NumSeries, Samples: b.meta.Stats.NumSamples,
	}, nil
}

// abandon removes what there is of the block.
func (b *blockWriter) abandon() error {
	if b.file != nil {
		_ = b.file.Close() // what it has written goes
	}
	return os.RemoveAll(b.tmp)
}

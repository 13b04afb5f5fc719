package backfill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"slices"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/index"
	"github.com/prometheus/prometheus/tsdb/tombstones"
)

// What a piece of a series is bounded by.
const (
	pieceSamples = 64 << 10
	pieceBytes   = 4 << 20
)

// Column holds samples of one kind, ascending in time.
type Column[V any] struct {
	T []int64 // ms
	V []V
	// ST are the start timestamps in ms, 0 where a sample has none. It is as long
	// as T, or empty if no sample has one.
	ST []int64
}

// Series is a series, or a piece of one. All but Labels is valid until the next
// call of the Reader that returned it.
type Series struct {
	Ref    uint64 // in the block: no ref of the WAL
	Labels labels.Labels

	Floats          Column[float64]
	Histograms      Column[*histogram.Histogram]
	FloatHistograms Column[*histogram.FloatHistogram]

	// More says that another piece of the series follows. All of its samples are
	// newer than those of this one.
	More bool
}

// CorruptError is a part of a block that can't be read: the chunk, or if Chunk is
// 0 the whole series. Reading goes on behind it.
type CorruptError struct {
	Block  ulid.ULID
	Series uint64        // ref in the block
	Labels labels.Labels // empty if they can't be read
	Chunk  uint64        // ref in the block
	Err    error
}

func (e *CorruptError) Error() string {
	if e.Chunk == 0 {
		return fmt.Sprintf("block %v: series %d: %v", e.Block, e.Series, e.Err)
	}
	return fmt.Sprintf("block %v: series %d %v: chunk %d: %v", e.Block, e.Series, e.Labels, e.Chunk, e.Err)
}

// Unwrap returns the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// Progress is what a Reader has read.
type Progress struct {
	Series  uint64 // ended, with or without samples in the time range
	Samples uint64
	Bytes   uint64 // of chunks
}

// Reader reads a block. It isn't safe for concurrent use.
type Reader struct {
	id         ulid.ULID
	mint, maxt int64 // of samples to return; both inclusive
	maxSamples int   // per piece
	maxBytes   int

	block    *tsdb.Block
	index    tsdb.IndexReader
	chunks   tsdb.ChunkReader
	stones   tombstones.Reader
	pool     chunkenc.Pool
	postings index.Postings

	unread   bool    // postings stands at a ref that is still to be read
	stop     error   // what Next returns from now on
	failed   []error // to be returned before anything else
	ready    bool    // out is to be returned
	given    bool    // out was returned
	progress Progress

	// The series at hand.
	inSeries  bool
	builder   labels.ScratchBuilder
	metas     []chunks.Meta // those to be read, and not opened yet
	metasBuf  []chunks.Meta
	intervals tombstones.Intervals // deleted
	last      int64                // timestamp of the newest sample

	// The chunk at hand, or several that overlap.
	it       chunkenc.Iterator // nil if none
	held     chunkenc.ValueType
	chunk    uint64 // its ref, or the first one's
	hasST    bool
	opened   []chunkenc.Chunk
	its      [16]chunkenc.Iterator // for use again, by encoding
	deleting tsdb.DeletedIterator
	deleted  tombstones.Intervals // buffer of deleting

	out        Series
	samples    int // in out
	bytes      int // of histograms in out, roughly
	hists      []*histogram.Histogram
	floatHists []*histogram.FloatHistogram
}

// Open opens a block to read its samples from mint to maxt (ms, both inclusive).
// Afterwards it stays readable even if it is deleted. A block that is gone already
// gives fs.ErrNotExist.
func Open(b Block, mint, maxt int64) (r *Reader, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			r, err = nil, fmt.Errorf("open block %s: %v", b.Dir, p)
		}
	}()
	pool := chunkenc.NewPool()
	// OpenBlock only reads: it is tsdb.Open that repairs and tidies up.
	block, err := tsdb.OpenBlock(nil, b.Dir, pool, nil)
	if err != nil {
		return nil, fmt.Errorf("open block %s: %w", b.Dir, err)
	}
	r = &Reader{
		id: b.ULID, mint: mint, maxt: maxt, maxSamples: pieceSamples, maxBytes: pieceBytes,
		block: block, pool: pool,
	}
	// None of these fails but for a block that is being closed.
	if r.index, err = block.Index(); err == nil {
		if r.chunks, err = block.Chunks(); err == nil {
			r.stones, err = block.Tombstones()
		}
	}
	if err == nil {
		err = r.Seek(0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open block %s: %w", b.Dir, err), r.Close())
	}
	return r, nil
}

// Close releases the files.
func (r *Reader) Close() error {
	if r.block == nil {
		return nil
	}
	for _, c := range []io.Closer{r.index, r.chunks, r.stones} {
		if c != nil {
			c.Close()
		}
	}
	block := r.block
	r.block, r.stop = nil, os.ErrClosed
	return block.Close()
}

// Progress returns what was read since Open.
func (r *Reader) Progress() Progress { return r.progress }

// Seek makes Next go on at the first series with a ref of at least ref. All
// series of lower refs than one that Next returned have been returned in full.
func (r *Reader) Seek(ref uint64) (err error) {
	if r.block == nil {
		return os.ErrClosed
	}
	// The list lies in a mapped file, which may have been cut off since.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			r.stop = fmt.Errorf("block %v: list of series: %v", r.id, p)
			err = r.stop
		}
	}()
	r.endChunk()
	r.stop, r.failed, r.ready, r.given, r.inSeries = nil, nil, false, true, false
	name, value := index.AllPostingsKey()
	// No request: nothing here waits.
	p, err := r.index.Postings(context.Background(), name, value)
	if err != nil {
		r.stop = fmt.Errorf("block %v: list of series: %w", r.id, err)
		return r.stop
	}
	r.postings, r.unread = p, false
	switch {
	case ref > math.MaxUint32: // refs have 32 bits, and the list's own Seek cuts them off
		r.stop = io.EOF
	case ref > 0: // a fresh list takes itself to be at 0
		if r.unread = p.Seek(storage.SeriesRef(ref)); !r.unread {
			r.stop = io.EOF
		}
	}
	return nil
}

// Next returns the next series, or piece of one, that has samples in the time
// range, or io.EOF. After a *CorruptError it goes on with what else can be read of
// the same series, or the next one. Any other error stays.
func (r *Reader) Next(ctx context.Context) (*Series, error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for {
		switch {
		case len(r.failed) > 0:
			err := r.failed[0]
			r.failed = r.failed[1:]
			return nil, err
		case r.ready:
			r.ready, r.given = false, true
			return &r.out, nil
		case r.stop != nil:
			return nil, r.stop
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
		r.step()
	}
}

// step does a bounded amount of work. A panic of Prometheus's decoders, or a fault
// in a mapped file, ends the chunk or series that it came from.
func (r *Reader) step() {
	advancing := false
	defer func() {
		p := recover()
		switch err, isErr := p.(error); {
		case p == nil:
		case advancing:
			r.stop = fmt.Errorf("block %v: list of series: %v", r.id, p)
		case isErr:
			r.fail(r.chunk, err)
		default:
			r.fail(r.chunk, fmt.Errorf("%v", p))
		}
		if p != nil {
			r.its = [len(r.its)]chunkenc.Iterator{} // whatever state they are in
			r.opened = nil
			r.endChunk()
		}
	}()
	if r.given {
		r.reset()
		r.given = false
	}
	if r.inSeries {
		r.fill()
		return
	}
	if !r.unread {
		advancing = true
		ok := r.postings.Next()
		if !ok {
			if r.stop = r.postings.Err(); r.stop == nil {
				r.stop = io.EOF
			}
			return
		}
		advancing = false
	}
	r.unread = false
	r.load(r.postings.At())
}

// fail notes that a chunk, or if it is 0 the series, can't be read.
func (r *Reader) fail(chunk uint64, err error) {
	r.failed = append(r.failed, &CorruptError{r.id, r.out.Ref, r.out.Labels, chunk, err})
}

// load begins with a series.
func (r *Reader) load(ref storage.SeriesRef) {
	r.out.Ref, r.out.Labels = uint64(ref), labels.EmptyLabels()
	if err := r.index.Series(ref, &r.builder, &r.metasBuf); err != nil {
		r.fail(0, err)
		return
	}
	r.out.Labels = r.builder.Labels()
	var err error
	if r.intervals, err = r.stones.Get(ref); err != nil {
		r.fail(0, err)
		return
	}
	r.metas = slices.DeleteFunc(r.metasBuf, func(m chunks.Meta) bool {
		return m.MaxTime < r.mint || m.MinTime > r.maxt ||
			tombstones.Interval{Mint: m.MinTime, Maxt: m.MaxTime}.IsSubrange(r.intervals)
	})
	byMinTime := func(a, b chunks.Meta) int { return cmp.Compare(a.MinTime, b.MinTime) }
	// Prometheus's index writer refuses chunks that overlap or aren't sorted, but
	// it did not always, and isn't the only one.
	if !slices.IsSortedFunc(r.metas, byMinTime) {
		slices.SortStableFunc(r.metas, byMinTime)
	}
	r.last = math.MinInt64
	r.inSeries = true
}

// fill reads the chunk at hand, or the next one, until its end or that of the
// piece.
func (r *Reader) fill() {
	if r.it == nil {
		if len(r.metas) == 0 {
			r.inSeries = false
			r.progress.Series++
			r.ready = r.samples > 0
			return
		}
		if r.openChunk(); r.it == nil {
			return // it couldn't be read
		}
	}
	vt := r.held
	r.held = chunkenc.ValNone
	if vt == chunkenc.ValNone {
		vt = r.it.Next()
	}
	for vt != chunkenc.ValNone {
		if r.samples >= r.maxSamples || r.bytes >= r.maxBytes {
			r.held, r.out.More, r.ready = vt, true, true
			return
		}
		var err error
		if vt, err = r.take(vt); err != nil {
			r.fail(r.chunk, err)
			r.endChunk()
			return
		}
	}
	if err := r.it.Err(); err != nil {
		r.fail(r.chunk, err)
	}
	r.endChunk()
}

// openChunk opens the next chunk, together with those that overlap it.
func (r *Reader) openChunk() {
	n, mint, maxt := 1, r.metas[0].MinTime, r.metas[0].MaxTime
	for n < len(r.metas) && r.metas[n].MinTime <= maxt {
		maxt = max(maxt, r.metas[n].MaxTime)
		n++
	}
	metas := r.metas[:n]
	r.metas = r.metas[n:]
	r.hasST = false
	for _, m := range metas {
		r.chunk = uint64(m.Ref)
		c, _, err := r.chunks.ChunkOrIterable(m)
		if err != nil {
			r.fail(r.chunk, err)
			continue
		}
		r.opened = append(r.opened, c)
		r.progress.Bytes += uint64(len(c.Bytes()))
		switch c.Encoding() {
		case chunkenc.EncXOR, chunkenc.EncHistogram, chunkenc.EncFloatHistogram:
		default:
			r.hasST = true
		}
	}
	r.chunk = uint64(metas[0].Ref)
	switch len(r.opened) {
	case 0:
		return
	case 1:
		enc := r.opened[0].Encoding()
		it := r.opened[0].Iterator(r.its[enc])
		r.its[enc], r.it = it, it
	default:
		// As Prometheus's querier merges blocks that overlap: of samples of one
		// timestamp it takes any, and hints of histograms that were not
		// neighbours become unknown.
		its := make([]chunkenc.Iterable, 0, len(r.opened))
		for _, c := range r.opened {
			its = append(its, c)
		}
		r.it = storage.ChainSampleIteratorFromIterables(nil, its)
	}
	// What is outside of the time range counts as deleted. This isn't left to
	// Intervals.Add, which panics when something up to the greatest time is added
	// to several intervals.
	deleted := r.deleted[:0]
	if mint < r.mint {
		deleted = append(deleted, tombstones.Interval{Mint: math.MinInt64, Maxt: r.mint - 1})
	}
	for _, i := range r.intervals {
		if i.Mint <= min(maxt, r.maxt) && i.Maxt >= max(mint, r.mint) {
			deleted = append(deleted, i)
		}
	}
	if maxt > r.maxt {
		deleted = append(deleted, tombstones.Interval{Mint: r.maxt + 1, Maxt: math.MaxInt64})
	}
	r.deleted, r.deleting.Intervals = deleted, deleted
	if len(deleted) > 0 {
		r.deleting.Iter = r.it
		r.it = &r.deleting
	}
}

func (r *Reader) endChunk() {
	for _, c := range r.opened {
		_ = r.pool.Put(c) // fails for chunks that aren't the pool's
	}
	clear(r.opened)
	r.opened = r.opened[:0]
	r.it, r.held, r.chunk = nil, chunkenc.ValNone, 0
}

var errUnsorted = errors.New("its samples are not sorted by time")

// take adds the sample that it stands at and those behind it of the same kind, as
// far as the piece has room. It returns what it then stands at.
func (r *Reader) take(vt chunkenc.ValueType) (chunkenc.ValueType, error) {
	switch vt {
	case chunkenc.ValFloat:
		return r.takeFloats()
	case chunkenc.ValHistogram:
		return take(r, vt, &r.out.Histograms, func(n int) (int64, *histogram.Histogram) {
			if n == len(r.hists) {
				r.hists = append(r.hists, new(histogram.Histogram))
			}
			t, h := r.it.AtHistogram(r.hists[n])
			r.bytes += histogramBytes(len(h.PositiveSpans)+len(h.NegativeSpans), len(h.PositiveBuckets)+len(h.NegativeBuckets))
			return t, h
		})
	case chunkenc.ValFloatHistogram:
		return take(r, vt, &r.out.FloatHistograms, func(n int) (int64, *histogram.FloatHistogram) {
			if n == len(r.floatHists) {
				r.floatHists = append(r.floatHists, new(histogram.FloatHistogram))
			}
			t, h := r.it.AtFloatHistogram(r.floatHists[n])
			r.bytes += histogramBytes(len(h.PositiveSpans)+len(h.NegativeSpans), len(h.PositiveBuckets)+len(h.NegativeBuckets))
			return t, h
		})
	default:
		return 0, fmt.Errorf("unknown kind of sample %v", vt)
	}
}

func histogramBytes(spans, buckets int) int { return 200 + 8*(spans+buckets) }

// takeFloats is take for floats, which is where the time goes.
func (r *Reader) takeFloats() (chunkenc.ValueType, error) {
	if r.hasST {
		return take(r, chunkenc.ValFloat, &r.out.Floats, func(int) (int64, float64) { return r.it.At() })
	}
	it, c, last := r.it, &r.out.Floats, r.last
	ts, vs, n := c.T, c.V, len(c.T)
	vt := chunkenc.ValFloat
	var err error
	for room := r.maxSamples - r.samples; vt == chunkenc.ValFloat && room > 0; vt = it.Next() {
		t, v := it.At()
		if t <= last {
			if t < last {
				err = errUnsorted
				break
			}
			continue
		}
		last = t
		ts, vs = append(ts, t), append(vs, v)
		room--
	}
	c.T, c.V, r.last = ts, vs, last
	r.count(len(ts) - n)
	if len(c.ST) > 0 {
		c.ST = append(c.ST, make([]int64, len(ts)-n)...)
	}
	return vt, err
}

// take adds to a column; at returns the sample that r.it stands at, as the nth of
// the column.
func take[V any](r *Reader, kind chunkenc.ValueType, c *Column[V], at func(n int) (int64, V)) (chunkenc.ValueType, error) {
	vt := kind
	for ; vt == kind && r.samples < r.maxSamples && r.bytes < r.maxBytes; vt = r.it.Next() {
		t, v := at(len(c.T))
		if t <= r.last {
			if t < r.last {
				return vt, errUnsorted
			}
			continue
		}
		r.last = t
		c.T, c.V = append(c.T, t), append(c.V, v)
		var st int64
		if r.hasST {
			st = r.it.AtST()
		}
		if st != 0 && len(c.ST) == 0 {
			c.ST = append(c.ST, make([]int64, len(c.T)-1)...)
		}
		if st != 0 || len(c.ST) > 0 {
			c.ST = append(c.ST, st)
		}
		r.count(1)
	}
	return vt, nil
}

func (r *Reader) count(n int) {
	r.samples += n
	r.progress.Samples += uint64(n)
}

// reset empties out, and keeps its buffers.
func (r *Reader) reset() {
	r.samples, r.bytes, r.out.More = 0, 0, false
	r.out.Floats.empty()
	r.out.Histograms.empty()
	r.out.FloatHistograms.empty()
}

func (c *Column[V]) empty() {
	clear(c.V) // what it points to is kept elsewhere, or of no more use
	c.T, c.V, c.ST = c.T[:0], c.V[:0], c.ST[:0]
}

package merge

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/internal/sorted"
)

// Querier is one query: all its selectors read one snapshot of history. It is a
// storage.Querier.
type Querier struct {
	s          *Storage
	mint, maxt int64

	listing sync.Mutex // held while snap is taken: Close and selectors that read heads don't wait for that
	snap    *history.Snapshot
	listed  time.Time // before snap was

	mu      sync.Mutex
	cancels []context.CancelFunc
	queue   []func() // selectors that are to be read, in order
	reading int      // goroutines that read them, see readingAtOnce
	selects sync.WaitGroup
	closed  bool
	alone   bool
	kept    []func() // give back the memory of what heads gave
	left    bool     // others may use that for longer
}

// Alone says that the query has one selector: nothing goes on beside its reading, so whoever waits for it
// does it. To wake another goroutine takes a good part of what a small query does. Call it before the others.
func (q *Querier) Alone() { q.alone = true }

// readingAtOnce is how many selectors of a query are read at the same time: each asks all
// ingesters, and may have some 32 MiB of pages under way.
const readingAtOnce = 16

// begin has fn read, and gives what waits for that: who waits for what hasn't been begun
// does it. The caller holds q.mu.
func (q *Querier) begin(fn func()) (wait func()) {
	if q.alone {
		return sync.OnceFunc(fn)
	}
	var begun atomic.Bool
	ready := make(chan struct{})
	once := func() {
		if !begun.CompareAndSwap(false, true) {
			<-ready
			return
		}
		defer close(ready)
		fn()
	}
	q.queue = append(q.queue, once)
	if q.reading < readingAtOnce {
		q.reading++
		q.selects.Go(q.read)
	}
	return once
}

// read reads what is in the queue, to its end.
func (q *Querier) read() {
	for {
		q.mu.Lock()
		if len(q.queue) == 0 {
			q.reading--
			q.mu.Unlock()
			return
		}
		fn := q.queue[0]
		q.queue[0], q.queue = nil, q.queue[1:]
		q.mu.Unlock()
		fn()
	}
}

// done waits for nothing.
func done() {}

// snapshot is taken once, after the first heads have answered. Heads that are
// asked later in the query need no newer one: a generation that they don't show
// any more was published a visibility delay before, which is longer than a query.
// But a member that has left meanwhile, or has restarted, shows nothing of what it has
// just published: what is listed before since won't do then.
func (q *Querier) snapshot(ctx context.Context, must []ulid.ULID, since time.Time) (*history.Snapshot, error) {
	q.listing.Lock()
	defer q.listing.Unlock()
	if q.snap == nil || since.After(q.listed) {
		now := time.Now()
		snap, err := q.s.snapshot(ctx, q.s.tenantOf(ctx), q.mint, q.maxt, must, since)
		if err != nil {
			return nil, err
		}
		q.snap, q.listed = snap, now
		account.From(ctx).AddHistory(snap.Stats)
	}
	return q.snap, nil
}

// Close ends what Select has started. No series is used after it: memory that they lie in is
// for other queries then.
func (q *Querier) Close() error {
	q.mu.Lock()
	q.closed, q.queue = true, nil
	for _, c := range q.cancels {
		c()
	}
	q.mu.Unlock()
	q.selects.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.left {
		for _, release := range q.kept {
			release()
		}
	}
	q.kept = nil
	return nil
}

// keep is fetch.Query's Keep.
func (q *Querier) keep(release func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.kept = append(q.kept, release)
}

// leave leaves the memory of what heads gave to the garbage collector.
func (q *Querier) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.left = true
}

var errClosed = errors.New("querier is closed")

// Select starts to read at once, see Alone; the set waits for it. The selectors of a query
// are so read at the same time, as far as readingAtOnce lets them.
func (q *Querier) Select(ctx context.Context, _ bool, hints *storage.SelectHints, ms ...*labels.Matcher) storage.SeriesSet {
	ctx, cancel := context.WithCancel(ctx)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		cancel()
		return storage.ErrSeriesSet(errClosed)
	}
	q.cancels = append(q.cancels, cancel)
	sel := newSelection(ctx, q, hints, ms)
	set := &seriesSet{ctx: ctx, account: account.From(ctx)}
	set.wait = q.begin(func() {
		sel.open(ctx)
		sel.read(ctx, set, sel.mint, sel.maxt)
	})
	return set
}

// Selection asks the heads at once, see Alone; the series are read when Set is called. The
// selection is good until the Querier is closed. With newest, of each series only the
// newest sample is wanted, and heads may give no others.
func (q *Querier) Selection(ctx context.Context, newest bool, hints *storage.SelectHints, ms ...*labels.Matcher) *Selection {
	ctx, cancel := context.WithCancel(ctx)
	sel := newSelection(ctx, q, hints, ms)
	sel.newest = newest
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		cancel()
		sel.err, sel.wait = errClosed, done
		return sel
	}
	q.cancels = append(q.cancels, cancel)
	sel.wait = q.begin(func() { sel.open(ctx) })
	return sel
}

// SamplesFrom is the first time in ms of which there may be samples, where summaries of
// windows are kept for longer; else math.MinInt64.
func (q *Querier) SamplesFrom(ctx context.Context) (int64, error) {
	from, err := q.s.history.SamplesFrom(ctx, q.s.tenantOf(ctx))
	return from, class(ctx, err)
}

// class puts an error into one of the classes for which Prometheus's API has
// status codes: the query was cancelled, it took too long, or the storage failed,
// which is not the fault of the query.
func class(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(context.Cause(ctx), account.ErrLimit):
		return context.Cause(ctx)
	case errors.Is(ctx.Err(), context.Canceled):
		return promql.ErrQueryCanceled("reading of samples")
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		if _, ok := errors.AsType[promql.ErrQueryTimeout](context.Cause(ctx)); ok {
			return context.Cause(ctx) // it names the limit
		}
		return promql.ErrQueryTimeout("reading of samples")
	}
	return promql.ErrStorage{Err: err}
}

// LabelValues implements storage.LabelQuerier.
func (q *Querier) LabelValues(ctx context.Context, name string, hints *storage.LabelHints, ms ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return q.labels(ctx, name, hints, ms, func(s *history.Snapshot) ([]string, error) {
		return s.LabelValues(ctx, name, ms, q.mint, q.maxt)
	})
}

// LabelNames implements storage.LabelQuerier.
func (q *Querier) LabelNames(ctx context.Context, hints *storage.LabelHints, ms ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return q.labels(ctx, "", hints, ms, func(s *history.Snapshot) ([]string, error) {
		return s.LabelNames(ctx, ms, q.mint, q.maxt)
	})
}

// textBytes is what a string takes beside its text.
const textBytes = 16

func (q *Querier) labels(ctx context.Context, name string, hints *storage.LabelHints, ms []*labels.Matcher, old func(*history.Snapshot) ([]string, error)) ([]string, annotations.Annotations, error) {
	tenant := q.s.tenantOf(ctx)
	fq := fetch.Query{Tenant: tenant, MinT: q.mint, MaxT: q.maxt, Matchers: ms}
	if hints != nil {
		fq.Limit = hints.Limit
	}
	as, since, warnings, err := ask(ctx, q.s.heads, tenant, func(ctx context.Context, c *fetch.Client) ([]string, fetch.Header, error) {
		return c.Labels(ctx, fq, name)
	})
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	snap, err := q.snapshot(ctx, blocks(as), since)
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	out, err := old(snap)
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	if !snap.Hidden.All(q.mint, q.maxt) {
		lists := [][]string{out}
		for _, a := range as {
			lists = append(lists, a.value)
		}
		out = sorted.Union(lists...)
	}
	bytes := int64(0)
	for _, text := range out {
		bytes += textBytes + int64(len(text))
	}
	account.From(ctx).Hold(bytes) // to the request's end: the caller keeps them
	if ctx.Err() != nil {
		return nil, nil, class(ctx, ctx.Err())
	}
	if fq.Limit > 0 && len(out) > fq.Limit {
		out = out[:fq.Limit]
	}
	return out, warnings, nil
}

// seriesSet merges what heads and history have, by labels.
type seriesSet struct {
	ctx  context.Context //nolint:containedctx // storage.SeriesSet has no other place for it
	wait func()          // until the fields below are set

	err           error
	warnings      annotations.Annotations
	mint, maxt    int64
	shard, shards uint64            // of the hints
	in            []bool            // shards that are wanted, see Shards
	hash          []byte            // scratch
	left          int               // series that may still be given; -1: all
	heads         [][]fetch.Series  // each ascending in labels; what is left
	snap          *history.Snapshot // says what is hidden of heads too; nil: nothing is
	labelsOnly    bool
	old           *history.SeriesSet
	more          bool // old has a present series

	account *account.Account
	of      *Selection         // which counts the series; nil: each counts
	given   int64              // series so far
	streams bool               // series aren't kept by the caller
	sums    *history.Summaries // that are wanted; nil: none
	held    int64              // bytes of history, as the account was told

	at *Series

	// What follows is memory for series.
	room [][]Series
	used int // of the series in room
}

// next gives an empty series.
func (s *seriesSet) next() *Series {
	const atOnce = 32
	if s.used == atOnce*len(s.room) {
		few, chunks := make([]Series, atOnce), make([][]fetch.Chunk, atOnce*len(s.heads))
		for i := range few {
			few[i].heads, chunks = chunks[:0:len(s.heads)], chunks[len(s.heads):]
		}
		s.room = append(s.room, few)
	}
	at := &s.room[s.used/atOnce][s.used%atOnce]
	s.used++
	*at = Series{heads: at.heads[:0]}
	return at
}

// Forget says that the series so far aren't used any more: their memory is for the next ones.
func (s *seriesSet) Forget() { s.used = 0 }

// hold tells the account what is held of history.
func (s *seriesSet) hold() {
	bytes := s.old.Bytes()
	if s.streams {
		bytes = s.old.Held()
	}
	bytes += s.old.IndexBytes()
	s.account.Hold(bytes - s.held)
	s.held = bytes
}

// Release lets go of pages that the set holds. It is for a set that is not read to its
// end, and of no more use afterwards.
func (s *seriesSet) Release() {
	s.wait()
	s.account.Hold(-s.held)
	s.held, s.old, s.more, s.left = 0, nil, false, 0
}

// readHistory begins to read blocks.
func (s *seriesSet) readHistory(ctx context.Context, snap *history.Snapshot, ms []*labels.Matcher) {
	width := int64(0)
	if s.sums != nil {
		width = s.sums.Width
	}
	lacks := onlySummaries(snap, s.mint, s.maxt, width)
	wanted := snap
	if len(s.in) > 0 {
		var hash []byte
		wanted = snap.Only(func(ls labels.Labels) (ok bool) {
			ok, hash = s.wants(ls, hash)
			return ok
		})
	}
	if s.sums == nil && s.left < 0 && s.shards == 0 {
		// Of summaries the caller may not want all: it reads samples then.
		wanted = wanted.Expecting(s.expect)
	}
	old, err := s.from(ctx, wanted, ms)
	if err == nil {
		if until := old.GoneUntil(); lacks == nil && until > math.MinInt64 { // kept for longer now than they were
			what := "samples"
			if s.sums != nil {
				what = finer
			}
			lacks = warning(until+1, what, hourly)
		}
		if lacks != nil {
			s.warnings = annotations.New().Merge(s.warnings) // those of the selection are others' too
			s.warnings.Add(lacks)
		}
		s.old = old
		s.more = old.Next(ctx)
		err = old.Err()
		s.hold()
	}
	s.err = class(ctx, err)
}

func (s *seriesSet) Next() bool {
	s.wait()
	for s.err == nil && s.left != 0 {
		if err := s.ctx.Err(); err != nil { // who takes them may be slow
			s.err = class(s.ctx, err)
			return false
		}
		ls, ok := s.least()
		if !ok {
			return false
		}
		at := s.next()
		at.labels, at.mint, at.maxt, at.summaries, at.snap = ls, s.mint, s.maxt, s.sums, s.snap
		if s.snap != nil && s.snap.Hidden != nil {
			at.hiddenSamples = s.snap.Hidden.Of(ls)
			switch at.hidden = at.hiddenSamples; {
			case s.sums != nil:
				at.hidden = s.snap.Hidden.OfWindows(ls, s.sums.Width)
			case s.labelsOnly:
				at.hidden = s.snap.Hidden.OfAll(ls)
			}
		}
		elsewhere := false // it has samples, at other times
		for i := range s.heads {
			if h := s.heads[i]; len(h) > 0 && labels.Equal(h[0].Labels, ls) {
				if slices.ContainsFunc(h[0].Chunks, at.shows) {
					at.heads = append(at.heads, h[0].Chunks)
				}
				elsewhere = elsewhere || len(h[0].Chunks) > 0
				s.heads[i] = h[1:]
			}
		}
		if s.more && labels.Equal(s.old.At().Labels, ls) {
			at.old = s.old.At()
			if s.more = s.old.Next(s.ctx); !s.more {
				s.err = class(s.ctx, s.old.Err())
			}
			s.hold()
		}
		if ok, s.hash = s.wants(ls, s.hash); !ok || elsewhere && len(at.heads) == 0 && at.old == nil {
			s.used--
			continue
		}
		if s.left > 0 {
			s.left--
		}
		if err := s.count(at); err != nil {
			s.err = err
			return false
		}
		s.at = at
		return true
	}
	return false
}

// wants says whether a series is in the shard of the hints, and in one of those that are wanted. buf is scratch
// memory.
func (s *seriesSet) wants(ls labels.Labels, buf []byte) (bool, []byte) {
	if s.shards > 0 && labels.StableHash(ls)%s.shards != s.shard {
		return false, buf
	}
	n := uint64(len(s.in))
	if n == 0 {
		return true, buf
	}
	k, buf := shardOf(ls, n, buf)
	return s.in[k], buf
}

// count tells the account of the next series.
func (s *seriesSet) count(at *Series) error {
	s.given++
	if s.of != nil {
		return s.of.AddSeries(s.given, at.samples())
	}
	return s.account.AddSeries(1, at.samples())
}

// expect tells the account of what all series of history will count, at the least.
func (s *seriesSet) expect(series, samples int64) {
	have := s.account.Series() // first: those of other sets of the selection may be added meanwhile
	if s.of != nil {
		series = max(0, series-s.of.series.Load())
	}
	s.account.Expect(have+series, samples)
}

// least finds the least labels among the next of all lists.
func (s *seriesSet) least() (least labels.Labels, ok bool) {
	if s.more {
		least, ok = s.old.At().Labels, true
	}
	for _, h := range s.heads {
		if len(h) > 0 && (!ok || labels.Compare(h[0].Labels, least) < 0) {
			least, ok = h[0].Labels, true
		}
	}
	return least, ok
}

func (s *seriesSet) At() storage.Series { return s.at }

func (s *seriesSet) Err() error {
	s.wait()
	return s.err
}

func (s *seriesSet) Warnings() annotations.Annotations {
	s.wait()
	return s.warnings
}

// Series is what the queriers of a Storage give. It is decoded when it is read.
type Series struct {
	labels     labels.Labels
	mint, maxt int64
	hidden     []chunkfmt.Range // of what is wanted, samples or windows
	snap       *history.Snapshot

	hiddenSamples []chunkfmt.Range

	heads     [][]fetch.Chunk    // of each ingester that has it
	old       *history.Series    // nil: none
	summaries *history.Summaries // that are wanted; nil: none
}

// shows says whether a chunk may have samples that are to be read.
func (s *Series) shows(c fetch.Chunk) bool {
	mint, maxt := max(c.MinT, s.mint), min(c.MaxT, s.maxt)
	return mint <= maxt && !history.Covers(s.hidden, mint, maxt)
}

// samples is about how many there are.
func (s *Series) samples() int64 {
	n := 0
	if s.old != nil {
		n = s.old.Samples()
	}
	for _, cs := range s.heads {
		for _, c := range cs {
			n += c.Samples()
		}
	}
	return int64(n)
}

// Labels implements storage.Labels.
func (s *Series) Labels() labels.Labels { return s.labels }

// Iterator implements storage.SampleIterable.
func (s *Series) Iterator(it chunkenc.Iterator) chunkenc.Iterator {
	mine, ok := it.(*iterator)
	if !ok {
		mine = &iterator{}
	}
	cols, err := s.Columns(&mine.buffer)
	if err != nil {
		cols, err = &chunkfmt.Series{}, promql.ErrStorage{Err: err}
	}
	mine.reset(cols, err)
	return mine
}

// Buffer is memory that one goroutine decodes into, again and again.
type Buffer struct {
	// Whole chooses the histograms with integer counts that get their buckets, where all are of history; nil: all do.
	Whole chunkfmt.Whole

	heads []*headBuffer
	runs  []*chunkfmt.Series
	old   history.Buffer

	fresh, windows rollup.Windows
	summariser     rollup.Summariser
	times, values  uint64
	falls          []history.Span
}

// Times names the times of the floats that Columns gave last: where it is the same, and not 0, they are the same.
func (b *Buffer) Times() uint64 { return b.times }

// Values names the values of the floats that Columns gave last: where it is the same, and not 0, so are times and values. It
// tells nothing of what other buffers are used for.
func (b *Buffer) Values() uint64 { return b.values }

// Falls says where, among the values of the floats that Columns gave last, one may be less than the one before it, or NaN:
// no other is. It ascends, and is good until the buffer is used again.
func (b *Buffer) Falls() []history.Span { return b.falls }

// headBuffer is what the chunks of one head are decoded into.
type headBuffer struct {
	decoder fetch.Decoder
	trimmed chunkfmt.Series
}

// head gives the i-th.
func (b *Buffer) head(i int) *headBuffer {
	for len(b.heads) <= i {
		b.heads = append(b.heads, &headBuffer{})
	}
	return b.heads[i]
}

// Columns gives the samples of the series in the time that was selected, merged.
// They may lie in the memory of buf: they are good until it is used again, and
// aren't to be changed.
func (s *Series) Columns(buf *Buffer) (*chunkfmt.Series, error) {
	var runs []*chunkfmt.Series
	buf.times, buf.values = 0, 0
	if s.old != nil {
		var err error
		if buf.old.Whole = buf.Whole; len(s.heads) > 0 {
			buf.old.Whole = nil
		}
		runs, err = s.old.Runs(&buf.old)
		if buf.old.Whole = nil; err != nil {
			return nil, err
		}
		if len(runs) == 1 && len(s.heads) == 0 {
			// They are given as they are.
			buf.times, buf.values, buf.falls = buf.old.Times(), buf.old.Values(), append(buf.falls[:0], buf.old.Falls()...)
			return runs[0], nil
		}
	}
	cols, err := s.merged(buf, runs, s.mint, s.maxt, s.hidden)
	if err == nil {
		buf.falls = append(buf.falls[:0], history.Span{To: len(cols.Floats.V)})
	}
	return cols, err
}

// merged puts what heads have in mint to maxt, but for what is hidden, together with
// runs of history.
func (s *Series) merged(buf *Buffer, runs []*chunkfmt.Series, mint, maxt int64, hidden []chunkfmt.Range) (*chunkfmt.Series, error) {
	runs = append(buf.runs[:0], runs...)
	for i, cs := range s.heads {
		h := buf.head(i)
		run, err := h.decoder.Decode(cs)
		if err != nil {
			return nil, err
		}
		trim(&h.trimmed, run, max(mint, s.mint), min(maxt, s.maxt))
		history.Cut(&h.trimmed, hidden)
		runs = append(runs, &h.trimmed)
	}
	buf.runs = runs
	if len(runs) == 0 {
		return &chunkfmt.Series{}, nil
	}
	return chunkfmt.Merge(runs...), nil
}

package history

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync/atomic"

	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// batchBytes is about how many bytes of data pages a SeriesSet fetches ahead.
const batchBytes = 32 << 20

// SeriesSet gives the series of a Select, in order of labels.Compare if not said
// otherwise. Pages of
// samples are fetched in batches as it goes on. Not for concurrent use; it needs
// no closing.
type SeriesSet struct {
	s      *Snapshot
	series []*Series // not yet loaded ones have no pages
	next   int
	loaded int                   // so many series have their pages
	pages  map[pageKey]*heldPage // of the last batch
	bytes  int64                 // of pages that were taken so far
	held   int64                 // of pages
	index  int64                 // of what blocks say of the series
	gone   int64                 // as GoneUntil
	err    error
}

// heldPage is a page that series hold on to.
type heldPage struct {
	want
	page
	beside []*heldPage // pages with other columns of the same windows
}

// Series is a series with its samples, still encoded: it takes about as much
// memory as its samples take in the store. It stays valid after its set has gone
// on, and is safe for concurrent use.
type Series struct {
	Labels labels.Labels

	mint, maxt int64
	hidden     []chunkfmt.Range // ascending
	s          *Snapshot
	parts      []part

	found int // parts that there will be

	// Of SelectWindows: what is read, and from which parts, ascending and disjoint.
	summaries Summaries
	pieces    []piece
	samples   []chunkfmt.Range // as hidden, of samples: hidden is of windows, and of samples that windows are made of
}

// part is what one block has of a series.
type part struct {
	block  *Block
	chunks []chunkfmt.Chunk
	pages  []*heldPage // of each chunk

	// Of SelectWindows. Windows stand for the samples in covered, ascending whole
	// windows; chunks are those that have others.
	entry       chunkfmt.WindowEntry
	windows     []chunkfmt.Chunk
	windowPages []*heldPage
	covered     []chunkfmt.Range // where its samples aren't read
}

// Select returns the series that match all of ms and may have samples in mint to
// maxt, both included, in ms.
func (s *Snapshot) Select(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) (*SeriesSet, error) {
	return s.SelectOrdered(ctx, ms, mint, maxt, nil)
}

// SelectOrdered is Select, in order of what key gives of the series' labels.
func (s *Snapshot) SelectOrdered(ctx context.Context, ms []*labels.Matcher, mint, maxt int64, key func(labels.Labels) labels.Labels) (*SeriesSet, error) {
	var set *SeriesSet
	mint = s.samplesFrom(mint)
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		held := tally{s: s}
		defer held.release()
		fs, err := s.find(ctx, bs, ms, mint, maxt, &held)
		if err != nil {
			return err
		}
		set = s.seriesSet(fs, max(mint, s.MinT), min(maxt, s.MaxT))
		if s.expect != nil {
			samples := 0
			for _, x := range set.series {
				samples += x.Samples()
			}
			if s.expect(int64(len(set.series)), int64(samples)); ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		if key != nil {
			keys := make(map[*Series]labels.Labels, len(set.series))
			for _, x := range set.series {
				keys[x] = key(x.Labels)
			}
			slices.SortStableFunc(set.series, func(a, b *Series) int { return labels.Compare(keys[a], keys[b]) })
		}
		return set.load(ctx) // here, where an absent object can be made good
	})
	if err != nil {
		return nil, err
	}
	return set, nil
}

func (s *Snapshot) seriesSet(fs []found, mint, maxt int64) *SeriesSet {
	out := &SeriesSet{s: s, gone: math.MinInt64}
	most, all := 0, 0
	for _, f := range fs {
		most, all = max(most, len(f.entries)), all+len(f.entries)
	}
	sets, of := newLabelSets(most), make([]*Series, 0, all) // of: by entry
	out.series = make([]*Series, 0, most)
	for _, f := range fs {
		out.index += f.bytes
		for i := range f.entries {
			e := &f.entries[i]
			out.gone = max(out.gone, goneUntil(e.Gone, mint, maxt))
			if len(e.Chunks) == 0 || e.Gone != nil && !s.keeps(e.Labels) {
				of = append(of, nil) // only exemplars in that time, or summaries
				continue
			}
			at, added := sets.add(e.Labels)
			if added {
				out.series = append(out.series, &Series{Labels: e.Labels, mint: mint, maxt: maxt, hidden: s.Hidden.Of(e.Labels), s: s})
			}
			out.series[at].found++
			of = append(of, out.series[at])
		}
	}
	for _, f := range fs {
		for i := range f.entries {
			s := of[0]
			if of = of[1:]; s == nil {
				continue
			}
			if s.parts == nil {
				s.parts = make([]part, 0, s.found)
			}
			s.parts = append(s.parts, part{block: f.block, chunks: f.entries[i].Chunks})
		}
	}
	slices.SortFunc(out.series, func(a, b *Series) int { return labels.Compare(a.Labels, b.Labels) })
	return out
}

// GoneUntil is the last time in ms, of what was selected, at which there are but
// summaries of windows of a series, or of a SelectWindows but such of wider windows;
// math.MinInt64 if there is none.
func (ss *SeriesSet) GoneUntil() int64 { return ss.gone }

// GoneUntil is the last time in mint to maxt, both included, in ms, at which there are but
// summaries of windows of a series that SelectWindows gave; math.MinInt64 if there is none.
func (s *Series) GoneUntil(mint, maxt int64) int64 {
	until := int64(math.MinInt64)
	for i := range s.parts {
		until = max(until, goneUntil(s.parts[i].entry.Gone, max(mint, s.mint), min(maxt, s.maxt)))
	}
	return until
}

// goneUntil is the last time of ranges, which ascend, in mint to maxt.
func goneUntil(gone []chunkfmt.Range, mint, maxt int64) int64 {
	for _, r := range slices.Backward(gone) {
		if r.Overlaps(mint, maxt) {
			return min(r.MaxT, maxt)
		}
	}
	return math.MinInt64
}

// Len is the number of series in the set, those that were passed included.
func (ss *SeriesSet) Len() int { return len(ss.series) }

// Next goes to the next series. It returns false at the end and after an error.
func (ss *SeriesSet) Next(ctx context.Context) bool {
	if ss.err != nil || ss.next == len(ss.series) {
		ss.pages, ss.held, ss.index = nil, 0, 0
		return false
	}
	if ss.next == ss.loaded {
		if ss.err = ss.load(ctx); ss.err != nil {
			return false
		}
	}
	if ss.next > 0 {
		ss.series[ss.next-1] = nil // its pages can go when the caller is done
	}
	ss.next++
	return true
}

// At is the present series.
func (ss *SeriesSet) At() *Series { return ss.series[ss.next-1] }

// Err is why Next has returned false, nil at the end.
func (ss *SeriesSet) Err() error { return ss.err }

// load fetches the pages of the next series.
func (ss *SeriesSet) load(ctx context.Context) error {
	before, n := ss.pages, ss.loaded
	ss.pages = map[pageKey]*heldPage{}
	var absent []*heldPage
	var size int64
	holdPage := func(b *Block, kind pageKind, at chunkfmt.Location) (held *heldPage, added bool, err error) {
		w, err := b.want(kind, at)
		if err != nil {
			return nil, false, err
		}
		held, ok := ss.pages[w.key()]
		if !ok {
			if held, ok = before[w.key()]; !ok {
				held = &heldPage{want: w}
				absent = append(absent, held)
				size += w.at.Size
			}
			ss.pages[w.key()] = held
			for _, other := range held.beside {
				ss.pages[other.key()] = other
			}
		}
		return held, !ok, nil
	}
	hold := func(pt *part, kind pageKind, chunks []chunkfmt.Chunk) ([]*heldPage, error) {
		if len(chunks) == 0 {
			return nil, nil
		}
		pages := make([]*heldPage, len(chunks))
		for c := range chunks {
			held, added, err := holdPage(pt.block, kind, chunks[c].Page)
			if err != nil {
				return nil, err
			}
			if pages[c] = held; !added || kind != windowPage {
				continue
			}
			of := &ss.series[n].summaries
			for _, at := range pt.entry.Beside(of.Width, chunks[c].Page, of.Columns) {
				other, _, err := holdPage(pt.block, kind, at)
				if err != nil {
					return nil, err
				}
				held.beside = append(held.beside, other)
			}
		}
		return pages, nil
	}
	var err error
	for ; n < len(ss.series) && (size < ss.s.h.batchBytes || n == ss.loaded); n++ {
		for p := range ss.series[n].parts {
			pt := &ss.series[n].parts[p]
			if pt.pages, err = hold(pt, dataPage, pt.chunks); err != nil {
				return err
			}
			if pt.windowPages, err = hold(pt, windowPage, pt.windows); err != nil {
				return err
			}
		}
	}
	wants := make([]want, len(absent))
	for i, held := range absent {
		wants[i] = held.want
	}
	pages, err := ss.s.fetch(ctx, 0, wants)
	if err != nil {
		return err
	}
	for i, held := range absent {
		held.page = pages[i]
	}
	for _, held := range absent {
		if err := held.join(); err != nil {
			return err
		}
	}
	ss.loaded = n
	ss.bytes += size
	ss.held = 0
	for _, held := range ss.pages {
		ss.held += held.at.Size
	}
	return nil
}

// join makes one page of windows of those with its columns.
func (h *heldPage) join() error {
	if len(h.beside) == 0 {
		return nil
	}
	others := make([]*chunkfmt.WindowPage, len(h.beside))
	for i, o := range h.beside {
		others[i] = o.windows
	}
	all, err := h.windows.With(others...)
	if err != nil {
		return h.error(err)
	}
	h.windows = all
	return nil
}

// Bytes is the size, in the store, of all pages that the set has taken so far: what
// a caller holds that keeps the series.
func (ss *SeriesSet) Bytes() int64 { return ss.bytes }

// Held is the size of the pages that the set itself holds, about 32 MiB at most:
// what a caller holds that keeps no series.
func (ss *SeriesSet) Held() int64 { return ss.held }

// IndexBytes is about what the set holds beside pages, to its end: labels of its series
// and places of their chunks.
func (ss *SeriesSet) IndexBytes() int64 { return ss.index }

// Samples is about how many samples Runs will give, and Windows windows, known
// without decoding.
func (s *Series) Samples() int {
	n := 0
	for i := range s.parts {
		for _, c := range s.parts[i].chunks {
			n += c.Samples
		}
	}
	return n + s.windows()
}

// Buffer is memory that one goroutine decodes series into, again and again.
type Buffer struct {
	// Whole chooses the histograms with integer counts that get their buckets, if one run has all; nil: all do.
	Whole chunkfmt.Whole

	runs    []*runBuffer
	dec     chunkfmt.Decoder
	plans   []runPlan
	windows windowBuffer
	times   timesNames
	values  uint64
	made    uint64 // the last number that a run's values were given
	falls   []Span
	rises   []bool // of the chunks of a part
}

// Times names the times of the floats of the one run that Runs gave last: where it is the same, and not 0, they are the
// same. It is 0 if that isn't known. No two buffers give the same.
func (b *Buffer) Times() uint64 { return b.times.last }

// Values names the values of the floats of the one run that Runs gave last: where it is the same, and not 0, so are times
// and values. It is 0 if that isn't known. It tells nothing of those that other buffers give.
func (b *Buffer) Values() uint64 { return b.values }

// Falls says where, among the values of the floats of the one run that Runs gave last, one may be less than the one before
// it, or NaN: no other is. It ascends, and is good until the buffer is used again.
func (b *Buffer) Falls() []Span { return b.falls }

// note notes of the values from from up to, without, to, whether they are known to rise among themselves.
func (b *Buffer) note(v []float64, from, to int, rises bool) {
	switch {
	case from == to:
	case !rises:
		b.falls = append(b.falls, Span{from, to})
	case from > 0 && !(v[from-1] <= v[from]):
		b.falls = append(b.falls, Span{from, from + 1})
	}
}

// timesNames gives numbers to what times are made of, as the series of a target have the same.
type timesNames struct {
	last  uint64 // of the last run
	of    []chunkfmt.TimesName
	known [32]knownTimes
	next  int // of known, to be overwritten
}

// knownTimes are those of chunks one after the other, between two times in ms.
type knownTimes struct {
	number     uint64
	of         []chunkfmt.TimesName
	mint, maxt int64
}

// timesNumbers is the last one that was given.
//
//nolint:gochecknoglobals // of the process
var timesNumbers atomic.Uint64

// name sets the number of the times of a run.
func (n *timesNames) name(p *runPlan, mint, maxt int64) {
	n.of = n.of[:0]
	for _, pt := range p.parts {
		if len(pt.covered) > 0 {
			return
		}
		for i := range pt.chunks {
			if pt.chunks[i].Kind != chunkfmt.KindFloat {
				return
			}
			n.of = append(n.of, pt.pages[i].data.TimesName(pt.chunks[i].Index))
		}
	}
	for i := range n.known {
		if k := &n.known[i]; k.mint == mint && k.maxt == maxt && slices.Equal(k.of, n.of) {
			n.last = k.number
			return
		}
	}
	k := &n.known[n.next]
	n.next = (n.next + 1) % len(n.known)
	n.last = timesNumbers.Add(1)
	*k = knownTimes{n.last, append(k.of[:0], n.of...), mint, maxt}
}

// runBuffer has room for one run. The columns of the run may become parts of t
// and v.
type runBuffer struct {
	run  chunkfmt.Series
	t    []int64
	v    []float64
	last madeOf
}

// madeOf is what the run in a buffer was made of. A run of another series whose times have the same number has the same,
// and its values alone are decoded, if they aren't the same too.
type madeOf struct {
	times  uint64             // their number, 0 if not known
	values uint64             // as Buffer.Values
	falls  []Span             // as Buffer.Falls
	in     [][]chunkfmt.Range // what of the block of each part is read
	chunks []madeOfChunk      // of all parts
}

type madeOfChunk struct {
	mint, maxt int64
	samples    int
	kept       []Span // which of them
	whole      bool   // all
	values     chunkfmt.ValuesName
}

// decode makes a run of values, whose times are those that the buffer has. It reports false if they aren't, or if
// there is an error: the whole is to be decoded then.
func (r *runBuffer) decode(buf *Buffer, p *runPlan, mint, maxt int64) bool {
	l := &r.last
	if l.times == 0 || l.times != buf.times.last || len(l.in) != len(p.parts) {
		return false
	}
	k, same := 0, true
	for i, pt := range p.parts {
		if !pt.block.reads(mint, maxt, l.in[i]) {
			return false
		}
		for j := range pt.chunks {
			c := &pt.chunks[j]
			if k == len(l.chunks) || l.chunks[k].mint != c.MinT || l.chunks[k].maxt != c.MaxT || l.chunks[k].samples != c.Samples {
				return false
			}
			values := pt.pages[j].data.ValuesName(c.Index)
			same = same && l.chunks[k].values == values
			l.chunks[k].values = values
			k++
		}
	}
	t := r.run.Floats.T
	if k != len(l.chunks) {
		return false
	}
	if same {
		r.run = chunkfmt.Series{Floats: r.run.Floats}
		buf.values, buf.falls = l.values, append(buf.falls[:0], l.falls...)
		return true
	}
	v := r.v[:0]
	k = 0
	buf.falls = buf.falls[:0]
	for _, pt := range p.parts {
		for j := range pt.chunks {
			made, before := &l.chunks[k], len(v)
			k++
			if !made.whole && len(made.kept) == 0 {
				continue
			}
			var ok bool
			from := 0
			if !made.whole {
				from = made.kept[0].From
			}
			if v, ok, _ = buf.dec.Values(pt.pages[j].data, pt.chunks[j].Index, from, v); !ok {
				return false
			}
			if !made.whole {
				v = keep(v, before, made.kept)
			}
			buf.note(v, before, len(v), buf.dec.Rises())
		}
	}
	if len(v) != len(t) {
		return false
	}
	r.run = chunkfmt.Series{Floats: chunkfmt.Floats{T: t, V: v}}
	l.made(buf)
	return true
}

// made notes what values there are, which are others than before.
func (l *madeOf) made(buf *Buffer) {
	buf.made++
	buf.values = buf.made
	l.values, l.falls = buf.values, append(l.falls[:0], buf.falls...)
}

// rememberedPages is how many of the blocks that a series is in are decoded as fast as one alone.
const rememberedPages = 8

// run gives the i-th run, empty but with room for so many floats.
func (b *Buffer) run(i, floats int) *chunkfmt.Series {
	for len(b.runs) <= i {
		b.runs = append(b.runs, &runBuffer{})
	}
	r := b.runs[i]
	r.last.times, r.last.in, r.last.chunks = 0, r.last.in[:0], r.last.chunks[:0]
	if floats > cap(r.t) { // each chunk's number of samples is bounded by the format
		r.t, r.v = make([]int64, 0, floats), make([]float64, 0, floats)
	}
	r.run = chunkfmt.Series{}
	if floats > 0 {
		r.run.Floats = chunkfmt.Floats{T: r.t[:0], V: r.v[:0]}
	}
	return &r.run
}

// Runs decodes the samples in the time that was asked for. What several blocks
// have one after the other is in one run; runs may overlap and repeat each other,
// and chunkfmt.Merge makes one of them. Each ascends in time. What is returned
// lies in buf, and is good until that is used again; it isn't to be changed.
func (s *Series) Runs(buf *Buffer) ([]*chunkfmt.Series, error) {
	plans := s.plan(buf.plans[:0])
	buf.plans = plans
	defer func() {
		for _, p := range plans {
			clear(p.parts) // buffers are kept
		}
	}()
	out := make([]*chunkfmt.Series, 0, len(plans))
	buf.times.last, buf.values, buf.dec.Pages = 0, 0, rememberedPages
	buf.dec.Reuse()
	whole := buf.Whole
	if len(plans) > 1 || len(s.hidden) > 0 {
		whole = nil // they may be compared, or come to stand behind others
	}
	if len(plans) == 1 && len(s.hidden) == 0 {
		buf.times.name(&plans[0], s.mint, s.maxt)
		if len(buf.runs) > 0 && buf.runs[0].decode(buf, &plans[0], s.mint, s.maxt) {
			run := &buf.runs[0].run
			run.Labels = s.Labels
			s.s.Stats.Samples.Add(int64(len(run.Floats.T)))
			if len(run.Floats.T) > 0 {
				out = append(out, run)
			}
			return out, nil
		}
	}
	for i, p := range plans {
		run := buf.run(i, p.floats)
		run.Labels = s.Labels
		buf.falls = buf.falls[:0]
		for _, pt := range p.parts {
			if err := pt.decode(buf, i, s.mint, s.maxt, whole); err != nil {
				return nil, err
			}
		}
		if last := &buf.runs[i].last; run.Floats.ST == nil && buf.times.last != 0 {
			last.times = buf.times.last
			last.made(buf)
		}
		Cut(run, s.hidden)
		n := len(run.Floats.T) + len(run.Histograms.T) + len(run.FloatHistograms.T)
		s.s.Stats.Samples.Add(int64(n))
		if n > 0 {
			out = append(out, run)
		}
	}
	if len(out) == 1 && (len(plans) > 1 || len(s.hidden) > 0) {
		buf.falls = append(buf.falls[:0], Span{0, len(out[0].Floats.V)})
	}
	return out, nil
}

// runPlan are parts that follow each other in time.
type runPlan struct {
	parts  []*part
	maxt   int64
	floats int
}

// plan puts each part behind the first run that ends before it starts. It makes use of the memory of out, which is empty.
func (s *Series) plan(out []runPlan) []runPlan {
	for i := range s.parts { // ascending by the blocks' first times
		p := &s.parts[i]
		if len(p.chunks) == 0 {
			continue // windows stand for all
		}
		mint, maxt, floats := p.chunks[0].MinT, p.chunks[0].MaxT, 0
		for _, c := range p.chunks {
			mint, maxt = min(mint, c.MinT), max(maxt, c.MaxT)
			if c.Kind == chunkfmt.KindFloat {
				floats += c.Samples
			}
		}
		at := slices.IndexFunc(out, func(r runPlan) bool { return r.maxt < mint })
		if at < 0 {
			if at = len(out); at < cap(out) {
				out = out[:at+1]
				out[at] = runPlan{parts: out[at].parts[:0]}
			} else {
				out = append(out, runPlan{})
			}
		}
		r := &out[at]
		r.parts, r.maxt, r.floats = append(r.parts, p), maxt, r.floats+floats
	}
	return out
}

// decode appends the part's samples in mint to maxt to the i-th run of a buffer, which ends before it
// starts.
func (p *part) decode(buf *Buffer, i int, mint, maxt int64, whole chunkfmt.Whole) error {
	run := &buf.runs[i].run
	in := subtract(p.block.readable(mint, maxt), p.covered)
	all := !slices.ContainsFunc(p.chunks, func(c chunkfmt.Chunk) bool {
		return !slices.ContainsFunc(in, func(r chunkfmt.Range) bool { return r.MinT <= c.MinT && c.MaxT <= r.MaxT })
	})
	if whole != nil && !all {
		whole = withEdges(whole, in)
	}
	floats, hists, floatHists := len(run.Floats.T), len(run.Histograms.T), len(run.FloatHistograms.T)
	last := &buf.runs[i].last
	last.in = append(last.in, in)
	made, rises := len(last.chunks), buf.rises[:0]
	for i := range p.chunks {
		c := &p.chunks[i]
		if err := p.pages[i].decode(&buf.dec, c, run, whole); err != nil {
			return err
		}
		if c.Kind == chunkfmt.KindFloat {
			last.chunks = append(last.chunks, madeOfChunk{c.MinT, c.MaxT, c.Samples, nil, all, p.pages[i].data.ValuesName(c.Index)})
			rises = append(rises, buf.dec.Rises())
		}
	}
	buf.rises = rises
	spans := []Span{{0, len(run.Floats.V) - floats}}
	if !all {
		spans = cut(run, in, floats, hists, floatHists)
	}
	from, at := 0, floats // of a chunk: in what was decoded, and now
	for i, rises := range rises {
		c := &last.chunks[made+i]
		kept := overlap(spans, from, from+c.samples)
		if !all {
			c.kept = kept
		}
		from += c.samples
		to := at
		for _, sp := range kept {
			to += sp.To - sp.From
		}
		buf.note(run.Floats.V, at, to, rises)
		at = to
	}
	// A hint speaks of the sample before, which another block may not have seen.
	if hists > 0 && hists < len(run.Histograms.H) {
		run.Histograms.H[hists] = unknownHint(run.Histograms.H[hists])
	}
	if floatHists > 0 && floatHists < len(run.FloatHistograms.H) {
		run.FloatHistograms.H[floatHists] = unknownFloatHint(run.FloatHistograms.H[floatHists])
	}
	return nil
}

// withEdges chooses the first and the last of each range, too: hints of resets are forgotten there.
func withEdges(whole chunkfmt.Whole, in []chunkfmt.Range) chunkfmt.Whole {
	return func(t []int64, chosen []bool) {
		whole(t, chosen)
		for _, s := range within(t, in) {
			chosen[s.From], chosen[s.To-1] = true, true
		}
	}
}

func unknownHint(h *histogram.Histogram) *histogram.Histogram {
	if h.CounterResetHint == histogram.GaugeType {
		return h
	}
	c := *h
	c.CounterResetHint = histogram.UnknownCounterReset
	return &c
}

func unknownFloatHint(h *histogram.FloatHistogram) *histogram.FloatHistogram {
	if h.CounterResetHint == histogram.GaugeType {
		return h
	}
	c := *h
	c.CounterResetHint = histogram.UnknownCounterReset
	return &c
}

// decode appends a chunk to run.
func (h *heldPage) decode(dec *chunkfmt.Decoder, c *chunkfmt.Chunk, run *chunkfmt.Series, whole chunkfmt.Whole) error {
	var err error
	var t []int64
	before := 0
	switch c.Kind {
	case chunkfmt.KindFloat:
		before = len(run.Floats.T)
		err = dec.Floats(h.data, c.Index, &run.Floats)
		t = run.Floats.T
	case chunkfmt.KindHistogram:
		before = len(run.Histograms.T)
		err = dec.Histograms(h.data, c.Index, &run.Histograms, whole)
		t = run.Histograms.T
	case chunkfmt.KindFloatHistogram:
		before = len(run.FloatHistograms.T)
		err = h.data.FloatHistograms(c.Index, &run.FloatHistograms)
		t = run.FloatHistograms.T
	default:
		err = fmt.Errorf("%w: a chunk of kind %d", chunkfmt.ErrCorrupt, c.Kind)
	}
	if err == nil {
		err = check(c, t, before)
	}
	if err != nil {
		return h.error(fmt.Errorf("chunk %d: %w", c.Index, err))
	}
	return nil
}

// check compares the times that were decoded from index before on with what the
// series page said of the chunk: queries were planned by that.
func check(c *chunkfmt.Chunk, t []int64, before int) error {
	switch n := len(t) - before; {
	case n != c.Samples || n == 0:
		return fmt.Errorf("%w: it has %d samples, its series page says %d", chunkfmt.ErrCorrupt, n, c.Samples)
	case t[before] != c.MinT || t[len(t)-1] != c.MaxT:
		return fmt.Errorf("%w: it spans %d to %d, its series page says %d to %d", chunkfmt.ErrCorrupt, t[before], t[len(t)-1], c.MinT, c.MaxT)
	case before > 0 && t[before-1] >= t[before]:
		return fmt.Errorf("%w: it starts at %d, before the chunk before it ends at %d", chunkfmt.ErrCorrupt, t[before], t[before-1])
	}
	return nil
}

// readable gives what of mint to maxt is to be read from the block, ascending.
func (b *Block) readable(mint, maxt int64) []chunkfmt.Range {
	out := make([]chunkfmt.Range, 0, len(b.Ranges))
	for _, r := range b.Ranges {
		if lo, hi := max(mint, r.MinT), min(maxt, r.MaxT); lo <= hi {
			out = append(out, chunkfmt.Range{MinT: lo, MaxT: hi})
		}
	}
	return out
}

// reads reports whether readable gives known.
func (b *Block) reads(mint, maxt int64, known []chunkfmt.Range) bool {
	for _, r := range b.Ranges {
		lo, hi := max(mint, r.MinT), min(maxt, r.MaxT)
		if lo > hi {
			continue
		}
		if len(known) == 0 || known[0] != (chunkfmt.Range{MinT: lo, MaxT: hi}) {
			return false
		}
		known = known[1:]
	}
	return len(known) == 0
}

// cut leaves of a run, behind its first so many samples, what lies in one of the
// ranges, which ascend. It gives the places of the floats that do.
func cut(run *chunkfmt.Series, in []chunkfmt.Range, floats, hists, floatHists int) []Span {
	f, h, g := &run.Floats, &run.Histograms, &run.FloatHistograms
	ofFloats := within(f.T[floats:], in)
	f.T, f.ST, f.V = keep(f.T, floats, ofFloats), keep(f.ST, floats, ofFloats), keep(f.V, floats, ofFloats)
	spans := within(h.T[hists:], in)
	h.T, h.ST, h.H = keep(h.T, hists, spans), keep(h.ST, hists, spans), keep(h.H, hists, spans)
	forget(h.H[hists:], spans, unknownHint)
	spans = within(g.T[floatHists:], in)
	g.T, g.ST, g.H = keep(g.T, floatHists, spans), keep(g.ST, floatHists, spans), keep(g.H, floatHists, spans)
	forget(g.H[floatHists:], spans, unknownFloatHint)
	return ofFloats
}

// Span is a range of indexes, the end excluded.
type Span struct{ From, To int }

// overlap gives what of spans lies from from up to, without, to, counted from from.
func overlap(spans []Span, from, to int) []Span {
	var out []Span
	for _, sp := range spans {
		if lo, hi := max(sp.From, from), min(sp.To, to); lo < hi {
			out = append(out, Span{lo - from, hi - from})
		}
	}
	return out
}

// within gives the indexes of the times that lie in ranges, which ascend.
func within(t []int64, ranges []chunkfmt.Range) []Span {
	var out []Span
	for _, r := range ranges {
		from := sort.Search(len(t), func(i int) bool { return t[i] >= r.MinT })
		to := from + sort.Search(len(t)-from, func(i int) bool { return t[from+i] > r.MaxT })
		switch n := len(out); {
		case from == to:
		case n > 0 && out[n-1].To == from:
			out[n-1].To = to
		default:
			out = append(out, Span{from, to})
		}
	}
	return out
}

// keep leaves the first so many elements, and behind those the elements at spans.
func keep[E any](s []E, first int, spans []Span) []E {
	if s == nil {
		return nil
	}
	if first == 0 && len(spans) == 1 {
		return s[spans[0].From:spans[0].To]
	}
	n := first
	for _, sp := range spans {
		n += copy(s[n:], s[first+sp.From:first+sp.To])
	}
	return s[:n]
}

// forget makes a counter-reset hint unknown where the sample before was cut out.
func forget[H any](hs []H, spans []Span, unknown func(H) H) {
	i := 0
	for n, sp := range spans {
		if n > 0 {
			hs[i] = unknown(hs[i])
		}
		i += sp.To - sp.From
	}
}

// Exemplars returns the exemplars in mint to maxt of the series that match all
// matchers of at least one of sets, sorted by labels; of a series, by time.
func (s *Snapshot) Exemplars(ctx context.Context, sets [][]*labels.Matcher, mint, maxt int64) ([]chunkfmt.Series, error) {
	var out []chunkfmt.Series
	mint = s.samplesFrom(mint)
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		type place struct {
			series int // in names.all
			chunk  chunkfmt.Chunk
			block  *Block
		}
		var names labelSets
		var places []place
		var wants []want
		seen := map[pageKey]map[int]bool{} // by page: chunks; matcher sets may overlap
		sizes := map[pageKey]int64{}
		held := tally{s: s}
		defer held.release()
		for _, ms := range sets {
			fs, err := s.find(ctx, bs, ms, mint, maxt, &held)
			if err != nil {
				return err
			}
			for _, f := range fs {
				for i := range f.entries {
					e := &f.entries[i]
					for _, c := range e.Exemplars {
						w, err := f.block.want(dataPage, c.Page)
						if err != nil {
							return err
						}
						if seen[w.key()] == nil {
							seen[w.key()], sizes[w.key()] = map[int]bool{}, w.at.Size
						}
						if seen[w.key()][c.Index] {
							continue
						}
						seen[w.key()][c.Index] = true
						at, _ := names.add(e.Labels)
						places, wants = append(places, place{at, c, f.block}), append(wants, w)
					}
				}
			}
		}
		for page := range seen {
			held.add(sizes[page])
		}
		pages, err := s.fetch(ctx, 0, wants)
		if err != nil {
			return err
		}
		runs := make([][]*chunkfmt.Series, len(names.all))
		for i, p := range places {
			es, err := pages[i].data.Exemplars(p.chunk.Index, nil)
			if err != nil {
				return wants[i].error(err)
			}
			es = slices.DeleteFunc(es, func(e exemplar.Exemplar) bool {
				return e.Ts < max(mint, s.MinT) || e.Ts > min(maxt, s.MaxT) || !p.block.Overlaps(e.Ts, e.Ts)
			})
			es = CutExemplars(es, s.Hidden.Of(names.all[p.series]))
			if len(es) > 0 {
				runs[p.series] = append(runs[p.series], &chunkfmt.Series{Labels: names.all[p.series], Exemplars: es})
			}
		}
		out = nil
		for _, r := range runs {
			if len(r) > 0 {
				out = append(out, *chunkfmt.Merge(r...))
			}
		}
		slices.SortFunc(out, func(a, b chunkfmt.Series) int { return labels.Compare(a.Labels, b.Labels) })
		return nil
	})
	return out, err
}

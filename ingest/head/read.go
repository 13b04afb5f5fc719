package head

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/internal/sorted"
)

// view is a tenant's part of the readable generations.
func (h *Head) view(tenant string) ([]*tenantHead, fetch.Header) {
	var ts []*tenantHead
	var hd fetch.Header
	for _, g := range h.readable() {
		g.mu.RLock()
		t, blocks := g.tenants[tenant], g.blocks[tenant]
		g.mu.RUnlock()
		if t == nil {
			continue
		}
		hd.Blocks = append(hd.Blocks, blocks...)
		ts = append(ts, t)
		mint, maxt, ok := t.timeRange()
		if !ok {
			continue
		}
		if !hd.HasSamples {
			hd.HasSamples, hd.Oldest, hd.Newest = true, mint, maxt
		}
		hd.Oldest, hd.Newest = min(hd.Oldest, mint), max(hd.Newest, maxt)
	}
	return ts, hd
}

// Select gives the series that match and have samples in the time range, ascending in
// labels. With LabelsOnly their chunks are left out.
func (h *Head) Select(ctx context.Context, q fetch.Query) ([]fetch.Series, fetch.Header, error) {
	q.Newest = false
	lists, hd, err := h.Lists(ctx, q)
	var out []fetch.Series
	for _, l := range lists {
		out = mergeSeries(out, l)
	}
	if q.Limit > 0 && len(out) > q.Limit {
		out = out[:q.Limit]
	}
	return out, hd, err
}

// Lists is Select generation by generation.
func (h *Head) Lists(ctx context.Context, q fetch.Query) ([][]fetch.Series, fetch.Header, error) {
	ts, hd := h.view(q.Tenant)
	var out [][]fetch.Series
	for _, t := range ts {
		for s, err := range t.read(ctx, q, 0) { // once
			if err != nil {
				return nil, hd, err
			}
			series := t.all()
			of := func(ref uint32) labels.Labels { return series[ref].labels }
			s.series = s.columns.Append(slices.Grow(s.series[:0], len(s.columns.Refs)), of)
			out = append(out, s.series)
		}
	}
	return out, hd, nil
}

// Read gives, generation by generation, the series that match and have samples in the
// time range, as columns of about so many bytes of chunks, each generation's ascending in
// labels. With LabelsOnly chunks are left out. What is given is good until the next.
func (h *Head) Read(ctx context.Context, q fetch.Query, bytes int) (fetch.Header, iter.Seq2[*fetch.Columns, error]) {
	ts, hd := h.view(q.Tenant)
	return hd, func(yield func(*fetch.Columns, error) bool) {
		for _, t := range ts {
			for s, err := range t.read(ctx, q, bytes) {
				if err != nil {
					yield(nil, err)
					return
				}
				if !yield(&s.columns, nil) {
					return
				}
			}
		}
	}
}

// What Series gives for a generation that is not there, and for a ref that nobody was
// given.
var (
	ErrGone       = errors.New("no such generation")
	ErrUnknownRef = errors.New("no such series")
)

// Series calls fn with the labels of series of a generation, by their refs.
func (h *Head) Series(tenant string, generation uint64, refs []uint32, fn func(labels.Labels) error) error {
	for _, g := range h.readable() {
		if g.id != generation {
			continue
		}
		var series []*memSeries
		if t := g.tenant(tenant); t != nil {
			series = t.all()
		}
		for _, ref := range refs {
			if int(ref) >= len(series) {
				return fmt.Errorf("%w: %d", ErrUnknownRef, ref)
			}
			if err := fn(series[ref].labels); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%w: %d", ErrGone, generation)
}

// all gives the series there are, by ref. More may come, those stay.
func (t *tenantHead) all() []*memSeries {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.series
}

// scratch is memory for what is read.
type scratch struct {
	columns fetch.Columns
	mem     memory
	series  []fetch.Series
}

// Scratch memory of columns that were sent, and of series that were kept for a while.
//
//nolint:gochecknoglobals // scratch memory
var (
	sent = sync.Pool{New: func() any { return &scratch{mem: memory{joined: true}} }}
	kept = sync.Pool{New: func() any { return new(scratch) }}
)

// maxKept bounds what one query leaves to the next, in bytes: more than a million
// samples take of a head.
const maxKept = 16 << 20

// release leaves what was kept to the next query.
func (s *scratch) release() {
	const series, chunk = 48, 48
	if series*cap(s.series)+chunk*cap(s.columns.Chunks)+s.mem.pieces.Size() > maxKept {
		return
	}
	// No chunk or label set of a generation that is gone is to stay for this.
	clear(s.series)
	clear(s.columns.Chunks)
	s.mem.reset()
	kept.Put(s)
}

// read gives what the tenant has for a query, as columns of about so many bytes of
// chunks; 0: all at once, to be kept.
func (t *tenantHead) read(ctx context.Context, q fetch.Query, bytes int) iter.Seq2[*scratch, error] {
	return func(yield func(*scratch, error) bool) {
		if mint, maxt, ok := t.timeRange(); !ok || mint > q.MaxT || maxt < q.MinT {
			return
		}
		t.mu.RLock()
		refs, all := t.matchRefs(q.Matchers)
		series := t.series // what is there stays as it is
		t.mu.RUnlock()
		left := q.Limit
		refs = t.order.sort(refs, all, series)
		var to *scratch
		switch {
		case bytes > 0:
			to, _ = sent.Get().(*scratch)
			defer sent.Put(to)
		case q.Keep != nil:
			to, _ = kept.Get().(*scratch)
			q.Keep(to.release)
		default:
			to = new(scratch)
		}
		c, mem := &to.columns, &to.mem
		if bytes == 0 {
			c.Refs = slices.Grow(c.Refs[:0], len(refs))
		}
		c.Generation = uint64(t.generation)
		if q.LabelsOnly {
			c.Counts = nil
		}
		for len(refs) > 0 {
			c.Refs, c.Counts, c.Chunks = c.Refs[:0], c.Counts[:0], c.Chunks[:0]
			mem.reset()
			n := 0
			for n < len(refs) && (bytes == 0 || len(mem.all)+chunkBytes*len(c.Chunks) < bytes && len(c.Refs) < readSeries) && (q.Limit == 0 || left > 0) {
				if n%1024 == 0 && ctx.Err() != nil {
					yield(nil, context.Cause(ctx))
					return
				}
				ref := refs[n]
				n++
				if q.LabelsOnly {
					if t.overlaps(series[ref], q.MinT, q.MaxT) {
						c.Refs = append(c.Refs, ref)
						left--
					}
					continue
				}
				before := len(c.Chunks)
				if err := t.chunks(c, series[ref], &q, mem); err != nil {
					yield(nil, err)
					return
				}
				if len(c.Chunks) == before {
					continue
				}
				c.Refs, c.Counts = append(c.Refs, ref), append(c.Counts, uint32(len(c.Chunks)-before))
				left--
				if bytes == 0 && len(c.Refs) == someSeries { // the others have about as many
					rest := len(refs) - n
					c.Counts, c.Chunks = slices.Grow(c.Counts, rest), slices.Grow(c.Chunks, rest*len(c.Chunks)/someSeries+rest/16)
				}
			}
			refs, c.Data = refs[n:], mem.all
			if len(c.Refs) > 0 && !yield(to, nil) || q.Limit > 0 && left <= 0 {
				return
			}
		}
	}
}

// someSeries tell how many chunks those of a tenant have.
const someSeries = 64

// chunkBytes is about what a chunk takes beside its data, in columns that are sent.
const chunkBytes = 16

// readSeries bounds the series of columns.
const readSeries = 16 << 10

// chunks appends what a series has for a query.
func (t *tenantHead) chunks(c *fetch.Columns, s *memSeries, q *fetch.Query, mem *memory) (err error) {
	l := t.lock(s)
	l.Lock()
	defer l.Unlock()
	if q.Newest {
		c.Chunks, err = s.newest(c.Chunks, q.MinT, q.MaxT, mem)
	} else {
		c.Chunks, err = s.chunks(c.Chunks, q.MinT, q.MaxT, mem)
	}
	return err
}

// overlaps takes the lock of the series for memSeries.overlaps.
func (t *tenantHead) overlaps(s *memSeries, mint, maxt int64) bool {
	l := t.lock(s)
	l.Lock()
	defer l.Unlock()
	return s.overlaps(mint, maxt)
}

// mergeSeries merges two lists that ascend in labels.
func mergeSeries(a, b []fetch.Series) []fetch.Series {
	if len(a) == 0 {
		return b
	}
	out := make([]fetch.Series, 0, max(len(a), len(b)))
	for len(a) > 0 && len(b) > 0 {
		switch c := labels.Compare(a[0].Labels, b[0].Labels); {
		case c < 0:
			out, a = append(out, a[0]), a[1:]
		case c > 0:
			out, b = append(out, b[0]), b[1:]
		default:
			out = append(out, fetch.Series{Labels: a[0].Labels, Chunks: append(slices.Clip(a[0].Chunks), b[0].Chunks...)})
			a, b = a[1:], b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// Labels gives the label names (name empty) or the values of the label name,
// sorted, of the series that match and have samples in the time range. Without
// matchers the range is compared with that of whole generations only.
func (h *Head) Labels(ctx context.Context, q fetch.Query, name string) ([]string, fetch.Header, error) {
	ts, hd := h.view(q.Tenant)
	ts = slices.DeleteFunc(ts, func(t *tenantHead) bool {
		mint, maxt, ok := t.timeRange()
		return !ok || mint > q.MaxT || maxt < q.MinT
	})
	if len(q.Matchers) == 0 {
		var lists [][]string
		for _, t := range ts {
			lists = append(lists, t.names(name))
		}
		return slices.Clone(limited(sorted.Union(lists...), q.Limit)), hd, nil
	}
	set := map[string]struct{}{}
	for _, t := range ts {
		t.mu.RLock()
		found := t.match(q.Matchers)
		t.mu.RUnlock()
		for i, s := range found {
			if i%1024 == 0 && ctx.Err() != nil {
				return nil, hd, context.Cause(ctx)
			}
			if name != "" {
				if v := s.labels.Get(name); v != "" {
					if _, ok := set[v]; !ok && t.overlaps(s, q.MinT, q.MaxT) {
						set[v] = struct{}{}
					}
				}
				continue
			}
			if t.overlaps(s, q.MinT, q.MaxT) {
				s.labels.Range(func(l labels.Label) { set[l.Name] = struct{}{} })
			}
		}
	}
	return limited(slices.Sorted(maps.Keys(set)), q.Limit), hd, nil
}

// names gives the label names (name empty) or the values of the label name of all series, sorted. The result is not
// to be changed.
func (t *tenantHead) names(name string) []string {
	t.mu.RLock()
	n := len(t.postings)
	if name != "" {
		n = len(t.postings[name])
	}
	if known := t.sorted[name]; len(known) == n { // names and values only come: as many are the same
		t.mu.RUnlock()
		return known
	}
	out := make([]string, 0, n)
	if name == "" {
		out = slices.AppendSeq(out, maps.Keys(t.postings))
	} else {
		out = slices.AppendSeq(out, maps.Keys(t.postings[name]))
	}
	t.mu.RUnlock()
	slices.Sort(out)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sorted == nil {
		t.sorted = map[string][]string{}
	}
	if len(t.sorted[name]) < len(out) {
		t.sorted[name] = out
	}
	return out
}

// limited gives so many at most; 0: all.
func limited(out []string, limit int) []string {
	if limit > 0 && len(out) > limit {
		return out[:limit]
	}
	return out
}

// Exemplars gives the exemplars in the time range of series that match all
// matchers of any of the sets, as series whose samples are left out.
func (h *Head) Exemplars(tenant string, mint, maxt int64, sets [][]*labels.Matcher) ([]chunkfmt.Series, fetch.Header) {
	ts, hd := h.view(tenant)
	var out []chunkfmt.Series
	for _, t := range ts {
		t.mu.RLock()
		seen := map[uint32]bool{}
		for _, ms := range sets {
			for _, s := range t.match(ms) {
				es := t.exemplars[s.ref]
				if seen[s.ref] || len(es) == 0 {
					continue
				}
				seen[s.ref] = true
				var in []chunkfmt.Exemplar
				for _, e := range es {
					if e.Ts >= mint && e.Ts <= maxt {
						in = append(in, e)
					}
				}
				if len(in) > 0 {
					out = append(out, chunkfmt.Series{Labels: s.labels, Exemplars: in})
				}
			}
		}
		t.mu.RUnlock()
	}
	slices.SortStableFunc(out, func(a, b chunkfmt.Series) int { return labels.Compare(a.Labels, b.Labels) })
	return out, hd
}

// Count is a name with a number.
type Count struct {
	Name  string
	Value uint64
}

// Stats is what the current generation holds of a tenant, in the terms of
// Prometheus's TSDB status page.
type Stats struct {
	Series, Chunks, LabelPairs                                uint64
	MinT, MaxT                                                int64 // ms since the epoch; 0 without samples
	SeriesByMetric, ValuesByLabel, BytesByLabel, SeriesByPair []Count
}

// Stats counts; each list has at most limit entries, the greatest first.
func (h *Head) Stats(tenant string, limit int) Stats {
	ts, hd := h.view(tenant)
	var st Stats
	if len(ts) == 0 {
		return st
	}
	if hd.HasSamples {
		st.MinT, st.MaxT = hd.Oldest, hd.Newest
	}
	t := ts[len(ts)-1]
	t.mu.RLock()
	defer t.mu.RUnlock()
	st.Series, st.LabelPairs = uint64(len(t.series)), uint64(t.pairs)
	for _, s := range t.series {
		l := t.lock(s)
		l.Lock()
		st.Chunks += uint64(s.inOrder.count())
		l.Unlock()
	}
	for name, values := range t.postings {
		size := 0
		for v, refs := range values {
			size += len(v) * len(refs)
			st.SeriesByPair = append(st.SeriesByPair, Count{name + "=" + v, uint64(len(refs))})
			if name == model.MetricNameLabel {
				st.SeriesByMetric = append(st.SeriesByMetric, Count{v, uint64(len(refs))})
			}
		}
		st.ValuesByLabel = append(st.ValuesByLabel, Count{name, uint64(len(values))})
		st.BytesByLabel = append(st.BytesByLabel, Count{name, uint64(size)})
	}
	for _, l := range []*[]Count{&st.SeriesByMetric, &st.ValuesByLabel, &st.BytesByLabel, &st.SeriesByPair} {
		*l = greatest(*l, limit)
	}
	return st
}

func greatest(cs []Count, limit int) []Count {
	slices.SortFunc(cs, func(a, b Count) int {
		if a.Value != b.Value {
			if a.Value > b.Value {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return cs[:min(len(cs), limit)]
}

// Tenants of a generation, sorted.
func (g *Generation) Tenants() []string {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Sorted(maps.Keys(g.tenants))
}

// Walk calls fn for each series of a tenant in a frozen generation that has
// samples or exemplars, in the order of a block: by metric name, then by
// labels. The series and its columns are valid during the call only.
func (g *Generation) Walk(tenant string, fn func(*chunkfmt.Series) error) error {
	t := g.tenant(tenant)
	if t == nil {
		return nil
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	type keyed struct {
		metric string
		s      *memSeries
	}
	order := make([]keyed, len(t.series))
	for i, s := range t.series {
		order[i] = keyed{s.labels.Get(model.MetricNameLabel), s}
	}
	slices.SortFunc(order, func(a, b keyed) int {
		if c := strings.Compare(a.metric, b.metric); c != 0 {
			return c
		}
		return labels.Compare(a.s.labels, b.s.labels)
	})
	var d fetch.Decoder
	var c fetch.Columns
	every := fetch.Query{MinT: math.MinInt64, MaxT: math.MaxInt64}
	var mem memory
	for _, k := range order {
		c.Chunks = c.Chunks[:0]
		mem.reset()
		if err := t.chunks(&c, k.s, &every, &mem); err != nil {
			return err
		}
		cs := c.Chunks
		exemplars := t.exemplars[k.s.ref]
		if len(cs) == 0 && len(exemplars) == 0 {
			continue
		}
		out, err := d.Decode(cs)
		if err != nil {
			return err
		}
		out.Labels, out.Exemplars = k.s.labels, exemplars
		out.Metadata, out.Family = t.metadata.newest(k.metric)
		if err := fn(out); err != nil {
			return err
		}
	}
	return nil
}

package compact

import (
	"cmp"
	"context"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// sink takes what a merge gives.
type sink interface {
	// tenant begins a tenant, of which the sources have about so many bytes.
	tenant(ctx context.Context, tenant string, sizeBytes int64) error
	// series adds a series of the tenant, in order, with its windows; nil: they aren't
	// known. It keeps nothing of it.
	series(ctx context.Context, s *chunkfmt.Series, sums *chunkfmt.Summaries) error
}

// merger puts the series of sources together, in order of tenant, metric name and
// labels, with chunkfmt.Merge deciding about their samples. It holds one series
// with its samples, and what sources hold.
type merger struct {
	sources []*source
	hidden  func(tenant string) *history.Hidden // what is to be dropped; nil: nothing
	rollups bool                                // windows are made
	heap    []*source                           // of those that have series of the tenant left, the least first
	equal   []*source                           // those that have the present series
	runs    []*run
	out     []*chunkfmt.Series
	drop    *history.Hidden // of the present tenant

	samples    int64 // read
	mint, maxt int64 // of the pass, inclusive
	sums       summariser
}

// run is memory for samples that follow each other, used again and again.
type run struct {
	s    chunkfmt.Series
	t    []int64
	v    []float64
	maxt int64
}

// merge reads what sources have in mint to maxt, both included, in ms. An error
// of a source is a *BlockError.
func (m *merger) merge(ctx context.Context, mint, maxt int64, to sink) error {
	m.mint, m.maxt = mint, maxt
	for _, s := range m.sources {
		s.start(mint, maxt)
	}
	for {
		tenant, some := "", false
		for _, s := range m.sources {
			if t, ok := s.at(); ok && (!some || t < tenant) {
				tenant, some = t, true
			}
		}
		if !some {
			return nil
		}
		if err := m.mergeTenant(ctx, tenant, to); err != nil {
			return err
		}
	}
}

func (m *merger) mergeTenant(ctx context.Context, tenant string, to sink) error {
	var size float64
	m.heap = m.heap[:0]
	if m.hidden != nil && m.gone(tenant) {
		m.leave(tenant)
		return nil
	}
	for _, s := range m.sources {
		if t, ok := s.at(); !ok || t != tenant {
			continue
		}
		size += s.tenantBytes()
		if err := s.enter(ctx); err != nil {
			return err
		}
		ok, err := s.nextSeries(ctx)
		if err != nil {
			return err
		}
		if ok {
			m.heap = append(m.heap, s)
		}
	}
	if err := to.tenant(ctx, tenant, int64(size)); err != nil {
		return err
	}
	for i := len(m.heap)/2 - 1; i >= 0; i-- {
		m.down(i)
	}
	for len(m.heap) > 0 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		// Those with the same series lie together at the top.
		m.equal = append(m.equal[:0], m.pop())
		first := m.equal[0]
		for len(m.heap) > 0 && m.heap[0].metric == first.metric && labels.Equal(m.heap[0].entry.Labels, first.entry.Labels) {
			m.equal = append(m.equal, m.pop())
		}
		s, err := m.read(ctx)
		if err != nil {
			return err
		}
		var sums *chunkfmt.Summaries
		if m.rollups || slices.ContainsFunc(m.equal, func(s *source) bool { return s.entry.Gone != nil }) {
			if sums, err = m.summaries(ctx, s); err != nil {
				return err
			}
		}
		if len(s.Floats.T)+len(s.Histograms.T)+len(s.FloatHistograms.T)+len(s.Exemplars) > 0 || sums != nil && len(sums.Gone) > 0 {
			if err := to.series(ctx, s, sums); err != nil {
				return err
			}
		}
		for _, s := range m.equal {
			ok, err := s.nextSeries(ctx)
			if err != nil {
				return err
			}
			if ok {
				m.push(s)
			}
		}
	}
	m.leave(tenant)
	return nil
}

// leave ends a tenant.
func (m *merger) leave(tenant string) {
	for _, s := range m.sources {
		if t, ok := s.at(); ok && t == tenant {
			s.nextTenant()
		}
	}
}

// gone finds out what of a tenant is to be dropped, and says whether all is.
func (m *merger) gone(tenant string) bool {
	m.drop = m.hidden(tenant)
	if m.drop == nil {
		return false
	}
	mint, maxt := int64(math.MaxInt64), int64(math.MinInt64)
	for _, s := range m.sources {
		if t, ok := s.at(); ok && t == tenant {
			x := &s.tenants[s.tenant]
			mint, maxt = min(mint, max(s.mint, x.MinT)), max(maxt, min(s.maxt, x.MaxT))
		}
	}
	m.drop = m.drop.Within(mint, maxt)
	return m.drop.All(mint, maxt)
}

// tenantBytes is about how much of the source the present tenant takes.
func (s *source) tenantBytes() float64 {
	return float64(s.block.ObjectSize) * float64(s.tenants[s.tenant].Samples) / float64(max(s.total, 1))
}

// read reads and merges the present series of the sources in equal. What is
// returned lies in memory that the next call uses.
func (m *merger) read(ctx context.Context) (*chunkfmt.Series, error) {
	// What is known best of a series' metadata is what the newest block says.
	newest := slices.MaxFunc(m.equal, func(a, b *source) int {
		if x, y := a.entry.Metadata.IsEmpty(), b.entry.Metadata.IsEmpty(); x != y {
			if x {
				return -1
			}
			return 1
		}
		return a.block.Block.Compare(b.block.Block)
	})
	slices.SortStableFunc(m.equal, func(a, b *source) int {
		x, _ := a.span()
		y, _ := b.span()
		return cmp.Compare(x, y)
	})
	runs := 0
	var err error
	for _, s := range m.equal {
		if len(s.entry.Chunks) == 0 {
			continue
		}
		// Behind the first run that ends before it starts: then there is nothing
		// to merge, in the usual case.
		mint, maxt := s.span()
		i := 0
		for i < runs && m.runs[i].maxt >= mint {
			i++
		}
		if i == runs {
			runs++
			if len(m.runs) < runs {
				m.runs = append(m.runs, &run{})
			}
			r := m.runs[i]
			r.s = chunkfmt.Series{Labels: s.entry.Labels, Floats: chunkfmt.Floats{T: r.t[:0], V: r.v[:0]}}
		}
		r := m.runs[i]
		r.maxt = maxt
		if err := s.read(ctx, &r.s); err != nil {
			return nil, err
		}
		if cap(r.s.Floats.T) > cap(r.t) {
			r.t = r.s.Floats.T
		}
		if cap(r.s.Floats.V) > cap(r.v) {
			r.v = r.s.Floats.V
		}
	}
	m.out = m.out[:0]
	for _, r := range m.runs[:runs] {
		f := &r.s.Floats
		if len(f.T) == 0 {
			*f = chunkfmt.Floats{}
		}
		m.samples += int64(len(f.T) + len(r.s.Histograms.T) + len(r.s.FloatHistograms.T))
		if n := len(m.out); n > 0 && holds(m.out[0], &r.s) {
			continue // a replica's, most likely
		}
		m.out = append(m.out, &r.s)
	}
	rest := &chunkfmt.Series{Labels: m.equal[0].entry.Labels}
	for _, s := range m.equal {
		if rest.Exemplars, err = s.readExemplars(ctx, rest.Exemplars); err != nil {
			return nil, err
		}
	}
	if len(rest.Exemplars) > 0 || runs == 0 {
		// Exemplars of one block ascend; Merge sorts those of more.
		m.out = append(m.out, rest, &chunkfmt.Series{})
	}
	out := chunkfmt.Merge(m.out...)
	history.Cut(out, m.drop.OfAll(rest.Labels)) // what is past the retention of samples alone is needed for windows
	out.Labels, out.Metadata, out.Family = rest.Labels, newest.entry.Metadata, newest.entry.Family
	return out, nil
}

// holds says whether all samples of b are in a, where that is quickly seen. Merge
// would find it out as well, but not without new memory.
func holds(a, b *chunkfmt.Series) bool {
	if len(b.Histograms.T)+len(b.FloatHistograms.T) > 0 || a.Floats.ST != nil || b.Floats.ST != nil {
		return false
	}
	f, g := &a.Floats, &b.Floats
	n := len(g.T)
	if n == 0 {
		return true
	}
	i, ok := slices.BinarySearch(f.T, g.T[0])
	if !ok || len(f.T)-i < n || !slices.Equal(f.T[i:i+n], g.T) || len(a.Histograms.T)+len(a.FloatHistograms.T) > 0 {
		return false
	}
	for j, v := range f.V[i : i+n] {
		if math.Float64bits(v) != math.Float64bits(g.V[j]) {
			return false
		}
	}
	return true
}

func (m *merger) less(i, j int) bool {
	a, b := m.heap[i], m.heap[j]
	return compareKeys(a.metric, a.entry.Labels, b.metric, b.entry.Labels) < 0
}

func (m *merger) push(s *source) {
	m.heap = append(m.heap, s)
	for i := len(m.heap) - 1; i > 0; {
		parent := (i - 1) / 2
		if !m.less(i, parent) {
			return
		}
		m.heap[i], m.heap[parent] = m.heap[parent], m.heap[i]
		i = parent
	}
}

func (m *merger) pop() *source {
	top, last := m.heap[0], len(m.heap)-1
	m.heap[0] = m.heap[last]
	m.heap = m.heap[:last]
	m.down(0)
	return top
}

func (m *merger) down(i int) {
	for {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(m.heap); c++ {
			if m.less(c, least) {
				least = c
			}
		}
		if least == i {
			return
		}
		m.heap[i], m.heap[least] = m.heap[least], m.heap[i]
		i = least
	}
}

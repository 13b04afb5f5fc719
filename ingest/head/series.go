package head

import (
	"math"
	"slices"
	"sort"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

// maxLate is how many late samples a series keeps as they are before they are
// put into chunks.
const maxLate = 120

// memSeries is a series in one generation. Before it is put into one it is just
// what a session has announced.
type memSeries struct {
	labels     labels.Labels
	generation uint32 // noGeneration, or refusedSeries, or one
	ref        uint32 // index in the tenant's series

	// What follows is guarded by the tenant's lock of the series.
	inOrder run
	late    *late // nil: none
}

// Generations are counted from 1; a head does not live to see the last.
const (
	noGeneration  = 0
	refusedSeries = math.MaxUint32 // all that is sent for it is dropped and counted
)

// late are samples that came when newer ones were there.
type late struct {
	samples []sample      // ascending in t, at most maxLate; of equal t the winner only
	done    []fetch.Chunk // may overlap each other
}

// outcome says what became of a sample.
type outcome uint8

const (
	appended outcome = iota
	appendedLate
	duplicate
)

// append adds a sample. it is an iterator to reuse, see run.find. As with all
// methods, the caller holds the lock of the series.
func (m *memSeries) append(s *sample, it chunkenc.Iterator) (o outcome, grown int, _ chunkenc.Iterator, err error) {
	if m.inOrder.empty() || s.t > m.inOrder.maxt() {
		grown, err = m.inOrder.append(s)
		return appended, grown, it, err
	}
	old, found, it := m.inOrder.find(s.t, it)
	if found && same(&old, s) {
		return duplicate, 0, it, nil
	}
	if m.late == nil {
		m.late = &late{}
		grown += 48
	}
	o, g, err := m.late.add(s)
	return o, grown + g, it, err
}

// same says that two samples of one timestamp are of the same kind and bits.
func same(a, b *sample) bool {
	if a.encoding() != b.encoding() || a.st != b.st {
		return false
	}
	switch {
	case a.h != nil:
		return chunkfmt.CompareHistograms(a.h, b.h) == 0
	case a.fh != nil:
		return chunkfmt.CompareFloatHistograms(a.fh, b.fh) == 0
	}
	return math.Float64bits(a.v) == math.Float64bits(b.v)
}

const lateSampleBytes = 40

func (l *late) add(s *sample) (outcome, int, error) {
	i := sort.Search(len(l.samples), func(i int) bool { return l.samples[i].t >= s.t })
	if i < len(l.samples) && l.samples[i].t == s.t {
		if same(&l.samples[i], s) {
			return duplicate, 0, nil
		}
		a, b := columns(l.samples[i:i+1]), columns([]sample{*s})
		if m := samples(chunkfmt.Merge(a, b)); len(m) == 1 {
			l.samples[i] = m[0]
		}
		return appendedLate, 0, nil
	}
	l.samples = slices.Insert(l.samples, i, *s)
	grown := lateSampleBytes
	if len(l.samples) < maxLate {
		return appendedLate, grown, nil
	}
	var r run
	for i := range l.samples {
		if _, err := r.append(&l.samples[i]); err != nil {
			return appendedLate, grown, err
		}
	}
	done := r.chunks(nil, math.MinInt64, math.MaxInt64, nil)
	for _, c := range done {
		grown += len(c.Data) + closedChunkBytes
	}
	l.done = append(l.done, done...)
	grown -= len(l.samples) * lateSampleBytes
	l.samples = nil
	return appendedLate, grown, nil
}

// newest appends chunks with the newest of the samples in [mint, maxt], or, where that
// isn't at hand, what chunks does.
func (m *memSeries) newest(dst []fetch.Chunk, mint, maxt int64, mem *memory) ([]fetch.Chunk, error) {
	if m.late != nil {
		return m.chunks(dst, mint, maxt, mem)
	}
	return m.inOrder.newest(dst, mint, maxt, mem), nil
}

// chunks appends the chunks that overlap [mint, maxt]; they may overlap each
// other in time.
func (m *memSeries) chunks(dst []fetch.Chunk, mint, maxt int64, mem *memory) ([]fetch.Chunk, error) {
	out := m.inOrder.chunks(dst, mint, maxt, mem)
	if m.late == nil {
		return out, nil
	}
	for _, c := range m.late.done {
		if c.MinT <= maxt && c.MaxT >= mint {
			out = append(out, mem.closed(c))
		}
	}
	var r run
	for i := range m.late.samples {
		if s := m.late.samples[i]; s.t >= mint && s.t <= maxt {
			// The encoding may change the spans of a histogram.
			if s.h != nil {
				s.h = s.h.Copy()
			}
			if s.fh != nil {
				s.fh = s.fh.Copy()
			}
			if _, err := r.append(&s); err != nil {
				return nil, err
			}
		}
	}
	return r.chunks(out, mint, maxt, mem), nil
}

// overlaps says whether the series has a chunk that overlaps [mint, maxt].
func (m *memSeries) overlaps(mint, maxt int64) bool {
	overlap := func(c fetch.Chunk) bool { return c.MinT <= maxt && c.MaxT >= mint }
	return m.inOrder.overlaps(mint, maxt) || m.late != nil && (slices.ContainsFunc(m.late.done, overlap) ||
		slices.ContainsFunc(m.late.samples, func(s sample) bool { return s.t <= maxt && s.t >= mint }))
}

// release lets go of the samples: a session may still hold the series.
func (m *memSeries) release() {
	m.inOrder, m.late = run{}, nil
}

// columns turns ascending samples into columns.
func columns(ss []sample) *chunkfmt.Series {
	out := &chunkfmt.Series{}
	for i := range ss {
		appendColumn(out, &ss[i])
	}
	return out
}

func appendColumn(out *chunkfmt.Series, s *sample) {
	switch {
	case s.h != nil:
		c := &out.Histograms
		c.ST = fetch.AppendStart(c.ST, len(c.T), s.st)
		c.T, c.H = append(c.T, s.t), append(c.H, s.h)
	case s.fh != nil:
		c := &out.FloatHistograms
		c.ST = fetch.AppendStart(c.ST, len(c.T), s.st)
		c.T, c.H = append(c.T, s.t), append(c.H, s.fh)
	default:
		c := &out.Floats
		c.ST = fetch.AppendStart(c.ST, len(c.T), s.st)
		c.T, c.V = append(c.T, s.t), append(c.V, s.v)
	}
}

// samples is the reverse of columns, without order among kinds.
func samples(s *chunkfmt.Series) []sample {
	var out []sample
	start := func(st []int64, i int) int64 {
		if st == nil {
			return 0
		}
		return st[i]
	}
	for i, t := range s.Floats.T {
		out = append(out, sample{t: t, st: start(s.Floats.ST, i), v: s.Floats.V[i]})
	}
	for i, t := range s.Histograms.T {
		out = append(out, sample{t: t, st: start(s.Histograms.ST, i), h: s.Histograms.H[i]})
	}
	for i, t := range s.FloatHistograms.T {
		out = append(out, sample{t: t, st: start(s.FloatHistograms.ST, i), fh: s.FloatHistograms.H[i]})
	}
	return out
}

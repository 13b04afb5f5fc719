package plan

import (
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/promql"
)

// points are the results for one series: floats and histograms, each ascending by
// the number of the step.
type points struct {
	step  []int32
	v     []float64
	hstep []int32
	h     []*histogram.FloatHistogram
	mem   nativeMemory // that h may lie in
}

func (p *points) reset() {
	p.step, p.v, p.hstep, p.h = p.step[:0], p.v[:0], p.hstep[:0], p.h[:0]
	p.mem.reset()
}

func (p *points) add(step int, v float64) {
	p.step = append(p.step, int32(step))
	p.v = append(p.v, v)
}

func (p *points) addHistogram(step int, h *histogram.FloatHistogram) {
	p.hstep = append(p.hstep, int32(step))
	p.h = append(p.h, h)
}

func (p *points) empty() bool { return len(p.step)+len(p.hstep) == 0 }

// series gives the points as the engine has them. They don't share memory with p,
// but for the histograms.
func (p *points) series(g Grid) promql.Series {
	var s promql.Series
	if len(p.step) > 0 {
		s.Floats = make([]promql.FPoint, len(p.step))
		for i, k := range p.step {
			s.Floats[i] = promql.FPoint{T: g.At(int(k)), F: p.v[i]}
		}
	}
	if len(p.hstep) > 0 {
		s.Histograms = make([]promql.HPoint, len(p.hstep))
		for i, k := range p.hstep {
			s.Histograms[i] = promql.HPoint{T: g.At(int(k)), H: p.h[i]}
		}
	}
	return s
}

// counts are the samples that the engine would have read, by step: in the whole
// window, and of those the ones that weren't in the window before, even for the
// first step. A histogram
// counts for several.
type counts struct {
	window, read []int64
	series       int64
}

func newCounts(steps int) counts {
	return counts{window: make([]int64, steps), read: make([]int64, steps)}
}

// floats adds one for each sample in each window, for so many series; ts are the times of their samples.
func (c *counts) floats(w *spans, ts []int64, l *Leaf, series int64) {
	before := l.before(ts)
	for i, hi := range w.hi {
		lo := w.lo[i]
		c.window[i] += series * int64(hi-lo)
		c.read[i] += series * int64(hi-max(lo, before))
		before = hi
	}
}

// before is how many samples were in the window of the step before the first, or
// earlier.
func (l *Leaf) before(ts []int64) int32 {
	return int32(search(ts, 0, l.Grid.At(-1)-l.offset()))
}

// point adds what a point of the result counts for.
func (c *counts) point(step, n int) {
	c.window[step] += int64(n)
	c.read[step] += int64(n)
}

// begin makes the first step the query's first: all in its window is read.
func (c *counts) begin() { c.read[0] = c.window[0] }

// without takes off what the engine counts the result for.
func (c *counts) without(s *promql.Series, g Grid) {
	c.series--
	for _, p := range s.Floats {
		c.point(int((p.T-g.Start)/g.Step), -1)
	}
	for _, p := range s.Histograms {
		c.point(int((p.T-g.Start)/g.Step), -histogramSize(p.H))
	}
}

func (c *counts) merge(o *counts) {
	c.add(o, 0)
	c.series += o.series
}

// add puts in the counts of the steps from from on.
func (c *counts) add(o *counts, from int) {
	for i, n := range o.window {
		c.window[from+i] += n
		c.read[from+i] += o.read[i]
	}
}

// search gives the first index from i on whose time is later than t.
func search(ts []int64, i int, t int64) int {
	step := 1
	for i+step <= len(ts) && ts[i+step-1] <= t {
		i += step
		step *= 2
	}
	n, _ := slices.BinarySearch(ts[i:min(i+step, len(ts))], t+1)
	return i + n
}

// spans are the parts of a column that lie in each window: of the i-th those from
// lo[i] up to, without, hi[i]. Both ascend.
type spans struct {
	lo, hi []int32
}

// find sets the spans for windows of g that are open to the left.
func (s *spans) find(ts []int64, g Grid, offset, rng int64) {
	n := g.Len()
	s.lo, s.hi = slices.Grow(s.lo[:0], n)[:n], slices.Grow(s.hi[:0], n)[:n]
	lo, hi, dlo, dhi := 0, 0, 0, 0
	end := g.Start - offset
	for i := range n {
		a, b := lo+dlo, hi+dhi // as far on as the window before: mostly right
		if a <= 0 || a >= len(ts) || ts[a] <= end-rng || ts[a-1] > end-rng {
			a = search(ts, lo, end-rng)
		}
		if b <= 0 || b >= len(ts) || ts[b] <= end || ts[b-1] > end {
			b = search(ts, max(hi, a), end)
		}
		dlo, dhi = a-lo, b-hi
		lo, hi = a, b
		s.lo[i], s.hi[i] = int32(a), int32(b)
		end += g.Step
	}
}

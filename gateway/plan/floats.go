package plan

import (
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/util/kahansum"

	"github.com/epimetheus-tsdb/epimetheus/history"
)

// The kernels below are the engine's functions (promql/functions.go of
// Prometheus) on columns of floats. k.frame has the windows; each kernel gives no
// point for an empty one.

func (k *kernel) count(_ []int64, _ []float64, out *points) {
	win := &k.frame.win
	for i, hi := range win.hi {
		if n := hi - win.lo[i]; n > 0 {
			out.add(i, float64(n))
		}
	}
}

func (k *kernel) present(_ []int64, _ []float64, out *points) {
	win := &k.frame.win
	for i, hi := range win.hi {
		if hi > win.lo[i] {
			out.add(i, 1)
		}
	}
}

func (k *kernel) last(_ []int64, v []float64, out *points) {
	win := &k.frame.win
	for i, hi := range win.hi {
		if hi > win.lo[i] {
			out.add(i, v[hi-1])
		}
	}
}

func (k *kernel) first(_ []int64, v []float64, out *points) {
	win := &k.frame.win
	for i, hi := range win.hi {
		if lo := win.lo[i]; hi > lo {
			out.add(i, v[lo])
		}
	}
}

// markResets puts into k.marks the samples in windows that are less than the one before: counter resets, which are in
// falls, as all that is NaN. It stops if it finds a staleness marker in a window, and says so.
func (k *kernel) markResets(v []float64, falls []history.Span) (stale bool) {
	// Between windows nobody has looked.
	k.marks, k.falls = k.marks[:0], len(falls) > 0 && len(k.frame.held) > 1
	for _, in := range k.frame.held {
		for _, fall := range falls {
			from, to := max(in.from, int32(fall.From)), min(in.to, int32(fall.To)) //nolint:gosec // indexes
			if from < to && k.markResetsIn(v, max(in.from, from-1), from, to) {
				return true
			}
		}
	}
	return false
}

// markResetsIn is markResets of the samples from from up to, without, to. Sample before is the one before these, or their first.
func (k *kernel) markResetsIn(v []float64, before, from, to int32) (stale bool) {
	prev := v[before]
	for from < to {
		few := v[from:min(from+8, to)]
		if len(few) == 8 && rising(prev, (*[8]float64)(few)) { // most are
			from += 8
			prev = few[7]
			continue
		}
		for _, cur := range few {
			if !(cur >= prev) { // or one is NaN
				switch {
				case cur < prev:
					k.marks = append(k.marks, from)
				case value.IsStaleNaN(cur):
					return true
				default:
					k.falls = true
				}
			}
			prev = cur
			from++
		}
	}
	return false
}

// rising reports whether none of v is less than the one before, or NaN.
func rising(prev float64, v *[8]float64) bool {
	return v[0] >= prev && v[1] >= v[0] && v[2] >= v[1] && v[3] >= v[2] && v[4] >= v[3] && v[5] >= v[4] && v[6] >= v[5] && v[7] >= v[6]
}

// markChanges is markResets for samples that differ from the one before. There are
// no staleness markers.
func (k *kernel) markChanges(v []float64) {
	k.marks = k.marks[:0]
	for _, in := range k.frame.held {
		prev := v[in.from]
		for j, cur := range v[in.from:in.to] {
			if cur != prev && !(math.IsNaN(cur) && math.IsNaN(prev)) {
				k.marks = append(k.marks, in.from+int32(j)) //nolint:gosec // an index
			}
			prev = cur
		}
	}
}

// changes is changes(), and resets() with the resets in k.marks.
func (k *kernel) changes(_ []int64, v []float64, out *points) {
	if k.leaf.function() == "changes" {
		k.markChanges(v)
	}
	at := k.marks
	a, b := 0, 0
	win := &k.frame.win
	for i, hi := range win.hi {
		lo := win.lo[i]
		for a < len(at) && at[a] <= lo {
			a++
		}
		for b < len(at) && at[b] < hi {
			b++
		}
		if hi > lo {
			out.add(i, float64(max(0, b-a)))
		}
	}
}

// rate is rate() and increase(), with the resets in k.marks, and delta():
// extrapolatedRate.
func (k *kernel) rate(_ []int64, v []float64, out *points) {
	out.step = append(out.step, k.frame.rateSteps...)
	out.v = slices.Grow(out.v, len(out.step))[:len(out.step)]
	k.frame.rates.Results(out.v, v, k.marks, k.falls)
}

// instantRate is irate() and idelta(): instantValue.
func (k *kernel) instantRate(t []int64, v []float64, out *points) {
	isRate := k.leaf.function() == "irate"
	win := &k.frame.win
	for i, hi := range win.hi {
		if hi-win.lo[i] < 2 {
			continue
		}
		interval := t[hi-1] - t[hi-2]
		if interval == 0 {
			continue
		}
		result := v[hi-1]
		if !isRate || !(v[hi-1] < v[hi-2]) {
			result = v[hi-1] - v[hi-2]
		}
		if isRate {
			result /= float64(interval) / 1000
		}
		out.add(i, result)
	}
}

// block is the sum of the samples between two neighbouring edges of windows, with
// its compensation.
type block struct {
	v, c float64
}

// extreme is max_over_time() and min_over_time(): the first of the greatest, or
// NaN if there is nothing else.
func (k *kernel) extreme(_ []int64, v []float64, out *points) {
	win, fold := &k.frame.win, greatest
	if k.leaf.function() == "min_over_time" {
		fold = least
	}
	if !k.frames.uses.blocks {
		for i, hi := range win.hi {
			if lo := win.lo[i]; hi > lo {
				out.add(i, fold(v[lo], v[lo+1:hi]))
			}
		}
		return
	}
	edges := k.frame.edges
	k.best = k.best[:0]
	for e := 0; e+1 < len(edges); e++ {
		k.best = append(k.best, fold(v[edges[e]], v[edges[e]+1:edges[e+1]]))
	}
	for _, w := range k.frame.over {
		out.add(int(w.step), fold(k.best[w.a], k.best[w.a+1:w.b]))
	}
}

func greatest(best float64, v []float64) float64 {
	for _, x := range v {
		if x > best || best != best {
			best = x
		}
	}
	return best
}

func least(best float64, v []float64) float64 {
	for _, x := range v {
		if x < best || best != best {
			best = x
		}
	}
	return best
}

// huge: beyond it a sum may overflow in one order and not in another.
const huge = 1e300

// sum is sum_over_time() and avg_over_time().
func (k *kernel) sum(_ []int64, v []float64, out *points) {
	win, one := &k.frame.win, sumOf
	if k.leaf.function() == "avg_over_time" {
		one = avgOf
	}
	if !k.frames.uses.blocks {
		for i, hi := range win.hi {
			if lo := win.lo[i]; hi > lo {
				out.add(i, one(v[lo:hi]))
			}
		}
		return
	}
	edges := k.frame.edges
	k.blocks = k.blocks[:0]
	for e := 0; e+1 < len(edges); e++ {
		var b block
		for _, x := range v[edges[e]:edges[e+1]] {
			b.v, b.c = kahansum.Inc(x, b.v, b.c)
		}
		k.blocks = append(k.blocks, b)
	}
	avg := k.leaf.function() == "avg_over_time"
	for _, w := range k.frame.over {
		var s block
		ok := true
		for _, x := range k.blocks[w.a:w.b] {
			s.v, s.c = kahansum.Inc(x.v, s.v, s.c)
			s.c += x.c
			ok = ok && math.Abs(x.v) < huge && math.Abs(s.v) < huge // not for NaN
		}
		in := v[edges[w.a]:edges[w.b]]
		switch n := float64(len(in)); {
		case !ok:
			out.add(int(w.step), one(in))
		case avg:
			out.add(int(w.step), s.v/n+s.c/n)
		default:
			out.add(int(w.step), s.v+s.c)
		}
	}
}

func sumOf(v []float64) float64 {
	var sum, c float64
	for _, x := range v {
		sum, c = kahansum.Inc(x, sum, c)
	}
	if math.IsInf(sum, 0) {
		return sum
	}
	return sum + c
}

func avgOf(v []float64) float64 {
	sum, count := v[0], 1.
	var mean, c float64
	incremental := false
	for i, x := range v[1:] {
		count = float64(i + 2)
		if !incremental {
			newSum, newC := kahansum.Inc(x, sum, c)
			if !math.IsInf(newSum, 0) {
				sum, c = newSum, newC
				continue
			}
			incremental = true
			mean = sum / (count - 1)
			c /= count - 1
		}
		q := (count - 1) / count
		mean, c = kahansum.Inc(x/count, q*mean, q*c)
	}
	if incremental {
		return mean + c
	}
	return sum/count + c/count
}

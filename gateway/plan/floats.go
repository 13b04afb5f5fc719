package plan

import (
	"math"

	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/util/kahansum"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// The kernels below are the engine's functions (promql/functions.go of
// Prometheus) on columns of floats. k.win has the windows; each kernel gives no
// point for an empty one.

func (k *kernel) count(_ []int64, _ []float64, out *points) {
	for i, hi := range k.win.hi {
		if n := hi - k.win.lo[i]; n > 0 {
			out.add(i, float64(n))
		}
	}
}

func (k *kernel) present(_ []int64, _ []float64, out *points) {
	for i, hi := range k.win.hi {
		if hi > k.win.lo[i] {
			out.add(i, 1)
		}
	}
}

func (k *kernel) last(_ []int64, v []float64, out *points) {
	for i, hi := range k.win.hi {
		if hi > k.win.lo[i] {
			out.add(i, v[hi-1])
		}
	}
}

func (k *kernel) first(_ []int64, v []float64, out *points) {
	for i, hi := range k.win.hi {
		if lo := k.win.lo[i]; hi > lo {
			out.add(i, v[lo])
		}
	}
}

// markResets puts into k.marks the samples that lie in a window together with the
// one before, and are less: counter resets. It stops if it finds a staleness marker
// in a window, and says so.
func (k *kernel) markResets(v []float64) (stale bool) {
	k.marks = k.marks[:0]
	for begin, end := range k.win.parts(1) {
		prev := v[begin-1]
		for j, cur := range v[begin:end] {
			if !(cur >= prev) { // or one is NaN
				if cur < prev {
					k.marks = append(k.marks, begin+int32(j))
				} else if value.IsStaleNaN(cur) || value.IsStaleNaN(prev) {
					return true
				}
			}
			prev = cur
		}
	}
	for i, hi := range k.win.hi { // those are in no pair
		if lo := k.win.lo[i]; hi-lo == 1 && value.IsStaleNaN(v[lo]) {
			return true
		}
	}
	return false
}

// markChanges is markResets for samples that differ from the one before. There are
// no staleness markers.
func (k *kernel) markChanges(v []float64) {
	k.marks = k.marks[:0]
	for begin, end := range k.win.parts(1) {
		prev := v[begin-1]
		for j, cur := range v[begin:end] {
			if cur != prev && !(math.IsNaN(cur) && math.IsNaN(prev)) {
				k.marks = append(k.marks, begin+int32(j))
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
	for i, hi := range k.win.hi {
		lo := k.win.lo[i]
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
func (k *kernel) rate(t []int64, v []float64, out *points) {
	var resets []int32
	if k.leaf.function() != "delta" {
		resets = k.marks
	}
	x := rollup.NewExtrapolation(k.leaf.function(), k.leaf.Range)
	g, offset := k.leaf.Grid, k.leaf.offset()
	r := 0
	for i, hi := range k.win.hi {
		lo := k.win.lo[i]
		if hi-lo < 2 {
			continue
		}
		result := v[hi-1] - v[lo]
		for r < len(resets) && resets[r] <= lo {
			r++
		}
		for j := r; j < len(resets) && resets[j] < hi; j++ {
			result += v[resets[j]-1]
		}
		out.add(i, x.Result(g.At(i)-offset, int64(hi-lo), t[lo], t[hi-1], v[lo], result))
	}
}

// instantRate is irate() and idelta(): instantValue.
func (k *kernel) instantRate(t []int64, v []float64, out *points) {
	isRate := k.leaf.function() == "irate"
	for i, hi := range k.win.hi {
		if hi-k.win.lo[i] < 2 {
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

// overlapping: windows share so much that it pays to put them together from
// blocks.
func (k *kernel) overlapping() bool { return k.leaf.Range > 2*k.leaf.Grid.Step }

// cut finds the edges of all windows, ascending, each once.
func (k *kernel) cut() []int32 {
	k.edges = k.edges[:0]
	lo, hi := k.win.lo, k.win.hi
	for len(lo) > 0 || len(hi) > 0 {
		var e int32
		if len(hi) == 0 || len(lo) > 0 && lo[0] <= hi[0] {
			e, lo = lo[0], lo[1:]
		} else {
			e, hi = hi[0], hi[1:]
		}
		if n := len(k.edges); n == 0 || k.edges[n-1] != e {
			k.edges = append(k.edges, e)
		}
	}
	return k.edges
}

// overBlocks calls fn for each window that isn't empty, with the blocks that it is
// made of: those from a up to, without, b. Block a begins at edges[a].
func (k *kernel) overBlocks(edges []int32, fn func(i, a, b int)) {
	a, b := 0, 0
	for i, hi := range k.win.hi {
		lo := k.win.lo[i]
		for edges[a] < lo {
			a++
		}
		for edges[b] < hi {
			b++
		}
		if hi > lo {
			fn(i, a, b)
		}
	}
}

// extreme is max_over_time() and min_over_time(): the first of the greatest, or
// NaN if there is nothing else.
func (k *kernel) extreme(_ []int64, v []float64, out *points) {
	fold := greatest
	if k.leaf.function() == "min_over_time" {
		fold = least
	}
	if !k.overlapping() {
		for i, hi := range k.win.hi {
			if lo := k.win.lo[i]; hi > lo {
				out.add(i, fold(v[lo], v[lo+1:hi]))
			}
		}
		return
	}
	edges := k.cut()
	k.best = k.best[:0]
	for e := 0; e+1 < len(edges); e++ {
		k.best = append(k.best, fold(v[edges[e]], v[edges[e]+1:edges[e+1]]))
	}
	k.overBlocks(edges, func(i, a, b int) { out.add(i, fold(k.best[a], k.best[a+1:b])) })
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
	one := sumOf
	if k.leaf.function() == "avg_over_time" {
		one = avgOf
	}
	if !k.overlapping() {
		for i, hi := range k.win.hi {
			if lo := k.win.lo[i]; hi > lo {
				out.add(i, one(v[lo:hi]))
			}
		}
		return
	}
	edges := k.cut()
	k.blocks = k.blocks[:0]
	for e := 0; e+1 < len(edges); e++ {
		var b block
		for _, x := range v[edges[e]:edges[e+1]] {
			b.v, b.c = kahansum.Inc(x, b.v, b.c)
		}
		k.blocks = append(k.blocks, b)
	}
	avg := k.leaf.function() == "avg_over_time"
	k.overBlocks(edges, func(i, a, b int) {
		var s block
		ok := true
		for _, x := range k.blocks[a:b] {
			s.v, s.c = kahansum.Inc(x.v, s.v, s.c)
			s.c += x.c
			ok = ok && math.Abs(x.v) < huge && math.Abs(s.v) < huge // not for NaN
		}
		in := v[edges[a]:edges[b]]
		switch n := float64(len(in)); {
		case !ok:
			out.add(i, one(in))
		case avg:
			out.add(i, s.v/n+s.c/n)
		default:
			out.add(i, s.v+s.c)
		}
	})
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

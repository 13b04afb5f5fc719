package plan

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// columnOfTimes gives times at about an interval in ms: exact, or with jitter, gaps, or nothing of a grid.
func columnOfTimes(r *rand.Rand, interval int64) (t []int64) {
	at := int64(1_700_000_000_000) + r.Int64N(2*interval)
	jitter, gaps, wild := r.IntN(3) == 0, r.IntN(3) == 0, r.IntN(8) == 0
	for range r.IntN(300) {
		at += interval
		if wild {
			at += r.Int64N(3 * interval)
		}
		if gaps && r.IntN(20) == 0 {
			at += interval * r.Int64N(30)
		}
		x := at
		if jitter && r.IntN(10) == 0 {
			x += r.Int64N(interval / 2)
		}
		t = append(t, x)
	}
	return t
}

// columnOfValues gives as many values: of counters, or of anything.
func columnOfValues(r *rand.Rand, n, kinds int) []float64 {
	odd := []float64{0, math.Copysign(0, -1), math.NaN(), math.Inf(1), math.Inf(-1), -3, 1e300, -1e308, 1e-310, 1e18}
	kind, markers := r.IntN(kinds), r.IntN(3) == 0
	v, x := make([]float64, n), float64(r.IntN(3)*r.IntN(100))
	for i := range v {
		switch {
		case kind == 0: // idle
		case kind == 1 && r.IntN(3) == 0, kind == 2:
			x += float64(r.IntN(50)) / 10
			if r.IntN(40) == 0 {
				x = float64(r.IntN(2))
			}
		case kind == 3:
			x += r.NormFloat64()
		case kind == 4:
			if x = r.Float64(); r.IntN(3) == 0 {
				x = odd[r.IntN(len(odd))]
			}
		}
		if v[i] = x; markers && r.IntN(30) == 0 {
			v[i] = math.Float64frombits(value.StaleNaN)
		}
	}
	return v
}

// Kernels over series of which some share their times give what the engine's functions give for each window of
// each, and count the same samples.
func TestKernelsOfSharedTimes(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	parse := parser.NewParser(parser.Options{EnableExperimentalFunctions: true})
	names := slices.Sorted(maps.Keys(kernels))
	seen := map[string]int{}
	for round := range 4000 {
		name := names[r.IntN(len(names))]
		if name == "absent_over_time" {
			continue // as a leaf it is present_over_time
		}
		interval := []int64{1000, 15_000, 60_000}[r.IntN(3)]
		step := interval * []int64{1, 1, 4, 20}[r.IntN(4)]
		if r.IntN(3) == 0 {
			step = 1 + r.Int64N(6*interval)
		}
		rng := interval * []int64{1, 2, 4, 20, 100}[r.IntN(5)]
		if r.IntN(3) == 0 {
			rng = 1 + r.Int64N(30*interval)
		}
		e, err := parse.ParseExpr(fmt.Sprintf("%s(x[%dms])", name, rng))
		if err != nil {
			t.Fatal(err)
		}
		call := e.(*parser.Call)
		selector := call.Args[0].(*parser.MatrixSelector).VectorSelector.(*parser.VectorSelector)
		selector.Offset = time.Duration(r.Int64N(2*interval)) * time.Millisecond
		start := int64(1_700_000_000_000) + r.Int64N(100*interval)
		leaf := &Leaf{Grid: Grid{Start: start, End: start + step*r.Int64N(80), Step: step}, Call: call, Selector: selector, Range: rng}

		same, kinds := sameBits, 5
		if leaf.Range > 2*step && (name == "sum_over_time" || name == "avg_over_time") {
			// Compensated sums, put together in another order.
			same, kinds = func(a, b float64) bool { return math.Abs(a-b) <= 1e-13*math.Abs(b) }, 3
		}
		k, want := newKernel(leaf, options{}), newCounts(leaf.Grid.Len())
		times := [][]int64{columnOfTimes(r, interval), columnOfTimes(r, interval)}
		var cols *chunkfmt.Series
		var of known
		for i := range 2 + r.IntN(6) {
			which := r.IntN(2)
			column := slices.Clone(times[which])
			if i == 0 || r.IntN(3) > 0 {
				cols = &chunkfmt.Series{Floats: chunkfmt.Floats{T: column, V: columnOfValues(r, len(column), kinds)}}
				of = known{uint64((1 + which) * r.IntN(2)), uint64((1 + i) * r.IntN(2)), falling(r, cols.Floats.V)}
			}
			var got, expect points
			var annos annotations.Annotations
			if err := k.eval(labels.EmptyLabels(), cols, of, &got, &annos); err != nil {
				t.Fatal(err)
			}
			if err := newCaller(leaf, false).eval(labels.EmptyLabels(), cols, &expect, &annos, &want); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got.step, expect.step) || !slices.EqualFunc(got.v, expect.v, same) {
				t.Fatalf("round %d: %s over %d ms, %s, of samples at %v with %v:\n%v %v, want\n%v %v",
					round, name, rng, leaf.Grid, cols.Floats.T, cols.Floats.V, got.step, got.v, expect.step, expect.v)
			}
			seen[name] += len(got.step)
			if r.IntN(6) == 0 {
				k.frames.clear() // as if they took too much memory
				k.given = nil
			}
		}
		k.done()
		if !slices.Equal(k.counts.window, want.window) || !slices.Equal(k.counts.read, want.read) {
			t.Fatalf("round %d: %s counts %v %v, want %v %v", round, name, k.counts.window, k.counts.read, want.window, want.read)
		}
	}
	for _, name := range names {
		if name != "absent_over_time" && seen[name] < 1000 {
			t.Errorf("%d points of %s are not much of a test", seen[name], name)
		}
	}
}

// falling gives stretches in which lie all values that are less than the one before, or NaN, and some others.
func falling(r *rand.Rand, v []float64) (out []history.Span) {
	if r.IntN(4) == 0 {
		return unknown(&chunkfmt.Series{Floats: chunkfmt.Floats{V: v}}).falls
	}
	for i := 0; i < len(v); i++ {
		if x := v[i]; x != x || i > 0 && !(x >= v[i-1]) || r.IntN(50) == 0 {
			to := min(len(v), i+1+r.IntN(3)*r.IntN(20))
			out = append(out, history.Span{From: max(0, i-r.IntN(2)), To: to})
			if n := len(out); n > 1 {
				out[n-1].From = max(out[n-1].From, out[n-2].To)
			}
			i = to - 1
		}
	}
	return out
}

// sameBits, whatever NaN.
func sameBits(a, b float64) bool {
	return math.Float64bits(a) == math.Float64bits(b) || math.IsNaN(a) && math.IsNaN(b)
}

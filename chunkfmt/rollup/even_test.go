package rollup

import (
	"flag"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

var evenQueries = flag.Int("even.n", 10000, "random queries of TestEven")

// stretched is w with stretches for columns of times; without windows that have no floats.
func stretched(w *Windows, cols Columns, width int64) *Windows {
	out := &Windows{}
	for i := range w.End {
		if w.Count[i] == 0 {
			continue
		}
		var one Windows
		one.Append(w, i, i+1, AllColumns)
		one.Even = one.AppendStretches(nil, 0, 1, width)
		one.End = nil
		out.Append(&one, 0, 1, cols)
	}
	return out
}

// TestEven compares what comes of stretches with what comes of columns, bit for bit.
func TestEven(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 1))
	var summariser Summariser
	stretches, windows, evenly, strided, points := 0, 0, 0, 0, map[uint8]int{}
	for range *evenQueries {
		s := randomSeries(r)
		width := []int64{Short, Long}[r.IntN(2)]
		fn := []string{"rate", "increase", "delta", "irate", "count_over_time"}[min(4, r.IntN(8)/2)]
		q := randomQuery(r, fn, width, s)
		switch r.IntN(4) {
		case 0:
			q.Range = width + q.Range%width
		case 1:
			q.Range = width + r.Int64N(width)
		}
		switch r.IntN(9) {
		case 0, 1: // as it is
		case 2, 3:
			q.Range, q.Step = width, width*(2+r.Int64N(12))
		default:
			q.Step = width
		}
		var w Windows
		summariser.Summarise(&w, s, width)
		if r.IntN(20) == 0 { // windows that are of no use
			for range 1 + w.Len()/20 {
				w.Flags[r.IntN(w.Len())] |= NativeHistograms
			}
		}
		e, ok := NewEvaluator(q, width)
		if !ok {
			t.Fatalf("%s isn't covered", q.String())
		}
		even := stretched(&w, e.Columns(), width)
		stretches, windows = stretches+len(even.Even), windows+even.Len()
		w = *stretched(&w, e.Columns(), width)
		w.Expand(e.Columns())
		for i := range even.PrevV {
			if e.rest > 0 && w.End[i]-w.PrevT[i] >= e.rest {
				even.PrevV[i] = r.Float64() // nobody looks at it
			}
		}
		var want, got Result
		wantCount, wantRead := make([]int64, q.Steps), make([]int64, q.Steps)
		count, read := make([]int64, q.Steps), make([]int64, q.Steps)
		e.Eval(&w, &want)
		e.Samples(wantCount, wantRead)
		e.Eval(even, &got)
		if q.Step > width && len(even.Even) > 0 && len(even.End) == 0 {
			strided++
		}
		e.Samples(count, read)
		if len(even.Even) > 0 {
			evenly++
			for i := range even.Even {
				points[even.Even[i].reaches(e.rest)] += even.Even[i].N
			}
		}
		same := slices.EqualFunc(want.Value, got.Value, func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })
		if !same || !slices.Equal(want.Step, got.Step) || !slices.Equal(want.Raw, got.Raw) || !slices.Equal(wantCount, count) || !slices.Equal(wantRead, read) {
			t.Fatalf("%s over %d stretches\nhas %v %v, samples %v %v of %v,\nwant %v %v, samples %v %v of %v",
				q.String(), len(even.Even), got.Step, got.Value, got.Raw, read, count, want.Step, want.Value, want.Raw, wantRead, wantCount)
		}
	}
	t.Logf("%d queries of stretches, %d of them strided; %d stretches of %d windows; windows by what the range after them has of them: %v", evenly, strided, stretches, windows, points)
	if evenly < *evenQueries/5 || strided < *evenQueries/20 || stretches > windows*3/4 || len(points) < 4 || 100*points[2] < *evenQueries {
		t.Error("not much of a test")
	}
}

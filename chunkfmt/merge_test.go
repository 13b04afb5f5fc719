package chunkfmt

import (
	"slices"
	"testing"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
)

// TestMergeHints merges runs of histograms at the times given, all with the hint
// that there was no reset, and looks at which times the hint is still there.
func TestMergeHints(t *testing.T) {
	run := func(times ...int64) *Series {
		s := &Series{}
		for _, ts := range times {
			h := tsdbutil.GenerateTestHistogram(ts)
			h.CounterResetHint = histogram.NotCounterReset
			s.Histograms.T, s.Histograms.H = append(s.Histograms.T, ts), append(s.Histograms.H, h)
		}
		return s
	}
	other := func(s *Series, times ...int64) *Series { // other values at these times, which win
		for _, ts := range times {
			i := slices.Index(s.Histograms.T, ts)
			s.Histograms.H[i] = tsdbutil.GenerateTestHistogram(0)
			s.Histograms.H[i].CounterResetHint = histogram.NotCounterReset
		}
		return s
	}
	check := func(name string, want []int64, runs ...*Series) {
		t.Helper()
		for range 2 {
			out := Merge(runs...)
			var kept []int64
			for i, h := range out.Histograms.H {
				if h.CounterResetHint == histogram.NotCounterReset {
					kept = append(kept, out.Histograms.T[i])
				}
			}
			for i, h := range out.FloatHistograms.H {
				if h.CounterResetHint == histogram.NotCounterReset {
					kept = append(kept, out.FloatHistograms.T[i])
				}
			}
			if !slices.Equal(kept, want) {
				t.Errorf("%s: hints at %v, want %v", name, kept, want)
			}
			for _, r := range runs {
				for _, h := range r.Histograms.H {
					if h.CounterResetHint != histogram.NotCounterReset {
						t.Fatalf("%s: a run was changed", name)
					}
				}
			}
			slices.Reverse(runs)
		}
	}
	check("one run", []int64{1, 2, 3}, run(1, 2, 3))
	check("one after the other", []int64{1, 2, 4}, run(1, 2), run(3, 4))
	check("the same twice", []int64{1, 2, 3}, run(1, 2, 3), run(1, 2, 3))
	check("a copy of the beginning", []int64{1, 2, 3, 4}, run(1, 2), run(1, 2, 3, 4))
	check("a copy of the end", []int64{1, 2, 3, 4}, run(3, 4), run(1, 2, 3, 4))
	check("a copy of the end with more behind", []int64{1, 2, 3, 4, 5}, run(3, 4, 5), run(1, 2, 3, 4))
	check("a copy with gaps", []int64{1, 2, 3, 4}, run(1, 3), run(1, 2, 3, 4))
	check("one between two", []int64{1}, run(1, 3), run(2))
	check("interleaved", []int64{1}, run(1, 3, 5), run(2, 4))
	check("three", []int64{1, 2, 4, 6}, run(1, 2), run(3, 4), run(5, 6))
	check("different values", []int64{1, 2}, run(1, 2, 3), other(run(1, 2), 2))
	check("different values, more behind", []int64{1, 2, 3}, run(1, 2), other(run(1, 2, 3), 2))

	fh := &Series{FloatHistograms: FloatHistograms{T: []int64{4}, H: []*histogram.FloatHistogram{run(4).Histograms.H[0].ToFloat(nil)}}}
	check("two kinds", nil, run(1, 2), fh)
	check("two kinds at one time", nil, run(3, 4), fh)
	check("a float instead", nil, run(1, 2), &Series{Floats: Floats{T: []int64{2}, V: []float64{1}}})
	check("a float behind", []int64{1, 2}, run(1, 2), &Series{Floats: Floats{T: []int64{3}, V: []float64{1}}})
}

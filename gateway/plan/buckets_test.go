package plan

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/prometheus/prometheus/promql"
)

// Quantiles are those of promql.BucketQuantile for each time alone, whatever the buckets.
func TestBucketQuantiles(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	odd := []float64{0, math.Copysign(0, -1), 1e-310, 1e-301, 1e300, math.Inf(1), math.Inf(-1), math.NaN(), -1}
	points, straight := 0, 0
	for round := range 3000 {
		uppers := []float64{-1, 0, 0.1, 0.5, 0.5, 1, 2.5, math.Inf(1)}
		uppers = slices.DeleteFunc(uppers, func(float64) bool { return r.IntN(4) == 0 })
		if r.IntN(4) > 0 {
			uppers = slices.Compact(uppers)
		}
		r.Shuffle(len(uppers), func(i, j int) { uppers[i], uppers[j] = uppers[j], uppers[i] })
		wild, gaps := r.IntN(3) == 0, r.IntN(3) == 0
		tiny := 1e-12 * math.Pow(10, 3*r.Float64())
		phi := []float64{0, 0.5, 0.99, 1, r.Float64()}[r.IntN(5)]
		steps := 1 + r.IntN(20)
		var h histogramOf
		want := make([]promql.Buckets, steps)
		for _, upper := range uppers {
			b := bucket{upper: upper}
			for k := range steps {
				v := float64((k%3)*1000) + math.Floor(100*math.Atan(min(upper, 10)))
				if k%3 == 0 {
					v = 0
				}
				switch {
				case k%3 == 2:
					v *= 0.1 / 3
				case k%6 == 1: // about what promql takes for rounding
					v = 1000 * (1 + tiny*math.Atan(min(upper, 10)))
				}
				if wild {
					switch r.IntN(12) {
					case 0:
						v *= 1 - 1e-13
					case 1:
						v *= 1 - 3e-12
					case 2:
						v = odd[r.IntN(len(odd))]
					}
				}
				if gaps && r.IntN(8) == 0 {
					continue
				}
				b.floats = append(b.floats, promql.FPoint{T: int64(k), F: v})
				want[k] = append(want[k], promql.Bucket{UpperBound: upper, Count: v})
			}
			h.buckets = append(h.buckets, b)
		}
		forced := false
		var expect []promql.FPoint
		for k := range want {
			if len(want[k]) == 0 {
				continue
			}
			slices.SortStableFunc(want[k], func(a, b promql.Bucket) int {
				switch {
				case a.UpperBound < b.UpperBound:
					return -1
				case a.UpperBound > b.UpperBound:
					return 1
				}
				return 0
			})
			v, f, _, _, _, _ := promql.BucketQuantile(phi, want[k])
			forced = forced || f
			expect = append(expect, promql.FPoint{T: int64(k), F: v})
		}
		if len(h.buckets) == 0 {
			continue
		}
		probe := histogramOf{buckets: slices.Clone(h.buckets)}
		slices.SortFunc(probe.buckets, func(a, b bucket) int {
			if a.upper < b.upper {
				return -1
			}
			return 1
		})
		if probe.proper() {
			straight += len(probe.straight(phi, make([]float64, len(uppers)), nil))
		}
		got, ok := h.quantile(phi)
		if ok == forced {
			t.Fatalf("round %d: monotonicity forced %v, want %v", round, !ok, forced)
		}
		if !ok {
			continue
		}
		points += len(got)
		same := func(a, b promql.FPoint) bool { return a.T == b.T && math.Float64bits(a.F) == math.Float64bits(b.F) }
		if !slices.EqualFunc(got, expect, same) {
			t.Fatalf("round %d: quantile(%v) over %v: %v, want %v", round, phi, uppers, got, expect)
		}
	}
	if points < 10_000 || straight < 5000 {
		t.Errorf("%d points, %d of them straight: the data are no good", points, straight)
	}
}

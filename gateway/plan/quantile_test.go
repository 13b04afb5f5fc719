package plan

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestQuantile compares with what sorting gives.
func TestQuantile(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	kinds := map[string]func(i, n int) float64{
		"random":  func(int, int) float64 { return rng.NormFloat64() },
		"few":     func(int, int) float64 { return float64(rng.IntN(4)) },
		"equal":   func(int, int) float64 { return 7 },
		"rising":  func(i, _ int) float64 { return float64(i) },
		"falling": func(i, _ int) float64 { return float64(-i) },
		"peak":    func(i, n int) float64 { return float64(min(i, n-i)) },
		"odd": func(int, int) float64 {
			return []float64{math.NaN(), math.Inf(1), math.Inf(-1), 1, 2, 3}[rng.IntN(6)]
		},
		"NaN": func(int, int) float64 { return math.NaN() },
	}
	for name, value := range kinds {
		for _, n := range []int{1, 2, 3, 16, 17, 18, 100, 3000} {
			for _, phi := range []float64{0, 0.001, 0.25, 0.5, 0.95, 0.999, 1} {
				values := make([]float64, n)
				for i := range values {
					values[i] = value(i, n)
				}
				sorted := slices.Clone(values)
				slices.Sort(sorted)
				rank := phi * float64(n-1)
				k, weight := int(rank), rank-math.Floor(rank)
				want := sorted[k]
				if weight != 0 {
					want = want*(1-weight) + sorted[k+1]*weight
				}
				if got := quantile(phi, values); math.Float64bits(got) != math.Float64bits(want) && !(math.IsNaN(got) && math.IsNaN(want)) {
					t.Errorf("%s, %d values: quantile %v is %v, want %v", name, n, phi, got, want)
				}
				slices.Sort(values)
				for i := range values {
					if math.Float64bits(values[i]) != math.Float64bits(sorted[i]) && !math.IsNaN(values[i]) {
						t.Fatalf("%s, %d values: they have changed", name, n)
					}
				}
			}
		}
	}
}

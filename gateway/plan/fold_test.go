package plan

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/kahansum"
)

// TestSum compares the sums of a group with kahansum's, bit for bit.
func TestSum(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 1))
	odd := []float64{0, math.Copysign(0, -1), 1, -1, math.MaxFloat64, -math.MaxFloat64, math.Inf(1), math.Inf(-1), math.NaN(), math.SmallestNonzeroFloat64, 0x1p1023, -0x1p970, 0x1p969}
	random := func() float64 {
		switch r.IntN(6) {
		case 0:
			return odd[r.IntN(len(odd))]
		case 1:
			return math.Float64frombits(r.Uint64())
		case 2:
			return math.Copysign(math.MaxFloat64*(1-r.Float64()*1e-15), r.Float64()-0.5)
		case 3:
			return r.NormFloat64() * math.Pow(2, float64(r.IntN(120)-60))
		}
		return float64(r.IntN(1000)) / 10
	}
	const steps = 7
	noNumbers := 0
	for range 20000 {
		g := newGroup(parser.SUM, steps, new(columns))
		var want, wantC [steps]float64
		var n [steps]int
		for range 1 + r.IntN(12) {
			var p points
			for s := range int32(steps) {
				if r.IntN(8) > 0 {
					p.step, p.v = append(p.step, s), append(p.v, random())
				}
			}
			if len(p.step) == 0 {
				continue
			}
			g.sum(&p)
			for i, s := range p.step {
				if n[s]++; n[s] == 1 {
					want[s] = p.v[i]
				} else {
					want[s], wantC[s] = kahansum.Inc(p.v[i], want[s], wantC[s])
				}
			}
		}
		for s := range steps {
			if math.IsNaN(want[s]) || math.IsInf(want[s], 0) {
				noNumbers++
			}
			if (g.n[s] > 0) != (n[s] > 0) || math.Float64bits(g.value(parser.SUM, s)) != math.Float64bits(want[s]+wantC[s]) || g.v[s] != want[s] && want[s] == want[s] || math.Float64bits(g.c[s]) != math.Float64bits(wantC[s]) {
				t.Fatalf("%d values give %v and %v, want %v and %v", n[s], g.v[s], g.c[s], want[s], wantC[s])
			}
		}
	}
	if noNumbers < 1000 {
		t.Error("not much of a test")
	}
}

package rollup

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/util/kahansum"
)

// TestDecimals compares what is made of integers with what is made of floats.
func TestDecimals(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var s Summariser
	taken := 0
	for range 20000 {
		n := 1 + r.IntN(60)
		decimals := max(0, r.IntN(16)-5)
		power := powersOf10[decimals]
		v, times := make([]float64, n), make([]int64, n)
		digits, shape := 1+r.IntN(57), r.IntN(4)
		x := r.Int64N(1 << digits)
		for i := range v {
			switch {
			case shape == 0 && r.IntN(20) > 0: // a counter
				x += r.Int64N(1 << (digits / 2))
			case shape == 1: // often the same
				x += r.Int64N(3) / 2
			case shape > 1:
				x = r.Int64N(1<<digits) - r.Int64N(1<<digits)
			default:
				x = 0
			}
			times[i], v[i] = int64(i), float64(x)/power
		}
		switch r.IntN(40) {
		case 0:
			v[r.IntN(n)] = math.Copysign(0, -1)
		case 1:
			v[r.IntN(n)] = inf
		case 2:
			v[r.IntN(n)] = 1.0 / 3
		case 3:
			v[r.IntN(n)] = -1e300
		}
		got, want := &Windows{}, &Windows{}
		got.grow(1)
		want.grow(1)
		if !s.integers(got, 0, times, v, decimals) {
			continue
		}
		taken++
		want.summarise(0, times, v, decimals, false, nil)
		if m, w := got.M2[0], want.M2[0]; (m == 0) != (w == 0) || !(math.Abs(m-w) <= math.Max(1e-11*w, float64(n)*math.Pow(0x1p-51*math.Max(-want.Min[0], want.Max[0]), 2)+
			0x1p-50*math.Max(-want.Min[0], want.Max[0])*math.Sqrt(float64(n)*w))) {
			t.Fatalf("%d decimals %v: M2 %v of integers, %v of floats", decimals, v, m, w)
		}
		got.M2, want.M2 = nil, nil
		if diff := cmp.Diff(want, got, bitwise); diff != "" {
			t.Fatalf("%d decimals %v: %s", decimals, v, diff)
		}
	}
	if taken < 10000 {
		t.Errorf("only %d of 20000 were taken for decimals", taken)
	}
}

// TestCompensated compares with the sum that Prometheus makes.
func TestCompensated(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		v := make([]float64, r.IntN(30))
		for i := range v {
			v[i] = math.Ldexp(r.NormFloat64(), r.IntN(120)*r.IntN(2)-60)
			if r.IntN(100) == 0 {
				v[i] = []float64{math.Copysign(0, -1), inf, -inf, math.MaxFloat64, nan, 5e-324}[r.IntN(6)]
			}
		}
		var sum, c float64
		for _, x := range v {
			sum, c = kahansum.Inc(x, sum, c)
		}
		got, gotC := compensated(v)
		if sum-sum == 0 && (math.Float64bits(got) != math.Float64bits(sum) || gotC != c && math.Abs(sum) < math.MaxFloat64/2) {
			t.Fatalf("%v: %v and %v, want %v and %v", v, got, gotC, sum, c)
		}
		if sum-sum != 0 && got-got == 0 {
			t.Fatalf("%v: %v, want %v", v, got, sum)
		}
	}
}

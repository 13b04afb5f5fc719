package codec

import (
	"math"
	"math/rand/v2"
	"testing"
)

// TestDecimalsAreDivided holds the reciprocals to what the format says: division.
func TestDecimalsAreDivided(t *testing.T) {
	rounds := 200_000
	if testing.Short() {
		rounds = 20_000
	}
	r := rand.New(rand.NewPCG(3, 4))
	ints, deltas, got := make([]int64, 13), make([]int64, 13), make([]float64, 13)
	for k := range maxDecimals + 1 {
		edge := int64(1) << 52
		if k <= maxReciprocal {
			edge = 1 << reciprocals[k].bits
		}
		check := func() {
			t.Helper()
			toDecimals(got, ints, k)
			for i, x := range ints {
				if want := float64(x) / powersOf10[k]; math.Float64bits(want) != math.Float64bits(got[i]) {
					t.Fatalf("%d / 10^%d: %v, want %v", x, k, got[i], want)
				}
			}
			if k > maxReciprocal {
				return
			}
			last := int64(5)
			for i, x := range ints {
				deltas[i] = x - last
				last = x
			}
			clear(got)
			if l := sumDecimals(got, deltas, 5, k); l != last {
				t.Fatalf("sum %d, want %d", l, last)
			}
			for i, x := range ints {
				if want := float64(x) / powersOf10[k]; math.Float64bits(want) != math.Float64bits(got[i]) {
					t.Fatalf("sum %d / 10^%d: %v, want %v", x, k, got[i], want)
				}
			}
		}
		for round := range rounds {
			for i := range ints {
				ints[i] = (r.Int64() >> r.UintN(63)) % (edge + 1) // of all magnitudes
			}
			switch round % 4 {
			case 0:
				for i := range ints {
					ints[i] = edge - r.Int64N(1000)
				}
			case 1:
				ints[r.IntN(len(ints))] = r.Int64() - r.Int64() // beyond
			}
			check()
		}
		for _, x := range []int64{0, 1, -1, edge, edge - 1, edge + 1, -edge, -edge - 1, -edge + 1, 2*edge - 1, math.MaxInt64, math.MinInt64} {
			for i := range ints {
				ints[i] = x
			}
			check()
		}
	}
}

// TestDecimalInts compares with one value after the other.
func TestDecimalInts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		k := r.IntN(maxDecimals + 1)
		x := float64(r.Int64N(1<<r.IntN(63)+1)) / powersOf10[r.IntN(maxDecimals+1)]
		switch r.IntN(20) {
		case 0:
			x = math.Float64frombits(r.Uint64())
		case 1:
			x = []float64{math.Copysign(0, -1), math.Inf(1), math.NaN(), 1e15, 1e15 - 0.5, 1 << 62, 1<<51 - 0.5}[r.IntN(7)]
		}
		if r.IntN(2) == 0 {
			x = -x
		}
		var got [1]int64
		want, ok := toDecimal(x, powersOf10[k])
		if n := decimalInts(got[:], []float64{x}, k); (n == 1) != ok || ok && got[0] != want {
			t.Fatalf("%v of %d decimals: %d, %d of 1, want %d, %t", x, k, got[0], n, want, ok)
		}
	}
}

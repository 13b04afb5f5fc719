package codec

import (
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestSort(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var e Encoder
	for range 2000 {
		v := make([]int64, 1+r.IntN(blockLen))
		width, off := 1+r.IntN(40), r.Int64()-r.Int64()
		for i := range v {
			v[i] = off + int64(r.Uint64()>>(64-width)) //nolint:gosec // it may overflow
		}
		want := slices.Sorted(slices.Values(v))
		lo, hi := ends(v)
		if lo != want[0] || hi != want[len(want)-1] {
			t.Fatalf("%v from %d to %d", v, lo, hi)
		}
		if hi < lo || uint64(hi)-uint64(lo) > 1<<62 { //nolint:gosec // bits
			continue
		}
		if got := e.sort(v, lo, bits.Len64(uint64(hi-lo))); !slices.Equal(got, want) { //nolint:gosec // not negative
			t.Fatalf("%v became %v", v, got)
		}
	}
}

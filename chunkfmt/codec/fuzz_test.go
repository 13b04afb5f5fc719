package codec

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"
)

func words(b []byte) []uint64 {
	var out []uint64
	for ; len(b) >= 8 && len(out) < 3000; b = b[8:] {
		out = append(out, binary.LittleEndian.Uint64(b))
	}
	return out
}

// FuzzRoundTrip makes columns of the bytes in several ways.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"), uint8(0))
	f.Add(make([]byte, 2000), uint8(40))
	f.Add(binary.LittleEndian.AppendUint64(make([]byte, 3000), staleBits), uint8(10))
	var e Encoder
	var d Decoder
	f.Fuzz(func(t *testing.T, b []byte, shift uint8) {
		var ints, narrow, sums []int64
		var floats, decimals []float64
		var sum int64
		for _, w := range words(b) {
			x := int64(w)
			n := x >> (shift & 63)
			sum += n
			ints, narrow, sums = append(ints, x), append(narrow, n), append(sums, sum)
			floats = append(floats, math.Float64frombits(w))
			decimals = append(decimals, float64(n)/powersOf10[shift%15])
		}
		checkInts(t, &e, &d, ints)
		checkInts(t, &e, &d, narrow)
		checkInts(t, &e, &d, sums)
		checkFloats(t, &e, &d, floats)
		checkFloats(t, &e, &d, decimals)
		slices.Sort(ints)
		slices.Sort(narrow)
		checkTimes(t, &e, &d, slices.Compact(ints))
		checkTimes(t, &e, &d, slices.Compact(narrow))
	})
}

// FuzzDecode gives any bytes to the decoders.
func FuzzDecode(f *testing.F) {
	var e Encoder
	v := make([]int64, 300)
	for i := range v {
		v[i] = int64(i*i%37*4096 + i/40)
	}
	f.Add(e.AppendInts(nil, v), 300)
	f.Add(e.AppendTimes(nil, []int64{1, 2, 3, 50, 60, 70, 80, 81}), 8)
	f.Add(e.AppendFloats(nil, []float64{1, 2, math.NaN(), 4.5}), 4)
	for _, form := range []byte{formConst, formPacked, formDelta, formScaled, formBitmap, formRuns} {
		f.Add([]byte{form, 2, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 12)
		f.Add([]byte{0, form, 2, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 12)
	}
	var d Decoder
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		n = int(uint(n) % (MaxLen + 2))
		check := func(got int, err error) {
			t.Helper()
			if err != nil && !errors.Is(err, ErrCorrupt) || err == nil && got != n {
				t.Fatalf("%d of %d values, %v", got, n, err)
			}
		}
		ints, _, err := d.Ints(nil, b, n)
		check(len(ints), err)
		times, _, err := d.Times(nil, b, n)
		check(len(times), err)
		floats, _, err := d.Floats(nil, b, n)
		check(len(floats), err)
		if n <= MaxLen {
			sum := make([]int64, n)
			from := n / 3 * (len(b) & 3)
			floats, _, err = d.FloatsOn(nil, b, n, from, sum, sum, false)
			check(len(floats), err)
			_ = d.BaseInts(sum, b, from, false)
			if n > 0 {
				checkFrom(t, &d, b, n, min(from, n-1), sum)
			}
		}
	})
}

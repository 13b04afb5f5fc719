package codec

import "math"

// Dividing by a power of ten is what takes longest in decoding decimals. So it is
// done by multiplying with the reciprocal in two parts: the upper of so few bits
// that its product with an integer of at most reciprocal.bits bits is exact, the
// lower of 53 bits. Their sum, before it is rounded, is off from the quotient
// i/10^k by less than 2^-(104-bits) of it. A quotient that is no double, and has
// no more than 53 bits in i, is at least 2^-54 * 5^-k of it away from where
// rounding changes direction, which is more as long as bits < 50 - k*log2(5). So
// the result is that of the division, bit for bit, with or without fused
// multiply-add.
type reciprocal struct {
	bits         uint
	upper, lower float64
}

// maxReciprocal is the largest power that has a reciprocal.
const maxReciprocal = 9

//nolint:gochecknoglobals // a constant table
var reciprocals = func() (all [maxReciprocal + 1]reciprocal) {
	for k := range all {
		power := powersOf10[k]
		r := reciprocal{bits: 48 - uint(k)*7/3}
		// The upper 53-bits bits, exact in all steps.
		r.upper = math.Float64frombits(math.Float64bits(1/power) &^ (1<<r.bits - 1))
		r.lower = (1 - float64(r.upper*power)) / power
		all[k] = r
	}
	return all
}()

// toDecimals sets dst to the integers divided by 10^decimals.
func toDecimals(dst []float64, ints []int64, decimals int) {
	power := powersOf10[decimals]
	dst = dst[:len(ints)]
	if decimals > maxReciprocal {
		for i, x := range ints {
			dst[i] = float64(x) / power
		}
		return
	}
	r := &reciprocals[decimals]
	upper, lower, half := r.upper, r.lower, int64(1)<<r.bits
	var outside int64
	o, s := dst, ints
	for len(s) >= 4 && len(o) >= 4 {
		v, f := (*[4]int64)(s), (*[4]float64)(o)
		f0, f1, f2, f3 := float64(v[0]), float64(v[1]), float64(v[2]), float64(v[3])
		outside |= (v[0] + half) | (v[1] + half) | (v[2] + half) | (v[3] + half)
		f[0], f[1], f[2], f[3] = f0*upper+f0*lower, f1*upper+f1*lower, f2*upper+f2*lower, f3*upper+f3*lower
		s, o = s[4:], o[4:]
	}
	o = o[:len(s)]
	for i, x := range s {
		f := float64(x)
		outside |= x + half
		o[i] = f*upper + f*lower
	}
	if uint64(outside)>>(r.bits+1) != 0 {
		for i, x := range ints {
			dst[i] = float64(x) / power
		}
	}
}

// sumDecimals is sumInts, and toDecimals in one, for at most maxReciprocal decimals.
func sumDecimals(dst []float64, deltas []int64, last int64, decimals int) int64 {
	r := &reciprocals[decimals]
	upper, lower, half := r.upper, r.lower, int64(1)<<r.bits
	var outside int64
	first := last
	o, s := dst, deltas
	for len(s) >= 4 && len(o) >= 4 {
		v, f := (*[4]int64)(s), (*[4]float64)(o)
		x0 := last + v[0]
		x1 := x0 + v[1]
		x2 := x1 + v[2]
		last = x2 + v[3]
		f0, f1, f2, f3 := float64(x0), float64(x1), float64(x2), float64(last)
		outside |= (x0 + half) | (x1 + half) | (x2 + half) | (last + half)
		f[0], f[1], f[2], f[3] = f0*upper+f0*lower, f1*upper+f1*lower, f2*upper+f2*lower, f3*upper+f3*lower
		s, o = s[4:], o[4:]
	}
	o = o[:len(s)]
	for i, d := range s {
		last += d
		outside |= last + half
		f := float64(last)
		o[i] = f*upper + f*lower
	}
	if uint64(outside)>>(r.bits+1) != 0 {
		sumInts(deltas, first)
		power := powersOf10[decimals]
		for i, x := range deltas {
			dst[i] = float64(x) / power
		}
	}
	return last
}

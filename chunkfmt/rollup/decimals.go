package rollup

import (
	"math"
	"math/bits"
	"slices"
)

// Most series are decimals with few digits. Their windows are made of the integers that these are, in loops
// without branches that can't be foreseen: several times as fast as with floats, and all sums are exact.

// integers is Windows.summarise for floats that all have so many decimals, or fewer, and few digits. It reports
// false, and has filled in nothing, if there are others.
func (s *Summariser) integers(w *Windows, i int, t []int64, v []float64, decimals int) bool {
	n := len(v)
	if decimals < 0 {
		return false
	}
	some := v // that tell of all
	if equal(v) {
		some = v[:1]
	}
	ints := slices.Grow(s.ints[:0], len(some))[:len(some)]
	s.ints = ints
	power := powersOf10[decimals]
	if decimals == 0 && !wholes(ints, some) || decimals > 0 && !scaled(ints, some, power) {
		return false
	}
	changes, resets, lost := steps(ints)
	first := ints[0]
	least, greatest := first, ints[len(ints)-1]
	if resets > 0 {
		least, greatest = span(ints)
	}
	var off, squares int64
	if changes > 0 {
		off, squares = sums(ints)
	}
	limit := int64(1 << 49)
	if n >= 1<<12 {
		limit = math.MaxInt64 / 4 / int64(n)
	}
	sum := int64(n)*first + off
	if least <= -limit || greatest >= limit || decimals > 0 && (!exactInt(sum) || !exactInt(lost)) {
		return false // of as many as decimalSum does without, or some more
	}
	w.ends(i, t, v)
	w.Resets[i], w.Changes[i] = uint32(resets), uint32(changes) //nolint:gosec // fewer than there are floats
	if decimals == 0 {
		w.Min[i], w.Max[i], w.Sum[i], w.Reset[i] = float64(least), float64(greatest), float64(sum), float64(lost)
	} else {
		w.Min[i], w.Max[i], w.Sum[i], w.Reset[i] = float64(least)/power, float64(greatest)/power, float64(sum)/power, float64(lost)/power
	}
	switch {
	case changes == 0:
	case 2*bits.Len64(uint64(greatest-least))+bits.Len(uint(n)) > 62: //nolint:gosec // not negative
		w.M2[i] = moment(v, w.Sum[i], 0)
	default:
		w.M2[i] = shorten(momentOf(n, off, squares) / (float64(n) * power * power))
	}
	return true
}

// Each of these loops is a function of its own, and not inlined, for what it needs to stay in registers.

// equal says whether all have the same bits.
func equal(v []float64) bool {
	first := math.Float64bits(v[0])
	for len(v) >= 4 {
		x := (*[4]float64)(v)
		if (math.Float64bits(x[0])^first)|(math.Float64bits(x[1])^first)|(math.Float64bits(x[2])^first)|(math.Float64bits(x[3])^first) != 0 {
			return false
		}
		v = v[4:]
	}
	for _, x := range v {
		if math.Float64bits(x) != first {
			return false
		}
	}
	return true
}

// steps counts the integers that differ from the one before, and those that are less, and gives the sum of those
// before these.
//
//go:noinline
func steps(ints []int64) (changes, resets, lost int64) {
	before := ints[0]
	for len(ints) >= 2 { // two at a time are faster than one
		x := (*[2]int64)(ints)
		x0, x1 := x[0], x[1]
		d, e := x0-before, x1-x0
		fell, fell2 := d>>63, e>>63
		lost += before&fell + x0&fell2
		resets -= fell + fell2
		changes -= (d|-d)>>63 + (e|-e)>>63
		before = x1
		ints = ints[2:]
	}
	if len(ints) > 0 {
		d := ints[0] - before
		fell := d >> 63
		lost += before & fell
		resets -= fell
		changes -= (d | -d) >> 63
	}
	return changes, resets, lost
}

// span gives the least and the greatest.
//
//go:noinline
func span(ints []int64) (least, greatest int64) {
	least, greatest = ints[0], ints[0]
	for _, x := range ints {
		least, greatest = min(least, x), max(greatest, x)
	}
	return least, greatest
}

// sums gives the sum of the differences to the first, and of their squares.
//
//go:noinline
func sums(ints []int64) (off, squares int64) {
	first := ints[0]
	for _, x := range ints {
		d := x - first
		off += d
		squares += d * d
	}
	return off, squares
}

// exactInt says whether a float is exactly that, and all between 0 and it.
func exactInt(i int64) bool { return i <= 1<<53 && i >= -1<<53 }

// magic is such that the sum of it and another float has no digits behind the point, and that its bits and those of
// magic differ by as much as it and magic do, if the other is less than 1<<51. If it isn't, they differ by more.
const magic = 3 << 51

// wholes sets ints to what the floats are, and reports whether they are integers. Those of a magnitude of 1<<51 and more
// become others, but no lesser ones.
//
//go:noinline
func wholes(ints []int64, v []float64) bool {
	var differ uint64
	ints = ints[:len(v)]
	for i, x := range v {
		p := x + magic
		ints[i] = int64(math.Float64bits(p) - math.Float64bits(magic)) //nolint:gosec // two's complement
		differ |= math.Float64bits(p-magic) ^ math.Float64bits(x)
	}
	return differ == 0
}

// scaled is wholes for floats times a power of 10.
//
//go:noinline
func scaled(ints []int64, v []float64, power float64) bool {
	var differ uint64
	ints = ints[:len(v)]
	for i, x := range v {
		p := x*power + magic
		ints[i] = int64(math.Float64bits(p) - math.Float64bits(magic)) //nolint:gosec // two's complement
		differ |= math.Float64bits((p-magic)/power) ^ math.Float64bits(x)
	}
	return differ == 0
}

// momentOf is n times the sum of the squares of the differences to the mean of n integers, of which the sum of those to
// one of them is given, and that of their squares: exact, rounded once.
func momentOf(n int, sum, squares int64) float64 {
	if sum < 0 {
		sum = -sum
	}
	hi, lo := bits.Mul64(uint64(n), uint64(squares)) //nolint:gosec // neither is negative
	hi2, lo2 := bits.Mul64(uint64(sum), uint64(sum)) //nolint:gosec // not negative
	lo, borrow := bits.Sub64(lo, lo2, 0)
	hi, _ = bits.Sub64(hi, hi2, borrow)
	if hi == 0 {
		return float64(lo)
	}
	return float64(hi)*0x1p64 + float64(lo)
}

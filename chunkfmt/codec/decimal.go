package codec

import (
	"math"
	"slices"
)

// BitsScale is the scale of integers that are the bits of floats, ordered as the
// numbers are; a lower scale is a number of decimals.
const BitsScale = floatBits

// Scale finds what all the values of the columns are integers of: decimals with so
// many digits behind the point, or BitsScale. It reports false if there are
// infinities, NaN or negative zeros among them, which are integers of nothing.
func Scale(columns ...[]float64) (scale byte, ok bool) {
	k := 0
	for _, v := range columns {
		for _, x := range v {
			if special(x) {
				return 0, false
			}
			for k <= scanDecimals {
				if _, ok := toDecimal(x, powersOf10[k]); ok {
					break
				}
				// Those before are decimals of one more digit as well, or the caller
				// finds out.
				k++
			}
		}
	}
	if k > scanDecimals {
		return BitsScale, true
	}
	return byte(k), true
}

// GuessScale is Scale of some of the values.
func GuessScale(v []float64) byte {
	if k := decimals(v); k >= 0 {
		return byte(k)
	}
	return BitsScale
}

// ScaledInts appends the integers that values are at a scale. It reports false if
// one is none; then what is appended means nothing.
func ScaledInts(dst []int64, v []float64, scale byte) ([]int64, bool) {
	if scale == BitsScale {
		for _, x := range v {
			dst = append(dst, orderedBits(math.Float64bits(x)))
		}
		return dst, true
	}
	from := len(dst)
	dst = slices.Grow(dst, len(v))[:from+len(v)]
	return dst, decimalInts(dst[from:], v, int(scale)) == len(v)
}

// ScaledFloats sets dst to the floats that integers of a scale are; there are as
// many. It reports false if there is no such scale.
func ScaledFloats(dst []float64, ints []int64, scale byte) bool {
	if scale > maxDecimals && scale != BitsScale {
		return false
	}
	m := mapping{kind: scale}
	m.apply(dst, ints)
	return true
}

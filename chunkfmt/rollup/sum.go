package rollup

import (
	"math"

	"github.com/prometheus/prometheus/util/kahansum"
)

const (
	maxDecimals   = 14 // more are not tried
	decimalSample = 32 // values looked at to find out how many decimals there are
)

//nolint:gochecknoglobals // a constant table
var powersOf10 = [maxDecimals + 1]float64{1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14}

// decimals guesses how many decimals the values have; -1: most aren't decimals.
func decimals(v []float64) int {
	most, seen, bad := 0, 0, 0
	step := max(1, len(v)/decimalSample)
	for i := 0; i < len(v); i += step {
		x := v[i]
		if x-x != 0 {
			continue
		}
		seen++
		k := most
		for k <= maxDecimals && !isDecimal(x, k) {
			k++
		}
		if k <= maxDecimals {
			most = k
		} else if bad++; bad > decimalSample/4 {
			return -1
		}
	}
	if 4*bad > seen {
		return -1
	}
	return most
}

func isDecimal(x float64, decimals int) bool {
	_, ok := decimalSum([]float64{x}, decimals)
	return ok
}

// decimalSum is the sum of values with so many decimals; exact, rounded once. It
// reports false if they have more, or so many digits that this can't be.
func decimalSum(v []float64, decimals int) (sum float64, ok bool) {
	ints := int64(0)
	limit := int64(math.MaxInt64 / 2)
	if n := int64(len(v)); n > 1 {
		limit /= n
	}
	magnitudes := int64(0) // has the bits of all
	if decimals == 0 {
		for _, x := range v {
			i := int64(x)
			if float64(i) != x {
				return 0, false
			}
			ints += i
			magnitudes |= i ^ i>>63
		}
		return float64(ints), magnitudes < limit
	}
	power := powersOf10[decimals]
	for _, x := range v {
		p := x * power
		if !(p < 1e15 && p > -1e15) { // more than 15 digits: any float is such a decimal, or nearly so
			return 0, false
		}
		i := int64(p + math.Copysign(0.5, p))
		if float64(i)/power != x {
			return 0, false
		}
		ints += i
		magnitudes |= i ^ i>>63
	}
	if magnitudes >= limit || ints > 1<<53 || ints < -1<<53 {
		return 0, false
	}
	return float64(ints) / power, true
}

// times is total of values that are all the same.
func times(v []float64, decimals int) float64 {
	if decimals >= 0 {
		power := powersOf10[decimals]
		if one, ok := decimalSum(v[:1], decimals); ok && one == v[0] {
			p := v[0] * power
			if i := int64(p + math.Copysign(0.5, p)); i < 1<<40 && i > -1<<40 && len(v) < 1<<13 {
				return float64(i*int64(len(v))) / power
			}
		}
	}
	sum, _ := total(v, decimals)
	return sum
}

// total is the sum of values that have perhaps so many decimals, rounded, and what
// was rounded off.
func total(v []float64, decimals int) (sum, rest float64) {
	if decimals >= 0 {
		if s, ok := decimalSum(v, decimals); ok {
			return s, 0
		}
	}
	sum, c := compensated(v)
	if (sum-sum)+(c-c) != 0 {
		sum, c = 0, 0
		for _, x := range v {
			sum, c = kahansum.Inc(x, sum, c)
		}
	}
	if math.IsInf(sum, 0) {
		return sum, 0
	}
	t := sum + c
	return t, c - (t - sum)
}

// compensated is what kahansum.Inc gives for values of which no sum overflows, without its branches: what an addition
// rounds off is found by Knuth's TwoSum, which is exact as well ("The Art of Computer Programming", vol. 2, 4.2.2).
// Otherwise sum or c isn't finite.
func compensated(v []float64) (sum, c float64) {
	for _, x := range v {
		t := sum + x
		y := t - sum
		c += (sum - (t - y)) + (x - y)
		sum = t
	}
	return sum, c
}

// moment is the sum of the squares of the differences to the mean: in two passes,
// with the correction for what the mean was rounded by (Chan, Golub and LeVeque,
// "Algorithms for computing the sample variance", 1983, the corrected two-pass
// algorithm). It isn't 0: there are values that differ.
func moment(v []float64, sum, rest float64) float64 {
	n := float64(len(v))
	mean := sum/n + rest/n
	var squares, off, squares2, off2 float64 // two at a time are faster than one
	for len(v) >= 2 {
		d, e := v[0]-mean, v[1]-mean
		squares += d * d
		off += d
		squares2 += e * e
		off2 += e
		v = v[2:]
	}
	if len(v) > 0 {
		d := v[0] - mean
		squares += d * d
		off += d
	}
	squares, off = squares+squares2, off+off2
	return max(shorten(squares-off*off/n), math.SmallestNonzeroFloat64)
}

// tinyMoment: what is less has been made of squares that lost digits, or vanished.
const tinyMoment = 0x1p-900

// shorten rounds to 40 bits, of 53: what follows is noise, and costs bytes.
func shorten(x float64) float64 {
	const cut = 1<<13 - 1
	if x-x != 0 {
		return x
	}
	return math.Float64frombits((math.Float64bits(x) + (cut+1)/2) &^ cut)
}

package codec

import (
	"encoding/binary"
	"math"
	"math/bits"
	"slices"
)

// A column of floats begins with how they become integers.
const (
	floatConst    = 0x20 // all are the same, whose bits follow as a varint with their bytes reversed
	floatBits     = 0x21 // a column of integers follows: the bits, ordered as the numbers are
	floatBase     = 0x40 // flag: add the integers of the base column
	floatExcept   = 0x80 // flag: exceptions follow the column of integers
	maxDecimals   = 18   // any lower number: a column of integers follows, which are divided by 10 to that power
	scanDecimals  = 14   // more are not tried
	decimalSample = 32   // values looked at to find out how many decimals there are
)

// What an exception is.
const (
	exceptBits     = 0 // eight bytes
	exceptStale    = 1
	exceptNaN      = 2
	exceptInf      = 3
	exceptNegInf   = 4
	exceptNegZero  = 5
	exceptFirstBad = 6
)

const (
	staleBits   = 0x7ff0000000000002 // value.StaleNaN of Prometheus
	nanBits     = 0x7ff8000000000001 // value.NormalNaN, which is math.NaN()
	infBits     = 0x7ff0000000000000
	negInfBits  = 0xfff0000000000000
	negZeroBits = 0x8000000000000000
)

//nolint:gochecknoglobals // a constant table
var exceptionBits = [exceptFirstBad]uint64{
	exceptStale: staleBits, exceptNaN: nanBits, exceptInf: infBits, exceptNegInf: negInfBits, exceptNegZero: negZeroBits,
}

//nolint:gochecknoglobals // a constant table
var powersOf10 = [maxDecimals + 1]float64{
	1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18,
}

// orderedBits maps floats to integers such that greater numbers have greater
// integers. It is its own inverse but for the types.
func orderedBits(b uint64) int64 { return int64(b ^ uint64(int64(b)>>63)>>1) }

// AppendFloats appends an encoding of any floats, bit for bit, to dst.
func (e *Encoder) AppendFloats(dst []byte, v []float64) []byte {
	dst, _, _ = e.AppendFloatsOn(dst, v, nil)
	return dst
}

// AppendFloatsOn is AppendFloats, where the values may be stored as differences
// to the integers of an earlier column of the same length: bases are those that
// come into question. It returns the integers of this column for use as a base,
// nil if it can't be one, valid until the next call; and which of bases was
// taken, -1 for none.
func (e *Encoder) AppendFloatsOn(dst []byte, v []float64, bases [][]int64) (out []byte, ints []int64, base int) {
	if len(v) == 0 {
		return dst, nil, -1
	}
	if first := math.Float64bits(v[0]); allBits(v, first) {
		dst = binary.AppendUvarint(append(dst, floatConst), bits.ReverseBytes64(first))
		return dst, nil, -1
	}
	head := byte(floatBits)
	if decimals := decimals(v); decimals >= 0 && e.toDecimals(v, decimals) {
		head = byte(decimals)
	} else {
		e.toBits(v)
	}
	column := e.ints
	base = -1
	if head == 0 && len(bases) > 0 {
		base = e.chooseBase(bases)
		if base >= 0 {
			column = e.diff[:0]
			for i, x := range e.ints {
				column = append(column, x-bases[base][i])
			}
			e.diff = column
			head |= floatBase
		}
	}
	if len(e.exceptions) > 0 {
		head |= floatExcept
	}
	dst = e.AppendInts(append(dst, head), column)
	if head&floatExcept != 0 {
		dst = e.appendExceptions(dst, v)
	}
	if head&^(floatExcept|floatBase) != 0 {
		return dst, nil, base
	}
	return dst, e.ints, base
}

func allBits(v []float64, b uint64) bool {
	for _, x := range v {
		if math.Float64bits(x) != b {
			return false
		}
	}
	return true
}

// special reports whether v is an exception wherever there is not a lot of them.
func special(v float64) bool {
	return v-v != 0 || v == 0 && math.Signbit(v)
}

// decimals is how many decimals the values have, or -1 for too many.
func decimals(v []float64) int {
	most, seen, bad := 0, 0, 0
	step := max(1, len(v)/decimalSample)
	for i := 0; i < len(v); i += step {
		x := v[i]
		if special(x) {
			continue
		}
		seen++
		k := most
		for k <= scanDecimals {
			if _, ok := toDecimal(x, powersOf10[k]); ok {
				break
			}
			k++
		}
		if k > scanDecimals {
			if bad++; bad > decimalSample/8 {
				return -1
			}
			continue
		}
		most = k
	}
	if seen == 0 || 4*bad > seen {
		return -1
	}
	return most
}

// toDecimal gives the integer that divided by power is v, bit for bit.
func toDecimal(v, power float64) (i int64, ok bool) {
	if power == 1 {
		i = int64(v)
		return i, math.Float64bits(float64(i)) == math.Float64bits(v) && i < 1<<62 && i > -(1<<62)
	}
	p := v * power
	// More than 15 digits: any float is such a decimal, or nearly so.
	if !(p < 1e15 && p > -1e15) {
		return 0, false
	}
	i = int64(p + math.Copysign(0.5, p))
	return i, math.Float64bits(float64(i)/power) == math.Float64bits(v)
}

// toDecimals fills e.ints and e.exceptions; it reports false if there would be
// too many exceptions.
func (e *Encoder) toDecimals(v []float64, decimals int) bool {
	power := powersOf10[decimals]
	e.ints, e.exceptions = slices.Grow(e.ints[:0], len(v)), e.exceptions[:0]
	limit := len(v)/8 + 1
	for i := 0; i < len(v); i++ {
		n := decimalInts(e.ints[i:len(v)], v[i:], decimals)
		e.ints = e.ints[:i+n]
		if i += n; i == len(v) {
			break
		}
		if k, ok := toDecimal(v[i], power); ok {
			e.ints = append(e.ints, k)
			continue
		}
		if len(e.exceptions) == limit {
			return false
		}
		e.except(i)
	}
	e.fillFront()
	return true
}

// wholes sets dst to the integers that values are, as toDecimal gives them, up to the first
// that is none, and says how many these are.
func wholes(dst []int64, v []float64) int {
	dst = dst[:len(v)]
	for i, x := range v {
		k := int64(x)
		if math.Float64bits(float64(k)) != math.Float64bits(x) || k >= 1<<62 || k <= -(1<<62) {
			return i
		}
		dst[i] = k
	}
	return len(v)
}

// magic is such that the sum of it and another float has no digits behind the point, and
// that its bits and those of magic differ by as much as it and magic do, if the magnitude
// of the other is less than 1<<51.
const magic = 3 << 51

// decimalInts is wholes for any number of decimals.
func decimalInts(dst []int64, v []float64, decimals int) int {
	if decimals == 0 {
		return wholes(dst, v)
	}
	power := powersOf10[decimals]
	dst = dst[:len(v)]
	for i, x := range v {
		p := x * power
		if !(p < 1e15 && p > -1e15) {
			return i
		}
		p += magic
		if math.Float64bits((p-magic)/power) != math.Float64bits(x) {
			return i
		}
		dst[i] = int64(math.Float64bits(p) - math.Float64bits(magic))
	}
	return len(v)
}

// toBits fills e.ints and e.exceptions with all floats that are numbers.
func (e *Encoder) toBits(v []float64) {
	e.ints, e.exceptions = e.ints[:0], e.exceptions[:0]
	for i, x := range v {
		if special(x) {
			e.except(i)
		} else {
			e.ints = append(e.ints, orderedBits(math.Float64bits(x)))
		}
	}
	e.fillFront()
}

// except notes value i as an exception. Its integer is that of the value before,
// or on the line of those before where they rise or fall steadily.
func (e *Encoder) except(i int) {
	e.exceptions = append(e.exceptions, i)
	switch {
	case i == 0:
		e.ints = append(e.ints, 0)
	case i > 2:
		d, before := e.ints[i-1]-e.ints[i-2], e.ints[i-2]-e.ints[i-3]
		if d^before >= 0 {
			e.ints = append(e.ints, e.ints[i-1]+d)
			return
		}
		fallthrough
	default:
		e.ints = append(e.ints, e.ints[i-1])
	}
}

// fillFront gives exceptions at the front the integer of the first that is none.
func (e *Encoder) fillFront() {
	k := 0
	for k < len(e.exceptions) && e.exceptions[k] == k {
		k++
	}
	if k < len(e.ints) {
		for i := range k {
			e.ints[i] = e.ints[k]
		}
	}
}

// chooseBase returns the base on which e.ints are likely to be smallest, or -1.
func (e *Encoder) chooseBase(bases [][]int64) int {
	e.exact = true // gaps of one column are outliers of the difference, at both ends
	defer func() { e.exact = false }()
	s := sample(e.ints)
	best, least := -1, e.estimate(s)
	least -= max(least*2/5, len(s)/8) + 2 // decoding two columns has to pay
	for k, b := range bases {
		if len(b) != len(e.ints) {
			continue
		}
		b = sample(b)
		e.diff = e.diff[:0]
		for i, x := range s {
			e.diff = append(e.diff, x-b[i])
		}
		if c := e.estimate(e.diff); c < least {
			best, least = k, c
		}
	}
	return best
}

// estimate is about what v takes, in bytes.
func (e *Encoder) estimate(v []int64) int {
	values, lens := distinct(e.values[:0], e.lens[:0], v)
	e.values, e.lens = values, lens
	if len(values) == 1 {
		return 3
	}
	if len(values) > len(v)-len(v)/4 {
		return e.cost(v)
	}
	inner := e.cost(values)
	return min(e.cost(v), inner+(len(v)+7)/8, inner+e.blocksCost(lens)+4)
}

func (e *Encoder) appendExceptions(dst []byte, v []float64) []byte {
	gaps, codes := e.values[:0], e.lens[:0]
	var raw []byte
	next := 0
	for _, i := range e.exceptions {
		gaps = append(gaps, int64(i-next))
		next = i + 1
		b := math.Float64bits(v[i])
		code := int64(exceptBits)
		for k := range exceptionBits {
			if k > 0 && exceptionBits[k] == b {
				code = int64(k)
			}
		}
		codes = append(codes, code)
		if code == exceptBits {
			raw = binary.LittleEndian.AppendUint64(raw, b)
		}
	}
	e.values, e.lens = gaps, codes
	dst = binary.AppendUvarint(dst, uint64(len(gaps)))
	dst = e.appendPlain(dst, gaps, unknown)
	dst = e.appendPlain(dst, codes, unknown)
	return append(dst, raw...)
}

// Floats appends n floats, at most MaxLen, to dst and returns the bytes behind
// them. A column on a base is refused.
func (d *Decoder) Floats(dst []float64, b []byte, n int) (out []float64, rest []byte, err error) {
	return d.FloatsOn(dst, b, n, 0, nil, nil, false)
}

// FloatsOn is Floats for a column on a base whose n integers are given. Those of
// this column, for use as a base in turn, go to sum, which may be base. Without a
// base, a column that can't be one is refused. rises: the integers of the base are known to. Of floats, sum and base the
// first from may be anything, before and after: they are counted, but not wanted.
func (d *Decoder) FloatsOn(dst []float64, b []byte, n, from int, sum, base []int64, rises bool) (out []float64, rest []byte, err error) {
	d.fell, d.rises = false, false
	out, added, err := grow(dst, n)
	if err != nil || n == 0 {
		return out, b, err
	}
	if len(b) == 0 {
		return dst, nil, ErrCorrupt
	}
	head := b[0]
	b = b[1:]
	if base != nil && head&floatBase == 0 || base == nil && sum != nil && head&^floatExcept != 0 {
		return dst, nil, ErrCorrupt
	}
	if head == floatConst {
		v, k := binary.Uvarint(b)
		if k <= 0 {
			return dst, nil, ErrCorrupt
		}
		fill(added, math.Float64frombits(bits.ReverseBytes64(v)))
		d.rises = added[n-1] == added[n-1] // or NaN
		return out, b[k:], nil
	}
	kind := head &^ (floatExcept | floatBase)
	if kind > maxDecimals && kind != floatBits || head&floatBase != 0 && (kind != 0 || len(base) != n) || sum != nil && len(sum) != n {
		return dst, nil, ErrCorrupt
	}
	from = min(max(from, 0), n-1)
	m := mapping{kind: kind}
	switch {
	case base != nil:
		b, err = d.intsOn(added, b, from, sum, base, rises)
	case sum != nil && len(b) > 0 && b[0] == formDelta:
		b, err = d.deltas(added, b[1:], from, sum)
	case sum != nil:
		if b, err = d.ints(sum, b, levelAny); err == nil {
			toFloats(added[from:], sum[from:])
		}
	default:
		b, err = d.mapped(added, b, from, m)
	}
	if err != nil {
		return dst, nil, err
	}
	fell := d.fell
	if head&floatExcept != 0 {
		if b, err = d.exceptions(added, b); err != nil {
			return dst, nil, err
		}
	}
	d.fell, d.rises = fell, !fell && head&floatExcept == 0 && kind <= maxDecimals
	return out, b, nil
}

// Rises reports whether the values that Floats or FloatsOn decoded last are known to rise: each is
// no less than the one before, and none is NaN. It is of use only for what AppendFloats has written.
func (d *Decoder) Rises() bool { return d.rises }

// IntsRise is Rises for the integers that FloatsOn or BaseInts put into sum.
func (d *Decoder) IntsRise() bool { return !d.fell }

// SameAsBase reports whether b is a column of floats on a base whose integers are those of the base.
func SameAsBase(b []byte) bool {
	return len(b) == 3 && b[0] == floatBase && b[1] == formConst && b[2] == 0
}

// HasExceptions reports whether b is a column of floats with exceptions, or none: other floats than its integers, then.
func HasExceptions(b []byte) bool { return len(b) == 0 || b[0]&floatExcept != 0 }

// BaseInts adds the integers of the column of floats at the start of b to sum,
// which has as many elements as the column. A column that can't be a base is
// refused. rises: those of sum are known to. from is as for FloatsOn.
func (d *Decoder) BaseInts(sum []int64, b []byte, from int, rises bool) error {
	if len(b) == 0 || b[0]&^(floatExcept|floatBase) != 0 {
		return ErrCorrupt
	}
	d.fell = false
	_, err := d.intsOn(nil, b[1:], min(max(from, 0), len(sum)), sum, sum, rises)
	return err
}

// exceptions overwrites the exceptions in v.
func (d *Decoder) exceptions(v []float64, b []byte) (rest []byte, err error) {
	count, k := binary.Uvarint(b)
	if k <= 0 || count > uint64(len(v)) {
		return nil, ErrCorrupt
	}
	var gaps, codes []int64
	if d.values, gaps, err = grow(d.values[:0], int(count)); err != nil {
		return nil, err
	}
	if d.lens, codes, err = grow(d.lens[:0], int(count)); err != nil {
		return nil, err
	}
	if b, err = d.ints(gaps, b[k:], levelPlain); err != nil {
		return nil, err
	}
	if b, err = d.ints(codes, b, levelPlain); err != nil {
		return nil, err
	}
	for i, gap := range gaps {
		code := codes[i]
		if uint64(gap) >= uint64(len(v)) || code < 0 || code >= exceptFirstBad || code == exceptBits && len(b) < 8 {
			return nil, ErrCorrupt
		}
		x := exceptionBits[code]
		if code == exceptBits {
			x = binary.LittleEndian.Uint64(b)
			b = b[8:]
		}
		v[gap] = math.Float64frombits(x)
		v = v[gap+1:]
	}
	return b, nil
}

package codec

import (
	"encoding/binary"
	"math"
)

// Columns of floats are decoded without writing their integers to memory: block
// by block through a small buffer, and runs of equal values after their
// expansion has become that of floats.

// mapping is how integers become floats.
type mapping struct {
	kind byte // how many decimals, or floatBits

	scaled bool // first becomes off + g*integer
	off, g int64
}

// apply maps as many integers as dst is long.
func (m *mapping) apply(dst []float64, ints []int64) {
	ints = ints[:len(dst)]
	if m.scaled {
		for i, q := range ints {
			ints[i] = m.off + m.g*q
		}
	}
	switch m.kind {
	case 0:
		toFloats(dst, ints)
	case floatBits:
		for i, x := range ints {
			dst[i] = math.Float64frombits(uint64(orderedBits(uint64(x))))
		}
	default:
		toDecimals(dst, ints, int(m.kind))
	}
}

// The loops that every sample goes through are unrolled by hand: the compiler
// doesn't, and it makes them up to twice as fast.

func toFloats(dst []float64, ints []int64) {
	for len(ints) >= 8 && len(dst) >= 8 {
		o, s := (*[8]float64)(dst), (*[8]int64)(ints)
		o[0] = float64(s[0])
		o[1] = float64(s[1])
		o[2] = float64(s[2])
		o[3] = float64(s[3])
		o[4] = float64(s[4])
		o[5] = float64(s[5])
		o[6] = float64(s[6])
		o[7] = float64(s[7])
		dst, ints = dst[8:], ints[8:]
	}
	dst = dst[:len(ints)]
	for i, x := range ints {
		dst[i] = float64(x)
	}
}

// fill sets all of dst to v.
func fill[T int64 | float64](dst []T, v T) {
	for len(dst) >= 8 {
		o := (*[8]T)(dst)
		o[0], o[1], o[2], o[3] = v, v, v, v
		o[4], o[5], o[6], o[7] = v, v, v, v
		dst = dst[8:]
	}
	for i := range dst {
		dst[i] = v
	}
}

// mapped decodes a column of integers that become floats. The first from of these aren't wanted.
func (d *Decoder) mapped(dst []float64, b []byte, from int, m mapping) (rest []byte, err error) {
	if len(b) == 0 {
		return nil, ErrCorrupt
	}
	switch b[0] {
	case formBitmap:
		bitmap, ones, b, err := bitmapHead(len(dst), b[1:])
		if err != nil {
			return nil, err
		}
		var values []float64
		if d.floats, values, err = grow(d.floats[:0], ones+1); err != nil {
			return nil, err
		}
		if b, err = d.mappedScaled(values, b, 0, m); err != nil {
			return nil, err
		}
		expandBitmap(dst, bitmap, values)
		return b, nil
	case formRuns:
		lens, b, err := d.runLengths(len(dst), b[1:])
		if err != nil {
			return nil, err
		}
		var values []float64
		if d.floats, values, err = grow(d.floats[:0], len(lens)); err != nil {
			return nil, err
		}
		if b, err = d.mappedScaled(values, b, 0, m); err != nil {
			return nil, err
		}
		return b, expandRuns(dst, lens, values)
	default:
		return d.mappedScaled(dst, b, from, m)
	}
}

func (d *Decoder) mappedScaled(dst []float64, b []byte, from int, m mapping) (rest []byte, err error) {
	if len(b) > 0 && b[0] == formScaled {
		m.scaled = true
		if m.off, m.g, b, err = scale(b[1:]); err != nil {
			return nil, err
		}
		d.fell = d.fell || m.g < 0
	}
	return d.mappedPlain(dst, b, from, m)
}

func (d *Decoder) mappedPlain(dst []float64, b []byte, from int, m mapping) (rest []byte, err error) {
	if len(dst) == 0 {
		return b, nil
	}
	if len(b) == 0 {
		return nil, ErrCorrupt
	}
	form := b[0]
	b = b[1:]
	var last int64
	if form == formConst || form == formDelta {
		x, k := binary.Varint(b)
		if k <= 0 {
			return nil, ErrCorrupt
		}
		b = b[k:]
		last = x
		if m.kind == 0 && !m.scaled {
			dst[0] = float64(x)
		} else {
			d.buf[0] = x
			m.apply(dst[:1], d.buf[:1])
		}
	}
	passed, sum := 0, int64(0)
	switch form {
	case formConst:
		fill(dst, dst[0])
		return b, nil
	case formPacked:
		d.fell = d.fell || len(dst) > 1
		if passed, _, b, err = d.pass(b, from); err != nil {
			return nil, err
		}
		dst = dst[passed:]
		for len(dst) > 0 {
			k := min(blockLen, len(dst))
			if b, err = d.block(d.buf[:k], b); err != nil {
				return nil, err
			}
			m.apply(dst[:k], d.buf[:k])
			dst = dst[k:]
		}
		return b, nil
	case formDelta:
		if passed, sum, b, err = d.pass(b, from-1); err != nil {
			return nil, err
		}
		last += sum
		dst = dst[1+passed:]
		for len(dst) > 0 {
			k := min(blockLen, len(dst))
			if m.kind == 0 && !m.scaled {
				if b, last, err = d.sumBlock(dst[:k], b, last); err != nil {
					return nil, err
				}
			} else {
				if b, err = d.block(d.buf[:k], b); err != nil {
					return nil, err
				}
				if m.scaled || m.kind > maxReciprocal {
					last = sumInts(d.buf[:k], last)
					m.apply(dst[:k], d.buf[:k])
				} else {
					last = sumDecimals(dst[:k], d.buf[:k], last, int(m.kind))
				}
			}
			dst = dst[k:]
		}
		return b, nil
	default:
		return nil, ErrCorrupt
	}
}

// sumInts turns differences into values.
func sumInts(v []int64, last int64) int64 {
	for len(v) >= 8 {
		s := (*[8]int64)(v)
		last += s[0]
		s[0] = last
		last += s[1]
		s[1] = last
		last += s[2]
		s[2] = last
		last += s[3]
		s[3] = last
		last += s[4]
		s[4] = last
		last += s[5]
		s[5] = last
		last += s[6]
		s[6] = last
		last += s[7]
		s[7] = last
		v = v[8:]
	}
	for i, x := range v {
		last += x
		v[i] = last
	}
	return last
}

// sumFloats is sumInts and toFloats in one.
func sumFloats(dst []float64, deltas []int64, last int64) int64 {
	for len(deltas) >= 8 && len(dst) >= 8 {
		o, s := (*[8]float64)(dst), (*[8]int64)(deltas)
		last += s[0]
		o[0] = float64(last)
		last += s[1]
		o[1] = float64(last)
		last += s[2]
		o[2] = float64(last)
		last += s[3]
		o[3] = float64(last)
		last += s[4]
		o[4] = float64(last)
		last += s[5]
		o[5] = float64(last)
		last += s[6]
		o[6] = float64(last)
		last += s[7]
		o[7] = float64(last)
		dst, deltas = dst[8:], deltas[8:]
	}
	dst = dst[:len(deltas)]
	for i, x := range deltas {
		last += x
		dst[i] = float64(last)
	}
	return last
}

// pass passes over the blocks that lie wholly before the from-th value, and gives how many values they have, and the sum
// of these.
func (d *Decoder) pass(b []byte, from int) (n int, sum int64, rest []byte, err error) {
	fell := d.fell
	for ; n+blockLen <= from; n += blockLen {
		width, patches, base, size, body, err := blockHead(blockLen, b)
		switch {
		case err != nil:
			return 0, 0, nil, err
		case patches || width > mostSummed:
			if b, err = d.block(d.buf[:], b); err != nil {
				return 0, 0, nil, err
			}
			for _, x := range d.buf {
				sum += x
			}
		default:
			sum += blockLen * base
			if width > 0 {
				sum += sumPacked(d.withSlack(body, size), width)
			}
			b = body[size:]
		}
	}
	d.fell = fell
	return n, sum, b, nil
}

// deltas decodes differences into sum, as values, and converts those. The first from aren't wanted.
func (d *Decoder) deltas(dst []float64, b []byte, from int, sum []int64) (rest []byte, err error) {
	last, k := binary.Varint(b)
	if k <= 0 {
		return nil, ErrCorrupt
	}
	sum[0], dst[0] = last, float64(last)
	passed, before, b, err := d.pass(b[k:], from-1)
	if err != nil {
		return nil, err
	}
	last += before
	sum, dst = sum[1+passed:], dst[1+passed:]
	for len(sum) > 0 {
		k := min(blockLen, len(sum))
		if b, err = d.block(d.buf[:k], b); err != nil {
			return nil, err
		}
		last = sumBoth(dst[:k], sum[:k], d.buf[:k], last)
		sum, dst = sum[k:], dst[k:]
	}
	return b, nil
}

// sumBoth is sumInts into sum, and toFloats in one.
func sumBoth(dst []float64, sum, deltas []int64, last int64) int64 {
	for len(deltas) >= 4 && len(sum) >= 4 && len(dst) >= 4 {
		o, s, d := (*[4]float64)(dst), (*[4]int64)(sum), (*[4]int64)(deltas)
		x0 := last + d[0]
		x1 := x0 + d[1]
		x2 := x1 + d[2]
		last = x2 + d[3]
		s[0], s[1], s[2], s[3] = x0, x1, x2, last
		o[0], o[1], o[2], o[3] = float64(x0), float64(x1), float64(x2), float64(last)
		dst, sum, deltas = dst[4:], sum[4:], deltas[4:]
	}
	dst, sum = dst[:len(deltas)], sum[:len(deltas)]
	for i, x := range deltas {
		last += x
		sum[i] = last
		dst[i] = float64(last)
	}
	return last
}

// intsOn decodes a column of integers into sum, adds base to them, and converts
// them, unless dst is nil. sum and base are of the same length and may be the
// same. It sets fell of sum; rises is whether base is known to. Of all the first from aren't wanted.
func (d *Decoder) intsOn(dst []float64, b []byte, from int, sum, base []int64, rises bool) (rest []byte, err error) {
	if len(b) == 0 || len(base) == 0 {
		return nil, ErrCorrupt
	}
	form := b[0]
	switch {
	case form == formPacked || form == formDelta:
		b = b[1:]
		a := adder{last: least}
		if form == formDelta {
			x, k := binary.Varint(b)
			if k <= 0 {
				return nil, ErrCorrupt
			}
			b = b[k:]
			d.buf[0] = x
			dst = a.add(dst, sum[:1], base[:1], d.buf[:1])
			passed, before, rest, err := d.pass(b, from-1)
			if err != nil {
				return nil, err
			}
			if passed > 0 {
				a.last = least
			}
			a.delta, b = x+before, rest
			sum, base = sum[1+passed:], base[1+passed:]
			if dst != nil {
				dst = dst[passed:]
			}
		}
		for len(base) > 0 {
			k := min(blockLen, len(base))
			if b, err = d.block(d.buf[:k], b); err != nil {
				return nil, err
			}
			if form == formDelta {
				dst = a.addDeltas(dst, sum[:k], base[:k], d.buf[:k])
			} else {
				dst = a.add(dst, sum[:k], base[:k], d.buf[:k])
			}
			sum, base = sum[k:], base[k:]
		}
		d.fell = a.fell < 0
		return b, nil
	case form == formBitmap && dst != nil:
		bitmap, ones, b, err := bitmapHead(len(base), b[1:])
		if err != nil {
			return nil, err
		}
		var values []int64
		if d.values, values, err = grow(d.values[:0], ones+1); err != nil {
			return nil, err
		}
		if b, err = d.ints(values, b, levelScaled); err != nil {
			return nil, err
		}
		addBitmap(dst, sum, base, bitmap, values)
		d.fell = d.fell || !rises
		return b, nil
	case form == formConst:
		v, k := binary.Varint(b[1:])
		if k <= 0 {
			return nil, ErrCorrupt
		}
		if dst != nil {
			dst = dst[from:]
		}
		addConst(dst, sum[from:], base[from:], v)
		d.fell = !rises
		return b[1+k:], nil
	default:
		var ints []int64
		if d.ints64, ints, err = grow(d.ints64[:0], len(base)); err != nil {
			return nil, err
		}
		if b, err = d.ints(ints, b, levelAny); err != nil {
			return nil, err
		}
		a := adder{last: least}
		a.add(dst, sum, base, ints)
		d.fell = a.fell < 0
		return b, nil
	}
}

// least is less than all integers of floats, by no more than an integer can be.
const least = -(1 << 62)

// adder adds columns to their bases. fell is negative once a sum is less than the one before.
type adder struct {
	last  int64 // sum
	fell  int64
	delta int64 // of addDeltas: the last value
}

// add makes sum of base and v and writes it to dst as floats, unless that
// is nil. It returns the rest of dst.
func (a *adder) add(dst []float64, sum, base, v []int64) []float64 {
	sum, base = sum[:len(v)], base[:len(v)]
	last, fell := a.last, a.fell
	for i, x := range v {
		x += base[i]
		fell |= x - last
		sum[i] = x
		last = x
	}
	a.last, a.fell = last, fell
	if dst == nil {
		return nil
	}
	toFloats(dst[:len(v)], sum)
	return dst[len(v):]
}

// addDeltas is add of the values whose differences v are.
func (a *adder) addDeltas(dst []float64, sum, base, v []int64) []float64 {
	sum, base = sum[:len(v)], base[:len(v)]
	if dst == nil {
		a.delta = sumInts(v, a.delta)
		return a.add(nil, sum, base, v)
	}
	rest := dst[len(v):]
	last, delta, fell := a.last, a.delta, a.fell
	for len(v) >= 4 && len(sum) >= 4 && len(dst) >= 4 && len(base) >= 4 {
		o, s, f, d := (*[4]float64)(dst), (*[4]int64)(sum), (*[4]int64)(base), (*[4]int64)(v)
		d0 := delta + d[0]
		d1 := d0 + d[1]
		d2 := d1 + d[2]
		delta = d2 + d[3]
		x0, x1, x2, x3 := f[0]+d0, f[1]+d1, f[2]+d2, f[3]+delta
		fell |= (x0 - last) | (x1 - x0) | (x2 - x1) | (x3 - x2)
		last = x3
		s[0], s[1], s[2], s[3] = x0, x1, x2, x3
		o[0], o[1], o[2], o[3] = float64(x0), float64(x1), float64(x2), float64(x3)
		dst, sum, base, v = dst[4:], sum[4:], base[4:], v[4:]
	}
	dst, sum, base = dst[:len(v)], sum[:len(v)], base[:len(v)]
	for i, d := range v {
		delta += d
		x := base[i] + delta
		fell |= x - last
		last = x
		sum[i] = x
		dst[i] = float64(x)
	}
	a.last, a.delta, a.fell = last, delta, fell
	return rest
}

// addConst is addInts for equal values.
func addConst(dst []float64, sum, base []int64, v int64) {
	sum = sum[:len(base)]
	if v == 0 {
		copy(sum, base)
	} else {
		for i, x := range base {
			sum[i] = x + v
		}
	}
	if dst != nil {
		toFloats(dst, sum)
	}
}

// addBitmap is expandBitmap and addInts in one.
func addBitmap(dst []float64, sum, base []int64, bitmap []byte, values []int64) {
	j := 0
	for len(dst) >= 8 && len(sum) >= 8 && len(base) >= 8 {
		bits := uint(bitmap[0])
		o, s, a := (*[8]float64)(dst), (*[8]int64)(sum), (*[8]int64)(base)
		j += int(bits & 1)
		x0 := a[0] + values[j]
		j += int(bits >> 1 & 1)
		x1 := a[1] + values[j]
		j += int(bits >> 2 & 1)
		x2 := a[2] + values[j]
		j += int(bits >> 3 & 1)
		x3 := a[3] + values[j]
		s[0], s[1], s[2], s[3] = x0, x1, x2, x3
		o[0], o[1], o[2], o[3] = float64(x0), float64(x1), float64(x2), float64(x3)
		j += int(bits >> 4 & 1)
		x0 = a[4] + values[j]
		j += int(bits >> 5 & 1)
		x1 = a[5] + values[j]
		j += int(bits >> 6 & 1)
		x2 = a[6] + values[j]
		j += int(bits >> 7 & 1)
		x3 = a[7] + values[j]
		s[4], s[5], s[6], s[7] = x0, x1, x2, x3
		o[4], o[5], o[6], o[7] = float64(x0), float64(x1), float64(x2), float64(x3)
		dst, sum, base, bitmap = dst[8:], sum[8:], base[8:], bitmap[1:]
	}
	for i := range dst {
		j += int(bitmap[0] >> i & 1)
		sum[i] = base[i] + values[j]
		dst[i] = float64(sum[i])
	}
}

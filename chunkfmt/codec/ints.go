package codec

import (
	"encoding/binary"
	"math/bits"
	"slices"
)

// A column of integers begins with its form.
const (
	formConst  = 0 // a varint: all values
	formPacked = 1 // blocks of values
	formDelta  = 2 // a varint: the first value; blocks of differences to the value before
	formScaled = 3 // a varint o and a uvarint g, then a column q: values are o + g*q
	formBitmap = 4 // a bit per value, set if it differs from the one before; then a column of distinct values
	formRuns   = 5 // a uvarint: how many runs; a column of their lengths, a column of their values
)

// Which forms may hold which: each only those of a lower level, so that
// decoding ends and every step lowers the number of values or the level.
const (
	levelPlain  = iota // const, packed, delta
	levelScaled        // and scaled
	levelAny           // and bitmap, runs
)

// sampleLen is how many consecutive values the choice of a form looks at.
const sampleLen = blockLen

// AppendInts appends an encoding of any integers to dst.
func (e *Encoder) AppendInts(dst []byte, v []int64) []byte {
	if len(v) == 0 {
		return dst
	}
	changes := changes(v)
	if changes == 0 {
		return binary.AppendVarint(append(dst, formConst), v[0])
	}
	form, plain := e.chooseExpand(v, changes)
	switch form {
	case formBitmap:
		return e.appendBitmap(dst, v, plain)
	case formRuns:
		return e.appendRuns(dst, v, plain)
	default:
		return e.appendScaled(dst, v, plain)
	}
}

// changes counts the values that differ from the one before.
func changes(v []int64) int {
	n := int64(0)
	last := v[0]
	for _, x := range v {
		d := x - last
		n -= (d | -d) >> 63
		last = x
	}
	return int(n)
}

// AppendNoise is AppendInts for integers of which a look at the differences
// wouldn't pay: they are differences already.
func (e *Encoder) AppendNoise(dst []byte, v []int64) []byte {
	e.noise = true
	dst = e.AppendInts(dst, v)
	e.noise = false
	return dst
}

// sample is a stretch from the middle of v.
func sample(v []int64) []int64 {
	if len(v) <= sampleLen {
		return v
	}
	from := (len(v) - sampleLen) / 2
	return v[from : from+sampleLen]
}

// unknown is a form that appendPlain has to choose.
const unknown = 0xff

// chooseExpand decides whether to store runs of equal values apart. It says also which form
// the values, or those without runs, are to have, if it knows that.
func (e *Encoder) chooseExpand(v []int64, changes int) (form, plain byte) {
	n := len(v)
	if changes > n-n/4 {
		return formPacked, unknown
	}
	if changes < n/32 {
		return formRuns, unknown
	}
	s := sample(v)
	values, lens := distinct(e.values[:0], e.lens[:0], s)
	e.values, e.lens = values, lens
	if len(values) < 2 {
		return formRuns, unknown
	}
	direct, form := e.packedOrDelta(s)
	inner, plain := e.packedOrDelta(values)
	if len(s) < n {
		plain = unknown // there are more
	}
	bitmap, runs := inner+(len(s)+7)/8, inner+e.blocksCost(lens)+4
	switch {
	case runs <= bitmap && runs < direct:
		return formRuns, plain
	case bitmap < direct:
		return formBitmap, plain
	default:
		return formPacked, form
	}
}

// distinct appends the first value of each run of equal values, and how long it is.
func distinct(values, lens, v []int64) ([]int64, []int64) {
	from := 0
	for i := 1; i <= len(v); i++ {
		if i == len(v) || v[i] != v[from] {
			values = append(values, v[from])
			lens = append(lens, int64(i-from))
			from = i
		}
	}
	return values, lens
}

// blocksCost is about what v takes as formPacked, in bytes.
func (e *Encoder) blocksCost(v []int64) int {
	cost := 1
	for len(v) > 0 {
		k := min(blockLen, len(v))
		f := e.chooseFrame(v[:k], !e.exact)
		cost += f.cost + 2 + bits.Len64(uint64(f.min^f.min>>63))/7
		v = v[k:]
	}
	return cost
}

// cost is about what v takes as formPacked or formDelta, in bytes.
func (e *Encoder) cost(v []int64) int {
	c, _ := e.packedOrDelta(v)
	return c
}

func (e *Encoder) packedOrDelta(v []int64) (cost int, form byte) {
	if e.noise {
		return e.blocksCost(v), formPacked
	}
	e.deltas = appendDeltas(e.deltas[:0], v)
	plain := e.blocksCost(v)
	diff := e.blocksCost(e.deltas) + 1 + bits.Len64(uint64(v[0]^v[0]>>63))/7
	if diff < plain {
		return diff, formDelta
	}
	return plain, formPacked
}

func appendDeltas(dst, v []int64) []int64 {
	if len(v) == 0 {
		return dst
	}
	from := len(dst)
	dst = slices.Grow(dst, len(v)-1)[:from+len(v)-1]
	out, next := dst[from:], v[1:]
	last := v[0]
	out = out[:len(next)]
	for i, x := range next {
		out[i] = x - last
		last = x
	}
	return dst
}

func (e *Encoder) appendBitmap(dst []byte, v []int64, plain byte) []byte {
	dst = append(dst, formBitmap)
	values := slices.Grow(e.values[:0], len(v))[:len(v)]
	values[0] = v[0]
	// No branch is to depend on whether a value is another one, which can't be foreseen.
	k, last := 0, v[0]
	for at := 0; at < len(v); at += 8 {
		word := uint(0)
		for i, x := range v[at:min(at+8, len(v))] {
			changed := uint(0)
			if x != last {
				changed = 1
			}
			word |= changed << i
			k += int(changed)
			values[k] = x
			last = x
		}
		dst = append(dst, byte(word))
	}
	values = values[:k+1]
	e.values = values
	return e.appendScaled(dst, values, plain)
}

func (e *Encoder) appendRuns(dst []byte, v []int64, plain byte) []byte {
	values, lens := distinct(e.values[:0], e.lens[:0], v)
	e.values, e.lens = values, lens
	dst = binary.AppendUvarint(append(dst, formRuns), uint64(len(values)))
	dst = e.appendPlain(dst, lens, unknown)
	return e.appendScaled(dst, values, plain)
}

// appendScaled takes a common divisor out of the differences, if there is one. plain is the
// form for the values as they are.
func (e *Encoder) appendScaled(dst []byte, v []int64, plain byte) []byte {
	g := commonDivisor(v)
	if g <= 1 || (bits.Len64(g)-1)*len(v) < 8*(3+bits.Len64(g)/7) {
		return e.appendPlain(dst, v, plain)
	}
	dst = append(dst, formScaled)
	dst = binary.AppendVarint(dst, v[0])
	dst = binary.AppendUvarint(dst, g)
	q := e.scaled[:0]
	for _, x := range v {
		q = append(q, (x-v[0])/int64(g))
	}
	e.scaled = q
	return e.appendPlain(dst, q, unknown)
}

// commonDivisor is the largest number below 1<<62 that divides all v[i]-v[0],
// or 0 or 1 if none is of use.
func commonDivisor(v []int64) uint64 {
	var g uint64
	for _, x := range v[1:] {
		d := x - v[0]
		if (x^v[0])&(x^d) < 0 {
			return 0 // overflow
		}
		a := uint64(max(d, -d))
		if a>>62 != 0 {
			return 0
		}
		switch {
		case a == 0:
		case g == 0:
			g = a
		case a%g != 0:
			for a != 0 {
				g, a = a, g%a
			}
		}
		if g == 1 {
			return 1
		}
	}
	return g
}

// appendPlain encodes without looking for runs or divisors.
func (e *Encoder) appendPlain(dst []byte, v []int64, form byte) []byte {
	switch {
	case e.noise:
		form = formPacked
	case form == unknown:
		_, form = e.packedOrDelta(sample(v))
	}
	if form == formPacked {
		return e.appendBlocks(append(dst, formPacked), v)
	}
	dst = binary.AppendVarint(append(dst, formDelta), v[0])
	e.deltas = appendDeltas(e.deltas[:0], v)
	return e.appendBlocks(dst, e.deltas)
}

func (e *Encoder) appendBlocks(dst []byte, v []int64) []byte {
	for len(v) > 0 {
		k := min(blockLen, len(v))
		dst = e.appendBlock(dst, v[:k])
		v = v[k:]
	}
	return dst
}

// Ints appends n integers, at most MaxLen, to dst and returns the bytes behind
// them.
func (d *Decoder) Ints(dst []int64, b []byte, n int) (out []int64, rest []byte, err error) {
	out, added, err := grow(dst, n)
	if err == nil {
		rest, err = d.ints(added, b, levelAny)
	}
	return out, rest, err
}

// Const reports whether what Ints would decode from b are all the same, if any, and which.
func Const(b []byte) (v int64, rest []byte, ok bool) {
	if len(b) == 0 || b[0] != formConst {
		return 0, b, false
	}
	v, k := binary.Varint(b[1:])
	if k <= 0 {
		return 0, b, false
	}
	return v, b[1+k:], true
}

// Grid reports whether what Times would decode from b are a step apart, all of them, and
// which is the first.
func Grid(b []byte) (first, step int64, rest []byte, ok bool) {
	first, k := binary.Varint(b)
	if k <= 0 {
		return 0, 0, b, false
	}
	u, k2 := binary.Uvarint(b[k:])
	if k += max(k2, 0); k2 <= 0 || k >= len(b) || b[k] != 0 {
		return 0, 0, b, false
	}
	return first, int64(u), b[k+1:], true
}

func grow[T any](dst []T, n int) (all, added []T, err error) {
	if n < 0 || n > MaxLen {
		return dst, nil, ErrCorrupt
	}
	have := len(dst)
	if cap(dst)-have < n {
		dst = append(make([]T, 0, have+n+groupLen), dst...)
	}
	dst = dst[:have+n]
	return dst, dst[have:], nil
}

// ints fills dst, whose length is at most MaxLen.
func (d *Decoder) ints(dst []int64, b []byte, level int) (rest []byte, err error) {
	if len(dst) == 0 {
		return b, nil
	}
	if len(b) == 0 {
		return nil, ErrCorrupt
	}
	form := b[0]
	b = b[1:]
	switch {
	case form == formConst:
		v, k := binary.Varint(b)
		if k <= 0 {
			return nil, ErrCorrupt
		}
		fill(dst, v)
		return b[k:], nil
	case form == formPacked:
		b, err := d.blocks(dst, b)
		d.fell = d.fell || len(dst) > 1
		return b, err
	case form == formDelta:
		v, k := binary.Varint(b)
		if k <= 0 {
			return nil, ErrCorrupt
		}
		if b, err = d.blocks(dst[1:], b[k:]); err != nil {
			return nil, err
		}
		dst[0] = v
		sumInts(dst[1:], v)
		return b, nil
	case form == formScaled && level >= levelScaled:
		off, g, b, err := scale(b)
		if err != nil {
			return nil, err
		}
		if b, err = d.ints(dst, b, levelPlain); err != nil {
			return nil, err
		}
		d.fell = d.fell || g < 0
		for i, q := range dst {
			dst[i] = off + g*q
		}
		return b, nil
	case form == formBitmap && level >= levelAny:
		return d.bitmap(dst, b)
	case form == formRuns && level >= levelAny:
		return d.runs(dst, b)
	default:
		return nil, ErrCorrupt
	}
}

func (d *Decoder) blocks(dst []int64, b []byte) (rest []byte, err error) {
	for len(dst) > 0 {
		k := min(blockLen, len(dst))
		if b, err = d.block(dst[:k], b); err != nil {
			return nil, err
		}
		dst = dst[k:]
	}
	return b, nil
}

// scale reads the head of formScaled.
func scale(b []byte) (off, g int64, rest []byte, err error) {
	off, k := binary.Varint(b)
	if k <= 0 {
		return 0, 0, nil, ErrCorrupt
	}
	u, k2 := binary.Uvarint(b[k:])
	if k2 <= 0 {
		return 0, 0, nil, ErrCorrupt
	}
	return off, int64(u), b[k+k2:], nil
}

func (d *Decoder) bitmap(dst []int64, b []byte) (rest []byte, err error) {
	bitmap, ones, b, err := bitmapHead(len(dst), b)
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
	expandBitmap(dst, bitmap, values)
	return b, nil
}

func (d *Decoder) runs(dst []int64, b []byte) (rest []byte, err error) {
	lens, b, err := d.runLengths(len(dst), b)
	if err != nil {
		return nil, err
	}
	var values []int64
	if d.values, values, err = grow(d.values[:0], len(lens)); err != nil {
		return nil, err
	}
	if b, err = d.ints(values, b, levelScaled); err != nil {
		return nil, err
	}
	return b, expandRuns(dst, lens, values)
}

// bitmapHead reads the bitmap for n values and counts the ones in it, fewer
// than n.
func bitmapHead(n int, b []byte) (bitmap []byte, ones int, rest []byte, err error) {
	size := (n + 7) / 8
	if len(b) < size || b[0]&1 != 0 {
		return nil, 0, nil, ErrCorrupt
	}
	bitmap = b[:size]
	if k := n & 7; k != 0 && bitmap[size-1]>>k != 0 {
		return nil, 0, nil, ErrCorrupt
	}
	whole := size &^ 7
	for i := 0; i < whole; i += 8 {
		ones += bits.OnesCount64(binary.LittleEndian.Uint64(bitmap[i:]))
	}
	for _, x := range bitmap[whole:] {
		ones += bits.OnesCount8(x)
	}
	return bitmap, ones, b[size:], nil
}

// runLengths reads the lengths of runs of n values.
func (d *Decoder) runLengths(n int, b []byte) (lens []int64, rest []byte, err error) {
	m, k := binary.Uvarint(b)
	if k <= 0 || m > uint64(n) {
		return nil, nil, ErrCorrupt
	}
	if d.lens, lens, err = grow(d.lens[:0], int(m)); err != nil {
		return nil, nil, err
	}
	fell := d.fell
	b, err = d.ints(lens, b[k:], levelPlain)
	d.fell = fell // of the values
	return lens, b, err
}

// expandBitmap repeats values[i] where a bit is zero and goes on to the next
// where it is one; values has one more than there are ones.
func expandBitmap[T int64 | float64](dst []T, bitmap []byte, values []T) {
	j := 0
	for len(dst) >= 8 {
		x := uint(bitmap[0])
		bitmap = bitmap[1:]
		o := (*[8]T)(dst)
		j += int(x & 1)
		o[0] = values[j]
		j += int(x >> 1 & 1)
		o[1] = values[j]
		j += int(x >> 2 & 1)
		o[2] = values[j]
		j += int(x >> 3 & 1)
		o[3] = values[j]
		j += int(x >> 4 & 1)
		o[4] = values[j]
		j += int(x >> 5 & 1)
		o[5] = values[j]
		j += int(x >> 6 & 1)
		o[6] = values[j]
		j += int(x >> 7 & 1)
		o[7] = values[j]
		dst = dst[8:]
	}
	for i := range dst {
		j += int(bitmap[0] >> i & 1)
		dst[i] = values[j]
	}
}

// expandRuns repeats each value as often as lens says, which must fill dst.
func expandRuns[T int64 | float64](dst []T, lens []int64, values []T) error {
	for i, l := range lens {
		if l < 1 || l > int64(len(dst)) {
			return ErrCorrupt
		}
		fill(dst[:l], values[i])
		dst = dst[l:]
	}
	if len(dst) > 0 {
		return ErrCorrupt
	}
	return nil
}

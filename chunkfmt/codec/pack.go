package codec

import (
	"encoding/binary"
	"math"
	"math/bits"
	"slices"
)

//go:generate go run ./internal/genunpack

const (
	// blockLen is how many values share a minimum and a width.
	blockLen = 256

	// groupLen is how many values are packed, and unpacked, together. Unpacking
	// fills up the last group if the slice has the capacity.
	groupLen = 8

	// maxWidth is the widest packing but for whole words of 64 bits: a value
	// at any bit lies in one load of eight bytes.
	maxWidth = 57

	wholeWord = 64

	patched = 0x80 // in a block's width: patches follow
)

// frame is how a block is packed: value - min in width bits each, patches for
// those that don't fit.
type frame struct {
	min     int64
	width   uint
	patches int // for so many values, and no others
	cost    int // bytes, about
}

func roundWidth(w int) uint {
	if w > maxWidth {
		return wholeWord
	}
	return uint(w)
}

func packedLen(n int, width uint) int { return (n + 7) / 8 * int(width) }

// fits reports whether v needs no patch.
func (f *frame) fits(v int64) bool {
	return f.width == wholeWord || uint64(v-f.min)>>f.width == 0
}

// patchCost is about what a patch takes, in bytes, if its value differs from
// the minimum by a number of so many bits.
func patchCost(bitLen int) int { return 2 + (bitLen+1)/7 }

// chooseFrame finds the frame of least cost for at most blockLen values. Of frames that leave
// out values at both ends, which take longest to find, an estimate looks at one alone:
// without the least and the greatest.
func (e *Encoder) chooseFrame(v []int64, estimate bool) frame {
	estimate = estimate && !e.noise
	var lo, hi, least, greatest int64
	if estimate {
		lo, hi, least, greatest = twoEnds(v)
	} else {
		lo, hi = ends(v)
	}
	w0 := bits.Len64(uint64(hi - lo))
	best := frame{min: lo, width: roundWidth(w0)}
	best.cost = packedLen(len(v), best.width)
	if w0 == 0 {
		return best
	}
	// Outliers above: bit lengths from the minimum. Below: from the maximum. Most often
	// there are none, or too many to be outliers.
	above, below := len(v), len(v)
	if w0 < 64 {
		half := int64(1) << (w0 - 1)
		above, below = outside(v, hi-half+1, lo+half)
	}
	var lens [65]uint16
	if above <= mostPatches(len(v)) || w0 == 64 {
		bitLens(&lens, v, lo, 1)
		best.fewer(len(v), w0, &lens, lo, 0)
	}
	if below <= mostPatches(len(v)) || w0 == 64 {
		bitLens(&lens, v, hi, -1)
		best.fewer(len(v), w0, &lens, hi, 1)
	}
	switch {
	case w0 < 4 || e.noise:
	case estimate:
		best.inner(len(v), lo, hi, least, greatest)
	case e.twoSided(v, w0):
		e.window(v, lo, w0, &best)
	}
	return best
}

// mostPatches is how many of n values may be patches at most, but for frames that leave
// out values at both ends.
func mostPatches(n int) int { return n/4 + 1 }

// Each of the loops that follow is a function of its own, and not inlined, for what it
// needs to stay in registers.

// ends are the least and the greatest value.
//
//go:noinline
func ends(v []int64) (lo, hi int64) {
	lo, hi = v[0], v[0]
	lo2, hi2 := lo, hi // two at a time are faster than one
	for len(v) >= 4 {
		x := (*[4]int64)(v)
		lo, hi = min(lo, x[0]), max(hi, x[0])
		lo2, hi2 = min(lo2, x[1]), max(hi2, x[1])
		lo, hi = min(lo, x[2]), max(hi, x[2])
		lo2, hi2 = min(lo2, x[3]), max(hi2, x[3])
		v = v[4:]
	}
	for _, x := range v {
		lo, hi = min(lo, x), max(hi, x)
	}
	return min(lo, lo2), max(hi, hi2)
}

// outside counts the values that aren't less than above, and those that are less than
// below, from neither of which they are 1<<63 away.
//
//go:noinline
func outside(v []int64, below, above int64) (over, under int) {
	for len(v) >= 2 {
		x := (*[2]int64)(v)
		over += int((x[0]-above)>>63) + int((x[1]-above)>>63)
		under -= int((x[0]-below)>>63) + int((x[1]-below)>>63)
		over += 2
		v = v[2:]
	}
	for _, x := range v {
		over += int((x-above)>>63) + 1
		under -= int((x - below) >> 63)
	}
	return over, under
}

// bitLens sets lens to how many values there are whose distance to an end of them, sign
// times that, has so many bits.
//
//go:noinline
func bitLens(lens *[65]uint16, v []int64, end, sign int64) {
	var one, two [65]uint16 // two at a time are faster than one
	for len(v) >= 2 {
		x := (*[2]int64)(v)
		one[bits.Len64(uint64((x[0]-end)*sign))]++
		two[bits.Len64(uint64((x[1]-end)*sign))]++
		v = v[2:]
	}
	for _, x := range v {
		one[bits.Len64(uint64((x-end)*sign))]++
	}
	for i := range lens {
		lens[i] = one[i] + two[i]
	}
}

// twoEnds are the least and the greatest value, and those next to them, which are the same
// where there are two such; of one value they are nothing.
func twoEnds(v []int64) (lo, hi, least, greatest int64) {
	lo, hi, least, greatest = v[0], v[0], math.MaxInt64, math.MinInt64
	for _, x := range v[1:] {
		least = min(least, max(lo, x))
		lo = min(lo, x)
		greatest = max(greatest, min(hi, x))
		hi = max(hi, x)
	}
	return lo, hi, least, greatest
}

// inner tries to leave out the least and the greatest value, if there are none like them.
func (f *frame) inner(n int, lo, hi, least, greatest int64) {
	if least == lo || greatest == hi || least > greatest {
		return
	}
	w := bits.Len64(uint64(greatest - least))
	if c := packedLen(n, roundWidth(w)) + 1 + patchCost(bits.Len64(uint64(hi-least))) + patchCost(bits.Len64(uint64(least-lo))); c < f.cost {
		*f = frame{min: least, width: roundWidth(w), patches: 2, cost: c}
	}
}

// fewer tries smaller widths with patches for the values of more bits.
func (f *frame) fewer(n, w0 int, lens *[65]uint16, anchor, down int64) {
	patches, extra := 0, 1
	for w := w0 - 1; w >= 0; w-- {
		k := int(lens[w+1])
		patches += k
		extra += k * patchCost(w+1)
		if patches > mostPatches(n) {
			return
		}
		if c := packedLen(n, roundWidth(w)) + extra; c < f.cost {
			*f = frame{min: anchor - down*(1<<uint(w)-1), width: roundWidth(w), patches: patches, cost: c}
			if f.width == wholeWord {
				f.min, f.patches = anchor-down*(1<<uint(w)-1), 0
			}
		}
	}
}

// twoSided guesses from a few values whether the middle ones lie much closer
// together than the outer ones.
func (e *Encoder) twoSided(v []int64, w0 int) bool {
	const looked, left = 16, 2 // left out at both ends
	if len(v) < looked {
		s := append(e.sorted[:0], v...)
		e.sorted = s
		slices.Sort(s)
		return bits.Len64(uint64(s[len(s)-1-len(s)/6]-s[len(s)/6]))+1 < w0
	}
	// The three least and the three greatest of them, in order.
	lo, hi := [left + 1]int64{math.MaxInt64, math.MaxInt64, math.MaxInt64}, [left + 1]int64{math.MinInt64, math.MinInt64, math.MinInt64}
	for i := range looked {
		x := v[i*len(v)/looked]
		y := x
		lo[0], x = min(lo[0], x), max(lo[0], x)
		lo[1], x = min(lo[1], x), max(lo[1], x)
		lo[2] = min(lo[2], x)
		hi[0], y = max(hi[0], y), min(hi[0], y)
		hi[1], y = max(hi[1], y), min(hi[1], y)
		hi[2] = max(hi[2], y)
	}
	return bits.Len64(uint64(hi[left]-lo[left]))+1 < w0
}

// window looks for the best frame that leaves out values at both ends.
func (e *Encoder) window(v []int64, lo int64, w0 int, best *frame) {
	s := e.sort(v, lo, w0)
	for w := min(w0-1, maxWidth-1); w >= 0; w-- {
		if packedLen(len(s), uint(w)) >= best.cost {
			continue
		}
		most, from := 0, 0 // values next to each other that fit
		for j, x := range s {
			if uint64(x-s[j-most])>>uint(w) == 0 {
				from = j - most
				most++
			}
		}
		if len(s)-most > len(s)/3 {
			return
		}
		extra := 1
		for _, x := range s[:from] {
			extra += patchCost(bits.Len64(uint64(s[from] - x)))
		}
		for _, x := range s[from+most:] {
			extra += patchCost(bits.Len64(uint64(x - s[from])))
		}
		if c := packedLen(len(s), uint(w)) + extra; c < best.cost {
			*best = frame{min: s[from], width: uint(w), patches: len(s) - most, cost: c}
		}
	}
}

// sort gives the values in order, of which the least is lo, and the greatest more by a number
// of w0 bits.
func (e *Encoder) sort(v []int64, lo int64, w0 int) []int64 {
	if w0 > 3*8 || len(v) < 64 {
		s := append(e.sorted[:0], v...)
		e.sorted = s
		slices.Sort(s)
		return s
	}
	// By their bytes, from the least on: two or three passes.
	from := append(e.sorted[:0], v...)
	to := slices.Grow(e.other[:0], len(v))[:len(v)]
	for shift := 0; shift < w0; shift += 8 {
		var at [256]uint16
		for _, x := range from {
			at[byte(uint64(x-lo)>>uint(shift))]++
		}
		next := uint16(0)
		for i, n := range at {
			at[i], next = next, next+n
		}
		for _, x := range from {
			k := byte(uint64(x-lo) >> uint(shift))
			to[at[k]] = x
			at[k]++
		}
		from, to = to, from
	}
	e.sorted, e.other = from, to
	return from
}

// appendBlock packs at most blockLen values.
func (e *Encoder) appendBlock(dst []byte, v []int64) []byte {
	f := e.chooseFrame(v, false)
	if f.patches == 0 {
		dst = binary.AppendVarint(append(dst, byte(f.width)), f.min)
		return pack(dst, v, &f)
	}
	var at [blockLen]byte
	patches, packed := 0, e.packed[:len(v)]
	for i, x := range v {
		packed[i] = x
		if !f.fits(x) {
			packed[i] = f.min
			at[patches] = byte(i)
			patches++
		}
	}
	dst = binary.AppendVarint(append(dst, byte(f.width)|patched), f.min)
	dst = pack(dst, packed, &f)
	dst = append(dst, byte(patches-1))
	dst = append(dst, at[:patches]...)
	for _, i := range at[:patches] {
		dst = binary.AppendVarint(dst, v[i]-f.min)
	}
	return dst
}

// pack appends the values, which all fit, padded with zeros to a whole number of groups of
// eight.
func pack(dst []byte, v []int64, f *frame) []byte {
	if f.width == 0 {
		return dst
	}
	n := packedLen(len(v), f.width)
	if f.width == wholeWord {
		for _, x := range v {
			dst = binary.LittleEndian.AppendUint64(dst, uint64(x-f.min))
		}
		return append(dst, make([]byte, n-8*len(v))...)
	}
	start := len(dst)
	dst = slices.Grow(dst, n+8)[:start+n+8]
	out := dst[start:]
	var word uint64
	var used uint
	base, width := f.min, f.width&63
	for _, x := range v {
		u := uint64(x - base)
		word |= u << (used & 63)
		if used += width; used >= 64 {
			binary.LittleEndian.PutUint64(out, word)
			out = out[8:]
			used -= 64
			word = u >> ((width - used) & 63)
		}
	}
	clear(out)
	binary.LittleEndian.PutUint64(out, word)
	return dst[:start+n]
}

// blockHead reads the width and minimum of a block of n values, and checks that
// they all lie in b.
func blockHead(n int, b []byte) (width uint, patches bool, base int64, size int, rest []byte, err error) {
	if len(b) < 2 {
		return 0, false, 0, 0, nil, ErrCorrupt
	}
	width = uint(b[0] &^ patched)
	patches = b[0]&patched != 0
	k := 1
	if u := b[1]; u < 0x80 {
		base = int64(u>>1) ^ -int64(u&1)
	} else if base, k = binary.Varint(b[1:]); k <= 0 {
		return 0, false, 0, 0, nil, ErrCorrupt
	}
	b = b[1+k:]
	size = packedLen(n, width)
	if len(b) < size || width > maxWidth && width != wholeWord {
		return 0, false, 0, 0, nil, ErrCorrupt
	}
	return width, patches, base, size, b, nil
}

// block unpacks len(dst) values, at most blockLen, and returns the bytes behind.
func (d *Decoder) block(dst []int64, b []byte) ([]byte, error) {
	width, patches, base, n, b, err := blockHead(len(dst), b)
	if err != nil {
		return nil, err
	}
	switch width {
	case 0:
		fill(dst, base)
	case wholeWord:
		for i := range dst {
			dst[i] = base + int64(binary.LittleEndian.Uint64(b[8*i:]))
		}
	default:
		d.unpackBlock(dst, b, n, width, base)
	}
	b = b[n:]
	d.fell = d.fell || base < 0
	if !patches {
		return b, nil
	}
	return d.patch(dst, b, base)
}

// sumBlock is block, and sumFloats of it. Only behind a block of blockLen values
// does sum mean anything: a shorter one is the last of its column.
func (d *Decoder) sumBlock(dst []float64, b []byte, last int64) (rest []byte, sum int64, err error) {
	width, patches, base, n, body, err := blockHead(len(dst), b)
	if err != nil {
		return nil, 0, err
	}
	if !patches && width != 0 && width != wholeWord {
		d.fell = d.fell || base < 0
		src := d.withSlack(body, n)
		if padded := (len(dst) + 7) &^ 7; padded <= cap(dst) {
			last = unpackSum(dst[:padded], src, width, base, last)
			return body[n:], last, nil
		}
		whole := len(dst) &^ 7
		last = unpackSum(dst[:whole], src, width, base, last)
		if whole < len(dst) {
			var tail [8]int64
			unpack(tail[:], src[n-int(width):], width, base)
			last = sumFloats(dst[whole:], tail[:len(dst)-whole], last)
		}
		return body[n:], last, nil
	}
	if rest, err = d.block(d.buf[:len(dst)], b); err != nil {
		return nil, 0, err
	}
	return rest, sumFloats(dst, d.buf[:len(dst)], last), nil
}

// mostSummed is the greatest width of which eight values lie in one load of eight bytes.
const mostSummed = 8

// sumPacked is the sum of a block of values of width bits, 1 to mostSummed, with eight readable bytes behind them: eight
// values become four of twice the width, two and one.
func sumPacked(src []byte, width uint) (sum int64) {
	four := uint64(1)<<(4*width) - 1
	two := (uint64(1)<<(2*width) - 1) * (1 + 1<<(4*width))
	one := (uint64(1)<<width - 1) * (1 + 1<<(2*width) + 1<<(4*width) + 1<<(6*width))
	for len(src) >= int(width)+8 {
		x := binary.LittleEndian.Uint64(src)
		x = x&one + x>>(width&63)&one
		x = x&two + x>>(2*width&63)&two
		sum += int64(x&four + x>>(4*width&63)&four)
		src = src[width:]
	}
	return sum
}

// unpackBlock unpacks the n bytes at the start of b.
func (d *Decoder) unpackBlock(dst []int64, b []byte, n int, width uint, base int64) {
	src := d.withSlack(b, n)
	if padded := (len(dst) + 7) &^ 7; padded <= cap(dst) {
		unpack(dst[:padded], src, width, base)
		return
	}
	whole := len(dst) &^ 7
	unpack(dst[:whole], src, width, base)
	if whole < len(dst) {
		var tail [8]int64
		unpack(tail[:], src[n-int(width):], width, base)
		copy(dst[whole:], tail[:])
	}
}

// withSlack returns the first n bytes of b with at least eight readable bytes
// behind them, of whatever value: unpacking loads whole words.
func (d *Decoder) withSlack(b []byte, n int) []byte {
	if cap(b) >= n+8 {
		return b[:n+8]
	}
	d.slack = append(d.slack[:0], b[:n]...)
	d.slack = append(d.slack, 0, 0, 0, 0, 0, 0, 0, 0)
	return d.slack
}

func (d *Decoder) patch(dst []int64, b []byte, base int64) ([]byte, error) {
	if len(b) < 1 {
		return nil, ErrCorrupt
	}
	count := int(b[0]) + 1
	if len(b) < 1+2*count {
		return nil, ErrCorrupt
	}
	at := b[1 : 1+count]
	b = b[1+count:]
	for _, i := range at {
		v, k := binary.Varint(b)
		if k <= 0 || int(i) >= len(dst) {
			return nil, ErrCorrupt
		}
		b = b[k:]
		dst[i] = base + v
		d.fell = d.fell || base+v < 0
	}
	return b, nil
}

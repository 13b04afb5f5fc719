package fetch

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/prometheus/prometheus/model/value"
)

// xor2 decodes chunks of Prometheus's XOR2 encoding (tsdb/chunkenc/xor2.go) without
// start timestamps, all samples of a chunk at once: what that package's iterator
// gives one by one. A fuzz test compares them.
type xor2 struct {
	padded []byte // the chunk, and zeros: reads need not look for its end
}

const (
	xor2Header = 3 // bytes: number of samples, start timestamps
	// A sample takes 5 + 64 + 3 + 11 + 64 bits at most, and is read by 9 bytes.
	xor2Padding = 32
)

// plainXOR2 says whether data is a chunk that xor2 decodes, if it is XOR2.
func plainXOR2(data []byte) bool { return len(data) >= xor2Header && data[2] == 0 }

// window is where the bits of a value differ from those of the one before.
type window struct {
	size, trailing uint // trailing may be 64 and more in bytes that nobody wrote
}

// append decodes a chunk and appends its samples.
func (d *xor2) append(data []byte, ts []int64, vs []float64) ([]int64, []float64, error) {
	total := int(binary.BigEndian.Uint16(data))
	if total == 0 {
		return ts, vs, nil
	}
	short := func() ([]int64, []float64, error) {
		return ts, vs, fmt.Errorf("%w: XOR2 of %d bytes ends before its %d samples do", ErrChunk, len(data), total)
	}
	// From the third on each takes a bit, and more before.
	if total > 8*len(data) {
		return short()
	}
	n := len(ts)
	ts, vs = slices.Grow(ts, total)[:n+total], slices.Grow(vs, total)[:n+total]
	t := ts[n:]
	v := vs[n:][:len(t)]
	at := xor2Header
	first, size := binary.Varint(data[at:])
	if at += size; size <= 0 || len(data) < at+8 {
		return short()
	}
	x := binary.BigEndian.Uint64(data[at:])
	t[0], v[0] = first, math.Float64frombits(x)
	base := x // the last value that isn't a staleness marker
	if x == value.StaleNaN {
		base = 0
	}
	if at += 8; total == 1 {
		return ts, vs, nil
	}
	delta, size := binary.Uvarint(data[at:])
	if size <= 0 {
		return short()
	}
	at += size
	d.padded = append(append(d.padded[:0], data...), make([]byte, xor2Padding)...)
	p, end := d.padded, uint(8*len(data))
	c := cursor{pos: uint(8 * at), now: first + int64(delta), delta: delta, base: base, win: window{size: 64}} //nolint:gosec // wraps, as there
	t[1], v[1] = c.now, c.value(p).of(&c)
	for i := 2; i < total && c.pos <= end; i++ {
		if i += c.near(p, end, t[i:], v[i:]); i == total || c.pos > end {
			break
		}
		is := c.next(p)
		t[i], v[i] = c.now, is.of(&c)
	}
	if c.pos > end {
		return short()
	}
	return ts, vs, nil
}

// cursor is where a decoder is in a chunk, and what it has to know of the samples before.
type cursor struct {
	pos   uint // of the next bit
	now   int64
	delta uint64
	base  uint64 // the last value that isn't a staleness marker
	win   window
}

// near decodes samples as long as each fits into one load, as nearly all do, and says how many. It stops soon
// after end, in bits: what comes after the chunk are zeros. c.next is for the others.
func (c *cursor) near(p []byte, end uint, t []int64, v []float64) int {
	// In variables, which stay in registers: nothing is called.
	pos, now, delta, base, size, trailing := c.pos, c.now, int64(c.delta), c.base, c.win.size, c.win.trailing //nolint:gosec // wraps, as there
	if trailing >= 64 {
		return 0
	}
	v = v[:len(t)]
	i := uint(0)
loop:
	for i < uint(len(t)) {
		k := pos >> 3
		x := binary.BigEndian.Uint64(p[k:k+8]) << (pos & 7) // 57 bits at least
		switch top := x >> 61; {
		case top == 0b100 && size <= 57-3: // the same time difference
			base ^= x << 3 >> ((64 - size) & 63) << (trailing & 63)
			pos += 3 + size
		case x>>56 == 0: // as often as there are zeros: the same time difference and value
			same := min(uint(bits.LeadingZeros64(x)), 57, uint(len(t))-i)
			was := math.Float64frombits(base)
			for to := i + same; i < to; i++ {
				now += delta
				t[i], v[i] = now, was
			}
			if pos += same; pos > end {
				break loop
			}
			continue
		case top < 0b100:
			pos++
		case top == 0b110 && x<<16>>62 != 0b11 && size <= 57-18:
			delta += int64(x<<3) >> (64 - 13) //nolint:gosec // bits
			pos += 17
			if x<<16>>63 != 0 {
				pos += 1 + size
				base ^= x << 18 >> ((64 - size) & 63) << (trailing & 63)
			}
		case top == 0b101 && x<<8>>58 <= min(57-14, 64-x<<3>>59) && x<<8>>58 != 0: // likewise, with a new window
			size = uint(x << 8 >> 58)
			trailing = 64 - size - uint(x<<3>>59)
			pos += 14 + size
			base ^= x << 14 >> ((64 - size) & 63) << (trailing & 63)
		default:
			break loop
		}
		now += delta
		t[i], v[i] = now, math.Float64frombits(base)
		i++
	}
	c.pos, c.now, c.delta, c.base, c.win = pos, now, uint64(delta), base, window{size, trailing} //nolint:gosec // wraps
	return int(i)
}

// next reads the next sample.
func (c *cursor) next(p []byte) (is kind) {
	switch x := load(p, c.pos); {
	case x>>63 == 0:
		c.pos++
	case x>>62 == 0b10: // the same time difference
		if c.pos += 3; x>>61 == 0b101 {
			c.window(p)
		}
		c.differs(p)
	case x>>59 == 0b11111:
		is = stale
		c.pos += 5
	default:
		switch {
		case x>>61 == 0b110:
			c.delta += uint64(int64(x<<3) >> (64 - 13)) //nolint:gosec // bits
			c.pos += 16
		case x>>60 == 0b1110:
			c.delta += uint64(int64(x<<4) >> (64 - 20)) //nolint:gosec // bits
			c.pos += 24
		default:
			c.delta += load(p, c.pos+5)
			c.pos += 69
		}
		is = c.value(p)
	}
	c.now += int64(c.delta) //nolint:gosec // wraps, as there
	return is
}

// load gives the 64 bits from a bit on.
func load(p []byte, pos uint) uint64 {
	b := p[pos>>3:]
	_ = b[8]
	return binary.BigEndian.Uint64(b)<<(pos&7) | uint64(b[8])>>(8-(pos&7))
}

// kind of a value: given by its bits, or a staleness marker.
type kind bool

const (
	given kind = false
	stale kind = true
)

// of gives the value that has just been read.
func (k kind) of(c *cursor) float64 {
	if k == stale {
		return math.Float64frombits(value.StaleNaN)
	}
	return math.Float64frombits(c.base)
}

// value reads a value that stands apart from the time.
func (c *cursor) value(p []byte) (is kind) {
	switch x := load(p, c.pos); {
	case x>>63 == 0:
		c.pos++
		return given
	case x>>61 == 0b111:
		c.pos += 3
		return stale
	case x>>61 == 0b110:
		c.pos += 3
		c.window(p)
	default:
		c.pos += 2
	}
	c.differs(p)
	return given
}

// differs reads what is in the window.
func (c *cursor) differs(p []byte) {
	c.base ^= load(p, c.pos) >> (64 - c.win.size) << c.win.trailing
	c.pos += c.win.size
}

// window reads a window.
func (c *cursor) window(p []byte) {
	x := load(p, c.pos)
	leading := uint8(x >> 59)
	size := uint8(x>>53) & 0x3f
	if size == 0 {
		size = 64
	}
	c.win = window{uint(size), uint(64 - leading - size)}
	c.pos += 11
}

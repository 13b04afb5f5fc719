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
	t, v := ts[n:], vs[n:]
	at := xor2Header
	first, size := binary.Varint(data[at:])
	if at += size; size <= 0 || len(data) < at+8 {
		return short()
	}
	base := uint64(0) // the last value that isn't a staleness marker
	x := binary.BigEndian.Uint64(data[at:])
	t[0], v[0] = first, math.Float64frombits(x)
	if x != value.StaleNaN {
		base = x
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
	pos, win := uint(8*at), window{size: 64}
	now := first + int64(delta) //nolint:gosec // wraps, as there
	t[1] = now
	pos, v[1] = win.value(p, pos, &base)
	if pos > end {
		return short()
	}
	for i := 2; i < total; {
		x := load(p, pos)
		switch {
		case x>>63 == 0: // as often as there are zeros: the same time difference and value
			same := min(bits.LeadingZeros64(x), total-i)
			was := math.Float64frombits(base)
			for k := i; k < i+same; k++ {
				now += int64(delta) //nolint:gosec // wraps, as there
				t[k], v[k] = now, was
			}
			i += same
			if pos += uint(same); pos > end { //nolint:gosec // at most 64
				return short()
			}
			continue
		case x>>62 == 0b10: // the same time difference
			now += int64(delta) //nolint:gosec // wraps, as there
			if x>>61 == 0b100 && win.size <= 61 {
				base ^= x << 3 >> (64 - win.size) << win.trailing
				pos += 3 + win.size
			} else if x>>61 == 0b100 {
				pos = win.difference(p, pos+3, &base)
			} else {
				pos = win.next(p, pos+3, &base)
			}
			t[i], v[i] = now, math.Float64frombits(base)
		case x>>59 == 0b11111:
			now += int64(delta) //nolint:gosec // wraps, as there
			t[i], v[i] = now, math.Float64frombits(value.StaleNaN)
			pos += 5
		default:
			switch {
			case x>>61 == 0b110:
				delta += uint64(int64(x<<3) >> (64 - 13)) //nolint:gosec // bits
				pos += 16
			case x>>60 == 0b1110:
				delta += uint64(int64(x<<4) >> (64 - 20)) //nolint:gosec // bits
				pos += 24
			default:
				delta += load(p, pos+5)
				pos += 69
			}
			now += int64(delta) //nolint:gosec // wraps, as there
			t[i] = now
			pos, v[i] = win.value(p, pos, &base)
		}
		if pos > end {
			return short()
		}
		i++
	}
	return ts, vs, nil
}

// load gives the 64 bits from a bit on.
func load(p []byte, pos uint) uint64 {
	b := p[pos>>3:]
	_ = b[8]
	return binary.BigEndian.Uint64(b)<<(pos&7) | uint64(b[8])>>(8-(pos&7))
}

// value reads a value that stands apart from the time.
func (w *window) value(p []byte, pos uint, base *uint64) (uint, float64) {
	x := load(p, pos)
	switch {
	case x>>63 == 0:
		pos++
	case x>>62 == 0b10:
		pos = w.difference(p, pos+2, base)
	case x>>61 == 0b110:
		pos = w.next(p, pos+3, base)
	default:
		return pos + 3, math.Float64frombits(value.StaleNaN)
	}
	return pos, math.Float64frombits(*base)
}

// difference reads what is in the window.
func (w *window) difference(p []byte, pos uint, base *uint64) uint {
	*base ^= load(p, pos) >> (64 - w.size) << w.trailing
	return pos + w.size
}

// next reads a new window and what is in it.
func (w *window) next(p []byte, pos uint, base *uint64) uint {
	x := load(p, pos)
	leading := uint8(x >> 59)
	size := uint8(x>>53) & 0x3f
	if size == 0 {
		size = 64
	}
	w.size, w.trailing = uint(size), uint(64-leading-size)
	return w.difference(p, pos+11, base)
}

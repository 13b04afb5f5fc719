package chunkfmt

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// cursor reads fields off hostile bytes. The first error sticks; after it every
// read returns zero, so callers check err once, before they act on a count.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = corrupt(format, args...)
		c.b = nil
	}
}

func (c *cursor) byte() byte {
	if len(c.b) < 1 {
		c.fail("ends early")
		return 0
	}
	x := c.b[0]
	c.b = c.b[1:]
	return x
}

func (c *cursor) uvarint() uint64 {
	if len(c.b) > 0 && c.b[0] < 0x80 {
		x := c.b[0]
		c.b = c.b[1:]
		return uint64(x)
	}
	x, n := binary.Uvarint(c.b)
	if n <= 0 {
		c.fail("bad varint")
		return 0
	}
	c.b = c.b[n:]
	return x
}

func (c *cursor) varint() int64 {
	u := c.uvarint()
	return int64(u>>1) ^ -int64(u&1)
}

func (c *cursor) uint32() uint32 {
	if len(c.b) < 4 {
		c.fail("ends early")
		return 0
	}
	x := binary.LittleEndian.Uint32(c.b)
	c.b = c.b[4:]
	return x
}

// float reads what appendFloat wrote.
func (c *cursor) float() float64 {
	return math.Float64frombits(bits.ReverseBytes64(c.uvarint()))
}

// count reads a number of items that take at least size bytes each and still
// lie ahead, so that what is allocated for them is bounded by the input.
func (c *cursor) count(size int) int {
	n := c.uvarint()
	if n > uint64(len(c.b)/size) {
		c.fail("count %d exceeds the %d bytes left", n, len(c.b))
		return 0
	}
	return int(n)
}

// bounded reads a number that must not exceed limit.
func (c *cursor) bounded(what string, limit uint64) int {
	n := c.uvarint()
	if n > limit {
		c.fail("%s is %d, limit %d", what, n, limit)
		return 0
	}
	return int(n)
}

func (c *cursor) bytes(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.fail("ends early")
		return nil
	}
	x := c.b[:n:n]
	c.b = c.b[n:]
	return x
}

// text reads a length and as many bytes.
func (c *cursor) text() string { return string(c.bytes(c.count(1))) }

// MaxLabel is the largest label name or value, in bytes; package labels of
// Prometheus panics on larger ones.
const MaxLabel = 1<<24 - 1

// label reads a text of at most MaxLabel bytes.
func (c *cursor) label() string {
	n := c.count(1)
	if n > MaxLabel {
		c.fail("label of %d bytes", n)
	}
	return string(c.bytes(n))
}

// end reports the sticky error, or that bytes were left over.
func (c *cursor) end() error {
	if c.err == nil && len(c.b) > 0 {
		c.fail("%d bytes left over", len(c.b))
	}
	return c.err
}

// appendFloat writes the bits with their bytes reversed as a varint: numbers
// with few significant digits take 1 to 3 bytes, any other at most 10.
func appendFloat(dst []byte, v float64) []byte {
	return binary.AppendUvarint(dst, bits.ReverseBytes64(math.Float64bits(v)))
}

func appendText(dst []byte, s string) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(s)))
	return append(dst, s...)
}

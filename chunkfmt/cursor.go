package chunkfmt

import (
	"encoding/binary"
	"math"
	"math/bits"

	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

// cursor reads the fields of pages.
type cursor struct{ untrusted.Reader }

func over(b []byte) cursor { return cursor{untrusted.Reader{B: b, Kind: ErrCorrupt}} }

// float reads what appendFloat wrote.
func (c *cursor) float() float64 {
	return math.Float64frombits(bits.ReverseBytes64(c.Uvarint()))
}

// MaxLabel is the largest label name or value, in bytes; package labels of
// Prometheus panics on larger ones.
const MaxLabel = 1<<24 - 1

// label reads a text of at most MaxLabel bytes.
func (c *cursor) label() string {
	n := c.Count(1)
	if n > MaxLabel {
		c.Fail("label of %d bytes", n)
	}
	return string(c.Bytes(n))
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

// Package codec turns columns of timestamps, integers and floats into bytes and
// back, in bulk. Every encoding delimits itself, given the number of values,
// which the caller stores and bounds (MaxLen). Encodings are chosen by
// estimated size at write time; decoding is loops over slices.
//
// Decoders treat bytes as hostile: errors wrap ErrCorrupt, and what is
// allocated depends on the number of values asked for, never on the bytes.
package codec

import (
	"encoding/binary"
	"errors"
	"math"
)

// ErrCorrupt says that bytes are no encoding of as many values as were asked for.
var ErrCorrupt = errors.New("corrupt block data")

// MaxLen is the largest number of values in a column.
const MaxLen = 1 << 16

// Encoder encodes columns. It keeps scratch memory between calls; the zero
// value is ready. Not safe for concurrent use.
type Encoder struct{}

// Decoder decodes columns. It keeps scratch memory between calls; the zero
// value is ready. Not safe for concurrent use.
type Decoder struct{}

// AppendTimes appends an encoding of timestamps in ascending order.
func (e *Encoder) AppendTimes(dst []byte, t []int64) []byte { return e.AppendInts(dst, t) }

// Times appends n timestamps to dst and returns the bytes behind them.
func (d *Decoder) Times(dst []int64, b []byte, n int) (out []int64, rest []byte, err error) {
	return d.Ints(dst, b, n)
}

// AppendInts appends an encoding of any integers.
func (e *Encoder) AppendInts(dst []byte, v []int64) []byte {
	var prev int64
	for _, x := range v {
		dst = binary.AppendVarint(dst, x-prev)
		prev = x
	}
	return dst
}

// Ints appends n integers to dst and returns the bytes behind them.
func (d *Decoder) Ints(dst []int64, b []byte, n int) (out []int64, rest []byte, err error) {
	var x int64
	for range n {
		y, k := binary.Varint(b)
		if k <= 0 {
			return nil, nil, ErrCorrupt
		}
		x += y
		b = b[k:]
		dst = append(dst, x)
	}
	return dst, b, nil
}

// AppendFloats appends an encoding of any floats, bit for bit.
func (e *Encoder) AppendFloats(dst []byte, v []float64) []byte {
	for _, x := range v {
		dst = binary.LittleEndian.AppendUint64(dst, math.Float64bits(x))
	}
	return dst
}

// Floats appends n floats to dst and returns the bytes behind them.
func (d *Decoder) Floats(dst []float64, b []byte, n int) (out []float64, rest []byte, err error) {
	if len(b)/8 < n {
		return nil, nil, ErrCorrupt
	}
	for i := range n {
		dst = append(dst, math.Float64frombits(binary.LittleEndian.Uint64(b[i*8:])))
	}
	return dst, b[n*8:], nil
}

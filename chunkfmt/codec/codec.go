// Package codec turns columns of timestamps, integers and floats into bytes and
// back, in bulk. Every encoding delimits itself, given the number of values,
// which the caller stores. Encodings are chosen by estimated size, from a
// stretch of the values; decoding is loops over slices.
//
// The base of all is a column of integers (ints.go): constant, or blocks of 256
// values as differences to a minimum in as many bits as most of them need, with
// patches for the rest (pack.go); plain or as differences to the value before;
// less a common divisor; with runs of equal values stored apart. Floats
// (floats.go) are mapped to integers, as decimals with few digits or by their
// bits; what doesn't map is an exception. Timestamps (times.go) are a grid and
// how far each lies off it.
//
// Decoders treat bytes as hostile: errors are ErrCorrupt, and what is allocated
// depends on the number of values asked for, never on the bytes. They load whole
// words, and so may read bytes between the length and the capacity of what they
// are given; and they unpack whole groups of eight, and so may overwrite what lies
// between the length of what they append and the capacity.
package codec

import "errors"

// ErrCorrupt says that bytes are no encoding of as many values as were asked for.
var ErrCorrupt = errors.New("corrupt block data")

// MaxLen is the largest number of values in a column.
const MaxLen = 1 << 16

// Encoder encodes columns. It keeps scratch memory between calls; the zero
// value is ready. Not safe for concurrent use.
type Encoder struct {
	sorted, other, deltas, values, lens, scaled []int64
	ints, diff, residuals                       []int64
	exceptions                                  []int
	packed                                      [blockLen]int64
	noise                                       bool // see AppendNoise
	exact                                       bool // estimates look for frames as thoroughly as the encoding does
}

// Decoder decodes columns. It keeps scratch memory between calls; the zero
// value is ready. Not safe for concurrent use.
type Decoder struct {
	values, lens []int64
	ints64       []int64
	floats       []float64
	slack        []byte
	buf          [blockLen]int64

	fell  bool // integers that were decoded may be less than those before them
	rises bool // see Rises
}

// Package untrusted takes fields off bytes that nobody vouches for: pages, rows, records and messages.
package untrusted

import (
	"encoding/binary"
	"fmt"
)

// Reader takes fields off the front of bytes. The first error sticks: after it nothing is left, and every
// read gives zero, so that callers look at Err once, before they act on what they read.
type Reader struct {
	B    []byte // what is left
	Err  error  // the first, or nil
	Kind error  // what errors wrap
}

// Fail makes an error of a text as fmt.Sprintf does, which wraps Kind, if there is none yet.
func (r *Reader) Fail(format string, args ...any) {
	if r.Err == nil {
		r.Err = fmt.Errorf("%w: %s", r.Kind, fmt.Sprintf(format, args...))
	}
	r.B = nil
}

// Byte reads a byte.
func (r *Reader) Byte() byte {
	if len(r.B) == 0 {
		r.early()
		return 0
	}
	x := r.B[0]
	r.B = r.B[1:]
	return x
}

// Uvarint reads what binary.AppendUvarint wrote.
func (r *Reader) Uvarint() uint64 {
	if len(r.B) > 0 && r.B[0] < 0x80 { // as nearly all
		x := r.B[0]
		r.B = r.B[1:]
		return uint64(x)
	}
	x, n := binary.Uvarint(r.B)
	if n <= 0 {
		r.Fail("bad varint")
		return 0
	}
	r.B = r.B[n:]
	return x
}

// Varint reads what binary.AppendVarint wrote.
func (r *Reader) Varint() int64 {
	u := r.Uvarint()
	return int64(u>>1) ^ -int64(u&1) //nolint:gosec // zigzag
}

// Uint32 reads four bytes, the lowest first.
func (r *Reader) Uint32() uint32 {
	if b := r.Bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// Uint64 reads eight bytes, the lowest first.
func (r *Reader) Uint64() uint64 {
	if b := r.Bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// Count reads a number of items that take at least so many bytes each and still lie ahead, so that what
// is allocated for them is bounded by the input.
func (r *Reader) Count(least int) int {
	n := r.Uvarint()
	if n > uint64(len(r.B)/least) {
		r.Fail("count %d exceeds the %d bytes left", n, len(r.B))
		return 0
	}
	return int(n) //nolint:gosec // bounded
}

// Bounded reads a number that is not to exceed limit, of an int; what names it in the error.
func (r *Reader) Bounded(what string, limit uint64) int {
	n := r.Uvarint()
	if n > limit {
		r.Fail("%s is %d, limit %d", what, n, limit)
		return 0
	}
	return int(n) //nolint:gosec // bounded
}

// Bytes reads n bytes, which are a part of the input; nil if there are less.
func (r *Reader) Bytes(n int) []byte {
	if n < 0 || n > len(r.B) {
		r.early()
		return nil
	}
	x := r.B[:n:n]
	r.B = r.B[n:]
	return x
}

// Sized reads a length and as many bytes, which are a part of the input.
func (r *Reader) Sized() []byte { return r.Bytes(r.Count(1)) }

// Text reads a length and as many bytes.
func (r *Reader) Text() string { return string(r.Sized()) }

// End gives Err, or an error if something is left.
func (r *Reader) End() error {
	if r.Err == nil && len(r.B) > 0 {
		r.Fail("%d bytes left over", len(r.B))
	}
	return r.Err
}

func (r *Reader) early() { r.Fail("ends early") }

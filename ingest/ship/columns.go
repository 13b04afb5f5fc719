package ship

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/prometheus/model/histogram"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

// Columns are the samples of a batch. The columns of one kind have the same
// length; ST is nil if no sample of the kind has a start timestamp.
type Columns struct {
	Floats          Floats
	Histograms      Histograms
	FloatHistograms FloatHistograms
}

// Floats are float samples of any series of the session.
type Floats struct {
	Ref   []uint32
	T, ST []int64 // ms since the epoch
	V     []float64
}

// Histograms are native histogram samples with integer counts.
type Histograms struct {
	Ref   []uint32
	T, ST []int64
	H     []*histogram.Histogram
}

// FloatHistograms are native histogram samples with float counts.
type FloatHistograms struct {
	Ref   []uint32
	T, ST []int64
	H     []*histogram.FloatHistogram
}

// Len is the number of samples.
func (c *Columns) Len() int {
	return len(c.Floats.T) + len(c.Histograms.T) + len(c.FloatHistograms.T)
}

// Reset empties c and keeps its memory.
func (c *Columns) Reset() {
	f, h, fh := &c.Floats, &c.Histograms, &c.FloatHistograms
	f.Ref, f.T, f.ST, f.V = f.Ref[:0], f.T[:0], f.ST[:0], f.V[:0]
	clear(h.H)
	h.Ref, h.T, h.ST, h.H = h.Ref[:0], h.T[:0], h.ST[:0], h.H[:0]
	clear(fh.H)
	fh.Ref, fh.T, fh.ST, fh.H = fh.Ref[:0], fh.T[:0], fh.ST[:0], fh.H[:0]
}

// Kinds and bounds of docs/protocols/ship.md.
const (
	kindFloats          = 1
	kindHistograms      = 2
	kindFloatHistograms = 3

	flagStart = 1

	maxColumnsBytes = 8 << 20
	maxSamples      = 1 << 20
	maxHistograms   = 1 << 16 // of one kind: each takes some hundred bytes of memory
)

// ErrColumns is wrapped by every error of DecodeColumns: the bytes are not
// columns of version 1.
var ErrColumns = errors.New("invalid columns")

// Encoder encodes columns, reusing its scratch memory. It is not safe for
// concurrent use.
type Encoder struct {
	raw, hist []byte
}

// Encode appends the encoded columns to dst.
func (e *Encoder) Encode(dst []byte, c *Columns) []byte {
	b := e.raw[:0]
	if f := &c.Floats; len(f.T) > 0 {
		b = appendSection(b, kindFloats, f.Ref, f.T, f.ST)
		for _, v := range f.V {
			b = binary.LittleEndian.AppendUint64(b, math.Float64bits(v))
		}
	}
	if h := &c.Histograms; len(h.T) > 0 {
		b = appendSection(b, kindHistograms, h.Ref, h.T, h.ST)
		for _, v := range h.H {
			e.hist = chunkfmt.AppendHistogram(e.hist[:0], v)
			b = append(binary.AppendUvarint(b, uint64(len(e.hist))), e.hist...)
		}
	}
	if h := &c.FloatHistograms; len(h.T) > 0 {
		b = appendSection(b, kindFloatHistograms, h.Ref, h.T, h.ST)
		for _, v := range h.H {
			e.hist = chunkfmt.AppendFloatHistogram(e.hist[:0], v)
			b = append(binary.AppendUvarint(b, uint64(len(e.hist))), e.hist...)
		}
	}
	e.raw = b
	if len(b) == 0 {
		return dst
	}
	return append(dst, s2.Encode(nil, b)...)
}

func appendSection(b []byte, kind byte, refs []uint32, ts, st []int64) []byte {
	flags := byte(0)
	if len(st) > 0 {
		flags = flagStart
	}
	b = append(b, kind, flags)
	b = binary.AppendUvarint(b, uint64(len(ts)))
	prevRef := int64(0)
	for _, r := range refs {
		b = binary.AppendVarint(b, int64(r)-prevRef)
		prevRef = int64(r)
	}
	prev := int64(0)
	for _, t := range ts {
		b = binary.AppendVarint(b, t-prev)
		prev = t
	}
	if flags&flagStart != 0 {
		prev = 0
		for _, s := range st {
			b = binary.AppendVarint(b, s-prev)
			prev = s
		}
	}
	return b
}

// Decoder decodes columns, reusing its scratch memory. It is not safe for
// concurrent use.
type Decoder struct {
	raw []byte
}

// Decode replaces the content of c by the columns in b. Histograms are newly
// allocated, the columns are not. Errors wrap ErrColumns; c is then undefined.
func (d *Decoder) Decode(b []byte, c *Columns) error {
	c.Reset()
	if len(b) == 0 {
		return nil
	}
	n, err := s2.DecodedLen(b)
	if err != nil {
		return fmt.Errorf("%w: compression header: %w", ErrColumns, err)
	}
	if n > maxColumnsBytes {
		return fmt.Errorf("%w: %d bytes decompressed, the limit is %d", ErrColumns, n, maxColumnsBytes)
	}
	if cap(d.raw) < n {
		d.raw = make([]byte, n)
	}
	raw, err := s2.Decode(d.raw[:n], b)
	if err != nil {
		return fmt.Errorf("%w: decompress: %w", ErrColumns, err)
	}
	r := reader{untrusted.Reader{B: raw, Kind: ErrColumns}}
	seen := [kindFloatHistograms + 1]bool{}
	for len(r.B) > 0 && r.Err == nil {
		kind := r.B[0]
		if kind < kindFloats || kind > kindFloatHistograms || seen[kind] {
			return fmt.Errorf("%w: section of kind %d, unknown or repeated", ErrColumns, kind)
		}
		seen[kind] = true
		r.B = r.B[1:]
		switch kind {
		case kindFloats:
			f := &c.Floats
			f.Ref, f.T, f.ST = r.section(f.Ref, f.T, f.ST, maxSamples)
			f.V = r.floats(f.V, len(f.T))
		case kindHistograms:
			h := &c.Histograms
			h.Ref, h.T, h.ST = r.section(h.Ref, h.T, h.ST, maxHistograms)
			h.H = histograms(&r, h.H, len(h.T), chunkfmt.DecodeHistogram)
		case kindFloatHistograms:
			h := &c.FloatHistograms
			h.Ref, h.T, h.ST = r.section(h.Ref, h.T, h.ST, maxHistograms)
			h.H = histograms(&r, h.H, len(h.T), chunkfmt.DecodeFloatHistogram)
		}
	}
	return r.Err
}

// reader reads the fields of columns.
type reader struct{ untrusted.Reader }

// section reads what the kinds have in common.
func (r *reader) section(refs []uint32, ts, st []int64, limit int) ([]uint32, []int64, []int64) {
	flags := r.Byte()
	if flags&^flagStart != 0 {
		r.Fail("unknown flags")
	}
	// A sample takes at least three bytes in the section: ref, time, value.
	n := r.Count(3)
	if n == 0 || n > limit {
		r.Fail("%d samples, and at most %d in a section", n, limit)
		return refs, ts, st
	}
	refs = r.refs(refs, n)
	ts = r.times(ts, n)
	if flags&flagStart != 0 {
		st = r.times(st, n)
	}
	return refs, ts, st
}

// ones are the top bits of eight bytes: where all are 0, eight bytes are as many
// numbers.
const ones = 0x8080808080808080

// refs reads n differences. Nearly all take one byte: those go eight at a time.
func (r *reader) refs(refs []uint32, n int) []uint32 {
	refs = slices.Grow(refs, n)
	ref, wrong := int64(0), uint64(0)
	for end := len(refs) + n; len(refs) < end && r.Err == nil; {
		for len(refs)+8 <= end && len(r.B) >= 8 {
			u := binary.LittleEndian.Uint64(r.B)
			if u&ones != 0 {
				break
			}
			r.B = r.B[8:]
			out := refs[len(refs) : len(refs)+8 : len(refs)+8]
			for i := range out {
				d := u & 0x7f
				u >>= 8
				ref += int64(d>>1) ^ -int64(d&1)
				wrong |= uint64(ref)
				out[i] = uint32(ref)
			}
			refs = refs[:len(refs)+8]
		}
		// Up to the next number that takes more than a byte, or the end.
		for i := 0; i < 8 && len(refs) < end; i++ {
			ref += r.Varint()
			wrong |= uint64(ref)
			refs = append(refs, uint32(ref))
		}
	}
	if wrong > math.MaxUint32 {
		r.Fail("ref out of range")
	}
	return refs
}

// times reads n differences as refs does. Most are 0: a scrape has one time.
func (r *reader) times(ts []int64, n int) []int64 {
	ts = slices.Grow(ts, n)
	t := int64(0)
	for end := len(ts) + n; len(ts) < end && r.Err == nil; {
		for len(ts)+8 <= end && len(r.B) >= 8 {
			u := binary.LittleEndian.Uint64(r.B)
			if u&ones != 0 {
				break
			}
			r.B = r.B[8:]
			out := ts[len(ts) : len(ts)+8 : len(ts)+8]
			if u == 0 {
				for i := range out {
					out[i] = t
				}
			} else {
				for i := range out {
					d := u & 0x7f
					u >>= 8
					t += int64(d>>1) ^ -int64(d&1)
					out[i] = t
				}
			}
			ts = ts[:len(ts)+8]
		}
		for i := 0; i < 8 && len(ts) < end; i++ {
			t += r.Varint()
			ts = append(ts, t)
		}
	}
	return ts
}

func (r *reader) floats(vs []float64, n int) []float64 {
	if r.Err != nil {
		return vs
	}
	if len(r.B) < 8*n {
		r.Fail("truncated values")
		return vs
	}
	at := len(vs)
	vs = slices.Grow(vs, n)[:at+n]
	out, b := vs[at:], r.B[:8*n]
	for i := range out {
		out[i] = math.Float64frombits(binary.LittleEndian.Uint64(b))
		b = b[8:]
	}
	r.B = r.B[8*n:]
	return vs
}

func histograms[H any](r *reader, hs []H, n int, decode func([]byte) (H, []byte, error)) []H {
	for range n {
		b := r.Sized()
		if r.Err != nil {
			return hs
		}
		h, rest, err := decode(b)
		if err != nil || len(rest) > 0 {
			r.Fail("histogram of %d bytes, %d left over: %v", len(b), len(rest), err)
			return hs
		}
		hs = append(hs, h)
	}
	return hs
}

package head

import (
	"encoding/binary"
	"math"
	"math/bits"

	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
)

// floats is an open XOR2 chunk of floats without start timestamps: the bytes of
// chunkenc's XOR2Chunk and the state of its appender as one plain struct. Most
// series of a head are just this, and each part of it that is allocated apart
// costs memory, and a cache miss for every sample. The bits are those of
// chunkenc (xor2.go of Prometheus); a test compares them.
type floats struct {
	stream []byte // with the header, whose count of samples bytes fills in
	t      int64  // of the last sample
	v      float64
	tDelta uint64

	free              uint8 // bits of the last byte of stream not yet written
	n                 uint8 // samples; 0: there is no chunk
	leading, trailing uint8 // window of the last value difference; leading 0xff: none
	stale             bool  // the last sample is a staleness marker; v is what came before then
}

const (
	xor2Header   = 3  // bytes: count of samples, start timestamps
	streamAtOnce = 64 // bytes a stream begins with
)

// start begins a chunk with its first sample.
func (f *floats) start(t int64, v float64) {
	*f = floats{stream: make([]byte, xor2Header, streamAtOnce), n: 1, leading: 0xff, t: t}
	f.stream = binary.AppendVarint(f.stream, t)
	f.stream = binary.BigEndian.AppendUint64(f.stream, math.Float64bits(v))
	if f.stale = value.IsStaleNaN(v); !f.stale {
		f.v = v
	}
}

// append adds a sample that is newer than all in the chunk. It returns by how
// many bytes the stream's memory has grown.
func (f *floats) append(t int64, v float64) (grown int) {
	// The longest sample takes 22 bytes.
	if before := cap(f.stream); before-len(f.stream) < 24 {
		grown = streamStep(before)
		s := make([]byte, len(f.stream), before+grown)
		copy(s, f.stream)
		f.stream = s
	}
	tDelta := uint64(t - f.t)
	if f.n == 1 {
		var buf [binary.MaxVarintLen64]byte
		for _, b := range buf[:binary.PutUvarint(buf[:], tDelta)] {
			f.write(uint64(b), 8)
		}
		f.value(v)
	} else {
		f.joint(int64(tDelta-f.tDelta), v)
	}
	f.t, f.tDelta = t, tDelta
	if f.stale = value.IsStaleNaN(v); !f.stale {
		f.v = v
	}
	f.n++
	return grown
}

// bitWriter writes bits beside the stream: to a place that is large enough, eight
// bytes at a time. It is for many samples at once.
type bitWriter struct {
	b    []byte
	n    int    // bytes written
	acc  uint64 // the bits that follow, from the highest on
	bits uint   // of acc; less than 64
}

// write appends the n low bits of u, of which there may be 1 to 64; the higher ones
// may be anything.
func (w *bitWriter) write(u uint64, n uint) {
	u <<= 64 - n
	w.acc |= u >> w.bits
	if w.bits += n; w.bits >= 64 {
		binary.BigEndian.PutUint64(w.b[w.n:], w.acc)
		w.n += 8
		w.bits -= 64
		w.acc = u << (n - w.bits) // 0 if nothing is left: then the shift is n, which is 64 at most
	}
}

// most is how much a run of a chunk takes at most: 22 bytes each sample, and what is
// written ahead.
const mostBytes = 22*chunkSamples + 16

// appendAll is append for several samples, which go into the chunk, with scratch
// memory of mostBytes. The chunk has two samples at least.
func (f *floats) appendAll(ts []int64, vs []float64, scratch []byte) (grown int) {
	w := bitWriter{b: scratch}
	size := len(f.stream)
	if f.free > 0 {
		size--
		w.acc, w.bits = uint64(f.stream[size])<<56, 8-uint(f.free)
	}
	last, tDelta := f.t, f.tDelta
	for i, t := range ts {
		v := vs[i]
		delta := uint64(t - last)
		dod := int64(delta - tDelta)
		last, tDelta = t, delta
		stale := value.IsStaleNaN(v)
		x := math.Float64bits(v) ^ math.Float64bits(f.v)
		f.stale = stale
		if dod == 0 {
			switch {
			case stale:
				w.write(0b11111, 5)
			case x == 0:
				w.write(0, 1)
			case f.reuses(x, 11):
				w.pair(0b100, 3, x>>f.trailing, 64-uint(f.leading)-uint(f.trailing))
			default:
				f.newWindow(x, 5)
				size := 64 - uint(f.leading) - uint(f.trailing)
				w.pair(0b101<<11|uint64(f.leading)<<6|uint64(size)&0x3f, 14, x>>f.trailing, size)
			}
		} else {
			switch {
			case dod >= -(1<<12) && dod < 1<<12:
				w.write(0b110<<13|uint64(dod)&(1<<13-1), 16)
			case dod >= -(1<<19) && dod < 1<<19:
				w.write(0b1110<<20|uint64(dod)&(1<<20-1), 24)
			default:
				w.write(0b11110, 5)
				w.write(uint64(dod), 64)
			}
			switch {
			case stale:
				w.write(0b111, 3)
			case x == 0:
				w.write(0, 1)
			case f.reuses(x, 12):
				w.pair(0b10, 2, x>>f.trailing, 64-uint(f.leading)-uint(f.trailing))
			default:
				f.newWindow(x, 6)
				size := 64 - uint(f.leading) - uint(f.trailing)
				w.pair(0b110<<11|uint64(f.leading)<<6|uint64(size)&0x3f, 14, x>>f.trailing, size)
			}
		}
		if !stale {
			f.v = v
		}
	}
	f.t, f.tDelta = last, tDelta
	f.n += uint8(len(ts))
	binary.BigEndian.PutUint64(w.b[w.n:], w.acc)
	tail := int(w.bits+7) / 8
	f.free = uint8(8*tail - int(w.bits))
	written := w.b[:w.n+tail]
	need, before := size+len(written), cap(f.stream)
	if before >= need {
		f.stream = append(f.stream[:size], written...)
		return 0
	}
	after := before
	for after < need {
		after += streamStep(after)
	}
	s := make([]byte, need, after)
	copy(s, f.stream[:size])
	copy(s[size:], written)
	f.stream = s
	return after - before
}

// pair writes control bits, at most 16, and what follows them.
func (w *bitWriter) pair(control uint64, n uint, u uint64, size uint) {
	if n+size <= 64 {
		w.write(control<<size|u, n+size)
		return
	}
	w.write(control, n)
	w.write(u, size)
}

// streamStep is by how much a stream of the size grows: it should waste little,
// and end at sizes that the Go runtime allocates.
func streamStep(size int) int {
	switch {
	case size < 256:
		return 48
	case size < 512:
		return 64
	}
	return 128
}

// joint writes time and value of any but the first two samples; dod is the
// difference to the time difference before.
func (f *floats) joint(dod int64, v float64) {
	switch {
	case dod == 0:
		if value.IsStaleNaN(v) {
			f.write(0b11111, 5)
			return
		}
		x := math.Float64bits(v) ^ math.Float64bits(f.v)
		if x == 0 {
			f.write(0, 1)
			return
		}
		// In comparison with value: a control bit less.
		if f.reuses(x, 11) {
			f.write(0b100, 3)
			f.write(x>>f.trailing, 64-int(f.leading)-int(f.trailing))
			return
		}
		f.write(0b101, 3)
		f.window(x, 5)
		return
	case dod >= -(1<<12) && dod < 1<<12:
		f.write(0b110<<13|uint64(dod)&(1<<13-1), 16)
	case dod >= -(1<<19) && dod < 1<<19:
		f.write(0b1110<<20|uint64(dod)&(1<<20-1), 24)
	default:
		f.write(0b11110, 5)
		f.write(uint64(dod), 64)
	}
	f.value(v)
}

// value writes the value apart from the time.
func (f *floats) value(v float64) {
	if value.IsStaleNaN(v) {
		f.write(0b111, 3)
		return
	}
	x := math.Float64bits(v) ^ math.Float64bits(f.v)
	switch {
	case x == 0:
		f.write(0, 1)
	case f.reuses(x, 12):
		f.write(0b10, 2)
		f.write(x>>f.trailing, 64-int(f.leading)-int(f.trailing))
	default:
		f.write(0b110, 3)
		f.window(x, 6)
	}
}

// zeros counts the zero bits around what differs, as far as a window can say.
func zeros(x uint64) (leading, trailing uint8) {
	return min(uint8(bits.LeadingZeros64(x)), 31), uint8(bits.TrailingZeros64(x))
}

// reuses says whether x goes into the present window: it fits, and a window of
// its own, for which extra bits are due, would not be shorter.
func (f *floats) reuses(x uint64, extra uint8) bool {
	l, t := zeros(x)
	return l >= f.leading && t >= f.trailing && l+t <= f.leading+f.trailing+extra
}

// window writes a new window and x in it. Bounds of the old one are kept if that
// costs no more than the bits given.
func (f *floats) window(x uint64, most uint8) {
	f.newWindow(x, most)
	size := 64 - int(f.leading) - int(f.trailing)
	f.write(uint64(f.leading)<<6|uint64(size)&0x3f, 11)
	f.write(x>>f.trailing, size)
}

func (f *floats) newWindow(x uint64, most uint8) {
	l, t := zeros(x)
	if f.leading != 0xff && (l < f.leading || t < f.trailing) {
		ul, ut := min(l, f.leading), min(t, f.trailing)
		if l+t-ul-ut <= most {
			l, t = ul, ut
		}
	}
	f.leading, f.trailing = l, t
}

// write appends the n low bits of u, of which there may be 1 to 64; the higher
// ones may be anything. There is room for 8 bytes more.
func (f *floats) write(u uint64, n int) {
	u <<= 64 - uint(n)
	if free := int(f.free); free > 0 {
		f.stream[len(f.stream)-1] |= byte(u >> (64 - uint(free)))
		if n <= free {
			f.free = uint8(free - n)
			return
		}
		u <<= uint(free)
		n -= free
	}
	l := len(f.stream)
	s := f.stream[:l+8]
	binary.BigEndian.PutUint64(s[l:], u)
	size := (n + 7) / 8
	f.stream = s[:l+size]
	f.free = uint8(8*size - n)
}

// bytes is the chunk in chunkenc's encoding, without a copy.
func (f *floats) bytes() []byte {
	binary.BigEndian.PutUint16(f.stream, uint16(f.n))
	return f.stream
}

// chunk is bytes to be read by chunkenc.
func (f *floats) chunk() chunkenc.Chunk {
	c := chunkenc.NewXOR2Chunk()
	c.Reset(f.bytes())
	return c
}

// newest is the value of the last sample.
func (f *floats) newest() float64 {
	if f.stale {
		return math.Float64frombits(value.StaleNaN)
	}
	return f.v
}

// mint is the time of the first sample.
func (f *floats) mint() int64 {
	t, _ := binary.Varint(f.stream[xor2Header:])
	return t
}

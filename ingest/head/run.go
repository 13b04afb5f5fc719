package head

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/internal/slab"
)

// chunkSamples is how many samples a chunk gets. Prometheus's XOR2 and
// histogram encodings with start timestamps count to 127 where start
// timestamps begin late in a chunk.
const chunkSamples = 120

// sample is one sample of any kind: a histogram if h is set, one with float
// counts if fh is, else a float.
type sample struct {
	t, st int64
	v     float64
	h     *histogram.Histogram
	fh    *histogram.FloatHistogram
}

func (s *sample) encoding() chunkenc.Encoding {
	switch {
	case s.h != nil:
		return chunkenc.EncHistogramST
	case s.fh != nil:
		return chunkenc.EncFloatHistogramST
	}
	return chunkenc.EncXOR2
}

// valid says whether a histogram is one that Prometheus takes, as it does before
// it writes its WAL. Iterators of chunkenc panic on some that are not.
func (s *sample) valid() bool {
	switch {
	case s.h != nil:
		return s.h.Validate() == nil
	case s.fh != nil:
		return s.fh.Validate() == nil
	}
	return true
}

// run is a strictly ascending sequence of samples in chunks, the last of which
// is open.
type run struct {
	floats floats // the open chunk, if there is one and it can be of this kind
	more   *more  // nil: none
}

// more is what a series doesn't have at first.
type more struct {
	done []fetch.Chunk
	open *open // the open chunk, if it is of another kind than floats; nil: none
	maxt int64 // of the run, if floats is empty
}

// open is an open chunk of chunkenc.
type open struct {
	chunk chunkenc.Chunk
	app   chunkenc.Appender
	count int // samples
	mint  int64
}

func (r *run) empty() bool { return r.floats.n == 0 && r.more == nil }

// maxt is the time of the last sample; the run has one.
func (r *run) maxt() int64 {
	if r.floats.n > 0 {
		return r.floats.t
	}
	return r.more.maxt
}

// append adds s, which must be newer than all in the run. It returns by how
// many bytes the memory of the run has grown, about.
func (r *run) append(s *sample) (int, error) {
	if s.h == nil && s.fh == nil && s.st == 0 && (r.more == nil || r.more.open == nil) {
		switch {
		case r.floats.n == 0:
			r.floats.start(s.t, s.v)
			return streamAtOnce, nil
		case r.floats.n < chunkSamples:
			return r.floats.append(s.t, s.v), nil
		}
		grown := r.cut() + streamAtOnce
		r.floats.start(s.t, s.v)
		return grown, nil
	}
	return r.appendOther(s)
}

// extend adds floats to the open chunk for as long as they are newer and it has
// room. It returns how many it took, and by how many bytes the memory has grown.
// scratch has mostBytes.
func (r *run) extend(ts []int64, vs []float64, scratch []byte) (n, grown int) {
	f := &r.floats
	if f.n == 0 {
		return 0, 0
	}
	if f.n == 1 && len(ts) > 0 && ts[0] > f.t {
		grown = f.append(ts[0], vs[0])
		n = 1
	}
	from, last := n, f.t
	for n < len(ts) && int(f.n)+n-from < chunkSamples && ts[n] > last {
		last = ts[n]
		n++
	}
	if n > from {
		grown += f.appendAll(ts[from:n], vs[from:n], scratch)
	}
	return n, grown
}

// appendOther is append for what doesn't go to floats.
func (r *run) appendOther(s *sample) (int, error) {
	grown := 0
	enc := s.encoding()
	if r.floats.n > 0 || r.more != nil && r.more.open != nil && (r.more.open.count >= chunkSamples || r.more.open.chunk.Encoding() != enc) {
		grown += r.cut()
		if enc == chunkenc.EncXOR2 && s.st == 0 {
			r.floats.start(s.t, s.v)
			return grown + streamAtOnce, nil
		}
	}
	if r.more == nil {
		r.more = &more{maxt: math.MinInt64}
		grown += moreBytes
	}
	o := r.more.open
	if o == nil {
		c, err := chunkenc.NewEmptyChunk(enc)
		if err != nil {
			return grown, fmt.Errorf("new chunk: %w", err)
		}
		app, err := c.Appender()
		if err != nil {
			return grown, fmt.Errorf("new chunk: %w", err)
		}
		o = &open{chunk: c, app: app, mint: s.t}
		grown += openChunkBytes
	}
	switch enc {
	case chunkenc.EncXOR2:
		o.app.Append(s.st, s.t, s.v)
	case chunkenc.EncHistogramST:
		c, recoded, app, err := o.app.AppendHistogram(nil, s.st, s.t, s.h, false)
		if err != nil {
			return grown, fmt.Errorf("append histogram: %w", err)
		}
		o, grown = r.replace(o, c, recoded, app, s.t, grown)
	case chunkenc.EncFloatHistogramST:
		c, recoded, app, err := o.app.AppendFloatHistogram(nil, s.st, s.t, s.fh, false)
		if err != nil {
			return grown, fmt.Errorf("append float histogram: %w", err)
		}
		o, grown = r.replace(o, c, recoded, app, s.t, grown)
	}
	o.count++
	r.more.open, r.more.maxt = o, s.t
	return grown, nil
}

// replace takes over the chunk that a histogram append returned: none, the same
// samples recoded, or a new one that holds just the histogram appended.
func (r *run) replace(o *open, c chunkenc.Chunk, recoded bool, app chunkenc.Appender, t int64, grown int) (*open, int) {
	switch {
	case c == nil:
		o.app = app
		return o, grown
	case recoded:
		o.chunk, o.app = c, app
		return o, grown
	}
	grown += r.cut()
	return &open{chunk: c, app: app, mint: t}, grown + openChunkBytes
}

// cut closes the open chunk. It returns by how many bytes the memory has grown.
func (r *run) cut() int {
	grown := 0
	if r.more == nil {
		r.more = &more{}
		grown += moreBytes
	}
	var c fetch.Chunk
	if f := &r.floats; f.n > 0 {
		c = fetch.Chunk{Encoding: chunkenc.EncXOR2, MinT: f.mint(), MaxT: f.t, Data: bytes.Clone(f.bytes())}
		grown -= cap(f.stream)
		r.more.maxt = f.t
		r.floats = floats{}
	} else {
		o := r.more.open
		o.chunk.Compact()
		c = fetch.Chunk{Encoding: o.chunk.Encoding(), MinT: o.mint, MaxT: r.more.maxt, Data: o.chunk.Bytes()}
		grown -= openChunkBytes
		r.more.open = nil
	}
	// Most runs have few chunks: append would make room for as many again.
	n := len(r.more.done)
	done := make([]fetch.Chunk, n, n+1+n/4)
	copy(done, r.more.done)
	r.more.done = append(done, c)
	return grown + len(c.Data) + closedChunkBytes
}

// What a chunk takes beside its data: the Chunk; the chunk and appender of
// chunkenc, and about what is allocated for the data of an open one.
const (
	moreBytes        = 40
	closedChunkBytes = 48
	openChunkBytes   = 360
)

// memory is what is copied lies in; without one each copy has its own.
type memory struct {
	pieces slab.Slab[byte]
	// joined: what is given lies in one piece, one after the other: all. So closed chunks are copied too.
	joined bool
	all    []byte
}

// reset makes all memory free again: nothing that was given is used any more.
func (m *memory) reset() {
	m.all = m.all[:0]
	m.pieces.Reset(maxKept)
}

func (m *memory) clone(b []byte) []byte {
	switch {
	case m == nil:
		return bytes.Clone(b)
	case m.joined:
		n := len(m.all)
		m.all = append(m.all, b...)
		return m.all[n:len(m.all):len(m.all)]
	}
	out := m.pieces.Take(len(b))
	copy(out, b)
	return out
}

// closed gives a chunk that doesn't change any more.
func (m *memory) closed(c fetch.Chunk) fetch.Chunk {
	if m != nil && m.joined {
		c.Data = m.clone(c.Data)
	}
	return c
}

// newest appends, of the chunks that overlap [mint, maxt], the last one, or just the
// last sample before maxt.
func (r *run) newest(dst []fetch.Chunk, mint, maxt int64, mem *memory) []fetch.Chunk {
	f := &r.floats
	if f.n > 0 && f.t <= maxt {
		if f.t >= mint {
			var b [8]byte
			binary.BigEndian.PutUint64(b[:], math.Float64bits(f.newest()))
			dst = append(dst, fetch.Chunk{Encoding: fetch.Sample, MinT: f.t, MaxT: f.t, Data: mem.clone(b[:])})
		}
		return dst
	}
	if f.overlaps(mint, maxt) {
		return append(dst, f.copied(mem))
	}
	if r.more == nil {
		return dst
	}
	if r.more.overlaps(mint, maxt) {
		return append(dst, r.more.copied(mem))
	}
	for _, c := range slices.Backward(r.more.done) {
		if c.MinT <= maxt && c.MaxT >= mint {
			return append(dst, mem.closed(c))
		}
	}
	return dst
}

// chunks appends the chunks that overlap [mint, maxt], ascending, the open one copied.
func (r *run) chunks(dst []fetch.Chunk, mint, maxt int64, mem *memory) []fetch.Chunk {
	if r.more != nil {
		for i := range r.more.done {
			if c := &r.more.done[i]; c.MinT <= maxt && c.MaxT >= mint {
				dst = append(dst, mem.closed(*c))
			}
		}
		if r.more.overlaps(mint, maxt) {
			dst = append(dst, r.more.copied(mem))
		}
	}
	if r.floats.overlaps(mint, maxt) {
		dst = append(dst, r.floats.copied(mem))
	}
	return dst
}

// overlaps says whether the open chunk overlaps [mint, maxt].
func (m *more) overlaps(mint, maxt int64) bool {
	return m.open != nil && m.open.mint <= maxt && m.maxt >= mint
}

// copied is the open chunk.
func (m *more) copied(mem *memory) fetch.Chunk {
	return fetch.Chunk{Encoding: m.open.chunk.Encoding(), MinT: m.open.mint, MaxT: m.maxt, Data: mem.clone(m.open.chunk.Bytes())}
}

// overlaps says whether the chunk, if there is one, overlaps [mint, maxt].
func (f *floats) overlaps(mint, maxt int64) bool {
	return f.n > 0 && f.t >= mint && f.mint() <= maxt
}

// copied is the chunk.
func (f *floats) copied(mem *memory) fetch.Chunk {
	return fetch.Chunk{Encoding: chunkenc.EncXOR2, MinT: f.mint(), MaxT: f.t, Data: mem.clone(f.bytes())}
}

// overlaps says whether a chunk overlaps [mint, maxt].
func (r *run) overlaps(mint, maxt int64) bool {
	return r.floats.overlaps(mint, maxt) || r.more != nil && (r.more.overlaps(mint, maxt) ||
		slices.ContainsFunc(r.more.done, func(c fetch.Chunk) bool { return c.MinT <= maxt && c.MaxT >= mint }))
}

// count is the number of chunks.
func (r *run) count() int {
	n := 0
	if r.floats.n > 0 {
		n++
	}
	if r.more != nil {
		n += len(r.more.done)
		if r.more.open != nil {
			n++
		}
	}
	return n
}

// at gives the chunk in which a sample at t would be, or nil.
func (r *run) at(t int64) chunkenc.Chunk {
	if f := &r.floats; f.n > 0 && t >= f.mint() {
		return f.chunk()
	}
	if r.more == nil {
		return nil
	}
	if o := r.more.open; o != nil && t >= o.mint {
		return o.chunk
	}
	for i := len(r.more.done) - 1; i >= 0; i-- {
		if d := &r.more.done[i]; t >= d.MinT {
			if t > d.MaxT {
				return nil
			}
			c, err := chunkenc.FromData(d.Encoding, d.Data)
			if err != nil {
				return nil // no: it is one of our encodings
			}
			return c
		}
	}
	return nil
}

// find looks for a sample at t. The iterator is reused if it fits; the one to
// reuse next time is returned.
func (r *run) find(t int64, it chunkenc.Iterator) (s sample, found bool, _ chunkenc.Iterator) {
	c := r.at(t)
	if c == nil {
		return sample{}, false, it
	}
	it = c.Iterator(it)
	kind := it.Seek(t)
	if kind == chunkenc.ValNone || it.AtT() != t {
		return sample{}, false, it
	}
	s = sample{t: t, st: it.AtST()}
	switch kind {
	case chunkenc.ValFloat:
		_, s.v = it.At()
	case chunkenc.ValHistogram:
		_, s.h = it.AtHistogram(nil)
	case chunkenc.ValFloatHistogram:
		_, s.fh = it.AtFloatHistogram(nil)
	}
	return s, true, it
}

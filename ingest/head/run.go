package head

import (
	"fmt"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
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

// run is a strictly ascending sequence of samples in chunks, the last of which
// is open.
type run struct {
	open  chunkenc.Chunk // nil: none
	app   chunkenc.Appender
	count int   // samples in open
	mint  int64 // of open
	maxt  int64 // of the run; valid if it has samples
	done  []fetch.Chunk
}

func (r *run) empty() bool { return r.open == nil && len(r.done) == 0 }

// append adds s, which must be newer than all in the run. It returns by how
// many bytes the memory of the run has grown, about.
func (r *run) append(s *sample) (int, error) {
	grown := 0
	enc := s.encoding()
	if r.open != nil && (r.count >= chunkSamples || r.open.Encoding() != enc) {
		grown += r.cut()
	}
	if r.open == nil {
		c, err := chunkenc.NewEmptyChunk(enc)
		if err != nil {
			return grown, fmt.Errorf("new chunk: %w", err)
		}
		app, err := c.Appender()
		if err != nil {
			return grown, fmt.Errorf("new chunk: %w", err)
		}
		r.start(c, app, s.t)
		grown += openChunkBytes
	}
	switch enc {
	case chunkenc.EncXOR2:
		r.app.Append(s.st, s.t, s.v)
	case chunkenc.EncHistogramST:
		c, recoded, app, err := r.app.AppendHistogram(nil, s.st, s.t, s.h, false)
		if err != nil {
			return grown, fmt.Errorf("append histogram: %w", err)
		}
		grown += r.replace(c, recoded, app, s.t)
	case chunkenc.EncFloatHistogramST:
		c, recoded, app, err := r.app.AppendFloatHistogram(nil, s.st, s.t, s.fh, false)
		if err != nil {
			return grown, fmt.Errorf("append float histogram: %w", err)
		}
		grown += r.replace(c, recoded, app, s.t)
	}
	r.count++
	r.maxt = s.t
	return grown, nil
}

func (r *run) start(c chunkenc.Chunk, app chunkenc.Appender, t int64) {
	r.open, r.app, r.count, r.mint = c, app, 0, t
}

// replace takes over the chunk that a histogram append returned: none, the same
// samples recoded, or a new one that holds just the histogram appended.
func (r *run) replace(c chunkenc.Chunk, recoded bool, app chunkenc.Appender, t int64) int {
	r.app = app
	switch {
	case c == nil:
		return 0
	case recoded:
		r.open = c
		return 0
	}
	grown := r.cut()
	r.start(c, app, t)
	return grown + openChunkBytes
}

// cut closes the open chunk.
func (r *run) cut() int {
	r.open.Compact()
	data := r.open.Bytes()
	r.done = append(r.done, fetch.Chunk{Encoding: r.open.Encoding(), MinT: r.mint, MaxT: r.maxt, Data: data})
	r.open, r.app = nil, nil
	return len(data) + closedChunkBytes - openChunkBytes
}

// What a chunk takes beside its data: the Chunk; the chunk and appender of
// chunkenc, and about what is allocated for the data of an open one.
const (
	closedChunkBytes = 48
	openChunkBytes   = 320
)

// chunks appends the chunks that overlap [mint, maxt], the open one copied.
func (r *run) chunks(dst []fetch.Chunk, mint, maxt int64) []fetch.Chunk {
	for _, c := range r.done {
		if c.MinT <= maxt && c.MaxT >= mint {
			dst = append(dst, c)
		}
	}
	if r.open != nil && r.mint <= maxt && r.maxt >= mint {
		dst = append(dst, fetch.Chunk{Encoding: r.open.Encoding(), MinT: r.mint, MaxT: r.maxt, Data: append([]byte(nil), r.open.Bytes()...)})
	}
	return dst
}

// find looks for a sample at t. The iterator is reused if it fits; the one to
// reuse next time is returned.
func (r *run) find(t int64, it chunkenc.Iterator) (s sample, found bool, _ chunkenc.Iterator) {
	var c chunkenc.Chunk
	if r.open != nil && t >= r.mint {
		c = r.open
	} else {
		for i := len(r.done) - 1; i >= 0; i-- {
			if d := &r.done[i]; t >= d.MinT {
				if t > d.MaxT {
					return sample{}, false, it
				}
				c, _ = chunkenc.FromData(d.Encoding, d.Data)
				break
			}
		}
	}
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

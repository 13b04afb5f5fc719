package fetch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/internal/slab"
)

// Chunk is a run of samples of a series in an encoding of Prometheus. Data is
// immutable.
type Chunk struct {
	Encoding   chunkenc.Encoding
	MinT, MaxT int64 // ms since the epoch, of the first and last sample
	Data       []byte
}

// Sample is the encoding of a chunk that is one float: the 8 bytes of its bits.
const Sample = chunkenc.EncNone

// Samples is how many the chunk says that it has.
func (c *Chunk) Samples() int {
	if c.Encoding == Sample {
		return 1
	}
	if len(c.Data) < 2 {
		return 0
	}
	return int(binary.BigEndian.Uint16(c.Data) & 0x3FFF) // as in all of Prometheus's encodings; the two other bits are flags
}

// Decoder turns chunks into columns, reusing its memory.
type Decoder struct {
	it  chunkenc.Iterator
	x   xor2
	one chunkfmt.Series

	// Those that were decoded, whose spans and buckets are used again.
	hs  slab.Slab[histogram.Histogram]
	fhs slab.Slab[histogram.FloatHistogram]
}

// maxHistograms bounds those of which the memory is kept for the next series.
const maxHistograms = 1 << 14

// Decode gives the samples of chunks of one series, which may overlap, merged.
// The result is valid until the next call.
func (d *Decoder) Decode(cs []Chunk) (*chunkfmt.Series, error) {
	one := &d.one
	reset(one)
	d.hs.Reset(maxHistograms)
	d.fhs.Reset(maxHistograms)
	overlap := false
	last := int64(math.MinInt64)
	for _, c := range cs {
		if c.MinT <= last && last != math.MinInt64 {
			overlap = true
			break
		}
		last = c.MaxT
	}
	if !overlap {
		for _, c := range cs {
			if err := d.decode(c, one); err != nil {
				return nil, err
			}
		}
		return one, nil
	}
	runs := make([]*chunkfmt.Series, len(cs))
	for i, c := range cs {
		runs[i] = &chunkfmt.Series{}
		if err := d.decode(c, runs[i]); err != nil {
			return nil, err
		}
	}
	return chunkfmt.Merge(runs...), nil
}

func reset(s *chunkfmt.Series) {
	f, h, fh := &s.Floats, &s.Histograms, &s.FloatHistograms
	*f = chunkfmt.Floats{T: f.T[:0], V: f.V[:0]}
	*h = chunkfmt.Histograms{T: h.T[:0], H: h.H[:0]}
	*fh = chunkfmt.FloatHistograms{T: fh.T[:0], H: fh.H[:0]}
}

// ErrChunk is wrapped by errors about bytes that are not a chunk.
var ErrChunk = errors.New("invalid chunk")

func (d *Decoder) decode(c Chunk, dst *chunkfmt.Series) (err error) {
	if f := &dst.Floats; c.Encoding == Sample {
		if len(c.Data) != 8 {
			return fmt.Errorf("%w: a sample of %d bytes", ErrChunk, len(c.Data))
		}
		f.ST = AppendStart(f.ST, len(f.T), 0)
		f.T, f.V = append(f.T, c.MinT), append(f.V, math.Float64frombits(binary.BigEndian.Uint64(c.Data)))
		return nil
	}
	if f := &dst.Floats; f.ST == nil && c.Encoding == chunkenc.EncXOR2 && plainXOR2(c.Data) {
		f.T, f.V, err = d.x.append(c.Data, f.T, f.V)
		return err
	}
	chunk, err := chunkenc.FromData(c.Encoding, c.Data)
	if err != nil {
		return errors.Join(ErrChunk, err)
	}
	d.it = chunk.Iterator(d.it)
	it := d.it
	f := &dst.Floats
	if c.Encoding == chunkenc.EncXOR || c.Encoding == chunkenc.EncXOR2 {
		f.T, f.V = grow(f.T, chunk.NumSamples()), grow(f.V, chunk.NumSamples())
	}
	for {
		switch it.Next() {
		case chunkenc.ValNone:
			if err := it.Err(); err != nil {
				return errors.Join(ErrChunk, err)
			}
			return nil
		case chunkenc.ValFloat:
			t, v := it.At()
			f.ST = AppendStart(f.ST, len(f.T), it.AtST())
			f.T, f.V = append(f.T, t), append(f.V, v)
		case chunkenc.ValHistogram:
			t, h := it.AtHistogram(&d.hs.Take(1)[0])
			c := &dst.Histograms
			c.ST = AppendStart(c.ST, len(c.T), it.AtST())
			c.T, c.H = append(c.T, t), append(c.H, h)
		case chunkenc.ValFloatHistogram:
			t, h := it.AtFloatHistogram(&d.fhs.Take(1)[0])
			c := &dst.FloatHistograms
			c.ST = AppendStart(c.ST, len(c.T), it.AtST())
			c.T, c.H = append(c.T, t), append(c.H, h)
		}
	}
}

// grow makes room for n more, and for as many again as there are: more chunks
// may follow.
func grow[E any](s []E, n int) []E {
	if cap(s)-len(s) >= n {
		return s
	}
	return slices.Grow(s, n+len(s))
}

// AppendStart appends a start timestamp to a column that stays nil until the
// first that is not 0; n samples came before.
func AppendStart(sts []int64, n int, st int64) []int64 {
	if sts == nil {
		if st == 0 {
			return nil
		}
		sts = make([]int64, n, n+1)
	}
	return append(sts, st)
}

package chunkfmt

import (
	"sync"
	"sync/atomic"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
)

// decoder is the scratch memory for decoding chunks, and what it remembers of
// the page it worked on last: neighbouring series share timestamps, and buckets
// of a histogram are based on each other.
type decoder struct {
	codec.Decoder
	page  uint64 // id
	timed [8]struct {
		valid  bool
		column uint32
		t      []int64
	}
	ints  [4]chunkInts
	next  int // of ints, to be overwritten
	chain []int
}

// chunkInts are the integers of a chunk that was on a base; chunk is -1 if of none.
type chunkInts struct {
	chunk int
	ints  []int64
}

//nolint:gochecknoglobals // scratch memory, shared by all pages
var (
	decoders = sync.Pool{New: func() any { return new(decoder) }}
	pageIDs  atomic.Uint64
)

// acquire takes a decoder for p.
func acquire(p *DataPage) *decoder {
	d := decoders.Get().(*decoder)
	if d.page != p.id {
		d.page = p.id
		for i := range d.timed {
			d.timed[i].valid = false
		}
		for i := range d.ints {
			d.ints[i].chunk = -1
		}
	}
	return d
}

func (d *decoder) release() { decoders.Put(d) }

// times returns a column of timestamps of p, valid until the next call.
func (d *decoder) times(p *DataPage, column uint32) ([]int64, error) {
	c := &d.timed[column%uint32(len(d.timed))]
	if c.valid && c.column == column {
		return c.t, nil
	}
	c.valid = false
	times := &p.times[column]
	t, rest, err := d.Times(c.t[:0], times.b, times.n)
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 {
		return nil, corrupt("%d bytes behind timestamps", len(rest))
	}
	c.t, c.column, c.valid = t, column, true
	return t, nil
}

// base returns the integers of the chunk that chunk i of p is based on, nil if
// none. Once chunk i has been decoded they are its own: then the caller notes i
// in the result, so that they are remembered.
func (d *decoder) base(p *DataPage, i, n int) (*chunkInts, error) {
	if p.chunks[i].base == 0 {
		return &chunkInts{}, nil
	}
	out := &d.ints[d.next]
	d.next = (d.next + 1) % len(d.ints)
	out.chunk = -1
	known := false
	d.chain = d.chain[:0]
	for j := i; p.chunks[j].base != 0 && !known; {
		j -= int(p.chunks[j].base)
		for k := range d.ints {
			if d.ints[k].chunk == j {
				out.ints = append(out.ints[:0], d.ints[k].ints...)
				known = true
			}
		}
		if known {
			break
		}
		if d.chain = append(d.chain, j); len(d.chain) > maxBases {
			return nil, corrupt("chunk based on more than %d others", maxBases)
		}
	}
	if !known {
		out.ints = append(out.ints[:0], make([]int64, n)...)
	}
	for k := len(d.chain) - 1; k >= 0; k-- {
		c := &p.chunks[d.chain[k]]
		b := c.b
		if c.kind&chunkST != 0 {
			var err error
			if _, b, err = d.Ints(nil, b, n); err != nil {
				return nil, err
			}
		}
		if err := d.BaseInts(out.ints, b); err != nil {
			return nil, err
		}
	}
	return out, nil
}

package chunkfmt

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
)

// decoder is the scratch memory for decoding chunks, and what it remembers of
// the page it worked on last: neighbouring series share timestamps, and buckets
// of a histogram are based on each other.
type decoder struct {
	codec.Decoder
	page  uint64    // id
	timed [][]int64 // by column; nil if not known
	arena []int64   // that timed lie in
	ints  []chunkInts
	next  int // of ints, to be overwritten
	chain []int
	rises bool // the values that were decoded last are known to
}

// A decoder remembers the integers of so many chunks, or of fewer if they are more values together. Series have several
// chunks in a page, and the base of one may be that of the series some before.
const (
	minInts, maxInts = 4, 32
	rememberedInts   = 1 << 16
)

// chunkInts are the integers of a chunk that is based on another or is a base;
// chunk is -1 if of none.
type chunkInts struct {
	chunk int
	ints  []int64
	from  int  // those before aren't known
	rise  bool // they are known to, from there on
}

//nolint:gochecknoglobals // scratch memory, shared by all pages
var (
	decoders = sync.Pool{New: func() any { return new(decoder) }}
	pageIDs  atomic.Uint64
)

// acquire takes a decoder for p.
func acquire(p *DataPage) *decoder {
	d := decoders.Get().(*decoder)
	d.enter(p)
	return d
}

func (d *decoder) release() { decoders.Put(d) }

// enter makes d ready for p.
func (d *decoder) enter(p *DataPage) {
	if d.page != p.id {
		d.page = p.id
		clear(d.timed)
		if cap(d.timed) < len(p.times) {
			d.timed = make([][]int64, len(p.times))
		}
		d.timed, d.arena = d.timed[:len(p.times)], d.arena[:0]
		for i := range d.ints {
			d.ints[i].chunk = -1
		}
	}
}

// Decoder decodes chunks as the methods of DataPage do, with scratch memory of
// its own: that saves taking it from a pool for each chunk, which counts where
// chunks are short. The zero value is ready. Not safe for concurrent use.
type Decoder struct {
	// Pages is of how many pages it remembers times and bases, those it used last: one that reads series which have chunks
	// in several had better remember them all. For each it takes up to about 1 MiB. 0: of one.
	Pages int

	pages []*decoder // the one used last first
	rises bool
	hists histogramMemory
}

// Histograms is DataPage.Histograms of p. The histograms lie in memory of d, and are good until Reuse is called. If whole isn't
// nil it chooses those that get their buckets; see Hollow for the others.
func (d *Decoder) Histograms(p *DataPage, i int, dst *Histograms, whole Whole) error {
	return p.histograms(d.of(p), i, dst, &d.hists, whole)
}

// Reuse says that the histograms that were decoded aren't used any more.
func (d *Decoder) Reuse() { d.hists.reset() }

// Floats is DataPage.Floats of p.
func (d *Decoder) Floats(p *DataPage, i int, dst *Floats) error {
	one := d.of(p)
	err := p.floats(one, i, dst)
	d.rises = one.rises
	return err
}

// Values appends the values of chunk i of p, as Floats does, to dst, reusing its capacity, without their times. The first
// from of them, less than it has, aren't wanted: they may be anything. It reports false, and decodes nothing, of one that has
// start timestamps, or is none of floats.
func (d *Decoder) Values(p *DataPage, i, from int, dst []float64) (out []float64, ok bool, err error) {
	if p.Kind(i) != KindFloat || p.chunks[i].kind&^(kindMask|chunkBase) != 0 {
		return dst, false, nil
	}
	k := &p.chunks[i]
	one := d.of(p)
	out, err = p.values(one, i, p.body[k.from:k.end], p.times[k.times].n, from, dst)
	if err != nil {
		return dst, false, fmt.Errorf("chunk %d: %w", i, err)
	}
	d.rises = one.rises
	return out, true, nil
}

// Rises reports whether the values that were decoded last, those that were wanted, are known to rise: each is no less than
// the one before, and none is NaN.
func (d *Decoder) Rises() bool { return d.rises }

// of gives the decoder that remembers p, or else the one that was used least recently.
func (d *Decoder) of(p *DataPage) *decoder {
	k := slices.IndexFunc(d.pages, func(m *decoder) bool { return m.page == p.id })
	if k < 0 {
		if len(d.pages) < max(d.Pages, 1) {
			d.pages = append(d.pages, new(decoder))
		}
		k = len(d.pages) - 1
	}
	one := d.pages[k]
	copy(d.pages[1:k+1], d.pages[:k])
	d.pages[0] = one
	one.enter(p)
	return one
}

// rememberedTimes bounds the timestamps that a decoder remembers, in values.
const rememberedTimes = 1 << 16

// times returns a column of timestamps of p, valid until the next call.
func (d *decoder) times(p *DataPage, column uint32) ([]int64, error) {
	if t := d.timed[column]; t != nil {
		return t, nil
	}
	n := p.times[column].n
	if n > cap(d.arena)-len(d.arena) {
		if cap(d.arena) < rememberedTimes {
			d.arena = make([]int64, 0, min(rememberedTimes, max(n, 2*cap(d.arena), 4096)))
		}
		d.arena = d.arena[:0]
		clear(d.timed)
	}
	at := len(d.arena)
	all, err := p.times[column].decode(&d.Decoder, d.arena)
	if err != nil {
		return nil, err
	}
	d.arena = all
	d.timed[column] = all[at:len(all):len(all)]
	return d.timed[column], nil
}

func (c *timesColumn) decode(d *codec.Decoder, dst []int64) ([]int64, error) {
	t, rest, err := d.Times(dst, c.b, c.n)
	if err == nil && len(rest) > 0 {
		err = corrupt("%d bytes behind timestamps", len(rest))
	}
	return t, err
}

// base returns the integers of the chunk that chunk i of p is based on, nil if
// none, whether they are known to rise, and where those of chunk i itself are to go. The caller notes i there
// once they have. Of all these the first from aren't wanted.
func (d *decoder) base(p *DataPage, i, n, from int) (sum *chunkInts, base []int64, rises bool, err error) {
	most := min(max(rememberedInts/max(n, 1), minInts), maxInts)
	if d.next >= most {
		d.next = 0
	}
	if d.next == len(d.ints) {
		d.ints = append(d.ints, chunkInts{})
	}
	sum = &d.ints[d.next]
	d.next++
	sum.chunk = -1
	if cap(sum.ints) < n {
		sum.ints = make([]int64, n)
	}
	sum.ints = sum.ints[:n]
	rises = true
	if p.chunks[i].base == 0 {
		return sum, nil, rises, nil
	}
	d.chain = d.chain[:0]
	for j := i; p.chunks[j].base != 0 && base == nil; {
		j -= int(p.chunks[j].base)
		for k := range d.ints {
			if d.ints[k].chunk == j && d.ints[k].from <= from {
				base, rises = d.ints[k].ints, d.ints[k].rise
			}
		}
		if base != nil {
			break
		}
		if d.chain = append(d.chain, j); len(d.chain) > maxBases {
			return nil, nil, false, corrupt("chunk based on more than %d others", maxBases)
		}
	}
	if len(d.chain) == 0 {
		return sum, base, rises, nil
	}
	if base == nil {
		clear(sum.ints)
	} else {
		copy(sum.ints, base)
	}
	for _, k := range slices.Backward(d.chain) {
		c := &p.chunks[k]
		b := p.body[c.from:c.end]
		if c.kind&chunkST != 0 {
			if _, b, err = d.Ints(nil, b, n); err != nil {
				return nil, nil, false, err
			}
		}
		if err := d.BaseInts(sum.ints, b, from, rises); err != nil {
			return nil, nil, false, err
		}
		rises = d.IntsRise()
	}
	return sum, sum.ints, rises, nil
}

package chunkfmt

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
)

// Kind is what the samples of a chunk are.
type Kind byte

// The kinds of chunks.
const (
	KindFloat          Kind = 1
	KindHistogram      Kind = 2
	KindFloatHistogram Kind = 3
	KindExemplar       Kind = 4
)

func (k Kind) String() string {
	switch k {
	case KindFloat:
		return "float"
	case KindHistogram:
		return "histogram"
	case KindFloatHistogram:
		return "float histogram"
	case KindExemplar:
		return "exemplar"
	default:
		return fmt.Sprintf("kind %d", byte(k))
	}
}

const (
	// MaxChunkSamples is the largest number of samples in a chunk.
	MaxChunkSamples = codec.MaxLen

	// maxChunkBuckets bounds samples times buckets of a histogram chunk with
	// more than one sample.
	maxChunkBuckets = 1 << 20

	kindMask = 0x0f
	chunkST  = 0x10 // start timestamps precede the values
)

// DataPage is a parsed page of chunks. Its methods keep scratch memory in it:
// one goroutine at a time. Clone makes another over the same bytes.
type DataPage struct {
	times  []timesColumn
	chunks []pageChunk
	dec    codec.Decoder
}

type timesColumn struct {
	n int
	b []byte
}

type pageChunk struct {
	kind  byte
	times uint32
	b     []byte
}

// ParseDataPage checks a page of chunks or of exemplars. The page keeps b and
// must not outlive changes to it.
func ParseDataPage(b []byte) (*DataPage, error) {
	typ := pageData
	if len(b) > 0 && pageType(b[0])&^pageZstd == pageExemplars {
		typ = pageExemplars
	}
	body, err := onlyPage(b, typ)
	if err != nil {
		return nil, fmt.Errorf("data page: %w", err)
	}
	p := &DataPage{}
	c := cursor{b: body}
	p.times = make([]timesColumn, c.count(2))
	sizes := make([]uint64, 0, 2*len(p.times))
	for i := range p.times {
		p.times[i].n = c.bounded("samples of a chunk", MaxChunkSamples)
		sizes = append(sizes, c.uvarint())
	}
	p.chunks = make([]pageChunk, c.count(3))
	for i := range p.chunks {
		k := &p.chunks[i]
		k.kind = c.byte()
		k.times = uint32(c.uvarint())
		if k.times >= uint32(len(p.times)) {
			c.fail("chunk %d names timestamps %d of %d", i, k.times, len(p.times))
		}
		sizes = append(sizes, c.uvarint())
		if c.err != nil {
			break
		}
	}
	for i, n := range sizes {
		if n > uint64(len(c.b)) {
			c.fail("column of %d bytes, %d left", n, len(c.b))
			break
		}
		column := c.bytes(int(n))
		if i < len(p.times) {
			p.times[i].b = column
		} else {
			p.chunks[i-len(p.times)].b = column
		}
	}
	if err := c.end(); err != nil {
		return nil, fmt.Errorf("data page: %w", err)
	}
	return p, nil
}

// Clone returns a page over the same bytes, for use by another goroutine.
func (p *DataPage) Clone() *DataPage { return &DataPage{times: p.times, chunks: p.chunks} }

// Len is the number of chunks in the page.
func (p *DataPage) Len() int { return len(p.chunks) }

// Samples is the number of samples in chunk i, at most MaxChunkSamples: what
// decoding it will take is known before. It is 0 if there is no chunk i.
func (p *DataPage) Samples(i int) int {
	if i < 0 || i >= len(p.chunks) {
		return 0
	}
	return p.times[p.chunks[i].times].n
}

// Kind is the kind of chunk i, 0 if there is none.
func (p *DataPage) Kind(i int) Kind {
	if i < 0 || i >= len(p.chunks) {
		return 0
	}
	return Kind(p.chunks[i].kind & kindMask)
}

// open appends the timestamps of chunk i and returns the rest of its columns.
func (p *DataPage) open(i int, kind Kind, t, st []int64) (outT, outST []int64, rest []byte, n int, err error) {
	if p.Kind(i) != kind {
		return nil, nil, nil, 0, corrupt("chunk %d is no %s chunk", i, kind)
	}
	k := &p.chunks[i]
	if k.kind&^(kindMask|chunkST) != 0 {
		return nil, nil, nil, 0, corrupt("chunk %d has flags %#x", i, k.kind)
	}
	times := &p.times[k.times]
	before := len(t)
	t, rest, err = p.dec.Times(t, times.b, times.n)
	if err != nil {
		return nil, nil, nil, 0, err
	}
	if len(rest) > 0 {
		return nil, nil, nil, 0, corrupt("%d bytes behind timestamps", len(rest))
	}
	if k.kind&chunkST == 0 {
		if st != nil {
			st = append(st, make([]int64, times.n)...)
		}
		return t, st, k.b, times.n, nil
	}
	if st == nil && before > 0 {
		st = make([]int64, before, before+times.n)
	}
	st, rest, err = p.dec.Ints(st, k.b, times.n)
	return t, st, rest, times.n, err
}

// Floats appends the samples of chunk i to dst, reusing its capacity. If it
// returns an error, dst is as before.
func (p *DataPage) Floats(i int, dst *Floats) error {
	t, st, b, n, err := p.open(i, KindFloat, dst.T, dst.ST)
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	v, rest, err := p.dec.Floats(dst.V, b, n)
	if err == nil && len(rest) > 0 {
		err = corrupt("%d bytes behind values", len(rest))
	}
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	dst.T, dst.ST, dst.V = t, st, v
	return nil
}

// Histograms appends the samples of chunk i to dst. Histograms of one chunk may
// share spans and custom values, which are not to be changed. If it returns an
// error, dst is as before.
func (p *DataPage) Histograms(i int, dst *Histograms) error {
	t, st, b, n, err := p.open(i, KindHistogram, dst.T, dst.ST)
	if err == nil {
		dst.H, err = decodeHistograms(&p.dec, b, n, dst.H)
	}
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	dst.T, dst.ST = t, st
	return nil
}

// FloatHistograms is Histograms for float counts.
func (p *DataPage) FloatHistograms(i int, dst *FloatHistograms) error {
	t, st, b, n, err := p.open(i, KindFloatHistogram, dst.T, dst.ST)
	if err == nil {
		dst.H, err = decodeFloatHistograms(&p.dec, b, n, dst.H)
	}
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	dst.T, dst.ST = t, st
	return nil
}

// Exemplars appends the exemplars of chunk i, which must be of KindExemplar,
// to dst.
func (p *DataPage) Exemplars(i int, dst []exemplar.Exemplar) ([]exemplar.Exemplar, error) {
	t, _, b, n, err := p.open(i, KindExemplar, nil, nil)
	if err != nil {
		return dst, fmt.Errorf("chunk %d: %w", i, err)
	}
	c := cursor{b: b}
	builder := labels.NewScratchBuilder(2)
	for j := range n {
		e := exemplar.Exemplar{Ts: t[j], Value: c.float()}
		head := c.uvarint()
		if head>>1 > uint64(len(c.b)/2) {
			c.fail("exemplar with %d labels", head>>1)
			break
		}
		e.HasTs = head&1 != 0
		builder.Reset()
		for range head >> 1 {
			name := c.label()
			builder.Add(name, c.label())
		}
		if c.err != nil {
			break
		}
		e.Labels = builder.Labels()
		dst = append(dst, e)
	}
	if err := c.end(); err != nil {
		return dst, fmt.Errorf("chunk %d: exemplars: %w", i, err)
	}
	return dst, nil
}

func appendExemplars(dst []byte, es []exemplar.Exemplar) []byte {
	for i := range es {
		dst = appendFloat(dst, es[i].Value)
		head := es[i].Labels.Len() << 1
		if es[i].HasTs {
			head |= 1
		}
		dst = binary.AppendUvarint(dst, uint64(head))
		es[i].Labels.Range(func(l labels.Label) {
			dst = appendText(dst, l.Name)
			dst = appendText(dst, l.Value)
		})
	}
	return dst
}

// pageBuilder collects the chunks of one data page.
type pageBuilder struct {
	enc    codec.Encoder
	times  []builtTimes
	known  map[uint64][]int // hash of timestamps → candidates in times
	heads  []byte           // table of chunks
	chunks int
	bodies []byte
	buf    []byte
}

type builtTimes struct {
	t []int64
	b []byte
}

// size is about how large the page is so far, in bytes.
func (p *pageBuilder) size() int {
	n := len(p.heads) + len(p.bodies)
	for i := range p.times {
		n += len(p.times[i].b) + 4
	}
	return n
}

// timestamps returns the index of the column t, which is stored once.
func (p *pageBuilder) timestamps(t []int64) int {
	h := uint64(len(t))
	if len(t) > 0 {
		for _, x := range []int64{t[0], t[len(t)/2], t[len(t)-1]} {
			h = (h ^ uint64(x)) * 0x9e3779b97f4a7c15
		}
	}
	for _, i := range p.known[h] {
		if slices.Equal(p.times[i].t, t) {
			return i
		}
	}
	if p.known == nil {
		p.known = map[uint64][]int{}
	}
	i := len(p.times)
	p.known[h] = append(p.known[h], i)
	p.times = append(p.times, builtTimes{t: slices.Clone(t), b: p.enc.AppendTimes(nil, t)})
	return i
}

// add appends a chunk; values appends its encoded values.
func (p *pageBuilder) add(kind Kind, t, st []int64, values func(dst []byte) []byte) {
	head, start := byte(kind), len(p.bodies)
	if st != nil {
		head |= chunkST
		p.bodies = p.enc.AppendInts(p.bodies, st)
	}
	p.bodies = values(p.bodies)
	p.heads = append(p.heads, head)
	p.heads = binary.AppendUvarint(p.heads, uint64(p.timestamps(t)))
	p.heads = binary.AppendUvarint(p.heads, uint64(len(p.bodies)-start))
	p.chunks++
}

// appendTo appends the page to dst and makes p ready for the next.
func (p *pageBuilder) appendTo(dst []byte, typ pageType) []byte {
	b := binary.AppendUvarint(p.buf[:0], uint64(len(p.times)))
	for i := range p.times {
		b = binary.AppendUvarint(b, uint64(len(p.times[i].t)))
		b = binary.AppendUvarint(b, uint64(len(p.times[i].b)))
	}
	b = binary.AppendUvarint(b, uint64(p.chunks))
	b = append(b, p.heads...)
	for i := range p.times {
		b = append(b, p.times[i].b...)
	}
	b = append(b, p.bodies...)
	p.buf = b
	clear(p.times)
	p.times, p.heads, p.bodies, p.chunks = p.times[:0], p.heads[:0], p.bodies[:0], 0
	clear(p.known)
	return appendPage(dst, typ, b, typ == pageExemplars)
}

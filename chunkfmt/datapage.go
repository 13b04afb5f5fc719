package chunkfmt

import (
	"bytes"
	"encoding/binary"
	"fmt"

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
	KindWindows        Kind = 5 // summaries of windows, in pages of their own
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
	case KindWindows:
		return "windows"
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

	kindMask  = 0x0f
	chunkST   = 0x10 // start timestamps precede the values
	chunkBase = 0x20 // the body begins with how far before it in the table the chunk lies that it is based on

	// maxBases is how many chunks may have to be decoded for one.
	maxBases = 16
)

// DataPage is a parsed page of chunks. It is safe for concurrent use.
type DataPage struct {
	id     uint64 // of this page in the memory of decoders
	times  []timesColumn
	chunks []pageChunk
	body   []byte // what from and end of chunks are in
}

type timesColumn struct {
	n int
	b []byte
}

type pageChunk struct {
	kind   byte
	isBase bool // of others
	times  uint32
	base   uint32 // distance to the chunk it is based on, 0 for none
	values uint32 // the first chunk that has the same values, as far as that is known
	from   uint32
	end    uint32
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
	p := &DataPage{id: pageIDs.Add(1)}
	c := over(body)
	p.times = make([]timesColumn, c.Count(2))
	sizes := make([]uint64, len(p.times))
	for i := range p.times {
		p.times[i].n = c.Bounded("samples of a chunk", MaxChunkSamples)
		sizes[i] = c.Uvarint()
	}
	p.chunks = make([]pageChunk, c.Count(3))
	for i := range p.chunks {
		k := &p.chunks[i]
		k.kind = c.Byte()
		k.times = uint32(c.Uvarint())
		if k.times >= uint32(len(p.times)) {
			c.Fail("chunk %d names timestamps %d of %d", i, k.times, len(p.times))
		}
		k.end = uint32(c.Bounded("bytes of a chunk", MaxPage)) // for now its size
		if c.Err != nil {
			break
		}
	}
	for i, n := range sizes {
		if n > uint64(len(c.B)) {
			c.Fail("column of %d bytes, %d left", n, len(c.B))
			break
		}
		p.times[i].b = c.Bytes(int(n))
	}
	if c.Err == nil {
		p.layOut(&c)
	}
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("data page: %w", err)
	}
	return p, nil
}

// layOut finds where chunks lie, and on which others they are based.
func (p *DataPage) layOut(c *cursor) {
	// With all its capacity, so that unpacking may load beyond the end of a chunk.
	p.body = c.B
	from := uint32(0)
	before := make([]uint32, len(p.times)) // by timestamps: one more than the chunk before that has them
	for i := range p.chunks {
		k := &p.chunks[i]
		k.values = uint32(i)
		if k.end > uint32(len(p.body))-from {
			c.Fail("column of %d bytes, %d left", k.end, uint32(len(p.body))-from)
			return
		}
		k.from, k.end = from, from+k.end
		from = k.end
		if k.kind&chunkBase != 0 {
			b := over(p.body[k.from:k.end])
			k.base = uint32(b.Bounded("base", uint64(i)))
			k.from = k.end - uint32(len(b.B))
			if b.Err != nil || k.base == 0 || k.kind != byte(KindFloat)|chunkBase && k.kind != byte(KindFloat)|chunkBase|chunkST || !p.mayBase(i-int(k.base), k.times) {
				c.Fail("chunk %d has a base %d before it", i, k.base)
				return
			}
			// The upper buckets of a histogram are often the same. What is based on one of those is, as well, on the first of
			// them, whose integers are most likely still known.
			of := int(p.chunks[i-int(k.base)].values)
			k.base = uint32(i - of)
			base := &p.chunks[of]
			base.isBase = true
			if k.kind == byte(KindFloat)|chunkBase && base.kind&chunkST == 0 && codec.SameAsBase(p.body[k.from:k.end]) && !codec.HasExceptions(p.body[base.from:base.end]) {
				k.values = uint32(of)
			}
		} else if j := before[k.times]; j > 0 {
			if o := &p.chunks[j-1]; o.kind == k.kind && bytes.Equal(p.body[o.from:o.end], p.body[k.from:k.end]) {
				k.values = o.values
			}
		}
		before[k.times] = uint32(i) + 1
	}
	c.B = c.B[from:]
}

// mayBase reports whether chunk i may be the base of one with such timestamps.
func (p *DataPage) mayBase(i int, times uint32) bool {
	return p.Kind(i) == KindFloat && p.chunks[i].times == times
}

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

// TimesName names timestamps: those of chunks that have the same name are the same. Others may be the same too.
type TimesName struct {
	page   uint64
	column uint32
}

// TimesName gives that of chunk i, which there must be.
func (p *DataPage) TimesName(i int) TimesName { return TimesName{p.id, p.chunks[i].times} }

// ValuesName names the values of a chunk of floats: chunks that have the same name have the same. Others may have the same
// too.
type ValuesName struct {
	page  uint64
	chunk uint32
}

// ValuesName gives that of chunk i, which there must be.
func (p *DataPage) ValuesName(i int) ValuesName { return ValuesName{p.id, p.chunks[i].values} }

// Kind is the kind of chunk i, 0 if there is none.
func (p *DataPage) Kind(i int) Kind {
	if i < 0 || i >= len(p.chunks) {
		return 0
	}
	return Kind(p.chunks[i].kind & kindMask)
}

// open appends the timestamps of chunk i and returns the rest of its columns.
func (p *DataPage) open(d *decoder, i int, kind Kind, t, st []int64) (outT, outST []int64, rest []byte, n int, err error) {
	if p.Kind(i) != kind {
		return nil, nil, nil, 0, corrupt("chunk %d is no %s chunk", i, kind)
	}
	k := &p.chunks[i]
	if k.kind&^(kindMask|chunkST|chunkBase) != 0 {
		return nil, nil, nil, 0, corrupt("chunk %d has flags %#x", i, k.kind)
	}
	before := len(t)
	times, err := d.times(p, k.times)
	if err != nil {
		return nil, nil, nil, 0, err
	}
	t = append(t, times...)
	if k.kind&chunkST == 0 {
		if st != nil {
			st = append(st, make([]int64, len(times))...)
		}
		return t, st, p.body[k.from:k.end], len(times), nil
	}
	if st == nil && before > 0 {
		st = make([]int64, before, before+len(times))
	}
	st, rest, err = d.Ints(st, p.body[k.from:k.end], len(times))
	return t, st, rest, len(times), err
}

// Floats appends the samples of chunk i to dst, reusing its capacity. If it
// returns an error, dst is as before.
func (p *DataPage) Floats(i int, dst *Floats) error {
	d := acquire(p)
	err := p.floats(d, i, dst)
	d.release()
	return err
}

func (p *DataPage) floats(d *decoder, i int, dst *Floats) error {
	t, st, b, n, err := p.open(d, i, KindFloat, dst.T, dst.ST)
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	v, err := p.values(d, i, b, n, 0, dst.V)
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	dst.T, dst.ST, dst.V = t, st, v
	return nil
}

// values appends n values, of which the first from aren't wanted and may be anything.
func (p *DataPage) values(d *decoder, i int, b []byte, n, from int, dst []float64) ([]float64, error) {
	var rest []byte
	var err error
	if k := &p.chunks[i]; k.base == 0 && !k.isBase {
		dst, rest, err = d.FloatsOn(dst, b, n, from, nil, nil, false)
		d.rises = d.Rises()
	} else {
		sum, base, rises, err2 := d.base(p, i, n, from)
		if err2 != nil {
			return dst, err2
		}
		if dst, rest, err = d.FloatsOn(dst, b, n, from, sum.ints, base, rises); err == nil {
			sum.chunk, sum.from, sum.rise, d.rises = i, from, d.IntsRise(), d.Rises()
		}
	}
	if err == nil && len(rest) > 0 {
		return dst[:len(dst)-n], corrupt("%d bytes behind values", len(rest))
	}
	return dst, err
}

// Histograms appends the samples of chunk i to dst. Histograms of one chunk may
// share spans and custom values, which are not to be changed. If it returns an
// error, dst is as before.
func (p *DataPage) Histograms(i int, dst *Histograms) error {
	d := acquire(p)
	defer d.release()
	return p.histograms(d, i, dst, new(histogramMemory), nil)
}

func (p *DataPage) histograms(d *decoder, i int, dst *Histograms, m *histogramMemory, whole Whole) error {
	t, st, b, n, err := p.open(d, i, KindHistogram, dst.T, dst.ST)
	if err == nil {
		dst.H, err = m.histograms(&d.Decoder, b, t[len(t)-n:], dst.H, whole)
	}
	if err != nil {
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	dst.T, dst.ST = t, st
	return nil
}

// FloatHistograms is Histograms for float counts.
func (p *DataPage) FloatHistograms(i int, dst *FloatHistograms) error {
	d := acquire(p)
	defer d.release()
	t, st, b, n, err := p.open(d, i, KindFloatHistogram, dst.T, dst.ST)
	if err == nil {
		dst.H, err = decodeFloatHistograms(&d.Decoder, b, n, dst.H)
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
	d := acquire(p)
	defer d.release()
	t, _, b, n, err := p.open(d, i, KindExemplar, nil, nil)
	if err != nil {
		return dst, fmt.Errorf("chunk %d: %w", i, err)
	}
	c := over(b)
	builder := labels.NewScratchBuilder(2)
	for j := range n {
		e := exemplar.Exemplar{Ts: t[j], Value: c.float()}
		head := c.Uvarint()
		if head>>1 > uint64(len(c.B)/2) {
			c.Fail("exemplar with %d labels", head>>1)
			break
		}
		e.HasTs = head&1 != 0
		builder.Reset()
		for range head >> 1 {
			name := c.label()
			builder.Add(name, c.label())
		}
		if c.Err != nil {
			break
		}
		e.Labels = builder.Labels()
		dst = append(dst, e)
	}
	if err := c.End(); err != nil {
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

package chunkfmt

import (
	"encoding/binary"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
)

// pageBuilder collects the chunks of one data page.
type pageBuilder struct {
	enc     codec.Encoder
	times   []builtTimes
	known   map[uint64][]int // hash of timestamps → candidates in times
	last    int              // of times, most often that of the next chunk too
	heads   []byte           // table of chunks
	chunks  int
	bodies  []byte
	bytes   int // of times
	buf     []byte
	buckets map[bucketKey][]bucket
}

type builtTimes struct {
	t []int64
	b []byte
}

// bucketKey is what the buckets of a classic histogram have in common.
type bucketKey struct {
	metric string // without _bucket
	labels uint64 // hash of all others but le
	times  int
}

// bucket is a chunk of a classic histogram's bucket, a base for others.
type bucket struct {
	le    float64
	chunk int
	depth int // how many chunks it is based on
	ints  []int64
}

// size is about how large the page is so far, in bytes.
func (p *pageBuilder) size() int { return len(p.heads) + len(p.bodies) + p.bytes }

// timestamps returns the index of the column t, which is stored once.
func (p *pageBuilder) timestamps(t []int64) int {
	if p.last < len(p.times) && SameTimes(p.times[p.last].t, t) {
		return p.last
	}
	h := uint64(len(t))
	for _, x := range []int64{t[0], t[len(t)/2], t[len(t)-1]} {
		h = (h ^ uint64(x)) * 0x9e3779b97f4a7c15
	}
	for _, i := range p.known[h] {
		if SameTimes(p.times[i].t, t) {
			p.last = i
			return i
		}
	}
	if p.known == nil {
		p.known = map[uint64][]int{}
	}
	i := len(p.times)
	p.known[h] = append(p.known[h], i)
	p.times = append(p.times, builtTimes{t: slices.Clone(t), b: p.enc.AppendTimes(nil, t)})
	p.bytes += len(p.times[i].b) + 4
	p.last = i
	return i
}

// SameTimes is slices.Equal, a few times as fast: arrays are compared in one step.
func SameTimes(a, b []int64) bool {
	if len(a) != len(b) {
		return false
	}
	for len(a) >= 64 && len(b) >= 64 {
		if *(*[64]int64)(a) != *(*[64]int64)(b) {
			return false
		}
		a, b = a[64:], b[64:]
	}
	return slices.Equal(a, b)
}

// add appends a chunk; values appends its encoded values.
func (p *pageBuilder) add(kind Kind, t, st []int64, values func(dst []byte) []byte) {
	start := len(p.bodies)
	head := p.start(kind, st)
	p.bodies = values(p.bodies)
	p.end(head, p.timestamps(t), start)
}

func (p *pageBuilder) start(kind Kind, st []int64) (head byte) {
	head = byte(kind)
	if st != nil {
		head |= chunkST
		p.bodies = p.enc.AppendInts(p.bodies, st)
	}
	return head
}

func (p *pageBuilder) end(head byte, times, start int) {
	p.heads = append(p.heads, head)
	p.heads = binary.AppendUvarint(p.heads, uint64(times))
	p.heads = binary.AppendUvarint(p.heads, uint64(len(p.bodies)-start))
	p.chunks++
}

// addFloats appends a chunk of floats. The buckets of a classic histogram are
// stored as differences to a neighbour, where that pays.
func (p *pageBuilder) addFloats(h *classic, t, st []int64, v []float64) {
	times, start := p.timestamps(t), len(p.bodies)
	if !h.is {
		head := p.start(KindFloat, st)
		p.bodies = p.enc.AppendFloats(p.bodies, v)
		p.end(head, times, start)
		return
	}
	key := bucketKey{h.metric, h.labels, times}
	neighbours := p.neighbours(key, h.le)
	bases := make([][]int64, len(neighbours))
	for i, b := range neighbours {
		bases[i] = b.ints
	}
	p.buf = p.buf[:0]
	if st != nil {
		p.buf = p.enc.AppendInts(p.buf, st)
	}
	out, ints, base := p.enc.AppendFloatsOn(p.buf, v, bases)
	p.buf = out
	head, depth := byte(KindFloat), 0
	if st != nil {
		head |= chunkST
	}
	if base >= 0 {
		head |= chunkBase
		depth = neighbours[base].depth + 1
		p.bodies = binary.AppendUvarint(p.bodies, uint64(p.chunks-neighbours[base].chunk))
	}
	p.bodies = append(p.bodies, p.buf...)
	if ints != nil && depth < maxBases {
		if p.buckets == nil {
			p.buckets = map[bucketKey][]bucket{}
		}
		key.metric = strings.Clone(key.metric)
		p.buckets[key] = append(p.buckets[key], bucket{h.le, p.chunks, depth, slices.Clone(ints)})
	}
	p.end(head, times, start)
}

// neighbours are the buckets with the next lower and the next higher bound
// among those already in the page.
func (p *pageBuilder) neighbours(key bucketKey, le float64) []bucket {
	bs := p.buckets[key]
	below, above := -1, -1
	for i, b := range bs {
		if b.le <= le && (below < 0 || b.le > bs[below].le) {
			below = i
		}
		if b.le > le && (above < 0 || b.le < bs[above].le) {
			above = i
		}
	}
	var out []bucket
	for _, i := range []int{below, above} {
		if i >= 0 {
			out = append(out, bs[i])
		}
	}
	return out
}

// classic is what is known of a series of a classic histogram.
type classic struct {
	is     bool
	metric string
	labels uint64
	le     float64
	buf    []byte
}

// set looks whether a series is a bucket, or the count, of a classic histogram.
func (h *classic) set(metric string, ls labels.Labels) {
	h.is = false
	name, ok := strings.CutSuffix(metric, "_bucket")
	bound := "+Inf"
	if ok {
		bound = ls.Get(labels.BucketLabel)
	} else if name, ok = strings.CutSuffix(metric, "_count"); !ok {
		return
	}
	le, err := strconv.ParseFloat(bound, 64)
	if err != nil {
		return
	}
	h.is, h.metric, h.le = true, name, le
	h.labels, h.buf = ls.HashWithoutLabels(h.buf, labels.BucketLabel)
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
	p.times, p.heads, p.bodies, p.chunks, p.bytes, p.last = p.times[:0], p.heads[:0], p.bodies[:0], 0, 0, 0
	clear(p.known)
	clear(p.buckets)
	return appendPage(dst, typ, b, typ == pageExemplars)
}

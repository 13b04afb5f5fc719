package chunkfmt

import (
	"encoding/binary"

	"github.com/prometheus/prometheus/model/histogram"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
	"github.com/epimetheus-tsdb/epimetheus/internal/slab"
)

// A histogram chunk is a dictionary of layouts (all that decides which buckets
// there are), and then columns: layout of each sample, hint, sum, count, zero
// count, and for each layout each of its buckets over the samples that have it.

// layout is what the histograms of a stretch of time have in common.
type layout struct {
	schema             int32
	zeroThreshold      float64
	positive, negative []histogram.Span
	custom             []float64
	nPos, nNeg         int

	samples int // that have this layout
}

func (l *layout) append(dst []byte) []byte {
	dst = binary.AppendVarint(dst, int64(l.schema))
	dst = appendFloat(dst, l.zeroThreshold)
	dst = appendSpans(dst, l.positive)
	dst = appendSpans(dst, l.negative)
	dst = binary.AppendUvarint(dst, uint64(len(l.custom)))
	for _, v := range l.custom {
		dst = appendFloat(dst, v)
	}
	return dst
}

func (c *cursor) layout() (l layout) {
	s := c.Varint()
	if s != int64(int32(s)) {
		c.Fail("histogram schema %d", s)
	}
	l.schema = int32(s)
	l.zeroThreshold = c.float()
	l.positive, l.nPos = c.spans()
	l.negative, l.nNeg = c.spans()
	if n := c.Count(1); n > 0 {
		l.custom = make([]float64, n)
		for i := range l.custom {
			l.custom[i] = c.float()
		}
	}
	if len(l.positive) == 0 {
		l.positive = nil
	}
	if len(l.negative) == 0 {
		l.negative = nil
	}
	return l
}

// layouts numbers the layouts of a chunk in the order they appear.
type layouts struct {
	ids   map[string]int
	bytes []byte
	of    []int64 // per sample
	key   []byte
}

func (ls *layouts) add(l layout) {
	ls.key = l.append(ls.key[:0])
	id, ok := ls.ids[string(ls.key)]
	if !ok {
		if ls.ids == nil {
			ls.ids = map[string]int{}
		}
		id = len(ls.ids)
		ls.ids[string(ls.key)] = id
		ls.bytes = append(ls.bytes, ls.key...)
	}
	ls.of = append(ls.of, int64(id))
}

func appendHistograms(e *codec.Encoder, dst []byte, hs []*histogram.Histogram) []byte {
	var ls layouts
	n := len(hs)
	hints, counts, zeros, sums := make([]int64, n), make([]int64, n), make([]int64, n), make([]float64, n)
	for i, h := range hs {
		ls.add(layout{schema: h.Schema, zeroThreshold: h.ZeroThreshold, positive: h.PositiveSpans, negative: h.NegativeSpans, custom: h.CustomValues})
		hints[i], counts[i], zeros[i], sums[i] = int64(h.CounterResetHint)&histHint, int64(h.Count), int64(h.ZeroCount), h.Sum
	}
	dst = ls.appendHead(e, dst, hints, sums)
	dst = e.AppendInts(dst, counts)
	dst = e.AppendInts(dst, zeros)
	column := counts
	for id := range len(ls.ids) {
		var with []*histogram.Histogram
		for i, h := range hs {
			if ls.of[i] == int64(id) {
				with = append(with, h)
			}
		}
		for _, side := range []func(*histogram.Histogram) []int64{
			func(h *histogram.Histogram) []int64 { return h.PositiveBuckets },
			func(h *histogram.Histogram) []int64 { return h.NegativeBuckets },
		} {
			// Buckets come as differences to their left neighbour; columns of
			// absolute counts grow evenly.
			run := make([]int64, len(with))
			for k := range side(with[0]) {
				column = column[:0]
				for i, h := range with {
					run[i] += side(h)[k]
					column = append(column, run[i])
				}
				dst = e.AppendInts(dst, column)
			}
		}
	}
	return dst
}

func appendFloatHistograms(e *codec.Encoder, dst []byte, hs []*histogram.FloatHistogram) []byte {
	var ls layouts
	n := len(hs)
	hints, counts, zeros, sums := make([]int64, n), make([]float64, n), make([]float64, n), make([]float64, n)
	for i, h := range hs {
		ls.add(layout{schema: h.Schema, zeroThreshold: h.ZeroThreshold, positive: h.PositiveSpans, negative: h.NegativeSpans, custom: h.CustomValues})
		hints[i], counts[i], zeros[i], sums[i] = int64(h.CounterResetHint)&histHint, h.Count, h.ZeroCount, h.Sum
	}
	dst = ls.appendHead(e, dst, hints, sums)
	dst = e.AppendFloats(dst, counts)
	dst = e.AppendFloats(dst, zeros)
	column := counts
	for id := range len(ls.ids) {
		var with []*histogram.FloatHistogram
		for i, h := range hs {
			if ls.of[i] == int64(id) {
				with = append(with, h)
			}
		}
		for _, side := range []func(*histogram.FloatHistogram) []float64{
			func(h *histogram.FloatHistogram) []float64 { return h.PositiveBuckets },
			func(h *histogram.FloatHistogram) []float64 { return h.NegativeBuckets },
		} {
			for k := range side(with[0]) {
				column = column[:0]
				for _, h := range with {
					column = append(column, side(h)[k])
				}
				dst = e.AppendFloats(dst, column)
			}
		}
	}
	return dst
}

func (ls *layouts) appendHead(e *codec.Encoder, dst []byte, hints []int64, sums []float64) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(ls.ids)))
	dst = append(dst, ls.bytes...)
	dst = e.AppendInts(dst, ls.of)
	dst = e.AppendInts(dst, hints)
	return e.AppendFloats(dst, sums)
}

// head reads what layouts.appendHead wrote and checks that the samples
// to come are within bounds.
func (m *histogramMemory) head(d *codec.Decoder, b []byte, n int) (ls []layout, rest []byte, err error) {
	c := over(b)
	ls = make([]layout, c.Bounded("layouts", min(uint64(n), uint64(len(b)/5))))
	for i := range ls {
		ls[i] = c.layout()
	}
	if c.Err != nil {
		return nil, nil, c.Err
	}
	if m.of, rest, err = d.Ints(m.of[:0], c.B, n); err != nil {
		return nil, nil, err
	}
	for _, id := range m.of {
		if id < 0 || id >= int64(len(ls)) {
			return nil, nil, corrupt("histogram layout %d of %d", id, len(ls))
		}
		ls[id].samples++
	}
	total := 0
	for i := range ls {
		total += ls[i].samples * (ls[i].nPos + ls[i].nNeg)
		if ls[i].samples == 0 || total > maxChunkBuckets && n > 1 {
			return nil, nil, corrupt("%d buckets in a histogram chunk, limit %d", total, maxChunkBuckets)
		}
	}
	if m.hints, rest, err = d.Ints(m.hints[:0], rest, n); err != nil {
		return nil, nil, err
	}
	for _, hint := range m.hints {
		if hint < 0 || hint > histHint {
			return nil, nil, corrupt("histogram hint %d", hint)
		}
	}
	m.sums, rest, err = d.Floats(m.sums[:0], rest, n)
	return ls, rest, err
}

// Whole chooses, of histograms at times that ascend, those that are wanted with their buckets: it sets their elements of
// whole, which has as many. There are others that it gets: the first and the last of a chunk; and such of which a
// counter-reset hint doesn't say that there was no reset, with the one before.
type Whole func(t []int64, whole []bool)

// Hollow reports whether h was decoded without its buckets.
func Hollow(h *histogram.Histogram) bool {
	return len(h.PositiveBuckets)+len(h.NegativeBuckets) == 0 && len(h.PositiveSpans)+len(h.NegativeSpans) > 0
}

// histogramMemory is what histograms are decoded into, and scratch memory.
type histogramMemory struct {
	hs      slab.Slab[histogram.Histogram]
	buckets slab.Slab[int64]

	of, hints, counts, zeros []int64
	sums                     []float64
	whole                    []bool
	at                       []sampleOf
	next                     []int
	columns                  [columnsAtOnce][]int64
	last                     []int64 // column
}

// sampleOf is a histogram, and the how manieth it is of those with its layout.
type sampleOf struct{ i, j int32 }

// columnsAtOnce is how many buckets of a histogram are written at the same time: one for each column would go
// through all of them, over and over.
const columnsAtOnce = 8

// reset makes the memory of histograms free for others.
func (m *histogramMemory) reset() {
	m.hs.Reset(1 << 14)
	m.buckets.Reset(1 << 20)
}

// histograms decodes n of them, at times t. whole may be nil: all are wanted with their buckets.
func (m *histogramMemory) histograms(d *codec.Decoder, b []byte, t []int64, dst []*histogram.Histogram, whole Whole) ([]*histogram.Histogram, error) {
	n := len(t)
	ls, b, err := m.head(d, b, n)
	if err != nil {
		return dst, err
	}
	if m.counts, b, err = d.Ints(m.counts[:0], b, n); err != nil {
		return dst, err
	}
	if m.zeros, b, err = d.Ints(m.zeros[:0], b, n); err != nil {
		return dst, err
	}
	left := m.choose(t, ls, whole)
	all := m.hs.Take(n)
	from := len(dst)
	for i := range all {
		l := &ls[m.of[i]]
		all[i] = histogram.Histogram{
			CounterResetHint: histogram.CounterResetHint(m.hints[i]), Schema: l.schema, ZeroThreshold: l.zeroThreshold,
			Count: uint64(m.counts[i]), ZeroCount: uint64(m.zeros[i]), Sum: m.sums[i],
			PositiveSpans: l.positive, NegativeSpans: l.negative, CustomValues: l.custom,
		}
		dst = append(dst, &all[i])
	}
	k := 0
	for id := range ls {
		if left == 0 {
			return dst, nil // no buckets are wanted of the rest
		}
		l := &ls[id]
		with := m.at[k:m.next[id]]
		k = m.next[id]
		left -= len(with)
		for _, w := range with {
			bs := m.buckets.Take(l.nPos + l.nNeg)
			all[w.i].PositiveBuckets, bs = cut(bs, l.nPos)
			all[w.i].NegativeBuckets, _ = cut(bs, l.nNeg)
		}
		if b, err = m.side(d, b, all, with, l.samples, l.nPos, false); err == nil {
			b, err = m.side(d, b, all, with, l.samples, l.nNeg, true)
		}
		if err != nil {
			return dst[:from], err
		}
	}
	if len(b) > 0 {
		return dst[:from], corrupt("%d bytes behind histograms", len(b))
	}
	return dst, nil
}

// choose puts the histograms that get buckets into m.at, by layout, and where those of a layout end into m.next. It gives how
// many they are.
func (m *histogramMemory) choose(t []int64, ls []layout, whole Whole) int {
	n := len(t)
	if whole != nil {
		m.whole = append(m.whole[:0], make([]bool, n)...)
		whole(t, m.whole)
		m.whole[0], m.whole[n-1] = true, true
		for i, hint := range m.hints {
			if histogram.CounterResetHint(hint) != histogram.NotCounterReset {
				m.whole[i], m.whole[max(i-1, 0)] = true, true
			}
		}
	}
	m.next = append(m.next[:0], make([]int, len(ls))...)
	left := 0
	for i, id := range m.of {
		if whole == nil || m.whole[i] {
			m.next[id]++
			left++
		}
	}
	at := 0
	for id, k := range m.next {
		m.next[id] = at
		at += k
		ls[id].samples = 0 // counted again
	}
	if cap(m.at) < left {
		m.at = make([]sampleOf, left)
	}
	m.at = m.at[:left]
	for i, id := range m.of {
		if l := &ls[id]; whole == nil || m.whole[i] {
			m.at[m.next[id]] = sampleOf{int32(i), int32(l.samples)} //nolint:gosec // no more than MaxChunkSamples
			m.next[id]++
		}
		ls[id].samples++
	}
	return left
}

// side decodes the columns of the positive or the negative buckets of a layout.
func (m *histogramMemory) side(d *codec.Decoder, b []byte, all []histogram.Histogram, with []sampleOf, samples, buckets int, negative bool) (rest []byte, err error) {
	for k := 0; k < buckets; k += columnsAtOnce {
		few := m.columns[:min(columnsAtOnce, buckets-k)]
		for c := range few {
			if few[c], b, err = d.Ints(few[c][:0], b, samples); err != nil {
				return nil, err
			}
		}
		for _, w := range with {
			bs := all[w.i].PositiveBuckets
			if negative {
				bs = all[w.i].NegativeBuckets
			}
			bs = bs[k : k+len(few)]
			run := int64(0)
			if k > 0 {
				run = m.last[w.j]
			}
			for c := range bs {
				x := few[c][w.j]
				bs[c] = x - run
				run = x
			}
		}
		last := len(few) - 1
		m.last, few[last] = few[last], m.last
	}
	return b, nil
}

func decodeFloatHistograms(d *codec.Decoder, b []byte, n int, dst []*histogram.FloatHistogram) ([]*histogram.FloatHistogram, error) {
	var m histogramMemory
	ls, b, err := m.head(d, b, n)
	if err != nil {
		return dst, err
	}
	of, hints, sums := m.of, m.hints, m.sums
	counts, b, err := d.Floats(nil, b, n)
	if err != nil {
		return dst, err
	}
	zeros, b, err := d.Floats(nil, b, n)
	if err != nil {
		return dst, err
	}
	all := make([]histogram.FloatHistogram, n)
	with := make([][]int, len(ls))
	for i := range all {
		l := &ls[of[i]]
		with[of[i]] = append(with[of[i]], i)
		all[i] = histogram.FloatHistogram{
			CounterResetHint: histogram.CounterResetHint(hints[i]), Schema: l.schema, ZeroThreshold: l.zeroThreshold,
			Count: counts[i], ZeroCount: zeros[i], Sum: sums[i],
			PositiveSpans: l.positive, NegativeSpans: l.negative, CustomValues: l.custom,
		}
	}
	column := counts
	for id := range ls {
		l := &ls[id]
		buckets := make([]float64, l.samples*(l.nPos+l.nNeg))
		for _, i := range with[id] {
			all[i].PositiveBuckets, buckets = cut(buckets, l.nPos)
			all[i].NegativeBuckets, buckets = cut(buckets, l.nNeg)
		}
		for k := range l.nPos + l.nNeg {
			if column, b, err = d.Floats(column[:0], b, l.samples); err != nil {
				return dst, err
			}
			for j, i := range with[id] {
				if k < l.nPos {
					all[i].PositiveBuckets[k] = column[j]
				} else {
					all[i].NegativeBuckets[k-l.nPos] = column[j]
				}
			}
		}
	}
	if len(b) > 0 {
		return dst, corrupt("%d bytes behind histograms", len(b))
	}
	for i := range all {
		dst = append(dst, &all[i])
	}
	return dst, nil
}

// cut takes n values off the front.
func cut[T any](values []T, n int) (front, rest []T) {
	if n == 0 {
		return nil, values
	}
	return values[:n:n], values[n:]
}

package chunkfmt

import (
	"encoding/binary"

	"github.com/prometheus/prometheus/model/histogram"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
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
	s := c.varint()
	if s != int64(int32(s)) {
		c.fail("histogram schema %d", s)
	}
	l.schema = int32(s)
	l.zeroThreshold = c.float()
	l.positive, l.nPos = c.spans()
	l.negative, l.nNeg = c.spans()
	if n := c.count(1); n > 0 {
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

// histogramHead reads what layouts.appendHead wrote and checks that the samples
// to come are within bounds.
func histogramHead(d *codec.Decoder, b []byte, n int) (ls []layout, of, hints []int64, sums []float64, rest []byte, err error) {
	c := cursor{b: b}
	ls = make([]layout, c.bounded("layouts", min(uint64(n), uint64(len(b)/5))))
	for i := range ls {
		ls[i] = c.layout()
	}
	if c.err != nil {
		return nil, nil, nil, nil, nil, c.err
	}
	if of, rest, err = d.Ints(nil, c.b, n); err != nil {
		return nil, nil, nil, nil, nil, err
	}
	for _, id := range of {
		if id < 0 || id >= int64(len(ls)) {
			return nil, nil, nil, nil, nil, corrupt("histogram layout %d of %d", id, len(ls))
		}
		ls[id].samples++
	}
	total := 0
	for i := range ls {
		total += ls[i].samples * (ls[i].nPos + ls[i].nNeg)
		if ls[i].samples == 0 || total > maxChunkBuckets && n > 1 {
			return nil, nil, nil, nil, nil, corrupt("%d buckets in a histogram chunk, limit %d", total, maxChunkBuckets)
		}
	}
	if hints, rest, err = d.Ints(nil, rest, n); err != nil {
		return nil, nil, nil, nil, nil, err
	}
	for _, hint := range hints {
		if hint < 0 || hint > histHint {
			return nil, nil, nil, nil, nil, corrupt("histogram hint %d", hint)
		}
	}
	sums, rest, err = d.Floats(nil, rest, n)
	return ls, of, hints, sums, rest, err
}

func decodeHistograms(d *codec.Decoder, b []byte, n int, dst []*histogram.Histogram) ([]*histogram.Histogram, error) {
	ls, of, hints, sums, b, err := histogramHead(d, b, n)
	if err != nil {
		return dst, err
	}
	counts, b, err := d.Ints(nil, b, n)
	if err != nil {
		return dst, err
	}
	zeros, b, err := d.Ints(nil, b, n)
	if err != nil {
		return dst, err
	}
	all := make([]histogram.Histogram, n)
	with := make([][]int, len(ls))
	for i := range all {
		l := &ls[of[i]]
		with[of[i]] = append(with[of[i]], i)
		all[i] = histogram.Histogram{
			CounterResetHint: histogram.CounterResetHint(hints[i]), Schema: l.schema, ZeroThreshold: l.zeroThreshold,
			Count: uint64(counts[i]), ZeroCount: uint64(zeros[i]), Sum: sums[i],
			PositiveSpans: l.positive, NegativeSpans: l.negative, CustomValues: l.custom,
		}
	}
	column := counts
	for id := range ls {
		l := &ls[id]
		slab := make([]int64, l.samples*(l.nPos+l.nNeg))
		for _, i := range with[id] {
			all[i].PositiveBuckets, slab = cut(slab, l.nPos)
			all[i].NegativeBuckets, slab = cut(slab, l.nNeg)
		}
		run := zeros[:l.samples]
		for k := range l.nPos + l.nNeg {
			if k == 0 || k == l.nPos {
				clear(run)
			}
			if column, b, err = d.Ints(column[:0], b, l.samples); err != nil {
				return dst, err
			}
			for j, i := range with[id] {
				if k < l.nPos {
					all[i].PositiveBuckets[k] = column[j] - run[j]
				} else {
					all[i].NegativeBuckets[k-l.nPos] = column[j] - run[j]
				}
				run[j] = column[j]
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

func decodeFloatHistograms(d *codec.Decoder, b []byte, n int, dst []*histogram.FloatHistogram) ([]*histogram.FloatHistogram, error) {
	ls, of, hints, sums, b, err := histogramHead(d, b, n)
	if err != nil {
		return dst, err
	}
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
		slab := make([]float64, l.samples*(l.nPos+l.nNeg))
		for _, i := range with[id] {
			all[i].PositiveBuckets, slab = cut(slab, l.nPos)
			all[i].NegativeBuckets, slab = cut(slab, l.nNeg)
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

// cut takes n values off the front of slab.
func cut[T any](slab []T, n int) (front, rest []T) {
	if n == 0 {
		return nil, slab
	}
	return slab[:n:n], slab[n:]
}

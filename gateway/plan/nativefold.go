package plan

import (
	"errors"
	"math"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/kahansum"

	"github.com/epimetheus-tsdb/epimetheus/internal/slab"
)

// nativeMemory is what histograms of points lie in.
type nativeMemory struct {
	hs      slab.Slab[histogram.FloatHistogram]
	buckets slab.Slab[float64]
	spans   slab.Slab[histogram.Span]
	again   bool // nobody keeps them: the memory is used for the next series
}

func (m *nativeMemory) reset() {
	if !m.again {
		*m = nativeMemory{}
		return
	}
	m.hs.Reset(1 << 12)
	m.buckets.Reset(1 << 18)
	m.spans.Reset(1 << 13)
}

// bytes is how much memory there is.
func (m *nativeMemory) bytes() int64 {
	const histogram = 168
	return int64(histogram*m.hs.Size() + 8*m.buckets.Size() + 8*m.spans.Size())
}

// floats gives room for so many buckets, in row if they aren't to stay.
func (m *nativeMemory) floats(n int, row *[]float64) []float64 {
	if m.again {
		return m.buckets.Take(n)
	}
	if cap(*row) < n {
		*row = make([]float64, n)
	}
	return (*row)[:n]
}

// side makes spans and buckets of a row, whose first element is of index from; without the empty ones, as the engine has them,
// if they are to stay.
func (m *nativeMemory) side(row []float64, from int32) ([]histogram.Span, []float64) {
	if m.again {
		spans := m.spans.Take(1)
		spans[0] = histogram.Span{Offset: from, Length: uint32(len(row))} //nolint:gosec // no more than maxNativeWidth
		return spans, row
	}
	return m.compact(row, from)
}

// compact makes spans and buckets of a row without the empty ones, as Compact(0) of the engine's histograms does.
func (m *nativeMemory) compact(row []float64, from int32) ([]histogram.Span, []float64) {
	ns, nb := 0, 0
	empty := true
	for _, x := range row {
		if x != 0 {
			nb++
			if empty {
				ns++
			}
		}
		empty = x == 0
	}
	if nb == 0 {
		return nil, nil
	}
	spans, buckets := m.spans.Take(ns)[:0], m.buckets.Take(nb)[:0]
	end := int32(0)
	for i, x := range row {
		if x == 0 {
			continue
		}
		at := from + int32(i) //nolint:gosec // no more than maxNativeWidth
		if len(spans) > 0 && at == end {
			spans[len(spans)-1].Length++
		} else {
			spans = append(spans, histogram.Span{Offset: at - end, Length: 1})
		}
		end = at + 1
		buckets = append(buckets, x)
	}
	return spans, buckets
}

// float is ToFloat of h.
func (m *nativeMemory) float(h *histogram.Histogram) *histogram.FloatHistogram {
	return h.ToFloat(m.room(h.PositiveSpans, h.NegativeSpans, len(h.PositiveBuckets), len(h.NegativeBuckets)))
}

// copy copies h.
func (m *nativeMemory) copy(h *histogram.FloatHistogram) *histogram.FloatHistogram {
	to := m.room(h.PositiveSpans, h.NegativeSpans, len(h.PositiveBuckets), len(h.NegativeBuckets))
	h.CopyTo(to)
	return to
}

// room gives a histogram that has the memory of one with such spans and so many buckets.
func (m *nativeMemory) room(pos, neg []histogram.Span, nPos, nNeg int) *histogram.FloatHistogram {
	return m.put(&histogram.FloatHistogram{
		PositiveSpans: m.spans.Take(len(pos)), NegativeSpans: m.spans.Take(len(neg)),
		PositiveBuckets: m.buckets.Take(nPos), NegativeBuckets: m.buckets.Take(nNeg),
	})
}

// put gives h a place.
func (m *nativeMemory) put(h *histogram.FloatHistogram) *histogram.FloatHistogram {
	to := &m.hs.Take(1)[0]
	*to = *h
	return to
}

// nativeSums are the sums or the averages of native histograms of a group: what promql's aggregation does, with the same
// arithmetic in the same order.
type nativeSums struct {
	avg    bool
	cells  []nativeCell // by step
	floats slab.Slab[float64]
	bits   slab.Slab[uint8]
	bounds nativeBounds
	bytes  int64
}

// nativeCell is what has been put together at a step. It is histogram and compensation, as the engine has them, once something
// comes that can't be added up by the indexes of buckets; and dense before.
type nativeCell struct {
	n         float64 // histograms; 0: none yet
	after     bool    // a float came before, so they don't count
	bad       bool    // some can't be added up
	reset     bool    // there was one with a hint of a reset
	noReset   bool    // or of none
	layout    nativeLayout
	hint      histogram.CounterResetHint
	count     kahan
	zero, sum kahan
	pos, neg  nativeRow

	h, c *histogram.FloatHistogram // if h isn't nil
	mean *histogram.FloatHistogram // histogramMean
	inc  bool                      // histogramIncrementalMean
}

// nativeCellBytes is how large a nativeCell is.
const nativeCellBytes = 408

// kahan is a sum, and what rounding took off.
type kahan struct{ v, c float64 }

func (k *kahan) add(x float64) { k.v, k.c = kahansum.Inc(x, k.v, k.c) }

// nativeRow are buckets from index from on, which is a multiple of 8.
type nativeRow struct {
	from int32
	v, c []float64
	// has is a bit for each bucket that one of the histograms has, if only with 0: what is added to such a bucket is
	// rounded otherwise than what is put where there was none.
	has []uint8
}

// without gives points but for the floats behind histograms that can't be added up, which don't count any more.
func (s *nativeSums) without(p *points) *points {
	if len(p.step) == 0 {
		return p
	}
	out := points{hstep: p.hstep, h: p.h}
	for i, step := range p.step {
		if !s.cells[step].bad {
			out.step, out.v = append(out.step, step), append(out.v, p.v[i])
		}
	}
	return &out
}

// add puts in the histograms of a series.
func (s *nativeSums) add(l *Leaf, name string, p *points, g *group, annos *annotations.Annotations) error {
	for i, step := range p.hstep {
		cell, x := &s.cells[step], p.h[i]
		switch {
		case cell.bad || cell.after:
			continue
		case cell.n == 0 && g.n[step] > 0:
			cell.after = true
			continue
		}
		switch x.CounterResetHint {
		case histogram.CounterReset:
			cell.reset = true
		case histogram.NotCounterReset:
			cell.noReset = true
		}
		if !s.addDense(cell, x) {
			if err := s.addWhole(cell, x, l, name, annos); err != nil {
				return err
			}
		}
	}
	return nil
}

// addDense adds by the indexes of buckets, if it can.
func (s *nativeSums) addDense(cell *nativeCell, x *histogram.FloatHistogram) bool {
	if cell.h != nil {
		return false
	}
	first := cell.n == 0
	if !first && (x.Schema != cell.layout.schema || x.ZeroThreshold != cell.layout.zero || !sameBounds(x.CustomValues, cell.layout.custom)) {
		return false
	}
	pos, okPos := sideOf(x.PositiveSpans)
	neg, okNeg := sideOf(x.NegativeSpans)
	l := nativeLayout{schema: x.Schema, zero: x.ZeroThreshold, custom: x.CustomValues, pos: pos, neg: neg}
	if !okPos || !okNeg || pos.buckets != len(x.PositiveBuckets) || neg.buckets != len(x.NegativeBuckets) || !s.bounds.proper(&l) {
		return false
	}
	if !s.cover(&cell.pos, &pos) || !s.cover(&cell.neg, &neg) {
		return false
	}
	// An average is made in another way once a sum is infinite, and bounds this far from it can't become so.
	if s.avg && !(below(x.Count) && below(x.Sum) && below(x.ZeroCount) && allBelow(x.PositiveBuckets) && allBelow(x.NegativeBuckets) &&
		below(cell.count.v) && below(cell.sum.v) && below(cell.zero.v) && allBelow(cell.pos.v) && allBelow(cell.neg.v)) {
		return false
	}
	if first {
		cell.layout, cell.hint = l, x.CounterResetHint
		cell.layout.pos.spans, cell.layout.neg.spans = nil, nil // of others
		cell.count.v, cell.zero.v, cell.sum.v = x.Count, x.ZeroCount, x.Sum
	} else {
		cell.hint = together(cell.hint, x.CounterResetHint)
		cell.count.add(x.Count)
		cell.zero.add(x.ZeroCount)
		cell.sum.add(x.Sum)
	}
	cell.n++
	cell.pos.add(x.PositiveSpans, x.PositiveBuckets)
	cell.neg.add(x.NegativeSpans, x.NegativeBuckets)
	return true
}

func below(x float64) bool { return math.Abs(x) < huge }

func allBelow(xs []float64) bool {
	for _, x := range xs {
		if !below(x) {
			return false
		}
	}
	return true
}

// together is the hint of a sum: adjustCounterReset of the engine's histograms.
func together(h, other histogram.CounterResetHint) histogram.CounterResetHint {
	switch {
	case h == other, h == histogram.GaugeType:
		return h
	case other == histogram.GaugeType:
		return other
	}
	return histogram.UnknownCounterReset
}

// cover makes room for the buckets of a side, if they don't lie too far apart.
func (s *nativeSums) cover(r *nativeRow, side *nativeSide) bool {
	if side.buckets == 0 {
		return true
	}
	from, to := r.from, r.from+int32(len(r.v)) //nolint:gosec // no more than maxNativeWidth
	if len(r.v) > 0 && from <= side.from && side.to <= to {
		return true
	}
	if len(r.v) == 0 {
		from, to = side.from, side.to
	} else {
		from, to = min(from, side.from), max(to, side.to)
	}
	const more = 8 // others come that have a few more
	if from, to = from&^(more-1), (to+more-1)&^(more-1); int64(to)-int64(from) > 2*maxNativeWidth || to < from {
		return false
	}
	n := int(to - from)
	mem := s.floats.Take(2 * n)
	clear(mem)
	v, c := mem[:n:n], mem[n:]
	has := s.bits.Take(n / 8)
	clear(has)
	if len(r.v) > 0 {
		copy(v[r.from-from:], r.v)
		copy(c[r.from-from:], r.c)
		copy(has[(r.from-from)/8:], r.has)
	}
	s.bytes += int64(16*n + n/8)
	r.from, r.v, r.c, r.has = from, v, c, has
	return true
}

// mark says that there are the buckets of a span, which begins at the place at.
func (r *nativeRow) mark(at, n int32) {
	for end := at + n; at < end; {
		if at%8 == 0 && end-at >= 8 {
			r.has[at/8] = 0xff
			at += 8
			continue
		}
		r.has[at/8] |= 1 << (at % 8)
		at++
	}
}

// sparse gives the buckets that there are. Those of the row aren't to be used any more.
func (r *nativeRow) sparse() (spans []histogram.Span, v, c []float64) {
	next, end := 0, int32(0) // place behind the last bucket, and its index
	for i := range r.v {
		if r.has[i/8]>>(i%8)&1 == 0 {
			continue
		}
		if at := r.from + int32(i); len(spans) == 0 || i > next { //nolint:gosec // no more than maxNativeWidth
			spans = append(spans, histogram.Span{Offset: at - end, Length: 1})
			end = at + 1
		} else {
			spans[len(spans)-1].Length++
			end++
		}
		next = i + 1
		r.v[len(v)], r.c[len(v)] = r.v[i], r.c[i]
		v, c = r.v[:len(v)+1], r.c[:len(v)+1]
	}
	return spans, v, c
}

// add adds buckets, as group.sum does. As long as all have the same bounds it doesn't matter which of them there were.
func (r *nativeRow) add(spans []histogram.Span, buckets []float64) {
	at := -r.from
	for _, sp := range spans {
		if at += sp.Offset; sp.Length == 0 {
			continue
		}
		n := int32(sp.Length) //nolint:gosec // no more than maxNativeWidth
		r.mark(at, n)
		vs, cs, xs := r.v[at:at+n], r.c[at:at+n], buckets[:n]
		for i := 0; i < len(xs); i++ {
			if i += sumFinite(vs[i:], cs[i:], xs[i:]); i == len(xs) {
				break
			}
			vs[i], cs[i] = kahansum.Inc(xs[i], vs[i], cs[i])
		}
		at += n
		buckets = buckets[n:]
	}
}

// addWhole adds as the engine does.
func (s *nativeSums) addWhole(cell *nativeCell, x *histogram.FloatHistogram, l *Leaf, name string, annos *annotations.Annotations) (err error) {
	defer func() {
		if recover() != nil { // the library, as it will for the engine
			err = ErrGiveUp
		}
	}()
	cell.whole()
	if cell.n++; cell.n == 1 {
		cell.h = x.Copy()
		s.bytes += int64(cell.h.Size())
		return nil
	}
	note := func(reconciled bool, err error) error {
		pos := l.Agg.Expr.PositionRange()
		if errors.Is(err, histogram.ErrHistogramsIncompatibleSchema) {
			annos.Add(annotations.NewMixedExponentialCustomHistogramsWarning(name, pos))
			cell.bad = true
			return nil
		}
		if reconciled {
			annos.Add(annotations.NewMismatchedCustomBucketsHistogramsInfo(pos, annotations.HistogramAgg))
		}
		return err
	}
	if !s.avg {
		c, _, reconciled, err := cell.h.KahanAdd(x, cell.c)
		cell.c = c
		return note(reconciled, err)
	}
	if !cell.inc {
		v := cell.h.Copy()
		var c *histogram.FloatHistogram
		if cell.c != nil {
			c = cell.c.Copy()
		}
		c, _, reconciled, err := v.KahanAdd(x, c)
		if err := note(reconciled, err); err != nil || cell.bad {
			return err
		}
		if !v.HasOverflow() {
			cell.h, cell.c = v, c
			return nil
		}
		cell.inc = true
		cell.mean = cell.h.Copy().Div(cell.n - 1)
		if cell.c != nil {
			cell.c.Div(cell.n - 1)
		}
	}
	q := (cell.n - 1) / cell.n
	if cell.c != nil {
		cell.c.Mul(q)
	}
	c, _, reconciled, err := cell.mean.Mul(q).KahanAdd(x.Copy().Div(cell.n), cell.c)
	cell.c = c
	return note(reconciled, err)
}

// whole makes histogram and compensation of what is dense.
func (c *nativeCell) whole() {
	if c.h != nil || c.n == 0 {
		return
	}
	posSpans, pos, posC := c.pos.sparse()
	negSpans, neg, negC := c.neg.sparse()
	c.h = &histogram.FloatHistogram{
		CounterResetHint: c.hint, Schema: c.layout.schema, ZeroThreshold: c.layout.zero, CustomValues: c.layout.custom,
		Count: c.count.v, ZeroCount: c.zero.v, Sum: c.sum.v,
		PositiveSpans: posSpans, NegativeSpans: negSpans, PositiveBuckets: pos, NegativeBuckets: neg,
	}
	if c.n > 1 {
		c.c = &histogram.FloatHistogram{
			CounterResetHint: c.hint, Schema: c.layout.schema, ZeroThreshold: c.layout.zero, CustomValues: c.layout.custom,
			Count: c.count.c, ZeroCount: c.zero.c, Sum: c.sum.c,
			PositiveSpans: posSpans, NegativeSpans: negSpans, PositiveBuckets: posC, NegativeBuckets: negC,
		}
	}
	c.pos, c.neg = nativeRow{}, nativeRow{}
}

// finish gives the histograms of all steps, and takes the floats of those out of the group at which there are both.
func (s *nativeSums) finish(l *Leaf, g *group, annos *annotations.Annotations) []promql.HPoint {
	var mem nativeMemory
	var out []promql.HPoint
	var row []float64
	for i := range s.cells {
		c := &s.cells[i]
		pos := l.Agg.Expr.PositionRange()
		switch {
		case c.n == 0 && !c.after:
			continue
		case g.n[i] > 0:
			annos.Add(annotations.NewMixedFloatsHistogramsAggWarning(pos))
			g.n[i] = 0
			continue
		case c.bad:
			continue
		}
		if c.reset && c.noReset {
			annos.Add(annotations.NewHistogramCounterResetCollisionWarning(pos, annotations.HistogramAgg))
		}
		var h *histogram.FloatHistogram
		if c.h != nil {
			h = c.result(s.avg)
		} else {
			value := func(k kahan) float64 {
				switch {
				case s.avg && c.n > 1:
					return k.v/c.n + k.c/c.n
				case c.n > 1:
					return k.v + k.c
				}
				return k.v
			}
			one := histogram.FloatHistogram{
				CounterResetHint: c.hint, Schema: c.layout.schema, ZeroThreshold: c.layout.zero, CustomValues: c.layout.custom,
				Count: value(c.count), ZeroCount: value(c.zero), Sum: value(c.sum),
			}
			side := func(r *nativeRow) ([]histogram.Span, []float64) {
				row = append(row[:0], r.v...)
				for k, x := range r.c {
					row[k] = value(kahan{row[k], x})
				}
				return mem.compact(row, r.from)
			}
			one.PositiveSpans, one.PositiveBuckets = side(&c.pos)
			one.NegativeSpans, one.NegativeBuckets = side(&c.neg)
			h = mem.put(&one)
		}
		if out == nil {
			out = make([]promql.HPoint, 0, len(s.cells)-i)
		}
		out = append(out, promql.HPoint{T: l.Grid.At(i), H: h})
	}
	return out
}

// result of a histogram and compensation.
func (c *nativeCell) result(avg bool) *histogram.FloatHistogram {
	h, comp := c.h, c.c
	switch {
	case c.inc:
		h = c.mean
	case avg:
		h.Div(c.n)
		if comp != nil {
			comp.Div(c.n)
		}
	}
	if comp != nil {
		h, _, _, _ = h.Add(comp) // as it could be added to before
	}
	return h.Compact(0)
}

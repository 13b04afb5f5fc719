package plan

import (
	"errors"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// errHollow: histograms are needed whole that weren't decoded so.
var errHollow = errors.New("a histogram has no buckets")

// natives is rate(), increase() and delta() of native histograms: promql's histogramRate, with the same arithmetic in the same
// order. Of a window it looks at the first sample and the last, and at those before resets: where these are is
// worked out once, not for each window. It does windows whose histograms have the same schema, zero threshold and custom bounds,
// and nothing to be warned of; the others are given to the engine's function.
type natives struct {
	leaf    *Leaf
	counter bool // not delta
	stats   bool // sum and count are all that is wanted: the engine sees the others without buckets
	x       rollup.Extrapolation

	// What follows is used again for each series.
	t        []int64
	h        []native
	resets   []int32 // samples in windows before which there was a reset, ascending
	layouts  []nativeLayout
	size     []int64 // that the samples before count for, as the engine counts; one more than samples
	gauges   []int32 // how many of the samples before are gauges
	breaks   []int32 // how many of the samples up to it can't be put together with the one before
	row      []float64
	was, now histogram.FloatHistogram
	bounds   nativeBounds
}

// native is a sample: a histogram with integer counts, or with float counts.
type native struct {
	int    *histogram.Histogram
	float  *histogram.FloatHistogram
	layout int32 // of natives.layouts
	hint   histogram.CounterResetHint
	reset  bool
}

// nativeLayout is what histograms have in common, mostly many that follow each other.
type nativeLayout struct {
	schema   int32
	zero     float64 // threshold
	custom   []float64
	pos, neg nativeSide
	size     int64 // as the engine counts a histogram
	proper   bool  // natives can compute with it
}

// nativeSide are the positive or the negative buckets.
type nativeSide struct {
	spans   []histogram.Span
	from    int32 // index of the first
	to      int32 // after the last one
	buckets int
}

// maxNativeWidth bounds the indexes between the first bucket and the last.
const maxNativeWidth = 1024

// sideOf gives the side with spans; not ok if it isn't as one is.
func sideOf(spans []histogram.Span) (s nativeSide, ok bool) {
	s.spans, ok = spans, true
	at := int64(0)
	for i, sp := range spans {
		ok = ok && (i == 0 || sp.Offset >= 0)
		if at += int64(sp.Offset); i == 0 {
			s.from = int32(at) //nolint:gosec // as it was
		}
		at += int64(sp.Length)
		s.buckets += int(sp.Length)
	}
	width := at - int64(s.from)
	if ok = ok && 0 <= width && width <= maxNativeWidth && at < math.MaxInt32; ok {
		s.to = s.from + int32(width)
	}
	return s, ok
}

// nativeBounds finds whether buckets lie above the zero bucket.
type nativeBounds struct {
	schema int32
	zero   float64
	least  int32 // index that is known to
	known  bool
}

// above reports whether the bucket with an index does, of a schema, which is exponential.
func (b *nativeBounds) above(schema int32, zero float64, index int32) bool {
	if b.schema != schema || b.zero != zero {
		*b = nativeBounds{schema: schema, zero: zero}
	}
	if zero == 0 || b.known && index >= b.least {
		return true
	}
	h := histogram.FloatHistogram{Schema: schema, PositiveSpans: []histogram.Span{{Offset: index, Length: 1}}, PositiveBuckets: []float64{0}}
	it := h.PositiveBucketIterator()
	if !it.Next() || !(it.At().Upper > zero) {
		return false
	}
	b.least, b.known = index, true
	return true
}

// proper reports whether histograms with a layout can be added up by the indexes of their buckets. Of others the engine leaves
// out, or puts together, some buckets.
func (b *nativeBounds) proper(l *nativeLayout) bool {
	if histogram.IsCustomBucketsSchema(l.schema) {
		return l.neg.buckets == 0 && l.zero == 0 && !slices.ContainsFunc(l.custom, func(x float64) bool { return x-x != 0 }) &&
			(l.pos.buckets == 0 || l.pos.from >= 0 && int(l.pos.to) <= len(l.custom)+1)
	}
	return histogram.IsExponentialSchema(l.schema) && l.zero >= 0 && len(l.custom) == 0 &&
		(l.pos.buckets == 0 || b.above(l.schema, l.zero, l.pos.from)) && (l.neg.buckets == 0 || b.above(l.schema, l.zero, l.neg.from))
}

// like reports whether histograms with these layouts can be added up by the indexes of their buckets.
func (l *nativeLayout) like(o *nativeLayout) bool {
	return l == o || l.proper && o.proper && l.schema == o.schema && l.zero == o.zero && sameBounds(l.custom, o.custom)
}

func sameBounds(a, b []float64) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

func sameSpans(a, b []histogram.Span) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

func newNatives(l *Leaf) *natives {
	switch l.function() {
	case "rate", "increase", "delta":
	default:
		return nil
	}
	return &natives{
		leaf: l, counter: l.function() != "delta", stats: l.Selector.SkipHistogramBuckets,
		x: rollup.NewExtrapolation(l.function(), l.Range),
	}
}

// whole is the chunkfmt.Whole of what they need.
func (n *natives) whole(t []int64, whole []bool) {
	if n.stats {
		return
	}
	var win spans
	win.find(t, n.leaf.Grid, n.leaf.offset(), n.leaf.Range)
	for i, hi := range win.hi {
		if lo := win.lo[i]; lo < hi {
			whole[lo], whole[hi-1] = true, true
		}
	}
}

// onlyStale reports whether there are no floats but staleness markers, which range functions don't see.
func onlyStale(v []float64) bool {
	return !slices.ContainsFunc(v, func(x float64) bool { return !value.IsStaleNaN(x) })
}

// eval computes the points of a series without floats.
func (n *natives) eval(k *kernel, ls labels.Labels, cols *chunkfmt.Series, out *points, annos *annotations.Annotations) error {
	n.load(cols)
	k.frame = k.frames.of(n.t, 0)
	win := &k.frame.win
	if err := n.findResets(k.frame.held); err != nil {
		return err
	}
	g, end := n.leaf.Grid, n.leaf.Grid.Start-n.leaf.offset()
	r := 0
	for i, hi := range win.hi {
		lo := win.lo[i]
		if hi-lo >= 2 {
			for r < len(n.resets) && n.resets[r] <= lo {
				r++
			}
			if n.fits(lo, hi) {
				to := r
				for to < len(n.resets) && n.resets[to] < hi {
					to++
				}
				h, err := n.rate(out, end, lo, hi, n.resets[r:to])
				if err != nil {
					return err
				}
				out.addHistogram(i, h)
			} else if err := n.ask(k, ls, lo, hi, i, out, annos); err != nil {
				return err
			}
		}
		end += g.Step
	}
	before := n.leaf.before(n.t)
	for i, hi := range win.hi {
		if lo := win.lo[i]; lo < hi {
			k.counts.window[i] += n.size[hi] - n.size[lo]
			k.counts.read[i] += n.size[hi] - n.size[max(lo, min(before, hi))]
			before = hi
		}
	}
	return nil
}

// load makes one column of both kinds of histograms, without staleness markers.
func (n *natives) load(cols *chunkfmt.Series) {
	clear(n.h)
	n.t, n.h, n.layouts = n.t[:0], n.h[:0], n.layouts[:0]
	n.size, n.gauges, n.breaks = append(n.size[:0], 0), append(n.gauges[:0], 0), n.breaks[:0]
	ints, floats := &cols.Histograms, &cols.FloatHistograms
	for i, j := 0, 0; i < len(ints.T) || j < len(floats.T); {
		var t int64
		var one native
		if j == len(floats.T) || i < len(ints.T) && ints.T[i] < floats.T[j] {
			h := ints.H[i]
			t = ints.T[i]
			if i++; value.IsStaleNaN(h.Sum) {
				continue
			}
			one.int, one.hint = h, h.CounterResetHint
			one.layout = n.layoutOf(h.Schema, h.ZeroThreshold, h.CustomValues, h.PositiveSpans, h.NegativeSpans)
		} else {
			h := floats.H[j]
			t = floats.T[j]
			if j++; value.IsStaleNaN(h.Sum) {
				continue
			}
			one.float, one.hint = h, h.CounterResetHint
			one.layout = n.layoutOf(h.Schema, h.ZeroThreshold, h.CustomValues, h.PositiveSpans, h.NegativeSpans)
		}
		l := &n.layouts[one.layout]
		gauges, breaks := n.gauges[len(n.h)], int32(0)
		if one.hint == histogram.GaugeType {
			gauges++
		}
		if last := len(n.h) - 1; last >= 0 {
			breaks = n.breaks[last]
			if !n.layouts[n.h[last].layout].like(l) {
				breaks++
			}
		}
		n.t, n.h = append(n.t, t), append(n.h, one)
		n.size, n.gauges, n.breaks = append(n.size, n.size[len(n.size)-1]+l.size), append(n.gauges, gauges), append(n.breaks, breaks)
	}
}

// layoutOf gives the number of a layout: that of the sample before if it is the same.
func (n *natives) layoutOf(schema int32, zero float64, custom []float64, pos, neg []histogram.Span) int32 {
	last := len(n.layouts) - 1
	if last >= 0 {
		if l := &n.layouts[last]; l.schema == schema && l.zero == zero && sameBounds(l.custom, custom) && sameSpans(l.pos.spans, pos) && sameSpans(l.neg.spans, neg) {
			return int32(last) //nolint:gosec // no more than samples
		}
	}
	l := nativeLayout{schema: schema, zero: zero, custom: custom}
	const fields = 168 // of a FloatHistogram, see its Size
	if n.stats {
		l.zero, l.custom, l.size, l.proper = 0, nil, (fields+8)/16, true
	} else {
		var okPos, okNeg bool
		l.pos, okPos = sideOf(pos)
		l.neg, okNeg = sideOf(neg)
		l.size = int64(fields+8*(len(pos)+len(neg)+l.pos.buckets+l.neg.buckets+len(custom))+8) / 16
		l.proper = okPos && okNeg && n.bounds.proper(&l)
	}
	n.layouts = append(n.layouts, l)
	return int32(last + 1) //nolint:gosec // no more than samples
}

// findResets notes the resets of a counter in windows, as DetectReset of the engine's histograms has them.
func (n *natives) findResets(held []stretch) error {
	n.resets = n.resets[:0]
	if !n.counter {
		return nil
	}
	for _, in := range held {
		for i := in.from + 1; i < in.to; i++ {
			h := &n.h[i]
			switch {
			case h.hint == histogram.NotCounterReset:
			case h.hint == histogram.CounterReset:
				h.reset = true
			case n.stats && h.hint == histogram.GaugeType:
				h.reset = n.stat(i).DetectReset(n.stat(i - 1))
			case n.hollow(i) || n.hollow(i-1):
				return errHollow
			default:
				h.reset = n.h[i].whole(&n.now).DetectReset(n.h[i-1].whole(&n.was))
			}
			if h.reset {
				n.resets = append(n.resets, i)
			}
		}
	}
	return nil
}

func (n *natives) hollow(i int32) bool {
	h := n.h[i].int
	return h != nil && chunkfmt.Hollow(h)
}

// whole gives a sample with float counts, in the memory of one.
func (h *native) whole(in *histogram.FloatHistogram) *histogram.FloatHistogram {
	if h.int == nil {
		return h.float
	}
	return h.int.ToFloat(in)
}

// head are the fields of a sample that are numbers.
func (h *native) head() (count, zero, sum float64) {
	if h.int == nil {
		return h.float.Count, h.float.ZeroCount, h.float.Sum
	}
	return float64(h.int.Count), float64(h.int.ZeroCount), h.int.Sum
}

// stat gives a sample as the engine sees it where buckets aren't wanted: promql's HistogramStatsIterator.
func (n *natives) stat(i int32) *histogram.FloatHistogram {
	h := &n.h[i]
	out := &histogram.FloatHistogram{CounterResetHint: h.hint, Schema: n.layouts[h.layout].schema}
	out.Count, _, out.Sum = h.head()
	if h.hint == histogram.UnknownCounterReset {
		if out.CounterResetHint = histogram.NotCounterReset; h.reset {
			out.CounterResetHint = histogram.CounterReset
		}
	}
	return out
}

// fits says whether the window of samples lo up to, without, hi can be computed here.
func (n *natives) fits(lo, hi int32) bool {
	first, last := &n.h[lo], &n.h[hi-1]
	if !n.layouts[first.layout].proper {
		return false
	}
	if n.counter {
		return n.breaks[lo] == n.breaks[hi-1] && n.gauges[lo] == n.gauges[hi]
	}
	return first.hint == histogram.GaugeType && last.hint == histogram.GaugeType && n.layouts[first.layout].like(&n.layouts[last.layout])
}

// maxExact bounds the integers that all are floats.
const maxExact = 1 << 53

// rate of a window that ends at end, with the resets in it but before its first sample.
func (n *natives) rate(out *points, end int64, lo, hi int32, resets []int32) (*histogram.FloatHistogram, error) {
	first, last := &n.h[lo], &n.h[hi-1]
	if !n.stats && (n.hollow(lo) || n.hollow(hi-1)) {
		return nil, errHollow
	}
	firstLayout, lastLayout := &n.layouts[first.layout], &n.layouts[last.layout]
	var h histogram.FloatHistogram
	h.CounterResetHint, h.Schema, h.ZeroThreshold, h.CustomValues = histogram.GaugeType, lastLayout.schema, lastLayout.zero, lastLayout.custom
	h.Count, h.ZeroCount, h.Sum = last.head()
	firstCount, firstZero, firstSum := first.head()
	// A reset between the first and the second sample takes the first one out.
	gone := len(resets) > 0 && resets[0] == lo+1
	if gone {
		resets = resets[1:]
	} else {
		h.Count -= firstCount
		h.ZeroCount -= firstZero
		h.Sum -= firstSum
	}
	for _, r := range resets {
		if !n.stats && n.hollow(r-1) {
			return nil, errHollow
		}
		count, zero, sum := n.h[r-1].head()
		h.Count += count
		h.ZeroCount += zero
		h.Sum += sum
	}
	factor := n.x.Factor(end, int64(hi-lo), n.t[lo], n.t[hi-1], firstCount, h.Count)
	if !n.stats {
		side := func(negative bool) ([]histogram.Span, []float64) {
			of := func(h *native) *nativeSide {
				if negative {
					return &n.layouts[h.layout].neg
				}
				return &n.layouts[h.layout].pos
			}
			var from, to int32
			cover := func(s *nativeSide) {
				switch {
				case s.buckets == 0:
				case from == to:
					from, to = s.from, s.to
				default:
					from, to = min(from, s.from), max(to, s.to)
				}
			}
			cover(of(last))
			if !gone {
				cover(of(first))
			}
			for _, r := range resets {
				cover(of(&n.h[r-1]))
			}
			if from == to {
				return nil, nil
			}
			row := out.mem.floats(int(to-from), &n.row)
			if !gone && len(resets) == 0 && first.int != nil && last.int != nil && last.int.Count < maxExact && first.int.Count < maxExact &&
				firstLayout == lastLayout && len(of(last).spans) == 1 {
				// Many are so: the difference of integers is exact.
				a, b := last.int.PositiveBuckets, first.int.PositiveBuckets
				if negative {
					a, b = last.int.NegativeBuckets, first.int.NegativeBuckets
				}
				run := int64(0)
				b = b[:len(a)]
				for i := range row[:len(a)] {
					run += a[i] - b[i]
					row[i] = float64(run) * factor
				}
			} else {
				clear(row)
				last.add(row, of(last), from, negative, 1)
				if !gone {
					first.add(row, of(first), from, negative, -1)
				}
				for _, r := range resets {
					n.h[r-1].add(row, of(&n.h[r-1]), from, negative, 1)
				}
				for i := range row {
					row[i] *= factor
				}
			}
			return out.mem.side(row, from)
		}
		h.PositiveSpans, h.PositiveBuckets = side(false)
		if firstLayout.neg.buckets+lastLayout.neg.buckets > 0 || len(resets) > 0 {
			h.NegativeSpans, h.NegativeBuckets = side(true)
		}
	}
	h.Count *= factor
	h.ZeroCount *= factor
	h.Sum *= factor
	return out.mem.put(&h), nil
}

// add puts the buckets of a side, times sign, to a row whose first element is that of index from.
func (h *native) add(row []float64, s *nativeSide, from int32, negative bool, sign float64) {
	b, at := 0, -from
	if h.int == nil {
		buckets := h.float.PositiveBuckets
		if negative {
			buckets = h.float.NegativeBuckets
		}
		for _, sp := range s.spans {
			at += sp.Offset
			for range sp.Length {
				row[at] += buckets[b] * sign
				at++
				b++
			}
		}
		return
	}
	buckets := h.int.PositiveBuckets
	if negative {
		buckets = h.int.NegativeBuckets
	}
	run := 0.0
	for _, sp := range s.spans {
		at += sp.Offset
		for range sp.Length {
			run += float64(buckets[b])
			row[at] += run * sign
			at++
			b++
		}
	}
}

// ask has the engine's function do a window.
func (n *natives) ask(k *kernel, ls labels.Labels, lo, hi int32, step int, out *points, annos *annotations.Annotations) error {
	hs := make([]promql.HPoint, 0, hi-lo)
	for i := lo; i < hi; i++ {
		switch {
		case n.stats:
			hs = append(hs, promql.HPoint{T: n.t[i], H: n.stat(i)})
		case n.hollow(i):
			return errHollow
		case n.h[i].int != nil:
			hs = append(hs, promql.HPoint{T: n.t[i], H: n.h[i].int.ToFloat(nil)})
		default:
			hs = append(hs, promql.HPoint{T: n.t[i], H: n.h[i].float.Copy()})
		}
	}
	if k.call == nil {
		k.call = newCaller(k.leaf, k.starts)
	}
	return k.call.window(ls, nil, hs, &promql.StartTimestamps{}, step, out, annos)
}

package plan

import (
	"math"
	"runtime"
	"slices"
	"sync"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// kernel computes a leaf's function for one series after the other. It is for one
// goroutine.
type kernel struct {
	leaf *Leaf
	// starts: the function looks at start timestamps.
	starts bool
	fast   func(k *kernel, t []int64, v []float64, out *points)
	// counter: fast wants to know of counter resets.
	counter bool
	counts  counts // of all series so far, once done
	frames  *frames

	// What follows is used again for each series.
	frame  *frame
	t      []int64 // without staleness markers
	v      []float64
	blocks []block   // of sums
	best   []float64 // of blocks: the greatest or the least
	marks  []int32
	falls  bool // there may be values less than those before that aren't in marks, or NaNs
	call   *caller

	natives *natives // nil: the function is none of theirs

	// The points that were computed last, while they are there, and the values that they are of.
	given  *points
	values uint64
}

// known is what is known of the floats of a series: see merge.Buffer.
type known struct {
	times, values uint64
	falls         []history.Span
}

// unknown is what is known of any floats.
func unknown(cols *chunkfmt.Series) known {
	return known{falls: []history.Span{{To: len(cols.Floats.V)}}}
}

// framesOf are frames of leaves that have been computed, for their memory.
//
//nolint:gochecknoglobals // scratch memory
var framesOf = sync.Pool{New: func() any { return &frames{index: map[frameKey]*frame{}, named: map[uint64]*frame{}} }}

func newKernel(l *Leaf, o options) *kernel {
	k := &kernel{leaf: l, fast: kernels[l.function()], counts: newCounts(l.Grid.Len()), natives: newNatives(l)}
	var uses uses
	switch l.function() {
	case "rate", "increase":
		k.starts, k.counter, uses.rates = o.startTimestamps, true, true
	case "resets":
		k.starts, k.counter = o.startTimestamps, true
	case "irate":
		k.starts = o.startTimestamps
	case "delta":
		uses.rates = true
	case "sum_over_time", "avg_over_time", "max_over_time", "min_over_time":
		uses.blocks = l.Range > 2*l.Grid.Step
	}
	k.frames, _ = framesOf.Get().(*frames)
	k.frames.leaf, k.frames.uses, k.frames.counts = l, uses, &k.counts
	return k
}

// done makes counts whole. The kernel is of no use after it.
func (k *kernel) done() {
	k.frames.clear()
	framesOf.Put(k.frames)
	k.frames, k.frame = nil, nil
}

// kernels over floats alone, without start timestamps. All others are the
// engine's functions.
//
//nolint:gochecknoglobals // a constant table
var kernels = map[string]func(k *kernel, t []int64, v []float64, out *points){
	"rate":              (*kernel).rate,
	"increase":          (*kernel).rate,
	"delta":             (*kernel).rate,
	"irate":             (*kernel).instantRate,
	"idelta":            (*kernel).instantRate,
	"count_over_time":   (*kernel).count,
	"present_over_time": (*kernel).present,
	"absent_over_time":  (*kernel).present,
	"last_over_time":    (*kernel).last,
	"first_over_time":   (*kernel).first,
	"max_over_time":     (*kernel).extreme,
	"min_over_time":     (*kernel).extreme,
	"sum_over_time":     (*kernel).sum,
	"avg_over_time":     (*kernel).sum,
	"changes":           (*kernel).changes,
	"resets":            (*kernel).changes,
}

// eval computes the points of one series. cols aren't changed or kept; out has to stay as it is until the next eval, or
// given is to be set to nil.
func (k *kernel) eval(ls labels.Labels, cols *chunkfmt.Series, of known, out *points, annos *annotations.Annotations) (err error) {
	given := k.given
	if k.given = nil; given == out {
		given = nil
	}
	out.reset()
	out.mem.again = k.leaf.Agg != nil // which keeps none
	histograms := len(cols.Histograms.T)+len(cols.FloatHistograms.T) > 0
	switch {
	case histograms && k.natives != nil && onlyStale(cols.Floats.V) && (!k.starts || cols.Histograms.ST == nil && cols.FloatHistograms.ST == nil):
		return k.natives.eval(k, ls, cols, out, annos)
	case histograms && k.leaf.Selector.SkipHistogramBuckets:
		return ErrGiveUp // the engine's hints of counter resets depend on how it iterates
	case slices.ContainsFunc(cols.Histograms.H, chunkfmt.Hollow):
		return errHollow
	case k.leaf.Call == nil && !histograms:
		k.instant(cols.Floats.T, cols.Floats.V, of.times, out)
	case k.leaf.Call == nil:
		k.instantMixed(cols, out)
	case k.fast != nil && !histograms && (!k.starts || cols.Floats.ST == nil):
		if given != nil && of.values != 0 && of.values == k.values {
			out.step, out.v = append(out.step, given.step...), append(out.v, given.v...)
		} else {
			k.column(cols.Floats.T, cols.Floats.V, &of, out)
		}
		k.frame.series++
		k.given, k.values = out, of.values
	default:
		if k.call == nil {
			k.call = newCaller(k.leaf, k.starts)
		}
		return k.call.eval(ls, cols, out, annos, &k.counts)
	}
	return nil
}

// column is fast of the floats of a series.
func (k *kernel) column(t []int64, v []float64, of *known, out *points) {
	k.frame = k.frames.of(t, of.times)
	stale := k.stale
	if k.counter {
		stale = k.markResets // in the same pass
	}
	if stale(v, of.falls) {
		t, v = k.withoutStale(t, v)
		k.frame = k.frames.of(t, 0)
		if k.counter {
			k.markResets(v, []history.Span{{To: len(v)}})
		}
	}
	k.fast(k, t, v, out)
}

// stale reports whether there is a staleness marker in a window. Values that are NaN are in falls.
func (k *kernel) stale(v []float64, falls []history.Span) bool {
	for _, in := range k.frame.held {
		for _, fall := range falls {
			for i := max(int(in.from), fall.From); i < min(int(in.to), fall.To); i++ {
				if v[i] != v[i] && value.IsStaleNaN(v[i]) {
					return true
				}
			}
		}
	}
	return false
}

// withoutStale gives the columns without staleness markers, which range functions
// don't see.
func (k *kernel) withoutStale(t []int64, v []float64) ([]int64, []float64) {
	k.t, k.v = k.t[:0], k.v[:0]
	for i, x := range v {
		if !value.IsStaleNaN(x) {
			k.t, k.v = append(k.t, t[i]), append(k.v, x)
		}
	}
	return k.t, k.v
}

// instant is the evaluation of a plain selector: the newest sample in the
// window, unless that is a staleness marker.
func (k *kernel) instant(t []int64, v []float64, times uint64, out *points) {
	k.frame = k.frames.of(t, times)
	win := &k.frame.win
	for i, hi := range win.hi {
		if hi > win.lo[i] && !value.IsStaleNaN(v[hi-1]) {
			out.add(i, v[hi-1])
			k.counts.point(i, 1)
		}
	}
}

// instantMixed is instant for a series that has histograms.
func (k *kernel) instantMixed(cols *chunkfmt.Series, out *points) {
	g, offset, rng := k.leaf.Grid, k.leaf.offset(), k.leaf.Range
	var f, h, fh spans
	f.find(cols.Floats.T, g, offset, rng)
	h.find(cols.Histograms.T, g, offset, rng)
	fh.find(cols.FloatHistograms.T, g, offset, rng)
	var was *histogram.FloatHistogram // the histogram at wasT
	wasT := int64(math.MinInt64)
	for i := range g.Len() {
		kind, t := chunkenc.ValNone, int64(math.MinInt64)
		newest := func(s *spans, ts []int64, is chunkenc.ValueType) {
			if s.hi[i] > s.lo[i] && ts[s.hi[i]-1] > t {
				kind, t = is, ts[s.hi[i]-1]
			}
		}
		newest(&f, cols.Floats.T, chunkenc.ValFloat)
		newest(&h, cols.Histograms.T, chunkenc.ValHistogram)
		newest(&fh, cols.FloatHistograms.T, chunkenc.ValFloatHistogram)
		switch kind {
		case chunkenc.ValFloat:
			if v := cols.Floats.V[f.hi[i]-1]; !value.IsStaleNaN(v) {
				out.add(i, v)
				k.counts.point(i, 1)
			}
			continue
		case chunkenc.ValHistogram:
			if t != wasT {
				wasT, was = t, out.mem.float(cols.Histograms.H[h.hi[i]-1])
			}
		case chunkenc.ValFloatHistogram:
			if t != wasT {
				wasT, was = t, out.mem.copy(cols.FloatHistograms.H[fh.hi[i]-1])
			}
		default:
			continue
		}
		if !value.IsStaleNaN(was.Sum) {
			out.addHistogram(i, was)
			k.counts.point(i, histogramSize(was))
		}
	}
}

// histogramSize is what the engine counts a histogram for: promql's HPoint.size.
func histogramSize(h *histogram.FloatHistogram) int {
	return (h.Size() + 8) / 16
}

// caller gives windows of points to the engine's own functions.
type caller struct {
	leaf   *Leaf
	starts bool
	fn     promql.FunctionCall
	args   parser.Expressions
	params []promql.Vector

	floats []promql.FPoint
	ftime  []int64 // their times, side by side
	fst    []int64
	fwin   spans
	hists  []promql.HPoint
	hst    []int64
	htime  []int64
	hwin   spans
	hsize  []int64 // what the histograms before count for; one more
	mem    nativeMemory
	one    promql.Matrix
	enh    promql.EvalNodeHelper
}

func newCaller(l *Leaf, starts bool) *caller {
	c := &caller{leaf: l, starts: starts, mem: nativeMemory{again: true}, fn: promql.FunctionCalls[l.function()], args: l.Call.Args, one: make(promql.Matrix, 1)}
	if l.function() == "absent_over_time" {
		c.fn = promql.FunctionCalls["present_over_time"] // what is absent is found out at the end
	}
	for _, p := range l.params {
		c.params = append(c.params, promql.Vector{promql.Sample{F: p}})
	}
	c.enh.Out = make(promql.Vector, 0, 1)
	return c
}

func (c *caller) eval(ls labels.Labels, cols *chunkfmt.Series, out *points, annos *annotations.Annotations, n *counts) (err error) {
	c.load(cols)
	g, offset := c.leaf.Grid, c.leaf.offset()
	c.fwin.find(c.ftime, g, offset, c.leaf.Range)
	c.hwin.find(c.htime, g, offset, c.leaf.Range)
	n.floats(&c.fwin, c.ftime, c.leaf, 1)
	before := c.leaf.before(c.htime)
	for i := range g.Len() {
		fs := c.floats[c.fwin.lo[i]:c.fwin.hi[i]:c.fwin.hi[i]]
		hs := c.hists[c.hwin.lo[i]:c.hwin.hi[i]:c.hwin.hi[i]]
		if len(fs)+len(hs) == 0 {
			continue
		}
		lo, hi := c.hwin.lo[i], c.hwin.hi[i]
		n.window[i] += c.hsize[hi] - c.hsize[lo]
		n.read[i] += c.hsize[hi] - c.hsize[max(lo, min(before, hi))]
		before = hi
		var st promql.StartTimestamps
		if c.fst != nil {
			st.Floats = c.fst[c.fwin.lo[i]:c.fwin.hi[i]:c.fwin.hi[i]]
		}
		if c.hst != nil {
			st.Histograms = c.hst[lo:hi:hi]
		}
		if err := c.window(ls, fs, hs, &st, i, out, annos); err != nil {
			return err
		}
	}
	return nil
}

// window calls the function for the window of a step.
func (c *caller) window(ls labels.Labels, fs []promql.FPoint, hs []promql.HPoint, st *promql.StartTimestamps, step int, out *points, annos *annotations.Annotations) (err error) {
	defer func() {
		// Functions panic with what is to fail the query. Which of two errors a
		// query fails with is up to the engine: it runs into the same.
		switch p := recover().(type) {
		case nil:
		case runtime.Error: // a bug
			panic(p)
		default:
			err = ErrGiveUp
		}
	}()
	c.one[0] = promql.Series{Metric: ls, Floats: fs, Histograms: hs}
	c.enh.Ts, c.enh.StartTimestamps = c.leaf.Grid.At(step), nil
	if c.starts {
		c.enh.StartTimestamps = st
	}
	vec, ws := c.fn(c.params, c.one, c.args, &c.enh)
	annos.Merge(ws)
	c.enh.Out = vec[:0]
	if len(vec) == 0 {
		return nil
	}
	if h := vec[0].H; h != nil {
		out.addHistogram(step, h)
	} else {
		out.add(step, vec[0].F)
	}
	return nil
}

// load makes points of columns, without staleness markers.
func (c *caller) load(cols *chunkfmt.Series) {
	c.floats, c.ftime, c.fst = c.floats[:0], c.ftime[:0], c.fst[:0]
	for i, v := range cols.Floats.V {
		if value.IsStaleNaN(v) {
			continue
		}
		c.floats, c.ftime = append(c.floats, promql.FPoint{T: cols.Floats.T[i], F: v}), append(c.ftime, cols.Floats.T[i])
		if cols.Floats.ST != nil {
			c.fst = append(c.fst, cols.Floats.ST[i])
		}
	}
	if cols.Floats.ST == nil {
		c.fst = nil
	}
	clear(c.hists)
	c.hists, c.htime, c.hst, c.hsize = c.hists[:0], c.htime[:0], c.hst[:0], append(c.hsize[:0], 0)
	c.mem.reset()
	ints, floats := &cols.Histograms, &cols.FloatHistograms
	if len(ints.T)+len(floats.T) == 0 {
		c.hst = nil
		return
	}
	starts := ints.ST != nil || floats.ST != nil
	add := func(t int64, st []int64, i int, h *histogram.FloatHistogram) {
		if value.IsStaleNaN(h.Sum) {
			return
		}
		c.hists, c.htime = append(c.hists, promql.HPoint{T: t, H: h}), append(c.htime, t)
		c.hsize = append(c.hsize, c.hsize[len(c.hsize)-1]+int64(histogramSize(h)))
		switch {
		case st != nil:
			c.hst = append(c.hst, st[i])
		case starts:
			c.hst = append(c.hst, 0)
		}
	}
	for i, j := 0, 0; i < len(ints.T) || j < len(floats.T); {
		if j == len(floats.T) || i < len(ints.T) && ints.T[i] < floats.T[j] {
			add(ints.T[i], ints.ST, i, c.mem.float(ints.H[i]))
			i++
		} else {
			add(floats.T[j], floats.ST, j, c.mem.copy(floats.H[j]))
			j++
		}
	}
	if !starts {
		c.hst = nil
	}
}

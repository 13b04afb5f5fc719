package rollup

import (
	"math"
	"slices"

	"github.com/prometheus/prometheus/util/kahansum"
)

// Evaluator computes one query, for one series after the other. It has memory that
// it uses again, and is not for concurrent use.
type Evaluator struct {
	q       Query
	f       function
	width   int64
	columns Columns
	whole   int64 // what whole windows take up of the range
	rest    int64 // and what sticks out at its old end
	useless Flags // of windows

	tally tally // of Samples

	out *Result
	w   *Windows // of the series
	// contiguous: there are windows, and none is missing between the first and the last. The
	// newest that may be in the i-th range is then window i*stride-before.
	contiguous     bool
	before, stride int
	// aligned: besides each range is one window, and all are of use. What is by step
	// below isn't set then.
	aligned bool

	// By step: which windows are in the range, and how many floats of the one before
	// those are, or edgeRaw.
	lo, hi []int32
	edge   []uint8

	dense Windows
	cum   []int64 // so many floats are before a window
	marks []int32 // windows that have resets, or begin with one
	lost  []float64
	acts  []int64 // changes, or resets, up to a window
	fore  []partSum
	aft   []partSum
}

// edgeRaw is for a step that needs the samples.
const edgeRaw = 255

// partSum is a sum, or in v alone an extreme, of several windows.
type partSum struct {
	v, c float64
}

// NewEvaluator makes one for windows of a width, in ms. It reports false if such
// windows can't answer the query.
func NewEvaluator(q Query, width int64) (*Evaluator, bool) {
	columns, ok := q.Columns(width)
	if !ok {
		return nil, false
	}
	e := &Evaluator{q: q, f: functions[q.Function], width: width, columns: columns, tally: newTally(q.Steps)}
	e.whole, e.rest = q.Range-q.Range%width, q.Rest(width)
	e.useless = NativeHistograms | e.f.needs
	if e.f.starts && q.StartTimestamps {
		e.useless |= StartTimestamps
	}
	return e, true
}

// Columns that windows need to have.
func (e *Evaluator) Columns() Columns { return e.columns }

// Eval puts the points of a series into out, which is emptied before. Windows aren't changed, but for an Expand; they are those
// that lie, or have a part, in the ranges, and there may be others.
func (e *Evaluator) Eval(w *Windows, out *Result) {
	e.w, e.out = w, out
	n := min(e.q.Steps, w.Len()) // more or less
	out.Step, out.Value, out.Raw = slices.Grow(out.Step[:0], n), slices.Grow(out.Value[:0], n), out.Raw[:0]
	if len(w.Even) > 0 {
		if e.evenly() {
			return
		}
		w.Expand(e.columns)
	}
	e.columnwise()
	e.note()
}

// columnwise is Eval with all columns at hand.
func (e *Evaluator) columnwise() {
	w, out := e.w, e.out
	if e.q.Function != "" { // that sees staleness markers
		e.densify()
	}
	e.place()
	useless := e.anyUseless(w)
	if e.aligned = e.contiguous && !useless && e.f.rates && e.q.Range == e.width; e.aligned {
		e.rateOfWindows()
		return
	}
	e.find()
	if useless {
		e.forbid(w)
	}
	for i, n := range e.edge {
		if n == edgeRaw {
			out.Raw = append(out.Raw, int32(i)) //nolint:gosec // a slice has fewer
		}
	}
	had := len(out.Raw)
	e.f.run(e)
	if len(out.Raw) > had {
		slices.Sort(out.Raw)
	}
}

// densify leaves out windows without floats.
func (e *Evaluator) densify() {
	w := e.w
	if !slices.Contains(w.Count, 0) {
		return
	}
	e.dense.Clear()
	for i := 0; i < len(w.Count); {
		j := i
		for j < len(w.Count) && w.Count[j] > 0 {
			j++
		}
		e.dense.Append(w, i, j, e.columns)
		i = j + 1
	}
	e.w = &e.dense
}

// place sets contiguous, before and stride.
func (e *Evaluator) place() {
	end := e.w.End
	k := len(end)
	e.contiguous = k > 0 && end[k-1]-end[0] == int64(k-1)*e.width
	if e.contiguous {
		e.before, e.stride = int((end[0]-e.q.Start)/e.width), int(e.q.Step/e.width)
	}
}

// anyUseless says whether there are windows that are of no use.
func (e *Evaluator) anyUseless(w *Windows) bool {
	any := Flags(0)
	for _, f := range w.Flags {
		any |= f
	}
	return any&e.useless != 0
}

// steps are the first step, if aligned, whose range is one of the windows, and the step behind
// the last.
func (e *Evaluator) steps() (from, to int) {
	last := len(e.w.End) - 1 + e.before // as far from the first step's window
	if last < 0 || e.before > 0 && e.stride == 0 {
		return 0, 0
	}
	to = e.q.Steps
	if e.stride > 0 { // several steps
		from = (max(0, e.before) + e.stride - 1) / e.stride
		to = min(to, last/e.stride+1)
	}
	return from, max(from, to)
}

// find sets lo, hi and edge.
func (e *Evaluator) find() {
	n, end := e.q.Steps, e.w.End
	e.lo, e.hi, e.edge = resize(e.lo, n), resize(e.hi, n), resize(e.edge, n)
	clear(e.edge)
	if e.contiguous {
		line(e.hi, 1-e.before, e.stride, len(end))
		line(e.lo, 1-e.before-int(e.whole/e.width), e.stride, len(end))
	} else {
		e.search()
	}
	if e.rest > 0 {
		from := e.q.Start - e.whole
		for i, lo := range e.lo {
			if lo > 0 && end[lo-1] == from {
				e.edge[i] = e.sticksInto(int(lo)-1, from-e.rest)
			}
			from += e.q.Step
		}
	}
	e.cum = resize(e.cum, len(end)+1)
	e.cum[0] = 0
	sum, cum := int64(0), e.cum[1:]
	for j, c := range e.w.Count {
		sum += int64(c)
		cum[j] = sum
	}
}

// line sets s[i] to at + i·step, but no less than 0 and no more than most. step isn't
// negative.
func line(s []int32, at, step, most int) {
	i := 0
	for ; i < len(s) && at < 0; i++ {
		s[i] = 0
		at += step
	}
	for ; i < len(s) && at < most; i++ {
		s[i] = int32(at) //nolint:gosec // an index of a slice
		at += step
	}
	for ; i < len(s); i++ {
		s[i] = int32(most) //nolint:gosec // the length of a slice
	}
}

// search sets lo and hi where windows are missing.
func (e *Evaluator) search() {
	end := e.w.End
	lo, hi, t := 0, 0, e.q.Start
	for i := range e.lo {
		for hi < len(end) && end[hi] <= t {
			hi++
		}
		for from := t - e.whole; lo < hi && end[lo] <= from; {
			lo++
		}
		e.lo[i], e.hi[i] = int32(lo), int32(hi) //nolint:gosec // a slice has fewer
		t += e.q.Step
	}
}

// sticksInto is how many floats of a window are later than a time within it.
func (e *Evaluator) sticksInto(window int, after int64) uint8 {
	w := e.w
	switch n := w.Count[window]; {
	case w.LastT[window] <= after:
		return 0
	case n == 1 || w.PrevT[window] <= after:
		return 1
	case n == 2:
		return 2
	}
	return edgeRaw
}

// forbid steps in whose ranges there are windows that are of no use.
func (e *Evaluator) forbid(w *Windows) {
	k, t := 0, e.q.Start
	worst := int64(math.MinInt64)
	for i := range e.edge {
		for ; k < len(w.End) && w.End[k] <= t; k++ {
			if w.Flags[k]&e.useless != 0 {
				worst = w.End[k]
			}
		}
		if worst > t-e.q.Range {
			e.edge[i] = edgeRaw
		}
		t += e.q.Step
	}
}

// Samples adds, for the series evaluated since it was called last, how many floats are in each
// step's range, and of those how many weren't in the range of the step before, not
// even for the first step. Of ranges that are no whole windows, of functions that look at
// the newest floats alone, the ones looked at are counted. Steps that need the
// samples are left out.
func (e *Evaluator) Samples(window, read []int64) {
	e.tally.into(window, read)
}

// tally is what Samples gives.
type tally struct {
	window, read []int64 // by step
	// What steps have more than the one before, besides.
	windowMore, readMore []int64
}

func newTally(steps int) tally {
	all := make([]int64, 4*steps+2)
	return tally{all[:steps], all[steps : 2*steps], all[2*steps : 3*steps+1], all[3*steps+1:]}
}

// add counts for each of the steps from up to, without, to.
func (t *tally) add(from, to int, window, read int64) {
	t.windowMore[from] += window
	t.windowMore[to] -= window
	t.readMore[from] += read
	t.readMore[to] -= read
}

// into adds all to others, and begins anew.
func (t *tally) into(window, read []int64) {
	w, r := int64(0), int64(0)
	for i := range t.window {
		w += t.windowMore[i]
		r += t.readMore[i]
		window[i] += w + t.window[i]
		read[i] += r + t.read[i]
	}
	clear(t.window)
	clear(t.read)
	clear(t.windowMore)
	clear(t.readMore)
}

// note puts into tally what is to be counted of the series.
func (e *Evaluator) note() {
	window, read := e.tally.window, e.tally.read
	if e.f.tail && (e.q.Function == "" || e.q.Range != e.whole) {
		n := int64(1)
		if e.columns&Prev != 0 {
			n = 2
		}
		for _, i := range e.out.Step {
			window[i] += n
			read[i] += n
		}
		return
	}
	if e.aligned {
		from, to := e.steps()
		j := from*e.stride - e.before
		for i := from; i < to; i++ {
			n := int64(e.w.Count[j])
			window[i] += n
			read[i] += n
			j += e.stride
		}
		return
	}
	window, read = window[:len(e.hi)], read[:len(e.hi)]
	if e.q.Step >= e.q.Range { // nothing is in two ranges
		for i, n := range e.edge {
			if n != edgeRaw {
				all := e.cum[e.hi[i]] - e.cum[e.lo[i]] + int64(n)
				window[i] += all
				read[i] += all
			}
		}
		return
	}
	before := int32(0)
	for before < int32(len(e.w.End)) && e.w.End[before] <= e.q.Start-e.q.Step { //nolint:gosec // a slice has fewer
		before++
	}
	for i, hi := range e.hi {
		if n := e.edge[i]; n != edgeRaw {
			lo := e.lo[i]
			window[i] += e.cum[hi] - e.cum[lo] + int64(n)
			read[i] += e.cum[hi] - e.cum[max(lo, before)]
		}
		before = hi
	}
}

func resize[E any](s []E, n int) []E { return slices.Grow(s[:0], n)[:n] }

// The functions below are those of Prometheus's engine (promql/functions.go).

// instant is the value of the newest sample, unless that is a staleness marker or
// too old.
func (e *Evaluator) instant() {
	w, t := e.w, e.q.Start
	for i, hi := range e.hi {
		if hi > 0 && w.Flags[hi-1]&Stale == 0 && e.edge[i] != edgeRaw && w.LastT[hi-1] > t-e.q.Range {
			e.out.add(i, w.LastV[hi-1])
		}
		t += e.q.Step
	}
}

// last is last_over_time(), present_over_time() and absent_over_time().
func (e *Evaluator) last() {
	w, t := e.w, e.q.Start
	value := e.q.Function == "last_over_time"
	for i, hi := range e.hi {
		if hi > 0 && e.edge[i] != edgeRaw && w.LastT[hi-1] > t-e.q.Range {
			if value {
				e.out.add(i, w.LastV[hi-1])
			} else {
				e.out.add(i, 1)
			}
		}
		t += e.q.Step
	}
}

// instantRate is irate() and idelta().
func (e *Evaluator) instantRate() {
	w, t := e.w, e.q.Start
	isRate := e.q.Function == "irate"
	for i, hi := range e.hi {
		after := t - e.q.Range
		t += e.q.Step
		k := int(hi) - 1
		if k < 0 || e.edge[i] == edgeRaw || w.LastT[k] <= after {
			continue
		}
		prevT, prevV := w.PrevT[k], w.PrevV[k]
		if w.Count[k] == 1 {
			if k == 0 {
				continue
			}
			prevT, prevV = w.LastT[k-1], w.LastV[k-1]
		}
		if prevT <= after {
			continue
		}
		v := w.LastV[k]
		if !isRate || !(v < prevV) {
			v -= prevV
		}
		if isRate {
			v /= float64(w.LastT[k]-prevT) / 1000
		}
		e.out.add(i, v)
	}
}

func (e *Evaluator) first() {
	w := e.w
	for i, lo := range e.lo {
		switch e.edge[i] {
		case 0:
			if lo < e.hi[i] {
				e.out.add(i, w.FirstV[lo])
			}
		case 1:
			e.out.add(i, w.LastV[lo-1])
		case 2:
			e.out.add(i, w.PrevV[lo-1])
		}
	}
}

func (e *Evaluator) count() {
	for i, lo := range e.lo {
		if edge := e.edge[i]; edge != edgeRaw {
			if n := e.cum[e.hi[i]] - e.cum[lo] + int64(edge); n > 0 {
				e.out.add(i, float64(n))
			}
		}
	}
}

// changes is changes() and resets().
func (e *Evaluator) changes() {
	w := e.w
	counts, counted := w.Changes, differ
	if e.q.Function == "resets" {
		counts, counted = w.Resets, func(prev, cur float64) bool { return cur < prev }
	}
	one := func(prev, cur float64) int64 {
		if counted(prev, cur) {
			return 1
		}
		return 0
	}
	e.acts = append(e.acts[:0], 0)
	sum := int64(0)
	for j, n := range counts {
		if j > 0 {
			sum += one(w.LastV[j-1], w.FirstV[j])
		}
		sum += int64(n)
		e.acts = append(e.acts, sum)
	}
	for i, lo := range e.lo {
		hi, edge := e.hi[i], e.edge[i]
		if edge == edgeRaw || lo == hi && edge == 0 {
			continue
		}
		n := int64(0)
		if lo < hi {
			n = e.acts[hi] - e.acts[lo+1] + int64(counts[lo])
			if edge > 0 {
				n += one(w.LastV[lo-1], w.FirstV[lo])
			}
		}
		if edge == 2 {
			n += one(w.PrevV[lo-1], w.LastV[lo-1])
		}
		e.out.add(i, float64(n))
	}
}

// findResets sets marks and lost: of a window that begins with a reset, what was
// lost by that, too.
func (e *Evaluator) findResets() {
	w := e.w
	e.marks, e.lost = e.marks[:0], e.lost[:0]
	last := math.Inf(-1)
	for j, first := range w.FirstV {
		if lost := w.Reset[j]; first < last || lost != 0 {
			if first < last {
				lost += last
			}
			e.marks = append(e.marks, int32(j)) //nolint:gosec // a slice has fewer
			e.lost = append(e.lost, lost)
		}
		last = w.LastV[j]
	}
}

// rate is rate(), increase() and delta().
func (e *Evaluator) rate() {
	w := e.w
	counter := e.q.Function != "delta"
	x := NewExtrapolation(e.q.Function, e.q.Range)
	e.marks = e.marks[:0]
	if counter {
		e.findResets()
	}
	r, t := 0, e.q.Start-e.q.Step
	for i, lo := range e.lo {
		t += e.q.Step
		hi, edge := e.hi[i], e.edge[i]
		if edge == edgeRaw {
			continue
		}
		n := e.cum[hi] - e.cum[lo] + int64(edge)
		if n < 2 {
			continue
		}
		var firstT, lastT int64
		var firstV, lastV float64
		if lo < hi {
			firstT, firstV, lastT, lastV = w.FirstT[lo], w.FirstV[lo], w.LastT[hi-1], w.LastV[hi-1]
		} else {
			lastT, lastV = w.LastT[lo-1], w.LastV[lo-1]
		}
		switch edge {
		case 1:
			firstT, firstV = w.LastT[lo-1], w.LastV[lo-1]
		case 2:
			firstT, firstV = w.PrevT[lo-1], w.PrevV[lo-1]
		}
		result := lastV - firstV
		if counter {
			if edge == 2 && w.LastV[lo-1] < firstV {
				result += firstV
			}
			if edge > 0 && lo < hi && w.FirstV[lo] < w.LastV[lo-1] {
				result += w.LastV[lo-1]
			}
			for r < len(e.marks) && e.marks[r] < lo {
				r++
			}
			for k := r; k < len(e.marks) && e.marks[k] < hi; k++ {
				lost := e.lost[k]
				if e.marks[k] == lo {
					lost = w.Reset[lo] // what it begins with is not in the range, or has been seen to
				}
				if lost != 0 { // -0 stays
					result += lost
				}
			}
		}
		e.out.add(i, x.Result(t, n, firstT, lastT, firstV, result))
	}
}

// rateOfWindows is rate where each range is one window.
func (e *Evaluator) rateOfWindows() {
	x := NewExtrapolation(e.q.Function, e.q.Range)
	n := len(e.w.End)
	counts, reset := e.w.Count[:n], e.w.Reset
	if !x.counter {
		reset = nil
	}
	firstT, firstV, lastT, lastV := e.w.FirstT[:n], e.w.FirstV[:n], e.w.LastT[:n], e.w.LastV[:n]
	from, to := e.steps()
	steps, values := resize(e.out.Step, to-from), resize(e.out.Value, to-from)
	k, j, t := 0, from*e.stride-e.before, e.q.Start+int64(from)*e.q.Step
	for i := from; i < to; i++ {
		if counts[j] > 1 {
			increase := lastV[j] - firstV[j]
			if reset != nil && reset[j] != 0 { // -0 stays
				increase += reset[j]
			}
			steps[k] = int32(i) //nolint:gosec // a slice has fewer
			values[k] = x.Result(t, int64(counts[j]), firstT[j], lastT[j], firstV[j], increase)
			k++
		}
		j += e.stride
		t += e.q.Step
	}
	e.out.Step, e.out.Value = steps[:k], values[:k]
}

// overlapping: ranges share so much that it pays to put them together from parts.
func (e *Evaluator) overlapping() bool { return e.whole > 4*e.width && e.q.Range > 2*e.q.Step }

// parts puts windows together in pieces of time as long as the ranges: in aft[j] is
// window j with all behind it in its piece, in fore[j] with all before it. A range
// is the end of one piece and the beginning of the next. (M. van Herk, "A fast algorithm
// for local minimum and maximum filters on rectangular and octagonal kernels", 1992.)
func (e *Evaluator) parts(one func(j int) partSum, both func(a, b partSum) partSum) {
	n := len(e.w.End)
	e.fore, e.aft = resize(e.fore, n), resize(e.aft, n)
	end := int64(math.MinInt64)
	for j, t := range e.w.End {
		e.fore[j] = one(j)
		if t <= end {
			e.fore[j] = both(e.fore[j-1], e.fore[j])
		} else {
			end = EndOf(t, e.whole)
		}
	}
	start := int64(math.MaxInt64)
	for j := n - 1; j >= 0; j-- {
		e.aft[j] = one(j)
		if t := e.w.End[j]; t > start {
			e.aft[j] = both(e.aft[j], e.aft[j+1])
		} else {
			start = EndOf(t, e.whole) - e.whole
		}
	}
}

// over puts the windows of each range together, if there are any.
func (e *Evaluator) over(one func(j int) partSum, both func(a, b partSum) partSum, add func(i int, p partSum)) {
	parted := e.overlapping()
	if parted {
		e.parts(one, both)
	}
	t := e.q.Start - e.q.Step
	for i, lo := range e.lo {
		t += e.q.Step
		hi, edge := e.hi[i], e.edge[i]
		if edge == edgeRaw || lo == hi && edge == 0 {
			continue
		}
		var p partSum
		some := lo < hi
		switch cut := EndOf(t-e.whole+1, e.whole); { // the only one in the range
		case !some:
		case !parted:
			p = one(int(lo))
			for j := lo + 1; j < hi; j++ {
				p = both(p, one(int(j)))
			}
		case e.w.End[lo] > cut:
			p = e.fore[hi-1]
		case e.w.End[hi-1] <= cut:
			p = e.aft[lo]
		default:
			p = both(e.aft[lo], e.fore[hi-1])
		}
		if edge > 0 {
			k := lo - 1
			q := partSum{v: e.w.LastV[k]}
			if edge == 2 {
				q = both(partSum{v: e.w.PrevV[k]}, q)
			}
			if some {
				q = both(q, p)
			}
			p = q
		}
		add(i, p)
	}
}

// extreme is max_over_time() and min_over_time().
func (e *Evaluator) extreme() {
	column, both := e.w.Max, func(a, b partSum) partSum {
		if b.v > a.v || a.v != a.v {
			return b
		}
		return a
	}
	if e.q.Function == "min_over_time" {
		column, both = e.w.Min, func(a, b partSum) partSum {
			if b.v < a.v || a.v != a.v {
				return b
			}
			return a
		}
	}
	e.over(func(j int) partSum { return partSum{v: column[j]} }, both, func(i int, p partSum) { e.out.add(i, p.v) })
}

func addSums(a, b partSum) partSum {
	v, c := kahansum.Inc(b.v, a.v, a.c)
	return partSum{v, c + b.c}
}

// sum is sum_over_time() and avg_over_time().
func (e *Evaluator) sum() {
	avg := e.q.Function == "avg_over_time"
	e.over(func(j int) partSum { return partSum{v: e.w.Sum[j]} }, addSums, func(i int, p partSum) {
		if math.IsInf(p.v, 0) {
			p.c = 0
		}
		if avg {
			n := float64(e.cum[e.hi[i]] - e.cum[e.lo[i]] + int64(e.edge[i]))
			e.out.add(i, p.v/n+p.c/n)
		} else {
			e.out.add(i, p.v+p.c)
		}
	})
}

// deviation is stddev_over_time() and stdvar_over_time().
func (e *Evaluator) deviation() {
	root := e.q.Function == "stddev_over_time"
	var both Windows
	for i, lo := range e.lo {
		edge := e.edge[i]
		if edge == edgeRaw || lo == e.hi[i] && edge == 0 {
			continue
		}
		w, lo, hi := e.w, int(lo), int(e.hi[i])
		if edge > 0 { // as windows of one float each
			both.Clear()
			k := lo - 1
			if edge == 2 {
				both.single(w.PrevV[k])
			}
			both.single(w.LastV[k])
			both.Append(w, lo, hi, First|Sum|M2)
			w, lo, hi = &both, 0, both.Len()
		}
		var sum partSum
		n := int64(0)
		for j := lo; j < hi; j++ {
			sum = addSums(sum, partSum{v: w.Sum[j]})
			n += int64(w.Count[j])
		}
		v := w.moment(lo, hi, sum.v/float64(n)+sum.c/float64(n))
		if v > 0 && v < tinyMoment {
			e.out.Raw = append(e.out.Raw, int32(i)) //nolint:gosec // a slice has fewer
			continue
		}
		v /= float64(n)
		if root {
			v = math.Sqrt(v)
		}
		e.out.add(i, v)
	}
}

// single appends a window of one float, of which only First, Sum and M2 are set, and
// no times.
func (w *Windows) single(v float64) {
	w.End, w.Count, w.Flags = append(w.End, 0), append(w.Count, 1), append(w.Flags, 0)
	w.FirstT, w.FirstV, w.Sum, w.M2 = append(w.FirstT, 0), append(w.FirstV, v), append(w.Sum, v), append(w.M2, v-v)
}

package rollup

import "slices"

// Even is a stretch of windows that follow each other, none missing, and lie alike: they have
// as many floats, one or more, the same flags, and the floats are as far from the windows' ends. Those
// of a target that was scraped on time for a year are one.
type Even struct {
	At    int   // index of the first window
	N     int   // windows
	End   int64 // of the first window, ms since the epoch
	Width int64 // ms
	Count uint32
	Flags Flags
	// How far the first float, the last but one and the last are before the end of
	// their window, in ms.
	First, Prev, Last int64
}

// behind is the end of the window that would be next.
func (e *Even) behind() int64 { return e.End + int64(e.N)*e.Width }

// follows reports whether the windows of e are those of o going on.
func (e *Even) follows(o *Even) bool {
	like := *e
	like.At, like.N, like.End = o.At, o.N, o.End
	return like == *o && e.End == o.behind()
}

// AppendEven notes the times of the next windows: w has no windows, or has Even. At is set here.
func (w *Windows) AppendEven(e Even) {
	if n := len(w.Even); n > 0 {
		last := &w.Even[n-1]
		if e.follows(last) {
			last.N += e.N
			return
		}
		e.At = last.At + last.N
	} else {
		e.At = 0
	}
	w.Even = append(w.Even, e)
}

// EndAt is the end of the i-th window.
func (w *Windows) EndAt(i int) int64 {
	if len(w.Even) == 0 {
		return w.End[i]
	}
	k := len(w.Even) - 1
	for w.Even[k].At > i {
		k--
	}
	return w.Even[k].End + int64(i-w.Even[k].At)*w.Even[k].Width
}

// Expand makes columns of Even, which is empty then, if it isn't already: End, Count, Flags, and the times of cols.
func (w *Windows) Expand(cols Columns) {
	for i := range w.Even {
		w.AppendTimes(&w.Even[i], cols)
	}
	w.Even = w.Even[:0]
}

// AppendEvens is AppendEven of stretches that are At one behind the other from 0 on, and none of which follows the one
// before.
func (w *Windows) AppendEvens(es []Even) {
	if len(es) == 0 {
		return
	}
	n := len(w.Even)
	w.AppendEven(es[0])
	at := len(w.Even)
	w.Even = append(w.Even, es[1:]...)
	if n == 0 {
		return // they are At where they were
	}
	by := w.Even[at-1].At + w.Even[at-1].N - es[0].N
	for i := range w.Even[at:] {
		w.Even[at+i].At += by
	}
}

// appendEven is Append of windows that have Even to such that have no others.
func (w *Windows) appendEven(from *Windows, i, j int) {
	for k := range from.Even {
		e := from.Even[k]
		lo, hi := max(i, e.At), min(j, e.At+e.N)
		if lo < hi {
			e.End, e.N = e.End+int64(lo-e.At)*e.Width, hi-lo
			w.AppendEven(e)
		}
	}
}

// AppendStretches appends to dst those that the windows from index i on are, of a width in ms, with all columns of times.
// None, if there would be more than most, or there is a window without floats.
func (w *Windows) AppendStretches(dst []Even, i, most int, width int64) []Even {
	had := len(dst)
	for ; i < len(w.End); i++ {
		end := w.End[i]
		one := Even{
			N: 1, End: end, Width: width, Count: w.Count[i], Flags: w.Flags[i],
			First: end - w.FirstT[i], Prev: end - w.PrevT[i], Last: end - w.LastT[i],
		}
		switch n := len(dst); {
		case one.Count == 0:
			return dst[:had]
		case n > had && one.follows(&dst[n-1]):
			dst[n-1].N++
		case n-had == most:
			return dst[:had]
		default:
			dst = append(dst, one)
		}
	}
	return dst
}

// AppendTimes appends to columns the times of windows: End, Count, Flags, and those of cols.
func (w *Windows) AppendTimes(e *Even, cols Columns) {
	at := len(w.End)
	w.End, w.Count, w.Flags = longer(w.End, e.N), longer(w.Count, e.N), longer(w.Flags, e.N)
	ends, counts, flags := w.End[at:], w.Count[at:], w.Flags[at:]
	end := e.End
	for i := range ends {
		ends[i] = end
		end += e.Width
	}
	for i := range counts {
		counts[i] = e.Count
	}
	for i := range flags {
		flags[i] = e.Flags
	}
	before := func(times []int64, by int64) []int64 {
		times = longer(times, e.N)
		added := times[len(times)-e.N:]
		for i, end := range ends[:len(added)] {
			added[i] = end - by
		}
		return times
	}
	if cols&First != 0 {
		w.FirstT = before(w.FirstT, e.First)
	}
	if cols&Prev != 0 {
		w.PrevT = before(w.PrevT, e.Prev)
	}
	if cols&Last != 0 {
		w.LastT = before(w.LastT, e.Last)
	}
}

// longer adds n elements, whatever they are.
func longer[E any](s []E, n int) []E { return slices.Grow(s, n)[:len(s)+n] }

// evenly evaluates what can be told stretch by stretch: rates over a window each, and the last floats
// of the window before. It reports false if it is anything else.
func (e *Evaluator) evenly() bool {
	w, q := e.w, &e.q
	strided := q.Steps > 1 && q.Step != e.width && e.rest == 0
	if !e.f.rates || e.whole != e.width || q.Step != e.width && !strided {
		return false
	}
	for i := range w.Even {
		if w.Even[i].Flags&e.useless != 0 {
			return false
		}
	}
	x := NewExtrapolation(q.Function, q.Range)
	if strided {
		e.strided(&x)
		return true
	}
	var before *Even // the stretch before, if it goes up to this one
	for i := range w.Even {
		s := &w.Even[i]
		e.stretch(&x, s, before)
		before = s
		if i+1 == len(w.Even) || w.Even[i+1].End != s.behind() {
			before = nil
			e.tail(&x, s)
		}
	}
	return true
}

// strided adds the results where each range is a window, and others lie between those.
func (e *Evaluator) strided(x *Extrapolation) {
	w, steps := e.w, e.q.Steps
	reset := w.Reset
	if !x.counter {
		reset = nil
	}
	i, t := 0, e.q.Start
	for k := range w.Even {
		s := &w.Even[k]
		for ; t < s.End && i < steps; i++ {
			t += e.q.Step
		}
		behind := s.behind()
		if t >= behind || i == steps {
			continue
		}
		n := int64(s.Count)
		if n > 1 {
			x.set(n, x.rng-s.First, s.Last, s.First-s.Last)
		}
		for ; t < behind && i < steps; i++ {
			e.tally.window[i] += n
			e.tally.read[i] += n
			if n > 1 {
				j := s.At + int((t-s.End)/e.width)
				first := w.FirstV[j]
				increase := w.LastV[j] - first
				if reset != nil && reset[j] != 0 { // -0 stays
					increase += reset[j]
				}
				e.out.add(i, x.nearZero(&x.place, first, increase))
			}
			t += e.q.Step
		}
	}
}

// step of a window's end, less than 0 before the first.
func (e *Evaluator) step(end int64) int { return int((end - e.q.Start) / e.width) }

// stretch adds the results for windows, of steps whose ranges they are. before are those
// before, nil if there are none.
func (e *Evaluator) stretch(x *Extrapolation, s, before *Even) {
	step := e.step(s.End)
	from, to := max(0, -step), min(s.N, e.q.Steps-step)
	switch {
	case from >= to:
	case e.rest == 0:
		e.rates(x, s, nil, 0, from, to)
	case from > 0:
		e.rates(x, s, s, s.reaches(e.rest), from, to)
	default:
		edge := uint8(0)
		if before != nil {
			edge = before.reaches(e.rest)
		}
		e.rates(x, s, before, edge, 0, 1)
		e.rates(x, s, s, s.reaches(e.rest), 1, to)
	}
}

// reaches is how many floats of a window are less than so many ms before its end, or edgeRaw.
func (e *Even) reaches(rest int64) uint8 {
	switch {
	case e.Last >= rest:
		return 0
	case e.Count == 1 || e.Prev >= rest:
		return 1
	case e.Count == 2:
		return 2
	}
	return edgeRaw
}

// rates adds the results for windows of s from up to, without, to. The range of each takes up
// edge floats of the window before, which lies like before.
func (e *Evaluator) rates(x *Extrapolation, s, before *Even, edge uint8, from, to int) {
	if from >= to {
		return
	}
	step := e.step(s.End)
	if edge == edgeRaw {
		for i := step + from; i < step+to; i++ {
			e.out.Raw = append(e.out.Raw, int32(i)) //nolint:gosec // a slice has fewer
		}
		return
	}
	n := int64(s.Count) + int64(edge)
	e.tally.add(step+from, step+to, n, int64(s.Count))
	if n < 2 {
		return
	}
	first := s.First
	switch edge {
	case 1:
		first = before.Last + e.width
	case 2:
		first = before.Prev + e.width
	}
	x.set(n, x.rng-first, s.Last, first-s.Last)
	k := len(e.out.Step)
	steps, values := longer(e.out.Step, to-from), longer(e.out.Value, to-from)
	e.out.Step, e.out.Value = steps, values
	steps, values = steps[k:], values[k:]
	i := int32(step + from) //nolint:gosec // a slice has fewer
	for k := range steps {
		steps[k] = i
		i++
	}
	w := e.w
	at, to := s.At+from, s.At+to
	var reset []float64
	if x.counter {
		reset = w.Reset[at:to]
	}
	firstV, lastV := w.FirstV[at:to], w.LastV[at:to]
	switch edge {
	case 0:
		x.results(values, firstV, lastV, reset)
	case 1:
		x.resultsFrom1(values, w.LastV[at-1:to-1], firstV, lastV, reset)
	default:
		x.resultsFrom2(values, w.PrevV[at-1:to-1], w.LastV[at-1:to-1], firstV, lastV, reset)
	}
}

// tail adds the result of the step whose range has no floats but those at the end of a stretch.
func (e *Evaluator) tail(x *Extrapolation, s *Even) {
	end := s.behind()
	i := e.step(end)
	if e.rest == 0 || i < 0 || i >= e.q.Steps {
		return
	}
	edge := s.reaches(e.rest)
	if edge == edgeRaw {
		e.out.Raw = append(e.out.Raw, int32(i)) //nolint:gosec // a slice has fewer
		return
	}
	e.tally.add(i, i+1, int64(edge), 0)
	if edge < 2 {
		return
	}
	k := s.At + s.N - 1
	prev, last := e.w.PrevV[k], e.w.LastV[k]
	increase := last - prev
	if x.counter && last < prev {
		increase += prev
	}
	e.out.add(i, x.Result(end, 2, end-e.width-s.Prev, end-e.width-s.Last, prev, increase))
}

// The loops of Result, where all ranges lie to their samples alike: see place. Without a counter there is no reset.

// results of ranges that are windows.
func (x *Extrapolation) results(dst, first, last, reset []float64) {
	first, last = first[:len(dst)], last[:len(dst)]
	if !x.counter {
		for i, v := range first {
			dst[i] = (last[i] - v) * x.factor
		}
		return
	}
	reset = reset[:len(dst)]
	toStart, sampled, factor := x.toStart, x.sampled, x.factor
	for i, v := range first {
		increase := last[i] - v
		if r := reset[i]; r != 0 { // -0 stays
			increase += r
		}
		if least := toStart * increase; least > 1e-290 && v*sampled > least*(1+1e-9) {
			dst[i] = increase * factor
		} else {
			dst[i] = x.nearZero(&x.place, v, increase)
		}
	}
}

// resultsFrom1 are those of ranges that begin with the last float of the window before.
func (x *Extrapolation) resultsFrom1(dst, from, first, last, reset []float64) {
	from, first, last = from[:len(dst)], first[:len(dst)], last[:len(dst)]
	if !x.counter {
		for i, v := range from {
			dst[i] = (last[i] - v) * x.factor
		}
		return
	}
	reset = reset[:len(dst)]
	toStart, sampled, factor := x.toStart, x.sampled, x.factor
	for i, v := range from {
		increase := last[i] - v
		if first[i] < v {
			increase += v
		}
		if r := reset[i]; r != 0 { // -0 stays
			increase += r
		}
		if least := toStart * increase; least > 1e-290 && v*sampled > least*(1+1e-9) {
			dst[i] = increase * factor
		} else {
			dst[i] = x.nearZero(&x.place, v, increase)
		}
	}
}

// resultsFrom2 are those of ranges that begin with the last two floats, prev and from, of the window before.
func (x *Extrapolation) resultsFrom2(dst, prev, from, first, last, reset []float64) {
	prev, from, first, last = prev[:len(dst)], from[:len(dst)], first[:len(dst)], last[:len(dst)]
	for i, v := range prev {
		increase := last[i] - v
		if x.counter {
			if from[i] < v {
				increase += v
			}
			if first[i] < from[i] {
				increase += from[i]
			}
			if r := reset[i]; r != 0 { // -0 stays
				increase += r
			}
		}
		dst[i] = x.nearZero(&x.place, v, increase)
	}
}

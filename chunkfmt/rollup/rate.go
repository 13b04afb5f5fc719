package rollup

import (
	"math"
	"slices"
	"time"
)

// Extrapolation makes a rate of what a series has gone up by between the first and
// the last sample of a range, as extrapolatedRate of Prometheus's engine does, to the
// bit. It is not for concurrent use: ranges mostly lie to their samples as the one
// before did, so that what follows from the times is kept.
type Extrapolation struct {
	rng     int64
	counter bool
	per     float64 // s; 0: it is no rate

	// The range before: how many samples it had, and in ms how far the first was from its
	// start, the last from its end, and what lay between them.
	n, start, end, between int64
	place
}

// place is what follows from how a range lies to its samples, in s, and the factor if zero is too
// far away to be reached.
type place struct {
	toStart, toEnd, sampled, factor float64
}

// NewExtrapolation is that of rate(), increase() or delta(), over a range in ms.
func NewExtrapolation(function string, rng int64) Extrapolation {
	x := Extrapolation{rng: rng, counter: function != "delta"}
	if function == "rate" {
		x.per = (time.Duration(rng) * time.Millisecond).Seconds()
	}
	return x
}

// Result for a range that ends at end and has n samples, two or more; the times are
// in ms. increase is the last value less the first, with what was lost in resets.
func (x *Extrapolation) Result(end, n, firstT, lastT int64, firstV, increase float64) float64 {
	x.at(end, n, firstT, lastT)
	return x.nearZero(&x.place, firstV, increase)
}

// at sets the place, and reports whether it is another one than before.
func (x *Extrapolation) at(end, n, firstT, lastT int64) bool {
	start, rest, between := firstT-(end-x.rng), end-lastT, lastT-firstT
	if start == x.start && rest == x.end && between == x.between && n == x.n {
		return false
	}
	x.set(n, start, rest, between)
	return true
}

// Factor is what Result multiplies the increase by: of histograms, by their counts of observations.
func (x *Extrapolation) Factor(end, n, firstT, lastT int64, firstV, increase float64) float64 {
	x.at(end, n, firstT, lastT)
	if x.counter && increase > 0 && firstV >= 0 {
		if toZero := x.sampled * (firstV / increase); toZero < x.toStart {
			return x.over(&x.place, toZero)
		}
	}
	return x.factor
}

// nearZero is Result where the times are those of p.
func (x *Extrapolation) nearZero(p *place, firstV, increase float64) float64 {
	// With p.toStart no longer than from firstV down to zero at this rate, zero changes nothing. A
	// product tells that as well as the quotient, if it isn't close.
	if least := p.toStart * increase; x.counter && increase > 0 && firstV >= 0 && !(least > 1e-290 && firstV*p.sampled > least*(1+1e-9)) {
		if toZero := p.sampled * (firstV / increase); toZero < p.toStart {
			return increase * x.over(p, toZero)
		}
	}
	return increase * p.factor
}

// set makes the place of the times.
func (x *Extrapolation) set(n, start, end, between int64) {
	x.n, x.start, x.end, x.between = n, start, end, between
	x.toStart, x.toEnd, x.sampled = float64(start)/1000, float64(end)/1000, float64(between)/1000
	average := x.sampled / float64(n-1)
	threshold := average * 1.1
	if x.toStart >= threshold {
		x.toStart = average / 2
	}
	if x.toEnd >= threshold {
		x.toEnd = average / 2
	}
	x.factor = x.over(&x.place, x.toStart)
}

// over is the factor if the series reaches so far, in s, before its first sample.
func (x *Extrapolation) over(p *place, toStart float64) float64 {
	factor := 1.0
	if p.sampled != 0 {
		factor = (p.sampled + toStart + p.toEnd) / p.sampled
	}
	if x.per > 0 {
		factor /= x.per
	}
	return factor
}

// Ranges are some of a column of samples, whose times are known: what follows from these is worked out once for
// all series that share them.
type Ranges struct {
	x       Extrapolation
	runs    []rangeRun
	places  []place
	placeOf []int32 // of each range
	// Of each range that of its place, so as to be read one after the other.
	factors []float64
	// Of places the shortest sampled and the longest toStart.
	leastSampled, mostToStart float64
}

// rangeRun are ranges, one after the other, each of which is by samples behind the one before.
type rangeRun struct {
	n           int
	first, last int // where in the column the first and the last sample of the first range are
	by          int
}

// Set makes r that of rate(), increase() or delta() over ranges of rng ms, of which the first ends at end, in ms, and each
// further one step later. The samples of the i-th are those of t from lo[i] up to, without, hi[i]; those that have less
// than two are left out.
func (r *Ranges) Set(function string, rng int64, t []int64, end, step int64, lo, hi []int32) {
	*r = Ranges{
		x: NewExtrapolation(function, rng), runs: r.runs[:0], places: r.places[:0], leastSampled: math.Inf(1),
		placeOf: slices.Grow(r.placeOf[:0], len(hi)), factors: slices.Grow(r.factors[:0], len(hi)),
	}
	var run rangeRun
	for i, hi := range hi {
		first, last := int(lo[i]), int(hi)-1
		if last > first {
			if r.x.at(end, int64(last-first+1), t[first], t[last]) || len(r.places) == 0 {
				r.places = append(r.places, r.x.place)
				r.leastSampled, r.mostToStart = min(r.leastSampled, r.x.sampled), max(r.mostToStart, r.x.toStart)
			}
			r.placeOf, r.factors = append(r.placeOf, int32(len(r.places)-1)), append(r.factors, r.x.factor) //nolint:gosec // no more than ranges
			if run.n == 1 {
				run.by = first - run.first
			}
			if run.n > 0 && (first != run.first+run.n*run.by || last != run.last+run.n*run.by) {
				r.runs = append(r.runs, run)
				run.n = 0
			}
			if run.n == 0 {
				run = rangeRun{first: first, last: last}
			}
			run.n++
		}
		end += step
	}
	if run.n > 0 {
		r.runs = append(r.runs, run)
	}
}

// rangesAtOnce is of how many ranges it is found out together whether zero is too far away to be reached by their rates.
const rangesAtOnce = 128

// Results sets dst, of as many elements, to the results for the values of a series. resets are where in v it is less than
// before, ascending; those outside of ranges may be missing if there is a NaN or if falls: it may be less there.
func (r *Ranges) Results(dst, v []float64, resets []int32, falls bool) {
	i := 0 // ranges that are done
	for _, run := range r.runs {
		for run.n > 0 {
			n := min(run.n, rangesAtOnce)
			for len(resets) > 0 && int(resets[0]) <= run.first {
				resets = resets[1:]
			}
			end := run.last + (n-1)*run.by
			within := len(resets) > 0 && int(resets[0]) <= end
			some, first, last := dst[i:i+n], v[run.first:], v[run.last:]
			if !r.x.counter || !within && !falls && r.farFromZero(v[run.first], v[end]) {
				differences(some, r.factors[i:i+n], first, last, run.by)
			} else {
				r.rates(some, i, first, last, run.by)
			}
			if within && r.x.counter {
				r.withResets(some, i, v, run, resets)
			}
			i += n
			run = rangeRun{run.n - n, run.first + n*run.by, run.last + n*run.by, run.by}
		}
	}
}

// farFromZero reports whether zero is too far from values that rise from first to last to be reached by the rate of any
// range: the first of all is more, by more than rounding, than what any range could take off. Of greater numbers or
// less than 1 it says nothing.
func (r *Ranges) farFromZero(first, last float64) bool {
	return first >= 1 && last < 1e200 && first*r.leastSampled > r.mostToStart*(last-first)*(1+1e-9)
}

// differences sets dst to the results of ranges where zero is too far away, or there is none. first and last begin with the
// values of the first one, and those of each further one come by behind. It is not inlined, for what it needs to stay in
// registers.
//
//go:noinline
func differences(dst, factors, first, last []float64, by int) {
	factors = factors[:len(dst)]
	at := 0
	for i := range dst {
		dst[i] = (last[at] - first[at]) * factors[i]
		at += by
	}
}

// rates is differences of the ranges from i on where zero may be near.
func (r *Ranges) rates(dst []float64, i int, first, last []float64, by int) {
	placeOf := r.placeOf[i:][:len(dst)]
	at := 0
	for i := range dst {
		p := &r.places[placeOf[i]]
		from := first[at]
		increase := last[at] - from
		if least := p.toStart * increase; least > 1e-290 && from*p.sampled > least*(1+1e-9) || increase == 0 {
			dst[i] = increase * p.factor
		} else {
			dst[i] = r.x.nearZero(p, from, increase)
		}
		at += by
	}
}

// withResets sets dst to the results of those ranges, the i-th and further, that have resets.
func (r *Ranges) withResets(dst []float64, i int, v []float64, run rangeRun, resets []int32) {
	for k := range dst {
		first, last := run.first+k*run.by, run.last+k*run.by
		for len(resets) > 0 && int(resets[0]) <= first {
			resets = resets[1:]
		}
		if len(resets) == 0 {
			return
		}
		if int(resets[0]) > last {
			continue
		}
		increase := v[last] - v[first]
		for _, at := range resets {
			if int(at) > last {
				break
			}
			increase += v[at-1]
		}
		dst[k] = r.x.nearZero(&r.places[r.placeOf[i+k]], v[first], increase)
	}
}

package rollup

import "time"

// Extrapolation makes a rate of what a series has gone up by between the first and
// the last sample of a range, as extrapolatedRate of Prometheus's engine does, to the
// bit. It is not for concurrent use: ranges mostly lie to their samples as the one
// before did, so that what follows from the times is kept.
type Extrapolation struct {
	rng     int64
	counter bool
	per     float64 // s; 0: it is no rate

	lie // of the range before
	place
}

// lie is how a range lies to its samples: how many it has, and in ms how far the first is from its start, the last from
// its end, and what lies between them.
type lie struct{ n, start, end, between int64 }

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
	if is := x.lieOf(end, n, firstT, lastT); is != x.lie {
		x.set(is)
	}
	return x.nearZero(&x.place, firstV, increase)
}

// lieOf is how a range that ends at end lies to n samples.
func (x *Extrapolation) lieOf(end, n, firstT, lastT int64) lie {
	return lie{n, firstT - (end - x.rng), end - lastT, lastT - firstT}
}

// Factor is what Result multiplies the increase by: of histograms, by their counts of observations.
func (x *Extrapolation) Factor(end, n, firstT, lastT int64, firstV, increase float64) float64 {
	if is := x.lieOf(end, n, firstT, lastT); is != x.lie {
		x.set(is)
	}
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

// set makes the place of a range.
func (x *Extrapolation) set(is lie) {
	x.lie = is
	x.toStart, x.toEnd, x.sampled = float64(is.start)/1000, float64(is.end)/1000, float64(is.between)/1000
	average := x.sampled / float64(is.n-1)
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
	x      Extrapolation
	n      int
	runs   []rangeRun
	others []otherRange // of all runs
}

// rangeRun are ranges, one after the other, each of which is by samples behind the one before. Where scrapes are on time
// they lie to their samples alike: in a run most do.
type rangeRun struct {
	n           int
	first, last int // where in the column the first and the last sample of the first range are
	by          int
	lie         lie
	place       place
	others      int // so many lie otherwise
}

// otherRange is a range that lies otherwise than its run, of which it is the i-th.
type otherRange struct {
	i     int
	place place
}

// Reset makes r hold none, for rate(), increase() or delta() over ranges of rng ms.
func (r *Ranges) Reset(function string, rng int64) {
	*r = Ranges{x: NewExtrapolation(function, rng), runs: r.runs[:0], others: r.others[:0]}
}

// Len is how many there are.
func (r *Ranges) Len() int { return r.n }

// Add puts in the next one, that ends at end, in ms, and whose samples are those of t from lo up to, without, hi: two or
// more.
func (r *Ranges) Add(end int64, t []int64, lo, hi int32) {
	first, last := int(lo), int(hi)-1
	is := r.x.lieOf(end, int64(hi-lo), t[first], t[last])
	r.n++
	if n := len(r.runs); n > 0 {
		run := &r.runs[n-1]
		if run.n == 1 {
			run.by = first - run.first
		}
		if first == run.first+run.n*run.by && last == run.last+run.n*run.by && (is == run.lie || 2*run.others < run.n) {
			if is != run.lie {
				r.x.set(is)
				r.others = append(r.others, otherRange{run.n, r.x.place})
				run.others++
			}
			run.n++
			return
		}
	}
	r.x.set(is)
	r.runs = append(r.runs, rangeRun{n: 1, first: first, last: last, lie: is, place: r.x.place})
}

// Results sets dst, of as many elements, to the results for the values of a series. resets are where in v it is less than
// before, ascending; those outside of ranges may be missing if there is a NaN or if falls: it may be less there.
func (r *Ranges) Results(dst, v []float64, resets []int32, falls bool) {
	others := r.others
	for i := range r.runs {
		run := &r.runs[i]
		for len(resets) > 0 && int(resets[0]) <= run.first {
			resets = resets[1:]
		}
		r.alike(run, dst[:run.n], v, resets, falls)
		left := resets
		for k := range others[:run.others] {
			o := &others[k]
			first, last := run.first+o.i*run.by, run.last+o.i*run.by
			for len(left) > 0 && int(left[0]) <= first {
				left = left[1:]
			}
			dst[o.i] = r.x.nearZero(&o.place, v[first], increase(v, first, last, left))
		}
		dst, others = dst[run.n:], others[run.others:]
	}
}

// increase is the last value of a range less the first, with what was lost in resets, all of which are behind the first.
func increase(v []float64, first, last int, resets []int32) float64 {
	sum := v[last] - v[first]
	for _, at := range resets {
		if int(at) > last {
			break
		}
		sum += v[at-1]
	}
	return sum
}

// rangesAtOnce is of how many ranges it is found out together whether zero is too far away to be reached by their rates.
const rangesAtOnce = 128

// alike is Results of a run, as if all of it lay alike.
func (r *Ranges) alike(run *rangeRun, dst, v []float64, resets []int32, falls bool) {
	p, by := &run.place, run.by
	for first, last := run.first, run.last; len(dst) > 0; {
		some := dst[:min(rangesAtOnce, len(dst))]
		end := last + (len(some)-1)*by
		for len(resets) > 0 && int(resets[0]) <= first {
			resets = resets[1:]
		}
		within := len(resets) > 0 && int(resets[0]) <= end
		if !r.x.counter || !within && !falls && p.farFromZero(v[first], v[end]) {
			p.differences(some, v[first:], v[last:], by)
		} else {
			r.x.rates(p, some, v[first:], v[last:], by)
		}
		if within && r.x.counter {
			left := resets
			for i := range some {
				first, last := first+i*by, last+i*by
				for len(left) > 0 && int(left[0]) <= first {
					left = left[1:]
				}
				if len(left) == 0 {
					break
				}
				if int(left[0]) <= last {
					some[i] = r.x.nearZero(p, v[first], increase(v, first, last, left))
				}
			}
		}
		first, last, dst = first+len(some)*by, last+len(some)*by, dst[len(some):]
	}
}

// farFromZero reports whether zero is too far from values that rise from first to last to be reached by the rate of any
// range: the first of all is more, by more than rounding, than what any range could take off. Of greater numbers or
// less than 1 it says nothing.
func (p *place) farFromZero(first, last float64) bool {
	return first >= 1 && last < 1e200 && first*p.sampled > p.toStart*(last-first)*(1+1e-9)
}

// differences sets dst to the results where zero is too far away, or there is none. first and last have the values of
// ranges, each by behind the one before.
func (p *place) differences(dst, first, last []float64, by int) {
	factor, at := p.factor, 0
	for i := range dst {
		dst[i] = (last[at] - first[at]) * factor
		at += by
	}
}

// rates is differences where zero may be near.
func (x *Extrapolation) rates(p *place, dst, first, last []float64, by int) {
	at := 0
	for i := range dst {
		from := first[at]
		increase := last[at] - from
		if least := p.toStart * increase; least > 1e-290 && from*p.sampled > least*(1+1e-9) || increase == 0 {
			dst[i] = increase * p.factor
		} else {
			dst[i] = x.nearZero(p, from, increase)
		}
		at += by
	}
}

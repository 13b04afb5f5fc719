package rollup

import (
	"math"
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
	x      Extrapolation
	ranges []aRange
	places []place
	// Of each range that of its place, so as to be read one after the other.
	factors []float64
	// Of places the shortest sampled and the longest toStart.
	leastSampled, mostToStart float64
}

// aRange is where in a column the first and the last sample of a range are, and its place.
type aRange struct{ first, last, place int32 }

// Reset makes r hold none, for rate(), increase() or delta() over ranges of rng ms.
func (r *Ranges) Reset(function string, rng int64) {
	*r = Ranges{
		x: NewExtrapolation(function, rng), ranges: r.ranges[:0], places: r.places[:0], factors: r.factors[:0],
		leastSampled: math.Inf(1),
	}
}

// Len is how many there are.
func (r *Ranges) Len() int { return len(r.ranges) }

// Add puts in the next one, that ends at end, in ms, and whose samples are those of t from lo up to, without, hi: two or
// more.
func (r *Ranges) Add(end int64, t []int64, lo, hi int32) {
	if r.x.at(end, int64(hi-lo), t[lo], t[hi-1]) || len(r.places) == 0 {
		r.places = append(r.places, r.x.place)
		r.leastSampled, r.mostToStart = min(r.leastSampled, r.x.sampled), max(r.mostToStart, r.x.toStart)
	}
	r.factors = append(r.factors, r.x.factor)
	r.ranges = append(r.ranges, aRange{lo, hi - 1, int32(len(r.places) - 1)}) //nolint:gosec // no more than ranges
}

// farFromZero reports whether zero is too far from values that rise to be reached by any of the rates: the first value of
// all is more, by more than rounding, than what any range could take off. Of greater numbers or less than 1 it says nothing.
func (r *Ranges) farFromZero(v []float64) bool {
	if len(r.ranges) == 0 {
		return false
	}
	first, last := v[r.ranges[0].first], v[r.ranges[len(r.ranges)-1].last]
	return first >= 1 && last < 1e200 && first*r.leastSampled > r.mostToStart*(last-first)*(1+1e-9)
}

// Results sets dst, of as many elements, to the results for the values of a series. resets are where in v it is less than
// before, ascending; of those outside of ranges no notice is taken. rises: there are no resets, and no value is NaN.
func (r *Ranges) Results(dst, v []float64, resets []int32, rises bool) {
	x, ranges, places := &r.x, r.ranges[:len(dst)], r.places
	if !x.counter || rises && r.farFromZero(v) {
		factors := r.factors[:len(dst)]
		for i := range ranges {
			at := &ranges[i]
			dst[i] = (v[at.last] - v[at.first]) * factors[i]
		}
		return
	}
	for i := range ranges {
		at := &ranges[i]
		p := &places[at.place]
		first := v[at.first]
		increase := v[at.last] - first
		if least := p.toStart * increase; least > 1e-290 && first*p.sampled > least*(1+1e-9) || increase == 0 {
			dst[i] = increase * p.factor
		} else {
			dst[i] = x.nearZero(p, first, increase)
		}
	}
	k := 0
	for i := 0; i < len(ranges) && len(resets) > 0; i++ {
		at := &ranges[i]
		for k < len(resets) && resets[k] <= at.first {
			k++
		}
		if k == len(resets) {
			return
		}
		if resets[k] > at.last {
			continue
		}
		increase := v[at.last] - v[at.first]
		for j := k; j < len(resets) && resets[j] <= at.last; j++ {
			increase += v[resets[j]-1]
		}
		dst[i] = x.nearZero(&places[at.place], v[at.first], increase)
	}
}

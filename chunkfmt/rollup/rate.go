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

	// The range before: how many samples it had, and in ms how far the first was from its
	// start, the last from its end, and what lay between them.
	n, start, end, between int64
	// What follows from that, in s, and the factor if zero is too far away to be reached.
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
	start, rest, between := firstT-(end-x.rng), end-lastT, lastT-firstT
	if start != x.start || rest != x.end || between != x.between || n != x.n {
		x.place(n, start, rest, between)
	}
	return x.nearZero(firstV, increase)
}

// nearZero is Result where the times are those of place.
func (x *Extrapolation) nearZero(firstV, increase float64) float64 {
	// With x.toStart no longer than from firstV down to zero at this rate, zero changes nothing. A
	// product tells that as well as the quotient, if it isn't close.
	if least := x.toStart * increase; x.counter && increase > 0 && firstV >= 0 && !(least > 1e-290 && firstV*x.sampled > least*(1+1e-9)) {
		if toZero := x.sampled * (firstV / increase); toZero < x.toStart {
			return increase * x.over(toZero)
		}
	}
	return increase * x.factor
}

// place sets what follows from the times.
func (x *Extrapolation) place(n, start, end, between int64) {
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
	x.factor = x.over(x.toStart)
}

// over is the factor if the series reaches so far, in s, before its first sample.
func (x *Extrapolation) over(toStart float64) float64 {
	factor := 1.0
	if x.sampled != 0 {
		factor = (x.sampled + toStart + x.toEnd) / x.sampled
	}
	if x.per > 0 {
		factor /= x.per
	}
	return factor
}

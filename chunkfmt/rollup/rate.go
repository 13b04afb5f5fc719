package rollup

import "time"

// Extrapolation makes a rate of what a series has gone up by between the first and
// the last sample of a range, as extrapolatedRate of Prometheus's engine does.
type Extrapolation struct {
	rng     int64
	counter bool
	per     float64 // s; 0: it is no rate
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
	durationToStart := float64(firstT-(end-x.rng)) / 1000
	durationToEnd := float64(end-lastT) / 1000
	sampledInterval := float64(lastT-firstT) / 1000
	average := sampledInterval / float64(n-1)
	threshold := average * 1.1
	if durationToStart >= threshold {
		durationToStart = average / 2
	}
	if x.counter {
		durationToZero := durationToStart
		if increase > 0 && firstV >= 0 {
			durationToZero = sampledInterval * (firstV / increase)
		}
		if durationToZero < durationToStart {
			durationToStart = durationToZero
		}
	}
	if durationToEnd >= threshold {
		durationToEnd = average / 2
	}
	factor := 1.0
	if sampledInterval != 0 {
		factor = (sampledInterval + durationToStart + durationToEnd) / sampledInterval
	}
	if x.per > 0 {
		factor /= x.per
	}
	return increase * factor
}

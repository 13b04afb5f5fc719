package transfer

import (
	"math"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// millis is ms since the epoch. (An alias, so that Seek is chunkenc.Iterator's,
// and vet doesn't take it for io.Seeker's.)
type millis = int64

// samples iterates over the samples of a series, as far as until, which is raised
// to go on. It can't go back.
type samples struct {
	s        *chunkfmt.Series
	until    int64 // ms, exclusive
	f, h, fh int   // next of each kind
	at       chunkenc.ValueType
}

// peek is the time of the next sample, math.MaxInt64 if there is none.
func (i *samples) peek() int64 {
	return min(head(i.s.Floats.T[i.f:]), head(i.s.Histograms.T[i.h:]), head(i.s.FloatHistograms.T[i.fh:]))
}

// Next implements chunkenc.Iterator.
func (i *samples) Next() chunkenc.ValueType {
	t := i.peek()
	switch {
	case t >= i.until || t == math.MaxInt64:
		i.at = chunkenc.ValNone
	case head(i.s.Floats.T[i.f:]) == t:
		i.f++
		i.at = chunkenc.ValFloat
	case head(i.s.Histograms.T[i.h:]) == t:
		i.h++
		i.at = chunkenc.ValHistogram
	default:
		i.fh++
		i.at = chunkenc.ValFloatHistogram
	}
	return i.at
}

// Seek implements chunkenc.Iterator.
func (i *samples) Seek(t millis) chunkenc.ValueType {
	for i.at == chunkenc.ValNone || i.AtT() < t {
		if i.Next() == chunkenc.ValNone {
			break
		}
	}
	return i.at
}

// At implements chunkenc.Iterator.
func (i *samples) At() (int64, float64) {
	return i.s.Floats.T[i.f-1], i.s.Floats.V[i.f-1]
}

// AtHistogram implements chunkenc.Iterator.
func (i *samples) AtHistogram(*histogram.Histogram) (int64, *histogram.Histogram) {
	// Appenders may change it, and Runs may give one more than once.
	return i.s.Histograms.T[i.h-1], i.s.Histograms.H[i.h-1].Copy()
}

// AtFloatHistogram implements chunkenc.Iterator.
func (i *samples) AtFloatHistogram(*histogram.FloatHistogram) (int64, *histogram.FloatHistogram) {
	if i.at == chunkenc.ValHistogram {
		return i.s.Histograms.T[i.h-1], i.s.Histograms.H[i.h-1].ToFloat(nil)
	}
	return i.s.FloatHistograms.T[i.fh-1], i.s.FloatHistograms.H[i.fh-1].Copy()
}

// AtT implements chunkenc.Iterator.
func (i *samples) AtT() int64 {
	switch i.at {
	case chunkenc.ValFloat:
		return i.s.Floats.T[i.f-1]
	case chunkenc.ValHistogram:
		return i.s.Histograms.T[i.h-1]
	default:
		return i.s.FloatHistograms.T[i.fh-1]
	}
}

// AtST implements chunkenc.Iterator.
func (i *samples) AtST() int64 {
	st, n := i.s.Floats.ST, i.f
	switch i.at {
	case chunkenc.ValHistogram:
		st, n = i.s.Histograms.ST, i.h
	case chunkenc.ValFloatHistogram:
		st, n = i.s.FloatHistograms.ST, i.fh
	default:
	}
	if len(st) == 0 {
		return 0
	}
	return st[n-1]
}

// Err implements chunkenc.Iterator.
func (*samples) Err() error { return nil }

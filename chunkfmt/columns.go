package chunkfmt

import (
	"cmp"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// Floats are the float samples of one series as columns, in strictly ascending
// order of T. All non-nil columns have the same length.
type Floats struct {
	T  []int64   // ms since the epoch
	ST []int64   // start timestamps, ms since the epoch, 0 where unknown; nil if no sample has one
	V  []float64 // every bit pattern survives, NaN payloads included
}

// Histograms are the native histogram samples with integer counts of one
// series, in strictly ascending order of T. A staleness marker is a histogram
// whose Sum is the stale NaN, as in Prometheus.
type Histograms struct {
	T  []int64
	ST []int64 // nil if no sample has one
	H  []*histogram.Histogram
}

// FloatHistograms are the native histogram samples with float counts of one
// series, in strictly ascending order of T.
type FloatHistograms struct {
	T  []int64
	ST []int64 // nil if no sample has one
	H  []*histogram.FloatHistogram
}

// Series is all that a block holds of one series. The three kinds of samples
// may interleave in time; no two samples, of whatever kind, share a timestamp.
type Series struct {
	Labels          labels.Labels
	Metadata        metadata.Metadata // the newest known; zero if none
	Family          string            // of metrics that Metadata is about; empty if it has the metric's own name
	Floats          Floats
	Histograms      Histograms
	FloatHistograms FloatHistograms
	Exemplars       []Exemplar // ascending in Ts
}

// Exemplar is an exemplar as Prometheus keeps it; Ts is in ms since the epoch.
type Exemplar = exemplar.Exemplar

// CompareExemplars orders exemplars by time, then by value, then by labels.
func CompareExemplars(a, b Exemplar) int {
	switch {
	case a.Ts != b.Ts:
		return cmp.Compare(a.Ts, b.Ts)
	case math.Float64bits(a.Value) != math.Float64bits(b.Value):
		return cmp.Compare(math.Float64bits(a.Value), math.Float64bits(b.Value))
	}
	return labels.Compare(a.Labels, b.Labels)
}

// Samples are those that summaries of windows are made of; they share memory with s.
func (s *Series) Samples() *rollup.Samples {
	out := &rollup.Samples{T: s.Floats.T, ST: s.Floats.ST, V: s.Floats.V}
	add := func(t int64, sum float64) {
		if value.IsStaleNaN(sum) {
			out.StaleHistograms = append(out.StaleHistograms, t)
		} else {
			out.Histograms = append(out.Histograms, t)
		}
	}
	for i, h := range s.Histograms.H {
		add(s.Histograms.T[i], h.Sum)
	}
	for i, h := range s.FloatHistograms.H {
		add(s.FloatHistograms.T[i], h.Sum)
	}
	if len(s.Histograms.H) > 0 && len(s.FloatHistograms.H) > 0 {
		slices.Sort(out.StaleHistograms)
		slices.Sort(out.Histograms)
	}
	return out
}

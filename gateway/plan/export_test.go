package plan

import (
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
)

// Tight makes the parts of leaves, and tasks for other gateways, as small as tests want
// them.
func Tight(s Spread) Spread {
	minute := hour / 60
	s.parting = parting{share: 1, samples: 1, far: 30, spans: []int64{minute, 5 * minute, 20 * minute, hour, 4 * hour, 24 * hour}, steps: 1}
	return s
}

// Usual makes parts as large as ever, but of so many times less samples.
func Usual(s Spread, less int64) Spread {
	s.parting = usual
	s.parting.least /= less
	s.parting.samples /= less
	s.parting.far /= less
	s.parting.shard /= less
	return s
}

// TightShards makes shards of all leaves that can be cut so.
func TightShards(s Spread) Spread {
	s.parting = parting{share: 1, samples: 1}
	return s
}

// Summarised makes an engine that summarises all samples, where summaries would do:
// as if blocks and heads had such of everything.
func Summarised(e *Engine) *Engine {
	e.summarise = true
	return e
}

// PartialVersion is partialVersion.
const PartialVersion = partialVersion

// PartialForm is a result in the form in which it is kept.
func PartialForm() ([]byte, error) {
	p := &partial{counts: newCounts(3)}
	p.counts.window, p.counts.read, p.counts.series = []int64{1, 2, 3}, []int64{4, 5, 6}, 7
	p.annos.Add(&told{text: "a", located: "a (1:1)", info: true})
	p.over.Add(&told{text: "b", located: "b (1:2)"})
	h := &histogram.FloatHistogram{
		Schema: 1, Count: 6, Sum: 2.5, ZeroThreshold: 1e-9, ZeroCount: 1, PositiveSpans: []histogram.Span{{Offset: 1, Length: 2}}, PositiveBuckets: []float64{2, 3},
	}
	p.series = []partialSeries{
		{Series: promql.Series{Metric: labels.FromStrings("job", "x"), Floats: []promql.FPoint{{T: 1000, F: 1}, {T: 3000, F: 2}}}, order: labels.FromStrings("__name__", "y", "job", "x")},
		{Series: promql.Series{Metric: labels.FromStrings("job", "z"), DropName: true, Histograms: []promql.HPoint{{T: 2000, H: h}}}, order: labels.FromStrings("job", "z")},
	}
	return p.marshal(Grid{Start: 1000, End: 3000, Step: 1000})
}

package plan

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/history"
)

// parting says how large parts of leaves are.
type parting struct {
	// A part reads one share-th of what the leaf reads, about, so that little is computed again when a query has moved. But it
	// reads least samples, for what goes with a part to be little beside it, and no more than samples, so that other gateways
	// have some to compute.
	share, least, samples int64

	shard int64   // that a shard reads at least, about: whoever computes one looks up all series
	far   int64   // that a task for another gateway reads, about: a request costs some milliseconds, of both and of the caches of processors
	spans []int64 // times that parts may have, ms; few, so that the same parts come back when a query of another time comes
	// A part has so many times the range of windows, which reach into the part before, and so many
	// steps, at least. A task has taskRanges times the range: the parts of one are read in one go.
	ranges, steps, taskRanges int64
	long                      int64 // time in ms from which on parts of selectors by themselves pay
}

//nolint:gochecknoglobals // a constant
var usual = parting{
	share: 32, least: 1 << 15, samples: 1 << 20, far: 1 << 23, shard: 1 << 25, spans: []int64{3 * hour / 2, 6 * hour, 24 * hour, 4 * 24 * hour, 16 * 24 * hour, 64 * 24 * hour},
	ranges: 1, steps: 4, taskRanges: 8, long: 24 * hour,
}

const hour = int64(3600 * 1000) // ms

// part is a piece of a leaf in time: the steps from, up to, without, to of its
// grid. But for the first and the last, a part begins at the first step that isn't
// before a multiple of its span, and ends before the next multiple.
type part struct {
	from, to int
	number   int64 // which multiple of the span
}

// worthParts says whether a leaf that reads about so many samples is to be cut.
func (l *Leaf) worthParts(samples int64, o options) bool { return samples >= 8*l.least(o) }

// least is how many samples a part reads at least, about. Without an aggregation there is a point of each series at each
// step: where summaries answer it, it takes about as long to compute as to read from what is kept. So it is with
// aggregations at short steps, where there are few samples for a point, which then summaries don't answer.
func (l *Leaf) least(o options) int64 {
	if l.Agg == nil || l.width == 0 {
		return max(o.parting.least, o.parting.samples/4)
	}
	return o.parting.least
}

// cut gives the parts of a leaf that reads about so many samples; one if it isn't
// to be parted. What is kept of parts of one span is of no use for another, and estimates are
// another each time, if by little: where kept says no of the span that fits, and yes of one beside it,
// that is taken.
func (l *Leaf) cut(samples int64, o options, kept func(parts []part, span int64) bool) (span int64, parts []part) {
	n := l.Grid.Len()
	whole := []part{{to: n}}
	if n < 2 || !l.worthParts(samples, o) || !l.separable(o) {
		return 0, whole
	}
	each := min(max(samples/o.parting.share, l.least(o)), o.parting.samples)
	want := float64(l.maxt()-l.mint()) / float64(samples) * float64(each)
	least := max(o.parting.ranges*l.Range, o.parting.steps*l.Grid.Step)
	spans := o.parting.spans
	fits := slices.IndexFunc(spans, func(s int64) bool { return float64(s) >= want && s >= least })
	if fits < 0 {
		return 0, whole
	}
	for _, i := range []int{fits, fits - 1, fits + 1} {
		if i < 0 || i == len(spans) || spans[i] < least {
			continue
		}
		if parts := l.partsOf(spans[i], 0, n); len(parts) > 1 && kept(parts, spans[i]) {
			return spans[i], parts
		}
	}
	return spans[fits], l.partsOf(spans[fits], 0, n)
}

// partsOf gives the parts of a span of the steps from, up to, without, to.
func (l *Leaf) partsOf(span int64, from, to int) (parts []part) {
	for i := from; i < to; {
		k := floorDiv(l.Grid.At(i), span)
		next := min(to, int(floorDiv((k+1)*span-1-l.Grid.Start, l.Grid.Step))+1)
		parts = append(parts, part{from: i, to: next, number: k})
		i = next
	}
	return parts
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// separable: no part has to know of series in others. Series that differ in their
// names alone become one series, or an error, once the names are dropped.
func (l *Leaf) separable(o options) bool {
	if l.Agg == nil || l.Call == nil || o.delayedNameRemoval {
		return true
	}
	if o.typeAndUnitLabels {
		return false // which are dropped too
	}
	return l.fixesName()
}

// fixesName: all series have the same name.
func (l *Leaf) fixesName() bool { return l.name() != nil }

// name is that of all series; nil: they may have several.
func (l *Leaf) name() *labels.Matcher {
	i := slices.IndexFunc(l.Selector.LabelMatchers, func(m *labels.Matcher) bool {
		return m.Type == labels.MatchEqual && m.Name == model.MetricNameLabel
	})
	if i < 0 {
		return nil
	}
	return l.Selector.LabelMatchers[i]
}

// nonCounter is the info that the metric isn't named as counters are, if the leaf has that of each part of which a float
// comes, and of no other; else nil.
func (l *Leaf) nonCounter(o options) error {
	name := l.name()
	if fn := l.function(); fn != "rate" && fn != "increase" || o.typeAndUnitLabels || name == nil || name.Value == "" || likeCounter(name.Value) {
		return nil
	}
	if l.Agg != nil {
		switch l.Agg.Op {
		case parser.SUM, parser.AVG, parser.MIN, parser.MAX, parser.STDDEV, parser.STDVAR, parser.QUANTILE, parser.TOPK, parser.BOTTOMK:
		default:
			return nil // of histograms come floats
		}
	}
	return annotations.NewPossibleNonCounterInfo(name.Value, l.Call.Args[0].PositionRange())
}

// keepable says whether parts of a result can be kept: it has no annotations of which it isn't known which part
// they are of.
func (l *Leaf) keepable(p *partial, o options) bool {
	if len(p.annos)+len(p.over) == 0 {
		return true
	}
	info := l.nonCounter(o)
	if info == nil || len(p.over) > 0 {
		return false
	}
	for text := range p.annos {
		if text != info.Error() {
			return false
		}
	}
	return true
}

// toKeep is what is kept of a part of a keepable result; of a hinted one only that it is, whatever steps of it are wanted.
func (l *Leaf) toKeep(part *partial, all *partial, o options) *partial {
	if part.hinted() {
		kept := &partial{counts: part.counts}
		kept.annos.Add(&told{text: errHinted.Error(), located: errHinted.Error()})
		return kept
	}
	if len(all.annos) == 0 || !part.floats() {
		return part
	}
	text := l.nonCounter(o).Error()
	kept := *part
	kept.annotated = annotated{}
	kept.annos.Add(&told{text: text, located: text, info: true})
	return &kept
}

// recalled makes what was kept, or some steps of it, a result of this query, whose place annotations name. It reports false if
// that can't have been kept.
func (l *Leaf) recalled(p *partial, o options) bool {
	if p.hinted() {
		return true
	}
	if !l.keepable(p, o) {
		return false
	}
	if len(p.annos) > 0 {
		p.annotated = annotated{}
		if p.floats() {
			p.annos.Add(l.nonCounter(o))
		}
	}
	return true
}

// errHinted is what parts that are hinted give: the whole leaf is to be computed in one go.
var errHinted = errors.New("hints of counter resets depend on where a part begins")

// hinted says whether a result depends on how long before its first step samples were read from: it has hints of counter resets,
// or warns of such. A hint speaks of the sample before; it is known no more where another block has a sample between the two,
// and that is seen only of what is read.
func (p *partial) hinted() bool {
	for _, set := range []annotations.Annotations{p.annos, p.over} {
		for text := range set {
			if text == errHinted.Error() || strings.Contains(text, annotations.HistogramCounterResetCollisionWarning.Error()) {
				return true
			}
		}
	}
	return slices.ContainsFunc(p.series, func(s partialSeries) bool {
		return slices.ContainsFunc(s.Histograms, func(h promql.HPoint) bool { return h.H.CounterResetHint != histogram.GaugeType })
	})
}

// floats says whether there are any among the points.
func (p *partial) floats() bool {
	return slices.ContainsFunc(p.series, func(s partialSeries) bool { return len(s.Floats) > 0 })
}

// only is the leaf of the steps of a part alone.
func (l *Leaf) only(from, to int) *Leaf {
	out := *l
	out.Grid = Grid{Start: l.Grid.At(from), End: l.Grid.At(to - 1), Step: l.Grid.Step}
	return &out
}

// key names what a part of a leaf gives, over what it reads of the blocks, whatever
// the query that it is in and however many of the part's steps that has. Nothing
// else goes into it: the times of the query don't.
func (l *Leaf) key(tenant string, span, number int64, o options, blocks []history.Block, hidden *history.Hidden) Key {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%q\n%s\n%d %d %d %d %d\n%t %t %t %t %d\n", partialVersion, tenant, l.expr(),
		l.offset(), l.Range, l.Grid.Step, l.Grid.Start-l.Grid.Start/l.Grid.Step*l.Grid.Step, number,
		l.Selector.SkipHistogramBuckets, o.startTimestamps, o.delayedNameRemoval, o.typeAndUnitLabels, span)
	mint, maxt := l.reads(span, number)
	var b []byte
	for _, x := range l.literals() { // the text of a literal such as 1s5ms is rounded
		b = binary.BigEndian.AppendUint64(b, math.Float64bits(x))
	}
	h.Write(b)
	for i := range blocks {
		if !blocks[i].Overlaps(mint, maxt) {
			continue
		}
		b = append(b[:0], blocks[i].ID[:]...)
		for _, r := range blocks[i].Ranges {
			if !r.Overlaps(mint, maxt) {
				continue // whether a query of another time sees it doesn't matter
			}
			b = binary.BigEndian.AppendUint64(b, uint64(r.MinT)) //nolint:gosec // bits
			b = binary.BigEndian.AppendUint64(b, uint64(r.MaxT)) //nolint:gosec // bits
		}
		h.Write(b)
	}
	if hidden = hidden.Within(mint, maxt); hidden != nil {
		b = append(b[:0], "hidden"...)
		for _, before := range []int64{hidden.Before.Raw, hidden.Before.Short, hidden.Before.Long} {
			b = binary.BigEndian.AppendUint64(b, uint64(min(before, maxt+1))) //nolint:gosec // bits
		}
		for i := range hidden.Deletions {
			b = append(b, hidden.Deletions[i].ID[:]...)
		}
		h.Write(b)
	}
	return Key(h.Sum(nil))
}

// literals are the numbers that the leaf's function and its aggregation are given. How many there are
// follows from what these are.
func (l *Leaf) literals() []float64 {
	out := slices.Clip(l.params)
	if l.Agg != nil {
		if p, ok := l.Agg.Param.(*parser.NumberLiteral); ok {
			out = append(out, p.Val)
		}
	}
	return out
}

// reads is the time of the samples that a whole part may need, inclusive.
func (l *Leaf) reads(span, number int64) (mint, maxt int64) {
	return number*span - l.offset() - l.Range + 1, (number+1)*span - 1 - l.offset()
}

// numbers calls fn with the parts that a sample, or samples of mint to maxt, may
// matter to.
func (l *Leaf) numbers(span, mint, maxt int64) (first, last int64) {
	return floorDiv(plus(mint, l.offset()), span), floorDiv(plus(plus(maxt, l.offset()), l.Range-1), span)
}

// plus adds up times in ms; what would overflow is the first or the last of all.
func plus(a, b int64) int64 {
	switch {
	case b < 0 && a < math.MinInt64-b:
		return math.MinInt64
	case b > 0 && a > math.MaxInt64-b:
		return math.MaxInt64
	}
	return a + b
}

// partial is what a leaf, or a part of it, gives.
type partial struct {
	series []partialSeries
	// counts by step. As read counts what is in a step's window and not in that
	// of the step before, for the first step too.
	counts counts
	annotated
	// slab, if not nil, is memory that all points of series lie in, and nothing else does: see takeQuantiles.
	slab *[]promql.FPoint
}

// annotated are the annotations of a leaf. The engine has those of its aggregation after the others, and of two
// with the same text it keeps the later, which is of another place in the query.
type annotated struct {
	annos annotations.Annotations
	over  annotations.Annotations // of the aggregation
}

func (a *annotated) merge(o *annotated) {
	a.annos.Merge(o.annos)
	a.over.Merge(o.over)
}

// all of them, as the engine keeps them. The sets of a aren't to be used any more.
func (a *annotated) all() annotations.Annotations { return a.annos.Merge(a.over) }

type partialSeries struct {
	promql.Series
	// order are the labels of the first series that went into it: the engine has
	// results in the order of those.
	order labels.Labels
}

// slice is what the steps from, up to, without, to of a leaf's result are, without
// annotations. The points are shared.
func (p *partial) slice(g Grid, from, to int) *partial {
	mint, maxt := g.At(from), g.At(to-1)
	out := &partial{counts: counts{window: p.counts.window[from:to], read: p.counts.read[from:to], series: p.counts.series}}
	for i := range p.series {
		s := p.series[i]
		s.Floats = within(s.Floats, func(f promql.FPoint) int64 { return f.T }, mint, maxt)
		s.Histograms = within(s.Histograms, func(h promql.HPoint) int64 { return h.T }, mint, maxt)
		if len(s.Floats)+len(s.Histograms) > 0 {
			out.series = append(out.series, s)
		}
	}
	return out
}

func within[P any](ps []P, at func(P) int64, mint, maxt int64) []P {
	search := func(t int64) int {
		i, _ := slices.BinarySearchFunc(ps, t, func(p P, t int64) int {
			if at(p) < t {
				return -1
			}
			return 1
		})
		return i
	}
	return ps[search(mint):search(maxt+1)]
}

// join puts the results of a leaf's parts, in order of time, together. Those without steps are in another.
func join(ps []*partial) *partial {
	ps = slices.DeleteFunc(ps, func(p *partial) bool { return len(p.counts.window) == 0 })
	if len(ps) == 1 {
		return ps[0]
	}
	out := &partial{}
	at := map[uint64][]int{} // by hash of the labels
	for _, p := range ps {
		out.counts.window = append(out.counts.window, p.counts.window...)
		out.counts.read = append(out.counts.read, p.counts.read...)
		out.counts.series = max(out.counts.series, p.counts.series)
		out.merge(&p.annotated)
	series:
		for i := range p.series {
			s := &p.series[i]
			hash := s.Metric.Hash()
			for _, j := range at[hash] {
				if o := &out.series[j]; labels.Equal(o.Metric, s.Metric) {
					o.Floats, o.Histograms = append(o.Floats, s.Floats...), append(o.Histograms, s.Histograms...)
					if labels.Compare(s.order, o.order) < 0 {
						o.order = s.order
					}
					continue series
				}
			}
			at[hash] = append(at[hash], len(out.series))
			out.series = append(out.series, *s)
			// The next part is appended to memory of our own.
			last := &out.series[len(out.series)-1]
			last.Floats, last.Histograms = slices.Clip(last.Floats), slices.Clip(last.Histograms)
		}
	}
	slices.SortFunc(out.series, func(a, b partialSeries) int { return labels.Compare(a.order, b.order) })
	return out
}

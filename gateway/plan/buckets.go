package plan

import (
	"cmp"
	"context"
	"math"
	"slices"
	"strconv"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/schema"
)

// overBuckets notes that histogram_quantile() stands over a leaf, and gives what is to stand
// in the place of both. The engine puts the buckets of each step together anew, by
// their labels, which takes longer than many a leaf.
func (p *planner) overBuckets(n *parser.Call) parser.Expr {
	phi, ok := n.Args[0].(*parser.NumberLiteral)
	if !ok || !(phi.Val >= 0 && phi.Val <= 1) || len(p.leaves) == 0 { // others have warnings
		return n
	}
	l := p.leaves[len(p.leaves)-1]
	if !l.stands(n.Args[1]) {
		return n
	}
	l.phi = phi.Val
	l.over = &parser.ParenExpr{PosRange: n.PosRange, Expr: n}
	return l.over
}

// bucket is the series of one.
type bucket struct {
	upper  float64
	floats []promql.FPoint // of which the first ones are done
}

// histogramOf are the buckets that differ in nothing else.
type histogramOf struct {
	labels  labels.Labels
	order   labels.Labels
	buckets []bucket
}

// quantiles makes of a leaf's result what histogram_quantile() over it gives, as
// promql.funcHistogramQuantile does. It reports false if the engine has to do it: where there
// is something to be warned of, native histograms, or the names of metrics.
func (l *Leaf) quantiles(ctx context.Context, series []partialSeries) ([]partialSeries, bool) {
	var all []*histogramOf
	index := map[string]*histogramOf{}
	var key []byte
	input := make(promql.Matrix, len(series))
	b := labels.NewBuilder(labels.EmptyLabels())
	for i := range series {
		s := &series[i]
		metric := s.Metric
		if s.DropName {
			metric = metric.DropReserved(schema.IsMetadataLabel)
		}
		input[i].Metric = metric
		upper, err := strconv.ParseFloat(metric.Get(model.BucketLabel), 64)
		if err != nil || math.IsNaN(upper) || len(s.Histograms) > 0 || metric.Has(model.MetricNameLabel) || named(metric) {
			return nil, false
		}
		key = metric.BytesWithoutLabels(key, model.BucketLabel)
		h := index[string(key)]
		if h == nil {
			b.Reset(metric)
			h = &histogramOf{labels: b.Del(model.BucketLabel).Labels(), order: s.order}
			index[string(key)] = h
			all = append(all, h)
		}
		h.buckets = append(h.buckets, bucket{upper, s.Floats})
	}
	if input.ContainsSameLabelset() { // that is an error of the engine's
		return nil, false
	}
	out := make([]partialSeries, 0, len(all))
	for _, h := range all {
		floats, ok := h.quantile(l.phi)
		if !ok || ctx.Err() != nil { // as the engine will find, too
			return nil, false
		}
		out = append(out, partialSeries{promql.Series{Metric: h.labels, Floats: floats, DropName: true}, h.order})
	}
	return out, true
}

// named says whether there are other labels that go with a metric's name.
func named(ls labels.Labels) bool {
	return ls.Has(model.MetricTypeLabel) || ls.Has(model.MetricUnitLabel)
}

// quantile at each time that one of the buckets has. It reports false where there is a
// warning.
func (h *histogramOf) quantile(phi float64) ([]promql.FPoint, bool) {
	slices.SortStableFunc(h.buckets, func(a, b bucket) int { return cmp.Compare(a.upper, b.upper) })
	longest := 0
	for i := range h.buckets {
		longest = max(longest, len(h.buckets[i].floats))
	}
	out := make([]promql.FPoint, 0, longest)
	at := make(promql.Buckets, 0, len(h.buckets))
	counts, proper := make([]float64, len(h.buckets)), h.proper()
	for {
		if proper {
			out = h.straight(phi, counts, out)
		}
		t := int64(math.MaxInt64)
		for i := range h.buckets {
			if f := h.buckets[i].floats; len(f) > 0 {
				t = min(t, f[0].T)
			}
		}
		at = at[:0]
		for i := range h.buckets {
			if f := h.buckets[i].floats; len(f) > 0 && f[0].T == t {
				at = append(at, promql.Bucket{UpperBound: h.buckets[i].upper, Count: f[0].F})
				h.buckets[i].floats = f[1:]
			}
		}
		if len(at) == 0 {
			return out, true
		}
		v, forced, _, _, _, _ := promql.BucketQuantile(phi, at)
		if forced {
			return nil, false
		}
		out = append(out, promql.FPoint{T: t, F: v})
	}
}

// proper: the bounds differ, and the last one, of two or more, is +Inf.
func (h *histogramOf) proper() bool {
	n := len(h.buckets)
	for i := 1; i < n; i++ {
		if h.buckets[i-1].upper == h.buckets[i].upper {
			return false
		}
	}
	return n > 1 && math.IsInf(h.buckets[n-1].upper, 1)
}

// straight appends the quantiles of proper buckets up to a time that not all of them have, or at which one of them is less
// than that of a lower bound or so little more that promql takes it for rounding. It is promql.BucketQuantile
// without the tests for what can't be then.
func (h *histogramOf) straight(phi float64, counts []float64, out []promql.FPoint) []promql.FPoint {
	bs := h.buckets
	last := len(bs) - 1
	n := len(bs[0].floats)
	for i := range bs {
		n = min(n, len(bs[i].floats))
	}
	k := 0
steps:
	for ; k < n; k++ {
		t, prev := bs[0].floats[k].T, 0.0
		for i := range bs {
			p := &bs[i].floats[k]
			// promql's tolerance is 1e-12 of the sum of both.
			if p.T != t || p.F != prev && !(p.F > prev*(1+1e-11) && p.F > 1e-300) {
				break steps
			}
			prev = p.F
			counts[i] = prev
		}
		rank := phi * prev
		b := 0
		for b < last && !(counts[b] >= rank) {
			b++
		}
		var v float64
		switch {
		case prev == 0:
			v = math.NaN()
		case b == last:
			v = bs[last-1].upper
		case b == 0 && bs[0].upper <= 0:
			v = bs[0].upper
		default:
			start, end, count := 0.0, bs[b].upper, counts[b]
			if b > 0 {
				start = bs[b-1].upper
				count -= counts[b-1]
				rank -= counts[b-1]
			}
			v = start + (end-start)*(rank/count)
		}
		out = append(out, promql.FPoint{T: t, F: v})
	}
	for i := range bs {
		bs[i].floats = bs[i].floats[k:]
	}
	return out
}

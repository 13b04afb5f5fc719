package gateway

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
)

// federate is Prometheus's /federate: the last sample of each series that is
// selected, as an exposition that another Prometheus scrapes.
func (a *API) federate(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, fmt.Sprintf("error parsing form values: %v", err), http.StatusBadRequest)
		return
	}
	v := a.variantOf(r.Context(), tenantsOf(r.Context()))
	sets, err := v.parser.ParseMetricSelectors(r.Form["match[]"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	format := expfmt.NegotiateAccept(r.Header, expfmt.NewFormat(expfmt.TypeProtoDelim), expfmt.NewFormat(expfmt.TypeProtoText), expfmt.NewFormat(expfmt.TypeProtoCompact), expfmt.NewFormat(expfmt.TypeTextPlain))
	w.Header().Set("Content-Type", string(format))
	now := time.Now()
	samples, err := a.lastSamples(r.Context(), sets, now.Add(-v.options.LookbackDelta), now)
	if err != nil {
		code, _ := errorClass(err)
		http.Error(w, err.Error(), code)
		return
	}
	binary := format.FormatType() != expfmt.TypeTextPlain
	enc := expfmt.NewEncoder(w, format)
	for family := range families(samples, binary) {
		if err := enc.Encode(family); err != nil {
			a.logger.Debug("answer to /federate not written", "err", err)
			return
		}
	}
}

// lastSamples gives the last sample of each series that one of the sets selects,
// if it is no staleness marker, by metric name.
func (a *API) lastSamples(ctx context.Context, sets [][]*labels.Matcher, from, to time.Time) (_ promql.Vector, err error) {
	mint, maxt := from.UnixMilli(), to.UnixMilli()
	q, err := a.storage.Querier(mint, maxt)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	var series []storage.SeriesSet
	for _, ms := range sets {
		series = append(series, q.Select(ctx, true, &storage.SelectHints{Start: mint, End: maxt}, ms...))
	}
	set := storage.NewMergeSeriesSet(series, 0, storage.ChainedSeriesMerge)
	var out promql.Vector
	var it chunkenc.Iterator
	for set.Next() {
		it = set.At().Iterator(it)
		s := promql.Sample{Metric: set.At().Labels()}
		present := false
		for vt := it.Next(); vt != chunkenc.ValNone; vt = it.Next() {
			present = true
			switch vt {
			case chunkenc.ValFloat:
				s.T, s.F = it.At()
				s.H = nil
			default:
				s.T, s.H = it.AtFloatHistogram(nil)
			}
		}
		if err := it.Err(); err != nil {
			return nil, err
		}
		if !present || s.H == nil && value.IsStaleNaN(s.F) || s.H != nil && value.IsStaleNaN(s.H.Sum) {
			continue
		}
		out = append(out, s)
	}
	if err := set.Err(); err != nil {
		return nil, err
	}
	if ws := set.Warnings(); len(ws) > 0 {
		// There is no place for warnings in an exposition.
		a.logger.Warn("answer to /federate may lack samples", "tenant", TenantOf(ctx), "warnings", ws.AsErrors())
	}
	slices.SortStableFunc(out, func(a, b promql.Sample) int {
		return strings.Compare(a.Metric.Get(model.MetricNameLabel), b.Metric.Get(model.MetricNameLabel))
	})
	return out, nil
}

// kind of samples that can be in one metric family.
type kind int

const (
	untyped kind = iota
	counterHistogram
	gaugeHistogram
)

func kindOf(s *promql.Sample) kind {
	switch {
	case s.H == nil:
		return untyped
	case s.H.CounterResetHint == histogram.GaugeType:
		return gaugeHistogram
	default:
		return counterHistogram
	}
}

// families puts samples, which are sorted by metric name, into metric families. A
// name has several where it has samples of several kinds. Native histograms are
// left out of formats that aren't protocol buffers, which have no way to write
// them.
func families(samples promql.Vector, protobuf bool) iter.Seq[*dto.MetricFamily] {
	types := map[kind]dto.MetricType{
		untyped: dto.MetricType_UNTYPED, counterHistogram: dto.MetricType_HISTOGRAM, gaugeHistogram: dto.MetricType_GAUGE_HISTOGRAM,
	}
	return func(yield func(*dto.MetricFamily) bool) {
		var family *dto.MetricFamily
		var of kind
		for i := range samples {
			s := &samples[i]
			name := s.Metric.Get(model.MetricNameLabel)
			if name == "" || s.H != nil && !s.H.UsesCustomBuckets() && !protobuf {
				continue
			}
			if k := kindOf(s); family == nil || family.GetName() != name || k != of {
				if family != nil && !yield(family) {
					return
				}
				of = k
				family = &dto.MetricFamily{Name: new(name), Type: types[k].Enum()}
			}
			family.Metric = append(family.Metric, toMetric(s))
		}
		if family != nil {
			yield(family)
		}
	}
}

func toMetric(s *promql.Sample) *dto.Metric {
	m := &dto.Metric{TimestampMs: new(s.T)}
	pair := func(name, value string) {
		m.Label = append(m.Label, &dto.LabelPair{Name: new(name), Value: new(value)})
	}
	s.Metric.Range(func(l labels.Label) {
		if l.Name != model.MetricNameLabel {
			pair(l.Name, l.Value)
		}
	})
	if !s.Metric.Has(model.InstanceLabel) {
		pair(model.InstanceLabel, "") // or the scraping Prometheus would put its own
	}
	switch {
	case s.H == nil:
		m.Untyped = &dto.Untyped{Value: new(s.F)}
	case s.H.UsesCustomBuckets():
		m.Histogram = classicHistogram(s.H)
	default:
		m.Histogram = nativeHistogram(s.H)
	}
	return m
}

func nativeHistogram(h *histogram.FloatHistogram) *dto.Histogram {
	spans := func(in []histogram.Span) []*dto.BucketSpan {
		var out []*dto.BucketSpan
		for _, s := range in {
			out = append(out, &dto.BucketSpan{Offset: new(s.Offset), Length: new(s.Length)})
		}
		return out
	}
	return &dto.Histogram{
		SampleCountFloat: new(h.Count), SampleSum: new(h.Sum), Schema: new(h.Schema),
		ZeroThreshold: new(h.ZeroThreshold), ZeroCountFloat: new(h.ZeroCount),
		NegativeSpan: spans(h.NegativeSpans), NegativeCount: h.NegativeBuckets,
		PositiveSpan: spans(h.PositiveSpans), PositiveCount: h.PositiveBuckets,
	}
}

// classicHistogram has a bucket for each custom bound; that of +Inf is implied.
func classicHistogram(h *histogram.FloatHistogram) *dto.Histogram {
	out := &dto.Histogram{SampleCountFloat: new(h.Count), SampleSum: new(h.Sum)}
	counts := make([]float64, len(h.CustomValues)+1)
	for it := h.PositiveBucketIterator(); it.Next(); {
		if b := it.At(); int(b.Index) < len(counts) {
			counts[b.Index] = b.Count
		}
	}
	sum := 0.0
	for i, le := range h.CustomValues {
		sum += counts[i]
		out.Bucket = append(out.Bucket, &dto.Bucket{UpperBound: new(le), CumulativeCountFloat: new(sum)})
	}
	return out
}

package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	v1 "github.com/prometheus/prometheus/web/api/v1"
)

// headSpan is how far back series count as those of a Prometheus's head, where a
// request doesn't say.
const headSpan = 2 * time.Hour

// cardinality counts label sets.
type cardinality struct {
	series uint64
	labels map[string]map[string]uint64 // name, value: series
}

func (c *cardinality) add(ls labels.Labels) {
	c.series++
	ls.Range(func(l labels.Label) {
		values := c.labels[l.Name]
		if values == nil {
			values = map[string]uint64{}
			c.labels[l.Name] = values
		}
		values[l.Value]++
	})
}

func badParam(name string, err error) error {
	return problem{fmt.Errorf("invalid parameter %q: %w", name, err)}
}

// timeParam reads a time as Prometheus does.
func timeParam(r *http.Request, name string, otherwise time.Time) (time.Time, error) {
	v := r.FormValue(name)
	if v == "" {
		return otherwise, nil
	}
	if f, err := strconv.ParseFloat(v, 64); err == nil && math.Abs(f) < 1e12 {
		return time.UnixMilli(int64(math.Round(f * 1000))), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
		return t, nil
	}
	return time.Time{}, badParam(name, fmt.Errorf("cannot parse %q to a valid timestamp", v))
}

// limitParam is that of status/tsdb.
func limitParam(r *http.Request) (int, error) {
	const maxLimit = 10000 // Prometheus's
	s := r.FormValue("limit")
	if s == "" {
		return 10, nil
	}
	limit, err := strconv.Atoi(s)
	if err != nil || limit < 1 {
		return 0, problem{errors.New("limit must be a positive number")}
	}
	if limit > maxLimit {
		return 0, problem{fmt.Errorf("limit must not exceed %d", maxLimit)}
	}
	return limit, nil
}

// eachSeries calls fn with the labels of each series, in heads or history, that
// has samples from start to end, which are the last two hours where the request
// doesn't say, and that one of match[] selects, if there are any.
func (a *API) eachSeries(r *http.Request, fn func(labels.Labels)) (_ annotations.Annotations, err error) {
	now := time.Now()
	end, err := timeParam(r, "end", now)
	if err != nil {
		return nil, err
	}
	start, err := timeParam(r, "start", end.Add(-headSpan))
	if err != nil {
		return nil, err
	}
	if end.Before(start) {
		return nil, badParam("end", errors.New("end timestamp must not be before start time"))
	}
	ctx := r.Context()
	sets := [][]*labels.Matcher{{labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, ".*")}} // all
	if match := r.Form["match[]"]; len(match) > 0 {
		if sets, err = a.variantOf(ctx, tenantsOf(ctx)).parser.ParseMetricSelectors(match); err != nil {
			return nil, badParam("match[]", err)
		}
	}
	q, err := a.storage.Querier(start.UnixMilli(), end.UnixMilli())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	hints := &storage.SelectHints{Start: start.UnixMilli(), End: end.UnixMilli(), Func: "series"}
	var series []storage.SeriesSet
	for _, ms := range sets {
		series = append(series, q.Select(ctx, true, hints, ms...))
	}
	set := storage.NewMergeSeriesSet(series, 0, storage.ChainedSeriesMerge)
	for set.Next() {
		fn(set.At().Labels())
	}
	return set.Warnings(), set.Err()
}

// tsdbStatus is status/tsdb, over heads and history. The number of chunks and the
// first and last time are those of the heads.
func (a *API) tsdbStatus(w http.ResponseWriter, r *http.Request) {
	limit, err := limitParam(r)
	if err != nil {
		fail(w, err)
		return
	}
	c := cardinality{labels: map[string]map[string]uint64{}}
	warnings, err := a.eachSeries(r, c.add)
	if err != nil {
		fail(w, err)
		return
	}
	heads, ws, err := a.storage.stats(r.Context(), 1)
	if err != nil {
		fail(w, err)
		return
	}
	warnings = warnings.Merge(ws)
	status := c.status(limit)
	hs := &status.HeadStats
	first := true
	for _, s := range heads {
		if s.Series == 0 {
			continue
		}
		if first {
			hs.MinTime, hs.MaxTime, first = s.Mint, s.Maxt, false
		}
		hs.MinTime, hs.MaxTime = min(hs.MinTime, s.Mint), max(hs.MaxTime, s.Maxt)
		hs.ChunkCount += int64(s.Chunks)
	}
	respond(w, status, warnings)
}

func (c *cardinality) status(limit int) *v1.TSDBStatus {
	out := &v1.TSDBStatus{HeadStats: v1.HeadStats{NumSeries: c.series}}
	values, size, pairs := map[string]uint64{}, map[string]uint64{}, map[string]uint64{}
	for name, of := range c.labels {
		values[name] = uint64(len(of))
		out.HeadStats.NumLabelPairs += len(of)
		for value, n := range of {
			size[name] += labels.SizeOfLabels(name, value, n)
			pairs[name+"="+value] = n
		}
	}
	out.SeriesCountByMetricName = greatest(c.labels[model.MetricNameLabel], limit)
	out.LabelValueCountByLabelName = greatest(values, limit)
	out.MemoryInBytesByLabelName = greatest(size, limit)
	out.SeriesCountByLabelValuePair = greatest(pairs, limit)
	return out
}

// greatest gives the entries with the greatest values, of equal ones the first by
// name.
func greatest(m map[string]uint64, limit int) []v1.TSDBStat {
	out := make([]v1.TSDBStat, 0, len(m))
	for name, n := range m {
		out = append(out, v1.TSDBStat{Name: name, Value: n})
	}
	slices.SortFunc(out, func(a, b v1.TSDBStat) int {
		return cmp.Or(cmp.Compare(b.Value, a.Value), cmp.Compare(a.Name, b.Name))
	})
	return out[:min(len(out), limit)]
}

// activeSeries is the answer of status/active_series.
type activeSeries struct {
	NumSeries   uint64        `json:"numSeries"`
	By          string        `json:"by"`
	NumValues   int           `json:"numValues"`
	SeriesCount []v1.TSDBStat `json:"seriesCount"` // by value of the label; the greatest
}

// activeSeries counts series by the value of one label, the metric name if the
// request doesn't say which.
func (a *API) activeSeries(w http.ResponseWriter, r *http.Request) {
	limit, err := limitParam(r)
	if err != nil {
		fail(w, err)
		return
	}
	out := activeSeries{By: r.FormValue("by")}
	if out.By == "" {
		out.By = model.MetricNameLabel
	}
	counts := map[string]uint64{}
	warnings, err := a.eachSeries(r, func(ls labels.Labels) {
		out.NumSeries++
		if v := ls.Get(out.By); v != "" {
			counts[v]++
		}
	})
	if err != nil {
		fail(w, err)
		return
	}
	out.NumValues, out.SeriesCount = len(counts), greatest(counts, limit)
	respond(w, out, warnings)
}

package plan_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/teststorage"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// TestOnlySummaries: when samples are past their retention, before they are removed and
// after, queries at steps of an hour answer what Prometheus's engine makes of the samples,
// which another database has; others answer nothing of that time, and say why.
func TestOnlySummaries(t *testing.T) {
	const delay, step = 200 * time.Millisecond, 15 * time.Second
	const days = 3
	// The first two days are past the retention, and the third isn't.
	start := time.Now().Add(-days * 24 * time.Hour).Truncate(24 * time.Hour)
	raw := time.Since(start.Add(48*time.Hour + 30*time.Minute)) // in the middle of an hour
	rs := &history.Retentions{Tenants: map[string]history.Retention{}}
	c := gatewaytest.New(t, gatewaytest.Options{VisibilityDelay: delay, Run: true, Retentions: func() *history.Retentions { return rs }})
	send := c.Shipper(gateway.DefaultTenant)
	prom := teststorage.New(t)
	app := prom.Appender(t.Context())
	r := rand.New(rand.NewPCG(8, 2))
	compactor, err := compact.New(compact.Options{
		Objects: c.Objects, Index: c.Index, Dir: t.TempDir(), Grace: 50 * time.Millisecond, MaxSources: 2, CleanAge: 40 * time.Millisecond,
		Ranges: []time.Duration{time.Second, 24 * time.Hour}, Retentions: func() *history.Retentions { return rs },
	})
	require.NoError(t, err)
	blocks := func() []index.BlockRow {
		t.Helper()
		_, err := compactor.Round(t.Context())
		require.NoError(t, err)
		rows, err := c.Index.AllBlocks(t.Context(), gateway.DefaultTenant)
		require.NoError(t, err)
		return rows
	}
	settled := func(until func(index.BlockRow) bool) {
		t.Helper()
		require.Eventually(t, func() bool { return !slices.ContainsFunc(blocks(), func(b index.BlockRow) bool { return !until(b) }) }, time.Minute, 20*time.Millisecond)
	}
	for d := range days {
		var ss []gatewaytest.Sample
		for i := range 8 {
			counter := labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))
			gauge := labels.FromStrings("__name__", "load", "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))
			rare := labels.FromStrings("__name__", "rare", "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))
			n := 0.0
			for k := range int(24 * time.Hour / step) {
				at := start.Add(time.Duration(d)*24*time.Hour + time.Duration(k+1)*step).UnixMilli()
				if r.Float64() < 0.0005 {
					n = 0
				}
				n += float64(r.IntN(50))
				if r.Float64() < 0.02 {
					continue
				}
				v := math.Round(r.NormFloat64()*1000) / 100
				if r.Float64() < 0.001 {
					n, v = math.Float64frombits(value.StaleNaN), math.NaN()
				}
				ss = append(ss, gatewaytest.Sample{Labels: counter, T: at, V: n}, gatewaytest.Sample{Labels: gauge, T: at, V: v})
				if k%60 == i { // of which there are no summaries as long as there are samples
					ss = append(ss, gatewaytest.Sample{Labels: rare, T: at, V: v})
				}
				if math.IsNaN(n) {
					n = 0
				}
			}
		}
		// A day's block comes of two of the level below.
		for half := range slices.Chunk(ss, len(ss)/2+1) {
			for part := range slices.Chunk(half, 10_000) {
				require.NoError(t, send.Send(t.Context(), part...))
			}
			require.NoError(t, c.Flush(t.Context()))
			settled(func(b index.BlockRow) bool { return b.Level > 0 })
		}
		slices.SortStableFunc(ss, func(a, b gatewaytest.Sample) int { return int(a.T - b.T) })
		for _, s := range ss {
			_, err := app.Append(0, s.Labels, s.T, s.V)
			require.NoError(t, err)
		}
	}
	require.NoError(t, app.Commit())
	settled(func(b index.BlockRow) bool { return b.Level == 2 })
	time.Sleep(delay + 2*time.Second) // heads let go of what is in blocks, once a second

	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	planned := plan.New(engine, o, plan.Spread{TenantOf: tenantOf})
	run := func(e promql.QueryEngine, q storage.Queryable, expr string, from, to time.Time, step time.Duration) *promql.Result {
		t.Helper()
		query, err := e.NewRangeQuery(t.Context(), q, nil, expr, from, to, step)
		require.NoError(t, err)
		defer query.Close()
		return detach(query.Exec(t.Context()))
	}
	lost := func(r *promql.Result) bool {
		for text, err := range r.Warnings {
			if errors.Is(err, annotations.PromQLWarning) && strings.Contains(text, "past their retention") {
				return true
			}
		}
		return false
	}
	end := start.Add(days * 24 * time.Hour)
	check := func(when string, only bool) {
		t.Helper()
		for _, expr := range []string{
			"sum by (job) (rate(requests_total[1h]))", "max_over_time(load[2h])", "avg by (job) (avg_over_time(load[1h]))",
			"count_over_time(load[1h])", "resets(requests_total[6h])", "changes(load[1h])", "sum(load)", "load", "rare", "count_over_time(rare[2h])",
			"stddev_over_time(load[1h])", "irate(requests_total[1h])", "delta(load[1h])", "sum_over_time(requests_total[3h] offset 1h)",
			"last_over_time(load[1h])", "increase(requests_total[1d])", "absent_over_time(load{i='3'}[1h])", "stdvar_over_time(rare[1d])",
		} {
			got := run(planned, c.Storage, expr, start, end, time.Hour)
			if diff := differ(run(engine, prom, expr, start, end, time.Hour), got); diff != "" {
				t.Errorf("%s: %s: %s", when, expr, diff)
			}
			if lost(got) {
				t.Errorf("%s: %s: %v", when, expr, got.Warnings)
			}
		}
		if !only {
			return
		}
		for _, expr := range []string{"quantile_over_time(0.5, load[1h])", "deriv(load[1h])", "rate(requests_total[1h30s])[2h:1h]", "load + 1"} {
			from, every := start.Add(24*time.Hour), time.Hour
			if expr == "load + 1" {
				from = from.Add(7 * time.Second)
			}
			for name, e := range map[string]promql.QueryEngine{"planned": planned, "engine": engine} {
				q, err := e.NewInstantQuery(t.Context(), c.Storage, nil, expr, from)
				require.NoError(t, err)
				if r := q.Exec(t.Context()); !lost(r) {
					t.Errorf("%s: %s: %s, at %s: no warning, but %v, %v", when, name, expr, from, r.Err, r.Warnings)
				}
				q.Close()
				if strings.Contains(expr, ":") {
					continue
				}
				r := run(e, c.Storage, expr, from, from.Add(10*time.Hour), every)
				if m, err := r.Matrix(); err != nil || len(m) > 0 || !lost(r) {
					t.Errorf("%s: %s: %s: %d series, %v, %v", when, name, expr, len(m), err, r.Warnings)
				}
			}
		}
		// Where there are samples, nothing is said.
		const expr = "quantile_over_time(0.5, load[1h])"
		got := run(planned, c.Storage, expr, end.Add(-10*time.Hour), end, time.Hour)
		if diff := differ(run(engine, prom, expr, end.Add(-10*time.Hour), end, time.Hour), got); diff != "" || lost(got) {
			t.Errorf("%s: %s: %s, %v", when, expr, diff, got.Warnings)
		}
		q, err := c.Storage.Querier(start.UnixMilli(), start.Add(12*time.Hour).UnixMilli())
		require.NoError(t, err)
		defer q.Close()
		names, _, err := q.LabelValues(t.Context(), "__name__", nil)
		require.NoError(t, err)
		require.Equal(t, []string{"load", "rare", "requests_total"}, names)
		jobs, _, err := q.LabelValues(t.Context(), "job", nil, labels.MustNewMatcher(labels.MatchRegexp, "i", "1|2"))
		require.NoError(t, err)
		require.Equal(t, []string{"1", "2"}, jobs)
		set := q.Select(t.Context(), true, &storage.SelectHints{Func: "series", Start: start.UnixMilli(), End: start.Add(12 * time.Hour).UnixMilli()},
			labels.MustNewMatcher(labels.MatchRegexp, "__name__", ".+"))
		n := 0
		for set.Next() {
			n++
		}
		require.NoError(t, set.Err())
		require.Equal(t, 24, n)
	}
	check("all samples are there", false)
	rs = &history.Retentions{Default: history.Retention{Raw: raw, Long: 100 * 24 * time.Hour}}
	check("past the retention", true)
	settled(func(b index.BlockRow) bool { return b.MaxT > start.Add(48*time.Hour).UnixMilli() || b.Samples == 0 })
	check("removed", true)

	// What is gone stays gone, and queries say so, though the retention is another.
	rs = &history.Retentions{}
	const expr = "quantile_over_time(0.5, load[1h])"
	for name, e := range map[string]promql.QueryEngine{"planned": planned, "engine": engine} {
		if r := run(e, c.Storage, expr, start.Add(time.Hour), start.Add(9*time.Hour), time.Hour); r.Err != nil || !lost(r) {
			t.Errorf("%s: kept for ever: %v, %v", name, r.Err, r.Warnings)
		}
	}
	// So do those that could be answered from summaries of 5 minutes, of which there are none.
	const fine = "sum by (job) (sum_over_time(load[10m]))"
	if r := run(planned, c.Storage, fine, start.Add(time.Hour), start.Add(9*time.Hour), 5*time.Minute); r.Err != nil || !lost(r) {
		t.Errorf("kept for ever, by 5 minutes: %v, %v", r.Err, r.Warnings)
	}
	newer := run(planned, c.Storage, fine, end.Add(-10*time.Hour), end, 5*time.Minute)
	if diff := differ(run(engine, prom, fine, end.Add(-10*time.Hour), end, 5*time.Minute), newer); diff != "" || lost(newer) {
		t.Errorf("kept for ever, by 5 minutes: %s, %v", diff, newer.Warnings)
	}
	const sum = "sum by (job) (sum_over_time(load[2h]))"
	got := run(planned, c.Storage, sum, start, end, time.Hour)
	if diff := differ(run(engine, prom, sum, start, end, time.Hour), got); diff != "" {
		t.Errorf("kept for ever: %s", diff)
	}
}

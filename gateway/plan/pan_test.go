package plan_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// TestPan: a dashboard of a month that is refreshed, as time goes on, and panned, reads only what is new.
func TestPan(t *testing.T) {
	const day, interval, series = 24 * time.Hour, time.Minute, 20
	const delay = 300 * time.Millisecond
	c := gatewaytest.New(t, gatewaytest.Options{VisibilityDelay: delay, Run: true})
	end := 60 * day
	value := func(i int, at time.Duration) float64 { return float64(i+1) * float64(at/time.Minute) }
	publish := func(from, to time.Duration) {
		var all []*chunkfmt.Series
		for _, name := range []string{"load", "requests_total"} {
			for i := range series {
				s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", name, "i", fmt.Sprintf("%02d", i), "job", fmt.Sprint(i%3))}
				for at := from + interval; at <= to; at += interval {
					s.Floats.T, s.Floats.V = append(s.Floats.T, at.Milliseconds()), append(s.Floats.V, value(i, at))
				}
				all = append(all, s)
			}
		}
		_, err := c.Import(t.Context(), gateway.DefaultTenant, chunkfmt.WriterOptions{Rollups: to-from >= day}, all...)
		require.NoError(t, err)
	}
	for at := time.Duration(0); at < end-day; at += day {
		publish(at, at+day)
	}
	for at := end - day; at < end-time.Hour; at += time.Hour {
		publish(at, at+time.Hour)
	}
	send := c.Shipper(gateway.DefaultTenant)
	ship := func(from, to time.Duration) {
		var ss []gatewaytest.Sample
		for at := from + interval; at <= to; at += interval {
			for _, name := range []string{"load", "requests_total"} {
				for i := range series {
					ss = append(ss, gatewaytest.Sample{
						Labels: labels.FromStrings("__name__", name, "i", fmt.Sprintf("%02d", i), "job", fmt.Sprint(i%3)), T: at.Milliseconds(), V: value(i, at),
					})
				}
			}
		}
		require.NoError(t, send.Send(t.Context(), ss...))
	}
	ship(end-time.Hour, end)

	o := suiteOptions
	o.MaxSamples = 50_000_000
	inner := promqltest.NewTestEngineWithOpts(t, o)
	whole := plan.New(inner, o, plan.Spread{})
	for _, q := range []struct {
		expr    string
		step    time.Duration
		instant bool
		summed  bool // of summaries, which are so few that parts are of less
	}{
		{expr: "sum by (job) (rate(requests_total[5m]))", step: 30 * time.Minute},
		{expr: "sum by (job) (rate(requests_total[1h]))", step: time.Hour, summed: true},
		{expr: "sum by (job) (rate(requests_total[1h15s]))", step: time.Hour, summed: true},
		{expr: "topk(5, max_over_time(load[1h]))", step: time.Hour, summed: true},
		{expr: "quantile(0.5, avg_over_time(load[2h]))", step: time.Hour, summed: true},
		{expr: "load", step: 30 * time.Minute},
		{expr: "sum(rate(load[5m]))", step: 30 * time.Minute}, // with an info: it isn't named as counters are
		{expr: "sum(load)", step: 10 * time.Minute},
		{expr: "max_over_time(load[6h])", step: time.Hour},
		{expr: "sum(increase(requests_total[1d]))", step: time.Hour},
		{expr: "max_over_time(sum(rate(requests_total[5m]))[1h:5m])", step: time.Hour},
		{expr: "max_over_time(sum(rate(requests_total[5m]))[30d:5m])", instant: true},
	} {
		results, err := plan.NewResults(64<<20, nil, prometheus.NewRegistry())
		require.NoError(t, err)
		less := int64(1 << 8)
		if q.summed {
			less = 1 << 4
		}
		e := plan.New(inner, o, plan.Usual(plan.Spread{TenantOf: tenantOf, Results: results}, less))
		read := func(e *plan.Engine, from, to time.Duration) (*promql.Result, account.Cost) {
			ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
			defer done()
			at := func(d time.Duration) time.Time { return time.UnixMilli(d.Milliseconds()) }
			query, err := e.NewRangeQuery(ctx, c.Storage, nil, q.expr, at(from.Truncate(q.step)), at(to.Truncate(q.step)), q.step)
			if q.instant {
				query, err = e.NewInstantQuery(ctx, c.Storage, nil, q.expr, at(to))
			}
			require.NoError(t, err)
			defer query.Close()
			r := query.Exec(ctx)
			require.NoError(t, r.Err)
			return detach(r), acc.Cost()
		}
		_, all := read(e, end-30*day, end)
		require.Greater(t, all.PartsHere, int64(20), q.expr)
		if q.summed {
			require.Positive(t, all.Windows, q.expr)
		}
		least := 0.1 * float64(all.PartsHere) // two or three parts are fresh
		for _, x := range []struct {
			what string
			from time.Duration
			new  float64
		}{
			{"again", 0, 0},
			{"a minute later", time.Minute, 0},
			{"an hour later", time.Hour, 0},
			{"a day before", -day, 1. / 30},
			{"a week before", -7 * day, 6. / 30},
			{"back", 0, 0},
		} {
			r, got := read(e, end-30*day+x.from, end+x.from)
			want, _ := read(whole, end-30*day+x.from, end+x.from)
			if diff := differ(want, r); diff != "" {
				t.Errorf("%s, %s: %s", q.expr, x.what, diff)
			}
			if most := least + 1.1*x.new*float64(all.PartsHere); float64(got.PartsHere) > most || got.PartsHere+got.PartsKept < all.PartsHere/2 {
				t.Errorf("%s, %s: %d parts were computed, want %g at most, and %d were kept; first %d were computed", q.expr, x.what, got.PartsHere, most, got.PartsKept, all.PartsHere)
			}
			if most := (0.1 + 1.1*x.new) * float64(all.Windows); float64(got.Windows) > most {
				t.Errorf("%s, %s: %d summaries were read, want %g at most; first it were %d", q.expr, x.what, got.Windows, most, all.Windows)
			}
		}
	}
}

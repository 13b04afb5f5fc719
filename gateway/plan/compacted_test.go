package plan_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// TestCompactedSummaries: what compaction made of flushed blocks answers from
// summaries what the engine makes of the samples; so it does when late samples lie
// over them, in heads or blocks, and when some are deleted.
func TestCompactedSummaries(t *testing.T) {
	const delay = 200 * time.Millisecond
	c := gatewaytest.New(t, gatewaytest.Options{VisibilityDelay: delay, Run: true})
	send := c.Shipper(gateway.DefaultTenant)
	r := rand.New(rand.NewPCG(1, 2))
	const days, step = 2, 15 * time.Second
	ship := func(from, to time.Duration, skip float64) {
		var ss []gatewaytest.Sample
		for i := range 12 {
			counter := labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))
			gauge := labels.FromStrings("__name__", "load", "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))
			n := 0.0
			for at := from; at < to; at += step {
				if r.Float64() < 0.0005 {
					n = 0
				}
				n += float64(r.IntN(50))
				if r.Float64() < skip {
					continue
				}
				ms := at.Milliseconds() + int64(i)*700 + r.Int64N(3)
				v := math.Round(r.NormFloat64()*1000) / 100
				if r.Float64() < 0.001 {
					n, v = math.Float64frombits(value.StaleNaN), math.NaN()
				}
				ss = append(ss, gatewaytest.Sample{Labels: counter, T: ms, V: n}, gatewaytest.Sample{Labels: gauge, T: ms, V: v})
				if math.IsNaN(n) {
					n = 0
				}
			}
		}
		for part := range slices.Chunk(ss, 10_000) {
			require.NoError(t, send.Send(t.Context(), part...))
		}
		require.NoError(t, c.Flush(t.Context()))
	}
	// Two levels, so that blocks of a day come after one merge of flushes: as soon as
	// there are two of these.
	compactor, err := compact.New(compact.Options{
		Objects: c.Objects, Index: c.Index, Dir: t.TempDir(), Grace: 50 * time.Millisecond, MaxSources: 2,
		Ranges: []time.Duration{time.Second, 24 * time.Hour},
	})
	require.NoError(t, err)
	settle := func(level index.Level) {
		t.Helper()
		require.Eventually(t, func() bool {
			_, err := compactor.Round(t.Context())
			require.NoError(t, err)
			rows, err := c.Index.AllBlocks(t.Context(), gateway.DefaultTenant)
			require.NoError(t, err)
			return !slices.ContainsFunc(rows, func(b index.BlockRow) bool { return b.Level < level })
		}, time.Minute, 20*time.Millisecond)
		time.Sleep(delay + 2*time.Second) // heads let go of what is in blocks, once a second
	}
	const day = 24 * time.Hour
	for d := range days * day / day {
		ship(d*day+step, d*day+14*time.Hour, 0.02)
		settle(1)
		ship(d*day+12*time.Hour, d*day+day, 0.02) // some twice, with other values
		settle(2)
	}

	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	planned := plan.New(engine, o, plan.Spread{TenantOf: tenantOf})
	memory := account.NewMemory(0, prometheus.NewRegistry())
	check := func(when string) int64 {
		t.Helper()
		windows := int64(0)
		for _, expr := range []string{
			"sum by (job) (rate(requests_total[1h]))", "sum by (job) (increase(requests_total[1h15s]))", "max_over_time(load[2h])",
			"avg by (job) (avg_over_time(load[1h]))", "count_over_time(load[1h])", "resets(requests_total[6h])", "changes(load[1h])",
			"sum(load)", "stddev_over_time(load[1h])", "irate(requests_total[1h])", "delta(load[1h])", "rate(requests_total[5m])",
			"sum_over_time(requests_total[30m] offset 1h)", "last_over_time(load[1h])", "quantile_over_time(0.5, load[1h])",
		} {
			run := func(e promql.QueryEngine, ask bool) *promql.Result {
				ctx := t.Context()
				if ask {
					var acc *account.Account
					var done func()
					ctx, acc, done = memory.Open(ctx, "", account.Limits{})
					defer func() { windows += acc.Cost().Windows; done() }()
				}
				q, err := e.NewRangeQuery(ctx, c.Storage, nil, expr, time.Unix(0, 0), time.Unix(days*24*3600, 0), time.Hour)
				require.NoError(t, err)
				defer q.Close()
				return detach(q.Exec(ctx))
			}
			if diff := differ(run(engine, false), run(planned, true)); diff != "" {
				t.Errorf("%s: %s: %s", when, expr, diff)
			}
		}
		return windows
	}
	all := check("compacted")
	require.Greater(t, all, int64(5000))

	ship(20*time.Hour, 22*time.Hour, 0.9)
	some := check("late samples in heads and a block")
	require.Less(t, some, all)
	require.Greater(t, some, all/2)

	_, err = c.History.Delete(t.Context(), gateway.DefaultTenant, (30 * time.Hour).Milliseconds(), (31*time.Hour + time.Minute).Milliseconds(),
		labels.MustNewMatcher(labels.MatchEqual, "job", "1"))
	require.NoError(t, err)
	less := check("deleted in part")
	require.Less(t, less, some)

	// What came late is in blocks of its own: blocks of the last level aren't merged again.
	settle(1)
	ship(23*time.Hour, 24*time.Hour, 0.9)
	settle(2)
	require.Greater(t, check("late samples compacted"), all/2)
}

package plan_test

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestResultsInMemcached: what one gateway has computed another finds in memcached,
// with the same result; not what has warnings, nor what memcached doesn't have as it
// was put there.
func TestResultsInMemcached(t *testing.T) {
	const delay = 300 * time.Millisecond
	c := gatewaytest.New(t, gatewaytest.Options{VisibilityDelay: delay, Run: true})
	var ss []gatewaytest.Sample
	for at := time.Duration(0); at < 24*time.Hour; at += time.Minute {
		for _, i := range []string{"a", "b", "c"} {
			ss = append(ss, gatewaytest.Sample{Labels: labels.FromStrings("__name__", "requests_total", "i", i), T: at.Milliseconds(), V: at.Seconds()})
		}
	}
	require.NoError(t, c.Shipper(gateway.DefaultTenant).Send(t.Context(), ss...))
	require.NoError(t, c.Flush(t.Context()))
	time.Sleep(4 * delay) // heads let go of what is in blocks

	addr, _ := testenv.Memcached(t)
	x := testenv.StartToxic(t, addr)
	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	type one struct {
		m      *historytest.Memcached
		engine promql.QueryEngine
		reg    *prometheus.Registry
	}
	gateways := func() *one {
		g := &one{m: historytest.StartMemcached(t, x.Addr), reg: prometheus.NewRegistry()}
		results, err := plan.NewResults(16<<20, g.m.Client, g.reg)
		require.NoError(t, err)
		g.engine = plan.New(engine, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
		return g
	}
	parts := func(g *one) map[string]float64 {
		out := map[string]float64{}
		ms, err := g.reg.Gather()
		require.NoError(t, err)
		for _, m := range ms {
			if m.GetName() == "epimetheus_gateway_query_parts_total" {
				for _, x := range m.GetMetric() {
					out[x.GetLabel()[0].GetValue()] = x.GetCounter().GetValue()
				}
			}
		}
		return out
	}
	check := func(g *one, expr string, from, to time.Duration) {
		t.Helper()
		run := func(e promql.QueryEngine) *promql.Result {
			q, err := e.NewRangeQuery(t.Context(), c.Storage, nil, expr, time.Unix(0, 0).Add(from), time.Unix(0, 0).Add(to), 10*time.Minute)
			require.NoError(t, err)
			defer q.Close()
			return detach(q.Exec(t.Context()))
		}
		if diff := differ(run(engine), run(g.engine)); diff != "" {
			t.Fatalf("%s: %s", expr, diff)
		}
		g.m.Idle(t)
	}
	const expr = "sum by (i) (rate(requests_total[10m]))"
	a, b := gateways(), gateways()
	check(a, expr, 0, 24*time.Hour)
	all := parts(a)
	require.Greater(t, all["here"], 20.)
	require.Zero(t, all["memcached"])
	check(b, expr, 0, 24*time.Hour)
	require.Equal(t, all["here"], parts(b)["memcached"])
	require.Zero(t, parts(b)["here"])
	// An explanation counts them as kept.
	ctx, explained := plan.WithExplanation(t.Context())
	q, err := gateways().engine.NewRangeQuery(ctx, c.Storage, nil, expr, time.Unix(0, 0), time.Unix(0, 0).Add(24*time.Hour), 10*time.Minute)
	require.NoError(t, err)
	require.NoError(t, q.Exec(ctx).Err)
	q.Close()
	require.Len(t, explained.Leaves, 1)
	require.InDelta(t, all["here"], explained.Leaves[0].Kept, 0)
	require.Zero(t, explained.Leaves[0].Here)
	// From then on in its memory; other steps of the same parts too.
	check(b, expr, 30*time.Minute, 23*time.Hour)
	require.Equal(t, all["here"], parts(b)["memcached"])
	require.Greater(t, parts(b)["kept"], 20.)
	require.Zero(t, parts(b)["here"])

	// With fewer steps than there are in a part: the next one puts more.
	check(a, "max(requests_total)", 10*time.Minute, 50*time.Minute)
	d := gateways()
	check(d, "max(requests_total)", 0, 2*time.Hour)
	e := gateways()
	check(e, "max(requests_total)", 0, 2*time.Hour)
	require.Zero(t, parts(e)["here"])

	// Damaged on the way: computed.
	x.Set(testenv.Damage)
	f := gateways()
	check(f, expr, 0, 24*time.Hour)
	require.Zero(t, parts(f)["memcached"])
	require.Equal(t, all["here"], parts(f)["here"])
	x.Set(testenv.Pure)

	// With warnings: kept by nobody.
	g := gateways()
	check(g, "sum(rate(requests_total[10m])) + sum(quantile_over_time(2, requests_total[10m]))", 0, 24*time.Hour)
	stored := g.m.Metric(t, "epimetheus_memcached_sets_total", "stored")
	h := gateways()
	check(h, "sum(rate(requests_total[10m])) + sum(quantile_over_time(2, requests_total[10m]))", 0, 24*time.Hour)
	require.Equal(t, stored, parts(h)["memcached"])

	// No answer at all: computed.
	x.Set(testenv.Cut)
	k := gateways()
	check(k, expr, 0, 24*time.Hour)
	require.Equal(t, all["here"], parts(k)["here"])
}

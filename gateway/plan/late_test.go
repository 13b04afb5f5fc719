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

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// TestLateSamples: no result that is kept hides samples that come later, be it those
// of an outage that was made good, a backfill or an import: neither while they are in
// a head nor once they are in a block. Results are kept all the same.
func TestLateSamples(t *testing.T) {
	const delay = 300 * time.Millisecond
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2, VisibilityDelay: delay, Run: true})
	send := c.Shipper(gateway.DefaultTenant)
	// Samples at times of an hour that a test chooses, over a day.
	ship := func(from, to time.Duration) {
		var ss []gatewaytest.Sample
		for i := range 5 {
			for at := from; at < to; at += 15 * time.Second {
				ss = append(ss, gatewaytest.Sample{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(i)), T: at.Milliseconds(), V: float64(i+1) * at.Seconds()})
			}
		}
		require.NoError(t, send.Send(t.Context(), ss...))
	}
	settle := func() { // heads let go of what is in blocks
		require.NoError(t, c.Flush(t.Context()))
		time.Sleep(delay + 2*time.Second) // they look each second
	}
	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	reg := prometheus.NewRegistry()
	results, err := plan.NewResults(16<<20, nil, reg)
	require.NoError(t, err)
	planned := plan.New(engine, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
	kept := func() float64 {
		ms, err := reg.Gather()
		require.NoError(t, err)
		for _, m := range ms {
			if m.GetName() == "epimetheus_gateway_query_parts_total" {
				for _, x := range m.GetMetric() {
					if x.GetLabel()[0].GetValue() == "kept" {
						return x.GetCounter().GetValue()
					}
				}
			}
		}
		return 0
	}
	// The same as the engine; gives how many parts were kept.
	check := func(when string) float64 {
		t.Helper()
		before := kept()
		for _, expr := range []string{"sum(rate(requests_total[10m]))", "max_over_time(requests_total[1h])", `count by (i) (requests_total)`} {
			run := func(e promql.QueryEngine) *promql.Result {
				q, err := e.NewRangeQuery(t.Context(), c.Storage, nil, expr, time.Unix(0, 0), time.Unix(24*3600, 0), 10*time.Minute)
				require.NoError(t, err)
				defer q.Close()
				return detach(q.Exec(t.Context()))
			}
			if diff := differ(run(engine), run(planned)); diff != "" {
				t.Fatalf("%s: %s: %s", when, expr, diff)
			}
		}
		return kept() - before
	}

	ship(0, 6*time.Hour)
	ship(8*time.Hour, 24*time.Hour) // there was an outage
	require.Zero(t, check("in heads"))
	settle()
	require.Zero(t, check("in a block, first"))
	all := check("in a block, again")
	require.Greater(t, all, 20.)

	ship(6*time.Hour, 8*time.Hour)
	some := check("late samples in heads")
	require.Less(t, some, all) // not where they are
	require.Greater(t, some, all/2)
	settle()
	require.Less(t, check("late samples in a block, first"), all)
	require.Equal(t, all, check("late samples in a block, again"))

	ship(-time.Hour, 0) // a backfill, that windows of the first steps reach into
	require.Less(t, check("backfill in heads"), all)
	settle()
	require.Less(t, check("backfill in a block, first"), all)
	require.Equal(t, all, check("backfill in a block, again"))
}

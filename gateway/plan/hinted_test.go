package plan_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// TestHintsInParts: hints of counter resets, and what is warned of them, are those that the engine has of the whole time, however
// that is cut. Of a histogram that follows, in its block, another some time before, one in another block may lie between the two,
// before all that a part reads: nobody there knows that the hint doesn't hold.
func TestHintsInParts(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	publish := func(first, apart time.Duration, hint func(i, k int) histogram.CounterResetHint) {
		var all []*chunkfmt.Series
		for k := range 3 {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "latency", "i", fmt.Sprint(k))}
			for i, at := 0, first; at < 10*time.Hour; i, at = i+1, at+apart {
				h := tsdbutil.GenerateTestHistogram(int64(at / time.Minute))
				h.CounterResetHint = hint(i, k)
				s.Histograms.T, s.Histograms.H = append(s.Histograms.T, at.Milliseconds()), append(s.Histograms.H, h)
			}
			all = append(all, s)
		}
		g := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "queued")}
		for at := first; at < 10*time.Hour; at += apart {
			g.Histograms.T, g.Histograms.H = append(g.Histograms.T, at.Milliseconds()), append(g.Histograms.H, tsdbutil.GenerateTestGaugeHistogram(int64(at/time.Minute)))
		}
		_, err := c.Import(t.Context(), gateway.DefaultTenant, chunkfmt.WriterOptions{}, append(all, g)...)
		require.NoError(t, err)
	}
	publish(0, 10*time.Minute, func(i, k int) histogram.CounterResetHint { // at the steps
		switch {
		case i == 0:
			return histogram.UnknownCounterReset
		case i%7 == k:
			return histogram.CounterReset
		}
		return histogram.NotCounterReset
	})
	publish(33*time.Minute, 60*time.Minute, func(int, int) histogram.CounterResetHint { return histogram.UnknownCounterReset })

	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	spread := func() plan.Spread {
		r, err := plan.NewResults(16<<20, nil, prometheus.NewRegistry())
		require.NoError(t, err)
		return plan.Tight(plan.Spread{TenantOf: tenantOf, Results: r})
	}
	alone, other := plan.New(engine, o, spread()), plan.New(engine, o, spread())
	with := spread()
	with.Workers = gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) { return other.Work(ctx, c.History, task) })
	for name, planned := range map[string]*plan.Engine{"alone": alone, "with workers": plan.New(engine, o, with)} {
		for _, q := range []struct {
			expr string
			kept bool
		}{
			{"latency", false},
			{"sum(latency)", false},
			{"avg(latency)", false},
			{"limitk(2, latency)", false},
			{"last_over_time(latency[5m])", false},
			{"first_over_time(latency[5m])", false},
			{"sum(sum_over_time(latency[25m]))", false},
			{"count(sum_over_time(latency[25m]))", false},
			{"sum(rate(latency[25m]))", true},
			{"sum(queued)", true},
			{"count(latency)", true},
			{"sum(resets(latency[25m]))", true},
		} {
			kept := 0
			for _, hours := range [][2]int64{{1, 4}, {2, 6}, {0, 9}, {3, 5}, {0, 9}} {
				run := func(e promql.QueryEngine) (*promql.Result, account.Cost) {
					ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
					defer done()
					query, err := e.NewRangeQuery(ctx, c.Storage, nil, q.expr, time.Unix(hours[0]*3600, 0), time.Unix(hours[1]*3600, 0), 10*time.Minute)
					require.NoError(t, err)
					defer query.Close()
					return detach(query.Exec(ctx)), acc.Cost()
				}
				want, _ := run(engine)
				got, cost := run(planned)
				if diff := differ(want, got); diff != "" {
					t.Errorf("%s: %s, %v: %s", name, q.expr, hours, diff)
				}
				kept += int(cost.PartsKept)
			}
			if q.kept && kept == 0 || !q.kept && kept > 0 && name == "alone" { // others keep that there are hints
				t.Errorf("%s: %s: %d parts were kept", name, q.expr, kept)
			}
		}
	}
}

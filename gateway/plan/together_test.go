package plan_test

import (
	"context"
	"errors"
	"math/rand"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// byChance matches what the engine gives in an order, or with digits, that depend on chance.
var byChance = regexp.MustCompile("histogram_quantile|histogram_fraction|count_values|limit")

// TestTogether asks many queries at the same time, some of which are cancelled: each answer is
// as it was when nothing else went on, so no query has used memory of another.
func TestTogether(t *testing.T) {
	const queries, askers, rounds = 60, 8, 2
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	dataset(t, rand.New(rand.NewSource(44)), s, 4)
	// One ingester is in the process of the gateway, the other one isn't.
	c.Heads.AddLocal("passthrough:///ingester-0", c.Ingesters[0])
	o := suiteOptions
	o.MaxSamples = 50_000_000
	e := promqltest.NewTestEngineWithOpts(t, o)
	var atWorkers atomic.Int64
	engines := []promql.QueryEngine{
		e, plan.New(e, o, plan.Spread{}), parted(t, c, e, o, plan.Tight, &atWorkers), parted(t, c, e, o, plan.TightShards, &atWorkers),
	}
	type asked struct {
		expr       string
		start, end time.Time
		step       time.Duration
		want       *promql.Result
	}
	memory := account.NewMemory(0, prometheus.NewRegistry())
	ask := func(ctx context.Context, engine promql.QueryEngine, q *asked) *promql.Result {
		ctx, _, done := memory.Open(ctx, "", account.Limits{})
		defer done()
		x, err := engine.NewRangeQuery(ctx, s, promql.NewPrometheusQueryOpts(false, 0, nil), q.expr, q.start, q.end, q.step)
		if err != nil {
			return &promql.Result{Err: err}
		}
		defer x.Close()
		return detach(x.Exec(ctx))
	}
	rnd := rand.New(rand.NewSource(*agreeSeed))
	var all []asked
	for len(all) < queries {
		q := asked{expr: leafy(rnd, 1), start: time.UnixMilli(int64(rnd.Intn(4*3600)) * 1000), step: time.Duration(1+rnd.Intn(300)) * time.Second}
		q.end = q.start.Add(q.step * time.Duration(rnd.Intn(40)))
		q.want = ask(t.Context(), e, &q)
		if again := ask(t.Context(), engines[1], &q); !byChance.MatchString(q.expr) && differ(q.want, again) == "" {
			all = append(all, q)
		}
	}
	var wg sync.WaitGroup
	var cancelled atomic.Int64
	for i := range askers {
		rnd := rand.New(rand.NewSource(*agreeSeed + int64(i)))
		wg.Go(func() {
			for range rounds {
				for _, k := range rnd.Perm(len(all)) {
					q := &all[k]
					ctx, cancel := context.WithCancel(t.Context())
					if rnd.Intn(4) == 0 {
						time.AfterFunc(time.Duration(rnd.Intn(3000))*time.Microsecond, cancel)
					}
					got := ask(ctx, engines[rnd.Intn(len(engines))], q)
					ended := ctx.Err() != nil
					cancel()
					if ended && got.Err != nil && errors.As(got.Err, new(promql.ErrQueryCanceled)) {
						cancelled.Add(1)
						continue
					}
					if diff := differ(q.want, got); diff != "" {
						t.Errorf("%s, start %d, end %d, step %s: %.2000s", q.expr, q.start.UnixMilli(), q.end.UnixMilli(), q.step, diff)
					}
				}
			}
		})
	}
	wg.Wait()
	// What was given is still what it was.
	for i := range all {
		q := &all[i]
		if diff := differ(q.want, ask(t.Context(), e, q)); diff != "" {
			t.Errorf("afterwards: %s: %.2000s", q.expr, diff)
		}
	}
	t.Logf("%d answers, %d cancelled, %d parts at workers", askers*rounds*len(all), cancelled.Load(), atWorkers.Load())
	if n := cancelled.Load(); n == 0 || n > askers*rounds*queries/2 {
		t.Errorf("%d of %d queries were cancelled", n, askers*rounds*queries)
	}
}

package plan_test

import (
	"fmt"
	"math"
	"math/rand"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// TestTop chooses among many equal values: which ones, and in what order, are to be those of the engine,
// also where parts and shards have chosen before.
func TestTop(t *testing.T) {
	const series, steps = 40, 60
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	rnd := rand.New(rand.NewSource(1))
	app := s.AppenderV2(t.Context())
	for i := range series {
		ls := labels.FromStrings("__name__", "few", "instance", fmt.Sprint(i), "job", fmt.Sprint(i%2))
		for j := range steps {
			if rnd.Intn(8) == 0 {
				continue
			}
			v := []float64{0, 1, 2, 3, math.NaN(), math.Inf(1)}[rnd.Intn(6)]
			if _, err := app.Append(0, ls, 0, int64(j)*15_000, v, nil, nil, storage.AppendV2Options{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
	o := suiteOptions
	o.MaxSamples = 1_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	var parts, shards atomic.Int64
	planned := map[string]*plan.Engine{
		"whole": plan.New(engine, o, plan.Spread{}), "parts": parted(t, c, engine, o, plan.Tight, &parts), "shards": parted(t, c, engine, o, plan.TightShards, &shards),
	}
	for _, op := range []string{"topk", "bottomk", "limitk"} {
		for _, k := range []string{"1", "2", "3", "5", "10", "39", "40", "100"} {
			for _, of := range []string{"few", "max_over_time(few[1m])", "changes(few[2m])"} {
				expr := fmt.Sprintf("%s by (job) (%s, %s)", op, k, of)
				if rnd.Intn(2) == 0 {
					expr = fmt.Sprintf("%s(%s, %s)", op, k, of)
				}
				for _, step := range []time.Duration{0, 15 * time.Second, 2 * time.Minute} {
					start, end := time.UnixMilli(45_000), time.UnixMilli(steps*15_000)
					run := func(e promql.QueryEngine) *promql.Result {
						q, err := e.NewRangeQuery(t.Context(), s, nil, expr, start, end, step)
						if step == 0 {
							q, err = e.NewInstantQuery(t.Context(), s, nil, expr, start)
						}
						if err != nil {
							t.Fatal(err)
						}
						defer q.Close()
						return detach(q.Exec(t.Context()))
					}
					want := run(engine)
					for name, e := range planned {
						got := run(e)
						if diff := differ(want, got); diff != "" || !slices.Equal(order(want), order(got)) {
							t.Errorf("%s, %s, step %s: %s\n%v\nwant %v", name, expr, step, diff, order(got), order(want))
						}
					}
				}
			}
		}
	}
	if parts.Load() == 0 || shards.Load() == 0 {
		t.Errorf("%d parts and %d shards were computed at workers: they aren't tested", parts.Load(), shards.Load())
	}
}

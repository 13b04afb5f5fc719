package plan_test

import (
	"context"
	"math/rand"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql/promqltest"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
)

// impatient takes tasks back soon.
type impatient struct{ *worker.Pool }

func (impatient) Patience() time.Duration { return 5 * time.Millisecond }

// TestOverdue: what other gateways don't give in time the caller computes itself, each part
// and each shard once, and takes what they give.
func TestOverdue(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	dataset(t, rand.New(rand.NewSource(45)), s, 4)
	o := suiteOptions
	o.MaxSamples = 50_000_000
	e := promqltest.NewTestEngineWithOpts(t, o)
	alone := plan.New(e, o, plan.Spread{})
	rnd := rand.New(rand.NewSource(*agreeSeed))
	for name, tight := range map[string]func(plan.Spread) plan.Spread{"parts": plan.Tight, "shards": plan.TightShards} {
		var n, computed, hung, ended atomic.Int64
		spread := tight(plan.Spread{TenantOf: tenantOf})
		spread.Workers = impatient{gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) {
			if n.Add(1)%3 == 0 {
				hung.Add(1)
				<-ctx.Done()
				ended.Add(1)
				return nil, context.Cause(ctx)
			}
			b, err := alone.Work(ctx, c.History, task)
			computed.Add(1)
			return b, err
		})}
		engine := plan.New(e, o, spread)
		for range 40 {
			q := leafy(rnd, 0)
			if byChance.MatchString(q) {
				continue
			}
			start := time.UnixMilli(int64(rnd.Intn(2*3600)) * 1000)
			end := start.Add(time.Hour)
			want, err := e.NewRangeQuery(t.Context(), s, nil, q, start, end, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			got, err := engine.NewRangeQuery(t.Context(), s, nil, q, start, end, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			if diff := differ(want.Exec(t.Context()), got.Exec(t.Context())); diff != "" {
				t.Errorf("%s of %s: %.2000s", name, q, diff)
			}
			want.Close()
			got.Close()
		}
		t.Logf("%s: %d computed elsewhere, %d hung", name, computed.Load(), hung.Load())
		if computed.Load() == 0 || hung.Load() == 0 {
			t.Errorf("%s: %d were computed elsewhere, %d hung", name, computed.Load(), hung.Load())
		}
		for hung.Load() != ended.Load() { // they are told soon
			time.Sleep(time.Millisecond)
		}
	}
}

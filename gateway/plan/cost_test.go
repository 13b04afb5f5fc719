package plan_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// counted counts what is asked of an object store.
type counted struct {
	object.Store

	gets, bytes atomic.Int64
}

func (c *counted) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	b, err := c.Store.GetRange(ctx, key, off, n)
	c.gets.Add(1)
	c.bytes.Add(int64(len(b)))
	return b, err
}

// costly is a gateway with caches of its own.
type costly struct {
	history *history.History
	objects *counted
	reg     *prometheus.Registry
}

func newCostly(t *testing.T, c *gatewaytest.Cluster) *costly {
	t.Helper()
	g := &costly{objects: &counted{Store: c.Objects}, reg: prometheus.NewRegistry()}
	var err error
	g.history, err = history.New(history.Options{Objects: g.objects, Index: c.Index, VisibilityDelay: 5 * time.Minute, Registerer: g.reg})
	require.NoError(t, err)
	return g
}

// pages that were looked up in the cache, and how many of them were there, or on their way.
func (g *costly) pages(t *testing.T) (all, cached int64) {
	t.Helper()
	ms, err := g.reg.Gather()
	require.NoError(t, err)
	for _, m := range ms {
		for _, x := range m.GetMetric() {
			if !slices.ContainsFunc(x.GetLabel(), func(l *dto.LabelPair) bool { return l.GetValue() == "pages" }) {
				continue
			}
			n := int64(x.GetCounter().GetValue())
			switch m.GetName() {
			case "epimetheus_cache_hits_total", "epimetheus_cache_waits_total":
				cached += n
				all += n
			case "epimetheus_cache_misses_total":
				all += n
			}
		}
	}
	return all, cached
}

// TestCostOfWorkers: what a query has cost is what all gateways have read for it, in samples,
// pages, requests and bytes.
func TestCostOfWorkers(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	const hour, interval, chunk, series = int64(3_600_000), 15_000, 120, 40
	for from := int64(0); from < 24*hour; from += 6 * hour {
		var all []*chunkfmt.Series
		for i := range int64(series) {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(10+i))}
			for ts := from; ts < from+6*hour; ts += interval {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts/1000*i%100_000))
			}
			all = append(all, s)
		}
		_, err := c.Import(t.Context(), gateway.DefaultTenant, chunkfmt.WriterOptions{ChunkSamples: chunk, Rollups: true}, all...)
		require.NoError(t, err)
	}
	var fresh []gatewaytest.Sample
	for i := range series {
		for ts := 24 * hour; ts < 25*hour; ts += interval {
			fresh = append(fresh, gatewaytest.Sample{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(10+i)), T: ts, V: float64(i)})
		}
	}
	require.NoError(t, c.Shipper(gateway.DefaultTenant).Send(t.Context(), fresh...))

	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	spread := func(tight func(plan.Spread) plan.Spread, workers plan.Workers) *plan.Engine {
		r, err := plan.NewResults(4<<20, nil, prometheus.NewRegistry())
		require.NoError(t, err)
		return plan.New(engine, o, tight(plan.Spread{TenantOf: tenantOf, Results: r, Workers: workers}))
	}
	const step, dashboard = 14 * time.Minute, time.Hour
	for _, q := range []struct {
		by    string
		tight func(plan.Spread) plan.Spread
		expr  string
		step  time.Duration // 0: an instant query
	}{
		{"time", plan.Tight, "sum by (i) (rate(requests_total[5m]))", step},
		{"time", plan.Tight, "max_over_time(requests_total[1h])", dashboard},
		{"series", plan.TightShards, "sum(rate(requests_total[20m]))", 0},
		{"series", plan.TightShards, "max_over_time(requests_total[20h])", 0},
	} {
		t.Run(q.by+" "+q.expr, func(t *testing.T) {
			exec := func(e *plan.Engine, g *costly, l account.Limits) (account.Cost, *promql.Result) {
				ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", l)
				defer done()
				data := merge.New(c.Heads, g.history, tenantOf)
				var query promql.Query
				var err error
				if q.step == 0 {
					query, err = e.NewInstantQuery(ctx, data, nil, q.expr, time.UnixMilli(24*hour+hour/12))
				} else {
					query, err = e.NewRangeQuery(ctx, data, nil, q.expr, time.UnixMilli(hour), time.UnixMilli(24*hour+hour/2), q.step)
				}
				require.NoError(t, err)
				defer query.Close()
				r := detach(query.Exec(ctx))
				return acc.Cost(), r
			}
			run := func(e *plan.Engine, g *costly) (account.Cost, *promql.Result) {
				cost, r := exec(e, g, account.Limits{})
				require.NoError(t, r.Err)
				return cost, r
			}
			single := newCostly(t, c)
			alone, want := run(spread(q.tight, nil), single)
			all, cached := single.pages(t)
			require.Equal(t, all, alone.Pages)
			require.Equal(t, cached, alone.PagesCached)
			require.Zero(t, alone.Workers)

			var slow atomic.Bool
			gateways := func() (e *plan.Engine, here, there *costly) {
				here, there = newCostly(t, c), newCostly(t, c)
				at := spread(q.tight, nil)
				var asked sync.Map // tasks
				return spread(q.tight, gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) {
					_, again := asked.LoadOrStore([2]int{task.From, task.Shard}, nil)
					b, err := at.Work(ctx, there.history, task)
					if again || ctx.Err() != nil {
						slow.Store(true)
					}
					return b, err
				})), here, there
			}
			e, here, there := gateways()
			split, got := run(e, here)
			if slow.Load() {
				t.Skip("a task took so long that another gateway was asked, or that it was taken back: what was read in vain isn't known")
			}
			if diff := differ(want, got); diff != "" {
				t.Fatal(diff)
			}
			require.Equal(t, int64(2), split.Workers)
			require.Positive(t, split.PartsElsewhere)
			require.Positive(t, there.objects.gets.Load())
			require.Equal(t, here.objects.gets.Load()+there.objects.gets.Load(), split.ObjectGets)
			require.Equal(t, here.objects.bytes.Load()+there.objects.bytes.Load(), split.ObjectBytes)
			allHere, cachedHere := here.pages(t)
			allThere, cachedThere := there.pages(t)
			require.Equal(t, allHere+allThere, split.Pages)
			require.Equal(t, cachedHere+cachedThere, split.PagesCached)
			require.GreaterOrEqual(t, split.Pages, alone.Pages)
			require.Equal(t, alone.Blocks, split.Blocks)
			require.Equal(t, alone.IndexQueries+alone.IndexCached, split.IndexQueries+split.IndexCached)
			require.Equal(t, alone.HeadBytes, split.HeadBytes)
			require.Equal(t, alone.Series, split.Series)
			if q.by == "series" {
				require.Equal(t, alone.Samples, split.Samples)
				require.Equal(t, alone.Windows, split.Windows)
			} else { // a chunk that two tasks need is read by both
				require.GreaterOrEqual(t, split.Samples, alone.Samples)
				require.LessOrEqual(t, split.Samples, alone.Samples+2*chunk*series*split.PartsElsewhere)
				require.GreaterOrEqual(t, split.Windows, alone.Windows)
				require.Equal(t, alone.PartsHere, split.PartsHere+split.PartsElsewhere)
			}
			if strings.HasPrefix(q.expr, "max_over_time") {
				require.Positive(t, split.Windows)
			}
			// Limits are of all together.
			for _, l := range []struct {
				account.Limits

				name string
			}{
				{account.Limits{Samples: alone.Samples - 1}, "query_samples"},
				{account.Limits{Samples: alone.Samples / 4}, "query_samples"},
				{account.Limits{Read: alone.ObjectBytes + alone.HeadBytes - 1}, "query_bytes"},
				{account.Limits{Read: alone.ObjectBytes/2 + alone.HeadBytes}, "query_bytes"},
			} {
				e, here, _ := gateways()
				_, r := exec(e, here, l.Limits)
				require.ErrorIs(t, r.Err, account.ErrLimit, "%+v", l)
				require.ErrorContains(t, r.Err, "limit gateway.limits."+l.name)
			}
			e, here, _ = gateways()
			_, r := exec(e, here, account.Limits{Samples: 2 * split.Samples, Read: 2 * (split.ObjectBytes + split.HeadBytes)})
			require.NoError(t, r.Err)

			if q.by == "time" { // results are kept there, and here
				again, _ := run(e, here)
				require.Zero(t, again.PartsElsewhere)
				require.Equal(t, int64(2), again.Workers)
				require.Equal(t, split.PartsHere+split.PartsElsewhere, again.PartsHere+again.PartsKept)
				require.Less(t, again.Samples, split.Samples/2)
				require.Less(t, again.Pages, split.Pages)
			}
		})
	}
}

package plan_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// BenchmarkCold runs queries over the data of BenchmarkDeep, in an S3 server, by
// gateways that have just started: without memcached (from=objects), with pages in
// memcached (from=pages), with results of parts there too (from=results). GETs take
// as long as the server takes (delay=0s), and 30 ms longer.
func BenchmarkCold(b *testing.B) {
	const day = 24 * time.Hour
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: 1_700_006_400_000}
	span := time.Duration(*benchDays) * day
	c.End = c.Start + span.Milliseconds()
	var delay atomic.Int64 // of a GET, ns
	var gets atomic.Int64
	objects := &historytest.FaultyObjects{Store: historytest.S3(b, prometheus.NewRegistry()), Decide: func(op, _ string) historytest.Fault {
		if op == "GetRange" {
			gets.Add(1)
			time.Sleep(time.Duration(delay.Load()))
		}
		return historytest.None
	}}
	rows := index.New(historytest.Bolt(b, prometheus.NewRegistry()))
	addr, _ := testenv.Memcached(b, "-m", "2048")
	heads := gatewaytest.New(b, gatewaytest.Options{}).Heads
	open := func(m *historytest.Memcached) *merge.Storage {
		o := history.Options{Objects: object.Store(objects), Index: rows, VisibilityDelay: 5 * time.Minute}
		if m != nil {
			o.Memcached = m.Client
		}
		h, err := history.New(o)
		if err != nil {
			b.Fatal(err)
		}
		return merge.New(heads, h, tenantOf)
	}
	h, err := history.New(history.Options{Objects: objects, Index: rows})
	if err != nil {
		b.Fatal(err)
	}
	loadDeep(b, c, h)

	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	o.Parser = parser.NewParser(parser.Options{})
	engine := promql.NewEngine(o)
	end := time.UnixMilli(c.End)
	type query struct {
		expr       string
		span, step time.Duration
	}
	var dashboard []query
	for _, hours := range []time.Duration{1, 6} {
		for _, expr := range []string{
			"sum by (job) (rate(http_requests_total[5m]))", "sum by (job, code) (rate(http_requests_total[5m]))",
			"histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[5m])))",
			"topk(10, rate(container_cpu_usage_seconds_total[5m]))", "node_load1", "avg(node_memory_MemAvailable_bytes)",
			`sum by (mode) (rate(node_cpu_seconds_total{mode!="idle"}[5m]))`, "max_over_time(node_load1[10m])",
			"sum(increase(http_requests_total[1h]))", `count by (__name__) ({__name__=~"node_.*"})`,
		} {
			dashboard = append(dashboard, query{expr, hours * time.Hour, hours * 15 * time.Second})
		}
	}
	for _, q := range []struct {
		name    string
		queries []query
	}{
		{"rate-by-job-all", []query{{"sum by (job) (rate(http_requests_total[1h]))", span, time.Hour}}},
		{fmt.Sprintf("dashboard-%d", len(dashboard)), dashboard},
	} {
		run := func(pages, kept *historytest.Memcached) {
			results, err := plan.NewResults(128<<20, nil, prometheus.NewRegistry())
			if kept != nil {
				results, err = plan.NewResults(128<<20, kept.Client, prometheus.NewRegistry())
			}
			if err != nil {
				b.Fatal(err)
			}
			storage := open(pages)
			planned := plan.New(engine, o, plan.Spread{TenantOf: tenantOf, Results: results})
			var g errgroup.Group
			g.SetLimit(6) // as a browser does
			for _, q := range q.queries {
				g.Go(func() error {
					p, err := planned.NewRangeQuery(b.Context(), storage, nil, q.expr, end.Add(-q.span), end, q.step)
					if err != nil {
						return err
					}
					defer p.Close()
					return p.Exec(b.Context()).Err
				})
			}
			if err := g.Wait(); err != nil {
				b.Fatal(err)
			}
		}
		warm := historytest.StartMemcached(b, addr)
		for range 3 { // what the queue had no room for the next one puts
			run(warm, warm)
			run(warm, nil)
			warm.Idle(b)
		}
		for _, d := range []time.Duration{0, 30 * time.Millisecond} {
			for _, from := range []string{"objects", "pages", "results"} {
				b.Run(fmt.Sprintf("q=%s/delay=%s/from=%s", q.name, d, from), func(b *testing.B) {
					m := historytest.StartImpatientMemcached(b, addr, 0) // as usual
					delay.Store(int64(d))
					defer delay.Store(0)
					gets.Store(0)
					before := cpu()
					for b.Loop() {
						switch from {
						case "objects":
							run(nil, nil)
						case "pages":
							run(m, nil)
						default:
							run(m, m)
						}
					}
					b.ReportMetric(float64(gets.Load())/float64(b.N), "gets/op")
					b.ReportMetric(float64(cpu()-before)/1e6/float64(b.N), "cpu-ms/op")
				})
			}
		}
	}
}

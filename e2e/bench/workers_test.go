package bench

import (
	"context"
	"flag"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var workers = flag.Int("bench.workers", 4, "how many gateways a gateway of BenchmarkWorkers has as workers")

// BenchmarkWorkers tells what it costs to spread queries over processes: one gateway
// alone, and another that has more as workers, on the same processors, over the
// same blocks in S3 and DynamoDB. Both are asked in turn, with pages in memory, and
// results aren't kept. CPU is that of all gateways together. Run it with -benchtime 1x;
// -bench.workers and -bench.deep-days are how many workers and days there are.
func BenchmarkWorkers(b *testing.B) {
	binary := binary(b)
	c, blocks := deep(b)
	yml := stores(b, binary, "gateway:\n  result_cache_bytes: 0\n")
	importBlocks(b, binary, yml, b.TempDir(), blocks)
	// Where threads are more than processors, the same work takes more CPU, for it finds less in
	// the caches of processors: one alone with as many as caller and workers have shows how much.
	crowded := startWith(b, []string{fmt.Sprint("GOMAXPROCS=", runtime.NumCPU()+2)}, testenv.FreeAddr(b), binary,
		"gateway", "--config.file="+yml, "--data.dir="+filepath.Join(b.TempDir(), "crowded"), "--gossip.member-id=crowded",
		"--grpc.listen-address="+testenv.FreeAddr(b), "--gossip.listen-address="+testenv.FreeAddr(b))
	roles := make([]*role, 1+1+*workers)
	first := testenv.FreeAddr(b)
	for i := range roles {
		id, gossip := fmt.Sprint("gateway-", i), testenv.FreeAddr(b)
		if i == 1 {
			gossip = first
		}
		args := []string{
			"gateway", "--config.file=" + yml, "--data.dir=" + filepath.Join(b.TempDir(), id), "--gossip.member-id=" + id,
			"--grpc.listen-address=" + testenv.FreeAddr(b), "--gossip.listen-address=" + gossip,
		}
		if i > 1 { // the first is for itself
			args = append(args, "--gossip.join="+first)
		}
		roles[i] = start(b, binary, args...)
	}
	alone, spread := roles[0], roles[1:]
	await(b, "gateways know each other", time.Minute, 100*time.Millisecond, func() bool {
		return !slices.ContainsFunc(spread, func(r *role) bool { return r.metric(b, "epimetheus_gateway_workers") != float64(1+*workers) })
	})
	one := &system{name: "alone", url: alone.url, procs: []*role{alone}}
	threads := &system{name: "crowded", url: crowded.url, procs: []*role{crowded}}
	many := &system{name: "workers", url: spread[0].url, procs: spread}
	end := time.UnixMilli(c.End)
	// What a process does when nothing is asked, gossip and metrics, is none of a query's.
	idle := map[*system]float64{}
	for _, s := range []*system{one, threads, many} {
		before, began := s.cpu(b), time.Now()
		time.Sleep(5 * time.Second)
		idle[s] = (s.cpu(b) - before).Seconds() / time.Since(began).Seconds()
	}
	for _, q := range heavy(length(c)) {
		b.Run("q="+q.name, func(b *testing.B) {
			const rounds, budget = 8, 500 * time.Millisecond
			ask := func(s *system) answered {
				body, err := s.ask(b.Context(), &q, time.UnixMilli(c.Start), end, nil)
				if err != nil {
					b.Fatalf("%s of %s: %v", q.name, s.name, err)
				}
				return digest(b, body)
			}
			// Which of two gateways has a part may change while one is slow: some times
			// until each has its pages.
			for range 3 {
				ask(threads)
				if x, y := ask(one), ask(many); !x.like(y) || x.points == 0 {
					b.Fatalf("%s: alone %+v, with workers %+v", q.name, x, y)
				}
			}
			for range b.N { // once is enough
			}
			runs, cpu, took := map[*system]float64{}, map[*system]float64{}, map[*system]float64{}
			parts := spread[0].metric(b, "epimetheus_gateway_worker_requests_total")
			for range rounds {
				for _, s := range []*system{one, threads, many} {
					before, began := s.cpu(b), time.Now()
					for time.Since(began) < budget {
						ask(s)
						runs[s]++
					}
					seconds := time.Since(began).Seconds()
					took[s] += seconds * 1000
					cpu[s] += ((s.cpu(b) - before).Seconds() - idle[s]*seconds) * 1000
				}
			}
			parts = spread[0].metric(b, "epimetheus_gateway_worker_requests_total") - parts
			if *profiles != "" {
				for name, of := range map[string]struct {
					*system
					*role
				}{"alone": {one, alone}, "caller": {many, spread[0]}, "worker": {many, spread[1]}} {
					ctx, cancel := context.WithCancel(b.Context())
					var wg sync.WaitGroup
					wg.Go(func() {
						for ctx.Err() == nil {
							_, _ = of.ask(ctx, &q, time.UnixMilli(c.Start), end, nil) // as above
						}
					})
					of.save(b, "/debug/pprof/profile?seconds=3", q.name+"."+name+".pprof")
					cancel()
					wg.Wait()
				}
			}
			x, y := cpu[one]/runs[one], cpu[many]/runs[many]
			b.ReportMetric(cpu[threads]/runs[threads], "crowded-cpu-ms")
			b.ReportMetric(x, "alone-cpu-ms")
			b.ReportMetric(y, "workers-cpu-ms")
			b.ReportMetric(took[one]/runs[one], "alone-ms")
			b.ReportMetric(took[many]/runs[many], "workers-ms")
			b.ReportMetric(100*(y/x-1), "overhead-%")
			b.ReportMetric(parts/runs[many], "parts-elsewhere")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// heavy are the queries of all of the time that have most to do, and such as need all
// samples: since the offset isn't a multiple of windows, summaries of those don't do.
func heavy(span time.Duration) []asked {
	const hour, buckets = time.Hour, "http_request_duration_seconds_bucket"
	const many = "http_request_duration_seconds_bucket|node_cpu_seconds_total|http_requests_total|kube_pod_status_phase|kube_pod_container_resource_requests"
	all := int(span.Seconds()) - 15
	var out []asked
	for _, q := range queries(span) {
		if slices.Contains([]string{"rate-by-job-all-5m", "p99-by-job-all", "quantile-7d", "inst-increase-all", "inst-count-by-name-1d"}, q.name) {
			out = append(out, q)
		}
	}
	return append(
		out,
		asked{name: "rate-by-job-all-step-5m", expr: `sum by (job) (rate(http_requests_total[5m]))`, span: span, step: 5 * time.Minute},
		asked{name: "rate-by-job-samples", expr: `sum by (job) (rate(http_requests_total[1h] offset 7s))`, span: span, step: hour},
		asked{name: "p99-by-job-samples", expr: `histogram_quantile(0.99, sum by (le, job) (rate(` + buckets + `[1h] offset 7s)))`, span: span, step: hour},
		asked{name: "p99-by-job-samples-step-5m", expr: `histogram_quantile(0.99, sum by (le, job) (rate(` + buckets + `[5m] offset 7s)))`, span: span, step: 5 * time.Minute},
		asked{name: "rate-samples", expr: `rate(` + buckets + `[1h] offset 7s)`, span: span, step: hour},
		asked{name: "inst-increase-samples", expr: fmt.Sprintf(`sum by (job) (increase(http_requests_total[%ds]))`, all)},
		asked{name: "inst-increase-buckets-samples", expr: fmt.Sprintf(`sum by (job, le) (increase(%s[%ds]))`, buckets, all)},
		asked{name: "inst-changes-buckets-samples", expr: fmt.Sprintf(`changes(%s[%ds])`, buckets, all)},
		asked{name: "inst-changes-half-samples", expr: fmt.Sprintf(`sum by (job) (changes({__name__=~"%s"}[%ds]))`, many, all)}, // of all samples, about
	)
}

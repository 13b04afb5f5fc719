package plan_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

var (
	benchDays  = flag.Int("bench.days", 10, "days of data of BenchmarkDeep and BenchmarkSpread")
	benchChunk = flag.Int("bench.chunk", 0, "samples of a chunk there; 0: as usual")
	benchRaw   = flag.Bool("bench.raw", false, "blocks there have no summaries of windows")
)

// BenchmarkDeep runs queries over 1,000 series at 15 s for days, as blocks of a
// day, through the planner (by=epimetheus), through the engine over the same
// blocks (by=engine), and through the engine over a Prometheus database with the
// same samples (by=prometheus). Pages are in memory, results aren't.
func BenchmarkDeep(b *testing.B) {
	const day = 24 * time.Hour
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: 1_700_006_400_000}
	span := time.Duration(*benchDays) * day
	c.End = c.Start + span.Milliseconds()
	ours := gatewaytest.New(b, gatewaytest.Options{})
	theirs := loadDeep(b, c, ours.History)

	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	o.Parser = parser.NewParser(parser.Options{})
	engine := promql.NewEngine(o)
	planned := plan.New(engine, o, plan.Spread{})
	secs := int(span.Seconds())
	rate := "sum by (job) (rate(http_requests_total[5m]))"
	for _, q := range []struct {
		name, expr string
		span, step time.Duration
	}{
		{"raw-1series-1h", `node_load1{instance="10.16.0.0:9100"}`, time.Hour, 15 * time.Second},
		{"rate-by-job-1h", rate, time.Hour, 15 * time.Second},
		{"inst-count-by-name", `count by (__name__) ({__name__!=""})`, 0, 0},
		{"regex-name-1h", `avg by (__name__) ({__name__=~"node_memory_.*_bytes"})`, time.Hour, 15 * time.Second},
		{"raw-1series-all", `node_load1{instance="10.16.0.0:9100"}`, span, time.Hour},
		{"raw-1series-15s-1d", `node_load1{instance="10.16.0.0:9100"}`, day, 15 * time.Second},
		{"rate-by-job-1d", rate, day, time.Minute},
		{"rate-by-job-all-5m", rate, span, time.Hour},
		{"rate-by-job-all-1h", `sum by (job) (rate(http_requests_total[1h]))`, span, time.Hour},
		{"rate-by-job-all-1h15s", `sum by (job) (rate(http_requests_total[1h15s]))`, span, time.Hour},
		{"rate-by-job-all-5m-5m", rate, span, 5 * time.Minute},
		{"p99-by-job-1d", `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[5m])))`, day, time.Minute},
		{"p99-by-job-all", `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[1h])))`, span, time.Hour},
		{"quantile-7d", `quantile(0.95, rate(node_cpu_seconds_total{mode!="idle"}[5m]))`, min(span, 7*day), 5 * time.Minute},
		{"topk-1d", `topk(10, rate(container_cpu_usage_seconds_total[5m]))`, day, 5 * time.Minute},
		{"topk-all", `topk(10, rate(container_cpu_usage_seconds_total[5m]))`, span, time.Hour},
		{"max-over-1d-all", `max_over_time(node_load1[1d])`, span, day},
		{"max-over-1d-all-1h", `max_over_time(node_load1[1d])`, span, time.Hour},
		{"avg-over-1d-all", `avg(avg_over_time(node_memory_MemAvailable_bytes[1d]))`, span, day},
		{"inst-increase-all", fmt.Sprintf(`sum by (job) (increase(http_requests_total[%ds]))`, secs), 0, 0},
		{"sum-without-1d", `sum without (instance) (rate(http_request_duration_seconds_bucket[5m]))`, day, 5 * time.Minute},
		{"inst-count-by-name-1d", `count by (__name__) (last_over_time({__name__!=""}[1d]))`, 0, 0},
	} {
		end := time.UnixMilli(c.End)
		results := map[string]*promql.Result{}
		for _, by := range []struct {
			name   string
			engine promql.QueryEngine
			data   storage.Queryable
		}{{"prometheus", engine, theirs}, {"engine", engine, ours.Storage}, {"epimetheus", planned, ours.Storage}} {
			b.Run("q="+q.name+"/by="+by.name, func(b *testing.B) {
				results[by.name] = timed(b, by.engine, by.data, q.expr, q.span, q.step, end)
			})
		}
		if want, got := results["prometheus"], results["epimetheus"]; want != nil && got != nil {
			sortVector(want)
			sortVector(got)
			if d := differ(want, got); d != "" {
				b.Errorf("%s: %s", q.name, d)
			}
		}
	}
}

// timed runs a query again and again, and gives its result; step 0: an instant query. Pages come into memory before.
func timed(b *testing.B, engine promql.QueryEngine, data storage.Queryable, expr string, span, step time.Duration, end time.Time) *promql.Result {
	b.Helper()
	b.ReportAllocs()
	run := func() *promql.Result {
		var p promql.Query
		var err error
		if step == 0 {
			p, err = engine.NewInstantQuery(b.Context(), data, nil, expr, end)
		} else {
			p, err = engine.NewRangeQuery(b.Context(), data, nil, expr, end.Add(-span), end, step)
		}
		if err != nil {
			b.Fatal(err)
		}
		defer p.Close()
		r := p.Exec(b.Context())
		if r.Err != nil {
			b.Fatal(r.Err)
		}
		return detach(r)
	}
	result := run()
	before := cpu()
	for b.Loop() {
		run()
	}
	b.ReportMetric(float64(cpu()-before)/1e6/float64(b.N), "cpu-ms/op")
	return result
}

// BenchmarkSpread runs a long query over the same data: not cut (whole), cut with
// nothing kept and all computed here (parts), by one, two and four other gateways
// over gRPC on the same processors (workers=n), by a gateway that keeps results and has
// none yet (first), that has all (kept), and that has all but for the last step (later).
func BenchmarkSpread(b *testing.B) {
	const day = 24 * time.Hour
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: 1_700_006_400_000}
	span := time.Duration(*benchDays) * day
	c.End = c.Start + span.Milliseconds()
	ours := gatewaytest.New(b, gatewaytest.Options{})
	loadDeep(b, c, ours.History)
	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	o.Parser = parser.NewParser(parser.Options{})
	engine := promql.NewEngine(o)
	const room = 2 * day // for later ones
	span -= room
	for _, q := range []struct {
		name, expr string
		span, step time.Duration
	}{
		{"rate-by-job", `sum by (job) (rate(http_requests_total[1h]))`, span, time.Hour},
		{"rate-by-job-5m", `sum by (job) (rate(http_requests_total[5m]))`, span, 5 * time.Minute},
		{"p99-by-job", `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[1h])))`, span, time.Hour},
		{"rate-by-series", `rate(http_requests_total[1h])`, span, time.Hour},
		{"quantile-7d", `quantile(0.95, rate(node_cpu_seconds_total{mode!="idle"}[5m]))`, 7 * day, 5 * time.Minute},
		{"p99-by-job-1d", `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[5m])))`, day, time.Minute},
		{"rate-by-job-6h", `sum by (job) (rate(http_requests_total[5m]))`, 6 * time.Hour, time.Minute},
	} {
		for _, by := range []struct {
			name    string
			workers int
			bytes   int64 // of results that are kept
			cut     bool
		}{{"whole", 0, 0, false}, {"parts", 0, 0, true}, {"workers=1", 1, 0, true}, {"workers=2", 2, 0, true}, {"workers=4", 4, 0, true}, {"first", 0, 1 << 30, true}, {"kept", 0, 1 << 30, true}, {"later", 0, 1 << 30, true}} {
			b.Run("q="+q.name+"/"+by.name, func(b *testing.B) {
				var s plan.Spread
				if by.workers > 0 {
					s.Workers = onlyOthers{gateways(b, by.workers, func(ctx context.Context, task *plan.Task) ([]byte, error) {
						return plan.New(engine, o, plan.Spread{}).Work(ctx, ours.History, task)
					})}
				}
				starts := func() *plan.Engine {
					if by.cut {
						r, err := plan.NewResults(by.bytes, nil, prometheus.NewRegistry())
						if err != nil {
							b.Fatal(err)
						}
						s.TenantOf, s.Results = tenantOf, r
					}
					return plan.New(engine, o, s)
				}
				planned := starts()
				end := time.UnixMilli(c.End).Add(-room)
				run := func() {
					p, err := planned.NewRangeQuery(b.Context(), ours.Storage, nil, q.expr, end.Add(-q.span), end, q.step)
					if err != nil {
						b.Fatal(err)
					}
					defer p.Close()
					if r := p.Exec(b.Context()); r.Err != nil {
						b.Fatal(r.Err)
					}
				}
				run()
				before := cpu()
				for b.Loop() {
					switch by.name {
					case "first":
						planned = starts()
					case "later":
						if end = end.Add(q.step); end.UnixMilli() > c.End {
							b.Fatalf("there is no room for %d runs", b.N)
						}
					}
					run()
				}
				b.ReportMetric(float64(cpu()-before)/1e6/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// onlyOthers computes nothing at the caller that another gateway could.
type onlyOthers struct{ *worker.Pool }

func (onlyOthers) Here(plan.Key) bool { return false }

// cpu is what the process has used, in ns.
func cpu() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// loadDeep writes the data set as blocks of a day.
func loadDeep(b *testing.B, c gen.Config, h *history.History) *tsdb.DB {
	b.Helper()
	dir := b.TempDir()
	const day = 24 * 3600 * 1000
	all, feeds := feedsOf(c, "")
	order := byLabels(all)
	for from := c.Start; from < c.End; from += day {
		for i, s := range all {
			feeds[i].fill(s, from+day-1)
		}
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, ChunkSamples: *benchChunk, Rollups: !*benchRaw})
		var old []storage.Series
		for _, i := range order {
			if len(all[i].Floats.T) == 0 {
				continue
			}
			if err := w.Add(gateway.DefaultTenant, all[i]); err != nil {
				b.Fatal(err)
			}
		}
		for _, s := range all {
			if len(s.Floats.T) > 0 {
				old = append(old, promql.NewStorageSeries(promql.Series{Metric: s.Labels, Floats: pointsOf(s)}))
			}
		}
		summary, err := w.Close()
		if err != nil {
			b.Fatal(err)
		}
		if err := h.Publish(b.Context(), ulid.Make(), buf.Bytes(), summary); err != nil {
			b.Fatal(err)
		}
		if _, err := tsdb.CreateBlock(old, dir, 3*day, promslog.NewNopLogger()); err != nil {
			b.Fatal(err)
		}
	}
	opts := tsdb.DefaultOptions()
	opts.RetentionDuration = 0
	db, err := tsdb.Open(dir, promslog.NewNopLogger(), nil, opts, nil)
	if err != nil {
		b.Fatal(err)
	}
	db.DisableCompactions()
	b.Cleanup(func() { _ = db.Close() })
	return db
}

// feed gives the samples of a series stretch by stretch.
type feed struct {
	it   *gen.Iter
	t    int64 // of a sample that was too late for the stretch before
	v    float64
	held bool
}

// feedsOf gives the series of a metric, without samples, and their feeds; with no metric, of
// all.
func feedsOf(c gen.Config, metric string) (all []*chunkfmt.Series, feeds []feed) {
	for _, g := range c.AllSeries() {
		lb := labels.NewScratchBuilder(len(g.Labels))
		for _, l := range g.Labels {
			lb.Add(l.Name, l.Value)
		}
		lb.Sort()
		if s := (&chunkfmt.Series{Labels: lb.Labels()}); metric == "" || s.Labels.Get("__name__") == metric {
			all, feeds = append(all, s), append(feeds, feed{it: g.Iter(c)})
		}
	}
	return all, feeds
}

// fill puts the next samples up to a time, inclusive, in ms, in the place of those that
// s has.
func (f *feed) fill(s *chunkfmt.Series, until int64) {
	s.Floats.T, s.Floats.V = s.Floats.T[:0], s.Floats.V[:0]
	for {
		if !f.held {
			if f.t, f.v, f.held = f.it.Next(); !f.held {
				return
			}
		}
		if f.t > until {
			return
		}
		s.Floats.T, s.Floats.V, f.held = append(s.Floats.T, f.t), append(s.Floats.V, f.v), false
	}
}

// byLabels gives the indexes of series in the order in which blocks have them.
func byLabels(all []*chunkfmt.Series) []int {
	order := make([]int, len(all))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(x, y int) int {
		if n := strings.Compare(all[x].Labels.Get("__name__"), all[y].Labels.Get("__name__")); n != 0 {
			return n
		}
		return labels.Compare(all[x].Labels, all[y].Labels)
	})
	return order
}

func pointsOf(s *chunkfmt.Series) []promql.FPoint {
	out := make([]promql.FPoint, len(s.Floats.T))
	for i, t := range s.Floats.T {
		out[i] = promql.FPoint{T: t, F: s.Floats.V[i]}
	}
	return out
}

// BenchmarkSummaries runs rates over counters at 15 s, of blocks of a week with
// summaries. Pages are in memory, results aren't.
func BenchmarkSummaries(b *testing.B) {
	const series, weeks, week = 400, 8, 7 * 24 * 3600 * 1000
	c := gatewaytest.New(b, gatewaytest.Options{})
	start := 2800 * history.Window
	for k := range int64(weeks) {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Rollups: true})
		for i := range int64(series) {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "requests_total", "instance", fmt.Sprintf("host-%03d", i/10), "job", fmt.Sprint("job-", i%10))}
			for t := start + k*week + 1 + 97*(i/10); t <= start+(k+1)*week; t += 15_000 {
				s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, float64((t-start)/1000*(i+1)))
			}
			if err := w.Add(gateway.DefaultTenant, s); err != nil {
				b.Fatal(err)
			}
		}
		summary, err := w.Close()
		if err != nil {
			b.Fatal(err)
		}
		if err := c.History.Publish(b.Context(), ulid.Make(), buf.Bytes(), summary); err != nil {
			b.Fatal(err)
		}
	}
	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	e := plan.New(promql.NewEngine(o), o, plan.Spread{})
	for _, expr := range []string{"sum by (job) (rate(requests_total[1h]))", "sum by (job) (rate(requests_total[1h15s]))", "sum by (job) (requests_total)", "max by (job) (max_over_time(requests_total[1d]))"} {
		b.Run(expr, func(b *testing.B) {
			windows := int64(0)
			run := func() {
				ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(b.Context(), "", account.Limits{})
				defer done()
				q, err := e.NewRangeQuery(ctx, c.Storage, nil, expr, time.UnixMilli(start).Add(time.Hour), time.UnixMilli(start+weeks*week), time.Hour)
				if err != nil {
					b.Fatal(err)
				}
				defer q.Close()
				if r := q.Exec(ctx); r.Err != nil {
					b.Fatal(r.Err)
				}
				windows = acc.Cost().Windows
			}
			run()
			before := cpu()
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
			b.ReportMetric(float64(windows)*float64(b.N)/(float64(cpu()-before)/1e9)/1e6, "Mwindows/cpu-s")
		})
	}
}

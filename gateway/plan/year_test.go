package plan_test

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
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

var (
	yearWeeks  = flag.Int("year.weeks", 52, "weeks of data of BenchmarkYear and BenchmarkManySeries")
	yearSeries = flag.Int("year.series", 10_000, "series of BenchmarkManySeries")
	// Amazon says that the first byte of a small object takes 100 to 200 ms, most see 20 to 50; a connection gives some 85 MB/s.
	yearFar = flag.Duration("year.far", 0, "how much longer each answer of the S3 server of BenchmarkYear and BenchmarkManySeries takes, as if it were S3, with 85 MB/s each")
)

// far makes a server as slow as one that isn't on the same machine.
type far struct {
	http.RoundTripper
	latency time.Duration
}

func (f far) RoundTrip(r *http.Request) (*http.Response, error) {
	began := time.Now()
	resp, err := f.RoundTripper.RoundTrip(r)
	if err == nil && r.Method == http.MethodGet {
		time.Sleep(f.latency - time.Since(began))
		resp.Body = &farBody{ReadCloser: resp.Body, began: time.Now()}
	}
	return resp, err
}

type farBody struct {
	io.ReadCloser
	began time.Time
	bytes int
}

func (f *farBody) Read(p []byte) (int, error) {
	const perSecond = 85e6
	n, err := f.ReadCloser.Read(p)
	f.bytes += n
	time.Sleep(time.Duration(float64(f.bytes)/perSecond*float64(time.Second)) - time.Since(f.began))
	return n, err
}

// yearOf is a year of one metric in blocks of a week, in an S3 server.
type yearOf struct {
	h        *history.History // pages come into memory and stay there
	storage  func(*history.History) *merge.Storage
	fresh    func() *history.History // nothing is at hand
	from, to time.Time
}

// newYear writes blocks that add fills: it adds the samples of the week from start on.
func newYear(b *testing.B, start int64, add func(w *chunkfmt.Writer, start, end int64)) *yearOf {
	b.Helper()
	o := historytest.S3Options(b, testenv.S3(b))
	if *yearFar > 0 {
		o.HTTPClient.Transport = far{o.HTTPClient.Transport, *yearFar}
	}
	objects, err := object.NewS3(b.Context(), o, prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	rows := index.New(historytest.Bolt(b, prometheus.NewRegistry()))
	heads := gatewaytest.New(b, gatewaytest.Options{}).Heads
	open := func(cache int64) *history.History {
		h, err := history.New(history.Options{Objects: objects, Index: rows, VisibilityDelay: 5 * time.Minute, PageCacheBytes: cache})
		if err != nil {
			b.Fatal(err)
		}
		return h
	}
	y := &yearOf{h: open(4 << 30), fresh: func() *history.History { return open(0) }}
	y.storage = func(h *history.History) *merge.Storage { return merge.New(heads, h, tenantOf) }
	end := start + int64(*yearWeeks)*history.Window
	y.from, y.to = time.UnixMilli(start).Add(time.Hour), time.UnixMilli(end)
	for from := start; from < end; from += history.Window {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Rollups: true})
		add(w, from, from+history.Window)
		summary, err := w.Close()
		if err != nil {
			b.Fatal(err)
		}
		if err := y.h.Publish(b.Context(), ulid.Make(), buf.Bytes(), summary); err != nil {
			b.Fatal(err)
		}
	}
	return y
}

type yearQuery struct {
	name, expr string
	span, step time.Duration
	shift      time.Duration // of all times
}

// run measures a query, with pages in memory and without; results aren't kept.
func (y *yearOf) run(b *testing.B, q yearQuery) {
	b.Helper()
	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	o.Parser = parser.NewParser(parser.Options{})
	planned := plan.New(promql.NewEngine(o), o, plan.Spread{})
	to := y.to.Add(-q.shift)
	from := to.Add(-q.span)
	if from.Before(y.from) {
		from = y.from.Add(q.shift)
	}
	for _, cold := range []bool{true, false} {
		b.Run(fmt.Sprintf("q=%s/cold=%t", q.name, cold), func(b *testing.B) {
			var cost account.Cost
			h := y.h
			run := func() {
				if cold {
					h = y.fresh()
				}
				ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(b.Context(), "", account.Limits{})
				defer done()
				p, err := planned.NewRangeQuery(ctx, y.storage(h), nil, q.expr, from, to, q.step)
				if err != nil {
					b.Fatal(err)
				}
				defer p.Close()
				r := p.Exec(ctx)
				if r.Err != nil {
					b.Fatal(r.Err)
				}
				if m, err := r.Matrix(); err != nil || len(m) == 0 {
					b.Fatal(m, err)
				}
				cost = acc.Cost()
			}
			run()
			before := cpu()
			for b.Loop() {
				run()
			}
			used := float64(cpu()-before) / float64(b.N)
			b.ReportMetric(used/1e6, "cpu-ms/op")
			b.ReportMetric(float64(cost.Windows)/used*1e3, "Mwindows/cpu-s")
			b.ReportMetric(float64(cost.Windows)/1e6, "Mwindows")
			b.ReportMetric(float64(cost.Samples)/1e6, "Msamples")
			b.ReportMetric(float64(cost.ObjectGets), "GETs")
			b.ReportMetric(float64(cost.ObjectBytes)/1e6, "MB")
			b.ReportMetric(float64(cost.IndexQueries), "index-reads")
		})
	}
}

// BenchmarkYear runs queries over a year of the counters of HTTP requests in the set deep (1,000 series at 15 s,
// a tenth of the pods replaced each day): cold, from an S3 server by a gateway that has
// just started, and with pages in memory. At times that are no ends of windows samples
// are read (by=samples).
func BenchmarkYear(b *testing.B) {
	const day = 24 * time.Hour
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: 2800 * history.Window}
	c.End = c.Start + int64(*yearWeeks)*history.Window
	all, feeds := feedsOf(c, "http_requests_total")
	order := byLabels(all)
	y := newYear(b, c.Start, func(w *chunkfmt.Writer, _, end int64) {
		for _, i := range order {
			s := all[i]
			if feeds[i].fill(s, end); len(s.Floats.T) == 0 {
				continue
			}
			if err := w.Add(gateway.DefaultTenant, s); err != nil {
				b.Fatal(err)
			}
		}
	})
	year := 53 * 7 * day
	for _, q := range []yearQuery{
		{"1h-year", `sum by (job) (rate(http_requests_total[1h]))`, year, time.Hour, 0},
		{"1h15s-year", `sum by (job) (rate(http_requests_total[1h15s]))`, year, time.Hour, 0},
		{"1h-year-by-samples", `sum by (job) (rate(http_requests_total[1h]))`, year, time.Hour, time.Minute},
		{"1h-30d", `sum by (job) (rate(http_requests_total[1h]))`, 30 * day, time.Hour, 0},
		{"1h-30d-by-samples", `sum by (job) (rate(http_requests_total[1h]))`, 30 * day, time.Hour, time.Minute},
		{"5m-30d", `sum by (job) (rate(http_requests_total[5m]))`, 30 * day, 5 * time.Minute, 0},
		{"5m-30d-by-samples", `sum by (job) (rate(http_requests_total[5m]))`, 30 * day, 5 * time.Minute, time.Minute},
		{"15s-1d", `sum by (job) (rate(http_requests_total[5m]))`, day, 15 * time.Second, 0},
	} {
		y.run(b, q)
	}
}

// BenchmarkManySeries runs a query over a year of 10,000 counters.
func BenchmarkManySeries(b *testing.B) {
	value := make([]float64, *yearSeries)
	all := make([]*chunkfmt.Series, *yearSeries)
	for i := range all {
		all[i] = &chunkfmt.Series{Labels: labels.FromStrings("__name__", "http_requests_total", "instance", fmt.Sprintf("10.0.%d.%d:9090", i/5000, i/20%250),
			"job", fmt.Sprintf("job-%d", i%10), "code", fmt.Sprint(200+i%20))}
	}
	order := byLabels(all)
	y := newYear(b, 2800*history.Window, func(w *chunkfmt.Writer, start, end int64) {
		s := &chunkfmt.Series{}
		for _, i := range order {
			s.Labels = all[i].Labels
			s.Floats.T, s.Floats.V = s.Floats.T[:0], s.Floats.V[:0]
			for k, t := 0, start+1+int64(i/20%250)*977; t <= end; k, t = k+1, t+300_000 {
				value[i] += float64((k*(i+7))%(i%50+2)) + float64(k%3)
				s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, value[i])
			}
			if err := w.Add(gateway.DefaultTenant, s); err != nil {
				b.Fatal(err)
			}
		}
	})
	y.run(b, yearQuery{"1h-year", `sum by (job) (rate(http_requests_total[1h]))`, 53 * 7 * 24 * time.Hour, time.Hour, 0})
	y.run(b, yearQuery{"1h15s-year", `sum by (job) (rate(http_requests_total[1h15s]))`, 53 * 7 * 24 * time.Hour, time.Hour, 0})
}

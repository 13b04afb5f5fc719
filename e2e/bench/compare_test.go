package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// asked is a query of a comparison. A range query has a step, and goes over span up
// to the end of the data; an instant one is asked there.
type asked struct {
	name, expr string
	span, step time.Duration
	path       string   // another endpoint than query and query_range
	panels     []string // a dashboard: queries in place of expr
}

// panels are those of a dashboard.
var panels = []string{
	`up`,
	`count(up == 0) or vector(0)`,
	`sum(rate(http_requests_total[5m]))`,
	`sum by (job) (rate(http_requests_total[5m]))`,
	`sum by (code) (rate(http_requests_total[5m]))`,
	`sum(rate(http_requests_total{code=~"5.."}[5m])) / sum(rate(http_requests_total[5m]))`,
	`histogram_quantile(0.5, sum by (le) (rate(http_request_duration_seconds_bucket[5m])))`,
	`histogram_quantile(0.99, sum by (le) (rate(http_request_duration_seconds_bucket[5m])))`,
	`histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[5m])))`,
	`sum by (instance) (rate(node_cpu_seconds_total{mode!="idle"}[5m]))`,
	`avg by (mode) (rate(node_cpu_seconds_total[5m]))`,
	`node_load1`,
	`1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes`,
	`min(node_memory_MemAvailable_bytes)`,
	`sum by (device) (rate(node_network_receive_bytes_total[5m]))`,
	`topk(5, sum by (pod) (rate(container_cpu_usage_seconds_total[5m])))`,
	`topk(10, container_memory_working_set_bytes)`,
	`sum by (namespace) (container_memory_working_set_bytes)`,
	`max_over_time(process_resident_memory_bytes[10m])`,
	`changes(process_start_time_seconds[1h])`,
}

// parts are the queries of a dashboard, or the query.
func (q *asked) parts() []*asked {
	if q.panels == nil {
		return []*asked{q}
	}
	var qs []*asked
	for _, expr := range q.panels {
		qs = append(qs, &asked{name: q.name, expr: expr, span: q.span, step: q.step})
	}
	return qs
}

const day = 24 * time.Hour

// queries are what dashboards and rules ask, from one series to all: those for an
// hour, and for data of a week or more also those over all of it.
func queries(span time.Duration) []asked {
	const hour = time.Hour
	node := "10.16.0.0:9100"
	rate := `sum by (job) (rate(http_requests_total[5m]))`
	p99 := `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[5m])))`
	qs := []asked{
		{name: "raw-1series-1h", expr: `node_load1{instance="` + node + `"}`, span: hour, step: 15 * time.Second},
		{name: "rate-by-job-1h", expr: rate, span: hour, step: 15 * time.Second},
		{name: "p99-by-job-1h", expr: p99, span: hour, step: 15 * time.Second},
		{name: "sum-without-1h", expr: `sum without (instance) (rate(http_request_duration_seconds_bucket[5m]))`, span: hour, step: time.Minute},
		{name: "topk-1h", expr: `topk(10, rate(container_cpu_usage_seconds_total[5m]))`, span: hour, step: 15 * time.Second},
		{name: "regex-1h", expr: `sum by (device) (rate(node_network_receive_bytes_total{device=~"eth.*|ens.*",instance=~"10.16.*:9100"}[5m]))`, span: hour, step: 15 * time.Second},
		{name: "regex-name-1h", expr: `avg by (__name__) ({__name__=~"node_memory_.*_bytes"})`, span: hour, step: 15 * time.Second},
		{name: "quantile-1h", expr: `quantile(0.95, rate(node_cpu_seconds_total{mode!="idle"}[5m]))`, span: hour, step: 15 * time.Second},
		{name: "inst-count-by-name", expr: `count by (__name__) ({__name__!=""})`},
		{name: "inst-rate-by-job", expr: rate},
		{name: "inst-alert-rule", expr: `sum by (job) (rate(http_requests_total{code=~"4..|5.."}[5m])) / sum by (job) (rate(http_requests_total[5m])) > 0.01`},
		{name: "inst-1target", expr: `{instance="` + node + `"}`},
		{name: "inst-topk-memory", expr: `topk(10, container_memory_working_set_bytes)`},
		{name: "label-values", path: "label/instance/values"},
		{name: "series-1name", path: "series", expr: `http_requests_total{code="200"}`},
		{name: "dashboard-1h", panels: panels, span: hour, step: 15 * time.Second},
	}
	if span < 7*day {
		return qs
	}
	return append(
		qs,
		asked{name: "raw-1series-1d", expr: `node_load1{instance="` + node + `"}`, span: day, step: time.Minute},
		asked{name: "raw-1series-all", expr: `node_load1{instance="` + node + `"}`, span: span, step: hour},
		asked{name: "rate-by-job-1d", expr: rate, span: day, step: time.Minute},
		asked{name: "rate-by-job-7d", expr: rate, span: 7 * day, step: 5 * time.Minute},
		asked{name: "rate-by-job-all-5m", expr: rate, span: span, step: hour},
		asked{name: "rate-by-job-all-1h", expr: `sum by (job) (rate(http_requests_total[1h]))`, span: span, step: hour},
		asked{name: "p99-by-job-1d", expr: p99, span: day, step: time.Minute},
		asked{name: "p99-by-job-all", expr: `histogram_quantile(0.99, sum by (le, job) (rate(http_request_duration_seconds_bucket[1h])))`, span: span, step: hour},
		asked{name: "quantile-7d", expr: `quantile(0.95, rate(node_cpu_seconds_total{mode!="idle"}[5m]))`, span: 7 * day, step: 5 * time.Minute},
		asked{name: "topk-1d", expr: `topk(10, rate(container_cpu_usage_seconds_total[5m]))`, span: day, step: 5 * time.Minute},
		asked{name: "max-over-1d-all", expr: `max_over_time(node_load1[1d])`, span: span, step: day},
		asked{name: "avg-over-1d-all", expr: `avg(avg_over_time(node_memory_MemAvailable_bytes[1d]))`, span: span, step: day},
		asked{name: "inst-increase-all", expr: fmt.Sprintf(`sum by (job) (increase(http_requests_total[%ds]))`, int(span.Seconds()))},
		asked{name: "inst-max-over-all", expr: fmt.Sprintf(`max(max_over_time(process_resident_memory_bytes[%ds]))`, int(span.Seconds()))},
		asked{name: "sum-without-1d", expr: `sum without (instance) (rate(http_request_duration_seconds_bucket[5m]))`, span: day, step: 5 * time.Minute},
		asked{name: "inst-count-by-name-1d", expr: `count by (__name__) (last_over_time({__name__!=""}[1d]))`},
	)
}

// system answers queries.
type system struct {
	name  string
	url   string // before /api/v1
	procs []*role
	form  url.Values // more parameters of each query
	idle  float64    // bytes in use before the first query
}

func (s *system) cpu(tb testing.TB) (sum time.Duration) {
	tb.Helper()
	for _, p := range s.procs {
		sum += p.cpu(tb)
	}
	return sum
}

func (s *system) memory(tb testing.TB, field string) (sum float64) {
	tb.Helper()
	for _, p := range s.procs {
		sum += p.memory(tb, field)
	}
	return sum
}

// used is what processes hold in memory without what Go's runtime has not yet given
// back after a collection: garbage of their start would hide what queries take.
func (s *system) used(tb testing.TB) (sum float64) {
	tb.Helper()
	for _, p := range s.procs {
		if _, err := p.get(tb.Context(), "/debug/pprof/heap?gc=1"); err != nil {
			tb.Fatal(err)
		}
		sum += p.memory(tb, "VmRSS") - p.metric(tb, "go_memstats_heap_idle_bytes") + p.metric(tb, "go_memstats_heap_released_bytes")
	}
	return sum
}

// resetPeak makes VmHWM start again from the present size.
func (s *system) resetPeak(tb testing.TB) {
	tb.Helper()
	for _, p := range s.procs {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.PID()), []byte("5"), 0); err != nil {
			tb.Fatal(err)
		}
	}
}

// rest lets processes be as if nothing had been asked: garbage is collected, and what Go's
// runtime keeps no longer for what comes next is given back. It takes some seconds. The
// second collection finds no garbage, and so expects little.
func (s *system) rest(tb testing.TB) {
	tb.Helper()
	for _, p := range s.procs {
		for range 2 {
			if _, err := p.get(tb.Context(), "/debug/pprof/heap?gc=1"); err != nil {
				tb.Fatal(err)
			}
		}
	}
	const every, most, still = time.Second, 15, 1e6
	for range most {
		before := s.memory(tb, "VmRSS")
		time.Sleep(every)
		if before-s.memory(tb, "VmRSS") < still {
			return
		}
	}
}

// ask runs a query over data that ends at end, and gives the answer.
func (s *system) ask(ctx context.Context, q *asked, start, end time.Time, more url.Values) ([]byte, error) {
	form, path := url.Values{}, q.path
	unix := func(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }
	switch {
	case path != "":
		form.Set("start", unix(start))
		form.Set("end", unix(end))
		if q.expr != "" {
			form.Set("match[]", q.expr)
		}
	case q.step == 0:
		path = "query"
		form.Set("query", q.expr)
		form.Set("time", unix(end))
	default:
		path = "query_range"
		end = end.Truncate(q.step)
		form.Set("query", q.expr)
		form.Set("start", unix(end.Add(-q.span)))
		form.Set("end", unix(end))
		form.Set("step", strconv.Itoa(int(q.step.Seconds())))
	}
	for _, m := range []url.Values{s.form, more} {
		maps.Copy(form, m)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/api/v1/"+path+"?"+form.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.300s", resp.Status, b)
	}
	return b, err
}

// measured is what a query took, medians and means of several runs.
type measured struct {
	cpu, wall float64 // ms
	peak      float64 // bytes of RSS, at most meanwhile
	one       float64 // bytes by which RSS grew at most when it was asked once, after a rest
	// Of the first time.
	coldCPU, coldWall float64
	answer            answered
}

// measure runs a query again and again for a while, at least three times, after a rest.
func (s *system) measure(b *testing.B, q *asked, start, end time.Time) measured {
	b.Helper()
	const atLeast, atMost, budget = 3, 200, 1500 * time.Millisecond
	once := func() ([][]byte, time.Duration) {
		began := time.Now()
		parts := q.parts()
		bodies := make([][]byte, len(parts))
		var g errgroup.Group
		g.SetLimit(6) // as browsers do
		for i, part := range parts {
			g.Go(func() (err error) {
				bodies[i], err = s.ask(b.Context(), part, start, end, nil)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatalf("%s of %s: %v", q.name, s.name, err)
		}
		return bodies, time.Since(began)
	}
	before := s.cpu(b)
	bodies, took := once()
	m := measured{coldCPU: (s.cpu(b) - before).Seconds() * 1000, coldWall: took.Seconds() * 1000}
	for _, body := range bodies {
		a := digest(b, body)
		m.answer.series, m.answer.points, m.answer.sum = m.answer.series+a.series, m.answer.points+a.points, m.answer.sum+a.sum
	}
	s.rest(b)
	s.resetPeak(b)
	atRest := s.memory(b, "VmRSS")
	once()
	m.one = s.memory(b, "VmHWM") - atRest
	began := time.Now()
	before = s.cpu(b)
	var walls []float64
	for len(walls) < atLeast || len(walls) < atMost && time.Since(began) < budget {
		_, took := once()
		walls = append(walls, took.Seconds()*1000)
	}
	m.cpu = (s.cpu(b) - before).Seconds() * 1000 / float64(len(walls))
	m.peak = s.memory(b, "VmHWM")
	slices.Sort(walls)
	m.wall = walls[len(walls)/2]
	return m
}

// touched is how many samples a query needs, as the engine counts them: those in
// windows, each once.
func (s *system) touched(b *testing.B, q *asked, start, end time.Time) float64 {
	b.Helper()
	if q.path != "" {
		return 0
	}
	if q.panels != nil {
		sum := 0.0
		for _, part := range q.parts() {
			sum += s.touched(b, part, start, end)
		}
		return sum
	}
	body, err := s.ask(b.Context(), q, start, end, url.Values{"stats": {"all"}})
	if err != nil {
		b.Fatal(err)
	}
	var r struct {
		Data struct {
			Stats struct {
				Samples struct {
					SamplesRead float64 `json:"samplesRead"`
				} `json:"samples"`
			} `json:"stats"`
		} `json:"data"`
	}
	if err := json.Unmarshal(body, &r); err != nil {
		b.Fatal(err)
	}
	return r.Data.Stats.Samples.SamplesRead
}

// answered tells answers apart, as far as order and the last digits don't matter.
type answered struct {
	series, points int
	sum            float64
}

func (a answered) like(o answered) bool {
	return a.series == o.series && a.points == o.points && math.Abs(a.sum-o.sum) <= 1e-9*max(math.Abs(a.sum), math.Abs(o.sum))
}

func digest(tb testing.TB, body []byte) (a answered) {
	tb.Helper()
	var r struct {
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(body, &r); err != nil {
		tb.Fatal(err)
	}
	var list []json.RawMessage
	if json.Unmarshal(r.Data, &list) == nil {
		return answered{series: len(list)}
	}
	var d struct {
		Result []struct {
			Value  *[2]any  `json:"value"`
			Values [][2]any `json:"values"`
		} `json:"result"`
	}
	if err := json.Unmarshal(r.Data, &d); err != nil {
		tb.Fatal(err)
	}
	for _, s := range d.Result {
		a.series++
		if s.Value != nil {
			s.Values = append(s.Values, *s.Value)
		}
		for _, p := range s.Values {
			a.points++
			text, _ := p[1].(string)
			if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) && !math.IsInf(v, 0) {
				a.sum += v
			}
		}
	}
	return a
}

// compare asks Prometheus and Epimetheus in turn, and reports what each query takes,
// and what of the aims it misses: as many times less CPU as given where more than a
// million samples are touched; never more than 1.1 times the CPU or 2 ms more; never
// slower; half of the memory for queries at most, what processes have had before the
// first one left out.
func compare(b *testing.B, prometheus *system, ours []*system, qs []asked, start, end time.Time, times func(samples float64, points int) float64) {
	b.Helper()
	for _, s := range append([]*system{prometheus}, ours...) {
		s.idle = s.used(b)
	}
	for _, q := range qs {
		var theirs measured
		for _, s := range ours {
			b.Run("q="+q.name+"/by="+s.name, func(b *testing.B) {
				if theirs.wall == 0 {
					theirs = prometheus.measure(b, &q, start, end)
				}
				m := s.measure(b, &q, start, end)
				if !m.answer.like(theirs.answer) {
					b.Errorf("%s: %+v, Prometheus %+v", q.name, m.answer, theirs.answer)
				}
				touched := s.touched(b, &q, start, end)
				for range b.N { // once is enough
				}
				b.ReportMetric(theirs.cpu, "prom-cpu-ms")
				b.ReportMetric(m.cpu, "cpu-ms")
				b.ReportMetric(theirs.cpu/max(m.cpu, 0.01), "x-less")
				b.ReportMetric(theirs.wall, "prom-ms")
				b.ReportMetric(m.wall, "ms")
				b.ReportMetric(theirs.coldCPU, "prom-first-cpu-ms")
				b.ReportMetric(m.coldCPU, "first-cpu-ms")
				b.ReportMetric(theirs.coldWall, "prom-first-ms")
				b.ReportMetric(m.coldWall, "first-ms")
				b.ReportMetric(theirs.peak/1e6, "prom-peak-MB")
				b.ReportMetric((theirs.peak-prometheus.idle)/1e6, "prom-more-MB")
				b.ReportMetric(theirs.one/1e6, "prom-once-MB")
				b.ReportMetric(m.peak/1e6, "peak-MB")
				b.ReportMetric((m.peak-s.idle)/1e6, "more-MB")
				b.ReportMetric(m.one/1e6, "once-MB")
				b.ReportMetric(touched/1e6, "Msamples")
				b.ReportMetric(float64(m.answer.points), "points")
				b.ReportMetric(0, "ns/op")
				var missed []string
				if aim := times(touched, m.answer.points); touched > 1e6 && m.cpu*aim > theirs.cpu {
					missed = append(missed, fmt.Sprintf("%.1f times less CPU, aim %.0f", theirs.cpu/m.cpu, aim))
				}
				if m.cpu > 1.1*theirs.cpu && m.cpu > theirs.cpu+2 {
					missed = append(missed, fmt.Sprintf("CPU %.1f ms, Prometheus %.1f", m.cpu, theirs.cpu))
				}
				if m.wall > theirs.wall && m.wall > theirs.wall+0.2 { // less can't be told from noise
					missed = append(missed, fmt.Sprintf("%.1f ms, Prometheus %.1f", m.wall, theirs.wall))
				}
				// What there is without queries is the head, above all.
				if ours, prom := m.peak-s.idle, theirs.peak-prometheus.idle; ours > prom/2 {
					missed = append(missed, fmt.Sprintf("%.0f MB more than before the first query, Prometheus %.0f", ours/1e6, prom/1e6))
				}
				if missed != nil {
					b.Log("missed: " + strings.Join(missed, "; "))
				}
			})
		}
	}
}

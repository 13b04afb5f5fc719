package gateway_test

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

func TestMain(m *testing.M) { gatewaytest.Main(m) }

// The samples are at start, start+15s and so on.
const (
	start   = 1_700_000_000_007 // ms
	step    = 15_000
	samples = 61
	end     = start + (samples-1)*step
)

// dataset is what both sides hold: ordinary metrics, and odd ones.
func dataset() []gatewaytest.Sample {
	var out []gatewaytest.Sample
	add := func(fill func(i int, s *gatewaytest.Sample), pairs ...string) {
		ls := labels.FromStrings(pairs...)
		for i := range samples {
			s := gatewaytest.Sample{Labels: ls, T: start + int64(i)*step}
			fill(i, &s)
			out = append(out, s)
		}
	}
	float := func(f func(i int) float64) func(int, *gatewaytest.Sample) {
		return func(i int, s *gatewaytest.Sample) { s.V = f(i) }
	}
	for n := range 6 {
		job, instance := fmt.Sprint("job-", n%2), fmt.Sprint("host-", n, ":80")
		add(float(func(i int) float64 { return float64((i + n) % 7 / 6) }), "__name__", "up", "job", job, "instance", instance)
		for _, code := range []string{"200", "500"} {
			add(func(i int, s *gatewaytest.Sample) {
				s.V = float64(i%40*(n+1)) * 1.1
				if code == "500" && i%20 == 3 {
					s.Exemplars = []exemplar.Exemplar{{
						Labels: labels.FromStrings("trace_id", fmt.Sprint(n, "-", i)), Value: float64(i), Ts: s.T - 3, HasTs: true,
					}}
				}
			}, "__name__", "http_requests_total", "job", job, "instance", instance, "code", code)
		}
		for b, le := range []string{"0.1", "1", "+Inf"} {
			add(float(func(i int) float64 { return float64(i * (b + 1) * (n + 1)) }), "__name__", "latency_bucket", "job", job, "instance", instance, "le", le)
		}
	}
	odd := []float64{
		math.Inf(1), math.Inf(-1), math.NaN(), math.Copysign(0, -1), 5e-324, math.MaxFloat64, 1e21, 1e-7, 0.1, 123456789.123456789,
	}
	add(float(func(i int) float64 { return odd[i%len(odd)] }), "__name__", "odd_values")
	add(float(func(i int) float64 {
		if i%5 == 4 {
			return math.Float64frombits(value.StaleNaN)
		}
		return float64(i)
	}), "__name__", "goes_stale")
	add(float(func(i int) float64 { return float64(i) }), "__name__", "métrique.à points", "label.with dots", "<a href=\"x\">&amp;\n\t\\é世界")
	add(func(i int, s *gatewaytest.Sample) { s.H = tsdbutil.GenerateTestHistogram(int64(i)) }, "__name__", "native", "kind", "int")
	add(func(i int, s *gatewaytest.Sample) { s.FH = tsdbutil.GenerateTestFloatHistogram(int64(i)) }, "__name__", "native", "kind", "float")
	add(func(i int, s *gatewaytest.Sample) { s.H = tsdbutil.GenerateTestCustomBucketsHistogram(int64(i)) }, "__name__", "native", "kind", "custom")
	add(func(i int, s *gatewaytest.Sample) {
		s.H = tsdbutil.GenerateTestHistogram(int64((i * 7) % 5))
		s.H.CounterResetHint = histogram.GaugeType
	}, "__name__", "native", "kind", "gauge")
	// Prometheus's order of series is that of their creation: so it is ours, too.
	slices.SortFunc(out, func(a, b gatewaytest.Sample) int { return cmp.Or(int(a.T-b.T), labels.Compare(a.Labels, b.Labels)) })
	return out
}

// toPrometheus starts a Prometheus that has the samples.
func toPrometheus(t *testing.T, ss []gatewaytest.Sample, features ...string) *testenv.PrometheusServer {
	t.Helper()
	return toPrometheusWith(t, ss, "global: {}\n", "--enable-feature="+strings.Join(append(features, "exemplar-storage"), ","))
}

// toPrometheusWith gives it a configuration and flags.
func toPrometheusWith(t *testing.T, ss []gatewaytest.Sample, config string, args ...string) *testenv.PrometheusServer {
	t.Helper()
	p := testenv.Prometheus(t, "", config, append(args, "--web.enable-remote-write-receiver")...)
	var req prompb.WriteRequest
	for _, s := range ss {
		ts := prompb.TimeSeries{Labels: prompb.FromLabels(s.Labels, nil)}
		switch {
		case s.H != nil:
			ts.Histograms = []prompb.Histogram{prompb.FromIntHistogram(s.T, s.H)}
		case s.FH != nil:
			ts.Histograms = []prompb.Histogram{prompb.FromFloatHistogram(s.T, s.FH)}
		default:
			ts.Samples = []prompb.Sample{{Timestamp: s.T, Value: s.V}}
		}
		for _, e := range s.Exemplars {
			ts.Exemplars = append(ts.Exemplars, prompb.Exemplar{Labels: prompb.FromLabels(e.Labels, nil), Value: e.Value, Timestamp: e.Ts})
		}
		req.Timeseries = append(req.Timeseries, ts)
	}
	body, err := req.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL+"/api/v1/write", bytes.NewReader(s2.EncodeSnappy(nil, body)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Encoding", "snappy")
	r.Header.Set("X-Prometheus-Remote-Write-Version", "0.1.0")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode/100 != 2 {
		t.Fatalf("remote write: %s: %s", resp.Status, b)
	}
	return p
}

// newAPI makes the API over a cluster's storage.
func newAPI(t *testing.T, c *gatewaytest.Cluster, o gateway.Options) *gateway.API {
	t.Helper()
	reg := prometheus.NewRegistry()
	api, err := gateway.New(o, c.Storage, c.Live, slog.New(slog.DiscardHandler), reg, reg)
	if err != nil {
		t.Fatal(err)
	}
	return api
}

// toGateway gives an API over the samples.
func toGateway(t *testing.T, ss []gatewaytest.Sample) *gateway.API {
	t.Helper()
	return newAPI(t, gatewayOf(t, ss), gateway.Options{Engine: gateway.EngineOptions{Features: []string{"search-api"}}})
}

// gatewayOf has the samples, the older half of them in blocks.
func gatewayOf(t *testing.T, ss []gatewaytest.Sample) *gatewaytest.Cluster {
	t.Helper()
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 3})
	shipHalves(t, c, gateway.DefaultTenant, ss)
	return c
}

// shipHalves gives a tenant the samples, the older half of them in blocks.
func shipHalves(t *testing.T, c *gatewaytest.Cluster, tenant string, ss []gatewaytest.Sample) {
	t.Helper()
	send := c.Shipper(tenant)
	if err := send.Send(t.Context(), ss[:len(ss)/2]...); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := send.Send(t.Context(), ss[len(ss)/2:]...); err != nil {
		t.Fatal(err)
	}
}

// request is one for both sides.
type request struct {
	method string // GET if empty; POST sends the parameters as a form
	path   string // below /api/v1
	params string // as in a URL
	header string // name: value
	// differs says why the bodies are not the same; then only status and content
	// type are compared.
	differs string
}

func (r request) String() string {
	return strings.TrimSpace(fmt.Sprint(r.method, " ", r.path, "?", r.params, " ", r.header))
}

func (r request) make(ctx context.Context, base string) (*http.Request, error) {
	method, target, body := r.method, base+"/api/v1"+r.path, io.Reader(nil)
	if method == "" {
		method = http.MethodGet
	}
	if method == http.MethodPost {
		body = strings.NewReader(r.params)
	} else if r.params != "" {
		target += "?" + r.params
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if name, v, ok := strings.Cut(r.header, ": "); ok {
		req.Header.Set(name, v)
	}
	return req, nil
}

// answer is what is compared.
type answer struct {
	Status int
	Header map[string]string
	Body   string
}

// headers that clients look at.
func headers() []string {
	return []string{
		"Content-Type", "Content-Encoding", "Vary", "Allow", "Access-Control-Allow-Origin", "Access-Control-Allow-Methods",
		"Access-Control-Allow-Headers", "Access-Control-Expose-Headers", "X-Content-Type-Options",
	}
}

func toAnswer(t *testing.T, code int, h http.Header, body []byte) answer {
	t.Helper()
	a := answer{Status: code, Header: map[string]string{}}
	for _, name := range headers() {
		if v := h.Values(name); len(v) > 0 {
			a.Header[name] = strings.Join(v, "; ")
		}
	}
	a.Body = string(decompress(t, h.Get("Content-Encoding"), body))
	return a
}

func decompress(t *testing.T, encoding string, body []byte) []byte {
	t.Helper()
	if len(body) == 0 {
		return nil
	}
	var r io.Reader
	var err error
	switch encoding {
	case "gzip":
		r, err = gzip.NewReader(bytes.NewReader(body))
	case "deflate":
		r, err = zlib.NewReader(bytes.NewReader(body))
	case "zstd":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(body)); err == nil {
			defer z.Close()
		}
		r = z
	default:
		return body
	}
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

var (
	timings = regexp.MustCompile(`"timings":\{[^}]*\}`)
	// What a query has cost is told beside Prometheus's statistics.
	cost = regexp.MustCompile(`,"cost":\{"series":[^}]*\}`)
	// Where a query is when its time is over depends on how fast the machine is.
	timedOut = regexp.MustCompile(`(expanding series: )?(query timed out in )[a-z ]+`)
	// The planner has other samples in memory at a time than Prometheus's engine.
	peak = regexp.MustCompile(`"peakSamples":\d+`)
)

// ordered sorts what Prometheus leaves unordered: the series of an instant vector
// and of the series endpoint, warnings; and takes out what a clock says. All
// other bytes stay as they are.
func (a answer) ordered() answer {
	a.Body = timings.ReplaceAllString(a.Body, `"timings":{}`)
	a.Body = timedOut.ReplaceAllString(a.Body, "$2")
	a.Body = peak.ReplaceAllString(cost.ReplaceAllString(a.Body, ""), `"peakSamples":0`)
	sorted := func(raw json.RawMessage) {
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil || len(list) < 2 {
			return
		}
		slices.SortFunc(list, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
		a.Body = strings.Replace(a.Body, string(raw), "["+string(bytes.Join(slices.Concat([][]byte{}, toBytes(list)), []byte(",")))+"]", 1)
	}
	var top, data map[string]json.RawMessage
	if json.Unmarshal([]byte(a.Body), &top) != nil {
		return a
	}
	sorted(top["warnings"])
	sorted(top["infos"])
	if json.Unmarshal(top["data"], &data) != nil {
		if bytes.HasPrefix(top["data"], []byte("[{")) {
			sorted(top["data"])
		}
		return a
	}
	if string(data["resultType"]) == `"vector"` {
		sorted(data["result"])
	}
	return a
}

func toBytes(list []json.RawMessage) [][]byte {
	out := make([][]byte, len(list))
	for i, r := range list {
		out[i] = r
	}
	return out
}

func requests() []request {
	sec := func(ms int64) string { return fmt.Sprintf("%d.%03d", ms/1000, ms%1000) }
	at := "&time=" + sec(end)
	all := "&start=" + sec(start) + "&end=" + sec(end)
	span := all + "&step=30"
	q := url.QueryEscape
	var out []request
	get := func(path, params string) { out = append(out, request{path: path, params: params}) }
	both := func(path, params string) {
		get(path, params)
		out = append(out, request{method: http.MethodPost, path: path, params: params})
	}
	differs := func(path, why string) {
		out = append(out, request{path: path, differs: why})
	}

	for _, expr := range []string{
		"up", `up{job="job-0"}`, `{job="job-1"}`, `{__name__=~"up|latency_bucket",instance!="host-1:80"}`, "sum by (job) (rate(http_requests_total[5m]))",
		"histogram_quantile(0.9, sum by (le) (rate(latency_bucket[5m])))", "topk(2, http_requests_total)", "sort_desc(http_requests_total)",
		"odd_values", "goes_stale", `{"métrique.à points"}`, "native", "rate(native[2m])", "histogram_quantile(0.5, native)", "sum(native)",
		"1", `"text"`, "vector(1)", "time()", "absent(nothing)", "nothing", "count_values(\"v\", up)", "up + on(instance) http_requests_total",
		"up offset 5m", "up @ 1700000300", "up[1m]", "native[1m]", "rate(up[5m:1m])", "up == 1", "-up", "label_replace(up, \"x\", \"$1\", \"job\", \"(.*)\")",
		"http_requests_total / up", "rate(up[5m])", "info(up)", "limitk(1, up)", "sum(http_requests_total", "foo(", "", "up{", "sum(up) by", "rate(up)",
		"1 +", "up @ foo", "up[5m] + 1", `{__name__=~".*"}`, `{}`, "up and ignoring(x) up", "stddev_over_time(odd_values[5m])", "quantile(2, up)",
		"histogram_quantile(3, native)", "last_over_time(goes_stale[1m])", "present_over_time(goes_stale[1m])", "timestamp(up)",
		"mad_over_time(up[5m])", "changes(odd_values[10m])", "sum(rate(http_requests_total[1m])) / 0", "count({__name__!=\"\"})",
	} {
		both("/query", "query="+q(expr)+at)
		get("/query_range", "query="+q(expr)+span)
	}
	// Times, steps, timeouts, limits, statistics.
	for _, p := range []string{
		"&time=1700000100", "&time=1700000100.5", "&time=2023-11-14T22:15:00Z", "&time=2023-11-14T22:15:00.123%2B01:00", "&time=x", "&time=1e9", "&time=NaN",
		"&time=-1", "&time=", at + "&timeout=x", at + "&timeout=10s", at + "&timeout=-1s", at + "&timeout=0.5", at + "&lookback_delta=1s", at + "&lookback_delta=x",
		at + "&lookback_delta=1h", at + "&limit=2", at + "&limit=0", at + "&limit=-1", at + "&limit=x", at + "&limit=100", at + "&stats=all", at + "&stats=true",
		at + "&stats=x", "&time=-9223372036854775808", "&time=292277025-08-18T07:12:54.999999999Z",
	} {
		if p == "&time=" || p == "&time=-9223372036854775808" {
			continue
		}
		both("/query", "query=up"+p)
	}
	for _, p := range []string{
		"", all, span, all + "&step=0", all + "&step=-5", all + "&step=x", all + "&step=1m", all + "&step=0.01", all + "&step=1e-9",
		"&start=x&end=1&step=1", "&start=1&end=x&step=1", "&start=10&end=5&step=1", span + "&timeout=x", span + "&limit=1", span + "&limit=x", span + "&stats=all",
		span + "&lookback_delta=10s", all + "&step=15s", "&start=2023-11-14T22:15:00Z&end=2023-11-14T22:16:00Z&step=7",
	} {
		both("/query_range", "query=up"+p)
	}
	// This takes seconds, if nothing stops it.
	both("/query", "query="+q("count_over_time((up + up)[15m:1ms])")+at+"&timeout=0.1")
	both("/query_range", "query="+q("count_over_time((up + up)[15m:1ms])")+span+"&timeout=0.1")
	get("/query", "")
	get("/query_range", "query=up[5m]"+span)

	for _, p := range []string{
		"", "match[]=up", "match[]=up&match[]=odd_values", "match[]=" + q(`{job="job-0"}`), "match[]=" + q(`{__name__=~"up|odd.*"}`), "match[]=nothing",
		"match[]={}", "match[]=up[5m]", "match[]=" + q("{"), "match[]=" + q(`{job=""}`), "match[]=up&limit=2", "match[]=up&limit=0", "match[]=up&limit=-1", "match[]=up&limit=x", "match[]=up&limit=100",
		"match[]=up&start=x", "match[]=up&end=x", "match[]=up" + all, "match[]=up&start=1&end=2", "match[]=up&start=5&end=1", "match[]=up&match[]=up&limit=3",
		"match[]=" + q(`{"label.with dots"!=""}`), "match[]=up&start=1700000000&end=1700000100", "match[]=up" + all + "&limit=1",
	} {
		both("/series", p)
		both("/labels", p)
		get("/label/job/values", p)
		get("/label/__name__/values", p)
		get("/label/U__label_2e_with_20_dots/values", p)
	}
	get("/label/nothing/values", "")
	get("/label/a-b/values", "")
	get("/label/"+url.PathEscape("label.with dots")+"/values", "")
	get("/label//values", "")
	get("/label/job", "")

	for _, p := range []string{"", "query=http_requests_total" + all, "query=" + q(`sum(rate(http_requests_total{code="500",job="job-1"}[5m])) / up`) + all, "query=up" + all, "query=http_requests_total", "query=" + q("foo(") + all, "query=up&start=x&end=1", "query=up&start=1&end=x", "query=up&start=5&end=1"} {
		both("/query_exemplars", p)
	}
	for _, p := range []string{"", "query=" + q("sum(rate(up[5m]))by(job)"), "query=" + q("sum(")} {
		both("/format_query", p)
		both("/parse_query", p)
	}
	for _, path := range []string{
		"/targets", "/rules", "/alerts", "/alertmanagers", "/scrape_pools", "/targets/metadata", "/scrape_pools/config", "/notifications", "/status/tsdb/blocks",
		"/targets/relabel_steps", "/query_cost", "/query_range_cost",
	} {
		get(path, "")
	}
	get("/targets", "state=active")
	get("/targets", "state=any&scrapePool=x")
	get("/targets", "state=dropped")
	get("/rules", "type=alert")
	get("/rules", "type=x")
	get("/rules", "exclude_alerts=x")
	get("/rules", "group_limit=1")
	get("/rules", "group_limit=x")
	get("/rules", "match[]={")
	get("/targets/metadata", "limit=x")
	get("/targets/metadata", "match_target={")
	get("/metadata", "limit=x")
	get("/metadata", "limit_per_metric=x")
	get("/metadata", "metric=nothing")
	get("/metadata", "")
	get("/status/tsdb", "limit=0")
	get("/status/tsdb", "limit=-1")
	get("/status/tsdb", "limit=x")
	get("/status/tsdb", "limit=20000")
	differs("/status/tsdb", "it counts the series of the last two hours; TestCardinalityLikePrometheus")
	differs("/status/config", "a gateway has no configuration of a Prometheus")
	differs("/status/flags", "the flags are others")
	differs("/status/buildinfo", "the revision is ours")
	differs("/status/runtimeinfo", "it tells of another process")
	differs("/status/walreplay", "a gateway has no WAL")
	differs("/status/self_metrics", "the metrics are others")
	get("/status/self_metrics", "metric_name_pattern=(")
	get("/status/self_metrics", "metric_name_pattern=nothing")
	differs("/features", "features of the scraping and storing parts are absent")
	differs("/openapi.yaml", "its address is in it")
	for _, path := range []string{"/nothing", "/", "/query/x", "/search/x", "/query_cost", "/write"} {
		get(path, "")
	}
	for _, path := range []string{"/otlp/v1/metrics", "/read"} {
		out = append(out, request{method: http.MethodPost, path: path})
	}
	for _, p := range []string{
		"", "search[]=up", "search[]=HTTP&case_sensitive=false", "search[]=lat&search[]=od&include_score=true", "search[]=htp&fuzz_threshold=50&include_score=true",
		"search[]=upp&fuzz_alg=jarowinkler&fuzz_threshold=60&include_score=true", "search[]=e&sort_by=score", "sort_by=alpha&sort_dir=dsc", "sort_by=alpha",
		"limit=2", "limit=2&batch_size=1", "batch_size=3", "search[]=nothing", "match[]=up", "match[]=up&match[]=odd_values", "match[]=nothing",
		"match[]={", "fuzz_threshold=101", "fuzz_alg=x", "case_sensitive=x", "include_score=x", "include_metadata=true", "include_metadata=x", "sort_by=x", "sort_dir=asc",
		"sort_by=score", "limit=0", "limit=x", "limit=20000", "batch_size=0", "start=x", "end=x", "start=5&end=1", "search[]=", "search[]=" + q("é"),
		strings.Repeat("search[]=a&", 33),
	} {
		if !strings.Contains(p, "start=") && !strings.Contains(p, "end=") {
			p += all
		}
		both("/search/metric_names", strings.TrimPrefix(p, "&"))
		both("/search/label_names", strings.TrimPrefix(p, "&"))
		both("/search/label_values", strings.TrimPrefix(p, "&"))
		both("/search/label_values", "label=instance&"+strings.TrimPrefix(p, "&"))
	}
	for _, method := range []string{http.MethodDelete, http.MethodPut, http.MethodHead, http.MethodPatch} {
		for _, path := range []string{"/query", "/labels", "/label/job/values", "/status/tsdb", "/metadata"} {
			out = append(out, request{method: method, path: path})
		}
	}
	for _, path := range []string{"/label/job/values", "/status/tsdb", "/targets", "/metadata", "/admin/tsdb/snapshot", "/admin/tsdb/clean_tombstones", "/admin/tsdb/delete_series"} {
		out = append(out, request{method: http.MethodPost, path: path})
	}
	out = append(
		out,
		request{method: http.MethodOptions, path: "/query"},
		request{method: http.MethodOptions, path: "/query", header: "Origin: http://grafana"},
		request{path: "/query", params: "query=up" + at, header: "Origin: http://grafana"},
		request{path: "/query", params: "query=up" + at, header: "Accept-Encoding: gzip"},
		request{path: "/query_range", params: "query=http_requests_total" + span, header: "Accept-Encoding: gzip"},
		request{path: "/query_range", params: "query=http_requests_total" + span, header: "Accept-Encoding: deflate, gzip;q=0.5"},
		request{path: "/query_range", params: "query=http_requests_total" + span, header: "Accept-Encoding: deflate"},
		request{path: "/series", params: "match[]=up", header: "Accept-Encoding: identity, gzip"},
		request{path: "/query", params: "query=up{", header: "Accept-Encoding: gzip"},
		request{path: "/search/label_names", params: all[1:], header: "Accept-Encoding: gzip"},
		request{path: "/notifications", header: "Accept-Encoding: gzip"},
		request{path: "/status/walreplay", header: "Accept-Encoding: gzip", differs: "a gateway has no WAL"},
		request{path: "/nothing", header: "Accept-Encoding: gzip"},
		request{method: http.MethodOptions, path: "/query", header: "Accept-Encoding: gzip"},
		request{path: "/query", params: "query=up" + at, header: "Accept: application/x-nothing"},
		request{path: "/query", params: "query=up" + at, header: "Accept: text/plain;q=0.5, */*"},
		request{method: http.MethodPost, path: "/query", params: "query=up%zz" + at},
		request{path: "/query", params: "query=up%zz" + at},
		request{path: "/query", params: "query=" + q("up") + "&time=" + sec(end) + "&query=nothing"},
	)
	return out
}

// elsewhere says of endpoints that are not in requests where they are compared,
// or why they aren't.
func elsewhere() map[string]string {
	return map[string]string{
		"/read":               "TestRemoteReadLikePrometheus",
		"/write":              "the Prometheus of the test takes remote writes, a gateway doesn't",
		"/notifications/live": "TestNotificationsLive: a gateway has none to tell",
		"/query_cost":         "TestQueryCost",
		"/query_range_cost":   "TestQueryCost",
	}
}

// client doesn't ask for compression by itself.
func client(t *testing.T) *http.Client {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// serve gives the URL of the API.
func serve(t *testing.T, api *gateway.API) string {
	t.Helper()
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	return server.URL
}

// do sends a request and reads the whole answer.
func do(t *testing.T, c *http.Client, req *http.Request) (*http.Response, []byte) {
	t.Helper()
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

// ask sends the request below a base URL.
func (r request) ask(t *testing.T, c *http.Client, base string) answer {
	t.Helper()
	req, err := r.make(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	resp, body := do(t, c, req)
	return toAnswer(t, resp.StatusCode, resp.Header, body).ordered()
}

// TestLikePrometheus drives the same requests at a real Prometheus and at the
// gateway, over the same samples: some for each endpoint that this Prometheus
// says it has.
func TestLikePrometheus(t *testing.T) {
	ss := dataset()
	p := toPrometheus(t, ss, "search-api")
	base := serve(t, toGateway(t, ss))
	c := client(t)
	ask := func(base string, r request) answer { return r.ask(t, c, base) }
	seen := map[string]bool{}
	for _, r := range requests() {
		want, got := ask(p.URL, r), ask(base, r)
		if r.differs != "" {
			want.Body, got.Body = "", ""
		}
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Errorf("%s: Prometheus -, gateway +\n%s", r, diff)
		}
		seen[r.path] = true
	}
	t.Logf("%d requests", len(requests()))
	seen["/label/{name}/values"] = seen["/label/job/values"]
	paths := regexp.MustCompile(`(?m)^ +(/\S*):$`).FindAllStringSubmatch(ask(p.URL, request{path: "/openapi.yaml"}).Body, -1)
	if len(paths) < 20 {
		t.Fatalf("openapi.yaml has %d paths", len(paths))
	}
	for _, m := range paths {
		if path := m[1]; !seen[path] && elsewhere()[path] == "" {
			t.Errorf("%s is an endpoint that is not compared", path)
		}
	}
}

// TestStorageFails: what the storage can't read is no fault of the query.
func TestStorageFails(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	if err := c.Close(); err != nil { // the index can't be read any more
		t.Fatal(err)
	}
	api := newAPI(t, c, gateway.Options{})
	for _, path := range []string{
		"/query?query=up", "/query_range?query=up&start=1&end=2&step=1", "/series?match[]=up",
		"/query_exemplars?query=up", "/metadata", "/status/tsdb", "/status/active_series",
	} {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1"+path, nil))
		if body := w.Body.String(); w.Code != http.StatusInternalServerError || !strings.Contains(body, `"errorType":"internal"`) {
			t.Errorf("%s: %d %s", path, w.Code, body)
		}
	}
}

// TestNoAnswerFromIngester: whatever may be incomplete says so.
func TestNoAnswerFromIngester(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	c.ServeFetch("away", fetchpb.UnimplementedFetchServer{})
	api := newAPI(t, c, gateway.Options{})
	for _, path := range []string{
		"/query?query=up", "/query_range?query=up&start=1&end=2&step=1", "/series?match[]=up", "/labels", "/label/job/values",
		"/query_exemplars?query=up", "/metadata", "/status/tsdb", "/status/active_series",
	} {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1"+path, nil))
		if body := w.Body.String(); w.Code != http.StatusOK || !strings.Contains(body, `"warnings":["ingester away did not answer`) {
			t.Errorf("%s: %d %s", path, w.Code, body)
		}
	}
}

// hanging answers nothing before its request is cancelled.
type hanging struct {
	fetchpb.UnimplementedFetchServer
	waiting, cancelled chan struct{}
}

func (h *hanging) Select(_ *fetchpb.SelectRequest, s grpc.ServerStreamingServer[fetchpb.SelectResponse]) error {
	h.waiting <- struct{}{}
	<-s.Context().Done()
	h.cancelled <- struct{}{}
	return s.Context().Err()
}

// TestClientGone: a request whose client has gone stops what it has started.
func TestClientGone(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	h := &hanging{waiting: make(chan struct{}), cancelled: make(chan struct{})}
	c.ServeFetch("slow", h)
	server := httptest.NewServer(newAPI(t, c, gateway.Options{}))
	defer server.Close() // waits for the request
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for _, path := range []string{"/query?query=up", "/query_range?query=up&start=1&end=2&step=1", "/series?match[]=up"} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/api/v1"+path, nil)
			if err == nil {
				var resp *http.Response
				if resp, err = client.Do(req); err == nil {
					err = resp.Body.Close()
				}
			}
			done <- err
		}()
		<-h.waiting
		cancel()
		<-h.cancelled
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestTenancy: the tenant is that of the header, and sees its own series only.
func TestTenancy(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	for _, tenant := range []string{"a", "b"} {
		s := gatewaytest.Sample{Labels: labels.FromStrings("__name__", "up", "of", tenant), T: start, V: 1}
		if err := c.Shipper(tenant).Send(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	api := newAPI(t, c, gateway.Options{Tenancy: gateway.Header})
	check := func(tenant string, wantCode int, want string) {
		t.Helper()
		for _, path := range []string{"/label/of/values", "/label/of/values?match[]=up", "/series?match[]={of!=''}", "/query?query=up&time=1700000001"} {
			req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1"+path, nil)
			if tenant != "" {
				req.Header.Set(gateway.TenantHeader, tenant)
			}
			w := httptest.NewRecorder()
			api.ServeHTTP(w, req)
			body := w.Body.String()
			if w.Code != wantCode || !strings.Contains(body, want) || wantCode == 200 && tenant != "b" && strings.Contains(body, `"b"`) {
				t.Errorf("tenant %q, %s: %d %s", tenant, path, w.Code, body)
			}
		}
	}
	check("a", http.StatusOK, `"a"`)
	check("b", http.StatusOK, `"b"`)
	check("c", http.StatusOK, `[]`)
	check("", http.StatusUnauthorized, gateway.TenantHeader)
	check(strings.Repeat("x", 151), http.StatusUnauthorized, "the limit is 150")
	check("a\xff", http.StatusUnauthorized, "UTF-8")
}

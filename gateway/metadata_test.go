package gateway_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// exposition is what the target of TestMetadataLikePrometheus says.
const exposition = `# HELP requests_total Requests with a "quote" and a \\ and é.
# TYPE requests_total counter
requests_total 1
# HELP latency_seconds Latency.
# TYPE latency_seconds histogram
latency_seconds_bucket{le="+Inf"} 1
latency_seconds_sum 1
latency_seconds_count 1
# HELP size Size.
# TYPE size gauge
size 1
# TYPE no_help summary
no_help{quantile="0.5"} 1
no_help_sum 1
no_help_count 1
`

// TestMetadataLikePrometheus: what a Prometheus says that scrapes, and a gateway
// whose ingesters were told the same, from heads or from blocks.
func TestMetadataLikePrometheus(t *testing.T) {
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		_, _ = io.WriteString(w, exposition)
	}))
	t.Cleanup(target.Close)
	config := fmt.Sprintf("global: {scrape_interval: 1s}\nscrape_configs: [{job_name: a, static_configs: [{targets: [%q]}]}]\n", strings.TrimPrefix(target.URL, "http://"))
	p := testenv.Prometheus(t, "", config, "--enable-feature=search-api")
	now := time.Now().UnixMilli()
	var ss []gatewaytest.Sample
	add := func(family string, m metadata.Metadata, names ...string) {
		for _, name := range names {
			ss = append(ss, gatewaytest.Sample{Labels: labels.FromStrings("__name__", name), T: now, V: 1, Metadata: m, Family: family})
		}
	}
	add("", metadata.Metadata{Type: model.MetricTypeCounter, Help: `Requests with a "quote" and a \ and é.`}, "requests_total")
	add("latency_seconds", metadata.Metadata{Type: model.MetricTypeHistogram, Help: "Latency."}, "latency_seconds_bucket", "latency_seconds_sum", "latency_seconds_count")
	add("", metadata.Metadata{Type: model.MetricTypeGauge, Help: "Size."}, "size")
	add("no_help", metadata.Metadata{Type: model.MetricTypeSummary}, "no_help", "no_help_sum", "no_help_count")
	api := func(flush bool) string {
		cluster := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
		if err := cluster.Shipper(gateway.DefaultTenant).Send(t.Context(), ss...); err != nil {
			t.Fatal(err)
		}
		if flush {
			if err := cluster.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, m := range []string{"ingester-0", "ingester-1"} { // as if they were gone: blocks must do
				cluster.SetState(m, ring.Left)
			}
		}
		return serve(t, newAPI(t, cluster, gateway.Options{Engine: gateway.EngineOptions{Features: []string{"search-api"}}}))
	}
	c := client(t)
	ask := func(base, path string) answer {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/api/v1"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, body := do(t, c, req)
		return toAnswer(t, resp.StatusCode, resp.Header, body)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if strings.Contains(ask(p.URL, "/metadata").Body, "no_help") && strings.Contains(ask(p.URL, "/query?query=no_help_sum").Body, "value") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the Prometheus has not scraped its target in 30 s")
		}
	}
	for _, flush := range []bool{false, true} {
		base := api(flush)
		for _, path := range []string{
			"/metadata", "/metadata?metric=size", "/metadata?metric=latency_seconds", "/metadata?metric=latency_seconds_bucket", "/metadata?metric=nothing",
			"/metadata?limit=0", "/metadata?limit=100", "/metadata?limit_per_metric=1", "/metadata?metric=size&limit=1&limit_per_metric=1",
			"/search/metric_names?include_metadata=true&search[]=e&match[]={__name__!~%22up|scrape.*%22}",
		} {
			got := ask(base, path)
			if flush { // there is no ingester, which it says
				got.Body = strings.ReplaceAll(got.Body, `,"warnings":["this gateway knows no ingester: fresh samples may be missing"]`, "")
			}
			if d := gocmp.Diff(ask(p.URL, path), got); d != "" {
				t.Errorf("in blocks %t, %s: Prometheus -, gateway +\n%s", flush, path, d)
			}
		}
		if got := ask(base, "/metadata?limit=2").Body; strings.Count(got, `"type"`) != 2 {
			t.Errorf("limit of 2: %s", got)
		}
	}
}

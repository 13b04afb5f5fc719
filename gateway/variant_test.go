package gateway_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestEngineOptions: each tenant's queries mean what they mean at its Prometheus.
func TestEngineOptions(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	for _, tenant := range []string{"plain", "features", "short"} {
		s := gatewaytest.Sample{Labels: labels.FromStrings("__name__", "up"), T: start, V: 1}
		if err := c.Shipper(tenant).Send(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	api := newAPI(t, c, gateway.Options{
		Tenancy: gateway.Header,
		Tenants: map[string]gateway.EngineOptions{
			"features": {Features: []string{"promql-experimental-functions", "promql-delayed-name-removal", "search-api", "query-cost"}},
			"short":    {LookbackDelta: 10 * time.Second},
		},
	})
	check := func(tenant, path string, wantCode int, want string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1"+path, nil)
		req.Header.Set(gateway.TenantHeader, tenant)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, req)
		if body := w.Body.String(); w.Code != wantCode || !strings.Contains(body, want) {
			t.Errorf("%s, %s: %d %s", tenant, path, w.Code, body)
		}
	}
	query := func(tenant, expr string, wantCode int, want string) {
		t.Helper()
		check(tenant, "/query?time=1700000060&query="+url.QueryEscape(expr), wantCode, want)
	}
	query("plain", "up", http.StatusOK, `"__name__":"up"`)
	query("plain", "mad_over_time(up[5m])", http.StatusBadRequest, "is not enabled")
	query("plain", "label_replace(rate(up[5m]) or up * 1, \"name\", \"$1\", \"__name__\", \"(.*)\")", http.StatusOK, `{"metric":{}`)
	query("features", "mad_over_time(up[5m])", http.StatusOK, `"0"`)
	query("features", "label_replace(rate(up[5m]) or up * 1, \"name\", \"$1\", \"__name__\", \"(.*)\")", http.StatusOK, `"name":"up"`)
	query("short", "up", http.StatusOK, `"result":[]`)
	query("other", "up", http.StatusOK, `"result":[]`)
	check("plain", "/search/metric_names?start=1700000000&end=1700000060", http.StatusInternalServerError, "search API disabled")
	check("plain", "/query_cost?query=up", http.StatusNotFound, "")
	check("features", "/query_cost?query=up&time=1700000060", http.StatusOK, `"seriesTouched":1`)
	check("features", "/features", http.StatusOK, `"search":true`)
	check("plain", "/status/flags", http.StatusOK, `"enable-feature":"","query.lookback-delta":"5m"`)
	check("short", "/status/flags", http.StatusOK, `"query.lookback-delta":"10s"`)
	check("plain", "/features", http.StatusOK, `"search":false`)

	_, err := gateway.New(gateway.Options{Tenants: map[string]gateway.EngineOptions{"x": {Features: []string{"y"}}}}, c.Storage, c.Live,
		slog.New(slog.DiscardHandler), prometheus.NewRegistry(), prometheus.NewRegistry())
	if want := `tenant x: feature "y" is not one of`; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %s", err, want)
	}
}

// TestFeaturesLikePrometheus compares what features of the query language change.
func TestFeaturesLikePrometheus(t *testing.T) {
	fs := slices.DeleteFunc(gateway.Features(), func(f string) bool { return f == "query-cost" })
	ss := dataset()
	p := toPrometheus(t, ss, fs...)
	base := serve(t, newAPI(t, gatewayOf(t, ss), gateway.Options{Engine: gateway.EngineOptions{Features: fs}}))
	c := client(t)
	rs := slices.DeleteFunc(requests(), func(r request) bool {
		return r.path != "/query" && r.path != "/query_range" || r.method == http.MethodPost
	})
	for _, expr := range []string{
		"mad_over_time(up[5m])", "sort_by_label(up, \"instance\")", "limit_ratio(0.5, up)", "ts_of_max_over_time(up[5m])", "label_join(rate(up[1m]), \"x\", \"-\", \"__name__\")",
		"rate({__name__=~\"up|odd_values\"}[5m])", "-{__name__=~\"up|http_requests_total\"}", "up + fill(0) on(instance, job) latency_bucket{le=\"1\"}", "sum by (__name__) (rate({job=\"job-0\"}[1m]))",
		"increase(http_requests_total[2m])", "sum(métrique)", "first_over_time(up[2m])", "info(up)", "double_exponential_smoothing(up[5m], 0.5, 0.5)", "start()", "sum(rate(http_requests_total[5m:1m]))",
	} {
		q := "query=" + url.QueryEscape(expr)
		rs = append(rs,
			request{path: "/query", params: q + "&time=1700000800"},
			request{path: "/query_range", params: q + "&start=1700000000&end=1700000900&step=30"},
			request{path: "/query_range", params: q + "&start=1700000000&end=1700000900&step=30&stats=all"})
	}
	for _, r := range rs {
		if diff := gocmp.Diff(r.ask(t, c, p.URL), r.ask(t, c, base)); diff != "" {
			t.Errorf("%s: Prometheus -, gateway +\n%s", r, diff)
		}
	}
	t.Logf("%d requests", len(rs))
}

// TestSubqueriesLikePrometheus compares subqueries that name no step, where rules are
// evaluated at another interval than the default.
func TestSubqueriesLikePrometheus(t *testing.T) {
	ss := dataset()
	p := toPrometheusWith(t, ss, "global: {evaluation_interval: 20s}\n")
	base := serve(t, newAPI(t, gatewayOf(t, ss), gateway.Options{Engine: gateway.EngineOptions{EvaluationInterval: 20 * time.Second}}))
	c := client(t)
	for _, expr := range []string{
		"up[5m:]", "count_over_time(up[5m:])", "max_over_time(rate(http_requests_total[1m])[5m:])", "sum(rate(http_requests_total[5m:]))", "avg_over_time(sum(up)[5m:] offset 1m)",
		"count_over_time((up + up)[5m:])", "count_over_time(up[5m:] @ 1700000300)", "rate(up[5m:15s])", "max_over_time(count_over_time(up[1m:])[5m:])",
	} {
		q := "query=" + url.QueryEscape(expr)
		for _, r := range []request{
			{path: "/query", params: q + "&time=1700000800&stats=all"},
			{path: "/query_range", params: q + "&start=1700000000&end=1700000900&step=30&stats=all"},
		} {
			if diff := gocmp.Diff(r.ask(t, c, p.URL), r.ask(t, c, base)); diff != "" {
				t.Errorf("%s: Prometheus -, gateway +\n%s", r, diff)
			}
		}
	}
}

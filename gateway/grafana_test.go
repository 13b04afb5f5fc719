package gateway_test

import (
	"cmp"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v2"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// dataSource is one of a provisioning file of Grafana.
type dataSource struct {
	Name     string
	URL      string `yaml:"url"`
	JSONData struct {
		HTTPMethod string `yaml:"httpMethod"`
		HeaderName string `yaml:"httpHeaderName1"`
	} `yaml:"jsonData"`
	SecureJSONData struct {
		HeaderValue string `yaml:"httpHeaderValue1"`
	} `yaml:"secureJsonData"`
}

// provisioned reads the provisioning file in docs/grafana.md.
func provisioned(t *testing.T) []dataSource {
	t.Helper()
	page, err := os.ReadFile("../docs/grafana.md")
	if err != nil {
		t.Fatal(err)
	}
	_, file, _ := strings.Cut(string(page), "```yaml\n")
	file, _, _ = strings.Cut(file, "```")
	var out struct {
		Datasources []dataSource
	}
	if err := yaml.Unmarshal([]byte(file), &out); err != nil {
		t.Fatal(err)
	}
	return out.Datasources
}

// grafanaRequest is one that Grafana's Prometheus data source sends.
type grafanaRequest struct {
	method string // as the data source says, if empty
	path   string
	inURL  bool // a POST has the parameters there, and an empty body
	form   url.Values
	want   string // a part of the answer
}

// grafanaRequests are those of the panels, editors and pages of Grafana.
func grafanaRequests() []grafanaRequest {
	sec := func(ms int64) string { return strconv.FormatFloat(float64(ms)/1000, 'f', -1, 64) }
	// Grafana aligns a range to the step.
	from, to := int64(start/step*step+step), int64(end/step*step)
	ranged := func(expr string, want string) grafanaRequest {
		return grafanaRequest{path: "/query_range", want: want, form: url.Values{"query": {expr}, "start": {sec(from)}, "end": {sec(to)}, "step": {"15"}}}
	}
	instant := func(expr string, want string) grafanaRequest {
		return grafanaRequest{path: "/query", want: want, form: url.Values{"query": {expr}, "time": {sec(to)}}}
	}
	browse := func(path, want string, pairs ...string) grafanaRequest {
		form := url.Values{"start": {sec(from / 1000 * 1000)}, "end": {sec(to / 1000 * 1000)}}
		for i := 0; i < len(pairs); i += 2 {
			form.Add(pairs[i], pairs[i+1])
		}
		return grafanaRequest{method: http.MethodGet, path: path, form: form, want: want}
	}
	post := func(r grafanaRequest) grafanaRequest {
		r.method = http.MethodPost
		return r
	}
	// What it can only GET it may try to POST before: it goes by the status.
	refused := func(path string) grafanaRequest {
		return grafanaRequest{method: http.MethodPost, path: path, want: "Method Not Allowed"}
	}
	// The probe for exemplars has ms where seconds belong.
	ms := func(t int64) string { return strconv.FormatInt(t, 10) }
	return []grafanaRequest{
		// Save & test.
		{path: "/query", form: url.Values{"query": {"1+1"}, "time": {"4"}}, want: `"resultType":"scalar"`},
		refused("/status/buildinfo"),
		{method: http.MethodGet, path: "/status/buildinfo", want: `"version":"3.16.0"`},
		// When the data source is first used.
		{path: "/query_exemplars", form: url.Values{"query": {"test"}, "start": {ms(to - 30*60_000)}, "end": {ms(to)}}, want: `{"status":"success","data":[]}`},
		// Panels and Explore.
		ranged("sum by (job) (rate(http_requests_total[1m]))", `"job":"job-1"`),
		ranged(`{__name__="up", job=~"job-0|job-1"}`, `"instance":"host-5:80"`),
		ranged("topk(3, sum by (instance) (increase(http_requests_total{code!=\"\"}[1m0s])))", `"matrix"`),
		ranged("histogram_quantile(0.95, sum by (le, job) (rate(latency_bucket[1m])))", `"matrix"`),
		// Heatmaps, of classic and of native histograms.
		ranged("sum by (le) (increase(latency_bucket[1m]))", `"le":"+Inf"`),
		ranged(`sum(increase(native{kind="int"}[1m]))`, `"histograms":`),
		ranged(`native{kind="float"}`, `"histograms":`),
		// Tables, stat panels, alert rules.
		instant("sort_desc(sum by (code, job) (http_requests_total))", `"code":"500"`),
		instant("up == 0", `"vector"`),
		instant("up[1m]", `"matrix"`),
		instant("absent(nothing)", `"1"`),
		{path: "/query_exemplars", form: url.Values{"query": {"sum(rate(http_requests_total[1m]))"}, "start": {sec(from)}, "end": {sec(to)}}, want: `"trace_id":`},
		{path: "/query_range", form: url.Values{"query": {"up"}, "start": {sec(from)}, "end": {sec(to)}, "step": {"15"}, "timeout": {"60s"}}, want: `"matrix"`},
		{path: "/query", form: url.Values{"query": {"up"}, "time": {sec(to)}, "timeout": {"60s"}}, want: `"vector"`},
		// The query builder and completion.
		browse("/labels", `"instance"`),
		browse("/labels", `"code"`, "match[]", `{job="job-0",__name__="http_requests_total"}`, "limit", "40000"),
		post(browse("/labels", `"le"`, "match[]", `{__name__="latency_bucket"}`)),
		browse("/label/__name__/values", `"http_requests_total"`, "limit", "40000"),
		browse("/label/__name__/values", `"latency_bucket"`, "match[]", `{__name__=~".*(l|L).*(a|A).*"}`, "limit", "1000"),
		browse("/label/job/values", `["job-0","job-1"]`, "match[]", `{__name__="up"}`),
		browse("/series", `"host-0:80"`, "match[]", "up", "limit", "40000"),
		post(browse("/series", `"host-0:80"`, "match[]", `{job="job-0"}`, "match[]", "native")),
		browse("/series", `"host-0:80"`, "match[]", `{__name__!=""}`, "limit", "40000"),
		browse("/label/__name__/values", `"latency_bucket"`, "match[]", `{__name__=~"(?i).*LATENCY.*"}`, "limit", "1000"),
		browse("/label/U__label_2e_with_20_dots/values", `"data":[`, "match[]", `{"métrique.à points"}`, "limit", "40000"),
		{method: http.MethodGet, path: "/metadata", form: url.Values{"limit": {"40000"}}, want: `"data":`},
		// Suggestions of ad hoc filters and of Drilldown.
		{method: http.MethodPost, inURL: true, path: "/labels", form: url.Values{"match[]": {`up{job="job-0"}`, `native{job="job-0"}`}, "start": {sec(from)}, "end": {sec(to)}, "limit": {"10"}}, want: `"instance"`},
		refused("/label/job/values"),
		{method: http.MethodGet, path: "/metadata", form: url.Values{"metric": {"up"}}, want: `"data":`},
		// Variables: label_names(), metrics(), label_values(), query_result().
		browse("/labels", `"job"`),
		browse("/label/__name__/values", `"up"`),
		browse("/label/instance/values", `"host-3:80"`, "match[]", `up{job="job-1"}`, "limit", "0"),
		instant(`count_values("value", up)`, `"value"`),
		// Annotations.
		ranged(`changes(up{job="job-0"}[1m]) > 0`, `"matrix"`),
		// Alert rules of the data source.
		{method: http.MethodGet, path: "/rules", want: `{"groups":[]}`},
		{method: http.MethodGet, path: "/rules", form: url.Values{"type": {"alert"}, "group_limit": {"50"}}, want: `{"groups":[]}`},
		{method: http.MethodGet, path: "/alerts", want: `{"alerts":[]}`},
		refused("/rules"),
		refused("/alerts"),
		{method: http.MethodGet, path: "/alertmanagers", want: `"activeAlertmanagers":[]`},
		// The editor's mistakes.
		ranged("rate(up", `"bad_data"`),
		instant("sum by (job", `"bad_data"`),
	}
}

// do sends it as Grafana does.
func (g grafanaRequest) do(t *testing.T, c *http.Client, base string, ds dataSource) answer {
	t.Helper()
	method := cmp.Or(g.method, ds.JSONData.HTTPMethod)
	target, body := base+"/api/v1"+g.path, ""
	if method == http.MethodPost && !g.inURL {
		body = g.form.Encode()
	} else if len(g.form) > 0 {
		target += "?" + g.form.Encode()
	}
	r, err := http.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Header.Set("User-Agent", "Grafana/12.1.0")
	r.Header.Set("Accept-Encoding", "gzip")
	r.Header.Set("X-Grafana-Org-Id", "1")
	if name := ds.JSONData.HeaderName; name != "" {
		r.Header.Set(name, ds.SecureJSONData.HeaderValue)
	}
	resp, got := do(t, c, r)
	return toAnswer(t, resp.StatusCode, resp.Header, got).ordered()
}

// TestGrafana sends what Grafana sends, with each data source of the provisioning
// file that the documentation has. What it gets is what it gets of a Prometheus.
func TestGrafana(t *testing.T) {
	ss := dataset()
	p := toPrometheus(t, ss)
	tenants := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	for _, tenant := range []string{"team-a", "team-b"} {
		shipHalves(t, tenants, tenant, ss)
	}
	single := serve(t, toGateway(t, ss))
	byHeader := serve(t, newAPI(t, tenants, gateway.Options{Tenancy: gateway.Header, TenantFederation: true}))
	c := client(t)
	sources := provisioned(t)
	if len(sources) != 3 {
		t.Fatalf("%d data sources in the documentation, want 3", len(sources))
	}
	for _, ds := range sources {
		base := single
		if ds.JSONData.HeaderName != "" {
			base = byHeader
		}
		several := strings.Contains(ds.SecureJSONData.HeaderValue, "|")
		for _, g := range grafanaRequests() {
			got := g.do(t, c, base, ds)
			if !strings.Contains(got.Body, g.want) {
				t.Errorf("%s: %v: %d %.300s, want %s", ds.Name, g, got.Status, got.Body, g.want)
			}
			want := g.do(t, c, p.URL, ds)
			if several || g.path == "/status/buildinfo" {
				want.Body, got.Body = "", "" // there is a label more, or the build is another
			}
			if d := gocmp.Diff(want, got); d != "" {
				t.Errorf("%s: %v: Prometheus -, gateway +\n%s", ds.Name, g, d)
			}
		}
		if several {
			g := grafanaRequest{method: http.MethodGet, path: "/label/__tenant_id__/values", form: url.Values{"match[]": {"up"}}}
			if got := g.do(t, c, base, ds); !strings.Contains(got.Body, `["team-a","team-b"]`) {
				t.Errorf("tenants for a variable: %s", got.Body)
			}
		}
	}
}

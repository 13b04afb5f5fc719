package gateway_test

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// TestTenantFederation: a request about several tenants sees the series of each
// under its name.
func TestTenantFederation(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	now := time.Now().UnixMilli()
	for i, tenant := range []string{"a", "b", "c"} {
		var ss []gatewaytest.Sample
		for j := range 20 {
			s := gatewaytest.Sample{Labels: labels.FromStrings("__name__", "up", "job", "j"), T: now - 60_000 + int64(j)*3000, V: float64(i + j)}
			if j == 19 {
				s.Exemplars = []exemplar.Exemplar{{Labels: labels.FromStrings("trace_id", tenant), Value: 1, Ts: s.T, HasTs: true}}
			}
			s.Metadata = metadata.Metadata{Type: model.MetricTypeGauge, Help: "Up."}
			ss = append(ss, s)
		}
		ss = append(ss,
			gatewaytest.Sample{Labels: labels.FromStrings("__name__", "only_"+tenant), T: now, V: 1},
			gatewaytest.Sample{Labels: labels.FromStrings("__name__", "odd", "Upper", "1"), T: now, V: 1},
			gatewaytest.Sample{Labels: labels.FromStrings("__name__", "odd", gateway.TenantLabel, "own"), T: now, V: 1},
			gatewaytest.Sample{Labels: labels.FromStrings("__name__", "odd"), T: now, V: 1},
		)
		send := c.Shipper(tenant)
		if err := send.Send(t.Context(), ss[:10]...); err != nil {
			t.Fatal(err)
		}
		if i != 1 {
			if err := c.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := send.Send(t.Context(), ss[10:]...); err != nil {
			t.Fatal(err)
		}
	}
	at := fmt.Sprintf("%d.%03d", now/1000, now%1000)
	q := url.QueryEscape
	ask := func(api http.Handler, tenants, path string) (int, string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		req.Header.Set(gateway.TenantHeader, tenants)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, req)
		return w.Code, w.Body.String()
	}
	o := gateway.Options{
		Tenancy: gateway.Header, TenantFederation: true,
		Engine: gateway.EngineOptions{Features: []string{"search-api"}},
		Tenants: map[string]gateway.EngineOptions{
			"a": {Features: []string{"promql-experimental-functions"}}, "b": {Features: []string{"promql-experimental-functions"}},
		},
	}
	api := newAPI(t, c, o)
	for _, tt := range []struct{ tenants, path, want string }{
		{"b|a|b", "/query?query=" + q("count by (__tenant_id__) (up)"), `{"__tenant_id__":"a"},"value":[@,"1"]},{"metric":{"__tenant_id__":"b"},"value":[@,"1"]}]`},
		{"a|b", "/query?query=" + q("sum(max_over_time(up[5m]))"), `"value":[@,"39"]`},
		{"a|b", "/query?query=" + q(`up{__tenant_id__="b"}`), `"result":[{"metric":{"__name__":"up","__tenant_id__":"b","job":"j"},"value":[@,"20"]}]`},
		{"a|b", "/query?query=" + q(`up{__tenant_id__!~"a|b"}`), `"result":[]`},
		{"a|b|c", "/query?query=" + q(`count({__tenant_id__=~"a|c"})`), `"value":[@,"10"]`},
		{"a|b", "/query?query=" + q(`count(odd{original___tenant_id__="own"})`), `"value":[@,"2"]`},
		{"a|b", "/query?query=" + q(`count by (original___tenant_id__) (odd)`), `{"original___tenant_id__":"own"},"value":[@,"2"]`},
		{"a", "/query?query=" + q(`up`), `{"__name__":"up","job":"j"}`},
		{"a", "/query?query=" + q(`up{__tenant_id__="a"}`), `"result":[]`},
		{"a|b", "/query?query=" + q(`mad_over_time(up[1m])`), `"result":[{"metric":{"__tenant_id__":"a"`},
		{"a|c", "/query?query=" + q(`mad_over_time(up[1m])`), `is not enabled`},
		{"a|b", "/query?query=up|limit", `parse error`},
		{"a|b", "/labels?match[]=up", `["__name__","__tenant_id__","job"]`},
		{"a|b", "/labels", `["Upper","__name__","__tenant_id__","job","original___tenant_id__"]`},
		{"a|b", "/label/original___tenant_id__/values", `["own"]`},
		{"a|b", "/label/__tenant_id__/values", `["a","b"]`},
		{"a|b|none", "/label/__tenant_id__/values", `["a","b"]`},
		{"a|b|none", "/label/__tenant_id__/values?match[]=only_a", `["a"]`},
		{"a|b", "/label/__name__/values", `["odd","only_a","only_b","up"]`},
		{"a|b|c", "/label/__name__/values?limit=3", `["odd","only_a","only_b"]`},
		{"a|b", "/label/__name__/values?match[]={__tenant_id__=%22b%22}", `["odd","only_b","up"]`},
		{"a|b", "/series?match[]=odd", `[{"Upper":"1","__name__":"odd","__tenant_id__":"a"},{"Upper":"1","__name__":"odd","__tenant_id__":"b"},{"__name__":"odd","__tenant_id__":"a"},{"__name__":"odd","__tenant_id__":"a","original___tenant_id__":"own"},`},
		{"a|b", "/series?match[]=up&limit=1", `[{"__name__":"up","__tenant_id__":"a","job":"j"}],"warnings"`},
		{"a|b", "/query_exemplars?query=up", `"trace_id":"b"`},
		{"a|b", "/query_exemplars?query=up{__tenant_id__=%22a%22}", `[{"seriesLabels":{"__name__":"up","__tenant_id__":"a","job":"j"},"exemplars":[{"labels":{"trace_id":"a"}`},
		{"a|b", "/metadata", `{"up":[{"type":"gauge","unit":"","help":"Up."}]}`},
		{"a|b|c", "/search/label_values?label=__tenant_id__", `{"value":"a"},{"value":"b"},{"value":"c"}`},
		{"a|b|c", "/search/metric_names", `{"name":"only_b"}`},
		{"a|b", "/status/active_series?by=__tenant_id__", `"seriesCount":[{"name":"a","value":5},{"name":"b","value":5}]`},
		{"a|b", "/query_explain?query=up", `"status":"success"`},
		{"a|b", "/rules", `{"groups":[]}`},
		{"a|b", "/alerts", `{"alerts":[]}`},
		{"a|b", "/targets", `"activeTargets":[]`},
		{"none|never", "/query?query=up", `"result":[]`},
		{"none|never", "/labels", `"data":[]`},
		{"none|never", "/query_exemplars?query=up", `"data":[]`},
		{"a|b", "/status/tsdb", `"seriesCountByMetricName":[{"name":"odd","value":6}`},
		{"a||b", "/query?query=up", `has an empty tenant beside a bar`},
		{"|", "/query?query=up", `has an empty tenant`},
		{"a|" + strings.Repeat("x", 151), "/query?query=up", `a tenant of 151 bytes`},
		{"a", "/query?query=vector(1)", `"success"`},
	} {
		path := tt.path
		if strings.HasPrefix(path, "/query?") {
			path += "&time=" + at
		}
		if strings.HasPrefix(path, "/query_ex") {
			path += "&start=0&end=" + at
		}
		if _, body := ask(api, tt.tenants, "/api/v1"+path); !strings.Contains(strings.ReplaceAll(body, at, "@"), tt.want) {
			t.Errorf("%s, %s: %s, want %s", tt.tenants, path, body, tt.want)
		}
	}
	if _, body := ask(api, "a|b", "/federate?match[]=up"); !strings.Contains(body, `up{__tenant_id__="b",job="j",instance=""} 20`) {
		t.Errorf("/federate: %s", body)
	}
	var many []string
	for i := range 101 {
		many = append(many, fmt.Sprint("t", i))
	}
	if code, body := ask(api, strings.Join(many, "|"), "/api/v1/query?query=up"); code != http.StatusUnauthorized || !strings.Contains(body, "the limit is 100") {
		t.Errorf("101 tenants: %d %s", code, body)
	}

	// A head that doesn't answer is told of once.
	c.ServeFetch("broken", fetchpb.UnimplementedFetchServer{})
	if _, body := ask(api, "a|b", "/api/v1/query?query=up&time="+at); strings.Count(body, "broken did not answer") != 1 {
		t.Errorf("with a head that doesn't answer: %s", body)
	}

	o.TenantFederation = false
	if _, body := ask(newAPI(t, c, o), "a|b", "/api/v1/query?query=up&time="+at); !strings.Contains(body, `"result":[]`) {
		t.Errorf("without federation a|b has a result: %s", body)
	}
}

// halting is an ingester that doesn't answer about tenant b, and has nothing of others.
type halting struct {
	fetchpb.UnimplementedFetchServer
}

func (halting) of(tenant string) error {
	if tenant == "b" {
		return status.Error(codes.Unavailable, "halted")
	}
	return nil
}

func (h halting) Select(r *fetchpb.SelectRequest, s grpc.ServerStreamingServer[fetchpb.SelectResponse]) error {
	return cmp.Or(h.of(r.GetTenant()), s.Send(&fetchpb.SelectResponse{Header: &fetchpb.Header{}}))
}

func (h halting) Read(r *fetchpb.ReadRequest, s grpc.ServerStreamingServer[fetchpb.ReadResponse]) error {
	return cmp.Or(h.of(r.GetTenant()), s.Send(&fetchpb.ReadResponse{Header: &fetchpb.Header{}}))
}

func (h halting) Labels(_ context.Context, r *fetchpb.LabelsRequest) (*fetchpb.LabelsResponse, error) {
	return &fetchpb.LabelsResponse{Header: &fetchpb.Header{}}, h.of(r.GetTenant())
}

func (h halting) Exemplars(_ context.Context, r *fetchpb.ExemplarsRequest) (*fetchpb.ExemplarsResponse, error) {
	return &fetchpb.ExemplarsResponse{Header: &fetchpb.Header{}}, h.of(r.GetTenant())
}

func (h halting) Metadata(_ context.Context, r *fetchpb.MetadataRequest) (*fetchpb.MetadataResponse, error) {
	return &fetchpb.MetadataResponse{Header: &fetchpb.Header{}}, h.of(r.GetTenant())
}

func (h halting) Stats(_ context.Context, r *fetchpb.StatsRequest) (*fetchpb.StatsResponse, error) {
	return &fetchpb.StatsResponse{}, h.of(r.GetTenant())
}

// TestWhoseTrouble: of several tenants, warnings and errors name the one that they are of.
func TestWhoseTrouble(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	now := time.Now().UnixMilli()
	for _, tenant := range []string{"a", "b", "lost"} {
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "up")}
		s.Floats.T, s.Floats.V = []int64{now - 60_000}, []float64{1}
		if _, err := c.Import(t.Context(), tenant, chunkfmt.WriterOptions{}, s); err != nil {
			t.Fatal(err)
		}
	}
	lost, err := c.History.Snapshot(t.Context(), "lost", 0, now, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Objects.Delete(t.Context(), lost.Blocks[0].Object); err != nil {
		t.Fatal(err)
	}
	c.ServeFetch("some", halting{})
	var fault historytest.Fault
	reports := index.New(&historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(_, hash string) historytest.Fault {
		if strings.Contains(hash, "b") {
			return fault
		}
		return historytest.None
	}})
	api := newAPI(t, c, gateway.Options{Tenancy: gateway.Header, TenantFederation: true, Index: reports})
	ask := func(tenants, path string) (int, string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		req.Header.Set(gateway.TenantHeader, tenants)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, req)
		return w.Code, w.Body.String()
	}
	paths := []string{
		"query?query=up", "query?query=last_over_time(up[5m])%2Babs(up)", "series?match[]=up", "labels", "label/__name__/values", "label/__tenant_id__/values",
		"query_exemplars?start=0&end=9999999999&query=up", "metadata", "status/tsdb", "status/active_series?label=__name__",
	}
	for _, path := range paths {
		for tenants, want := range map[string]string{
			"a|b": `"warnings":["tenant b: ingester some did not answer`, "a|b|c": `"warnings":["tenant b: ingester some`, "b": `"warnings":["ingester some did not answer`,
		} {
			if code, body := ask(tenants, "/api/v1/"+path); code != http.StatusOK || !strings.Contains(body, want) || strings.Count(body, "did not answer") != 1 {
				t.Errorf("%s, %s: %d %s, want %s", tenants, path, code, body, want)
			}
		}
		if code, body := ask("a|c", "/api/v1/"+path); code != http.StatusOK || strings.Contains(body, "warnings") {
			t.Errorf("a|c, %s: %d %s", path, code, body)
		}
	}
	fault = historytest.Before
	if _, body := ask("d|bb", "/api/v1/query?query=1"); !strings.Contains(body, `"warnings":["tenant bb: engine options of the tenant's Prometheus`) {
		t.Errorf("engine options that can't be read: %s", body)
	}
	for _, path := range paths {
		code, body := ask("a|lost", "/api/v1/"+path)
		alone, _ := ask("lost", "/api/v1/"+path)
		if code != alone || code < 400 || !strings.Contains(body, "tenant lost: ") {
			t.Errorf("without a block: %s: %d %s, alone %d", path, code, body, alone)
		}
		if code, body := ask("a|c", "/api/v1/"+path); code != http.StatusOK {
			t.Errorf("a|c, %s: %d %s", path, code, body)
		}
	}
}

// TestFederationLikePrometheus: several tenants together answer as a Prometheus that has the
// samples of all, with the tenant as a label.
func TestFederationLikePrometheus(t *testing.T) {
	names := []string{"a", "b", "c"}
	of := map[string][]gatewaytest.Sample{}
	var all []gatewaytest.Sample
	for _, s := range dataset() {
		tenant := names[labels.StableHash(s.Labels)%3]
		of[tenant] = append(of[tenant], s)
		b := labels.NewBuilder(s.Labels)
		s.Labels = b.Set(gateway.TenantLabel, tenant).Labels()
		all = append(all, s)
	}
	// As in dataset.
	slices.SortStableFunc(all, func(a, b gatewaytest.Sample) int {
		return cmp.Or(cmp.Compare(a.T, b.T), labels.Compare(a.Labels, b.Labels))
	})
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 3})
	for _, tenant := range names {
		shipHalves(t, c, tenant, of[tenant])
	}
	p := toPrometheus(t, all, "search-api")
	api := newAPI(t, c, gateway.Options{Tenancy: gateway.Header, TenantFederation: true, Engine: gateway.EngineOptions{Features: []string{"search-api"}}})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set(gateway.TenantHeader, "a|b|c")
		api.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	cl := client(t)
	for _, r := range requests() {
		if r.differs != "" || strings.HasPrefix(r.path, "/admin/") { // refused
			continue
		}
		if diff := gocmp.Diff(r.ask(t, cl, p.URL), r.ask(t, cl, server.URL)); diff != "" {
			t.Errorf("%s: Prometheus -, gateway +\n%s", r, diff)
		}
	}
}

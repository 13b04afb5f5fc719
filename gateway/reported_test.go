package gateway_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// TestReportedEngine: queries mean what the flags of the tenant's Prometheus, as its
// sidecar reports them, make of them.
func TestReportedEngine(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	for _, tenant := range []string{"a", "b", "configured"} {
		if err := c.Shipper(tenant).Send(t.Context(), gatewaytest.Sample{Labels: labels.FromStrings("__name__", "up"), T: start, V: 1}); err != nil {
			t.Fatal(err)
		}
	}
	var fault historytest.Fault
	x := index.New(&historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(string, string) historytest.Fault { return fault }})
	options := gateway.Options{
		Tenancy: gateway.Header, Index: x,
		Engine:  gateway.EngineOptions{Features: []string{"search-api"}},
		Tenants: map[string]gateway.EngineOptions{"configured": {LookbackDelta: time.Minute}},
	}
	api := newAPI(t, c, options)
	do := func(api *gateway.API, method, tenant, path, body string, wantCode int, want string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), method, "/api/v1"+path, strings.NewReader(body))
		req.Header.Set(gateway.TenantHeader, tenant)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, req)
		if got := w.Body.String(); w.Code != wantCode || !strings.Contains(got, want) {
			t.Errorf("%s, %s: %d %s, want %d %s", tenant, path, w.Code, got, wantCode, want)
		}
	}
	report := func(tenant, body string, wantCode int, want string) {
		t.Helper()
		do(api, http.MethodPost, tenant, "/engine", body, wantCode, want)
	}
	query := func(api *gateway.API, tenant, expr string, wantCode int, want string) {
		t.Helper()
		do(api, http.MethodGet, tenant, "/query?time=1700000060&query="+url.QueryEscape(expr), "", wantCode, want)
	}
	query(api, "a", "up", http.StatusOK, `"__name__":"up"`)
	query(api, "a", "mad_over_time(up[5m])", http.StatusBadRequest, "is not enabled")

	report("a", `{"lookback_delta":"30s","enable_features":["promql-experimental-functions","exemplar-storage"]}`, http.StatusOK, "success")
	report("configured", `{"lookback_delta":"30s","enable_features":[]}`, http.StatusOK, "success")
	other := newAPI(t, c, options)
	for _, api := range []*gateway.API{api, other} {
		query(api, "a", "up", http.StatusOK, `"result":[]`)
		query(api, "a", "mad_over_time(up[5m])", http.StatusOK, `"0"`)
		do(api, http.MethodGet, "a", "/status/flags", "", http.StatusOK, `"enable-feature":"search-api,promql-experimental-functions","query.lookback-delta":"30s"`)
		do(api, http.MethodGet, "a", "/openapi.yaml", "", http.StatusOK, "/query_range:")
		do(api, http.MethodGet, "a", "/query?time=1700000060&stats=all&query=mad_over_time(up[5m])", "", http.StatusOK, `"0"`)
		query(api, "b", "up", http.StatusOK, `"__name__":"up"`)
		query(api, "b", "mad_over_time(up[5m])", http.StatusBadRequest, "is not enabled")
		query(api, "configured", "up", http.StatusOK, `"__name__":"up"`)
	}

	// A subquery's own steps are those of the rules.
	steps := func(want string) {
		t.Helper()
		query(api, "b", "count_over_time(vector(1)[5m:])", http.StatusOK, `[1700000060,"`+want+`"]`)
		do(api, http.MethodGet, "b", "/query?time=1700000060&stats=all&query=count_over_time(vector(1)[5m:])", "", http.StatusOK, `[1700000060,"`+want+`"]`)
	}
	steps("5")
	report("b", `{"lookback_delta":"5m","evaluation_interval":"15s"}`, http.StatusOK, "success")
	steps("20")
	do(api, http.MethodGet, "b", "/status/config", "", http.StatusOK, `evaluation_interval: 15s`)
	report("b", `{"lookback_delta":"5m","evaluation_interval":"-1s"}`, http.StatusBadRequest, "not a valid duration")
	report("b", `{"lookback_delta":"5m"}`, http.StatusOK, "success")
	steps("5")

	report("b", `{"lookback_delta":"-1s"}`, http.StatusBadRequest, "not a valid duration")
	report("b", `{"enable_features":["x"]}`, http.StatusBadRequest, "lookback delta of 0 ms")
	report("b", `{"lookback_delta":"1m","enable_features":[""]}`, http.StatusBadRequest, "is empty")
	report("b", `{"lookback_delta":"1m","enable_features":["`+strings.Repeat("x", 200)+`"]}`, http.StatusBadRequest, "longer than 128 bytes")
	report("b", `{`, http.StatusBadRequest, "unexpected EOF")
	report("", `{"lookback_delta":"1m"}`, http.StatusUnauthorized, "no tenant")
	fault = historytest.Before
	report("b", `{"lookback_delta":"30s"}`, http.StatusServiceUnavailable, "unavailable")
	query(api, "b", "up", http.StatusOK, `"__name__":"up"`)
	query(api, "a", "up", http.StatusOK, `"result":[]`) // it knows
	fault = historytest.None
	options.Index = nil
	do(newAPI(t, c, options), http.MethodPost, "a", "/engine", `{"lookback_delta":"1m"}`, http.StatusNotImplemented, "takes no reports")
}

// nothing is a storage without samples.
type nothing struct{ gateway.Storage }

func (nothing) Querier(int64, int64) (storage.Querier, error) { return storage.NoopQuerier(), nil }

// TestUnknownEngine: where it can't be known what a tenant's Prometheus has, answers
// warn, and mean what they should as soon as it can be read.
func TestUnknownEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // for the time until it is read again
		var fault historytest.Fault
		x := index.New(&historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(string, string) historytest.Fault { return fault }})
		if err := x.PutEngine(t.Context(), index.EngineRow{Tenant: gateway.DefaultTenant, LookbackDelta: 30_000}); err != nil {
			t.Fatal(err)
		}
		reg := prometheus.NewRegistry()
		api, err := gateway.New(gateway.Options{Index: x}, nothing{}, &ring.Live{}, slog.New(slog.DiscardHandler), reg, reg)
		if err != nil {
			t.Fatal(err)
		}
		check := func(warns bool, lookback string) {
			t.Helper()
			for path, want := range map[string]string{
				"query?query=1": "", "query?query=1&stats=all": "", "query_explain?query=1": "", "status/flags": `"query.lookback-delta":"` + lookback + `"`,
			} {
				w := httptest.NewRecorder()
				api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/"+path, http.NoBody))
				got := w.Body.String()
				if w.Code != http.StatusOK || !strings.Contains(got, want) || strings.Contains(got, "engine options of the tenant's Prometheus") != warns {
					t.Errorf("%s: %d %s, want warning %t, %s", path, w.Code, got, warns, want)
				}
			}
		}
		fault = historytest.Before
		check(true, "5m")
		time.Sleep(1100 * time.Millisecond)
		check(true, "5m")
		fault = historytest.None
		time.Sleep(1100 * time.Millisecond)
		check(false, "30s")
		fault = historytest.Before
		time.Sleep(time.Hour)
		check(false, "30s") // known before
	})
}

// TestReportWaits: while a report can't be written yet, queries are answered as before.
func TestReportWaits(t *testing.T) {
	answered := make(chan string)
	var query func() string
	wait := false
	x := index.New(&historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(op, _ string) historytest.Fault {
		if op == "Put" && wait { // the write takes as long as a query
			go func() { answered <- query() }()
			select {
			case got := <-answered:
				if !strings.Contains(got, `"query.lookback-delta":"30s"`) {
					t.Errorf("while another report is written: %s", got)
				}
			case <-time.After(time.Minute):
				t.Error("a query waits for the write of a report")
				go func() { <-answered }()
			}
		}
		return historytest.None
	}})
	reg := prometheus.NewRegistry()
	api, err := gateway.New(gateway.Options{Index: x}, nothing{}, &ring.Live{}, slog.New(slog.DiscardHandler), reg, reg)
	if err != nil {
		t.Fatal(err)
	}
	do := func(method, path, body string) string {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, "/api/v1/"+path, strings.NewReader(body)))
		return w.Body.String()
	}
	query = func() string { return do(http.MethodGet, "status/flags", "") }
	for _, lookback := range []string{"30s", "1m"} {
		if got := do(http.MethodPost, "engine", `{"lookback_delta":"`+lookback+`"}`); !strings.Contains(got, "success") {
			t.Fatal(got)
		}
		wait = true
	}
	if got := query(); !strings.Contains(got, `"query.lookback-delta":"1m"`) {
		t.Errorf("after the report: %s", got)
	}
}

// TestUnknownEngineLogged: one tenant's row that can't be read is told of once, though others are
// read between.
func TestUnknownEngineLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fault := historytest.Before
		x := index.New(&historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(_, key string) historytest.Fault {
			if strings.Contains(key, "bad") {
				return fault
			}
			return historytest.None
		}})
		var logged strings.Builder
		reg := prometheus.NewRegistry()
		api, err := gateway.New(gateway.Options{Index: x, Tenancy: gateway.Header}, nothing{}, &ring.Live{}, slog.New(slog.NewTextHandler(&logged, nil)), reg, reg)
		if err != nil {
			t.Fatal(err)
		}
		query := func(tenant string) {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/query?query=1", http.NoBody)
			r.Header.Set(gateway.TenantHeader, tenant)
			api.ServeHTTP(httptest.NewRecorder(), r)
		}
		check := func(want int) {
			t.Helper()
			for range 10 {
				query("bad")
				query("good")
				time.Sleep(40 * time.Second)
			}
			if n := strings.Count(logged.String(), "can't be read"); n != want {
				t.Errorf("logged %d times, want %d:\n%s", n, want, logged.String())
			}
		}
		check(1)
		fault = historytest.None
		check(1)
		fault = historytest.Before
		check(2)
	})
}

// TestManyReportedEngines: what tenants report takes no memory without a bound.
func TestManyReportedEngines(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	api := newAPI(t, c, gateway.Options{Tenancy: gateway.Header, Index: index.New(&historytest.MemoryRows{})})
	for i := range 40 {
		tenant := "t" + time.Duration(i).String()
		for _, r := range []*http.Request{
			httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/api/v1/engine", strings.NewReader(`{"lookback_delta":"`+(time.Duration(i+1)*time.Second).String()+`"}`)),
			httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/query?query=1", http.NoBody),
		} {
			r.Header.Set(gateway.TenantHeader, tenant)
			w := httptest.NewRecorder()
			if api.ServeHTTP(w, r); w.Code != http.StatusOK {
				t.Fatalf("%s %s: %d %s", tenant, r.URL, w.Code, w.Body)
			}
		}
	}
	if n := api.Engines(); n > 33 {
		t.Errorf("%d engines are kept", n)
	}
}

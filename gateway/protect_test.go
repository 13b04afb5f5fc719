package gateway_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// fifty are series of an hour, the older half in a block.
func fifty(t *testing.T) *gatewaytest.Cluster {
	t.Helper()
	var ss []gatewaytest.Sample
	for i := range 50 {
		for ts := int64(0); ts <= 3_600_000; ts += 15_000 {
			ss = append(ss, gatewaytest.Sample{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(i)), T: ts, V: float64(ts)})
		}
	}
	return gatewayOf(t, ss)
}

type response struct {
	code      int
	Status    string          `json:"status"`
	ErrorType string          `json:"errorType"`
	Error     string          `json:"error"`
	Data      json.RawMessage `json:"data"`
}

func call(t *testing.T, h http.Handler, path string, params ...string) response {
	t.Helper()
	v := url.Values{}
	for i := 0; i < len(params); i += 2 {
		v.Add(params[i], params[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/api/v1/"+path+"?"+v.Encode(), nil))
	a := response{code: w.Code}
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &a), w.Body.String())
	return a
}

// A query beyond a limit fails with its name and value; others go on.
func TestLimits(t *testing.T) {
	c := fifty(t)
	for _, q := range []struct {
		limits gateway.Limits
		expr   string
		want   string // part of the error
	}{
		{gateway.Limits{Limits: account.Limits{Series: 49}}, `requests_total`, "limit gateway.limits.query_series is 49"},
		{gateway.Limits{Limits: account.Limits{Series: 49}}, `sum(rate(requests_total[5m]))`, "limit gateway.limits.query_series is 49"},
		{gateway.Limits{Limits: account.Limits{Series: 50}}, `sum(rate(requests_total[5m]))`, ""},
		{gateway.Limits{Limits: account.Limits{Samples: 1000}}, `requests_total`, "limit gateway.limits.query_samples is 1000"},
		{gateway.Limits{Limits: account.Limits{Samples: 1000}}, `requests_total{i="1"}`, ""},
		{gateway.Limits{Limits: account.Limits{Range: time.Hour}}, `rate(requests_total[5m])`, "limit gateway.limits.query_range is 1h0m0s"},
		{gateway.Limits{Limits: account.Limits{Range: 2 * time.Hour}}, `rate(requests_total[5m])`, ""},
		{gateway.Limits{Limits: account.Limits{Bytes: 10_000}}, `requests_total`, "limit gateway.limits.answer_bytes is 10000"},
		{gateway.Limits{Limits: account.Limits{Bytes: 10_000}}, `sum(requests_total)`, ""},
	} {
		// A sidecar can report a feature with which there is no plan.
		for _, features := range [][]string{nil, {"query-cost"}} {
			api := newAPI(t, c, gateway.Options{Limits: q.limits, Engine: gateway.EngineOptions{Features: features}})
			a := call(t, api, "query_range", "query", q.expr, "start", "0", "end", "3600", "step", "60")
			if q.want == "" {
				require.Equal(t, http.StatusOK, a.code, "%+v: %s", q, a.Error)
				continue
			}
			require.Equal(t, http.StatusUnprocessableEntity, a.code, "%v: %+v", features, q)
			require.Equal(t, "execution", a.ErrorType)
			require.Contains(t, a.Error, q.want)
		}
	}
}

// logged is what the log of slow queries says of one.
type logged struct {
	Series      int64 `json:"series"`
	Samples     int64 `json:"samples"`
	HeadBytes   int64 `json:"head_bytes"`
	ObjectBytes int64 `json:"object_bytes"`
	ObjectGets  int64 `json:"object_gets"`
}

// reader asks a gateway without caches, over fifty series, and gives what was read too.
func reader(t *testing.T) func(l account.Limits, path string, params ...string) (response, logged) {
	t.Helper()
	c := fifty(t)
	cold, err := history.New(history.Options{Objects: c.Objects, Index: c.Index, VisibilityDelay: 5 * time.Minute, PageCacheBytes: -1, Registerer: prometheus.NewRegistry()})
	require.NoError(t, err)
	storage := merge.New(c.Heads, cold, func(context.Context) string { return gateway.DefaultTenant })
	return func(l account.Limits, path string, params ...string) (response, logged) {
		t.Helper()
		var log bytes.Buffer
		reg := prometheus.NewRegistry()
		o := gateway.Options{SlowQuery: time.Nanosecond, Limits: gateway.Limits{Limits: l}}
		api, err := gateway.New(o, storage, c.Live, slog.New(slog.NewJSONHandler(&log, nil)), reg, reg)
		require.NoError(t, err)
		a := call(t, api, path, params...)
		var line logged
		require.NoError(t, json.Unmarshal(log.Bytes(), &line), log.String())
		return a, line
	}
}

// What a query is known to read, beyond a limit, is not read; what is not beyond it is.
func TestLimitsBefore(t *testing.T) {
	read := reader(t)
	for _, query := range []string{`requests_total`, `sum(rate(requests_total[5m]))`, `requests_total{i=~"1.*"} + 1`, `avg_over_time(requests_total[10m:1m])`} {
		params := []string{"query", query, "start", "0", "end", "3600", "step", "60"}
		a, all := read(account.Limits{}, "query_range", params...)
		require.Equal(t, http.StatusOK, a.code, a.Error)
		for limit, l := range map[string]func(less int64) account.Limits{
			"query_series":  func(less int64) account.Limits { return account.Limits{Series: all.Series - less} },
			"query_samples": func(less int64) account.Limits { return account.Limits{Samples: all.Samples - less} },
		} {
			a, _ := read(l(0), "query_range", params...)
			require.Equal(t, http.StatusOK, a.code, "%s: %s", query, a.Error)
			a, _ = read(l(1), "query_range", params...)
			require.Equal(t, http.StatusUnprocessableEntity, a.code, query)
			require.Contains(t, a.Error, "limit gateway.limits."+limit, query)
		}
		for _, l := range []account.Limits{{Series: 1}, {Samples: 1}} {
			a, some := read(l, "query_range", params...)
			require.Equal(t, http.StatusUnprocessableEntity, a.code, query)
			require.Equal(t, "execution", a.ErrorType)
			require.Contains(t, a.Error, "as estimated before")
			require.Less(t, some.ObjectBytes, all.ObjectBytes, query)
			require.Zero(t, some.Samples)
		}
	}
}

// An explanation says which limits a query would go beyond.
func TestExplainLimits(t *testing.T) {
	c := fifty(t)
	for _, q := range []struct {
		limits account.Limits
		expr   string
		want   []account.Excess
	}{
		{account.Limits{Series: 50, Samples: 1 << 20, Range: 2 * time.Hour}, `rate(requests_total[5m])`, []account.Excess{}},
		{account.Limits{Series: 49}, `rate(requests_total[5m])`, []account.Excess{{Limit: "gateway.limits.query_series", Value: 50.0, Max: 49.0}}},
		{account.Limits{Series: 49}, `requests_total`, []account.Excess{{Limit: "gateway.limits.query_series", Value: 50.0, Max: 49.0}}},
		{account.Limits{Series: 99}, `requests_total + rate(requests_total[5m])`, []account.Excess{{Limit: "gateway.limits.query_series", Value: 100.0, Max: 99.0}}},
		{account.Limits{Samples: 100}, `sum(rate(requests_total[5m]))`, []account.Excess{{Limit: "gateway.limits.query_samples", Max: 100.0}}},
		{account.Limits{Series: 1, Range: time.Hour}, `rate(requests_total[5m])`, []account.Excess{{Limit: "gateway.limits.query_range", Value: "1h4m59.999s", Max: "1h0m0s"}}},
	} {
		api := newAPI(t, c, gateway.Options{Limits: gateway.Limits{Limits: q.limits}})
		a := call(t, api, "query_range_explain", "query", q.expr, "start", "0", "end", "3600", "step", "60")
		require.Equal(t, http.StatusOK, a.code, a.Error)
		var e struct{ Exceeds []account.Excess }
		require.NoError(t, json.Unmarshal(a.Data, &e))
		if len(q.want) == 1 && q.want[0].Value == nil && len(e.Exceeds) == 1 {
			require.GreaterOrEqual(t, e.Exceeds[0].Value, 241.0*50)
			q.want[0].Value = e.Exceeds[0].Value
		}
		require.Equal(t, q.want, e.Exceeds, "%+v", q)
	}
}

// Bytes of blocks and of heads count, in whatever reads them, and what is beyond the limit isn't
// asked for.
func TestLimitOfBytes(t *testing.T) {
	read := reader(t)
	hour := []string{"start", "0", "end", "3600", "step", "60"}
	for _, q := range []struct {
		path   string
		params []string
		heads  bool // are asked for series
	}{
		{"query_range", append([]string{"query", "requests_total"}, hour...), true},
		{"query_range", append([]string{"query", "sum(rate(requests_total[5m]))"}, hour...), true},
		{"query_range", append([]string{"query", `sum(increase(requests_total{i="40"}[10m]))`}, hour...), true},
		{"query", []string{"query", `topk(3, requests_total)`, "time", "1800"}, true},
		{"series", []string{"match[]", "requests_total", "start", "0", "end", "3600"}, true},
		{"label/i/values", []string{"match[]", "requests_total", "start", "0", "end", "3600"}, false},
		{"query_exemplars", []string{"query", "requests_total", "start", "0", "end", "3600"}, false},
	} {
		a, all := read(account.Limits{Read: 0}, q.path, q.params...)
		require.Equal(t, http.StatusOK, a.code, "%v: %s", q, a.Error)
		if q.path != "query_exemplars" { // which says nothing of its cost
			require.Positive(t, all.ObjectBytes, q)
			require.Equal(t, q.heads, all.HeadBytes > 0, q)
		}
		if n := all.ObjectBytes + all.HeadBytes; n > 0 {
			a, _ = read(account.Limits{Read: 2 * n}, q.path, q.params...)
			require.Equal(t, http.StatusOK, a.code, "%v: %s", q, a.Error)
			a, some := read(account.Limits{Read: n - 1}, q.path, q.params...)
			require.Equal(t, http.StatusUnprocessableEntity, a.code, q)
			require.Equal(t, "execution", a.ErrorType)
			require.Contains(t, a.Error, fmt.Sprintf("limit gateway.limits.query_bytes is %d", n-1))
			require.Less(t, some.ObjectBytes, all.ObjectBytes)
		}
		a, none := read(account.Limits{Read: 1}, q.path, q.params...)
		require.Equal(t, http.StatusUnprocessableEntity, a.code, q)
		require.Contains(t, a.Error, "limit gateway.limits.query_bytes is 1)", q)
		require.Zero(t, none.ObjectGets, q)
	}
}

// Limits hold for whatever reads series, not for queries alone.
func TestLimitsOfOtherEndpoints(t *testing.T) {
	c := fifty(t)
	read := func(types ...prompb.ReadRequest_ResponseType) []byte {
		b, err := (&prompb.ReadRequest{AcceptedResponseTypes: types, Queries: []*prompb.Query{{
			EndTimestampMs: 3_600_000, Matchers: []*prompb.LabelMatcher{{Name: "__name__", Value: "requests_total"}},
		}}}).Marshal()
		require.NoError(t, err)
		return s2.EncodeSnappy(nil, b)
	}
	series := account.Limits{Series: 49}
	for _, q := range []struct {
		limits account.Limits
		path   string
		body   []byte
		want   string // part of the error
	}{
		{series, "/api/v1/read", read(), "query_series is 49"},
		{account.Limits{Range: time.Minute}, "/api/v1/read", read(), "query_range is 1m0s"},
		{account.Limits{Range: time.Minute}, "/api/v1/read", read(prompb.ReadRequest_STREAMED_XOR_CHUNKS), "query_range is 1m0s"},
		{account.Limits{Range: time.Hour}, "/api/v1/read", read(), ""},
		{series, "/api/v1/series?match[]=requests_total", nil, "query_series is 49"},
		{series, "/api/v1/status/tsdb?start=0&end=3600", nil, "query_series is 49"},
		{series, "/api/v1/status/active_series?start=0&end=3600", nil, "query_series is 49"},
	} {
		api := newAPI(t, c, gateway.Options{Limits: gateway.Limits{Limits: q.limits}})
		method := http.MethodGet
		if q.body != nil {
			method = http.MethodPost
		}
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequest(method, q.path, bytes.NewReader(q.body)))
		if q.want == "" {
			require.Equal(t, http.StatusOK, w.Code, "%s: %s", q.path, w.Body)
			continue
		}
		require.Equal(t, http.StatusUnprocessableEntity, w.Code, "%s: %s", q.path, w.Body)
		require.Contains(t, w.Body.String(), "limit gateway.limits."+q.want)
	}
}

// So much time that it can't be said in nanoseconds is beyond the limit too.
func TestLimitOfAges(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{Limits: gateway.Limits{Limits: account.Limits{Range: time.Hour}}})
	for _, start := range []string{"-12000000000", "-20000000000", "-9000000000000000"} { // 292 years are 9.2e9 s
		a := call(t, api, "query_range", "query", "requests_total", "start", start, "end", "3600", "step", "9000000000")
		require.Equal(t, http.StatusUnprocessableEntity, a.code, start)
		require.Contains(t, a.Error, "limit gateway.limits.query_range is 1h0m0s")
	}
}

// A tenant's own limits stand in place of the others.
func TestTenantLimits(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{
		Limits:       gateway.Limits{Limits: account.Limits{Series: 1}},
		TenantLimits: map[string]gateway.Limits{gateway.DefaultTenant: {}},
	})
	require.Equal(t, http.StatusOK, call(t, api, "query", "query", "requests_total", "time", "1800").code)
}

// Of several tenants' limits the strictest count.
func TestLimitsOfSeveralTenants(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{
		Tenancy: gateway.Header, TenantFederation: true,
		Limits:       gateway.Limits{Limits: account.Limits{Series: 1000}},
		TenantLimits: map[string]gateway.Limits{"strict": {Limits: account.Limits{Series: 10}}, "free": {}},
	})
	for tenants, want := range map[string]int{
		gateway.DefaultTenant: http.StatusOK, gateway.DefaultTenant + "|free": http.StatusOK, "free|" + gateway.DefaultTenant + "|strict": http.StatusUnprocessableEntity,
	} {
		r := httptest.NewRequest(http.MethodGet, "/api/v1/query?query=requests_total&time=1800", nil)
		r.Header.Set(gateway.TenantHeader, tenants)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		require.Equal(t, want, w.Code, "%s: %s", tenants, w.Body)
	}
}

// The query that holds most is ended when all together hold too much.
func TestQueryMemory(t *testing.T) {
	reg := prometheus.NewRegistry()
	api := newAPI(t, fifty(t), gateway.Options{Memory: account.NewMemory(20_000, reg)})
	a := call(t, api, "query_range", "query", "requests_total", "start", "0", "end", "3600", "step", "15")
	require.Equal(t, http.StatusUnprocessableEntity, a.code)
	require.Contains(t, a.Error, "gateway.query_memory_bytes (20000)")
	require.Equal(t, http.StatusOK, call(t, api, "query", "query", `requests_total{i="1"}`, "time", "1800").code)
	ms, err := reg.Gather()
	require.NoError(t, err)
	for _, m := range ms {
		switch m.GetName() {
		case "epimetheus_gateway_queries_ended_for_memory_total":
			require.InDelta(t, 1, m.GetMetric()[0].GetCounter().GetValue(), 0)
		case "epimetheus_gateway_query_memory_bytes":
			require.Zero(t, m.GetMetric()[0].GetGauge().GetValue()) // all has been given back
		}
	}
}

// The points that the engine makes count, while it makes them, but not those that it
// doesn't: of series that are there for a small part of the time.
func TestMemoryOfPoints(t *testing.T) {
	c := fifty(t) // of which the samples take 200 kB
	for _, q := range []struct {
		expr  string
		end   string
		step  string
		fails bool
	}{
		{"requests_total", "3600", "0.5", true}, // 6 MB
		{"requests_total", "3600", "5", false},
		{"requests_total", "2592000", "240", false},
		{"requests_total * 2", "3600", "0.5", true},
		{`requests_total{i="1"} * 2`, "3600", "0.5", false},
		{"max_over_time((requests_total * 2)[1h:500ms])", "3600", "3600", true},
		{"sum by (i) (rate(requests_total[5m])) * 2", "3600", "0.5", true},
		{"timestamp(requests_total)", "3600", "0.5", true},
		{`quantile_over_time(scalar(vector(0.5)), requests_total{i="1"}[400d])`, "3600", "60", false},
		{`sum by (i) (rate(requests_total{i="1"}[5m])) * 2`, "3600", "0.5", false},
	} {
		reg := prometheus.NewRegistry()
		api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(3<<20, reg)})
		a := call(t, api, "query_range", "query", q.expr, "start", "0", "end", q.end, "step", q.step)
		if !q.fails {
			require.Equal(t, http.StatusOK, a.code, "%+v: %s", q, a.Error)
		} else {
			require.Equal(t, http.StatusUnprocessableEntity, a.code, q)
			require.Contains(t, a.Error, "gateway.query_memory_bytes (3145728)")
		}
		require.NoError(t, testutil.GatherAndCompare(reg, strings.NewReader("# HELP epimetheus_gateway_query_memory_bytes Memory that running queries hold: samples of heads, pages and results, about.\n# TYPE epimetheus_gateway_query_memory_bytes gauge\nepimetheus_gateway_query_memory_bytes 0\n"), "epimetheus_gateway_query_memory_bytes"))
	}
}

// endless is an ingester whose answers have no end.
type endless struct {
	fetchpb.UnimplementedFetchServer
}

func (endless) Read(_ *fetchpb.ReadRequest, s grpc.ServerStreamingServer[fetchpb.ReadResponse]) error {
	err := s.Send(&fetchpb.ReadResponse{Header: &fetchpb.Header{}})
	for ref := uint32(1); err == nil; ref++ {
		const size = 1 << 20
		err = s.Send(&fetchpb.ReadResponse{
			Refs: []uint32{ref}, Chunks: []uint32{1}, Encodings: []byte{1}, Mint: []int64{0}, Span: []uint64{1}, Sizes: []uint32{size}, Data: make([]byte, size),
		})
	}
	return err
}

// What the engine takes at once, or for labels that functions make longer, counts before it is
// taken: else one query ends the process.
func TestMemoryOfEngine(t *testing.T) {
	c := fifty(t)
	longer := func(expr string, times int, replacement string) string {
		for range times {
			expr = `label_replace(` + expr + `, "i", "` + replacement + `", "i", "(.*)")`
		}
		return expr
	}
	for _, q := range []struct {
		expr  string
		ended bool
	}{
		{`count_over_time(vector(1)[100d:1ms])`, true},
		{`count_over_time(requests_total[100d:1ms])`, true},
		{`max_over_time(count_over_time(requests_total[5m])[100d:1ms])`, true},
		{`count_over_time(vector(1)[1h:1s])`, false},
		{`count_over_time(requests_total{i="1"}[30m:1s])`, false},
		{longer(`requests_total`, 5, "$1$1$1$1$1$1$1$1"), true},
		{longer(`rate(requests_total[5m])`, 5, "$1$1$1$1$1$1$1$1"), true},
		{longer(`requests_total`, 1, strings.Repeat("x", 200_000)), true},
		{longer(`requests_total`, 20, "$1"), false},
		{longer(`rate(requests_total[5m])`, 20, "$1"), false},
		{longer(`vector(1)`, 20, "$1$1$1$1$1$1$1$1"), false}, // of one series; the engine makes no labels that are too long
	} {
		reg := prometheus.NewRegistry()
		api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(3<<20, reg)})
		a := call(t, api, "query", "query", q.expr, "time", "3600")
		require.Equal(t, q.ended, strings.Contains(a.Error, "gateway.query_memory_bytes (3145728)"), "%s: %s", plan.Excerpt(q.expr), a.Error)
		if q.ended {
			require.Equal(t, http.StatusUnprocessableEntity, a.code, a.Error)
		}
	}
}

// What an ingester sends counts while it comes.
func TestMemoryOfHeads(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	c.ServeFetch("endless", endless{})
	api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(20<<20, prometheus.NewRegistry())})
	for _, expr := range []string{"up", "sum(rate(up[5m]))"} {
		a := call(t, api, "query", "query", expr)
		require.Equal(t, http.StatusUnprocessableEntity, a.code, a)
		require.Contains(t, a.Error, "gateway.query_memory_bytes (20971520)")
	}
}

// What is found in blocks counts before a sample of it is read, and is given back.
func TestMemoryOfLabels(t *testing.T) {
	c := fifty(t)
	for _, m := range []string{"ingester-0", "ingester-1", "ingester-2"} { // blocks alone
		c.SetState(m, ring.Left)
	}
	for _, path := range []string{
		"labels", "label/i/values", "series?match[]=requests_total", "labels?match[]={i=~\".%2b\"}", "label/i/values?match[]={i=~\".%2b\"}", "status/active_series?start=0&end=3600",
		"query?query=requests_total&time=600", "query_exemplars?query=requests_total",
	} {
		for max, want := range map[int64]int{2000: http.StatusUnprocessableEntity, 0: http.StatusOK} {
			reg := prometheus.NewRegistry()
			api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(max, reg)})
			w := httptest.NewRecorder()
			api.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/api/v1/"+path, nil))
			require.Equal(t, want, w.Code, "%s: %s", path, w.Body)
			if max > 0 {
				require.Contains(t, w.Body.String(), "gateway.query_memory_bytes (2000)")
			}
			held, err := testutil.GatherAndCount(reg, "epimetheus_gateway_query_memory_bytes")
			require.NoError(t, err)
			require.Equal(t, 1, held)
			require.NoError(t, testutil.GatherAndCompare(reg, strings.NewReader("# HELP epimetheus_gateway_query_memory_bytes Memory that running queries hold: samples of heads, pages and results, about.\n# TYPE epimetheus_gateway_query_memory_bytes gauge\nepimetheus_gateway_query_memory_bytes 0\n"), "epimetheus_gateway_query_memory_bytes"))
		}
	}
}

// What parts of other gateways' queries hold counts too.
func TestMemoryOfWorkers(t *testing.T) {
	c := fifty(t)
	snap, err := c.History.Snapshot(t.Context(), gateway.DefaultTenant, 0, 3_600_000, nil, time.Time{})
	require.NoError(t, err)
	require.NotEmpty(t, snap.Blocks)
	for _, q := range []struct {
		bytes int64
		fails bool
	}{{5000, true}, {0, false}} {
		reg := prometheus.NewRegistry()
		api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(q.bytes, reg)})
		_, _, err := api.Work(t.Context(), c.History, &plan.Task{
			Tenant: gateway.DefaultTenant, Query: "rate(requests_total[5m])", Start: 0, End: 3_600_000, Step: 15_000, Lookback: 300_000, SubqueryStep: 60_000,
			MaxSamples: 1e6, Span: 24 * 3_600_000, To: 241, Blocks: snap.Blocks,
		})
		require.Equal(t, q.fails, err != nil, err)
	}
}

// What a worker reads for a query is within what is left of its limits, and told with an error too.
func TestLimitsOfWorkers(t *testing.T) {
	c := fifty(t)
	cold, err := history.New(history.Options{Objects: c.Objects, Index: c.Index, VisibilityDelay: 5 * time.Minute, PageCacheBytes: -1, Registerer: prometheus.NewRegistry()})
	require.NoError(t, err)
	snap, err := cold.Snapshot(t.Context(), gateway.DefaultTenant, 0, 3_600_000, nil, time.Time{})
	require.NoError(t, err)
	api := newAPI(t, c, gateway.Options{})
	work := func(query string, left account.Limits) (account.Cost, error) {
		_, cost, err := api.Work(t.Context(), cold, &plan.Task{
			Tenant: gateway.DefaultTenant, Query: query, Start: 0, End: 3_600_000, Step: 15_000, Lookback: 300_000, SubqueryStep: 60_000,
			MaxSamples: 1e6, Left: left, Span: 24 * 3_600_000, To: 241, Blocks: snap.Blocks,
		})
		return cost, err
	}
	all, err := work("rate(requests_total[5m])", account.Limits{})
	require.NoError(t, err)
	require.Equal(t, int64(25), all.Series)
	require.Positive(t, all.Samples)
	require.Positive(t, all.ObjectGets)
	require.Equal(t, int64(1), all.PartsHere)
	_, err = work("rate(requests_total[5m])", account.Limits{Samples: all.Samples, Read: all.ObjectBytes})
	require.NoError(t, err)
	some, err := work("rate(requests_total[5m])", account.Limits{Samples: all.Samples - 1})
	require.ErrorIs(t, err, account.ErrLimit)
	require.Positive(t, some.ObjectGets)
	some, err = work("rate(requests_total[5m])", account.Limits{Read: all.ObjectBytes - 1})
	require.ErrorIs(t, err, account.ErrLimit)
	require.Positive(t, some.ObjectBytes)
	require.Less(t, some.ObjectBytes, all.ObjectBytes)
	none, err := work("rate(requests_total[5m])", account.Limits{Read: 1})
	require.ErrorIs(t, err, account.ErrLimit)
	require.Zero(t, none.ObjectGets)

	// What it can't read as a query the caller can.
	_, err = work("max_of(", account.Limits{})
	require.ErrorIs(t, err, plan.ErrUnlike)
}

// everyRead are requests other than queries that read what a tenant has.
func everyRead() []string {
	return []string{
		"/api/v1/series?match[]=requests_total", "/api/v1/labels", "/api/v1/labels?match[]=requests_total", "/api/v1/label/i/values", "/api/v1/metadata",
		"/api/v1/query_exemplars?query=requests_total&start=0&end=3600", "/api/v1/status/tsdb", "/api/v1/status/active_series",
		"/api/v1/search/metric_names", "/api/v1/search/label_names", "/api/v1/search/label_values?label=i", "/federate?match[]=requests_total",
		"/api/v1/query_explain?query=requests_total", "/api/v1/query_range_explain?query=requests_total&start=0&end=3600&step=60",
	}
}

// hangingIndex is an index that doesn't answer.
type hangingIndex struct{ index.Store }

func (hangingIndex) Query(ctx context.Context, _ index.Query) ([]index.Item, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// What isn't a query takes no more time than one.
func TestTimeoutOfOtherEndpoints(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	h, err := history.New(history.Options{Objects: c.Objects, Index: index.New(hangingIndex{}), VisibilityDelay: time.Minute})
	require.NoError(t, err)
	c.Storage = merge.New(c.Heads, h, gateway.TenantOf)
	api := newAPI(t, c, gateway.Options{QueryTimeout: 100 * time.Millisecond, Engine: gateway.EngineOptions{Features: []string{"search-api"}}})
	for _, path := range everyRead() {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
		code, kind := http.StatusServiceUnavailable, `"errorType":"timeout"`
		if strings.HasPrefix(path, "/api/v1/label") { // Prometheus's handlers of these have one class of errors
			code, kind = http.StatusUnprocessableEntity, `"errorType":"execution"`
		}
		require.Equal(t, code, w.Code, "%s: %s", path, w.Body)
		require.Contains(t, w.Body.String(), "limit gateway.query_timeout is 100ms", path)
		if strings.HasPrefix(path, "/api/") {
			require.Contains(t, w.Body.String(), kind, path)
		}
	}
}

// Waiting for others takes no longer either.
func TestTimeoutOfWaiting(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{
		Limits: gateway.Limits{Queries: 1}, QueryTimeout: 100 * time.Millisecond,
		Ready: func() error {
			begin()
			<-release
			return nil
		},
	})
	var wg sync.WaitGroup
	wg.Go(func() { call(t, api, "query", "query", "1") })
	<-begun
	for _, path := range []string{"query", "series"} {
		a := call(t, api, path, "query", "1")
		require.Equal(t, http.StatusServiceUnavailable, a.code, a)
		require.Equal(t, "timeout", a.ErrorType)
		require.Contains(t, a.Error, "limit gateway.limits.queries is 1")
		require.Contains(t, a.Error, "limit gateway.query_timeout is 100ms")
	}
	close(release)
	wg.Wait()
}

// What reads counts as a query does; what sidecars ask for doesn't.
func TestConcurrencyOfOtherEndpoints(t *testing.T) {
	var release atomic.Pointer[chan struct{}]
	api := newAPI(t, fifty(t), gateway.Options{
		Limits: gateway.Limits{Queries: 1}, Engine: gateway.EngineOptions{Features: []string{"search-api"}},
		Ready: func() error {
			<-*release.Load()
			return nil
		},
	})
	ask := func(path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
		return w
	}
	for _, path := range everyRead() {
		released := make(chan struct{})
		release.Store(&released)
		refusesOneOfTwelve(t, released, func(int) int {
			w := ask(path)
			if w.Code != http.StatusOK {
				if !strings.Contains(w.Body.String(), "limit gateway.limits.queries is 1") {
					t.Errorf("%s: %s", path, w.Body)
				}
				if w := ask("/api/v1/ring"); w.Code != http.StatusOK {
					t.Errorf("%d %s", w.Code, w.Body)
				}
			}
			return w.Code
		})
	}
}

// refusesOneOfTwelve asks twelve times while only one may run and ten may wait, and lets them go on with release.
func refusesOneOfTwelve(t *testing.T, release chan struct{}, ask func(i int) (code int)) {
	t.Helper()
	codes := make(chan int, 12)
	for i := range 12 {
		go func() { codes <- ask(i) }()
	}
	select {
	case code := <-codes:
		require.Equal(t, http.StatusTooManyRequests, code)
	case <-time.After(time.Minute):
		t.Error("none of twelve was refused")
	}
	close(release)
	for range 11 {
		require.Equal(t, http.StatusOK, <-codes)
	}
}

// So many queries of a tenant run at a time, ten times as many wait, the next are
// refused.
func TestConcurrency(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{Limits: gateway.Limits{Queries: 1}})
	var wg sync.WaitGroup
	var mu sync.Mutex
	codes := map[int]int{}
	for range 40 {
		wg.Go(func() {
			a := call(t, api, "query_range", "query", `sum(rate(requests_total[5m])) + sum(requests_total)`, "start", "0", "end", "3600", "step", "1")
			mu.Lock()
			defer mu.Unlock()
			codes[a.code]++
			if a.code == http.StatusTooManyRequests && (a.ErrorType != "too_many_requests" || !strings.Contains(a.Error, "gateway.limits.queries is 1")) {
				t.Errorf("%+v", a)
			}
		})
	}
	wg.Wait()
	require.GreaterOrEqual(t, codes[http.StatusOK], 11)
	require.Equal(t, 40, codes[http.StatusOK]+codes[http.StatusTooManyRequests], codes)
	require.Positive(t, codes[http.StatusTooManyRequests])
	require.Equal(t, http.StatusOK, call(t, api, "query", "query", "1").code)
}

// A query of several tenants is one of each: naming others beside it doesn't give a tenant
// more queries.
func TestConcurrencyOfSeveralTenants(t *testing.T) {
	release := make(chan struct{})
	api := newAPI(t, fifty(t), gateway.Options{
		Tenancy: gateway.Header, TenantFederation: true, TenantLimits: map[string]gateway.Limits{"a": {Queries: 1}},
		Ready: func() error {
			<-release
			return nil
		},
	})
	refusesOneOfTwelve(t, release, func(i int) int {
		r := httptest.NewRequest(http.MethodGet, "/api/v1/query?query=up", nil)
		r.Header.Set(gateway.TenantHeader, fmt.Sprintf("a|b%d", i))
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		if body := w.Body.String(); w.Code == http.StatusTooManyRequests && !strings.Contains(body, "tenant a: 1 queries of the tenant are running") {
			t.Errorf("it doesn't name the tenant: %s", body)
		}
		return w.Code
	})
}

// A tenant with 1,000 queries at a time doesn't keep another's dashboard waiting: meanwhile
// it has about as many answers as the dashboard.
func TestDashboardBesideManyQueries(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{Tenancy: gateway.Header, Limits: gateway.Limits{Queries: gateway.DefaultQueries}})
	server := httptest.NewServer(api)
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1020}}
	defer client.CloseIdleConnections()
	ask := func(ctx context.Context, tenant string) (code int) {
		v := url.Values{"query": {"sum(rate(requests_total[5m])) + sum(requests_total)"}, "start": {"0"}, "end": {"3600"}, "step": {"2"}}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/api/v1/query_range", strings.NewReader(v.Encode()))
		if err != nil {
			t.Error(err)
			return 0
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set(gateway.TenantHeader, tenant)
		resp, err := client.Do(r)
		if err != nil {
			return 0 // it was cancelled
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return 0
		}
		return resp.StatusCode
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var many sync.WaitGroup
	defer many.Wait()
	defer cancel()
	var answers, refused atomic.Int64
	for range 1000 {
		many.Go(func() {
			for ctx.Err() == nil {
				switch ask(ctx, gateway.DefaultTenant) {
				case http.StatusOK:
					answers.Add(1)
				case http.StatusTooManyRequests:
					refused.Add(1)
					select {
					case <-ctx.Done():
					case <-time.After(time.Second): // as Retry-After says
					}
				}
			}
		})
	}
	require.Eventually(t, func() bool { return refused.Load() > 0 && answers.Load() > 20 }, time.Minute, time.Millisecond)
	const panels, refreshes = 20, 3
	before, began := answers.Load(), time.Now()
	for range refreshes {
		var dashboard sync.WaitGroup
		for range panels {
			dashboard.Go(func() {
				if code := ask(ctx, "other"); code != http.StatusOK {
					t.Errorf("status %d", code)
				}
			})
		}
		dashboard.Wait()
	}
	during := answers.Load() - before
	t.Logf("%d panels took %s, while the other tenant had %d answers", panels*refreshes, time.Since(began), during)
	require.Less(t, during, int64(5*panels*refreshes))
}

// Slow queries are logged with what they read, others aren't.
func TestSlowQuery(t *testing.T) {
	c := fifty(t)
	for _, slow := range []time.Duration{time.Nanosecond, time.Hour} {
		var log bytes.Buffer
		reg := prometheus.NewRegistry()
		api, err := gateway.New(gateway.Options{SlowQuery: slow}, c.Storage, c.Live, slog.New(slog.NewJSONHandler(&log, nil)), reg, reg)
		require.NoError(t, err)
		query := "requests_total #" + strings.Repeat("é", 500_000)
		r := httptest.NewRequest(http.MethodPost, "/api/v1/query", strings.NewReader(url.Values{"query": {query}, "time": {"1800"}}.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		require.Equal(t, http.StatusOK, w.Code, w.Body)
		if slow == time.Hour {
			require.NotContains(t, log.String(), "slow query")
			continue
		}
		var line map[string]any
		require.NoError(t, json.Unmarshal(log.Bytes(), &line), log.String())
		require.Equal(t, "slow query", line["msg"])
		require.Contains(t, line["query"], "requests_total #é")
		require.Contains(t, line["query"], "more bytes)")
		require.Less(t, log.Len(), 4<<10)
		require.NotContains(t, line["query"], "\ufffd")
		require.InDelta(t, 50, line["series"], 0)
	}
}

// With stats=all there is what the query has cost, and only then.
func TestCost(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{Prices: gateway.Prices{MillionObjectGets: 1e6}})
	type data struct {
		Stats struct {
			Samples map[string]any
			Cost    map[string]float64
		}
	}
	for _, stats := range []string{"", "true", "all"} {
		a := call(t, api, "query", "query", "sum(rate(requests_total[30m]))", "time", "1800", "stats", stats)
		require.Equal(t, http.StatusOK, a.code, a.Error)
		var d data
		require.NoError(t, json.Unmarshal(a.Data, &d))
		require.Equal(t, stats != "", d.Stats.Samples != nil)
		require.Equal(t, stats == "all", d.Stats.Cost != nil)
		if stats == "all" {
			require.InDelta(t, 50, d.Stats.Cost["series"], 0)
			require.Positive(t, d.Stats.Cost["samples"])
			require.Positive(t, d.Stats.Cost["blocks"])
			require.InDelta(t, d.Stats.Cost["objectGets"], d.Stats.Cost["dollars"], 1e-9)
		}
	}
}

// The explanation has the plan; what is wrong with the parameters is said as the
// query's endpoint says it.
func TestExplain(t *testing.T) {
	api := newAPI(t, fifty(t), gateway.Options{})
	a := call(t, api, "query_range_explain", "query", `sum(rate(requests_total[5m])) / on() requests_total{i="1"}`, "start", "0", "end", "3600", "step", "60")
	require.Equal(t, http.StatusOK, a.code, a.Error)
	var e struct {
		Plan   string
		Leaves []struct {
			Expr                  string
			Samples, Steps, Parts int
		}
		Selectors []struct {
			Expr    string
			Samples int
		}
		Blocks int
	}
	require.NoError(t, json.Unmarshal(a.Data, &e))
	require.Contains(t, e.Plan, "leaf_1: sum(rate(requests_total[5m]))")
	require.Len(t, e.Leaves, 1)
	require.Equal(t, 61, e.Leaves[0].Steps)
	require.Len(t, e.Selectors, 1)
	require.Equal(t, `requests_total{i="1"}`, e.Selectors[0].Expr)
	require.Positive(t, e.Selectors[0].Samples)
	require.Positive(t, e.Blocks)
	for _, params := range [][]string{
		{"query", "sum(", "start", "0", "end", "1", "step", "1"},
		{"query", "up", "start", "x", "end", "1", "step", "1"},
		{"query", "up", "start", "0", "end", "1e9", "step", "1"},
	} {
		got, want := call(t, api, "query_range_explain", params...), call(t, api, "query_range", params...)
		require.Equal(t, http.StatusBadRequest, got.code)
		require.Equal(t, want, got)
	}
	require.Equal(t, http.StatusOK, call(t, api, "query_explain", "query", "1+1").code)
	require.Equal(t, http.StatusOK, call(t, api, "query_explain", "query", `"text"`).code)
}

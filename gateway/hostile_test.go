package gateway_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/prompb"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestHostileQueries: what a query says is bounded at every endpoint that reads queries, before
// it is parsed. The first of them ends a process whose stack ends.
func TestHostileQueries(t *testing.T) {
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{})
	ask := func(path, contentType, body, want string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body))
		req.Header.Set("Content-Type", contentType)
		if !strings.HasPrefix(path, "/api/v1/read") && body == "" {
			req.Method = http.MethodGet
		}
		w := httptest.NewRecorder()
		api.ServeHTTP(w, req)
		if got := w.Body.String(); w.Code != http.StatusBadRequest || !strings.Contains(got, want) {
			t.Errorf("%.100s: %d %.300s", path, w.Code, got)
		}
	}
	const form = "application/x-www-form-urlencoded"
	deep := url.QueryEscape(strings.Repeat("abs(", 200_000) + "up" + strings.Repeat(")", 200_000))
	pattern := strings.Repeat("(?:"+strings.Repeat("ab", 500)+"){1000}", 3)
	large := url.QueryEscape(`{a=~"` + pattern + `"}`)
	for _, path := range []string{"query", "query_range?start=1&end=2&step=1", "query_exemplars", "parse_query", "format_query", "query_explain", "query_range_explain?start=1&end=2&step=1"} {
		ask("/api/v1/"+path, form, "query="+deep, "is nested some")
		ask("/api/v1/"+path, form, "query="+large, "regular expressions are too large")
	}
	for _, path := range []string{"series", "labels", "status/active_series"} {
		ask("/api/v1/"+path, form, "match[]="+large, "regular expressions are too large")
		ask("/api/v1/"+path, form, strings.Repeat("match[]=up&", 1001), "1001 selectors")
	}
	for _, path := range []string{"/api/v1/label/a/values?", "/api/v1/status/tsdb?", "/federate?"} {
		ask(path+"match[]="+large, form, "", "regular expressions are too large")
	}
	read := prompb.ReadRequest{Queries: []*prompb.Query{{Matchers: []*prompb.LabelMatcher{{Type: prompb.LabelMatcher_NRE, Name: "a", Value: pattern}}}}}
	b, err := read.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	ask("/api/v1/read", "application/x-protobuf", string(s2.EncodeSnappy(nil, b)), "regular expressions are too large")
}

// TestSlowReaderGivesBack: an answer that a client takes slowly is broken off when its memory is
// needed, at once, and doesn't look whole.
func TestSlowReaderGivesBack(t *testing.T) {
	reg := prometheus.NewRegistry()
	memory := account.NewMemory(12<<20, reg)
	api := newAPI(t, fifty(t), gateway.Options{Memory: memory})
	server := httptest.NewUnstartedServer(api)
	server.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		tcp, ok := c.(*net.TCPConn)
		require.True(t, ok)
		require.NoError(t, tcp.SetWriteBuffer(4<<10)) // it waits for the client soon
		return ctx
	}
	server.Start()
	defer server.Close()
	v := url.Values{"query": {"requests_total"}, "start": {"0"}, "end": {"3600"}, "step": {"0.4"}} // 7 MB of points, 12 MB of text
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	tcp, ok := conn.(*net.TCPConn)
	require.True(t, ok)
	require.NoError(t, tcp.SetReadBuffer(4<<10))
	_, err = fmt.Fprintf(conn, "GET /api/v1/query_range?%s HTTP/1.1\r\nHost: x\r\n\r\n", v.Encode())
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // it has begun
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	ctx, acc, done := memory.Open(t.Context(), "another", account.Limits{})
	defer done()
	acc.Hold(6 << 20)
	require.NoError(t, ctx.Err())
	require.Eventually(t, func() bool {
		ms, err := reg.Gather()
		require.NoError(t, err)
		i := slices.IndexFunc(ms, func(m *dto.MetricFamily) bool { return m.GetName() == "epimetheus_gateway_query_memory_bytes" })
		return ms[i].GetMetric()[0].GetGauge().GetValue() == 6<<20
	}, 30*time.Second, time.Millisecond)
	_, err = io.Copy(io.Discard, resp.Body)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

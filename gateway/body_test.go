package gateway_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/prompb"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// sendPart begins a POST with part of its body, of length bytes.
func sendPart(t *testing.T, server *httptest.Server, path string, length int, part string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() }) // the server may have
	_, err = fmt.Fprintf(c, "POST /api/v1/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n%s", path, length, part)
	require.NoError(t, err)
	return c, bufio.NewReader(c)
}

func answerOf(t *testing.T, r *bufio.Reader) (code int, body string) {
	t.Helper()
	a, err := http.ReadResponse(r, nil)
	require.NoError(t, err)
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	require.NoError(t, err)
	return a.StatusCode, string(b)
}

// A body that comes slowly keeps no place from its tenant's queries.
func TestSlowBody(t *testing.T) {
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{Limits: gateway.Limits{Queries: 1}})
	server := httptest.NewServer(api)
	defer server.Close()
	body := url.Values{"query": {"1+1"}, "time": {"0"}}.Encode()
	type slow struct {
		net.Conn
		r *bufio.Reader
	}
	var all []slow
	for range 20 { // more than may run or wait
		c, r := sendPart(t, server, "query", len(body), body[:4])
		all = append(all, slow{c, r})
		c, _ = sendPart(t, server, "read", 100, "x")
		defer c.Close()
	}
	a := call(t, api, "query", "query", "1")
	require.Equal(t, http.StatusOK, a.code, a.Error)
	resp, err := server.Client().PostForm(server.URL+"/api/v1/query", url.Values{"query": {"1"}})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.NoError(t, resp.Body.Close())
	for _, s := range all { // each has its turn
		_, err := io.WriteString(s, body[4:])
		require.NoError(t, err)
		code, text := answerOf(t, s.r)
		require.Equal(t, http.StatusOK, code)
		require.Contains(t, text, `"2"`)
		require.NoError(t, s.Close())
	}
}

// A body has to come within some time, after which the answer may take longer.
func TestBodyTimeout(t *testing.T) {
	ready := make(chan struct{})
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{Ready: func() error { <-ready; return nil }})
	api.SetTimeouts(200 * time.Millisecond)
	server := httptest.NewServer(api)
	defer server.Close()
	conn, whole := sendPart(t, server, "query", 8, "query=up")
	for _, path := range []string{"query", "read", "engine", "ha/claim", "series", "admin/tsdb/delete_series"} {
		c, r := sendPart(t, server, path, 7, "que")
		code, text := answerOf(t, r)
		require.Equal(t, http.StatusRequestTimeout, code, path)
		require.Contains(t, text, "200ms")
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF, path)
	}
	close(ready) // longer than a body may take
	defer conn.Close()
	code, text := answerOf(t, whole)
	require.Equal(t, http.StatusOK, code, text)
}

// A body has a bound, and counts to the memory of queries.
func TestBodySize(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	read, err := (&prompb.ReadRequest{}).Marshal()
	require.NoError(t, err)
	for _, q := range []struct {
		path   string
		body   []byte
		memory int64
		code   int
		want   string
	}{
		{"query", bytes.Repeat([]byte("x"), 10<<20+1), 0, http.StatusRequestEntityTooLarge, "the limit is 10485760 bytes"},
		{"read", bytes.Repeat([]byte("x"), 32<<20+1), 0, http.StatusRequestEntityTooLarge, "the limit is 33554432 bytes"},
		{"query", bytes.Repeat([]byte("x"), 1<<20), 1 << 19, http.StatusUnprocessableEntity, "gateway.query_memory_bytes (524288)"},
		{"query", []byte("query=1"), 0, http.StatusOK, ""},
		{"read", s2.EncodeSnappy(nil, read), 0, http.StatusOK, ""},
	} {
		api := newAPI(t, c, gateway.Options{Memory: account.NewMemory(q.memory, prometheus.NewRegistry())})
		for _, sized := range []bool{true, false} {
			r := httptest.NewRequest(http.MethodPost, "/api/v1/"+q.path, bytes.NewReader(q.body))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			if !sized {
				r.ContentLength = -1
			}
			w := httptest.NewRecorder()
			api.ServeHTTP(w, r)
			require.Equal(t, q.code, w.Code, "%s: %.200s", q.path, w.Body)
			require.True(t, strings.Contains(w.Body.String(), q.want), "%s: %.200s", q.path, w.Body)
		}
	}
}

// A client that doesn't take its answer keeps no place from its tenant's queries; one
// that takes it slowly gets all of it.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newAPI(t, fifty(t), gateway.Options{Limits: gateway.Limits{Queries: 1}})
		api.SetTimeouts(400 * time.Millisecond)
		pipe, stop := gateway.ServePipe(t, api)
		defer stop()
		long := url.Values{"query": {"requests_total"}, "start": {"0"}, "end": {"3600"}, "step": {"0.4"}}.Encode()
		dial := func() net.Conn {
			c := pipe()
			_, err := fmt.Fprintf(c, "GET /api/v1/query_range?%s HTTP/1.1\r\nHost: x\r\n\r\n", long)
			require.NoError(t, err)
			return c
		}
		stalled := dial()
		defer stalled.Close()
		_, err := io.ReadFull(stalled, make([]byte, 64<<10)) // it has the place
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, call(t, api, "query", "query", "1").code)

		slow := dial()
		defer slow.Close()
		begin := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(slow), nil)
		require.NoError(t, err)
		defer resp.Body.Close()
		n, err := gateway.ReadSlowly(resp.Body, 1<<20)
		require.NoError(t, err)
		require.Greater(t, n, 8<<20)
		require.GreaterOrEqual(t, time.Since(begin), 800*time.Millisecond)
	})
}

// A remote read takes no longer than a query may, whether its client stops to take the
// answer or takes it slowly: another then has the place.
func TestTimeoutOfRemoteRead(t *testing.T) {
	const limit = 2 * time.Second
	api := newAPI(t, fifty(t), gateway.Options{Limits: gateway.Limits{Queries: 1}, QueryTimeout: limit})
	server := httptest.NewServer(api)
	defer server.Close()
	// Longer than what sockets hold.
	q := &prompb.Query{EndTimestampMs: 3_600_000, Matchers: []*prompb.LabelMatcher{{Name: "__name__", Value: "requests_total"}}}
	for kind, n := range map[prompb.ReadRequest_ResponseType]int{prompb.ReadRequest_STREAMED_XOR_CHUNKS: 1000, prompb.ReadRequest_SAMPLES: 1000} {
		read := &prompb.ReadRequest{AcceptedResponseTypes: []prompb.ReadRequest_ResponseType{kind}}
		for range n {
			read.Queries = append(read.Queries, q)
		}
		b, err := read.Marshal()
		require.NoError(t, err)
		body := s2.EncodeSnappy(nil, b)
		ask := func() net.Conn {
			c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
			require.NoError(t, err)
			t.Cleanup(func() { _ = c.Close() }) // once more
			_, err = fmt.Fprintf(c, "POST /api/v1/read HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			require.NoError(t, err)
			return c
		}
		free := func() {
			t.Helper()
			require.Eventually(t, func() bool { return call(t, api, "query", "query", "1").code == http.StatusOK }, 30*time.Second, time.Millisecond)
		}
		stalled := ask()
		_, err = io.ReadFull(stalled, make([]byte, 100)) // it has, or had, the place
		require.NoError(t, err)
		free()
		require.NoError(t, stalled.Close())

		resp, err := http.ReadResponse(bufio.NewReader(ask()), nil)
		if err == nil && resp.StatusCode == http.StatusOK {
			for err == nil {
				_, err = io.CopyN(io.Discard, resp.Body, 16<<10)
				time.Sleep(10 * time.Millisecond) // what a slow client does
			}
			_ = resp.Body.Close() // the rest doesn't come
		} else if err == nil { // on a slow machine
			require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
			require.NoError(t, resp.Body.Close())
			err = io.ErrUnexpectedEOF
		}
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		free()
	}
}

// So many bodies of a tenant are waited for, and others have theirs.
func TestManySlowBodies(t *testing.T) {
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{Tenancy: gateway.Header})
	var wg sync.WaitGroup
	slow, end := io.Pipe()
	ask := func(tenant string, body io.Reader) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodPost, "/api/v1/query", body)
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set(gateway.TenantHeader, tenant)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		return w
	}
	codes := make(chan int, 1001)
	for range 1001 {
		wg.Go(func() { codes <- ask("many", slow).Code })
	}
	require.Equal(t, http.StatusTooManyRequests, <-codes)
	refused := ask("many", strings.NewReader("query=1"))
	require.Equal(t, http.StatusTooManyRequests, refused.Code)
	require.Contains(t, refused.Body.String(), "the bodies of 1000 requests of the tenant are still to come")
	require.Equal(t, "close", refused.Header().Get("Connection"))
	require.Equal(t, http.StatusOK, ask("few", strings.NewReader("query=1")).Code)
	require.NoError(t, end.Close())
	wg.Wait()
	require.Equal(t, http.StatusOK, ask("many", strings.NewReader("query=1")).Code)
}

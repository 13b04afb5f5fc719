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
	"testing"
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
	api := newAPI(t, fifty(t), gateway.Options{Limits: gateway.Limits{Queries: 1}})
	api.SetTimeouts(400 * time.Millisecond)
	server := httptest.NewServer(api)
	defer server.Close()
	// Longer than what sockets hold.
	long := url.Values{"query": {"requests_total"}, "start": {"0"}, "end": {"3600"}, "step": {"0.4"}}.Encode()
	dial := func() net.Conn {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
		require.NoError(t, err)
		_, err = fmt.Fprintf(c, "GET /api/v1/query_range?%s HTTP/1.1\r\nHost: x\r\n\r\n", long)
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
	n := 0
	for {
		some, err := io.CopyN(io.Discard, resp.Body, 1<<20)
		n += int(some)
		if err != nil {
			require.ErrorIs(t, err, io.EOF)
			break
		}
		time.Sleep(100 * time.Millisecond) // what a slow client does
	}
	require.Greater(t, n, 8<<20)
	require.Greater(t, time.Since(begin), 800*time.Millisecond)
}

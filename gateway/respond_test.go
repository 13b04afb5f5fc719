package gateway_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// manySeries answers with so many series that they don't fit into one piece.
func manySeries(t *testing.T) http.Handler {
	t.Helper()
	c := gatewaytest.New(t, gatewaytest.Options{})
	var ss []gatewaytest.Sample
	for i := range 5000 {
		ls := labels.FromStrings("__name__", "many", "instance", fmt.Sprintf("host-%04d", i), "padding", strings.Repeat("x", 100))
		ss = append(ss, gatewaytest.Sample{Labels: ls, T: start, V: float64(i)})
	}
	if err := c.Shipper(gateway.DefaultTenant).Send(t.Context(), ss...); err != nil {
		t.Fatal(err)
	}
	return newAPI(t, c, gateway.Options{})
}

// pieces notes how large what is written at once is.
type pieces struct {
	httptest.ResponseRecorder
	largest int // bytes
}

func (p *pieces) Write(b []byte) (int, error) {
	p.largest = max(p.largest, len(b))
	return p.ResponseRecorder.Write(b)
}

// TestAnswersAreStreamed: a large answer is never in memory as a whole as text,
// and is the same in all encodings.
func TestAnswersAreStreamed(t *testing.T) {
	api := manySeries(t)
	for _, path := range []string{
		"/query?query=many&time=1700000001", "/query_range?query=many&start=1700000000&end=1700000060&step=1", "/series?match[]=many", "/label/instance/values",
		"/query?query=many%5B1m%5D&time=1700000001&stats=all",
	} {
		var plain []byte
		for _, encoding := range []string{"", "gzip", "deflate", "zstd", "br, zstd, gzip"} {
			w := &pieces{ResponseRecorder: *httptest.NewRecorder()}
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1"+path, nil)
			r.Header.Set("Accept-Encoding", encoding)
			api.ServeHTTP(w, r)
			body := w.Body.Bytes()
			if w.largest > 80_000 {
				t.Errorf("%s, %q: %d bytes written at once", path, encoding, w.largest)
			}
			got := decompress(t, w.Header().Get("Content-Encoding"), body)
			if encoding == "" {
				plain = got
				if !json.Valid(plain) || len(plain) < 50_000 {
					t.Errorf("%s: %d bytes, no JSON or too small a test: %.100q", path, len(plain), plain)
				}
				continue
			}
			got, want := timings.ReplaceAll(got, nil), timings.ReplaceAll(plain, nil)
			if !bytes.Equal(got, want) || len(body) >= len(plain)/2 {
				t.Errorf("%s, %q: %d bytes, %d when decompressed, want %d", path, encoding, len(body), len(got), len(want))
			}
		}
	}
}

// TestClientLeavesAnswer: that the client has gone ends the answer, and nothing of
// it is left over for others.
func TestClientLeavesAnswer(t *testing.T) {
	api := manySeries(t)
	for _, encoding := range []string{"", "zstd", "gzip"} {
		for range 3 {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/query?query=many&time=1700000001", nil)
			r.Header.Set("Accept-Encoding", encoding)
			if !aborts(api, &leaving{ResponseRecorder: *httptest.NewRecorder()}, r) {
				t.Fatalf("%s: an answer that was cut short ended as if it were whole", encoding)
			}
			w := httptest.NewRecorder()
			api.ServeHTTP(w, r)
			if got := decompress(t, w.Header().Get("Content-Encoding"), w.Body.Bytes()); !json.Valid(got) {
				t.Fatalf("%s: %d bytes after a client has gone, no JSON", encoding, len(got))
			}
		}
	}
}

// aborts says whether a handler ends the connection: net/http does when it panics so.
func aborts(h http.Handler, w http.ResponseWriter, r *http.Request) (aborted bool) {
	defer func() {
		if p := recover(); p != nil {
			if aborted = p == http.ErrAbortHandler; !aborted { //nolint:errorlint // the value itself
				panic(p)
			}
		}
	}()
	h.ServeHTTP(w, r)
	return false
}

// TestRestOfAnswerIsLeft: what a client that has gone doesn't read takes no memory.
func TestRestOfAnswerIsLeft(t *testing.T) {
	answer := &v1.Response{Status: "success", Data: slices.Repeat([]string{strings.Repeat("x", 1000)}, 50_000)} // 50 MB
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if gateway.Encode(&leaving{ResponseRecorder: *httptest.NewRecorder()}, answer) == nil {
		t.Error("no error of a client that has gone")
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 5<<20 {
		t.Errorf("%d bytes of memory for an answer that nobody reads", took)
	}
}

// leaving takes one write.
type leaving struct {
	httptest.ResponseRecorder
	writes int
}

func (l *leaving) Write(p []byte) (int, error) {
	if l.writes++; l.writes > 1 {
		return 0, errors.New("connection reset by peer")
	}
	return l.ResponseRecorder.Write(p)
}

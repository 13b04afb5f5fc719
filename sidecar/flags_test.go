package sidecar

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFlags: the flags of Prometheus reach a gateway, whichever is there, and an
// agent's don't.
func TestFlags(t *testing.T) {
	var mu sync.Mutex
	answer, config := map[string]string{}, "global: {scrape_interval: 10s}\n"
	prometheus := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		data := any(answer)
		switch r.URL.Path {
		case "/api/v1/status/config":
			data = map[string]string{"yaml": config}
		case "/api/v1/status/flags":
		default:
			http.NotFound(w, r)
			return
		}
		if err := json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": data}); err != nil {
			t.Error(err)
		}
	}))
	defer prometheus.Close()
	reports := make(chan string, 10)
	gateway := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		reports <- r.Method + " " + r.URL.Path + " " + r.Header.Get("X-Scope-OrgID") + " " + string(b)
	}))
	defer gateway.Close()
	dead := httptest.NewServer(http.NotFoundHandler())
	defer dead.Close()

	failures := 0
	f := &flags{
		url: prometheus.URL, gateways: []string{dead.URL, gateway.URL}, tenant: "acme", client: prometheus.Client(), gateway: gateway.Client(),
		logger: slog.New(slog.DiscardHandler), failed: func() { failures++ },
	}
	get := func(flags map[string]string, want *engineFlags) {
		t.Helper()
		mu.Lock()
		answer = flags
		mu.Unlock()
		got, err := f.get(t.Context())
		if err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	get(map[string]string{"agent": "true", "query.lookback-delta": "5m", "enable-feature": ""}, nil)
	get(map[string]string{"storage.agent.path": "x"}, nil)
	get(map[string]string{"query.lookback-delta": "5m", "enable-feature": ""}, &engineFlags{"5m", []string{}, "1m"})
	config = "global: {evaluation_interval: 15s, unknown: x}\n"
	get(map[string]string{"query.lookback-delta": "1m", "enable-feature": "a, b,c"}, &engineFlags{"1m", []string{"a", "b", "c"}, "15s"})
	mu.Lock()
	answer = nil
	mu.Unlock()
	if _, err := f.get(t.Context()); err == nil {
		t.Error("an answer without flags is none, and no error came")
	}
	mu.Lock()
	answer = map[string]string{"query.lookback-delta": "1m", "enable-feature": "a"}
	mu.Unlock()

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.run(ctx)
	}()
	if got, want := <-reports, `POST /api/v1/engine acme {"lookback_delta":"1m","enable_features":["a"],"evaluation_interval":"15s"}`; got != want {
		t.Errorf("report %s, want %s", got, want)
	}
	cancel()
	<-done
	if failures == 0 {
		t.Error("the gateway that refuses was not counted")
	}
}

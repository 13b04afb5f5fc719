package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// honesty asks the gateways all the time for something that Prometheus knows
// too: an answer is either the same, or it says that it may not be.
type honesty struct {
	same, warned, refused atomic.Int64
	end                   func()
}

// settled is how old a sample must be to be asked for. While the ring changes,
// samples wait at the sidecar, or are at an ingester that not every gateway knows
// of yet, for some seconds on a busy machine: that makes no warning.
const settled = 20 * time.Second

func startHonesty(t *testing.T, s *stack, n *tenant) *honesty {
	t.Helper()
	h := &honesty{}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, g := range s.gateways {
		url := g.url
		wg.Go(func() {
			for ctx.Err() == nil {
				h.ask(ctx, t, url, n)
				pause(ctx, 200*time.Millisecond)
			}
		})
	}
	h.end = func() {
		cancel()
		wg.Wait()
		t.Logf("%d answers were right, %d warned, %d were errors", h.same.Load(), h.warned.Load(), h.refused.Load())
	}
	t.Cleanup(h.end)
	return h
}

func (h *honesty) ask(ctx context.Context, t *testing.T, gw string, n *tenant) {
	at := time.Now().Add(-settled)
	var sums []string
	for _, m := range []string{"up", "scrape_duration_seconds", "scrape_samples_scraped", "test_latency_seconds_bucket", "test_requests_total", "go_goroutines", "process_cpu_seconds_total"} {
		sums = append(sums, "sum(count_over_time("+m+"[10m]))")
	}
	form := url.Values{
		"query": {strings.Join(sums, "+")}, "time": {fmt.Sprintf("%.3f", float64(at.UnixMilli())/1000)},
	}
	code, got, err := get(ctx, gw, "/api/v1/query", n.name, form)
	switch {
	case ctx.Err() != nil:
		return
	case err != nil || code != http.StatusOK:
		if h.refused.Add(1) <= 5 {
			t.Logf("%s: no answer: %d %s %v", time.Now().Format("15:04:05.000"), code, got.Error, err)
		}
		return
	case len(got.Warnings) > 0:
		h.warned.Add(1)
		return
	}
	_, want, err := get(ctx, n.prom.URL, "/api/v1/query", "", form)
	if err != nil {
		return
	}
	g, w := counted(got), counted(want)
	if g != w {
		t.Errorf("%s: %s samples by %s, without a warning; Prometheus has %s", time.Now().Format("15:04:05.000"), g, at.Format("15:04:05.000"), w)
		return
	}
	h.same.Add(1)
}

// counted is the one value of an answer, "" for none.
func counted(r response) string {
	var v vector
	if json.Unmarshal(r.Data, &v) != nil || len(v.Result) != 1 {
		return ""
	}
	return fmt.Sprint(v.Result[0].Value[1])
}

package gateway_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// panels of a dashboard: 20 queries as they are usual.
func panels() []string {
	var out []string
	for _, metric := range []string{"requests_total", "bytes_total", "errors_total"} {
		out = append(out,
			fmt.Sprintf("sum by (job) (rate(%s[5m]))", metric),
			fmt.Sprintf("topk(3, rate(%s[1m]))", metric),
			fmt.Sprintf("sum(increase(%s[1h]))", metric),
			fmt.Sprintf(`max by (instance) (rate(%s{job="job-1"}[5m]))`, metric))
	}
	for _, metric := range []string{"temperature", "memory"} {
		out = append(out, metric, "avg("+metric+")", fmt.Sprintf(`max_over_time(%s{job=~"job-[12]"}[10m])`, metric), fmt.Sprintf("count by (job) (%s)", metric))
	}
	return out
}

// fleet publishes blocks of half an hour up to a time.
func fleet(t testing.TB, h *history.History, series int, from, to time.Time) {
	t.Helper()
	const width = int64(30 * time.Minute / time.Millisecond)
	for start := from.UnixMilli(); start < to.UnixMilli(); start += width {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
		for m, metric := range []string{"bytes_total", "errors_total", "memory", "requests_total", "temperature"} {
			for i := range series / 5 {
				s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", metric, "instance", fmt.Sprintf("host-%06d", i), "job", fmt.Sprintf("job-%d", i%7))}
				for ts := start; ts < min(start+width, to.UnixMilli()); ts += 15_000 {
					s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, math.Round(1000*math.Sin(float64(ts/15_000*int64(i+m)))))
				}
				require.NoError(t, w.Add(gateway.DefaultTenant, s))
			}
		}
		summary, err := w.Close()
		require.NoError(t, err)
		require.NoError(t, h.Publish(t.Context(), ulid.Make(), buf.Bytes(), summary))
	}
}

// costOf is the cost in the answer to a query with stats=all.
func costOf(t *testing.T, a response) account.Cost {
	t.Helper()
	var data struct {
		Stats struct {
			Cost account.Cost `json:"cost"`
		} `json:"stats"`
	}
	require.NoError(t, json.Unmarshal(a.Data, &data))
	return data.Stats.Cost
}

// TestFreshDashboard: a gateway that starts cold answers a dashboard of the last hours
// without any request to the object store, since what was flushed was written ahead
// into memcached.
func TestFreshDashboard(t *testing.T) {
	var gets atomic.Int64
	objects := &historytest.FaultyObjects{
		Store: historytest.S3(t, prometheus.NewRegistry()),
		Decide: func(op, _ string) historytest.Fault {
			if op != "Put" {
				gets.Add(1)
			}
			return historytest.None
		},
	}
	rows := index.New(historytest.DynamoDB(t, prometheus.NewRegistry()))
	addr, server := testenv.Memcached(t)
	c := gatewaytest.New(t, gatewaytest.Options{})
	open := func(m *historytest.Memcached) *history.History {
		o := history.Options{Objects: object.Store(objects), Index: rows, VisibilityDelay: 5 * time.Minute}
		if m != nil {
			o.Memcached = m.Client
		}
		h, err := history.New(o)
		require.NoError(t, err)
		return h
	}
	start := func(m *historytest.Memcached) *gateway.API {
		c.Storage = merge.New(c.Heads, open(m), gateway.TenantOf)
		results, err := plan.NewResults(64<<20, nil, prometheus.NewRegistry()) // without memcached: pages are meant
		require.NoError(t, err)
		return newAPI(t, c, gateway.Options{Spread: plan.Spread{Results: results}})
	}
	now := time.Now().Truncate(time.Minute)
	ingester := historytest.StartMemcached(t, addr)
	fleet(t, open(ingester), 300, now.Add(-8*time.Hour), now)
	ingester.Idle(t)

	without := start(nil)
	cold := historytest.StartMemcached(t, addr)
	with := start(cold)
	near := int64(0)
	for _, hours := range []int{1, 4} {
		for _, expr := range panels() {
			params := []string{
				"query", expr, "start", fmt.Sprint(now.Add(-time.Duration(hours) * time.Hour).Unix()), "end", fmt.Sprint(now.Unix()),
				"step", fmt.Sprint(15 * hours), "stats", "all",
			}
			want := call(t, without, "query_range", params...)
			require.Equal(t, http.StatusOK, want.code, want.Error)
			gets.Store(0)
			got := call(t, with, "query_range", params...)
			require.Equal(t, http.StatusOK, got.code, got.Error)
			require.Zero(t, gets.Load(), "requests to the object store for %d h of %s", hours, expr)
			cost := costOf(t, got)
			require.Zero(t, cost.ObjectGets)
			require.Positive(t, cost.Pages, expr)
			near += cost.PagesMemcached
			require.JSONEq(t, resultOf(t, want), resultOf(t, got), expr)
		}
	}
	require.Positive(t, near)
	require.InDelta(t, near, cold.Metric(t, "epimetheus_memcached_gets_total", "hit"), 0)
	require.Zero(t, cold.Metric(t, "epimetheus_memcached_gets_total", "miss"))

	// Without memcached the same dashboard costs GETs.
	server.Kill()
	gets.Store(0)
	got := call(t, start(historytest.StartMemcached(t, addr)), "query", "query", panels()[0], "stats", "all")
	require.Equal(t, http.StatusOK, got.code, got.Error)
	require.Positive(t, gets.Load())
}

// resultOf is the result in an answer, as JSON.
func resultOf(t *testing.T, a response) string {
	t.Helper()
	var data struct {
		Result json.RawMessage `json:"result"`
	}
	require.NoError(t, json.Unmarshal(a.Data, &data))
	return string(data.Result)
}

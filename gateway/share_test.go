package gateway_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"testing"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// Of the samples of days: how many each series has, and the time between them in ms.
const (
	dayN        = 60_000 // ten days
	dayInterval = 15_000
)

// days publishes ten blocks of a day. Their ids are always the same, and
// with them the keys of parts of queries.
func days(t *testing.T, c *gatewaytest.Cluster, series int) {
	t.Helper()
	const n, interval = dayN, dayInterval
	first := 10
	if series > 90 {
		first = 100 // as many digits in all
	}
	for from := int64(0); from < n*interval; from += 24 * 3600 * 1000 {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
		for i := range series {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(first+i))}
			for ts := from; ts < min(from+24*3600*1000, n*interval); ts += interval {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts/1000*int64(i)%100_000))
			}
			require.NoError(t, w.Add(gateway.DefaultTenant, s))
		}
		summary, err := w.Close()
		require.NoError(t, err)
		require.NoError(t, c.History.Publish(t.Context(), ulid.MustNew(uint64(from), nil), buf.Bytes(), summary))
	}
}

// TestGatewaysShareWork: a long query at one gateway is computed by another in part,
// with the tenant's engine, and gives what one gateway alone gives.
func TestGatewaysShareWork(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	days(t, c, 350) // so many samples that others are asked
	const n, interval = dayN, dayInterval
	// The gateway's engine has an option that shows in results.
	engine := gateway.EngineOptions{Features: []string{"promql-delayed-name-removal"}}
	newResults := func() *plan.Results {
		r, err := plan.NewResults(64<<20, nil, prometheus.NewRegistry())
		require.NoError(t, err)
		return r
	}
	alone := newAPI(t, c, gateway.Options{Engine: engine})
	other := newAPI(t, c, gateway.Options{Engine: engine, Spread: plan.Spread{Results: newResults()}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := grpc.NewServer()
	reg := prometheus.NewRegistry()
	worker.NewServer(func(ctx context.Context, task *plan.Task) ([]byte, account.Cost, error) {
		return other.Work(ctx, c.History, task)
	},
		slog.New(slog.DiscardHandler), reg).Register(g)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.Serve(l) // ends with Stop
	}()
	t.Cleanup(func() {
		g.Stop()
		<-served
	})
	peers := []worker.Peer{{ID: "other", Address: l.Addr().String()}}
	pool := worker.NewPool("one", func() []worker.Peer { return peers }, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	t.Cleanup(func() { require.NoError(t, pool.Close()) })
	prices := gateway.Prices{MillionObjectGets: 0.4, MillionIndexReads: 0.25}
	one := newAPI(t, c, gateway.Options{Engine: engine, Prices: prices, Spread: plan.Spread{Results: newResults(), Workers: pool}})

	// What it has cost is of both.
	last := fmt.Sprint(n * interval / 1000)
	cost := func(api *gateway.API, offset int) (c struct {
		account.Cost

		Dollars float64
	},
	) {
		a := call(t, api, "query_range", "query", fmt.Sprintf(`sum(rate(requests_total[5m] offset %ds))`, offset), "start", "3600", "end", last, "step", "3600", "stats", "all")
		require.Equal(t, http.StatusOK, a.code, a.Error)
		var data struct{ Stats struct{ Cost any } }
		data.Stats.Cost = &c
		require.NoError(t, json.Unmarshal(a.Data, &data))
		return c
	}
	offset := 1
	together := cost(one, offset)
	for together.Workers == 0 { // they took long, and were computed at the caller meanwhile
		offset++
		require.Less(t, offset, 20)
		together = cost(one, offset)
	}
	require.Equal(t, int64(1), together.Workers)
	require.Positive(t, together.PartsElsewhere)
	single := cost(alone, offset)
	require.Equal(t, single.Series, together.Series)
	require.GreaterOrEqual(t, together.Samples, single.Samples)
	require.GreaterOrEqual(t, together.Pages, single.Pages)
	require.InDelta(t, float64(together.ObjectGets)*prices.MillionObjectGets/1e6+float64(together.IndexQueries)*prices.MillionIndexReads/1e6, together.Dollars, 1e-12)

	compare := func() {
		for _, expr := range []string{`sum(rate(requests_total[5m]))`, `max_over_time(requests_total[1h])`, `label_replace(rate(requests_total[5m]), "n", "$1", "__name__", "(.*)")`} {
			params := []string{"query", expr, "start", "3600", "end", fmt.Sprint(n * interval / 1000), "step", "3600"}
			want, got := call(t, alone, "query_range", params...), call(t, one, "query_range", params...)
			require.Equal(t, http.StatusOK, want.code, want.Error)
			require.Equal(t, want, got, expr)
		}
	}
	compare()
	ms, err := reg.Gather()
	require.NoError(t, err)
	ok := 0.
	for _, m := range ms {
		if m.GetName() == "epimetheus_gateway_worker_parts_total" {
			for _, x := range m.GetMetric() {
				switch outcome := x.GetLabel()[0].GetValue(); outcome {
				case "ok":
					ok += x.GetCounter().GetValue()
				case "canceled": // it took long, and was computed at the caller meanwhile
				default:
					t.Errorf("%v parts %s", x.GetCounter().GetValue(), outcome)
				}
			}
		}
	}
	require.Greater(t, ok, 1.)

	// Both have results of before; a worker doesn't look for deletions itself.
	before := call(t, one, "query_range", "query", `sum(rate(requests_total[5m]))`, "start", "3600", "end", last, "step", "3600")
	_, err = c.History.Delete(t.Context(), gateway.DefaultTenant, 0, n*interval/2, labels.MustNewMatcher(labels.MatchRegexp, "i", "1.."))
	require.NoError(t, err)
	compare()
	after := call(t, one, "query_range", "query", `sum(rate(requests_total[5m]))`, "start", "3600", "end", last, "step", "3600")
	require.NotEqual(t, before, after)
}

package gateway_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// BenchmarkSmall takes small requests, from the handler's side of HTTP on, over 200 targets with 20 series
// each, an hour at 15 s: where they are in a head in the process, in one that is asked over gRPC, and in a block.
func BenchmarkSmall(b *testing.B) {
	const targets, metrics, scrapes, interval = 200, 20, 240, 15_000
	end := time.Now().UnixMilli() / interval * interval
	begin := end - scrapes*interval
	target := func(i int) string { return fmt.Sprintf("10.16.%d.%d:9100", i/100, i%100) }
	seconds := func(ms int64) string { return strconv.FormatInt(ms/1000, 10) }
	requests := []struct{ name, url string }{
		{"raw", "/api/v1/query_range?" + url.Values{
			"query": {`metric_3{instance="` + target(7) + `"}`}, "start": {seconds(begin)}, "end": {seconds(end)}, "step": {"15"},
		}.Encode()},
		{"one", "/api/v1/query?" + url.Values{"query": {`metric_3{instance="` + target(7) + `"}`}, "time": {seconds(end)}}.Encode()},
		{"target", "/api/v1/query?" + url.Values{"query": {`{instance="` + target(7) + `"}`}, "time": {seconds(end)}}.Encode()},
		{"label_values", "/api/v1/label/instance/values?" + url.Values{"start": {seconds(begin)}, "end": {seconds(end)}}.Encode()},
	}
	for _, place := range []string{"local", "wire", "block"} {
		b.Run("in="+place, func(b *testing.B) {
			o := gatewaytest.Options{}
			if place == "block" {
				o = gatewaytest.Options{Run: true, VisibilityDelay: time.Second}
			}
			c := gatewaytest.New(b, o)
			send := c.Shipper(gateway.DefaultTenant)
			for k := range int64(scrapes) {
				var ss []gatewaytest.Sample
				for i := range targets {
					for m := range metrics {
						ls := labels.FromStrings("__name__", fmt.Sprint("metric_", m), "job", fmt.Sprint("job-", i%10), "instance", target(i))
						ss = append(ss, gatewaytest.Sample{Labels: ls, T: begin + (k+1)*interval, V: float64(k*k) * float64(i+m)})
					}
				}
				if err := send.Send(b.Context(), ss...); err != nil {
					b.Fatal(err)
				}
			}
			switch place {
			case "local":
				m := c.Live.Ring().Snapshot().Members[0]
				c.Heads.AddLocal(m.Address, c.Ingesters[0])
			case "block":
				if err := c.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
				for c.Ingesters[0].Size().Samples > 0 {
					time.Sleep(100 * time.Millisecond) // until the generation is dropped
				}
			}
			reg := prometheus.NewRegistry()
			api, err := gateway.New(gateway.Options{Limits: gateway.Limits{Queries: gateway.DefaultQueries}, SlowQuery: time.Minute}, c.Storage, c.Live, slog.New(slog.DiscardHandler), reg, reg)
			if err != nil {
				b.Fatal(err)
			}
			for _, q := range requests {
				b.Run("q="+q.name, func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						r := httptest.NewRequestWithContext(b.Context(), http.MethodGet, q.url, nil)
						w := httptest.NewRecorder()
						if api.ServeHTTP(w, r); w.Code != http.StatusOK || w.Body.Len() < 150 {
							b.Fatal(w.Code, w.Body)
						}
					}
				})
			}
		})
	}
}

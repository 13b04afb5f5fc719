package merge_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// BenchmarkQueryRange evaluates over 500 series of 4 hours at 15 s: where they
// are in heads, where they are in blocks (and have left the heads), and where the
// older half is in a block and still in the heads as well.
func BenchmarkQueryRange(b *testing.B) {
	const series, steps, interval = 500, 960, int64(15_000)
	begin := time.Now().Add(-steps * 15 * time.Second).UnixMilli()
	engine := promqltest.NewTestEngine(b, false, 5*time.Minute, 50_000_000)
	for _, place := range []string{"heads", "blocks", "both"} {
		c := gatewaytest.New(b, gatewaytest.Options{Ingesters: 2, Run: place == "blocks", VisibilityDelay: time.Second})
		send := c.Shipper(gateway.DefaultTenant)
		const part = steps / 8
		for p := range int64(8) {
			var ss []gatewaytest.Sample
			for k := p * part; k < (p+1)*part; k++ {
				for i := range series {
					l := ls("__name__", "requests_total", "job", fmt.Sprint("job-", i%10), "instance", fmt.Sprint("host-", i))
					ss = append(ss, gatewaytest.Sample{Labels: l, T: begin + k*interval, V: float64(k * int64(i+1))})
				}
			}
			if err := send.Send(b.Context(), ss...); err != nil {
				b.Fatal(err)
			}
			if place == "both" && p == 3 || place == "blocks" && p == 7 {
				if err := c.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		}
		for place == "blocks" && c.Ingesters[0].Size().Samples+c.Ingesters[1].Size().Samples > 0 {
			time.Sleep(100 * time.Millisecond) // until the generations are dropped
		}
		for _, expr := range []string{"sum by (job) (rate(requests_total[5m]))", "count(requests_total)", `requests_total{instance="host-7"}`} {
			b.Run(fmt.Sprintf("%s/%s", place, expr), func(b *testing.B) {
				b.ReportAllocs()
				read := 0
				for b.Loop() {
					q, err := engine.NewRangeQuery(b.Context(), c.Storage, promql.NewPrometheusQueryOpts(false, 0, nil), expr,
						time.UnixMilli(begin), time.UnixMilli(begin+steps*interval), time.Minute)
					if err != nil {
						b.Fatal(err)
					}
					r := q.Exec(b.Context())
					if r.Err != nil || len(r.Warnings) > 0 {
						b.Fatal(r.Err, r.Warnings)
					}
					read = series * steps
					if expr[len(expr)-1] == '}' {
						read = steps
					}
					q.Close()
				}
				b.ReportMetric(float64(read)*float64(b.N)/b.Elapsed().Seconds(), "samples/s")
			})
		}
		if err := c.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

package history

import (
	"fmt"
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// BenchmarkSelect reads 1,000 series of 240 samples each from every of a number
// of blocks, merged, with pages at hand: what a query costs beside its engine.
func BenchmarkSelect(b *testing.B) {
	for _, blocks := range []int{1, 24} {
		b.Run(fmt.Sprintf("blocks=%d", blocks), func(b *testing.B) {
			h := localStores(b).open(b, nil)
			const series, samples, step = 1000, 240, int64(15_000)
			for i := range blocks {
				var all []*chunkfmt.Series
				for j := range series {
					all = append(all, floats(int64(i)*samples*step, step, samples, func(k int) float64 { return float64((i*samples+k)*j) / 10 },
						"__name__", "metric", "instance", fmt.Sprintf("host-%04d", j), "job", "bench"))
				}
				publishWith(b, h, tenantSeries{"a": all}, chunkfmt.WriterOptions{})
			}
			maxt := int64(blocks) * samples * step
			b.ReportAllocs()
			for b.Loop() {
				s := snapshot(b, h, "a", 0, maxt)
				if got := selectAll(b, s, 0, maxt, eq("__name__", "metric")); len(got) != series {
					b.Fatal(len(got))
				}
			}
			b.ReportMetric(float64(blocks*series*samples)*float64(b.N)/b.Elapsed().Seconds(), "samples/s")
		})
	}
}

// BenchmarkSeries lists the series of 24 blocks, with pages at hand.
func BenchmarkSeries(b *testing.B) {
	h := localStores(b).open(b, nil)
	for i := range 24 {
		publish(b, h, tenantSeries{"a": wideSeries(int64(i) * 3_600_000)})
	}
	b.ReportAllocs()
	for b.Loop() {
		s := snapshot(b, h, "a", 0, 1e9)
		if got, err := s.Series(b.Context(), nil, 0, 1e9); err != nil || len(got) != 2400 {
			b.Fatal(len(got), err)
		}
	}
	b.ReportMetric(24*2400*float64(b.N)/b.Elapsed().Seconds(), "series/s")
}

package history

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
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

var benchWeeks = flag.Int("bench.weeks", 52, "weeks of data of BenchmarkSelectWindows")

// BenchmarkSelectWindows reads the windows of an hour of 1,000 counters over a year
// of blocks of a week, cold (nothing at hand) and warm, with the columns for rates.
func BenchmarkSelectWindows(b *testing.B) {
	const week, step, series = Window, int64(300_000), 1000
	start := 2800 * week
	st := localStores(b)
	h := st.open(b, func(o *Options) { o.VisibilityDelay, o.PageCacheBytes = time.Hour, 1<<30 })
	r := rand.New(rand.NewPCG(1, 1))
	var value [series]float64
	for i := range int64(*benchWeeks) {
		var all []*chunkfmt.Series
		for j := range series {
			all = append(all, floats(start+i*week+1+int64(j%10)*1000, step, int(week/step), func(int) float64 {
				value[j] += float64(r.IntN(j + 2))
				return value[j]
			}, "__name__", "http_requests_total", "instance", fmt.Sprintf("10.0.0.%d:9090", j%10), "job", "bench",
				"handler", fmt.Sprintf("/api/v1/%d", j/50), "method", "GET", "code", fmt.Sprint(200+j/10%5)))
		}
		publishWith(b, h, tenantSeries{"a": all}, chunkfmt.WriterOptions{Rollups: true})
	}
	end := start + int64(*benchWeeks)*week
	var windows, gets, bytes int64
	run := func(h *History) {
		s := snapshot(b, h, "a", start, end)
		set, err := s.SelectWindows(b.Context(), []*labels.Matcher{eq("__name__", "http_requests_total")}, start+1, end,
			Summaries{Width: rollup.Long, Columns: rollup.First | rollup.Last | rollup.Reset})
		if err != nil {
			b.Fatal(err)
		}
		var buf Buffer
		n := 0
		for set.Next(b.Context()) {
			if _, covered, err := set.At().Windows(&buf); err != nil || len(covered) != 1 {
				b.Fatal(covered, err)
			}
			n++
		}
		if set.Err() != nil || n != series {
			b.Fatal(n, set.Err())
		}
		windows, gets, bytes = s.Stats.Windows.Load(), s.Stats.ObjectGets.Load(), s.Stats.ObjectBytes.Load()
	}
	for _, cold := range []bool{true, false} {
		b.Run(map[bool]string{true: "cold", false: "warm"}[cold], func(b *testing.B) {
			run(h)
			b.ReportAllocs()
			before := cpuSeconds(b)
			for b.Loop() {
				if cold {
					run(st.open(b, nil))
				} else {
					run(h)
				}
			}
			cpu := (cpuSeconds(b) - before) / float64(b.N)
			b.ReportMetric(float64(windows)/cpu/1e6, "Mwindows/CPU-s")
			b.ReportMetric(cpu*1e3, "CPU-ms")
			b.ReportMetric(float64(gets), "GETs")
			b.ReportMetric(float64(bytes)/1e6, "MB")
		})
	}
}

// cpuSeconds is what the process has used.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

// BenchmarkLabelReads asks for values of labels over 52 blocks, a year of weeks, of
// 5,000 metrics each, with nothing at hand.
func BenchmarkLabelReads(b *testing.B) {
	st := localStores(b)
	w := st.open(b, nil)
	const metrics, blocks = 5000, 52
	for i := range int64(blocks) {
		var all []*chunkfmt.Series
		for m := range metrics {
			for k := range 4 {
				all = append(all, floats(i*Window+1, 60_000, 2, func(int) float64 { return 1 }, "__name__", fmt.Sprintf("metric_%04d_total", m),
					"instance", fmt.Sprintf("host-%04d:9100", 4*(m%1000)+k), "job", fmt.Sprintf("job-%02d", m%20)))
			}
		}
		publish(b, w, tenantSeries{"a": all})
	}
	for _, bench := range []struct {
		name, label string
		values      int
		ms          []*labels.Matcher
	}{
		{"job", "job", 20, nil},
		{"instance", "instance", 4000, nil},
		{"names", "__name__", metrics, nil},
		{"instance/of=metric", "instance", 4, []*labels.Matcher{eq("__name__", "metric_0042_total")}},
		{"instance/of=job", "instance", 200, []*labels.Matcher{eq("job", "job-03")}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var gets, bytes int64
			before := cpuSeconds(b)
			for b.Loop() {
				s := snapshot(b, st.open(b, nil), "a", 0, blocks*Window)
				got, err := s.LabelValues(b.Context(), bench.label, bench.ms, 0, blocks*Window)
				if err != nil || len(got) != bench.values {
					b.Fatal(len(got), err)
				}
				gets, bytes = s.Stats.ObjectGets.Load(), s.Stats.ObjectBytes.Load()
			}
			if gets > 3*blocks {
				b.Errorf("%d GETs of %d blocks", gets, blocks)
			}
			b.ReportMetric(float64(gets)/blocks, "GETs/block")
			b.ReportMetric(float64(bytes)/blocks/1024, "KiB/block")
			b.ReportMetric((cpuSeconds(b)-before)/float64(b.N)*1000, "CPU-ms")
		})
	}
}

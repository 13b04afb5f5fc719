package compact

import (
	"context"
	"crypto/rand"
	"fmt"
	"runtime"
	runtimemetrics "runtime/metrics"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// BenchmarkMerge merges blocks in files into others, on one core: two hours of
// flushes from one owner and from two replicas, and a day of blocks of two hours;
// of one tenant, and of many small ones. It counts the samples that are read.
func BenchmarkMerge(b *testing.B) {
	for _, bench := range []struct {
		name                       string
		tenants, series            int // per tenant
		blocks, perBlock, replicas int
		rollups, reuse             bool // windows are made, and those of the sources are used
		exemplars                  bool // each series has one in each block
	}{
		{"2h/tenants=1/replicas=1", 1, 20_000, 4, 120, 1, false, false, false},
		{"2h/tenants=1/replicas=1/exemplars", 1, 20_000, 4, 120, 1, false, false, true},
		{"2h/tenants=1/replicas=2", 1, 20_000, 4, 120, 2, false, false, false},
		{"2h/tenants=200/replicas=2", 200, 100, 4, 120, 2, false, false, false},
		{"1d/tenants=1/replicas=1", 1, 2_000, 12, 480, 1, false, false, false},
		{"1d/tenants=1/replicas=1/rollups", 1, 2_000, 12, 480, 1, true, false, false},
		{"1d/tenants=200/replicas=1/rollups", 200, 10, 12, 480, 1, true, false, false},
		{"1d/tenants=1/replicas=1/rollups/large", 1, 16_000, 12, 480, 1, true, false, false},
		{"1w/tenants=1/replicas=1", 1, 250, 7, 5760, 1, false, false, false},
		{"1w/tenants=1/replicas=1/rollups", 1, 250, 7, 5760, 1, true, false, false},
		{"1w/tenants=1/replicas=1/reused", 1, 250, 7, 5760, 1, true, true, false},
		{"1w/tenants=50/replicas=1/reused", 50, 5, 7, 5760, 1, true, true, false},
	} {
		b.Run(bench.name, func(b *testing.B) {
			objects := historytest.Files(b, prometheus.NewRegistry())
			var refs []index.BlockRef
			var in, size int64
			contents := make([]content, bench.blocks)
			for i := range contents {
				contents[i] = content{}
			}
			for t := range bench.tenants {
				const start, interval = int64(1_699_920_015_000), int64(15_000) // the first scrape of a day
				c := gen.Config{
					Series: bench.series, Targets: max(1, bench.series/500), Churn: 0.1, Seed: uint64(t), Interval: interval, //nolint:gosec // small
					Start: start, End: start + interval*int64(bench.blocks*bench.perBlock),
				}
				for _, g := range c.AllSeries() {
					lb := labels.NewScratchBuilder(len(g.Labels))
					for _, l := range g.Labels {
						lb.Add(l.Name, l.Value)
					}
					lb.Sort()
					parts := make([]*chunkfmt.Series, bench.blocks)
					for it := g.Iter(c); ; {
						at, v, ok := it.Next()
						if !ok {
							break
						}
						i := min(int((at-1-(start-interval))/interval)/bench.perBlock, bench.blocks-1) // (a, b]
						if parts[i] == nil {
							parts[i] = &chunkfmt.Series{Labels: lb.Labels()}
							if bench.exemplars {
								parts[i].Exemplars = []exemplar.Exemplar{{Labels: labels.FromStrings("trace_id", fmt.Sprint(at, v)), Value: v, Ts: at}}
							}
						}
						parts[i].Floats.T, parts[i].Floats.V = append(parts[i].Floats.T, at), append(parts[i].Floats.V, v)
						in += int64(bench.replicas)
					}
					for i, s := range parts {
						if s != nil {
							contents[i].add(fmt.Sprintf("tenant-%05d", t), s)
						}
					}
				}
			}
			for range bench.replicas {
				for _, c := range contents {
					ref := put(b, objects, chunkfmt.WriterOptions{Rollups: bench.reuse}, c)
					refs = append(refs, ref)
					size += ref.ObjectSize
				}
			}
			clear(contents)
			b.SetBytes(size)
			b.ReportAllocs()
			peak := peakHeap(b)
			before := cpuSeconds(b)
			for b.Loop() {
				o := &outputs{
					objects: objects, dir: b.TempDir(), width: history.Window, level: 1, maxBytes: 512 << 20, ownBytes: 64 << 20,
					now: time.Now, entropy: rand.Reader, beat: func(context.Context) error { return nil }, shared: map[int64]*output{}, own: map[int64]*output{},
					writer: chunkfmt.WriterOptions{Window: history.Window, Rollups: bench.rollups},
				}
				m := &merger{rollups: bench.rollups}
				for _, ref := range refs {
					s, err := openSource(b.Context(), objects, ref, 1<<20)
					if err != nil {
						b.Fatal(err)
					}
					m.sources = append(m.sources, s)
				}
				for _, p := range plan(m.sources, o.width, 32) {
					if err := m.merge(b.Context(), p.MinT, p.MaxT, o); err != nil {
						b.Fatal(err)
					}
					if err := o.finish(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
				if m.samples != in {
					b.Fatalf("%d samples of %d", m.samples, in)
				}
				for _, row := range o.done {
					if err := objects.Delete(b.Context(), row.Object); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(peak(), "peak-MiB")
			b.ReportMetric(float64(in)*float64(b.N)/(cpuSeconds(b)-before)/1e6, "Msamples/CPU-s")
		})
	}
}

// peakHeap begins to look at the heap, and what it returns says by how many MiB it grew
// at most.
func peakHeap(b *testing.B) func() float64 {
	b.Helper()
	sample := []runtimemetrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	read := func() uint64 {
		runtimemetrics.Read(sample)
		return sample[0].Value.Uint64()
	}
	runtime.GC()
	base, most := read(), uint64(0)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				most = max(most, read())
			}
		}
	}()
	return func() float64 {
		close(stop)
		<-done
		return float64(max(most, base)-base) / (1 << 20)
	}
}

// cpuSeconds is what the process has used, the collector of garbage included.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

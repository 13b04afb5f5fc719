package bench

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var (
	minutes  = flag.Int("minutes", 30, "how much of the data set wide goes through the write path")
	given    = flag.String("binary", "", "measure this binary instead of building one")
	profiles = flag.String("profiles", "", "existing directory for CPU and heap profiles of the processes")
)

// Nothing is flushed before the end, so that the phases can be told apart.
const config = `
ingester:
  flush_interval: 24h
  flush_bytes: 8GiB
  max_bytes: 32GiB
`

// BenchmarkWritePath has a sidecar ship the WAL of the data set wide to
// `epimetheus all`, and flushes. One round takes about a minute: run it with
// -benchtime=1x.
func BenchmarkWritePath(b *testing.B) {
	binary := binary(b)
	for b.Loop() {
		writePath(b, binary)
	}
}

func writePath(b *testing.B, binary string) {
	span := time.Duration(*minutes) * time.Minute
	src := newSource(b, wide(time.Now().Add(-span).Truncate(time.Second), span))
	total := 0
	for range src.config.Steps() {
		total += src.scrape(b)
	}
	millions := float64(total) / 1e6
	dir := b.TempDir()
	yml := filepath.Join(dir, "epimetheus.yml")
	if err := os.WriteFile(yml, []byte(config), 0o644); err != nil {
		b.Fatal(err)
	}

	// Tail, encode and ship; receive and append.
	ingester := start(b, binary, "all", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "all"),
		"--grpc.listen-address="+testenv.FreeAddr(b))
	fixed := ingester.memory(b, "VmRSS")
	before, began := ingester.cpu(b), time.Now()
	var profiling sync.WaitGroup
	sidecar := start(b, binary, "sidecar", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "sidecar"),
		"--prometheus.data-dir="+src.dir, "--gateway.url="+ingester.url)
	for name, r := range map[string]*role{"ingester": ingester, "sidecar": sidecar} {
		profiling.Go(func() { r.save(b, "/debug/pprof/profile?seconds=4", name+".cpu") })
	}
	await(b, "all samples received", 10*time.Minute, 100*time.Millisecond, func() bool {
		return ingester.metric(b, "epimetheus_ingester_received_samples_total") >= float64(total)
	})
	elapsed := time.Since(began)
	received := ingester.cpu(b)
	b.ReportMetric(sidecar.cpu(b).Seconds()/millions, "sidecar-cpu-s/Msamples")
	b.ReportMetric((received-before).Seconds()/millions, "ingester-cpu-s/Msamples")
	b.ReportMetric(millions/elapsed.Seconds(), "Msamples/s")
	series := float64(src.config.Series)
	b.ReportMetric((ingester.memory(b, "VmRSS")-fixed)/series, "head-RSS-B/series")
	b.ReportMetric(ingester.memory(b, "VmRSS")/1e6, "ingester-RSS-MB")
	b.ReportMetric(fixed/1e6, "ingester-idle-RSS-MB")
	b.ReportMetric(ingester.metric(b, "go_memstats_next_gc_bytes")/series, "ingester-heap-goal-B/series")
	b.ReportMetric(ingester.metric(b, "epimetheus_ingester_head_bytes")/series, "head-counted-B/series")
	b.ReportMetric(sidecar.memory(b, "VmRSS")/1e6, "sidecar-RSS-MB")
	b.ReportMetric(sidecar.memory(b, "VmHWM")/1e6, "sidecar-peak-RSS-MB")
	b.ReportMetric(ingester.metric(b, "epimetheus_ingester_received_bytes_total")/float64(total), "shipped-B/sample")
	profiling.Wait()
	ingester.save(b, "/debug/pprof/heap?gc=1", "ingester.heap")
	sidecar.save(b, "/debug/pprof/heap?gc=1", "sidecar.heap")

	// From a commit to an answer of the gateway.
	marker := labels.FromStrings(model.MetricNameLabel, "bench_marker")
	var delays []time.Duration
	for i := range 40 {
		committed := time.Now()
		src.append(b, marker, float64(i))
		await(b, "a fresh sample", time.Minute, 5*time.Millisecond, func() bool {
			v, ok := ingester.instant(b, "bench_marker")
			return ok && v == float64(i)
		})
		delays = append(delays, time.Since(committed))
	}
	slices.Sort(delays)
	b.ReportMetric(delays[len(delays)/2].Seconds(), "delay-p50-s")
	b.ReportMetric(delays[len(delays)-1].Seconds(), "delay-max-s")

	// The sidecar ends first, so that the last flush of the ingester is alone.
	if code, err := sidecar.Stop(); code != 0 {
		b.Fatalf("sidecar: exit code %d, %v\n%s", code, err, sidecar.Output())
	}
	before, ended := ingester.cpu(b), children(b)
	if code, err := ingester.Stop(); code != 0 {
		b.Fatalf("ingester: exit code %d, %v\n%s", code, err, ingester.Output())
	}
	b.ReportMetric((children(b)-ended-before).Seconds()/millions, "flush-cpu-s/Msamples")
	size := int64(0)
	err := filepath.WalkDir(filepath.Join(dir, "all", "objects"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(size)/float64(total), "block-B/sample")
	b.ReportMetric(0, "ns/op")
}

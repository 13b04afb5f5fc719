package bench

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var restartSeries = flag.Int("restart-series", 500_000, "series of BenchmarkRestart")

// BenchmarkRestart kills `epimetheus all` (-9) with 30 minutes (-minutes) of
// 500,000 series (-restart-series) in its head, and starts it again: it replays
// its commit log, and the sidecar goes on. It takes some minutes and 5 GB of
// memory, and runs once however large b.N is.
func BenchmarkRestart(b *testing.B) {
	binary := binary(b)
	span := time.Duration(*minutes) * time.Minute
	c := gen.Config{Series: *restartSeries, Targets: *restartSeries / 1000, Start: time.Now().Add(-span).UnixMilli(), Interval: 15_000, Seed: 1}
	c.End = c.Start + span.Milliseconds()
	src := newSource(b, c)
	total := 0
	for range c.Steps() {
		total += src.scrape(b)
	}
	millions := float64(total) / 1e6
	dir := b.TempDir()
	yml := filepath.Join(dir, "epimetheus.yml")
	if err := os.WriteFile(yml, []byte(config), 0o644); err != nil {
		b.Fatal(err)
	}
	web := testenv.FreeAddr(b)
	args := []string{"all", "--config.file=" + yml, "--data.dir=" + filepath.Join(dir, "all"), "--grpc.listen-address=" + testenv.FreeAddr(b)}
	r := startAt(b, web, binary, args...)
	before := r.cpu(b)
	sidecar := start(b, binary, "sidecar", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "sidecar"),
		"--prometheus.data-dir="+src.dir, "--gateway.url="+r.url)
	await(b, "all samples received", 20*time.Minute, 100*time.Millisecond, func() bool {
		return r.metric(b, "epimetheus_ingester_received_samples_total") >= float64(total)
	})
	b.ReportMetric((r.cpu(b)-before).Seconds()/millions, "receive-cpu-s/Msamples")
	b.ReportMetric(r.metric(b, "epimetheus_ingester_commitlog_written_bytes_total")/float64(total), "log-B/sample")
	b.ReportMetric(r.memory(b, "VmHWM")/1e6, "peak-RSS-before-MB")

	r.Kill()
	killed := time.Now()
	r = startAt(b, web, binary, args...)
	b.ReportMetric(r.ready.Seconds(), "ready-s")
	b.ReportMetric(r.metric(b, "epimetheus_ingester_commitlog_replay_duration_seconds"), "replay-s")
	b.ReportMetric(millions/r.cpu(b).Seconds(), "start-Msamples/cpu-s")
	b.ReportMetric(r.memory(b, "VmHWM")/1e6, "peak-RSS-after-MB")
	if n := r.metric(b, "epimetheus_ingester_head_samples"); n < float64(total) {
		b.Errorf("%v samples of %d after the restart", n, total)
	}
	r.save(b, "/debug/pprof/heap", "restarted.heap")
	src.append(b, labels.FromStrings(model.MetricNameLabel, "bench_marker"), 1)
	await(b, "a fresh sample after the restart", time.Minute, 10*time.Millisecond, func() bool {
		_, ok := r.instant(b, "bench_marker")
		return ok
	})
	b.ReportMetric(time.Since(killed).Seconds(), "kill-to-fresh-sample-s")
	if n := sidecar.metric(b, "epimetheus_sidecar_sessions_ended_total"); n != 0 {
		b.Errorf("%v sessions ended", n)
	}
	b.ReportMetric(0, "ns/op")
}

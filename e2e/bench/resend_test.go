package bench

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

const noCommitLog = config + "  commit_log: false\n"

// BenchmarkResend kills `epimetheus all` (-9), without a commit log, with half an
// hour (-minutes) of the data set wide in its head, and starts it again: the
// sidecar sends all of it again. Then it kills it for as long as it takes to write
// as much again, and lets the sidecar catch up. It runs once however large b.N is.
func BenchmarkResend(b *testing.B) {
	binary := binary(b)
	span := time.Duration(*minutes) * time.Minute
	src := newSource(b, wide(time.Now().Add(-2*span).Truncate(time.Second), 2*span))
	half := src.config.Steps() / 2
	total := 0
	for range half {
		total += src.scrape(b)
	}
	dir := b.TempDir()
	yml := filepath.Join(dir, "epimetheus.yml")
	if err := os.WriteFile(yml, []byte(noCommitLog), 0o644); err != nil {
		b.Fatal(err)
	}
	web := testenv.FreeAddr(b)
	args := []string{"all", "--config.file=" + yml, "--data.dir=" + filepath.Join(dir, "all"), "--grpc.listen-address=" + testenv.FreeAddr(b)}
	r := startAt(b, web, binary, args...)
	sidecar := start(b, binary, "sidecar", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "sidecar"),
		"--prometheus.data-dir="+src.dir, "--gateway.url="+r.url)
	all := func() bool { return r.metric(b, "epimetheus_ingester_head_samples") >= float64(total) }
	await(b, "all samples received", 20*time.Minute, 100*time.Millisecond, all)
	b.ReportMetric(sidecar.memory(b, "VmHWM")/1e6, "sidecar-peak-RSS-MB")

	r.Kill()
	killed := time.Now()
	r = startAt(b, web, binary, args...)
	await(b, "all samples received again", 20*time.Minute, 20*time.Millisecond, all)
	b.ReportMetric(time.Since(killed).Seconds(), "kill-to-all-queryable-s")

	r.Kill()
	for range src.config.Steps() - half {
		total += src.scrape(b)
	}
	b.ReportMetric(sidecar.memory(b, "VmHWM")/1e6, "sidecar-peak-RSS-while-away-MB")
	back := time.Now()
	r = startAt(b, web, binary, args...)
	await(b, "all samples received after the ingester was away", 20*time.Minute, 20*time.Millisecond, all)
	b.ReportMetric(time.Since(back).Seconds(), "catch-up-s")
	b.ReportMetric(sidecar.memory(b, "VmHWM")/1e6, "sidecar-peak-RSS-after-MB")
	b.ReportMetric(0, "ns/op")
}

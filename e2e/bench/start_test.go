package bench

import (
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// BenchmarkStart takes the time from starting a role to its /-/ready, in steps
// of 10 ms. Ingester and gateway use an S3 and a DynamoDB server on the same
// machine.
func BenchmarkStart(b *testing.B) {
	binary := binary(b)
	run := func(name string, args func(b *testing.B, dir string) []string) {
		b.Run(name, func(b *testing.B) {
			var sum time.Duration
			n := 0
			for b.Loop() {
				r := start(b, binary, append([]string{name}, args(b, b.TempDir())...)...)
				sum += r.ready
				n++
				r.Kill()
			}
			b.ReportMetric(sum.Seconds()/float64(n), "ready-s")
			b.ReportMetric(0, "ns/op")
		})
	}
	run("all", func(b *testing.B, dir string) []string {
		b.Helper()
		return []string{"--data.dir=" + dir, "--grpc.listen-address=" + testenv.FreeAddr(b)}
	})

	all := start(b, binary, "all", "--data.dir="+b.TempDir(), "--grpc.listen-address="+testenv.FreeAddr(b))
	src := newSource(b, wide(time.Now().Add(-time.Minute), time.Minute))
	src.scrape(b)
	run("sidecar", func(_ *testing.B, dir string) []string {
		return []string{"--data.dir=" + dir, "--prometheus.data-dir=" + src.dir, "--gateway.url=" + all.url}
	})

	yml := stores(b, binary, "")
	member := func(b *testing.B, dir string) []string {
		b.Helper()
		return []string{"--config.file=" + yml, "--data.dir=" + dir, "--gossip.listen-address=" + testenv.FreeAddr(b), "--gossip.member-id=one"}
	}
	run("ingester", func(b *testing.B, dir string) []string {
		b.Helper()
		return append(member(b, dir), "--grpc.listen-address="+testenv.FreeAddr(b))
	})
	gossip := testenv.FreeAddr(b)
	start(b, binary, "ingester", "--config.file="+yml, "--data.dir="+b.TempDir(), "--gossip.listen-address="+gossip,
		"--gossip.member-id=two", "--grpc.listen-address="+testenv.FreeAddr(b))
	run("gateway", func(b *testing.B, dir string) []string {
		b.Helper()
		return append(member(b, dir), "--gossip.join="+gossip)
	})
}

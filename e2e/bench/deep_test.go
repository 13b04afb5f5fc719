package bench

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var deepDays = flag.Int("bench.deep-days", 30, "how many days the block of BenchmarkServers spans")

// BenchmarkServers compares queries over blocks: 1,000 series at 15 s for 30 days, as a
// block of Prometheus in a Prometheus server, and imported, in `all`. Both have just
// started, so that the first time of a query is a cold one, as far as others before have
// not read the same; results of parts are not kept. Run it with -benchtime 1x.
func BenchmarkServers(b *testing.B) {
	binary := binary(b)
	c, blocks := deep(b)
	dir := b.TempDir()
	data, yml := filepath.Join(dir, "all"), filepath.Join(dir, "epimetheus.yml")
	if err := os.WriteFile(yml, []byte("gateway:\n  result_cache_bytes: 0\ncompactor:\n  enabled: false\n"), 0o644); err != nil {
		b.Fatal(err)
	}
	importBlocks(b, binary, yml, data, blocks)
	prom := testenv.Prometheus(b, blocks, "", "--storage.tsdb.retention.time=100y")
	all := startAt(b, testenv.FreeAddr(b), binary, "all", "--config.file="+yml, "--data.dir="+data, "--grpc.listen-address="+testenv.FreeAddr(b))
	end := time.UnixMilli(c.End)
	compare(b, &system{name: "prometheus", url: prom.URL, procs: []*role{{Process: prom.Process, url: prom.URL}}},
		[]*system{{name: "all", url: all.url, procs: []*role{all}}}, queries(length(c)), time.UnixMilli(c.Start), end,
		func(_ float64, points int) float64 {
			if points < 10_000 {
				return 15
			}
			return 4
		})
}

// deep writes as many days of the data set deep as were asked for, as one block of
// Prometheus in a folder.
func deep(b *testing.B) (c gen.Config, blocks string) {
	b.Helper()
	const week = 7 * 24 * 3_600_000 // ms
	start := int64(1_700_006_400_000) / week * week
	c = gen.Config{
		Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: start, End: start + (time.Duration(*deepDays) * day).Milliseconds(),
	}
	blocks = b.TempDir()
	writeTSDBBlock(b, filepath.Join(blocks, ulid.Make().String()), c)
	return c, blocks
}

// length of the data.
func length(c gen.Config) time.Duration { return time.Duration(c.End-c.Start) * time.Millisecond }

// importBlocks takes blocks of Prometheus into history.
func importBlocks(b *testing.B, binary, yml, data, blocks string) {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), binary, "tool", "import", "--config.file="+yml, "--data.dir="+data, blocks)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("import: %v\n%s", err, out)
	}
}

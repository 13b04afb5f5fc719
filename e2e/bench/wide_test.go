package bench

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var (
	keep  = flag.String("bench.keep", "", "folder where BenchmarkWide keeps its data, and finds it again, for runs one after the other")
	split = flag.Bool("bench.split", true, "BenchmarkWide asks an ingester and a gateway in processes of their own too")
)

// BenchmarkWide compares queries over heads: an hour of 100,000 series (24 M samples),
// written into a WAL by Prometheus's own tsdb package, in a Prometheus server on that
// WAL, and in Epimetheus, to which a sidecar ships it: `all`, and an ingester and a
// gateway as processes of their own. Run it with -benchtime 1x.
func BenchmarkWide(b *testing.B) {
	binary := binary(b)
	dir := *keep
	if dir == "" {
		dir = b.TempDir()
	}
	data := filepath.Join(dir, "prometheus")
	end, total := wideData(b, dir, data)
	prom := testenv.Prometheus(b, data, "")
	yml := filepath.Join(b.TempDir(), "epimetheus.yml")
	if err := os.WriteFile(yml, []byte(config), 0o644); err != nil {
		b.Fatal(err)
	}
	all := start(b, binary, "all", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "all"), "--grpc.listen-address="+testenv.FreeAddr(b))
	ours := []*system{{name: "all", url: all.url, procs: []*role{all}}}
	ship(b, binary, yml, dir, "sidecar", data, all, all, total)
	if *split {
		yml := stores(b, binary, config)
		gossip := testenv.FreeAddr(b)
		ingester := start(b, binary, "ingester", "--config.file="+yml, "--data.dir="+filepath.Join(dir, "ingester"),
			"--gossip.listen-address="+gossip, "--gossip.member-id=ingester", "--grpc.listen-address="+testenv.FreeAddr(b))
		gateway := start(b, binary, "gateway", "--config.file="+yml, "--data.dir="+b.TempDir(),
			"--grpc.listen-address="+testenv.FreeAddr(b), "--gossip.listen-address="+testenv.FreeAddr(b), "--gossip.member-id=gateway", "--gossip.join="+gossip)
		ship(b, binary, yml, dir, "sidecar2", data, gateway, ingester, total)
		ours = append(ours, &system{name: "split", url: gateway.url, procs: []*role{ingester, gateway}})
		defer ingester.save(b, "/debug/pprof/heap", "ingester.heap")
		defer gateway.save(b, "/debug/pprof/heap", "gateway.heap")
	}
	compare(b, &system{name: "prometheus", url: prom.URL, procs: []*role{{Process: prom.Process, url: prom.URL}}}, ours,
		queries(time.Hour), end.Add(-time.Hour), end, func(float64, int) float64 { return 4 })
	all.save(b, "/debug/pprof/heap", "all.heap")
}

// wideData writes an hour of wide, unless it is there, and gives its end and its
// samples.
func wideData(b *testing.B, dir, data string) (end time.Time, total int) {
	b.Helper()
	note := filepath.Join(dir, "wide")
	if text, err := os.ReadFile(note); err == nil {
		var unix int64
		if _, err := fmt.Sscan(string(text), &unix, &total); err != nil {
			b.Fatal(err)
		}
		return time.Unix(unix, 0), total
	}
	end = time.Now().Truncate(15 * time.Second)
	c := gen.Config{Series: 100_000, Targets: 200, Churn: 1, Start: end.Add(-time.Hour).UnixMilli(), End: end.UnixMilli(), Interval: 15_000, Seed: 1}
	src := newSourceAt(b, data, c)
	for range c.Steps() {
		total += src.scrape(b)
	}
	if err := src.db.Close(); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(note, []byte(strconv.FormatInt(end.Unix(), 10)+" "+strconv.Itoa(total)), 0o644); err != nil {
		b.Fatal(err)
	}
	return end, total
}

// ship lets a sidecar bring all samples of data to an ingester, and ends it.
func ship(b *testing.B, binary, yml, dir, name, data string, gateway, ingester *role, total int) {
	b.Helper()
	sidecar := start(b, binary, "sidecar", "--config.file="+yml, "--data.dir="+filepath.Join(dir, name),
		"--prometheus.data-dir="+data, "--gateway.url="+gateway.url)
	await(b, "all samples received", 10*time.Minute, 100*time.Millisecond, func() bool {
		return ingester.metric(b, "epimetheus_ingester_head_samples") >= float64(total)
	})
	if code, err := sidecar.Stop(); code != 0 {
		b.Fatalf("sidecar: exit code %d, %v\n%s", code, err, sidecar.Output())
	}
}

// stores starts an S3 and a DynamoDB server, and gives a configuration file that names
// them.
func stores(b *testing.B, binary, more string) string {
	b.Helper()
	return storesBehind(b, binary, more, func(dynamodb string) string { return dynamodb })
}

// storesBehind is stores with a proxy in front of the DynamoDB server.
func storesBehind(b *testing.B, binary, more string, proxy func(dynamodb string) string) string {
	b.Helper()
	s3, db := testenv.S3(b), testenv.DynamoDB(b)
	for _, kv := range s3.Env() {
		for i := range kv {
			if kv[i] == '=' {
				b.Setenv(kv[:i], kv[i+1:])
				break
			}
		}
	}
	yml := filepath.Join(b.TempDir(), "epimetheus.yml")
	text := fmt.Sprintf(`
objects:
  type: s3
  s3: {bucket: %q, endpoint: %q, region: %q, path_style: true}
index:
  type: dynamodb
  dynamodb: {table: rows, endpoint: %q, region: %q}
`, s3.Bucket, s3.Endpoint, s3.Region, proxy(db.Endpoint), db.Region) + more
	if err := os.WriteFile(yml, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.CommandContext(b.Context(), binary, "tool", "create-table", "--config.file="+yml).CombinedOutput(); err != nil {
		b.Fatalf("create-table: %v\n%s", err, out)
	}
	return yml
}

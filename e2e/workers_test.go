package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// Of the samples of TestWorkers: some 23 million.
const (
	workerDays   = 10
	workerSeries = 400
)

// publishDays writes blocks of a day of tenant t into the stores.
func publishDays(t *testing.T, s3 *testenv.S3Server, db *testenv.DynamoDBServer) {
	t.Helper()
	objects, err := object.NewS3(t.Context(), historytest.S3Options(t, s3), prometheus.NewRegistry())
	require.NoError(t, err)
	rows, err := index.NewDynamoDB(t.Context(), historytest.DynamoDBOptions(t, db.Endpoint), prometheus.NewRegistry())
	require.NoError(t, err)
	require.NoError(t, rows.CreateTable(t.Context()))
	h, err := history.New(history.Options{Objects: objects, Index: index.New(rows), Registerer: prometheus.NewRegistry()})
	require.NoError(t, err)
	const day, interval = 24 * 3600 * 1000, 15_000
	for d := range int64(workerDays) {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
		for i := range workerSeries {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "requests_total", "i", fmt.Sprint(1000+i))}
			for ts := d * day; ts < (d+1)*day; ts += interval {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts/1000*int64(i)%100_003))
			}
			require.NoError(t, w.Add("t", s))
		}
		summary, err := w.Close()
		require.NoError(t, err)
		require.NoError(t, h.Publish(t.Context(), ulid.Make(), buf.Bytes(), summary))
	}
}

// TestWorkers: gateways that compute parts of one another's queries freeze, are cut off, die,
// or are of another version in the middle of these. Each query gives what one gateway alone
// gives. When its client goes, the work ends everywhere.
func TestWorkers(t *testing.T) {
	t.Parallel()
	s3, db := testenv.S3(t), testenv.DynamoDB(t)
	publishDays(t, s3, db)
	s := &stack{dir: t.TempDir(), env: s3.Env()}
	s.config = writeFile(t, s.dir, "epimetheus.yml", fmt.Sprintf(`
tenancy: header
gateway: {query_timeout: 2m, result_cache_bytes: 0}
objects:
  type: s3
  s3: {bucket: %q, endpoint: %q, region: %q, path_style: true}
index:
  type: dynamodb
  dynamodb: {table: epimetheus, endpoint: %q, region: %q}
`, s3.Bucket, s3.Endpoint, s3.Region, db.Endpoint, db.Region))
	gateway := func(id, program string, links bool, join ...string) *member {
		t.Helper()
		m := &member{}
		grpc, gossip := testenv.FreeAddr(t), testenv.FreeAddr(t)
		args := []string{
			"gateway", "--config.file=" + s.config, "--data.dir=" + filepath.Join(s.dir, id), "--gossip.member-id=" + id,
			"--grpc.listen-address=" + grpc, "--gossip.listen-address=" + gossip,
		}
		if links {
			m.grpc = startLink(t, grpc)
			args = append(args, "--grpc.advertise-address="+m.grpc.addr)
		}
		for _, j := range join {
			args = append(args, "--gossip.join="+j)
		}
		s.join = append(s.join, gossip)
		web := testenv.FreeAddr(t)
		m.url = "http://" + web
		m.Process = testenv.Start(t, testenv.Command{Path: program, Args: append(args, "--web.listen-address="+web), Env: s.env, Ready: testenv.Answering(m.url + "/-/ready")})
		return m
	}
	alone := gateway("alone", binary, false)
	caller := gateway("caller", binary, false)
	workers := []*member{gateway("worker-0", binary, true, s.join[1]), gateway("worker-1", binary, true, s.join[1])}
	together := func(n float64) {
		t.Helper()
		for _, g := range append(workers, caller) {
			metricIs(t, time.Minute, g.url, "epimetheus_gateway_workers", func(v float64) bool { return v == n })
		}
	}
	together(3)

	// ask gives what there is in the answer to a query at a gateway.
	ask := func(ctx context.Context, g *member, q string) (string, error) {
		form := url.Values{"query": {q}, "start": {"3600"}, "end": {fmt.Sprint(workerDays * 24 * 3600)}, "step": {"3600"}}
		code, r, err := get(ctx, g.url, "/api/v1/query_range", "t", form)
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, r.Error)
		}
		return string(r.Data), err
	}
	// Which gateway a part falls to depends on chance, and on all of the query.
	var q, want string
	right := func(g *member) {
		t.Helper()
		got, err := ask(t.Context(), g, q)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	parts := func(outcome string) (n [2]float64) { // "": whatever came of them
		t.Helper()
		name := "epimetheus_gateway_worker_parts_total"
		if outcome != "" {
			name += `{outcome="` + outcome + `"}`
		}
		for i, w := range workers {
			v, err := metric(t.Context(), w.url, name)
			if err == nil { // else there were none
				n[i] = v
			}
		}
		return n
	}
	step(t, "all is well")
	for i := 1; ; i++ {
		var err error
		q = fmt.Sprintf(`sum by (i) (rate(requests_total[1h] offset %ds))`, i)
		want, err = ask(t.Context(), alone, q)
		require.NoError(t, err)
		before := parts("ok")
		right(caller)
		if n := parts("ok"); n[0] > before[0] && n[1] > before[1] {
			break
		}
		require.Less(t, i, 50, "no query that both workers have parts of")
	}

	// On a busy machine the other may always be faster.
	used := func() {
		t.Helper()
		eventually(t, time.Minute, "both workers are given parts again", func() error {
			before, ok := parts(""), parts("ok")
			right(caller)
			if n := parts(""); n[0] == before[0] || n[1] == before[1] {
				return fmt.Errorf("before %v, then %v; ok were %v, then %v", before, n, ok, parts("ok"))
			}
			return nil
		})
	}

	step(t, "both workers are frozen, one is killed while a query waits for it")
	for _, w := range workers {
		require.NoError(t, w.Signal(syscall.SIGSTOP))
	}
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		pause(t.Context(), 300*time.Millisecond)
		workers[0].Kill()
	}()
	right(caller)
	<-killed
	right(caller)
	require.NoError(t, workers[1].Signal(syscall.SIGCONT))
	workers[0].restart(t)
	together(3)
	used()

	for name, bad := range map[string]trouble{"stands still": {stall: true}, "is cut": {refuse: true}} {
		for i, w := range workers {
			step(t, fmt.Sprintf("the connection to worker %d %s", i, name))
			w.grpc.set(bad)
			right(caller)
			w.grpc.set(trouble{})
			used()
		}
	}

	step(t, "the client goes while all compute")
	before := parts("canceled")
	var leave context.CancelFunc
	var gone chan error
	for i := 1; leave == nil; i++ {
		require.Less(t, i, 20, "no query that both workers have parts of")
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		done := make(chan error, 1)
		go func() {
			_, err := ask(ctx, caller, fmt.Sprintf(`max(quantile_over_time(0.9, requests_total[12h] offset %ds))`, i)) // takes long
			done <- err
		}()
		for range 5 {
			if busy(t, workers[0]) > 0.1 && busy(t, workers[1]) > 0.1 {
				leave, gone = cancel, done
				break
			}
		}
		if leave == nil {
			cancel()
			<-done
			before = parts("canceled")
		}
	}
	leave()
	left := time.Now()
	require.ErrorIs(t, <-gone, context.Canceled)
	eventually(t, time.Minute, "nobody computes any more", func() error {
		now := parts("canceled")
		for i := range workers {
			if now[i] <= before[i] {
				return fmt.Errorf("worker %d does", i)
			}
		}
		return nil
	})
	t.Logf("the workers had ended their parts after %s", time.Since(left))
	eventually(t, time.Minute, "all are idle", func() error {
		for _, m := range append(workers, caller) {
			if b := busy(t, m); b > 0.05 {
				return fmt.Errorf("%s uses %.2f processors", m.url, b)
			}
		}
		return nil
	})

	step(t, "a gateway has another version of the protocol")
	workers[0].stop(t)
	other := gateway("worker-0", buildOther(t), true, s.join[1])
	workers[0] = other
	together(3)
	eventually(t, time.Minute, "parts are declined", func() error {
		for _, g := range []*member{caller, other} { // in both directions
			right(g)
			if v, err := metric(t.Context(), g.url, `epimetheus_gateway_worker_requests_total{outcome="declined"}`); err != nil || v == 0 {
				return fmt.Errorf("%v of %s, %w", v, g.url, err)
			}
		}
		return nil
	})
	require.Positive(t, parts("declined")[0])
}

// busy is how many processors a process uses, over a while.
func busy(t *testing.T, m *member) float64 {
	t.Helper()
	cpu := func() float64 {
		v, err := metric(t.Context(), m.url, "process_cpu_seconds_total")
		require.NoError(t, err)
		return v
	}
	before, began := cpu(), time.Now()
	pause(t.Context(), 500*time.Millisecond)
	return (cpu() - before) / time.Since(began).Seconds()
}

// buildOther builds a binary whose version of the work protocol is another one.
func buildOther(t *testing.T) string {
	t.Helper()
	source := filepath.Join(testenv.Root(t), "gateway", "plan", "spread.go")
	text, err := os.ReadFile(source)
	require.NoError(t, err)
	was := fmt.Sprintf("const Version = %d\n", plan.Version)
	require.Contains(t, string(text), was)
	dir := t.TempDir()
	changed := writeFile(t, dir, "spread.go", strings.Replace(string(text), was, fmt.Sprintf("const Version = %d\n", plan.Version+1), 1))
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {source: changed}})
	require.NoError(t, err)
	out := filepath.Join(dir, "epimetheus")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-overlay", writeFile(t, dir, "overlay.json", string(overlay)), "-o", out, "./cmd/epimetheus")
	cmd.Dir = testenv.Root(t)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, text)
	}
	return out
}

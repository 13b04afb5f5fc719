package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// stack is Epimetheus in one of its shapes.
type stack struct {
	gateways []*member
	// victim is an ingester, or the process that is one.
	victim *member
	// rest are the other ingesters.
	rest []*member
	s3   *testenv.S3Server
	db   *testenv.DynamoDBServer
	env  []string
	dir  string
	// replicas of each series; with several each ingester is in a zone of its own.
	replicas int
}

// member is one process of a stack.
type member struct {
	*testenv.Process
	url string
}

// Flushes every ten seconds; generations stay readable a little longer than the
// longest query.
const commonConfig = `
tenancy: header
ingester:
  flush_interval: 10s
  visibility_delay: 10s
gateway:
  query_timeout: 5s
`

func writeFile(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (s *stack) start(t *testing.T, web string, args ...string) *member {
	t.Helper()
	m := &member{url: "http://" + web}
	m.Process = testenv.Start(t, testenv.Command{
		Path: binary, Args: append(args, "--web.listen-address="+web), Env: s.env, Ready: testenv.Answering(m.url + "/-/ready"),
	})
	return m
}

// restart brings a member back that was killed.
func (m *member) restart(t *testing.T) {
	t.Helper()
	m.Process = m.Restart(t)
}

func (m *member) stop(t *testing.T) {
	t.Helper()
	code, err := m.Stop()
	if err != nil || code != 0 {
		t.Errorf("%s: exit code %d, %v\n%s", m.Command.Args[0], code, err, m.Output())
	}
}

func startAll(t *testing.T) *stack {
	t.Helper()
	s := &stack{dir: t.TempDir()}
	config := writeFile(t, s.dir, "epimetheus.yml", commonConfig)
	m := s.start(t, testenv.FreeAddr(t), "all", "--config.file="+config, "--data.dir="+filepath.Join(s.dir, "data"),
		"--grpc.listen-address="+testenv.FreeAddr(t))
	s.gateways, s.victim = []*member{m}, m
	return s
}

func startRoles(t *testing.T, s3 *testenv.S3Server) *stack {
	t.Helper()
	return startReplicated(t, s3, 1)
}

func startReplicated(t *testing.T, s3 *testenv.S3Server, replicas int) *stack {
	t.Helper()
	db := testenv.DynamoDBOn(t, t.TempDir())
	s := &stack{dir: t.TempDir(), env: s3.Env(), s3: s3, db: db, replicas: replicas}
	text := commonConfig + fmt.Sprintf(`
objects:
  type: s3
  s3: {bucket: %q, endpoint: %q, region: %q, path_style: true}
index:
  type: dynamodb
  dynamodb: {table: rows, endpoint: %q, region: %q}
`, s3.Bucket, s3.Endpoint, s3.Region, db.Endpoint, db.Region)
	config := writeFile(t, s.dir, "epimetheus.yml", text)

	// Without its table an ingester says what to do.
	cmd := exec.CommandContext(t.Context(), binary, "ingester", "--config.file="+config, "--data.dir="+filepath.Join(s.dir, "x"))
	cmd.Env = append(os.Environ(), s.env...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "create-table") {
		t.Errorf("an ingester without a table: %v\n%s", err, out)
	}
	cmd = exec.CommandContext(t.Context(), binary, "tool", "create-table", "--config.file="+config)
	cmd.Env = append(os.Environ(), s.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("create-table: %v\n%s", err, out)
	}

	var join []string
	for range 3 {
		join = append(join, testenv.FreeAddr(t))
	}
	for i, g := range join {
		id := fmt.Sprintf("ingester-%d", i)
		config := config
		if replicas > 1 {
			config = writeFile(t, s.dir, id+".yml", text+"ring: {zone: zone-of-"+id+"}\n")
		}
		m := s.start(t, testenv.FreeAddr(t), "ingester", "--config.file="+config, "--data.dir="+filepath.Join(s.dir, id),
			"--gossip.member-id="+id, "--gossip.listen-address="+g, "--gossip.join="+join[0], "--gossip.join="+join[2],
			"--grpc.listen-address="+testenv.FreeAddr(t))
		if i == 1 {
			s.victim = m
		} else {
			s.rest = append(s.rest, m)
		}
	}
	for i := range 2 {
		id := fmt.Sprintf("gateway-%d", i)
		s.gateways = append(s.gateways, s.start(t, testenv.FreeAddr(t), "gateway", "--config.file="+config,
			"--data.dir="+filepath.Join(s.dir, id), "--gossip.member-id="+id, "--gossip.listen-address="+testenv.FreeAddr(t),
			"--gossip.join="+join[0], "--gossip.join="+join[1]))
	}
	return s
}

// tenant is a Prometheus with its sidecar.
type tenant struct {
	name    string
	prom    *testenv.PrometheusServer
	sidecar *member
}

// startTenant starts a Prometheus that scrapes itself, the stack and an exporter
// of ours each second, and a sidecar beside it.
func startTenant(t *testing.T, s *stack, name, features string) *tenant {
	t.Helper()
	targets := []string{startExporter(t)}
	for _, m := range append(append([]*member{s.victim}, s.gateways...), s.rest...) {
		targets = append(targets, strings.TrimPrefix(m.url, "http://"))
	}
	n := &tenant{name: name}
	n.prom = testenv.Prometheus(t, "", fmt.Sprintf(`
global:
  scrape_interval: 1s
  external_labels: {cluster: cluster-of-%s, replica: "0"}
scrape_configs:
- job_name: all
  scrape_native_histograms: true
  always_scrape_classic_histograms: true
  static_configs: [{targets: ['%s']}]
`, name, strings.Join(targets, "', '")), "--enable-feature=exemplar-storage"+features)
	n.startSidecar(t, s)
	return n
}

// Feature of Prometheus that makes it write metadata into its WAL. Without it the
// sidecar asks for it.
const metadataInWAL = ",metadata-wal-records"

// Features of Prometheus that make it write start timestamps, in records of the
// second version.
const startTimestamps = ",st-storage,xor2-encoding,histograms-st-encoding,created-timestamp-zero-ingestion"

// startAgent is startTenant with a Prometheus in agent mode.
func startAgent(t *testing.T, s *stack, name string) *tenant {
	t.Helper()
	dir, addr := t.TempDir(), testenv.FreeAddr(t)
	n := &tenant{name: name, prom: &testenv.PrometheusServer{URL: "http://" + addr, Addr: addr, Dir: filepath.Join(dir, "data")}}
	config := writeFile(t, dir, "agent.yml", fmt.Sprintf(`
global:
  scrape_interval: 1s
  external_labels: {cluster: cluster-of-%s, replica: "0"}
scrape_configs:
- job_name: all
  scrape_native_histograms: true
  static_configs: [{targets: ['%s', '%s']}]
`, name, startExporter(t), addr))
	n.prom.Process = testenv.Start(t, testenv.Command{
		Path: testenv.Tool(t, "bin/prometheus"), Dir: dir, Ready: testenv.Answering(n.prom.URL + "/-/ready"),
		Args: []string{"--agent", "--config.file=" + config, "--storage.agent.path=" + n.prom.Dir, "--web.listen-address=" + addr},
	})
	n.startSidecar(t, s)
	return n
}

func (n *tenant) startSidecar(t *testing.T, s *stack) {
	t.Helper()
	args := []string{
		"sidecar", "--data.dir=" + filepath.Join(s.dir, "sidecar-"+n.name), "--tenant=" + n.name,
		"--prometheus.data-dir=" + n.prom.Dir, "--prometheus.url=" + n.prom.URL,
	}
	for _, g := range s.gateways {
		args = append(args, "--gateway.url="+g.url)
	}
	if s.replicas > 1 {
		args = append(args, "--config.file="+writeFile(t, s.dir, "sidecar-"+n.name+".yml", fmt.Sprintf("sidecar: {replication_factor: %d}\n", s.replicas)))
	}
	n.sidecar = s.start(t, testenv.FreeAddr(t), args...)
}

// startExporter serves what other targets don't: native histograms, exemplars,
// and a series that comes and goes.
func startExporter(t *testing.T) string {
	t.Helper()
	reg := prometheus.NewRegistry()
	classic := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "test_latency_seconds", Help: "Latency."})
	native := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "test_native_seconds", Help: "Native latency.", NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
	})
	total := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "test_requests_total", Help: "Requests.", Unit: ""}, []string{"code"})
	flapping := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "test_flapping", Help: "Comes and goes."}, []string{"n"})
	reg.MustRegister(classic, native, total, flapping)
	h := promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true})
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n++
		v := float64(n%17) / 7
		classic.(prometheus.ExemplarObserver).ObserveWithExemplar(v, prometheus.Labels{"trace_id": fmt.Sprint(n)})
		native.Observe(v * v)
		total.WithLabelValues("200").Add(v)
		flapping.Reset()
		if n%10 < 5 {
			flapping.WithLabelValues(fmt.Sprint(n % 2)).Set(v)
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// runTool runs the binary's tool with a deadline.
func (s *stack) runTool(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, append([]string{"tool"}, args...)...)
	cmd.Env = append(os.Environ(), s.env...)
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	return string(out), err
}

package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// stack is Epimetheus in one of its shapes.
type stack struct {
	gateways []*member
	// ingesters are all of them, or the process that is one.
	ingesters []*member
	// victim is one of the ingesters.
	victim *member
	// rest are the other ingesters.
	rest []*member
	s3   *testenv.S3Server
	db   *testenv.DynamoDBServer
	env  []string
	dir  string

	shape  shape
	config string   // file
	text   string   // in it
	join   []string // gossip addresses
}

// member is one process of a stack.
type member struct {
	*testenv.Process
	url string
	dir string // its data directory

	// Ways to it that the test can cut, and its clock, if the shape asks for them.
	grpc, gossip *link
	clock        *clock
}

// shape says how a stack of roles differs from the plain one.
type shape struct {
	s3, db string // endpoints of the stores, where they aren't the servers' own
	links  bool   // ingesters are reached through links
	clocks bool   // each process has a wall clock of its own
	// replicas of each series; with several each ingester is in a zone of its own.
	replicas int
	places   []place
	more     string // text of the configuration
	tls      string // more of it, for sidecars too
}

// place is where an ingester runs.
type place struct {
	run  []string // command that runs another one there
	host string   // its IP address there
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
	m := &member{}
	s.launch(t, m, nil, web, args...)
	return m
}

// launch starts the binary, by the command run if there is one.
func (s *stack) launch(t *testing.T, m *member, run []string, web string, args ...string) {
	t.Helper()
	m.url = "http://" + web
	if s.shape.clocks {
		m.clock = newClock(t)
		run = append(slices.Clone(run), m.clock.run...)
	}
	line := append(append(slices.Clone(run), binary), append(args, "--web.listen-address="+web)...)
	m.Process = testenv.Start(t, testenv.Command{
		Path: line[0], Args: line[1:], Env: s.env, Ready: testenv.Answering(m.url + "/-/ready"),
	})
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
	return startAllOn(t, filepath.Join(t.TempDir(), "data"))
}

func startAllOn(t *testing.T, data string) *stack {
	t.Helper()
	s := &stack{dir: t.TempDir()}
	config := writeFile(t, s.dir, "epimetheus.yml", commonConfig)
	m := s.start(t, testenv.FreeAddr(t), "all", "--config.file="+config, "--data.dir="+data, "--grpc.listen-address="+testenv.FreeAddr(t))
	m.dir = data
	s.gateways, s.ingesters, s.victim = []*member{m}, []*member{m}, m
	return s
}

// startRoles starts three ingesters and two gateways.
func startRoles(t *testing.T, s3 *testenv.S3Server) *stack {
	t.Helper()
	return startShape(t, s3, testenv.DynamoDBOn(t, t.TempDir()), shape{})
}

func startShape(t *testing.T, s3 *testenv.S3Server, db *testenv.DynamoDBServer, sh shape) *stack {
	t.Helper()
	s := &stack{dir: t.TempDir(), env: s3.Env(), s3: s3, db: db, shape: sh}
	if sh.s3 == "" {
		sh.s3 = s3.Endpoint
	}
	if sh.db == "" {
		sh.db = db.Endpoint
	}
	s.text = commonConfig + fmt.Sprintf(`
objects:
  type: s3
  s3: {bucket: %q, endpoint: %q, region: %q, path_style: true}
index:
  type: dynamodb
  dynamodb: {table: rows, endpoint: %q, region: %q}
`, s3.Bucket, sh.s3, s3.Region, sh.db, db.Region) + sh.more + sh.tls
	s.config = writeFile(t, s.dir, "epimetheus.yml", s.text)

	// Without its table an ingester says what to do.
	cmd := exec.CommandContext(t.Context(), binary, "ingester", "--config.file="+s.config, "--data.dir="+filepath.Join(s.dir, "x"))
	cmd.Env = append(os.Environ(), s.env...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "create-table") {
		t.Errorf("an ingester without a table: %v\n%s", err, out)
	}
	cmd = exec.CommandContext(t.Context(), binary, "tool", "create-table", "--config.file="+s.config)
	cmd.Env = append(os.Environ(), s.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("create-table: %v\n%s", err, out)
	}
	// Each joins by the addresses of all: one that restarts finds the others.
	var start []func()
	for range 3 {
		start = append(start, s.prepareIngester(t))
	}
	for i, m := range s.ingesters {
		start[i]()
		if i == 1 {
			s.victim = m
		} else {
			s.rest = append(s.rest, m)
		}
	}
	for i := range 2 {
		id := fmt.Sprintf("gateway-%d", i)
		host := "127.0.0.1"
		if len(sh.places) > 0 {
			host = sh.places[0].host // any address of the machine does that they can reach
			host = host[:strings.LastIndexByte(host, '.')] + ".1"
		}
		s.gateways = append(s.gateways, s.start(t, testenv.FreeAddr(t), append([]string{
			"gateway", "--config.file=" + s.config,
			"--data.dir=" + filepath.Join(s.dir, id), "--gossip.member-id=" + id, "--gossip.listen-address=" + freeAddrOn(t, host),
			"--grpc.listen-address=" + freeAddrOn(t, host),
		}, s.joinArgs()...)...))
	}
	return s
}

func (s *stack) joinArgs() []string {
	var args []string
	for _, j := range s.join {
		args = append(args, "--gossip.join="+j)
	}
	return args
}

// addIngester starts one more ingester.
func (s *stack) addIngester(t *testing.T) *member {
	t.Helper()
	s.prepareIngester(t)()
	return s.ingesters[len(s.ingesters)-1]
}

// prepareIngester makes one that start starts.
func (s *stack) prepareIngester(t *testing.T) (start func()) {
	t.Helper()
	i := len(s.ingesters)
	id := fmt.Sprintf("ingester-%d", i)
	pl := place{host: "127.0.0.1"}
	if i < len(s.shape.places) {
		pl = s.shape.places[i]
	}
	m := &member{dir: filepath.Join(s.dir, id)}
	config := s.config
	if s.shape.replicas > 1 {
		config = writeFile(t, s.dir, id+".yml", s.text+"ring: {zone: zone-of-"+id+"}\n")
	}
	grpc, gossip := freeAddrOn(t, pl.host), freeAddrOn(t, pl.host)
	args := []string{
		"ingester", "--config.file=" + config, "--data.dir=" + m.dir, "--gossip.member-id=" + id,
		"--gossip.listen-address=" + gossip, "--grpc.listen-address=" + grpc,
	}
	if s.shape.links {
		m.grpc, m.gossip = startLink(t, grpc), startLink(t, gossip)
		args = append(args, "--grpc.advertise-address="+m.grpc.addr, "--gossip.advertise-address="+m.gossip.addr)
		gossip = m.gossip.addr
	}
	if len(s.join) < 3 {
		s.join = append(s.join, gossip)
	}
	s.ingesters = append(s.ingesters, m)
	return func() {
		t.Helper()
		s.launch(t, m, pl.run, freeAddrOn(t, pl.host), append(args, s.joinArgs()...)...)
	}
}

// freeAddrOn is a free address, on an IP address that may be elsewhere.
func freeAddrOn(t *testing.T, host string) string {
	t.Helper()
	return strings.Replace(testenv.FreeAddr(t), "127.0.0.1", host, 1)
}

// tenant is a Prometheus with its sidecar.
type tenant struct {
	name    string
	prom    *testenv.PrometheusServer
	sidecar *member
	// logged is a data directory that has all that Prometheus has logged, where
	// its own has it no more.
	logged string
}

// startTenant starts a Prometheus that scrapes itself, the stack and an exporter
// of ours each second, and a sidecar beside it.
func startTenant(t *testing.T, s *stack, name, features string) *tenant {
	t.Helper()
	n := startPrometheus(t, s, name, "", "--enable-feature=exemplar-storage"+features)
	n.startSidecar(t, s)
	return n
}

// startPrometheus is startTenant without a sidecar. more is added to the
// configuration.
func startPrometheus(t *testing.T, s *stack, name, more string, args ...string) *tenant {
	t.Helper()
	return startPrometheusOn(t, s, "", name, more, args...)
}

func startPrometheusOn(t *testing.T, s *stack, dir, name, more string, args ...string) *tenant {
	t.Helper()
	targets := []string{startExporter(t)}
	for _, m := range append(append([]*member{s.victim}, s.gateways...), s.rest...) {
		targets = append(targets, strings.TrimPrefix(m.url, "http://"))
	}
	n := &tenant{name: name}
	n.prom = testenv.Prometheus(t, dir, fmt.Sprintf(`
global:
  scrape_interval: 1s
  external_labels: {cluster: cluster-of-%s, replica: "0"}
scrape_configs:
- job_name: all
  scrape_native_histograms: true
  always_scrape_classic_histograms: true
  static_configs: [{targets: ['%s']}]
`, name, strings.Join(targets, "', '"))+more, args...)
	return n
}

// restartPrometheus brings it back after it has ended.
func (n *tenant) restartPrometheus(t *testing.T) {
	t.Helper()
	n.prom.Process = n.prom.Restart(t)
}

// sidecarDir is where the sidecar keeps its account.
func (n *tenant) sidecarDir(s *stack) string { return filepath.Join(s.dir, "sidecar-"+n.name) }

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
	n.startSidecarOn(t, s, n.sidecarDir(s))
}

func (n *tenant) startSidecarOn(t *testing.T, s *stack, dir string) {
	t.Helper()
	args := []string{
		"sidecar", "--data.dir=" + dir, "--tenant=" + n.name,
		"--prometheus.data-dir=" + n.prom.Dir, "--prometheus.url=" + n.prom.URL,
	}
	for _, g := range s.gateways {
		args = append(args, "--gateway.url="+g.url)
	}
	text := s.shape.tls
	if s.shape.replicas > 1 {
		text += fmt.Sprintf("sidecar: {replication_factor: %d}\n", s.shape.replicas)
	}
	if text != "" {
		args = append(args, "--config.file="+writeFile(t, s.dir, "sidecar-"+n.name+".yml", text))
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
	var mu sync.Mutex // two Prometheis may scrape it
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
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

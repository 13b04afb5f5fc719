// Command demo runs Epimetheus beside a real Prometheus on this machine: a
// Prometheus that scrapes itself, Epimetheus and a node exporter, a sidecar that
// tails it, and `epimetheus all` on the embedded store. `make demo` builds what
// it needs and starts it.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

type options struct {
	bin, tools, dir                                     string
	gateway, grpc, prometheus, nodeExporter, sidecarWeb string
	runFor                                              time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.bin, "epimetheus", "bin/epimetheus", "the binary")
	flag.StringVar(&o.tools, "tools", ".tools/bin", "folder with prometheus and node_exporter")
	flag.StringVar(&o.dir, "dir", ".demo", "folder that keeps the data from one start to the next")
	flag.StringVar(&o.gateway, "gateway", "127.0.0.1:9009", "address of the gateway")
	flag.StringVar(&o.grpc, "grpc", "127.0.0.1:9010", "address of the ingester")
	flag.StringVar(&o.prometheus, "prometheus", "127.0.0.1:9090", "address of Prometheus")
	flag.StringVar(&o.nodeExporter, "node-exporter", "127.0.0.1:9100", "address of the node exporter")
	flag.StringVar(&o.sidecarWeb, "sidecar", "127.0.0.1:9013", "address of the sidecar's web page")
	flag.DurationVar(&o.runFor, "for", 0, "stop by itself after this time; exit code 0 only if the queries answered")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	for _, p := range []struct{ name, address, variable string }{
		{"the gateway", o.gateway, "DEMO_GATEWAY"},
		{"the ingester", o.grpc, "DEMO_GRPC"},
		{"Prometheus", o.prometheus, "DEMO_PROMETHEUS"},
		{"the node exporter", o.nodeExporter, "DEMO_NODE_EXPORTER"},
		{"the sidecar", o.sidecarWeb, "DEMO_SIDECAR"},
	} {
		l, err := net.Listen("tcp", p.address)
		if err != nil {
			return fmt.Errorf("the address %s for %s can't be used (%w): choose another, for example `make demo %s=127.0.0.1:19999`", p.address, p.name, err, p.variable)
		}
		l.Close()
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	prom := filepath.Join(dir, "prometheus")
	for _, d := range []string{"logs", "prometheus", "sidecar", "epimetheus"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	config := fmt.Sprintf(`global:
  scrape_interval: 5s
  external_labels: {cluster: demo}
scrape_configs:
- job_name: prometheus
  static_configs: [{targets: [%q]}]
- job_name: epimetheus
  static_configs: [{targets: [%q, %q]}]
- job_name: node
  static_configs: [{targets: [%q]}]
`, o.prometheus, o.gateway, o.sidecarWeb, o.nodeExporter)
	configFile := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(configFile, []byte(config), 0o644); err != nil {
		return err
	}
	epimetheusConfig := filepath.Join(dir, "epimetheus.yml")
	// Short flushes, so that blocks are seen soon.
	if err := os.WriteFile(epimetheusConfig, []byte("ingester:\n  flush_interval: 1m\n"), 0o644); err != nil {
		return err
	}

	began := time.Now()
	s := &stack{logs: filepath.Join(dir, "logs"), failed: make(chan error, 8)}
	defer s.stop()
	if err := s.start("epimetheus", o.bin, "all", "--config.file="+epimetheusConfig, "--data.dir="+filepath.Join(dir, "epimetheus"),
		"--web.listen-address="+o.gateway, "--grpc.listen-address="+o.grpc); err != nil {
		return err
	}
	if err := s.start("node_exporter", filepath.Join(o.tools, "node_exporter"), "--web.listen-address="+o.nodeExporter); err != nil {
		return err
	}
	if err := s.start("prometheus", filepath.Join(o.tools, "prometheus"), "--config.file="+configFile,
		"--storage.tsdb.path="+prom, "--web.listen-address="+o.prometheus); err != nil {
		return err
	}
	for _, u := range []string{"http://" + o.gateway, "http://" + o.prometheus} {
		if err := s.wait(ctx, u+"/-/ready", func(*http.Response) error { return nil }); err != nil {
			return err
		}
	}
	if err := s.start("sidecar", o.bin, "sidecar", "--data.dir="+filepath.Join(dir, "sidecar"), "--prometheus.data-dir="+prom,
		"--prometheus.url=http://"+o.prometheus, "--gateway.url=http://"+o.gateway, "--web.listen-address="+o.sidecarWeb); err != nil {
		return err
	}
	fmt.Println("started; waiting for the first sample to come out of the gateway")
	fresh := func() string { return fmt.Sprintf("up{cluster=\"demo\"} and timestamp(up) > %d", began.Unix()) }
	if err := s.waitQuery(ctx, o.gateway, fresh(), 1); err != nil {
		return err
	}
	fmt.Printf("first sample after %.1f s\n", time.Since(began).Seconds())
	if err := s.waitQuery(ctx, o.gateway, fresh(), 3); err != nil {
		return err
	}
	for _, q := range []string{
		`count by (job) (up == 1)`,
		`sum by (job) (scrape_samples_scraped)`,
		`count({__name__=~"epimetheus_.+"})`,
	} {
		result, err := query(ctx, o.gateway, q)
		if err != nil {
			return fmt.Errorf("query %s: %w", q, err)
		}
		if len(result) == 0 {
			return fmt.Errorf("query %s: no result", q)
		}
		fmt.Printf("\n%s\n", q)
		for _, r := range result {
			fmt.Printf("  %s = %v\n", labels(r.Metric), r.Value[1])
		}
	}
	fmt.Printf(`
Epimetheus remembers what Prometheus scrapes.

  gateway      http://%[1]s        (status page; the Prometheus HTTP API is below /api/v1)
  Prometheus   http://%[2]s
  sidecar      http://%[3]s
  data, logs   %[4]s

Try next:
  curl -s 'http://%[1]s/api/v1/query?query=up'
  curl -s 'http://%[1]s/api/v1/label/__name__/values'
  bin/epimetheus tool audit --prometheus http://%[2]s --gateway http://%[1]s
  in Grafana: add a Prometheus data source with the URL http://%[1]s
`, o.gateway, o.prometheus, o.sidecarWeb, dir)

	var end <-chan time.Time
	if o.runFor > 0 {
		end = time.After(time.Until(began.Add(o.runFor)))
	} else {
		fmt.Println("\nCtrl-C stops all of it; the next start goes on with the data of this one.")
	}
	select {
	case <-ctx.Done():
	case <-end:
		if _, err := query(context.Background(), o.gateway, "up"); err != nil {
			return err
		}
	case err := <-s.failed:
		return err
	}
	fmt.Println("stopping")
	return nil
}

// stack is what has been started, in order.
type stack struct {
	logs   string
	failed chan error // a process that ended by itself

	mu       sync.Mutex
	procs    []*proc
	stopping bool
}

type proc struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
}

func (s *stack) start(name, path string, args ...string) error {
	log, err := os.Create(filepath.Join(s.logs, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	p := &proc{name: name, cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us: we stop them in order
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	go func() { // ends with the process; stop waits for it
		err := p.cmd.Wait()
		close(p.done)
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.stopping {
			tail, _ := os.ReadFile(log.Name())
			s.failed <- fmt.Errorf("%s ended by itself: %w\n%s", name, err, bytes.TrimSpace(tail[max(0, len(tail)-2000):]))
		}
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs = append(s.procs, p)
	return nil
}

// stop ends what was started, the last first.
func (s *stack) stop() {
	s.mu.Lock()
	s.stopping = true
	procs := s.procs
	s.mu.Unlock()
	for _, p := range slices.Backward(procs) {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(time.Minute):
			fmt.Fprintf(os.Stderr, "demo: %s did not stop within a minute, it is killed\n", p.name)
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
}

const waitAtMost = 2 * time.Minute

// wait asks url until check is content.
func (s *stack) wait(ctx context.Context, url string, check func(*http.Response) error) error {
	ctx, cancel := context.WithTimeout(ctx, waitAtMost)
	defer cancel()
	for {
		err := get(ctx, url, check)
		if err == nil {
			return nil
		}
		select {
		case f := <-s.failed:
			return f
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for %s: %w (logs are in %s)", url, err, s.logs)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *stack) waitQuery(ctx context.Context, gateway, q string, atLeast int) error {
	return s.wait(ctx, queryURL(gateway, q), func(r *http.Response) error {
		v, err := decode(r)
		if err == nil && len(v) < atLeast {
			err = errors.New("no result yet")
		}
		return err
	})
}

func get(ctx context.Context, url string, check func(*http.Response) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(b))
	}
	return check(resp)
}

type sample struct {
	Metric map[string]string `json:"metric"`
	Value  [2]any            `json:"value"`
}

func labels(m map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s=%q", k, m[k]))
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

func queryURL(gateway, q string) string {
	return "http://" + gateway + "/api/v1/query?" + url.Values{"query": {q}}.Encode()
}

func query(ctx context.Context, gateway, q string) (result []sample, err error) {
	err = get(ctx, queryURL(gateway, q), func(r *http.Response) error {
		result, err = decode(r)
		return err
	})
	return result, err
}

func decode(r *http.Response) ([]sample, error) {
	var body struct {
		Data struct{ Result []sample }
	}
	err := json.NewDecoder(r.Body).Decode(&body)
	return body.Data.Result, err
}

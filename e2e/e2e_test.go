package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// binary is the epimetheus that TestMain has built.
var binary string

func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == clockTracer {
		os.Exit(traceClock(os.Args[2], os.Args[3:]))
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "epimetheus-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "epimetheus")
	if out, err := exec.Command("go", "build", "-o", binary, "../cmd/epimetheus").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	for _, v := range failed.list {
		fmt.Println(v)
	}
	return code
}

// failed is what was waited for in vain. It is told again at the end of the
// output, behind what the processes of all tests printed.
var failed verdicts

type verdicts struct {
	mu   sync.Mutex
	list []string
}

func (v *verdicts) add(text string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.list = append(v.list, text)
}

// TestAll is the scenario on one process with the embedded store.
func TestAll(t *testing.T) {
	t.Parallel()
	scenario(t, startAll(t))
}

// TestRoles is the scenario on three ingesters and two gateways, with S3 and
// DynamoDB over the wire.
func TestRoles(t *testing.T) {
	t.Parallel()
	s := startRoles(t, testenv.S3(t))
	for _, g := range s.gateways {
		metricIs(t, time.Minute, g.url, "epimetheus_gateway_workers", func(v float64) bool { return v == float64(len(s.gateways)) })
	}
	scenario(t, s)
}

// TestClearErrors: what is wrong is said in one line, with an exit code.
func TestClearErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.MkdirAll(filepath.Join(dir, "nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	write("nothing/foreign.txt", "an empty folder would pass: Prometheus may be about to start in it")
	dead := "http://127.0.0.1:1"
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"unknown key", []string{"tool", "check-config", write("key.yml", "ingester:\n  flush_intervall: 1m\n")}, 1, []string{"flush_intervall", "line 2"}},
		{"impossible value", []string{"tool", "check-config", write("value.yml", "tenancy: double\ningester:\n  flush_interval: 1ms\n")}, 1, []string{"tenancy", "single, header", "ingester.flush_interval", "1s"}},
		{"no such file", []string{"all", "--config.file=" + filepath.Join(dir, "absent.yml")}, 1, []string{"absent.yml", "no such file"}},
		{"unknown flag", []string{"all", "--nonsense"}, 2, []string{"--nonsense", "--help"}},
		{"no index for many", []string{"ingester", "--data.dir=" + dir}, 1, []string{"index.type", "dynamodb"}},
		{"unreachable bucket", []string{"all", "--data.dir=" + dir, "--config.file=" + write("bucket.yml", "objects:\n  type: s3\n  s3: {bucket: b, endpoint: '"+dead+"', region: r, path_style: true}\n")}, 1, []string{"objects", "127.0.0.1:1", "endpoint"}},
		{"unreachable table", []string{"all", "--data.dir=" + dir, "--config.file=" + write("table.yml", "index:\n  type: dynamodb\n  dynamodb: {table: x, endpoint: '"+dead+"', region: r}\n")}, 1, []string{"index.dynamodb", "127.0.0.1:1"}},
		{"no data directory", []string{"sidecar", "--data.dir=" + filepath.Join(dir, "s"), "--gateway.url=" + dead}, 1, []string{"--prometheus.data-dir"}},
		{"wrong data directory", []string{"sidecar", "--data.dir=" + filepath.Join(dir, "s"), "--gateway.url=" + dead, "--prometheus.data-dir=" + filepath.Join(dir, "nothing")}, 1, []string{"nothing"}},
		{"audit of nothing", []string{"tool", "audit", "--prometheus=" + filepath.Join(dir, "nothing"), "--gateway=" + dead}, 1, []string{"data directory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // one that does not stop is wrong
			defer cancel()
			cmd := exec.CommandContext(ctx, binary, c.args...)
			cmd.Env = append(os.Environ(), "AWS_ACCESS_KEY_ID=k", "AWS_SECRET_ACCESS_KEY=s", "AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1")
			var stderr strings.Builder
			cmd.Stderr = &stderr
			_ = cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != c.code {
				t.Errorf("exit code %d, want %d", got, c.code)
			}
			lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
			last := lines[len(lines)-1]
			for _, s := range c.says {
				if !strings.Contains(last, s) {
					t.Errorf("%q does not speak of %q", last, s)
				}
			}
		})
	}
}

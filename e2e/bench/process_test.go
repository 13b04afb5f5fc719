package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// binary is the one given, or one built as `make build` does.
func binary(tb testing.TB) string {
	tb.Helper()
	if *given != "" {
		return *given
	}
	return build(tb)
}

// build makes the binary as `make build` does.
func build(tb testing.TB) string {
	tb.Helper()
	binary := filepath.Join(tb.TempDir(), "epimetheus")
	cmd := exec.CommandContext(tb.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "./cmd/epimetheus")
	cmd.Dir = testenv.Root(tb)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build: %v\n%s", err, out)
	}
	return binary
}

// role is a running process of the binary.
type role struct {
	*testenv.Process
	url   string
	ready time.Duration // from exec to ready
}

func start(tb testing.TB, binary string, args ...string) *role {
	tb.Helper()
	return startAt(tb, testenv.FreeAddr(tb), binary, args...)
}

// startAt is start with a web address that is known before.
func startAt(tb testing.TB, web, binary string, args ...string) *role {
	tb.Helper()
	return startWith(tb, nil, web, binary, args...)
}

// startWith is startAt with more in the environment.
func startWith(tb testing.TB, env []string, web, binary string, args ...string) *role {
	tb.Helper()
	r := &role{url: "http://" + web}
	began := time.Now()
	r.Process = testenv.Start(tb, testenv.Command{
		Path: binary, Args: append(args, "--web.listen-address="+web), Env: env, Ready: testenv.Answering(r.url + "/-/ready"),
	})
	r.ready = time.Since(began)
	return r
}

// cpu is the user and system time of the process so far.
func (r *role) cpu(tb testing.TB) time.Duration {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.PID()))
	if err != nil {
		tb.Fatal(err)
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks int64
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		ticks += n
	}
	const ticksPerSecond = 100 // USER_HZ
	return time.Duration(ticks) * time.Second / ticksPerSecond
}

// children is the user and system time of the processes that have ended.
func children(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// memory is a field of /proc/PID/status in bytes: VmRSS or VmHWM.
func (r *role) memory(tb testing.TB, field string) float64 {
	tb.Helper()
	n, err := memoryOf(r.PID(), field)
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

// memoryOf is memory of a process.
func memoryOf(pid int, field string) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kb * 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in the status of process %d", field, pid)
}

func (r *role) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, b)
	}
	return b, err
}

// metric is the sum of the series of a metric that the process exposes.
func (r *role) metric(tb testing.TB, name string) float64 {
	tb.Helper()
	b, err := r.get(tb.Context(), "/metrics")
	if err != nil {
		tb.Fatal(err)
	}
	sum := 0.0
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' '):]), 64)
		if err != nil {
			tb.Fatal(err)
		}
		sum += v
	}
	return sum
}

// await polls until the condition holds.
func await(tb testing.TB, what string, limit time.Duration, every time.Duration, ok func() bool) {
	tb.Helper()
	tick := time.NewTicker(every)
	defer tick.Stop()
	deadline := time.After(limit)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// instant is the value of an instant query that gives at most one series.
func (r *role) instant(tb testing.TB, query string) (float64, bool) {
	tb.Helper()
	b, err := r.get(tb.Context(), "/api/v1/query?query="+url.QueryEscape(query))
	if err != nil {
		tb.Fatal(err)
	}
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		tb.Fatal(err)
	}
	if len(answer.Data.Result) == 0 {
		return 0, false
	}
	v, err := strconv.ParseFloat(answer.Data.Result[0].Value[1].(string), 64)
	if err != nil {
		tb.Fatal(err)
	}
	return v, true
}

// save keeps a profile of the process if -profiles is given.
func (r *role) save(tb testing.TB, path, name string) {
	tb.Helper()
	if *profiles == "" {
		return
	}
	b, err := r.get(context.WithoutCancel(tb.Context()), path)
	if err != nil {
		tb.Error(err)
		return
	}
	if err := os.WriteFile(filepath.Join(*profiles, name), b, 0o644); err != nil {
		tb.Error(err)
	}
}

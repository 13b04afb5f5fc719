// Package testenv starts the real servers that tests run against: an S3 server
// (versitygw), a DynamoDB server (dynalite), memcached, Prometheus.
//
// The binaries are those that `make tools` put into .tools at the root of the
// repository (EPIMETHEUS_TOOLS names another folder). A test that needs one that
// is absent fails and says so: a skipped test would look like a passed one.
//
// Every server listens on 127.0.0.1 on a port of its own, keeps its data in a
// temporary folder and is killed when the test ends. What it printed is shown if
// the test failed.
package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// startTimeout is how long a server may take until it answers, on a busy machine.
const startTimeout = 60 * time.Second

// stopTimeout is how long a server may take to end after it was asked to: an ingester
// has a minute for its last flush alone, and needs it where the disk is slow.
const stopTimeout = 2 * time.Minute

// Root is the root of the repository: the nearest folder above the working
// directory of the test that holds a go.mod.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
		if d == filepath.Dir(d) {
			t.Fatalf("no go.mod in or above %s", dir)
		}
	}
}

// Tool is the path of a tool, relative to the tools folder, such as
// "bin/prometheus". The test fails if it is absent.
func Tool(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("EPIMETHEUS_TOOLS")
	if dir == "" {
		dir = filepath.Join(Root(t), ".tools")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is absent: run `make tools`", path)
	}
	return path
}

// Ports of FreeAddr: below those that systems give to connections (Linux from
// 32768 on), or one of these might have taken it before the server does. Each
// process begins anywhere, and gives none twice until it has been around.
const firstPort, ports = 10_000, 22_000

var nextPort = func() *atomic.Uint32 {
	var n atomic.Uint32
	n.Store(rand.Uint32N(ports))
	return &n
}()

// FreeAddr is an address on the loopback interface that nobody listens on at the
// time of the call, for TCP or UDP.
func FreeAddr(t testing.TB) string {
	t.Helper()
	var err error
	for range ports {
		addr := fmt.Sprintf("127.0.0.1:%d", firstPort+nextPort.Add(1)%ports)
		if err = free(t.Context(), addr); err == nil {
			return addr
		}
	}
	t.Fatal(err)
	return ""
}

func free(ctx context.Context, addr string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer l.Close()
	p, err := lc.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return err
	}
	return p.Close()
}

// Command says how to start a process.
type Command struct {
	Path  string
	Args  []string
	Env   []string // in addition to the test's own
	Dir   string   // working directory; the test's own if empty
	Ready func(ctx context.Context) error
}

// Process is a running server. Its methods may be called from any goroutine.
type Process struct {
	Command Command

	name   string
	output string // file with what it printed
	cmd    *exec.Cmd
	done   chan struct{} // closed when the process has ended
	err    error         // of Wait; valid after done
}

// Start starts a process and waits until Ready returns nil. The process is
// killed when the test ends; a crash before that does not fail the test by itself.
func Start(t testing.TB, c Command) *Process {
	t.Helper()
	p := &Process{Command: c, name: filepath.Base(c.Path), done: make(chan struct{})}
	out, err := os.CreateTemp(t.TempDir(), p.name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	p.output = out.Name()
	defer out.Close()

	p.cmd = exec.Command(c.Path, c.Args...)
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Dir = c.Dir
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = processAttr()
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", c.Path, err)
	}
	go func() { // ends when the process does; Cleanup waits for it
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("output of %s %q:\n%s", p.name, c.Args, p.tail(8<<10))
		}
	})
	if c.Ready != nil {
		if err := p.waitReady(); err != nil {
			t.Fatalf("%s: %v\n%s", p.name, err, p.tail(8<<10))
		}
	}
	return p
}

// Restart starts the same command once more after the process has ended.
func (p *Process) Restart(t testing.TB) *Process {
	t.Helper()
	select {
	case <-p.done:
	default:
		t.Fatalf("%s still runs", p.name)
	}
	return Start(t, p.Command)
}

// PID is the id of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Output is all that the process has printed so far.
func (p *Process) Output() string {
	b, _ := os.ReadFile(p.output)
	return string(b)
}

// Kill ends the process with SIGKILL and returns when it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // fails only if it has ended already
	<-p.done
}

// Signal sends a signal to the process.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Stop asks the process to end with SIGTERM, waits for it and returns its exit code.
func (p *Process) Stop() (int, error) {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return -1, err
	}
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-time.After(stopTimeout):
		return -1, fmt.Errorf("%s has not ended %s after SIGTERM", p.name, stopTimeout)
	}
}

func (p *Process) waitReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := p.Command.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("ended before it was ready: %w", errors.Join(p.err, err))
		case <-ctx.Done():
			return fmt.Errorf("not ready after %s: %w", startTimeout, err)
		case <-tick.C:
		}
	}
}

func (p *Process) tail(n int) []byte {
	b, _ := os.ReadFile(p.output)
	if len(b) > n {
		b = append([]byte("…"), b[len(b)-n:]...)
	}
	return bytes.TrimSpace(b)
}

// Listening is a Ready function: something accepts connections at addr.
func Listening(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		d := net.Dialer{Timeout: time.Second}
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

// Answering is a Ready function: a GET of url answers 200.
func Answering(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		// It keeps no connection open, so that leak checks stay quiet.
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s", url, resp.Status)
		}
		return nil
	}
}

func port(addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		panic(err)
	}
	if _, err := strconv.Atoi(p); err != nil {
		panic(err)
	}
	return p
}

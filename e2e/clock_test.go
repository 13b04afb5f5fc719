package e2e

import (
	endian "encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// clockTracer as the first argument makes the test's binary run a program with a
// clock of its own.
const clockTracer = "trace-clock"

// killTraced is the signal by which a tracer kills (-9) its program, and ends when
// it is gone.
const killTraced = syscall.SIGUSR1

// clock is the wall clock of one process.
type clock struct {
	file string
	run  []string // command that runs a program by it
}

func newClock(t *testing.T) *clock {
	t.Helper()
	if !canFakeClock {
		t.Skip("the clock of a process can be changed on linux/amd64 only")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "clock")
	c := &clock{file: file, run: []string{self, clockTracer, file}}
	c.jump(t, 0)
	out, err := exec.CommandContext(t.Context(), c.run[0], clockTracer, file, "/bin/true").CombinedOutput()
	if err != nil {
		t.Skipf("no process can be traced on this machine: %v: %s", err, out)
	}
	return c
}

// jump sets the clock to what is true plus an offset.
func (c *clock) jump(t *testing.T, by time.Duration) {
	t.Helper()
	f, err := os.OpenFile(c.file, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [8]byte
	endian.LittleEndian.PutUint64(b[:], uint64(by))
	if _, err := f.WriteAt(b[:], 0); err != nil {
		t.Fatal(err)
	}
}

// kill ends a process that has a clock of its own with SIGKILL.
func (m *member) kill(t *testing.T) {
	t.Helper()
	if err := m.Signal(killTraced); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
}

// TestClock: the clocks of an ingester, of all of them, of the sidecar and of a
// gateway jump an hour ahead and an hour back while samples flow, are flushed, and
// processes are restarted. Prometheus's own is right all the time.
func TestClock(t *testing.T) {
	t.Parallel()
	s := startShape(t, testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir()), shape{clocks: true})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	audit := func() {
		t.Helper()
		auditLive(t, s, n, s.gateways[0].url, began, time.Now())
	}
	const waiting = "epimetheus_ingester_clock_waiting_sessions"
	none := func(v float64) bool { return v == 0 }
	n.scraping(t)
	audit()
	in := s.ingesters[1]

	step(t, "an ingester's clock jumps an hour ahead; it flushes, and is restarted")
	in.clock.jump(t, time.Hour)
	pause(t.Context(), 12*time.Second)
	audit()
	in.stop(t)
	in.restart(t)
	audit()
	step(t, "two hours back: its sources' samples would be from the future")
	in.clock.jump(t, -time.Hour)
	metricIs(t, time.Minute, in.url, waiting, more(0))
	audit()
	in.kill(t)
	in.restart(t)
	pause(t.Context(), 5*time.Second)
	audit()
	step(t, "it is right again")
	in.clock.jump(t, 0)
	metricIs(t, time.Minute, in.url, waiting, none)
	audit()

	step(t, "the clocks of all ingesters jump an hour back: samples wait in the WAL")
	for _, m := range s.ingesters {
		m.clock.jump(t, -time.Hour)
	}
	metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_wal_lag_bytes", more(0))
	s.ingesters[0].stop(t)
	s.ingesters[0].restart(t)
	eventually(t, time.Minute, "health of the sidecar", func() error {
		code, body, err := raw(t.Context(), n.sidecar.url+"/health", "")
		if err == nil && !strings.Contains(string(body), "see to the clocks") {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	n.scraping(t)
	for _, m := range s.ingesters {
		m.clock.jump(t, 0)
	}
	audit()

	for _, by := range []time.Duration{time.Hour, -time.Hour, 0} {
		step(t, "the clock of the sidecar is off by "+by.String())
		n.sidecar.clock.jump(t, by)
		pause(t.Context(), 3*time.Second)
		n.sidecar.kill(t)
		n.sidecar.restart(t)
		pause(t.Context(), 5*time.Second)
		audit()
	}
	g := s.gateways[0]
	for _, by := range []time.Duration{time.Hour, -time.Hour, 0} {
		step(t, "the clock of a gateway is off by "+by.String())
		g.clock.jump(t, by)
		pause(t.Context(), 3*time.Second)
		audit()
		g.stop(t)
		g.restart(t)
		audit()
	}

	for _, m := range s.ingesters {
		if v, err := metric(t.Context(), m.url, "epimetheus_ingester_refused_samples_total"); err == nil && v != 0 {
			t.Errorf("%v samples were refused", v)
		}
		metricIs(t, time.Minute, m.url, waiting, none)
	}
	keptAccount(t, n)
	for _, m := range slices.Concat([]*member{n.sidecar}, s.ingesters, s.gateways) {
		m.stop(t)
	}
}

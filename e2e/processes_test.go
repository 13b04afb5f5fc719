package e2e

import (
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// long skips a test that takes minutes, unless it was asked for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("EPIMETHEUS_LONG") == "" {
		t.Skip("takes minutes: run `make e2e-long`, or set EPIMETHEUS_LONG=1")
	}
}

// wipe removes what a process has on disk.
func wipe(t *testing.T, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
}

// TestProcessesDie: every process of a stack is killed, replaced, restarted in
// turn, added and taken away while samples flow.
func TestProcessesDie(t *testing.T) {
	t.Parallel()
	s := startRoles(t, testenv.S3(t))
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	audit := func() {
		t.Helper()
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	n.scraping(t)
	audit()
	answers := startHonesty(t, s, n)

	step(t, "each ingester is killed")
	for _, m := range s.ingesters {
		m.Kill()
		pause(t.Context(), time.Second)
		m.restart(t)
		pause(t.Context(), 3*time.Second)
	}
	audit()

	step(t, "all ingesters are killed at once")
	for _, m := range s.ingesters {
		m.Kill()
	}
	for _, m := range s.ingesters {
		m.restart(t)
	}
	audit()

	step(t, "all ingesters are restarted one by one")
	for _, m := range s.ingesters {
		m.stop(t)
		m.restart(t)
	}
	audit()

	step(t, "an ingester is added")
	added := s.addIngester(t)
	metricIs(t, time.Minute, added.url, "epimetheus_ingester_received_samples_total", more(0))
	audit()

	step(t, "one is taken away for good")
	s.ingesters[0].stop(t)
	ringGone(t, s.gateways[1], "ingester-0")
	pause(t.Context(), 3*time.Second)
	audit()

	running := s.ingesters[1:]
	t.Logf("up to here %d answers were right, %d warned, %d were errors", answers.same.Load(), answers.warned.Load(), answers.refused.Load())

	step(t, "each ingester is killed, its disk gone")
	for _, m := range running {
		m.Kill()
		wipe(t, m.dir)
		pause(t.Context(), time.Second)
		m.restart(t)
		pause(t.Context(), 2*time.Second)
	}
	audit()

	step(t, "all ingesters are killed at once, their disks gone")
	pause(t.Context(), 3*time.Second)
	for _, m := range running {
		m.Kill()
	}
	for _, m := range running {
		wipe(t, m.dir)
	}
	pause(t.Context(), 2*time.Second)
	for _, m := range running {
		m.restart(t)
	}
	audit()

	answers.end()
	if same, refused := answers.same.Load(), answers.refused.Load(); same < 10 || refused > same/10 { // a busy machine makes some time out
		t.Errorf("%d answers were right, %d queries were refused", same, refused)
	}

	step(t, "a gateway is killed, and the sidecar again and again")
	s.gateways[0].Kill()
	for i := range 6 {
		n.sidecar.Kill()
		n.sidecar.restart(t)
		pause(t.Context(), time.Duration(i)*300*time.Millisecond)
	}
	audit()
	s.gateways[0].restart(t)
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())

	step(t, "the sidecar's directory is deleted")
	keptAccount(t, n)
	n.sidecar.Kill()
	wipe(t, n.sidecarDir(s))
	pause(t.Context(), 2*time.Second)
	n.sidecar.restart(t)
	audit()
	keptAccount(t, n)
	for _, m := range slices.Concat([]*member{n.sidecar}, running, s.gateways) {
		m.stop(t)
	}
}

// TestFrozen: each kind of process stands still for a minute, as under a paused
// machine, and goes on.
func TestFrozen(t *testing.T) {
	long(t)
	t.Parallel()
	s := startRoles(t, testenv.S3(t))
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	pause(t.Context(), 5*time.Second)
	for _, c := range []struct {
		what  string
		procs []*testenv.Process
	}{
		{"an ingester", []*testenv.Process{s.ingesters[0].Process}},
		{"the sidecar", []*testenv.Process{n.sidecar.Process}},
		{"a gateway", []*testenv.Process{s.gateways[0].Process}},
		{"object store and index", []*testenv.Process{s.s3.Process, s.db.Process}},
		{"all ingesters", []*testenv.Process{s.ingesters[0].Process, s.ingesters[1].Process, s.ingesters[2].Process}},
	} {
		step(t, c.what+": stopped for a minute")
		signal := func(sig syscall.Signal) {
			for _, p := range c.procs {
				if err := p.Signal(sig); err != nil {
					t.Fatal(err)
				}
			}
		}
		signal(syscall.SIGSTOP)
		pause(t.Context(), time.Minute)
		if c.what != "the sidecar" {
			n.scraping(t)
		}
		signal(syscall.SIGCONT)
		for _, id := range []string{"ingester-0", "ingester-1", "ingester-2"} {
			ringState(t, s.gateways[1], id, ring.Active)
		}
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	keptAccount(t, n)
}

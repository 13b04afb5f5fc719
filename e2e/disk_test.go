package e2e

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// smallDisk is a folder on a file system of its own that holds few bytes.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("a small disk can't be mounted, that needs root: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	return dir
}

// fill takes all the room there is in a folder's file system, once more if it did
// before; the result gives it back.
func fill(t *testing.T, dir string) (release func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, chunk := range []int64{1 << 20, 4 << 10} {
		for err == nil {
			_, err = io.CopyN(f, rand.Reader, chunk)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// fails waits until a process has counted more failures than some. It takes the room
// that comes up on a full disk: a file was just being replaced when it got full, say.
func fails(t *testing.T, dir, base, name string, than float64) {
	t.Helper()
	metricIs(t, 2*time.Minute, base, name, func(v float64) bool {
		fill(t, dir)
		return v > than
	})
}

// TestDiskFull: the disks of a stack in one process, of a sidecar, and of its
// Prometheus are full for a while.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	disks := []string{smallDisk(t, "64m"), smallDisk(t, "32m"), smallDisk(t, "64m")}
	s := startAllOn(t, filepath.Join(disks[0], "data"))
	began := time.Now().Add(-time.Second)
	n := startPrometheusOn(t, s, filepath.Join(disks[2], "data"), "team-a", "", "--enable-feature=exemplar-storage")
	n.startSidecarOn(t, s, filepath.Join(disks[1], "sidecar"))
	metricIs(t, time.Minute, s.victim.url, "epimetheus_ingester_flushed_blocks_total", more(0))
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())

	step(t, "both disks are full")
	release := []func(){fill(t, disks[0]), fill(t, disks[1])}
	full := time.Now()
	fails(t, disks[0], s.victim.url, "epimetheus_ingester_flush_failures_total", 1)
	fails(t, disks[1], n.sidecar.url, "epimetheus_sidecar_checkpoint_errors_total", 1)
	n.scraping(t)
	eventually(t, time.Minute, "samples of after that are received", func() error {
		v, err := query(t.Context(), s.gateways[0].url, n.name, fmt.Sprintf("timestamp(up) > %d", full.Add(time.Second).Unix()))
		if err == nil && len(v.Result) == 0 {
			err = errors.New("none")
		}
		return err
	})

	step(t, "the process and the sidecar are killed, and find full disks when they start")
	s.victim.Kill()
	n.sidecar.Kill()
	for _, m := range []*member{s.victim, n.sidecar} {
		cmd := exec.CommandContext(t.Context(), binary, m.Command.Args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select { // it may run or end; what counts is what is there afterwards
		case err := <-done:
			t.Logf("%s on a full disk: %v", m.Command.Args[0], err)
		case <-time.After(3 * time.Second):
			t.Logf("%s on a full disk runs", m.Command.Args[0])
			_ = cmd.Process.Kill()
			<-done
		}
	}
	for _, r := range release {
		r()
	}
	step(t, "there is room again")
	s.victim.restart(t)
	n.sidecar.restart(t)
	metricIs(t, time.Minute, s.victim.url, "epimetheus_ingester_flushed_blocks_total", more(0))
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())

	step(t, "both are full once more, and go on by themselves")
	release = []func(){fill(t, disks[0]), fill(t, disks[1])}
	fails(t, disks[0], s.victim.url, "epimetheus_ingester_flush_failures_total", 0)
	for _, r := range release {
		r()
	}
	was, err := metric(t.Context(), s.victim.url, "epimetheus_ingester_flushed_blocks_total")
	if err != nil {
		t.Fatal(err)
	}
	metricIs(t, time.Minute, s.victim.url, "epimetheus_ingester_flushed_blocks_total", more(was))
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())

	step(t, "Prometheus's disk is full")
	free := fill(t, disks[2])
	eventually(t, time.Minute, "Prometheus to miss its disk", func() error {
		fill(t, disks[2])
		v, err := metric(t.Context(), n.prom.URL, "prometheus_tsdb_wal_writes_failed_total")
		if err == nil && v < 2 {
			err = fmt.Errorf("%v writes have failed", v)
		}
		return err
	})
	free()
	n.scraping(t)
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())
	keptAccount(t, n)
	n.sidecar.stop(t)
	s.victim.stop(t)
}

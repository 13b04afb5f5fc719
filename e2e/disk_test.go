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

// fill takes all the room there is in a folder's file system; the result gives
// it back.
func fill(t *testing.T, dir string) (release func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
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
	metricIs(t, time.Minute, s.victim.url, "epimetheus_ingester_flush_failures_total", more(1))
	metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_checkpoint_errors_total", more(1))
	n.scraping(t)
	if lag := freshness(t, s.gateways[0].url, n.name); lag > 20*time.Second {
		t.Errorf("fresh samples are not received: the newest is %s old", lag)
	}

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
	metricIs(t, time.Minute, s.victim.url, "epimetheus_ingester_flush_failures_total", more(0))
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

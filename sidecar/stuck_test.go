package sidecar

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// valve is a sink that takes nothing while it is shut.
type valve struct {
	sink
	shut atomic.Bool
}

func (v *valve) TrySend(b *shippb.Batch) (uint64, bool) {
	if v.shut.Load() {
		return 0, false
	}
	return v.sink.TrySend(b)
}

func (v *valve) State() ship.SessionState {
	s := v.sink.State()
	if v.shut.Load() {
		s.InflightBytes = s.WindowBytes
	}
	return s
}

// An owner that was left out with a batch stuck, and becomes the last one on the
// ring, gets samples again: as long as these can't be sent, their range must be
// entered as lost, or the checkpoint would pass them.
func TestStuckOwnerBecomesTheLast(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "wal"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "wal", "00000000"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sh, _, stop := benchShipper(t, dir, 2)
	defer stop()
	sh.opts.DetachAfter = time.Millisecond
	links := map[string]*valve{}
	sh.connect = func(m ring.Member) link {
		links[m.ID] = &valve{}
		return links[m.ID]
	}
	ctx := t.Context()
	sh.resplit()
	a := sh.owners["ingester-0"]
	ss := sh.sessionOf(ctx, a)
	ref := ss.say(labels.FromStrings("__name__", "x"))
	ss.float(ref, 0, 1000, 1)
	links["ingester-0"].shut.Store(true)
	sh.flush(ctx, ss)
	if !a.detached || ss.stuck == nil || !lostPart(sh.acc, "ingester-0") {
		t.Fatalf("a shut owner: detached %v, stuck %v, account %+v", a.detached, ss.stuck != nil, sh.acc)
	}

	// The other one leaves; this one is better than none.
	sh.ringWatch.ring = ring.New(ring.NewSnapshot([]ring.Member{{ID: "ingester-0", Address: "x", State: ring.Active}}))
	sh.resplit()
	if a.detached || !sh.owns(a) {
		t.Fatalf("the last owner: detached %v, owns %v", a.detached, sh.owns(a))
	}
	for i := range 3 { // ranges
		sh.acc = &account{}
		ss.float(ref, 0, int64(2000+i), 1)
		short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
		sh.flush(short, ss)
		cancel()
		if !lostPart(sh.acc, "ingester-0") {
			t.Fatalf("range %d: its samples can't be sent, but it isn't entered as lost: %+v", i, sh.acc)
		}
	}

	// It opens: what was stuck goes first, then the rest.
	links["ingester-0"].shut.Store(false)
	sh.acc = &account{}
	ss.float(ref, 0, 3000, 1)
	sh.flush(ctx, ss)
	if parts := sh.acc.parts(sh.split); len(parts) != 1 || parts[0].Copies[0].Lost || len(parts[0].Copies[0].Sent) != 1 || parts[0].Copies[0].Sent[0].Seq != 2 || ss.stuck != nil {
		t.Errorf("after it opened: %+v, stuck %v", parts, ss.stuck != nil)
	}
}

// While the tail waits for room in a window, what Prometheus writes meanwhile is
// kept, or it would be gone when the tail comes to it.
func TestKeepWhileStuck(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "wal"), 0o755); err != nil {
		t.Fatal(err)
	}
	segment := func(name string) string { return filepath.Join(dir, "wal", name) }
	if err := os.WriteFile(segment("00000000"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sh, _, stop := benchShipper(t, dir, 1)
	defer stop()
	v := &valve{}
	sh.connect = func(ring.Member) link { return v }
	sh.resplit()
	ss := sh.sessionOf(t.Context(), sh.owners["ingester-0"])
	ss.float(ss.say(labels.FromStrings("__name__", "x")), 0, 1000, 1)
	v.shut.Store(true)
	for _, name := range []string{"00000001", "00000002"} {
		if err := os.WriteFile(segment(name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	sh.flush(ctx, ss)
	for i := 1; i <= 2; i++ {
		if _, err := os.Stat(filepath.Join(sh.opts.DataDir, "segments", fmt.Sprintf("0-%08d", i))); err != nil {
			t.Errorf("a segment written while the tail waited isn't kept: %v", err)
		}
	}
}

// TestSlowDisk: while the disk takes as long as it likes for a checkpoint, samples are
// sent; the sidecar says what is wrong. Then checkpoints are written again.
func TestSlowDisk(t *testing.T) {
	h := newHarness(t, 2)
	w := h.wal()
	w.series(0, 10)
	w.scrape(0, 10, 1)
	h.run()
	h.want(w.all, false)
	// To open a pipe for writing takes until somebody reads, and it can't be synced.
	pipe := checkpointPath(h.dataDir) + ".tmp"
	eventually(t, "a pipe in place of the file", func() bool { return syscall.Mkfifo(pipe, 0o600) == nil })
	release := sync.OnceFunc(func() {
		f, err := os.Open(pipe)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := os.Remove(pipe); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(release) // or the sidecar couldn't stop
	ill := func() bool {
		for _, c := range h.sidecar.shipper.health.Conditions() {
			if strings.Contains(c.What, "under way to the disk") {
				return true
			}
		}
		return false
	}
	eventually(t, "a slow disk is told", ill)
	was := h.metric("epimetheus_sidecar_checkpoints_total")
	w.series(10, 20)
	w.scrape(0, 20, 2)
	h.want(w.all, false)
	if n := h.metric("epimetheus_sidecar_checkpoints_total"); n != was {
		t.Errorf("%v checkpoints were written meanwhile", n-was)
	}
	release()
	eventually(t, "checkpoints again", func() bool { return h.metric("epimetheus_sidecar_checkpoints_total") > was && !ill() })
}

func lostPart(a *account, member string) bool { return a.isLost(member) }

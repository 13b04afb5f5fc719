package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// shortBlocks let Prometheus compact and truncate its WAL every few seconds, as
// it does every two hours otherwise.
func shortBlocks() []string {
	return []string{"--storage.tsdb.min-block-duration=8s", "--storage.tsdb.max-block-duration=16s", "--enable-feature=exemplar-storage"}
}

// segments are the numbers of the files of a WAL.
func segments(t *testing.T, n *tenant) []int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.prom.Dir, "wal"))
	if err != nil {
		t.Fatal(err)
	}
	var nums []int
	for _, e := range entries {
		if i, err := strconv.Atoi(e.Name()); err == nil {
			nums = append(nums, i)
		}
	}
	slices.Sort(nums)
	return nums
}

// truncated waits until Prometheus has deleted all segments up to one.
func truncated(t *testing.T, n *tenant, segment int) {
	t.Helper()
	eventually(t, 4*time.Minute, "truncation of the WAL of "+n.name, func() error {
		if s := segments(t, n); len(s) == 0 || s[0] <= segment {
			return fmt.Errorf("segments %v, waiting for more than %d", s, segment)
		}
		return nil
	})
}

// keepCopy copies the data directory of a Prometheus that doesn't run.
func (n *tenant) keepCopy(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(dir, os.DirFS(n.prom.Dir)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// damage changes the newest segment in which there is something, which must be
// of a Prometheus that doesn't run.
func damage(t *testing.T, n *tenant, how func(path string, size int64) error) {
	t.Helper()
	for _, i := range slices.Backward(segments(t, n)) {
		path := filepath.Join(n.prom.Dir, "wal", fmt.Sprintf("%08d", i))
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() < 4<<10 {
			continue
		}
		if err := how(path, st.Size()); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no segment has anything in it")
}

// tear cuts a segment in the middle of a record, as a crash does.
func tear(path string, size int64) error { return os.Truncate(path, size-777) }

// flip changes a bit in the middle of a segment.
func flip(path string, size int64) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[size*2/3] ^= 1
	return os.WriteFile(path, b, 0o644)
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// jumpingTarget is configuration for a target whose timestamps are those of a
// clock that jumps, by so many ms.
func jumpingTarget(t *testing.T, jump *atomic.Int64) string {
	t.Helper()
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n++
		ms := time.Now().UnixMilli() + jump.Load()
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprintf(w, "test_clock %d %d\ntest_clock_total{a=\"b\"} %d %d\n", n%7, ms, n, ms)
	}))
	t.Cleanup(srv.Close)
	return fmt.Sprintf(`
- job_name: jumping
  static_configs: [{targets: [%q]}]
storage:
  tsdb: {out_of_order_time_window: 30m}
`, strings.TrimPrefix(srv.URL, "http://"))
}

// TestWAL: what can happen to the WAL of a Prometheus and to the sidecar beside
// it, each to a tenant of its own, beside one `epimetheus all`.
func TestWAL(t *testing.T) {
	t.Parallel()
	s := startAll(t)
	gw := s.gateways[0].url
	began := time.Now().Add(-time.Second)
	audit := func(n *tenant, from time.Time) {
		t.Helper()
		auditLive(t, s, n, gw, from, time.Now())
	}
	stop := func(n *tenant) {
		t.Helper()
		if code, err := n.prom.Stop(); err != nil || code != 0 {
			t.Errorf("prometheus: exit code %d, %v", code, err)
		}
	}

	// Prometheis that truncate: one whose sidecar will be away, one that has
	// blocks before it gets a sidecar.
	// A target of the former has only samples that are late.
	var behind, jump atomic.Int64
	behind.Store(-(25 * time.Second).Milliseconds())
	away := startPrometheus(t, s, "away", jumpingTarget(t, &behind), shortBlocks()...)
	away.startSidecar(t, s)
	late := startPrometheus(t, s, "late", "", shortBlocks()...)
	repaired := startTenant(t, s, "repaired", "")
	restored := startTenant(t, s, "restored", "")
	jumps := startPrometheus(t, s, "jumps", jumpingTarget(t, &jump))
	jumps.startSidecar(t, s)
	for _, n := range []*tenant{away, repaired, restored, jumps} {
		metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_shipped_samples_total", more(0))
	}
	pause(t.Context(), 5*time.Second)
	away.sidecar.Kill()
	awaySegments := segments(t, away)

	step(t, "a Prometheus is killed and its WAL torn, where the sidecar has not read it")
	const jumpAhead = 8 * time.Minute
	ahead := time.Now().Add(jumpAhead - time.Second)
	jump.Store(jumpAhead.Milliseconds())
	repaired.sidecar.Kill()
	pause(t.Context(), 3*time.Second)
	repaired.prom.Kill()
	repaired.logged = repaired.keepCopy(t)
	damage(t, repaired, tear)
	repaired.restartPrometheus(t)
	repaired.sidecar.restart(t)
	repaired.scraping(t)
	audit(repaired, began)

	step(t, "and again, while the sidecar runs, with a byte of what was read long ago changed")
	torn := time.Now()
	pause(t.Context(), 5*time.Second)
	repaired.prom.Kill()
	repaired.logged = repaired.keepCopy(t)
	damage(t, repaired, flip)
	repaired.restartPrometheus(t)
	repaired.scraping(t)
	audit(repaired, torn)

	step(t, "a data directory is restored from a copy that is older")
	jump.Store(-(5 * time.Minute).Milliseconds())
	stop(restored)
	older := restored.keepCopy(t)
	restored.restartPrometheus(t)
	restored.scraping(t)
	pause(t.Context(), 5*time.Second)
	stop(restored)
	restored.logged = filepath.Join(t.TempDir(), "newer")
	rename(t, restored.prom.Dir, restored.logged)
	rename(t, older, restored.prom.Dir)
	restored.restartPrometheus(t)
	restored.scraping(t)
	audit(restored, began)

	step(t, "a data directory is wiped")
	wiped := time.Now()
	pause(t.Context(), 3*time.Second)
	restored.prom.Kill()
	restored.logged = filepath.Join(t.TempDir(), "wiped")
	rename(t, restored.prom.Dir, restored.logged)
	restored.restartPrometheus(t)
	restored.scraping(t)
	audit(restored, wiped)

	step(t, "timestamps have jumped ahead and back")
	jump.Store(0)
	pause(t.Context(), 3*time.Second)
	// Not up to there in one: Prometheus has new samples in between all the time,
	// which need a moment to the gateway.
	audit(jumps, began.Add(-10*time.Minute))
	auditLive(t, s, jumps, gw, ahead, ahead.Add(20*time.Minute))

	step(t, "the sidecar comes back after the WAL was truncated: gaps are filled from blocks")
	truncated(t, away, awaySegments[len(awaySegments)-1]+1)
	away.sidecar.restart(t)
	audit(away, began)
	metricIs(t, time.Minute, away.sidecar.url, "epimetheus_sidecar_gaps_total", more(0))
	metricIs(t, 2*time.Minute, away.sidecar.url, "epimetheus_sidecar_gap_open", func(v float64) bool { return v == 0 })

	step(t, "a sidecar starts beside a Prometheus that has blocks")
	truncated(t, late, 1)
	late.startSidecar(t, s)
	audit(late, began)
	metricIs(t, time.Minute, late.sidecar.url, "epimetheus_sidecar_block_samples_total", more(0))

	step(t, "the sidecar's directory is deleted, where the WAL was truncated")
	away.sidecar.Kill()
	wipe(t, away.sidecarDir(s))
	away.sidecar.restart(t)
	away.scraping(t)
	audit(away, began)

	step(t, "a Prometheus whose WAL was truncated is killed")
	late.prom.Kill()
	late.restartPrometheus(t)
	late.scraping(t)
	audit(late, began)
	for _, n := range []*tenant{away, late, repaired, restored, jumps} {
		keptAccount(t, n)
		n.sidecar.stop(t)
	}
	s.victim.stop(t)
}

// TestAgent: what a Prometheus in agent mode logs comes out of the gateway. It
// is killed, and so is its sidecar.
func TestAgent(t *testing.T) {
	t.Parallel()
	s := startAll(t)
	began := time.Now().Add(-time.Second)
	n := startAgent(t, s, "team-a")
	pause(t.Context(), 10*time.Second)
	n.sidecar.Kill()
	pause(t.Context(), 2*time.Second)
	n.sidecar.restart(t)
	pause(t.Context(), 3*time.Second)
	n.prom.Kill()
	n.prom.Process = n.prom.Restart(t)
	pause(t.Context(), 6*time.Second)
	auditAgent(t, s, n, began, time.Now())
}

// auditAgent compares with the agent's WAL: it has no API to read samples by.
func auditAgent(t *testing.T, s *stack, n *tenant, from, to time.Time) {
	t.Helper()
	eventually(t, 2*time.Minute, "audit", func() error {
		out, err := s.runTool(t, "audit", "--prometheus="+n.prom.Dir, "--external-label=cluster=cluster-of-"+n.name, "--external-label=replica=0",
			"--gateway="+s.gateways[0].url, "--tenant="+n.name, "--from="+from.Format(time.RFC3339Nano), "--to="+to.Format(time.RFC3339Nano))
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		t.Log(out)
		return nil
	})
}

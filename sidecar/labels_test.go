package sidecar

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// Changed labels hold from when Prometheus took them, but not for what was sent
// already, which may be ahead of the clock.
func TestLabelsSince(t *testing.T) {
	now := time.UnixMilli(1_800_000_000_000)
	for _, c := range []struct {
		name                  string
		loaded, newest, since time.Duration // from now
	}{
		{"nothing sent since", -time.Minute, -time.Hour, -time.Minute},
		{"sent since", -time.Hour, -time.Second, -time.Second + time.Millisecond},
		{"a target is ahead", -time.Hour, 5 * time.Minute, 5*time.Minute + time.Millisecond},
		{"further than can be", -time.Hour, time.Hour, 10*time.Minute + time.Millisecond},
	} {
		if got, want := labelsSince(now.Add(c.loaded), now, now.Add(c.newest).UnixMilli()), now.Add(c.since).UnixMilli(); got != want {
			t.Errorf("%s: since %v, want %v", c.name, time.UnixMilli(got).Sub(now), c.since)
		}
	}
}

// Changed labels are on disk before anything is sent under them, so that a
// sidecar that is killed knows what was.
func TestLabelsAreWrittenFirst(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "wal"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "wal", "00000000"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sh, _, stop := benchShipper(t, dir, 1)
	defer stop()
	written := func() (names []string) {
		cp, err := loadCheckpoint(sh.opts.DataDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range cp.Labels {
			names = append(names, v.External.Get("v"))
		}
		return names
	}
	sh.takeLabels(t.Context(), labels.FromStrings("v", "1"), time.Time{})
	if d := cmp.Diff([]string{"1"}, written()); d != "" {
		t.Errorf("the first version (-want +written):\n%s", d)
	}

	blocked := checkpointPath(sh.opts.DataDir) + ".tmp"
	if err := os.Mkdir(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	sh.takeLabels(t.Context(), labels.FromStrings("v", "2"), time.Time{})
	if p := sh.versions.present; sh.version != p || p.external.Get("v") != "1" || !p.holds(math.MaxInt64-1) {
		t.Errorf("what couldn't be written is used: %+v", p)
	}

	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	sh.nextLabels = time.Time{}
	sh.takeLabels(t.Context(), labels.FromStrings("v", "2"), time.Time{})
	if d := cmp.Diff([]string{"1", "2"}, written()); d != "" || sh.version.external.Get("v") != "2" {
		t.Errorf("the second version (-want +written):\n%s", d)
	}
}

// What was sent between the last checkpoint and a kill keeps its labels if the
// next start has others.
func TestKilledBetweenCheckpoints(t *testing.T) {
	prom := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data := map[string]any{"yaml": "global: {}\n"}
		if r.URL.Path == "/api/v1/status/runtimeinfo" {
			data = map[string]any{"lastConfigTime": time.Now().Add(-time.Hour)}
		}
		json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": data})
	}))
	defer prom.Close()
	h := newHarness(t, 1)
	h.opts.PrometheusURL = prom.URL
	h.opts.CheckpointInterval = 10 * time.Second
	w := h.wal()
	w.series(1, 3)
	h.run()
	eventually(t, "the labels are known", func() bool { return h.sidecar.Status().LabelsKnown })
	w.scrape(1, 3, time.Now().UnixMilli())
	h.want(w.all, false)
	killed := t.TempDir()
	if err := os.CopyFS(killed, os.DirFS(h.dataDir)); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.dataDir, h.opts.DataDir = killed, killed
	h.opts.RelabelConfigs = []*relabel.Config{{
		Action: relabel.Replace, TargetLabel: "team", Replacement: "x", Regex: relabel.MustNewRegexp("(.*)"), Separator: ";", NameValidationScheme: model.UTF8Validation,
	}}
	h.run()
	eventually(t, "it has caught up", func() bool { st := h.sidecar.Status(); return !st.Time.IsZero() && st.LagBytes == 0 })
	w.scrape(1, 3, time.Now().Add(-time.Second).UnixMilli()) // comes after all that is sent again
	h.want(w.all, false)
}

// A series whose slot is given away is withdrawn under all versions of the labels
// that it was announced under, and no other.
func TestReleaseSlot(t *testing.T) {
	d := openTestDictionary(t, t.TempDir())
	vs := &labelVersions{}
	for i := range 3 {
		vs.add(int64(i), labels.FromStrings("v", fmt.Sprint(i)), "", nil)
	}
	a := &session{index: 1, extra: map[extraKey]uint32{{1, 1}: 10, {1, 2}: 11, {2, 1}: 12}}
	b := &session{index: 2, extra: map[extraKey]uint32{{1, 2}: 20, {3, 2}: 21}}
	s := &shipper{
		dict: d, versions: vs, opts: Options{Replicas: 1}, sessions: []*session{nil, a, b},
		others: map[extraKey]resolved{{1, 1}: {}, {2, 1}: {}},
	}
	i, _, err := d.define(1, seriesLabels(1), tail.Position{})
	if err != nil || i != 1 {
		t.Fatal(i, err)
	}
	d.at(i).session, d.at(i).ref = 2, 22
	s.releaseSlot(i)
	slices.Sort(a.withdraw)
	type state struct {
		A, B           map[extraKey]uint32
		Others         map[extraKey]resolved
		FromA, FromB   []uint32
		StillAnnounced uint16
	}
	want := state{
		A: map[extraKey]uint32{{2, 1}: 12}, B: map[extraKey]uint32{{3, 2}: 21}, Others: map[extraKey]resolved{{2, 1}: {}},
		FromA: []uint32{10, 11}, FromB: []uint32{22, 20},
	}
	got := state{a.extra, b.extra, s.others, a.withdraw, b.withdraw, d.at(i).session}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(extraKey{}, resolved{})); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

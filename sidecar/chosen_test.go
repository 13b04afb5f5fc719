package sidecar

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
)

const testLease = 1500 * time.Millisecond

// replicaOf makes a harness whose Prometheus has the same labels as another but
// for the replica's, on the same ingesters and gateway.
func (h *harness) replicaOf(name string) *harness {
	h.t.Helper()
	r := newHarness(h.t, 0)
	r.ingesters, r.gateway = h.ingesters, h.gateway
	r.opts.Gateways = h.opts.Gateways
	r.asReplica(name)
	return r
}

func (h *harness) asReplica(name string) {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "prometheus.yml")
	h.write(file, "cluster: c1\n    replica: "+name)
	h.opts.PrometheusConfigFile, h.opts.ReplicaLabel, h.lease = file, "replica", testLease
}

func (h *harness) write(file, external string) {
	h.t.Helper()
	if err := os.WriteFile(file, []byte("global:\n  external_labels:\n    "+external+"\n"), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// chosenWAL is a WAL whose series are to be sent without the replica's label.
func (h *harness) chosenWAL() *promWAL {
	w := h.wal()
	w.ext = labels.FromStrings("cluster", "c1")
	w.series(1, 10)
	return w
}

// decided is what the index has of the group from from on.
func (h *harness) decided(from time.Time) []choice.Interval {
	h.t.Helper()
	is, err := h.gateway.choices.Decided(h.t.Context(), "team", `{"cluster":"c1"}`, from.UnixMilli(), time.Now().Add(20*24*time.Hour).UnixMilli())
	if err != nil {
		h.t.Fatal(err)
	}
	return is
}

func ownerAt(is []choice.Interval, t int64) string {
	for _, x := range is {
		if x.From <= t && t < x.Until {
			return x.Replica
		}
	}
	return ""
}

// kept is what is to be kept of what replicas have written, by the claims.
func kept(is []choice.Interval, wals map[string]map[string]map[int64]string) map[string]map[int64]string {
	out := map[string]map[int64]string{}
	for name, all := range wals {
		for series, samples := range all {
			for t, v := range samples {
				if ownerAt(is, t) != name {
					continue
				}
				if out[series] == nil {
					out[series] = map[int64]string{}
				}
				out[series][t] = v
			}
		}
	}
	return out
}

// read waits until a sidecar has read and decided all of its WAL.
func (h *harness) read() {
	h.t.Helper()
	began := time.Now()
	eventually(h.t, "all is read", func() bool {
		st := h.sidecar.Status()
		return st.Time.After(began) && st.LagBytes == 0 && st.HeldSince == nil
	})
}

// Of two replicas one is chosen at a time; when it dies the other is, with a gap of
// a lease; when it is back nothing is doubled, and what ingesters lose comes back
// as it was.
func TestReplicaChosen(t *testing.T) {
	for _, copies := range []int{1, 2} {
		t.Run(fmt.Sprint("copies=", copies), func(t *testing.T) {
			t.Parallel()
			replicaChosen(t, copies)
		})
	}
}

func replicaChosen(t *testing.T, copies int) {
	t.Helper()
	a := newHarness(t, 2)
	a.asReplica("a")
	b := a.replicaOf("b")
	a.opts.Replicas, b.opts.Replicas = copies, copies
	wa, wb := a.chosenWAL(), b.chosenWAL()
	wals := map[string]map[string]map[int64]string{"a": wa.all, "b": wb.all}
	start := time.Now()
	var pause time.Duration // the longest that nothing was written: a busy machine
	last := start
	write := func(d time.Duration, ws ...*promWAL) {
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			pause, last = max(pause, time.Since(last)), time.Now()
			for i, w := range ws {
				if w != nil {
					w.scrape(1, 10, time.Now().UnixMilli()/10*10+int64(i))
				}
			}
		}
	}
	a.run()
	write(300*time.Millisecond, wa)
	a.want(wa.all, false)
	b.run()
	write(testLease, wa, wb)
	a.read()
	b.read()
	calm := len(a.decided(start)) == 1
	a.want(kept(a.decided(start), wals), false)
	if got := b.metric("epimetheus_sidecar_dropped_samples_total", "other_replica"); got == 0 {
		t.Error("nothing of the other was dropped")
	}
	eventually(t, "who is chosen is shown", func() bool {
		ra, rb := a.sidecar.Status().Replica, b.sidecar.Status().Replica
		return ra != nil && rb != nil && ra.Name == "a" && rb.Name == "b" && (!calm || ra.Chosen && !rb.Chosen)
	})

	// The sidecar of a dies, and its Prometheus writes on for a moment.
	a.stop()
	died := time.Now()
	write(100*time.Millisecond, wa, wb)
	write(4*testLease, nil, wb)
	b.read()
	is := b.decided(start)
	if n := len(is); is[n-1].Replica != "b" || is[n-1].From > died.Add(testLease+testLease/4+pause).UnixMilli() {
		t.Errorf("a died at %d; chosen: %v", died.UnixMilli(), is)
	}

	// It is back, with what it had not read. Then all ingesters lose everything.
	a.run()
	write(testLease, wa, wb)
	a.read()
	b.read()
	is = a.decided(start)
	a.want(kept(is, wals), false)
	for _, f := range a.ingesters {
		f.kill()
	}
	for _, f := range a.ingesters {
		f.start()
	}
	a.want(kept(is, wals), false)
	a.settled()
	b.settled()
	a.want(kept(is, wals), true)
	for series := range a.got(true) {
		if strings.Contains(series, "replica") {
			t.Errorf("%s has the replica's label", series)
		}
	}
	// No time is two's, and but for the one gap something was kept all along.
	var times []int64
	for _, samples := range a.got(true) {
		for t0 := range samples {
			times = append(times, t0)
		}
	}
	slices.Sort(times)
	bound := (testLease + testLease/4 + 2*pause).Milliseconds()
	for i := 1; i < len(times); i++ {
		if times[i]-times[i-1] > bound {
			t.Errorf("a gap of %d ms, the bound is %d", times[i]-times[i-1], bound)
		}
	}
	if pause < testLease/4 && len(is) != 2 {
		t.Errorf("more than one switch: %v", is)
	}
	// A claim serves for most of a lease.
	if n, most := a.gateway.claims, int(time.Since(start)/(testLease/4))+10; n > most {
		t.Errorf("%d claims, want at most %d", n, most)
	}
}

// While no gateway answers, what is read waits, over restarts and losses, and
// nothing of it is forgotten.
func TestHeld(t *testing.T) {
	h := newHarness(t, 2)
	h.asReplica("a")
	w := h.chosenWAL()
	now := time.Now().Add(-30 * time.Second).UnixMilli()
	h.run()
	for i := range int64(10) {
		w.scrape(1, 10, now+i)
	}
	h.want(w.all, false)
	claimed := func(on bool) {
		h.gateway.mu.Lock()
		defer h.gateway.mu.Unlock()
		h.gateway.noClaim = !on
	}
	claimed(false)
	before := w.clone()
	w.series(10, 15)
	now += testLease.Milliseconds() * 3
	for i := range int64(400) { // more than a segment
		w.scrape(1, 15, now+i)
	}
	eventually(t, "it is held", func() bool { return h.sidecar.Status().HeldSince != nil })
	eventually(t, "the checkpoint is at what is held", func() bool {
		for _, f := range h.ingesters {
			f.flush()
		}
		st := h.sidecar.Status()
		return st.Checkpoint == st.Position && st.OpenRanges == 0
	})
	at := h.sidecar.Status().Position
	// What was sent before is lost again and again meanwhile, also with the sidecar.
	for range 2 {
		w.scrape(1, 15, now+1000)
		w.remember(w.lsets[1], now+1000, w.all[w.lsets[1]][now+1000])
		h.ingesters[0].kill()
		h.ingesters[0].start()
		h.stop()
		h.run()
		eventually(t, "it is held", func() bool { return h.sidecar.Status().HeldSince != nil })
		now++
	}
	if got := h.sidecar.Status(); got.Position != at || got.Checkpoint != at {
		t.Errorf("held at %v with the checkpoint at %v, want %v", got.Position, got.Checkpoint, at)
	}
	if got := h.got(true); len(got) != len(before) {
		t.Errorf("%d series were sent before it was known whose they are", len(got))
	}
	if h.sidecar.Status().Replica.Error == "" {
		t.Error("the status doesn't say why")
	}
	claimed(true)
	h.settled()
	h.want(w.all, true)
	if st := h.sidecar.Status(); st.HeldSince != nil {
		t.Errorf("still held since %s", st.HeldSince)
	}
}

func (w *promWAL) clone() map[string]map[int64]string {
	out := map[string]map[int64]string{}
	for s, m := range w.all {
		out[s] = map[int64]string{}
		maps.Copy(out[s], m)
	}
	return out
}

// Samples of the future go by the choice for the present, and claims don't reach
// out for them.
func TestHeldFuture(t *testing.T) {
	h := newHarness(t, 1)
	h.asReplica("a")
	w := h.chosenWAL()
	h.run()
	start := time.Now()
	for i := range int64(20) {
		for _, ahead := range []time.Duration{0, time.Second / 4, 5 * time.Minute, 15 * 24 * time.Hour} {
			w.scrape(1, 10, time.Now().Add(ahead).UnixMilli()/100*100+i)
		}
		time.Sleep(20 * time.Millisecond)
	}
	h.want(w.all, false)
	is := h.decided(start)
	if end := is[len(is)-1].Until; end > time.Now().Add(testLease+testLease/2).UnixMilli() {
		t.Errorf("claimed: %v, now it is %d", is, time.Now().UnixMilli())
	}
	// Only such samples, after a pause in which nobody claimed.
	h.stop()
	h.gateway.choices.Claim(t.Context(), "team", `{"cluster":"c1"}`, "b", is[len(is)-1].Until, is[len(is)-1].Until+1)
	time.Sleep(2 * testLease)
	h.run()
	w.scrape(1, 10, time.Now().Add(6*time.Minute).UnixMilli())
	h.want(w.all, false)
}

func withCluster(all map[string]map[int64]string) map[string]map[int64]string {
	out := map[string]map[int64]string{}
	for s, m := range all {
		out[strings.Replace(s, `__name__="m", `, `__name__="m", cluster="c1", `, 1)] = m
	}
	return out
}

// What Prometheus truncates while it isn't known who is chosen comes from blocks,
// once it is.
func TestHeldGap(t *testing.T) {
	h := newHarness(t, 2)
	h.asReplica("a")
	h.lease = 8 * time.Second
	h.opts.BackfillAge, h.opts.KeepBytes = -1, 1
	d := h.openDB()
	d.put(time.Minute)
	h.run()
	h.want(withCluster(d.all), false)
	h.settled()
	h.gateway.mu.Lock()
	h.gateway.noClaim = true
	h.gateway.mu.Unlock()
	d.put(3 * time.Minute)
	eventually(t, "it is held", func() bool { return h.sidecar.Status().HeldSince != nil })
	for range 12 {
		d.put(3 * time.Minute)
		d.compact()
		time.Sleep(5 * h.opts.CheckpointInterval) // blocks are seen, and are not known
	}
	eventually(t, "what was truncated is let go", func() bool { return h.metric("epimetheus_sidecar_dropped_wal_files_total") > 0 })
	h.gateway.mu.Lock()
	h.gateway.noClaim = false
	h.gateway.mu.Unlock()
	h.want(withCluster(d.all), false)
	if h.metric("epimetheus_sidecar_gaps_total") == 0 {
		t.Error("nothing was missed")
	}
	if is := h.decided(time.UnixMilli(d.now).Add(-24 * time.Hour)); slices.ContainsFunc(is, func(x choice.Interval) bool { return x.Replica != "a" }) {
		t.Errorf("chosen: %v", is)
	}
}

// The history in blocks, and what fills a gap, obeys the choice too.
func TestChosenBackfill(t *testing.T) {
	a := newHarness(t, 2)
	a.asReplica("a")
	b := a.replicaOf("b")
	b.opts.PrometheusConfigFile = filepath.Join(t.TempDir(), "b.yml")
	b.write(b.opts.PrometheusConfigFile, "cluster: c1\n    replica: b")
	da, db := a.openDB(), b.openDB()
	db.now = da.now + 1
	a.lease, b.lease = 20*time.Second, 20*time.Second
	start := time.UnixMilli(da.now)
	for _, d := range []*promDB{da, db} {
		d.put(20 * time.Minute)
		d.compact()
		if len(d.db.Blocks()) == 0 {
			t.Fatal("no block")
		}
	}
	da.put(time.Minute)
	db.put(5 * time.Minute)
	a.run()
	b.run()
	done := func(h *harness) func() bool {
		return func() bool {
			for _, f := range h.ingesters {
				f.flush()
			}
			st := h.sidecar.Status()
			return !st.Time.IsZero() && len(st.Fills) == 0 && h.sidecar.shipper.blocks != nil && st.LagBytes == 0 && st.HeldSince == nil && st.OpenRanges == 0 && st.Series > 0
		}
	}
	eventually(t, "a is done", done(a))
	eventually(t, "b is done", done(b))
	// The gateway may not have heard of all when the last block was done.
	a.settled()
	b.settled()
	is := a.decided(start)
	a.want(kept(is, map[string]map[string]map[int64]string{"a": withCluster(da.all), "b": withCluster(db.all)}), true)
	names := map[string]bool{}
	for _, x := range is {
		names[x.Replica] = true
	}
	if len(names) != 2 {
		t.Logf("one has all of it: %v", is)
	}
}

// Without its label a replica sends nothing, and says so.
func TestReplicaWithoutName(t *testing.T) {
	h := newHarness(t, 1)
	h.asReplica("a")
	h.write(h.opts.PrometheusConfigFile, "cluster: c1")
	w := h.chosenWAL()
	w.scrape(1, 10, time.Now().UnixMilli())
	h.run()
	eventually(t, "it says so", func() bool { return strings.Contains(fmt.Sprint(h.sidecar.Ready()), `"replica"`) })
	if got := h.got(false); len(got) > 0 {
		t.Errorf("sent: %v", got)
	}
	h.write(h.opts.PrometheusConfigFile, "cluster: c1\n    replica: x")
	h.want(w.all, false)
	// With the label kept, from now on, it is as for anybody else.
	h.settled()
	h.stop()
	h.opts.ReplicaLabel = ""
	h.gateway.mu.Lock()
	h.gateway.noClaim = true
	h.gateway.mu.Unlock()
	time.Sleep(5 * time.Millisecond)
	w.ext = labels.FromStrings("cluster", "c1", "replica", "x")
	h.run()
	eventually(t, "labels are known", func() bool { return h.sidecar.Status().ExternalLabels.Get("replica") == "x" })
	s := []record.RefSample{{Ref: chunks.HeadSeriesRef(1), T: time.Now().Add(time.Second).UnixMilli(), V: 1}}
	w.log(w.enc.Samples(s, nil))
	w.remember(w.sent(labels.FromStrings("__name__", "metric_1", "i", "1")), s[0].T, "0 3ff0000000000000")
	h.want(w.all, false)
}

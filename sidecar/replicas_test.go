package sidecar

import (
	"fmt"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// inZones puts the ingesters on the ring, each in a zone of its own.
func (g *fakeGateway) inZones(ingesters ...*fakeIngester) {
	g.set(ingesters...)
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.members {
		g.members[i].Zone = "zone-of-" + g.members[i].ID
	}
}

// copiesOf counts the ingesters that hold each sample.
func (h *harness) copiesOf(from ...*fakeIngester) map[string]int {
	out := map[string]int{}
	for _, f := range from {
		f.mu.Lock()
		mine := map[string]bool{}
		for _, m := range []map[string]map[int64]string{f.durable, f.memory} {
			for series, samples := range m {
				for t := range samples {
					mine[fmt.Sprint(series, t)] = true
				}
			}
		}
		f.mu.Unlock()
		for k := range mine {
			out[k]++
		}
	}
	return out
}

// each says whether each sample that was written is held n times at least.
func (h *harness) each(w *promWAL, n int, from ...*fakeIngester) bool {
	held := h.copiesOf(from...)
	for series, samples := range w.all {
		for t := range samples {
			if held[fmt.Sprint(series, t)] < n {
				return false
			}
		}
	}
	return true
}

func startReplicas(t *testing.T, replicas int) (*harness, *promWAL) {
	h := newHarness(t, 3)
	h.gateway.inZones(h.ingesters...)
	h.opts.Replicas = replicas
	w := h.wal()
	h.run()
	w.series(1, 101)
	for ts := range int64(10) {
		w.scrape(1, 101, 1000+ts)
	}
	return h, w
}

// Each sample goes to as many ingesters as it should, and to no more.
func TestReplicas(t *testing.T) {
	for replicas := 1; replicas <= 3; replicas++ {
		h, w := startReplicas(t, replicas)
		eventually(t, "all is held", func() bool { return h.each(w, replicas, h.ingesters...) })
		for k, n := range h.copiesOf(h.ingesters...) {
			if n != replicas {
				t.Fatalf("%d replicas: %s is held %d times", replicas, k, n)
			}
		}
		eventually(t, "as many copies", func() bool { return h.sidecar.Status().Copies == replicas })
		h.settled()
		h.want(w.all, true)
		h.stop()
	}
}

// One replica dies. Nothing is read again, what comes while it is missing is at
// the others, and the checkpoint goes on with what they make durable.
func TestReplicaDies(t *testing.T) {
	h, w := startReplicas(t, 2)
	eventually(t, "two copies", func() bool { return h.each(w, 2, h.ingesters...) && h.sidecar.Status().Copies == 2 })
	dead, left := h.ingesters[1], h.ingesters[:1:1]
	left = append(left, h.ingesters[2])
	dead.kill()
	for ts := range int64(10) {
		w.scrape(1, 101, 2000+ts)
		eventually(t, "fresh samples are at another", func() bool { return h.each(w, 1, left...) })
	}
	eventually(t, "one copy of what it had", func() bool { return h.sidecar.Status().Copies == 1 })
	c := h.sidecar.shipper.coverage.Load()
	for _, o := range c.Holders {
		if o.Member == dead.id {
			t.Errorf("the dead one is said to hold something: %v", c)
		}
	}
	// It is left out then, and what comes has two copies again.
	eventually(t, "it is left out", func() bool { return h.metric("epimetheus_sidecar_detached_owners") == 1 })
	for _, f := range left {
		f.flush()
	}
	w.scrape(1, 101, 3000)
	eventually(t, "two copies again", func() bool { return h.sidecar.Status().Copies == 2 })
	if n := h.metric("epimetheus_sidecar_resent_samples_total"); n != 0 {
		t.Errorf("%v samples were sent again", n)
	}
	dead.start()
	w.scrape(1, 101, 4000)
	h.settled()
	h.want(w.all, true)
}

// Both replicas of something die: it is sent again.
func TestReplicasDie(t *testing.T) {
	h, w := startReplicas(t, 2)
	eventually(t, "two copies", func() bool { return h.each(w, 2, h.ingesters...) })
	for _, f := range h.ingesters[1:] {
		f.kill()
	}
	for _, f := range h.ingesters[1:] {
		f.start()
	}
	w.scrape(1, 101, 2000)
	eventually(t, "all is held again", func() bool { return h.each(w, 1, h.ingesters...) })
	h.settled()
	h.want(w.all, true)
	if h.metric("epimetheus_sidecar_resent_samples_total") == 0 {
		t.Error("nothing was sent again")
	}
}

// A replica that takes nothing doesn't hold back the others, nor the checkpoint.
func TestReplicaStalls(t *testing.T) {
	h, w := startReplicas(t, 2)
	h.opts.DetachAfter = 5 * time.Second
	h.stop()
	h.run()
	eventually(t, "two copies", func() bool { return h.each(w, 2, h.ingesters...) })
	slow := h.ingesters[0]
	slow.set(func() { slow.stalled = true })
	others := h.ingesters[1:]
	began := time.Now()
	for ts := range int64(600) { // beyond what windows and buffers hold
		w.scrape(1, 101, 2000+ts)
	}
	w.series(101, 20101)
	for ts := range int64(8) {
		w.scrape(101, 20101, 3000+ts)
	}
	eventually(t, "the others have all", func() bool { return h.each(w, 1, others...) })
	t.Logf("behind a stalled replica: %s", time.Since(began))
	for _, f := range others {
		f.flush()
	}
	slow.set(func() { slow.stalled = false })
	w.scrape(1, 101, 9000)
	h.settled()
	h.want(w.all, true)
}

// A replica that refuses what others take doesn't count.
func TestReplicaRefuses(t *testing.T) {
	h := newHarness(t, 3)
	h.gateway.inZones(h.ingesters...)
	h.opts.Replicas = 2
	h.ingesters[0].refuse = "metric_3"
	w := h.wal()
	h.run()
	w.series(1, 101)
	w.scrape(1, 101, 1000)
	eventually(t, "all is held", func() bool { return h.each(w, 1, h.ingesters[1:]...) })
	flushed := time.Now()
	eventually(t, "a status of after the flush", func() bool {
		h.ingesters[0].flush()
		return h.sidecar.Status().Time.After(flushed.Add(200 * time.Millisecond))
	})
	if st := h.sidecar.Status(); st.Checkpoint == st.Position || st.OpenRanges == 0 || st.Copies > 1 {
		t.Errorf("what one replica has refused is relied on: %+v", st)
	}
	h.ingesters[1].kill()
	h.ingesters[1].start()
	eventually(t, "what it alone had is sent again", func() bool { return h.each(w, 1, h.ingesters...) })
	h.settled()
	h.want(w.all, true)
}

// Members come, go and change places while samples flow.
func TestReplicasMove(t *testing.T) {
	h, w := startReplicas(t, 2)
	all := h.ingesters
	more := newFakeIngester(t, "ingester-9")
	h.ingesters = append(h.ingesters[:3:3], more)
	for i, now := range [][]*fakeIngester{{all[0], all[1]}, {all[0], all[1], more}, {more}, {all[2], more}, {all[0], all[1], all[2], more}} {
		h.gateway.inZones(now...)
		for ts := range int64(5) {
			w.scrape(1, 101, 2000+int64(i)*100+ts)
			time.Sleep(5 * time.Millisecond)
		}
		eventually(t, "all is held", func() bool { return h.each(w, 1, h.ingesters...) })
	}
	h.settled()
	h.want(w.all, true)
}

func TestSplitSets(t *testing.T) {
	var ms []ring.Member
	for i := range 5 {
		ms = append(ms, ring.Member{ID: fmt.Sprint("m", i), State: ring.Active})
	}
	sp := &split{ring: ring.New(ring.NewSnapshot(ms)), replicas: 2, excluded: map[string]bool{"m3": true}, index: map[string]uint16{}, byKey: map[setKey]uint32{}}
	for _, m := range ms {
		if m.ID != "m3" {
			sp.index[m.ID] = uint16(len(sp.owners))
			sp.owners = append(sp.owners, &owner{member: m})
		}
	}
	for tok := range uint32(5000) {
		tok *= 800_000
		set := sp.sets[sp.set(tok)]
		first, _ := sp.member(tok)
		if len(set.owners) != 2 || sp.owners[set.owners[0]].member.ID != first.ID {
			t.Fatalf("set %+v, first owner %s", set, first.ID)
		}
	}
	if len(sp.sets) > 12 {
		t.Errorf("%d sets of 2 of 4", len(sp.sets))
	}
}

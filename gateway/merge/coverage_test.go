package merge

import (
	"slices"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// world is three ingesters in zones of their own, each of process p1, that have
// all heard of one source with two replicas of each series.
type world struct {
	members []ring.Member
	heads   map[string]fetch.Header
	before  map[string]heard // what each said some seconds ago
}

var now = time.Unix(1_700_000_000, 0)

func source(id uint64, age time.Duration, copies, zones int, holders ...fetch.Holder) fetch.Coverage {
	return fetch.Coverage{Sources: []uint64{id}, Age: age, ReplicationFactor: 2, Copies: copies, Zones: zones, Holders: holders}
}

func in(process string, members ...string) (out []fetch.Holder) {
	for _, m := range members {
		out = append(out, fetch.Holder{Member: m, Process: process})
	}
	return out
}

func newWorld(cs ...fetch.Coverage) *world {
	w := &world{heads: map[string]fetch.Header{}, before: map[string]heard{}}
	if len(cs) == 0 {
		cs = []fetch.Coverage{source(1, time.Second, 2, 2, in("p1", "a", "b", "c")...)}
	}
	for _, id := range []string{"a", "b", "c"} {
		w.members = append(w.members, ring.Member{ID: id, Zone: "zone-" + id, State: ring.Active})
		w.heads[id] = fetch.Header{Process: []byte("p1"), Coverage: cs}
		w.before[id+"\x00"] = heard{at: now.Add(-time.Minute), coverage: cs}
	}
	return w
}

func (w *world) say(id string, cs ...fetch.Coverage) *world {
	h := w.heads[id]
	h.Coverage = cs
	w.heads[id] = h
	return w
}

func (w *world) miss(ids ...string) *coverage {
	c := &coverage{members: w.members}
	for _, m := range w.members {
		if slices.Contains(ids, m.ID) {
			c.missing = append(c.missing, m)
		} else if h, ok := w.heads[m.ID]; ok {
			c.answers = append(c.answers, heading{m, h})
		}
	}
	c.collect()
	return c
}

func TestCovers(t *testing.T) {
	all := in("p1", "a", "b", "c")
	check := func(what string, w *world, want bool, missing ...string) {
		t.Helper()
		if got := w.miss(missing...).covers(w.before, now); got != want {
			t.Errorf("%s: covered %v, want %v", what, got, want)
		}
	}
	check("one of three", newWorld(), true, "a")
	check("two of three", newWorld(), false, "a", "b")
	check("all", newWorld(), false, "a", "b", "c")
	check("one copy of something, the missing one is known to be", newWorld(source(1, 0, 1, 1, in("p1", "b", "c")...)), true, "a")
	check("one copy of something, another is missing", newWorld(source(1, 0, 1, 1, in("p1", "b", "c")...)), false, "b")
	check("nothing is known", newWorld(source(1, 0, 0, 0)), false, "a")
	check("not heard of for long", newWorld(source(1, 20*time.Second, 2, 2, all...)), false, "a")
	check("heard of by one", newWorld(source(1, 20*time.Second, 2, 2, all...)).say("c", source(1, time.Second, 2, 2, all...)), true, "a")
	check("the newest counts", newWorld(source(1, 5*time.Second, 2, 2, all...)).say("c", source(1, time.Second, 1, 1, all...)), false, "a")
	check("another has restarted", newWorld(source(1, time.Second, 2, 2, append(in("p0", "b"), in("p1", "a", "c")...)...)), false, "a")
	check("no source at all", newWorld(fetch.Coverage{ReplicationFactor: 1}), false, "a")
	check("a source with one replica", newWorld().say("b", source(1, 0, 2, 2, all...), fetch.Coverage{ReplicationFactor: 1}), false, "a")

	w := newWorld()
	w.before["a\x00"] = heard{at: now, coverage: []fetch.Coverage{{ReplicationFactor: 1}}}
	check("the missing one had a source with one replica", w, false, "a")
	w = newWorld()
	w.before["a\x00"] = heard{at: now, coverage: []fetch.Coverage{source(7, 0, 2, 2, all...)}}
	check("the missing one had a source that nobody else knows", w, false, "a")
	w = newWorld()
	delete(w.before, "a\x00")
	check("the missing one was never asked", w, false, "a")
	w.before["a\x00"] = heard{at: now.Add(-2 * time.Hour), coverage: nil}
	check("the missing one was asked long ago", w, false, "a")
	w.before["a\x00"] = heard{at: now, coverage: nil}
	check("the missing one had nothing of the tenant", w, true, "a")

	// A zone with two members goes; the copies are in two zones.
	w = newWorld(source(1, 0, 2, 2, in("p1", "a", "b", "c", "d")...))
	w.members = append(w.members, ring.Member{ID: "d", Zone: "zone-a", State: ring.Lost})
	w.before["d\x00"] = heard{at: now, coverage: nil}
	check("two members of one zone", w, true, "a", "d")
	check("two members of two zones", w, false, "b", "d")
	// One of the source's owners isn't on the ring any more.
	check("an owner is gone from the ring", newWorld(source(1, 0, 2, 2, in("p1", "a", "b", "z")...)), false, "a")
	w = newWorld(source(1, 0, 2, 2, in("p1", "a", "b", "z")...))
	w.members = append(w.members, ring.Member{ID: "z", State: ring.Left})
	check("an owner has left", w, true, "a")
}

func TestRestarted(t *testing.T) {
	for _, c := range []struct {
		what          string
		x             fetch.Coverage
		lacking, some bool
	}{
		{"none", source(1, 0, 2, 2, in("p1", "a", "b")...), false, false},
		{"one of two copies", source(1, 0, 2, 2, append(in("p0", "a"), in("p1", "b")...)...), false, true},
		{"the only copy", source(1, 0, 1, 1, in("p0", "a")...), true, true},
		{"the only copy, long ago", source(1, time.Minute, 1, 1, in("p0", "a")...), false, false},
		{"one replica", fetch.Coverage{ReplicationFactor: 1}, false, false},
	} {
		lacking, some := newWorld(c.x).miss().restarted()
		if lacking != c.lacking || some != c.some {
			t.Errorf("%s: %v, %v", c.what, lacking, some)
		}
	}
}

func TestRemember(t *testing.T) {
	h := &Heads{heard: map[string]map[string]heard{}}
	w := newWorld()
	h.remember("t", w.miss(), now)
	if got := h.remember("t", w.miss("a"), now); len(got) != 1 || len(got["a\x00"].coverage) != 1 {
		t.Errorf("of the missing one is remembered: %v", got)
	}
	if got := h.remember("other", w.miss("a"), now); len(got) != 0 {
		t.Errorf("of another tenant: %v", got)
	}
	// An answer without what sources say, such as one of what a head holds, is no
	// word that nobody counts on the missing one.
	w = newWorld(source(1, time.Second, 2, 2, in("", "a", "b", "c")...))
	h.remember("held", w.miss(), now)
	silent := w.miss("a")
	silent.newest = nil
	h.remember("held", silent, now)
	later := now.Add(time.Minute)
	if got := h.remember("held", w.miss("a"), later); !got["a\x00"].gone.Equal(later) {
		t.Errorf("a holder counts as gone since %s, not since %s", got["a\x00"].gone, later)
	}
	single := newWorld(fetch.Coverage{ReplicationFactor: 1})
	h.remember("single", single.miss(), now)
	if len(h.heard["single"]) != 0 {
		t.Error("a tenant with one replica is remembered")
	}
}

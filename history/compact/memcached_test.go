package compact

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestCompactedAhead: of a block that was just compacted, whoever reads it first
// finds the pages in memcached.
func TestCompactedAhead(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	w := newWorld(t, historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry()))
	w.c.o.Memcached = m.Client
	r := rand.New(rand.NewPCG(1, 2))
	start := w.now
	for range 4 {
		w.now = w.now.Add(30 * time.Minute)
		now := w.now.UnixMilli()
		c := content{"a": map[string]*chunkfmt.Series{}}
		for i := range 20 {
			if s := someSeries(r, "m", i, now-30*minute+1, now); len(s.Floats.T) > 0 {
				c["a"][s.Labels.String()] = s
			}
		}
		w.flush(t, c)
	}
	flushed := w.now
	w.pass(t, 2*time.Hour, 10*time.Minute)
	if w.levels(t, "a")[1] == 0 {
		t.Fatalf("levels %v", w.levels(t, "a"))
	}
	m.Idle(t)
	cold, err := history.New(history.Options{Objects: w.objects, Index: w.index, Memcached: m.Client})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cold.Snapshot(t.Context(), "a", start.UnixMilli(), flushed.UnixMilli(), nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.Select(t.Context(), nil, start.UnixMilli(), flushed.UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for set.Next(t.Context()) {
		n++
	}
	if n == 0 || set.Err() != nil {
		t.Fatalf("%d series, %v", n, set.Err())
	}
	if gets, near := s.Stats.ObjectGets.Load(), s.Stats.PagesMemcached.Load(); gets != 0 || near == 0 {
		t.Errorf("%d GETs, %d pages of memcached", gets, near)
	}
}

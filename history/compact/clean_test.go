package compact

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// bytesOf are all objects one after the other.
func bytesOf(t *testing.T, objects object.Store) []byte {
	t.Helper()
	var all []byte
	if err := objects.List(t.Context(), "", func(i object.Info) error {
		b, err := objects.GetRange(t.Context(), i.Key, 0, i.Size)
		all = append(all, b...)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func (w *world) traces(t *testing.T, tenant string) []Trace {
	t.Helper()
	out, err := Traces(t.Context(), w.objects, w.index, tenant, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// samplesOf counts what blocks have of a tenant, whatever hides it.
func (w *world) samplesOf(t *testing.T, tenant string, ms ...*labels.Matcher) int {
	t.Helper()
	return w.samplesIn(t, tenant, math.MinInt64, math.MaxInt64, ms...)
}

func (w *world) deletions(t *testing.T, tenant string) []index.Deletion {
	t.Helper()
	ds, err := w.history.Deletions(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	return ds
}

// TestClean: what is deleted is gone from blocks of the last level, a day after, or
// soon where somebody asks for it; a tenant that is deleted, from blocks that it
// shares with others, which keep what is theirs.
func TestClean(t *testing.T) {
	t.Parallel() // it mostly waits for servers
	onStores(t, func(t *testing.T, objects object.Store, rows index.Store) {
		w := newWorld(t, objects, rows)
		at := w.now
		secret := func(i int, from int64) *chunkfmt.Series {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "user", fmt.Sprintf("secret-%d", i))}
			for ts := from; ts < from+hour; ts += minute {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts%1000))
			}
			s.Exemplars = []exemplar.Exemplar{{Ts: from, HasTs: true, Labels: labels.FromStrings("trace", "of"+s.Labels.Get("user"))}}
			return s
		}
		all := func() content {
			c := content{}
			for _, tenant := range []string{"shared-a", "shared-b"} {
				for i := range 3 {
					c.add(tenant, secret(i, at.UnixMilli()))
				}
			}
			return c
		}
		w.flush(t, all())
		w.pass(t, 16*24*time.Hour, 6*time.Hour)
		if got := w.levels(t, "shared-a"); len(got) != 1 || got[3] != 1 {
			t.Fatalf("before: rows by level %v", got)
		}
		del := func(tenant string, maxt int64, ms ...*labels.Matcher) {
			t.Helper()
			if _, err := w.history.Delete(t.Context(), tenant, math.MinInt64, maxt, ms...); err != nil {
				t.Fatal(err)
			}
		}
		user := func(i int) *labels.Matcher {
			return labels.MustNewMatcher(labels.MatchEqual, "user", fmt.Sprintf("secret-%d", i))
		}
		// Half of one, and all of another.
		del("shared-a", at.UnixMilli()+hour/2-1, user(0))
		del("shared-a", w.now.UnixMilli(), user(1))
		w.pass(t, 20*time.Hour, time.Hour)
		if n := w.samplesOf(t, "shared-a"); n != 180 {
			t.Errorf("within a day: %d samples, want those that there were", n)
		}
		w.pass(t, 24*time.Hour, time.Hour)
		if n := w.samplesOf(t, "shared-a"); n != 90 {
			t.Errorf("after a day: %d samples, want 90", n)
		}
		if n := w.samplesOf(t, "shared-b"); n != 180 {
			t.Errorf("another tenant has %d samples, want 180", n)
		}
		if got := w.levels(t, "shared-a"); len(got) != 1 || got[3] != 1 {
			t.Errorf("after: rows by level %v", got)
		}
		w.pass(t, 14*time.Hour, time.Hour)
		for _, d := range w.deletions(t, "shared-a") {
			if d.Gone == 0 {
				t.Errorf("nobody has noted that nothing is left of %+v", d)
			}
		}
		// It is sent again: hidden, and dropped as soon as it is merged.
		w.flush(t, all())
		w.pass(t, 4*time.Hour, 10*time.Minute)
		if n := w.samplesOf(t, "shared-a", user(1)); n != 0 {
			t.Errorf("%d samples are back", n)
		}

		// Soon, at all levels.
		del("shared-a", w.now.UnixMilli(), user(0))
		del("shared-b", w.now.UnixMilli())
		for _, tenant := range []string{"shared-a", "shared-b"} {
			if err := w.history.Clean(t.Context(), tenant); err != nil {
				t.Fatal(err)
			}
		}
		w.pass(t, 3*time.Hour, 5*time.Minute)
		if n := w.samplesOf(t, "shared-a"); n != 60 {
			t.Errorf("of the last series there are %d samples, want 60", n)
		}
		b := bytesOf(t, objects)
		for _, gone := range []string{"secret-0", "secret-1", "shared-b"} {
			if bytes.Contains(b, []byte(gone)) {
				t.Errorf("%q is in an object", gone)
			}
		}
		if !bytes.Contains(b, []byte("shared-a")) {
			t.Error("names can't be found in objects at all")
		}
		if got := w.traces(t, "shared-b"); len(got) != 0 {
			t.Errorf("the tenant that is deleted: %+v", got)
		}
		if got := w.traces(t, "shared-a"); len(got) < 4 {
			t.Errorf("of the other there are only %+v", got)
		}
		for _, d := range append(w.deletions(t, "shared-a"), w.deletions(t, "shared-b")...) {
			if d.Gone == 0 {
				t.Errorf("nobody has noted that nothing is left of %+v", d)
			}
		}
	})
}

// TestCleanOtherLevels: blocks are cleaned that were of the last level by other ranges
// than those of now.
func TestCleanOtherLevels(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before int // levels
		after  int
	}{{"fewer", 3, 2}, {"more", 2, 3}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
			w.c.o.Ranges = DefaultRanges()[:tc.before]
			at, c := w.now.UnixMilli()+hour, content{}
			for _, tenant := range []string{"gone", "kept"} {
				c.add(tenant, &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m"), Floats: chunkfmt.Floats{T: []int64{at, at + minute}, V: []float64{1, 2}}})
			}
			w.flush(t, c)
			w.pass(t, 16*24*time.Hour, 6*time.Hour)
			if got := w.levels(t, "gone"); len(got) != 1 || got[index.Level(tc.before)] != 1 { //nolint:gosec // 2 or 3
				t.Fatalf("before: rows by level %v", got)
			}
			w.c.o.Ranges = DefaultRanges()[:tc.after]
			if _, err := w.history.Delete(t.Context(), "gone", math.MinInt64, w.now.UnixMilli()); err != nil {
				t.Fatal(err)
			}
			if err := w.history.Clean(t.Context(), "gone"); err != nil {
				t.Fatal(err)
			}
			w.pass(t, 3*time.Hour, 5*time.Minute)
			if got := w.traces(t, "gone"); len(got) != 0 {
				t.Errorf("of the tenant that is deleted there is %+v", got)
			}
			if n := w.samplesOf(t, "kept"); n != 2 {
				t.Errorf("the other tenant has %d samples, want 2", n)
			}
		})
	}
}

// TestCleanUnreadable: a block that can't be read doesn't keep compaction from its work,
// and counts as one that has something left.
func TestCleanUnreadable(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	at, c := w.now.UnixMilli(), content{}
	c.add("a", &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m"), Floats: chunkfmt.Floats{T: []int64{at, at + minute}, V: []float64{1, 2}}})
	w.flush(t, c)
	w.pass(t, 16*24*time.Hour, 6*time.Hour)
	rows, err := w.index.AllBlocks(t.Context(), "a")
	if err != nil || len(rows) != 1 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	if err := w.objects.Delete(t.Context(), rows[0].Object); err != nil {
		t.Fatal(err)
	}
	if _, err := w.history.Delete(t.Context(), "a", math.MinInt64, w.now.UnixMilli()); err != nil {
		t.Fatal(err)
	}
	w.pass(t, 3*24*time.Hour, time.Hour) // it fails if a round does
	if d := w.deletions(t, "a")[0]; d.Gone != 0 {
		t.Errorf("nothing is said to be left of %+v, though a block can't be read", d)
	}
	if w.c.cleaner.full.IsZero() || w.now.Sub(w.c.cleaner.full) > 24*time.Hour {
		t.Errorf("all was looked at last at %s, it is %s", w.c.cleaner.full, w.now)
	}
}

// TestRetention: a block goes when all of it is past the retention, and a tenant goes
// from a block that it shares, whatever level the block is of; nothing that isn't.
func TestRetention(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	rs := &history.Retentions{Tenants: map[string]history.Retention{"days": {Raw: 3 * 24 * time.Hour}}}
	w.c.o.Retentions = func() *history.Retentions { return rs }
	tenants := []string{"days", "weeks", "ever"}
	start := w.now
	for range 10 { // days
		c := content{}
		for _, tenant := range tenants {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m")}
			for ts := w.now.UnixMilli() + 1; ts <= w.now.Add(24*time.Hour).UnixMilli(); ts += hour {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, 1)
			}
			c.add(tenant, s)
		}
		w.now = w.now.Add(24 * time.Hour)
		w.flush(t, c)
		w.now = w.now.Add(-24 * time.Hour)
		w.pass(t, 24*time.Hour, time.Hour)
	}
	// A day's block goes when its last sample is three days old, and half a day later at most.
	if n := w.samplesOf(t, "days"); n < 3*24 || n > 5*24 {
		t.Errorf("of three days' retention %d hours are left", n)
	}
	if n := w.samplesOf(t, "weeks"); n != 10*24 {
		t.Errorf("without a retention %d hours are left, want all", n)
	}
	// It is changed at run time.
	rs = &history.Retentions{Default: history.Retention{Raw: 14 * 24 * time.Hour}, Tenants: map[string]history.Retention{"ever": {}, "days": rs.Tenants["days"]}}
	w.pass(t, 8*24*time.Hour, time.Hour)
	if n, past := w.samplesOf(t, "weeks"), int(w.now.Add(-14*24*time.Hour).Sub(start)/time.Hour); n < 10*24-past || n > 10*24 {
		t.Errorf("of two weeks' retention %d hours are left, %d of 240 are past it", n, past)
	}
	if got := w.traces(t, "days"); len(got) != 0 {
		t.Errorf("of three days' retention there is still %+v", got)
	}
	w.pass(t, 20*24*time.Hour, 2*time.Hour)
	if got := w.traces(t, "weeks"); len(got) != 0 {
		t.Errorf("of two weeks' retention there is still %+v", got)
	}
	if n := w.samplesOf(t, "ever"); n != 10*24 {
		t.Errorf("of what is kept for ever %d hours are left", n)
	}
}

// TestCleanImports: what an import brings of a deletion of which nothing was left, in
// blocks of the last level, is removed too.
func TestCleanImports(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	c := content{}
	s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m")}
	for ts := w.now.UnixMilli() + 1; ts < w.now.UnixMilli()+hour; ts += minute {
		s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, 1)
	}
	c.add("a", s)
	c.add("b", s)
	w.pass(t, 10*24*time.Hour, 6*time.Hour)
	if _, err := w.history.Delete(t.Context(), "a", math.MinInt64, w.now.UnixMilli()); err != nil {
		t.Fatal(err)
	}
	w.pass(t, 24*time.Hour, time.Hour)
	if w.deletions(t, "a")[0].Gone == 0 {
		t.Fatal("there never was anything, and nobody has noted it")
	}
	w.pass(t, 10*24*time.Hour, 6*time.Hour)
	data, sum := encode(t, c)
	id := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
	ref := index.BlockRef{Block: id, Object: history.ObjectKey(id), ObjectSize: sum.Size}
	if err := w.objects.Put(t.Context(), ref.Object, bytes.NewReader(data), sum.Size); err != nil {
		t.Fatal(err)
	}
	if err := w.index.PutBlocks(t.Context(), history.Rows(ref, 3, sum.Tenants)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.index.Guard(t.Context(), id, index.Published); err != nil {
		t.Fatal(err)
	}
	w.pass(t, 24*time.Hour, time.Hour)
	if got := w.traces(t, "a"); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
	if n := w.samplesOf(t, "b"); n != len(s.Floats.T) {
		t.Errorf("the other tenant has %d samples, want %d", n, len(s.Floats.T))
	}
}

// gatedObjects hang as long as the gate is shut.
type gatedObjects struct {
	object.Store
	gate, waiting chan struct{}
}

func (o *gatedObjects) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	select {
	case o.waiting <- struct{}{}:
	default:
	}
	select {
	case <-o.gate:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return o.Store.GetRange(ctx, key, off, n)
}

// TestSurveyBeside: rounds go on while it takes long to find out what is left of a
// deletion, and clean when that is known.
func TestSurveyBeside(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	put := func() {
		c, now := content{}, w.now.UnixMilli()
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m")}
		for ts := now + 1; ts < now+hour; ts += minute {
			s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, 1)
		}
		c.add("a", s)
		w.flush(t, c)
	}
	var clock atomic.Int64 // w.now, for another goroutine
	w.c.now = func() time.Time { return time.UnixMilli(clock.Load()) }
	pass := func(d, every time.Duration) {
		t.Helper()
		for end := w.now.Add(d); w.now.Before(end); {
			clock.Store(w.now.UnixMilli())
			w.pass(t, every, every)
		}
	}
	put()
	pass(16*24*time.Hour, 6*time.Hour)
	slow := &gatedObjects{w.objects, make(chan struct{}), make(chan struct{}, 1)}
	var err error
	if w.c.reader, err = history.New(history.Options{Objects: slow, Index: w.index, PageCacheBytes: -1, RowCacheBytes: -1}); err != nil {
		t.Fatal(err)
	}
	w.c.surveyor = &surveyor{done: make(chan surveyed, 1)}
	if _, err := w.history.Delete(t.Context(), "a", math.MinInt64, w.now.UnixMilli()); err != nil {
		t.Fatal(err)
	}
	if err := w.history.Clean(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	put()
	pass(30*time.Minute, 10*time.Minute)
	<-slow.waiting
	pass(3*time.Hour, 10*time.Minute)
	if got := w.levels(t, "a"); got[1] != 1 || got[3] != 1 {
		t.Errorf("while it is looked what is left: rows by level %v", got)
	}
	close(slow.gate)
	w.c.surveyor.wg.Wait()
	for range 8 { // each takes what the survey before has found
		pass(10*time.Minute, 10*time.Minute)
		w.c.surveyor.wg.Wait()
	}
	if n := w.samplesOf(t, "a"); n != 60 {
		t.Errorf("%d samples are left, want 60", n)
	}
	pass(20*time.Hour, 10*time.Minute)
	w.c.surveyor.wg.Wait()
	if got := w.levels(t, "a"); got[3] != 0 {
		t.Errorf("rows by level %v", got)
	}
}

// TestAgedOverlap: what overlapped when nobody looked is merged all the same, one group
// in each survey, whatever its age; what nothing overlaps isn't asked after again.
func TestAgedOverlap(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 5))
	want := content{}
	put := func(from int64) {
		s := someSeries(r, "m", 1, from, from+hour)
		want.add("a", s)
		c := content{}
		c.add("a", s)
		w.flush(t, c)
	}
	week := 7 * day
	first := w.now.UnixMilli() - w.now.UnixMilli()%week + day
	weeks := []int64{first, first - 2*week, first - 4*week, first - 6*week}
	w.c.o.CleanAge = 1000 * 24 * time.Hour // nobody looks
	for range 2 {
		for _, at := range weeks[1:] {
			put(at)
		}
		w.pass(t, 16*24*time.Hour, 6*time.Hour)
	}
	put(weeks[0])
	w.pass(t, 16*24*time.Hour, 6*time.Hour)
	if got := w.levels(t, "a"); len(got) != 1 || got[3] != 7 {
		t.Fatalf("before: rows by level %v", got)
	}
	w.c.o.CleanAge = 24 * time.Hour
	w.c.cleaner = cleaner{}
	for left := 6; left >= 4; left-- {
		w.pass(t, 5*time.Hour, time.Hour) // merged
		w.pass(t, time.Hour, 10*time.Minute)
		if got := w.levels(t, "a"); len(got) != 1 || got[3] != left {
			t.Errorf("rows by level %v, want %d of the last", got, left)
		}
	}
	w.check(t, want)
	w.pass(t, 3*24*time.Hour, time.Hour)
	if got := w.levels(t, "a"); len(got) != 1 || got[3] != 4 || len(w.c.cleaner.apart) != 4 {
		t.Errorf("in the end: rows by level %v, %d known to be apart, want 4", got, len(w.c.cleaner.apart))
	}
}

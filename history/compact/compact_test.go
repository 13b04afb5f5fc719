package compact

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// world is stores with a history, and a compactor whose time the test sets.
type world struct {
	objects object.Store
	index   *index.Index
	history *history.History
	now     time.Time
	c       *Compactor
}

func newWorld(t *testing.T, objects object.Store, rows index.Store) *world {
	t.Helper()
	w := &world{objects: objects, index: index.New(rows), now: time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)}
	var err error
	if w.history, err = history.New(history.Options{Objects: objects, Index: w.index, Now: func() time.Time { return w.now }}); err != nil {
		t.Fatal(err)
	}
	w.c, err = New(Options{Objects: objects, Index: w.index, Dir: t.TempDir(), Grace: 10 * time.Minute, OrphanAge: 100 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	w.c.now = func() time.Time { return w.now }
	return w
}

func (w *world) flush(t *testing.T, c content) ulid.ULID {
	t.Helper()
	data, sum := encode(t, c)
	id := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
	if err := w.history.Publish(t.Context(), id, data, sum); err != nil {
		t.Fatal(err)
	}
	return id
}

// pass lets time pass, with a round every so often.
func (w *world) pass(t *testing.T, d, every time.Duration) {
	t.Helper()
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(every) {
		for {
			worked, err := w.c.Round(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !worked {
				break
			}
		}
	}
}

func (w *world) levels(t *testing.T, tenant string) map[index.Level]int {
	t.Helper()
	rows, err := w.index.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	out := map[index.Level]int{}
	for _, r := range rows {
		out[r.Level]++
	}
	return out
}

// onStores runs a test on files with bbolt, and on an S3 and a DynamoDB server.
func onStores(t *testing.T, test func(t *testing.T, objects object.Store, rows index.Store)) {
	t.Run("local", func(t *testing.T) {
		test(t, historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry()))
	})
	t.Run("aws", func(t *testing.T) {
		test(t, historytest.S3(t, prometheus.NewRegistry()), historytest.DynamoDB(t, prometheus.NewRegistry()))
	})
}

// TestLevels follows two tenants through all levels of default widths: what was
// flushed in half hours by two replicas ends as a block of a week.
func TestLevels(t *testing.T) {
	t.Parallel() // it mostly waits for servers
	onStores(t, func(t *testing.T, objects object.Store, rows index.Store) {
		w := newWorld(t, objects, rows)
		r := rand.New(rand.NewPCG(1, 2))
		want := content{}
		start := w.now
		for range 2 * 26 {
			w.now = w.now.Add(30 * time.Minute)
			now := w.now.UnixMilli()
			c := content{}
			for _, tenant := range []string{"a", "b"} {
				s := someSeries(r, "m", 1, now-30*minute+1, now)
				if len(s.Floats.T) > 0 {
					c.add(tenant, s)
					want.add(tenant, s)
				}
			}
			w.flush(t, c)
			w.flush(t, c)
		}
		w.pass(t, time.Hour, 10*time.Minute)
		if got := w.levels(t, "a"); got[0] > 8 || got[1] < 12 || got[1] > 15 {
			t.Errorf("after 26 hours: rows by level %v", got)
		}
		w.pass(t, 6*time.Hour, 10*time.Minute)
		if got := w.levels(t, "a"); got[0] != 0 || got[1] > 2 || got[2] < 1 || got[2] > 2 {
			t.Errorf("after a day and a quarter: rows by level %v", got)
		}
		w.pass(t, 14*24*time.Hour, 6*time.Hour)
		for tenant := range want {
			// A week begins on a Thursday, so these days are in one.
			if got := w.levels(t, tenant); len(got) != 1 || got[3] != 1 {
				t.Errorf("in the end: rows by level %v of %s", got, tenant)
			}
			snap, err := w.history.Snapshot(t.Context(), tenant, math.MinInt64, math.MaxInt64, nil, time.Time{})
			if err != nil {
				t.Fatal(err)
			}
			set, err := snap.Select(t.Context(), nil, start.UnixMilli(), w.now.UnixMilli())
			if err != nil {
				t.Fatal(err)
			}
			for set.Next(t.Context()) {
				runs, err := set.At().Runs(&history.Buffer{})
				if err != nil || len(runs) != 1 {
					t.Fatal(len(runs), err)
				}
				if n, m := len(runs[0].Floats.T), len(want[tenant][set.At().Labels.String()].Floats.T); n != m {
					t.Errorf("%d samples of %s, want %d", n, tenant, m)
				}
			}
			if set.Err() != nil || set.Len() != 1 {
				t.Errorf("%d series, %v", set.Len(), set.Err())
			}
		}
		n := 0
		if err := objects.List(t.Context(), "", func(object.Info) error { n++; return nil }); err != nil || n != 1 {
			t.Errorf("%d objects, want 1 (%v)", n, err)
		}
	})
}

// TestSetAside sees that blocks that are damaged or absent are named and left
// alone, that the rest is compacted, and that queries fail as before.
func TestSetAside(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	w := newWorld(t, objects, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 3))
	now := w.now.UnixMilli()
	var ids []ulid.ULID
	for i := range 6 {
		c := content{}
		c.add(fmt.Sprintf("t%d", i), someSeries(r, "m", 1, now-hour, now))
		c.add("all", someSeries(r, "m", 3*i, now-hour, now))
		ids = append(ids, w.flush(t, c))
	}
	if err := objects.Delete(t.Context(), history.ObjectKey(ids[1])); err != nil {
		t.Fatal(err)
	}
	size, err := objects.Size(t.Context(), history.ObjectKey(ids[3]))
	if err != nil {
		t.Fatal(err)
	}
	b, err := objects.GetRange(t.Context(), history.ObjectKey(ids[3]), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	b[60] ^= 1 // in its first data page
	if err := objects.Put(t.Context(), history.ObjectKey(ids[3]), bytes.NewReader(b), size); err != nil {
		t.Fatal(err)
	}
	w.pass(t, 4*time.Hour, 10*time.Minute)
	aside, err := w.index.Aside(t.Context())
	if err != nil || len(aside) != 2 || aside[0].Block != ids[1] && aside[0].Block != ids[3] {
		t.Fatalf("set aside: %+v, %v", aside, err)
	}
	for _, a := range aside {
		if !strings.Contains(a.Reason, a.Object) || !strings.Contains(a.Reason, "offset") {
			t.Errorf("reason %q names neither object nor offset", a.Reason)
		}
	}
	if got := len(w.c.Conditions()); got != 2 {
		t.Errorf("%d conditions, want 2", got)
	}
	for i := range ids {
		want := map[index.Level]int{1: 1}
		if i == 1 || i == 3 {
			want = map[index.Level]int{0: 1}
		}
		if got := w.levels(t, fmt.Sprintf("t%d", i)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("tenant of block %d: rows by level %v, want %v", i, got, want)
		}
	}
	if got := w.levels(t, "all"); got[0] != 2 || got[1] != 1 {
		t.Errorf("rows by level %v", got)
	}
	snap, err := w.history.Snapshot(t.Context(), "t1", 0, math.MaxInt64, nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snap.Select(t.Context(), nil, 0, math.MaxInt64); err == nil {
		t.Error("an absent block is not reported any more")
	}
}

// TestOrphans sees that what nobody has published is listed, then removed with
// its rows, and nothing else.
func TestOrphans(t *testing.T) {
	objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
	w := newWorld(t, objects, rows)
	w.c.o.OrphanAge = 24 * time.Hour
	r := rand.New(rand.NewPCG(1, 4))
	now := w.now.UnixMilli()
	c := content{}
	c.add("a", someSeries(r, "m", 1, now-hour, now))
	good := w.flush(t, c)
	// An ingester that died before the guard row.
	dying := &historytest.FaultyRows{Store: rows, Decide: func(op, _ string) historytest.Fault {
		if op == "PutIf" {
			return historytest.Before
		}
		return historytest.None
	}}
	h, err := history.New(history.Options{Objects: objects, Index: index.New(dying)})
	if err != nil {
		t.Fatal(err)
	}
	data, sum := encode(t, c)
	half := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
	if err := h.Publish(t.Context(), half, data, sum); err == nil {
		t.Fatal("published")
	}
	if err := objects.Put(t.Context(), "blocks/other", strings.NewReader("x"), 1); err != nil {
		t.Fatal(err)
	}
	w.now = time.Now().Add(25 * time.Hour) // the store's clock is not ours to set
	found, err := Orphans(t.Context(), objects, w.index, w.now, w.c.o.OrphanAge)
	if err != nil || len(found) != 1 || found[0].Block != half {
		t.Fatalf("%+v, %v", found, err)
	}
	for range 5 {
		if err := w.c.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(6 * time.Hour)
	}
	var left []string
	if err := objects.List(t.Context(), "", func(i object.Info) error { left = append(left, i.Key); return nil }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(left) != fmt.Sprint([]string{history.ObjectKey(good), "blocks/other"}) {
		t.Errorf("left: %v", left)
	}
	if got := w.levels(t, "a"); got[0] != 1 {
		t.Errorf("rows %v", got)
	}
	work := index.NewWorkRow(half)
	if got, err := w.index.Work(t.Context(), work.Day, work.Shard); err != nil || len(got) > 1 || len(got) == 1 && got[0].Block != good {
		t.Errorf("work rows %v, %v", got, err)
	}
	if err := h.Publish(t.Context(), half, data, sum); err == nil {
		t.Error("published though condemned")
	}
}

// TestLeases sees that two compactors don't merge the same, that a lease that
// shows no sign of life goes to another, and that the first can't commit then.
func TestLeases(t *testing.T) {
	objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
	w := newWorld(t, objects, rows)
	other := newWorld(t, objects, rows)
	r := rand.New(rand.NewPCG(1, 5))
	c := content{}
	c.add("a", someSeries(r, "m", 1, w.now.UnixMilli()-hour, w.now.UnixMilli()))
	w.flush(t, c)
	w.now = w.now.Add(3 * time.Hour)
	other.now = w.now
	// The first stands still while it merges.
	merging := false
	w.c.o.Objects = &historytest.FaultyObjects{Store: objects, Decide: func(op, _ string) historytest.Fault {
		if op == "Put" && !merging {
			merging = true
			for i := range 6 {
				worked, err := other.c.Round(context.Background())
				if err != nil || worked != (i == 5) {
					t.Errorf("round %d of the other: %v, %v", i, worked, err)
				}
				other.now = other.now.Add(time.Minute)
			}
		}
		return historytest.None
	}}
	if worked, err := w.c.Round(t.Context()); worked || err != nil {
		t.Errorf("the first: %v, %v", worked, err)
	}
	if !merging {
		t.Error("nothing was merged")
	}
	if got := w.levels(t, "a"); got[0] != 1 || got[1] != 1 {
		t.Errorf("rows by level %v", got)
	}
}

func TestValidate(t *testing.T) {
	for _, ranges := range [][]time.Duration{
		{2 * time.Hour, 3 * time.Hour}, {2 * time.Hour, 2 * time.Hour}, {5 * time.Hour}, {14 * 24 * time.Hour}, {time.Millisecond},
	} {
		if err := ValidateRanges(ranges); err == nil {
			t.Errorf("%v was taken", ranges)
		}
	}
	if err := ValidateRanges(DefaultRanges()); err != nil {
		t.Error(err)
	}
	if _, err := New(Options{}); err == nil {
		t.Error("options without anything were taken")
	}
}

func TestPlan(t *testing.T) {
	tenant := func(ranges ...int64) chunkfmt.TenantSummary {
		var s chunkfmt.TenantSummary
		for i := 0; i < len(ranges); i += 2 {
			s.Windows = append(s.Windows, chunkfmt.Range{MinT: ranges[i], MaxT: ranges[i+1]})
		}
		return s
	}
	got := plan([]*source{
		{tenants: []chunkfmt.TenantSummary{tenant(5, 25), tenant(-5, -1, 95, 95)}},
		{tenants: []chunkfmt.TenantSummary{tenant(11, 12)}},
	}, 10, 2)
	want := "[{-9 10} {11 30} {91 100}]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestFit(t *testing.T) {
	wide := func(weeks int64) *source {
		s := &source{tenants: []chunkfmt.TenantSummary{{Tenant: "a"}}}
		for w := range weeks {
			s.tenants[0].Windows = append(s.tenants[0].Windows, chunkfmt.Range{MinT: w*history.Window + 1, MaxT: w*history.Window + hour})
		}
		return s
	}
	for name, c := range map[string]struct {
		sources []*source
		want    int
	}{
		"all":              {[]*source{wide(2), wide(500), wide(1000)}, 3},
		"too many windows": {[]*source{wide(2), wide(maxWindows + 1), wide(1)}, 1},
		"too many rows":    {[]*source{wide(1500), wide(1500), wide(1500), wide(1500), wide(1)}, 4},
		"none":             {[]*source{wide(maxWindows + 1)}, 0},
	} {
		if got := fit(c.sources, day); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestHeldJob: rows of one tenant can't be written, nor removed, for long. Its
// compaction is parked: the other tenants in it see what it made, and its slot is
// free for others. Then it is finished.
func TestHeldJob(t *testing.T) {
	objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
	held := false
	w := newWorld(t, objects, &historytest.FaultyRows{Store: rows, Decide: func(op, key string) historytest.Fault {
		if held && key == "b/a" && (op == "Put" || op == "Delete") {
			return historytest.Before
		}
		return historytest.None
	}})
	r := rand.New(rand.NewPCG(1, 7))
	flushes := func(tenants ...string) {
		for range 2 {
			w.now = w.now.Add(time.Second)
			c := content{}
			for _, tenant := range tenants {
				c.add(tenant, someSeries(r, "m", 1, w.now.UnixMilli()-hour, w.now.UnixMilli()))
			}
			w.flush(t, c)
		}
	}
	pass := func(d time.Duration) {
		for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(time.Minute) {
			_, _ = w.c.Round(t.Context()) // it fails at times
		}
	}
	begin := w.now
	flushes("a", "b")
	held = true
	pass(4 * time.Hour)
	if got := w.levels(t, "b"); got[0]+got[1] != 3 || got[1] != 1 { // the rows of the sources are there until a's are
		t.Errorf("b has rows by level %v", got)
	}
	if got := w.levels(t, "a"); got[1] != 0 {
		t.Errorf("a has rows by level %v", got)
	}
	snap, err := w.history.Snapshot(t.Context(), "b", math.MinInt64, math.MaxInt64, nil, time.Time{})
	if err != nil || len(snap.Blocks) != 1 {
		t.Errorf("b sees %d blocks, %v", len(snap.Blocks), err)
	}
	cs := w.c.Conditions()
	if len(cs) != 1 || !strings.Contains(cs[0].What, `such as of "a"`) {
		t.Errorf("conditions %v", cs)
	}
	jobs := func() (free, aside int) {
		js, err := w.index.Jobs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range js {
			switch {
			case j.State != index.JobIdle && j.Slot >= parkedSlots:
				aside++
			case j.State != index.JobIdle:
				t.Errorf("a slot is taken: %+v", j)
			default:
				free++
			}
		}
		return free, aside
	}
	if free, aside := jobs(); free != 1 || aside != 1 {
		t.Errorf("%d jobs are done, %d parked", free, aside)
	}

	// The slot of that window is that of another one, a day later.
	w.now = begin.Add(24 * time.Hour)
	flushes("b", "c")
	pass(4 * time.Hour)
	if got := w.levels(t, "c"); got[0] != 0 || got[1] != 1 {
		t.Errorf("c has rows by level %v", got)
	}
	held = false
	pass(3 * time.Hour)
	if _, aside := jobs(); aside != 0 {
		t.Error("a job is parked still")
	}
	for _, tenant := range []string{"a", "b", "c"} {
		if got := w.levels(t, tenant); got[0] != 0 {
			t.Errorf("%s has rows by level %v", tenant, got)
		}
	}
	if cs := w.c.Conditions(); len(cs) != 0 {
		t.Errorf("conditions %v", cs)
	}
}

// TestTakeBack: what a program of before has set aside because of its version is compacted
// by one that can read it; what nobody can read stays set aside.
func TestTakeBack(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	w := newWorld(t, objects, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 9))
	now := w.now.UnixMilli()
	var ids []ulid.ULID
	for range 4 {
		c := content{}
		c.add("a", someSeries(r, "m", 3, now-hour, now))
		ids = append(ids, w.flush(t, c))
	}
	// The first two for their version, of which one is of one still unknown, and the third
	// for damage.
	for i, id := range ids[:3] {
		size, err := objects.Size(t.Context(), history.ObjectKey(id))
		if err != nil {
			t.Fatal(err)
		}
		ref := index.BlockRef{Block: id, Object: history.ObjectKey(id), ObjectSize: size}
		reason := fmt.Errorf("block %s: footer: %w: 2, this program reads 1 to 1", id, chunkfmt.ErrVersion).Error()
		switch i {
		case 1:
			b := bytes.Clone(bytesAt(t, objects, ref))
			b[len(b)-12] = 9 // the version in its trailer
			if err := objects.Put(t.Context(), ref.Object, bytes.NewReader(b), size); err != nil {
				t.Fatal(err)
			}
		case 2:
			reason = "block is corrupt"
		}
		if err := w.index.PutAside(t.Context(), index.AsideRow{BlockRef: ref, Reason: reason}); err != nil {
			t.Fatal(err)
		}
		if err := w.c.deleteWork(t.Context(), index.JobSource{BlockRef: ref}); err != nil {
			t.Fatal(err)
		}
	}
	w.pass(t, 4*time.Hour, 10*time.Minute)
	aside, err := w.index.Aside(t.Context())
	if err != nil || len(aside) != 2 || aside[0].Block != ids[1] || aside[1].Block != ids[2] {
		t.Errorf("set aside: %+v, %v", aside, err)
	}
	if got := w.levels(t, "a"); got[0] != 2 || got[1] != 1 {
		t.Errorf("rows by level %v", got)
	}
}

// TestParkedTwice: a job that two compactors have parked, in two slots, is there once in
// the end, and goes on.
func TestParkedTwice(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	id := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
	source := index.BlockRef{Block: ulid.MustNew(1, ulid.DefaultEntropy()), Object: "blocks/a", ObjectSize: 1}
	for _, slot := range []uint8{parkedSlots, parkedSlots + 1} {
		j := index.Job{Level: 1, Slot: slot, State: index.JobRemoved, ID: id, Sources: []index.JobSource{{BlockRef: source}}}
		if err := w.index.SwapJob(t.Context(), index.Job{Level: 1, Slot: slot}, j); err != nil {
			t.Fatal(err)
		}
	}
	unfinished := func() (n int) {
		js, err := w.index.Jobs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range js {
			if j.State != index.JobIdle {
				n++
			}
		}
		return n
	}
	if _, err := w.c.Round(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := unfinished(); n != 1 {
		t.Fatalf("the job is there %d times", n)
	}
	w.pass(t, time.Hour, time.Minute)
	if n := unfinished(); n != 0 {
		t.Errorf("the job is there %d times in the end", n)
	}
	if state, err := w.index.GuardState(t.Context(), source.Block); err != nil || state != index.Condemned {
		t.Errorf("the source is %s, %v", state, err)
	}
}

// TestAbandonedMerge: who merged is gone, and so is what there was to merge. Its slot is
// freed.
func TestAbandonedMerge(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	j := index.Job{Level: 2, Slot: 3, State: index.JobMerging, Owner: "another", ID: ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())}
	if err := w.index.SwapJob(t.Context(), index.Job{Level: 2, Slot: 3}, j); err != nil {
		t.Fatal(err)
	}
	state := func() index.JobState {
		js, err := w.index.Jobs(t.Context())
		if err != nil || len(js) != 1 {
			t.Fatalf("%d jobs, %v", len(js), err)
		}
		return js[0].State
	}
	w.pass(t, 4*time.Minute, time.Minute)
	if s := state(); s != index.JobMerging {
		t.Errorf("within its lease it is %s", s)
	}
	w.pass(t, 4*time.Minute, time.Minute)
	if s := state(); s != index.JobIdle {
		t.Errorf("after its lease it is %s", s)
	}
}

// TestFirstDay: flushes are found and compacted though a clock was wrong, or they came
// much later than they were made.
func TestFirstDay(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 11))
	flush := func(w *world, at time.Time) {
		t.Helper()
		c := content{}
		c.add("a", someSeries(r, "m", 1, at.UnixMilli()-hour, at.UnixMilli()))
		data, sum := encode(t, c)
		if err := w.history.Publish(t.Context(), ulid.MustNew(ulid.Timestamp(at), ulid.DefaultEntropy()), data, sum); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("clock ahead", func(t *testing.T) {
		objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
		ahead, w := newWorld(t, objects, rows), newWorld(t, objects, rows)
		ahead.now = w.now.Add(300 * 24 * time.Hour)
		ahead.pass(t, time.Minute, time.Minute)
		for range 8 {
			w.now = w.now.Add(6 * time.Hour)
			flush(w, w.now)
		}
		w.now = w.now.Add(2 * 24 * time.Hour)
		w.pass(t, 12*time.Hour, time.Hour)
		if got := w.levels(t, "a"); got[0] != 0 {
			t.Errorf("rows by level %v", got)
		}
	})
	t.Run("late", func(t *testing.T) {
		w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
		made := w.now
		w.pass(t, 10*24*time.Hour, 6*time.Hour)
		flush(w, made)
		w.pass(t, 24*time.Hour, time.Hour)
		if got := w.levels(t, "a"); got[0] != 0 {
			t.Errorf("rows by level %v", got)
		}
	})
}

// TestSlowPut: an object store takes longer to take a block than the lease lasts. The job
// stays its owner's all the same, and is done once.
func TestSlowPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
		var puts atomic.Int32
		slow := &historytest.FaultyObjects{Store: objects, Decide: func(op, _ string) historytest.Fault {
			if op == "Put" {
				puts.Add(1)
				time.Sleep(20 * time.Minute)
			}
			return historytest.None
		}}
		w, other := newWorld(t, objects, rows), newWorld(t, objects, rows)
		w.now = time.Now()
		c := content{}
		c.add("a", someSeries(rand.New(rand.NewPCG(1, 5)), "m", 1, w.now.UnixMilli()-hour, w.now.UnixMilli()))
		w.flush(t, c)
		time.Sleep(3 * time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Hour)
		defer cancel()
		var wg sync.WaitGroup
		for _, x := range []*world{w, other} {
			x.c.now, x.c.o.Objects = time.Now, slow
			wg.Go(func() {
				if err := x.c.Run(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := w.levels(t, "a"); got[0] != 0 || got[1] != 1 || puts.Load() != 1 {
			t.Errorf("%d blocks were put; rows by level %v", puts.Load(), got)
		}
	})
}

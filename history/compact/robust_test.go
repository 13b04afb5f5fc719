package compact

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// tryOn lets time pass, with a round every so often, of which some may fail.
func (w *world) tryOn(t *testing.T, d, every time.Duration) {
	t.Helper()
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(every) {
		for {
			if worked, err := w.c.Round(t.Context()); !worked || err != nil {
				break
			}
		}
	}
}

// samples counts what a query sees of tenant a.
func (w *world) samples(t *testing.T) (n int) {
	t.Helper()
	snap, err := w.history.Snapshot(t.Context(), "a", math.MinInt64, math.MaxInt64, nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := snap.Select(t.Context(), nil, math.MinInt64, math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	for set.Next(t.Context()) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			t.Fatal(err)
		}
		n += len(chunkfmt.Merge(runs...).Floats.T)
	}
	if err := set.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// flushes makes n blocks of some tenants, with some samples each.
func (w *world) flushes(t *testing.T, r *rand.Rand, n int, tenants ...string) (ids []ulid.ULID) {
	t.Helper()
	for range n {
		w.now = w.now.Add(time.Minute)
		c := content{}
		for _, tenant := range tenants {
			c.add(tenant, someSeries(r, "m", 1, w.now.UnixMilli()-minute, w.now.UnixMilli()))
		}
		ids = append(ids, w.flush(t, c))
	}
	return ids
}

// idle fails a test if a job is under way.
func (w *world) idle(t *testing.T) {
	t.Helper()
	jobs, err := w.index.Jobs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range jobs {
		if j.State != index.JobIdle {
			t.Errorf("job %+v", j)
		}
	}
}

// TestOutputLost: what a compaction has made is lost, or damaged, before it is visible.
// Its sources are compacted once more, and nothing is left of it.
func TestOutputLost(t *testing.T) {
	for _, how := range []string{"missing", "damaged", "missing, half of the rows written"} {
		t.Run(how, func(t *testing.T) {
			objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
			failing := false
			w := newWorld(t, objects, &historytest.FaultyRows{Store: rows, Decide: func(op, key string) historytest.Fault {
				if failing && op == "Put" && key == "b/a" {
					return historytest.Torn
				}
				return historytest.None
			}})
			w.c.o.OrphanAge = 24 * time.Hour
			r := rand.New(rand.NewPCG(1, 21))
			w.flushes(t, r, 4, "a", "b")
			want := w.samples(t)
			failing = how == "missing, half of the rows written"
			lost := ""
			w.c.o.Objects = &historytest.FaultyObjects{Store: objects, Decide: func(op, key string) historytest.Fault {
				if op != "Put" || lost != "" {
					return historytest.None
				}
				lost = key
				return historytest.None
			}}
			// It is lost when the row of the job says that it is there.
			lose := func() {
				if lost == "" {
					return
				}
				jobs, err := w.index.Jobs(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, j := range jobs {
					if j.State == index.JobCommitted {
						size, err := objects.Size(t.Context(), lost)
						if errors.Is(err, object.ErrNotExist) {
							return
						}
						if how == "damaged" {
							err = objects.Put(t.Context(), lost, bytes.NewReader(make([]byte, size)), size)
						} else {
							err = objects.Delete(t.Context(), lost)
						}
						if err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			if !failing {
				w.c.o.Index = index.New(&historytest.FaultyRows{Store: rows, Decide: func(op, key string) historytest.Fault {
					if op == "PutIf" && strings.HasPrefix(key, "g/") {
						lose()
					}
					return historytest.None
				}})
				w.tryOn(t, 4*time.Hour, time.Minute)
			} else {
				w.tryOn(t, 140*time.Minute, time.Minute)
				lose()
				failing = false
				w.tryOn(t, 100*time.Minute, time.Minute)
			}
			if lost == "" {
				t.Fatal("nothing was lost")
			}
			w.idle(t)
			for _, tenant := range []string{"a", "b"} {
				if got := w.levels(t, tenant); fmt.Sprint(got) != "map[1:1]" {
					t.Errorf("rows by level %v", got)
				}
			}
			if got := w.samples(t); got != want || got == 0 {
				t.Errorf("%d samples, want %d", got, want)
			}
			id := ulid.MustParse(strings.TrimPrefix(lost, "blocks/"))
			if state, err := w.index.GuardState(t.Context(), id); err != nil || state != index.Condemned {
				t.Errorf("what was lost is %s, %v", state, err)
			}
		})
	}
}

// TestOutputLostLater: what a compaction has made is lost when it is visible, before its
// sources are removed. They stay, and others go on.
func TestOutputLostLater(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	w := newWorld(t, objects, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 22))
	w.flushes(t, r, 3, "a")
	want := w.samples(t)
	var keep []byte
	var key string
	for end := w.now.Add(4 * time.Hour); w.now.Before(end); w.now = w.now.Add(time.Minute) {
		_, _ = w.c.Round(t.Context())
		jobs, err := w.index.Jobs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range jobs {
			if j.State == index.JobPublished && key == "" {
				key = j.Outputs[0].Object
				keep = bytesAt(t, objects, j.Outputs[0].BlockRef)
				if err := objects.Delete(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if key == "" {
		t.Fatal("nothing was made")
	}
	if got := w.levels(t, "a"); got[0] != 3 {
		t.Errorf("rows by level %v: sources went though what replaces them is lost", got)
	}
	if cs := w.c.Conditions(); len(cs) == 0 || !strings.Contains(cs[0].What, key) {
		t.Errorf("conditions %v", cs)
	}
	// A day later the slot is another window's.
	w.now = w.now.Add(20*time.Hour - 3*time.Minute)
	w.flushes(t, r, 2, "b")
	w.tryOn(t, 4*time.Hour, time.Minute)
	if got := w.levels(t, "b"); got[0] != 0 {
		t.Errorf("others: rows by level %v", got)
	}
	// It is put back.
	if err := objects.Put(t.Context(), key, bytes.NewReader(keep), int64(len(keep))); err != nil {
		t.Fatal(err)
	}
	w.tryOn(t, 2*time.Hour, time.Minute)
	w.idle(t)
	if got := w.samples(t); got != want {
		t.Errorf("%d samples, want %d", got, want)
	}
}

// TestDenied: a block can't be read for long, and not because it is absent or damaged.
// The others of its group are compacted without it; it is when it can be read again.
func TestDenied(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	w := newWorld(t, objects, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 23))
	ids := w.flushes(t, r, 4, "a")
	denied := history.ObjectKey(ids[1])
	w.c.o.Objects = &historytest.FaultyObjects{Store: objects, Decide: func(op, key string) historytest.Fault {
		if op == "GetRange" && key == denied {
			return historytest.Before
		}
		return historytest.None
	}}
	w.tryOn(t, 4*time.Hour, time.Minute)
	if got := w.levels(t, "a"); got[0] != 1 || got[1] != 1 {
		t.Errorf("rows by level %v", got)
	}
	if cs := w.c.Conditions(); len(cs) == 0 || !strings.Contains(cs[0].What, denied) {
		t.Errorf("conditions %v", cs)
	}
	if aside, err := w.index.Aside(t.Context()); err != nil || len(aside) > 0 {
		t.Errorf("set aside: %v, %v", aside, err)
	}
	denied = ""
	w.tryOn(t, 8*time.Hour, 10*time.Minute)
	if got := w.levels(t, "a"); got[0] != 0 {
		t.Errorf("rows by level %v", got)
	}
	if cs := w.c.Conditions(); len(cs) != 0 {
		t.Errorf("conditions %v", cs)
	}
}

// TestUnreadableRows: rows that compaction needs are damaged, one of each kind. The rest
// is compacted, what is named by work rows too.
func TestUnreadableRows(t *testing.T) {
	damage := func(t *testing.T, rows *historytest.MemoryRows, hash string) {
		t.Helper()
		items, err := rows.Query(t.Context(), index.Query{Hash: hash, Consistent: true})
		if err != nil || len(items) == 0 {
			t.Fatalf("%d rows below %s, %v", len(items), hash, err)
		}
		items[0].Value[len(items[0].Value)/2] ^= 1
		if err := rows.Put(t.Context(), items[:1]); err != nil {
			t.Fatal(err)
		}
	}
	prepare := func(t *testing.T) (*world, *historytest.MemoryRows, []ulid.ULID) {
		t.Helper()
		rows := &historytest.MemoryRows{}
		w := newWorld(t, &historytest.MemoryObjects{}, rows)
		w.now = time.Date(2026, 6, 1, 1, 30, 0, 0, time.UTC)
		r := rand.New(rand.NewPCG(1, 24))
		return w, rows, w.flushes(t, r, 4, "a")
	}
	compacted := func(t *testing.T, w *world, want string) {
		t.Helper()
		w.idle(t)
		if got := w.levels(t, "a"); fmt.Sprint(got) != want {
			t.Errorf("rows by level %v, want %s", got, want)
		}
		if aside, err := w.index.Aside(t.Context()); err != nil || len(aside) > 0 {
			t.Errorf("set aside: %v, %v", aside, err)
		}
		if cs := w.c.Conditions(); len(cs) != 0 {
			t.Errorf("conditions %v", cs)
		}
	}
	t.Run("flush", func(t *testing.T) {
		w, rows, ids := prepare(t)
		row := index.NewWorkRow(ids[2])
		damage(t, rows, fmt.Sprintf("w/%d/%d", row.Day, row.Shard))
		w.tryOn(t, 6*time.Hour, time.Minute)
		got := w.levels(t, "a")
		if got[0] != 0 {
			t.Errorf("rows by level %v", got)
		}
		compacted(t, w, fmt.Sprint(got))
	})
	t.Run("compacted", func(t *testing.T) {
		w, rows, _ := prepare(t)
		w.tryOn(t, 3*time.Hour, time.Minute)
		damage(t, rows, "w/compacted")
		w.tryOn(t, 48*time.Hour, 20*time.Minute)
		compacted(t, w, "map[2:1]")
	})
	t.Run("of an object that is lost", func(t *testing.T) {
		w, rows, _ := prepare(t)
		w.tryOn(t, 3*time.Hour, time.Minute)
		lost, err := w.index.Compacted(t.Context())
		if err != nil || len(lost) != 1 {
			t.Fatal(lost, err)
		}
		damage(t, rows, "w/compacted")
		if err := w.objects.Delete(t.Context(), lost[0].Object); err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 25))
		w.flushes(t, r, 4, "b")
		w.tryOn(t, 48*time.Hour, 20*time.Minute)
		if got := w.levels(t, "b"); got[2] != 1 || len(got) != 1 {
			t.Errorf("others: rows by level %v", got)
		}
		if aside, err := w.index.Aside(t.Context()); err != nil || len(aside) != 1 || aside[0].Block != lost[0].Block {
			t.Errorf("set aside: %v, %v", aside, err)
		}
	})
	t.Run("first day", func(t *testing.T) {
		w, rows, _ := prepare(t)
		w.tryOn(t, time.Minute, time.Minute)
		damage(t, rows, "compaction/day")
		w.tryOn(t, 6*time.Hour, time.Minute)
		compacted(t, w, "map[1:1]")
	})
	t.Run("set aside", func(t *testing.T) {
		w, rows, ids := prepare(t)
		if err := w.objects.Delete(t.Context(), history.ObjectKey(ids[0])); err != nil {
			t.Fatal(err)
		}
		w.tryOn(t, 3*time.Hour, time.Minute)
		damage(t, rows, "w/aside")
		r := rand.New(rand.NewPCG(1, 25))
		w.flushes(t, r, 4, "b")
		w.tryOn(t, 6*time.Hour, 10*time.Minute)
		if got := w.levels(t, "b"); got[0] != 0 {
			t.Errorf("rows by level %v", got)
		}
	})
	t.Run("job", func(t *testing.T) {
		w, rows, _ := prepare(t)
		w.tryOn(t, 3*time.Hour, time.Minute)
		damage(t, rows, "compaction/jobs")
		// Another window's slot.
		r := rand.New(rand.NewPCG(1, 25))
		w.flushes(t, r, 4, "b")
		w.tryOn(t, 6*time.Hour, 10*time.Minute)
		if got := w.levels(t, "b"); got[0] != 0 {
			t.Errorf("rows by level %v", got)
		}
		if cs := w.c.Conditions(); len(cs) == 0 {
			t.Errorf("conditions %v", cs)
		}
	})
	t.Run("guard", func(t *testing.T) {
		w, rows, ids := prepare(t)
		damage(t, rows, "g/"+ids[1].String())
		w.tryOn(t, 6*time.Hour, time.Minute)
		if got := w.levels(t, "a"); got[0] != 1 || got[1] != 1 {
			t.Errorf("rows by level %v", got)
		}
		if cs := w.c.Conditions(); len(cs) == 0 {
			t.Errorf("conditions %v", cs)
		}
	})
}

// TestOrphansOfShortLives: compactors that live for no longer than a round remove orphans,
// and one that can't be read keeps none of the others.
func TestOrphansOfShortLives(t *testing.T) {
	objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
	w := newWorld(t, objects, rows)
	r := rand.New(rand.NewPCG(1, 26))
	c := content{}
	c.add("a", someSeries(r, "m", 1, w.now.UnixMilli()-hour, w.now.UnixMilli()))
	data, _ := encode(t, c)
	var ids []ulid.ULID
	for range 3 {
		id := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
		ids = append(ids, id)
		if err := objects.Put(t.Context(), history.ObjectKey(id), bytes.NewReader(data), int64(len(data))); err != nil {
			t.Fatal(err)
		}
	}
	denied := &historytest.FaultyObjects{Store: objects, Decide: func(op, key string) historytest.Fault {
		if op == "GetRange" && key == history.ObjectKey(ids[0]) {
			return historytest.Before
		}
		return historytest.None
	}}
	w.now = time.Now() // the store's clock is not ours to set
	for range 60 {
		w.now = w.now.Add(time.Hour)
		next := newWorld(t, denied, rows)
		next.now, next.c.o.OrphanAge = w.now, 24*time.Hour
		_, _ = next.c.Round(t.Context())
	}
	var left []string
	if err := objects.List(t.Context(), "", func(i object.Info) error { left = append(left, i.Key); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 || left[0] != history.ObjectKey(ids[0]) {
		t.Errorf("left: %v", left)
	}
}

// TestSurveysOfTrouble: an orphan, and a block that can't be read, have no survey begin again
// in each round.
func TestSurveysOfTrouble(t *testing.T) {
	for _, what := range []string{"nothing", "orphan", "denied"} {
		t.Run(what, func(t *testing.T) {
			objects := &historytest.MemoryObjects{}
			w := newWorld(t, objects, &historytest.MemoryRows{})
			w.c.o.Retentions = func() *history.Retentions {
				return &history.Retentions{Default: history.Retention{Raw: 1000 * time.Hour}}
			}
			r := rand.New(rand.NewPCG(1, 27))
			w.flushes(t, r, 4, "a")
			w.tryOn(t, 4*time.Hour, 10*time.Minute)
			lists, denied := 0, ""
			w.c.o.Objects = &historytest.FaultyObjects{Store: objects, Decide: func(op, key string) historytest.Fault {
				if op == "List" {
					lists++
				}
				if op == "GetRange" && key == denied {
					return historytest.Before
				}
				return historytest.None
			}}
			switch what {
			case "orphan":
				id := ulid.MustNew(ulid.Timestamp(w.now), ulid.DefaultEntropy())
				if err := objects.Put(t.Context(), history.ObjectKey(id), strings.NewReader("x"), 1); err != nil {
					t.Fatal(err)
				}
			case "denied":
				rows, err := w.index.AllBlocks(t.Context(), "a")
				if err != nil || len(rows) != 1 {
					t.Fatal(rows, err)
				}
				denied = rows[0].Object
				w.c.cleaner.due = nil
			}
			w.tryOn(t, 12*time.Hour, 10*time.Minute)
			if lists > 4 {
				t.Errorf("objects were listed %d times in 12 hours", lists)
			}
		})
	}
}

// TestDeleteDenied: who may not delete objects compacts all the same.
func TestDeleteDenied(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	w := newWorld(t, objects, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 28))
	denied := true
	w.c.o.Objects = &historytest.FaultyObjects{Store: objects, Decide: func(op, _ string) historytest.Fault {
		if op == "Delete" && denied {
			return historytest.Before
		}
		return historytest.None
	}}
	start := w.now
	for day := range 3 { // the same slot each time
		w.now = start.Add(time.Duration(day) * 24 * time.Hour)
		w.flushes(t, r, 2, fmt.Sprint("t", day))
		w.tryOn(t, 4*time.Hour, time.Minute)
		if got := w.levels(t, fmt.Sprint("t", day)); got[0] != 0 {
			t.Errorf("day %d: rows by level %v", day, got)
		}
	}
	denied = false
	w.tryOn(t, 2*time.Hour, time.Minute)
	w.idle(t)
}

// whileMerged lets something happen when a merge has read its sources, before it commits.
func (w *world) whileMerged(t *testing.T, happen func()) {
	t.Helper()
	done := false
	w.c.o.Objects = &historytest.FaultyObjects{Store: w.objects, Decide: func(op, _ string) historytest.Fault {
		if op == "Put" && !done {
			done = true
			happen()
		}
		return historytest.None
	}}
	w.pass(t, 4*time.Hour, 10*time.Minute)
	if !done {
		t.Fatal("nothing was merged")
	}
}

// TestDeletedWhileMerged: what is deleted between the reading of the sources and the commit
// is never seen, though it gets into the new block; then it goes from there too. What is
// deleted and cancelled in that time stays.
func TestDeletedWhileMerged(t *testing.T) {
	for _, cancelled := range []bool{false, true} {
		w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
		r := rand.New(rand.NewPCG(1, 31))
		w.flushes(t, r, 4, "a", "b")
		all := w.samplesOf(t, "a")
		w.whileMerged(t, func() {
			id, err := w.history.Delete(t.Context(), "a", math.MinInt64, w.now.UnixMilli())
			if err == nil && cancelled {
				err = w.history.Cancel(t.Context(), "a", id)
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		want := all
		if !cancelled {
			want = 0
		}
		if got := w.samples(t); got != want {
			t.Errorf("cancelled %v: %d samples are seen, want %d", cancelled, got, want)
		}
		if got := w.samplesOf(t, "a"); got != all {
			t.Errorf("cancelled %v: the new block has %d samples, want all %d: the deletion wasn't made in between", cancelled, got, all)
		}
		w.pass(t, 14*24*time.Hour, 6*time.Hour)
		if got := w.samplesOf(t, "a"); got != want {
			t.Errorf("cancelled %v: %d samples are in blocks, want %d", cancelled, got, want)
		}
		if ds := w.deletions(t, "a"); !cancelled && (len(ds) != 1 || ds[0].Gone == 0) {
			t.Errorf("deletions %+v", ds)
		}
	}
}

// TestLapsedWhileMerged: all that a tenant has gets past its retention while it is merged, by
// another configuration. It isn't seen, goes from the new block, and the other tenant's stays.
func TestLapsedWhileMerged(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	r := rand.New(rand.NewPCG(1, 32))
	var rs *history.Retentions
	w.c.o.Retentions = func() *history.Retentions { return rs }
	w.flushes(t, r, 4, "a", "b")
	b := w.samplesOf(t, "b")
	w.whileMerged(t, func() {
		rs = &history.Retentions{Tenants: map[string]history.Retention{"a": {Raw: time.Hour}}}
	})
	if w.samplesOf(t, "a") == 0 {
		t.Error("it was dropped by the merge: the retention wasn't changed in between")
	}
	w.pass(t, 14*24*time.Hour, 6*time.Hour)
	if got := w.traces(t, "a"); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
	if got := w.samplesOf(t, "b"); got != b {
		t.Errorf("the other tenant has %d samples, want %d", got, b)
	}
}

// TestOnlyLate: all that tenants send is old: of days years apart, of the same week as what
// is compacted, past the retention when it comes. It ends in blocks of the last level, one
// for each week, or nowhere.
func TestOnlyLate(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	w.c.o.Retentions = func() *history.Retentions {
		return &history.Retentions{Tenants: map[string]history.Retention{"gone": {Raw: 30 * 24 * time.Hour}}}
	}
	r := rand.New(rand.NewPCG(1, 33))
	want := 0
	year := 365 * 24 * hour
	for round := range 3 {
		for _, age := range []int64{2 * year, 5*year + 3*24*hour, 10 * 24 * hour} {
			at := w.now.UnixMilli() - age - int64(round)*hour
			c := content{}
			for i := range 3 {
				s := someSeries(r, "m", i, at-10*minute, at)
				want += len(s.Floats.T)
				c.add("a", s)
			}
			if age > year {
				c.add("gone", someSeries(r, "m", 1, at-10*minute, at))
			}
			w.flush(t, c)
			w.now = w.now.Add(time.Minute)
		}
		w.pass(t, 36*time.Hour, time.Hour)
	}
	w.pass(t, 21*24*time.Hour, 6*time.Hour)
	if got := w.levels(t, "a"); len(got) != 1 || got[3] < 3 || got[3] > 5 {
		t.Errorf("rows by level %v", got)
	}
	if got := w.samplesOf(t, "a"); got != want {
		t.Errorf("%d samples, want %d", got, want)
	}
	if got := w.traces(t, "gone"); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
	w.idle(t)
}

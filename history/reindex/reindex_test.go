package reindex

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const hour = int64(3_600_000)

// now is that of the newest block.
var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

// flush publishes a block as an ingester does, of two tenants with samples of an
// hour that ends at a time.
func flush(t *testing.T, h *history.History, at int64) {
	t.Helper()
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
	for _, tenant := range []string{"a", "b"} {
		for i := range 3 {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))}
			for ts := at - hour + 1; ts <= at; ts += 60_000 {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts+int64(i)))
			}
			if err := w.Add(tenant, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	id := ulid.MustNew(uint64(at), ulid.DefaultEntropy()) //nolint:gosec // positive
	if err := h.Publish(t.Context(), id, buf.Bytes(), sum); err != nil {
		t.Fatal(err)
	}
}

// all is what an index finds of a tenant: by series, the times of samples.
func all(t *testing.T, objects object.Store, x *index.Index, tenant string) map[string][]int64 {
	t.Helper()
	h, err := history.New(history.Options{Objects: objects, Index: x})
	if err != nil {
		t.Fatal(err)
	}
	s, err := h.Snapshot(t.Context(), tenant, math.MinInt64, math.MaxInt64, nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.Select(t.Context(), nil, math.MinInt64, math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]int64{}
	for set.Next(t.Context()) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			t.Fatal(err)
		}
		out[set.At().Labels.String()] = append([]int64{}, chunkfmt.Merge(runs...).Floats.T...)
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	return out
}

func levels(t *testing.T, x *index.Index, tenant string) map[index.Level]int {
	t.Helper()
	rows, err := x.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	out := map[index.Level]int{}
	for _, r := range rows {
		out[r.Level]++
	}
	return out
}

func run(t *testing.T, o Options) Result {
	t.Helper()
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func compactor(t *testing.T, objects object.Store, x *index.Index, orphanAge time.Duration) *compact.Compactor {
	t.Helper()
	c, err := compact.New(compact.Options{Objects: objects, Index: x, Dir: t.TempDir(), Grace: time.Nanosecond, OrphanAge: orphanAge})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// rounds lets compactors work until there is nothing left to do.
func rounds(t *testing.T, c *compact.Compactor) {
	t.Helper()
	for idle := 0; idle < 4; idle++ { // steps of jobs
		worked, err := c.Round(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if worked {
			idle = 0
		}
	}
}

// TestLost loses the index of a history with blocks of several levels, and some
// that were replaced or never published; makes it again; and compacts what there is.
func TestLost(t *testing.T) {
	objects, old, x := historytest.Files(t, prometheus.NewRegistry()), index.New(&historytest.MemoryRows{}), index.New(&historytest.MemoryRows{})
	h, err := history.New(history.Options{Objects: objects, Index: old})
	if err != nil {
		t.Fatal(err)
	}
	first := now.UnixMilli() - 9*24*hour
	for at := first; at <= now.UnixMilli(); at += 2 * hour {
		flush(t, h, at)
	}
	c := compactor(t, objects, old, 365*24*time.Hour)
	rounds(t, c)
	for i := range int64(3) { // late ones
		flush(t, h, first+i*hour/2)
	}
	if l := levels(t, old, "a"); l[3] == 0 || l[0] != 3 {
		t.Fatalf("rows by level: %v", l)
	}
	want := map[string]map[string][]int64{"a": all(t, objects, old, "a"), "b": all(t, objects, old, "b")}
	n := 0
	if err := objects.List(t.Context(), "", func(object.Info) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := objects.Put(t.Context(), history.ObjectKey(ulid.Make()), bytes.NewReader([]byte("no block at all, but for its name")), 33); err != nil {
		t.Fatal(err)
	}

	o := Options{Objects: objects, Index: x}
	if r := run(t, o); r[Adopt] != n || r[Unreadable] != 1 {
		t.Errorf("dry run: %v, want %d blocks", r, n)
	}
	if l := levels(t, x, "a"); len(l) != 0 {
		t.Errorf("a dry run has written: %v", l)
	}
	o.Write = true
	if r := run(t, o); r[Adopt] != n {
		t.Errorf("%v, want %d blocks", r, n)
	}
	for tenant := range want {
		if d := cmp.Diff(want[tenant], all(t, objects, x, tenant)); d != "" {
			t.Fatalf("tenant %s (-want +got):\n%.2000s", tenant, d)
		}
		// One of the last level lies where one of a lower level does.
		was, is := levels(t, old, tenant), levels(t, x, tenant)
		was[2], was[3] = was[2]+1, was[3]-1
		if d := cmp.Diff(was, is); d != "" {
			t.Errorf("levels of tenant %s (-want +got):\n%s", tenant, d)
		}
	}
	// Again, it is in use.
	if _, err := Run(t.Context(), o); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("written into an index in use: %v", err)
	}
	o.NotEmpty = true
	if r := run(t, o); r[Keep] != n || r[Adopt]+r[Repair] != 0 {
		t.Errorf("again: %v", r)
	}
	rows, err := x.AllBlocks(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := x.DeleteBlocks(t.Context(), "a", []index.RowID{rows[0].ID()}); err != nil {
		t.Fatal(err)
	}
	if r := run(t, o); r[Repair] != 1 || r[Keep] != n-1 {
		t.Errorf("with a row gone: %v", r)
	}
	if d := cmp.Diff(want["a"], all(t, objects, x, "a")); d != "" {
		t.Fatalf("repaired (-want +got):\n%.2000s", d)
	}
	// Compaction takes it on from there: flushes of weeks ago are found.
	rounds(t, compactor(t, objects, x, 365*24*time.Hour))
	for tenant := range want {
		if l := levels(t, x, tenant); l[0] != 0 || l[3] == 0 {
			t.Errorf("compacted, rows by level: %v", l)
		}
		if d := cmp.Diff(want[tenant], all(t, objects, x, tenant)); d != "" {
			t.Fatalf("tenant %s, compacted (-want +got):\n%.2000s", tenant, d)
		}
	}
}

// windows is what an index finds of a tenant: by series, the ends of hours and how many
// samples their windows tell of, without those that are read from samples.
func windows(t *testing.T, objects object.Store, x *index.Index, tenant string) map[string]map[int64]uint64 {
	t.Helper()
	h, err := history.New(history.Options{Objects: objects, Index: x})
	if err != nil {
		t.Fatal(err)
	}
	s, err := h.Snapshot(t.Context(), tenant, 0, now.UnixMilli(), nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.SelectWindows(t.Context(), nil, 0, now.UnixMilli(), history.Summaries{Width: rollup.Long})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[int64]uint64{}
	for set.Next(t.Context()) {
		w, _, err := set.At().Windows(&history.Buffer{})
		if err != nil {
			t.Fatal(err)
		}
		of := map[int64]uint64{}
		for i, end := range w.End {
			of[end] += uint64(w.Count[i])
		}
		out[set.At().Labels.String()] = of
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	return out
}

// TestSummariesAlone loses the index of blocks of which, of one tenant, only summaries
// are left, and makes it again: with those blocks alone, and where the blocks with
// the samples that they replaced are still there. The summaries are seen as before, once,
// and stay when it is compacted.
func TestSummariesAlone(t *testing.T) {
	objects, old := historytest.Files(t, prometheus.NewRegistry()), index.New(&historytest.MemoryRows{})
	h, err := history.New(history.Options{Objects: objects, Index: old})
	if err != nil {
		t.Fatal(err)
	}
	for at := now.UnixMilli() - 9*24*hour + 2*hour; at <= now.UnixMilli(); at += 2 * hour {
		flush(t, h, at)
	}
	rounds(t, compactor(t, objects, old, 365*24*time.Hour))
	samples := all(t, objects, old, "b")
	replaced := map[string][]byte{}
	if err := objects.List(t.Context(), "", func(i object.Info) error {
		b, err := objects.GetRange(t.Context(), i.Key, 0, i.Size)
		replaced[i.Key] = b
		return err
	}); err != nil {
		t.Fatal(err)
	}
	thinning := func(x *index.Index) *compact.Compactor {
		c, err := compact.New(compact.Options{
			Objects: objects, Index: x, Dir: t.TempDir(), Grace: time.Nanosecond, OrphanAge: 365 * 24 * time.Hour,
			CleanAge: time.Nanosecond,
			Retentions: func() *history.Retentions {
				return &history.Retentions{Tenants: map[string]history.Retention{"a": {Raw: time.Hour, Short: 10_000 * 24 * time.Hour, Long: 20_000 * 24 * time.Hour}}}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	rounds(t, thinning(old))
	want := windows(t, objects, old, "a")
	if n := len(all(t, objects, old, "a")["{__name__=\"m\", i=\"0\"}"]); n != 0 || len(want) != 3 || len(want["{__name__=\"m\", i=\"1\"}"]) != 108 {
		t.Fatalf("%d samples are left, windows of %d series", n, len(want))
	}
	check := func(x *index.Index, when string) {
		t.Helper()
		if d := cmp.Diff(want, windows(t, objects, x, "a")); d != "" {
			t.Errorf("%s: windows (-want +got):\n%.2000s", when, d)
		}
		if d := cmp.Diff(samples, all(t, objects, x, "b")); d != "" {
			t.Errorf("%s: samples of the other tenant (-want +got):\n%.2000s", when, d)
		}
	}
	x := index.New(&historytest.MemoryRows{})
	if r := run(t, Options{Objects: objects, Index: x, Write: true}); r[Unreadable] != 0 || r[Adopt] == 0 {
		t.Fatal(r)
	}
	check(x, "blocks alone")
	if d := cmp.Diff(levels(t, old, "a"), levels(t, x, "a")); d != "" {
		t.Errorf("levels (-want +got):\n%s", d)
	}
	if r := run(t, Options{Objects: objects, Index: x, Write: true, NotEmpty: true}); r[Keep] == 0 || r[Repair]+r[Adopt] != 0 {
		t.Errorf("again: %v", r)
	}
	for key, b := range replaced {
		if err := objects.Put(t.Context(), key, bytes.NewReader(b), int64(len(b))); err != nil {
			t.Fatal(err)
		}
	}
	x = index.New(&historytest.MemoryRows{})
	if r := run(t, Options{Objects: objects, Index: x, Write: true}); r[Unreadable] != 0 {
		t.Fatal(r)
	}
	check(x, "with what they replaced")
	c := thinning(x)
	for range 3 { // surveys
		rounds(t, c)
	}
	check(x, "compacted")
	if n := len(all(t, objects, x, "a")["{__name__=\"m\", i=\"0\"}"]); n != 0 {
		t.Errorf("%d samples are left", n)
	}
}

// TestLeft leaves what is condemned, and lowers what overlaps.
func TestLeft(t *testing.T) {
	t.Run("local", func(t *testing.T) {
		testLeft(t, historytest.Files(t, prometheus.NewRegistry()), index.New(historytest.Bolt(t, prometheus.NewRegistry())))
	})
	t.Run("aws", func(t *testing.T) {
		testLeft(t, historytest.S3(t, prometheus.NewRegistry()), index.New(historytest.DynamoDB(t, prometheus.NewRegistry())))
	})
}

func testLeft(t *testing.T, objects object.Store, x *index.Index) {
	t.Helper()
	put := func(level int, at int64) ulid.ULID {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Level: level})
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m"), Floats: chunkfmt.Floats{T: []int64{at}, V: []float64{1}}}
		if err := w.Add("a", s); err != nil {
			t.Fatal(err)
		}
		sum, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		id := ulid.Make()
		if err := objects.Put(context.Background(), history.ObjectKey(id), bytes.NewReader(buf.Bytes()), sum.Size); err != nil {
			t.Fatal(err)
		}
		return id
	}
	week := 7 * 24 * hour
	condemned := put(0, 1)
	if _, err := x.Guard(t.Context(), condemned, index.Condemned); err != nil {
		t.Fatal(err)
	}
	want := map[ulid.ULID]index.Level{
		put(3, 10*week): 2, put(2, 10*week-5): 2, // of one week, (9, 10]
		put(3, 10*week+1): 3, put(1, 9*week): 1, put(3, -1): 2, put(2, 0): 2,
	}
	got := map[ulid.ULID]index.Level{}
	r := run(t, Options{Objects: objects, Index: x, Write: true, NotEmpty: true, Report: func(e Event) {
		if e.Action == Adopt {
			got[e.Block] = e.Level
		}
	}})
	if d := cmp.Diff(want, got); d != "" || r[Leave] != 1 {
		t.Errorf("%v (-want +got):\n%s", r, d)
	}
	work, err := x.Compacted(t.Context())
	if err != nil || len(work) != 5 {
		t.Errorf("%d work rows, %v", len(work), err)
	}
}

// TestSweepOfLostIndex: a compactor that finds an empty index removes nothing.
func TestSweepOfLostIndex(t *testing.T) {
	objects, old, x := historytest.Files(t, prometheus.NewRegistry()), index.New(&historytest.MemoryRows{}), index.New(&historytest.MemoryRows{})
	h, err := history.New(history.Options{Objects: objects, Index: old})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(40) {
		flush(t, h, now.UnixMilli()-(100+i)*24*hour)
	}
	age := time.Nanosecond
	if _, err := compactor(t, objects, x, age).Round(t.Context()); err == nil {
		t.Error("a sweep of a lost index goes well")
	}
	if r := run(t, Options{Objects: objects, Index: x, Write: true}); r[Adopt] != 40 {
		t.Errorf("%v", r)
	}
	if _, err := compactor(t, objects, x, age).Round(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestDamaged: of an index with damaged rows those of blocks are written anew, and what
// can't be decided is named.
func TestDamaged(t *testing.T) {
	objects, rows := &historytest.MemoryObjects{}, &historytest.MemoryRows{}
	x := index.New(rows)
	h, err := history.New(history.Options{Objects: objects, Index: x})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		flush(t, h, now.UnixMilli()-int64(3-i)*hour)
	}
	want := all(t, objects, x, "a")
	found, err := x.AllBlocks(t.Context(), "a")
	if err != nil || len(found) != 4 {
		t.Fatal(found, err)
	}
	j := index.Job{Level: 1, Slot: 3, State: index.JobMerging, ID: found[0].Block}
	if err := x.SwapJob(t.Context(), index.Job{Level: 1, Slot: 3}, j); err != nil {
		t.Fatal(err)
	}
	for _, hash := range []string{"b/a", "compaction/jobs", "g/" + found[2].Block.String()} {
		items, err := rows.Query(t.Context(), index.Query{Hash: hash, Consistent: true})
		if err != nil || len(items) == 0 {
			t.Fatal(items, err)
		}
		items[0].Value[1] ^= 1
		if err := rows.Put(t.Context(), items[:1]); err != nil {
			t.Fatal(err)
		}
	}
	o := Options{Objects: objects, Index: x, Write: true, NotEmpty: true}
	if r := run(t, o); r[Unreadable] != 1 || r[Repair] == 0 {
		t.Errorf("%v", r)
	}
	if d := cmp.Diff(want, all(t, objects, x, "a")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if r := run(t, o); r[Unreadable] != 1 || r[Keep] != 3 {
		t.Errorf("again: %v", r)
	}
}

package compact

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

func (w *world) intake(t *testing.T, span int64) *Intake {
	t.Helper()
	in, err := NewIntake(IntakeOptions{Objects: w.objects, Index: w.index, Dir: t.TempDir(), Tenant: "a"}, span)
	if err != nil {
		t.Fatal(err)
	}
	in.out.now = w.c.now
	return in
}

// check sees that the visible blocks of tenant "a" hold what is wanted.
func (w *world) check(t *testing.T, want content) {
	t.Helper()
	s, err := w.history.Snapshot(t.Context(), "a", math.MinInt64, math.MaxInt64, nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	var refs []index.BlockRef
	for _, b := range s.Blocks {
		refs = append(refs, index.BlockRef{Block: b.ID, Object: b.Object, ObjectSize: b.ObjectSize})
	}
	if d := cmp.Diff(want, read(t, w.objects, refs, maxRead, math.MinInt64, math.MaxInt64), cmpContent); d != "" {
		t.Fatalf("(-want +got):\n%.2000s", d)
	}
}

// TestIntakeLevels: what comes two hours at a time begins below what comes by days,
// and nothing at the last level.
func TestIntakeLevels(t *testing.T) {
	for _, x := range []struct {
		ranges []time.Duration
		span   int64
		level  index.Level
		width  int64
	}{
		{nil, 2 * hour, 1, 24 * hour},
		{nil, 24*hour - 1, 1, 24 * hour},
		{nil, 24 * hour, 2, 24 * hour},
		{nil, 31 * 24 * hour, 2, 24 * hour},
		{[]time.Duration{2 * time.Hour}, 1000 * hour, 1, 2 * hour},
		{[]time.Duration{2 * time.Hour, 24 * time.Hour}, 1000 * hour, 1, 24 * hour},
	} {
		in, err := NewIntake(IntakeOptions{
			Objects: historytest.Files(t, prometheus.NewRegistry()), Index: index.New(historytest.Bolt(t, prometheus.NewRegistry())),
			Dir: t.TempDir(), Tenant: "a", Ranges: x.ranges,
		}, x.span)
		if err != nil {
			t.Fatal(err)
		}
		if in.Level() != x.level || in.Width() != x.width {
			t.Errorf("%v, %d: level %d, width %d", x.ranges, x.span, in.Level(), in.Width())
		}
	}
}

// TestIntakeIsCompacted puts two weeks into history from elsewhere, and sees that
// compaction makes weeks of them.
func TestIntakeIsCompacted(t *testing.T) {
	t.Parallel() // it mostly waits for servers
	onStores(t, func(t *testing.T, objects object.Store, rows index.Store) {
		w := newWorld(t, objects, rows)
		r := rand.New(rand.NewPCG(1, 2))
		want := content{}
		in := w.intake(t, 14*day)
		start := w.now.UnixMilli() - 20*day
		for i := range 3 {
			s := someSeries(r, fmt.Sprintf("m%d", i), 2, start, start+14*day)
			want.add("a", s)
			if err := in.Add(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		blocks, err := in.Finish(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := w.levels(t, "a"); len(got) != 0 {
			t.Fatalf("visible before it is published: %v", got)
		}
		for range 2 { // it may be repeated
			if err := in.Publish(t.Context(), blocks); err != nil {
				t.Fatal(err)
			}
		}
		if got := w.levels(t, "a"); got[2] < 10 || len(got) != 1 {
			t.Fatalf("rows by level %v", got)
		}
		w.check(t, want)
		w.pass(t, 5*24*time.Hour, time.Hour)
		if got := w.levels(t, "a"); got[2] != 0 || got[3] < 2 || got[3] > 4 {
			t.Errorf("rows by level %v after compaction", got)
		}
		w.check(t, want)
	})
}

func TestIntakeCondemned(t *testing.T) {
	w := newWorld(t, historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry()))
	in := w.intake(t, day)
	s := someSeries(rand.New(rand.NewPCG(1, 2)), "m", 1, 1, 3*day)
	s.Labels = labels.FromStrings("__name__", "m")
	if err := in.Add(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	blocks, err := in.Finish(t.Context())
	if err != nil || len(blocks) < 2 {
		t.Fatal(blocks, err)
	}
	if _, err := w.index.Guard(t.Context(), blocks[0].Block, index.Condemned); err != nil {
		t.Fatal(err)
	}
	if err := in.Publish(t.Context(), blocks); !errors.Is(err, ErrCondemned) {
		t.Errorf("published: %v", err)
	}
	rows, err := w.index.AllBlocks(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if r.Block == blocks[0].Block {
			t.Errorf("a row of a condemned block is left: %+v", r)
		}
	}
	work, err := w.index.Compacted(t.Context())
	if err != nil || len(work) != len(rows) {
		t.Errorf("%d work rows, %d block rows, %v", len(work), len(rows), err)
	}
}

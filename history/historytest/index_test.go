package historytest

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

func onIndexes(t *testing.T, test func(*testing.T, index.Store)) {
	t.Run("bolt", func(t *testing.T) { test(t, Bolt(t, prometheus.NewRegistry())) })
	t.Run("dynamodb", func(t *testing.T) { test(t, DynamoDB(t, prometheus.NewRegistry())) })
}

func blockRow(tenant string, mint, maxt int64) index.BlockRow {
	return index.BlockRow{
		Tenant: tenant, Block: ulid.Make(), MinT: mint, MaxT: maxt, Object: "o", ObjectSize: 100,
		Directory: chunkfmt.Location{Offset: 10, Size: 20},
	}
}

func TestBlocksByTime(t *testing.T) {
	onIndexes(t, func(t *testing.T, s index.Store) {
		x := index.New(s)
		const w = index.Width
		rows := []index.BlockRow{
			blockRow("a", math.MinInt64, math.MinInt64), blockRow("a", -w, 0), blockRow("a", -10, -1), blockRow("a", 0, 0),
			blockRow("a", 0, w), blockRow("a", w, w), blockRow("a", w, 2*w), blockRow("a", math.MaxInt64-w, math.MaxInt64),
		}
		other := blockRow("ab", 0, w)
		if err := x.PutBlocks(t.Context(), append([]index.BlockRow{other}, rows...)); err != nil {
			t.Fatal(err)
		}
		order := func(a, b index.BlockRow) int {
			if a.MaxT != b.MaxT {
				if a.MaxT < b.MaxT {
					return -1
				}
				return 1
			}
			return slices.Compare(a.Block[:], b.Block[:])
		}
		for _, r := range [][2]int64{
			{math.MinInt64, math.MaxInt64},
			{0, 0},
			{-1, -1},
			{1, w - 1},
			{w, w},
			{w + 1, 2 * w},
			{3 * w, 4 * w},
			{math.MaxInt64, math.MaxInt64},
			{math.MinInt64, math.MinInt64},
			{5, 4},
		} {
			want := []index.BlockRow{}
			for _, row := range rows {
				if row.MinT <= r[1] && r[0] <= row.MaxT && r[0] <= r[1] {
					want = append(want, row)
				}
			}
			slices.SortFunc(want, order)
			got, err := x.Blocks(t.Context(), "a", r[0], r[1], true)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) == 0 {
				got = []index.BlockRow{}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("blocks of %d to %d (-want +got):\n%s", r[0], r[1], d)
			}
		}
		if err := x.DeleteBlocks(t.Context(), "a", []index.RowID{rows[3].ID()}); err != nil {
			t.Fatal(err)
		}
		got, err := x.Blocks(t.Context(), "a", 0, 0, true)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 2 {
			t.Errorf("%d rows at 0 after a deletion, want 2", len(got))
		}
	})
}

func TestWork(t *testing.T) {
	onIndexes(t, func(t *testing.T, s index.Store) {
		x := index.New(s)
		w := index.NewWorkRow(ulid.Make())
		w.Object, w.ObjectSize, w.Tenants = "o", 7, []string{"a", "b"}
		for range 2 {
			if err := x.PutWork(t.Context(), w); err != nil {
				t.Fatal(err)
			}
		}
		got, err := x.Work(t.Context(), w.Day, w.Shard)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]index.WorkRow{w}, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
		if err := x.DeleteWork(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		if got, err := x.Work(t.Context(), w.Day, w.Shard); err != nil || len(got) != 0 {
			t.Errorf("%d work rows after deletion, %v", len(got), err)
		}
	})
}

func TestGuard(t *testing.T) {
	onIndexes(t, func(t *testing.T, s index.Store) {
		x := index.New(s)
		for _, first := range []index.GuardState{index.Published, index.Condemned} {
			id := ulid.Make()
			if s, err := x.GuardState(t.Context(), id); s != 0 || err != nil {
				t.Errorf("state of an unknown block: %s, %v", s, err)
			}
			for _, s := range []index.GuardState{first, index.Published, index.Condemned} {
				if got, err := x.Guard(t.Context(), id, s); got != first || err != nil {
					t.Errorf("%s after %s: %s, %v", s, first, got, err)
				}
			}
			if s, err := x.GuardState(t.Context(), id); s != first || err != nil {
				t.Errorf("state is %s, want %s, %v", s, first, err)
			}
		}
	})
}

// TestDamagedRow holds that a damaged row is an error that names it.
func TestDamagedRow(t *testing.T) {
	damaged := false
	x := index.New(&FaultyRows{Bolt(t, prometheus.NewRegistry()), func(op, _ string) Fault {
		if damaged && op == "Query" {
			return Corrupt
		}
		return None
	}})
	if err := x.PutBlocks(context.Background(), []index.BlockRow{blockRow("a", 0, 1)}); err != nil {
		t.Fatal(err)
	}
	damaged = true
	_, err := x.Blocks(t.Context(), "a", 0, 1, true)
	var rowErr *index.RowError
	if !errors.As(err, &rowErr) || rowErr.Hash != "b/a" || !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("%v, want a RowError", err)
	}
}

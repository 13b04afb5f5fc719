package compact

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
)

// TestRollups follows a tenant through the levels: blocks of a day and of a week
// tell all windows of their samples, whatever was flushed twice and whenever. Late
// samples make the windows void that they lie in.
func TestRollups(t *testing.T) {
	w := newWorld(t, historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry()))
	w.now = time.Date(2026, 5, 27, 23, 0, 0, 0, time.UTC) // a week begins in an hour
	from := w.now.UnixMilli()
	series := func(i int, mint, maxt int64) *chunkfmt.Series {
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))}
		for at := mint - mint%15_000 + 15_000; at <= maxt; at += 15_000 {
			s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, float64(at%(7*rollup.Long)/1000*int64(i+1)))
		}
		return s
	}
	put := func(mint, maxt int64) {
		c := content{}
		for i := range 3 {
			c.add("a", series(i, mint, maxt))
		}
		w.flush(t, c)
	}
	last := from
	for range 40 {
		w.now = w.now.Add(45 * time.Minute)
		put(last-rollup.Short/2, w.now.UnixMilli()) // some of it is sent again
		last = w.now.UnixMilli()
	}
	to := last
	lateFrom, lateTo := from+4*rollup.Long+60_000, from+5*rollup.Long+60_000 // two windows of an hour

	// covered is how much of the time is told by windows of a width, which are those
	// of the samples.
	covered := func(width int64) []chunkfmt.Range {
		t.Helper()
		snap, err := w.history.Snapshot(t.Context(), "a", math.MinInt64, math.MaxInt64, nil, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		set, err := snap.SelectWindows(t.Context(), nil, from, to, history.Summaries{Width: width, Columns: rollup.AllColumns &^ rollup.M2})
		if err != nil {
			t.Fatal(err)
		}
		var buf history.Buffer
		var sum rollup.Summariser
		var all []chunkfmt.Range
		n := 0
		for set.Next(t.Context()) {
			got, covered, err := set.At().Windows(&buf)
			if err != nil {
				t.Fatal(err)
			}
			got.Expand(got.Columns())
			var short, want rollup.Windows
			for _, c := range covered {
				sum.Summarise(&short, series(n, max(from-rollup.Short/2, c.MinT-1), min(to, c.MaxT)).Samples(), rollup.Short)
			}
			rollup.Widen(&want, &short, width)
			want.M2 = nil
			if d := cmp.Diff(want, *got); d != "" {
				t.Fatalf("series %d, covered %v: %s", n, covered, d)
			}
			if n > 0 && !slices.Equal(covered, all) {
				t.Fatalf("covered %v and %v", covered, all)
			}
			all = slices.Clone(covered)
			n++
		}
		if set.Err() != nil || n != 3 {
			t.Fatal(set.Err(), n)
		}
		return all
	}
	if got := covered(rollup.Long); len(got) != 0 {
		t.Errorf("windows before compaction: %v", got)
	}
	w.pass(t, 4*time.Hour, 10*time.Minute)
	if got := w.levels(t, "a"); got[1] == 0 || got[2] == 0 {
		t.Fatalf("rows by level %v", got)
	}
	// What else has been flushed is in blocks of two hours, which have none.
	for _, width := range []int64{rollup.Short, rollup.Long} {
		if got := covered(width); len(got) != 1 || got[0].MaxT-got[0].MinT < 12*rollup.Long {
			t.Errorf("windows of a day: %v", got)
		}
	}
	w.pass(t, 14*24*time.Hour, 6*time.Hour)
	if got := w.levels(t, "a"); len(got) != 1 || got[3] != 2 {
		t.Fatalf("rows by level %v", got)
	}
	for _, width := range []int64{rollup.Short, rollup.Long} {
		if got := covered(width); len(got) != 1 || got[0].MinT > from+1 || got[0].MaxT < to-width {
			t.Errorf("windows of weeks: %v, of %d to %d", got, from, to)
		}
	}
	put(lateFrom, lateTo)
	want := []chunkfmt.Range{{MinT: lateFrom - 60_000 + 1, MaxT: lateFrom - 60_000 + 2*rollup.Long}}
	if got := covered(rollup.Long); len(got) != 2 || got[0].MaxT+1 != want[0].MinT || got[1].MinT != want[0].MaxT+1 {
		t.Errorf("windows beside late samples: %v, want all but %v", got, want)
	}
}

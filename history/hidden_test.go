package history

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// TestHiddenModel compares what is hidden with what each deletion says by itself.
func TestHiddenModel(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	for range 300 {
		var ds []index.Deletion
		for range r.IntN(5) {
			a := r.Int64N(100)
			d := index.Deletion{MinT: a, MaxT: a + r.Int64N(20)}
			switch r.IntN(8) {
			case 0:
				d.MinT = math.MinInt64
			case 1:
				d.MaxT = math.MaxInt64
			}
			switch r.IntN(4) {
			case 0:
				d.Matchers = []*labels.Matcher{re("a", "1|2"), eq("__name__", fmt.Sprint("m", r.IntN(3)))}
			case 1:
				d.Matchers = []*labels.Matcher{eq("a", "1")}
			case 2:
				d.Matchers = []*labels.Matcher{labels.MustNewMatcher(labels.MatchNotEqual, "a", "")}
			}
			ds = append(ds, d)
		}
		before := int64(math.MinInt64)
		if r.IntN(3) == 0 {
			before = r.Int64N(100)
		}
		all := NewHidden(ds, Before(before))
		lo := r.Int64N(100)
		hi := lo + r.Int64N(30)
		for _, h := range []*Hidden{all, all.Within(lo, hi)} {
			for m := range 3 {
				for _, a := range []string{"", "1", "2", "3"} {
					ls := labels.FromStrings("__name__", fmt.Sprint("m", m), "a", a)
					is := func(ts int64) bool {
						return ts < before || slices.ContainsFunc(ds, func(d index.Deletion) bool { return d.Overlaps(ts, ts) && d.Matches(ls) })
					}
					hidden := h.Of(ls)
					some := false
					for ts := lo; ts <= hi; ts++ {
						if got := Covers(hidden, ts, ts); got != is(ts) {
							t.Fatalf("%v at %d: hidden %v, of %v", ls, ts, got, ds)
						}
						some = some || ts > lo && is(ts)
						if h.All(ts, ts) && !is(ts) {
							t.Fatalf("all is hidden at %d, of %v", ts, ds)
						}
					}
					if got := h.Touches(ls, lo, hi); got != some {
						t.Fatalf("%v in (%d, %d]: touched %v, of %v", ls, lo, hi, got, ds)
					}
				}
			}
		}
	}
}

func TestCut(t *testing.T) {
	s := &chunkfmt.Series{Labels: labels.FromStrings("a", "b")}
	for ts := range int64(10) {
		h := tsdbutil.GenerateTestHistogram(ts)
		h.CounterResetHint = histogram.NotCounterReset
		s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts))
		s.Histograms.T, s.Histograms.H = append(s.Histograms.T, ts), append(s.Histograms.H, h)
		s.Exemplars = append(s.Exemplars, exemplar.Exemplar{Ts: ts})
	}
	Cut(s, []chunkfmt.Range{{MinT: math.MinInt64, MaxT: 1}, {MinT: 4, MaxT: 4}, {MinT: 8, MaxT: math.MaxInt64}})
	want := []int64{2, 3, 5, 6, 7}
	if d := cmp.Diff(want, s.Floats.T); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]float64{2, 3, 5, 6, 7}, s.Floats.V); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(want, s.Histograms.T); d != "" {
		t.Error(d)
	}
	for i, h := range s.Histograms.H {
		if unknown := h.CounterResetHint == histogram.UnknownCounterReset; unknown != (i == 2) {
			t.Errorf("hint of the sample at %d: %v", s.Histograms.T[i], h.CounterResetHint)
		}
	}
	if n := len(s.Exemplars); n != 5 {
		t.Errorf("%d exemplars", n)
	}
}

// TestDeleted: what is deleted at one gateway is gone at another that has rows and
// pages in memory, within seconds; a cancelled deletion is undone; what comes later
// is deleted too, but not what is newer than the deletion.
func TestDeleted(t *testing.T) {
	st := localStores(t)
	now := time.UnixMilli(1_800_000_000_000)
	clock := func() time.Time { return now }
	a, b := st.open(t, nil), st.open(t, nil)
	a.now, b.now = clock, clock
	const from, step, n = 1_700_000_000_000, 15_000, 100
	value := func(i int) float64 { return float64(i) }
	kept := floats(from, step, n, value, "__name__", "kept")
	gone := floats(from, step, n, value, "__name__", "gone")
	part := floats(from, step, n, value, "__name__", "part")
	publish(t, a, tenantSeries{"t": {gone, kept, part}, "u": {gone}})
	read := func(h *History, tenant string) []*chunkfmt.Series {
		return selectAll(t, snapshot(t, h, tenant, from, from+step*n), from, from+step*n)
	}
	wantSeries(t, read(b, "t"), []*chunkfmt.Series{gone, kept, part}) // warm

	id, err := a.Delete(t.Context(), "t", from, from+step*n, eq("__name__", "gone"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Delete(t.Context(), "t", math.MinInt64, from+step*50-1, eq("__name__", "part")); err != nil {
		t.Fatal(err)
	}
	half := floats(from+step*50, step, n-50, func(i int) float64 { return value(i + 50) }, "__name__", "part")
	wantSeries(t, read(a, "t"), []*chunkfmt.Series{kept, half})
	now = now.Add(deletionsAge)
	wantSeries(t, read(b, "t"), []*chunkfmt.Series{kept, half})
	wantSeries(t, read(b, "u"), []*chunkfmt.Series{gone}) // another tenant's

	s := snapshot(t, b, "t", from, from+step*n)
	names := func(mint, maxt int64) []string {
		all, err := s.Series(t.Context(), nil, mint, maxt)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, ls := range all {
			out = append(out, ls.Get("__name__"))
		}
		return out
	}
	if d := cmp.Diff([]string{"kept", "part"}, names(from, from+step*n)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"kept"}, names(from, from+step*49)); d != "" {
		t.Error(d)
	}

	// It is sent again.
	publish(t, a, tenantSeries{"t": {gone}})
	for _, h := range []*History{a, b, st.open(t, nil)} {
		h.rows.Remove(rowSetKey{"t", alignDown(from), alignUp(from + step*n)})
		wantSeries(t, read(h, "t"), []*chunkfmt.Series{kept, half})
	}

	if err := b.Cancel(t.Context(), "t", id); err != nil {
		t.Fatal(err)
	}
	if err := b.Cancel(t.Context(), "t", id); !errors.Is(err, ErrNoDeletion) {
		t.Errorf("cancelled twice: %v", err)
	}
	now = now.Add(deletionsAge)
	wantSeries(t, read(a, "t"), []*chunkfmt.Series{gone, kept, half})
	if ds, err := a.Deletions(t.Context(), "t"); err != nil || len(ds) != 1 {
		t.Errorf("in force: %v, %v", ds, err)
	}
}

// TestDeletionsUnknown: while the index can't be read, what was known is used for as
// long as rows are, and then the query fails rather than give what is deleted.
func TestDeletionsUnknown(t *testing.T) {
	st := localStores(t)
	h := st.open(t, nil)
	now := time.UnixMilli(1_800_000_000_000)
	h.now = func() time.Time { return now }
	s := floats(1000, 1000, 10, constant(1), "__name__", "m")
	publish(t, h, tenantSeries{"t": {s}})
	if _, err := h.Delete(t.Context(), "t", 0, 5000, eq("__name__", "m")); err != nil {
		t.Fatal(err)
	}
	rest := floats(6000, 1000, 5, constant(1), "__name__", "m")
	read := func() ([]*chunkfmt.Series, error) {
		snap, err := h.Snapshot(t.Context(), "t", 0, 10_000, nil, time.Time{})
		if err != nil {
			return nil, err
		}
		return trySelect(t.Context(), snap, 0, 10_000)
	}
	if got, err := read(); err != nil {
		t.Fatal(err)
	} else {
		wantSeries(t, got, []*chunkfmt.Series{rest})
	}
	failed := 0
	st.setFault(func(op, _ string) historytest.Fault {
		if op == "Query" {
			failed++
			return historytest.Before
		}
		return historytest.None
	})
	for range 3 {
		now = now.Add(deletionsAge)
		if got, err := read(); err != nil {
			t.Fatal(err)
		} else {
			wantSeries(t, got, []*chunkfmt.Series{rest})
		}
	}
	if failed == 0 || failed > 2 {
		t.Errorf("%d looks in 6 s, want one that fails, and no other for some seconds", failed)
	}
	now = now.Add(h.o.VisibilityDelay)
	if _, err := read(); err == nil {
		t.Error("a query is answered though deletions aren't known")
	}
}

// TestDeletionsUnreadable: a row of deletions that can't be read fails the queries of
// its tenant, and nobody else's.
func TestDeletionsUnreadable(t *testing.T) {
	st := localStores(t)
	h := st.open(t, nil)
	s := floats(1000, 1000, 10, constant(1), "__name__", "m")
	publish(t, h, tenantSeries{"t": {s}, "u": {s}})
	bad := index.Item{Key: index.Key{Hash: "deletions", Range: []byte("\x01t")}, Value: []byte("of another version")}
	if err := st.rows.Put(t.Context(), []index.Item{bad}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Snapshot(t.Context(), "t", 0, 10_000, nil, time.Time{}); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("a query is answered though the tenant's deletions can't be read: %v", err)
	}
	if _, err := h.Delete(t.Context(), "t", 0, 5000); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("the row is written over: %v", err)
	}
	if _, err := h.Delete(t.Context(), "u", 0, 5000); err != nil {
		t.Fatal(err)
	}
	wantSeries(t, selectAll(t, snapshot(t, h, "u", 0, 10_000), 0, 10_000), []*chunkfmt.Series{floats(6000, 1000, 5, constant(1), "__name__", "m")})
}

// TestPastRetention: what is past it isn't read, though blocks have it.
func TestPastRetention(t *testing.T) {
	st := localStores(t)
	now := time.UnixMilli(1_700_000_000_000).Truncate(time.Minute)
	h := st.open(t, func(o *Options) {
		o.Retentions = func() *Retentions {
			return &Retentions{Tenants: map[string]Retention{"short": {Raw: time.Hour}}}
		}
	})
	h.now = func() time.Time { return now }
	from := now.Add(-2 * time.Hour).UnixMilli()
	const minute = 60_000
	s := floats(from, minute, 120, func(i int) float64 { return float64(i) }, "__name__", "m")
	old := floats(from, minute, 30, constant(1), "__name__", "old")
	publish(t, h, tenantSeries{"short": {s, old}, "long": {s, old}})
	read := func(tenant string) []*chunkfmt.Series {
		return selectAll(t, snapshot(t, h, tenant, from, now.UnixMilli()), from, now.UnixMilli())
	}
	wantSeries(t, read("long"), []*chunkfmt.Series{s, old})
	half := floats(from+60*minute, minute, 60, func(i int) float64 { return float64(i + 60) }, "__name__", "m")
	wantSeries(t, read("short"), []*chunkfmt.Series{half})
	if all, err := snapshot(t, h, "short", from, now.UnixMilli()).Series(t.Context(), nil, from, now.UnixMilli()); err != nil || len(all) != 1 {
		t.Errorf("series %v, %v", all, err)
	}
	now = now.Add(3 * time.Hour)
	if got := read("short"); len(got) != 0 {
		t.Errorf("%d series are left", len(got))
	}
}

// lostAnswer is an index whose first conditional write is done, then another's, and
// then says what a client's own repetition finds: a row that is another.
type lostAnswer struct {
	index.Store
	then func()
}

func (l *lostAnswer) PutIf(ctx context.Context, it index.Item, old []byte) ([]byte, error) {
	got, err := l.Store.PutIf(ctx, it, old)
	if then := l.then; then != nil && err == nil {
		l.then = nil
		then()
		return got, index.ErrConflict
	}
	return got, err
}

// TestDeletionAnswerLost: a deletion whose answer is lost is made once, and a
// cancellation whose answer is lost is one that happened.
func TestDeletionAnswerLost(t *testing.T) {
	st := localStores(t)
	other := st.open(t, nil)
	rows := &lostAnswer{Store: st.rows}
	h := st.open(t, func(o *Options) { o.Index = index.New(rows) })
	meanwhile := func() {
		if err := other.Clean(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	}
	if _, err := other.Delete(t.Context(), "a", 0, 1); err != nil {
		t.Fatal(err)
	}
	rows.then = meanwhile
	id, err := h.Delete(t.Context(), "a", 0, 1000, eq("__name__", "m"))
	if err != nil {
		t.Fatal(err)
	}
	if ds, err := h.Deletions(t.Context(), "a"); err != nil || len(ds) != 2 {
		t.Errorf("two deletions are %d, %v", len(ds), err)
	}
	rows.then = meanwhile
	if err := h.Cancel(t.Context(), "a", id); err != nil {
		t.Error(err)
	}
	if ds, err := h.Deletions(t.Context(), "a"); err != nil || len(ds) != 1 || ds[0].ID == id {
		t.Errorf("after one was cancelled: %v, %v", ds, err)
	}
	if err := h.Cancel(t.Context(), "a", id); !errors.Is(err, ErrNoDeletion) {
		t.Errorf("cancelled again: %v", err)
	}
}

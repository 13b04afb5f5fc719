package compact

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// someSamples has floats of some kind in a range, and perhaps histograms.
func someSamples(r *rand.Rand, i int, mint, maxt int64) *chunkfmt.Series {
	s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", fmt.Sprint("m", i%3), "i", fmt.Sprint(i))}
	interval := []int64{15_000, 15_000, 30_000, 60_000, 600_000, 15_000}[i%6]
	t := mint + r.Int64N(interval)
	x := float64(r.IntN(1000))
	for ; t <= maxt; t += interval {
		switch i % 4 {
		case 0:
			x += float64(r.IntN(20))
		case 1:
			x = math.Round(r.NormFloat64()*1e4) / 1e3
		case 2:
			x = r.NormFloat64()
		case 3:
			x += float64(r.IntN(2))
		}
		if r.IntN(1000) == 0 {
			x = 0
		}
		if r.IntN(400) == 0 {
			t += r.Int64N(10 * hour)
			continue
		}
		v := x
		if r.IntN(500) == 0 {
			v = math.Float64frombits(value.StaleNaN)
		}
		if r.IntN(3000) == 0 {
			v = []float64{math.Inf(1), math.NaN(), 1e300, 0.1}[r.IntN(4)]
		}
		s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, v)
	}
	if i == 5 && r.IntN(3) == 0 && len(s.Floats.T) == 0 {
		s.Histograms.T, s.Histograms.H = []int64{maxt}, []*histogram.Histogram{tsdbutil.GenerateTestHistogram(1)}
	}
	return s
}

// merged gives the blocks that a merge of sources makes.
func merged(t *testing.T, objects *historytest.MemoryObjects, blocks []index.BlockRef, rollups bool, hidden func(string) *history.Hidden) (rows []index.CompactedRow) {
	t.Helper()
	o := &outputs{
		objects: objects, dir: t.TempDir(), width: history.Window, level: 3, maxBytes: 1 << 30, ownBytes: 1 << 30,
		now: time.Now, entropy: crand.Reader, beat: func(context.Context) error { return nil }, shared: map[int64]*output{}, own: map[int64]*output{},
		writer: chunkfmt.WriterOptions{Window: history.Window, Rollups: true},
	}
	m := &merger{rollups: rollups, hidden: hidden}
	for i, b := range blocks {
		s, err := openSource(t.Context(), objects, b, []int64{1 << 20, 5000, 20_000}[i%3])
		if err != nil {
			t.Fatal(err)
		}
		m.sources = append(m.sources, s)
	}
	for _, p := range plan(m.sources, o.width, 8) {
		if err := m.merge(t.Context(), p.MinT, p.MaxT, o); err != nil {
			t.Fatal(err)
		}
		if err := o.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return o.done
}

// TestReusedSummaries: a week is to the last bit the same, whether the windows of its
// days are reused or made anew, with late samples, copies, and days without windows.
func TestReusedSummaries(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 5))
		objects := &historytest.MemoryObjects{}
		start := 2900 * history.Window
		var blocks []index.BlockRef
		for d := range int64(7) {
			c := content{}
			for i := range 12 {
				if s := someSamples(r, i, start+d*day+1, start+(d+1)*day); r.IntN(8) > 0 && len(s.Floats.T)+len(s.Histograms.T) > 0 {
					c.add("a", s)
				}
			}
			blocks = append(blocks, put(t, objects, chunkfmt.WriterOptions{Window: history.Window, Rollups: r.IntN(6) > 0, PageSeries: 5, PageBytes: 3000}, c))
		}
		for range r.IntN(3) { // late
			c := content{}
			from := start + r.Int64N(6*day)
			for i := range 12 {
				if s := someSamples(r, i, from, from+r.Int64N(4*hour)); r.IntN(2) == 0 && len(s.Floats.T)+len(s.Histograms.T) > 0 {
					c.add("a", s)
				}
			}
			if len(c) > 0 {
				blocks = append(blocks, put(t, objects, chunkfmt.WriterOptions{Window: history.Window, Rollups: r.IntN(2) == 0}, c))
			}
		}
		reused, anew := merged(t, objects, blocks, true, nil), merged(t, objects, blocks, false, nil)
		if len(reused) != 1 || len(anew) != 1 {
			t.Fatal(reused, anew)
		}
		if a, b := bytesAt(t, objects, reused[0].BlockRef), bytesAt(t, objects, anew[0].BlockRef); !bytes.Equal(a, b) {
			t.Errorf("seed %d: %d and %d other bytes", seed, len(a), len(b))
		}
	}
}

// TestReusedBefore: summaries in blocks that were written before there were groups of
// columns are reused too, here such of samples that are gone.
func TestReusedBefore(t *testing.T) {
	objects := &historytest.MemoryObjects{}
	var made [][]byte
	for _, name := range []string{"block-v2", "block-v3"} {
		b, err := os.ReadFile("../../chunkfmt/testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		ref := index.BlockRef{Block: ulid.Make(), ObjectSize: int64(len(b))}
		ref.Object = history.ObjectKey(ref.Block)
		if err := objects.Put(t.Context(), ref.Object, bytes.NewReader(b), ref.ObjectSize); err != nil {
			t.Fatal(err)
		}
		rows := merged(t, objects, []index.BlockRef{ref}, true, nil)
		var all []byte
		for _, row := range rows {
			all = append(all, bytesAt(t, objects, row.BlockRef)...)
		}
		made = append(made, all)
	}
	if !bytes.Equal(made[0], made[1]) || len(made[0]) < 100_000 {
		t.Errorf("%d and %d other bytes", len(made[0]), len(made[1]))
	}
}

func bytesAt(t *testing.T, objects *historytest.MemoryObjects, b index.BlockRef) []byte {
	t.Helper()
	out, err := objects.GetRange(t.Context(), b.Object, 0, b.ObjectSize)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// windowsOfTenant reads all windows of a width, with the samples that are beside them.
func (w *world) windowsOf(t *testing.T, tenant string, width int64) (map[string]*rollup.Windows, int) {
	t.Helper()
	rows, err := w.index.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	of := history.Summaries{Width: width, Columns: rollup.AllColumns}
	if width == rollup.Short {
		of.Columns &^= rollup.M2
	}
	mint, maxt := w.now.Add(-1000*24*time.Hour).UnixMilli(), w.now.UnixMilli()
	set, err := w.history.Open(tenant, mint, maxt, history.Blocks(rows), nil).SelectWindows(t.Context(), nil, mint, maxt, of)
	if err != nil {
		t.Fatal(err)
	}
	out, beside := map[string]*rollup.Windows{}, 0
	var buf history.Buffer
	for set.Next(t.Context()) {
		s := set.At()
		got, _, err := s.Windows(&buf)
		if err != nil {
			t.Fatal(err)
		}
		one := &rollup.Windows{}
		got.Expand(of.Columns)
		one.Append(got, 0, got.Len(), of.Columns)
		runs, err := s.Runs(&buf)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range runs {
			beside += len(r.Floats.T)
		}
		out[s.Labels.String()] = one
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	return out, beside
}

// TestSummariesStay: when samples are past their retention, their windows stay as they
// were, and of series that had none, for they have few samples, there are some then; late
// samples don't change them; and each width has a retention of its own. Another tenant in
// the same blocks keeps its samples.
func TestSummariesStay(t *testing.T) {
	w := newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	const days = 24 * time.Hour
	rs := &history.Retentions{}
	w.c.o.Retentions = func() *history.Retentions { return rs }
	w.now = time.Date(2026, 5, 28, 0, 0, 0, 0, time.UTC) // a week begins
	start := w.now.UnixMilli()
	r := rand.New(rand.NewPCG(4, 4))
	all := content{}
	for range 7 {
		c := content{}
		for _, tenant := range []string{"a", "b"} {
			for i := range 6 {
				s := someSamples(r, i, w.now.UnixMilli()+1, w.now.Add(days).UnixMilli())
				s.Exemplars = []chunkfmt.Exemplar{{Ts: s.Floats.T[0], HasTs: true, Labels: labels.FromStrings("trace", "x")}}
				c.add(tenant, s)
				all.add(tenant, s)
			}
		}
		w.now = w.now.Add(days)
		w.flush(t, c)
	}
	end := w.now.UnixMilli()
	w.pass(t, 16*days, 6*time.Hour)
	if got := w.levels(t, "a"); len(got) != 1 || got[3] == 0 {
		t.Fatalf("rows by level %v", got)
	}
	want := map[int64]map[string]*rollup.Windows{}
	var sum rollup.Summariser
	for _, width := range []int64{rollup.Short, rollup.Long} {
		want[width] = map[string]*rollup.Windows{}
		for key, s := range all["a"] {
			var short, long rollup.Windows
			sum.Summarise(&short, s.Samples(), rollup.Short)
			rollup.Widen(&long, &short, rollup.Long)
			short.M2 = nil
			want[width][key] = map[int64]*rollup.Windows{rollup.Short: &short, rollup.Long: &long}[width]
		}
	}
	same := func(when string, width int64) {
		t.Helper()
		got, beside := w.windowsOf(t, "a", width)
		if beside != 0 {
			t.Errorf("%s: %d samples beside windows of %d ms", when, beside, width)
		}
		if d := cmp.Diff(want[width], got, cmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })); d != "" {
			t.Errorf("%s: windows of %d ms: %s", when, width, d[:min(len(d), 2000)])
		}
	}
	rs = &history.Retentions{Tenants: map[string]history.Retention{"a": {Raw: 20 * 24 * time.Hour, Short: 40 * days, Long: 10_000 * days}}}
	samples := w.samplesOf(t, "b")
	w.pass(t, 2*days, 6*time.Hour)
	if n := w.samplesOf(t, "a"); n == 0 {
		t.Error("samples are gone that aren't past the retention")
	}
	w.pass(t, 8*days, 6*time.Hour)
	check := func(when string) {
		t.Helper()
		if n := w.samplesOf(t, "a"); n != 0 {
			t.Errorf("%s: %d samples are left", when, n)
		}
		if n := w.samplesOf(t, "b"); n != samples {
			t.Errorf("%s: the other tenant has %d samples of %d", when, n, samples)
		}
		if n := bytes.Count(bytesOf(t, w.objects), []byte("EPIBLOCK")); n > 8 {
			t.Errorf("%s: there are %d objects", when, n/2)
		}
	}
	check("samples gone")
	same("samples gone", rollup.Short)
	same("samples gone", rollup.Long)
	seen := w.levels(t, "a")
	w.pass(t, 4*days, 6*time.Hour)
	if got := w.levels(t, "a"); fmt.Sprint(got) != fmt.Sprint(seen) {
		t.Errorf("rows by level %v, and then %v", seen, got)
	}

	// Some come again: there are fewer of them in each window than it tells of.
	c := content{}
	for _, s := range all["a"] {
		again := &chunkfmt.Series{Labels: s.Labels}
		for i, at := range s.Floats.T {
			if at > start+2*day && at < start+3*day && i%5 == 0 {
				again.Floats.T, again.Floats.V = append(again.Floats.T, at), append(again.Floats.V, s.Floats.V[i])
			}
		}
		c.add("a", again)
	}
	w.flush(t, c)
	same("samples came again", rollup.Long)
	w.pass(t, 20*days, 6*time.Hour)
	check("samples came again, compacted")
	same("samples came again, compacted", rollup.Long)
	for key, short := range w.must(w.windowsOf(t, "a", rollup.Short)) {
		if short.Len() > 0 {
			t.Errorf("%s has %d short windows that are past their retention", key, short.Len())
		}
	}

	// A deletion takes windows too, whole.
	if _, err := w.history.Delete(t.Context(), "a", start+day, end, labels.MustNewMatcher(labels.MatchEqual, "i", "1")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.history.Delete(t.Context(), "a", math.MinInt64, end, labels.MustNewMatcher(labels.MatchEqual, "i", "2")); err != nil {
		t.Fatal(err)
	}
	w.pass(t, 4*days, 6*time.Hour)
	for key, long := range want[rollup.Long] {
		switch key {
		case `{__name__="m1", i="1"}`:
			n := 0
			for n < long.Len() && long.End[n] < start+day {
				n++
			}
			part := long.Slice(0, n)
			want[rollup.Long][key] = &part
		case `{__name__="m2", i="2"}`:
			delete(want[rollup.Long], key)
		}
	}
	same("deleted", rollup.Long)
	for _, d := range w.deletions(t, "a") {
		if d.Gone == 0 {
			t.Errorf("something of %v is left", d.Matchers)
		}
	}

	// And then all goes.
	rs = &history.Retentions{Tenants: map[string]history.Retention{"a": {Raw: 20 * 24 * time.Hour, Long: 50 * days}}}
	w.pass(t, 10*days, 6*time.Hour)
	if got := w.traces(t, "a"); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
}

func (w *world) must(m map[string]*rollup.Windows, _ int) map[string]*rollup.Windows { return m }

// lateWorld has a week of two tenants in blocks that they share, and of b some samples of
// two of its last days that come late, and were just flushed.
func lateWorld(t *testing.T) (w *world, all content) {
	t.Helper()
	w = newWorld(t, &historytest.MemoryObjects{}, &historytest.MemoryRows{})
	w.now = time.Date(2026, 5, 28, 0, 0, 0, 0, time.UTC) // a week begins
	start := w.now.UnixMilli()
	r := rand.New(rand.NewPCG(6, 4))
	all = content{}
	rest := content{}
	for range 7 {
		c := content{}
		for _, tenant := range []string{"a", "b"} {
			for i := range 4 {
				s := someSamples(r, i, w.now.UnixMilli()+1, w.now.Add(24*time.Hour).UnixMilli())
				all.add(tenant, s)
				now, later := &chunkfmt.Series{Labels: s.Labels}, &chunkfmt.Series{Labels: s.Labels}
				for k, at := range s.Floats.T {
					to := now
					if tenant == "b" && k%3 == 0 && at > start+4*day && at <= start+6*day {
						to = later
					}
					to.Floats.T, to.Floats.V = append(to.Floats.T, at), append(to.Floats.V, s.Floats.V[k])
				}
				c.add(tenant, now)
				if len(later.Floats.T) > 0 {
					rest.add(tenant, later)
				}
			}
		}
		w.now = w.now.Add(24 * time.Hour)
		w.flush(t, c)
	}
	w.pass(t, 16*24*time.Hour, 6*time.Hour)
	if got := w.levels(t, "b"); len(got) != 1 || got[3] == 0 {
		t.Fatalf("rows by level %v", got)
	}
	w.flush(t, rest)
	return w, all
}

// wantWindows checks that there are the hours of all samples of a tenant, and none beside.
func (w *world) wantWindows(t *testing.T, tenant string, all content) {
	t.Helper()
	want := map[string]*rollup.Windows{}
	var sum rollup.Summariser
	for key, s := range all[tenant] {
		var short, long rollup.Windows
		sum.Summarise(&short, s.Samples(), rollup.Short)
		rollup.Widen(&long, &short, rollup.Long)
		want[key] = &long
	}
	got, beside := w.windowsOf(t, tenant, rollup.Long)
	if beside != 0 {
		t.Errorf("%d samples beside windows", beside)
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })); d != "" {
		t.Errorf("windows: %s", d[:min(len(d), 1000)])
	}
}

// TestLateBeforeThinned: samples don't go while others of the same time wait to be merged,
// neither those of a tenant that is wholly past its retention, nor the older ones of one
// that isn't and shares a block with one that is. What stays tells of all of them.
func TestLateBeforeThinned(t *testing.T) {
	const days = 24 * time.Hour
	for name, b := range map[string]history.Retention{
		"partly past": {Raw: 18 * days, Long: 10_000 * days}, // its newest samples are 16 days old
		"wholly past": {Raw: 10 * days, Long: 10_000 * days},
	} {
		t.Run(name, func(t *testing.T) {
			w, all := lateWorld(t)
			rs := &history.Retentions{Tenants: map[string]history.Retention{"a": {Raw: 10 * days, Long: 10_000 * days}, "b": b}}
			w.c.o.Retentions = func() *history.Retentions { return rs }
			n, from := 0, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC).UnixMilli()+1
			for _, s := range all["b"] {
				i, _ := slices.BinarySearch(s.Floats.T, from)
				j, _ := slices.BinarySearch(s.Floats.T, from+2*day)
				n += j - i
			}
			w.pass(t, days, 30*time.Minute)
			if got := w.levels(t, "b"); got[3] == 0 || len(got) != 2 {
				t.Fatalf("rows by level %v", got)
			}
			if got := w.samplesOf(t, "a"); got != 0 {
				t.Errorf("of the tenant that is past its retention %d samples are left", got)
			}
			if got := w.samplesIn(t, "b", from, from+2*day-1); got != n {
				t.Errorf("of the other %d samples are left of %d, while some wait", got, n)
			}
			w.pass(t, 25*days, 6*time.Hour)
			if got := w.samplesOf(t, "b"); got != 0 {
				t.Errorf("later, %d samples are left", got)
			}
			w.wantWindows(t, "b", all)
			w.wantWindows(t, "a", all)
		})
	}
}

// TestThinnedWithUnreadable: samples don't go while a block that overlaps them can't be
// read, neither when a merge finds that out, nor later.
func TestThinnedWithUnreadable(t *testing.T) {
	const days = 24 * time.Hour
	w, all := lateWorld(t)
	known := map[ulid.ULID]bool{}
	for _, r := range w.rowsOf(t, "b") {
		known[r.Block] = r.Level == 3
	}
	var late index.BlockRow
	for range 100 { // until they are of the last level
		w.pass(t, 6*time.Hour, 6*time.Hour)
		for _, r := range w.rowsOf(t, "b") {
			if r.Level == 3 && !known[r.Block] {
				late = r
			}
		}
		if late.Level == 3 {
			break
		}
	}
	data := bytes.Clone(bytesAt(t, w.objects.(*historytest.MemoryObjects), index.BlockRef{Object: late.Object, ObjectSize: late.ObjectSize}))
	data[60] ^= 1 // in its first data page
	if err := w.objects.Put(t.Context(), late.Object, bytes.NewReader(data), int64(len(data))); err != nil {
		t.Fatal(err)
	}
	rs := &history.Retentions{Default: history.Retention{Raw: 10 * days, Long: 10_000 * days}}
	w.c.o.Retentions = func() *history.Retentions { return rs }
	w.pass(t, 5*days, 30*time.Minute)
	aside, err := w.index.Aside(t.Context())
	if err != nil || len(aside) != 1 || aside[0].Block != late.Block {
		t.Fatalf("set aside: %+v, %v", aside, err)
	}
	if got := w.samplesOf(t, "a"); got != 0 {
		t.Errorf("of the other tenant %d samples are left", got)
	}
	rows := slices.DeleteFunc(w.rowsOf(t, "b"), func(r index.BlockRow) bool { return r.Block == late.Block || r.MaxT < late.MinT || r.MinT > late.MaxT })
	if len(rows) == 0 {
		t.Fatal("nothing overlaps it any more")
	}
	n, want := uint64(0), uint64(0)
	for _, r := range rows {
		n += r.Samples
		for _, s := range all["b"] {
			i, _ := slices.BinarySearch(s.Floats.T, r.MinT)
			j, _ := slices.BinarySearch(s.Floats.T, r.MaxT+1)
			want += uint64(j - i) //nolint:gosec // few
		}
	}
	if n < want*6/10 || n > want { // but for those that came late
		t.Errorf("%d samples are left of %d", n, want)
	}
}

func (w *world) rowsOf(t *testing.T, tenant string) []index.BlockRow {
	t.Helper()
	rows, err := w.index.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// samplesIn is samplesOf of mint to maxt, both included, in ms.
func (w *world) samplesIn(t *testing.T, tenant string, mint, maxt int64, ms ...*labels.Matcher) (n int) {
	t.Helper()
	set, err := w.history.Open(tenant, mint, maxt, history.Blocks(w.rowsOf(t, tenant)), nil).Select(t.Context(), ms, mint, maxt)
	if err != nil {
		t.Fatal(err)
	}
	var buf history.Buffer
	for set.Next(t.Context()) {
		runs, err := set.At().Runs(&buf)
		if err != nil {
			t.Fatal(err)
		}
		if len(runs) > 0 {
			n += len(chunkfmt.Merge(runs...).Floats.T)
		}
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	return n
}

package history

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// between is what of a series lies in a range, or with outside, in none of ranges.
func between(s *chunkfmt.Series, outside bool, ranges ...chunkfmt.Range) *chunkfmt.Series {
	out := &chunkfmt.Series{Labels: s.Labels}
	in := func(t int64) bool { return covers(ranges, t, t) != outside }
	for i, t := range s.Floats.T {
		if in(t) {
			out.Floats.T, out.Floats.V = append(out.Floats.T, t), append(out.Floats.V, s.Floats.V[i])
		}
	}
	for i, t := range s.Histograms.T {
		if in(t) {
			out.Histograms.T, out.Histograms.H = append(out.Histograms.T, t), append(out.Histograms.H, s.Histograms.H[i])
		}
	}
	return out
}

// sameSamples compares times and values.
func sameSamples(a, b *chunkfmt.Series) bool {
	return slices.Equal(a.Floats.T, b.Floats.T) && slices.Equal(a.Histograms.T, b.Histograms.T) &&
		slices.EqualFunc(a.Floats.V, b.Floats.V, func(x, y float64) bool { return math.Float64bits(x) == math.Float64bits(y) })
}

func merged(runs []*chunkfmt.Series) *chunkfmt.Series {
	if len(runs) == 0 {
		return &chunkfmt.Series{}
	}
	return chunkfmt.Merge(runs...)
}

// TestSelectWindows reads random blocks of several days, with late samples, copies,
// parts that others have taken over, and parts that are hidden. Windows and the
// samples beside them are to be the same as what a Select gives of the time, and
// there are to be windows of most of the time in which a block is alone.
func TestSelectWindows(t *testing.T) {
	const day = 24 * rollup.Long
	start := 2800*Window - 2*day // a week begins within
	r := rand.New(rand.NewPCG(11, 3))
	for round := range 60 {
		st := localStores(t)
		h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
		clean := round%3 == 0
		var all []*chunkfmt.Series
		for i := range 5 {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", fmt.Sprint("m", i/2), "i", fmt.Sprint(i))}
			interval := []int64{15_000, 30_000, 60_000, 600_000, 30_000}[i]
			at := start + r.Int64N(interval)
			if !clean && r.IntN(3) == 0 {
				at += r.Int64N(3 * day)
			}
			v := 0.
			for ; at <= start+4*day; at += interval {
				if v += float64(r.IntN(10)); r.IntN(300) == 0 {
					v = 0
				}
				if !clean && r.IntN(500) == 0 {
					at += r.Int64N(6 * rollup.Long)
				}
				x := v
				if r.IntN(200) == 0 {
					x = math.Float64frombits(0x7ff0000000000002)
				}
				s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, x)
			}
			if i == 4 && !clean {
				s.Histograms.T, s.Histograms.H = []int64{start + 1000}, []*histogram.Histogram{tsdbutil.GenerateTestHistogram(1)}
			}
			all = append(all, s)
		}
		put := func(rollups bool, ranges ...chunkfmt.Range) {
			var of []*chunkfmt.Series
			for _, s := range all {
				if s = between(s, false, ranges...); len(s.Floats.T)+len(s.Histograms.T) > 0 {
					of = append(of, s)
				}
			}
			if len(of) > 0 {
				publishWith(t, h, tenantSeries{"a": of}, chunkfmt.WriterOptions{PageBytes: 8 << 10, PageSeries: 3, ChunkSamples: 50 + r.IntN(2000), Rollups: rollups})
			}
		}
		wide := r.IntN(4) == 0
		if wide {
			put(true, chunkfmt.Range{MinT: start + 1, MaxT: start + 4*day})
		} else {
			for d := range int64(4) {
				put(clean || r.IntN(4) > 0, chunkfmt.Range{MinT: start + d*day + 1, MaxT: start + (d+1)*day})
			}
		}
		if !clean {
			for range r.IntN(4) { // late samples, and copies
				from := start + r.Int64N(4*day)
				put(r.IntN(2) == 0, chunkfmt.Range{MinT: from, MaxT: from + r.Int64N(rollup.Long)})
			}
		}
		if wide && r.IntN(2) == 0 { // another block stands for the days before the week's end
			bs := snapshot(t, h, "a", 0, math.MaxInt64).Blocks
			b := bs[slices.IndexFunc(bs, func(b Block) bool { return len(b.Ranges) == 2 })]
			if err := index.New(st.rows).DeleteBlocks(t.Context(), "a", []index.RowID{{MaxT: b.Ranges[0].MaxT, Block: b.ID}}); err != nil {
				t.Fatal(err)
			}
			put(false, chunkfmt.Range{MinT: start + 1, MaxT: start + day})
			clean = false
		}
		for range 6 {
			mint := start + r.Int64N(3*day)
			maxt := mint + r.Int64N(start+4*day-mint+1)
			snap := snapshot(t, h, "a", mint, maxt)
			of := Summaries{Width: rollup.Short, Columns: rollup.AllColumns &^ rollup.M2}
			if r.IntN(2) == 0 {
				of = Summaries{Width: rollup.Long, Columns: rollup.AllColumns}
			}
			if r.IntN(2) == 0 {
				of.Columns &= rollup.Columns(r.IntN(int(rollup.AllColumns) + 1))
			}
			h.batchBytes = []int64{batchBytes, 10 << 10}[r.IntN(2)]
			var voids []chunkfmt.Range
			if !clean && r.IntN(3) == 0 {
				a := start + r.Int64N(4*day)
				voids = append(voids, chunkfmt.Range{MinT: a, MaxT: a + r.Int64N(1000)})
				of.Elsewhere = func(labels.Labels) []chunkfmt.Range { return voids }
			}
			if !clean && r.IntN(3) == 0 {
				a := start + r.Int64N(4*day)
				snap.hide(NewHidden([]index.Deletion{{MinT: a, MaxT: a + r.Int64N(day), Matchers: []*labels.Matcher{eq("__name__", "m1")}}}, Before(start+r.Int64N(2)*r.Int64N(day))))
			}
			compareWindows(t, snap, of, voids, mint, maxt, clean)
			if t.Failed() {
				t.Fatalf("round %d, %d to %d, hidden %+v, elsewhere %v", round, mint, maxt, snap.Hidden, voids)
			}
		}
	}
}

func compareWindows(t *testing.T, snap *Snapshot, of Summaries, voids []chunkfmt.Range, mint, maxt int64, clean bool) {
	t.Helper()
	want := map[string]*chunkfmt.Series{}
	for _, s := range selectAll(t, snap, mint, maxt) {
		want[s.Labels.String()] = s
	}
	set, err := snap.SelectWindows(t.Context(), nil, mint, maxt, of)
	if err != nil {
		t.Fatal(err)
	}
	var buf Buffer
	var sum rollup.Summariser
	windows, samples, most := 0, 0, 0
	before := snap.Stats.Windows.Load()
	for set.Next(t.Context()) {
		s := set.At()
		w, covered, err := s.Windows(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w.Expand(of.Columns)
		runs, err := s.Runs(&buf)
		if err != nil {
			t.Fatal(err)
		}
		rest := merged(runs)
		full := want[s.Labels.String()]
		delete(want, s.Labels.String())
		if full == nil {
			full = &chunkfmt.Series{}
		}
		if !sameSamples(rest, between(full, true, covered...)) {
			t.Errorf("%v: %d samples beside windows, want %d; covered %v", s.Labels, len(rest.Floats.T), len(between(full, true, covered...).Floats.T), covered)
		}
		expect := &rollup.Windows{}
		for i, c := range covered {
			if (c.MinT-1)%of.Width != 0 || c.MaxT%of.Width != 0 || c.MaxT > maxt || c.MinT <= mint-of.Width || c.MinT > c.MaxT || i > 0 && covered[i-1].MaxT+1 >= c.MinT {
				t.Errorf("covered are %v", covered)
			}
			if slices.ContainsFunc(voids, func(r chunkfmt.Range) bool { return r.Overlaps(max(c.MinT, mint), c.MaxT) }) {
				t.Errorf("covered are %v, though others have samples there", covered)
			}
			from := c.MinT
			if c.MinT < mint {
				// Of the first window, only what is about the time from mint on is true.
				from += of.Width
				if k := w.Len(); k > 0 && w.End[0] < from {
					*w = *after(w, 1, of.Columns)
				}
			}
			if from <= c.MaxT {
				sum.Summarise(expect, between(full, false, chunkfmt.Range{MinT: from, MaxT: c.MaxT}).Samples(), of.Width)
			}
		}
		if of.Width == rollup.Long {
			// As the writer makes them.
			var short rollup.Windows
			for _, c := range covered {
				sum.Summarise(&short, between(full, false, chunkfmt.Range{MinT: max(c.MinT, mintOf(mint, of.Width)), MaxT: c.MaxT}).Samples(), rollup.Short)
			}
			expect.Clear()
			rollup.Widen(expect, &short, rollup.Long)
		}
		expect = after(expect, 0, of.Columns)
		if d := cmp.Diff(expect, after(w, 0, of.Columns), cmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })); d != "" {
			t.Errorf("%v: windows in %v differ (-want +got):\n%s", s.Labels, covered, d)
		}
		windows, samples = windows+w.Len(), samples+len(rest.Floats.T)
		if len(full.Floats.T) >= 20*int((maxt-mint)/of.Width+1) {
			most += max(0, int((maxt-mint)/of.Width)-1)
		}
		a := mint + (maxt-mint)/3
		b := a + (maxt-a)/2
		if runs, err = s.Raw(t.Context(), &buf, a, b); err != nil {
			t.Fatal(err)
		}
		if !sameSamples(merged(runs), between(full, false, chunkfmt.Range{MinT: a, MaxT: b})) {
			t.Errorf("%v: other samples in %d to %d", s.Labels, a, b)
		}
		if t.Failed() {
			return
		}
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	for ls := range want {
		t.Errorf("series %s is missing", ls)
	}
	if clean && windows < most*8/10 {
		t.Errorf("%d windows, at least %d are possible; and %d samples", windows, most, samples)
	}
	if n := snap.Stats.Windows.Load() - before; n < int64(windows) {
		t.Errorf("%d windows counted of %d", n, windows)
	}
	if clean {
		w, n, err := snap.EstimateWindows(t.Context(), nil, mint, maxt, of.Width)
		if err != nil || w < int64(windows)*9/10 || w > int64(windows)*3/2+20*5 || n > int64(2*samples+20_000) {
			t.Errorf("estimate of %d windows and %d samples, %v: there are %d and %d", w, n, err, windows, samples)
		}
	}
}

// TestSelectWindowsGroups: no more is fetched than the pages with the columns that are
// wanted, those of a group at once.
func TestSelectWindowsGroups(t *testing.T) {
	const series = 200
	st := localStores(t)
	h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
	r := rand.New(rand.NewPCG(12, 3))
	var all []*chunkfmt.Series
	for i := range series {
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprintf("%03d", i))}
		for at := int64(15_000); at <= 7*24*rollup.Long; at += 60_000 {
			s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, math.Round(1000*r.NormFloat64()))
		}
		all = append(all, s)
	}
	publishWith(t, h, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageBytes: 16 << 10, PageSeries: series, Rollups: true})
	read := func(cols rollup.Columns) (gets, bytes int64) {
		t.Helper()
		s := snapshot(t, st.open(t, func(o *Options) { o.VisibilityDelay = 0 }), "a", 0, math.MaxInt64)
		set, err := s.SelectWindows(t.Context(), nil, 0, 7*24*rollup.Long, Summaries{Width: rollup.Long, Columns: cols})
		if err != nil {
			t.Fatal(err)
		}
		var buf Buffer
		for set.Next(t.Context()) {
			if w, _, err := set.At().Windows(&buf); err != nil || w.Len() != 7*24 {
				t.Fatal(w.Len(), err)
			}
		}
		if set.Err() != nil {
			t.Fatal(set.Err())
		}
		return s.Stats.ObjectGets.Load(), s.Stats.ObjectBytes.Load()
	}
	gets, all4 := read(rollup.AllColumns)
	for cols, most := range map[rollup.Columns]float64{
		0: .35, rollup.First | rollup.Last | rollup.Reset: .35, rollup.First | rollup.Last | rollup.Reset | rollup.Prev: .45, rollup.AllColumns &^ rollup.M2: .75,
	} {
		if n, bytes := read(cols); n != gets || float64(bytes) > most*float64(all4) {
			t.Errorf("columns %b: %d GETs of %d bytes; for all %d of %d", cols, n, bytes, gets, all4)
		}
	}
}

// mintOf is the first ms of the first window that begins at mint or later.
func mintOf(mint, width int64) int64 {
	return rollup.EndOf(mint-1, width) + 1
}

// after copies the windows from the i-th on.
func after(w *rollup.Windows, i int, cols rollup.Columns) *rollup.Windows {
	out := &rollup.Windows{}
	out.Append(w, i, w.Len(), cols)
	return out
}

// TestGoneGap: a block whose samples are gone had none in the third of five hours. What others
// have there counts, be it samples, or windows of another such block, or in a head; what they
// have in the other hours doesn't.
func TestGoneGap(t *testing.T) {
	start := 2800*Window + 24*rollup.Long
	ls := labels.FromStrings("__name__", "m")
	of := func(value float64, hours ...int64) *chunkfmt.Series {
		s := &chunkfmt.Series{Labels: ls}
		for _, k := range hours {
			for i := int64(1); i <= 240; i++ {
				s.Floats.T, s.Floats.V = append(s.Floats.T, start+(k-1)*rollup.Long+i*15_000), append(s.Floats.V, value)
			}
		}
		return s
	}
	hours := func(from, to int64) chunkfmt.Range {
		return chunkfmt.Range{MinT: start + (from-1)*rollup.Long + 1, MaxT: start + to*rollup.Long}
	}
	gone := func(t *testing.T, h *History, s *chunkfmt.Series, times chunkfmt.Range) {
		x := &chunkfmt.Summaries{Gone: []chunkfmt.Range{times}}
		var sum rollup.Summariser
		sum.Summarise(&x.Short, s.Samples(), rollup.Short)
		rollup.Widen(&x.Long, &x.Short, rollup.Long)
		var b bytes.Buffer
		w := chunkfmt.NewWriter(&b, chunkfmt.WriterOptions{Window: Window, Level: 3})
		if err := w.AddSummarised("a", &chunkfmt.Series{Labels: ls}, x); err != nil {
			t.Fatal(err)
		}
		summary, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Publish(t.Context(), ulid.Make(), b.Bytes(), summary); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name      string
		others    func(t *testing.T, h *History)
		elsewhere []chunkfmt.Range
		third     float64 // value of the floats of the third hour; 0: there are none
	}{
		{name: "nobody", others: func(*testing.T, *History) {}},
		{name: "samples", third: 2, others: func(t *testing.T, h *History) {
			publishWith(t, h, tenantSeries{"a": {of(2, 2, 3, 4)}}, chunkfmt.WriterOptions{Rollups: true})
		}},
		{name: "samples without windows", third: 2, others: func(t *testing.T, h *History) {
			publishWith(t, h, tenantSeries{"a": {of(2, 3)}}, chunkfmt.WriterOptions{})
		}},
		{name: "gone too", third: 3, others: func(t *testing.T, h *History) { gone(t, h, of(3, 2, 3, 4), hours(2, 4)) }},
		{name: "gone too, between gaps", third: 3, others: func(t *testing.T, h *History) { gone(t, h, of(3, 1, 3, 5), hours(1, 5)) }},
		{name: "both", third: 3, others: func(t *testing.T, h *History) {
			gone(t, h, of(3, 2, 3), hours(2, 3))
			publishWith(t, h, tenantSeries{"a": {of(2, 3, 4)}}, chunkfmt.WriterOptions{Rollups: true})
		}},
		{name: "a head", elsewhere: []chunkfmt.Range{hours(2, 4)}, others: func(*testing.T, *History) {}},
	} {
		for _, width := range []int64{rollup.Long, rollup.Short} {
			t.Run(fmt.Sprint(test.name, " ", width), func(t *testing.T) {
				st := localStores(t)
				h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
				gone(t, h, of(1, 1, 2, 4, 5), hours(1, 5))
				test.others(t, h)
				q := Summaries{Width: width, Columns: rollup.AllColumns &^ rollup.M2}
				if test.elsewhere != nil {
					q.Elsewhere = func(labels.Labels) []chunkfmt.Range { return test.elsewhere }
				}
				snap := snapshot(t, h, "a", 0, math.MaxInt64)
				var held meter
				snap.Hold = held.hold
				set, err := snap.SelectWindows(t.Context(), nil, start+1, start+5*rollup.Long, q)
				if err != nil {
					t.Fatal(err)
				}
				var buf Buffer
				counts, sums := map[int64]int{}, map[int64]float64{}
				var covered []chunkfmt.Range
				for set.Next(t.Context()) {
					var w *rollup.Windows
					if w, covered, err = set.At().Windows(&buf); err != nil {
						t.Fatal(err)
					}
					w.Expand(q.Columns)
					for i, end := range w.End {
						hour := (rollup.EndOf(end, rollup.Long) - start) / rollup.Long
						counts[hour], sums[hour] = counts[hour]+int(w.Count[i]), sums[hour]+w.Sum[i]
					}
					runs, err := set.At().Runs(&buf)
					if err != nil {
						t.Fatal(err)
					}
					rest := merged(runs)
					for i, at := range rest.Floats.T {
						hour := (rollup.EndOf(at, rollup.Long) - start) / rollup.Long
						counts[hour], sums[hour] = counts[hour]+1, sums[hour]+rest.Floats.V[i]
					}
				}
				if set.Err() != nil {
					t.Fatal(set.Err())
				}
				wantCounts, wantSums := map[int64]int{1: 240, 2: 240, 4: 240, 5: 240}, map[int64]float64{1: 240, 2: 240, 4: 240, 5: 240}
				if test.third > 0 {
					wantCounts[3], wantSums[3] = 240, 240*test.third
				}
				if d := cmp.Diff([]any{wantCounts, wantSums}, []any{counts, sums}); d != "" {
					t.Errorf("floats, and their sums, by hour (-want +got):\n%s", d)
				}
				if in := Overlap(covered, []chunkfmt.Range{hours(3, 3)}); test.elsewhere != nil && len(in) > 0 {
					t.Errorf("%v is covered, though a head has samples there", in)
				}
				if now, most := held.now.Load(), held.most.Load(); now != 0 || most == 0 {
					t.Errorf("%d bytes are still held, of %d", now, most)
				}
			})
		}
	}
}

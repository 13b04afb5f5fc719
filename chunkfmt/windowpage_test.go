package chunkfmt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// sameWindows compares bit for bit.
func sameWindows(a, b *rollup.Windows) string {
	bits := func(a, b []float64) bool {
		return (a == nil) == (b == nil) && slices.EqualFunc(a, b, func(x, y float64) bool { return math.Float64bits(x) == math.Float64bits(y) })
	}
	if slices.Equal(a.End, b.End) && slices.Equal(a.Count, b.Count) && slices.Equal(a.Flags, b.Flags) && a.Columns() == b.Columns() &&
		slices.Equal(a.FirstT, b.FirstT) && slices.Equal(a.PrevT, b.PrevT) && slices.Equal(a.LastT, b.LastT) &&
		bits(a.FirstV, b.FirstV) && bits(a.PrevV, b.PrevV) && bits(a.LastV, b.LastV) && bits(a.Sum, b.Sum) && bits(a.Min, b.Min) && bits(a.Max, b.Max) &&
		bits(a.Reset, b.Reset) && bits(a.M2, b.M2) && slices.Equal(a.Resets, b.Resets) && slices.Equal(a.Changes, b.Changes) {
		return ""
	}
	return cmp.Diff(a, b, cmp.Comparer(func(x, y float64) bool { return math.Float64bits(x) == math.Float64bits(y) }))
}

// project leaves the columns that were asked for.
func project(w *rollup.Windows, cols rollup.Columns) *rollup.Windows {
	out := &rollup.Windows{}
	out.Append(w, 0, w.Len(), cols)
	return out
}

// regularSeries is scraped at an interval of ms, with gaps, and has values of some kind.
func regularSeries(r *rand.Rand, interval int64) *Series {
	s := &Series{}
	t := 1_700_000_000_000 + r.Int64N(interval)
	kind, odd, gaps := r.IntN(9), r.IntN(4), r.IntN(3)
	x := float64(r.IntN(1000))
	for range 20 + r.IntN(3000) {
		switch kind {
		case 0:
			x = 7
		case 1, 2:
			if x += float64(r.IntN(50)); r.IntN(300) == 0 {
				x = 0
			}
		case 3:
			x = math.Round(x*100+r.NormFloat64()*50) / 100
		case 4:
			x = r.NormFloat64()
		case 5:
			x += r.Float64()
		case 6:
			x = float64(r.Int64() >> r.IntN(60))
		case 7:
			x = math.Pow(2, float64(r.IntN(2000)-1000))
		case 8:
			x = float64(r.IntN(2))
		}
		v := x
		if odd == 1 && r.IntN(100) == 0 || odd == 2 && r.IntN(3) == 0 {
			v = oddFloat(r)
		}
		s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, v)
		if t += interval; r.IntN(25) == 0 {
			t += r.Int64N(40)
		}
		if gaps == 1 && r.IntN(100) == 0 {
			t += r.Int64N(100 * interval)
		}
	}
	return s
}

// oddWindows are such as no samples give: any values at all.
func oddWindows(r *rand.Rand, width int64) *rollup.Windows {
	w := &rollup.Windows{}
	end := (r.Int64N(2000) - 1000) * width
	for range 1 + r.IntN(600) {
		end += width * (1 + r.Int64N(3)*r.Int64N(2))
		n := uint32(r.IntN(30))
		var v [7]float64
		first, prev, last := end, end, end
		if n > 0 {
			first = end - width + 1 + r.Int64N(width)
			last = first + r.Int64N(end-first+1)
			prev = first + r.Int64N(last-first+1)
			for i := range v {
				if v[i] = math.Round(r.NormFloat64()*1000) / 10; r.IntN(30) == 0 {
					v[i] = oddFloat(r)
				}
			}
		}
		w.End, w.Count, w.Flags = append(w.End, end), append(w.Count, n), append(w.Flags, rollup.Flags(r.IntN(16)))
		w.FirstT, w.PrevT, w.LastT = append(w.FirstT, first), append(w.PrevT, prev), append(w.LastT, last)
		w.FirstV, w.PrevV, w.LastV = append(w.FirstV, v[0]), append(w.PrevV, v[1]), append(w.LastV, v[2])
		w.Sum, w.Min, w.Max, w.Reset = append(w.Sum, v[3]), append(w.Min, v[4]), append(w.Max, v[5]), append(w.Reset, v[6])
		w.Resets, w.Changes = append(w.Resets, r.Uint32()>>r.IntN(32)), append(w.Changes, r.Uint32()>>r.IntN(32))
		w.M2 = append(w.M2, v[6])
	}
	return w
}

// together are the pages that a builder makes, as one.
func together(t *testing.T, p *windowBuilder) *WindowPage {
	t.Helper()
	var pages []*WindowPage
	for g := groupEnds; g <= p.lastGroup(); g++ {
		page, err := ParseWindowPage(p.page(g))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, page)
	}
	page, err := pages[0].With(pages[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	return page
}

// windowPage reads a page of windows with those beside it.
func windowPage(tb testing.TB, block []byte, e *WindowEntry, l Location, width int64, cols rollup.Columns) *WindowPage {
	tb.Helper()
	page, err := ParseWindowPage(at(block, l))
	if err != nil {
		tb.Fatal(err)
	}
	var others []*WindowPage
	for _, l := range e.Beside(width, l, cols) {
		o, err := ParseWindowPage(at(block, l))
		if err != nil {
			tb.Fatal(err)
		}
		others = append(others, o)
	}
	if page, err = page.With(others...); err != nil {
		tb.Fatal(err)
	}
	return page
}

// TestWindowPage writes and reads windows, all columns and some of them, appended
// to each other.
func TestWindowPage(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 20))
	var sum rollup.Summariser
	evens := 0
	for n := range 300 {
		var in []*rollup.Windows
		p := windowBuilder{width: rollup.Long}
		if n%2 == 0 {
			p.width = rollup.Short
		}
		for k := range 8 {
			w := &rollup.Windows{}
			if n%5 == 4 {
				w = oddWindows(r, p.width)
			} else {
				sum.Summarise(w, regularSeries(r, []int64{1000, 15_000, 60_000, 600_000}[k%4]).Samples(), p.width)
			}
			if n%7 == 6 && k > 0 && w.Len() == in[0].Len() {
				w.End, w.Count, w.Flags, w.FirstT, w.PrevT, w.LastT = in[0].End, in[0].Count, in[0].Flags, in[0].FirstT, in[0].PrevT, in[0].LastT
			}
			in = append(in, w)
			for i := 0; i < w.Len(); i += maxRunWindows {
				p.add(w, i, min(w.Len(), i+maxRunWindows))
			}
		}
		page := together(t, &p)
		if page.Width() != p.width {
			t.Fatal(page.Width())
		}
		var dec WindowDecoder
		for cols := range []rollup.Columns{0, 0, 0, 0} {
			which := rollup.AllColumns
			if cols > 0 {
				which = rollup.Columns(r.IntN(int(rollup.AllColumns) + 1))
			}
			if cols > 1 {
				which &= besideEven
			}
			if p.width == rollup.Short {
				which &^= rollup.M2
			}
			chunk := 0
			for _, w := range in {
				got, even := &rollup.Windows{}, &rollup.Windows{}
				for got.Len() < w.Len() {
					if page.Windows(chunk) == 0 {
						t.Fatalf("chunk %d has none", chunk)
					}
					if err := dec.Decode(page, chunk, which, got); err != nil {
						t.Fatal(err)
					}
					if err := dec.DecodeEven(page, chunk, which, 0, even); err != nil || even.Len() != got.Len() || even.EndAt(even.Len()-1) != got.EndAt(got.Len()-1) {
						t.Fatal(err, even.Len(), got.Len())
					}
					chunk++
				}
				if len(even.Even) > 0 {
					evens++
				}
				rest := &rollup.Windows{}
				reach := r.Int64N(p.width/2) + 1
				for k := chunk - 1; k >= 0 && rest.Len() == 0; k-- { // the last chunk
					if err := dec.DecodeEven(page, k, which, reach, rest); err != nil {
						t.Fatal(err)
					}
				}
				if rest.Expand(which); which&rollup.Prev != 0 {
					for k, i := 0, got.Len()-rest.Len(); i < got.Len(); k, i = k+1, i+1 {
						if got.End[i]-got.PrevT[i] < reach && math.Float64bits(got.PrevV[i]) != math.Float64bits(rest.PrevV[k]) {
							t.Fatalf("round %d: last but one %v, want %v", n, rest.PrevV[k], got.PrevV[i])
						}
					}
				}
				from := r.IntN(got.Len())
				part, evenPart := &rollup.Windows{}, &rollup.Windows{}
				for range 2 {
					part.Append(got, from, got.Len(), which)
					evenPart.Append(even, from, got.Len(), which)
				}
				evenPart.Expand(which)
				if d := sameWindows(part, evenPart); d != "" {
					t.Fatalf("round %d, columns %b, parts of stretches: %s", n, which, d)
				}
				if even.Expand(which); sameWindows(got, even) != "" {
					t.Fatalf("round %d, columns %b, of stretches: %s", n, which, sameWindows(got, even))
				}
				if d := sameWindows(project(w, which), got); d != "" {
					t.Fatalf("round %d, columns %b: %s", n, which, d)
				}
			}
			if chunk != page.Len() {
				t.Fatalf("%d chunks of %d", chunk, page.Len())
			}
		}
		if err := dec.Decode(page, page.Len(), 0, &rollup.Windows{}); err == nil {
			t.Fatal("a chunk behind the last")
		}
	}
	if evens < 50 {
		t.Errorf("times were left as stretches %d times", evens)
	}
}

// TestWindowGroups: pages of groups go together if they are of the same windows, and a
// chunk is decoded if those of its columns are at hand.
func TestWindowGroups(t *testing.T) {
	var sum rollup.Summariser
	builder := func(width int64, chunks int) *windowBuilder {
		p := &windowBuilder{width: width}
		for range chunks {
			w := &rollup.Windows{}
			sum.Summarise(w, regularSeries(rand.New(rand.NewPCG(1, 22)), 60_000).Samples(), width)
			p.add(w, 0, w.Len())
		}
		return p
	}
	page := func(p *windowBuilder, g windowGroup) *WindowPage {
		out, err := ParseWindowPage(p.page(g))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	two := builder(rollup.Long, 2)
	ends, prev, moment := page(two, groupEnds), page(two, groupPrev), page(two, groupMoment)
	for name, pages := range map[string][]*WindowPage{
		"no first":    {prev, moment},
		"two firsts":  {ends, ends},
		"twice":       {ends, prev, prev},
		"more chunks": {ends, page(builder(rollup.Long, 3), groupPrev)},
		"other width": {ends, page(builder(rollup.Short, 2), groupPrev)},
	} {
		if _, err := pages[0].With(pages[1:]...); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	some, err := ends.With(prev, moment)
	if err != nil {
		t.Fatal(err)
	}
	var dec WindowDecoder
	for _, x := range []struct {
		page *WindowPage
		cols rollup.Columns
		ok   bool
	}{
		{ends, rollup.First | rollup.Last | rollup.Reset, true},
		{ends, rollup.First | rollup.Prev, false},
		{some, rollup.First | rollup.Prev | rollup.M2, true},
		{some, rollup.Max, false},
		{some, rollup.AllColumns, false},
		{prev, 0, false},
	} {
		w := &rollup.Windows{}
		if err := dec.Decode(x.page, 1, x.cols, w); (err == nil) != x.ok || err != nil && (!errors.Is(err, ErrCorrupt) || w.Len() > 0) {
			t.Errorf("columns %b of group %d: %v", x.cols, x.page.group, err)
		}
	}
	if n := prev.Windows(0); n != 0 {
		t.Errorf("%d windows where it isn't said", n)
	}
}

// TestWindowsTwice: a series page has windows of a width in one part.
func TestWindowsTwice(t *testing.T) {
	empty := []byte{0, 0, 0} // offset, pages, spans
	page := func(parts ...int) []byte {
		body := []byte{0, 0} // series, labels
		for _, part := range parts {
			if part >= partShortGroups {
				body = appendPart(body, part, append([]byte{3}, empty...))
			} else {
				body = appendPart(body, part, empty)
			}
		}
		return appendPage(nil, pageSeries, body, false)
	}
	for _, x := range []struct {
		parts []int
		ok    bool
	}{
		{[]int{partShort, partLong}, true},
		{[]int{partShortGroups, partLongGroups}, true},
		{[]int{partShort, partLongGroups}, true},
		{[]int{partShort, partShortGroups}, false},
		{[]int{partLong, partLongGroups}, false},
	} {
		if _, err := ParseSeriesPage(page(x.parts...)); (err == nil) != x.ok {
			t.Errorf("parts %v: %v", x.parts, err)
		}
	}
	for _, groups := range []byte{0, 5} {
		body := appendPart([]byte{0, 0}, partLongGroups, append([]byte{groups}, empty...))
		if _, err := ParseSeriesPage(appendPage(nil, pageSeries, body, false)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d groups: %v", groups, err)
		}
	}
}

// readWindows reads all windows of a width in a block, by tenant and series.
func readWindows(tb testing.TB, block []byte, width int64, cols rollup.Columns) map[string]*rollup.Windows {
	tb.Helper()
	f, err := ParseFooter(block, int64(len(block)))
	if err != nil {
		tb.Fatal(err)
	}
	out := map[string]*rollup.Windows{}
	var dec WindowDecoder
	var said, found uint64
	for _, tenant := range f.Tenants {
		d, err := ParseDirectory(at(block, tenant.Directory))
		if err != nil {
			tb.Fatal(err)
		}
		for _, ref := range d.Pages(nil, math.MinInt64, math.MaxInt64) {
			p, err := ParseSeriesPage(at(block, ref.Location))
			if err != nil {
				tb.Fatal(err)
			}
			said += ref.Short.Windows
			if width == rollup.Long {
				said += ref.Long.Windows - ref.Short.Windows
			}
			for _, e := range p.SelectWindows(nil, math.MinInt64, math.MaxInt64, width) {
				w := &rollup.Windows{}
				for _, c := range e.Windows {
					page := windowPage(tb, block, &e, c.Page, width, cols)
					n := w.Len()
					if err := dec.Decode(page, c.Index, cols, w); err != nil {
						tb.Fatal(err)
					}
					if w.Len()-n != c.Samples || w.End[n]-width+1 != c.MinT || w.End[w.Len()-1] != c.MaxT || c.Kind != KindWindows {
						tb.Fatalf("chunk %+v has %d windows", c, w.Len()-n)
					}
				}
				found += uint64(w.Len())
				if w.Len() > 0 {
					out[tenant.Tenant+e.Labels.String()] = w
				}
			}
		}
	}
	if said != found {
		tb.Fatalf("directories say %d windows, there are %d", said, found)
	}
	return out
}

// TestRollups compares the windows in a block with what is made of its samples.
func TestRollups(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 20))
	var in []tenantSeries
	for i := range 60 {
		s := regularSeries(r, []int64{1000, 15_000, 60_000, 600_000}[i%4])
		s.Labels = labels.FromStrings(model.MetricNameLabel, fmt.Sprintf("m%02d", i/20), "i", fmt.Sprintf("%02d", i))
		if i%15 == 3 {
			s.Histograms.T, s.Histograms.H = []int64{s.Floats.T[0] - 1}, []*histogram.Histogram{randomHistogram(r)}
		}
		in = append(in, tenantSeries{fmt.Sprintf("t%d", i/30), s})
	}
	plain, _ := writeBlock(t, in, WriterOptions{PageSeries: 7, PageBytes: 4000})
	block, _ := writeBlock(t, in, WriterOptions{PageSeries: 7, PageBytes: 4000, Rollups: true})
	without, err := readBlock(plain, nil, math.MinInt64, math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	with, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
	if err != nil || len(with) != len(without) {
		t.Fatal(err, len(with), len(without))
	}
	for i := range with {
		if !equalSeries(with[i].s, in[i].s) {
			t.Fatalf("series %d differs", i)
		}
	}
	short, long := readWindows(t, block, rollup.Short, rollup.AllColumns&^rollup.M2), readWindows(t, block, rollup.Long, rollup.AllColumns)
	var sum rollup.Summariser
	n := 0
	for _, ts := range in {
		var wantShort, wantLong rollup.Windows
		sum.Summarise(&wantShort, ts.s.Samples(), rollup.Short)
		rollup.Widen(&wantLong, &wantShort, rollup.Long)
		for _, x := range []struct{ want, got *rollup.Windows }{
			{project(&wantShort, rollup.AllColumns&^rollup.M2), short[ts.tenant+ts.s.Labels.String()]}, {&wantLong, long[ts.tenant+ts.s.Labels.String()]},
		} {
			if pays := len(ts.s.Histograms.T) == 0 && len(ts.s.Floats.T) >= minPerWindow*x.want.Len(); !pays {
				if x.got != nil {
					t.Errorf("%s has windows", ts.s.Labels)
				}
				continue
			}
			n++
			if x.got == nil {
				t.Fatalf("%s has no windows", ts.s.Labels)
			}
			if d := sameWindows(x.want, x.got); d != "" {
				t.Fatalf("%s: %s", ts.s.Labels, d)
			}
		}
	}
	if n < 60 || n > 110 {
		t.Errorf("%d of 120 have windows", n)
	}
}

var deepDays = flag.Int("bench.days", 7, "days of data of BenchmarkDeep")

// deepBlocks writes the blocks of a week that the deep set of the benchmarks makes:
// 1,000 series, scraped each 15 s for days.
func deepBlocks(b *testing.B, days int, o WriterOptions, block func(data []byte, samples int)) {
	const week = 7 * 24 * 3600_000
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15_000, Start: 1_700_006_400_000}
	c.End = c.Start + int64(days)*24*3600_000
	var all []*Series
	iters := map[*Series]*gen.Iter{}
	for _, g := range c.AllSeries() {
		lb := labels.NewScratchBuilder(len(g.Labels))
		for _, l := range g.Labels {
			lb.Add(l.Name, l.Value)
		}
		lb.Sort()
		s := &Series{Labels: lb.Labels()}
		all = append(all, s)
		iters[s] = g.Iter(c)
	}
	sortSeries(all)
	type sample struct {
		t int64
		v float64
	}
	held := map[*Series]sample{}
	var f Floats
	for end := (c.Start/week + 1) * week; end < c.End+week; end += week {
		var buf bytes.Buffer
		w := NewWriter(&buf, o)
		samples := 0
		for _, s := range all {
			f.T, f.V = f.T[:0], f.V[:0]
			for {
				next, ok := held[s]
				if delete(held, s); !ok {
					next.t, next.v, ok = iters[s].Next()
				}
				if !ok {
					break
				}
				if next.t > end {
					held[s] = next
					break
				}
				f.T, f.V = append(f.T, next.t), append(f.V, next.v)
			}
			if len(f.T) == 0 {
				continue
			}
			samples += len(f.T)
			if err := w.Add("t", &Series{Labels: s.Labels, Floats: f}); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := w.Close(); err != nil {
			b.Fatal(err)
		}
		block(buf.Bytes(), samples)
	}
}

// windowChunks are all chunks of windows of a width in a block.
func windowChunks(b *testing.B, block []byte, width int64, each func(p *WindowPage, index int, new bool, size int64)) {
	pages := map[int64]*WindowPage{}
	f, err := ParseFooter(block, int64(len(block)))
	if err != nil {
		b.Fatal(err)
	}
	d, err := ParseDirectory(at(block, f.Tenants[0].Directory))
	if err != nil {
		b.Fatal(err)
	}
	for _, ref := range d.Pages(nil, math.MinInt64, math.MaxInt64) {
		sp, err := ParseSeriesPage(at(block, ref.Location))
		if err != nil {
			b.Fatal(err)
		}
		for _, e := range sp.SelectWindows(nil, math.MinInt64, math.MaxInt64, width) {
			for _, c := range e.Windows {
				_, had := pages[c.Page.Offset]
				size := c.Page.Size
				if !had {
					pages[c.Page.Offset] = windowPage(b, block, &e, c.Page, width, rollup.AllColumns)
					for _, l := range e.Beside(width, c.Page, rollup.AllColumns) {
						size += l.Size
					}
				}
				each(pages[c.Page.Offset], c.Index, !had, size)
			}
		}
	}
}

// BenchmarkDeep measures what blocks of a week take, with their indexes (size/…: all
// but pages of windows, and those), how fast they are written with and without
// windows, and how fast windows are read.
func BenchmarkDeep(b *testing.B) {
	b.Run(fmt.Sprintf("size/days=%d", *deepDays), func(b *testing.B) {
		var samples, all, short, long, shortWindows, longWindows int64
		for b.Loop() {
			samples, all, short, long, shortWindows, longWindows = 0, 0, 0, 0, 0, 0
			deepBlocks(b, *deepDays, WriterOptions{Rollups: true}, func(block []byte, n int) {
				samples, all = samples+int64(n), all+int64(len(block))
				add := func(pages, windows *int64) func(p *WindowPage, index int, new bool, size int64) {
					return func(p *WindowPage, index int, new bool, size int64) {
						if *windows += int64(p.Windows(index)); new {
							*pages += size
						}
					}
				}
				windowChunks(b, block, rollup.Short, add(&short, &shortWindows))
				windowChunks(b, block, rollup.Long, add(&long, &longWindows))
			})
		}
		for _, x := range []struct {
			name string
			n    int64
		}{{"raw-B/sample", all - short - long}, {"short-B/sample", short}, {"long-B/sample", long}, {"all-B/sample", all}} {
			b.ReportMetric(float64(x.n)/float64(samples), x.name)
		}
		b.ReportMetric(float64(short)/float64(shortWindows), "B/short")
		b.ReportMetric(float64(long)/float64(longWindows), "B/long")
		b.ReportMetric(float64(samples)/1e6, "Msamples")
	})
	mix := benchSets(7 * 24 * 3600 / 15)[0]
	var in []tenantSeries
	for _, s := range mix.series {
		in = append(in, tenantSeries{"t", s})
	}
	n := float64(mix.samples())
	var block []byte
	for _, rollups := range []bool{false, true} {
		b.Run(fmt.Sprintf("write/rollups=%v", rollups), func(b *testing.B) {
			before := cpuSeconds(b)
			for b.Loop() {
				block, _ = writeBlock(b, in, WriterOptions{Rollups: rollups})
			}
			b.ReportMetric(n*float64(b.N)/(cpuSeconds(b)-before)/1e6, "Msamples/CPU-s")
			b.ReportMetric(float64(len(block))/n, "B/sample")
		})
	}
	if block == nil {
		block, _ = writeBlock(b, in, WriterOptions{Rollups: true})
	}
	for _, width := range []int64{rollup.Short, rollup.Long} {
		type chunk struct {
			page  *WindowPage
			index int
		}
		var chunks []chunk
		windowChunks(b, block, width, func(p *WindowPage, index int, _ bool, _ int64) { chunks = append(chunks, chunk{p, index}) })
		for _, x := range []struct {
			name string
			cols rollup.Columns
		}{
			{"rate", rollup.First | rollup.Last | rollup.Reset},
			{"last", rollup.Last},
			{"irate", rollup.Prev | rollup.Last},
			{"avg", rollup.Sum},
			{"max", rollup.Max},
			{"all", rollup.AllColumns &^ rollup.M2},
		} {
			b.Run(fmt.Sprintf("read/width=%s/cols=%s", time.Duration(width)*time.Millisecond, x.name), func(b *testing.B) {
				var dec WindowDecoder
				var w rollup.Windows
				windows := 0
				b.ReportAllocs()
				before := cpuSeconds(b)
				for b.Loop() {
					windows = 0
					for _, c := range chunks {
						w.Clear()
						if err := dec.Decode(c.page, c.index, x.cols, &w); err != nil {
							b.Fatal(err)
						}
						windows += w.Len()
					}
				}
				b.ReportMetric(float64(windows)*float64(b.N)/(cpuSeconds(b)-before)/1e6, "Mwindows/CPU-s")
			})
		}
	}
}

// cpuSeconds is what the process has used.
func cpuSeconds(b *testing.B) float64 {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

// TestHostileWindowPage: pages that promise as much as they can take no more than a few
// times their size, until it is seen that it isn't there.
func TestHostileWindowPage(t *testing.T) {
	const size = 1 << 20
	for group := range windowGroups {
		for _, shapes := range []bool{true, false} {
			var body []byte
			if group != allColumns {
				body = append(body, 0, byte(group))
			}
			body = binary.AppendUvarint(body, uint64(rollup.Long))
			switch {
			case group <= groupEnds && shapes:
				body = binary.AppendUvarint(body, size/leastShape-16)
			case group <= groupEnds:
				body = binary.AppendUvarint(append(body, 0), size/leastFirst-16)
			default:
				body = binary.AppendUvarint(body, size/leastOther-16)
			}
			b := appendPage(nil, pageWindows, append(body, make([]byte, size-len(body))...), false)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := ParseWindowPage(b)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; err == nil || n > 6*size {
				t.Errorf("group %d, shapes %v: %.1f times its size, %v", group, shapes, float64(n)/size, err)
			}
		}
	}
}

package chunkfmt

import (
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// The parsers check the CRC of a page first, so the fuzzer gives the body of a
// page, and the test makes the page.

// bodies collects the bodies of all pages of some blocks by type.
func bodies(tb testing.TB) map[pageType][][]byte {
	tb.Helper()
	out := map[pageType][][]byte{}
	var blocks [][]byte
	for _, name := range []string{"testdata/block-v2", "testdata/block-v3"} {
		gone, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		blocks = append(blocks, gone)
	}
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 7))
		block, _ := writeBlock(tb, randomBlock(r, 2, 12), WriterOptions{Uncompressed: true, PageSeries: 6 + int(seed)*10, PageBytes: 3000, Rollups: seed%2 == 0})
		blocks = append(blocks, block)
	}
	for _, block := range blocks {
		for b := block[headerSize : len(block)-trailerSize]; len(b) > 0; {
			typ := pageType(b[0]) &^ pageZstd
			body, rest, err := openPage(b, typ)
			if err != nil {
				tb.Fatal(err)
			}
			out[typ] = append(out[typ], body)
			b = rest
		}
	}
	return out
}

func wantCorrupt(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v does not wrap ErrCorrupt", err)
	}
}

func FuzzDataPage(f *testing.F) {
	all := bodies(f)
	for _, b := range append(all[pageData], all[pageExemplars]...) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := ParseDataPage(appendPage(nil, pageData, body, false))
		wantCorrupt(t, err)
		if err != nil {
			return
		}
		for i := range min(p.Len(), 20) {
			n := p.Samples(i)
			switch p.Kind(i) {
			case KindFloat:
				var dst Floats
				if err = p.Floats(i, &dst); err == nil && (len(dst.T) != n || len(dst.V) != n) {
					t.Fatal("wrong number of samples")
				}
			case KindHistogram:
				var dst Histograms
				if err = p.Histograms(i, &dst); err == nil {
					for _, h := range dst.H {
						if err := ValidHistogram(h); err != nil {
							t.Fatal(err)
						}
					}
				}
			case KindFloatHistogram:
				var dst FloatHistograms
				if err = p.FloatHistograms(i, &dst); err == nil {
					for _, h := range dst.H {
						if err := ValidFloatHistogram(h); err != nil {
							t.Fatal(err)
						}
					}
				}
			default:
				_, err = p.Exemplars(i, nil)
			}
			wantCorrupt(t, err)
		}
	})
}

func FuzzWindowPage(f *testing.F) {
	for _, b := range bodies(f)[pageWindows] {
		f.Add(b, uint16(rollup.AllColumns))
	}
	f.Fuzz(func(t *testing.T, body []byte, columns uint16) {
		p, err := ParseWindowPage(appendPage(nil, pageWindows, body, false))
		wantCorrupt(t, err)
		if err == nil {
			fuzzWindows(t, p, columns)
		}
	})
}

// FuzzWindowGroups is FuzzWindowPage for pages of groups of columns.
func FuzzWindowGroups(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 21))
	var sum rollup.Summariser
	for n := range 6 {
		p := windowBuilder{width: []int64{rollup.Short, rollup.Long}[n%2]}
		for k := range 2 {
			w := oddWindows(r, p.width)
			if n >= 2 {
				w = &rollup.Windows{}
				sum.Summarise(w, regularSeries(r, 60_000).Samples(), p.width)
			}
			p.add(w, 0, min(w.Len(), 8+20*k)) // small, or minimizing takes all the time
		}
		var body [windowGroups][]byte
		for g := groupEnds; g <= p.lastGroup(); g++ {
			var err error
			if body[g], err = onlyPage(p.page(g), pageWindows); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(body[groupEnds], body[groupPrev], body[groupValues], body[groupMoment], uint16(rollup.AllColumns))
	}
	f.Fuzz(func(t *testing.T, ends, prev, values, moment []byte, columns uint16) {
		p, err := ParseWindowPage(appendPage(nil, pageWindows, ends, false))
		wantCorrupt(t, err)
		if err != nil {
			return
		}
		for _, body := range [][]byte{prev, values, moment} {
			o, err := ParseWindowPage(appendPage(nil, pageWindows, body, false))
			wantCorrupt(t, err)
			if err == nil {
				all, err := p.With(o)
				wantCorrupt(t, err)
				if err == nil {
					p = all
				}
			}
		}
		fuzzWindows(t, p, columns)
	})
}

// fuzzWindows decodes the chunks of a page.
func fuzzWindows(t *testing.T, p *WindowPage, columns uint16) {
	t.Helper()
	cols := rollup.Columns(columns) & rollup.AllColumns
	var dec, other WindowDecoder
	var all, one, even rollup.Windows
	for i := range min(p.Len(), 20) {
		n := all.Len()
		one.Clear()
		err := dec.Decode(p, i, cols, &one)
		wantCorrupt(t, err)
		if err2 := dec.Decode(p, i, cols, &all); (err == nil) != (err2 == nil) {
			t.Fatal(err, err2)
		}
		even.Clear()
		if err2 := other.DecodeEven(p, i, cols, 0, &even); (err == nil) != (err2 == nil) {
			t.Fatal(err, err2)
		}
		if even.Expand(cols); err == nil {
			if d := sameWindows(&one, &even); d != "" {
				t.Fatal(d)
			}
		}
		if err != nil {
			if all.Len() != n {
				t.Fatal("windows of a bad chunk")
			}
			continue
		}
		if one.Len() != p.Windows(i) || all.Len() != n+one.Len() {
			t.Fatalf("%d windows", one.Len())
		}
		for k, end := range one.End {
			in := func(x int64) bool { return x > end-p.Width() && x <= end }
			if end%p.Width() != 0 || k > 0 && one.End[k-1] >= end || !one.Flags[k].Valid() ||
				cols&rollup.First != 0 && !in(one.FirstT[k]) || cols&rollup.Prev != 0 && !in(one.PrevT[k]) || cols&rollup.Last != 0 && !in(one.LastT[k]) {
				t.Fatalf("window %d: %+v", k, one)
			}
		}
	}
}

func FuzzSeriesPage(f *testing.F) {
	for _, b := range bodies(f)[pageSeries] {
		f.Add(b)
	}
	ms := []*labels.Matcher{
		labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, ".*"),
		labels.MustNewMatcher(labels.MatchNotEqual, "job", "v1"),
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := ParseSeriesPage(appendPage(nil, pageSeries, body, false))
		wantCorrupt(t, err)
		if err != nil {
			return
		}
		p.Select(nil, math.MinInt64, math.MaxInt64)
		for _, e := range p.SelectWindows(nil, 0, 100000, rollup.Short) {
			for _, c := range e.Windows {
				for _, l := range e.Beside(rollup.Short, c.Page, rollup.AllColumns) {
					if !slices.Contains(p.WindowPages(rollup.Short), l) {
						t.Fatalf("page %v beside %v", l, c.Page)
					}
				}
			}
			if n := len(e.Chunks(0, 100000)); n == 0 && e.Gone == nil || !e.Times.Overlaps(0, 100000) {
				t.Fatalf("%d chunks, %v", n, e.Times)
			}
		}
		for _, e := range p.Select(ms, 0, 100000) {
			for _, c := range e.Chunks {
				if !c.Overlaps(0, 100000) {
					t.Fatal(c)
				}
			}
		}
		l := p.LabelPage()
		for _, name := range l.Names() {
			v, _ := l.Values(name)
			for _, s := range v.Values() {
				v.Metrics(s)
			}
		}
	})
}

func FuzzLabelPage(f *testing.F) {
	for _, b := range bodies(f)[pageLabels] {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := ParseLabelPage(appendPage(nil, pageLabels, body, false))
		wantCorrupt(t, err)
		if err != nil {
			return
		}
		for _, name := range p.Names() {
			v, _ := p.Values(name)
			if v == nil {
				v, err = p.ParseValues(appendPage(nil, pageLabelValues, body, false))
				wantCorrupt(t, err)
				if err != nil {
					continue
				}
			}
			for _, s := range v.Values() {
				v.Metrics(s)
			}
			v.Of("metric_1")
		}
	})
}

func FuzzDirectory(f *testing.F) {
	for _, b := range bodies(f)[pageDirectory] {
		f.Add(b)
	}
	m := labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, "metric_[1-3]x?")
	f.Fuzz(func(t *testing.T, body []byte) {
		d, err := ParseDirectory(append(appendPage(nil, pageDirectory, body, false), body...))
		wantCorrupt(t, err)
		if err != nil {
			return
		}
		d.Pages([]*labels.Matcher{m}, 0, 1000)
	})
}

func FuzzFooter(f *testing.F) {
	for _, b := range bodies(f)[pageFooter] {
		f.Add(appendTrailer(appendPage(nil, pageFooter, b, false), Version), int64(1<<30))
	}
	f.Fuzz(func(t *testing.T, tail []byte, size int64) {
		_, err := ParseFooter(tail, size)
		if short, ok := errors.AsType[*TailError](err); ok {
			if short.Need > size || short.Need <= int64(len(tail)) {
				t.Fatalf("needs %d of %d, has %d", short.Need, size, len(tail))
			}
		} else if !errors.Is(err, ErrVersion) {
			wantCorrupt(t, err)
		}
	})
}

func FuzzPage(f *testing.F) {
	f.Add(appendPage(nil, pageSeries, make([]byte, 100), true))
	f.Add(appendPage(nil, pageSeries, []byte("abc"), false))
	f.Fuzz(func(t *testing.T, b []byte) {
		body, rest, err := openPage(b, pageSeries)
		wantCorrupt(t, err)
		if err == nil && len(body) > maxRatio*len(b) || len(rest) > len(b) {
			t.Fatalf("%d bytes out of %d", len(body), len(b))
		}
		body, err = unpackBody(b) // behind the checksum
		wantCorrupt(t, err)
		if len(body) > maxRatio*len(b) {
			t.Fatalf("%d bytes out of %d", len(body), len(b))
		}
	})
}

// FuzzBlock writes and reads blocks of odd series.
func FuzzBlock(f *testing.F) {
	for seed := range uint64(10) {
		f.Add(seed, 30, 40, 5000)
	}
	f.Fuzz(func(t *testing.T, seed uint64, pageSeries, chunkSamples, pageBytes int) {
		in := randomBlock(rand.New(rand.NewPCG(seed, 1)), 1+int(seed%3), 20)
		block, _ := writeBlock(t, in, WriterOptions{PageSeries: pageSeries, ChunkSamples: chunkSamples, PageBytes: pageBytes, Uncompressed: seed%2 == 0})
		out, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
		if err != nil || len(out) != len(in) {
			t.Fatalf("%v, %d series of %d", err, len(out), len(in))
		}
		for i := range in {
			if in[i].tenant != out[i].tenant || !equalSeries(in[i].s, out[i].s) {
				t.Fatalf("series %d:\n%+v\n%+v", i, in[i].s, out[i].s)
			}
		}
	})
}

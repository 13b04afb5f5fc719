package chunkfmt

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// goneBlock has two tenants: one with nothing gone, and one with series of which all,
// the older half, or nothing is in windows alone; and what those are.
func goneBlock(t *testing.T) (block []byte, summary *Summary, sums map[string]*Summaries) {
	t.Helper()
	r := rand.New(rand.NewPCG(4, 2))
	var b bytes.Buffer
	w := NewWriter(&b, WriterOptions{Uncompressed: true, PageSeries: 6, PageBytes: 2000, Window: 24 * rollup.Long, Level: 3})
	sums = map[string]*Summaries{}
	var sum rollup.Summariser
	for _, tenant := range []string{"all", "some"} {
		for i := range 10 {
			s := regularSeries(r, 60_000)
			s.Labels = labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))
			x := &Summaries{}
			sum.Summarise(&x.Short, s.Samples(), rollup.Short)
			rollup.Widen(&x.Long, &x.Short, rollup.Long)
			if tenant == "some" {
				first, last := s.Floats.T[0], s.Floats.T[len(s.Floats.T)-1]
				until := []int64{0, rollup.EndOf(last, rollup.Long), rollup.EndOf((first+last)/2, rollup.Long)}[i%3]
				if until > 0 {
					x.Gone = []Range{{rollup.EndOf(first, rollup.Long) - rollup.Long + 1, until}}
				}
				n := 0
				for n < len(s.Floats.T) && s.Floats.T[n] <= until {
					n++
				}
				s = &Series{Labels: s.Labels, Floats: Floats{T: s.Floats.T[n:], V: s.Floats.V[n:]}}
			}
			if err := w.AddSummarised(tenant, s, x); err != nil {
				t.Fatal(err)
			}
			sums[tenant+s.Labels.String()] = x
		}
	}
	summary, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), summary, sums
}

// TestGone reads windows of which the samples are gone, and finds their series. The
// blocks are those that are kept as of versions 2 and 3.
func TestGone(t *testing.T) {
	block, summary, sums := goneBlock(t)
	checkGone(t, 3, block, summary, sums)
	for _, version := range []int{2, 3} {
		checkGone(t, version, kept(t, fmt.Sprintf("testdata/block-v%d", version), block), summary, sums)
	}
}

func checkGone(t *testing.T, version int, block []byte, summary *Summary, sums map[string]*Summaries) {
	t.Helper()
	f, err := ParseFooter(block, int64(len(block)))
	if err != nil || f.Version != version {
		t.Fatal(err, f)
	}
	for i, tenant := range f.Tenants {
		if tenant.Gone = summary.Tenants[i].Gone; !slices.Equal(tenant.Windows, summary.Tenants[i].Windows) {
			t.Errorf("windows %v, want %v", tenant.Windows, summary.Tenants[i].Windows)
		}
		d, err := ParseDirectory(at(block, tenant.Directory))
		if err != nil || d.Gone != (tenant.Tenant == "some") || tenant.Gone != d.Gone {
			t.Fatal(err, d)
		}
		// What programs do that know earlier versions alone.
		for i, typ := range []pageType{pageDirectory, pageGoneDirectory}[:version-1] {
			if _, _, err := openPage(at(block, tenant.Directory), typ); (err == nil) != (i == 0 && !d.Gone) {
				t.Errorf("%s: a directory of version %d: %v", tenant.Tenant, i+1, err)
			}
		}
		found := 0
		for _, ref := range d.Pages(nil, math.MinInt64, math.MaxInt64) {
			p, err := ParseSeriesPage(at(block, ref.Location))
			if err != nil {
				t.Fatal(err)
			}
			entries := p.Select(nil, math.MinInt64, math.MaxInt64)
			found += len(entries)
			for _, e := range entries {
				x := sums[tenant.Tenant+e.Labels.String()]
				if !slices.Equal(e.Gone, x.Gone) {
					t.Errorf("%s: gone %v, want %v", e.Labels, e.Gone, x.Gone)
				}
				// The first window alone, in which there may be no samples.
				end := x.Long.End[0]
				first := p.Select([]*labels.Matcher{labels.MustNewMatcher(labels.MatchEqual, "i", e.Labels.Get("i"))}, end, end)
				if len(x.Gone) > 0 && (len(first) != 1 || len(first[0].Chunks) != 0) {
					t.Errorf("%s: in its first window: %v", e.Labels, first)
				}
			}
			for _, width := range []int64{rollup.Short, rollup.Long} {
				for _, e := range p.SelectWindows(nil, math.MinInt64, math.MaxInt64, width) {
					x := sums[tenant.Tenant+e.Labels.String()]
					want := &x.Short
					if width == rollup.Long {
						want = &x.Long
					}
					if n := 0; len(x.Gone) > 0 {
						for _, c := range e.Windows {
							n += c.Samples
						}
						if n != want.Len() {
							t.Errorf("%s: %d windows of %d", e.Labels, n, want.Len())
						}
						if e.Times.MinT > want.FirstT[0] || e.Times.MaxT < want.LastT[want.Len()-1] {
							t.Errorf("%s: times %v", e.Labels, e.Times)
						}
					}
				}
			}
		}
		if found != 10 {
			t.Errorf("%s: %d series", tenant.Tenant, found)
		}
	}
	long := readWindows(t, block, rollup.Long, rollup.AllColumns)
	for key, x := range sums {
		if got := long[key]; got != nil {
			if d := sameWindows(&x.Long, got); d != "" {
				t.Errorf("%s: %s", key, d)
			}
		} else if len(x.Gone) > 0 {
			t.Errorf("%s: no windows", key)
		}
	}
}

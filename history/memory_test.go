package history

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// meter is what a snapshot's Hold was told of.
type meter struct{ now, most atomic.Int64 }

func (m *meter) hold(bytes int64) {
	now := m.now.Add(bytes)
	for {
		most := m.most.Load()
		if now <= most || m.most.CompareAndSwap(most, now) {
			return
		}
	}
}

// meteredObjects looks whether what is read at the same time has been told of.
type meteredObjects struct {
	object.Store
	meter   *meter
	reading atomic.Int64
	untold  atomic.Int64 // bytes, at the most
}

func (o *meteredObjects) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	defer o.reading.Add(-n)
	if untold := o.reading.Add(n) - o.meter.now.Load(); untold > o.untold.Load() {
		o.untold.Store(untold)
	}
	return o.Store.GetRange(ctx, key, off, n)
}

// TestCoalesce: pages of labels are put into few GETs, but neither is much read along for
// that, nor is a GET large.
func TestCoalesce(t *testing.T) {
	const page = 64 << 10
	type get struct {
		object string
		at     chunkfmt.Location
		pages  int
	}
	at := func(offset int64) chunkfmt.Location { return chunkfmt.Location{Offset: offset, Size: page} }
	row := func(from, step int64, n int) (out []chunkfmt.Location) {
		for i := range int64(n) {
			out = append(out, at(from+i*step))
		}
		return out
	}
	for _, test := range []struct {
		name  string
		pages []chunkfmt.Location
		want  []get // with a single GET wanted; of each of the objects
	}{
		{"one", row(100, 0, 1), []get{{at: at(100), pages: 1}}},
		{"near", row(100, 2*page, 10), []get{{at: chunkfmt.Location{Offset: 100, Size: 19 * page}, pages: 10}}},
		{"over gaps", row(0, 16*page, 6), []get{{at: chunkfmt.Location{Size: 81 * page}, pages: 6}}},
		{"far apart", []chunkfmt.Location{at(100 << 20), at(220 << 20)}, []get{{at: at(100 << 20), pages: 1}, {at: at(220 << 20), pages: 1}}},
		{
			"the nearest first",
			[]chunkfmt.Location{at(0), at(6 << 20), at(8 << 20), at(9 << 20)},
			[]get{{at: at(0), pages: 1}, {at: chunkfmt.Location{Offset: 6 << 20, Size: 3<<20 + page}, pages: 3}},
		},
		{
			"many", row(0, page, 300),
			[]get{{at: chunkfmt.Location{Size: maxRun}, pages: 128}, {at: chunkfmt.Location{Offset: maxRun, Size: maxRun}, pages: 128}, {at: chunkfmt.Location{Offset: 2 * maxRun, Size: 44 * page}, pages: 44}},
		},
		{"a large one", []chunkfmt.Location{{Offset: 5, Size: 2 * maxRun}}, []get{{at: chunkfmt.Location{Offset: 5, Size: 2 * maxRun}, pages: 1}}},
	} {
		var wants []want
		var pending []pendingPage
		var expected []get
		for _, o := range []string{"a", "b", "c"} {
			for _, l := range test.pages {
				pending = append(pending, pendingPage{i: len(wants)})
				wants = append(wants, want{object: o, kind: seriesPage, at: l})
			}
			for _, g := range test.want {
				g.object = o
				expected = append(expected, g)
			}
		}
		slices.Reverse(pending)
		var got []get
		for _, r := range coalesce(fetching{runs: 1}, wants, pending) {
			got = append(got, get{r.object, r.at, len(r.pages)})
			for _, p := range r.pages {
				if w := wants[p.i]; w.object != r.object || w.at.Offset < r.at.Offset || w.at.End() > r.at.End() {
					t.Errorf("%s: a page at %v is in a GET of %v", test.name, w.at, r.at)
				}
			}
		}
		if d := cmp.Diff(expected, got, cmp.AllowUnexported(get{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, d)
		}
	}
}

// TestHoldReads: what is read is told of before, what lies between pages too, and given
// back.
func TestHoldReads(t *testing.T) {
	st := localStores(t)
	w := st.open(t, nil)
	for b := range int64(3) {
		var all []*chunkfmt.Series
		for i := range 2000 {
			all = append(all, floats(b*Window+1, 60_000, 300, func(i int) float64 { return float64(i % 7) }, "__name__", fmt.Sprintf("m_%04d", i), "job", fmt.Sprint(i%100)))
		}
		publishWith(t, w, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageBytes: 4 << 10, PageSeries: 16, Rollups: true})
	}
	ms := []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, "__name__", "m_0000|m_0700|m_1999")}
	for name, read := range map[string]func(s *Snapshot) error{
		"series": func(s *Snapshot) error {
			_, err := s.Series(t.Context(), ms, 0, 3*Window)
			return err
		},
		"samples": func(s *Snapshot) error {
			_, err := s.Select(t.Context(), ms, 0, 3*Window)
			return err
		},
		"windows": func(s *Snapshot) error {
			_, err := s.SelectWindows(t.Context(), ms, 0, 3*Window, Summaries{Width: rollup.Short, Columns: rollup.AllColumns &^ rollup.M2})
			return err
		},
	} {
		objects := &meteredObjects{Store: st.objects, meter: &meter{}}
		s := snapshot(t, st.open(t, func(o *Options) { o.Objects = objects }), "a", 0, 3*Window)
		s.Hold = objects.meter.hold
		if err := read(s); err != nil {
			t.Fatal(err)
		}
		if n := objects.untold.Load(); n > 0 {
			t.Errorf("%s: %d bytes were read that nobody had told of", name, n)
		}
		if n := objects.meter.now.Load(); n != 0 {
			t.Errorf("%s: %d bytes are held in the end", name, n)
		}
	}
}

// TestReadIsTold: what is asked of the object store is told of before, all of it; who ends
// the read then gets its reason, and nothing more is asked for.
func TestReadIsTold(t *testing.T) {
	st := localStores(t)
	w := st.open(t, nil)
	var all []*chunkfmt.Series
	for i := range 200 {
		all = append(all, floats(1, 60_000, 300, func(k int) float64 { return float64(k * i % 7) }, "__name__", "m", "i", fmt.Sprint(i)))
	}
	publishWith(t, w, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageBytes: 4 << 10, PageSeries: 16})
	reason := errors.New("enough")
	read := func(most int64) (told, bytes, gets int64, err error) {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		h := st.open(t, nil)
		h.batchBytes = 4 << 10
		s := snapshot(t, h, "a", 0, Window)
		s.Read = func(n int64) {
			if told += n; told > most {
				cancel(reason)
			}
		}
		set, err := s.Select(ctx, []*labels.Matcher{eq("__name__", "m")}, 0, Window)
		for err == nil && set.Next(ctx) {
			err = set.Err()
		}
		if err == nil {
			err = set.Err()
		}
		return told, s.Stats.ObjectBytes.Load(), s.Stats.ObjectGets.Load(), err
	}
	told, bytes, gets, err := read(math.MaxInt64)
	if err != nil || told != bytes || gets < 5 {
		t.Fatalf("%d bytes read with %d GETs, %d told of: %v", bytes, gets, told, err)
	}
	for most := bytes - 1; most > 0; most -= bytes / 10 {
		told, bytes, _, err := read(most)
		if !errors.Is(err, reason) || bytes > most || told <= most {
			t.Errorf("with %d bytes at the most: %d read, %d told of: %v", most, bytes, told, err)
		}
	}
	if _, bytes, gets, err := read(0); !errors.Is(err, reason) || bytes+gets > 0 {
		t.Errorf("with none: %d bytes, %d GETs, %v", bytes, gets, err)
	}
}

// TestExpecting: what is said before of a set is no more than is in it, and then as much; of
// what directories tell without doubt, before lists of series are read.
func TestExpecting(t *testing.T) {
	st := localStores(t)
	w := st.open(t, nil)
	for b := range int64(3) {
		var all []*chunkfmt.Series
		for i := range 100 {
			all = append(all, floats(b*Window+1+int64(i), 60_000, 60+i, constant(1), "__name__", fmt.Sprint("m", i/40), "i", fmt.Sprint(i)))
		}
		publishWith(t, w, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageSeries: 10, ChunkSamples: 20})
	}
	re := func(name, value string) *labels.Matcher {
		return labels.MustNewMatcher(labels.MatchRegexp, name, value)
	}
	for _, ms := range [][]*labels.Matcher{{eq("__name__", "m1")}, {re("__name__", "m.*")}, {re("__name__", "m.*"), eq("i", "7")}, nil} {
		for _, r := range []chunkfmt.Range{{MinT: 0, MaxT: 3 * Window}, {MinT: 70 * 60_000, MaxT: 2*Window + 100_000}, {MinT: Window + 5, MaxT: Window + 6}} {
			for _, hidden := range []*Hidden{nil, NewHidden([]index.Deletion{{MinT: Window, MaxT: 2 * Window, Matchers: []*labels.Matcher{eq("i", "41")}}}, Before(math.MinInt64)), NewHidden(nil, Before(Window+600_000))} {
				s := snapshot(t, w, "a", 0, 3*Window)
				s.hide(hidden)
				type said struct{ series, samples int64 }
				var told []said
				set, err := s.Expecting(func(series, samples int64) { told = append(told, said{series, samples}) }).Select(t.Context(), ms, r.MinT, r.MaxT)
				if err != nil {
					t.Fatal(err)
				}
				var got said
				for set.Next(t.Context()) {
					got.series++
					got.samples += int64(set.At().Samples())
				}
				if set.Err() != nil || len(told) != 2 || told[1] != got || told[0].series > got.series || told[0].samples > got.samples {
					t.Errorf("%v of %v, %v hidden: told %v, got %v, %v", ms, r, hidden, told, got, set.Err())
				}
				if hidden == nil && r.MinT == 0 && len(ms) == 1 && ms[0].Type == labels.MatchEqual && told[0].samples != got.samples {
					t.Errorf("%v of all time: %v told of at first, of %v", ms, told[0], got)
				}
			}
		}
	}
}

// TestHoldLabels: what label reads hold is about what they give and some pages, not the pages
// of all blocks; and all is given back.
func TestHoldLabels(t *testing.T) {
	const blocks, series = 6, 4000
	st := localStores(t)
	w := st.open(t, nil)
	for b := range blocks {
		var all []*chunkfmt.Series
		for i := range series {
			all = append(all, floats(int64(b)*Window+1, 1000, 2, constant(1), "__name__", fmt.Sprint("m", i%3), "of", fmt.Sprintf("block %d", b), "pod", fmt.Sprintf("pod-%x-%08d", i*i, i)))
		}
		publishWith(t, w, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageSeries: 256})
	}
	text := int64(0) // of all pods
	for i := range series {
		text += int64(len(fmt.Sprintf("pod-%x-%08d", i*i, i)))
	}
	read := func(s *Snapshot, ms []*labels.Matcher) map[string]func() (int, error) {
		return map[string]func() (int, error){
			"values": func() (int, error) {
				vs, err := s.LabelValues(t.Context(), "pod", ms, 0, blocks*Window)
				return len(vs), err
			},
			"names": func() (int, error) {
				vs, err := s.LabelNames(t.Context(), ms, 0, blocks*Window)
				return len(vs), err
			},
			"series": func() (int, error) {
				ls, err := s.Series(t.Context(), ms, 0, blocks*Window)
				return len(ls), err
			},
		}
	}
	want := map[string]int{"values": series, "names": 3, "series": blocks * series}
	least := map[string]int64{"values": text, "series": blocks * text} // of what is given
	for _, ms := range [][]*labels.Matcher{nil, {eq("__name__", "m1")}, {labels.MustNewMatcher(labels.MatchRegexp, "pod", "pod-.*")}} {
		most := map[int64]int64{} // of values, by the size of batches
		for _, batch := range []int64{batchBytes, 1} {
			h := st.open(t, func(o *Options) { o.PageCacheBytes = -1 })
			h.batchBytes = batch
			s := snapshot(t, h, "a", 0, blocks*Window)
			var m meter
			s.Hold = m.hold
			for name, read := range read(s, ms) {
				m.most.Store(0)
				n, err := read()
				if all := len(ms) == 0 || ms[0].Name == "pod"; err != nil || all && n != want[name] || n == 0 {
					t.Errorf("%s of %v: %d, %v, want %d", name, ms, n, err, want[name])
				} else if most := m.most.Load(); all && most < least[name] {
					t.Errorf("%s of %v: %d bytes were held, which is less than the text", name, ms, most)
				}
				if name == "values" {
					most[batch] = m.most.Load()
				}
				if n := m.now.Load(); n != 0 {
					t.Errorf("%s of %v: %d bytes are held in the end", name, ms, n)
				}
			}
		}
		if _, byPages := onlyMetric(ms); byPages && most[1] > most[batchBytes]*2/3 {
			t.Errorf("values of %v: %d bytes were held at the most block by block, %d together", ms, most[1], most[batchBytes])
		}
	}
}

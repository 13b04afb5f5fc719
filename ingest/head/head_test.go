package head

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// writer appends for one session.
type writer struct {
	t      *testing.T
	h      *Head
	tenant string
	refs   Refs
	known  map[string]uint32
}

func newWriter(t *testing.T, h *Head, tenant string) *writer {
	return &writer{t: t, h: h, tenant: tenant, known: map[string]uint32{}}
}

func (w *writer) ref(ls labels.Labels) uint32 {
	ref, ok := w.known[ls.String()]
	if !ok {
		ref = uint32(w.refs.Len())
		if !w.refs.Announce(ref, ls, false) {
			w.t.Fatal("announcement refused")
		}
		w.known[ls.String()] = ref
	}
	return ref
}

func (w *writer) floats(ls labels.Labels, tv ...float64) Result {
	c := &ship.Columns{}
	for i := 0; i < len(tv); i += 2 {
		c.Floats.Ref = append(c.Floats.Ref, w.ref(ls))
		c.Floats.T = append(c.Floats.T, int64(tv[i]))
		c.Floats.V = append(c.Floats.V, tv[i+1])
	}
	return w.h.Append(w.tenant, &w.refs, &Batch{Columns: c})
}

func all(t *testing.T, h *Head, tenant string, ms ...*labels.Matcher) map[string]*chunkfmt.Series {
	t.Helper()
	found, _, err := h.Select(context.Background(), fetch.Query{
		Tenant: tenant, MinT: math.MinInt64, MaxT: math.MaxInt64, Matchers: ms,
	})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*chunkfmt.Series{}
	for _, s := range found {
		var d fetch.Decoder
		cols, err := d.Decode(s.Chunks)
		if err != nil {
			t.Fatal(err)
		}
		out[s.Labels.String()] = cols
	}
	return out
}

func ls(ss ...string) labels.Labels { return labels.FromStrings(ss...) }

func TestInOrderLateAndDuplicates(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	up := ls("__name__", "up", "job", "x")
	if r := w.floats(up, 1000, 1, 2000, 2, 4000, 4); r.Appended != 3 {
		t.Errorf("in order: %+v", r)
	}
	if r := w.floats(up, 3000, 3, 500, 0.5); r.Late != 2 {
		t.Errorf("late: %+v", r)
	}
	if r := w.floats(up, 1000, 1, 2000, 2, 4000, 4, 3000, 3, 500, 0.5); r.Duplicates != 5 {
		t.Errorf("sent again: %+v", r)
	}
	// A different value for a timestamp: the greater bits win, a marker loses.
	w.floats(up, 2000, 1.5, 4000, 5, 3000, math.Float64frombits(value.StaleNaN))
	got := all(t, h, "a")[up.String()].Floats
	want := chunkfmt.Floats{T: []int64{500, 1000, 2000, 3000, 4000}, V: []float64{0.5, 1, 2, 3, 5}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestManyLateSamples(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	up := ls("__name__", "up")
	w.floats(up, 1e9, 1)
	r := rand.New(rand.NewPCG(1, 1))
	want := map[int64]float64{1e9: 1}
	for range 3000 {
		at, v := int64(r.IntN(1e6)), float64(r.IntN(3))
		w.floats(up, float64(at), v)
		if old, ok := want[at]; !ok || v > old {
			want[at] = v
		}
	}
	got := all(t, h, "a")[up.String()].Floats
	if !slices.IsSorted(got.T) || len(got.T) != len(want) {
		t.Fatalf("%d samples, want %d; sorted: %v", len(got.T), len(want), slices.IsSorted(got.T))
	}
	for i, at := range got.T {
		if got.V[i] != want[at] {
			t.Errorf("at %d: %v, want %v", at, got.V[i], want[at])
		}
	}
}

func TestKindsMix(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	m := ls("__name__", "m")
	ref := w.ref(m)
	int1, int2 := tsdbutil.GenerateTestHistogram(1), tsdbutil.GenerateTestHistogram(2)
	stale := &histogram.Histogram{Sum: math.Float64frombits(value.StaleNaN)}
	float1 := tsdbutil.GenerateTestFloatHistogram(5)
	custom := tsdbutil.GenerateTestCustomBucketsHistogram(3)
	res := h.Append("a", &w.refs, &Batch{Columns: &ship.Columns{
		Floats:          ship.Floats{Ref: []uint32{ref, ref}, T: []int64{10, 70}, ST: []int64{0, 5}, V: []float64{1, 2}},
		Histograms:      ship.Histograms{Ref: []uint32{ref, ref, ref, ref}, T: []int64{20, 30, 40, 60}, ST: []int64{1, 1, 1, 1}, H: []*histogram.Histogram{int1, int2, stale, custom}},
		FloatHistograms: ship.FloatHistograms{Ref: []uint32{ref}, T: []int64{50}, H: []*histogram.FloatHistogram{float1}},
	}})
	if res.Refused != nil {
		t.Fatalf("refused: %+v", res.Refused)
	}
	got := all(t, h, "a")[m.String()]
	if d := cmp.Diff(chunkfmt.Floats{T: []int64{10, 70}, ST: []int64{0, 5}, V: []float64{1, 2}}, got.Floats); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]int64{20, 30, 40, 60}, got.Histograms.T); d != "" {
		t.Error(d)
	}
	for i, want := range []*histogram.Histogram{int1, int2, nil, custom} {
		if h := got.Histograms.H[i]; want != nil && !h.Equals(want) || want == nil && !value.IsStaleNaN(h.Sum) {
			t.Errorf("histogram %d is %s, want %s", i, h, want)
		}
	}
	if len(got.FloatHistograms.T) != 1 || !got.FloatHistograms.H[0].Equals(float1) {
		t.Errorf("float histograms %+v", got.FloatHistograms)
	}
}

func TestGenerations(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	up, down := ls("__name__", "up"), ls("__name__", "down")
	w.floats(up, 1, 1)
	w.floats(down, 1, 1)
	g := h.Rotate()
	w.floats(up, 2, 2)
	if got := all(t, h, "a")[up.String()].Floats.T; !slices.Equal(got, []int64{1, 2}) {
		t.Errorf("both generations: %v", got)
	}
	var walked []string
	if err := g.Walk("a", func(s *chunkfmt.Series) error {
		walked = append(walked, fmt.Sprint(s.Labels, s.Floats.T))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{`{__name__="down"} [1]`, `{__name__="up"} [1]`}, walked); d != "" {
		t.Error(d)
	}
	h.Published(g, nil)
	h.Drop(g, nil)
	got := all(t, h, "a")
	if len(got) != 1 || !slices.Equal(got[up.String()].Floats.T, []int64{2}) {
		t.Errorf("after the drop: %v", got)
	}
	if s := h.Size(); s.Generations != 1 || s.Series != 1 || s.Samples != 1 {
		t.Errorf("size %+v", s)
	}
	// A session goes on with refs of the dropped generation.
	w.floats(down, 3, 3)
	if got := all(t, h, "a")[down.String()].Floats.T; !slices.Equal(got, []int64{3}) {
		t.Errorf("after the drop: %v", got)
	}
}

func TestTenantsAreApart(t *testing.T) {
	h := New(0)
	a, b := newWriter(t, h, "a"), newWriter(t, h, "b")
	a.floats(ls("__name__", "up"), 1, 1)
	b.floats(ls("__name__", "up"), 2, 2)
	if got := all(t, h, "a"); len(got) != 1 || got[`{__name__="up"}`].Floats.T[0] != 1 {
		t.Errorf("tenant a sees %v", got)
	}
	if got := all(t, h, "c"); len(got) != 0 {
		t.Errorf("tenant c sees %v", got)
	}
}

func TestSeriesLimit(t *testing.T) {
	h := New(2)
	w := newWriter(t, h, "a")
	for i := range 4 {
		r := w.floats(ls("__name__", "m", "i", fmt.Sprint(i)), 1, 1)
		if got := r.Refused[ReasonSeriesLimit].Samples; got != map[bool]int{true: 1}[i >= 2] {
			t.Errorf("series %d: %d refused", i, got)
		}
	}
	if got := all(t, h, "a"); len(got) != 2 {
		t.Errorf("%d series", len(got))
	}
}

// matcher kinds against the plain definition.
func TestMatchersAgainstDefinition(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	var series []labels.Labels
	for i := range 60 {
		b := labels.NewBuilder(ls("__name__", fmt.Sprintf("m%d", i%3), "i", fmt.Sprint(i)))
		if i%2 == 0 {
			b.Set("even", "yes")
		}
		if i%5 == 0 {
			b.Set("env", []string{"prod", "dev"}[i/5%2])
		}
		series = append(series, b.Labels())
		w.floats(b.Labels(), 1, 1)
	}
	var ms []*labels.Matcher
	for _, name := range []string{"__name__", "even", "env", "i", "nosuch"} {
		for _, v := range []string{"", "m1", "m1|m2", "yes", "prod", "prod|dev|", ".+", ".*", "1.*", "7"} {
			for _, typ := range []labels.MatchType{labels.MatchEqual, labels.MatchNotEqual, labels.MatchRegexp, labels.MatchNotRegexp} {
				ms = append(ms, labels.MustNewMatcher(typ, name, v))
			}
		}
	}
	for i, m := range ms {
		for _, set := range [][]*labels.Matcher{{m}, {m, ms[(i*7+3)%len(ms)]}, {m, ms[(i*11+5)%len(ms)], ms[(i*13+1)%len(ms)]}} {
			want := 0
			for _, l := range series {
				ok := true
				for _, m := range set {
					ok = ok && m.Matches(l.Get(m.Name))
				}
				if ok {
					want++
				}
			}
			if got := all(t, h, "a", set...); len(got) != want {
				t.Errorf("%v: %d series, want %d", set, len(got), want)
			}
		}
	}
}

// Names and values that were asked for grow with the series; an answer is the caller's to change.
func TestLabelsGrow(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	everything := fetch.Query{Tenant: "a", MinT: math.MinInt64, MaxT: math.MaxInt64}
	check := func(name string, want ...string) {
		t.Helper()
		for range 2 {
			got, _, err := h.Labels(t.Context(), everything, name)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("names or values of %q: %q, %v, want %q", name, got, err, want)
			}
			for i := range got {
				got[i] = "changed"
			}
		}
	}
	w.floats(ls("__name__", "x", "job", "j2"), 1000, 1)
	check("", "__name__", "job")
	check("job", "j2")
	check("env")
	w.floats(ls("__name__", "x", "job", "j1", "env", "e"), 1000, 1)
	check("", "__name__", "env", "job")
	check("job", "j1", "j2")
	check("env", "e")
	h.Rotate()
	w.floats(ls("__name__", "x", "job", "j0"), 2000, 1)
	w.floats(ls("__name__", "x", "job", "j2"), 2000, 1)
	check("job", "j0", "j1", "j2")
}

func TestLabelsExemplarsMetadata(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	w.floats(ls("__name__", "x", "job", "j1"), 1000, 1)
	w.floats(ls("__name__", "y", "job", "j2", "env", "e"), 2000, 1)
	ctx, everything := context.Background(), fetch.Query{Tenant: "a", MinT: math.MinInt64, MaxT: math.MaxInt64}
	names, hd, err := h.Labels(ctx, everything, "")
	if err != nil || !slices.Equal(names, []string{"__name__", "env", "job"}) || hd.Oldest != 1000 || hd.Newest != 2000 {
		t.Errorf("names %v, header %+v, err %v", names, hd, err)
	}
	q := everything
	q.Matchers = []*labels.Matcher{labels.MustNewMatcher(labels.MatchEqual, "__name__", "y")}
	if vs, _, err := h.Labels(ctx, q, "job"); err != nil || !slices.Equal(vs, []string{"j2"}) {
		t.Errorf("values %v, err %v", vs, err)
	}
	e := chunkfmt.Exemplar{Labels: ls("trace", "1"), Ts: 1000, HasTs: true, Value: 3}
	for range 2 {
		h.Append("a", &w.refs, &Batch{
			Columns: &ship.Columns{}, Exemplars: []Exemplar{{0, e}},
			Metadata: []Metadata{{0, "", metadata.Metadata{Type: "gauge", Help: "old"}}, {0, "", metadata.Metadata{Type: "gauge", Help: "new"}}},
		})
		h.Rotate()
	}
	h.Append("a", &w.refs, &Batch{Columns: &ship.Columns{}})
	es, _ := h.Exemplars("a", 0, 5000, [][]*labels.Matcher{{labels.MustNewMatcher(labels.MatchEqual, "job", "j1")}})
	if len(es) != 2 || len(es[0].Exemplars) != 1 || !es[0].Exemplars[0].Equals(e) {
		t.Errorf("exemplars of both generations: %+v", es)
	}
	md, _ := h.Metadata("a", "", 0)
	if len(md) != 2 || md[1].Metric != "x" || md[1].Help != "new" {
		t.Errorf("metadata in a new generation: %+v", md)
	}
}

// Metadata is of a family: that is what readers ask for, and what a block says of
// each series.
func TestMetadataOfFamily(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	w.floats(ls("__name__", "x_bucket", "le", "1"), 1000, 1)
	w.floats(ls("__name__", "y"), 1000, 1)
	m := metadata.Metadata{Type: "histogram", Help: "X."}
	h.Append("a", &w.refs, &Batch{Columns: &ship.Columns{}, Metadata: []Metadata{{0, "x", m}, {1, "y", m}}})
	h.Rotate()
	w.floats(ls("__name__", "x_bucket", "le", "1"), 2000, 1)
	md, _ := h.Metadata("a", "", 0)
	if len(md) != 2 || md[0].Metric != "x" || md[1].Metric != "y" {
		t.Errorf("families %+v", md)
	}
	if md, _ := h.Metadata("a", "x_bucket", 0); len(md) != 0 {
		t.Errorf("a member of a family has metadata: %+v", md)
	}
	for i, g := range []*Generation{h.Rotate(), h.readable()[0]} {
		err := g.Walk("a", func(s *chunkfmt.Series) error {
			want := map[string]string{"x_bucket": "x", "y": ""}
			if name := s.Labels.Get("__name__"); s.Metadata != m || s.Family != want[name] {
				t.Errorf("generation %d: %s has %q %v", i, name, s.Family, s.Metadata)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// Readers and a rotation beside a writer see no sample twice, and miss none
// that was there before they began.
func TestConcurrentReads(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	const rounds = 400
	var wg sync.WaitGroup
	stop := make(chan struct{})
	progress := make(chan int64, rounds+1)
	progress <- 0
	wg.Go(func() {
		defer close(stop)
		for i := range rounds {
			for s := range 5 {
				w.floats(ls("__name__", "m", "s", fmt.Sprint(s)), float64(i+1), float64(i+1))
			}
			progress <- int64(i + 1)
			if i%50 == 0 {
				h.Rotate()
			}
		}
	})
	wg.Go(func() {
		seen := int64(0)
		for {
			select {
			case <-stop:
				return
			case seen = <-progress:
			}
			for name, s := range all(t, h, "a") {
				for i, at := range s.Floats.T {
					if at != int64(i+1) {
						t.Errorf("%s: sample %d has time %d", name, i, at)
						return
					}
				}
				if int64(len(s.Floats.T)) < seen {
					t.Errorf("%s: %d samples, %d were there", name, len(s.Floats.T), seen)
					return
				}
			}
		}
	})
	wg.Wait()
}

// A histogram that breaks Prometheus's rules is refused: its iterators panic on
// some of these.
func TestInvalidHistogram(t *testing.T) {
	h := New(0)
	var refs Refs
	ls := labels.FromStrings("__name__", "x")
	refs.Announce(0, ls, false)
	good := &histogram.FloatHistogram{Schema: 3, Count: 2, Sum: 1, PositiveSpans: []histogram.Span{{Offset: 1, Length: 1}}, PositiveBuckets: []float64{2}}
	backwards := []histogram.Span{{Offset: 1, Length: 1}, {Offset: -7, Length: 1}}
	bad := []*histogram.FloatHistogram{
		{Schema: 9, Count: 2, PositiveSpans: backwards, PositiveBuckets: []float64{1, 1}},
		{Schema: 3, Count: 2, PositiveSpans: backwards, PositiveBuckets: []float64{1, 1}},
		{Schema: 3, Count: 1, PositiveSpans: good.PositiveSpans},
	}
	cols := ship.Columns{
		FloatHistograms: ship.FloatHistograms{Ref: []uint32{0}, T: []int64{1}, H: []*histogram.FloatHistogram{good}},
		Histograms: ship.Histograms{Ref: []uint32{0}, T: []int64{99}, H: []*histogram.Histogram{
			{Schema: 9, Count: 2, PositiveSpans: backwards, PositiveBuckets: []int64{1, 0}},
		}},
	}
	for i, b := range bad {
		c := &cols.FloatHistograms
		c.Ref, c.T, c.H = append(c.Ref, 0), append(c.T, int64(i+2)), append(c.H, b)
	}
	res := h.Append("t", &refs, &Batch{Columns: &cols})
	if res.Appended != 1 || res.Refused[ReasonHistogram].Samples != len(bad)+1 {
		t.Errorf("appended %d, refused %+v", res.Appended, res.Refused)
	}
	n := 0
	if err := h.Rotate().Walk("t", func(s *chunkfmt.Series) error {
		n += len(s.FloatHistograms.T) + len(s.Histograms.T)
		return nil
	}); err != nil || n != 1 {
		t.Errorf("%d samples, %v", n, err)
	}
}

// TestKeep: what a query has not released stays as it is, whatever others release.
func TestKeep(t *testing.T) {
	h := New(0)
	w := newWriter(t, h, "a")
	for i := range 300 {
		for k := range 130 { // a closed chunk, and an open one
			w.floats(ls("__name__", "m", "i", fmt.Sprint(i)), float64(1000*k), float64(i*k))
		}
	}
	h.Rotate()
	for i := range 200 {
		w.floats(ls("__name__", "m", "i", fmt.Sprint(i)), 200_000, float64(i))
	}
	type answer struct {
		lists   [][]fetch.Series
		release []func()
	}
	ask := func(of string, newest bool) (a answer) {
		var err error
		a.lists, _, err = h.Lists(t.Context(), fetch.Query{
			Tenant: "a", MinT: math.MinInt64, MaxT: math.MaxInt64, Newest: newest,
			Matchers: []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, "i", of)},
			Keep:     func(release func()) { a.release = append(a.release, release) },
		})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	text := func(a answer) string { return fmt.Sprint(a.lists) }
	kinds := []func() answer{
		func() answer { return ask(".*", false) },
		func() answer { return ask("1.*", false) },
		func() answer { return ask(".*", true) },
		func() answer { return ask("2.*|17", true) },
	}
	var want []string
	for _, kind := range kinds {
		want = append(want, text(kind()))
	}
	rng := rand.New(rand.NewPCG(1, 2))
	open := map[int][]answer{}
	for range 200 {
		k := rng.IntN(len(kinds))
		if as := open[k]; len(as) > 0 && rng.IntN(2) == 0 {
			if got := text(as[0]); got != want[k] {
				t.Fatalf("kind %d changed", k)
			}
			for _, release := range as[0].release {
				release()
			}
			open[k] = as[1:]
			continue
		}
		a := kinds[k]()
		if got := text(a); got != want[k] {
			t.Fatalf("kind %d is another at first", k)
		}
		open[k] = append(open[k], a)
	}
}

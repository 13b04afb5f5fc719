package chunkfmt

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
)

type tenantSeries struct {
	tenant string
	s      *Series
}

// randomBlock makes series of odd values in the order that a Writer wants.
func randomBlock(r *rand.Rand, tenants, series int) []tenantSeries {
	var out []tenantSeries
	for t := range tenants {
		seen := map[string]bool{}
		var of []tenantSeries
		for range series {
			ls := []string{}
			if r.IntN(20) > 0 {
				ls = append(ls, model.MetricNameLabel, fmt.Sprintf("metric_%d", r.IntN(10)))
			}
			for _, n := range []string{"Zone", "instance", "le", "job"} {
				if r.IntN(3) > 0 {
					ls = append(ls, n, fmt.Sprintf("v%d", r.IntN(20)))
				}
			}
			l := labels.FromStrings(ls...)
			if seen[l.String()] {
				continue
			}
			seen[l.String()] = true
			s := randomSeries(r)
			s.Labels = l
			of = append(of, tenantSeries{fmt.Sprintf("tenant-%d", t), s})
		}
		slices.SortFunc(of, func(a, b tenantSeries) int {
			return cmp.Or(cmp.Compare(a.s.Labels.Get(model.MetricNameLabel), b.s.Labels.Get(model.MetricNameLabel)), labels.Compare(a.s.Labels, b.s.Labels))
		})
		out = append(out, of...)
	}
	return out
}

func randomSeries(r *rand.Rand) *Series {
	s := &Series{}
	if r.IntN(2) == 0 {
		s.Metadata = metadata.Metadata{Type: "counter", Help: fmt.Sprintf("help %d", r.IntN(3))}
	}
	times := func() (t, st []int64) {
		x := int64(r.IntN(1000)) - 500
		for range r.IntN(60) + 1 {
			x += int64(1 + r.IntN(3)*r.IntN(20000))
			t = append(t, x)
		}
		if r.IntN(3) == 0 {
			for range t {
				st = append(st, int64(r.IntN(2)*100))
			}
			st[0] = 7
		}
		return t, st
	}
	if r.IntN(4) > 0 {
		s.Floats.T, s.Floats.ST = times()
		for range s.Floats.T {
			s.Floats.V = append(s.Floats.V, oddFloat(r))
		}
	}
	if r.IntN(6) == 0 {
		s.Histograms.T, s.Histograms.ST = times()
		h := randomHistogram(r)
		for range s.Histograms.T {
			if r.IntN(5) == 0 {
				h = randomHistogram(r)
			}
			s.Histograms.H = append(s.Histograms.H, h)
		}
	}
	if r.IntN(6) == 0 {
		s.FloatHistograms.T, s.FloatHistograms.ST = times()
		for range s.FloatHistograms.T {
			s.FloatHistograms.H = append(s.FloatHistograms.H, randomFloatHistogram(r))
		}
	}
	if r.IntN(6) == 0 {
		t, _ := times()
		for _, x := range t {
			s.Exemplars = append(s.Exemplars, exemplar.Exemplar{
				Ts: x, Value: oddFloat(r), HasTs: r.IntN(2) == 0,
				Labels: labels.FromStrings("trace_id", fmt.Sprint(r.IntN(1e6))),
			})
		}
	}
	if len(s.Floats.T)+len(s.Histograms.T)+len(s.FloatHistograms.T)+len(s.Exemplars) == 0 {
		s.Floats = Floats{T: []int64{math.MinInt64, 0, math.MaxInt64}, V: []float64{1, 2, 3}}
	}
	return s
}

func writeBlock(t testing.TB, in []tenantSeries, o WriterOptions) ([]byte, *Summary) {
	t.Helper()
	var buf bytes.Buffer
	w := NewWriter(&buf, o)
	for _, ts := range in {
		if err := w.Add(ts.tenant, ts.s); err != nil {
			t.Fatal(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if sum.Size != int64(buf.Len()) {
		t.Fatalf("summary says %d bytes, there are %d", sum.Size, buf.Len())
	}
	return buf.Bytes(), sum
}

func at(block []byte, l Location) []byte { return block[l.Offset:l.End():l.End()] }

// readBlock reads a whole block the way package history does.
func readBlock(block []byte, ms []*labels.Matcher, mint, maxt int64) ([]tenantSeries, error) {
	tail := block[max(0, len(block)-FooterTail):]
	f, err := ParseFooter(tail, int64(len(block)))
	if short, ok := errors.AsType[*TailError](err); ok {
		f, err = ParseFooter(block[int64(len(block))-short.Need:], int64(len(block)))
	}
	if err != nil {
		return nil, err
	}
	var out []tenantSeries
	for _, tenant := range f.Tenants {
		d, err := ParseDirectory(at(block, tenant.Directory))
		if err != nil {
			return nil, err
		}
		for _, ref := range d.Pages(ms, mint, maxt) {
			if ref.Bytes != nil && !bytes.Equal(ref.Bytes, at(block, ref.Location)) {
				return nil, errors.New("page that came with the directory differs")
			}
			p, err := ParseSeriesPage(at(block, ref.Location))
			if err != nil {
				return nil, err
			}
			for _, e := range p.Select(ms, mint, maxt) {
				s := &Series{Labels: e.Labels, Metadata: e.Metadata, Family: e.Family}
				for _, c := range e.Chunks {
					if c.Page.Offset < ref.Data.Offset || c.Page.End() > ref.Data.End() {
						return nil, fmt.Errorf("page %v outside %v", c.Page, ref.Data)
					}
					page, err := ParseDataPage(at(block, c.Page))
					if err != nil {
						return nil, err
					}
					if page.Samples(c.Index) != c.Samples || page.Kind(c.Index) != c.Kind {
						return nil, fmt.Errorf("chunk %+v has %d samples of %v", c, page.Samples(c.Index), page.Kind(c.Index))
					}
					switch c.Kind {
					case KindFloat:
						err = page.Floats(c.Index, &s.Floats)
					case KindHistogram:
						err = page.Histograms(c.Index, &s.Histograms)
					case KindFloatHistogram:
						err = page.FloatHistograms(c.Index, &s.FloatHistograms)
					}
					if err != nil {
						return nil, err
					}
				}
				for _, c := range e.Exemplars {
					page, err := ParseDataPage(at(block, c.Page))
					if err != nil {
						return nil, err
					}
					if s.Exemplars, err = page.Exemplars(c.Index, s.Exemplars); err != nil {
						return nil, err
					}
				}
				out = append(out, tenantSeries{tenant.Tenant, s})
			}
		}
	}
	return out, nil
}

func equalSeries(a, b *Series) bool {
	if !labels.Equal(a.Labels, b.Labels) || a.Metadata != b.Metadata || a.Family != b.Family || len(a.Exemplars) != len(b.Exemplars) {
		return false
	}
	for i := range a.Exemplars {
		x, y := a.Exemplars[i], b.Exemplars[i]
		if x.Ts != y.Ts || x.HasTs != y.HasTs || math.Float64bits(x.Value) != math.Float64bits(y.Value) || !labels.Equal(x.Labels, y.Labels) {
			return false
		}
	}
	return bitEqual(a.Floats, b.Floats) && bitEqual(a.Histograms, b.Histograms) && bitEqual(a.FloatHistograms, b.FloatHistograms)
}

func TestBlockRoundTrip(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		in := randomBlock(r, 1+int(seed%4), 1+r.IntN(150))
		o := WriterOptions{PageBytes: 100 + r.IntN(20000), PageSeries: 1 + r.IntN(200), ChunkSamples: 1 + r.IntN(70), Window: int64(seed%3) * 50000}
		block, sum := writeBlock(t, in, o)
		out, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
		if err != nil || len(out) != len(in) {
			t.Fatalf("seed %d: %v, %d series of %d", seed, err, len(out), len(in))
		}
		for i := range in {
			if in[i].tenant != out[i].tenant || !equalSeries(in[i].s, out[i].s) {
				t.Fatalf("seed %d series %d:\n%+v\n%+v", seed, i, in[i].s, out[i].s)
			}
		}
		f, err := ParseFooter(block, int64(len(block)))
		if err != nil || !bitEqual(f.Tenants, sum.Tenants) {
			t.Fatalf("%v\n%+v\n%+v", err, f, sum)
		}
	}
}

func TestSelect(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 1))
	in := randomBlock(r, 2, 300)
	block, _ := writeBlock(t, in, WriterOptions{PageSeries: 40})
	matchers := []*labels.Matcher{
		labels.MustNewMatcher(labels.MatchEqual, model.MetricNameLabel, "metric_3"),
		labels.MustNewMatcher(labels.MatchEqual, model.MetricNameLabel, ""),
		labels.MustNewMatcher(labels.MatchNotEqual, model.MetricNameLabel, "metric_3"),
		labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, "metric_(3|5)"),
		labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, "metric_.*"),
		labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, "a.*"),
		labels.MustNewMatcher(labels.MatchEqual, "job", "v7"),
		labels.MustNewMatcher(labels.MatchEqual, "job", ""),
		labels.MustNewMatcher(labels.MatchNotRegexp, "le", "v1.*"),
		labels.MustNewMatcher(labels.MatchEqual, "nosuch", ""),
		labels.MustNewMatcher(labels.MatchEqual, "nosuch", "x"),
	}
	for range 300 {
		ms := []*labels.Matcher{matchers[r.IntN(len(matchers))], matchers[r.IntN(len(matchers))]}
		mint := int64(r.IntN(200000))
		maxt := mint + int64(r.IntN(200000))
		got, err := readBlock(block, ms, mint, maxt)
		if err != nil {
			t.Fatal(err)
		}
		var want []tenantSeries
		overlaps := func(t []int64) bool {
			return len(t) > 0 && t[0] <= maxt && t[len(t)-1] >= mint
		}
		for _, ts := range in {
			ok := ms[0].Matches(ts.s.Labels.Get(ms[0].Name)) && ms[1].Matches(ts.s.Labels.Get(ms[1].Name))
			var ex []int64
			for _, e := range ts.s.Exemplars {
				ex = append(ex, e.Ts)
			}
			if ok && (overlaps(ts.s.Floats.T) || overlaps(ts.s.Histograms.T) || overlaps(ts.s.FloatHistograms.T) || overlaps(ex)) {
				want = append(want, ts)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("%v: %d series, want %d", ms, len(got), len(want))
		}
		for i := range got {
			if got[i].tenant != want[i].tenant || !labels.Equal(got[i].s.Labels, want[i].s.Labels) {
				t.Fatalf("%v: %v, want %v", ms, got[i].s.Labels, want[i].s.Labels)
			}
		}
	}
}

// labelFacts is what a label page says: name → value → metrics.
type labelFacts map[string]map[string][]string

func TestLabelPages(t *testing.T) {
	r := rand.New(rand.NewPCG(10, 1))
	in := randomBlock(r, 1, 300)
	// A label with so many values that they get pages of their own.
	for i := range 70000 {
		s := &Series{Labels: labels.FromStrings(model.MetricNameLabel, "z", "pod", fmt.Sprintf("p%06d", i)), Floats: Floats{T: []int64{1}, V: []float64{1}}}
		in = append(in, tenantSeries{"tenant-0", s})
	}
	want := labelFacts{}
	for _, ts := range in {
		metric := ts.s.Labels.Get(model.MetricNameLabel)
		ts.s.Labels.Range(func(l labels.Label) {
			if want[l.Name] == nil {
				want[l.Name] = map[string][]string{}
			}
			if ms := want[l.Name][l.Value]; len(ms) == 0 || ms[len(ms)-1] != metric {
				want[l.Name][l.Value] = append(ms, metric)
			}
		})
	}
	check := func(block []byte, p *LabelPage, external bool) {
		t.Helper()
		names := p.Names()
		if !slices.IsSorted(names) || len(names) != len(want) {
			t.Fatalf("names %v", names)
		}
		for _, name := range names {
			v, loc := p.Values(name)
			if v == nil {
				if !external || name != "pod" {
					t.Fatalf("%s has pages of its own", name)
				}
				var err error
				if v, err = p.ParseValues(at(block, loc)); err != nil {
					t.Fatal(err)
				}
			}
			if len(v.Values()) != len(want[name]) || !slices.IsSorted(v.Values()) {
				t.Fatalf("%s: %d values, want %d", name, len(v.Values()), len(want[name]))
			}
			for i, s := range v.Values() {
				if i < 1000 && !slices.Equal(v.Metrics(s), want[name][s]) {
					t.Fatalf("%s=%s: %v, want %v", name, s, v.Metrics(s), want[name][s])
				}
			}
			var of []string
			for _, s := range v.Values() {
				if slices.Contains(want[name][s], "metric_4") {
					of = append(of, s)
				}
			}
			if !slices.Equal(of, v.Of("metric_4")) {
				t.Fatalf("%s: values of metric_4 %v, want %v", name, v.Of("metric_4"), of)
			}
		}
	}
	block, sum := writeBlock(t, in, WriterOptions{})
	d, err := ParseDirectory(at(block, sum.Tenants[0].Directory))
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParseLabelPage(at(block, d.Labels))
	if err != nil {
		t.Fatal(err)
	}
	check(block, p, true)

	block, sum = writeBlock(t, in, WriterOptions{PageSeries: 1 << 16, PageBytes: 1 << 20})
	d, err = ParseDirectory(at(block, sum.Tenants[0].Directory))
	if err != nil {
		t.Fatal(err)
	}
	if d.Labels.Size == 0 {
		t.Fatal("no label page")
	}

	delete(want, "pod")
	delete(want[model.MetricNameLabel], "z")
	in = slices.DeleteFunc(in, func(ts tenantSeries) bool { return ts.s.Labels.Has("pod") })
	block, sum = writeBlock(t, in, WriterOptions{})
	if d, err = ParseDirectory(at(block, sum.Tenants[0].Directory)); err != nil {
		t.Fatal(err)
	}
	if d.Labels.Size != 0 {
		t.Fatal("a label page for one series page")
	}
	sp, err := ParseSeriesPage(at(block, d.Pages(nil, math.MinInt64, math.MaxInt64)[0].Location))
	if err != nil {
		t.Fatal(err)
	}
	check(block, sp.LabelPage(), false)
}

func TestWriterRefuses(t *testing.T) {
	series := func(name string) *Series {
		return &Series{Labels: labels.FromStrings(model.MetricNameLabel, name), Floats: Floats{T: []int64{1}, V: []float64{1}}}
	}
	for name, c := range map[string]struct {
		tenant string
		s      *Series
		want   error
	}{
		"tenant order":   {"a", series("z"), ErrOrder},
		"series order":   {"b", series("l"), ErrOrder},
		"same series":    {"b", series("m"), ErrOrder},
		"sample order":   {"b", &Series{Labels: labels.FromStrings("x", "y", model.MetricNameLabel, "n"), Floats: Floats{T: []int64{1, 1}, V: []float64{1, 2}}}, ErrOrder},
		"column lengths": {"b", &Series{Labels: labels.FromStrings(model.MetricNameLabel, "n"), Floats: Floats{T: []int64{1, 2}, V: []float64{1}}}, ErrInvalid},
	} {
		w := NewWriter(&bytes.Buffer{}, WriterOptions{})
		if err := w.Add("b", series("m")); err != nil {
			t.Fatal(err)
		}
		if err := w.Add(c.tenant, c.s); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := w.Close(); err == nil {
			t.Errorf("%s: closed all the same", name)
		}
	}
}

func TestWindows(t *testing.T) {
	s := &Series{Labels: labels.FromStrings(model.MetricNameLabel, "m")}
	for _, x := range []int64{-101, -100, -99, 0, 1, 100, 101, 500} {
		s.Floats.T, s.Floats.V = append(s.Floats.T, x), append(s.Floats.V, 1)
	}
	late := &Series{Labels: labels.FromStrings(model.MetricNameLabel, "n"), Floats: Floats{T: []int64{99, 300}, V: []float64{1, 2}}}
	_, sum := writeBlock(t, []tenantSeries{{"a", s}, {"a", late}}, WriterOptions{Window: 100})
	want := []Range{{-101, -100}, {-99, 0}, {1, 100}, {101, 101}, {300, 300}, {500, 500}}
	if !slices.Equal(sum.Tenants[0].Windows, want) {
		t.Fatalf("%v, want %v", sum.Tenants[0].Windows, want)
	}
}

// TestHugeLabels: text cuts pages long before they are too large to be read.
func TestHugeLabels(t *testing.T) {
	var in []tenantSeries
	for i := range 40 {
		in = append(in, tenantSeries{"a", &Series{
			Labels: labels.FromStrings(model.MetricNameLabel, "m", "l", fmt.Sprintf("%02d", i)+strings.Repeat("x", 3<<20)),
			Floats: Floats{T: []int64{1}, V: []float64{1}},
		}})
	}
	block, _ := writeBlock(t, in, WriterOptions{Uncompressed: true})
	out, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
	if err != nil || len(out) != len(in) {
		t.Fatal(err, len(out))
	}
}

func TestEmptyBlock(t *testing.T) {
	block, _ := writeBlock(t, nil, WriterOptions{})
	out, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
	if err != nil || len(out) != 0 {
		t.Fatal(err, out)
	}
}

func TestFamilies(t *testing.T) {
	m := metadata.Metadata{Type: "counter", Help: "Help."}
	var want []tenantSeries
	for i, family := range []string{"", "x", "x", "y", ""} {
		s := &Series{Labels: labels.FromStrings(model.MetricNameLabel, fmt.Sprint(i)), Floats: Floats{T: []int64{1}, V: []float64{1}}}
		if i < 4 {
			s.Metadata, s.Family = m, family
		}
		want = append(want, tenantSeries{"t", s})
	}
	block, _ := writeBlock(t, want, WriterOptions{})
	got, err := readBlock(block, nil, math.MinInt64, math.MaxInt64)
	if err != nil || len(got) != len(want) {
		t.Fatalf("%d series, %v", len(got), err)
	}
	for i, s := range got {
		if w := want[i].s; s.s.Family != w.Family || s.s.Metadata != w.Metadata {
			t.Errorf("series %d: %q %v, want %q %v", i, s.s.Family, s.s.Metadata, w.Family, w.Metadata)
		}
	}
}

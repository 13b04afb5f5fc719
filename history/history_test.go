package history

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stores are what a History is built on, with faults that a test may set.
type stores struct {
	objects *historytest.FaultyObjects
	rows    *historytest.FaultyRows

	mu    sync.Mutex
	fault func(op, key string) historytest.Fault // nil: none
}

func (s *stores) decide(op, key string) historytest.Fault {
	s.mu.Lock()
	f := s.fault
	s.mu.Unlock()
	if f == nil {
		return historytest.None
	}
	return f(op, key)
}

func (s *stores) setFault(f func(op, key string) historytest.Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

func localStores(t testing.TB) *stores {
	t.Helper()
	s := &stores{}
	s.objects = &historytest.FaultyObjects{Store: historytest.Files(t, prometheus.NewRegistry()), Decide: s.decide}
	s.rows = &historytest.FaultyRows{Store: historytest.Bolt(t, prometheus.NewRegistry()), Decide: s.decide}
	return s
}

func (s *stores) open(t testing.TB, change func(*Options)) *History {
	t.Helper()
	o := Options{Objects: s.objects, Index: index.New(s.rows), VisibilityDelay: 10 * time.Minute}
	if change != nil {
		change(&o)
	}
	h, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// tenantSeries are the series of a tenant, in any order.
type tenantSeries map[string][]*chunkfmt.Series

func encode(t testing.TB, data tenantSeries, o chunkfmt.WriterOptions) ([]byte, *chunkfmt.Summary) {
	t.Helper()
	o.Window = cmp.Or(o.Window, Window)
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, o)
	tenants := make([]string, 0, len(data))
	for tenant := range data {
		tenants = append(tenants, tenant)
	}
	slices.Sort(tenants)
	for _, tenant := range tenants {
		series := slices.Clone(data[tenant])
		slices.SortFunc(series, func(a, b *chunkfmt.Series) int {
			return cmp.Or(cmp.Compare(a.Labels.Get("__name__"), b.Labels.Get("__name__")), labels.Compare(a.Labels, b.Labels))
		})
		for _, s := range series {
			if err := w.Add(tenant, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	summary, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), summary
}

func publish(t testing.TB, h *History, data tenantSeries) ulid.ULID {
	t.Helper()
	return publishWith(t, h, data, chunkfmt.WriterOptions{PageBytes: 4 << 10, PageSeries: 16})
}

func publishWith(t testing.TB, h *History, data tenantSeries, o chunkfmt.WriterOptions) ulid.ULID {
	t.Helper()
	b, summary := encode(t, data, o)
	id := ulid.Make()
	if err := h.Publish(t.Context(), id, b, summary); err != nil {
		t.Fatal(err)
	}
	return id
}

func floats(from, step int64, n int, v func(i int) float64, ls ...string) *chunkfmt.Series {
	s := &chunkfmt.Series{Labels: labels.FromStrings(ls...)}
	for i := range n {
		s.Floats.T, s.Floats.V = append(s.Floats.T, from+int64(i)*step), append(s.Floats.V, v(i))
	}
	return s
}

func constant(v float64) func(int) float64 { return func(int) float64 { return v } }

// selectAll reads and merges all that a Select gives.
func selectAll(t testing.TB, s *Snapshot, mint, maxt int64, ms ...*labels.Matcher) []*chunkfmt.Series {
	t.Helper()
	got, err := trySelect(t.Context(), s, mint, maxt, ms...)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func trySelect(ctx context.Context, s *Snapshot, mint, maxt int64, ms ...*labels.Matcher) ([]*chunkfmt.Series, error) {
	set, err := s.Select(ctx, ms, mint, maxt)
	if err != nil {
		return nil, err
	}
	out := []*chunkfmt.Series{}
	for set.Next(ctx) {
		runs, err := set.At().Runs(&Buffer{})
		if err != nil {
			return nil, err
		}
		if len(runs) > 0 {
			out = append(out, chunkfmt.Merge(runs...))
		}
	}
	return out, set.Err()
}

func eq(name, value string) *labels.Matcher {
	return labels.MustNewMatcher(labels.MatchEqual, name, value)
}

func re(name, value string) *labels.Matcher {
	return labels.MustNewMatcher(labels.MatchRegexp, name, value)
}

func snapshot(t testing.TB, h *History, tenant string, mint, maxt int64, must ...ulid.ULID) *Snapshot {
	t.Helper()
	s, err := h.Snapshot(t.Context(), tenant, mint, maxt, must, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var cmpSeries = gocmp.Options{
	gocmp.Comparer(func(a, b labels.Labels) bool { return labels.Equal(a, b) }),
	gocmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) }),
	cmpopts.EquateEmpty(),
}

func wantSeries(t testing.TB, got, want []*chunkfmt.Series) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d series, want %d", len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		if d := gocmp.Diff(want[i], got[i], cmpSeries); d != "" {
			t.Fatalf("series %d (-want +got):\n%s", i, d)
		}
	}
}

// randomSeries has all kinds of samples in [from, from+span).
func randomSeries(r *rand.Rand, from, span int64, ls labels.Labels) *chunkfmt.Series {
	s := &chunkfmt.Series{Labels: ls, Metadata: metadata.Metadata{Type: model.MetricTypeGauge, Help: "h " + ls.Get("__name__")}}
	for at := from + r.Int64N(span/10); at < from+span; at += 1 + r.Int64N(span/20) {
		switch r.IntN(20) {
		case 0:
			s.Histograms.T = append(s.Histograms.T, at)
			s.Histograms.H = append(s.Histograms.H, tsdbutil.GenerateTestHistogram(r.Int64N(5)))
		case 1:
			s.FloatHistograms.T = append(s.FloatHistograms.T, at)
			s.FloatHistograms.H = append(s.FloatHistograms.H, tsdbutil.GenerateTestFloatHistogram(r.Int64N(5)))
		case 2:
			s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, math.Float64frombits(r.Uint64()))
		default:
			s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, float64(r.IntN(1000))/10)
		}
		if r.IntN(10) == 0 {
			s.Exemplars = append(s.Exemplars, exemplar.Exemplar{Labels: labels.FromStrings("trace", fmt.Sprint(at)), Value: 1, Ts: at, HasTs: true})
		}
	}
	return s
}

// trim is what a run has in mint to maxt.
func trim(s *chunkfmt.Series, mint, maxt int64) *chunkfmt.Series {
	c := &chunkfmt.Series{
		Labels:          s.Labels,
		Floats:          chunkfmt.Floats{T: slices.Clone(s.Floats.T), ST: slices.Clone(s.Floats.ST), V: slices.Clone(s.Floats.V)},
		Histograms:      chunkfmt.Histograms{T: slices.Clone(s.Histograms.T), ST: slices.Clone(s.Histograms.ST), H: slices.Clone(s.Histograms.H)},
		FloatHistograms: chunkfmt.FloatHistograms{T: slices.Clone(s.FloatHistograms.T), ST: slices.Clone(s.FloatHistograms.ST), H: slices.Clone(s.FloatHistograms.H)},
	}
	cut(c, []chunkfmt.Range{{MinT: mint, MaxT: maxt}}, 0, 0, 0)
	return c
}

// TestAgainstModel publishes random blocks, overlapping in time and series, and
// compares all reads with what went in. It runs on local and on remote stores.
func TestAgainstModel(t *testing.T) {
	t.Run("files and bolt", func(t *testing.T) { testAgainstModel(t, localStores(t), 6) })
	t.Run("s3 and dynamodb", func(t *testing.T) {
		s := &stores{}
		s.objects = &historytest.FaultyObjects{Store: historytest.S3(t, prometheus.NewRegistry()), Decide: s.decide}
		s.rows = &historytest.FaultyRows{Store: historytest.DynamoDB(t, prometheus.NewRegistry()), Decide: s.decide}
		testAgainstModel(t, s, 3)
	})
}

func testAgainstModel(t *testing.T, st *stores, rounds int) {
	const hour = int64(3_600_000)
	seed := uint64(time.Now().UnixNano()) //nolint:gosec // any will do
	if v := os.Getenv("EPIMETHEUS_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("EPIMETHEUS_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // no secret
	h := st.open(t, nil)
	tenants := []string{"a", "b", "b/1", "c"}
	all := map[string][]*chunkfmt.Series{}
	var ids []ulid.ULID
	start := int64(1_700_000_000_000)
	for round := range rounds {
		data := tenantSeries{}
		for _, tenant := range tenants[:1+r.IntN(len(tenants))] {
			for m := range 8 {
				for i := range 6 {
					if r.IntN(3) == 0 {
						continue
					}
					ls := labels.FromStrings("__name__", fmt.Sprintf("metric_%d", m), "Z", "upper sorts before", "i", fmt.Sprint(i), "job", fmt.Sprintf("j%d", i%3))
					if m == 7 {
						ls = labels.FromStrings("i", fmt.Sprint(i)) // without a name
					}
					span := 2 * hour
					if round == 1 {
						span = 500 * hour // several windows
					}
					data[tenant] = append(data[tenant], randomSeries(r, start+int64(round)*hour, span, ls))
				}
			}
		}
		for tenant, s := range data {
			all[tenant] = append(all[tenant], s...)
		}
		ids = append(ids, publish(t, h, data))
	}
	matchers := [][]*labels.Matcher{
		nil,
		{eq("__name__", "metric_3")},
		{eq("__name__", "absent")},
		{re("__name__", "metric_[12]"), eq("job", "j1")},
		{eq("job", "j2")},
		{labels.MustNewMatcher(labels.MatchNotEqual, "job", "j2")},
		{eq("__name__", "")},
		{labels.MustNewMatcher(labels.MatchNotRegexp, "i", "[0-3]"), re("__name__", ".+")},
	}
	for _, tenant := range append(tenants, "nobody") {
		for range 12 {
			ms := matchers[r.IntN(len(matchers))]
			mint := start + r.Int64N(8*hour) - hour
			maxt := mint + r.Int64N(5*hour)
			if r.IntN(4) == 0 {
				mint, maxt = math.MinInt64, math.MaxInt64
			}
			matches := func(ls labels.Labels) bool {
				return !slices.ContainsFunc(ms, func(m *labels.Matcher) bool { return !m.Matches(ls.Get(m.Name)) })
			}
			runs := map[string][]*chunkfmt.Series{}
			exemplars := map[string][]*chunkfmt.Series{}
			for _, s := range all[tenant] {
				if !matches(s.Labels) {
					continue
				}
				if c := trim(s, mint, maxt); len(c.Floats.T)+len(c.Histograms.T)+len(c.FloatHistograms.T) > 0 {
					runs[s.Labels.String()] = append(runs[s.Labels.String()], c)
				}
				es := slices.DeleteFunc(slices.Clone(s.Exemplars), func(e exemplar.Exemplar) bool { return e.Ts < mint || e.Ts > maxt })
				if len(es) > 0 {
					exemplars[s.Labels.String()] = append(exemplars[s.Labels.String()], &chunkfmt.Series{Labels: s.Labels, Exemplars: es})
				}
			}
			merged := func(runs map[string][]*chunkfmt.Series) []*chunkfmt.Series {
				out := []*chunkfmt.Series{}
				for _, r := range runs {
					out = append(out, chunkfmt.Merge(r...))
				}
				slices.SortFunc(out, func(a, b *chunkfmt.Series) int { return labels.Compare(a.Labels, b.Labels) })
				return out
			}
			want := merged(runs)
			snap := snapshot(t, h, tenant, mint, maxt, ids...)
			wantSeries(t, selectAll(t, snap, mint, maxt, ms...), want)

			es, err := snap.Exemplars(t.Context(), [][]*labels.Matcher{ms, ms}, mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			esp := []*chunkfmt.Series{}
			for i := range es {
				esp = append(esp, &es[i])
			}
			wantSeries(t, esp, merged(exemplars))

			// Labels may speak of a chunk's or a block's whole time.
			names, values, metas := map[string]bool{}, map[string]bool{}, map[string]bool{}
			for _, s := range want {
				s.Labels.Range(func(l labels.Label) { names[l.Name] = true })
				values[s.Labels.Get("job")] = true
				metas[s.Labels.Get("__name__")] = true
			}
			gotNames, err := snap.LabelNames(t.Context(), ms, mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			gotValues, err := snap.LabelValues(t.Context(), "job", ms, mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			gotSeries, err := snap.Series(t.Context(), ms, mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			gotMetas, err := snap.Metadata(t.Context(), "", mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			for n := range names {
				if !slices.Contains(gotNames, n) {
					t.Errorf("label name %s is missing", n)
				}
			}
			for v := range values {
				if v != "" && !slices.Contains(gotValues, v) {
					t.Errorf("label value %s is missing", v)
				}
			}
			for _, s := range want {
				if !slices.ContainsFunc(gotSeries, func(ls labels.Labels) bool { return labels.Equal(ls, s.Labels) }) {
					t.Errorf("series %s is missing", s.Labels)
				}
			}
			for m := range metas {
				if !slices.ContainsFunc(gotMetas, func(x MetricMetadata) bool { return x.Metric == m && x.Help == "h "+m }) {
					t.Errorf("metadata of %q is missing", m)
				}
			}
			if !slices.IsSorted(gotNames) || !slices.IsSorted(gotValues) || !slices.IsSortedFunc(gotSeries, labels.Compare) {
				t.Error("labels are not sorted")
			}
			if mint == math.MinInt64 { // then they are exact
				if len(gotValues) != len(values)-b2i(values[""]) || len(gotSeries) != len(want) {
					t.Errorf("%d values and %d series, want %d and %d", len(gotValues), len(gotSeries), len(values), len(want))
				}
			}
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestLabelsOfOneMetric(t *testing.T) {
	h := localStores(t).open(t, nil)
	publish(t, h, tenantSeries{"a": {
		floats(0, 1, 1, constant(1), "__name__", "up", "job", "x"), floats(0, 1, 1, constant(1), "__name__", "down", "job", "y"),
	}})
	s := snapshot(t, h, "a", 0, 10)
	for name, want := range map[string][]string{"job": {"x"}, "__name__": {"up"}, "absent": {}} {
		got, err := s.LabelValues(t.Context(), name, []*labels.Matcher{eq("__name__", "up")}, 0, 10)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("values of %s: %q, %v, want %q", name, got, err, want)
		}
	}
	if got, err := s.LabelValues(t.Context(), "__name__", []*labels.Matcher{eq("__name__", "gone")}, 0, 10); err != nil || len(got) != 0 {
		t.Errorf("values of an absent metric: %q, %v", got, err)
	}
	if got, err := s.LabelValues(t.Context(), "job", nil, 20, 30); err != nil || len(got) != 0 {
		t.Errorf("values outside of the snapshot: %q, %v", got, err)
	}
}

// The share of the series that match is that of all of them where there are few pages,
// and near it where only some are looked at.
func TestShare(t *testing.T) {
	for _, c := range []struct {
		series, off int
	}{{10, 0}, {4000, 20}} {
		h := localStores(t).open(t, nil)
		var all []*chunkfmt.Series
		for i := range c.series {
			all = append(all, floats(0, 1000, 2, constant(1), "__name__", "m", "i", fmt.Sprint(i), "job", fmt.Sprint(i%5)))
		}
		publishWith(t, h, tenantSeries{"a": all}, chunkfmt.WriterOptions{PageSeries: 100})
		s := snapshot(t, h, "a", 0, 10_000)
		for _, q := range []struct {
			matcher *labels.Matcher
			percent int
		}{{eq("job", "3"), 20}, {re("job", "[0-3]"), 80}, {eq("__name__", "m"), 100}, {eq("__name__", "n"), 0}} {
			got, err := s.Share(t.Context(), []*labels.Matcher{q.matcher}, 0, 10_000)
			if d := 100*got - float64(q.percent); err != nil || math.Abs(d) > float64(c.off)/100*float64(q.percent)+1e-9 {
				t.Errorf("%d series, %s: %v, %v; want about %d %%", c.series, q.matcher, got, err, q.percent)
			}
		}
	}
}

// TestHiddenWindow holds that a row stands for its window only: what another
// block has taken over is not read twice.
func TestHiddenWindow(t *testing.T) {
	st := localStores(t)
	h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
	const w = Window
	data := tenantSeries{"a": {
		floats(w/2, w, 5, func(i int) float64 { return float64(i) }, "__name__", "m"), // one sample in each window
		floats(2*w+w/2, w, 1, constant(9), "__name__", "only"),                        // only in the third
	}}
	publish(t, h, data)
	s := snapshot(t, h, "a", 0, 10*w)
	if n := len(s.Blocks[0].Ranges); len(s.Blocks) != 1 || n != 5 {
		t.Fatalf("%d blocks, %d ranges", len(s.Blocks), n)
	}
	// Compaction has taken over the third window, and removed its row.
	row := index.RowID{MaxT: 2*w + w/2, Block: s.Blocks[0].ID}
	if err := index.New(st.rows).DeleteBlocks(t.Context(), "a", []index.RowID{row}); err != nil {
		t.Fatal(err)
	}
	s = snapshot(t, h, "a", 0, 10*w)
	got := selectAll(t, s, 0, 10*w)
	want := floats(w/2, w, 2, func(i int) float64 { return float64(i) }, "__name__", "m")
	want.Floats.T, want.Floats.V = append(want.Floats.T, 3*w+w/2, 4*w+w/2), append(want.Floats.V, 3, 4)
	wantSeries(t, got, []*chunkfmt.Series{want})
	series, err := s.Series(t.Context(), nil, 0, 10*w)
	if err != nil || len(series) != 1 {
		t.Errorf("%v, %v: want only the series with samples in visible windows", series, err)
	}
	if got := selectAll(t, s, 2*w+1, 3*w); len(got) != 0 {
		t.Errorf("%d series in the hidden window", len(got))
	}
}

func TestVisible(t *testing.T) {
	id := func(n byte) (u ulid.ULID) { u[15] = n; return u }
	row := func(n byte, mint, maxt int64) index.BlockRow {
		return index.BlockRow{Block: id(n), MinT: mint, MaxT: maxt}
	}
	replacing := func(r index.BlockRow, siblings []index.BlockRow, replaced ...index.BlockRow) index.BlockRow {
		for i := range replaced {
			r.Replaces = append(r.Replaces, replaced[i].ID())
		}
		for i := range siblings {
			r.Siblings = append(r.Siblings, index.Sibling{RowID: siblings[i].ID(), MinT: siblings[i].MinT})
		}
		return r
	}
	a, b, c := row(1, 0, 10), row(2, 5, 20), row(3, 15, 30)
	out1, out2 := row(10, 0, 15), row(11, 16, 30)
	last := replacing(out2, []index.BlockRow{out1}, a, b, c)
	again := replacing(row(20, 0, 30), nil, out1, out2)
	for name, test := range map[string]struct {
		rows       []index.BlockRow
		mint, maxt int64
		want       []byte
	}{
		"nothing replaced":                {[]index.BlockRow{a, b, c}, 0, 30, []byte{1, 2, 3}},
		"only what overlaps":              {[]index.BlockRow{a, b, c}, 11, 14, []byte{2}},
		"first output only":               {[]index.BlockRow{a, b, c, out1}, 0, 30, []byte{1, 2, 3, 10}},
		"all outputs":                     {[]index.BlockRow{a, b, c, out1, last}, 0, 30, []byte{10, 11}},
		"a sibling not seen":              {[]index.BlockRow{a, b, c, last}, 0, 30, []byte{1, 2, 3, 11}},
		"a sibling not needed":            {[]index.BlockRow{b, c, last}, 16, 30, []byte{11}},
		"the last does not overlap":       {[]index.BlockRow{a, b, c, out1, last}, 0, 12, []byte{1, 2, 10}},
		"what is replaced still replaces": {[]index.BlockRow{a, b, c, out1, last, again}, 0, 30, []byte{20}},
		"replaced rows gone":              {[]index.BlockRow{out1, last}, 0, 30, []byte{10, 11}},
	} {
		var got []byte
		for _, r := range visible(test.rows, test.mint, test.maxt) {
			got = append(got, r.Block[15])
		}
		if !bytes.Equal(got, test.want) {
			t.Errorf("%s: blocks %d, want %d", name, got, test.want)
		}
	}
}

func TestRowsAreKeptForHalfTheVisibilityDelay(t *testing.T) {
	h := localStores(t).open(t, nil)
	now := time.Now()
	h.now = func() time.Time { return now }
	data := tenantSeries{"a": {floats(1000, 1000, 10, constant(1), "__name__", "m")}}
	first := publish(t, h, data)
	look := func(wantBlocks, wantQueries int, must ...ulid.ULID) {
		t.Helper()
		s := snapshot(t, h, "a", 0, 20_000, must...)
		if len(s.Blocks) != wantBlocks || s.Stats.IndexQueries.Load() != int64(wantQueries) {
			t.Errorf("%d blocks, %d reads of rows, want %d and %d", len(s.Blocks), s.Stats.IndexQueries.Load(), wantBlocks, wantQueries)
		}
	}
	look(1, 1)
	look(1, 0)
	look(1, 0, first)
	second := publish(t, h, data)
	look(1, 0) // may be old
	look(2, 1, first, second)
	look(2, 0, first, second)
	// A block without rows in this time is asked for once.
	elsewhere := publish(t, h, tenantSeries{"a": {floats(1e12, 1000, 10, constant(1), "__name__", "m")}})
	look(2, 1, elsewhere)
	look(2, 0, elsewhere)
	// The ring has changed: rows from before are not enough.
	now = now.Add(time.Second)
	for want := int64(1); want >= 0; want-- {
		s, err := h.Snapshot(t.Context(), "a", 0, 20_000, nil, now)
		if err != nil || s.Stats.IndexQueries.Load() != want {
			t.Errorf("%d reads of rows, want %d, %v", s.Stats.IndexQueries.Load(), want, err)
		}
	}
	third := publish(t, h, data)
	now = now.Add(5*time.Minute - 1)
	look(2, 0)
	now = now.Add(1)
	look(3, 1)
	look(3, 0, third)
}

func TestManyAskForRowsAtOnce(t *testing.T) {
	h := localStores(t).open(t, nil)
	publish(t, h, tenantSeries{"a": {floats(1000, 1000, 10, constant(1), "__name__", "m")}})
	var g errgroup.Group
	var total Stats
	for range 50 {
		g.Go(func() error {
			s, err := h.Snapshot(t.Context(), "a", 0, 20_000, nil, time.Time{})
			if err != nil {
				return err
			}
			if len(s.Blocks) != 1 {
				return fmt.Errorf("%d blocks", len(s.Blocks))
			}
			total.IndexQueries.Add(s.Stats.IndexQueries.Load())
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := total.IndexQueries.Load(); n != 1 {
		t.Errorf("%d reads of rows, want 1", n)
	}
}

// TestPublishSurvivesFaults lets every call of Publish fail, before and after its
// effect, and in the middle: repeating it makes the block durable, once.
func TestPublishSurvivesFaults(t *testing.T) {
	data := tenantSeries{}
	for i := range 5 {
		data[fmt.Sprintf("t%d", i)] = []*chunkfmt.Series{floats(1000, 1000, 10, constant(1), "__name__", "m")}
	}
	for _, fault := range []historytest.Fault{historytest.Before, historytest.After, historytest.Torn} {
		for nth := range 5 {
			st := localStores(t)
			h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
			var calls atomic.Int64
			st.setFault(func(string, string) historytest.Fault {
				if calls.Add(1)-1 == int64(nth) {
					return fault
				}
				return historytest.None
			})
			b, summary := encode(t, data, chunkfmt.WriterOptions{})
			id := ulid.Make()
			err := h.Publish(t.Context(), id, b, summary)
			// Rows that can't be written all at once are written tenant by tenant.
			if wantErr := nth < 4 && nth != 2; (err != nil) != wantErr || err != nil && !errors.Is(err, historytest.ErrInjected) {
				t.Fatalf("fault %d at call %d: %v", fault, nth, err)
			}
			st.setFault(nil)
			// Whatever is visible now is whole.
			for tenant := range data {
				s := snapshot(t, h, tenant, 0, 20_000)
				if got := selectAll(t, s, 0, 20_000); len(s.Blocks) > 0 && (len(got) != 1 || len(got[0].Floats.T) != 10) {
					t.Errorf("fault %d at call %d: half a block is visible", fault, nth)
				}
			}
			for range 2 {
				if err := h.Publish(t.Context(), id, b, summary); err != nil {
					t.Fatal(err)
				}
			}
			for tenant := range data {
				s := snapshot(t, h, tenant, 0, 20_000)
				wantSeries(t, selectAll(t, s, 0, 20_000), data[tenant])
			}
			x := index.New(st.rows)
			w := index.NewWorkRow(id)
			work, err := x.Work(t.Context(), w.Day, w.Shard)
			if err != nil || len(work) != 1 || work[0].Object != ObjectKey(id) {
				t.Errorf("work rows %+v, %v", work, err)
			}
			if s, err := x.GuardState(t.Context(), id); s != index.Published || err != nil {
				t.Errorf("guard row: %s, %v", s, err)
			}
		}
	}
}

func TestPublishOfACondemnedBlock(t *testing.T) {
	st := localStores(t)
	h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
	x := index.New(st.rows)
	id := ulid.Make()
	if _, err := x.Guard(t.Context(), id, index.Condemned); err != nil {
		t.Fatal(err)
	}
	data := tenantSeries{"a": {floats(0, Window, 3, constant(1), "__name__", "m")}, "b": {floats(0, 1, 3, constant(1), "__name__", "m")}}
	b, summary := encode(t, data, chunkfmt.WriterOptions{})
	for range 2 {
		if err := h.Publish(t.Context(), id, b, summary); !errors.Is(err, ErrCondemned) {
			t.Fatalf("%v, want ErrCondemned", err)
		}
	}
	for tenant := range data {
		if s := snapshot(t, h, tenant, math.MinInt64, math.MaxInt64); len(s.Blocks) != 0 {
			t.Errorf("%d blocks of %s are visible", len(s.Blocks), tenant)
		}
	}
	w := index.NewWorkRow(id)
	if work, err := x.Work(t.Context(), w.Day, w.Shard); err != nil || len(work) != 0 {
		t.Errorf("work rows %+v, %v", work, err)
	}
}

// held is what index rows can't be written of.
type held struct {
	mu      sync.Mutex
	tenants map[string]bool
}

func (h *held) set(tenants ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tenants = map[string]bool{}
	for _, t := range tenants {
		h.tenants["b/"+t] = true
	}
}

func (h *held) is(hash string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tenants[hash]
}

// The rows of tenants that can't be written hold nobody else back, come later, and
// if compaction was faster leave nothing behind.
func TestRowsOfSomeTenants(t *testing.T) {
	data := tenantSeries{}
	for i := range 60 {
		data[fmt.Sprintf("t%02d", i)] = []*chunkfmt.Series{floats(1000, 1000, 10, constant(1), "__name__", "m")}
	}
	b, summary := encode(t, data, chunkfmt.WriterOptions{})
	for _, whole := range []bool{false, true} {
		t.Run(fmt.Sprintf("whole requests fail: %v", whole), func(t *testing.T) {
			st := localStores(t)
			var held held
			rows := &historytest.HeldRows{Store: st.rows, Held: held.is, Whole: whole}
			x := index.New(rows)
			h := st.open(t, func(o *Options) { o.VisibilityDelay, o.Index = 0, x })
			visible := func() (out []string) {
				for tenant := range data {
					if s := snapshot(t, h, tenant, 0, 20_000); len(s.Blocks) > 0 {
						wantSeries(t, selectAll(t, s, 0, 20_000), data[tenant])
						out = append(out, tenant)
					}
				}
				slices.Sort(out)
				return out
			}
			left := func(err error, published bool) []string {
				t.Helper()
				var e *RowsError
				if !errors.As(err, &e) || e.Published != published || !errors.Is(err, historytest.ErrInjected) {
					t.Fatalf("%v, want rows that are left", err)
				}
				return slices.Sorted(maps.Keys(e.Tenants))
			}
			id := ulid.Make()

			// None: the block isn't published.
			held.set(slices.Collect(maps.Keys(data))...)
			if got := left(h.Publish(t.Context(), id, b, summary), false); len(got) != 60 || len(visible()) != 0 {
				t.Errorf("left %v, visible %v", got, visible())
			}
			if s, err := x.GuardState(t.Context(), id); s != 0 || err != nil {
				t.Errorf("guard row of a block without rows: %s, %v", s, err)
			}

			// All but some.
			held.set("t03", "t41")
			if got := left(h.Publish(t.Context(), id, b, summary), true); !slices.Equal(got, []string{"t03", "t41"}) {
				t.Errorf("left %v", got)
			}
			if s, err := x.GuardState(t.Context(), id); s != index.Published || err != nil {
				t.Errorf("guard row: %s, %v", s, err)
			}
			if got := visible(); len(got) != 58 || slices.Contains(got, "t03") {
				t.Errorf("visible: %v", got)
			}

			// One of them.
			held.set("t41")
			if got := left(h.PublishRows(t.Context(), id, summary, []string{"t03", "t41"}), true); !slices.Equal(got, []string{"t41"}) {
				t.Errorf("left %v", got)
			}
			if got := visible(); len(got) != 59 || !slices.Contains(got, "t03") {
				t.Errorf("visible: %v", got)
			}

			// A compaction is about to replace the block: it isn't known yet what of the
			// rows is left in the end.
			held.set()
			w := index.NewWorkRow(id)
			w.Object, w.ObjectSize = ObjectKey(id), summary.Size
			idle := index.Job{Level: 1}
			job := index.Job{Level: 1, State: index.JobCommitted, ID: ulid.Make(), Sources: []index.JobSource{{BlockRef: w.Ref()}}}
			if err := x.SwapJob(t.Context(), idle, job); err != nil {
				t.Fatal(err)
			}
			if err := h.PublishRows(t.Context(), id, summary, []string{"t41"}); err == nil || errors.As(err, new(*RowsError)) {
				t.Errorf("during a compaction: %v", err)
			}
			// It has.
			if err := x.Condemn(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if err := x.SwapJob(t.Context(), job, index.Job{Level: 1, ID: job.ID}); err != nil {
				t.Fatal(err)
			}
			if err := h.PublishRows(t.Context(), id, summary, []string{"t41"}); err != nil {
				t.Error(err)
			}
			if got := visible(); len(got) != 59 || slices.Contains(got, "t41") {
				t.Errorf("rows of a block that was replaced: %v", got)
			}
		})
	}
}

// Rows that were written while compaction replaced the block don't stay.
func TestRowsTooLate(t *testing.T) {
	st := localStores(t)
	b, summary := encode(t, tenantSeries{"a": {floats(0, 1, 3, constant(1), "__name__", "m")}, "b": {floats(0, 1, 3, constant(1), "__name__", "m")}}, chunkfmt.WriterOptions{})
	id := ulid.Make()
	h := st.open(t, func(o *Options) { o.VisibilityDelay = 0 })
	if err := h.Publish(t.Context(), id, b, summary); err != nil {
		t.Fatal(err)
	}
	x := index.New(st.rows)
	st.setFault(func(op, key string) historytest.Fault {
		if op == "Put" && key == "b/b" { // between its looks
			st.setFault(nil)
			if err := x.Condemn(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		return historytest.None
	})
	if err := h.PublishRows(t.Context(), id, summary, []string{"b"}); err != nil {
		t.Fatal(err)
	}
	if rows, err := x.AllBlocks(t.Context(), "b"); err != nil || len(rows) != 0 {
		t.Errorf("rows of a block that was replaced: %v, %v", rows, err)
	}
}

func TestPublishRefusesAWrongSummary(t *testing.T) {
	h := localStores(t).open(t, nil)
	b, summary := encode(t, tenantSeries{"a": {floats(0, 1, 3, constant(1), "__name__", "m")}}, chunkfmt.WriterOptions{})
	if err := h.Publish(t.Context(), ulid.Make(), b[:len(b)-1], summary); err == nil {
		t.Error("no error")
	}
}

// wideSeries need several series pages, a label page, and pages of label values.
func wideSeries(from int64) []*chunkfmt.Series {
	var out []*chunkfmt.Series
	for m := range 6 {
		for i := range 400 {
			out = append(out, floats(from, 15_000, 3, func(j int) float64 { return float64(i * j) },
				"__name__", fmt.Sprintf("metric_%d", m), "instance", fmt.Sprintf("host-%d-%s", i, strings.Repeat("x", 40)), "job", fmt.Sprint(m%3)))
		}
	}
	return out
}

// TestLabelReadsTakeThreeGets holds the bound on requests over many blocks.
func TestLabelReadsTakeThreeGets(t *testing.T) {
	const blocks, hour = 40, int64(3_600_000)
	st := localStores(t)
	w := st.open(t, nil)
	b, summary := encode(t, tenantSeries{"a": wideSeries(0), "b": wideSeries(0)}, chunkfmt.WriterOptions{PageSeries: 128, PageBytes: 16 << 10})
	dir := summary.Tenants[0].Directory
	d, err := chunkfmt.ParseDirectory(b[dir.Offset:dir.End()])
	if err != nil {
		t.Fatal(err)
	}
	if n := len(d.Pages(nil, math.MinInt64, math.MaxInt64)); n < 10 || d.Labels.Size == 0 {
		t.Fatalf("%d series pages, label page of %d bytes: too small a block for the test", n, d.Labels.Size)
	}
	for range blocks {
		if err := w.Publish(t.Context(), ulid.Make(), b, summary); err != nil {
			t.Fatal(err)
		}
	}
	const maxt = hour
	for name, read := range map[string]func(*Snapshot) (int, error){
		"label names": func(s *Snapshot) (int, error) {
			got, err := s.LabelNames(t.Context(), nil, 0, maxt)
			return len(got) - 3, err
		},
		"label names of a job": func(s *Snapshot) (int, error) {
			got, err := s.LabelNames(t.Context(), []*labels.Matcher{eq("job", "1")}, 0, maxt)
			return len(got) - 3, err
		},
		"values of a small label": func(s *Snapshot) (int, error) {
			got, err := s.LabelValues(t.Context(), "job", nil, 0, maxt)
			return len(got) - 3, err
		},
		"values of a large label": func(s *Snapshot) (int, error) {
			got, err := s.LabelValues(t.Context(), "instance", nil, 0, maxt)
			return len(got) - 400, err
		},
		"values for a metric": func(s *Snapshot) (int, error) {
			got, err := s.LabelValues(t.Context(), "instance", []*labels.Matcher{eq("__name__", "metric_2")}, 0, maxt)
			return len(got) - 400, err
		},
		"values with matchers": func(s *Snapshot) (int, error) {
			got, err := s.LabelValues(t.Context(), "instance", []*labels.Matcher{eq("job", "1"), re("__name__", "metric_.")}, 0, maxt)
			return len(got) - 400, err
		},
		"metric names": func(s *Snapshot) (int, error) {
			got, err := s.LabelValues(t.Context(), "__name__", nil, 0, maxt)
			return len(got) - 6, err
		},
		"series": func(s *Snapshot) (int, error) {
			got, err := s.Series(t.Context(), []*labels.Matcher{eq("__name__", "metric_4")}, 0, maxt)
			return len(got) - 400, err
		},
		"series without a name": func(s *Snapshot) (int, error) {
			got, err := s.Series(t.Context(), []*labels.Matcher{eq("job", "2")}, 0, maxt)
			return len(got) - 800, err
		},
		"series by a regular expression": func(s *Snapshot) (int, error) {
			got, err := s.Series(t.Context(), []*labels.Matcher{re("instance", "host-1-.*")}, 0, maxt)
			return len(got) - 6, err
		},
		"series of metrics that lie apart": func(s *Snapshot) (int, error) {
			got, err := s.Series(t.Context(), []*labels.Matcher{re("__name__", "metric_0|metric_5")}, 0, maxt)
			return len(got) - 800, err
		},
		"metadata": func(s *Snapshot) (int, error) {
			got, err := s.Metadata(t.Context(), "metric_1", 0, maxt)
			return len(got), err
		},
	} {
		h := st.open(t, nil) // with cold caches
		var mu sync.Mutex
		gets := map[string]int{}
		st.setFault(func(op, key string) historytest.Fault {
			mu.Lock()
			defer mu.Unlock()
			if op == "GetRange" {
				gets[key]++
			}
			return historytest.None
		})
		s := snapshot(t, h, "a", 0, maxt)
		if diff, err := read(s); diff != 0 || err != nil {
			t.Errorf("%s: %d more than expected, %v", name, diff, err)
		}
		most := 0
		for _, n := range gets {
			most = max(most, n)
		}
		total := s.Stats.ObjectGets.Load()
		if len(gets) != blocks || most > 3 || total > 3*blocks {
			t.Errorf("%s: %d GETs over %d blocks, at most %d of one", name, total, len(gets), most)
		}
		// Once more, it costs nothing.
		s = snapshot(t, h, "a", 0, maxt)
		if _, err := read(s); err != nil || s.Stats.ObjectGets.Load() != 0 {
			t.Errorf("%s: %d GETs with warm caches, %v", name, s.Stats.ObjectGets.Load(), err)
		}
	}
}

func TestSelectReadsOnlyWhatItNeeds(t *testing.T) {
	h := localStores(t).open(t, nil)
	publishWith(t, h, tenantSeries{"a": wideSeries(0), "b": wideSeries(0)}, chunkfmt.WriterOptions{})
	s := snapshot(t, h, "a", 0, 1e9)
	if got := selectAll(t, s, 0, 1e9, eq("__name__", "metric_3")); len(got) != 400 {
		t.Fatalf("%d series", len(got))
	}
	if n := s.Stats.ObjectGets.Load(); n > 3 {
		t.Errorf("%d GETs for one metric of one block, want directory, series page, data", n)
	}
	if n := s.Stats.Samples.Load(); n != 1200 {
		t.Errorf("%d samples decoded, want 1200", n)
	}
	if s.Stats.ObjectBytes.Load() > s.Blocks[0].ObjectSize/2 {
		t.Errorf("%d of %d bytes read", s.Stats.ObjectBytes.Load(), s.Blocks[0].ObjectSize)
	}
}

func TestManyBlocksAndSeries(t *testing.T) {
	h := localStores(t).open(t, func(o *Options) { o.PageCacheBytes = -1 })
	h.batchBytes = 20 << 10 // the set fetches its pages in many goes
	var want []*chunkfmt.Series
	runs := map[string][]*chunkfmt.Series{}
	for i := range 5 {
		series := wideSeries(int64(i) * 3_600_000)
		publishWith(t, h, tenantSeries{"a": series}, chunkfmt.WriterOptions{PageBytes: 2 << 10, PageSeries: 100})
		for _, s := range series {
			runs[s.Labels.String()] = append(runs[s.Labels.String()], s)
		}
	}
	for _, r := range runs {
		want = append(want, chunkfmt.Merge(r...))
	}
	slices.SortFunc(want, func(a, b *chunkfmt.Series) int { return labels.Compare(a.Labels, b.Labels) })
	s := snapshot(t, h, "a", 0, 1e9)
	wantSeries(t, selectAll(t, s, 0, 1e9), want)
}

// TestHeldPages: whoever keeps no series holds no more than the pages of a few goes,
// however many the set takes.
func TestHeldPages(t *testing.T) {
	h := localStores(t).open(t, func(o *Options) { o.PageCacheBytes = -1 })
	h.batchBytes = 20 << 10
	for i := range 5 {
		publishWith(t, h, tenantSeries{"a": wideSeries(int64(i) * 3_600_000)}, chunkfmt.WriterOptions{PageBytes: 2 << 10, PageSeries: 100})
	}
	set, err := snapshot(t, h, "a", 0, 1e9).Select(t.Context(), nil, 0, 1e9)
	if err != nil {
		t.Fatal(err)
	}
	most := int64(0)
	for set.Next(t.Context()) {
		most = max(most, set.Held())
	}
	if set.Err() != nil {
		t.Fatal(set.Err())
	}
	if most == 0 || most > 2*h.batchBytes || set.Bytes() < 2*most {
		t.Errorf("%d bytes held at most, of %d taken", most, set.Bytes())
	}
	if set.Held() != 0 {
		t.Errorf("%d bytes held at the end", set.Held())
	}
}

func TestConcurrentQueriesShareLoads(t *testing.T) {
	h := localStores(t).open(t, nil)
	publishWith(t, h, tenantSeries{"a": wideSeries(0)}, chunkfmt.WriterOptions{})
	var total Stats
	var g errgroup.Group
	for range 20 {
		g.Go(func() error {
			s, err := h.Snapshot(t.Context(), "a", 0, 1e9, nil, time.Time{})
			if err != nil {
				return err
			}
			got, err := trySelect(t.Context(), s, 0, 1e9, eq("__name__", "metric_3"))
			if err == nil && len(got) != 400 {
				err = fmt.Errorf("%d series", len(got))
			}
			total.ObjectGets.Add(s.Stats.ObjectGets.Load())
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := total.ObjectGets.Load(); n > 3 {
		t.Errorf("%d GETs of 20 queries, want those of one", n)
	}
}

// TestACancelledQueryHarmsNoOther: one that waits for pages that a cancelled
// query was to load loads them itself.
func TestACancelledQueryHarmsNoOther(t *testing.T) {
	st := localStores(t)
	h := st.open(t, nil)
	publish(t, h, tenantSeries{"a": {floats(1000, 1000, 10, constant(1), "__name__", "m")}})
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	var once sync.Once
	st.setFault(func(op, _ string) historytest.Fault {
		first := false
		if op == "GetRange" {
			once.Do(func() { first = true })
		}
		if first {
			close(started)
			<-ctx.Done()
		}
		return historytest.None
	})
	var g errgroup.Group
	g.Go(func() error {
		s, err := h.Snapshot(ctx, "a", 0, 20_000, nil, time.Time{})
		if err == nil {
			_, err = trySelect(ctx, s, 0, 20_000)
		}
		if !errors.Is(err, context.Canceled) {
			return fmt.Errorf("cancelled query: %w", err)
		}
		return nil
	})
	<-started
	g.Go(func() error {
		s, err := h.Snapshot(t.Context(), "a", 0, 20_000, nil, time.Time{})
		if err != nil {
			return err
		}
		got, err := trySelect(t.Context(), s, 0, 20_000)
		if err == nil && len(got) != 1 {
			err = fmt.Errorf("%d series", len(got))
		}
		return err
	})
	cancel()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// TestDamageIsNamed damages each read in turn: the query fails and says where, or
// gives the right answer; never a wrong one.
func TestDamageIsNamed(t *testing.T) {
	st := localStores(t)
	data := tenantSeries{"a": wideSeries(0)}
	publishWith(t, st.open(t, nil), data, chunkfmt.WriterOptions{PageSeries: 128, PageBytes: 16 << 10})
	want := selectAll(t, snapshot(t, st.open(t, nil), "a", 0, 1e9), 0, 1e9, re("__name__", "metric_[34]"))
	for _, fault := range []historytest.Fault{historytest.Torn, historytest.Corrupt, historytest.Before, historytest.Missing} {
		kinds := map[string]int{}
		for nth := range 6 {
			var mu sync.Mutex
			reads := 0
			st.setFault(func(op, _ string) historytest.Fault {
				if op != "GetRange" {
					return historytest.None
				}
				mu.Lock()
				defer mu.Unlock()
				reads++
				if reads-1 == nth {
					return fault
				}
				return historytest.None
			})
			h := st.open(t, nil)
			s := snapshot(t, h, "a", 0, 1e9)
			got, err := trySelect(t.Context(), s, 0, 1e9, re("__name__", "metric_[34]"))
			if err == nil {
				wantSeries(t, got, want)
				if reads > nth && fault != historytest.Corrupt { // a gap between pages may be hit
					t.Errorf("fault %d at read %d went unnoticed", fault, nth)
				}
				continue
			}
			var pageErr *PageError
			if !errors.As(err, &pageErr) || pageErr.Object != s.Blocks[0].Object || pageErr.Size <= 0 {
				t.Fatalf("fault %d: %v, want a PageError", fault, err)
			}
			kinds[pageErr.Page]++
			// The next query reads again.
			st.setFault(nil)
			wantSeries(t, selectAll(t, snapshot(t, h, "a", 0, 1e9), 0, 1e9, re("__name__", "metric_[34]")), want)
		}
		for _, kind := range []string{"directory", "series page", "data page"} {
			if kinds[kind] == 0 {
				t.Errorf("fault %d: no error named a %s: %v", fault, kind, kinds)
			}
		}
	}
}

// TestDamageIsNotKept damages the read of a small block's directory where it holds
// the series pages that come with it.
func TestDamageIsNotKept(t *testing.T) {
	st := localStores(t)
	var data []*chunkfmt.Series
	for i := range 8 {
		data = append(data, floats(1000, 1000, 2, constant(1), "__name__", "m", "n", fmt.Sprintf("%02d%x", i, historytest.Bytes(30, uint64(i)))))
	}
	publish(t, st.open(t, nil), tenantSeries{"a": data})
	want := selectAll(t, snapshot(t, st.open(t, nil), "a", 0, 1e9), 0, 1e9)
	damage := true
	st.setFault(func(op, _ string) historytest.Fault {
		if op == "GetRange" && damage {
			damage = false
			return historytest.Corrupt
		}
		return historytest.None
	})
	h := st.open(t, nil)
	for range 2 {
		got, err := trySelect(t.Context(), snapshot(t, h, "a", 0, 1e9), 0, 1e9)
		if err != nil {
			t.Fatal(err) // the page that is damaged can be read by itself
		}
		wantSeries(t, got, want)
	}
}

func TestAbsentObject(t *testing.T) {
	st := localStores(t)
	h := st.open(t, nil)
	data := tenantSeries{"a": {floats(1000, 1000, 10, constant(1), "__name__", "m")}}
	old := publish(t, h, data)
	read := func(s *Snapshot) error {
		got, err := trySelect(t.Context(), s, 0, 20_000)
		if err != nil {
			return err
		}
		wantSeries(t, got, data["a"])
		if _, err := s.LabelNames(t.Context(), nil, 0, 20_000); err != nil {
			return err
		}
		_, err = s.Series(t.Context(), nil, 0, 20_000)
		return err
	}
	s := snapshot(t, h, "a", 0, 20_000) // before compaction
	// Compaction replaces the block, then removes row and object.
	publish(t, h, data)
	if err := index.New(st.rows).DeleteBlocks(t.Context(), "a", []index.RowID{{MaxT: 10_000, Block: old}}); err != nil {
		t.Fatal(err)
	}
	if err := st.objects.Delete(t.Context(), ObjectKey(old)); err != nil {
		t.Fatal(err)
	}
	if err := read(s); err != nil {
		t.Errorf("after compaction: %v", err)
	}
	// An object that is absent while its row is there is an error.
	lost := publish(t, h, data)
	if err := st.objects.Delete(t.Context(), ObjectKey(lost)); err != nil {
		t.Fatal(err)
	}
	err := read(snapshot(t, h, "a", 0, 20_000, lost))
	var pageErr *PageError
	if !errors.Is(err, object.ErrNotExist) || !errors.As(err, &pageErr) || pageErr.Object != ObjectKey(lost) {
		t.Errorf("%v, want one that names the absent object", err)
	}
	// Unless the block is condemned: its row was left by somebody who was late.
	if err := index.New(st.rows).Condemn(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	if err := read(snapshot(t, h, "a", 0, 20_000, lost)); err != nil {
		t.Errorf("with a row of a condemned block: %v", err)
	}
}

func TestSplit(t *testing.T) {
	const w = Window
	for _, test := range []struct {
		in   chunkfmt.Range
		want []chunkfmt.Range
	}{
		{chunkfmt.Range{MinT: 5, MaxT: 5}, []chunkfmt.Range{{MinT: 5, MaxT: 5}}},
		{chunkfmt.Range{MinT: 5, MaxT: 5 + w}, []chunkfmt.Range{{MinT: 5, MaxT: 5 + w}}},
		{chunkfmt.Range{MinT: 5, MaxT: 6 + w}, []chunkfmt.Range{{MinT: 5, MaxT: w}, {MinT: w + 1, MaxT: 6 + w}}},
		{chunkfmt.Range{MinT: w, MaxT: 2*w + 1}, []chunkfmt.Range{{MinT: w, MaxT: w}, {MinT: w + 1, MaxT: 2*w + 1}}},
		{chunkfmt.Range{MinT: -w - 5, MaxT: 1}, []chunkfmt.Range{{MinT: -w - 5, MaxT: -w}, {MinT: -w + 1, MaxT: 1}}},
	} {
		if d := gocmp.Diff(test.want, split(test.in)); d != "" {
			t.Errorf("split %v (-want +got):\n%s", test.in, d)
		}
	}
}

func TestAlign(t *testing.T) {
	for _, at := range []int64{math.MinInt64, math.MinInt64 + 5, -rowSetAlign - 1, -rowSetAlign, -1, 0, 1, rowSetAlign - 1, rowSetAlign, math.MaxInt64 - 5, math.MaxInt64} {
		lo, hi := alignDown(at), alignUp(at)
		if lo > at || hi < at || at-lo >= rowSetAlign && lo != math.MinInt64 || hi-at >= rowSetAlign && hi != math.MaxInt64 {
			t.Errorf("%d: %d to %d", at, lo, hi)
		}
	}
}

func TestValidate(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("no error without stores")
	}
}

// TestRuns holds how samples of several blocks become runs.
func TestRuns(t *testing.T) {
	h := localStores(t).open(t, nil)
	series := func(from int64, n int) *chunkfmt.Series {
		s := floats(from, 10, n, constant(1), "__name__", "m")
		for i := range 3 {
			s.Histograms.T = append(s.Histograms.T, from+5+int64(i)*10)
			x := tsdbutil.GenerateTestHistogram(int64(i))
			x.CounterResetHint = histogram.NotCounterReset
			s.Histograms.H = append(s.Histograms.H, x)
		}
		return s
	}
	// Three one after the other; one of them with start timestamps; a replica of the second.
	second := series(1000, 20)
	second.Floats.ST = make([]int64, 20)
	second.Floats.ST[3] = 7
	for _, s := range []*chunkfmt.Series{series(0, 20), second, series(2000, 20), second} {
		publish(t, h, tenantSeries{"a": {s}})
	}
	runs := func(mint, maxt int64) []*chunkfmt.Series {
		t.Helper()
		set, err := snapshot(t, h, "a", 0, 10_000).Select(t.Context(), nil, mint, maxt)
		if err != nil {
			t.Fatal(err)
		}
		if set.Len() != 1 || !set.Next(t.Context()) {
			t.Fatalf("%d series, %v", set.Len(), set.Err())
		}
		s := set.At()
		if set.Next(t.Context()) || set.Err() != nil {
			t.Fatalf("another series, or %v", set.Err())
		}
		out, err := s.Runs(&Buffer{}) // after the set has ended
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	got := runs(0, 10_000)
	if len(got) != 2 || len(got[0].Floats.T) != 60 || len(got[1].Floats.T) != 20 {
		t.Fatalf("%d runs", len(got))
	}
	if st := got[0].Floats.ST; len(st) != 60 || st[23] != 7 || st[3] != 0 || st[43] != 0 {
		t.Errorf("start timestamps %v", st)
	}
	for i, x := range got[0].Histograms.H {
		want := histogram.NotCounterReset
		if i == 3 || i == 6 { // the first of a further block
			want = histogram.UnknownCounterReset
		}
		if x.CounterResetHint != want {
			t.Errorf("histogram %d has hint %d, want %d", i, x.CounterResetHint, want)
		}
	}
	got = runs(100, 2050)
	if f := got[0].Floats; len(got) != 2 || len(f.T) != 10+20+6 || f.T[0] != 100 || f.T[35] != 2050 || len(f.ST) != 36 || f.ST[13] != 7 {
		t.Errorf("trimmed: %d runs, %+v", len(got), f)
	}
}

// Series that share their times, in one buffer and so decoded without them, give what each gives alone; and what is said
// to rise does.
func TestRunsOfSharedTimes(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	shared, again, same, rising, falling := Buffer{}, 0, 0, 0, 0
	values := uint64(0) // the name of those that shared has given last
	for range 6 {
		h := localStores(t).open(t, nil)
		for block := range int64(3) {
			var data []*chunkfmt.Series
			from := block * 100_000
			if r.IntN(3) == 0 {
				from -= 20_000 // overlaps the one before
			}
			for target := range int64(3) {
				n := 20 + r.IntN(60)
				for i := range 8 {
					x := 0.0
					s := floats(from+target, 1000, n, func(k int) float64 {
						x += float64(r.IntN(4) * i)
						if i == 5 && k == n/2 {
							x = 0
						}
						if i == 7 {
							return r.NormFloat64()
						}
						return x
					}, "__name__", "m_bucket", "instance", fmt.Sprint(target), "le", fmt.Sprint(i))
					if i == 3 || i == 4 || i == 6 { // the upper buckets are the same, but for a NaN
						if len(data) > 0 && len(data[len(data)-1].Floats.V) == n {
							copy(s.Floats.V, data[len(data)-1].Floats.V)
						}
						if i == 6 {
							s.Floats.V[3] = math.NaN()
						}
					}
					if r.IntN(30) == 0 {
						s.Floats.ST = make([]int64, n)
						s.Floats.ST[n-1] = 1
					}
					if r.IntN(30) > 0 {
						data = append(data, s)
					}
				}
			}
			publishWith(t, h, tenantSeries{"a": data}, chunkfmt.WriterOptions{ChunkSamples: 10 + r.IntN(100)})
		}
		mint, maxt := int64(0), int64(0)
		var ms []*labels.Matcher
		for k := range 20 {
			if k%4 == 0 {
				mint = r.Int64N(200_000) - 30_000
				maxt = mint + r.Int64N(300_000)
				if ms = nil; k%8 == 0 { // one target, whose times queries have one after the other
					ms = append(ms, eq("instance", "1"))
				}
			}
			snap := snapshot(t, h, "a", -100_000, 400_000)
			if r.IntN(3) == 0 { // the same pages, but not all of them are read
				b := &snap.Blocks[r.IntN(len(snap.Blocks))]
				from, to := b.Ranges[0].MinT, b.Ranges[0].MaxT
				mid := from + (to-from)/2
				b.Ranges = []chunkfmt.Range{{MinT: from, MaxT: mid - r.Int64N(5000)}, {MinT: mid + 1 + r.Int64N(5000), MaxT: to}}
			}
			set, err := snap.Select(t.Context(), ms, mint, maxt)
			if err != nil {
				t.Fatal(err)
			}
			for set.Next(t.Context()) {
				alone := Buffer{}
				want, err := set.At().Runs(&alone)
				if err != nil {
					t.Fatal(err)
				}
				number := uint64(0)
				if len(shared.runs) > 0 {
					number = shared.runs[0].last.times
				}
				got, err := set.At().Runs(&shared)
				if err != nil {
					t.Fatal(err)
				}
				if d := gocmp.Diff(want, got, cmpSeries); d != "" {
					t.Fatalf("%s in %d to %d (-want +got):\n%s", set.At().Labels, mint, maxt, d)
				}
				if shared.Times() != 0 && shared.Times() == number {
					again++
				}
				if len(got) != 1 {
					continue
				}
				for _, falls := range [][]Span{alone.Falls(), shared.Falls()} {
					v := got[0].Floats.V
					for i, x := range v {
						for len(falls) > 0 && falls[0].To <= i {
							falls = falls[1:]
						}
						said := len(falls) > 0 && falls[0].From <= i
						does := x != x || i > 0 && x < v[i-1]
						switch {
						case does && !said:
							t.Fatalf("%s in %d to %d: %d said to rise: %v", set.At().Labels, mint, maxt, i, v)
						case does:
							falling++
						case !said:
							rising++
						}
					}
				}
				if n := shared.Values(); n != 0 && n == values {
					same++
				}
				values = shared.Values()
			}
			if set.Err() != nil {
				t.Fatal(set.Err())
			}
		}
	}
	t.Logf("times of %d as before, values of %d; %d said to rise, %d don't", again, same, rising, falling)
	if again < 500 || same < 100 || rising < 3000 || falling < 300 {
		t.Error("not much of a test")
	}
}

// Metadata is answered by the name of the family, as Prometheus does.
func TestMetadataOfFamilies(t *testing.T) {
	h := localStores(t).open(t, nil)
	var series []*chunkfmt.Series
	add := func(metric, family string, m metadata.Metadata) {
		s := floats(0, 1000, 3, func(i int) float64 { return float64(i) }, "__name__", metric)
		s.Metadata, s.Family = m, family
		series = append(series, s)
	}
	add("other", "", metadata.Metadata{})
	add("x_bucket", "x", metadata.Metadata{Type: model.MetricTypeHistogram, Help: "X."})
	add("x_count", "x", metadata.Metadata{Type: model.MetricTypeHistogram, Help: "X."})
	add("x_sum", "", metadata.Metadata{Type: model.MetricTypeGauge, Help: "Not of x."})
	add("y_total", "y", metadata.Metadata{Type: model.MetricTypeCounter, Help: "Y."})
	add("z_total", "", metadata.Metadata{Type: model.MetricTypeCounter, Help: "Z."})
	publishWith(t, h, tenantSeries{"a": series}, chunkfmt.WriterOptions{})
	s := snapshot(t, h, "a", 0, 1e9)
	all := []MetricMetadata{
		{"x", metadata.Metadata{Type: model.MetricTypeHistogram, Help: "X."}},
		{"x_sum", metadata.Metadata{Type: model.MetricTypeGauge, Help: "Not of x."}},
		{"y", metadata.Metadata{Type: model.MetricTypeCounter, Help: "Y."}},
		{"z_total", metadata.Metadata{Type: model.MetricTypeCounter, Help: "Z."}},
	}
	want := map[string][]MetricMetadata{"": all, "x_bucket": {}, "y_total": {}, "other": {}}
	for _, m := range all {
		want[m.Metric] = []MetricMetadata{m}
	}
	for metric, w := range want {
		got, err := s.Metadata(t.Context(), metric, 0, 1e9)
		if err != nil || !slices.Equal(got, w) {
			t.Errorf("metadata of %q: %v, %v, want %v", metric, got, err, w)
		}
	}
}

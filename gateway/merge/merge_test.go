package merge_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// point is a sample as text but for its time.
type point struct {
	T int64
	V string
}

// points reads all of an iterator.
func points(it chunkenc.Iterator) ([]point, error) {
	var out []point
	for {
		switch it.Next() {
		case chunkenc.ValNone:
			return out, it.Err()
		case chunkenc.ValFloat:
			t, v := it.At()
			out = append(out, point{t, fmt.Sprint(v)})
		case chunkenc.ValHistogram:
			t, h := it.AtHistogram(nil)
			out = append(out, point{t, fmt.Sprint(h.CounterResetHint, h)})
		case chunkenc.ValFloatHistogram:
			t, h := it.AtFloatHistogram(nil)
			out = append(out, point{t, fmt.Sprint(h.CounterResetHint, h)})
		}
	}
}

// result is what a selector gave.
type result struct {
	Series   []string // in order
	Points   map[string][]point
	Warnings []string
}

func collect(set storage.SeriesSet) (result, error) {
	r := result{Points: map[string][]point{}}
	var it chunkenc.Iterator
	for set.Next() {
		s := set.At()
		it = s.Iterator(it)
		ps, err := points(it)
		if err != nil {
			return r, err
		}
		name := s.Labels().String()
		r.Series = append(r.Series, name)
		r.Points[name] = ps
	}
	r.Warnings, _ = set.Warnings().AsStrings("", 0, 0)
	slices.Sort(r.Warnings)
	return r, set.Err()
}

// query selects in a querier of its own, from time 0 on.
func query(ctx context.Context, s storage.Queryable, maxt int64, hints *storage.SelectHints, ms ...*labels.Matcher) (result, error) {
	q, err := s.Querier(0, maxt)
	if err != nil {
		return result{}, err
	}
	defer q.Close()
	return collect(q.Select(ctx, true, hints, ms...))
}

func equal(name, v string) *labels.Matcher { return labels.MustNewMatcher(labels.MatchEqual, name, v) }

func ls(pairs ...string) labels.Labels { return labels.FromStrings(pairs...) }

// floats are samples of one series at the times given, with the time as value.
func floats(l labels.Labels, times ...int64) []gatewaytest.Sample {
	var out []gatewaytest.Sample
	for _, t := range times {
		out = append(out, gatewaytest.Sample{Labels: l, T: t, V: float64(t)})
	}
	return out
}

// setup sends the samples, those of the first list into blocks.
func setup(t *testing.T, c *gatewaytest.Cluster, blocks, heads []gatewaytest.Sample) {
	t.Helper()
	send := c.Shipper(gateway.DefaultTenant)
	if err := send.Send(t.Context(), blocks...); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := send.Send(t.Context(), heads...); err != nil {
		t.Fatal(err)
	}
}

// TestFlushBoundary reads while samples are written, flushed and dropped from
// the heads: every sample that was there before a query began is in its result,
// and each is there once.
func TestFlushBoundary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const visibility, publishing, rounds = 10 * time.Second, 2 * time.Second, 60
		c := gatewaytest.New(t, gatewaytest.Options{
			Ingesters: 2, VisibilityDelay: visibility, Run: true,
			BeforePublish: func() { time.Sleep(publishing) },
		})
		var all []labels.Labels
		for i := range 10 {
			all = append(all, ls("__name__", "m", "i", fmt.Sprint(i)))
		}
		var written atomic.Int64 // samples at 1 … written are received
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			defer cancel()
			send := c.Shipper(gateway.DefaultTenant)
			for k := int64(1); k <= rounds; k++ {
				var batch []gatewaytest.Sample
				for _, l := range all {
					batch = append(batch, floats(l, k)...)
				}
				if err := send.Send(t.Context(), batch...); err != nil {
					t.Error(err)
					return
				}
				written.Store(k)
				time.Sleep(time.Second)
			}
		})
		wg.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(4500 * time.Millisecond)
				if err := c.Flush(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
		check := func(r result, err error, before int64) {
			if err != nil {
				t.Error(err)
			}
			if len(r.Warnings) > 0 {
				t.Errorf("warnings: %q", r.Warnings)
			}
			if before > 0 && len(r.Series) != len(all) {
				t.Errorf("%d series of %d", len(r.Series), len(all))
			}
			for name, ps := range r.Points {
				for i, p := range ps {
					if p.T != int64(i+1) || p.V != fmt.Sprint(i+1) {
						t.Errorf("%s: sample %d of %d is %v", name, i+1, len(ps), p)
						break
					}
				}
				if int64(len(ps)) < before {
					t.Errorf("%s: %d samples, %d were there before", name, len(ps), before)
				}
			}
		}
		for n := range 4 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(n)))
				for ctx.Err() == nil {
					q, err := c.Storage.Querier(0, math.MaxInt64)
					if err != nil {
						t.Error(err)
						return
					}
					for range 2 { // a query may have several selectors, and take a while
						before := written.Load()
						res, err := collect(q.Select(t.Context(), true, nil, equal("__name__", "m")))
						check(res, err, before)
						time.Sleep(time.Duration(r.Int64N(int64(visibility / 4))))
					}
					if err := q.Close(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		time.Sleep(2 * visibility)
		for _, i := range c.Ingesters {
			if s := i.Size(); s.Generations != 1 || s.Samples > 0 {
				t.Errorf("not dropped: %+v", s)
			}
		}
		res, err := query(t.Context(), c.Storage, math.MaxInt64, nil, equal("__name__", "m"))
		check(res, err, rounds)
	})
}

func TestEqualTimestamps(t *testing.T) {
	stale := math.Float64frombits(value.StaleNaN)
	f := func(v float64) gatewaytest.Sample { return gatewaytest.Sample{V: v} }
	h := func(i int64) gatewaytest.Sample { return gatewaytest.Sample{H: tsdbutil.GenerateTestHistogram(i)} }
	fh := func(i int64) gatewaytest.Sample {
		return gatewaytest.Sample{FH: tsdbutil.GenerateTestFloatHistogram(i)}
	}
	text := func(s gatewaytest.Sample) string {
		switch {
		case s.H != nil:
			return fmt.Sprint(0, s.H)
		case s.FH != nil:
			return fmt.Sprint(0, s.FH)
		}
		return fmt.Sprint(s.V)
	}
	for i, p := range []struct{ loser, winner gatewaytest.Sample }{
		{f(1), f(1)},
		{f(1), f(2)},
		{f(1), f(-1)}, // the greater bits
		{f(0), f(math.Copysign(0, -1))},
		{f(stale), f(1)},
		{f(stale), h(1)},
		{f(1e300), h(1)},
		{h(1), fh(1)},
		{f(1), gatewaytest.Sample{H: &histogram.Histogram{}}},
		{gatewaytest.Sample{H: &histogram.Histogram{Sum: stale}}, f(1)},
	} {
		name := fmt.Sprint(i)
		t.Run(name, func(t *testing.T) {
			a, b := p.loser, p.winner
			a.T, b.T = 1, 1
			a.Labels, b.Labels = ls("__name__", "m"), ls("__name__", "m")
			for _, order := range [][2][]gatewaytest.Sample{
				{{a}, {b}}, {{b}, {a}}, {{a, b}, nil}, {{b, a}, nil}, {nil, {a, b}}, {nil, {b, a}}, {{b}, {a, b, a}},
			} {
				c := gatewaytest.New(t, gatewaytest.Options{})
				setup(t, c, order[0], order[1])
				r, err := query(t.Context(), c.Storage, 10, nil, equal("__name__", "m"))
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff([]point{{1, text(b)}}, r.Points[b.Labels.String()]); diff != "" {
					t.Errorf("want -, got +\n%s", diff)
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestHints: where a sample comes from a block and the next from a head, nobody
// knows whether there was a counter reset between.
func TestHints(t *testing.T) {
	for name, gauge := range map[string]bool{"counter": false, "gauge": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const visibility = time.Minute
				c := gatewaytest.New(t, gatewaytest.Options{Run: true, VisibilityDelay: visibility})
				var ss []gatewaytest.Sample
				for i := range int64(4) {
					h := tsdbutil.GenerateTestHistogram(i)
					if gauge {
						h.CounterResetHint = histogram.GaugeType
					}
					ss = append(ss, gatewaytest.Sample{Labels: ls("__name__", "i"), T: i, H: h})
					ss = append(ss, gatewaytest.Sample{Labels: ls("__name__", "f"), T: i, FH: h.ToFloat(nil)})
				}
				setup(t, c, ss[:4], ss[4:])
				want := []histogram.CounterResetHint{
					histogram.UnknownCounterReset, histogram.NotCounterReset, histogram.UnknownCounterReset, histogram.NotCounterReset,
				}
				if gauge {
					want = slices.Repeat([]histogram.CounterResetHint{histogram.GaugeType}, 4)
				}
				for _, step := range []string{"in block and head", "in the block only"} {
					q, err := c.Storage.Querier(0, 10)
					if err != nil {
						t.Fatal(err)
					}
					for _, m := range []string{"i", "f"} {
						set := q.Select(t.Context(), true, nil, equal("__name__", m))
						if !set.Next() {
							t.Fatal(set.Err())
						}
						it := set.At().Iterator(nil)
						var got []histogram.CounterResetHint
						for it.Next() != chunkenc.ValNone {
							_, h := it.AtFloatHistogram(nil)
							got = append(got, h.CounterResetHint)
						}
						if !slices.Equal(got, want) {
							t.Errorf("%s, %s: hints %v, want %v", m, step, got, want)
						}
					}
					if err := q.Close(); err != nil {
						t.Fatal(err)
					}
					time.Sleep(2 * visibility)
				}
			})
		})
	}
}

// browsing is a cluster with series in a block, in heads, and in both.
func browsing(t *testing.T) *gatewaytest.Cluster {
	t.Helper()
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 3})
	var blocks, heads []gatewaytest.Sample
	for i := range 9 {
		l := ls("__name__", fmt.Sprint("m", i%3), "i", fmt.Sprint(i), "job", fmt.Sprint("j", i%2))
		if i < 6 {
			blocks = append(blocks, floats(l, 1000, 2000)...)
		}
		if i >= 3 {
			heads = append(heads, floats(l, 3000, 4000)...)
		}
	}
	setup(t, c, blocks, heads)
	other := c.Shipper("other")
	if err := other.Send(t.Context(), floats(ls("__name__", "m0", "i", "x", "secret", "y"), 1000, 3000)...); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSelectHints(t *testing.T) {
	c := browsing(t)
	all := labels.MustNewMatcher(labels.MatchRegexp, "i", ".+")
	check := func(hints *storage.SelectHints, wantSeries, wantSamples int) []string {
		t.Helper()
		r, err := query(t.Context(), c.Storage, 10_000, hints, all)
		if err != nil {
			t.Error(err)
		}
		n := 0
		for _, ps := range r.Points {
			n += len(ps)
		}
		if len(r.Series) != wantSeries || n != wantSamples {
			t.Errorf("%+v: %d series with %d samples, want %d with %d", hints, len(r.Series), n, wantSeries, wantSamples)
		}
		if !slices.IsSorted(r.Series) || len(slices.Compact(slices.Clone(r.Series))) != len(r.Series) {
			t.Errorf("%+v: not in order: %q", hints, r.Series)
		}
		return r.Series
	}
	full := check(nil, 9, 24)
	check(&storage.SelectHints{Start: 0, End: 10_000}, 9, 24)
	check(&storage.SelectHints{Start: -50, End: 1 << 60}, 9, 24)
	check(&storage.SelectHints{Start: 1001, End: 3999}, 9, 12)
	check(&storage.SelectHints{Start: 2000, End: 2000}, 6, 6)
	check(&storage.SelectHints{Start: 4001, End: 10_000}, 0, 0)
	check(&storage.SelectHints{Start: 5, End: 4}, 0, 0)
	check(&storage.SelectHints{Start: 0, End: 10_000, Func: "series"}, 9, 0)
	check(&storage.SelectHints{Start: 2500, End: 10_000, Func: "series"}, 6, 0)
	check(&storage.SelectHints{Start: 0, End: 2500, Func: "series"}, 6, 0)
	if got := check(&storage.SelectHints{Start: 0, End: 10_000, Limit: 4, Func: "series"}, 4, 0); !slices.Equal(got, full[:4]) {
		t.Errorf("with a limit: %q", got)
	}
	check(&storage.SelectHints{Start: 0, End: 10_000, Limit: 100}, 9, 24)
	var sharded []string
	for i := range uint64(3) {
		q, err := c.Storage.Querier(0, 10_000)
		if err != nil {
			t.Fatal(err)
		}
		r, err := collect(q.Select(t.Context(), true, &storage.SelectHints{End: 10_000, ShardCount: 3, ShardIndex: i}, all))
		if err != nil {
			t.Error(err)
		}
		sharded = append(sharded, r.Series...)
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	slices.Sort(sharded)
	if diff := cmp.Diff(full, sharded); diff != "" {
		t.Errorf("shards together, want -, got +\n%s", diff)
	}
}

func TestTenants(t *testing.T) {
	c := browsing(t)
	for tenant, want := range map[string]int{"other": 1, "nobody": 0, gateway.DefaultTenant: 9} {
		r, err := query(gateway.WithTenant(t.Context(), tenant), c.Storage, 10_000, nil, equal("__name__", "m0"))
		if err != nil {
			t.Error(err)
		}
		if want == 9 {
			want = 3 // of them m0
		}
		if len(r.Series) != want {
			t.Errorf("tenant %s: %q", tenant, r.Series)
		}
	}
}

func TestLabels(t *testing.T) {
	c := browsing(t)
	ctx := t.Context()
	check := func(what string, got []string, err error, want string) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	for _, r := range []struct {
		mint, maxt int64
		hints      *storage.LabelHints
		ms         []*labels.Matcher
		names      string
		metrics, i string
	}{
		{0, 10_000, nil, nil, "__name__ i job", "m0 m1 m2", "0 1 2 3 4 5 6 7 8"},
		{0, 10_000, &storage.LabelHints{Limit: 2}, nil, "__name__ i", "m0 m1", "0 1"},
		{0, 10_000, nil, []*labels.Matcher{equal("__name__", "m1")}, "__name__ i job", "m1", "1 4 7"},
		{0, 10_000, nil, []*labels.Matcher{equal("job", "j1")}, "__name__ i job", "m0 m1 m2", "1 3 5 7"},
		{0, 10_000, &storage.LabelHints{Limit: 2}, []*labels.Matcher{equal("job", "j1")}, "__name__ i", "m0 m1", "1 3"},
		{0, 10_000, nil, []*labels.Matcher{equal("job", "j2")}, "", "", ""},
		{0, 10_000, nil, []*labels.Matcher{equal("absent", "")}, "__name__ i job", "m0 m1 m2", "0 1 2 3 4 5 6 7 8"},
		{2500, 10_000, nil, []*labels.Matcher{equal("__name__", "m1")}, "__name__ i job", "m1", "4 7"},
		{0, 2500, nil, []*labels.Matcher{equal("__name__", "m1")}, "__name__ i job", "m1", "1 4"},
		{20_000, 30_000, nil, nil, "", "", ""},
	} {
		q, err := c.Storage.Querier(r.mint, r.maxt)
		if err != nil {
			t.Fatal(err)
		}
		what := fmt.Sprint(r.mint, r.maxt, r.hints, r.ms)
		names, _, err := q.LabelNames(ctx, r.hints, r.ms...)
		check(what+" names", names, err, r.names)
		metrics, _, err := q.LabelValues(ctx, "__name__", r.hints, r.ms...)
		check(what+" metrics", metrics, err, r.metrics)
		is, _, err := q.LabelValues(ctx, "i", r.hints, r.ms...)
		check(what+" values of i", is, err, r.i)
		none, _, err := q.LabelValues(ctx, "absent", r.hints, r.ms...)
		check(what+" values of absent", none, err, "")
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestLabelsHeld: labels that are given count to the request's end.
func TestLabelsHeld(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	var all []gatewaytest.Sample
	text := 0
	for i := range 100 {
		pod := fmt.Sprintf("%03d%s", i, strings.Repeat("x", 1000))
		text += len(pod)
		all = append(all, floats(ls("__name__", "m", "pod", pod), 1000)...)
	}
	setup(t, c, all, nil)
	for name, read := range map[string]func(ctx context.Context, q storage.Querier) (int, error){
		"values": func(ctx context.Context, q storage.Querier) (int, error) {
			vs, _, err := q.LabelValues(ctx, "pod", nil)
			return len(vs), err
		},
		"series": func(ctx context.Context, q storage.Querier) (int, error) {
			n := 0
			set := q.Select(ctx, true, &storage.SelectHints{Start: 0, End: 10_000, Func: "series"}, equal("__name__", "m"))
			for set.Next() {
				n++
			}
			return n, set.Err()
		},
	} {
		for _, limit := range []int64{0, int64(text)} {
			reg := prometheus.NewRegistry()
			held := func() float64 {
				ms, err := reg.Gather()
				if err != nil {
					t.Fatal(err)
				}
				i := slices.IndexFunc(ms, func(m *dto.MetricFamily) bool { return m.GetName() == "epimetheus_gateway_query_memory_bytes" })
				return ms[i].GetMetric()[0].GetGauge().GetValue()
			}
			ctx, _, done := account.NewMemory(limit, reg).Open(t.Context(), gateway.DefaultTenant, account.Limits{})
			q, err := c.Storage.Querier(0, 10_000)
			if err != nil {
				t.Fatal(err)
			}
			switch n, err := read(ctx, q); {
			case limit > 0 && !errors.Is(err, account.ErrLimit):
				t.Errorf("%s: %v, though %d bytes are more than the limit", name, err, text)
			case limit == 0 && (err != nil || n != len(all)):
				t.Errorf("%s: %d, %v", name, n, err)
			case limit == 0 && held() < float64(text):
				t.Errorf("%s: %v bytes are held of %d", name, held(), text)
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
			if done(); held() != 0 {
				t.Errorf("%s: %v bytes are held in the end", name, held())
			}
		}
	}
}

func TestExemplarsAndMetadata(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	ex := func(ts int64) exemplar.Exemplar {
		return exemplar.Exemplar{Labels: ls("id", fmt.Sprint(ts)), Value: float64(ts), Ts: ts, HasTs: true}
	}
	now := time.Now().UnixMilli()
	sample := func(i string, ts int64, help string) gatewaytest.Sample {
		return gatewaytest.Sample{
			Labels: ls("__name__", "m", "i", i), T: ts, Exemplars: []exemplar.Exemplar{ex(ts)},
			Metadata: metadata.Metadata{Type: "counter", Help: help},
		}
	}
	setup(t, c,
		[]gatewaytest.Sample{sample("a", now, "old"), sample("a", now+1, "old"), sample("b", now, "old")},
		[]gatewaytest.Sample{sample("a", now+2, "new"), sample("c", now+2, "new")})
	q, err := c.Storage.ExemplarQuerier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := q.Select(now+1, now+2, []*labels.Matcher{equal("i", "a")}, []*labels.Matcher{equal("__name__", "m")})
	if err != nil {
		t.Fatal(err)
	}
	want := []exemplar.QueryResult{
		{SeriesLabels: ls("__name__", "m", "i", "a"), Exemplars: []exemplar.Exemplar{ex(now + 1), ex(now + 2)}},
		{SeriesLabels: ls("__name__", "m", "i", "c"), Exemplars: []exemplar.Exemplar{ex(now + 2)}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(labels.Equal)); diff != "" {
		t.Errorf("exemplars, want -, got +\n%s", diff)
	}
	ms, warnings, err := c.Storage.Metadata(t.Context(), gateway.DefaultTenant, "")
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	var helps []string
	for _, m := range ms {
		helps = append(helps, m.Metric+" "+string(m.Type)+" "+m.Help)
	}
	if diff := cmp.Diff([]string{"m counter new", "m counter old"}, helps); diff != "" {
		t.Errorf("metadata, want -, got +\n%s", diff)
	}
	if ms, _, err := c.Storage.Metadata(t.Context(), gateway.DefaultTenant, "absent"); err != nil || len(ms) > 0 {
		t.Errorf("metadata of an absent metric: %v, %v", ms, err)
	}
}

// hanging answers nothing before its request is cancelled.
type hanging struct {
	fetchpb.UnimplementedFetchServer
	waiting, cancelled atomic.Int64
}

func (h *hanging) wait(ctx context.Context) error {
	h.waiting.Add(1)
	<-ctx.Done()
	h.cancelled.Add(1)
	return ctx.Err()
}

func (h *hanging) Select(_ *fetchpb.SelectRequest, s grpc.ServerStreamingServer[fetchpb.SelectResponse]) error {
	return h.wait(s.Context())
}

func (h *hanging) Labels(ctx context.Context, _ *fetchpb.LabelsRequest) (*fetchpb.LabelsResponse, error) {
	return nil, h.wait(ctx)
}

// TestNoAnswer: an ingester that doesn't answer, for whatever reason, makes a
// warning, and in time for the query.
func TestNoAnswer(t *testing.T) {
	for name, serve := range map[string]func(c *gatewaytest.Cluster){
		"hangs":              func(c *gatewaytest.Cluster) { c.ServeFetch("bad", &hanging{}) },
		"can't be connected": func(c *gatewaytest.Cluster) { c.Serve("bad", ring.Active, nil) },
		"is no ingester":     func(c *gatewaytest.Cluster) { c.Serve("bad", ring.Leaving, func(*grpc.Server) {}) },
		"is lost":            func(c *gatewaytest.Cluster) { c.Serve("bad", ring.Lost, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := gatewaytest.New(t, gatewaytest.Options{})
				setup(t, c, floats(ls("__name__", "m"), 1), floats(ls("__name__", "m"), 2))
				serve(c)
				for _, limit := range []time.Duration{0, time.Second} {
					ctx, cancel := context.WithCancel(t.Context())
					if limit > 0 {
						ctx, cancel = context.WithTimeout(t.Context(), limit)
					}
					begin := time.Now()
					r, err := query(ctx, c.Storage, 10, nil, equal("__name__", "m"))
					if err != nil {
						t.Error(err)
					}
					if took := time.Since(begin); took > 15*time.Second || limit > 0 && took > limit/2 {
						t.Errorf("took %s of %s", took, limit)
					}
					if len(r.Points[`{__name__="m"}`]) != 2 {
						t.Errorf("got %v", r.Points)
					}
					if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "bad") {
						t.Errorf("warnings: %q", r.Warnings)
					}
					q, err := c.Storage.Querier(0, 10)
					if err != nil {
						t.Fatal(err)
					}
					names, warnings, err := q.LabelNames(ctx, nil)
					if limit == 0 && (err != nil || len(names) != 1 || len(warnings) != 1) {
						t.Errorf("label names %q, warnings %v, %v", names, warnings, err)
					}
					if err := q.Close(); err != nil {
						t.Error(err)
					}
					cancel()
				}
			})
		})
	}
}

// TestLeft: what a member flushed before it left is found at once, although the
// rows that are kept don't have it and no head names it.
func TestLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2, VisibilityDelay: time.Hour})
		var ss []gatewaytest.Sample
		for i := range 20 {
			ss = append(ss, floats(ls("__name__", "m", "i", fmt.Sprint(i)), 1)...)
		}
		setup(t, c, nil, ss)
		count := func() int {
			t.Helper()
			r, err := query(t.Context(), c.Storage, 10, nil, equal("__name__", "m"))
			if err != nil || len(r.Warnings) > 0 {
				t.Fatal(err, r.Warnings)
			}
			return len(r.Series)
		}
		if n := count(); n != 20 {
			t.Fatalf("%d series before", n)
		}
		time.Sleep(time.Second)
		if err := c.Ingesters[1].Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.SetState("ingester-1", ring.Left)
		if n := count(); n != 20 {
			t.Errorf("%d series of 20 after a member has left", n)
		}
	})
}

// TestLeavesDuringQuery: what a member flushed and left with while a query goes on is
// found by those selectors of the query that read later.
func TestLeavesDuringQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2, VisibilityDelay: time.Hour})
		var ss []gatewaytest.Sample
		for i := range 20 {
			ss = append(ss, floats(ls("__name__", "m", "i", fmt.Sprint(i)), 1)...)
		}
		setup(t, c, nil, ss)
		q, err := c.Storage.Querier(0, 10)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for _, when := range []string{"before", "after"} {
			r, err := collect(q.Select(t.Context(), true, nil, equal("__name__", "m")))
			if err != nil || len(r.Warnings) > 0 {
				t.Fatal(err, r.Warnings)
			}
			if len(r.Series) != 20 {
				t.Errorf("%d series of 20 %s a member has left", len(r.Series), when)
			}
			time.Sleep(time.Second)
			if err := c.Ingesters[1].Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.SetState("ingester-1", ring.Left)
		}
	})
}

// TestCancel: a cancelled query ends the requests to ingesters, and Close waits
// for all that the query has started.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{})
		h := &hanging{}
		c.ServeFetch("slow", h)

		ctx, cancel := context.WithCancel(t.Context())
		q, err := c.Storage.Querier(0, 10)
		if err != nil {
			t.Fatal(err)
		}
		set := q.Select(ctx, true, nil, equal("__name__", "m"))
		synctest.Wait()
		if h.waiting.Load() != 1 {
			t.Fatal("Select has not begun to read")
		}
		cancel()
		synctest.Wait()
		if h.cancelled.Load() != 1 {
			t.Error("cancelled, and the ingester doesn't know")
		}
		if set.Next() || set.Err() == nil {
			t.Error("cancelled, and no error")
		}
		if err := q.Close(); err != nil {
			t.Error(err)
		}

		if q, err = c.Storage.Querier(0, 10); err != nil {
			t.Fatal(err)
		}
		sets := []storage.SeriesSet{
			q.Select(t.Context(), true, nil, equal("__name__", "m")),
			q.Select(t.Context(), true, nil, equal("__name__", "n")),
		}
		synctest.Wait()
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		for _, s := range sets {
			if s.Next() || s.Err() == nil {
				t.Error("closed, and no error")
			}
		}
		synctest.Wait()
		if n := h.cancelled.Load(); n != 3 {
			t.Errorf("%d requests cancelled of 3", n)
		}
		if s := q.Select(t.Context(), true, nil, equal("__name__", "m")); s.Next() || s.Err() == nil {
			t.Error("Select after Close")
		}
	})
}

// TestOneSnapshot: all selectors of a query read the same blocks.
func TestOneSnapshot(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	setup(t, c, floats(ls("__name__", "m"), 1), nil)
	q, err := c.Storage.Querier(0, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for range 2 {
		r, err := collect(q.Select(t.Context(), true, nil, equal("__name__", "m")))
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Collect(maps.Keys(r.Points)); len(got) != 1 {
			t.Errorf("series %q", got)
		}
		setup(t, c, floats(ls("__name__", "m"), 2), nil)
	}
}

// replica answers with one series, and says what a source says of its copies.
type replica struct {
	fetchpb.UnimplementedFetchServer
	process  string
	coverage []*fetchpb.Coverage
	members  []uint32
	fail     atomic.Bool
}

func (r *replica) Select(_ *fetchpb.SelectRequest, s grpc.ServerStreamingServer[fetchpb.SelectResponse]) error {
	if r.fail.Load() {
		return status.Error(codes.Unavailable, "gone")
	}
	return s.Send(&fetchpb.SelectResponse{Header: &fetchpb.Header{Process: []byte(r.process), Coverage: r.coverage, Members: r.members}})
}

// TestManySelectors: a query reads some of its selectors at the same time, whatever it has,
// and all of them in the end; those that haven't begun when it is closed never do.
func TestManySelectors(t *testing.T) {
	const selectors = 300
	names := make([]string, selectors)
	for i := range names {
		names[i] = fmt.Sprint("m", i)
	}
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{})
		h := &hanging{}
		c.ServeFetch("slow", h)
		for _, leaves := range []bool{false, true} {
			h.waiting.Store(0)
			q, err := c.Storage.Querier(0, 10)
			if err != nil {
				t.Fatal(err)
			}
			var sels []*merge.Selection
			var sets []storage.SeriesSet
			for _, name := range names {
				if leaves {
					sels = append(sels, q.(*merge.Querier).Selection(t.Context(), false, nil, equal("__name__", name)))
				} else {
					sets = append(sets, q.Select(t.Context(), true, nil, equal("__name__", name)))
				}
			}
			synctest.Wait()
			if n := h.waiting.Load(); n != merge.ReadingAtOnce {
				t.Errorf("%d selectors are read at the same time, want %d", n, merge.ReadingAtOnce)
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
			if n := h.waiting.Load(); n != merge.ReadingAtOnce {
				t.Errorf("%d selectors were read", n)
			}
			for _, sel := range sels {
				if sel.Wait() == nil {
					t.Error("no error after Close")
				}
			}
			for _, set := range sets {
				if set.Next() || set.Err() == nil {
					t.Error("no error after Close")
				}
			}
		}
	})
	c := gatewaytest.New(t, gatewaytest.Options{})
	var samples []gatewaytest.Sample
	for _, name := range names {
		samples = append(samples, gatewaytest.Sample{Labels: ls("__name__", name), T: 5, V: 1})
	}
	setup(t, c, samples[:selectors/2], samples[selectors/2:])
	q, err := c.Storage.Querier(0, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	var sets []storage.SeriesSet
	for _, name := range names {
		sets = append(sets, q.Select(t.Context(), true, nil, equal("__name__", name)))
	}
	for i := range sets {
		if i%2 == 0 { // in any order
			i = len(sets) - 2 - i
		}
		if r, err := collect(sets[i]); err != nil || len(r.Series) != 1 || r.Series[0] != ls("__name__", names[i]).String() {
			t.Errorf("%s: %v, %v", names[i], r.Series, err)
		}
	}
}

// TestReplicas: a missing ingester makes no warning where others have all that it
// had, and one as ever where they may not.
func TestReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{})
		var all []*replica
		said := &fetchpb.Coverage{Sources: []uint64{1}, AgeMs: 100, ReplicationFactor: 2, Copies: 2, Zones: 2}
		for i := range 3 {
			r := &replica{process: fmt.Sprint("process-number-", i), coverage: []*fetchpb.Coverage{said}}
			all = append(all, r)
			id := fmt.Sprint("replica-", i)
			said.Holders = append(said.Holders, &fetchpb.Holder{Member: id, Process: []byte(r.process)})
			c.ServeFetch(id, r)
		}
		warnings := func(want int) {
			t.Helper()
			r, err := query(t.Context(), c.Storage, 10, nil, equal("__name__", "m"))
			if err != nil || len(r.Warnings) != want {
				t.Errorf("warnings %q, %v, want %d", r.Warnings, err, want)
			}
		}
		warnings(0)
		all[0].fail.Store(true)
		warnings(0)
		all[1].fail.Store(true)
		warnings(2)
		all[1].fail.Store(false)
		warnings(0)
		c.SetState("replica-0", ring.Lost)
		warnings(0)
		all[1].process = "process-number-x" // it restarts, and nobody has noticed
		warnings(1)
	})
}

// TestRingBehind: a gateway that is behind with the ring warns, from what ingesters
// say of themselves and of others.
func TestRingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := gatewaytest.New(t, gatewaytest.Options{})
		r := &replica{process: "process-number-1"}
		c.ServeFetch("one", r)
		set := func(ms ...ring.Member) { c.Live.Set(ring.NewSnapshot(ms)) }
		warned := func(want string) {
			t.Helper()
			r, err := query(t.Context(), c.Storage, 10, nil, equal("__name__", "m"))
			if err != nil || (want == "") != (len(r.Warnings) == 0) || want != "" && !strings.Contains(r.Warnings[0], want) {
				t.Errorf("warnings %q, %v, want %q", r.Warnings, err, want)
			}
		}
		member := func(id, process string, state ring.State) ring.Member {
			return ring.Member{ID: id, Address: "passthrough:///one", State: state, Process: "x", Memory: hex.EncodeToString([]byte(process))}
		}
		one, two := member("one", "process-number-1", ring.Active), member("two", "process-number-2", ring.Active)
		set()
		warned("no ingester")
		r.members = []uint32{one.Digest()}
		set(one)
		warned("")
		// It hears of another by the first.
		r.members = append(r.members, two.Digest())
		warned("doesn't know all ingesters")
		joining := member("two", "process-number-1", ring.Joining)
		joining.Memory = two.Memory
		c.ServeFetch("two", &replica{process: "process-number-2"})
		joining.Address = "passthrough:///two"
		set(one, joining)
		warned("")
		// It has left, and the first doesn't know yet.
		set(one)
		warned("")
		// A restart that the ring doesn't tell of yet.
		r.process = "process-number-x"
		warned("one vanished")
	})
}

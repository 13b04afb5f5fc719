package plan_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cortexproject/promqlsmith"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

var (
	agreeSeed = flag.Int64("agree.seed", 1, "first seed of TestAgreement")
	agreeN    = flag.Int("agree.n", 900, "queries of TestAgreement")
	agreeAll  = flag.Bool("agree.natives", false, "queries of TestAgreement are all over native histograms")
)

// dataset is some hours of series of all sorts: counters with resets, gauges,
// NaN, infinities, gaps, staleness markers, start timestamps, histograms, series
// that change between floats and histograms.
func dataset(t testing.TB, rnd *rand.Rand, s *gatewaytest.Shipped, hours int) []labels.Labels {
	t.Helper()
	const interval = 15_000
	n := hours * 240
	app := s.AppenderV2(t.Context())
	var all []labels.Labels
	for i, name := range []string{"requests_total", "temperature", "odd", "latency", "latency_bucket", "mixed", "sizes", "waits", "queued"} {
		for k := range 8 {
			b := labels.NewScratchBuilder(4)
			b.Add("__name__", name)
			b.Add("instance", fmt.Sprint("host-", k%4))
			b.Add("job", fmt.Sprint("job-", k/4))
			if name == "latency_bucket" {
				b.Add("le", []string{"0.1", "1", "10", "+Inf"}[k%4])
			}
			ls := b.Labels()
			all = append(all, ls)
			v, start := float64(rnd.Intn(1000)), int64(1)
			gap := 0
			shape := newShape(rnd, name)
			for j := range n {
				ts := int64(j)*interval + int64(rnd.Intn(7)) // some jitter
				if k%3 == 0 {
					ts = int64(j) * interval
				}
				if gap > 0 {
					gap--
					continue
				}
				var h *histogram.Histogram
				var fh *histogram.FloatHistogram
				switch {
				case rnd.Intn(300) == 0:
					gap = rnd.Intn(60)
					v2 := math.Float64frombits(value.StaleNaN)
					switch { // as heads make them
					case i > 5 && k%4 == 3:
						fh = &histogram.FloatHistogram{Sum: v2}
					case i > 5:
						h = &histogram.Histogram{Sum: v2}
					}
					if _, err := app.Append(0, ls, 0, ts, v2, h, fh, storage.AppendV2Options{}); err != nil {
						t.Fatal(err)
					}
					continue
				case i == 0 || i == 4:
					if v += float64(rnd.Intn(20)); rnd.Intn(100) == 0 {
						v, start = float64(rnd.Intn(3)), ts-1
					}
				case i == 1:
					v += rnd.NormFloat64()
				case i == 2:
					v = []float64{math.NaN(), math.Inf(1), math.Inf(-1), math.Copysign(0, -1), 0, 1e300, -1e308, rnd.Float64(), 3}[rnd.Intn(9)]
				case i == 3:
					h = tsdbutil.GenerateTestHistogram(int64(j%200 + k))
				case i == 5:
					if j/40%3 == 0 {
						h = tsdbutil.GenerateTestHistogram(int64(j))
					}
					v = float64(j)
				case i > 5:
					if h = shape.next(rnd); shape.reset {
						start = ts - 1
					}
					if k%4 == 3 {
						h, fh = nil, h.ToFloat(nil).Mul(0.7)
					}
				}
				st := int64(0)
				if k%2 == 1 && h == nil && i == 0 || k == 5 && i > 5 {
					st = start
				}
				if _, err := app.Append(0, ls, st, ts, v, h, fh, storage.AppendV2Options{}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
	return all
}

// shape makes native histograms of a series: sizes are exponential, and both positive and negative; waits have custom bounds;
// queued are gauges, of either kind. Now and then there is a reset, or another schema, zero threshold or bounds.
type shape struct {
	custom, gauge bool
	pos, neg      map[int]int64 // by index
	zero          int64
	sum           float64
	schema        int32
	threshold     float64
	bounds        []float64
	reset         bool
}

func newShape(rnd *rand.Rand, name string) *shape {
	s := &shape{custom: name == "waits", gauge: name == "queued"}
	if s.gauge {
		s.custom = rnd.Intn(3) == 0
	}
	s.clear()
	s.change(rnd)
	return s
}

func (s *shape) clear() {
	s.pos, s.neg, s.zero, s.sum, s.reset = map[int]int64{}, map[int]int64{}, 0, 0, true
}

// change takes another layout; the buckets keep their indexes.
func (s *shape) change(rnd *rand.Rand) {
	s.schema = []int32{0, 0, 0, 3, 1, -2}[rnd.Intn(6)]
	s.threshold = []float64{0.001, 0.001, 0.001, 0, 2.938735877055719e-39, 0.7, 3}[rnd.Intn(7)]
	s.bounds = [][]float64{{1, 2, 3, 4, 5}, {1, 2, 3, 4, 5}, {2, 4, 6, 8, 10, 12}, {-1, 1, 3}}[rnd.Intn(4)]
}

func (s *shape) next(rnd *rand.Rand) *histogram.Histogram {
	s.reset = false
	if rnd.Intn(150) == 0 {
		s.clear()
	}
	if rnd.Intn(200) == 0 {
		s.change(rnd)
	}
	if s.gauge && rnd.Intn(4) == 0 {
		s.clear()
	}
	for range rnd.Intn(6) {
		n := int64(1 + rnd.Intn(4))
		s.sum += rnd.Float64() * float64(n)
		switch k := rnd.Intn(14); {
		case s.custom:
			s.pos[k%len(s.bounds)] += n
		case k < 2:
			s.zero += n
		case k < 9:
			s.pos[2+k/2+10*(k/8)] += n
		default:
			s.neg[k-8] += n
		}
	}
	h := &histogram.Histogram{Schema: s.schema, ZeroThreshold: s.threshold, ZeroCount: uint64(s.zero), Count: uint64(s.zero), Sum: s.sum}
	if s.custom {
		h.Schema, h.ZeroThreshold, h.CustomValues = histogram.CustomBucketsSchema, 0, s.bounds
	}
	if s.gauge {
		h.CounterResetHint = histogram.GaugeType
	}
	side := func(of map[int]int64) (spans []histogram.Span, buckets []int64) {
		end, last := 0, int64(0)
		for _, k := range slices.Sorted(maps.Keys(of)) {
			if s.custom && k > len(s.bounds) {
				delete(of, k)
				continue
			}
			if k == end && len(spans) > 0 {
				spans[len(spans)-1].Length++
			} else {
				spans = append(spans, histogram.Span{Offset: int32(k - end), Length: 1})
			}
			buckets = append(buckets, of[k]-last)
			h.Count += uint64(of[k])
			end, last = k+1, of[k]
		}
		return spans, buckets
	}
	h.PositiveSpans, h.PositiveBuckets = side(s.pos)
	h.NegativeSpans, h.NegativeBuckets = side(s.neg)
	return h
}

// summarised gives what a cluster has to another one, most of it in a block with
// summaries. The last half hour of counters is in heads, and some late samples are in
// a block of their own.
func summarised(t *testing.T, from *gatewaytest.Cluster) *gatewaytest.Cluster {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	q, err := from.Storage.Querier(math.MinInt64, math.MaxInt64)
	must(err)
	defer q.Close()
	set := q.Select(t.Context(), true, nil, labels.MustNewMatcher(labels.MatchRegexp, "__name__", ".+"))
	var most, late []*chunkfmt.Series
	var fresh []gatewaytest.Sample
	for set.Next() {
		cols, err := set.At().(*merge.Series).Columns(&merge.Buffer{})
		must(err)
		s := *cols
		s.Labels = set.At().Labels()
		name := s.Labels.Get("__name__")
		kept, other := chunkfmt.Floats{}, chunkfmt.Floats{}
		last := int64(0)
		if n := len(s.Floats.T); n > 0 {
			last = s.Floats.T[n-1]
		}
		for i, ts := range s.Floats.T {
			to := &kept
			switch {
			case name == "latency_bucket" && ts > last-1_800_000:
				fresh = append(fresh, gatewaytest.Sample{Labels: s.Labels, T: ts, V: s.Floats.V[i]})
				continue
			case name == "temperature" && 36_000_000 < ts && ts < 40_000_000 && i%7 == 0:
				to = &other
			}
			to.T, to.V = append(to.T, ts), append(to.V, s.Floats.V[i])
			if s.Floats.ST != nil {
				to.ST = append(to.ST, s.Floats.ST[i])
			}
		}
		s.Floats = kept
		most = append(most, &s)
		if len(other.T) > 0 {
			late = append(late, &chunkfmt.Series{Labels: s.Labels, Floats: other})
		}
	}
	must(set.Err())
	to := gatewaytest.New(t, gatewaytest.Options{})
	for _, all := range [][]*chunkfmt.Series{most, late} {
		slices.SortFunc(all, func(a, b *chunkfmt.Series) int {
			return cmp.Or(strings.Compare(a.Labels.Get("__name__"), b.Labels.Get("__name__")), labels.Compare(a.Labels, b.Labels))
		})
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, ChunkSamples: 1000, Rollups: true})
		for _, s := range all {
			must(w.Add(gateway.DefaultTenant, s))
		}
		sum, err := w.Close()
		must(err)
		must(to.History.Publish(t.Context(), ulid.Make(), buf.Bytes(), sum))
	}
	must(to.Shipper(gateway.DefaultTenant).Send(t.Context(), fresh...))
	return to
}

func tenantOf(context.Context) string { return gateway.DefaultTenant }

// gateways starts gateways that compute parts, and gives the way to them.
func gateways(t testing.TB, n int, run func(context.Context, *plan.Task) ([]byte, error)) *worker.Pool {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	var peers []worker.Peer
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer()
		worker.NewServer(func(ctx context.Context, task *plan.Task) ([]byte, account.Cost, error) {
			ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(ctx, task.Tenant, task.Left)
			defer done()
			b, err := run(ctx, task)
			return b, acc.Cost(), err
		}, logger, prometheus.NewRegistry()).Register(g)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = g.Serve(l) // ends with Stop
		}()
		t.Cleanup(func() {
			g.Stop()
			<-done
		})
		peers = append(peers, worker.Peer{ID: fmt.Sprint("gateway-", i), Address: l.Addr().String()})
	}
	pool := worker.NewPool("here", func() []worker.Peer { return peers }, logger, prometheus.NewRegistry(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	t.Cleanup(func() { _ = pool.Close() }) // of connections
	return pool
}

// parted is an engine that computes small parts, or shards of the series, here and at
// two other gateways, and keeps the results. runs counts those with results from there.
func parted(t *testing.T, c *gatewaytest.Cluster, e *promql.Engine, o promql.EngineOpts, tight func(plan.Spread) plan.Spread, runs *atomic.Int64) *plan.Engine {
	t.Helper()
	spread := func() plan.Spread {
		r, err := plan.NewResults(4<<20, nil, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		return tight(plan.Spread{TenantOf: tenantOf, Results: r})
	}
	engine := plan.New(e, o, spread())
	s := spread()
	s.Workers = gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) {
		b, err := engine.Work(ctx, c.History, task)
		if len(b) > 100 { // there is something in it
			runs.Add(1)
		}
		return b, err
	})
	return plan.New(e, o, s)
}

// differed are seeds whose queries came out otherwise once: the same info from two places in a
// query, of which the engine keeps the later that it evaluates.
var differed = []int64{502469, 655678, 624822}

// TestAgreement runs random queries through the planner and through the engine
// alone, on the same data. -agree.n says how many, -agree.seed repeats one.
func TestAgreement(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	all := dataset(t, rand.New(rand.NewSource(42)), s, 4)
	day := gatewaytest.New(t, gatewaytest.Options{})
	dataset(t, rand.New(rand.NewSource(43)), gatewaytest.NewShipped(day, gatewaytest.Splits[0], true), 24)
	rolledCluster := summarised(t, day)
	rolled := rolledCluster.Storage
	type engines struct {
		name  string
		plain *promql.Engine
		plan  *plan.Engine
		data  storage.Queryable
		parts bool
		sums  bool // steps are such that summaries may answer
	}
	// What was flushed is in heads for a while. This is as if it were gone.
	none := merge.NewHeads(&ring.Live{}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	defer none.Close()
	old := merge.New(none, c.History, tenantOf)
	var es []engines
	var atWorkers, atShards atomic.Int64
	for _, delayed := range []bool{false, true} {
		for _, starts := range []bool{false, true} {
			o := suiteOptions
			o.MaxSamples, o.EnablePerStepStats = 50_000_000, true // kernels hold less in memory, so they fail later
			o.EnableDelayedNameRemoval, o.UseStartTimestamps = delayed, starts
			e := promqltest.NewTestEngineWithOpts(t, o)
			name := fmt.Sprintf("delayed name removal %t, start timestamps %t", delayed, starts)
			es = append(es, engines{name, e, plan.New(e, o, plan.Spread{}), s, false, false},
				engines{name + ", parts", e, parted(t, c, e, o, plan.Tight, &atWorkers), s, true, false},
				engines{name + ", parts of history", e, parted(t, c, e, o, plan.Tight, &atWorkers), old, true, false},
				engines{name + ", shards", e, parted(t, c, e, o, plan.TightShards, &atShards), s, false, false},
				engines{name + ", shards of history", e, parted(t, c, e, o, plan.TightShards, &atShards), old, false, false},
				engines{name + ", shards of summaries", e, parted(t, rolledCluster, e, o, plan.TightShards, &atShards), rolled, false, true},
				engines{name + ", summaries of all", e, plan.Summarised(plan.New(e, o, plan.Spread{})), s, false, true},
				engines{name + ", summaries of blocks", e, plan.New(e, o, plan.Spread{}), rolled, false, true})
		}
	}
	leaves, ofSummaries, failed, chance, conflicts, windows := 0, 0, 0, 0, 0, int64(0)
	for i := range *agreeN {
		if i%10_000 == 9_999 {
			t.Logf("%d queries, %d leaves, %d differ, %d by chance", i+1, leaves, failed, chance)
		}
		seed := *agreeSeed + int64(i)
		if i < len(differed) && *agreeN > 100 {
			seed = differed[i]
		}
		rnd := rand.New(rand.NewSource(seed))
		opts := []promqlsmith.Option{
			promqlsmith.WithEnableOffset(true), promqlsmith.WithEnableAtModifier(true), promqlsmith.WithAtModifierMaxTimestamp(4 * 3600 * 1000),
			promqlsmith.WithEnableVectorMatching(true), promqlsmith.WithEnableExperimentalPromQLFunctions(true),
			promqlsmith.WithMaxDepth(1 + rnd.Intn(4)),
		}
		ps := promqlsmith.New(rnd, all, opts...)
		e := es[rnd.Intn(len(es))]
		instant := rnd.Intn(3) == 0
		start := time.UnixMilli(int64(rnd.Intn(4*3600)) * 1000)
		step := time.Duration(1+rnd.Intn(600)) * time.Second
		if e.sums {
			if e.data == rolled {
				start = start.Add(time.Duration(rnd.Intn(20)) * time.Hour)
			}
			start = start.Truncate([]time.Duration{5 * time.Minute, time.Hour}[rnd.Intn(2)])
			step = []time.Duration{5 * time.Minute, 10 * time.Minute, time.Hour}[rnd.Intn(3)]
		}
		end := start.Add(step * time.Duration(rnd.Intn(40)))
		expr := walk(ps, instant)
		if seed%4 != 0 { // most of promqlsmith's queries have no leaf
			expr = leafy(rnd, 2)
		}
		if *agreeAll || seed%8 == 7 {
			expr = native(rnd, 3)
		}
		expr = strings.ReplaceAll(expr, "\n", " ") // for places to be columns
		var read map[string]int64
		run := func(ng promql.QueryEngine) (*promql.Result, string) {
			ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
			defer done()
			defer func() { windows += acc.Cost().Windows }()
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			var q promql.Query
			var err error
			if instant {
				q, err = ng.NewInstantQuery(ctx, e.data, promql.NewPrometheusQueryOpts(true, 0, nil), expr, start)
			} else {
				q, err = ng.NewRangeQuery(ctx, e.data, promql.NewPrometheusQueryOpts(true, 0, nil), expr, start, end, step)
			}
			if err != nil {
				return &promql.Result{Err: err}, ""
			}
			defer q.Close()
			text := ""
			if p, ok := q.(interface{ Plan() string }); ok {
				text = p.Plan()
			}
			r := q.Exec(ctx)
			n := q.Stats().Samples
			read = map[string]int64{"samples": n.TotalSamples, "read": n.SamplesRead, "series": n.TotalSeries}
			for i, v := range n.TotalSamplesPerStep {
				read[fmt.Sprint("samples of step ", i)] = v
				read[fmt.Sprint("read of step ", i)] = n.SamplesReadPerStep[i]
			}
			return detach(r), text
		}
		want, _ := run(e.plain)
		wantRead := read
		got, text := run(e.plan)
		if e.parts { // the same series in several parts are known to be so only where they are computed
			delete(read, "series")
			delete(wantRead, "series")
		}
		counts := (!e.sums || !newest.MatchString(expr))
		if got.Err == nil && want.Err == nil && counts && !sameCounts(read, wantRead, expr) {
			t.Errorf("seed %d (%s, instant %t, start %d, end %d, step %s): %s\n%sread %v, want %v", seed, e.name, instant, start.UnixMilli(), end.UnixMilli(), step, expr, text, read, wantRead)
		}
		if again, _ := run(e.plain); byMap.MatchString(expr) || !slices.Equal(order(want), order(again)) {
			sortVector(want) // the engine's own order depends on that of a map
			sortVector(got)
		}
		leaves += strings.Count(text, "\nleaf_")
		if strings.Contains(strings.Join(annotated(want), "\n"), "conflicting counter resets") {
			conflicts++
		}
		if e.sums {
			ofSummaries += strings.Count(text, ", of summaries of")
		}
		diff := differ(want, got)
		for try := 0; try < 40 && diff != ""; try++ {
			// The engine walks over maps, so some of its results depend on chance.
			again, _ := run(e.plain)
			if differ(want, again) != "" || !strings.Contains(text, "\nleaf_") || rounded.MatchString(expr) || e.sums && roundedSums.MatchString(expr) ||
				strings.Contains(e.name, "shards") && roundedShards.MatchString(expr) {
				chance++
				diff = ""
			}
		}
		if len(diff) > 2000 {
			diff = diff[:2000]
		}
		if diff != "" {
			failed++
			t.Errorf("seed %d (%s, instant %t, start %d, end %d, step %s):\n%s\n%s%s", seed, e.name, instant, start.UnixMilli(), end.UnixMilli(), step, expr, text, diff)
			if failed > 20 {
				t.FailNow()
			}
		}
	}
	t.Logf("%d queries with %d leaves, %d of summaries (%d windows read), %d parts and %d shards at workers: %d warn of conflicting resets; %d differ; of %d the engine gave two results", *agreeN, leaves, ofSummaries, windows, atWorkers.Load(), atShards.Load(), conflicts, failed, chance)
	if chance > max(3, *agreeN/50) {
		t.Errorf("%d results depend on chance: too many to tell", chance)
	}
	if *agreeN > 100 && (atWorkers.Load() < int64(*agreeN)/10 || atShards.Load() < int64(*agreeN)/10) {
		t.Errorf("only %d parts and %d shards were computed at workers: they aren't tested", atWorkers.Load(), atShards.Load())
	}
	if !*agreeAll && (*agreeN > 100 && ofSummaries < *agreeN/10 || windows < 2*int64(*agreeN)) { // of floats
		t.Errorf("only %d leaves of summaries, and %d of those read: they aren't tested", ofSummaries, windows)
	}
	if *agreeN > 100 && leaves < *agreeN/4 {
		t.Errorf("only %d leaves: the planner isn't tested", leaves)
	}
}

// A worker keeps results by part, of which a task names the first, so it has to be
// that; and it takes no memory for steps without end.
func TestTasksThatDoNotFit(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	r, err := plan.NewResults(1<<20, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	e := plan.New(promqltest.NewTestEngineWithOpts(t, suiteOptions), suiteOptions, plan.Spread{TenantOf: tenantOf, Results: r})
	const hour, minute = 3_600_000, 60_000
	ok := plan.Task{
		Tenant: gateway.DefaultTenant, Query: "sum(rate(x[5m]))", Start: hour / 2, End: 3 * hour, Step: minute, Lookback: 5 * minute,
		SubqueryStep: minute, StartTimestamps: true, DelayedNameRemoval: true, MaxSamples: 1000, Span: hour, Number: 1, From: 30, To: 90,
	}
	for _, q := range []struct {
		name   string
		change func(t *plan.Task)
		want   error
	}{
		{"whole part", func(*plan.Task) {}, nil},
		{"begins before", func(t *plan.Task) { t.From-- }, plan.ErrUnlike},
		{"two parts and a piece", func(t *plan.Task) { t.To = 151 }, nil},
		{"ends after the query", func(t *plan.Task) { t.To = 152 }, plan.ErrUnlike},
		{"another part", func(t *plan.Task) { t.Number++ }, plan.ErrUnlike},
		{"another step of subqueries", func(t *plan.Task) { t.SubqueryStep /= 2 }, plan.ErrUnlike},
		{"no span", func(t *plan.Task) { t.Span = 0 }, plan.ErrUnlike},
		{"billions of steps", func(t *plan.Task) { t.Start, t.End, t.Step, t.To, t.Span, t.Number = 0, 1e10, 1, 3e9, 1e11, 0 }, plan.ErrUnlike},
	} {
		task := ok
		q.change(&task)
		if _, err := e.Work(t.Context(), c.History, &task); !errors.Is(err, q.want) {
			t.Errorf("%s: %v, want %v", q.name, err, q.want)
		}
	}
}

// A limit that is as much as a query reads lets it pass, whatever is known of it before, and one
// less doesn't: of parts whose results are kept nothing counts.
func TestLimitsAreExact(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	dataset(t, rand.New(rand.NewSource(1)), s, 4)
	o := suiteOptions
	o.MaxSamples = 50_000_000
	inner := promqltest.NewTestEngineWithOpts(t, o)
	run := func(e *plan.Engine, query string, hours time.Duration, l account.Limits) (account.Cost, error) {
		t.Helper()
		ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", l)
		defer done()
		q, err := e.NewRangeQuery(ctx, c.Storage, nil, query, time.UnixMilli(0), time.UnixMilli(0).Add(hours*time.Hour), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		err = q.Exec(ctx).Err
		return acc.Cost(), err
	}
	for _, query := range []string{`rate(requests_total[5m])`, `requests_total`, `sum(max_over_time(requests_total[7m])) / count(requests_total)`, `absent_over_time(requests_total{job=~".+"}[5m])`} {
		for _, kept := range []time.Duration{0, 2} { // hours of which parts are kept
			engine := func() *plan.Engine {
				r, err := plan.NewResults(8<<20, nil, prometheus.NewRegistry())
				if err != nil {
					t.Fatal(err)
				}
				e := plan.New(inner, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: r}))
				if kept > 0 {
					if _, err := run(e, query, kept, account.Limits{}); err != nil {
						t.Fatal(err)
					}
				}
				return e
			}
			all, err := run(engine(), query, 4, account.Limits{})
			if err != nil || all.Series == 0 || all.Samples == 0 {
				t.Fatalf("%s: %+v, %v", query, all, err)
			}
			for less := range int64(2) {
				for _, l := range []account.Limits{{Series: all.Series - less}, {Samples: all.Samples - less}} {
					if _, err := run(engine(), query, 4, l); errors.Is(err, account.ErrLimit) != (less > 0) {
						t.Errorf("%s, %d hours kept, limits %+v: %v", query, kept, l, err)
					}
				}
			}
		}
	}
}

// What the parts of a query read counts as what the query reads, wherever that is:
// the series of several parts are the same; and what was kept is in memory again.
func TestPartsCount(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	s := gatewaytest.NewShipped(c, gatewaytest.Splits[0], true)
	dataset(t, rand.New(rand.NewSource(1)), s, 4)
	none := merge.NewHeads(&ring.Live{}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	defer none.Close()
	old := merge.New(none, c.History, tenantOf)
	var atWorkers atomic.Int64
	o := suiteOptions
	o.MaxSamples = 50_000_000
	inner := promqltest.NewTestEngineWithOpts(t, o)
	r, err := plan.NewResults(8<<20, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	here := plan.New(inner, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: r}))
	run := func(e *plan.Engine, series int64) (account.Cost, int64, error) {
		reg := prometheus.NewRegistry()
		ctx, acc, done := account.NewMemory(0, reg).Open(t.Context(), "", account.Limits{Series: series})
		defer done()
		q, err := e.NewRangeQuery(ctx, old, nil, `rate(requests_total[5m])`, time.UnixMilli(0), time.UnixMilli(4*3_600_000), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		err = q.Exec(ctx).Err
		ms, gatherErr := reg.Gather()
		if gatherErr != nil {
			t.Fatal(gatherErr)
		}
		held := int64(0)
		for _, m := range ms {
			if m.GetName() == "epimetheus_gateway_query_memory_bytes" {
				held = int64(m.GetMetric()[0].GetGauge().GetValue())
			}
		}
		return acc.Cost(), held, err
	}
	for range 2 {
		cost, held, err := run(here, 8)
		if err != nil {
			t.Fatal(err)
		}
		if cost.PartsHere+cost.PartsKept == 0 || held < 16*8*1000 {
			t.Errorf("%+v, %d bytes held, want most points of 8 series", cost, held)
		}
	}
	cost, _, err := run(parted(t, c, inner, o, plan.Tight, &atWorkers), 8)
	if err != nil {
		t.Fatal(err)
	}
	if cost.Series != 8 || cost.PartsElsewhere == 0 {
		t.Errorf("%+v, want 8 series", cost)
	}
}

// overTime are functions of ranges.
var overTime = func() (out []*parser.Function) {
	for _, f := range parser.Functions {
		if slices.Contains(f.ArgTypes, parser.ValueTypeMatrix) {
			out = append(out, f)
		}
	}
	slices.SortFunc(out, func(a, b *parser.Function) int { return strings.Compare(a.Name, b.Name) })
	return out
}()

// leafy makes a query with leaves in it.
func leafy(rnd *rand.Rand, depth int) string {
	pick := func(of ...string) string { return of[rnd.Intn(len(of))] }
	switch rnd.Intn(12) {
	case 0:
		if depth > 0 {
			return fmt.Sprintf("(%s) %s (%s)", leafy(rnd, depth-1), pick("+", "-", "/", "> bool", "and", "or", "unless on (instance)"), leafy(rnd, depth-1))
		}
	case 1:
		if depth > 0 {
			return fmt.Sprintf("%s((%s)[%s:%s]%s)", pick("max_over_time", "rate", "last_over_time", "absent_over_time", "count_over_time"), leafy(rnd, depth-1),
				pick("10m", "1h", "3m"), pick("", "1m", "17s", "5m"), pick("", " offset 2m", " offset -2m", " @ 7000", " @ end()"))
		}
	case 2:
		return fmt.Sprintf("%s(%s)", pick("abs", "absent", "histogram_count", "histogram_sum", "histogram_avg", "histogram_count", "histogram_avg", "sort", "timestamp", "scalar", "-", "sgn", "histogram_stddev"), leafy(rnd, 0))
	case 3:
		return fmt.Sprintf("histogram_quantile(0.9, %s by (%s) (%s(%s[5m])))", pick("sum", "avg"), pick("le", "le, job", "instance"), pick("rate", "increase", "delta", "irate"), pick("latency", "latency_bucket", "mixed", "sizes", "waits", "queued"))
	}
	sel := pick("requests_total", "temperature", "odd", "latency", "latency_bucket", "mixed", "sizes", "sizes", "waits", "queued",
		`sizes{instance=~"host-[012]"}`, `waits{job="job-0"}`, `{__name__=~"sizes|waits"}`, `{__name__=~"requests_total|temperature"}`,
		`{__name__=~"l.*"}`, `{job="job-1"}`, `{instance=~"host-[12]",__name__!="odd"}`, `requests_total{instance="host-0"}`, `none{job="x",a!="b"}`)
	at := pick("", "", "", " offset 1m", " offset -3m", " offset 1h", " @ 5000", " @ start()", " @ end() offset 5m")
	agg := pick("", "sum", "avg", "min", "max", "count", "group", "stddev", "stdvar", "topk", "bottomk", "quantile", "count_values", "limitk")
	inner := sel + at
	if agg == "" || rnd.Intn(4) > 0 {
		f := overTime[rnd.Intn(len(overTime))]
		var args []string
		for _, a := range f.ArgTypes {
			if a == parser.ValueTypeMatrix {
				args = append(args, sel+pick("[15s]", "[1m]", "[5m]", "[7m]", "[30m]", "[1h]", "[1h15s]", "[2h]", "[1ms]")+at)
			} else {
				args = append(args, pick("0.5", "0.9", "60", "-30", "0.1", "vector(1)"))
			}
		}
		inner = fmt.Sprintf("%s(%s)", f.Name, strings.Join(args, ", "))
	}
	param := map[string]string{"quantile": "0.7, ", "count_values": `"v", `}[agg]
	if strings.HasSuffix(agg, "k") {
		param = pick("1", "2", "3", "5", "5", "12", "2.9", "0.5", "-1", "1e10", "1e20") + ", "
	}
	if agg == "" {
		return inner
	}
	by := pick("", " by (job)", " by (instance)", " without (instance)", " by (__name__)", " by (le, job)", " without ()")
	return fmt.Sprintf("%s%s (%s%s)", agg, by, param, inner)
}

// native makes a query over native histograms: of counters with resets, of gauges, of several resolutions, zero buckets and custom
// bounds, alone and together, and now and then with floats.
func native(rnd *rand.Rand, depth int) string {
	pick := func(of ...string) string { return of[rnd.Intn(len(of))] }
	sel := pick("latency", "sizes", "sizes", "waits", "queued", "mixed", `sizes{instance="host-1"}`, `waits{job="job-0"}`, `queued{instance=~"host-[03]"}`, `latency{job="job-1"}`,
		`{__name__=~"sizes|latency"}`, `{__name__=~"sizes|queued"}`, `{__name__=~"waits|sizes"}`, `{__name__=~"latency|mixed|requests_total"}`)
	at := pick("", "", "", "", " offset 1m", " offset -3m", " @ 5000", " @ end()")
	over := func() string {
		return sel + pick("[15s]", "[1m]", "[2m]", "[5m]", "[5m]", "[7m]", "[30m]", "[1h]") + at
	}
	if depth > 0 {
		switch rnd.Intn(9) {
		case 0:
			return fmt.Sprintf("(%s) %s (%s)", native(rnd, depth-1), pick("+", "+", "-", "-", "==", "!=", "and", "or", "unless", "+ on (instance, job)", "- ignoring (job)"), native(rnd, depth-1))
		case 1:
			return fmt.Sprintf("(%s) %s", native(rnd, depth-1), pick("* 2", "/ 3", "* -1", "/ 0", "== 1", "+ 1", "* on (instance, job) temperature", "^ 2"))
		case 2:
			return fmt.Sprintf("%s((%s)[%s:%s]%s)", pick("rate", "increase", "sum_over_time", "avg_over_time", "last_over_time", "first_over_time", "resets", "changes", "delta", "irate", "idelta", "count_over_time"),
				native(rnd, depth-1), pick("3m", "10m", "1h"), pick("", "1m", "17s", "5m"), pick("", "", " offset 2m", " @ end()"))
		case 3:
			return fmt.Sprintf("%s(%s)", pick("histogram_count", "histogram_sum", "histogram_avg", "histogram_stddev", "histogram_stdvar", "-", "abs", "absent", "sort", "scalar", "timestamp"), native(rnd, depth-1))
		case 4:
			return fmt.Sprintf("%s, %s)", pick("histogram_quantile(0.9", "histogram_quantile(0.5", "histogram_fraction(0, 2"), native(rnd, depth-1))
		case 5, 6, 7:
			param := ""
			agg := pick("sum", "sum", "sum", "avg", "avg", "avg", "count", "group", "limitk", "min", "topk", "quantile", "stddev", "count_values")
			switch agg {
			case "limitk", "topk":
				param = pick("1", "3", "20") + ", "
			case "quantile":
				param = "0.5, "
			case "count_values":
				param = `"v", `
			}
			return fmt.Sprintf("%s%s (%s%s)", agg, pick("", "", " by (job)", " by (instance)", " without (instance)", " by (__name__)", " without ()"), param, native(rnd, depth-1))
		}
	}
	if rnd.Intn(4) == 0 {
		return sel + at
	}
	return fmt.Sprintf("%s(%s)", pick("rate", "rate", "increase", "delta", "irate", "idelta", "resets", "changes", "sum_over_time", "sum_over_time", "avg_over_time", "avg_over_time", "last_over_time",
		"first_over_time", "count_over_time", "present_over_time", "max_over_time", "deriv", "ts_of_last_over_time"), over())
}

// walk makes a query. It may panic over functions that promqlsmith doesn't know.
func walk(ps *promqlsmith.PromQLSmith, instant bool) (expr string) {
	defer func() {
		if recover() != nil {
			expr = "vector(1)"
		}
	}()
	if instant {
		return ps.WalkInstantQuery().Pretty(0)
	}
	return ps.WalkRangeQuery().Pretty(0)
}

// sameCounts compares statistics of samples. In a subquery the engine has selectors read up to a step
// more of time than it evaluates, in which there may be other series; and of the same histogram in two
// places, one of which may have more empty buckets, it may see the other, which it counts as a few samples
// more or less.
func sameCounts(got, want map[string]int64, expr string) bool {
	if !strings.Contains(expr, ":") {
		return maps.Equal(got, want)
	}
	return maps.EqualFunc(got, want, func(a, b int64) bool { return a == b || 98*b <= 100*a && 98*a <= 100*b }) ||
		got["samples"] == want["samples"] && got["read"] == want["read"] && got["series"] < want["series"]
}

// byMap matches what the engine gives in the order of a map.
var byMap = regexp.MustCompile("histogram_quantile|histogram_fraction|count_values")

// newest matches functions of which summaries don't tell how many samples the engine
// reads.
var newest = regexp.MustCompile("irate|idelta|last_over_time|present_over_time|absent_over_time")

// rounded, roundedSums and roundedShards match labels made of values that may differ in the last digit, the latter two if they are
// made of summaries, or put together from shards.
var (
	rounded       = regexp.MustCompile(`count_values(.|\n)*(avg|sum)_over_time`)
	roundedSums   = regexp.MustCompile(`count_values(.|\n)*(rate|increase|delta|stddev_over_time|stdvar_over_time)\(`)
	roundedShards = regexp.MustCompile(`count_values(.|\n)*\b(avg|sum)\b`)
)

// order of the series in a vector. A matrix is sorted.
func order(r *promql.Result) []string {
	v, _ := r.Value.(promql.Vector)
	var out []string
	for _, s := range v {
		out = append(out, s.Metric.String())
	}
	return out
}

func sortVector(r *promql.Result) {
	if v, ok := r.Value.(promql.Vector); ok {
		slices.SortStableFunc(v, func(a, b promql.Sample) int { return labels.Compare(a.Metric, b.Metric) })
	}
}

// detach copies what a closed query takes back.
func detach(r *promql.Result) *promql.Result {
	out := &promql.Result{Err: r.Err, Warnings: r.Warnings}
	switch v := r.Value.(type) {
	case promql.Matrix:
		m := slices.Clone(v)
		for i := range m {
			m[i].Floats, m[i].Histograms = slices.Clone(m[i].Floats), slices.Clone(m[i].Histograms)
		}
		out.Value = m
	case promql.Vector:
		out.Value = slices.Clone(v)
	default:
		out.Value = r.Value
	}
	return out
}

// differ says in what two results differ, empty if in nothing.
func differ(want, got *promql.Result) string {
	if (want.Err == nil) != (got.Err == nil) || want.Err != nil && want.Err.Error() != got.Err.Error() {
		return fmt.Sprintf("error %v, want %v", got.Err, want.Err)
	}
	if want.Err != nil {
		return ""
	}
	a, b := annotated(want), annotated(got)
	if !slices.Equal(a, b) {
		return fmt.Sprintf("warnings\n%s\nwant\n%s", strings.Join(b, "\n"), strings.Join(a, "\n"))
	}
	switch w := want.Value.(type) {
	case promql.Matrix:
		g, ok := got.Value.(promql.Matrix)
		if !ok || len(g) != len(w) {
			return fmt.Sprintf("%v\nwant %v", got.Value, w)
		}
		for i := range w {
			if d := differSeries(&w[i], &g[i]); d != "" {
				return fmt.Sprintf("series %d: %s", i, d)
			}
		}
	case promql.Vector:
		g, ok := got.Value.(promql.Vector)
		if !ok || len(g) != len(w) {
			return fmt.Sprintf("%v\nwant %v", got.Value, w)
		}
		for i := range w {
			if !labels.Equal(w[i].Metric, g[i].Metric) || w[i].T != g[i].T || !same(w[i].F, g[i].F) || !sameHistogram(w[i].H, g[i].H) {
				return fmt.Sprintf("sample %d: %v, want %v", i, g[i], w[i])
			}
		}
	case promql.Scalar:
		if g, ok := got.Value.(promql.Scalar); !ok || g.T != w.T || !same(w.V, g.V) {
			return fmt.Sprintf("%v, want %v", got.Value, w)
		}
	default:
		if got.Value.String() != want.Value.String() {
			return fmt.Sprintf("%v, want %v", got.Value, want.Value)
		}
	}
	return ""
}

func differSeries(w, g *promql.Series) string {
	if !labels.Equal(w.Metric, g.Metric) {
		return fmt.Sprintf("labels %s, want %s", g.Metric, w.Metric)
	}
	if len(w.Floats) != len(g.Floats) || len(w.Histograms) != len(g.Histograms) {
		return fmt.Sprintf("%s has %d floats and %d histograms, want %d and %d", w.Metric, len(g.Floats), len(g.Histograms), len(w.Floats), len(w.Histograms))
	}
	for i := range w.Floats {
		if w.Floats[i].T != g.Floats[i].T || !same(w.Floats[i].F, g.Floats[i].F) {
			return fmt.Sprintf("%s: %v, want %v", w.Metric, g.Floats[i], w.Floats[i])
		}
	}
	for i := range w.Histograms {
		if w.Histograms[i].T != g.Histograms[i].T || !sameHistogram(w.Histograms[i].H, g.Histograms[i].H) {
			return fmt.Sprintf("%s: %v (hint %d), want %v (hint %d)", w.Metric, g.Histograms[i], g.Histograms[i].H.CounterResetHint, w.Histograms[i], w.Histograms[i].H.CounterResetHint)
		}
	}
	return ""
}

// same but for rounding in sums of windows that overlap.
func same(a, b float64) bool {
	if math.IsNaN(a) || math.IsNaN(b) {
		return math.IsNaN(a) && math.IsNaN(b)
	}
	return a == b || math.Abs(a-b) <= 1e-11*max(math.Abs(a), math.Abs(b), 1)
}

func sameHistogram(a, b *histogram.FloatHistogram) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Equals(b) && a.CounterResetHint == b.CounterResetHint
}

// annotated are warnings and infos, with their places in the query, whatever that is.
func annotated(r *promql.Result) []string {
	ws, infos := r.Warnings.AsStrings(strings.Repeat(" ", 1<<12), 0, 0)
	out := append(ws, infos...)
	slices.Sort(out)
	return out
}

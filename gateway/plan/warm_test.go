package plan_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"math/rand"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

var (
	warmSeed  = flag.Int64("warm.seed", 1, "first seed of TestWarm")
	warmN     = flag.Int("warm.n", 1, "seeds of TestWarm")
	warmSteps = flag.Int("warm.steps", 40, "steps of each seed of TestWarm")
)

// warmDelay is the visibility delay of TestWarm.
const warmDelay = 300 * time.Millisecond

// TestWarm: whatever happens to the samples, gateways that keep results, in memory and in a
// memcached that they share, answer what one answers that keeps nothing. -warm.seed repeats a world.
func TestWarm(t *testing.T) {
	for i := range int64(*warmN) {
		t.Run(fmt.Sprint("seed ", *warmSeed+i), func(t *testing.T) {
			t.Parallel()
			runWarm(t, *warmSeed+i)
		})
	}
}

// warmWorld is what happens to samples.
type warmWorld struct {
	t          *testing.T
	rnd        *rand.Rand
	c          *gatewaytest.Cluster
	send       *gatewaytest.Shipper
	base       time.Time // of the samples, which are of warmHours from then on
	retentions atomic.Pointer[history.Retentions]
	compactor  *compact.Compactor
	toxic      *testenv.Toxic
	all        *warmGateway // keeps nothing, and sees all at once
	log        []string
	pool       []int // of warmExprs
	forever    bool  // all is kept so long
	summed     int   // answers in parts that summaries had a share in
}

const warmHours = 36

// warmGateway answers queries.
type warmGateway struct {
	name    string
	history *history.History
	storage *merge.Storage
	warm    []*plan.Engine // by variant
	cold    []promql.QueryEngine
	kept    []*historytest.Memcached
	reg     *prometheus.Registry
}

// warmVariants are engines that tenants may have.
var warmVariants = []struct {
	delayed, starts bool
	lookback        time.Duration
}{{false, false, 5 * time.Minute}, {true, true, 5 * time.Minute}, {false, false, 2 * time.Minute}}

func (w *warmWorld) engines(s plan.Spread) (planned []*plan.Engine, cold []promql.QueryEngine) {
	for _, v := range warmVariants {
		o := suiteOptions
		o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps, o.LookbackDelta = 50_000_000, v.delayed, v.starts, v.lookback
		inner := promqltest.NewTestEngineWithOpts(w.t, o)
		planned = append(planned, plan.New(inner, o, s))
		if w.forever {
			cold = append(cold, inner)
		} else { // Prometheus's engine alone reads no summaries
			cold = append(cold, plan.New(inner, o, plan.Spread{}))
		}
	}
	return planned, cold
}

// heads are those of the cluster, of which no gateway takes the ingesters for restarted: each would list blocks
// anew for each query.
func (w *warmWorld) heads() *merge.Heads {
	members := slices.Clone(w.c.Live.Ring().Snapshot().Members)
	for i := range members {
		members[i].Process = ""
	}
	live := &ring.Live{}
	live.Set(ring.NewSnapshot(members))
	heads := merge.NewHeads(live, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), w.c.DialOptions()...)
	w.t.Cleanup(func() { require.NoError(w.t, heads.Close()) })
	return heads
}

// gateway makes one that keeps rows for half of a visibility delay.
func (w *warmWorld) gateway(name string, delay time.Duration, memcached string, workers bool) *warmGateway {
	t := w.t
	g := &warmGateway{name: name, reg: prometheus.NewRegistry()}
	var err error
	g.history, err = history.New(history.Options{Objects: w.c.Objects, Index: w.c.Index, VisibilityDelay: delay, Retentions: w.retentions.Load})
	require.NoError(t, err)
	g.storage = merge.New(w.heads(), g.history, tenantOf)
	_, g.cold = w.engines(plan.Spread{})
	if memcached == "" {
		return g
	}
	spread := func(reg prometheus.Registerer) plan.Spread {
		m := historytest.StartMemcached(t, memcached)
		g.kept = append(g.kept, m)
		r, err := plan.NewResults(2<<20, m.Client, reg)
		require.NoError(t, err)
		return plan.Tight(plan.Spread{TenantOf: tenantOf, Results: r})
	}
	s := spread(g.reg)
	if workers {
		others, _ := w.engines(spread(prometheus.NewRegistry()))
		s.Workers = gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) {
			for i, v := range warmVariants {
				if v.delayed == task.DelayedNameRemoval && v.starts == task.StartTimestamps {
					return others[i].Work(ctx, g.history, task)
				}
			}
			return nil, plan.ErrUnlike
		})
	}
	g.warm, _ = w.engines(s)
	return g
}

func (w *warmWorld) did(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

// series are some of those that there are, with samples in a random time.
func (w *warmWorld) series() (out []*chunkfmt.Series) {
	r := w.rnd
	from := w.base.Add(time.Duration(r.Int63n(int64(warmHours+3)*int64(time.Hour))) - 3*time.Hour).UnixMilli()
	length := []time.Duration{time.Minute, 20 * time.Minute, 3 * time.Hour, 12 * time.Hour}[r.Intn(4)]
	to := min(from+length.Milliseconds(), w.base.UnixMilli()+warmHours*3_600_000)
	skip := []float64{0, 0.1, 0.95}[r.Intn(3)]
	share := []float64{1, 0.5, 0.1}[r.Intn(3)]
	for _, name := range []string{"latency", "load", "requests_total"} {
		for i := range 6 {
			if r.Float64() > share {
				continue
			}
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", name, "i", fmt.Sprint(i), "job", fmt.Sprint(i%3))}
			v := float64(r.Intn(1000))
			for ts := from - from%60_000 + int64(i)*1000; ts < to; ts += 60_000 {
				if v += float64(r.Intn(9)); r.Intn(300) == 0 {
					v = 0
				}
				switch {
				case r.Float64() < skip:
				case name == "latency":
					s.Histograms.T, s.Histograms.H = append(s.Histograms.T, ts), append(s.Histograms.H, tsdbutil.GenerateTestHistogram(int64(v)))
				case r.Intn(200) == 0:
					s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, math.Float64frombits(value.StaleNaN))
				default:
					s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, v)
				}
			}
			if len(s.Floats.T)+len(s.Histograms.T) > 0 {
				out = append(out, s)
			}
		}
	}
	w.did("samples of %d series from %d to %d min", len(out), (from-w.base.UnixMilli())/60_000, (to-w.base.UnixMilli())/60_000)
	return out
}

func (w *warmWorld) ship() {
	var ss []gatewaytest.Sample
	for _, s := range w.series() {
		for i, ts := range s.Floats.T {
			ss = append(ss, gatewaytest.Sample{Labels: s.Labels, T: ts, V: s.Floats.V[i]})
		}
		for i, ts := range s.Histograms.T {
			ss = append(ss, gatewaytest.Sample{Labels: s.Labels, T: ts, H: s.Histograms.H[i]})
		}
	}
	for part := range slices.Chunk(ss, 10_000) {
		require.NoError(w.t, w.send.Send(w.t.Context(), part...))
	}
	w.did("  shipped")
}

// importBlock publishes a block that no head has had.
func (w *warmWorld) importBlock() {
	all := w.series()
	if len(all) == 0 {
		return
	}
	id, err := w.c.Import(w.t.Context(), gateway.DefaultTenant, chunkfmt.WriterOptions{Rollups: w.rnd.Intn(4) > 0}, all...)
	require.NoError(w.t, err)
	w.did("  imported as %s", id)
}

func (w *warmWorld) flush() {
	require.NoError(w.t, w.c.Flush(w.t.Context()))
	w.did("flushed")
}

func (w *warmWorld) settle() {
	w.flush()
	time.Sleep(warmDelay + 1100*time.Millisecond) // heads look each second
	w.did("settled")
}

func (w *warmWorld) compact() {
	for range 1 + w.rnd.Intn(5) {
		if _, err := w.compactor.Round(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		time.Sleep(60 * time.Millisecond)
	}
	w.did("compacted")
}

func (w *warmWorld) delete() {
	from := w.base.Add(time.Duration(w.rnd.Int63n(warmHours * int64(time.Hour)))).UnixMilli()
	to := from + w.rnd.Int63n(6*3_600_000)
	var ms []*labels.Matcher
	if w.rnd.Intn(3) > 0 {
		ms = append(ms, labels.MustNewMatcher(labels.MatchEqual, "__name__", []string{"requests_total", "load", "latency"}[w.rnd.Intn(3)]))
	}
	if w.rnd.Intn(2) == 0 {
		ms = append(ms, labels.MustNewMatcher(labels.MatchRegexp, "i", []string{"1|2", "[3-5]", "0"}[w.rnd.Intn(3)]))
	}
	id, err := w.all.history.Delete(w.t.Context(), gateway.DefaultTenant, from, to, ms...)
	require.NoError(w.t, err)
	if w.rnd.Intn(3) == 0 {
		require.NoError(w.t, w.all.history.Clean(w.t.Context(), gateway.DefaultTenant))
	}
	w.did("deleted %v from %d to %d min: %s", ms, (from-w.base.UnixMilli())/60_000, (to-w.base.UnixMilli())/60_000, id)
}

func (w *warmWorld) cancel() {
	ds, err := w.all.history.Deletions(w.t.Context(), gateway.DefaultTenant)
	require.NoError(w.t, err)
	if len(ds) > 0 {
		id := ds[w.rnd.Intn(len(ds))].ID
		require.NoError(w.t, w.all.history.Cancel(w.t.Context(), gateway.DefaultTenant, id))
		w.did("cancelled %s", id)
	}
}

func (w *warmWorld) retain() {
	if w.forever {
		return
	}
	r := history.Retention{}
	if w.rnd.Intn(3) > 0 {
		r.Raw = time.Since(w.base.Add(time.Duration(w.rnd.Intn(warmHours*60)) * time.Minute))
		if w.rnd.Intn(2) == 0 {
			r.Long = r.Raw + time.Duration(w.rnd.Intn(100))*time.Hour
		}
		if w.rnd.Intn(2) == 0 {
			r.Short = r.Raw + time.Duration(w.rnd.Intn(10))*time.Hour
		}
	}
	w.retentions.Store(&history.Retentions{Default: r})
	w.did("retention %+v", r)
}

func (w *warmWorld) memcached() {
	mode := []testenv.Toxin{testenv.Damage, testenv.Cut, testenv.Pure, testenv.Pure}[w.rnd.Intn(4)]
	w.toxic.Set(mode)
	w.did("memcached: %v", mode)
}

// act does one thing.
func (w *warmWorld) act() {
	for _, a := range []struct {
		weight int
		do     func()
	}{
		{8, w.ship}, {4, w.importBlock}, {4, w.flush}, {6, w.settle}, {6, w.compact}, {3, w.delete}, {2, w.cancel}, {2, w.retain}, {1, w.memcached},
	} {
		if x := w.rnd.Intn(60); x < a.weight {
			a.do()
			return
		}
	}
}

// warmExprs are queries that come again and again.
var warmExprs = []string{
	"sum by (job) (rate(requests_total[10m]))", "requests_total", "latency", "load offset 20m * 2", "requests_total", "rate(load[10m])", "1 + sum by (job) (increase(load[10m]))", "sum(load)", "max_over_time(load[1h])", "avg by (job) (load offset 20m)",
	"sum(increase(requests_total[1h] offset -30m))", "sum by (job) (rate(requests_total[1h]))", "quantile(0.5, avg_over_time(load[2h]))", "topk(2, max_over_time(load[1h]))", "topk(2, load)", "quantile(0.5, load)", "count_over_time(load[7m13s])", "rate(load[5m])",
	"max_over_time(sum(rate(requests_total[5m]))[1h:5m])", "avg_over_time(load[30m]) - avg_over_time(load[30m] offset 1h)",
	"sum(rate(requests_total[10m])) / sum(rate(requests_total[10m] @ end()))", "max_over_time(load[1h:7m] offset 10m)", "absent_over_time(load{i=\"2\"}[10m])",
	"histogram_quantile(0.9, sum by (job) (rate(latency[10m])))", "histogram_count(rate(latency[10m]))", "sum(latency)",
	"last_over_time(load{job!=\"1\"}[20m])", "count by (job) (load > 100)", "stddev_over_time(load[1h])", "limitk(2, requests_total)", "irate(requests_total[5m])",
	"sum_over_time(max_over_time(load[20m] @ start())[1h:10m])", "predict_linear(load[30m], 10m)", "predict_linear(load[30m], 1s5ms)", "predict_linear(load[30m], 1s4ms)",
	"min by (i) (min_over_time(load[2h]))", "sum(rate(requests_total[1h15s]))", "avg by (job) (avg_over_time(load[1h]))", "sum(load or vector(0))", "group({__name__=~\"load|requests_total\"})", "sum(rate({__name__=~\"load|requests_total\"}[10m]))",
}

// alike takes out of a result warnings of times of which there are only summaries, which are about blocks beside the samples that
// are needed, too.
func alike(r *promql.Result) *promql.Result {
	var out annotations.Annotations
	for text, err := range r.Warnings {
		if !strings.Contains(text, "past their retention") {
			out.Add(err)
		}
	}
	r.Warnings = out
	return r
}

// ask asks all gateways the same.
func (w *warmWorld) ask(gs []*warmGateway) {
	r := w.rnd
	expr := warmExprs[w.pool[r.Intn(len(w.pool))]]
	variant := r.Intn(len(warmVariants))
	step := []time.Duration{time.Minute, 10 * time.Minute, 10 * time.Minute, 10 * time.Minute, 10 * time.Minute, time.Hour, 7*time.Minute + 13*time.Second + 7*time.Millisecond}[r.Intn(7)]
	if strings.Contains(expr, "h]") && r.Intn(3) > 0 {
		step = time.Hour // summaries answer it
	}
	start := w.base.Add(time.Duration(r.Int63n(warmHours * int64(time.Hour)))).Truncate(step)
	if r.Intn(5) == 0 {
		start = start.Add(1234 * time.Millisecond)
	}
	steps := 1 + r.Intn(300)
	if r.Intn(2) == 0 {
		start, steps = w.base.Truncate(step), int(warmHours*time.Hour/step)
	}
	end := start.Add(time.Duration(min(steps, 500)) * step)
	instant := r.Intn(6) == 0
	run := func(e promql.QueryEngine, s *merge.Storage) *promql.Result {
		var q promql.Query
		var err error
		opts := promql.NewPrometheusQueryOpts(false, 0, nil)
		if instant {
			q, err = e.NewInstantQuery(w.t.Context(), s, opts, expr, end)
		} else {
			q, err = e.NewRangeQuery(w.t.Context(), s, opts, expr, start, end, step)
		}
		require.NoError(w.t, err)
		defer q.Close()
		ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(w.t.Context(), "", account.Limits{})
		defer done()
		result := detach(q.Exec(ctx))
		if cost := acc.Cost(); s != w.all.storage && cost.Windows > 0 && cost.PartsHere+cost.PartsKept > 1 {
			w.summed++
		}
		return result
	}
	for _, k := range r.Perm(len(gs)) {
		g := gs[k]
		ok, diff := false, ""
		for try := range 4 {
			want := run(w.all.cold[variant], w.all.storage)
			got := run(g.warm[variant], g.storage)
			if diff = differ(alike(want), alike(got)); diff == "" {
				ok = true
				break
			}
			if errors.Is(got.Err, object.ErrNotExist) || errors.Is(want.Err, object.ErrNotExist) {
				w.did("object gone")
				time.Sleep(warmDelay)
				continue
			}
			if g.name == "fresh" && try == 1 {
				break // try 0 may have been at the turn of a minute
			}
			if g.name != "fresh" {
				time.Sleep([]time.Duration{warmDelay, 2 * time.Second, 2 * time.Second, 0}[try]) // it doesn't know yet
			}
		}
		for _, m := range g.kept {
			m.Idle(w.t)
		}
		if !ok {
			for _, l := range w.log {
				w.t.Log(l)
			}
			w.t.Fatalf("%s, variant %d: %s from %d to %d min by %s (instant %t): %s", g.name, variant, expr,
				start.Sub(w.base)/time.Minute, end.Sub(w.base)/time.Minute, step, instant, diff)
		}
	}
}

func runWarm(t *testing.T, seed int64) {
	w := &warmWorld{t: t, rnd: rand.New(rand.NewSource(seed)), base: time.Now().Add(-(warmHours + 6) * time.Hour).Truncate(time.Hour)}
	w.forever = w.rnd.Intn(2) == 0
	w.pool = w.rnd.Perm(len(warmExprs))[:6]
	w.retentions.Store(&history.Retentions{})
	w.c = gatewaytest.New(t, gatewaytest.Options{Ingesters: 2, VisibilityDelay: warmDelay, Run: true, Retentions: w.retentions.Load})
	w.send = w.c.Shipper(gateway.DefaultTenant)
	var err error
	w.compactor, err = compact.New(compact.Options{
		Objects: w.c.Objects, Index: w.c.Index, Dir: t.TempDir(), Grace: 150 * time.Millisecond, MaxSources: 4, CleanAge: 40 * time.Millisecond,
		Ranges: []time.Duration{2 * time.Hour, 24 * time.Hour}, Retentions: w.retentions.Load,
	})
	require.NoError(t, err)
	addr, _ := testenv.Memcached(t)
	w.toxic = testenv.StartToxic(t, addr)
	w.all = w.gateway("all", 0, "", false)
	gs := []*warmGateway{w.gateway("fresh", 0, w.toxic.Addr, false), w.gateway("other", warmDelay, w.toxic.Addr, true)}
	for range 4 {
		w.ship()
	}
	w.settle()
	for range *warmSteps {
		w.act()
		for range 6 {
			w.ask(gs)
		}
	}
	t.Logf("%d answers had parts of summaries", w.summed)
	for _, g := range gs {
		ms, err := g.reg.Gather()
		require.NoError(t, err)
		for _, m := range ms {
			if m.GetName() == "epimetheus_gateway_query_parts_total" {
				for _, x := range m.GetMetric() {
					t.Logf("%s: %s %v", g.name, x.GetLabel()[0].GetValue(), x.GetCounter().GetValue())
				}
			}
		}
	}
}

// TestNearlySame: results are told apart by all that differs in queries, also where their text is the same once they have been
// parsed, and by the options of engines.
func TestNearlySame(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	dataset(t, rand.New(rand.NewSource(1)), gatewaytest.NewShipped(c, gatewaytest.Splits[0], true), 4)
	old := summarised(t, c).Storage // most is in blocks alone
	results, err := plan.NewResults(64<<20, nil, prometheus.NewRegistry())
	require.NoError(t, err)
	for bits := range 8 {
		o := suiteOptions
		o.MaxSamples, o.LookbackDelta = 50_000_000, time.Duration(5-bits%3)*time.Minute
		o.EnableDelayedNameRemoval, o.UseStartTimestamps, o.EnableTypeAndUnitLabels = bits&1 != 0, bits&2 != 0, bits&4 != 0
		engine := promqltest.NewTestEngineWithOpts(t, o)
		planned := plan.New(engine, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
		for _, expr := range []string{
			"predict_linear(requests_total[10m], 1s4ms)", "predict_linear(requests_total[10m], 1s5ms)", "predict_linear(requests_total[10m], 1.0041)",
			"quantile(58ms, temperature)", "quantile(0.058, temperature)", "quantile(0.0581, temperature)", "topk(1, temperature)", "topk(1s1ms, temperature)", "topk(2s, temperature)",
			"rate(requests_total[5m])", "sum by (__name__, job) (rate(requests_total[5m]))", "sum by (__name__) (requests_total)",
			`label_replace(sum by (__name__, job) (rate(requests_total[5m])), "was", "$1", "__name__", "(.*)")`, "max(requests_total)", "max(requests_total offset 1m)",
			"max(requests_total offset 1001ms)", "max_over_time(requests_total[1001ms])", "max_over_time(requests_total[1s])", "histogram_count(sum(rate(sizes[5m])))",
			"histogram_quantile(0.9, sum(rate(sizes[5m])))", "sum(rate(sizes[5m]))", "sum by (job) (temperature)", "sum without (job) (temperature)", "max by () (temperature)",
		} {
			for _, step := range []time.Duration{time.Minute, 61 * time.Second} {
				run := func(e promql.QueryEngine) *promql.Result {
					q, err := e.NewRangeQuery(t.Context(), old, nil, expr, time.Unix(0, 0), time.Unix(2*3600, 0), step)
					require.NoError(t, err)
					defer q.Close()
					return detach(q.Exec(t.Context()))
				}
				if diff := differ(run(engine), run(planned)); diff != "" {
					t.Errorf("options %d: %s by %s: %s", bits, expr, step, diff)
				}
			}
		}
	}
}

// TestOtherBlocks: what was read of other blocks than those that a gateway has listed, since these are gone, isn't kept
// as a result of those.
func TestOtherBlocks(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{Run: true})
	w := &warmWorld{t: t, rnd: rand.New(rand.NewSource(1)), c: c, forever: true}
	publish := func(from, to time.Duration) {
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "load")}
		for at := from; at < to; at += time.Minute {
			s.Floats.T, s.Floats.V = append(s.Floats.T, at.Milliseconds()), append(s.Floats.V, at.Seconds())
		}
		_, err := c.Import(t.Context(), gateway.DefaultTenant, chunkfmt.WriterOptions{}, s)
		require.NoError(t, err)
	}
	var err error
	w.compactor, err = compact.New(compact.Options{
		Objects: c.Objects, Index: c.Index, Dir: t.TempDir(), Grace: 20 * time.Millisecond, MaxSources: 2, Ranges: []time.Duration{24 * time.Hour},
	})
	require.NoError(t, err)
	h, err := history.New(history.Options{Objects: c.Objects, Index: c.Index, VisibilityDelay: time.Hour, PageCacheBytes: -1})
	require.NoError(t, err)
	storage := merge.New(w.heads(), h, tenantOf)
	results := func() *plan.Results {
		r, err := plan.NewResults(2<<20, nil, prometheus.NewRegistry())
		require.NoError(t, err)
		return r
	}
	alone, _ := w.engines(plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results()}))
	others, _ := w.engines(plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results()}))
	spread := plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results()})
	var atWorkers account.Cost
	var mu sync.Mutex
	spread.Workers = gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) {
		b, err := others[0].Work(ctx, h, task)
		mu.Lock()
		defer mu.Unlock()
		atWorkers.PartsKept += account.From(ctx).Cost().PartsKept
		atWorkers.PartsHere += account.From(ctx).Cost().PartsHere
		return b, err
	})
	with, _ := w.engines(spread)
	run := func(e *plan.Engine, expr string) account.Cost {
		ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
		defer done()
		q, err := e.NewRangeQuery(ctx, storage, nil, expr, time.Unix(0, 0), time.Unix(10*3600, 0), 5*time.Minute)
		require.NoError(t, err)
		defer q.Close()
		require.NoError(t, q.Exec(ctx).Err)
		return acc.Cost()
	}
	publish(0, 5*time.Hour)
	publish(5*time.Hour, 10*time.Hour)
	run(alone[0], "count(load)") // now the blocks are listed
	listed, err := c.Index.AllBlocks(t.Context(), gateway.DefaultTenant)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := w.compactor.Round(t.Context())
		require.NoError(t, err)
		_, err = c.Objects.Size(t.Context(), listed[0].Object)
		return errors.Is(err, object.ErrNotExist)
	}, time.Minute, 20*time.Millisecond)
	publish(2*time.Hour, 3*time.Hour) // late samples
	for range 2 {
		cost := run(alone[0], "sum(load)")
		require.Zero(t, cost.PartsKept)
		require.Positive(t, cost.PartsHere)
		run(with[0], "sum(load)")
	}
	require.Positive(t, atWorkers.PartsHere)
	require.Zero(t, atWorkers.PartsKept)
}

// TestKeptInfos: the info that a metric may not be a counter doesn't keep results from being kept. It is there where it would
// be without, at its place in each query.
func TestKeptInfos(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	dataset(t, rand.New(rand.NewSource(1)), gatewaytest.NewShipped(c, gatewaytest.Splits[0], true), 8)
	c = summarised(t, c) // most is in blocks alone
	results, err := plan.NewResults(16<<20, nil, prometheus.NewRegistry())
	require.NoError(t, err)
	o := suiteOptions
	o.MaxSamples = 50_000_000
	engine := promqltest.NewTestEngineWithOpts(t, o)
	planned := plan.New(engine, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
	others := plan.New(engine, o, plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
	with := plan.Tight(plan.Spread{TenantOf: tenantOf})
	with.Workers = gateways(t, 2, func(ctx context.Context, task *plan.Task) ([]byte, error) { return others.Work(ctx, c.History, task) })
	for _, e := range []*plan.Engine{planned, plan.New(engine, o, with)} {
		kept := int64(0)
		for _, expr := range []string{
			"sum(rate(temperature[10m]))", "  sum( rate(temperature[10m]) ) / 2", "1 + sum(rate(temperature[10m]))", "rate(temperature[10m])", "   rate(temperature[10m])",
			"count(rate(temperature[10m]))", "count(rate(mixed[10m]))", "sum(rate(mixed[10m]))", "rate(mixed[10m])", "-rate(mixed[10m])", "max(rate(mixed[10m]))", "rate(latency[10m])",
			"topk(2, rate(mixed[10m]))", "abs(topk(2, rate(mixed[10m])))", "quantile(0.5, increase(mixed[2m]))", "1 * quantile(0.5, increase(mixed[2m]))",
		} {
			for _, hours := range [][2]int64{{0, 3}, {1, 2}, {0, 4}} {
				run := func(e promql.QueryEngine) (*promql.Result, int64) {
					ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
					defer done()
					q, err := e.NewRangeQuery(ctx, c.Storage, nil, expr, time.Unix(hours[0]*3600, 0), time.Unix(hours[1]*3600, 0), time.Minute)
					require.NoError(t, err)
					defer q.Close()
					return detach(q.Exec(ctx)), acc.Cost().PartsKept
				}
				want, _ := run(engine)
				got, n := run(e)
				if diff := differ(want, got); diff != "" {
					t.Errorf("%s, %v: %s", expr, hours, diff)
				}
				if w := strings.Join(where(got, expr), "\n"); w != strings.Join(where(want, expr), "\n") {
					t.Errorf("%s: %s, want %s", expr, w, where(want, expr))
				}
				if strings.Contains(expr, "temperature") && !strings.Contains(expr, "count") {
					kept += n
				}
			}
		}
		require.Greater(t, kept, int64(300))
	}
}

// where are the annotations of a result, with their places.
func where(r *promql.Result, expr string) []string {
	ws, infos := r.Warnings.AsStrings(expr, 0, 0)
	out := slices.Concat(ws, infos)
	slices.Sort(out)
	return out
}

// TestKeptWarns: what is kept is used while an ingester is out of reach, and the answer warns as it would without.
func TestKeptWarns(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	w := &warmWorld{t: t, rnd: rand.New(rand.NewSource(1)), c: c, forever: true, base: time.Unix(0, 0)}
	for range 5 {
		w.importBlock()
	}
	results, err := plan.NewResults(2<<20, nil, prometheus.NewRegistry())
	require.NoError(t, err)
	planned, cold := w.engines(plan.Tight(plan.Spread{TenantOf: tenantOf, Results: results}))
	run := func(e promql.QueryEngine, s *merge.Storage) (*promql.Result, account.Cost) {
		ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "", account.Limits{})
		defer done()
		q, err := e.NewRangeQuery(ctx, s, nil, "sum by (job) (rate(requests_total[10m]))", time.Unix(0, 0), time.Unix(warmHours*3600, 0), 10*time.Minute)
		require.NoError(t, err)
		defer q.Close()
		return detach(q.Exec(ctx)), acc.Cost()
	}
	well := merge.New(w.heads(), c.History, tenantOf)
	want, _ := run(cold[0], well)
	got, cost := run(planned[0], well)
	require.Empty(t, differ(want, got))
	require.Empty(t, got.Warnings)
	require.Positive(t, cost.PartsHere)

	c.Serve("gone", ring.Lost, nil)
	ill := merge.New(w.heads(), c.History, tenantOf)
	want, _ = run(cold[0], ill)
	require.Len(t, want.Warnings, 1)
	got, again := run(planned[0], ill)
	require.Empty(t, differ(want, got))
	require.Equal(t, cost.PartsHere, again.PartsKept)
	require.Zero(t, again.PartsHere)
}

// TestKeptByTenant: blocks have several tenants, and what is kept of them is of one.
func TestKeptByTenant(t *testing.T) {
	c := gatewaytest.New(t, gatewaytest.Options{})
	var buf bytes.Buffer
	wr := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
	for i, tenant := range []string{"a", "b"} {
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "load")}
		for at := time.Duration(0); at < 10*time.Hour; at += time.Minute {
			s.Floats.T, s.Floats.V = append(s.Floats.T, at.Milliseconds()), append(s.Floats.V, float64(i))
		}
		require.NoError(t, wr.Add(tenant, s))
	}
	sum, err := wr.Close()
	require.NoError(t, err)
	require.NoError(t, c.History.Publish(t.Context(), ulid.Make(), buf.Bytes(), sum))
	results, err := plan.NewResults(2<<20, nil, prometheus.NewRegistry())
	require.NoError(t, err)
	e := plan.New(promqltest.NewTestEngineWithOpts(t, suiteOptions), suiteOptions, plan.Tight(plan.Spread{TenantOf: gateway.TenantOf, Results: results}))
	for range 2 {
		for i, tenant := range []string{"a", "b"} {
			q, err := e.NewRangeQuery(gateway.WithTenant(t.Context(), tenant), c.Storage, nil, "sum(load)", time.Unix(0, 0), time.Unix(9*3600, 0), 10*time.Minute)
			require.NoError(t, err)
			m, err := q.Exec(gateway.WithTenant(t.Context(), tenant)).Matrix()
			require.NoError(t, err)
			require.Len(t, m, 1)
			for _, p := range m[0].Floats {
				require.InDelta(t, i, p.F, 0)
			}
			q.Close()
		}
	}
}

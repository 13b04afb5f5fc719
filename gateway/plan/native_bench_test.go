package plan_test

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"math"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

var nativeSeries = flag.Int("bench.native", 200, "series of native histograms of BenchmarkNative, a day long")

// nativeSample is a histogram at a time.
type nativeSample struct {
	t int64
	h *histogram.Histogram
}

func (s nativeSample) ST() int64                     { return 0 }
func (s nativeSample) T() int64                      { return s.t }
func (s nativeSample) F() float64                    { return 0 }
func (s nativeSample) H() *histogram.Histogram       { return s.h }
func (s nativeSample) FH() *histogram.FloatHistogram { return nil }
func (s nativeSample) Type() chunkenc.ValueType      { return chunkenc.ValHistogram }
func (s nativeSample) Copy() chunks.Sample           { return nativeSample{s.t, s.h.Copy()} }

// nativeFeed observes durations as a service does: its buckets become more with time, and
// all are lost when it restarts.
type nativeFeed struct {
	labels labels.Labels
	rnd    *rand.Rand
	custom []float64 // nil: exponential
	counts []int64   // of the buckets
	sum    float64
	t      int64
}

const (
	nativeInterval = 15_000
	nativeFirst    = -20 // index of the first bucket of counts
)

func (f *nativeFeed) next() nativeSample {
	if f.rnd.Intn(2000) == 0 {
		clear(f.counts)
		f.sum = 0
	}
	for range 5 + f.rnd.Intn(40) {
		k := min(max(int(10+6*f.rnd.NormFloat64()), 0), len(f.counts)-1)
		if f.rnd.Intn(400) == 0 {
			k = f.rnd.Intn(len(f.counts))
		}
		f.counts[k]++
		f.sum += math.Exp2(float64(nativeFirst+k) / 8)
	}
	h := &histogram.Histogram{Schema: 3, ZeroThreshold: 2.938735877055719e-39, Sum: f.sum}
	first := nativeFirst
	if f.custom != nil {
		first, h.Schema, h.ZeroThreshold, h.CustomValues = 0, histogram.CustomBucketsSchema, 0, f.custom
	}
	end, last := 0, int64(0)
	for k, n := range f.counts {
		if h.Count += uint64(n); n == 0 {
			continue
		}
		if at := first + k; len(h.PositiveSpans) > 0 && at == end {
			h.PositiveSpans[len(h.PositiveSpans)-1].Length++
		} else {
			h.PositiveSpans = append(h.PositiveSpans, histogram.Span{Offset: int32(at - end), Length: 1})
		}
		h.PositiveBuckets = append(h.PositiveBuckets, n-last)
		end, last = first+k+1, n
	}
	s := nativeSample{f.t, h}
	f.t += nativeInterval
	return s
}

// nativeFeeds are those of h, which is exponential, and of c, a tenth of the series, with custom buckets.
func nativeFeeds(n int, start int64) (all []*nativeFeed) {
	bounds := []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}
	for i := range n {
		f := &nativeFeed{rnd: rand.New(rand.NewSource(int64(i))), t: start + int64(i%20)*700, counts: make([]int64, 20+i%41)}
		name := "h"
		if i%10 == 9 {
			name, f.custom, f.counts = "c", bounds, make([]int64, len(bounds)+1)
		}
		f.labels = labels.FromStrings("__name__", name, "instance", fmt.Sprintf("host-%03d", i/4), "job", fmt.Sprint("job-", i/20), "path", fmt.Sprint("/", i%4))
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *nativeFeed) int {
		return cmp.Or(strings.Compare(a.labels.Get("__name__"), b.labels.Get("__name__")), labels.Compare(a.labels, b.labels))
	})
	return all
}

// BenchmarkNative runs queries over native histograms at 15 s of a day, in heads and in a block, as BenchmarkDeep
// does over floats. What is in the block has been in heads before, and has their hints of counter resets.
func BenchmarkNative(b *testing.B) {
	const day = 24 * time.Hour
	start := time.UnixMilli(1_700_006_400_000)
	end := start.Add(day)
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	ours := gatewaytest.New(b, gatewaytest.Options{})
	ship := ours.Shipper(gateway.DefaultTenant)
	opts := tsdb.DefaultOptions()
	opts.RetentionDuration, opts.MinBlockDuration, opts.MaxBlockDuration = 0, 3*day.Milliseconds(), 3*day.Milliseconds()
	blockDir := b.TempDir()
	headDB, err := tsdb.Open(b.TempDir(), promslog.NewNopLogger(), nil, opts, nil)
	must(err)
	headDB.DisableCompactions()
	b.Cleanup(func() { _ = headDB.Close() })
	var old []storage.Series
	for _, f := range nativeFeeds(*nativeSeries, start.UnixMilli()) {
		var theirs []chunks.Sample
		var mine []gatewaytest.Sample
		app := headDB.Appender(b.Context())
		for f.t < end.UnixMilli() {
			s := f.next()
			theirs, mine = append(theirs, s), append(mine, gatewaytest.Sample{Labels: f.labels, T: s.t, H: s.h})
			_, err := app.AppendHistogram(0, f.labels, s.t, s.h, nil)
			must(err)
		}
		must(app.Commit())
		must(ship.Send(b.Context(), mine...))
		old = append(old, storage.NewListSeries(f.labels, theirs))
	}
	_, err = tsdb.CreateBlock(old, blockDir, 3*day.Milliseconds(), promslog.NewNopLogger())
	must(err)
	blockDB, err := tsdb.Open(blockDir, promslog.NewNopLogger(), nil, opts, nil)
	must(err)
	blockDB.DisableCompactions()
	b.Cleanup(func() { _ = blockDB.Close() })

	blocks := gatewaytest.New(b, gatewaytest.Options{})
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Rollups: true})
	q, err := ours.Storage.Querier(math.MinInt64, math.MaxInt64)
	must(err)
	defer q.Close()
	set := q.Select(b.Context(), true, nil, labels.MustNewMatcher(labels.MatchRegexp, "__name__", ".+"))
	for set.Next() {
		cols, err := set.At().(*merge.Series).Columns(&merge.Buffer{})
		must(err)
		s := *cols
		s.Labels = set.At().Labels()
		must(w.Add(gateway.DefaultTenant, &s))
	}
	must(set.Err())
	sum, err := w.Close()
	must(err)
	must(blocks.History.Publish(b.Context(), ulid.Make(), buf.Bytes(), sum))
	b.Logf("a block of %d bytes, Prometheus has %d", buf.Len(), dirBytes(b, blockDir))

	o := suiteOptions
	o.MaxSamples, o.EnableDelayedNameRemoval, o.UseStartTimestamps = 50_000_000, false, false
	o.Parser = parser.NewParser(parser.Options{EnableExperimentalFunctions: true})
	engine := promql.NewEngine(o)
	planned := plan.New(engine, o, plan.Spread{})
	for _, q := range []struct {
		name, expr string
		span, step time.Duration
	}{
		{"p99-by-job-1d", `histogram_quantile(0.99, sum by (job) (rate(h[5m])))`, day, time.Minute},
		{"p99-by-job-1d-10m", `histogram_quantile(0.99, sum by (job) (rate(h[5m])))`, day, 10 * time.Minute},
		{"p99-custom-1d", `histogram_quantile(0.99, sum by (job) (rate(c[5m])))`, day, time.Minute},
		{"increase-1h-1d", `sum(increase(h[1h]))`, day, 10 * time.Minute},
		{"count-1d", `histogram_count(sum(rate(h[5m])))`, day, time.Minute},
		{"avg-by-job-1d", `histogram_avg(sum by (job) (rate(h[5m])))`, day, time.Minute},
		{"raw-1series-1d", `h{instance="host-007",path="/1"}`, day, time.Minute},
		{"sum-1d", `sum by (job) (h)`, day, 5 * time.Minute},
		{"avg-1d", `avg(h)`, day, 5 * time.Minute},
		{"rate-1job-1d", `rate(h{job="job-3"}[5m])`, day, 5 * time.Minute},
		{"fraction-1d", `histogram_fraction(0, 0.5, sum(rate(h[5m])))`, day, 5 * time.Minute},
		{"sum-over-time-1d", `sum(sum_over_time(h[10m]))`, day, 10 * time.Minute},
		{"count-over-time-1d", `sum(count_over_time(h[10m]))`, day, 10 * time.Minute},
		{"count-1h", `sum(histogram_count(rate(h[5m])))`, time.Hour, 15 * time.Second},
		{"p99-1h", `histogram_quantile(0.99, sum(rate(h[5m])))`, time.Hour, 15 * time.Second},
		{"inst-rate", `sum(rate(h[5m]))`, 0, 0},
		{"inst-count-all", `histogram_count(sum(increase(h[1d])))`, 0, 0},
		{"inst-increase-all", `sum by (job) (increase(h[1d]))`, 0, 0},
		{"count-values-1h", `count_values("n", histogram_count(h))`, time.Hour, time.Minute},
		{"limitk-1d", `limitk(5, rate(h[5m]))`, day, 5 * time.Minute},
	} {
		for _, of := range []struct {
			name   string
			theirs storage.Queryable
			mine   storage.Queryable
		}{{"block", blockDB, blocks.Storage}, {"head", headDB, ours.Storage}} {
			results := map[string]*promql.Result{}
			for _, by := range []struct {
				name   string
				engine promql.QueryEngine
				data   storage.Queryable
			}{{"prometheus", engine, of.theirs}, {"engine", engine, of.mine}, {"epimetheus", planned, of.mine}} {
				b.Run("q="+q.name+"/of="+of.name+"/by="+by.name, func(b *testing.B) {
					results[by.name] = timed(b, by.engine, by.data, q.expr, q.span, q.step, end)
				})
			}
			if want, got := results["prometheus"], results["epimetheus"]; want != nil && got != nil {
				sortVector(want)
				sortVector(got)
				withoutHints(want, got)
				if d := differ(want, got); d != "" {
					b.Errorf("%s of a %s: %s", q.name, of.name, d)
				}
			}
		}
	}
}

// withoutHints takes off what depends on where chunks begin.
func withoutHints(rs ...*promql.Result) {
	for _, r := range rs {
		switch v := r.Value.(type) {
		case promql.Matrix:
			for i := range v {
				for _, p := range v[i].Histograms {
					p.H.CounterResetHint = histogram.UnknownCounterReset
				}
			}
		case promql.Vector:
			for i := range v {
				if v[i].H != nil {
					v[i].H.CounterResetHint = histogram.UnknownCounterReset
				}
			}
		}
	}
}

// dirBytes is how many bytes the chunks of Prometheus's blocks have.
func dirBytes(b *testing.B, dir string) (n int64) {
	b.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "chunks", "*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			b.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

package rollup

import (
	"context"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

var queries = flag.Int("rollup.n", 300, "random queries to compare with Prometheus's engine, of each function")

// oneSeries is a storage of one series.
type oneSeries struct {
	storage.LabelQuerier
	series storage.Series
	given  bool
}

type sample struct {
	t int64
	v float64
}

func (s sample) T() int64                      { return s.t }
func (s sample) ST() int64                     { return 0 }
func (s sample) F() float64                    { return s.v }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }

func newOneSeries(f *Samples) *oneSeries {
	var ss []chunks.Sample
	for i, t := range f.T {
		ss = append(ss, sample{t, f.V[i]})
	}
	return &oneSeries{series: storage.NewListSeries(labels.FromStrings("__name__", "x_total"), ss)}
}

func (o *oneSeries) Querier(int64, int64) (storage.Querier, error) { return o, nil }
func (o *oneSeries) Select(context.Context, bool, *storage.SelectHints, ...*labels.Matcher) storage.SeriesSet {
	o.given = false
	return o
}

func (o *oneSeries) Next() bool {
	was := o.given
	o.given = true
	return !was
}
func (o *oneSeries) At() storage.Series                { return o.series }
func (o *oneSeries) Err() error                        { return nil }
func (o *oneSeries) Warnings() annotations.Annotations { return nil }
func (o *oneSeries) Close() error                      { return nil }

// randomQuery for a series.
func randomQuery(r *rand.Rand, fn string, width int64, f *Samples) Query {
	q := Query{Function: fn, Step: width * (1 + r.Int64N(3)), Range: width * (1 + r.Int64N(4))}
	switch r.IntN(6) {
	case 0:
		q.Range = width * (5 + r.Int64N(20))
		q.Step = width
	case 1, 2: // sticks out by a few scrapes
		q.Range += []int64{1000, 15000, 15000, 30000, 60000, 120000}[r.IntN(6)]
	case 3:
		if functions[fn].tail {
			q.Range = []int64{1, 15000, 60000, 300000, 1000000, 7200000}[r.IntN(6)]
		}
	}
	first, last := f.T[0], f.T[len(f.T)-1]
	q.Start = EndOf(first, width) + width*(r.Int64N(4)-2)
	q.Steps = max(1, 1+min(200, int((last-q.Start+q.Range)/q.Step)+r.IntN(4)))
	return q
}

func (q *Query) String() string {
	if q.Function == "" {
		return fmt.Sprintf("x, looking back %d, at %d steps of %d from %d", q.Range, q.Steps, q.Step, q.Start)
	}
	return fmt.Sprintf("%s(x[%dms]) at %d steps of %d from %d", q.Function, q.Range, q.Steps, q.Step, q.Start)
}

// TestAgainstEngine compares random queries of random series with Prometheus's engine
// on the samples.
func TestAgainstEngine(t *testing.T) {
	t.Parallel()
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e8, Timeout: time.Minute, Parser: parser.NewParser(parser.Options{})})
	var names []string
	for fn := range functions {
		names = append(names, fn)
	}
	sort.Strings(names)
	var summariser Summariser
	for k, fn := range names {
		r := rand.New(rand.NewPCG(7, uint64(k)))
		points, raw := 0, 0
		worst := 0.
		for range *queries {
			s := randomSeries(r)
			width := []int64{Short, Long}[r.IntN(2)]
			if functions[fn].long {
				width = Long
			}
			q := randomQuery(r, fn, width, s)
			var short, w Windows
			summariser.Summarise(&short, s, Short)
			if width == Long && r.IntN(2) == 0 {
				Widen(&w, &short, Long)
			} else {
				summariser.Summarise(&w, s, width)
			}
			e, ok := NewEvaluator(q, width)
			if !ok {
				t.Fatalf("%s isn't covered", q.String())
			}
			var only Windows
			columns := e.Columns() // what was asked for, or more
			if r.IntN(2) == 0 {
				columns = w.Columns()
			}
			only.Append(&w, 0, w.Len(), columns)
			var got Result
			e.Eval(&only, &got)
			want := ask(t, engine, newOneSeries(s), &q)
			off, err := compare(&q, s, want, &got)
			if err != nil {
				t.Fatalf("%s with windows of %d: %v", q.String(), width, err)
			}
			if !functions[fn].tail {
				checkSamples(t, e, &q, s, &got)
			}
			worst = max(worst, off)
			points += len(got.Step)
			raw += len(got.Raw)
		}
		t.Logf("%-20s %8d points, %6d need samples, off by %.3g at most", fn, points, raw, worst)
		if points < 3**queries || raw*2 > points {
			t.Errorf("%s: %d points and %d that need the samples: not much of a test", fn, points, raw)
		}
	}
}

// checkSamples compares what an evaluator counts with the samples.
func checkSamples(t *testing.T, e *Evaluator, q *Query, s *Samples, got *Result) {
	t.Helper()
	window, read := make([]int64, q.Steps), make([]int64, q.Steps)
	e.Samples(window, read)
	raw := map[int32]bool{}
	for _, i := range got.Raw {
		raw[i] = true
	}
	for i := range q.Steps {
		end := q.Start + int64(i)*q.Step
		all, fresh := int64(0), int64(0)
		for k, at := range s.T {
			if at > end-q.Range && at <= end && !value.IsStaleNaN(s.V[k]) {
				all++
				if at > end-q.Step {
					fresh++
				}
			}
		}
		if raw[int32(i)] {
			all, fresh = 0, 0
		}
		if window[i] != all || read[i] != fresh {
			t.Fatalf("%s: step %d counts %d samples, %d of them fresh, want %d and %d", q.String(), i, window[i], read[i], all, fresh)
		}
	}
}

// ask the engine: a value for each step that has one.
func ask(t *testing.T, engine *promql.Engine, s *oneSeries, q *Query) map[int32]float64 {
	t.Helper()
	expr, lookback := "x_total", time.Duration(q.Range)*time.Millisecond
	if q.Function != "" {
		expr, lookback = fmt.Sprintf("%s(x_total[%dms])", q.Function, q.Range), 0
	}
	if q.Function == "absent_over_time" {
		expr = strings.ReplaceAll(expr, "absent", "present")
	}
	end := q.Start + int64(q.Steps-1)*q.Step
	query, err := engine.NewRangeQuery(t.Context(), s, promql.NewPrometheusQueryOpts(false, lookback, nil), expr,
		time.UnixMilli(q.Start), time.UnixMilli(end), time.Duration(q.Step)*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer query.Close()
	res := query.Exec(t.Context())
	m, err := res.Matrix()
	if err != nil {
		t.Fatalf("%s: %v", expr, err)
	}
	out := map[int32]float64{}
	for _, series := range m {
		for _, p := range series.Floats {
			out[int32((p.T-q.Start)/q.Step)] = p.F
		}
	}
	return out
}

// compare gives by how much a value is off at most, in parts of what it may be
// off by to be right up to rounding.
func compare(q *Query, f *Samples, want map[int32]float64, got *Result) (worst float64, err error) {
	seen := map[int32]bool{}
	for _, i := range got.Raw {
		seen[i] = true
	}
	for k, i := range got.Step {
		if seen[i] {
			return 0, fmt.Errorf("step %d is there twice", i)
		}
		seen[i] = true
		x, ok := want[i]
		if !ok {
			return 0, fmt.Errorf("step %d is %v, want none", i, got.Value[k])
		}
		off, ok := off(q, f, q.Start+int64(i)*q.Step, x, got.Value[k])
		if !ok {
			return 0, fmt.Errorf("step %d is %v, want %v", i, got.Value[k], x)
		}
		worst = max(worst, off)
	}
	for i, x := range want {
		if !seen[i] {
			return 0, fmt.Errorf("step %d isn't there, want %v", i, x)
		}
	}
	return worst, nil
}

// off compares a value with the engine's.
func off(q *Query, f *Samples, t int64, want, got float64) (off float64, ok bool) {
	if math.Float64bits(want) == math.Float64bits(got) {
		return 0, true
	}
	magnitude, greatest, corrected, lost, n := 0., 0., 0., 0., 0.
	resets := 0
	prev := math.NaN()
	for i, x := range f.V {
		if f.T[i] <= t-q.Range || f.T[i] > t || value.IsStaleNaN(x) {
			continue
		}
		if x < prev {
			lost += prev
			resets++
		}
		magnitude += math.Abs(x)
		greatest = max(greatest, math.Abs(x))
		if x-x == 0 {
			corrected = max(corrected, math.Abs(x+lost), math.Abs(lost))
		}
		prev = x
		n++
	}
	const eps = 0x1p-52
	allowed := 0.
	switch q.Function {
	case "sum_over_time":
		allowed = 1e-9 * max(math.Abs(want), magnitude)
	case "avg_over_time":
		allowed = 1e-9 * max(math.Abs(want), magnitude/n)
	case "increase", "rate":
		if resets == 0 {
			return 0, false
		}
		allowed = 1e-9 * corrected
		if q.Function == "rate" {
			allowed /= float64(q.Range) / 1000
		}
	case "stddev_over_time":
		allowed = 1e-9*want + 8*eps*greatest
	case "stdvar_over_time":
		sigma := math.Sqrt(want) + 8*eps*greatest
		allowed = 1e-9*want + 8*eps*greatest*2*sigma
	default:
		return 0, false
	}
	if math.IsNaN(want) && math.IsNaN(got) {
		return 0, true
	}
	off = math.Abs(want-got) / allowed
	return off, off <= 1
}

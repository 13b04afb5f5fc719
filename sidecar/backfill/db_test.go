package backfill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
)

const (
	hour = 3_600_000
	t0   = 1_699_999_200_000 // begins a block
)

// testDB is a Prometheus's storage with the series that the tests read.
type testDB struct {
	t   testing.TB
	dir string
	db  *tsdb.DB
	st  bool
}

func openDB(t testing.TB, st bool, change ...func(*tsdb.Options)) *testDB {
	t.Helper()
	d := &testDB{t: t, dir: t.TempDir(), st: st}
	opts := tsdb.DefaultOptions()
	opts.NoLockfile = true
	opts.OutOfOrderTimeWindow = 24 * hour
	if st {
		opts.EnableSTStorage, opts.EnableHistogramSTEncoding, opts.FloatChunkEncoding = true, true, chunkenc.EncXOR2
	}
	for _, f := range change {
		f(opts)
	}
	var err error
	if d.db, err = tsdb.Open(d.dir, promslog.NewNopLogger(), nil, opts, nil); err != nil {
		t.Fatal(err)
	}
	d.db.DisableCompactions()
	t.Cleanup(func() { d.db.Close() })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write appends one sample a minute to series of all kinds, from and to included.
func (d *testDB) write(from, to int64) {
	d.t.Helper()
	stale := math.Float64frombits(value.StaleNaN)
	app := d.db.AppenderV2(context.Background())
	for t := from; t <= to; t += 60_000 {
		i := (t - t0) / 60_000
		var st int64
		if d.st && i%7 != 0 {
			st = t0 - hour + i/50*1000
		}
		add := func(name string, v float64, h *histogram.Histogram, fh *histogram.FloatHistogram) {
			d.t.Helper()
			_, err := app.Append(0, labels.FromStrings("__name__", name, "job", "test"), st, t, v, h, fh, storage.AppendV2Options{})
			must(d.t, err)
		}
		add("counter", float64(i)*3.25, nil, nil)
		add("sparse_negative_zero", math.Copysign(0, -1), nil, nil)
		if i%11 == 10 {
			add("stale_float", stale, nil, nil)
			add("stale_histogram", 0, &histogram.Histogram{Sum: stale}, nil)
			add("stale_float_histogram", 0, nil, &histogram.FloatHistogram{Sum: stale})
		} else {
			add("stale_float", math.Sqrt(float64(i)), nil, nil)
			add("stale_histogram", 0, tsdbutil.GenerateTestHistogram(i), nil)
			add("stale_float_histogram", 0, nil, tsdbutil.GenerateTestFloatHistogram(i))
		}
		add("histogram", 0, tsdbutil.GenerateTestHistogram(i%90), nil) // with resets
		add("gauge_histogram", 0, tsdbutil.GenerateTestGaugeHistogram(100-i%90), nil)
		add("custom_histogram", 0, tsdbutil.GenerateTestCustomBucketsHistogram(i), nil)
		add("float_histogram", 0, nil, tsdbutil.GenerateTestFloatHistogram(i%90))
		add("custom_float_histogram", 0, nil, tsdbutil.GenerateTestCustomBucketsFloatHistogram(i))
		switch i / 10 % 3 { // a kind after another
		case 0:
			add("mixed", float64(i), nil, nil)
		case 1:
			add("mixed", 0, tsdbutil.GenerateTestHistogram(i), nil)
		default:
			add("mixed", 0, nil, tsdbutil.GenerateTestFloatHistogram(i))
		}
		if t == from+5*60_000 {
			add("single", math.Inf(-1), nil, nil)
		}
	}
	must(d.t, app.Commit())
}

func (d *testDB) float(name string, t int64, v float64) {
	d.t.Helper()
	app := d.db.AppenderV2(context.Background())
	_, err := app.Append(0, labels.FromStrings("__name__", name, "job", "test"), 0, t, v, nil, nil, storage.AppendV2Options{})
	must(d.t, err)
	must(d.t, app.Commit())
}

func (d *testDB) compactHead(mint, maxt int64) {
	d.t.Helper()
	must(d.t, d.db.CompactHead(tsdb.NewRangeHead(d.db.Head(), mint, maxt-1)))
}

func (d *testDB) list() []Block {
	d.t.Helper()
	blocks, bad, err := NewLister(d.dir).List()
	must(d.t, err)
	if len(bad) > 0 {
		d.t.Fatal(bad)
	}
	return blocks
}

// oneBlock returns a database with one block of samples of all kinds.
func oneBlock(t testing.TB, st bool) (*testDB, Block) {
	t.Helper()
	d := openDB(t, st)
	d.write(t0, t0+2*hour-1)
	d.compactHead(t0, t0+2*hour)
	blocks := d.list()
	if len(blocks) != 1 {
		t.Fatalf("%d blocks", len(blocks))
	}
	return d, blocks[0]
}

// line is a sample as text, bit for bit.
type line struct {
	t    int64
	text string
}

func floatLine(t, st int64, v float64) line {
	return line{t, fmt.Sprintf("%d st=%d %016x", t, st, math.Float64bits(v))}
}

func histogramLine(t, st int64, h *histogram.Histogram) line {
	return line{t, fmt.Sprintf("%d st=%d h %016x %+v", t, st, math.Float64bits(h.Sum), *h)}
}

func floatHistogramLine(t, st int64, h *histogram.FloatHistogram) line {
	return line{t, fmt.Sprintf("%d st=%d fh %016x %+v", t, st, math.Float64bits(h.Sum), *h)}
}

type textSeries struct {
	Ref    uint64
	Labels string
	Lines  []string
}

// columns returns the samples of a piece in order of time.
func columns(t testing.TB, s *Series) []line {
	t.Helper()
	var out []line
	st := func(column []int64, n, i int) int64 {
		switch len(column) {
		case 0:
			return 0
		case n:
			return column[i]
		default:
			t.Fatalf("%d start timestamps of %d samples", len(column), n)
			return 0
		}
	}
	ascending := func(ts []int64) {
		for i := 1; i < len(ts); i++ {
			if ts[i] <= ts[i-1] {
				t.Fatalf("%v: %d after %d", s.Labels, ts[i], ts[i-1])
			}
		}
	}
	f, h, fh := &s.Floats, &s.Histograms, &s.FloatHistograms
	ascending(f.T)
	ascending(h.T)
	ascending(fh.T)
	for i, v := range f.V {
		out = append(out, floatLine(f.T[i], st(f.ST, len(f.T), i), v))
	}
	for i, v := range h.V {
		out = append(out, histogramLine(h.T[i], st(h.ST, len(h.T), i), v))
	}
	for i, v := range fh.V {
		out = append(out, floatHistogramLine(fh.T[i], st(fh.ST, len(fh.T), i), v))
	}
	slices.SortStableFunc(out, func(a, b line) int { return cmp.Compare(a.t, b.t) })
	return out
}

// readAll reads to the end, and returns what it read and the errors on the way.
func readAll(t testing.TB, r *Reader) (out []textSeries, errs []error) {
	t.Helper()
	more := false
	var last int64
	for {
		s, err := r.Next(t.Context())
		if errors.Is(err, io.EOF) {
			return out, errs
		}
		if err != nil {
			if errs = append(errs, err); len(errs) > 10_000 {
				t.Fatal("no end to errors: ", err)
			}
			continue
		}
		ls := columns(t, s)
		if len(ls) == 0 {
			t.Fatalf("%v without samples", s.Labels)
		}
		if !more || out[len(out)-1].Ref != s.Ref {
			if more {
				t.Fatalf("no more of series %d", out[len(out)-1].Ref)
			}
			if len(out) > 0 && s.Ref <= out[len(out)-1].Ref {
				t.Fatalf("series %d after %d", s.Ref, out[len(out)-1].Ref)
			}
			out = append(out, textSeries{Ref: s.Ref, Labels: s.Labels.String()})
			last = math.MinInt64
		}
		if ls[0].t <= last {
			t.Fatalf("%v: a piece that begins at %d after %d", s.Labels, ls[0].t, last)
		}
		last = ls[len(ls)-1].t
		x := &out[len(out)-1]
		for _, l := range ls {
			x.Lines = append(x.Lines, l.text)
		}
		more = s.More
	}
}

// query is what Prometheus's querier returns of a block, with refs left out.
func query(t testing.TB, b Block) []textSeries {
	t.Helper()
	block, err := tsdb.OpenBlock(nil, b.Dir, nil, nil)
	must(t, err)
	defer block.Close()
	q, err := tsdb.NewBlockQuerier(block, math.MinInt64, math.MaxInt64)
	must(t, err)
	defer q.Close()
	set := q.Select(context.Background(), false, nil, labels.MustNewMatcher(labels.MatchRegexp, "__name__", ".+"))
	var out []textSeries
	for set.Next() {
		s := textSeries{Labels: set.At().Labels().String()}
		it := set.At().Iterator(nil)
		for vt := it.Next(); vt != chunkenc.ValNone; vt = it.Next() {
			switch vt {
			case chunkenc.ValFloat:
				t, v := it.At()
				s.Lines = append(s.Lines, floatLine(t, it.AtST(), v).text)
			case chunkenc.ValHistogram:
				t, h := it.AtHistogram(nil)
				s.Lines = append(s.Lines, histogramLine(t, it.AtST(), h).text)
			case chunkenc.ValFloatHistogram:
				t, h := it.AtFloatHistogram(nil)
				s.Lines = append(s.Lines, floatHistogramLine(t, it.AtST(), h).text)
			}
		}
		must(t, it.Err())
		if len(s.Lines) > 0 {
			out = append(out, s)
		}
	}
	must(t, set.Err())
	return out
}

func timeOf(line string) int64 {
	t, _, _ := strings.Cut(line, " ")
	n, err := strconv.ParseInt(t, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

// within leaves out samples outside of a time range. The querier isn't asked to,
// since it can panic where a series has several tombstones.
func within(series []textSeries, mint, maxt int64) []textSeries {
	var out []textSeries
	for _, s := range series {
		var lines []string
		for _, l := range s.Lines {
			if at := timeOf(l); at >= mint && at <= maxt {
				lines = append(lines, l)
			}
		}
		if len(lines) > 0 {
			out = append(out, textSeries{Labels: s.Labels, Lines: lines})
		}
	}
	return out
}

func open(t testing.TB, b Block, mint, maxt int64) *Reader {
	t.Helper()
	r, err := Open(b, mint, maxt)
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

func openAll(t testing.TB, b Block) *Reader {
	t.Helper()
	return open(t, b, math.MinInt64, math.MaxInt64)
}

func withoutRefs(s []textSeries) []textSeries {
	var out []textSeries
	for _, x := range s {
		out = append(out, textSeries{Labels: x.Labels, Lines: x.Lines})
	}
	return out
}

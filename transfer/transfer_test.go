package transfer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

const (
	hour = int64(3_600_000)
	// t0 begins a block two hours before a day does.
	t0 = 1_700_006_400_000 - 2*hour
)

// writeBlocks makes the blocks of a Prometheus with samples of all kinds, one
// for each pair of times, and returns its data directory.
func writeBlocks(t testing.TB, st bool, times ...[2]int64) string {
	t.Helper()
	dir := t.TempDir()
	opts := tsdb.DefaultOptions()
	opts.NoLockfile = true
	opts.OutOfOrderTimeWindow = 1000 * hour
	if st {
		opts.EnableSTStorage, opts.EnableHistogramSTEncoding, opts.FloatChunkEncoding = true, true, chunkenc.EncXOR2
	}
	db, err := tsdb.Open(dir, promslog.NewNopLogger(), nil, opts, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.DisableCompactions()
	for _, b := range times {
		writeSamples(t, db, st, b[0], b[1])
		if err := db.CompactHead(tsdb.NewRangeHead(db.Head(), b[0], b[1]-1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func writeSamples(t testing.TB, db *tsdb.DB, withST bool, from, to int64) {
	t.Helper()
	stale := math.Float64frombits(value.StaleNaN)
	specials := []float64{math.Inf(1), math.Inf(-1), math.NaN(), math.Copysign(0, -1), math.Float64frombits(0x7ff8_0000_dead_beef), 5e-324}
	app := db.AppenderV2(t.Context())
	for ts := from; ts < to; ts += 60_000 {
		i := (ts - t0) / 60_000
		var st int64
		if withST && i%7 != 0 {
			st = t0 - hour + i/50*1000
		}
		add := func(name string, v float64, h *histogram.Histogram, fh *histogram.FloatHistogram, more ...string) {
			t.Helper()
			ls := labels.FromStrings(append([]string{"__name__", name, "job", "test"}, more...)...)
			if _, err := app.Append(0, ls, st, ts, v, h, fh, storage.AppendV2Options{}); err != nil {
				t.Fatal(err)
			}
		}
		add("counter", float64(i)*3.25, nil, nil)
		add("special", specials[i%int64(len(specials))], nil, nil)
		// Labels whose order is another in history than in a block of Prometheus.
		add("upper", float64(i), nil, nil, "Zone", "z")
		add("aaa", float64(i), nil, nil)
		for n := range 20 {
			add("many", float64(n)+float64(i)/10, nil, nil, "n", fmt.Sprint(n))
		}
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
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
}

// text is all samples of some series, bit for bit: by labels, then by time.
type text map[string]map[int64]string

func (x text) add(ls labels.Labels, it chunkenc.Iterator) error {
	of := x[ls.String()]
	if of == nil {
		of = map[int64]string{}
		x[ls.String()] = of
	}
	for vt := it.Next(); vt != chunkenc.ValNone; vt = it.Next() {
		st := it.AtST()
		switch vt {
		case chunkenc.ValFloat:
			t, v := it.At()
			of[t] = fmt.Sprintf("st=%d %016x", st, math.Float64bits(v))
		case chunkenc.ValHistogram:
			t, h := it.AtHistogram(nil)
			if h.CounterResetHint != histogram.GaugeType { // they don't count
				h.CounterResetHint = histogram.UnknownCounterReset
			}
			of[t] = fmt.Sprintf("st=%d h %016x %+v", st, math.Float64bits(h.Sum), *h.Compact(0))
		default:
			t, h := it.AtFloatHistogram(nil)
			if h.CounterResetHint != histogram.GaugeType {
				h.CounterResetHint = histogram.UnknownCounterReset
			}
			of[t] = fmt.Sprintf("st=%d fh %016x %+v", st, math.Float64bits(h.Sum), *h.Compact(0))
		}
	}
	return it.Err()
}

func (x text) samples() (n int) {
	for _, of := range x {
		n += len(of)
	}
	return n
}

// inBlocks is what the blocks in a folder hold, as Prometheus reads them. Series
// get external labels that they haven't.
func inBlocks(t testing.TB, dir string, external ...string) text {
	t.Helper()
	x := text{}
	dirs, err := filepath.Glob(filepath.Join(dir, "*", metaFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		b, err := tsdb.OpenBlock(promslog.NewNopLogger(), filepath.Dir(d), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		q, err := tsdb.NewBlockQuerier(b, math.MinInt64, math.MaxInt64)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		set := q.Select(t.Context(), true, nil, labels.MustNewMatcher(labels.MatchRegexp, "job", ".*"))
		for set.Next() {
			lb := labels.NewBuilder(set.At().Labels())
			for i := 0; i < len(external); i += 2 {
				if lb.Get(external[i]) == "" {
					lb.Set(external[i], external[i+1])
				}
			}
			if err := x.add(lb.Labels(), set.At().Iterator(nil)); err != nil {
				t.Fatal(err)
			}
		}
		if err := set.Err(); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// world is stores, and a history in them.
type world struct {
	objects object.Store
	index   *index.Index
	history *history.History
}

func newWorld(t *testing.T, objects object.Store, rows index.Store) *world {
	t.Helper()
	w := &world{objects: objects, index: index.New(rows)}
	var err error
	if w.history, err = history.New(history.Options{Objects: objects, Index: w.index}); err != nil {
		t.Fatal(err)
	}
	return w
}

func localWorld(t *testing.T) *world {
	t.Helper()
	return newWorld(t, historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry()))
}

// onStores runs a test on files with bbolt, and on an S3 and a DynamoDB server.
func onStores(t *testing.T, test func(t *testing.T, w *world)) {
	t.Run("local", func(t *testing.T) { test(t, localWorld(t)) })
	t.Run("aws", func(t *testing.T) {
		test(t, newWorld(t, historytest.S3(t, prometheus.NewRegistry()), historytest.DynamoDB(t, prometheus.NewRegistry())))
	})
}

// inHistory is what history has of a tenant.
func (w *world) inHistory(t testing.TB, tenant string) text {
	t.Helper()
	x := text{}
	s, err := w.history.Snapshot(t.Context(), tenant, math.MinInt64, math.MaxInt64, nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.Select(t.Context(), nil, math.MinInt64, math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	var buf history.Buffer
	for set.Next(t.Context()) {
		runs, err := set.At().Runs(&buf)
		if err != nil {
			t.Fatal(err)
		}
		if err := x.add(set.At().Labels, &samples{s: chunkfmt.Merge(runs...), until: math.MaxInt64}); err != nil {
			t.Fatal(err)
		}
	}
	if err := set.Err(); err != nil {
		t.Fatal(err)
	}
	return x
}

// stored counts the samples in a tenant's blocks, those that are there twice too.
func (w *world) stored(t testing.TB, tenant string) (n int) {
	t.Helper()
	rows, err := w.index.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[ulid.ULID]bool{}
	for _, r := range rows {
		if !seen[r.Block] {
			seen[r.Block] = true
			n += int(r.Samples)
		}
	}
	return n
}

func (w *world) options(t testing.TB, blocks Blocks) ImportOptions {
	t.Helper()
	return ImportOptions{Blocks: blocks, Objects: w.objects, Index: w.index, Dir: t.TempDir(), Tenant: "acme"}
}

func imports(t testing.TB, o ImportOptions) (*ImportResult, []Event) {
	t.Helper()
	var events []Event
	o.Report = func(e Event) { events = append(events, e) }
	r, err := Import(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(o.Dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	return r, events
}

func same(t testing.TB, what string, want, got text) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("%s (-want +got):\n%.4000s", what, d)
	}
}

// promtool runs it, and returns what it prints.
func promtool(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), testenv.Tool(t, "bin/promtool"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("promtool %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestRoundTrip imports blocks of all kinds of samples, exports them, and wants
// the same in blocks, history and blocks.
func TestRoundTrip(t *testing.T) {
	for _, st := range []bool{false, true} {
		t.Run(fmt.Sprintf("st=%t", st), func(t *testing.T) {
			dir := writeBlocks(t, st, [2]int64{t0, t0 + 2*hour}, [2]int64{t0 + 2*hour, t0 + 8*hour})
			want := inBlocks(t, dir)
			onStores(t, func(t *testing.T, w *world) {
				o := w.options(t, Directory(dir))
				r, events := imports(t, o)
				if !r.OK() || r.Imported != 2 || int(r.Samples) != want.samples() {
					t.Fatalf("%+v, want %d samples in 2 blocks; %v", r, want.samples(), events)
				}
				same(t, "history", want, w.inHistory(t, "acme"))
				if n := w.stored(t, "acme"); n != want.samples() {
					t.Errorf("%d samples stored, want %d", n, want.samples())
				}
				// Not again.
				if r, _ := imports(t, o); r.Before != 2 || r.Samples != 0 {
					t.Errorf("again: %+v", r)
				}
				for _, width := range []time.Duration{0, 2 * time.Hour} {
					out := filepath.Join(t.TempDir(), "out")
					e, err := Export(t.Context(), ExportOptions{
						History: w.history, Tenant: "acme", MinT: math.MinInt64, MaxT: math.MaxInt64, Dir: out, Range: width,
					})
					if err != nil {
						t.Fatal(err)
					}
					if blocks := map[time.Duration]int{0: 2, 2 * time.Hour: 4}[width]; e.Blocks != blocks || int(e.Samples) != want.samples() {
						t.Errorf("%+v, want %d samples in %d blocks", e, want.samples(), blocks)
					}
					same(t, "exported", want, inBlocks(t, out))
					files, err := filepath.Glob(filepath.Join(out, "*", "*"))
					if err != nil || len(files) != 4*e.Blocks {
						t.Errorf("files %v, %v", files, err)
					}
					if s := promtool(t, "tsdb", "list", out); strings.Count(s, "\n") != e.Blocks+1 {
						t.Errorf("promtool lists:\n%s", s)
					}
					promtool(t, "tsdb", "analyze", out)
				}
			})
		})
	}
}

// TestPart exports a part of the series and of the time.
func TestPart(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 4*hour})
	w := localWorld(t)
	o := w.options(t, Directory(dir))
	o.AddLabels = map[string]string{"cluster": "eu", "job": "other"}
	imports(t, o)
	all := inBlocks(t, dir, "cluster", "eu")
	same(t, "history", all, w.inHistory(t, "acme"))
	out := filepath.Join(t.TempDir(), "out")
	mint, maxt := t0+hour, t0+3*hour
	if _, err := Export(t.Context(), ExportOptions{
		History: w.history, Tenant: "acme", MinT: mint, MaxT: maxt, Dir: out, External: map[string]string{"cluster": "eu"},
		Selectors: [][]*labels.Matcher{
			{labels.MustNewMatcher(labels.MatchRegexp, "__name__", "many|histogram")},
			{labels.MustNewMatcher(labels.MatchEqual, "__name__", "upper")},
			{labels.MustNewMatcher(labels.MatchEqual, "n", "3")},
		},
	}); err != nil {
		t.Fatal(err)
	}
	want := text{}
	for name, of := range inBlocks(t, dir) {
		if !strings.Contains(name, `"many"`) && !strings.Contains(name, `"histogram"`) && !strings.Contains(name, `"upper"`) {
			continue
		}
		want[name] = map[int64]string{}
		for at, s := range of {
			if at >= mint && at <= maxt {
				want[name][at] = s
			}
		}
	}
	same(t, "exported", want, inBlocks(t, out))

	// What is exported so comes back with its labels, and not into a folder that
	// has something.
	o = w.options(t, Directory(out))
	o.Tenant = "again"
	imports(t, o)
	for name := range w.inHistory(t, "again") {
		if !strings.Contains(name, `cluster="eu"`) {
			t.Errorf("%s has come back", name)
		}
	}
	if _, err := Export(t.Context(), ExportOptions{History: w.history, Tenant: "acme", MinT: mint, MaxT: maxt, Dir: out}); err == nil {
		t.Error("exported into a folder that isn't empty")
	}
	if r, err := Export(t.Context(), ExportOptions{History: w.history, Tenant: "nobody", MinT: 0, MaxT: maxt, Dir: t.TempDir()}); err != nil || r.Blocks != 0 {
		t.Errorf("of nobody: %+v, %v", r, err)
	}
}

// TestExternalOrder exports series that come in another order without the external
// label.
func TestExternalOrder(t *testing.T) {
	w := localWorld(t)
	var block bytes.Buffer
	out := chunkfmt.NewWriter(&block, chunkfmt.WriterOptions{Window: history.Window})
	for _, ls := range []labels.Labels{
		labels.FromStrings("__name__", "m", "instance", "1", "region", "eu"), labels.FromStrings("__name__", "m", "region", "eu"),
		labels.FromStrings("__name__", "m", "region", "eu", "zone", "a"),
	} {
		if err := out.Add("acme", &chunkfmt.Series{Labels: ls, Floats: chunkfmt.Floats{T: []int64{t0, t0 + 1}, V: []float64{1, 2}}}); err != nil {
			t.Fatal(err)
		}
	}
	sum, err := out.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.history.Publish(t.Context(), ulid.Make(), block.Bytes(), sum); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := Export(t.Context(), ExportOptions{
		History: w.history, Tenant: "acme", MinT: t0, MaxT: t0 + hour, Dir: dir, External: map[string]string{"region": "eu"},
		Selectors: [][]*labels.Matcher{
			{labels.MustNewMatcher(labels.MatchEqual, "zone", "")}, {labels.MustNewMatcher(labels.MatchEqual, "instance", "")},
		},
	}); err != nil {
		t.Fatal(err)
	}
	want := text{}
	for _, name := range []string{`{__name__="m"}`, `{__name__="m", instance="1"}`, `{__name__="m", zone="a"}`} {
		want[name] = nil
	}
	got := inBlocks(t, dir)
	for name, of := range got {
		if len(of) != 2 {
			t.Errorf("%s has %d samples, want 2", name, len(of))
		}
		got[name] = nil
	}
	same(t, "exported", want, got)
}

// TestInterrupted ends an import at every step of every unit, and goes on.
func TestInterrupted(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 4*hour})
	want := inBlocks(t, dir)
	for _, step := range []string{"put", "noted", "published"} {
		t.Run(step, func(t *testing.T) {
			w := localWorld(t)
			o := w.options(t, Directory(dir))
			o.unitSamples = 3 * 240 // a few series
			broken := errors.New("broken")
			units, runs := uint64(0), 0
			for {
				n := 0
				o.fail = func(s string) error {
					if n++; s == step && n > 1 {
						return broken
					}
					return nil
				}
				var last Event
				o.Report = func(e Event) {
					if e.Kind == Unit || e.Kind == Resumed {
						last = e
					}
					if e.Kind == Unit {
						units++
					}
				}
				_, err := Import(t.Context(), o)
				if runs++; err == nil {
					break
				}
				if !errors.Is(err, broken) {
					t.Fatal(err)
				}
				if runs > 100 {
					t.Fatalf("it doesn't go on: %+v", last)
				}
			}
			if runs < 5 {
				t.Errorf("%d runs, %d units", runs, units)
			}
			same(t, "history", want, w.inHistory(t, "acme"))
			if n := w.stored(t, "acme"); n != want.samples() {
				t.Errorf("%d samples stored, want %d", n, want.samples())
			}
		})
	}
}

// TestStoodStill goes on with an import whose blocks a sweeper took for orphans.
func TestStoodStill(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour})
	w := localWorld(t)
	o := w.options(t, Directory(dir))
	broken := errors.New("broken")
	o.fail = func(s string) error {
		if s == "noted" {
			return broken
		}
		return nil
	}
	if _, err := Import(t.Context(), o); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if err := w.objects.List(t.Context(), "", func(i object.Info) error {
		id := ulid.MustParse(strings.TrimPrefix(i.Key, "blocks/"))
		if _, err := w.index.Guard(context.Background(), id, index.Condemned); err != nil {
			return err
		}
		return w.objects.Delete(context.Background(), i.Key)
	}); err != nil {
		t.Fatal(err)
	}
	o.fail = nil
	imports(t, o)
	same(t, "history", inBlocks(t, dir), w.inHistory(t, "acme"))
}

// setMeta changes a block's meta.json.
func setMeta(t testing.TB, dir string, change func(m map[string]any)) {
	t.Helper()
	file := filepath.Join(dir, metaFile)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	if raw, err = json.Marshal(m); err == nil {
		err = os.WriteFile(file, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// folders are those of the blocks, the oldest first.
func folders(t testing.TB, dir string) []string {
	t.Helper()
	blocks, _, err := Directory(dir).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, b := range slices.Backward(blocks) {
		out = append(out, b.dir)
	}
	return out
}

// upload puts the blocks in a data directory into a bucket.
func upload(t testing.TB, bucket object.Store, dir string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || strings.HasPrefix(name, "wal") || strings.HasPrefix(name, "chunks_head") {
			return err
		}
		return bucket.Put(t.Context(), name, strings.NewReader(string(raw)), int64(len(raw)))
	}); err != nil {
		t.Fatal(err)
	}
}

// TestThanos imports blocks as Thanos has them in a bucket.
func TestThanos(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour}, [2]int64{t0 + 2*hour, t0 + 4*hour}, [2]int64{t0 + 4*hour, t0 + 6*hour}, [2]int64{t0 + 6*hour, t0 + 8*hour})
	all := folders(t, dir)
	for _, d := range all[:2] {
		setMeta(t, d, func(m map[string]any) {
			m["thanos"] = map[string]any{"labels": map[string]string{"cluster": "eu", "replica": "a", "__org_id__": "x"}}
		})
	}
	setMeta(t, all[2], func(m map[string]any) {
		m["thanos"] = map[string]any{"labels": map[string]string{"cluster": "eu"}, "downsample": map[string]int{"resolution": 300_000}}
	})
	if err := os.WriteFile(filepath.Join(all[3], deletionMark), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	store := historytest.S3(t, prometheus.NewRegistry())
	upload(t, store, dir)
	half := ulid.Make().String()
	if err := store.Put(t.Context(), half+"/index", strings.NewReader("x"), 1); err != nil {
		t.Fatal(err)
	}
	w := localWorld(t)
	o := w.options(t, nil)
	o.Blocks = Bucket(store, o.Dir)
	o.DropLabels = []string{"replica"}
	r, events := imports(t, o)
	if r.Imported != 2 || r.Skipped != 2 || r.Failed != 1 || r.OK() {
		t.Errorf("%+v, %+v", r, events)
	}
	if !slices.ContainsFunc(events, func(e Event) bool { return e.Kind == Failed && strings.Contains(e.Err.Error(), half) }) {
		t.Errorf("the half block isn't named: %+v", events)
	}
	for _, d := range all[2:] {
		if err := os.RemoveAll(d); err != nil {
			t.Fatal(err)
		}
	}
	same(t, "history", inBlocks(t, dir, "cluster", "eu"), w.inHistory(t, "acme"))
}

// TestBroken imports what can be read of blocks that are broken.
func TestBroken(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour}, [2]int64{t0 + 2*hour, t0 + 4*hour}, [2]int64{t0 + 4*hour, t0 + 6*hour}, [2]int64{t0 + 6*hour, t0 + 8*hour})
	all := folders(t, dir)
	if err := os.Truncate(filepath.Join(all[0], "index"), 1000); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(all[1], metaFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A bit in a chunk.
	file := filepath.Join(all[2], "chunks", "000001")
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	w := localWorld(t)
	o := w.options(t, Directory(dir))
	r, events := imports(t, o)
	if r.Imported != 2 || r.Faulty != 1 || r.Failed != 2 || r.OK() {
		t.Fatalf("%+v, %+v", r, events)
	}
	faults := 0
	for _, e := range events {
		switch e.Kind {
		case Fault:
			faults++
			if !strings.Contains(e.Err.Error(), filepath.Base(all[2])) || !strings.Contains(e.Err.Error(), "chunk") {
				t.Errorf("fault: %v", e.Err)
			}
		case Failed:
			if !strings.Contains(e.Err.Error(), filepath.Base(all[0])) && !strings.Contains(e.Err.Error(), filepath.Base(all[1])) {
				t.Errorf("failed: %v", e.Err)
			}
		}
	}
	if faults != 1 {
		t.Errorf("%d faults", faults)
	}
	// All but one chunk of the third, and all of the last.
	n := 0
	for _, of := range w.inHistory(t, "acme") {
		for at := range of {
			if at < t0+4*hour {
				t.Fatalf("a sample at %d", at)
			}
			n++
		}
	}
	if perBlock := 33 * 120; n < 2*perBlock-120 || n >= 2*perBlock {
		t.Errorf("%d samples of %d", n, 2*perBlock)
	}
	// The next run still says so.
	if r, _ := imports(t, o); r.Faulty != 1 || r.Before != 2 {
		t.Errorf("again: %+v", r)
	}
}

// TestTombstones doesn't import what was deleted.
func TestTombstones(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour})
	db, err := tsdb.Open(dir, promslog.NewNopLogger(), nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"many", "aaa"} {
		if err := db.Delete(t.Context(), t0+hour/2, t0+hour, labels.MustNewMatcher(labels.MatchEqual, "__name__", name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Delete(t.Context(), t0, t0+2*hour, labels.MustNewMatcher(labels.MatchEqual, "__name__", "counter")); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	want := inBlocks(t, dir)
	for name, of := range want { // the querier gives series without samples
		if len(of) == 0 {
			delete(want, name)
		}
	}
	w := localWorld(t)
	imports(t, w.options(t, Directory(dir)))
	same(t, "history", want, w.inHistory(t, "acme"))
	if strings.Contains(fmt.Sprint(want), `"counter"`) {
		t.Error("nothing was deleted")
	}
}

// TestCollision imports series that external labels make the same.
func TestCollision(t *testing.T) {
	dir := t.TempDir()
	db, err := tsdb.Open(dir, promslog.NewNopLogger(), nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		t.Fatal(err)
	}
	app := db.AppenderV2(t.Context())
	for i := range int64(100) {
		ls := labels.FromStrings("__name__", "x", "job", "j")
		if i%2 == 0 {
			ls = labels.FromStrings("__name__", "x", "cluster", "eu", "job", "j")
		}
		if _, err := app.Append(0, ls, 0, t0+i*200_000, float64(i), nil, nil, storage.AppendV2Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := db.CompactHead(tsdb.NewRangeHead(db.Head(), t0, t0+6*hour-1)); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	w := localWorld(t)
	o := w.options(t, Directory(dir))
	o.AddLabels = map[string]string{"cluster": "eu"}
	imports(t, o)
	got := w.inHistory(t, "acme")
	same(t, "history", inBlocks(t, dir, "cluster", "eu"), got)
	if len(got) != 1 || got.samples() != 100 {
		t.Errorf("%d series, %d samples", len(got), got.samples())
	}
}

// lostAnswer is rows of which one conditional write is done, and is tried again later, as
// where its answer was lost and its writer stood still.
type lostAnswer struct {
	index.Store
	hash  string
	after int // writes that come before
	then  func()
}

func (l *lostAnswer) PutIf(ctx context.Context, it index.Item, old []byte) ([]byte, error) {
	if it.Hash == l.hash && l.then != nil {
		if l.after--; l.after < 0 {
			then := l.then
			l.then = nil
			if _, err := l.Store.PutIf(ctx, it, old); err != nil {
				return nil, err
			}
			then()
		}
	}
	return l.Store.PutIf(ctx, it, old)
}

// TestTwoImports: an import stands still, another goes on with the block, and the first
// finds that out. What the other has published stays.
func TestTwoImports(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour})
	rows := &lostAnswer{Store: historytest.Bolt(t, prometheus.NewRegistry()), hash: "i/acme", after: 1} // the first says that it begins
	w := newWorld(t, historytest.Files(t, prometheus.NewRegistry()), rows)
	o := w.options(t, Directory(dir))
	rows.then = func() { imports(t, w.options(t, Directory(dir))) }
	if _, err := Import(t.Context(), o); !errors.Is(err, index.ErrConflict) {
		t.Errorf("the first: %v", err)
	}
	same(t, "history", inBlocks(t, dir), w.inHistory(t, "acme"))
}

// TestVanishing: a block goes between listing and reading. The others are imported.
func TestVanishing(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour}, [2]int64{t0 + 2*hour, t0 + 4*hour})
	from := historytest.Files(t, prometheus.NewRegistry())
	upload(t, from, dir)
	first := filepath.Base(folders(t, dir)[0])
	vanished := &historytest.FaultyObjects{Store: from, Decide: func(op, key string) historytest.Fault {
		if op == "GetRange" && strings.HasPrefix(key, first) {
			return historytest.Missing
		}
		return historytest.None
	}}
	w := localWorld(t)
	r, err := Import(t.Context(), w.options(t, Bucket(vanished, t.TempDir())))
	if err != nil || r.Imported != 1 || r.Failed != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestReplacedWhileExported: a block is replaced, and goes, while it is being exported.
func TestReplacedWhileExported(t *testing.T) {
	if testing.Short() {
		t.Skip("writes more than history fetches at a time: a minute with -race")
	}
	objects, rows := &historytest.MemoryObjects{}, index.New(&historytest.MemoryRows{})
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
	r := rand.New(rand.NewPCG(1, 2))
	want := uint64(0)
	for i := range 100 { // more than is fetched at a time
		s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprintf("%03d", i))}
		for k := range int64(60_000) {
			s.Floats.T, s.Floats.V = append(s.Floats.T, t0+k*1000), append(s.Floats.V, r.NormFloat64())
		}
		want += uint64(len(s.Floats.T))
		if err := w.Add("acme", s); err != nil {
			t.Fatal(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	old, next := ulid.MustNew(1, nil), ulid.MustNew(2, nil)
	var read atomic.Int32
	faulty := &historytest.FaultyObjects{Store: objects, Decide: func(op, key string) historytest.Fault {
		if op != "GetRange" || key != history.ObjectKey(old) {
			return historytest.None
		}
		if read.Add(1) != 10 {
			return historytest.None
		}
		// As compaction does.
		if err := objects.Put(ctx, history.ObjectKey(next), bytes.NewReader(buf.Bytes()), sum.Size); err != nil {
			t.Error(err)
		}
		of := func(id ulid.ULID) []index.BlockRow {
			return history.Rows(index.BlockRef{Block: id, Object: history.ObjectKey(id), ObjectSize: sum.Size}, 1, sum.Tenants)
		}
		if err := errors.Join(rows.PutBlocks(ctx, of(next)), rows.DeleteRows(ctx, of(old)), rows.Condemn(ctx, old), objects.Delete(ctx, history.ObjectKey(old))); err != nil {
			t.Error(err)
		}
		return historytest.None
	}}
	h, err := history.New(history.Options{Objects: faulty, Index: rows, PageCacheBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Publish(ctx, old, buf.Bytes(), sum); err != nil {
		t.Fatal(err)
	}
	got, err := Export(ctx, ExportOptions{History: h, Tenant: "acme", MinT: math.MinInt64, MaxT: math.MaxInt64, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if got.Samples != want || read.Load() < 10 {
		t.Errorf("%d samples of %d, %d reads", got.Samples, want, read.Load())
	}
}

package sidecar

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage/remote"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/agent"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// harness is a Prometheus directory, ingesters, a gateway and a sidecar.
type harness struct {
	t         *testing.T
	promDir   string
	dataDir   string
	ingesters []*fakeIngester
	gateway   *fakeGateway
	opts      Options
	lease     time.Duration // shorter than options may have it

	sidecar *Sidecar
	reg     *prometheus.Registry
	stop    func()
}

func newHarness(t *testing.T, ingesters int) *harness {
	h := &harness{t: t, promDir: filepath.Join(t.TempDir(), "prom"), dataDir: filepath.Join(t.TempDir(), "sidecar")}
	if err := os.MkdirAll(h.promDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range ingesters {
		h.ingesters = append(h.ingesters, newFakeIngester(t, fmt.Sprintf("ingester-%d", i)))
	}
	h.gateway = newFakeGateway(t, h.ingesters...)
	h.opts = Options{
		PrometheusDir: h.promDir, DataDir: h.dataDir, Tenant: "team", Gateways: []string{h.gateway.URL},
		PollInterval: 5 * time.Millisecond, RangeAge: 50 * time.Millisecond, RangeBytes: 64 << 10,
		DetachAfter: 300 * time.Millisecond, ReattachAfter: 300 * time.Millisecond, GiveUp: 1500 * time.Millisecond,
		CheckpointInterval: 30 * time.Millisecond, LabelsInterval: 10 * time.Millisecond, RingWait: 2 * time.Second,
	}
	return h
}

func (h *harness) run() {
	h.t.Helper()
	h.reg = prometheus.NewRegistry()
	logger := promslog.NewNopLogger()
	if os.Getenv("VERBOSE") != "" {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s, err := New(h.opts, logger, h.reg)
	if err != nil {
		h.t.Fatal(err)
	}
	if h.sidecar = s; h.lease > 0 {
		s.shipper.opts.Lease = h.lease
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	h.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				h.t.Errorf("run: %v", err)
			}
		})
	}
	h.t.Cleanup(func() { h.stop() })
}

func (h *harness) metric(name string, label ...string) float64 {
	h.t.Helper()
	families, err := h.reg.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		var sum float64
		for _, m := range f.GetMetric() {
			if len(label) == 0 || m.GetLabel()[0].GetValue() == label[0] {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		return sum
	}
	h.t.Fatalf("no metric %s", name)
	return 0
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// got is what all ingesters hold, durable or not.
func (h *harness) got(durableOnly bool) map[string]map[int64]string {
	out := map[string]map[int64]string{}
	for _, f := range h.ingesters {
		f.mu.Lock()
		for _, m := range []map[string]map[int64]string{f.durable, f.memory} {
			for s, samples := range m {
				if out[s] == nil {
					out[s] = map[int64]string{}
				}
				maps.Copy(out[s], samples)
			}
			if durableOnly {
				break
			}
		}
		f.mu.Unlock()
	}
	return out
}

func (h *harness) noConflicts() {
	h.t.Helper()
	for _, f := range h.ingesters {
		f.mu.Lock()
		if len(f.conflicts) > 0 {
			h.t.Errorf("%s: %v", f.id, f.conflicts[0])
		}
		f.mu.Unlock()
	}
}

// want waits until the ingesters hold exactly this.
func (h *harness) want(w map[string]map[int64]string, durable bool) {
	h.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		g := h.got(durable)
		if d := cmp.Diff(w, g); d == "" {
			break
		} else if time.Now().After(deadline) {
			if len(d) > 3000 {
				d = d[:3000]
			}
			h.t.Fatalf("ingesters hold something else (-want +got):\n%s\nstatus %+v", d, h.sidecar.Status())
		}
	}
	h.noConflicts()
}

// settled waits until the checkpoint is where the tail is.
func (h *harness) settled() {
	h.t.Helper()
	began := time.Now()
	eventually(h.t, "all is durable", func() bool {
		for _, f := range h.ingesters {
			f.flush()
		}
		st := h.sidecar.Status()
		return st.Time.After(began) && st.Checkpoint == st.Position && st.LagBytes == 0 && st.OpenRanges == 0
	})
}

// promWAL writes a WAL as Prometheus's head does, and remembers what it wrote.
type promWAL struct {
	t     testing.TB
	wl    *wlog.WL
	enc   record.Encoder
	lsets map[chunks.HeadSeriesRef]string // as the sidecar ought to send them
	all   map[string]map[int64]string
	ext   labels.Labels
	rnd   *rand.Rand
}

func (h *harness) wal() *promWAL {
	h.t.Helper()
	os.MkdirAll(filepath.Join(h.promDir, "chunks_head"), 0o755)
	wl, err := wlog.NewSize(promslog.NewNopLogger(), nil, filepath.Join(h.promDir, "wal"), 512<<10, compression.Snappy)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { wl.Close() })
	return &promWAL{t: h.t, wl: wl, lsets: map[chunks.HeadSeriesRef]string{}, all: map[string]map[int64]string{}, rnd: rand.New(rand.NewSource(1))}
}

func (w *promWAL) log(recs ...[]byte) {
	w.t.Helper()
	if err := w.wl.Log(recs...); err != nil {
		w.t.Fatal(err)
	}
}

func (w *promWAL) series(from, to int) {
	var s []record.RefSeries
	for i := from; i < to; i++ {
		ls := labels.FromStrings("__name__", fmt.Sprintf("metric_%d", i%7), "i", fmt.Sprint(i))
		s = append(s, record.RefSeries{Ref: chunks.HeadSeriesRef(i), Labels: ls})
		w.lsets[chunks.HeadSeriesRef(i)] = w.sent(ls)
	}
	w.log(w.enc.Series(s, nil))
}

func (w *promWAL) sent(ls labels.Labels) string {
	b := labels.NewBuilder(ls)
	w.ext.Range(func(l labels.Label) {
		if ls.Get(l.Name) == "" {
			b.Set(l.Name, l.Value)
		}
	})
	return b.Labels().String()
}

// scrape logs one sample per series, as relabelled for the external labels of w.
func (w *promWAL) scrape(from, to int, t int64) {
	var s []record.RefSample
	for i := from; i < to; i++ {
		x := record.RefSample{Ref: chunks.HeadSeriesRef(i), T: t, V: w.rnd.NormFloat64()}
		s = append(s, x)
		w.remember(w.lsets[x.Ref], t, fmt.Sprintf("0 %x", math.Float64bits(x.V)))
	}
	w.log(w.enc.Samples(s, nil))
}

func (w *promWAL) remember(series string, t int64, v string) {
	if w.all[series] == nil {
		w.all[series] = map[int64]string{}
	}
	w.all[series][t] = v
}

// A Prometheus's own tsdb writes; all kinds of samples arrive, bit for bit.
func TestFromPrometheusTSDB(t *testing.T) {
	h := newHarness(t, 3)
	external := "cluster: c1\n    i: never"
	prom := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/status/config" {
			http.NotFound(w, r)
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": map[string]string{"yaml": "global:\n  external_labels:\n    " + external + "\nunheard_of: {}\n"}})
	}))
	defer prom.Close()
	h.opts.PrometheusURL = prom.URL
	h.run()
	if err := h.sidecar.Ready(); err == nil {
		t.Error("ready without a WAL")
	}
	opts := tsdb.DefaultOptions()
	opts.WALSegmentSize = 256 << 10
	opts.EnableExemplarStorage, opts.MaxExemplars = true, 1000
	opts.EnableMetadataWALRecords = true
	db, err := tsdb.Open(h.promDir, promslog.NewNopLogger(), nil, opts, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	want := map[string]map[int64]string{}
	put := func(ls labels.Labels, t int64, v string) {
		ls = labels.NewBuilder(ls).Set("cluster", "c1").Labels()
		if ls.Get("i") == "" {
			ls = labels.NewBuilder(ls).Set("i", "never").Labels()
		}
		if want[ls.String()] == nil {
			want[ls.String()] = map[int64]string{}
		}
		want[ls.String()][t] = v
	}
	ctx := context.Background()
	now := time.Now().UnixMilli()
	custom := &histogram.Histogram{Schema: histogram.CustomBucketsSchema, Count: 3, Sum: 5, PositiveSpans: []histogram.Span{{Length: 2}}, PositiveBuckets: []int64{1, 1}, CustomValues: []float64{1, 2}}
	for step := range int64(50) {
		app := db.Appender(ctx)
		ts := now + step*1000
		for i := range 200 {
			ls := labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))
			v := float64(step) * 1.1
			if step == 20 && i%3 == 0 {
				v = math.Float64frombits(value.StaleNaN)
			}
			if _, err := app.Append(0, ls, ts, v); err != nil {
				t.Fatal(err)
			}
			put(ls, ts, fmt.Sprintf("0 %x", math.Float64bits(v)))
		}
		hls, fls, cls := labels.FromStrings("__name__", "h"), labels.FromStrings("__name__", "fh"), labels.FromStrings("__name__", "ch")
		hist, fh := tsdbutil.GenerateTestHistogram(step), tsdbutil.GenerateTestFloatHistogram(step)
		for _, x := range []struct {
			ls labels.Labels
			h  *histogram.Histogram
			fh *histogram.FloatHistogram
		}{{hls, hist, nil}, {fls, nil, fh}, {cls, custom, nil}} {
			ref, err := app.AppendHistogram(0, x.ls, ts, x.h, x.fh)
			if err != nil {
				t.Fatal(err)
			}
			if x.h != nil {
				put(x.ls, ts, fmt.Sprintf("0 %s %x %v", x.h, math.Float64bits(x.h.Sum), x.h.CustomValues))
			} else {
				put(x.ls, ts, fmt.Sprintf("0 %s %x %v", x.fh, math.Float64bits(x.fh.Sum), x.fh.CustomValues))
			}
			if step == 10 {
				if _, err := app.AppendExemplar(ref, x.ls, exemplar.Exemplar{Labels: labels.FromStrings("trace_id", "abc"), Value: 1.5, Ts: ts, HasTs: true}); err != nil {
					t.Fatal(err)
				}
				if _, err := app.UpdateMetadata(ref, x.ls, metadata.Metadata{Type: model.MetricTypeHistogram, Unit: "seconds", Help: "help"}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := app.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	h.want(want, false)
	series := labels.FromStrings("__name__", "h", "cluster", "c1", "i", "never").String()
	var ex, md string
	for _, f := range h.ingesters {
		f.set(func() {
			ex += f.exemplars[series]
			md += f.metadata[series]
			if len(f.sessions) != 1 {
				t.Errorf("%d sessions", len(f.sessions))
			}
		})
	}
	if want := fmt.Sprint(now+10000, 1.5, []string{"trace_id", "abc"}); ex != want || md != "histogram seconds help" {
		t.Errorf("exemplar %q, want %q; metadata %q", ex, want, md)
	}
	// Nothing is durable, so the checkpoint stays; then it follows.
	if st := h.sidecar.Status(); st.Checkpoint != (Position{}) && st.Checkpoint.Offset != 0 {
		t.Errorf("checkpoint %v before anything is durable", st.Checkpoint)
	}
	h.settled()
	if err := h.sidecar.Ready(); err != nil {
		t.Error(err)
	}
	h.gateway.mu.Lock()
	if h.gateway.tenant != "team" {
		t.Errorf("asked for the ring as %q", h.gateway.tenant)
	}
	h.gateway.mu.Unlock()
	// Stopped and started: it goes on, and sends nothing twice.
	h.stop()
	before := h.got(false)
	h.run()
	app := db.Appender(ctx)
	ls := labels.FromStrings("__name__", "m", "i", "5")
	if _, err := app.Append(0, ls, now+100000, 7); err != nil {
		t.Fatal(err)
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
	put(ls, now+100000, fmt.Sprintf("0 %x", math.Float64bits(7)))
	h.want(want, false)
	if n := h.metric("epimetheus_sidecar_shipped_samples_total", "float"); n != 1 {
		t.Errorf("%v samples sent after the restart, want 1 (%d series before)", n, len(before))
	}
}

// An agent's WAL, and its WAL checkpoint, whose samples are placeholders.
func TestFromAgent(t *testing.T) {
	h := newHarness(t, 2)
	opts := agent.DefaultOptions()
	opts.TruncateFrequency = time.Hour
	rs := remote.NewStorage(promslog.NewNopLogger(), nil, func() (int64, error) { return 0, nil }, t.TempDir(), time.Second, nil, false)
	defer rs.Close()
	if err := rs.ApplyConfig(&config.Config{}); err != nil {
		t.Fatal(err)
	}
	db, err := agent.Open(promslog.NewNopLogger(), nil, rs, h.promDir, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	want := map[string]map[int64]string{}
	write := func(ts int64) {
		app := db.Appender(context.Background())
		for i := range 50 {
			ls := labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))
			if _, err := app.Append(0, ls, ts, float64(ts)); err != nil {
				t.Fatal(err)
			}
			if want[ls.String()] == nil {
				want[ls.String()] = map[int64]string{}
			}
			want[ls.String()][ts] = fmt.Sprintf("0 %x", math.Float64bits(float64(ts)))
		}
		if err := app.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	write(1000)
	h.run()
	h.want(want, false)
	write(2000)
	h.want(want, false)
	eventually(t, "it is taken for an agent", func() bool { return h.sidecar.Status().Agent })
}

// The samples in an agent's WAL checkpoint are placeholders.
func TestAgentCheckpoint(t *testing.T) {
	h := newHarness(t, 1)
	w := h.wal()
	if err := os.Remove(filepath.Join(h.promDir, "chunks_head")); err != nil {
		t.Fatal(err)
	}
	w.series(1, 11)
	w.scrape(1, 11, 1000)
	w.wl.NextSegment()
	if _, err := wlog.Checkpoint(promslog.NewNopLogger(), w.wl, 0, 0, func(chunks.HeadSeriesRef) bool { return true }, 0, false, false); err != nil {
		t.Fatal(err)
	}
	w.wl.Truncate(1)
	clear(w.all)
	w.scrape(1, 11, 2000)
	h.run()
	h.want(w.all, false)
	if n := h.metric("epimetheus_sidecar_dropped_samples_total", "agent_checkpoint"); n != 10 {
		t.Errorf("%v placeholders counted", n)
	}
}

// Without its dictionary the sidecar stops rather than lose samples; started
// again it has lost none.
func TestDictionaryFails(t *testing.T) {
	h := newHarness(t, 1)
	w := h.wal()
	w.series(1, 20)
	w.scrape(1, 20, 1000)
	h.run()
	h.want(w.all, false)
	h.stop()
	s, err := New(h.opts, promslog.NewNopLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.shipper.dict.f.Close()
	w.scrape(1, 20, 2000)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.Run(ctx); err == nil || ctx.Err() != nil {
		t.Fatalf("ended with %v, %v", err, ctx.Err())
	}
	h.run()
	h.want(w.all, false)
}

// Ingesters die and come back as other processes, streams break, acks are lost,
// the sidecar is killed: in the end everything is durable.
func TestNothingLost(t *testing.T) {
	for seed := range int64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			h := newHarness(t, 3)
			rnd := rand.New(rand.NewSource(seed))
			w := h.wal()
			h.run()
			w.series(1, 200)
			ts := int64(0)
			for range 40 {
				for range 1 + rnd.Intn(10) {
					ts += 1000
					w.scrape(1, 200, ts)
				}
				f := h.ingesters[rnd.Intn(len(h.ingesters))]
				switch rnd.Intn(8) {
				case 0:
					f.kill()
					f.start()
				case 1:
					f.cut()
				case 2:
					f.set(func() { f.loseAcks = true })
					eventually(t, "it gets something", func() bool { return len(h.got(false)) > 0 })
					f.set(func() { f.loseAcks = false })
					f.cut()
				case 3, 4:
					f.flush()
				case 5:
					// Killed: what it wrote last may be a while ago.
					saved := t.TempDir()
					os.CopyFS(saved, os.DirFS(h.dataDir))
					h.stop()
					os.RemoveAll(h.dataDir)
					os.CopyFS(h.dataDir, os.DirFS(saved))
					h.run()
				case 6:
					w.series(200+int(ts), 210+int(ts))
					w.scrape(200+int(ts), 210+int(ts), ts)
				case 7:
					got := h.got(false)
					eventually(t, "more arrives", func() bool { return len(got) == len(w.all) || len(h.got(false)) >= len(got) })
				}
			}
			for _, f := range h.ingesters {
				f.set(func() { f.autoFlush = true; f.flushLocked() })
			}
			h.want(w.all, true)
			h.settled()
		})
	}
}

// An owner that doesn't read, and one that is gone, hold up nobody; their series
// go to the others.
func TestSlowAndGoneOwner(t *testing.T) {
	for _, gone := range []bool{false, true} {
		t.Run(fmt.Sprintf("gone=%v", gone), func(t *testing.T) {
			h := newHarness(t, 3)
			w := h.wal()
			w.series(1, 300)
			w.scrape(1, 300, 1000)
			h.run()
			h.want(w.all, false)
			bad := h.ingesters[1]
			if gone {
				bad.kill()
			} else {
				bad.set(func() { bad.stalled = true })
			}
			ts := int64(1000)
			for range 300 {
				ts += 1000
				w.scrape(1, 300, ts)
			}
			// Without the bad one's memory: the others have everything after its
			// first scrape, which is not durable anywhere yet.
			eventually(t, "the others have the rest", func() bool {
				n := 0
				for _, f := range []*fakeIngester{h.ingesters[0], h.ingesters[2]} {
					f.set(func() {
						for _, samples := range f.memory {
							if samples[ts] != "" {
								n++
							}
						}
					})
				}
				return n >= 299
			})
			if n := h.metric("epimetheus_sidecar_owner_detachments_total"); n == 0 {
				t.Error("no detachment counted")
			}
			if gone {
				bad.start()
			} else {
				bad.set(func() { bad.stalled = false })
			}
			eventually(t, "it gets samples again", func() bool {
				ts += 1000
				w.scrape(1, 300, ts)
				n := 0
				bad.set(func() {
					for _, samples := range bad.memory {
						if samples[ts-1000] != "" {
							n++
						}
					}
				})
				return n > 0
			})
			for _, f := range h.ingesters {
				f.set(func() { f.autoFlush = true; f.flushLocked() })
			}
			h.want(w.all, true)
			h.settled()
		})
	}
}

// All ingesters are gone: the tail waits, in bounded memory, and goes on.
func TestAllGone(t *testing.T) {
	h := newHarness(t, 2)
	w := h.wal()
	w.series(1, 100)
	h.run()
	w.scrape(1, 100, 1000)
	h.want(w.all, false)
	h.ingesters[0].kill()
	h.ingesters[1].kill()
	for ts := int64(2000); ts < 400000; ts += 1000 {
		w.scrape(1, 100, ts)
	}
	eventually(t, "not ready", func() bool { return h.sidecar.Ready() != nil })
	h.ingesters[0].start()
	h.ingesters[1].start()
	h.want(w.all, false)
}

// The ring changes: series move, and what was sent by the old ring and is not
// durable is re-sent whole when an old owner leaves without a flush.
func TestRingChange(t *testing.T) {
	h := newHarness(t, 3)
	h.gateway.set(h.ingesters[0])
	w := h.wal()
	w.series(1, 100)
	w.scrape(1, 100, 1000)
	h.run()
	h.want(w.all, false)
	h.gateway.set(h.ingesters...)
	eventually(t, "the new ones get series", func() bool {
		w.scrape(1, 100, int64(len(w.all[w.lsets[1]])+1)*1000)
		n := 0
		for _, f := range h.ingesters[1:] {
			f.set(func() { n += len(f.memory) })
		}
		return n > 40
	})
	h.ingesters[0].kill()
	h.gateway.set(h.ingesters[1:]...)
	h.ingesters[0].set(func() { h.ingesters[0].memory = nil })
	h.want(w.all, false)
	if n := h.metric("epimetheus_sidecar_resent_samples_total"); n == 0 {
		t.Error("no samples counted as sent again")
	}
}

func TestGatewayDown(t *testing.T) {
	h := newHarness(t, 1)
	h.gateway.mu.Lock()
	h.gateway.down = true
	h.gateway.mu.Unlock()
	w := h.wal()
	w.series(1, 10)
	w.scrape(1, 10, 1000)
	h.run()
	eventually(t, "errors are counted", func() bool { return h.metric("epimetheus_sidecar_ring_errors_total") > 1 })
	if err := h.sidecar.Ready(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("ready: %v", err)
	}
	h.gateway.mu.Lock()
	h.gateway.down = false
	h.gateway.mu.Unlock()
	h.want(w.all, false)
}

// External labels follow a reload, and what is sent again has those of its time.
func TestExternalLabelsReload(t *testing.T) {
	h := newHarness(t, 1)
	file := filepath.Join(t.TempDir(), "prometheus.yml")
	t.Setenv("SIDECAR_TEST_REGION", "eu")
	os.WriteFile(file, []byte("global:\n  external_labels:\n    region: ${SIDECAR_TEST_REGION}\n    i: x\n"), 0o644)
	h.opts.PrometheusConfigFile = file
	w := h.wal()
	w.ext = labels.FromStrings("region", "eu")
	w.series(1, 20)
	w.scrape(1, 20, time.Now().Add(-time.Minute).UnixMilli())
	h.run()
	h.want(w.all, false)

	os.WriteFile(file, []byte("global:\n  external_labels:\n    region: us\n"), 0o644)
	eventually(t, "new labels are seen", func() bool { return h.sidecar.Status().ExternalLabels.Get("region") == "us" })
	w.ext = labels.FromStrings("region", "us")
	for ref := range w.lsets {
		w.lsets[ref] = strings.ReplaceAll(w.lsets[ref], `"eu"`, `"us"`)
	}
	w.scrape(1, 20, time.Now().Add(time.Second).UnixMilli())
	h.want(w.all, false)

	// Lost: both are sent again, each under its labels.
	h.ingesters[0].kill()
	h.ingesters[0].start()
	h.want(w.all, false)

	// So they are when the sidecar has been started anew in between.
	h.stop()
	h.ingesters[0].kill()
	h.ingesters[0].start()
	h.run()
	h.want(w.all, false)
}

func TestWhatIsNotSent(t *testing.T) {
	h := newHarness(t, 1)
	h.opts.RelabelConfigs = []*relabel.Config{
		{Action: relabel.Drop, SourceLabels: model.LabelNames{"drop"}, Regex: relabel.MustNewRegexp("yes"), Separator: ";", NameValidationScheme: model.UTF8Validation},
		{Action: relabel.LabelDrop, Regex: relabel.MustNewRegexp("secret"), Separator: relabel.DefaultRelabelConfig.Separator, Replacement: relabel.DefaultRelabelConfig.Replacement, NameValidationScheme: model.UTF8Validation},
	}
	h.ingesters[0].refuse = "refused_metric"
	w := h.wal()
	var long strings.Builder
	for long.Len() < maxLabelsBytes {
		long.WriteString("long")
	}
	sb := labels.NewScratchBuilder(3)
	sb.Add("__name__", "twice")
	sb.Add("a", "1")
	sb.Add("a", "2")
	w.log(w.enc.Series([]record.RefSeries{
		{Ref: 1, Labels: labels.FromStrings("__name__", "good", "secret", "s")},
		{Ref: 2, Labels: labels.FromStrings("job", "nameless")},
		{Ref: 3, Labels: labels.FromStrings("__name__", "bad", "l", "\xff\xfe")},
		{Ref: 4, Labels: sb.Labels()},
		{Ref: 5, Labels: labels.FromStrings("__name__", "dropped", "drop", "yes")},
		{Ref: 6, Labels: labels.FromStrings("__name__", "long", "l", long.String())},
		{Ref: 7, Labels: labels.FromStrings("__name__", "refused_metric")},
	}, nil))
	var s []record.RefSample
	for ref := chunks.HeadSeriesRef(1); ref <= 8; ref++ {
		s = append(s, record.RefSample{Ref: ref, T: 1000, V: 1})
	}
	s = append(s, record.RefSample{Ref: 1, T: 1000, V: 2}, record.RefSample{Ref: 1, T: 500, V: 3}, record.RefSample{Ref: 1, T: 1000, V: 4})
	w.log(w.enc.Samples(s, nil))
	h.run()
	h.want(map[string]map[int64]string{`{__name__="good"}`: {1000: fmt.Sprintf("0 %x", math.Float64bits(1)), 500: fmt.Sprintf("0 %x", math.Float64bits(3))}}, false)
	for reason, n := range map[string]float64{
		"no_metric_name": 1, "invalid_labels": 1, "duplicate_label_name": 1, "relabelled": 1, "labels_too_long": 1, "unknown_ref": 1, "equal_timestamp": 2,
	} {
		if got := h.metric("epimetheus_sidecar_dropped_samples_total", reason); got != n {
			t.Errorf("%s: %v counted, want %v", reason, got, n)
		}
	}
	eventually(t, "refusal is counted", func() bool {
		return testutil.CollectAndCount(h.sidecar.shipper.metrics.refused) == 1 && h.metric("epimetheus_sidecar_refused_samples_total", "test_limit") == 1
	})
	// The process is gone: read again, the first in WAL order wins again.
	h.ingesters[0].kill()
	h.ingesters[0].start()
	h.want(map[string]map[int64]string{`{__name__="good"}`: {1000: fmt.Sprintf("0 %x", math.Float64bits(1)), 500: fmt.Sprintf("0 %x", math.Float64bits(3))}}, false)
}

// What doesn't fit into a message is left out, and doesn't stop the rest.
func TestTooLarge(t *testing.T) {
	h := newHarness(t, 1)
	w := h.wal()
	w.series(1, 3)
	long := strings.Repeat("x", maxRecordBytes/2)
	w.log(w.enc.Series([]record.RefSeries{{Ref: 9, Labels: labels.FromStrings("__name__", "m", "a", long, "b", long)}}, nil))
	w.log(w.enc.Metadata([]record.RefMetadata{{Ref: 1, Type: 1, Help: strings.Repeat("x", 5<<20)}, {Ref: 2, Type: 1, Help: "h"}}, nil))
	n := 600_000
	ints := &histogram.Histogram{PositiveSpans: []histogram.Span{{Length: uint32(n)}}, PositiveBuckets: make([]int64, n)}
	floats := &histogram.FloatHistogram{PositiveSpans: []histogram.Span{{Length: uint32(n)}}, PositiveBuckets: make([]float64, n)}
	for i := range n {
		ints.PositiveBuckets[i] = w.rnd.Int63()
		floats.PositiveBuckets[i] = w.rnd.Float64()
	}
	rec, _ := w.enc.HistogramSamples([]record.RefHistogramSample{{Ref: 1, T: 1000, H: ints}}, nil)
	w.log(rec)
	rec, _ = w.enc.FloatHistogramSamples([]record.RefFloatHistogramSample{{Ref: 2, T: 1000, FH: floats}}, nil)
	w.log(rec)
	w.log(w.enc.Exemplars([]record.RefExemplar{{Ref: 1, T: 1000, Labels: labels.FromStrings("l", strings.Repeat("x", 5<<20))}}, nil))
	w.log(w.enc.Samples([]record.RefSample{{Ref: 9, T: 2000, V: 1}}, nil))
	w.scrape(1, 3, 2000)
	for range 2 {
		h.run()
		h.want(w.all, false)
		h.ingesters[0].set(func() {
			if d := cmp.Diff(map[string]string{w.lsets[2]: "counter  h"}, h.ingesters[0].metadata); d != "" || len(h.ingesters[0].exemplars) > 0 {
				t.Errorf("exemplars %d, metadata (-want +got):\n%.1000s", len(h.ingesters[0].exemplars), d)
			}
		})
		for reason, n := range map[string]float64{"too_large": 4, "labels_too_long": 1, "unknown_ref": 0} {
			eventually(t, fmt.Sprint(n, " are counted as ", reason), func() bool { return h.metric("epimetheus_sidecar_dropped_samples_total", reason) == n })
		}
		h.stop()
	}
}

// A batch has a bound for withdrawals too: the rest goes with the next.
func TestManyWithdrawals(t *testing.T) {
	ss := &session{}
	for i := range uint32(2*maxWithdrawals + 1) {
		ss.drop(i)
	}
	var enc ship.Encoder
	next := uint32(0)
	for _, n := range []int{maxWithdrawals, maxWithdrawals, 1, 0} {
		b := ss.take(&enc)
		if len(b.Withdraw) != n || len(ss.free) != int(next)+n || ss.bytes != withdrawalBytes*len(ss.withdraw) {
			t.Fatalf("%d withdrawals, want %d; %d refs free; %d bytes left", len(b.Withdraw), n, len(ss.free), ss.bytes)
		}
		for _, ref := range b.Withdraw {
			if ref != next {
				t.Fatalf("ref %d, want %d", ref, next)
			}
			next++
		}
	}
}

// A ref that is issued anew means the new series from there on, and the old one
// for ranges that lie before.
func TestRefRedefined(t *testing.T) {
	h := newHarness(t, 1)
	w := h.wal()
	h.run()
	w.series(1, 10)
	w.scrape(1, 10, 1000)
	h.want(w.all, false)
	w.log(w.enc.Series([]record.RefSeries{{Ref: 5, Labels: labels.FromStrings("__name__", "another")}}, nil))
	w.lsets[5] = `{__name__="another"}`
	w.scrape(1, 10, 2000)
	h.want(w.all, false)
	h.ingesters[0].kill()
	h.ingesters[0].start()
	h.want(w.all, false)
}

// Series that Prometheus dropped are forgotten once its WAL checkpoint doesn't
// name them, and withdrawn.
func TestSeriesGone(t *testing.T) {
	h := newHarness(t, 1)
	h.ingesters[0].autoFlush = true
	w := h.wal()
	w.series(1, 101)
	w.scrape(1, 101, 1000)
	h.run()
	h.want(w.all, true)
	for range 3 {
		w.wl.NextSegment()
	}
	w.scrape(1, 50, 2000)
	h.want(w.all, true)
	if _, err := wlog.Checkpoint(promslog.NewNopLogger(), w.wl, 0, 1, func(r chunks.HeadSeriesRef) bool { return r < 50 }, 2000, false, true); err != nil {
		t.Fatal(err)
	}
	w.wl.Truncate(2)
	eventually(t, "series are forgotten", func() bool { return h.sidecar.Status().Series == 49 })
	eventually(t, "series are withdrawn", func() bool {
		n := 0
		h.ingesters[0].set(func() { n = h.ingesters[0].withdrawn })
		return n == 51
	})
	w.series(200, 240)
	w.scrape(1, 50, 3000)
	w.scrape(200, 240, 3000)
	h.want(w.all, true)
	h.stop()
	// A first start from that WAL checkpoint sees what is still there.
	os.RemoveAll(h.dataDir)
	for _, f := range h.ingesters {
		f.set(func() { f.durable = map[string]map[int64]string{} })
	}
	h.run()
	for s, samples := range w.all {
		if delete(samples, 1000); len(samples) == 0 {
			delete(w.all, s)
		}
	}
	h.want(w.all, true)
}

// Samples of a series can outlive its record in the log: until they are durable,
// the series is not forgotten.
func TestSeriesGoneBeforeItsSamplesAreDurable(t *testing.T) {
	h := newHarness(t, 1)
	w := h.wal()
	w.series(1, 101)
	w.scrape(1, 101, 1000)
	h.run()
	h.want(w.all, false)
	h.ingesters[0].flush()
	for range 2 {
		w.wl.NextSegment()
	}
	w.scrape(1, 101, 2000)
	h.want(w.all, false)
	w.wl.NextSegment()
	if _, err := wlog.Checkpoint(promslog.NewNopLogger(), w.wl, 0, 1, func(r chunks.HeadSeriesRef) bool { return r < 50 }, 3000, false, true); err != nil {
		t.Fatal(err)
	}
	w.wl.Truncate(2)
	n := h.metric("epimetheus_sidecar_checkpoints_total")
	eventually(t, "the WAL checkpoint was looked at", func() bool { return h.metric("epimetheus_sidecar_checkpoints_total") >= n+5 })
	h.ingesters[0].kill()
	h.ingesters[0].start()
	h.want(w.all, false)
	h.ingesters[0].flush()
	h.want(w.all, true)
	w.scrape(1, 49, 3000)
	h.ingesters[0].set(func() { h.ingesters[0].autoFlush = true })
	h.want(w.all, true)
	eventually(t, "series are forgotten", func() bool { return h.sidecar.Status().Series == 49 })
}

// The dictionary is lost or damaged: rebuilt from the WAL.
func TestDictionaryLost(t *testing.T) {
	h := newHarness(t, 1)
	h.ingesters[0].autoFlush = true
	w := h.wal()
	w.series(1, 50)
	w.scrape(1, 50, 1000)
	h.run()
	h.want(w.all, true)
	h.settled()
	for i, damage := range []func(string){
		func(p string) { os.Remove(p) },
		func(p string) { os.WriteFile(p, []byte("rubbish"), 0o600) },
		func(p string) { os.Truncate(p, 500) },
	} {
		h.stop()
		damage(filepath.Join(h.dataDir, "dictionary"))
		w.scrape(1, 50, int64(2000+i))
		h.run()
		h.want(w.all, true)
	}
}

func TestNewErrors(t *testing.T) {
	h := newHarness(t, 1)
	h.wal()
	h.run()
	if _, err := New(h.opts, promslog.NewNopLogger(), nil); err == nil || !strings.Contains(err.Error(), "another sidecar") {
		t.Errorf("second sidecar on one directory: %v", err)
	}
	for want, change := range map[string]func(*Options){
		"no gateway":                  func(o *Options) { o.Gateways = nil },
		"not a URL":                   func(o *Options) { o.Gateways = []string{"gateway:9009"} },
		"is Prometheus's":             func(o *Options) { o.DataDir = o.PrometheusDir },
		"not a Prometheus data":       func(o *Options) { o.PrometheusDir = t.TempDir() + "/x" },
		"give one of the two":         func(o *Options) { o.PrometheusURL, o.PrometheusConfigFile = "http://x", "y" },
		"relabel configuration 1":     func(o *Options) { o.RelabelConfigs = []*relabel.Config{{}} },
		"shards -1":                   func(o *Options) { o.Shards = -1 },
		"own data directory is not g": func(o *Options) { o.DataDir = "" },
	} {
		o := h.opts
		change(&o)
		if _, err := New(o, promslog.NewNopLogger(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	h.stop()
	p := checkpointPath(h.dataDir)
	for _, bad := range []string{"{", `{"version":2}`, `{"version":1,"source":"x"}`} {
		os.WriteFile(p, []byte(bad), 0o600)
		if _, err := New(h.opts, promslog.NewNopLogger(), nil); err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

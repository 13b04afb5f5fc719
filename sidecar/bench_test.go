package sidecar

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// sink is a link to an ingester that takes everything at once.
type sink struct {
	seq   uint64
	bytes int64
}

func (k *sink) TrySend(b *shippb.Batch) (uint64, bool) {
	k.seq++
	// What gRPC would do in this process.
	raw, err := proto.Marshal(b)
	k.bytes += int64(len(raw))
	return k.seq, err == nil
}

func (k *sink) State() ship.SessionState {
	return ship.SessionState{Connected: true, Received: k.seq, Durable: k.seq, Sent: k.seq, WindowBytes: 4 << 20, LastAnswer: time.Now()}
}

func (k *sink) Beat() {}

func (k *sink) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// benchShipper returns a shipper over dir that sends to sinks, ready to read.
func benchShipper(tb testing.TB, dir string, members int) (*shipper, *[]*sink, func()) {
	tb.Helper()
	s, err := New(Options{PrometheusDir: dir, DataDir: tb.TempDir(), Tenant: "bench", Gateways: []string{"http://localhost"}, CheckpointInterval: time.Hour}, promslog.NewNopLogger(), nil)
	if err != nil {
		tb.Fatal(err)
	}
	sh := s.shipper
	sinks := &[]*sink{}
	sh.connect = func(ring.Member) link {
		k := &sink{}
		*sinks = append(*sinks, k)
		return k
	}
	var ms []ring.Member
	for i := range members {
		ms = append(ms, ring.Member{ID: fmt.Sprint("ingester-", i), Address: "x", State: ring.Active})
	}
	sh.ringWatch.ring = ring.New(ring.NewSnapshot(ms))
	sh.external.set(labels.FromStrings("cluster", "bench"), time.Time{})
	sh.group = &errgroup.Group{}
	sh.sessions, sh.owners, sh.splits, sh.acc, sh.warned, sh.gcDone = []*session{nil}, map[string]*owner{}, map[SplitID]*split{}, &account{}, map[string]bool{}, -1
	sh.others = map[extraKey]resolved{}
	if err := sh.start(context.Background()); err != nil {
		tb.Fatal(err)
	}
	return sh, sinks, func() {
		for _, ss := range sh.sessions {
			if ss != nil {
				ss.cancel()
			}
		}
		sh.group.Wait()
		sh.files.Close()
		sh.dict.close()
		s.lock.Release()
	}
}

func (s *shipper) readAll(ctx context.Context) {
	s.housekeep(ctx)
	for more := true; more; s.housekeep(ctx) {
		more, _ = s.readTail(ctx)
	}
	s.flushAll(ctx)
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkTail reads a WAL that Prometheus's tsdb package wrote from data of
// real shape, and encodes it for three ingesters: the sidecar's whole work but
// for the network.
func BenchmarkTail(b *testing.B) {
	const series, targets, steps = 20000, 40, 120
	for _, st := range []bool{false, true} {
		b.Run(fmt.Sprintf("v2=%v", st), func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "prom")
			samples := writeWAL(b, dir, series, targets, steps, st)
			b.ReportAllocs()
			var sent int64
			began := cpu()
			for b.Loop() {
				s, sinks, done := benchShipper(b, dir, 3)
				s.readAll(context.Background())
				sent = 0
				for _, k := range *sinks {
					sent += k.bytes
				}
				done()
			}
			used := (cpu() - began).Seconds() / float64(b.N)
			b.ReportMetric(used/float64(samples)*1e6, "cpu-s/Msamples")
			b.ReportMetric(float64(sent)/float64(samples), "sent-bytes/sample")
			b.ReportMetric(float64(samples)*float64(b.N)/b.Elapsed().Seconds(), "samples/s")
		})
	}
}

// writeWAL has Prometheus's tsdb package write generated data, a commit per
// target and scrape.
func writeWAL(tb testing.TB, dir string, series, targets, steps int, st bool) (samples int) {
	tb.Helper()
	opts := tsdb.DefaultOptions()
	opts.WALCompression = compression.Snappy
	if opts.EnableSTStorage = st; st {
		opts.FloatChunkEncoding = chunkenc.EncXOR2
	}
	opts.NoLockfile = true
	db, err := tsdb.Open(dir, promslog.NewNopLogger(), nil, opts, nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer db.Close()
	c := gen.Config{Series: series, Targets: targets, Start: 1_700_000_000_000, Interval: 15000, Seed: 1}
	c.End = c.Start + int64(steps)*c.Interval
	byTarget := map[int][]*gen.Iter{}
	lsets := map[*gen.Iter]labels.Labels{}
	for _, s := range c.AllSeries() {
		it := s.Iter(c)
		b := labels.NewScratchBuilder(len(s.Labels))
		for _, l := range s.Labels {
			b.Add(l.Name, l.Value)
		}
		lsets[it] = b.Labels()
		byTarget[s.Target] = append(byTarget[s.Target], it)
	}
	for range steps {
		for t := range targets {
			app := db.Appender(context.Background())
			for _, it := range byTarget[t] {
				ts, v, ok := it.Next()
				if !ok {
					continue
				}
				if _, err := app.Append(0, lsets[it], ts, v); err == nil {
					samples++
				}
			}
			if err := app.Commit(); err != nil {
				tb.Fatal(err)
			}
		}
	}
	return samples
}

// TestMemoryPerSeries holds the sidecar to its bound: bytes of resident memory
// that each further active series costs, with what the collector leaves lying.
func TestMemoryPerSeries(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a second or two")
	}
	if raceEnabled {
		t.Skip("the race detector takes memory of its own")
	}
	const first, all, bound = 100_000, 600_000, 200
	dir := filepath.Join(t.TempDir(), "prom")
	os.MkdirAll(filepath.Join(dir, "chunks_head"), 0o755)
	wl, err := wlog.New(promslog.NewNopLogger(), nil, filepath.Join(dir, "wal"), compression.Snappy)
	if err != nil {
		t.Fatal(err)
	}
	defer wl.Close()
	write := func(from, to int) {
		const scrape = 1000
		var enc record.Encoder
		for i := from; i < to; i += scrape {
			var series []record.RefSeries
			var samples []record.RefSample
			for k := i; k < i+scrape; k++ {
				series = append(series, record.RefSeries{Ref: chunks.HeadSeriesRef(k + 1), Labels: labels.FromStrings(
					"__name__", "container_network_receive_bytes_total", "namespace", fmt.Sprint("ns-", k%50), "pod", fmt.Sprint("pod-", k/20), "interface", "eth0", "i", fmt.Sprint(k))})
				samples = append(samples, record.RefSample{Ref: chunks.HeadSeriesRef(k + 1), T: 1000, V: float64(k)})
			}
			if err := wl.Log(enc.Series(series, nil), enc.Samples(samples, nil)); err != nil {
				t.Fatal(err)
			}
		}
		for step := range int64(3) {
			for i := from; i < to; i += scrape {
				var samples []record.RefSample
				for k := i; k < i+scrape; k++ {
					samples = append(samples, record.RefSample{Ref: chunks.HeadSeriesRef(k + 1), T: 2000 + step, V: float64(k)})
				}
				if err := wl.Log(enc.Samples(samples, nil)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	ctx := context.Background()
	write(0, first)
	s, _, done := benchShipper(t, dir, 3)
	defer done()
	s.readAll(ctx)
	settle := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	debug.FreeOSMemory()
	heap0 := settle()
	rss0 := rss(t)
	write(first, all)
	debug.FreeOSMemory()
	s.readAll(ctx)
	rss1 := rss(t) // with garbage
	heap1 := settle()
	if s.dict.count != all {
		t.Fatalf("%d series", s.dict.count)
	}
	live := float64(heap1-heap0) / (all - first)
	resident := float64(rss1-rss0) / (all - first)
	t.Logf("per series: %.0f bytes live, %.0f bytes resident; fixed %.1f MB resident", live, resident, float64(rss0)/1e6)
	if resident > bound {
		t.Errorf("%.0f bytes of memory per series, the bound is %d", resident, bound)
	}
}

func rss(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skipf("no resident size to be had: %v", err)
	}
	n, err := strconv.ParseInt(string(bytes.Fields(b)[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n * int64(os.Getpagesize())
}

package ingest

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

var benchSeries = flag.Int("bench-series", 50_000, "series of BenchmarkReplay and BenchmarkReceive")

// shipped are the batches that a sidecar makes of a data set: of about 256 KiB, in
// the order of scrapes.
func shipped(c gen.Config, send func(*shippb.Batch)) (samples int) {
	type one struct {
		ref uint32
		it  *gen.Iter
	}
	targets := make([][]one, c.Targets)
	b, cols := &shippb.Batch{}, ship.Columns{}
	var enc ship.Encoder
	size, seq := 0, uint64(0)
	flush := func() {
		seq++
		b.Seq, b.Columns = seq, enc.Encode(nil, &cols)
		send(b)
		cols.Reset()
		b, size = &shippb.Batch{}, 0
	}
	for i, s := range c.AllSeries() {
		targets[s.Target] = append(targets[s.Target], one{uint32(i), s.Iter(c)})
		p := &shippb.Series{Ref: uint32(i)}
		for _, l := range s.Labels {
			p.Labels = append(p.Labels, l.Name, l.Value)
			size += len(l.Name) + len(l.Value) + 2
		}
		if b.Announce = append(b.Announce, p); size > 256<<10 {
			flush()
		}
	}
	for range c.Steps() {
		for _, series := range targets {
			for _, s := range series {
				if t, v, ok := s.it.Next(); ok {
					f := &cols.Floats
					f.Ref, f.T, f.V = append(f.Ref, s.ref), append(f.T, t), append(f.V, v)
					samples++
					size += 12
				}
			}
			if size > 256<<10 {
				flush()
			}
		}
	}
	flush()
	return samples
}

func benchIngester(tb testing.TB, dir string) *Ingester {
	tb.Helper()
	i, err := New(Options{Member: "m", RowWidth: index.Width, CommitLog: dir, FlushBytes: 1 << 40, MaxBytes: 1 << 40},
		publishFunc(func(context.Context, ulid.ULID, []byte, *chunkfmt.Summary) error { return nil }),
		promslog.NewNopLogger(), prometheus.NewRegistry())
	if err != nil {
		tb.Fatal(err)
	}
	return i
}

// wideSet is half an hour at 15 s of series that no cache holds.
func wideSet(series int) gen.Config {
	c := gen.Config{Series: series, Targets: series / 1000, Start: 1_700_000_000_000, Interval: 15_000, Seed: 1}
	c.End = c.Start + 120*c.Interval
	return c
}

// feed applies the data set as streams do, in sessions that take turns.
func feed(tb testing.TB, i *Ingester, c gen.Config) (samples int) {
	tb.Helper()
	s := &session{id: sessionID{tenant: "a", id: [16]byte{1}}, changed: make(chan struct{}, 1)}
	var dec ship.Decoder
	var cols ship.Columns
	return shipped(c, func(b *shippb.Batch) {
		if err := i.receive.apply(s, b, &dec, &cols); err != nil {
			tb.Fatal(err)
		}
	})
}

// BenchmarkReplay fills a head from a commit log. The series are one session's,
// which one core replays.
func BenchmarkReplay(b *testing.B) {
	dir := b.TempDir()
	ctx, cancel := context.WithCancel(b.Context())
	i := benchIngester(b, dir)
	ended := make(chan error, 1)
	go func() { ended <- i.log.Run(ctx) }()
	samples := feed(b, i, wideSet(*benchSeries))
	cancel()
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
	size := int64(0)
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range names {
		info, err := os.Stat(n)
		if err != nil {
			b.Fatal(err)
		}
		size += info.Size()
	}
	b.ReportAllocs()
	began := cpu(b)
	for b.Loop() {
		i := benchIngester(b, dir)
		if err := i.Replay(b.Context()); err != nil {
			b.Fatal(err)
		}
		if n := i.Size().Samples; n != int64(samples) || len(i.receive.sessions) != 1 {
			b.Fatalf("%d samples of %d, %d sessions", n, samples, len(i.receive.sessions))
		}
		if err := i.log.Close(); err != nil {
			b.Fatal(err)
		}
	}
	used := (cpu(b) - began).Seconds()
	b.ReportMetric(float64(samples*b.N)/b.Elapsed().Seconds()/1e6, "Msamples/s")
	b.ReportMetric(float64(samples*b.N)/used/1e6, "Msamples/cpu-s")
	b.ReportMetric(float64(size)/float64(samples), "B/sample")
}

// BenchmarkReceive applies what streams bring to a head, without the network: with
// a commit log and without.
func BenchmarkReceive(b *testing.B) {
	c := wideSet(*benchSeries)
	var batches []*shippb.Batch
	samples := shipped(c, func(x *shippb.Batch) { batches = append(batches, x) })
	for _, logged := range []bool{false, true} {
		name := "log=off"
		if logged {
			name = "log=on"
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			used := 0.0
			for b.Loop() {
				dir := ""
				if logged {
					dir = b.TempDir()
				}
				i := benchIngester(b, dir)
				ctx, cancel := context.WithCancel(b.Context())
				ended := make(chan error, 1)
				if logged {
					go func() { ended <- i.log.Run(ctx) }()
				} else {
					ended <- nil
				}
				s := &session{id: sessionID{tenant: "a"}, changed: make(chan struct{}, 1)}
				var dec ship.Decoder
				var cols ship.Columns
				began := cpu(b)
				for _, x := range batches {
					if logged {
						if err := i.log.Wait(ctx); err != nil {
							b.Fatal(err)
						}
					}
					if err := i.receive.apply(s, x, &dec, &cols); err != nil {
						b.Fatal(err)
					}
				}
				cancel()
				if err := <-ended; err != nil {
					b.Fatal(err)
				}
				used += (cpu(b) - began).Seconds()
			}
			b.ReportMetric(used/float64(samples*b.N)*1e6, "cpu-s/Msamples")
		})
	}
}

package bench

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/index"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

var transferDays = flag.Int("bench.transfer-days", 30, "how many days the block of BenchmarkTransfer spans")

// BenchmarkTransfer imports a block of Prometheus with 1,000 series at 15 s with the
// built binary into files, and exports it again: samples per CPU second of the
// process, and the most memory that it had.
func BenchmarkTransfer(b *testing.B) {
	const day, interval = int64(24 * 3_600_000), int64(15_000)
	start := 1_700_006_400_000 / (7 * day) * 7 * day
	c := gen.Config{
		Series: 1000, Targets: 2, Churn: 0.1, Seed: 1, Interval: interval, Start: start, End: start + int64(*transferDays)*day,
	}
	bin, blocks := binary(b), b.TempDir()
	samples := writeTSDBBlock(b, filepath.Join(blocks, ulid.Make().String()), c)
	run := func(b *testing.B, args ...string) {
		b.Helper()
		var out bytes.Buffer
		cmd := exec.CommandContext(b.Context(), bin, append([]string{"tool"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }() // it is waited for below
		// What the system tells at the end counts what this process had when it began that one.
		peak, look := 0.0, time.NewTicker(20*time.Millisecond)
		defer look.Stop()
		for running := true; running; {
			select {
			case err := <-ended:
				if running = false; err != nil {
					b.Fatalf("%q: %v\n%s", args, err, out.Bytes())
				}
			case <-look.C:
				if n, err := memoryOf(cmd.Process.Pid, "VmHWM"); err == nil { // else it has ended
					peak = max(peak, n)
				}
			}
		}
		b.ReportMetric(float64(samples)/(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()).Seconds()/1e6, "Msamples/cpu-s")
		b.ReportMetric(peak/(1<<20), "MiB-max-rss")
	}
	kept := b.TempDir() // outlives the parts of the benchmark
	var data string
	b.Run("import", func(b *testing.B) {
		for b.Loop() {
			data = b.TempDir()
			run(b, "import", "--data.dir="+data, blocks)
		}
		if err := os.Rename(data, filepath.Join(kept, "data")); err != nil {
			b.Fatal(err)
		}
		data = filepath.Join(kept, "data")
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			run(b, "blocks", "verify", "--data.dir="+data)
		}
	})
	for _, width := range []string{"2h", "24h"} {
		var out string
		b.Run("export/range="+width, func(b *testing.B) {
			for b.Loop() {
				out = filepath.Join(b.TempDir(), "out")
				run(b, "export", "--data.dir="+data, "--block-range="+width, out)
			}
			if n := sameSamples(b, blocks, out, c.Start, c.End-1); n != samples {
				b.Errorf("%d samples of %d are the same", n, samples)
			}
		})
	}
}

// sameSamples compares all samples in two folders of blocks, bit for bit, and gives their
// number.
func sameSamples(b *testing.B, want, got string, mint, maxt int64) (n uint64) {
	b.Helper()
	all := func(dir string) storage.SeriesSet {
		db, err := tsdb.OpenDBReadOnly(dir, b.TempDir(), nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := db.Close(); err != nil {
				b.Error(err)
			}
		})
		q, err := db.Querier(mint, maxt)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := q.Close(); err != nil {
				b.Error(err)
			}
		})
		return q.Select(b.Context(), true, nil, labels.MustNewMatcher(labels.MatchNotEqual, model.MetricNameLabel, ""))
	}
	x, y := all(want), all(got)
	var xs, ys chunkenc.Iterator
	for x.Next() {
		if !y.Next() || !labels.Equal(x.At().Labels(), y.At().Labels()) {
			b.Fatalf("series %s is missing, or another is there: %v", x.At().Labels(), y.Err())
		}
		xs, ys = x.At().Iterator(xs), y.At().Iterator(ys)
		for kind := xs.Next(); kind != chunkenc.ValNone; kind = xs.Next() {
			t, v := xs.At()
			if k := ys.Next(); k != kind {
				b.Fatalf("series %s at %d: %v in place of %v", x.At().Labels(), t, k, kind)
			}
			if u, w := ys.At(); u != t || math.Float64bits(w) != math.Float64bits(v) {
				b.Fatalf("series %s: %v at %d in place of %v at %d", x.At().Labels(), w, u, v, t)
			}
			n++
		}
		if k := ys.Next(); k != chunkenc.ValNone {
			b.Fatalf("series %s has samples more", x.At().Labels())
		}
		if xs.Err() != nil || ys.Err() != nil {
			b.Fatal(xs.Err(), ys.Err())
		}
	}
	if y.Next() || x.Err() != nil || y.Err() != nil {
		b.Fatalf("a series more than there should be, or %v, %v", x.Err(), y.Err())
	}
	return n
}

// writeTSDBBlock makes a block of Prometheus and returns its number of samples.
func writeTSDBBlock(b *testing.B, dir string, c gen.Config) (n uint64) {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(os.MkdirAll(dir, 0o755))
	type series struct {
		gen *gen.Series
		ls  labels.Labels
	}
	var all []series
	symbols := map[string]bool{"": true}
	for _, s := range c.AllSeries() {
		lb := labels.NewScratchBuilder(len(s.Labels))
		for _, l := range s.Labels {
			lb.Add(l.Name, l.Value)
			symbols[l.Name], symbols[l.Value] = true, true
		}
		lb.Sort()
		all = append(all, series{s, lb.Labels()})
	}
	slices.SortFunc(all, func(x, y series) int { return labels.Compare(x.ls, y.ls) })
	cw, err := chunks.NewWriter(filepath.Join(dir, "chunks"))
	must(err)
	iw, err := index.NewWriter(b.Context(), filepath.Join(dir, "index"))
	must(err)
	var sorted []string
	for s := range symbols {
		sorted = append(sorted, s)
	}
	slices.Sort(sorted)
	for _, s := range sorted {
		must(iw.AddSymbol(s))
	}
	for i, s := range all {
		var metas []chunks.Meta
		var app chunkenc.Appender
		for it := s.gen.Iter(c); ; {
			t, v, ok := it.Next()
			if !ok {
				break
			}
			if k := len(metas); k == 0 || metas[k-1].Chunk.NumSamples() >= 120 {
				x := chunkenc.NewXORChunk()
				app, err = x.Appender()
				must(err)
				metas = append(metas, chunks.Meta{MinTime: t, Chunk: x})
			}
			app.Append(0, t, v)
			metas[len(metas)-1].MaxTime = t
			n++
		}
		if len(metas) > 0 {
			must(cw.WriteChunks(metas...))
			must(iw.AddSeries(storage.SeriesRef(i), s.ls, metas...)) //nolint:gosec // small
		}
	}
	must(cw.Close())
	must(iw.Close())
	id := ulid.MustParse(filepath.Base(dir))
	raw, err := json.Marshal(tsdb.BlockMeta{
		ULID: id, MinTime: c.Start, MaxTime: c.End, Version: 1, Stats: tsdb.BlockStats{NumSamples: n, NumSeries: uint64(len(all))},
		Compaction: tsdb.BlockMetaCompaction{Level: 1, Sources: []ulid.ULID{id}},
	})
	must(err)
	must(os.WriteFile(filepath.Join(dir, "meta.json"), raw, 0o600))
	return n
}

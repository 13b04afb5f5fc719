package backfill

import (
	"context"
	"errors"
	"io"
	"math"
	"path/filepath"
	"testing"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// genBlock writes a block of two hours of generated data.
func genBlock(tb testing.TB, series int, enc chunkenc.Encoding) Block {
	tb.Helper()
	opts := tsdb.DefaultHeadOptions()
	opts.ChunkDirRoot = tb.TempDir()
	opts.ChunkRange = 2 * hour
	opts.FloatChunkEncoding.Store(uint32(enc))
	head, err := tsdb.NewHead(nil, promslog.NewNopLogger(), nil, nil, opts, nil)
	must(tb, err)
	defer head.Close()
	c := gen.Config{Series: series, Targets: 20, Start: t0, End: t0 + 2*hour, Interval: 15_000, Seed: 1}
	type writer struct {
		it     *gen.Iter
		labels labels.Labels
		ref    storage.SeriesRef
	}
	var ws []*writer
	for _, s := range c.AllSeries() {
		b := labels.NewScratchBuilder(len(s.Labels))
		for _, l := range s.Labels {
			b.Add(l.Name, l.Value)
		}
		b.Sort()
		ws = append(ws, &writer{it: s.Iter(c), labels: b.Labels()})
	}
	for range c.Steps() {
		app := head.AppenderV2(context.Background())
		for _, w := range ws {
			if t, v, ok := w.it.Next(); ok && t >= t0 && t < t0+2*hour {
				w.ref, err = app.Append(w.ref, w.labels, 0, t, v, nil, nil, storage.AppendV2Options{})
				must(tb, err)
			}
		}
		must(tb, app.Commit())
	}
	compactor, err := tsdb.NewLeveledCompactor(context.Background(), nil, promslog.NewNopLogger(), []int64{2 * hour}, nil, nil)
	must(tb, err)
	dir := tb.TempDir()
	ids, err := compactor.Write(dir, tsdb.NewRangeHead(head, t0, t0+2*hour-1), t0, t0+2*hour, nil)
	must(tb, err)
	b, err := readMeta(filepath.Join(dir, ids[0].String()))
	must(tb, err)
	return b
}

func BenchmarkRead(b *testing.B) {
	for _, enc := range []chunkenc.Encoding{chunkenc.EncXOR, chunkenc.EncXOR2} {
		b.Run(enc.String(), func(b *testing.B) {
			block := genBlock(b, 5000, enc)
			r, err := Open(block, math.MinInt64, math.MaxInt64)
			must(b, err)
			defer r.Close()
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				must(b, r.Seek(0))
				for {
					_, err := r.Next(b.Context())
					if errors.Is(err, io.EOF) {
						break
					}
					must(b, err)
				}
			}
			p := r.Progress()
			b.ReportMetric(float64(p.Samples)/b.Elapsed().Seconds(), "samples/s")
			b.ReportMetric(float64(p.Samples)/float64(p.Series), "samples/series")
			b.ReportMetric(float64(p.Bytes)/float64(p.Samples), "bytes/sample")
		})
	}
}

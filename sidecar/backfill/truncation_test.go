package backfill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"testing"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/wlog"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// What Prometheus promises without saying so, and gaps in the WAL are filled by:
// a sample that truncation took from the WAL is in the WAL checkpoint, in a block,
// or in the out-of-order log, at any time; the block comes before the log goes.
func TestTruncationLosesNothing(t *testing.T) {
	d := openDB(t, false, func(o *tsdb.Options) { o.WALSegmentSize = 32 << 10 })
	dir, err := tail.OpenDir(d.dir)
	must(t, err)
	names := map[chunks.HeadSeriesRef]string{}
	add := func(to map[string]bool, b *tail.Batch) {
		for _, s := range b.Series {
			names[s.Ref] = s.Labels.String()
		}
		for _, s := range b.Samples {
			to[fmt.Sprint(names[s.Ref], s.T)] = true
		}
		for _, s := range b.Histograms {
			to[fmt.Sprint(names[s.Ref], s.T)] = true
		}
		for _, s := range b.FloatHistograms {
			to[fmt.Sprint(names[s.Ref], s.T)] = true
		}
	}
	readWAL := func() map[string]bool {
		out := map[string]bool{}
		start, err := dir.Start(0)
		must(t, err)
		files, err := tail.NewFiles(dir, "", 0, promslog.NewNopLogger(), tail.NewMetrics(nil))
		if err != nil {
			d.t.Fatal(err)
		}
		defer files.Close()
		tl := tail.New(files, start, promslog.NewNopLogger(), tail.NewMetrics(nil))
		for {
			b, err := tl.Next()
			if errors.Is(err, io.EOF) {
				return out
			}
			must(t, err)
			add(out, b)
		}
	}
	readLog := func() map[string]bool {
		out := map[string]bool{}
		must(t, ReadWBL(t.Context(), dir, promslog.NewNopLogger(), tail.NewMetrics(nil), func(b *tail.Batch) error {
			add(out, b)
			return nil
		}))
		return out
	}
	readBlocks := func() map[string]bool {
		out := map[string]bool{}
		for _, b := range d.list() {
			r := openAll(t, b)
			got, errs := readAll(t, r)
			if len(errs) > 0 {
				t.Fatal(errs)
			}
			for _, s := range got {
				for _, l := range s.Lines {
					out[fmt.Sprint(s.Labels, timeOf(l))] = true
				}
			}
		}
		return out
	}

	d.write(t0, t0+4*hour)
	d.write(t0+hour+1, t0+2*hour)
	all := readWAL()
	late := readLog()
	if len(late) == 0 {
		t.Fatal("nothing late")
	}
	for s := range late {
		if !all[s] {
			t.Fatalf("%s is in the out-of-order log but not in the WAL", s)
		}
	}
	check := func(when string, truncated bool) {
		t.Helper()
		wal := readWAL()
		if gone := len(all) - len(wal); (gone > 0) != truncated {
			t.Errorf("%s: %d samples gone from the WAL", when, gone)
		}
		have := maps.Clone(wal)
		maps.Copy(have, readLog())
		maps.Copy(have, readBlocks())
		for s := range all {
			if !have[s] {
				t.Fatalf("%s: %s is nowhere", when, s)
			}
		}
	}
	check("at first", false)
	// The head alone: late samples that truncation takes from the WAL stay in
	// their own log.
	d.compactHead(t0, t0+2*hour)
	check("after the head", true)
	mint, ok, err := wlog.ReadMinValidTime(filepath.Join(d.dir, "wal"))
	if mint != t0+2*hour || !ok || err != nil {
		t.Errorf("WAL truncated up to %d, %v, %v", mint, ok, err)
	}
	if blocks := readBlocks(); slices.ContainsFunc(slices.Collect(maps.Keys(late)), func(s string) bool { return blocks[s] }) {
		t.Error("late samples are in the head's block")
	}
	must(t, d.db.CompactOOOHead(context.Background()))
	check("after what was late", true)
	if n := len(readLog()); n > 0 {
		t.Errorf("%d samples in the out-of-order log", n)
	}
	// A head compaction without any sample writes no block, but truncates.
	n := len(d.list())
	d.float("far", t0+20*hour, math.Pi)
	for mint := int64(t0 + 2*hour); mint < t0+10*hour; mint += 2 * hour {
		d.compactHead(mint, mint+2*hour)
	}
	check("after an empty block", true)
	if got := len(d.list()); got >= n+4 {
		t.Errorf("%d blocks, then %d", n, got)
	}
	if mint, _, _ := wlog.ReadMinValidTime(filepath.Join(d.dir, "wal")); mint <= t0+2*hour {
		t.Errorf("WAL truncated up to %d", mint)
	}
}

package backfill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
)

// same compares what the Reader gives of a block with what Prometheus's querier
// does, for several time ranges and sizes of pieces.
func same(t *testing.T, b Block) {
	t.Helper()
	mid := (b.MinTime + b.MaxTime) / 2
	whole := query(t, b)
	for _, x := range []struct {
		mint, maxt int64
		piece      int
	}{
		{math.MinInt64, math.MaxInt64, pieceSamples},
		{math.MinInt64, math.MaxInt64, 7},
		{b.MinTime, b.MaxTime, 1},
		{mid, math.MaxInt64, pieceSamples},
		{mid, mid + 20*60_000 + 1, 7},
		{math.MinInt64, mid - 30_000, 50},
		{b.MinTime + 60_000, b.MinTime + 60_000, 1},
		{b.MaxTime + 1, math.MaxInt64, 1},
	} {
		want := within(whole, x.mint, x.maxt)
		r := open(t, b, x.mint, x.maxt)
		r.maxSamples = x.piece
		got, errs := readAll(t, r)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		if d := cmp.Diff(want, withoutRefs(got)); d != "" {
			t.Fatalf("block %v, %+v: %s", b.ULID, x, d)
		}
		var n uint64
		for _, s := range got {
			n += uint64(len(s.Lines))
		}
		if p := r.Progress(); p.Samples != n || (n > 0 && p.Bytes == 0) {
			t.Fatalf("progress %+v of %d samples", p, n)
		}
	}
}

func TestAsPrometheusReads(t *testing.T) {
	for _, st := range []bool{false, true} {
		t.Run(fmt.Sprintf("st=%v", st), func(t *testing.T) {
			_, b := oneBlock(t, st)
			if b.MinTime != t0 || b.MaxTime != t0+2*hour || b.Level != 1 || b.OutOfOrder || b.Stale || !slices.Contains(b.Sources, b.ULID) {
				t.Fatalf("%+v", b)
			}
			same(t, b)
			r := openAll(t, b)
			got, _ := readAll(t, r)
			var all strings.Builder
			for _, s := range got {
				all.WriteString(strings.Join(s.Lines, "\n"))
			}
			if p := r.Progress(); p.Samples != b.NumSamples || p.Series != b.NumSeries {
				t.Errorf("read %+v, the block has %d series, %d samples", p, b.NumSeries, b.NumSamples)
			}
			for what, text := range map[string]string{
				"staleness marker":           " 7ff0000000000002",
				"histogram's marker":         " h 7ff0000000000002",
				"float histogram's marker":   " fh 7ff0000000000002",
				"negative zero":              " 8000000000000000",
				"custom buckets":             "CustomValues:[0 1 2 3 4]",
				"no counter reset":           "CounterResetHint:2",
				"gauge":                      "CounterResetHint:3",
				"start timestamp of a float": fmt.Sprintf("st=%d ", t0-hour),
			} {
				if want := st || !strings.HasPrefix(text, "st="); strings.Contains(all.String(), text) != want {
					t.Errorf("%s: %v", what, !want)
				}
			}
		})
	}
}

// Level 2 blocks, out-of-order blocks, blocks of stale series, deleted samples.
func TestBlocksOfAllKinds(t *testing.T) {
	for _, st := range []bool{false, true} {
		t.Run(fmt.Sprintf("st=%v", st), func(t *testing.T) {
			d := openDB(t, st)
			d.write(t0, t0+10*hour)
			d.write(t0+3*hour+1, t0+4*hour) // late, between the others
			d.write(t0+5*hour, t0+5*hour+10*60_000)
			for i := range int64(200) { // more than an out-of-order chunk
				d.float("late", t0+8*hour-i*1000, float64(i))
			}
			d.db.EnableCompactions()
			must(t, d.db.Compact(context.Background()))
			d.db.DisableCompactions()
			var compacted, outOfOrder int
			check := func() {
				t.Helper()
				for _, b := range d.list() {
					same(t, b)
				}
			}
			for i, b := range d.list() {
				t.Logf("%v: %d %d level %d ooo %v sources %v", b.ULID, (b.MinTime-t0)/hour, (b.MaxTime-t0)/hour, b.Level, b.OutOfOrder, b.Sources)
				if b.Level > 1 {
					compacted++
				}
				if b.OutOfOrder {
					outOfOrder++
				}
				if i > 0 && b.MaxTime > d.list()[i-1].MaxTime {
					t.Error("not newest first")
				}
			}
			if compacted == 0 {
				t.Error("no compacted block")
			}
			check()
			// Not merged with in-order blocks before the next compaction.
			d.write(t0+9*hour+1, t0+9*hour+10*60_000)
			must(t, d.db.CompactOOOHead(context.Background()))
			for _, b := range d.list() {
				if b.OutOfOrder {
					outOfOrder++
				}
			}
			if outOfOrder == 0 {
				t.Error("no out-of-order block")
			}
			check()

			must(t, d.db.Delete(context.Background(), t0+hour, t0+2*hour-7, labels.MustNewMatcher(labels.MatchRegexp, "__name__", "counter|histogram|mixed")))
			must(t, d.db.Delete(context.Background(), t0+90*60_000, t0+7*hour, labels.MustNewMatcher(labels.MatchRegexp, "__name__", "stale.*|late|custom_float_histogram")))
			must(t, d.db.Delete(context.Background(), math.MinInt64, math.MaxInt64, labels.MustNewMatcher(labels.MatchEqual, "__name__", "single")))
			check()

			d.float("stale_float", t0+10*hour+60_000, math.Float64frombits(0x7ff0000000000002))
			must(t, d.db.CompactStaleHead())
			if !slices.ContainsFunc(d.list(), func(b Block) bool { return b.Stale }) {
				t.Error("no block of stale series")
			}
			check()

			before := d.list()
			must(t, d.db.CleanTombstones())
			rewritten := 0
			for _, b := range d.list() {
				if slices.ContainsFunc(before, func(x Block) bool { return x.ULID == b.ULID }) {
					if b.Rewrites != (ulid.ULID{}) {
						t.Errorf("%v isn't rewritten", b.ULID)
					}
					continue
				}
				rewritten++
				i := slices.IndexFunc(before, func(x Block) bool { return x.ULID == b.Rewrites })
				if i < 0 || before[i].MinTime != b.MinTime || before[i].OutOfOrder != b.OutOfOrder {
					t.Errorf("%+v rewrites none", b)
				}
			}
			if rewritten == 0 {
				t.Error("no block without its deleted samples")
			}
			check()
		})
	}
}

func TestResumeAtEverySeries(t *testing.T) {
	_, b := oneBlock(t, true)
	r := openAll(t, b)
	r.maxSamples = 50
	all, _ := readAll(t, r)
	for i, s := range all {
		for _, ref := range []uint64{s.Ref, s.Ref - 1} { // refs are further apart
			must(t, r.Seek(ref))
			got, errs := readAll(t, r)
			if d := cmp.Diff(all[i:], got); d != "" || len(errs) > 0 {
				t.Fatalf("from ref %d: %v %s", ref, errs, d)
			}
		}
		// In the middle of a series, and with a piece not taken.
		must(t, r.Seek(s.Ref))
		_, err := r.Next(t.Context())
		must(t, err)
		must(t, r.Seek(0))
		if got, _ := readAll(t, r); len(got) != len(all) || !cmp.Equal(all[0], got[0]) {
			t.Fatal("not from the start again")
		}
	}
	for _, ref := range []uint64{all[len(all)-1].Ref + 1, math.MaxUint32, math.MaxUint32 + 1, math.MaxUint64} {
		must(t, r.Seek(ref))
		if _, err := r.Next(t.Context()); !errors.Is(err, io.EOF) {
			t.Fatalf("from ref %d: %v", ref, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, r.Seek(0))
	if _, err := r.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if _, err := r.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestPiecesAreBoundedInBytes(t *testing.T) {
	_, b := oneBlock(t, false)
	r := openAll(t, b)
	r.maxBytes = 1000
	got, errs := readAll(t, r)
	if d := cmp.Diff(query(t, b), withoutRefs(got)); d != "" || len(errs) > 0 {
		t.Fatal(errs, d)
	}
	must(t, r.Seek(0))
	for {
		s, err := r.Next(t.Context())
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if n := len(s.Histograms.T) + len(s.FloatHistograms.T); n > 5 {
			t.Fatalf("%d histograms in a piece", n)
		}
	}
}

func TestDeletedWhileReading(t *testing.T) {
	_, b := oneBlock(t, false)
	want := query(t, b)
	r := openAll(t, b)
	// As deleteBlocks in tsdb/db.go.
	tmp := b.Dir + ".tmp-for-deletion"
	must(t, os.Rename(b.Dir, tmp))
	must(t, os.RemoveAll(tmp))
	got, errs := readAll(t, r)
	if d := cmp.Diff(want, withoutRefs(got)); d != "" || len(errs) > 0 {
		t.Fatal(errs, d)
	}
	if _, err := Open(b, 0, math.MaxInt64); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	must(t, r.Close())
	must(t, r.Close())
	if _, err := r.Next(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	if err := r.Seek(0); !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
}

// Nothing in the directory changes by our reading.
func TestReadsOnly(t *testing.T) {
	d, b := oneBlock(t, false)
	look := func() string {
		var out strings.Builder
		must(t, filepath.WalkDir(d.dir, func(p string, e fs.DirEntry, err error) error {
			must(t, err)
			info, err := e.Info()
			must(t, err)
			fmt.Fprintln(&out, p, info.Size(), info.ModTime(), info.Mode())
			return nil
		}))
		return out.String()
	}
	before := look()
	r := openAll(t, b)
	_, errs := readAll(t, r)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	must(t, r.Close())
	if d := cmp.Diff(before, look()); d != "" {
		t.Fatal(d)
	}
}

func copyBlock(t testing.TB, b Block) Block {
	t.Helper()
	dir := filepath.Join(t.TempDir(), b.ULID.String())
	must(t, os.CopyFS(dir, os.DirFS(b.Dir)))
	b.Dir = dir
	return b
}

// Whatever byte is wrong: what is returned is right, and what isn't is named.
func TestFlippedBytes(t *testing.T) {
	d := openDB(t, true)
	d.write(t0, t0+20*60_000)
	d.compactHead(t0, t0+2*hour)
	b := copyBlock(t, d.list()[0])
	want := map[string]string{}
	for _, s := range query(t, b) {
		want[s.Labels] = strings.Join(s.Lines, "\n")
	}
	for _, name := range []string{"chunks/000001", "index", "tombstones"} {
		path := filepath.Join(b.Dir, name)
		raw, err := os.ReadFile(path)
		must(t, err)
		var refused, partly, whole int
		step := 3
		if testing.Short() {
			step = 29
		}
		for i := 0; i < len(raw); i += step {
			bad := slices.Clone(raw)
			bad[i] ^= byte(1 << (i % 8))
			must(t, os.WriteFile(path, bad, 0o644))
			r, err := Open(b, math.MinInt64, math.MaxInt64)
			if err != nil {
				refused++
				continue
			}
			got, errs := readAll(t, r)
			must(t, r.Close())
			for _, s := range got {
				if want[s.Labels] != strings.Join(s.Lines, "\n") && len(errs) == 0 {
					t.Fatalf("%s, byte %d: %s has other samples", name, i, s.Labels)
				}
				for _, l := range s.Lines {
					if !strings.Contains(want[s.Labels], l) {
						t.Fatalf("%s, byte %d: %s has another sample %s", name, i, s.Labels, l)
					}
				}
			}
			for _, err := range errs {
				if c, ok := errors.AsType[*CorruptError](err); ok && (c.Block != b.ULID || c.Series == 0 || (name != "index" && c.Chunk == 0)) {
					t.Fatalf("%s, byte %d: %#v", name, i, err)
				}
			}
			switch {
			case len(errs) > 0 && len(got) < len(want)-1:
				t.Fatalf("%s, byte %d: %d of %d series left: %v", name, i, len(got), len(want), errs)
			case len(errs) > 0:
				partly++
			default:
				whole++
			}
		}
		t.Logf("%s: of %d bytes %d keep it from being opened, %d cost a part, %d none", name, len(raw), refused, partly, whole)
		must(t, os.WriteFile(path, raw, 0o644))
	}
}

func TestCorruptChunkCostsItsSamplesOnly(t *testing.T) {
	_, b := oneBlock(t, false)
	b = copyBlock(t, b)
	want := query(t, b)
	r := openAll(t, b)
	i := slices.IndexFunc(want, func(s textSeries) bool { return strings.Contains(s.Labels, `"mixed"`) })
	all, _ := readAll(t, r)
	var metas []chunks.Meta
	must(t, r.index.Series(storage.SeriesRef(all[i].Ref), &labels.ScratchBuilder{}, &metas))
	if len(metas) < 3 {
		t.Fatalf("%d chunks", len(metas))
	}
	path := filepath.Join(b.Dir, "chunks", "000001")
	raw, err := os.ReadFile(path)
	must(t, err)
	_, offset := chunks.BlockChunkRef(metas[1].Ref).Unpack()
	raw[offset+20] ^= 4
	must(t, os.WriteFile(path, raw, 0o644))

	r = openAll(t, b)
	got, errs := readAll(t, r)
	if len(errs) != 1 {
		t.Fatalf("%v", errs)
	}
	c, ok := errors.AsType[*CorruptError](errs[0])
	if !ok || c.Series != all[i].Ref || c.Chunk != uint64(metas[1].Ref) || c.Labels.Get("__name__") != "mixed" {
		t.Fatalf("%v", errs)
	}
	for _, part := range []string{b.ULID.String(), fmt.Sprint(c.Series), "mixed", fmt.Sprint(c.Chunk)} {
		if !strings.Contains(c.Error(), part) {
			t.Errorf("%q doesn't say %s", c.Error(), part)
		}
	}
	want[i].Lines = slices.DeleteFunc(want[i].Lines, func(l string) bool {
		at := timeOf(l)
		return at >= metas[1].MinTime && at <= metas[1].MaxTime
	})
	if d := cmp.Diff(want, withoutRefs(got)); d != "" {
		t.Fatal(d)
	}
}

// A file that can't be read any more is a fault in a mapped page.
func TestFault(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("what becomes of a mapped file that is cut differs between systems")
	}
	_, b := oneBlock(t, false)
	for _, name := range []string{"chunks/000001", "index"} {
		b := copyBlock(t, b)
		r := openAll(t, b)
		must(t, os.Truncate(filepath.Join(b.Dir, name), 0))
		n := 0
		for ; n < 1000; n++ {
			_, err := r.Next(t.Context())
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil {
				t.Fatal(name, ": no error")
			}
			if _, ok := errors.AsType[*CorruptError](err); !ok {
				break // the list of series itself
			}
		}
		if n == 1000 {
			t.Fatal("no end")
		}
		must(t, r.Close())
	}
}

// strangeIndex stands for decoders that meet bytes that they don't expect, and for
// blocks with chunks that Prometheus's index writer would refuse.
type strangeIndex struct {
	tsdb.IndexReader
	change func(ref storage.SeriesRef, metas []chunks.Meta) []chunks.Meta
}

func (x strangeIndex) Series(ref storage.SeriesRef, b *labels.ScratchBuilder, metas *[]chunks.Meta) error {
	err := x.IndexReader.Series(ref, b, metas)
	*metas = x.change(ref, *metas)
	return err
}

type strangeChunks struct {
	tsdb.ChunkReader
	panicAt chunks.ChunkRef
}

func (x strangeChunks) ChunkOrIterable(m chunks.Meta) (chunkenc.Chunk, chunkenc.Iterable, error) {
	if m.Ref == x.panicAt {
		panic("chunk")
	}
	return x.ChunkReader.ChunkOrIterable(m)
}

func TestPanics(t *testing.T) {
	_, b := oneBlock(t, false)
	r := openAll(t, b)
	all, _ := readAll(t, r)
	var metas []chunks.Meta
	must(t, r.index.Series(storage.SeriesRef(all[2].Ref), &labels.ScratchBuilder{}, &metas))
	r.chunks = strangeChunks{r.chunks, metas[0].Ref}
	r.index = strangeIndex{r.index, func(ref storage.SeriesRef, m []chunks.Meta) []chunks.Meta {
		if uint64(ref) == all[5].Ref {
			panic("index")
		}
		return m
	}}
	must(t, r.Seek(0))
	got, errs := readAll(t, r)
	if len(errs) != 2 || !strings.Contains(errs[0].Error(), fmt.Sprint("chunk ", metas[0].Ref)) || !strings.Contains(errs[1].Error(), fmt.Sprint("series ", all[5].Ref)) {
		t.Fatal(errs)
	}
	if len(got) < len(all)-2 {
		t.Fatalf("%d series of %d left", len(got), len(all))
	}
}

// A block that is cut off while it is read is an error, whoever touches the mapped file.
func TestCutOffWhileRead(t *testing.T) {
	_, b := oneBlock(t, false)
	r := openAll(t, b)
	all, _ := readAll(t, r)
	must(t, os.Truncate(filepath.Join(b.Dir, "index"), 0))
	if err := r.Seek(all[2].Ref); err == nil {
		t.Error("the list of series is read")
	}
	if _, err := r.Next(t.Context()); err == nil || errors.Is(err, io.EOF) {
		t.Error("it can be read on:", err)
	}
}

// Chunks of one series that overlap, or are not in order, come out in order.
func TestOverlappingChunks(t *testing.T) {
	d := openDB(t, true)
	for i := range int64(600) {
		d.float("a", t0+i*10, float64(i))
		d.float("b", t0+i*10+i%3, float64(-i))
	}
	d.compactHead(t0, t0+2*hour)
	b := d.list()[0]
	r := openAll(t, b)
	all, _ := readAll(t, r)
	if len(all) != 2 {
		t.Fatal(len(all))
	}
	var others []chunks.Meta
	must(t, r.index.Series(storage.SeriesRef(all[1].Ref), &labels.ScratchBuilder{}, &others))
	r.index = strangeIndex{r.index, func(ref storage.SeriesRef, m []chunks.Meta) []chunks.Meta {
		if uint64(ref) == all[0].Ref {
			return append(slices.Clone(others), m...)
		}
		return nil
	}}
	times := map[string]bool{}
	for _, s := range all {
		for _, l := range s.Lines {
			times[strings.Fields(l)[0]] = true
		}
	}
	for _, piece := range []int{pieceSamples, 7} {
		must(t, r.Seek(0))
		r.maxSamples = piece
		got, errs := readAll(t, r) // which checks the order
		if len(errs) > 0 || len(got) != 1 || len(got[0].Lines) != len(times) {
			t.Fatalf("%v, %d series, want %d samples", errs, len(got), len(times))
		}
		for _, l := range got[0].Lines {
			if !slices.Contains(all[0].Lines, l) && !slices.Contains(all[1].Lines, l) {
				t.Fatalf("made up: %s", l)
			}
		}
	}
}

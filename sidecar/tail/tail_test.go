package tail

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/tombstones"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
)

// testWAL is a WAL that a test writes as Prometheus does.
type testWAL struct {
	t   testing.TB
	dir *Dir
	wl  *wlog.WL
	enc record.Encoder
}

func newTestWAL(t testing.TB, segmentBytes int, c compression.Type) *testWAL {
	t.Helper()
	path := t.TempDir()
	if err := os.MkdirAll(filepath.Join(path, "chunks_head"), 0o755); err != nil {
		t.Fatal(err)
	}
	wl, err := wlog.NewSize(promslog.NewNopLogger(), nil, filepath.Join(path, "wal"), segmentBytes, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wl.Close() })
	dir, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	return &testWAL{t: t, dir: dir, wl: wl}
}

func (w *testWAL) log(recs ...[]byte) {
	w.t.Helper()
	if err := w.wl.Log(recs...); err != nil {
		w.t.Fatal(err)
	}
}

// samples logs n samples of the given time.
func (w *testWAL) samples(t int64, n int) {
	s := make([]record.RefSample, n)
	for i := range s {
		s[i] = record.RefSample{Ref: chunks.HeadSeriesRef(i + 1), T: t, V: float64(t) + rand.Float64()}
	}
	w.log(w.enc.Samples(s, nil))
}

func (w *testWAL) series(refs ...chunks.HeadSeriesRef) {
	var s []record.RefSeries
	for _, r := range refs {
		s = append(s, record.RefSeries{Ref: r, Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprint(r))})
	}
	w.log(w.enc.Series(s, nil))
}

func (w *testWAL) tail() (*Tail, *Metrics) {
	w.t.Helper()
	p, err := w.dir.Start(0)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.tailFrom(p)
}

func (w *testWAL) tailFrom(p Position) (*Tail, *Metrics) {
	m := NewMetrics(prometheus.NewRegistry())
	return New(testFiles(w.t, w.dir), p, promslog.NewNopLogger(), m), m
}

// testFiles keeps files in a folder of the test's.
func testFiles(t testing.TB, dir *Dir) *Files {
	t.Helper()
	x, err := NewFiles(dir, t.TempDir(), 1<<30, promslog.NewNopLogger(), NewMetrics(nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.Close)
	return x
}

// drain reads until io.EOF and returns what was read as text, one line each.
func drain(t testing.TB, tl *Tail) []string {
	t.Helper()
	var out []string
	for {
		b, err := tl.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if _, ok := errors.AsType[*BreakError](err); ok {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, text(b))
	}
}

func text(b *Batch) string {
	var s strings.Builder
	for _, x := range b.Series {
		fmt.Fprintf(&s, "series %d %s;", x.Ref, x.Labels)
	}
	for _, x := range b.Samples {
		fmt.Fprintf(&s, "sample %d %d %d %x;", x.Ref, x.ST, x.T, math.Float64bits(x.V))
	}
	for _, x := range b.Histograms {
		fmt.Fprintf(&s, "histogram %d %d %d %s %x;", x.Ref, x.ST, x.T, x.H, math.Float64bits(x.H.Sum))
	}
	for _, x := range b.FloatHistograms {
		fmt.Fprintf(&s, "floathistogram %d %d %d %s %x;", x.Ref, x.ST, x.T, x.FH, math.Float64bits(x.FH.Sum))
	}
	for _, x := range b.Exemplars {
		fmt.Fprintf(&s, "exemplar %d %d %v %s;", x.Ref, x.T, x.V, x.Labels)
	}
	for _, x := range b.Metadata {
		fmt.Fprintf(&s, "metadata %d %d %s %s;", x.Ref, x.Type, x.Unit, x.Help)
	}
	return s.String()
}

func count(m *Metrics, trouble string) float64 {
	return testutil.ToFloat64(m.trouble.WithLabelValues(trouble))
}

func TestAllRecordTypes(t *testing.T) {
	stale := math.Float64frombits(value.StaleNaN)
	custom := &histogram.Histogram{
		Schema: histogram.CustomBucketsSchema, Count: 3, Sum: 5,
		PositiveSpans: []histogram.Span{{Length: 2}}, PositiveBuckets: []int64{1, 1}, CustomValues: []float64{1, 2},
	}
	for _, c := range []compression.Type{compression.None, compression.Snappy, compression.Zstd} {
		for _, st := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/st=%v", c, st), func(t *testing.T) {
				w := newTestWAL(t, wlog.DefaultSegmentSize, c)
				w.enc.EnableSTStorage = st
				start := int64(0)
				if st {
					start = 500
				}
				w.series(1, 2, 3)
				w.log(w.enc.Samples([]record.RefSample{{Ref: 1, ST: start, T: 1000, V: 1}, {Ref: 2, ST: start, T: 1000, V: stale}, {Ref: 3, T: 999, V: math.Copysign(0, -1)}}, nil))
				hs := []record.RefHistogramSample{{Ref: 1, ST: start, T: 2000, H: tsdbutil.GenerateTestHistogram(1)}, {Ref: 3, ST: start, T: 2000, H: custom}}
				rec, rest := w.enc.HistogramSamples(hs, nil)
				w.log(rec)
				if !st {
					w.log(w.enc.CustomBucketsHistogramSamples(rest, nil))
				}
				fhs := []record.RefFloatHistogramSample{{Ref: 1, ST: start, T: 3000, FH: tsdbutil.GenerateTestFloatHistogram(1)}, {Ref: 2, ST: start, T: 3000, FH: custom.ToFloat(nil)}}
				rec, frest := w.enc.FloatHistogramSamples(fhs, nil)
				w.log(rec)
				if !st {
					w.log(w.enc.CustomBucketsFloatHistogramSamples(frest, nil))
				}
				w.log(w.enc.Exemplars([]record.RefExemplar{{Ref: 1, T: 4000, V: 2, Labels: labels.FromStrings("trace_id", "x")}}, nil))
				w.log(w.enc.Metadata([]record.RefMetadata{{Ref: 1, Type: 1, Unit: "s", Help: "h"}}, nil))
				w.log(w.enc.Tombstones([]tombstones.Stone{{Ref: 1, Intervals: tombstones.Intervals{{Mint: 1, Maxt: 2}}}}, nil))
				w.log(w.enc.MmapMarkers([]record.RefMmapMarker{{Ref: 1, MmapRef: 2}}, nil), w.enc.MinValidTime(3, nil))
				w.log([]byte{99, 1, 2, 3}, []byte{99, 4})
				w.log([]byte{byte(record.Samples), 1}) // of a known type, but cut
				w.samples(5000, 1)

				tl, m := w.tail()
				got := strings.Join(drain(t, tl), "")
				for _, want := range []string{
					`series 2 {__name__="m", i="2"};`,
					fmt.Sprintf("sample 1 %d 1000 3ff0000000000000;", start),
					fmt.Sprintf("sample 2 %d 1000 %x;", start, value.StaleNaN),
					"sample 3 0 999 8000000000000000;",
					fmt.Sprintf("histogram 1 %d 2000 %s", start, hs[0].H), fmt.Sprintf("histogram 3 %d 2000 %s", start, custom),
					fmt.Sprintf("floathistogram 1 %d 3000 %s", start, fhs[0].FH), fmt.Sprintf("floathistogram 2 %d 3000 %s", start, fhs[1].FH),
					`exemplar 1 4000 2 {trace_id="x"};`, "metadata 1 1 s h;", "sample 1 0 5000 ",
				} {
					if !strings.Contains(got, want) {
						t.Errorf("missing %q in\n%s", want, got)
					}
				}
				if n := count(m, "unknown_record_type"); n != 2 {
					t.Errorf("%v unknown records counted, want 2", n)
				}
				if n := count(m, "undecodable_record"); n != 1 {
					t.Errorf("%v undecodable records counted, want 1", n)
				}
			})
		}
	}
}

// A record that may hold samples, and can't be read, is told as a break. Reading goes
// on behind it.
func TestUnreadableRecords(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
	w.series(1)
	w.log([]byte{99, 1, 2, 3}, []byte{byte(record.Samples), 1})
	w.log([]byte{byte(record.Exemplars), 1}) // no blocks have any
	w.samples(5000, 1)
	tl, _ := w.tail()
	var got []string
	var at Position
	for {
		b, err := tl.Next()
		if br, ok := errors.AsType[*BreakError](err); ok {
			if br.Moved() || br.From != at {
				t.Errorf("%v, was at %v", br, at)
			}
			got = append(got, string(br.Kind))
		} else if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		} else {
			got = append(got, b.Type.String())
		}
		at = tl.Position()
	}
	if d := cmp.Diff([]string{"series", "unknown_record_type", "undecodable_record", "samples"}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// A tail that follows the writer, however it interleaves, sees each record once,
// over many segments; and any part of it can be read again by its positions.
func TestFollowAndReadAgain(t *testing.T) {
	for _, c := range []compression.Type{compression.None, compression.Snappy, compression.Zstd} {
		t.Run(c, func(t *testing.T) {
			w := newTestWAL(t, 4*pageBytes, c)
			rnd := rand.New(rand.NewSource(1))
			tl, m := w.tail()
			type rec struct {
				from, to Position
				text     string
			}
			var recs []rec
			for i := range 300 {
				w.samples(int64(i), 1+rnd.Intn(3000)) // up to more than a page
				if rnd.Intn(3) == 0 {
					continue
				}
				for {
					b, err := tl.Next()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					recs = append(recs, rec{b.From, b.To, text(b)})
				}
			}
			for {
				b, err := tl.Next()
				if err != nil {
					break
				}
				recs = append(recs, rec{b.From, b.To, text(b)})
			}
			if len(recs) != 300 {
				t.Fatalf("read %d records, want 300", len(recs))
			}
			for i, r := range recs {
				if !strings.Contains(r.text, fmt.Sprintf("sample 1 0 %d ", i)) {
					t.Fatalf("record %d is %.60s", i, r.text)
				}
				if !r.from.Before(r.to) || !r.from.SameFile(r.to) {
					t.Fatalf("record %d from %v to %v", i, r.from, r.to)
				}
			}
			if last := recs[len(recs)-1].to.Segment; last < 3 {
				t.Fatalf("only %d segments", last+1)
			}
			for range 100 {
				i := rnd.Intn(len(recs))
				j := i
				for j+1 < len(recs) && recs[j+1].to.SameFile(recs[i].from) && rnd.Intn(4) > 0 {
					j++
				}
				var got, want []string
				err := ReadRange(context.Background(), tl.files, recs[i].from, recs[j].to, promslog.NewNopLogger(), m, func(b *Batch) error {
					got = append(got, text(b))
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range recs[i : j+1] {
					want = append(want, r.text)
				}
				if d := cmp.Diff(want, got); d != "" {
					t.Fatalf("range %v to %v: %s", recs[i].from, recs[j].to, d)
				}
			}
			// A tail that starts at a position goes on behind it.
			tl2, _ := w.tailFrom(recs[200].to)
			if got := drain(t, tl2); len(got) != 99 || got[0] != recs[201].text {
				t.Fatalf("started at record 201: %d records", len(got))
			}
			if n := count(m, "torn_record") + count(m, "corrupt_segment") + count(m, "gap") + count(m, "replaced"); n != 0 {
				t.Errorf("%v troubles", n)
			}
		})
	}
}

func copyWAL(t *testing.T, w *testWAL) *Dir {
	t.Helper()
	path := t.TempDir()
	if err := os.CopyFS(path, os.DirFS(w.dir.Path())); err != nil {
		t.Fatal(err)
	}
	dir, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTornRecordCompletedLater(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
	for i := range 20 {
		w.samples(int64(i), 1000)
	}
	full, err := os.ReadFile(wlog.SegmentName(w.dir.WAL(), 0))
	if err != nil {
		t.Fatal(err)
	}
	tl0, _ := w.tail()
	want := drain(t, tl0)

	dir := copyWAL(t, w)
	name := wlog.SegmentName(dir.WAL(), 0)
	if err := os.Truncate(name, 0); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tl := New(testFiles(t, dir), Position{}, promslog.NewNopLogger(), NewMetrics(nil))
	var got []string
	rnd := rand.New(rand.NewSource(2))
	for len(full) > 0 {
		n := min(len(full), 1+rnd.Intn(700))
		if _, err := f.Write(full[:n]); err != nil {
			t.Fatal(err)
		}
		full = full[n:]
		got = append(got, drain(t, tl)...)
		// Whatever fragment it saw: one that starts at its position goes on right.
		if rnd.Intn(10) == 0 {
			p := tl.Position()
			tl = New(testFiles(t, dir), p, promslog.NewNopLogger(), NewMetrics(nil))
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
}

func TestTornRecordBeforeNewerSegment(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.Snappy)
	w.samples(1, 10)
	w.samples(2, 5000)
	dir := copyWAL(t, w)
	name := wlog.SegmentName(dir.WAL(), 0)
	info, _ := os.Stat(name)
	if err := os.Truncate(name, info.Size()-10); err != nil {
		t.Fatal(err)
	}
	m := NewMetrics(nil)
	tl := New(testFiles(t, dir), Position{}, promslog.NewNopLogger(), m)
	if got := drain(t, tl); len(got) != 1 {
		t.Fatalf("%d records", len(got))
	}
	wl, err := wlog.New(promslog.NewNopLogger(), nil, dir.WAL(), compression.None)
	if err != nil {
		t.Fatal(err)
	}
	defer wl.Close()
	if err := wl.Log(w.enc.Samples([]record.RefSample{{Ref: 1, T: 3, V: 3}}, nil)); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, tl); len(got) != 1 || !strings.HasPrefix(got[0], "sample 1 0 3 ") {
		t.Fatalf("got %v", got)
	}
	if n := count(m, "torn_record"); n != 1 {
		t.Errorf("%v torn records counted", n)
	}
	if p := tl.Position(); p.Segment != 1 {
		t.Errorf("position %v", p)
	}
}

func TestCorruptSegment(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
	w.samples(1, 10)
	w.samples(2, 10)
	w.samples(3, 10)
	name := wlog.SegmentName(w.dir.WAL(), 0)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	second := headerBytes + int(binary.BigEndian.Uint16(b[1:]))
	b[second+headerBytes+20] ^= 1
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	m := NewMetrics(nil)
	tl := New(testFiles(t, w.dir), Position{}, slog.New(slog.NewTextHandler(&logged, nil)), m)
	var got []string
	for range 10 {
		got = append(got, drain(t, tl)...)
	}
	if len(got) != 1 {
		t.Fatalf("%d records before the corruption", len(got))
	}
	if _, err := w.wl.NextSegment(); err != nil {
		t.Fatal(err)
	}
	w.samples(4, 1)
	for range 10 {
		got = append(got, drain(t, tl)...)
	}
	if len(got) != 2 || !strings.HasPrefix(got[1], "sample 1 0 4 ") {
		t.Fatalf("got %d records: %v", len(got), got)
	}
	if n := count(m, "corrupt_segment"); n != 1 {
		t.Errorf("%v corrupt segments counted", n)
	}
	if n := strings.Count(logged.String(), "corrupt"); n != 1 {
		t.Errorf("logged %d times: %s", n, &logged)
	}
}

// checkpoint makes a WAL checkpoint as Prometheus's head does.
func (w *testWAL) checkpoint(from, to int, keep func(chunks.HeadSeriesRef) bool, mint int64) {
	w.t.Helper()
	if _, err := wlog.Checkpoint(promslog.NewNopLogger(), w.wl, from, to, keep, mint, false, true); err != nil {
		w.t.Fatal(err)
	}
	if err := w.wl.Truncate(to + 1); err != nil {
		w.t.Fatal(err)
	}
	if err := wlog.DeleteCheckpoints(w.dir.WAL(), to); err != nil {
		w.t.Fatal(err)
	}
}

func TestWALCheckpoint(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.Snappy)
	w.series(1, 2, 3)
	w.samples(1, 3)
	w.log(w.enc.Metadata([]record.RefMetadata{{Ref: 2, Type: 1, Help: "h"}}, nil))
	w.wl.NextSegment()
	w.samples(2, 3)
	w.wl.NextSegment()
	w.samples(3, 3)
	w.checkpoint(0, 1, func(r chunks.HeadSeriesRef) bool { return r != 1 }, 2)

	tl, m := w.tail()
	if p := tl.Position(); !p.InCheckpoint || p.Checkpoint != 1 {
		t.Fatalf("starts at %v", p)
	}
	var types []string
	for {
		b, err := tl.Next()
		if err != nil {
			break
		}
		types = append(types, fmt.Sprintf("%v:%v", b.Type, b.From.InCheckpoint))
	}
	if d := cmp.Diff([]string{"series:true", "samples:true", "metadata:true", "samples:false"}, types); d != "" {
		t.Fatal(d)
	}
	var refs []chunks.HeadSeriesRef
	err := CheckpointSeries(context.Background(), w.dir, 1, promslog.NewNopLogger(), m, func(s []record.RefSeries) {
		for _, x := range s {
			refs = append(refs, x.Ref)
		}
	})
	if err != nil || !cmp.Equal(refs, []chunks.HeadSeriesRef{2, 3}) {
		t.Fatalf("series of the WAL checkpoint: %v, %v", refs, err)
	}
	if n, err := w.dir.LastCheckpoint(); n != 1 || err != nil {
		t.Fatalf("last WAL checkpoint %d, %v", n, err)
	}

	t.Run("gap", func(t *testing.T) {
		tl, m := w.tailFrom(Position{Segment: 0, Offset: 0})
		if got := drain(t, tl); len(got) != 4 {
			t.Fatalf("%d records", len(got))
		}
		if n := count(m, "gap"); n != 1 {
			t.Fatalf("gaps %v", n)
		}
	})
	t.Run("range of a file that is gone", func(t *testing.T) {
		err := ReadRange(context.Background(), tl.files, Position{}, Position{Offset: 10}, promslog.NewNopLogger(), m, nil)
		if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	})
	t.Run("truncated behind the tail", func(t *testing.T) {
		w.wl.NextSegment()
		w.wl.NextSegment()
		w.samples(4, 1)
		w.checkpoint(2, 2, func(r chunks.HeadSeriesRef) bool { return true }, 3)
		if got := drain(t, tl); len(got) != 1 || count(m, "gap") != 0 {
			t.Fatalf("%v, %v gaps", got, count(m, "gap"))
		}
	})
}

// A WAL checkpoint of several files is read to its end, over a restart too, though a
// newer one has taken its place. What can't be is told.
func TestWALCheckpointGone(t *testing.T) {
	for _, c := range []struct {
		name     string
		maxBytes int64
		restart  bool
		want     string
	}{
		{"kept", 1 << 30, false, "1 2 3 4 "},
		{"kept over a restart", 1 << 30, true, "1 2 3 4 "},
		{"let go", 1, false, "1 gap 4 "},
		{"not kept over a restart", 1, true, "1 gap 4 "},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
			folder := wlog.CheckpointDir(w.dir.WAL(), 2)
			if err := os.Mkdir(folder, 0o755); err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				w.samples(int64(i+1), 1)
				w.wl.NextSegment()
				if err := os.Rename(wlog.SegmentName(w.dir.WAL(), i), wlog.SegmentName(folder, i)); err != nil {
					t.Fatal(err)
				}
			}
			w.samples(4, 1)
			links := t.TempDir()
			open := func() *Files {
				x, err := NewFiles(w.dir, links, c.maxBytes, promslog.NewNopLogger(), NewMetrics(nil))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(x.Close)
				return x
			}
			pos, err := w.dir.Start(0)
			if err != nil {
				t.Fatal(err)
			}
			files := open()
			tl := New(files, pos, promslog.NewNopLogger(), NewMetrics(nil))
			got := ""
			for {
				b, err := tl.Next()
				if br, ok := errors.AsType[*BreakError](err); ok {
					got += string(br.Kind) + " "
				} else if err != nil {
					break
				} else {
					got += fmt.Sprint(b.Samples[0].T, " ")
				}
				if got != "1 " {
					continue
				}
				tl.Note()
				known, err := files.Known(tl.Position())
				if err != nil {
					t.Fatal(err)
				}
				if err := os.RemoveAll(folder); err != nil {
					t.Fatal(err)
				}
				if err := files.Keep(tl.Position()); err != nil {
					t.Fatal(err)
				}
				if c.restart {
					files.Close()
					files = open()
					pos, _, err := files.Verify(tl.Position(), known)
					if err != nil {
						t.Fatal(err)
					}
					tl = New(files, pos, promslog.NewNopLogger(), NewMetrics(nil))
				}
			}
			if got != c.want {
				t.Errorf("read %q, want %q", got, c.want)
			}
		})
	}
}

// Prometheus repairs a torn WAL by writing the segment anew under its name.
func TestReplaced(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
	w.series(1)
	w.samples(1, 1)
	tl, m := w.tail()
	drain(t, tl)
	if err := w.wl.Repair(&wlog.CorruptionErr{Dir: w.dir.WAL(), Segment: 0, Offset: 60, Err: errors.New("test")}); err != nil {
		t.Fatal(err)
	}
	// A next segment is there, so this tail leaves the deleted file for it.
	w.samples(2, 1)
	if got := drain(t, tl); len(got) != 1 {
		t.Fatalf("%v", got)
	}
	// The whole directory goes, another comes.
	if err := os.RemoveAll(w.dir.WAL()); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, tl); len(got) != 0 {
		t.Fatalf("%v", got)
	}
	wl, err := wlog.New(promslog.NewNopLogger(), nil, w.dir.WAL(), compression.None)
	if err != nil {
		t.Fatal(err)
	}
	defer wl.Close()
	wl.Log(w.enc.Series([]record.RefSeries{{Ref: 1, Labels: labels.FromStrings("__name__", "other")}}, nil))
	if got := drain(t, tl); len(got) != 1 || !strings.Contains(got[0], "other") {
		t.Fatalf("%v", got)
	}
	if p := tl.Position(); p.Epoch != 2 || p.Segment != 0 {
		t.Fatalf("position %v", p)
	}
	if n := count(m, "replaced"); n != 2 {
		t.Errorf("%v replaced", n)
	}
}

func TestOpenDir(t *testing.T) {
	root := t.TempDir()
	mk := func(parts ...string) string {
		p := filepath.Join(append([]string{root}, parts...)...)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	server, agent, empty, other, parent := mk("server"), mk("agent"), mk("empty"), mk("other"), mk("parent")
	mk("server", "wal")
	mk("server", "chunks_head")
	mk("agent", "wal")
	mk("other", "stuff")
	mk("parent", "data", "wal")
	for _, p := range []string{server, agent, empty} {
		if _, err := OpenDir(p); err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
	for p, want := range map[string]string{
		other: "stuff", parent: "did you mean " + filepath.Join(parent, "data"),
		filepath.Join(root, "none"): "--storage.tsdb.path",
	} {
		if _, err := OpenDir(p); !errors.Is(err, ErrNotPrometheus) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", p, err)
		}
	}
	d, _ := OpenDir(agent)
	s, _ := OpenDir(server)
	e, _ := OpenDir(empty)
	if !d.Agent() || s.Agent() || e.Agent() {
		t.Error("agent not told from server")
	}
	// Its memory-mapped chunks were removed, to repair it.
	if err := os.Remove(filepath.Join(server, "chunks_head")); err != nil {
		t.Fatal(err)
	}
	mk("server", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
	if s.Agent() {
		t.Error("a server with blocks is taken for an agent")
	}
	if _, err := e.Start(0); !errors.Is(err, ErrNoWAL) {
		t.Error(err)
	}
}

func TestPositionOrder(t *testing.T) {
	ordered := []Position{
		{Segment: 3, Offset: 0},
		{Segment: 3, Offset: 70},
		{InCheckpoint: true, Checkpoint: 3, Segment: 0, Offset: 9},
		{InCheckpoint: true, Checkpoint: 3, Segment: 1, Offset: 0},
		{Segment: 4, Offset: 0},
		{Epoch: 1, Segment: 0, Offset: 0},
	}
	for i, p := range ordered {
		for j, q := range ordered {
			if got, want := p.Compare(q), min(1, max(-1, i-j)); got != want {
				t.Errorf("%v against %v: %d", p, q, got)
			}
		}
	}
}

// Any bytes as a segment: no panic, no endless loop.
func FuzzSegment(f *testing.F) {
	w := newTestWAL(f, wlog.DefaultSegmentSize, compression.Snappy)
	w.series(1, 2)
	w.samples(1, 2)
	rec, _ := w.enc.HistogramSamples([]record.RefHistogramSample{{Ref: 1, H: tsdbutil.GenerateTestHistogram(1)}}, nil)
	w.log(rec)
	seed, err := os.ReadFile(wlog.SegmentName(w.dir.WAL(), 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, int64(0))
	f.Add(seed, int64(50))
	f.Fuzz(func(t *testing.T, b []byte, offset int64) {
		path := t.TempDir()
		os.Mkdir(filepath.Join(path, "wal"), 0o755)
		os.WriteFile(wlog.SegmentName(filepath.Join(path, "wal"), 0), b, 0o644)
		os.WriteFile(wlog.SegmentName(filepath.Join(path, "wal"), 1), nil, 0o644)
		dir, err := OpenDir(path)
		if err != nil {
			t.Fatal(err)
		}
		tl := New(testFiles(t, dir), Position{Offset: offset}, promslog.NewNopLogger(), NewMetrics(nil))
		for range 100 {
			if _, err := tl.Next(); err != nil && !errors.Is(err, io.EOF) {
				return
			}
		}
	})
}

// A batch that is put back comes again, and the tail's position is before it.
func TestUnread(t *testing.T) {
	w := newTestWAL(t, 32<<10, compression.None)
	w.series(1, 2)
	w.samples(1000, 2)
	w.samples(2000, 2)
	tl, _ := w.tail()
	for i := range 3 {
		before := tl.Position()
		b, err := tl.Next()
		if err != nil {
			t.Fatal(err)
		}
		from, to := b.From, b.To
		if before != from || tl.Position() != to {
			t.Fatalf("record %d: from %v to %v, the tail was at %v and is at %v", i, from, to, before, tl.Position())
		}
		for range 2 {
			tl.Unread(b)
			if tl.Position() != from {
				t.Errorf("record %d: put back, the tail is at %v, want %v", i, tl.Position(), from)
			}
			again, err := tl.Next()
			if err != nil || again != b || tl.Position() != to {
				t.Fatalf("record %d: %v, %v, the tail is at %v", i, again, err, tl.Position())
			}
		}
	}
	if _, err := tl.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

package tail

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
)

var seed = flag.Uint64("tail.seed", 0, "seed of TestRewritten; 0: a fixed set")

// rewriting is a log to which all happens that happens to logs, and a tail that
// is started anew now and then.
type rewriting struct {
	t   *testing.T
	rnd *rand.Rand
	dir *Dir
	wl  *wlog.WL
	enc record.Encoder
	id  int64

	links string
	files *Files
	tail  *Tail
	got   map[string]bool
	read  []reading // since the checkpoint
	gaps  int
	saved struct {
		pos   Position
		known []Known
		epoch uint32
	}
	inPlace bool   // a file that may be kept was damaged
	backup  string // of the whole log; empty if there is none
	what    []string
}

type reading struct {
	from, to Position
	text     string
}

func (r *rewriting) open() {
	wl, err := wlog.NewSize(promslog.NewNopLogger(), nil, r.dir.WAL(), wlog.DefaultSegmentSize, compression.Snappy)
	if err != nil {
		r.t.Fatal(err)
	}
	r.wl = wl
	// As Head.Init: the log up to the segment before the new one is read, and
	// repaired where it can't be.
	sr, err := wlog.NewSegmentsReader(r.dir.WAL())
	if err != nil {
		r.t.Fatal(err)
	}
	defer sr.Close()
	rd := wlog.NewReader(sr)
	for rd.Next() {
	}
	if err := rd.Err(); err != nil {
		sr.Close()
		if err := wl.Repair(err); err != nil {
			r.t.Fatal(err)
		}
		r.what = append(r.what, fmt.Sprintf("repaired: %v", err))
	}
}

func (r *rewriting) log() {
	var recs [][]byte
	for range 1 + r.rnd.IntN(20) {
		r.id++
		if r.rnd.IntN(4) == 0 {
			ls := labels.FromStrings("__name__", fmt.Sprint("m", r.id))
			recs = append(recs, r.enc.Series([]record.RefSeries{{Ref: chunks.HeadSeriesRef(r.id), Labels: ls}}, nil))
			continue
		}
		var s []record.RefSample
		for i := range 1 + r.rnd.IntN(200) {
			s = append(s, record.RefSample{Ref: chunks.HeadSeriesRef(i), T: r.id, V: r.rnd.Float64()})
		}
		recs = append(recs, r.enc.Samples(s, nil))
	}
	if err := r.wl.Log(recs...); err != nil {
		r.t.Fatal(err)
	}
}

// present is what the log holds now.
func (r *rewriting) present() map[string]bool {
	out := map[string]bool{}
	sr, err := wlog.NewSegmentsReader(r.dir.WAL())
	if err != nil {
		r.t.Fatal(err)
	}
	defer sr.Close()
	dec := newDecoder(promslog.NewNopLogger())
	rd := wlog.NewReader(sr)
	for rd.Next() {
		if b, err := dec.decode(rd.Record()); err == nil && b != nil {
			out[text(b)] = true
		}
	}
	if err := rd.Err(); err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *rewriting) newTail(pos Position) {
	r.tail = New(r.files, pos, promslog.NewNopLogger(), NewMetrics(nil))
}

// pull reads up to n records, all that there are if n is less than 0.
func (r *rewriting) pull(n int) {
	for tries := 0; n != 0; {
		b, err := r.tail.Next()
		var br *BreakError
		switch {
		case errors.As(err, &br):
			if br.Kind != BreakReplaced {
				r.gaps++
			}
			r.what = append(r.what, fmt.Sprintf("%+v", *br))
		case errors.Is(err, io.EOF):
			if tries++; n > 0 || tries > 5 {
				return
			}
			time.Sleep(settleTime / 2)
		case err != nil:
			r.t.Fatal(err)
		default:
			r.got[text(b)] = true
			r.read = append(r.read, reading{b.From, b.To, text(b)})
			n--
		}
	}
}

func (r *rewriting) save() {
	r.tail.Note()
	pos := r.tail.Position()
	if n := len(r.read); n > 0 && r.rnd.IntN(2) == 0 {
		k := r.rnd.IntN(n)
		pos = r.read[k].from
		r.read = r.read[k:]
	} else {
		r.read = nil
	}
	known, err := r.files.Known(r.tail.Position())
	if err != nil {
		r.t.Fatal(err)
	}
	r.saved.pos, r.saved.known, r.saved.epoch = pos, known, r.tail.Position().Epoch
	r.files.Release(pos)
}

func (r *rewriting) restart() {
	r.files.Close()
	if r.rnd.IntN(3) == 0 {
		r.links = r.t.TempDir() // a file system that can't link
	}
	files, err := NewFiles(r.dir, r.links, 1<<30, promslog.NewNopLogger(), NewMetrics(nil))
	if err != nil {
		r.t.Fatal(err)
	}
	r.files = files
	files.DropFrom(r.saved.epoch + 1)
	pos, err := r.saved.pos, error(nil)
	if r.saved.epoch != pos.Epoch {
		err = ErrDifferent
	} else {
		pos, _, err = files.Verify(pos, r.saved.known)
	}
	if errors.Is(err, ErrDifferent) {
		pos, err = r.dir.Start(r.saved.epoch + 1)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.read = nil
	r.newTail(pos)
	r.pull(1) // what is compared is opened at once
}

// again reads all ranges since the checkpoint again.
func (r *rewriting) again() {
	for _, x := range r.read {
		n := 0
		err := ReadRange(context.Background(), r.files, x.from, x.to, promslog.NewNopLogger(), NewMetrics(nil), func(b *Batch) error {
			if n++; text(b) != x.text {
				return fmt.Errorf("%v to %v is another record: %s, was %s", x.from, x.to, text(b), x.text)
			}
			return nil
		})
		if errors.Is(err, fs.ErrNotExist) || (n == 0 && r.inPlace) {
			continue
		}
		if err != nil || n != 1 {
			r.t.Fatalf("read again: %d records, %v", n, err)
		}
	}
}

func (r *rewriting) copyLog(from, to string) {
	if err := os.MkdirAll(to, 0o755); err != nil {
		r.t.Fatal(err)
	}
	entries, _ := os.ReadDir(from)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			r.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), b, 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
}

// damage does to a closed log what a crash or a disk does.
func (r *rewriting) damage() {
	first, last, _ := r.dir.Segments()
	n := last
	if r.rnd.IntN(2) == 0 {
		n = first + r.rnd.IntN(last-first+1)
	}
	path := wlog.SegmentName(r.dir.WAL(), n)
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	if len(b) < 10 {
		return
	}
	at := r.rnd.IntN(len(b))
	switch r.rnd.IntN(3) {
	case 0:
		b = b[:at] // a torn record
	case 1:
		b[at] ^= 1 << r.rnd.IntN(8)
	case 2:
		clear(b[at:]) // what power loss leaves
	}
	if r.rnd.IntN(2) == 0 {
		os.Remove(path) // then what was read of it stays readable
	} else {
		r.inPlace = true
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.what = append(r.what, fmt.Sprintf("damaged %d at %d", n, at))
}

func (r *rewriting) step() {
	do := func(what string) {
		first, last, _ := r.dir.Segments()
		var known []string
		for _, k := range r.files.ascending() {
			known = append(known, fmt.Sprintf("%v:%d", k.start, k.read))
		}
		r.what = append(r.what, fmt.Sprintf("%s (tail %v, log %d to %d, known %v)", what, r.tail.Position(), first, last, known))
	}
	switch k := r.rnd.IntN(40); {
	case k < 14:
		r.log()
	case k < 18:
		do("segment")
		r.wl.NextSegment()
	case k < 26:
		do("pull")
		r.pull(1 + r.rnd.IntN(30))
	case k < 28:
		do("keep")
		if err := r.files.Keep(r.tail.Position()); err != nil {
			r.t.Fatal(err)
		}
	case k < 30:
		do("save")
		r.save()
	case k < 32:
		do("restart of the tail")
		r.restart()
	case k < 36:
		do("crash")
		r.wl.Close()
		if r.rnd.IntN(2) == 0 {
			r.damage()
		}
		r.open()
	case k < 37:
		first, last, _ := r.dir.Segments()
		if last > first {
			do("truncate")
			// What is truncated unread is a gap, and not there to be compared.
			r.pull(-1)
			if err := r.wl.Truncate(first + 1 + r.rnd.IntN(last-first)); err != nil {
				r.t.Fatal(err)
			}
		}
	case k < 38:
		if r.backup == "" {
			do("backup")
			r.backup = r.t.TempDir()
			r.copyLog(r.dir.WAL(), r.backup)
			break
		}
		do("restore")
		r.wl.Close()
		os.RemoveAll(r.dir.WAL())
		r.copyLog(r.backup, r.dir.WAL())
		r.backup = ""
		r.open()
	case k < 39:
		if r.rnd.IntN(4) == 0 {
			do("wipe")
			r.wl.Close()
			os.RemoveAll(r.dir.WAL())
			r.open()
		}
	default:
		r.again()
	}
}

func (r *rewriting) check() {
	r.pull(-1)
	for rec := range r.present() {
		if !r.got[rec] {
			r.t.Fatalf("not read: %.100s\n%s", rec, strings.Join(r.what, "\n"))
		}
	}
	r.again()
}

// Whatever happens to a log and whenever the tail is started anew: all that the
// log holds in the end was read, and what was read can be read again, as it was,
// from the places at which it was.
func TestRewritten(t *testing.T) {
	seeds := []uint64{*seed}
	if *seed == 0 {
		seeds = seeds[:0]
		for n := range uint64(12) {
			seeds = append(seeds, n+1)
		}
	}
	for _, n := range seeds {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "prom")
			os.MkdirAll(filepath.Join(path, "wal"), 0o755)
			dir, err := OpenDir(path)
			if err != nil {
				t.Fatal(err)
			}
			links := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				r := &rewriting{t: t, rnd: rand.New(rand.NewPCG(n, 1)), dir: dir, links: links, got: map[string]bool{}}
				r.open()
				defer func() { r.wl.Close() }()
				if r.files, err = NewFiles(dir, links, 1<<30, promslog.NewNopLogger(), NewMetrics(nil)); err != nil {
					t.Fatal(err)
				}
				defer func() { r.files.Close() }()
				r.log()
				r.newTail(Position{})
				r.save()
				for i := range 150 {
					r.step()
					if i%25 == 24 {
						r.check()
					}
				}
				r.check()
			})
		})
	}
}

// What Prometheus deletes stays readable: within one life by open files, over a
// restart by links; beyond the bound it is let go.
func TestKept(t *testing.T) {
	w := newTestWAL(t, wlog.DefaultSegmentSize, compression.None)
	links := t.TempDir()
	open := func(maxBytes int64) *Files {
		x, err := NewFiles(w.dir, links, maxBytes, promslog.NewNopLogger(), NewMetrics(nil))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(x.Close)
		return x
	}
	x := open(1 << 30)
	tl := New(x, Position{}, promslog.NewNopLogger(), NewMetrics(nil))
	for i := range 4 {
		w.samples(int64(i), 100)
		w.wl.NextSegment()
	}
	if err := x.Keep(Position{}); err != nil {
		t.Fatal(err)
	}
	if err := w.wl.Truncate(3); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, tl); len(got) != 4 {
		t.Fatalf("%d records read, want 4", len(got))
	}
	if err := x.Keep(Position{}); err != nil || x.Stats().Deleted == 0 {
		t.Fatalf("%+v, %v", x.Stats(), err)
	}
	known, err := x.Known(tl.Position())
	if err != nil || len(known) != 4 { // of the fifth nothing is known
		t.Fatalf("%v, %v", known, err)
	}
	x.Close()

	x = open(1 << 30)
	pos, carried, err := x.Verify(Position{}, known)
	if err != nil || !carried || pos != (Position{}) {
		t.Fatalf("%v, %v, %v", pos, carried, err)
	}
	tl = New(x, pos, promslog.NewNopLogger(), NewMetrics(nil))
	if got := drain(t, tl); len(got) != 4 {
		t.Fatalf("%d records read after a restart, want 4", len(got))
	}
	x.Release(Position{Segment: 2, Offset: 7})
	if n := len(x.ascending()); n != 3 {
		t.Fatalf("%d files kept, want 3", n)
	}
	x.Close()

	x = open(1)
	if err := x.Keep(Position{Segment: 2}); err != nil {
		t.Fatal(err)
	}
	if s := x.Stats(); s.Dropped != 1 || s.Deleted != 0 {
		t.Fatalf("%+v", s)
	}
	entries, _ := os.ReadDir(links)
	if !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "0-00000003" }) {
		t.Errorf("links: %v", entries)
	}
}

package sidecar

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

func openTestDictionary(t testing.TB, dir string) *dictionary {
	t.Helper()
	d, err := openDictionary(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.f.Close() })
	return d
}

func seriesLabels(i int) labels.Labels {
	return labels.FromStrings("__name__", "metric", "i", fmt.Sprint(i))
}

// A random run of definitions, drops, compactions and restarts, against a model.
func TestDictionaryModel(t *testing.T) {
	for seed := range int64(10) {
		rnd := rand.New(rand.NewSource(seed))
		dir := t.TempDir()
		d := openTestDictionary(t, dir)
		type def struct {
			from tail.Position
			ls   labels.Labels
			md   string
		}
		model := map[uint64][]def{}
		pos := tail.Position{}
		check := func(step int) {
			t.Helper()
			for ref := range uint64(300) {
				defs := model[ref]
				for range 3 {
					p := tail.Position{Segment: rnd.Intn(pos.Segment + 1), Offset: rnd.Int63n(1000)}
					i, ok := d.lookup(ref, p)
					if ok != (len(defs) > 0) {
						t.Fatalf("seed %d, step %d: ref %d known: %v", seed, step, ref, ok)
					}
					if !ok {
						continue
					}
					want := defs[0]
					for _, x := range defs {
						if !p.Before(x.from) {
							want = x
						}
					}
					got, err := d.labels(i)
					if err != nil || !labels.Equal(got, want.ls) {
						t.Fatalf("seed %d, step %d: ref %d at %v is %v, want %v (%v)", seed, step, ref, p, got, want.ls, err)
					}
					if md := d.at(i).metadata; (md != 0) != (want.md != "") {
						t.Fatalf("seed %d, step %d: ref %d has metadata at %d, want %q", seed, step, ref, md, want.md)
					} else if md != 0 {
						if m, err := d.metadata(i); err != nil || m.Help != want.md {
							t.Fatalf("seed %d, step %d: metadata %v, %v", seed, step, m, err)
						}
					}
				}
			}
		}
		for step := range 2000 {
			if pos.Offset += int64(1 + rnd.Intn(20)); rnd.Intn(50) == 0 {
				pos = tail.Position{Segment: pos.Segment + 1}
			}
			ref := uint64(rnd.Intn(300))
			switch rnd.Intn(20) {
			default:
				ls := seriesLabels(rnd.Intn(3))
				_, isNew, err := d.define(ref, ls, pos)
				if err != nil {
					t.Fatal(err)
				}
				defs := model[ref]
				if n := len(defs); n > 0 && labels.Equal(defs[n-1].ls, ls) {
					if isNew {
						t.Fatal("the same is new")
					}
					break
				}
				model[ref] = append(defs, def{from: pos, ls: ls})
			case 0, 1:
				if i, ok := d.current(ref); ok {
					md := fmt.Sprint("help ", step%5)
					if err := d.describe(i, ref, record.RefMetadata{Help: md}); err != nil {
						t.Fatal(err)
					}
					model[ref][len(model[ref])-1].md = md
				}
			case 2:
				if err := d.gone(ref, func(uint32) {}); err != nil {
					t.Fatal(err)
				}
				delete(model, ref)
			case 3:
				if rnd.Intn(10) > 0 {
					break
				}
				syncMark(t, d, d.mark)
				if err := d.compact(); err != nil {
					t.Fatal(err)
				}
			case 4:
				if rnd.Intn(10) > 0 {
					break
				}
				syncMark(t, d, pos)
				if err := d.close(); err != nil {
					t.Fatal(err)
				}
				if d = openTestDictionary(t, dir); d.mark != pos {
					t.Fatalf("mark %v, want %v", d.mark, pos)
				}
			}
			if step%100 == 0 {
				check(step)
			}
		}
		check(-1)
		n := 0
		for _, defs := range model {
			n += len(defs)
		}
		if d.count != n {
			t.Fatalf("%d slots in use, want %d", d.count, n)
		}
		// Nothing before the tail is needed any more.
		d.forget(pos, func(uint32) {})
		if d.count != len(model) || len(d.old) != 0 {
			t.Fatalf("%d slots in use after forget, want %d", d.count, len(model))
		}
	}
}

func syncMark(t *testing.T, d *dictionary, pos tail.Position) {
	t.Helper()
	x, err := d.setMark(pos)
	if err == nil {
		err = x.write()
	}
	x.end(err)
	if err != nil {
		t.Fatal(err)
	}
}

// A crash before a compacted file is on disk leaves the one before, with what was
// written up to the last mark.
func TestDictionaryCompactedAndKilled(t *testing.T) {
	dir := t.TempDir()
	d := openTestDictionary(t, dir)
	define := func(from, to int) {
		for i := from; i < to; i++ {
			if _, _, err := d.define(uint64(i), seriesLabels(i), at(int64(i))); err != nil {
				t.Fatal(err)
			}
		}
	}
	after := func(what string, mark, series int) {
		t.Helper()
		found := openTestDictionary(t, dir)
		defer found.close()
		if found.mark != at(int64(mark)) || found.count != series {
			t.Errorf("%s: %d series up to %v, want %d up to %v", what, found.count, found.mark, series, at(int64(mark)))
		}
	}
	define(0, 100)
	for i := range 50 {
		if err := d.gone(uint64(i), func(uint32) {}); err != nil {
			t.Fatal(err)
		}
	}
	syncMark(t, d, at(100))
	if err := d.compact(); err != nil {
		t.Fatal(err)
	}
	define(100, 150)
	x, err := d.setMark(at(150))
	if err != nil {
		t.Fatal(err)
	}
	after("compacted", 100, 50)
	// openDictionary has removed what a crash leaves, which here is in use.
	if err := x.write(); err == nil {
		t.Error("the compacted file was put in its place although it is gone")
	} else {
		x.end(err)
	}
	if d = openTestDictionary(t, dir); d.count != 50 {
		t.Fatalf("%d series", d.count)
	}
	define(100, 150)
	if err := d.compact(); err != nil {
		t.Fatal(err)
	}
	define(150, 200)
	if x, err = d.setMark(at(200)); err != nil {
		t.Fatal(err)
	}
	define(200, 250) // while it is being synced
	if err := x.write(); err != nil {
		t.Fatal(err)
	}
	after("in place", 200, 150)
	// The folder couldn't be synced: the next one tries again.
	x.end(errors.New("folder"))
	syncMark(t, d, at(250))
	after("again", 250, 200)
}

// Whatever a crash or a disk left of the file: it opens, and what it then says
// is what was written.
func TestDictionaryDamaged(t *testing.T) {
	dir := t.TempDir()
	d := openTestDictionary(t, dir)
	for i := range 100 {
		if _, _, err := d.define(uint64(i), seriesLabels(i), tail.Position{Offset: int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	syncMark(t, d, at(100))
	whole, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewSource(1))
	for range 300 {
		b := append([]byte(nil), whole...)
		switch rnd.Intn(3) {
		case 0:
			b = b[:rnd.Intn(len(b))]
		case 1:
			b[rnd.Intn(len(b))] ^= byte(1 + rnd.Intn(255))
		case 2:
			at := rnd.Intn(len(b))
			clear(b[at:min(len(b), at+rnd.Intn(200))])
		}
		sub := t.TempDir()
		if err := os.WriteFile(filepath.Join(sub, "dictionary"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		d := openTestDictionary(t, sub)
		for i := range 100 {
			if slot, ok := d.current(uint64(i)); ok {
				if ls, err := d.labels(slot); err != nil || !labels.Equal(ls, seriesLabels(i)) {
					t.Fatalf("%d is %v, %v", i, ls, err)
				}
			} else if d.mark == at(100) {
				t.Fatalf("%d is missing, and yet the mark is there", i)
			}
		}
		if _, _, err := d.define(1000, seriesLabels(1000), at(200)); err != nil {
			t.Fatal(err)
		}
		d.f.Close()
	}
}

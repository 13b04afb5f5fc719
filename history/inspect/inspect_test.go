package inspect

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

const hour = int64(3_600_000)

// encode makes a block with pages of all kinds.
func encode(t testing.TB) ([]byte, *chunkfmt.Summary) {
	t.Helper()
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Level: 2, Rollups: true, PageSeries: 16, PageBytes: 4096})
	for _, tenant := range []string{"a", "b"} {
		for i := range 40 {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", fmt.Sprintf("m%02d", i), "i", fmt.Sprint(i))}
			for ts := 1 * hour; ts <= 12*hour; ts += 15_000 {
				switch i % 3 {
				case 0:
					s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts%int64(1000*(i+1)+7)))
				case 1:
					if ts%hour == 0 {
						s.Histograms.T, s.Histograms.H = append(s.Histograms.T, ts), append(s.Histograms.H, tsdbutil.GenerateTestHistogram(ts/hour))
					}
				default:
					if ts%hour == 0 {
						s.FloatHistograms.T = append(s.FloatHistograms.T, ts)
						s.FloatHistograms.H = append(s.FloatHistograms.H, tsdbutil.GenerateTestFloatHistogram(ts/hour))
						s.Exemplars = append(s.Exemplars, exemplar.Exemplar{Labels: labels.FromStrings("id", fmt.Sprint(ts)), Value: 1, Ts: ts, HasTs: true})
					}
				}
			}
			if err := w.Add(tenant, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), sum
}

// TestGone: a block in which some is in summaries alone is as it should be, unless
// there are samples there too.
func TestGone(t *testing.T) {
	block := func(wrong bool) []byte {
		var buf bytes.Buffer
		w := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window, Level: 3})
		var sum rollup.Summariser
		for i := range 10 {
			s := &chunkfmt.Series{Labels: labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))}
			for ts := 1 * hour; ts <= 12*hour; ts += 15_000 {
				s.Floats.T, s.Floats.V = append(s.Floats.T, ts), append(s.Floats.V, float64(ts))
			}
			x := &chunkfmt.Summaries{Gone: []chunkfmt.Range{{MinT: 1, MaxT: 4 * hour}}}
			sum.Summarise(&x.Short, s.Samples(), rollup.Short)
			rollup.Widen(&x.Long, &x.Short, rollup.Long)
			if !wrong {
				history.Cut(s, x.Gone)
			}
			if i == 3 {
				s.Floats = chunkfmt.Floats{}
			}
			if err := w.AddSummarised("a", s, x); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	if _, f := verify(t, block(false)); len(f) > 0 {
		t.Error(f[0])
	}
	if _, f := verify(t, block(true)); len(f) != 9 || !strings.Contains(f[0].String(), "are gone") {
		t.Error(f)
	}
}

// TestVersions: blocks of all versions are whole.
func TestVersions(t *testing.T) {
	names, err := filepath.Glob("../../chunkfmt/testdata/block-v*")
	if err != nil || len(names) < 6 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, f := verify(t, data); len(f) > 0 {
			t.Errorf("%s: %d faults: %v", name, len(f), f[0])
		}
	}
}

type faults []*Fault

func (f *faults) report(x *Fault) { *f = append(*f, x) }

func verify(t *testing.T, data []byte) (*Block, faults) {
	t.Helper()
	objects, id := &historytest.MemoryObjects{}, ulid.Make()
	if err := objects.Put(t.Context(), history.ObjectKey(id), bytes.NewReader(data), int64(len(data))); err != nil {
		t.Fatal(err)
	}
	ref, err := Find(t.Context(), objects, id)
	if err != nil {
		t.Fatal(err)
	}
	var f faults
	b, err := Verify(t.Context(), objects, ref, f.report)
	if err != nil {
		t.Fatal(err)
	}
	return b, f
}

func TestWhole(t *testing.T) {
	data, sum := encode(t)
	b, f := verify(t, data)
	if len(f) > 0 {
		t.Fatalf("%d faults in a block that is whole: %v", len(f), f[0])
	}
	series, samples, mint, maxt := b.Totals()
	if series != sum.Tenants[0].Series+sum.Tenants[1].Series || samples != sum.Tenants[0].Samples+sum.Tenants[1].Samples ||
		mint != hour || maxt != 12*hour || b.Level != 2 || len(b.Tenants) != 2 {
		t.Errorf("%+v", b)
	}
	total := int64(chunkfmt.HeaderSize + trailerBytes)
	for kind, p := range b.Pages {
		if p.Count == 0 || p.Unpacked == 0 {
			t.Errorf("%s: %+v", kind, p)
		}
		total += p.Bytes
	}
	if total != int64(len(data)) || len(b.Pages) < 6 {
		t.Errorf("pages of %d bytes in %d: %v", total, len(data), b.Pages)
	}
}

// TestDamage changes a byte here and there: every time there is a fault that names
// the block and where.
func TestDamage(t *testing.T) {
	data, _ := encode(t)
	for i := 0; i < len(data); i += 1 + len(data)/400 {
		damaged := bytes.Clone(data)
		damaged[i] ^= 0x10
		b, f := verify(t, damaged)
		if len(f) == 0 {
			t.Fatalf("byte %d: no fault", i)
		}
		for n, x := range f {
			// Behind a page whose length is damaged others aren't found: that is said second.
			if s := x.String(); !strings.Contains(s, b.ID.String()) || !strings.Contains(s, "offset") || n == 0 && x.Offset > int64(i) && x.Page == "page" {
				t.Errorf("byte %d: %s", i, s)
			}
		}
	}
	for _, n := range []int{0, 7, 8, 100, len(data) - 1} {
		if _, f := verify(t, data[:n]); len(f) == 0 {
			t.Errorf("cut at %d: no fault", n)
		}
	}
}

// TestLies has pages whose checksums are right, and that contradict each other.
func TestLies(t *testing.T) {
	data, sum := encode(t)
	// The directory of one block before the pages of another of the same size.
	other := bytes.Clone(data)
	at := sum.Tenants[0].Directory
	copy(other[at.Offset:at.End()], data[sum.Tenants[1].Directory.Offset:])
	if sum.Tenants[0].Directory.Size != sum.Tenants[1].Directory.Size {
		t.Skip("directories of different size")
	}
	if _, f := verify(t, other); len(f) == 0 {
		t.Error("no fault")
	}
}

func TestRows(t *testing.T) {
	data, sum := encode(t)
	objects, x := historytest.Files(t, prometheus.NewRegistry()), index.New(&historytest.MemoryRows{})
	h, err := history.New(history.Options{Objects: objects, Index: x})
	if err != nil {
		t.Fatal(err)
	}
	id := ulid.Make()
	if err := h.Publish(t.Context(), id, data, sum); err != nil {
		t.Fatal(err)
	}
	ref, err := Find(t.Context(), objects, id)
	if err != nil {
		t.Fatal(err)
	}
	var f faults
	b, err := Open(t.Context(), objects, ref, f.report)
	if err != nil {
		t.Fatal(err)
	}
	check := func() faults {
		t.Helper()
		var f faults
		if err := Rows(t.Context(), x, b, f.report); err != nil {
			t.Fatal(err)
		}
		return f
	}
	if f := check(); len(f) > 0 {
		t.Fatal(f)
	}
	rows, err := x.AllBlocks(t.Context(), "a")
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	rows[0].Samples++
	if err := x.PutBlocks(t.Context(), rows); err != nil {
		t.Fatal(err)
	}
	if err := x.DeleteBlocks(t.Context(), "b", []index.RowID{{MaxT: 12 * hour, Block: id}}); err != nil {
		t.Fatal(err)
	}
	if f := check(); len(f) != 2 || !strings.Contains(f[0].String(), `"a"`) || !strings.Contains(f[1].String(), "no row") {
		t.Errorf("%v", f)
	}
	if err := objects.Delete(t.Context(), ref.Object); err != nil {
		t.Fatal(err)
	}
	f = nil
	if _, err := Verify(t.Context(), objects, ref, f.report); err != nil || len(f) == 0 || f[0].Page != "object" {
		t.Errorf("without an object: %v, %v", f, err)
	}
}

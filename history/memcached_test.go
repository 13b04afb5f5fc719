package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

const hour = int64(time.Hour / time.Millisecond)

// manyPages makes a block of many pages of each kind.
func manyPages() chunkfmt.WriterOptions {
	return chunkfmt.WriterOptions{PageBytes: 2 << 10, PageSeries: 100}
}

// with opens a history with memcached. Its clock stands some minutes behind the
// samples of wideSeries(0).
func (s *stores) with(t *testing.T, m *historytest.Memcached) *History {
	t.Helper()
	h := s.open(t, func(o *Options) { o.Memcached = m.Client })
	h.now = func() time.Time { return time.UnixMilli(hour) }
	return h
}

// readAll reads in all ways, and says what it cost.
func readAll(t *testing.T, h *History, want []*chunkfmt.Series) *Stats {
	t.Helper()
	s := snapshot(t, h, "a", 0, 1e9)
	got := selectAll(t, s, 0, 1e9)
	wantSeries(t, got, want)
	if names, err := s.LabelNames(t.Context(), nil, 0, 1e9); err != nil || len(names) == 0 {
		t.Errorf("label names %v, %v", names, err)
	}
	if values, err := s.LabelValues(t.Context(), "instance", []*labels.Matcher{eq("__name__", "metric_3")}, 0, 1e9); err != nil || len(values) == 0 {
		t.Errorf("label values %v, %v", values, err)
	}
	return s.Stats
}

// TestMemcachedInsteadOfGets: what one process has read, another finds in memcached.
func TestMemcachedInsteadOfGets(t *testing.T) {
	addr, process := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	st := localStores(t)
	publishWith(t, st.open(t, nil), tenantSeries{"a": wideSeries(0), "b": wideSeries(0)}, manyPages())
	want := selectAll(t, snapshot(t, st.open(t, nil), "a", 0, 1e9), 0, 1e9)

	cost := readAll(t, st.with(t, m), want)
	if cost.ObjectGets.Load() == 0 || cost.PagesMemcached.Load() != 0 {
		t.Errorf("at first %d GETs, %d pages of memcached", cost.ObjectGets.Load(), cost.PagesMemcached.Load())
	}
	m.Idle(t)
	h := st.with(t, m)
	cost = readAll(t, h, want)
	if gets, near, cached, pages := cost.ObjectGets.Load(), cost.PagesMemcached.Load(), cost.PagesCached.Load(), cost.Pages.Load(); gets != 0 || near == 0 || near+cached != pages {
		t.Errorf("%d GETs, of %d pages %d of memcached, %d of memory", gets, pages, near, cached)
	}
	cost = readAll(t, h, want)
	if near, cached, pages := cost.PagesMemcached.Load(), cost.PagesCached.Load(), cost.Pages.Load(); near != 0 || cached != pages {
		t.Errorf("the second time of %d pages %d of memcached, %d of memory", pages, near, cached)
	}

	process.Kill()
	cost = readAll(t, st.with(t, m), want)
	if cost.ObjectGets.Load() == 0 {
		t.Error("no GETs without memcached")
	}
}

// TestWrongPagesInMemcached: a page that isn't what belongs there, though its frame
// is right, is read from the object store.
func TestWrongPagesInMemcached(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	st := localStores(t)
	publishWith(t, st.open(t, nil), tenantSeries{"a": wideSeries(0)}, manyPages())
	s := snapshot(t, st.open(t, nil), "a", 0, 1e9)
	want := selectAll(t, s, 0, 1e9)
	b := &s.Blocks[0]
	m.Set(memcached.Pages, pageKeyAt(b.Object, b.Directory), make([]byte, b.Directory.Size))
	m.Idle(t)
	cost := readAll(t, st.with(t, m), want)
	if cost.ObjectGets.Load() == 0 || cost.PagesMemcached.Load() != 0 {
		t.Errorf("%d GETs, %d pages of memcached", cost.ObjectGets.Load(), cost.PagesMemcached.Load())
	}
	m.Idle(t)
	if cost = readAll(t, st.with(t, m), want); cost.ObjectGets.Load() != 0 {
		t.Errorf("%d GETs after the wrong page was replaced", cost.ObjectGets.Load())
	}
}

// TestWriteAhead: whoever reads a block first that was just published finds its pages
// in memcached, but for what is old.
func TestWriteAhead(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	st := localStores(t)
	publishWith(t, st.with(t, m), tenantSeries{"a": wideSeries(0), "b": wideSeries(0)}, manyPages())
	m.Idle(t)
	want := selectAll(t, snapshot(t, st.open(t, nil), "a", 0, 1e9), 0, 1e9)
	cost := readAll(t, st.with(t, m), want)
	if gets, near := cost.ObjectGets.Load(), cost.PagesMemcached.Load(); gets != 0 || near < 10 {
		t.Errorf("%d GETs, %d pages of memcached", gets, near)
	}
	before := m.Metric(t, "epimetheus_memcached_sets_total", "stored")
	h := st.with(t, m)
	h.now = func() time.Time { return time.UnixMilli(30 * hour) }
	publishWith(t, h, tenantSeries{"a": wideSeries(0)}, manyPages())
	m.Idle(t)
	if n := m.Metric(t, "epimetheus_memcached_sets_total", "stored") - before; n != 0 {
		t.Errorf("%v pages of yesterday were written ahead", n)
	}
}

// TestHangingMemcached: with a memcached that is silent, blocks are published and
// queries answered, and after three waits nobody waits again.
func TestHangingMemcached(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	x := testenv.StartToxic(t, addr)
	m := historytest.StartImpatientMemcached(t, x.Addr, time.Millisecond)
	x.Set(testenv.Hang)
	st := localStores(t)
	publishWith(t, st.with(t, m), tenantSeries{"a": wideSeries(0)}, manyPages())
	want := selectAll(t, snapshot(t, st.open(t, nil), "a", 0, 1e9), 0, 1e9)
	for range 3 {
		cost := readAll(t, st.with(t, m), want)
		if cost.ObjectGets.Load() == 0 || cost.PagesMemcached.Load() != 0 {
			t.Fatalf("%d GETs, %d pages of memcached", cost.ObjectGets.Load(), cost.PagesMemcached.Load())
		}
	}
	if m.Metric(t, "epimetheus_memcached_gets_total", "skipped") == 0 {
		t.Error("it is still asked")
	}
}

// TestUnreadableBlockAhead: a block that can't be read is an error of its own.
func TestUnreadableBlockAhead(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	b, summary := encode(t, tenantSeries{"a": wideSeries(0)}, manyPages())
	for i := range b {
		b[i] = 0xff
	}
	err := WriteAhead(context.Background(), m.Client, "blocks/x", bytes.NewReader(b), summary, time.UnixMilli(hour))
	if !errors.Is(err, chunkfmt.ErrCorrupt) {
		t.Errorf("damaged: %v", err)
	}
	if err := WriteAhead(context.Background(), m.Client, "blocks/x", bytes.NewReader(b[:10]), summary, time.UnixMilli(hour)); err == nil {
		t.Error("cut: no error")
	}
	if err := WriteAhead(context.Background(), nil, "blocks/x", nil, summary, time.UnixMilli(hour)); err != nil {
		t.Errorf("without memcached: %v", err)
	}
}

// TestWriteAheadWindows: so are the pages of windows.
func TestWriteAheadWindows(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	m := historytest.StartMemcached(t, addr)
	st := localStores(t)
	var all []*chunkfmt.Series
	for i := range 50 {
		all = append(all, floats(1, 15_000, 1000, func(k int) float64 { return float64(k * i) }, "__name__", "m", "i", fmt.Sprintf("%02d", i)))
	}
	o := manyPages()
	o.Rollups = true
	publishWith(t, st.with(t, m), tenantSeries{"a": all}, o)
	m.Idle(t)
	for width, cols := range map[int64]rollup.Columns{rollup.Short: rollup.AllColumns &^ rollup.M2, rollup.Long: rollup.AllColumns} {
		s := snapshot(t, st.with(t, m), "a", 0, 1e9)
		set, err := s.SelectWindows(t.Context(), nil, 0, 1e9, Summaries{Width: width, Columns: cols})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		var buf Buffer
		for set.Next(t.Context()) {
			w, _, err := set.At().Windows(&buf)
			if err != nil {
				t.Fatal(err)
			}
			n += w.Len()
		}
		if gets := s.Stats.ObjectGets.Load(); gets != 0 || n < 50*4 || set.Err() != nil {
			t.Errorf("%d ms: %d GETs, %d windows, %v", width, gets, n, set.Err())
		}
	}
}

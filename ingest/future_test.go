package ingest

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

func TestFutureSamples(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	h := hello("a")
	c := e.mustOpen(h)
	soon := float64(time.Now().Add(ship.MaxFuture - time.Minute).UnixMilli())
	late := float64(time.Now().Add(ship.MaxFuture + time.Minute).UnixMilli())
	c.send(c.batch(1, 0, []string{"x", "y"}, 0, 1000, 1, 1, late, 2, 1, 1000, 3, 0, late, 4, 0, soon, 5))
	c.send(c.batch(2, 0, nil, 0, late, 6))
	c.send(c.batch(3, 0, nil, 1, 2000, 7))
	c.await(3, 0)
	want := map[string][]float64{`{__name__="x"}`: {1000, 1, soon, 5}, `{__name__="y"}`: {1000, 3, 2000, 7}}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error(d)
	}
	got := map[uint64]uint64{}
	for _, r := range c.refused {
		got[r.Seq] += r.Samples
		if r.Reason != "future" || r.Example == "" {
			t.Errorf("refused: %v", r)
		}
	}
	if d := cmp.Diff(map[uint64]uint64{1: 2, 2: 1}, got); d != "" {
		t.Errorf("refused by batch: %s", d)
	}
	if n := e.counted("epimetheus_ingester_refused_samples_total"); n != 3 {
		t.Errorf("%v refusals counted", n)
	}

	// The clock was wrong when this was taken. It is taken for good.
	e.receive.now = func() time.Time { return time.Now().Add(time.Hour) }
	c.send(c.batch(4, 0, nil, 1, late, 8))
	c.await(4, 0)
	want[`{__name__="y"}`] = append(want[`{__name__="y"}`], late, 8)
	after := start(t, logged(crash(t, dir)))
	if d := cmp.Diff(want, after.inHead("a")); d != "" {
		t.Error("replayed:", d)
	}
	if w := after.mustOpen(again(h, c, 5, 4)).welcome; !w.Resumed || w.Received != 4 {
		t.Errorf("welcome %v", w)
	}
}

func TestRefuseFuture(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	limit := now.Add(ship.MaxFuture).UnixMilli()
	var refs head.Refs
	_ = refs.Announce(0, labels.FromStrings("__name__", "x"), false)
	_ = refs.Announce(1, labels.FromStrings("__name__", "y"), false)
	hs, fhs := tsdbutil.GenerateTestHistograms(3), tsdbutil.GenerateTestFloatHistograms(3)
	make3 := func() *ship.Columns {
		return &ship.Columns{
			Floats:          ship.Floats{Ref: []uint32{0, 1, 0}, T: []int64{limit + 1, limit, 5}, ST: []int64{1, 2, 3}, V: []float64{1, 2, 3}},
			Histograms:      ship.Histograms{Ref: []uint32{0, 1, 0}, T: []int64{1, limit + 1, limit}, H: append([]*histogram.Histogram(nil), hs...)},
			FloatHistograms: ship.FloatHistograms{Ref: []uint32{1, 1, 1}, T: []int64{limit + 3, limit + 2, limit + 1}, ST: []int64{1, 2, 3}, H: append([]*histogram.FloatHistogram(nil), fhs...)},
		}
	}
	var enc ship.Encoder
	cols := make3()
	in := &shippb.Batch{Seq: 7, Columns: enc.Encode(nil, cols), Withdraw: []uint32{1}}
	out, refused := refuseFuture(in, cols, &refs, now)
	if refused.Samples != 5 || refused.Example.Get("__name__") != "x" {
		t.Errorf("refused %+v", refused)
	}
	want := &ship.Columns{
		Floats:     ship.Floats{Ref: []uint32{1, 0}, T: []int64{limit, 5}, ST: []int64{2, 3}, V: []float64{2, 3}},
		Histograms: ship.Histograms{Ref: []uint32{0, 0}, T: []int64{1, limit}, H: []*histogram.Histogram{hs[0], hs[2]}},
	}
	want.FloatHistograms = ship.FloatHistograms{Ref: []uint32{}, T: []int64{}, ST: []int64{}, H: []*histogram.FloatHistogram{}}
	if d := cmp.Diff(want, cols); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	var dec ship.Decoder
	var read ship.Columns
	if err := dec.Decode(out.Columns, &read); err != nil || read.Len() != cols.Len() || out.Seq != 7 || len(out.Withdraw) != 1 {
		t.Errorf("batch %v with %d samples: %v", out, read.Len(), err)
	}
	// What is all right is not touched, and costs nothing.
	cols = make3()
	if allocs := testing.AllocsPerRun(10, func() {
		if out, refused = refuseFuture(in, cols, &refs, now.Add(time.Hour)); out != in || refused.Samples > 0 {
			t.Errorf("refused %+v", refused)
		}
	}); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
}

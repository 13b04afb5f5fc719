package ingest

import (
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"google.golang.org/grpc/codes"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

func TestFutureSamples(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	h := hello("a")
	c := e.mustOpen(h)
	soon := float64(time.Now().Add(ship.MaxFuture - time.Minute).UnixMilli())
	late := float64(time.Now().Add(ship.MaxFuture + time.Minute).UnixMilli())
	b := c.batch(1, 0, []string{"x", "y"}, 0, 1000, 1, 1, late, 2, 1, 1000, 3, 0, late, 4, 0, soon, 5)
	for _, at := range []int64{1000, int64(late), int64(soon), math.MaxInt64} {
		b.Exemplars = append(b.Exemplars, &shippb.Exemplar{Ref: 1, T: at, Labels: []string{"trace", "1"}})
	}
	c.send(b)
	c.send(c.batch(2, 0, nil, 0, late, 6))
	c.send(c.batch(3, 0, nil, 1, 2000, 7))
	c.await(3, 0)
	want := map[string][]float64{`{__name__="x"}`: {1000, 1, soon, 5}, `{__name__="y"}`: {1000, 3, 2000, 7}}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error(d)
	}
	exemplars := func(e *env) (ts []int64) {
		found, _ := e.head.Exemplars("a", math.MinInt64, math.MaxInt64, [][]*labels.Matcher{{labels.MustNewMatcher(labels.MatchEqual, "__name__", "y")}})
		for _, s := range found {
			for _, x := range s.Exemplars {
				ts = append(ts, x.Ts)
			}
		}
		return ts
	}
	if d := cmp.Diff([]int64{1000, int64(soon)}, exemplars(e)); d != "" {
		t.Error("exemplars:", d)
	}
	got := map[uint64]uint64{}
	for _, r := range c.refused {
		got[r.Seq] += r.Samples
		if r.Reason != "future" || r.Example == "" {
			t.Errorf("refused: %v", r)
		}
	}
	if d := cmp.Diff(map[uint64]uint64{1: 4, 2: 1}, got); d != "" {
		t.Errorf("refused by batch: %s", d)
	}
	if n := e.counted("epimetheus_ingester_refused_samples_total"); n != 5 {
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
	if d := cmp.Diff([]int64{1000, int64(soon)}, exemplars(after)); d != "" {
		t.Error("exemplars replayed:", d)
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

// TestClocksDiffer: what is in the future by the ingester's clock, but not by that
// of the source's machine, is not refused. It waits, until one of the clocks is
// set right.
func TestClocksDiffer(t *testing.T) {
	e := start(t, Options{})
	var behind atomic.Int64 // of the ingester's clock
	e.receive.now = func() time.Time { return time.Now().Add(-time.Duration(behind.Load())) }
	open := func(source time.Duration) (*shippb.Hello, *client) {
		h := hello("a")
		h.Clock = time.Now().Add(source).UnixMilli()
		return h, e.mustOpen(h)
	}
	now := float64(time.Now().UnixMilli())
	waits := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if got, _ := e.receive.clocks(); got == n {
				return
			} else if time.Now().After(deadline) {
				t.Fatalf("%d sessions wait, want %d", got, n)
			}
		}
	}

	// Ours is an hour behind. What comes is applied once it is right.
	behind.Store(int64(time.Hour))
	_, c := open(0)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1, 0, now, 2))
	waits(1)
	if d := cmp.Diff(map[string][]float64{}, e.inHead("a")); d != "" {
		t.Error(d)
	}
	e.note()
	if cs := e.Health().Conditions(); !slices.ContainsFunc(cs, func(c health.Condition) bool { return strings.Contains(c.What, "1h0m0s ahead") }) {
		t.Errorf("health says %v", cs)
	}
	_, c2 := open(0)
	b := c2.batch(1, 0, []string{"x"})
	b.Exemplars = []*shippb.Exemplar{{Ref: 0, T: int64(now)}}
	c2.send(b)
	waits(2)
	behind.Store(0)
	c.await(1, 0)
	if c2.await(1, 0); len(c2.refused) > 0 {
		t.Errorf("refused %v", c2.refused)
	}
	waits(0)
	want := map[string][]float64{`{__name__="x"}`: {1000, 1, now, 2}}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error(d)
	}

	// The source's is an hour ahead, its samples with it. After a while the stream
	// ends, so that it can say what its clock is now: right. Then these samples are
	// in the future by both.
	ahead := now + float64(time.Hour.Milliseconds())
	h, c := open(time.Hour)
	c.send(c.batch(1, 0, []string{"y"}, 0, ahead, 1, 0, now, 2))
	waits(1)
	c.ends(codes.Unavailable)
	h2 := again(h, c, 2, 0)
	h2.Clock = time.Now().UnixMilli()
	c = e.mustOpen(h2)
	if !c.welcome.Resumed || c.welcome.Received != 0 {
		t.Fatalf("welcome %v", c.welcome)
	}
	c.send(c.batch(1, 0, []string{"y"}, 0, ahead, 1, 0, now, 2))
	c.await(1, 0)
	want[`{__name__="y"}`] = []float64{now, 2}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error(d)
	}
	if len(c.refused) != 1 || c.refused[0].Reason != "future" || c.refused[0].Samples != 1 {
		t.Errorf("refused %v", c.refused)
	}

	// Where all is in the future by both clocks nothing waits; nor where the source
	// doesn't say what its clock is (TestFutureSamples).
	_, c = open(-time.Hour)
	c.send(c.batch(1, 0, []string{"z"}, 0, ahead, 1))
	c.await(1, 0)
	if len(c.refused) != 1 || c.refused[0].Samples != 1 {
		t.Errorf("refused %v", c.refused)
	}
}

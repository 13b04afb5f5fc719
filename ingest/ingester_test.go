package ingest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// publishFunc is a Publisher that leaves no rows.
type publishFunc func(ctx context.Context, id ulid.ULID, data []byte, summary *chunkfmt.Summary) error

func (f publishFunc) Publish(ctx context.Context, id ulid.ULID, data []byte, summary *chunkfmt.Summary) error {
	return f(ctx, id, data, summary)
}

func (f publishFunc) PublishRows(context.Context, ulid.ULID, *chunkfmt.Summary, []string) error {
	return errors.New("no rows were left")
}

func flush(t *testing.T, e *env) {
	t.Helper()
	if err := e.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestReceivedThenDurable(t *testing.T) {
	e := start(t, Options{})
	c := e.mustOpen(hello("a"))
	if w := c.welcome; w.Version != ship.Version || w.Resumed || w.Received != 0 || len(w.Process) != 16 || w.Ingester != "ingester-0" || w.WindowBytes == 0 {
		t.Errorf("welcome %v", w)
	}
	c.send(c.batch(1, 0, []string{"x", "y"}, 0, 1000, 1, 1, 1000, 2))
	c.send(c.batch(2, 0, nil, 0, 2000, 3))
	c.await(2, 0)
	want := map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 3}, `{__name__="y"}`: {1000, 2}}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error("head:", d)
	}
	if got, n := e.inBlocks("a"); len(got) > 0 || n > 0 {
		t.Errorf("in blocks before the flush: %v", got)
	}
	flush(t, e)
	c.await(2, 2)
	got, n := e.inBlocks("a")
	if d := cmp.Diff(want, got); d != "" || n != 1 {
		t.Errorf("%d blocks: %s", n, d)
	}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error("the generation must stay readable:", d)
	}
	if got, _ := e.inBlocks("b"); len(got) > 0 || len(e.inHead("b")) > 0 {
		t.Errorf("another tenant sees %v", got)
	}
	// The session goes on in the next generation.
	c.send(c.batch(3, 0, nil, 0, 3000, 4))
	c.await(3, 2)
	e.flush.drop(time.Now().Add(e.opts.VisibilityDelay + time.Second))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {3000, 4}}, e.inHead("a")); d != "" {
		t.Error("after the drop:", d)
	}
	if got := e.counted("epimetheus_ingester_flushed_samples_total"); got != 3 {
		t.Errorf("%v samples counted as flushed", got)
	}
}

func TestResume(t *testing.T) {
	e := start(t, Options{})
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1, 1))
	c.send(c.batch(2, 0, nil, 0, 2, 2))
	c.await(2, 0)
	c.cancel() // the connection breaks
	c.ends(codes.Canceled)

	h.Process, h.NextSeq = c.welcome.Process, 4
	flush(t, e)
	c = e.mustOpen(h)
	if w := c.welcome; !w.Resumed || w.Received != 2 || w.Durable != 2 {
		t.Errorf("welcome %v", w)
	}
	// What was under way is sent again; what was received is not applied anew.
	for _, seq := range []uint64{2, 3, 3, 4} {
		c.send(c.batch(seq, 0, nil, 0, float64(seq), float64(seq)))
	}
	c.await(4, 2)
	if got := e.samplesReceived("in_order"); got != 4 {
		t.Errorf("%v samples applied", got)
	}
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1, 1, 2, 2, 3, 3, 4, 4}}, e.inHead("a")); d != "" {
		t.Error(d)
	}

	// A second stream takes the session over from one that still stands.
	second := e.mustOpen(h)
	c.ends(codes.Aborted)
	second.send(second.batch(5, 0, nil, 0, 5, 5))
	second.await(5, 2)

	// The same id under another tenant is another session.
	other := hello("b")
	other.Session = h.Session
	if w := e.mustOpen(other).welcome; w.Resumed || w.Received != 0 {
		t.Errorf("another tenant's session: %v", w)
	}
}

func TestUnknownSessionEnds(t *testing.T) {
	e := start(t, Options{})
	h := hello("a")
	h.Process, h.NextSeq = make([]byte, 16), 7 // of another process
	c := e.mustOpen(h)
	if c.welcome.Resumed {
		t.Error("resumed")
	}
	c.ends(codes.NotFound)
	// Nor is it heard of a source: it would pass for one without replicas.
	if x := e.receive.sources.coverage("a", time.Now()); len(x) > 0 {
		t.Errorf("coverage %v", x)
	}
	e.receive.mu.Lock()
	defer e.receive.mu.Unlock()
	if n := len(e.receive.sessions); n != 0 {
		t.Errorf("%d sessions kept", n)
	}
}

func TestSessionsExpire(t *testing.T) {
	e := start(t, Options{})
	h := hello("a")
	c := e.mustOpen(h)
	beat := &shippb.ToIngester{Message: &shippb.ToIngester_Heartbeat{Heartbeat: &shippb.Heartbeat{OpenRewinds: 3}}}
	if err := c.stream.Send(beat); err != nil {
		t.Fatal(err)
	}
	c.send(c.batch(1, 0, []string{"x"}, 0, 1, 1))
	c.await(1, 0)
	if !e.receive.resending("a") || e.receive.resending("b") {
		t.Error("ranges to send again are not noted")
	}
	e.receive.expire(time.Now().Add(2 * sessionTTL)) // it has a stream
	if err := c.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.stream.Recv(); err == nil || status.Code(err) != codes.Unknown {
		t.Errorf("closed: %v", err)
	}
	h.Process = c.welcome.Process
	e.receive.expire(time.Now())
	if c = e.mustOpen(h); !c.welcome.Resumed {
		t.Fatal("forgotten at once")
	}
	c.cancel()
	c.ends(codes.Canceled)
	// The server notices in its own time.
	for {
		e.receive.expire(time.Now().Add(2 * sessionTTL))
		e.receive.mu.Lock()
		n := len(e.receive.sessions)
		e.receive.mu.Unlock()
		if n == 0 {
			break
		}
	}
	if e.receive.resending("a") {
		t.Error("a session that is gone has ranges to send again")
	}
}

func TestRefusedHello(t *testing.T) {
	e := start(t, Options{})
	for name, test := range map[string]struct {
		change func(*shippb.Hello)
		code   codes.Code
		text   string
	}{
		"version":   {func(h *shippb.Hello) { h.Version = 2 }, codes.FailedPrecondition, "version 2 is not spoken here, version 1 is"},
		"session":   {func(h *shippb.Hello) { h.Session = nil }, codes.InvalidArgument, "16 bytes"},
		"source":    {func(h *shippb.Hello) { h.Source = []byte("x") }, codes.InvalidArgument, "16 bytes"},
		"no tenant": {func(h *shippb.Hello) { h.Tenant = "" }, codes.InvalidArgument, "tenant"},
		"tenant":    {func(h *shippb.Hello) { h.Tenant = strings.Repeat("x", 151) }, codes.InvalidArgument, "it has 151"},
	} {
		h := hello("a")
		test.change(h)
		_, err := e.open(h)
		if s := status.Convert(err); s.Code() != test.code || !strings.Contains(s.Message(), test.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e.Drain()
	if _, err := e.open(hello("a")); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream to one that leaves: %v", err)
	}
}

func TestBrokenProtocolEndsTheStream(t *testing.T) {
	e := start(t, Options{})
	for name, bad := range map[string]func(*client) *shippb.Batch{
		"skipped seq": func(c *client) *shippb.Batch { return c.batch(3, 0, nil, 0, 2, 2) },
		"unknown ref": func(c *client) *shippb.Batch { return c.batch(2, 0, nil, 1, 2, 2) },
		"gap in refs": func(c *client) *shippb.Batch { return c.batch(2, 2, []string{"z"}) },
		"withdrawn":   func(c *client) *shippb.Batch { b := c.batch(2, 0, nil); b.Withdraw = []uint32{0, 0}; return b },
		"columns":     func(c *client) *shippb.Batch { b := c.batch(2, 0, nil); b.Columns = []byte("hostile"); return b },
		"exemplar": func(c *client) *shippb.Batch {
			b := c.batch(2, 0, nil)
			b.Exemplars = []*shippb.Exemplar{{Ref: 9}}
			return b
		},
		"metadata": func(c *client) *shippb.Batch {
			b := c.batch(2, 0, nil)
			b.Metadata = []*shippb.Metadata{{Ref: 9}}
			return b
		},
		"huge ref": func(c *client) *shippb.Batch { return c.batch(2, 1<<31, []string{"z"}) },
	} {
		t.Run(name, func(t *testing.T) {
			e := &env{Ingester: e.Ingester, t: t, conn: e.conn}
			c := e.mustOpen(hello(name))
			c.send(c.batch(1, 0, []string{"x"}, 0, 1, 1))
			c.await(1, 0)
			c.send(bad(c))
			c.ends(codes.InvalidArgument)
			if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1, 1}}, e.inHead(name)); d != "" {
				t.Error(d)
			}
		})
	}
	c := e.mustOpen(hello("a"))
	if err := c.stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Hello{Hello: hello("a")}}); err != nil {
		t.Fatal(err)
	}
	c.ends(codes.InvalidArgument)
}

func TestInvalidSeriesAreRefusedAndCounted(t *testing.T) {
	e := start(t, Options{Limits: Limits{Series: 2, LabelsPerSeries: 3, LabelNameBytes: 10, LabelValueBytes: 10}})
	c := e.mustOpen(hello("a"))
	b := c.batch(1, 0, nil, 0, 1, 1, 1, 1, 1, 2, 1, 1, 3, 1, 1, 4, 1, 1, 5, 1, 1, 6, 1, 1, 7, 1, 1, 8, 1, 1, 8, 2, 1)
	for i, ls := range [][]string{
		{"__name__", "good"},
		{"job", "no name"},
		{"__name__", "x", "a", ""},
		{"b", "unsorted", "__name__", "x"},
		{"__name__", "x", "a", "1", "b", "2", "c", "3"},
		{"__name__", "x", "far_too_long", "1"},
		{"__name__", "x", "a", "far too long"},
		{"__name__", "y"},
		{"__name__", "one too many"[:3]},
	} {
		b.Announce = append(b.Announce, &shippb.Series{Ref: uint32(i), Labels: ls})
	}
	c.send(b)
	c.await(1, 0)
	if d := cmp.Diff(map[string][]float64{`{__name__="good"}`: {1, 1}, `{__name__="y"}`: {1, 1}}, e.inHead("a")); d != "" {
		t.Error(d)
	}
	got := map[string]uint64{}
	for _, r := range c.refused {
		got[r.Reason] += r.Samples
		if r.Seq != 1 || r.Example == "" {
			t.Errorf("refused: %v", r)
		}
	}
	if d := cmp.Diff(map[string]uint64{string(head.ReasonInvalidSeries): 6, string(head.ReasonSeriesLimit): 2}, got); d != "" {
		t.Error(d)
	}
	if got := e.counted("epimetheus_ingester_refused_samples_total"); got != 8 {
		t.Errorf("%v refusals counted", got)
	}
	// A flush makes room; the session need not say anything anew.
	flush(t, e)
	c.send(c.batch(2, 0, nil, 8, 3, 3))
	c.await(2, 1)
	if got := e.inHead("a")[`{__name__="one"}`]; !cmp.Equal(got, []float64{3, 3}) {
		t.Errorf("after the flush: %v", got)
	}
}

// Nothing is durable before all of it is: object, work row, block rows, guard.
func TestDurableOnlyAfterPublish(t *testing.T) {
	// The writes of a publication, in order.
	writes := []string{"object", "work row", "block rows", "guard"}
	kinds := map[string]historytest.Fault{
		"not written": historytest.Before, "written, answer lost": historytest.After, "written by half": historytest.Torn,
	}
	for i, write := range writes {
		for name, kind := range kinds {
			t.Run(write+" "+name, func(t *testing.T) {
				t.Parallel()
				e := start(t, Options{})
				h := hello("a")
				c := e.mustOpen(h)
				c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
				c.await(1, 0)
				e.receive.mu.Lock()
				s := e.receive.sessions[sessionID{"a", [16]byte(h.Session)}]
				e.receive.mu.Unlock()

				calls := 0
				e.faults(func(op, _ string) historytest.Fault {
					if op != "Put" && op != "PutIf" {
						return historytest.None
					}
					s.mu.Lock()
					defer s.mu.Unlock()
					if s.durable != 0 {
						t.Errorf("durable before write %d", calls)
					}
					calls++
					if calls == i+1 {
						return kind
					}
					return historytest.None
				})
				flush(t, e)
				if want := i + 1 + len(writes); calls != want {
					t.Errorf("%d writes, want %d", calls, want)
				}
				c.await(1, 1)
				e.faults(nil)
				got, n := e.inBlocks("a")
				if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1}}, got); d != "" || n != 1 {
					t.Errorf("%d blocks: %s", n, d)
				}
				if got := e.counted("epimetheus_ingester_flush_failures_total"); got != 1 {
					t.Errorf("%v failures counted", got)
				}
			})
		}
	}
}

// A flush that is broken off goes on with the next; generations become durable
// in order.
func TestInterruptedFlushGoesOn(t *testing.T) {
	e := start(t, Options{})
	c := e.mustOpen(hello("a"))
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	ctx, cancel := context.WithCancel(t.Context())
	e.faults(func(op, _ string) historytest.Fault {
		if op == "Put" {
			cancel()
			return historytest.Before
		}
		return historytest.None
	})
	if err := e.Flush(ctx); err == nil {
		t.Fatal("no error of an interrupted flush")
	}
	c.send(c.batch(2, 0, nil, 0, 2000, 2))
	c.await(2, 0)
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 2}}, e.inHead("a")); d != "" {
		t.Error("what is not durable must stay readable:", d)
	}
	e.flush.drop(time.Now().Add(time.Hour))
	if len(e.inHead("a")) != 1 {
		t.Error("what is not durable was dropped")
	}
	e.faults(nil)
	flush(t, e)
	c.await(2, 2)
	got, n := e.inBlocks("a")
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 2}}, got); d != "" || n != 2 {
		t.Errorf("%d blocks: %s", n, d)
	}
}

// A block that a sweeper has condemned goes out under another id.
func TestCondemnedBlock(t *testing.T) {
	var ids []ulid.ULID
	i, err := New(Options{Member: "m", RowWidth: index.Width}, publishFunc(func(_ context.Context, id ulid.ULID, _ []byte, _ *chunkfmt.Summary) error {
		ids = append(ids, id)
		if len(ids) == 1 {
			return fmt.Errorf("publish: %w", history.ErrCondemned)
		}
		return nil
	}), promslog.NewNopLogger(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	var refs head.Refs
	refs.Announce(0, labels.FromStrings(model.MetricNameLabel, "x"), false)
	cols := &ship.Columns{Floats: ship.Floats{Ref: []uint32{0}, T: []int64{1}, V: []float64{1}}}
	i.head.Append("a", &refs, &head.Batch{Columns: cols})
	if err := i.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(ids) != 2 || ids[0] == ids[1] {
		t.Errorf("published as %v", ids)
	}
}

// Every sample is in exactly one generation, whenever rotations happen.
func TestRotationDuringAppends(t *testing.T) {
	e := start(t, Options{})
	const sessions, batches, pace = 3, 120, 12
	var wg sync.WaitGroup
	due := make(chan struct{}, sessions*batches)
	for n := range sessions {
		c := e.mustOpen(hello("a"))
		wg.Go(func() {
			for seq := uint64(1); seq <= batches; seq++ {
				var names []string
				if seq == 1 {
					names = []string{fmt.Sprint("own", n), "shared"}
				}
				at := float64(seq)
				c.send(c.batch(seq, 0, names, 0, at, at, 1, at*10+float64(n), at))
				if seq%pace == 0 {
					c.awaitAtLeast(seq, 0)
					due <- struct{}{} // a flush, while others send
				}
			}
			c.awaitAtLeast(batches, batches)
		})
	}
	for range sessions * batches / pace {
		<-due
		flush(t, e)
	}
	wg.Wait()
	got, blocks := e.inBlocks("a")
	for n := range sessions {
		if have := len(got[fmt.Sprintf(`{__name__="own%d"}`, n)]) / 2; have != batches {
			t.Errorf("session %d: %d samples, want %d", n, have, batches)
		}
	}
	if have := len(got[`{__name__="shared"}`]) / 2; have != sessions*batches {
		t.Errorf("shared: %d samples, want %d", have, sessions*batches)
	}
	if blocks < 3 {
		t.Errorf("%d blocks: there was nothing to test", blocks)
	}
	if got := e.counted("epimetheus_ingester_flushed_samples_total"); got != 2*sessions*batches {
		t.Errorf("%v samples counted as flushed, want %d", got, 2*sessions*batches)
	}
}

// A head that is full takes nothing, and goes on once generations are dropped.
func TestFullHeadHoldsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, err := New(Options{Member: "m", RowWidth: index.Width, FlushBytes: 500, MaxBytes: 1000},
			publishFunc(func(context.Context, ulid.ULID, []byte, *chunkfmt.Summary) error { return nil }),
			promslog.NewNopLogger(), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		var refs head.Refs
		cols := &ship.Columns{}
		for n := range uint32(20) {
			refs.Announce(n, labels.FromStrings(model.MetricNameLabel, fmt.Sprint("m", n)), false)
			cols.Floats.Ref, cols.Floats.T, cols.Floats.V = append(cols.Floats.Ref, n), append(cols.Floats.T, 1), append(cols.Floats.V, 1)
		}
		if err := i.admit(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		i.head.Append("a", &refs, &head.Batch{Columns: cols})
		if i.Size().Bytes < 1000 {
			t.Fatalf("the head counts %d bytes", i.Size().Bytes)
		}
		admitted := make(chan error, 2)
		go func() { admitted <- i.admit(t.Context(), "a") }()
		time.Sleep(time.Minute)
		synctest.Wait()
		select {
		case <-admitted:
			t.Fatal("admitted into a full head")
		case <-i.flush.now: // a flush was asked for
		}
		if err := i.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if len(admitted) > 0 {
			t.Fatal("admitted while the frozen generation is there")
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { admitted <- i.admit(ctx, "a") }()
		cancel()
		if err := <-admitted; err == nil {
			t.Error("a wait that was cancelled ended without an error")
		}
		i.flush.drop(time.Now().Add(i.opts.VisibilityDelay))
		if err := <-admitted; err != nil {
			t.Error(err)
		}
	})
}

// Run flushes by time and by bytes, drops after the visibility delay, and
// flushes once more on the way out.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var samples []uint64 // of each block
		published := func() []uint64 {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(samples)
		}
		i, err := New(Options{Member: "m", RowWidth: index.Width, FlushInterval: 10 * time.Minute, FlushBytes: 100_000, VisibilityDelay: time.Minute},
			publishFunc(func(_ context.Context, _ ulid.ULID, _ []byte, s *chunkfmt.Summary) error {
				mu.Lock()
				defer mu.Unlock()
				samples = append(samples, s.Tenants[0].Samples)
				return nil
			}), promslog.NewNopLogger(), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- i.Run(ctx) }()
		var refs head.Refs
		add := func(n int) {
			cols := &ship.Columns{}
			for range n {
				ref := uint32(refs.Len())
				refs.Announce(ref, labels.FromStrings(model.MetricNameLabel, fmt.Sprint("m", ref)), false)
				cols.Floats.Ref, cols.Floats.T, cols.Floats.V = append(cols.Floats.Ref, ref), append(cols.Floats.T, 1), append(cols.Floats.V, 1)
			}
			i.head.Append("a", &refs, &head.Batch{Columns: cols})
			if err := i.admit(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		add(3)
		if len(published()) != 0 {
			t.Fatalf("published at once: %v", published())
		}
		time.Sleep(11 * time.Minute) // the interval, spread by a twentieth
		synctest.Wait()
		if !cmp.Equal(published(), []uint64{3}) {
			t.Fatalf("after the interval: %v", published())
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if s := i.Size(); s.Generations != 1 || s.Samples != 0 {
			t.Errorf("after the visibility delay: %+v", s)
		}
		add(1000)
		if !cmp.Equal(published(), []uint64{3, 1000}) {
			t.Fatalf("after many bytes: %v", published())
		}
		add(5)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if !cmp.Equal(published(), []uint64{3, 1000, 5}) {
			t.Errorf("after the end: %v", published())
		}
	})
}

// A last flush that can't work ends in time and says what follows.
func TestLastFlushIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, err := New(Options{Member: "m", RowWidth: index.Width, FinalFlush: 5 * time.Second},
			publishFunc(func(context.Context, ulid.ULID, []byte, *chunkfmt.Summary) error { return historytest.ErrInjected }),
			promslog.NewNopLogger(), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		var refs head.Refs
		refs.Announce(0, labels.FromStrings(model.MetricNameLabel, "x"), false)
		cols := &ship.Columns{Floats: ship.Floats{Ref: []uint32{0}, T: []int64{1}, V: []float64{1}}}
		i.head.Append("a", &refs, &head.Batch{Columns: cols})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		if err := i.Run(ctx); err == nil || !strings.Contains(err.Error(), "send these samples again") {
			t.Errorf("last flush: %v", err)
		}
		if d := time.Since(began); d < 5*time.Second || d > 30*time.Second {
			t.Errorf("it took %s", d)
		}
	})
}

// encode splits where a block would become too large, and keeps the order of
// tenants and series.
func TestEncodeSplits(t *testing.T) {
	h := head.New(0)
	for _, tenant := range []string{"b", "a"} {
		var refs head.Refs
		cols := &ship.Columns{}
		for n := range uint32(2000) {
			refs.Announce(n, labels.FromStrings(model.MetricNameLabel, fmt.Sprintf("m%04d", n)), false)
			for at := range int64(20) {
				cols.Floats.Ref, cols.Floats.T = append(cols.Floats.Ref, n), append(cols.Floats.T, at*15000)
				cols.Floats.V = append(cols.Floats.V, float64(n)*1.1+float64(at*at)*0.37)
			}
		}
		h.Append(tenant, &refs, &head.Batch{Columns: cols})
	}
	g := h.Rotate()
	blocks, _, err := encode(g, index.Width, 64<<10, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(blocks) < 3 {
		t.Fatalf("%d blocks", len(blocks))
	}
	var samples uint64
	last := ""
	for _, b := range blocks {
		if len(b.data) > 1<<20 || b.summary.Size != int64(len(b.data)) {
			t.Errorf("block of %d bytes, summary says %d", len(b.data), b.summary.Size)
		}
		for _, s := range b.summary.Tenants {
			if s.Tenant < last {
				t.Errorf("tenant %q after %q", s.Tenant, last)
			}
			last = s.Tenant
			samples += s.Samples
		}
	}
	if samples != 2*2000*20 {
		t.Errorf("%d samples in blocks", samples)
	}
	if blocks, _, err = encode(h.Rotate(), index.Width, maxBlockBytes, time.Now()); err != nil || len(blocks) != 0 {
		t.Errorf("an empty generation gives %d blocks, %v", len(blocks), err)
	}
}

// A tenant whose samples can't be made a block costs the others nothing. (No
// source gets so far: labels are checked when they are announced.)
func TestEncodeFails(t *testing.T) {
	h := head.New(0)
	for tenant, value := range map[string]string{"a": "x", "bad": "", "c": "x"} {
		var refs head.Refs
		refs.Announce(0, labels.FromStrings(model.MetricNameLabel, "m", "empty", value), false)
		cols := &ship.Columns{}
		cols.Floats.Ref, cols.Floats.T, cols.Floats.V = []uint32{0}, []int64{1}, []float64{1}
		h.Append(tenant, &refs, &head.Batch{Columns: cols})
	}
	blocks, failed, err := encode(h.Rotate(), index.Width, maxBlockBytes, time.Now())
	if err != nil || len(failed) != 1 || failed["bad"] == nil {
		t.Fatalf("failed %v, %v", failed, err)
	}
	var got []string
	for _, x := range blocks[0].summary.Tenants {
		got = append(got, x.Tenant)
	}
	if d := cmp.Diff([]string{"a", "c"}, got); d != "" {
		t.Error(d)
	}
}

// The sessions of a tenant that a flush leaves out end, and no others.
func TestSessionsEnd(t *testing.T) {
	e := start(t, Options{})
	bad, good := e.mustOpen(hello("bad")), e.mustOpen(hello("good"))
	for _, c := range []*client{bad, good} {
		c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
		c.await(1, 0)
	}
	if n := e.counted("epimetheus_ingester_announced_bytes"); n < 200 {
		t.Errorf("%v bytes announced", n)
	}
	e.durable(durability{generation: e.head.Rotate().ID()}, map[string]error{"bad": errors.New("test")})
	good.await(1, 1)
	bad.ends(codes.NotFound)
	if n := e.counted("epimetheus_ingester_announced_bytes"); n > 200+sessionBytes {
		t.Errorf("%v bytes announced by a session that has ended", n)
	}
}

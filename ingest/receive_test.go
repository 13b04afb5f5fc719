package ingest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// quiet is a stream of one batch, then silence.
type quiet struct {
	grpc.ServerStream
	msgs chan *shippb.ToIngester
	ctx  context.Context //nolint:containedctx // of the stream
}

func (q *quiet) Send(*shippb.ToSidecar) error { return nil }

func (q *quiet) Recv() (*shippb.ToIngester, error) {
	select {
	case m := <-q.msgs:
		return m, nil
	case <-q.ctx.Done():
		return nil, q.ctx.Err()
	}
}

// The time that a batch waits for room in the head is no silence of the client.
func TestWaitForRoomIsNoSilence(t *testing.T) {
	e := start(t, Options{})
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{
			head: e.head, metrics: e.receive.metrics, now: time.Now,
			admit: func(context.Context, string) error { time.Sleep(2 * silenceLimit); return nil },
		}
		r.durable.Store(&durability{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		q := &quiet{msgs: make(chan *shippb.ToIngester, 1), ctx: ctx}
		q.msgs <- &shippb.ToIngester{Message: &shippb.ToIngester_Batch{Batch: &shippb.Batch{Seq: 1}}}
		s := &session{id: sessionID{tenant: "a"}, changed: make(chan struct{}, 1)}
		ended := make(chan error, 1)
		began := time.Now()
		go func() { ended <- r.receive(ctx, q, s) }()
		err := <-ended
		if status.Code(err) != codes.DeadlineExceeded || s.received != 1 {
			t.Errorf("received %d, then %v", s.received, err)
		}
		if took := time.Since(began); took != 3*silenceLimit {
			t.Errorf("ended after %s", took)
		}
	})
}

// What comes with samples counts as memory, and long exemplars are refused.
func TestMemoryBesideSamples(t *testing.T) {
	e := start(t, Options{})
	c := e.mustOpen(hello("a"))
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	before := e.Size().Bytes
	long := strings.Repeat("h", 10_000)
	c.send(&shippb.Batch{
		Seq:      2,
		Metadata: []*shippb.Metadata{{Ref: 0, Help: long}, {Ref: 0, Help: long}},
		Exemplars: []*shippb.Exemplar{
			{Ref: 0, T: 1, Labels: []string{"trace_id", "1"}},
			{Ref: 0, T: 2, Labels: []string{"trace_id", long}},
		},
	})
	ack := c.awaitAtLeast(2, 0)
	if grown := e.Size().Bytes - before; grown < 10_000 || grown > 11_000 {
		t.Errorf("the head counts %d bytes more", grown)
	}
	if len(ack.Refused) != 1 || ack.Refused[0].Reason != "invalid_exemplar" {
		t.Errorf("refused %v", ack.Refused)
	}
}

// What comes during the last flush is not taken: it would be in no block, and the
// others would hear that nothing is missing. What the flush makes durable is told.
func TestNothingIsTakenDuringTheLastFlush(t *testing.T) {
	e := start(t, Options{})
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	flushing, gate := make(chan struct{}, 100), make(chan struct{})
	e.faults(func(string, string) historytest.Fault {
		flushing <- struct{}{}
		<-gate
		return historytest.None
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	e.Drain()
	cancel()
	<-flushing
	c.send(c.batch(2, 0, nil, 0, 2000, 1))
	e.receive.mu.Lock()
	s := e.receive.sessions[sessionID{"a", [16]byte(h.Session)}]
	e.receive.mu.Unlock()
	// As the stream's goroutine does, sooner or later.
	if err := e.receive.apply(s, c.batch(2, 0, nil, 0, 2000, 1), &ship.Decoder{}, &ship.Columns{}); !errors.Is(err, errClosed) {
		t.Errorf("a batch came to %v", err)
	}
	close(gate)
	c.await(1, 1)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := e.head.Current().Samples(); n != 0 {
		t.Errorf("%d samples are in no block", n)
	}
}

// A new session of a source outdates what it said in those that it has left behind,
// whoever else is there, and what is kept of sessions goes with them.
func TestSuccession(t *testing.T) {
	r := start(t, Options{}).receive
	attach := func(tenant string, source int) (*session, *stream) {
		t.Helper()
		h := hello(tenant)
		h.Source = binary.BigEndian.AppendUint64(make([]byte, 8), uint64(source))
		st := &stream{cancel: func(error) {}, done: make(chan struct{})}
		s, resumed, err := r.attach(t.Context(), h, st)
		if err != nil || resumed {
			t.Fatal(resumed, err)
		}
		return s, st
	}
	gone, st := attach("a", 1)
	r.beat(gone, &shippb.Heartbeat{OpenRewinds: 3})
	r.letGo(gone, st)
	there, _ := attach("a", 1_000_000)
	r.beat(there, &shippb.Heartbeat{OpenRewinds: 3})
	for i := range 20_000 { // which takes long if each looks at all
		s, st := attach(fmt.Sprint("t", i), 1)
		r.letGo(s, st)
	}
	if n := r.rewinds["a"]; n != 2 {
		t.Errorf("%d sources send again", n)
	}
	attach("a", 1)
	attach("a", 1_000_000) // beside the other one, which has its stream
	if n := r.rewinds["a"]; n != 1 || !gone.succeeded || there.succeeded {
		t.Errorf("%d sources send again", n)
	}
	r.expire(time.Now().Add(2 * sessionTTL))
	if len(r.sessions) != 3 || len(r.bySource) != 2 || len(r.bySource[sourceID{"a", there.source}]) != 2 {
		t.Errorf("%d sessions of %d sources are left", len(r.sessions), len(r.bySource))
	}
}

// A stream that has nothing to say takes little memory, whatever it sent before.
func TestIdleStreams(t *testing.T) {
	e := start(t, Options{})
	heap := func() int64 {
		for range 3 { // pools let go of their memory at the second
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const n = 30
	var cs []*client
	for i := range n {
		c := e.mustOpen(hello(fmt.Sprint("t", i)))
		c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
		c.await(1, 0)
		cs = append(cs, c)
	}
	var cols ship.Columns
	for range 21_000 { // what a sidecar puts into a batch of 256 KiB
		cols.Floats.Ref, cols.Floats.T, cols.Floats.V = append(cols.Floats.Ref, 0), append(cols.Floats.T, 1000), append(cols.Floats.V, 1)
	}
	var enc ship.Encoder
	columns := enc.Encode(nil, &cols)
	before := heap()
	for _, c := range cs {
		c.send(&shippb.Batch{Seq: 2, Columns: columns})
		c.await(2, 0)
	}
	if grown := (heap() - before) / n; grown > 200<<10 {
		t.Errorf("%d bytes more for each stream", grown)
	}
	runtime.KeepAlive(cs)
}

// What ends a session ends what is counted of it, though its stream has more to say.
func TestEndedSession(t *testing.T) {
	e := start(t, Options{})
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	r := e.receive
	r.mu.Lock()
	s := r.sessions[sessionID{"a", [16]byte(h.Session)}]
	r.mu.Unlock()
	r.endSessions("a")
	r.beat(s, &shippb.Heartbeat{OpenRewinds: 1})
	if r.resending("a") {
		t.Error("a session that has ended is sending again")
	}
	if err := r.apply(s, c.batch(2, 1, []string{"y"}, 1, 1000, 1), &ship.Decoder{}, &ship.Columns{}); status.Code(err) != codes.NotFound {
		t.Errorf("a batch for it came to %v", err)
	}
	if n := r.announced.Load(); n != 0 {
		t.Errorf("%d bytes are announced", n)
	}
	c.ends(codes.NotFound)
}

// Sessions are bounded, counted, and those of others don't suffer.
func TestSessionsAreBounded(t *testing.T) {
	r := start(t, Options{}).receive
	attach := func(tenant string, source byte, gone bool) error {
		h := hello(tenant)
		h.Source[0] = source
		st := &stream{cancel: func(error) {}, done: make(chan struct{})}
		s, _, err := r.attach(t.Context(), h, st)
		if err == nil && gone {
			r.letGo(s, st)
		}
		return err
	}
	for range 3 * maxOfSource { // a sidecar that crashes all the time
		if err := attach("a", 1, true); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.announced.Load(); len(r.sessions) != maxOfSource || n != maxOfSource*sessionBytes {
		t.Errorf("%d sessions take %d bytes", len(r.sessions), n)
	}
	for range maxOfSource {
		if err := attach("a", 1, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := attach("a", 1, false); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "100 streams") {
		t.Errorf("more streams of a source: %v", err)
	}
	if err := attach("a", 2, false); err != nil {
		t.Errorf("another source: %v", err)
	}
	r.ofTenant["a"] = maxSessions
	if err := attach("a", 3, false); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "10000 sessions") {
		t.Errorf("more sessions of a tenant: %v", err)
	}
	if err := attach("b", 1, false); err != nil {
		t.Errorf("another tenant: %v", err)
	}
}

// deaf is a stream of a client that neither reads nor speaks.
type deaf struct {
	quiet
	stuck chan struct{} // closed when the stream has ended, as gRPC does
}

func (d *deaf) Context() context.Context { return d.ctx }

func (d *deaf) Send(m *shippb.ToSidecar) error {
	if m.GetWelcome() != nil {
		return nil
	}
	<-d.stuck
	return io.ErrClosedPipe
}

// A client that reads nothing doesn't keep its session for ever.
func TestDeafClient(t *testing.T) {
	e := start(t, Options{})
	synctest.Test(t, func(t *testing.T) {
		r := e.receive
		ctx, cancel := context.WithCancel(t.Context())
		d := &deaf{quiet{msgs: make(chan *shippb.ToIngester, 1), ctx: ctx}, make(chan struct{})}
		d.msgs <- &shippb.ToIngester{Message: &shippb.ToIngester_Hello{Hello: hello("a")}}
		if err := r.Stream(d); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the stream ended with %v", err)
		}
		synctest.Wait()
		r.expire(time.Now().Add(time.Hour))
		if len(r.sessions) != 1 {
			t.Error("expired while an answer is sent")
		}
		close(d.stuck)
		cancel()
		synctest.Wait()
		r.expire(time.Now().Add(time.Hour))
		if n := len(r.sessions); n != 0 {
			t.Errorf("%d sessions are kept", n)
		}
	})
}

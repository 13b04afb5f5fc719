package ship

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

type stream = grpc.BidiStreamingServer[shippb.ToIngester, shippb.ToSidecar]

// scripted is a server whose streams are handled, one after the other, by a
// test's functions; the last one handles all that follow.
type scripted struct {
	shippb.UnimplementedShipServer
	mu      sync.Mutex
	streams []func(*shippb.Hello, stream) error
}

func (s *scripted) Stream(st stream) error {
	msg, err := st.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	fn := s.streams[0]
	if len(s.streams) > 1 {
		s.streams = s.streams[1:]
	}
	s.mu.Unlock()
	return fn(msg.GetHello(), st)
}

func serveScript(t *testing.T, streams ...func(*shippb.Hello, stream) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	shippb.RegisterShipServer(s, &scripted{streams: streams})
	done := make(chan struct{})
	go func() { s.Serve(l); close(done) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}

var processA, processB = make([]byte, 16), append(make([]byte, 15), 1)

func welcome(st stream, w *shippb.Welcome) error {
	w.Version = 1
	if w.Process == nil {
		w.Process = processA
	}
	return st.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Welcome{Welcome: w}})
}

func sendAck(st stream, received, durable uint64) error {
	return st.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Ack{Ack: &shippb.Ack{Received: received, Durable: durable}}})
}

// recvBatch returns the next batch, passing over heartbeats.
func recvBatch(st stream) (*shippb.Batch, error) {
	for {
		msg, err := st.Recv()
		if err != nil {
			return nil, err
		}
		if b := msg.GetBatch(); b != nil {
			return b, nil
		}
	}
}

// startSession runs a session with short times.
func startSession(t *testing.T, addr string, change func(*SessionOptions)) (*Session, chan struct{}, chan error) {
	t.Helper()
	changed := make(chan struct{}, 1)
	o := SessionOptions{
		Address: addr, Tenant: "team", Source: [16]byte{7}, MinBackoff: time.Millisecond, MaxBackoff: 20 * time.Millisecond,
		HandshakeTimeout: time.Second, SilenceTimeout: 5 * time.Second, GiveUp: 5 * time.Second, HeartbeatInterval: 5 * time.Millisecond,
		Notify: func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		},
	}
	if change != nil {
		change(&o)
	}
	s := NewSession(o, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	finished := make(chan struct{})
	go func() { ended <- s.Run(ctx); close(finished) }()
	t.Cleanup(func() { cancel(); <-finished })
	return s, changed, ended
}

// until waits for a state.
func until(t *testing.T, s *Session, changed chan struct{}, cond func(SessionState) bool) SessionState {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		if st := s.State(); cond(st) {
			return st
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("timed out: %+v", s.State())
		}
	}
}

func batchOf(n int) *shippb.Batch { return &shippb.Batch{Columns: make([]byte, n)} }

func TestSessionResumes(t *testing.T) {
	type hello struct {
		next    uint64
		process string
		session string
	}
	var mu sync.Mutex
	var hellos []hello
	var got []uint64
	handle := func(received uint64, resumed bool, batches int, reply func(stream, uint64) error) func(*shippb.Hello, stream) error {
		return func(h *shippb.Hello, st stream) error {
			mu.Lock()
			hellos = append(hellos, hello{h.NextSeq, string(h.Process), string(h.Session)})
			mu.Unlock()
			md, _ := metadata.FromIncomingContext(st.Context())
			if h.Tenant != "team" || h.Source[0] != 7 || md.Get("x-scope-orgid")[0] != "team" {
				return status.Error(codes.InvalidArgument, "hello")
			}
			if err := welcome(st, &shippb.Welcome{Received: received, Resumed: resumed}); err != nil {
				return err
			}
			for range batches {
				b, err := recvBatch(st)
				if err != nil {
					return err
				}
				mu.Lock()
				got = append(got, b.Seq)
				mu.Unlock()
				if err := reply(st, b.Seq); err != nil {
					return err
				}
			}
			return status.Error(codes.Unavailable, "broken")
		}
	}
	silent := func(stream, uint64) error { return nil }
	addr := serveScript(t,
		// Takes three, acknowledges one, breaks.
		handle(0, false, 3, func(st stream, seq uint64) error {
			if seq == 1 {
				return sendAck(st, 1, 0)
			}
			return nil
		}),
		// Had received two of them.
		handle(2, true, 1, silent),
		handle(3, true, 100, func(st stream, seq uint64) error { return sendAck(st, seq, seq-1) }),
	)
	s, changed, _ := startSession(t, addr, nil)
	for range 5 {
		if _, ok := s.TrySend(batchOf(10)); !ok {
			t.Fatal("no room")
		}
	}
	st := until(t, s, changed, func(st SessionState) bool { return st.Received == 5 })
	if st.InflightBytes != 0 || st.Durable < 3 || st.Sent != 5 || s.NextSeq() != 6 {
		t.Errorf("%+v", st)
	}
	mu.Lock()
	defer mu.Unlock()
	want := []uint64{1, 2, 3, 3, 4, 5}
	if len(got) != len(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
	for i, h := range hellos {
		next, process := uint64(6), string(processA)
		if i == 0 {
			next, process = 1, ""
		}
		id := s.ID()
		if h != (hello{next, process, string(id[:])}) {
			t.Errorf("hello %d: %+v", i, h)
		}
	}
}

// What ends a session for good.
func TestSessionEnds(t *testing.T) {
	breaks := func(_ *shippb.Hello, st stream) error {
		if err := welcome(st, &shippb.Welcome{}); err != nil {
			return err
		}
		recvBatch(st)
		return status.Error(codes.Unavailable, "broken")
	}
	answers := func(w *shippb.Welcome) func(*shippb.Hello, stream) error {
		return func(_ *shippb.Hello, st stream) error {
			welcome(st, w)
			<-st.Context().Done()
			return nil
		}
	}
	acks := func(received, durable uint64) func(*shippb.Hello, stream) error {
		return func(_ *shippb.Hello, st stream) error {
			welcome(st, &shippb.Welcome{})
			recvBatch(st)
			sendAck(st, received, durable)
			<-st.Context().Done()
			return nil
		}
	}
	for name, streams := range map[string][]func(*shippb.Hello, stream) error{
		"another process":      {breaks, answers(&shippb.Welcome{Process: processB})},
		"forgotten":            {breaks, answers(&shippb.Welcome{})},
		"received too much":    {breaks, answers(&shippb.Welcome{Resumed: true, Received: 9})},
		"durable not received": {breaks, answers(&shippb.Welcome{Resumed: true, Durable: 1})},
		"new but received":     {answers(&shippb.Welcome{Received: 1})},
		"short process id":     {answers(&shippb.Welcome{Process: []byte{1}})},
		"ack of the unsent":    {acks(2, 0)},
		"durable of unsent":    {acks(0, 2)},
		"refused version":      {func(*shippb.Hello, stream) error { return status.Error(codes.FailedPrecondition, "version") }},
		"message too large": {func(_ *shippb.Hello, st stream) error {
			welcome(st, &shippb.Welcome{})
			return status.Error(codes.ResourceExhausted, "received message larger than max")
		}},
		"refused tenant": {func(*shippb.Hello, stream) error { return status.Error(codes.PermissionDenied, "tenant") }},
	} {
		t.Run(name, func(t *testing.T) {
			s, _, ended := startSession(t, serveScript(t, streams...), nil)
			s.TrySend(batchOf(1))
			select {
			case err := <-ended:
				if !errors.Is(err, ErrSessionEnded) {
					t.Errorf("ended with %v", err)
				}
			case <-time.After(time.Minute):
				t.Fatal("goes on")
			}
			st := s.State()
			if st.Connected || !errors.Is(st.Ended, ErrSessionEnded) {
				t.Errorf("%+v", st)
			}
			if _, ok := s.TrySend(batchOf(1)); ok {
				t.Error("takes a batch")
			}
		})
	}
	t.Run("out of reach", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		_, _, ended := startSession(t, l.Addr().String(), func(o *SessionOptions) { o.GiveUp = 50 * time.Millisecond })
		if err := <-ended; !errors.Is(err, ErrSessionEnded) {
			t.Error(err)
		}
	})
	t.Run("accepts but never answers", func(t *testing.T) {
		_, _, ended := startSession(t, serveScript(t, func(_ *shippb.Hello, st stream) error { <-st.Context().Done(); return nil }), func(o *SessionOptions) {
			o.HandshakeTimeout, o.GiveUp = 20*time.Millisecond, 50*time.Millisecond
		})
		if err := <-ended; !errors.Is(err, ErrSessionEnded) {
			t.Error(err)
		}
	})
}

// A server that falls silent is left and dialled anew, and the session goes on.
func TestSessionSilence(t *testing.T) {
	addr := serveScript(t,
		func(_ *shippb.Hello, st stream) error {
			welcome(st, &shippb.Welcome{})
			<-st.Context().Done()
			return nil
		},
		func(h *shippb.Hello, st stream) error {
			welcome(st, &shippb.Welcome{Resumed: true})
			b, err := recvBatch(st)
			if err != nil {
				return err
			}
			sendAck(st, b.Seq, b.Seq)
			<-st.Context().Done()
			return nil
		})
	s, changed, _ := startSession(t, addr, func(o *SessionOptions) { o.SilenceTimeout = 50 * time.Millisecond })
	s.TrySend(batchOf(1))
	until(t, s, changed, func(st SessionState) bool { return st.Durable == 1 })
}

func TestSessionWindow(t *testing.T) {
	release := make(chan struct{})
	beats := make(chan struct{}, 1000)
	addr := serveScript(t, func(_ *shippb.Hello, st stream) error {
		welcome(st, &shippb.Welcome{WindowBytes: 1000})
		for n := 0; n < 2; {
			msg, err := st.Recv()
			if err != nil {
				return err
			}
			if msg.GetHeartbeat().GetLagMs() == 5 {
				beats <- struct{}{}
			} else if msg.GetBatch() != nil {
				n++
			}
		}
		<-release
		st.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Ack{Ack: &shippb.Ack{Received: 2, Refused: []*shippb.Refused{{Reason: "limit", Samples: 3}}}}})
		<-st.Context().Done()
		return nil
	})
	refused := make(chan *shippb.Refused, 1)
	s, changed, _ := startSession(t, addr, func(o *SessionOptions) {
		o.Heartbeat = func() *shippb.Heartbeat { return &shippb.Heartbeat{LagMs: 5} }
		o.Refused = func(r *shippb.Refused) { refused <- r }
	})
	until(t, s, changed, func(st SessionState) bool { return st.Connected && st.WindowBytes == 1000 })
	<-beats
	for _, x := range []struct {
		size int
		ok   bool
	}{{400, true}, {400, true}, {400, false}, {100, true}} {
		if x.size == 100 {
			close(release)
			until(t, s, changed, func(st SessionState) bool { return st.Received == 2 })
			if r := <-refused; r.Reason != "limit" {
				t.Errorf("refused %v", r)
			}
			if _, ok := s.TrySend(batchOf(5000)); !ok {
				t.Error("a batch larger than the window is never taken")
			}
			break
		}
		if _, ok := s.TrySend(batchOf(x.size)); ok != x.ok {
			t.Errorf("batch of %d: %v", x.size, ok)
		}
	}
}

package ship

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// clientVersion is the version of the protocol that the client speaks.
const clientVersion = 1

// ErrSessionEnded is wrapped by the error with which a session ends for good:
// what isn't durable in it has to be sent again in another.
var ErrSessionEnded = errors.New("session ended")

// SessionOptions are the options of a Session. The zero value of all but
// Address, Tenant and Source is a sane default.
type SessionOptions struct {
	Address string // host:port of the ingester
	Tenant  string
	Source  [16]byte
	Client  string // name and version, for the ingester's logs

	DialOptions []grpc.DialOption // credentials; none means plain text

	// WindowBytes bounds what is sent and not yet received, if the ingester
	// doesn't ask for less; 4 MiB by default.
	WindowBytes int64
	// HandshakeTimeout bounds connecting, hello and welcome; 5 s by default.
	HandshakeTimeout time.Duration
	// SilenceTimeout is how long the ingester may say nothing before the
	// stream is given up and opened anew; 15 s by default. It acknowledges
	// every 5 s at least.
	SilenceTimeout time.Duration
	// GiveUp is how long the ingester may stay out of reach before the session
	// ends for good; 60 s by default.
	GiveUp time.Duration
	// HeartbeatInterval is 3 s by default.
	HeartbeatInterval time.Duration
	// MinBackoff and MaxBackoff bound the pause between attempts to connect;
	// 100 ms and 5 s by default.
	MinBackoff, MaxBackoff time.Duration

	// Heartbeat returns what the next heartbeat says, but for the clock. May be nil.
	Heartbeat func() *shippb.Heartbeat
	// Notify is called, from the session's goroutines and without any lock
	// held, when SessionState may have changed. It must not block. May be nil.
	Notify func()
	// Refused is called for what the ingester refused, before what it refused
	// counts as received or durable. It must not block. May be nil.
	Refused func(*shippb.Refused)
}

func (o *SessionOptions) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	if o.WindowBytes <= 0 {
		o.WindowBytes = 4 << 20
	}
	def(&o.HandshakeTimeout, 5*time.Second)
	def(&o.SilenceTimeout, 15*time.Second)
	def(&o.GiveUp, time.Minute)
	def(&o.HeartbeatInterval, 3*time.Second)
	def(&o.MinBackoff, 100*time.Millisecond)
	def(&o.MaxBackoff, 5*time.Second)
	if o.Notify == nil {
		o.Notify = func() {}
	}
	if o.Refused == nil {
		o.Refused = func(*shippb.Refused) {}
	}
	if o.Heartbeat == nil {
		o.Heartbeat = func() *shippb.Heartbeat { return &shippb.Heartbeat{} }
	}
}

// SessionState is what is known of a session at one moment.
type SessionState struct {
	Connected     bool
	Received      uint64 // batches up to this one are in the ingester's memory
	Durable       uint64 // … in blocks, and found
	Sent          uint64 // the last sequence number given out
	InflightBytes int64  // sent or to be sent, not yet received
	WindowBytes   int64
	Process       []byte    // of the ingester; nil before its first answer
	LastAnswer    time.Time // of the ingester; creation of the session if there was none
	Broke         error     // with which a stream ended; nil if something has been received since
	Ended         error     // wraps ErrSessionEnded; nil while the session lives
}

// Session is the client's end of one session: an ordered run of batches to one
// ingester process. It keeps each batch until the ingester has received it,
// connects anew when the stream breaks, and ends for good when the ingester is
// another process, refuses the session, or stays out of reach.
type Session struct {
	opts   SessionOptions
	id     [16]byte
	logger *slog.Logger
	work   chan struct{} // cap 1: there is something to send

	mu         sync.Mutex
	beat       bool       // a heartbeat is due now
	queue      []inflight // not yet received, ascending in seq
	sent       int        // how many of queue went out on the present stream
	nextSeq    uint64
	bytes      int64
	window     int64
	received   uint64
	durable    uint64
	process    []byte
	connected  bool
	lastAnswer time.Time
	broke      error
	ended      error
}

type inflight struct {
	batch *shippb.Batch
	size  int64
}

// NewSession returns a session with a new random id. Nothing is sent before Run.
func NewSession(opts SessionOptions, logger *slog.Logger) *Session {
	opts.setDefaults()
	s := &Session{
		opts:       opts,
		logger:     logger,
		work:       make(chan struct{}, 1),
		nextSeq:    1,
		window:     opts.WindowBytes,
		lastAnswer: time.Now(),
	}
	rand.Read(s.id[:])
	return s
}

// ID is the session's random id.
func (s *Session) ID() [16]byte { return s.id }

// State returns the present state.
func (s *Session) State() SessionState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SessionState{
		Connected: s.connected, Received: s.received, Durable: s.durable, Sent: s.nextSeq - 1,
		InflightBytes: s.bytes, WindowBytes: s.window, LastAnswer: s.lastAnswer, Broke: s.broke, Ended: s.ended, Process: s.process,
	}
}

// NextSeq is the sequence number that the next batch will get.
func (s *Session) NextSeq() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nextSeq
}

// TrySend queues a batch, which it keeps, and gives it the next sequence number.
// It returns false if the window is full or the session has ended. A batch
// larger than the window is taken when nothing else is in flight.
func (s *Session) TrySend(b *shippb.Batch) (seq uint64, ok bool) {
	size := int64(proto.Size(b)) + 12 // and its sequence number
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil || (s.bytes > 0 && s.bytes+size > s.window) {
		return 0, false
	}
	b.Seq = s.nextSeq
	s.nextSeq++
	s.queue = append(s.queue, inflight{b, size})
	s.bytes += size
	select {
	case s.work <- struct{}{}:
	default:
	}
	return b.Seq, true
}

// Beat has a heartbeat sent at once, or with the next stream if there is none.
func (s *Session) Beat() {
	s.mu.Lock()
	s.beat = true
	s.mu.Unlock()
	select {
	case s.work <- struct{}{}:
	default:
	}
}

// Run keeps the session going until ctx is done, which returns nil, or it ends
// for good, which returns an error that wraps ErrSessionEnded.
func (s *Session) Run(ctx context.Context) (err error) {
	defer func() {
		s.mu.Lock()
		s.connected = false
		s.ended = err
		if err == nil {
			s.ended = fmt.Errorf("%w: closed", ErrSessionEnded)
		}
		s.queue, s.bytes = nil, 0
		s.mu.Unlock()
		s.opts.Notify()
	}()
	dial := append([]grpc.DialOption{
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: s.opts.MinBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: s.opts.MaxBackoff},
			MinConnectTimeout: s.opts.HandshakeTimeout,
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
	}, s.opts.DialOptions...)
	conn, err := grpc.NewClient(s.opts.Address, dial...)
	if err != nil {
		return fmt.Errorf("%w: dial %s: %w", ErrSessionEnded, s.opts.Address, err)
	}
	defer conn.Close()
	client := shippb.NewShipClient(conn)

	pause := s.opts.MinBackoff
	for {
		before := s.State().LastAnswer
		err := s.stream(ctx, client)
		s.mu.Lock()
		s.connected, s.broke = false, err
		last := s.lastAnswer
		s.mu.Unlock()
		s.opts.Notify()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrSessionEnded):
			return err
		case time.Since(last) > s.opts.GiveUp:
			return fmt.Errorf("%w: %s out of reach for %v: %w", ErrSessionEnded, s.opts.Address, time.Since(last).Round(time.Second), err)
		}
		s.logger.Debug("ship stream broke", "owner", s.opts.Address, "err", err)
		if last.After(before) {
			pause = s.opts.MinBackoff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause/2 + mathrand.N(pause)):
		}
		pause = min(2*pause, s.opts.MaxBackoff)
	}
}

// stream carries the session over one stream, until that breaks.
func (s *Session) stream(ctx context.Context, client shippb.ShipClient) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// gRPC streams have deadlines as a whole only: this timer is what bounds
	// each step.
	watchdog := time.AfterFunc(s.opts.HandshakeTimeout, func() { cancel(errors.New("no answer in time")) })
	defer watchdog.Stop()

	st, err := client.Stream(metadata.AppendToOutgoingContext(ctx, "x-scope-orgid", s.opts.Tenant))
	if err != nil {
		return s.class(ctx, err)
	}
	s.mu.Lock()
	hello := &shippb.Hello{
		Version: clientVersion, Tenant: s.opts.Tenant, Source: s.opts.Source[:], Session: s.id[:],
		NextSeq: s.nextSeq, Process: s.process, Received: s.received, Client: s.opts.Client,
		Clock: time.Now().UnixMilli(),
	}
	if s.process == nil {
		hello.NextSeq = 1 // what is queued has never gone out
	}
	s.mu.Unlock()
	if err := st.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Hello{Hello: hello}}); err != nil && !errors.Is(err, io.EOF) {
		return s.class(ctx, err) // for io.EOF, Recv has the reason
	}
	msg, err := st.Recv()
	if err != nil {
		return s.class(ctx, err)
	}
	if err := s.welcome(msg.GetWelcome()); err != nil {
		return err
	}
	watchdog.Reset(s.opts.SilenceTimeout)
	s.opts.Notify()

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.send(gctx, st) })
	g.Go(func() error {
		for {
			msg, err := st.Recv()
			if err != nil {
				cancel(err) // wakes a Send that waits for flow control
				return s.class(ctx, err)
			}
			watchdog.Reset(s.opts.SilenceTimeout)
			if err := s.ack(msg.GetAck()); err != nil {
				cancel(err)
				return err
			}
		}
	})
	return g.Wait()
}

func (s *Session) welcome(w *shippb.Welcome) error {
	switch {
	case w == nil:
		return fmt.Errorf("%w: the ingester's first message is no welcome", ErrSessionEnded)
	case w.Version != clientVersion:
		return fmt.Errorf("%w: the ingester speaks version %d of the ship protocol, this is version %d", ErrSessionEnded, w.Version, clientVersion)
	case len(w.Process) != 16:
		return fmt.Errorf("%w: welcome with a process id of %d bytes", ErrSessionEnded, len(w.Process))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil && (!w.Resumed || string(w.Process) != string(s.process)) {
		return fmt.Errorf("%w: ingester %s is another process now or has forgotten the session", ErrSessionEnded, w.Ingester)
	}
	if w.Received >= s.nextSeq || w.Durable > w.Received || (s.process == nil && w.Received > 0) {
		return fmt.Errorf("%w: welcome names received %d, durable %d, sent were %d", ErrSessionEnded, w.Received, w.Durable, s.nextSeq-1)
	}
	if w.Received < s.received || w.Durable < s.durable {
		return fmt.Errorf("%w: welcome goes back behind received %d or durable %d", ErrSessionEnded, s.received, s.durable)
	}
	s.process = w.Process
	if w.WindowBytes > 0 {
		s.window = min(s.opts.WindowBytes, int64(min(w.WindowBytes, 1<<40)))
	}
	s.receivedLocked(w.Received)
	s.durable = w.Durable
	s.sent = 0
	s.connected = true
	s.lastAnswer = time.Now()
	return nil
}

func (s *Session) ack(a *shippb.Ack) error {
	if a == nil {
		return fmt.Errorf("%w: the ingester sent something that is no acknowledgement", ErrSessionEnded)
	}
	s.mu.Lock()
	if a.Received >= s.nextSeq || a.Durable >= s.nextSeq {
		s.mu.Unlock()
		return fmt.Errorf("%w: received %d and durable %d acknowledged, sent were %d", ErrSessionEnded, a.Received, a.Durable, s.nextSeq-1)
	}
	s.mu.Unlock()
	for _, r := range a.Refused {
		s.opts.Refused(r)
	}
	s.mu.Lock()
	s.receivedLocked(a.Received)
	s.durable = max(s.durable, a.Durable)
	s.lastAnswer = time.Now()
	s.mu.Unlock()
	s.opts.Notify()
	return nil
}

// receivedLocked forgets the batches up to seq.
func (s *Session) receivedLocked(seq uint64) {
	if seq <= s.received {
		return
	}
	s.received, s.broke = seq, nil
	n := 0
	for n < len(s.queue) && s.queue[n].batch.Seq <= seq {
		s.bytes -= s.queue[n].size
		n++
	}
	rest := copy(s.queue, s.queue[n:])
	clear(s.queue[rest:])
	s.queue = s.queue[:rest]
	s.sent = max(0, s.sent-n)
}

// send sends what is queued, and heartbeats.
func (s *Session) send(ctx context.Context, st grpc.BidiStreamingClient[shippb.ToIngester, shippb.ToSidecar]) error {
	tick := time.NewTicker(s.opts.HeartbeatInterval)
	defer tick.Stop()
	for {
		s.mu.Lock()
		beat := s.beat
		s.beat = false
		var b *shippb.Batch
		if s.sent < len(s.queue) {
			b = s.queue[s.sent].batch
			s.sent++
		}
		s.mu.Unlock()
		if beat {
			if err := s.heartbeat(ctx, st); err != nil {
				return err
			}
		}
		if b != nil {
			if err := st.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Batch{Batch: b}}); err != nil {
				return s.sendError(ctx, err)
			}
			continue
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.work:
		case <-tick.C:
			if err := s.heartbeat(ctx, st); err != nil {
				return err
			}
		}
	}
}

func (s *Session) heartbeat(ctx context.Context, st grpc.BidiStreamingClient[shippb.ToIngester, shippb.ToSidecar]) error {
	b := s.opts.Heartbeat()
	b.Clock = time.Now().UnixMilli()
	if err := st.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Heartbeat{Heartbeat: b}}); err != nil {
		return s.sendError(ctx, err)
	}
	return nil
}

// sendError waits for the receiving side to learn why, if that is where to look.
func (s *Session) sendError(ctx context.Context, err error) error {
	if !errors.Is(err, io.EOF) {
		return s.class(ctx, err)
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// class tells errors that end the session from those that only break the stream.
func (s *Session) class(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && status.Code(err) == codes.Canceled {
		err = cause
	}
	switch status.Code(err) {
	// ResourceExhausted: a message is larger than the ingester takes, and stays so.
	case codes.ResourceExhausted, codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return fmt.Errorf("%w: %s: %w", ErrSessionEnded, s.opts.Address, err)
	}
	return err
}

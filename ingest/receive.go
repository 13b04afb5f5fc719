package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/commitlog"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// Bounds and times of docs/protocols/ship.md.
const (
	ackEvery     = 50 * time.Millisecond // at most
	ackAtLeast   = 5 * time.Second
	sessionTTL   = 10 * time.Minute
	silenceLimit = 30 * time.Second // a stream without any message is ended
	maxRefs      = 16 << 20         // of a session
	maxTenant    = 150              // bytes
	maxSessions  = 10_000           // of a tenant
	maxOfSource  = 100              // sessions of a source
	sessionBytes = 1 << 10          // beside its refs, about
)

// errStarting is the answer to streams and requests before the commit log has
// been replayed.
var errStarting = status.Error(codes.Unavailable, "the ingester is starting: it replays its commit log")

// receiver keeps the sessions and applies their batches to the head.
type receiver struct {
	shippb.UnimplementedShipServer

	process  [16]byte // that sessions are with
	member   string
	head     *head.Head
	log      *commitlog.Log                                 // nil: there is none
	admit    func(ctx context.Context, tenant string) error // waits while the head is full
	window   uint64
	limits   Limits
	logger   *slog.Logger
	metrics  *receiveMetrics
	now      func() time.Time // what samples of the future are measured by
	draining atomic.Bool
	starting atomic.Bool // the commit log has not been replayed

	taking sync.RWMutex // held, for reading, while a batch is applied
	closed bool         // no batch is applied any more; under taking

	durable   atomic.Pointer[durability]
	announced atomic.Int64 // bytes that all sessions' refs take, about

	mu       sync.Mutex
	sessions map[sessionID]*session
	bySource map[sourceID][]*session // the same, oldest first
	ofTenant map[string]int          // how many

	sources sources
	awaited awaited
	windows windows

	rewindsMu sync.Mutex
	rewinds   map[string]int // sessions with ranges to send again, by tenant; 0 is left out
}

// Limits of a tenant. Zero means none.
type Limits struct {
	Series          int `yaml:"series" doc:"Series of a tenant in one generation of one ingester. 0: no limit."`
	LabelsPerSeries int `yaml:"labels_per_series" doc:"Labels of a series. 0: no limit."`
	LabelNameBytes  int `yaml:"label_name_bytes" doc:"Length of a label name. 0: no limit."`
	LabelValueBytes int `yaml:"label_value_bytes" doc:"Length of a label value. 0: no limit."`
}

type receiveMetrics struct {
	samples, batches, refused *prometheus.CounterVec
	bytes                     prometheus.Counter
	streams, clocks           prometheus.Gauge
}

func newReceiveMetrics(reg prometheus.Registerer) *receiveMetrics {
	m := &receiveMetrics{
		samples: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_ingester_received_samples_total",
			Help: "Samples received, by what became of them: in_order, late or duplicate.",
		}, []string{"outcome"}),
		batches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_ingester_received_batches_total",
			Help: "Batches received, by what became of them: applied or repeated.",
		}, []string{"outcome"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_ingester_refused_samples_total",
			Help: "Samples refused for good, by reason.",
		}, []string{"reason"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_received_bytes_total",
			Help: "Bytes of sample columns received, as encoded.",
		}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_ingester_ship_streams",
			Help: "Streams of sidecars that are open.",
		}),
		clocks: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_ingester_clock_waiting_sessions",
			Help: "Sessions of sources whose samples are in the future by this ingester's clock but not by their own: they wait until the clocks agree.",
		}),
	}
	reg.MustRegister(m.clocks, m.samples, m.batches, m.refused, m.bytes, m.streams)
	for _, o := range []string{"in_order", "late", "duplicate"} {
		m.samples.WithLabelValues(o)
	}
	return m
}

// Stream implements the ship protocol.
func (r *receiver) Stream(ss shippb.Ship_StreamServer) error {
	if r.starting.Load() {
		return errStarting
	}
	if r.draining.Load() {
		return status.Error(codes.Unavailable, "the ingester is leaving: send to the other owners on the ring")
	}
	first, err := ss.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message of a stream must be a hello")
	}
	if hello.Version != ship.Version {
		return status.Errorf(codes.FailedPrecondition, "ship protocol version %d is not spoken here, version %d is", hello.Version, ship.Version)
	}
	if len(hello.Session) != 16 || len(hello.Source) != 16 {
		return status.Error(codes.InvalidArgument, "session and source must have 16 bytes")
	}
	if hello.Tenant == "" || len(hello.Tenant) > maxTenant || !utf8.ValidString(hello.Tenant) {
		return status.Errorf(codes.InvalidArgument, "tenant must be valid UTF-8 of 1 to %d bytes, it has %d", maxTenant, len(hello.Tenant))
	}

	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	st := &stream{cancel: cancel, done: make(chan struct{})}
	s, resumed, err := r.attach(ctx, hello, st)
	if err != nil {
		return err
	}
	r.metrics.streams.Inc()
	defer r.metrics.streams.Dec()
	if err := r.welcome(ss, hello, s, resumed); err != nil {
		r.letGo(s, st)
		return err
	}
	received := make(chan struct{})
	// The answers have a goroutine of their own, which ends with the stream. This one
	// doesn't wait for it: to a client that reads nothing an answer is sent until
	// this one has returned. The session has no other stream before both have ended.
	go func() {
		if err := r.answer(ctx, ss, s); err != nil {
			cancel(err)
		}
		<-received
		r.letGo(s, st)
	}()
	s.wake() // there may be more to say than the welcome did
	err = r.receive(ctx, ss, s)
	cancel(err)
	close(received)
	return err
}

// welcome answers the hello. An error ends the stream.
func (r *receiver) welcome(ss shippb.Ship_StreamServer, hello *shippb.Hello, s *session, resumed bool) error {
	s.mu.Lock()
	s.hearClock(hello.Clock)
	welcome := &shippb.Welcome{
		Version: ship.Version, Process: r.process[:], Ingester: r.member,
		Received: s.untold.before(r.acknowledged(s)), Durable: s.untold.before(s.durable), WindowBytes: r.window, Resumed: resumed,
	}
	s.mu.Unlock()
	if err := ss.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	if len(hello.Process) > 0 && !resumed {
		return status.Error(codes.NotFound, "the session is not known here: begin a new one")
	}
	r.sources.hear(s.id.tenant, s.source, nil, time.Now())
	return nil
}

// attach finds or makes the session and makes st its stream; the stream that it
// had before is ended first.
func (r *receiver) attach(ctx context.Context, hello *shippb.Hello, st *stream) (*session, bool, error) {
	id := sessionID{tenant: hello.Tenant, id: [16]byte(hello.Session)}
	continues := len(hello.Process) > 0
	for {
		r.mu.Lock()
		s := r.sessions[id]
		if s == nil {
			if continues {
				// Another process knew it, or it has expired. The client hears
				// that it is not resumed, and gives it up; nothing is kept.
				r.mu.Unlock()
				return &session{id: id, changed: make(chan struct{}, 1), stream: st}, false, nil
			}
			s = &session{id: id, source: [16]byte(hello.Source), changed: make(chan struct{}, 1), stream: st}
			err := r.room(s)
			if err == nil {
				r.succeed(s)
				r.add(s)
			}
			r.mu.Unlock()
			return s, false, err
		}
		r.mu.Unlock()
		s.mu.Lock()
		old := s.stream
		lost := hello.Received > s.received && !bug.Is(bug.HoleInLog)
		if old == nil && continues && (lost || !s.untold.resume(hello.Received)) {
			// A crash has cost the end of the commit log. The client has what is
			// missing no more: it reads it again, for another session. So it does
			// if it can't be told what was refused.
			s.mu.Unlock()
			if lost {
				r.awaited.add(s.id.tenant, s.source, time.Now())
			}
			r.forget(s)
			continue
		}
		if old == nil {
			s.stream = st
			s.mu.Unlock()
			return s, true, nil
		}
		s.mu.Unlock()
		old.cancel(status.Error(codes.Aborted, "another stream continues the session"))
		select {
		case <-old.done:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// room makes room for a session, or says that there is none. The caller holds r.mu.
func (r *receiver) room(s *session) error {
	if n := r.ofTenant[s.id.tenant]; n >= maxSessions {
		return status.Errorf(codes.Unavailable, "the tenant has %d sessions here, which is the limit; those of sidecars that are gone end after %s", n, sessionTTL)
	}
	of := r.bySource[sourceID{s.id.tenant, s.source}]
	if len(of) < maxOfSource {
		return nil
	}
	for _, old := range of {
		old.mu.Lock()
		gone := old.stream == nil
		if gone {
			r.remove(old) // a source has one
		}
		old.mu.Unlock()
		if gone {
			return nil
		}
	}
	return status.Errorf(codes.Unavailable, "the source has %d streams here, which is the limit: is its directory in use by several sidecars?", len(of))
}

// add enters a session. The caller holds r.mu.
func (r *receiver) add(s *session) {
	r.sessions[s.id] = s
	of := sourceID{s.id.tenant, s.source}
	r.bySource[of] = append(r.bySource[of], s)
	r.ofTenant[s.id.tenant]++
	r.announced.Add(sessionBytes + s.refs.Bytes())
}

// succeed takes what a source has said in sessions that it has left behind for
// outdated: it was started anew, and says again what it has to send again. The
// caller holds r.mu.
func (r *receiver) succeed(s *session) {
	for _, old := range r.bySource[sourceID{s.id.tenant, s.source}] {
		old.mu.Lock()
		if old.stream == nil {
			r.setRewinds(old, 0)
			old.succeeded = true
		}
		old.mu.Unlock()
	}
}

// letGo takes a stream from its session.
func (r *receiver) letGo(s *session, st *stream) {
	s.mu.Lock()
	if s.stream == st {
		s.stream, s.lastSeen = nil, time.Now()
	}
	s.mu.Unlock()
	close(st.done)
}

// beat notes what the source says of itself.
func (r *receiver) beat(s *session, b *shippb.Heartbeat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.removed {
		return
	}
	s.lag = time.Duration(b.LagMs) * time.Millisecond
	s.hearClock(b.Clock)
	r.sources.hear(s.id.tenant, s.source, b, time.Now())
	r.setRewinds(s, b.OpenRewinds)
	r.awaited.hear(s.id.tenant, s.source)
}

// setRewinds keeps the count by tenant. The caller holds s.mu.
func (r *receiver) setRewinds(s *session, n uint32) {
	before, after := s.rewinds > 0, n > 0
	s.rewinds = n
	if before == after {
		return
	}
	r.rewindsMu.Lock()
	defer r.rewindsMu.Unlock()
	if after {
		r.rewinds[s.id.tenant]++
	} else if r.rewinds[s.id.tenant]--; r.rewinds[s.id.tenant] == 0 {
		delete(r.rewinds, s.id.tenant)
	}
}

// resending says whether a source of the tenant has ranges to send again, or may
// have.
func (r *receiver) resending(tenant string) bool {
	if r.awaited.of(tenant, time.Now()) {
		return true
	}
	r.rewindsMu.Lock()
	defer r.rewindsMu.Unlock()
	return r.rewinds[tenant] > 0
}

// anyResending says whether a source of any tenant has ranges to send again, or
// has a session but no stream to say so.
func (r *receiver) anyResending() bool {
	if r.awaited.any(time.Now()) {
		return true
	}
	r.rewindsMu.Lock()
	n := len(r.rewinds)
	r.rewindsMu.Unlock()
	if n > 0 {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions {
		s.mu.Lock()
		silent := s.stream == nil && !s.succeeded && s.durable < s.received
		s.mu.Unlock()
		if silent {
			return true
		}
	}
	return false
}

// forget drops a session that is of no use to its client.
func (r *receiver) forget(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.sessions[s.id] == s {
		r.remove(s)
	}
}

// remove takes a session out. The caller holds r.mu and s.mu.
func (r *receiver) remove(s *session) {
	r.setRewinds(s, 0)
	s.removed = true
	r.announced.Add(-sessionBytes - s.refs.Bytes())
	delete(r.sessions, s.id)
	if r.ofTenant[s.id.tenant]--; r.ofTenant[s.id.tenant] == 0 {
		delete(r.ofTenant, s.id.tenant)
	}
	of := sourceID{s.id.tenant, s.source}
	left := slices.DeleteFunc(r.bySource[of], func(x *session) bool { return x == s })
	if r.bySource[of] = left; len(left) == 0 {
		delete(r.bySource, of)
	}
}

// expire forgets sessions without a stream for too long.
func (r *receiver) expire(now time.Time) {
	r.awaited.expire(now)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions {
		s.mu.Lock()
		if s.stream == nil && now.Sub(s.lastSeen) > sessionTTL {
			r.remove(s)
		}
		s.mu.Unlock()
	}
}

// acknowledged is what the source may be told as received. With a commit log
// that is what a restarted process will know. The caller holds s.mu.
func (r *receiver) acknowledged(s *session) uint64 {
	if r.log == nil {
		return s.received
	}
	return min(s.received, max(s.logged.Load(), s.durable))
}

// flushed tells all sessions what is durable.
func (r *receiver) flushed(d *durability) {
	r.durable.Store(d)
	r.mu.Lock()
	all := make([]*session, 0, len(r.sessions))
	for _, s := range r.sessions {
		all = append(all, s)
	}
	r.mu.Unlock()
	for _, s := range all {
		s.flushed(d.of(s.id.tenant))
	}
}

var errEnded = status.Error(codes.NotFound, "what the session has received can't be made durable: begin a new one")

// endSessions ends a tenant's sessions for good.
func (r *receiver) endSessions(tenant string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions {
		if s.id.tenant != tenant {
			continue
		}
		s.mu.Lock()
		if s.stream != nil {
			s.stream.cancel(errEnded)
		}
		r.remove(s)
		s.mu.Unlock()
	}
}

// told waits until every source that is connected has been told what is durable,
// or ctx ends. What a source isn't told it sends again.
func (r *receiver) told(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		waiting := false
		r.mu.Lock()
		for _, s := range r.sessions {
			s.mu.Lock()
			waiting = waiting || s.stream != nil && s.told < s.durable
			s.mu.Unlock()
		}
		r.mu.Unlock()
		if !waiting {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// answer sends acknowledgements until ctx ends.
func (r *receiver) answer(ctx context.Context, ss shippb.Ship_StreamServer, s *session) error {
	beat := time.NewTicker(ackAtLeast)
	defer beat.Stop()
	pause := time.NewTicker(ackEvery)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		case <-beat.C:
		}
		s.mu.Lock()
		ack := &shippb.Ack{Received: r.acknowledged(s), Durable: s.durable, Refused: s.untold.say()}
		s.mu.Unlock()
		if err := ss.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Ack{Ack: ack}}); err != nil {
			return err
		}
		s.mu.Lock()
		s.told = max(s.told, ack.Durable)
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		}
	}
}

// decoder is memory to decode batches in. An idle stream has none: there are tens of
// thousands.
type decoder struct {
	ship.Decoder
	cols ship.Columns
}

//nolint:gochecknoglobals // scratch memory
var decoders = sync.Pool{New: func() any { return new(decoder) }}

// receive applies batches until the stream ends.
func (r *receiver) receive(ctx context.Context, ss shippb.Ship_StreamServer, s *session) error {
	msgs := make(chan *shippb.ToIngester)
	failed := make(chan error, 1)
	// Recv can't be cancelled but by leaving the handler, which ends it: the
	// goroutine is gone once Stream has returned.
	go func() {
		for {
			m, err := ss.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case msgs <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	silence := time.NewTimer(silenceLimit)
	defer silence.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-silence.C:
			return status.Errorf(codes.DeadlineExceeded, "no message, not even a heartbeat, for %s", silenceLimit)
		case m := <-msgs:
			silence.Reset(silenceLimit)
			switch m := m.Message.(type) {
			case *shippb.ToIngester_Batch:
				if err := s.awaitRoom(ctx); err != nil {
					return err
				}
				if err := r.admit(ctx, s.id.tenant); err != nil {
					return err
				}
				if r.log != nil {
					if err := r.log.Wait(ctx); err != nil {
						return err
					}
				}
				w := decoders.Get().(*decoder)
				err := r.applyWhenPossible(ctx, s, m.Batch, &w.Decoder, &w.cols)
				decoders.Put(w)
				if errors.Is(err, errClosed) {
					<-ctx.Done() // it is for another owner; the stream stays, for what is told
					return context.Cause(ctx)
				}
				if err != nil {
					return err
				}
				silence.Reset(silenceLimit) // the wait was ours
			case *shippb.ToIngester_Heartbeat:
				r.beat(s, m.Heartbeat)
			default:
				return status.Error(codes.InvalidArgument, "a second hello, or an unknown message")
			}
		}
	}
}

// errClosed is that of a batch that comes when the last flush has begun.
var errClosed = errors.New("the ingester has left")

// close has no batch applied from its return on. Streams stay, to be told what the
// last flush makes durable.
func (r *receiver) close() {
	r.taking.Lock()
	defer r.taking.Unlock()
	r.closed = true
}

// apply adds a batch to the head.
func (r *receiver) apply(s *session, b *shippb.Batch, dec *ship.Decoder, cols *ship.Columns) error {
	r.taking.RLock()
	defer r.taking.RUnlock()
	if r.closed {
		return errClosed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.removed {
		return errEnded
	}
	if b.Seq <= s.received {
		r.metrics.batches.WithLabelValues("repeated").Inc()
		return nil
	}
	if b.Seq != s.received+1 {
		return status.Errorf(codes.InvalidArgument, "batch %d follows batch %d", b.Seq, s.received)
	}
	if err := dec.Decode(b.Columns, cols); err != nil {
		return status.Errorf(codes.InvalidArgument, "batch %d: %v", b.Seq, err)
	}
	now := r.now()
	ahead := s.clocksDiffer(cols, b.Exemplars, now)
	if r.waits(s, ahead); ahead != 0 {
		return errClocks
	}
	var found []int64
	all := true
	if r.windows.width > 0 {
		if found, all = r.windows.of(cols, b.Exemplars); !r.windows.take(s.id.tenant, r.head.Current().ID(), found) {
			return errWindows
		}
	}
	known, announced := s.refs.Len(), s.refs.Bytes()
	defer func() { r.announced.Add(s.refs.Bytes() - announced) }()
	var refused []uint32
	var builder labels.ScratchBuilder
	for i, a := range b.Announce {
		ls, err := r.labels(&builder, a.Labels)
		if int64(a.Ref) >= maxRefs {
			return status.Errorf(codes.InvalidArgument, "ref %d is beyond the limit of %d series in a session", a.Ref, maxRefs)
		}
		if err != nil {
			refused = append(refused, uint32(i))
			r.logger.Debug("series refused", "tenant", s.id.tenant, "series", ls.String(), "err", err)
		}
		if !s.refs.Announce(a.Ref, ls, err != nil) {
			return status.Errorf(codes.InvalidArgument, "ref %d announced after %d refs: refs must be dense", a.Ref, s.refs.Len())
		}
	}
	batch := head.Batch{Columns: cols}
	if err := checkRefs(&s.refs, cols, b.Withdraw); err != nil {
		return err
	}
	for _, e := range b.Exemplars {
		if !s.refs.Valid(e.Ref) {
			return unknownRef(e.Ref)
		}
	}
	encoded := len(b.Columns)
	b, future := refuseFuture(b, cols, &s.refs, now)
	var outside head.Refusal
	if !all {
		b, outside = refuseTimes(b, cols, &s.refs, func(t int64) bool {
			_, in := slices.BinarySearch(found, r.windows.window(t))
			return !in
		})
	}
	var invalid head.Refusal
	for _, e := range b.Exemplars {
		x, ok := exemplarOf(e)
		if !ok {
			invalid.Samples++
			invalid.Example = s.refs.Labels(e.Ref)
			continue
		}
		batch.Exemplars = append(batch.Exemplars, x)
	}
	for _, m := range b.Metadata {
		if !s.refs.Valid(m.Ref) {
			return unknownRef(m.Ref)
		}
		batch.Metadata = append(batch.Metadata, metadataOf(m))
	}
	res := r.head.Append(s.id.tenant, &s.refs, &batch)
	refuse := func(reason head.Reason, f head.Refusal) {
		if f.Samples == 0 {
			return
		}
		if res.Refused == nil {
			res.Refused = map[head.Reason]head.Refusal{}
		}
		res.Refused[reason] = f
	}
	refuse(reasonFuture, future)
	refuse(reasonExemplar, invalid)
	refuse(reasonWindows, outside)
	b.Refused = refusals(b.Seq, res.Refused)
	s.untold.add(b.Refused)
	if r.log != nil {
		r.write(s, b, known, refused, &res)
	}
	for _, ref := range b.Withdraw {
		s.refs.Withdraw(ref)
	}
	s.applied(b.Seq, res.Generation, r.durable.Load().of(s.id.tenant))
	r.metrics.batches.WithLabelValues("applied").Inc()
	r.metrics.bytes.Add(float64(encoded))
	r.metrics.samples.WithLabelValues("in_order").Add(float64(res.Appended))
	r.metrics.samples.WithLabelValues("late").Add(float64(res.Late))
	r.metrics.samples.WithLabelValues("duplicate").Add(float64(res.Duplicates))
	for reason, f := range res.Refused {
		r.metrics.refused.WithLabelValues(string(reason)).Add(float64(f.Samples))
	}
	s.wake()
	return nil
}

func unknownRef(ref uint32) error {
	return status.Errorf(codes.InvalidArgument, "ref %d is not announced", ref)
}

// checkRefs says whether all refs of samples and withdrawals mean something.
func checkRefs(known *head.Refs, c *ship.Columns, withdraw []uint32) error {
	for _, refs := range [][]uint32{c.Floats.Ref, c.Histograms.Ref, c.FloatHistograms.Ref, withdraw} {
		for _, ref := range refs {
			if !known.Valid(ref) {
				return unknownRef(ref)
			}
		}
	}
	if len(withdraw) > 1 {
		sorted := slices.Sorted(slices.Values(withdraw))
		for i, ref := range sorted[1:] {
			if ref == sorted[i] {
				return unknownRef(ref) // it is withdrawn twice
			}
		}
	}
	return nil
}

// reasonExemplar is why an exemplar is refused that Prometheus wouldn't take.
const reasonExemplar head.Reason = "invalid_exemplar"

// exemplarOf is false for one that Prometheus wouldn't take either.
func exemplarOf(e *shippb.Exemplar) (head.Exemplar, bool) {
	ls, err := pairs(new(labels.ScratchBuilder), e.Labels)
	if err != nil || labelRunes(e.Labels) > exemplar.ExemplarMaxLabelSetLength {
		return head.Exemplar{}, false
	}
	return head.Exemplar{Ref: e.Ref, Exemplar: chunkfmt.Exemplar{
		Labels: ls, Ts: e.T, HasTs: true, Value: math.Float64frombits(e.Value),
	}}, true
}

func metadataOf(m *shippb.Metadata) head.Metadata {
	return head.Metadata{Ref: m.Ref, Family: m.Family, Metadata: metadata.Metadata{
		Type: model.MetricType(m.Type), Unit: m.Unit, Help: m.Help,
	}}
}

// pairs makes labels of names and values, by turns. b is scratch memory.
func pairs(b *labels.ScratchBuilder, ss []string) (labels.Labels, error) {
	if len(ss)%2 != 0 {
		return labels.EmptyLabels(), errors.New("a label name without a value")
	}
	b.Reset()
	for i := 0; i < len(ss); i += 2 {
		if i > 0 && ss[i] <= ss[i-2] {
			return labels.EmptyLabels(), fmt.Errorf("label name %q after %q", ss[i], ss[i-2])
		}
		if ss[i] == "" || !utf8.ValidString(ss[i]) || !utf8.ValidString(ss[i+1]) {
			return labels.EmptyLabels(), fmt.Errorf("label %q: empty name or invalid UTF-8", ss[i])
		}
		b.Add(ss[i], ss[i+1])
	}
	return b.Labels(), nil
}

// labelRunes is the length of labels as Prometheus limits it for exemplars.
func labelRunes(ss []string) int {
	n := 0
	for _, s := range ss {
		n += utf8.RuneCountInString(s)
	}
	return n
}

// labels checks the labels of an announcement; with an error the series is
// refused. b is scratch memory.
func (r *receiver) labels(b *labels.ScratchBuilder, ss []string) (labels.Labels, error) {
	ls, err := pairs(b, ss)
	if err != nil {
		return ls, err
	}
	if l := r.limits; l.LabelsPerSeries > 0 && len(ss)/2 > l.LabelsPerSeries {
		return ls, fmt.Errorf("%d labels, the limit is %d", len(ss)/2, l.LabelsPerSeries)
	}
	named := false
	for i := 0; i < len(ss); i += 2 {
		if ss[i+1] == "" {
			return ls, fmt.Errorf("label %q has an empty value", ss[i])
		}
		if l := r.limits.LabelNameBytes; l > 0 && len(ss[i]) > l {
			return ls, fmt.Errorf("label name of %d bytes, the limit is %d", len(ss[i]), l)
		}
		if l := r.limits.LabelValueBytes; l > 0 && len(ss[i+1]) > l {
			return ls, fmt.Errorf("value of label %q has %d bytes, the limit is %d", ss[i], len(ss[i+1]), l)
		}
		named = named || ss[i] == model.MetricNameLabel
	}
	if !named {
		return ls, errors.New("no metric name")
	}
	return ls, nil
}

package sidecar

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// fakeIngester is the server's end of the ship protocol over a map. Tests stop
// it, start it as another process, and hold back what it says.
type fakeIngester struct {
	shippb.UnimplementedShipServer
	t       testing.TB
	id      string
	address string

	mu         sync.Mutex
	changed    *sync.Cond
	server     *grpc.Server
	listener   net.Listener
	process    [16]byte
	sessions   map[string]*fakeSession
	memory     map[string]map[int64]string // series → time → sample; gone with the process
	durable    map[string]map[int64]string // … for ever
	conflicts  []string                    // samples that came twice with different values
	autoFlush  bool
	stalled    bool // reads nothing
	loseAcks   bool // says nothing after the welcome
	announced  int
	withdrawn  int
	heartbeats int
	metadata   map[string]string
	families   []string // all metadata that came, in order
	exemplars  map[string]string
	refuse     string // series with this name are refused
}

type fakeSession struct {
	received, durable uint64
	refs              []string // "" if withdrawn
	announcedEver     uint32
	refused           []*shippb.Refused
	stream            int
}

func newFakeIngester(t testing.TB, id string) *fakeIngester {
	f := &fakeIngester{t: t, id: id, durable: map[string]map[int64]string{}, metadata: map[string]string{}, exemplars: map[string]string{}}
	f.changed = sync.NewCond(&f.mu)
	f.start()
	t.Cleanup(f.kill)
	return f
}

// start starts it as a new process, at the address that it had.
func (f *fakeIngester) start() {
	addr := f.address
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l := f.open(addr)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.address = l.Addr().String()
	rand.Read(f.process[:])
	f.sessions, f.memory = map[string]*fakeSession{}, map[string]map[int64]string{}
	f.listen(l)
}

func (f *fakeIngester) open(addr string) (l net.Listener) {
	f.t.Helper()
	eventually(f.t, "listen on "+addr, func() bool {
		var err error
		l, err = net.Listen("tcp", addr)
		return err == nil
	})
	return l
}

func (f *fakeIngester) listen(l net.Listener) {
	f.listener = l
	f.server = grpc.NewServer()
	shippb.RegisterShipServer(f.server, f)
	go f.server.Serve(l) // ended by kill
}

// kill stops it as kill -9 would.
func (f *fakeIngester) kill() {
	f.mu.Lock()
	s, l := f.server, f.listener
	f.stalled = false
	f.mu.Unlock()
	f.changed.Broadcast()
	l.Close() // Serve may not have taken it yet
	s.Stop()
}

// cut breaks all streams but keeps the process.
func (f *fakeIngester) cut() {
	f.kill()
	l := f.open(f.address)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listen(l)
}

func (f *fakeIngester) set(fn func()) {
	f.mu.Lock()
	fn()
	f.mu.Unlock()
	f.changed.Broadcast()
}

// flush makes all that is in memory durable.
func (f *fakeIngester) flush() {
	f.set(f.flushLocked)
}

func (f *fakeIngester) flushLocked() {
	for series, samples := range f.memory {
		if f.durable[series] == nil {
			f.durable[series] = map[int64]string{}
		}
		maps.Copy(f.durable[series], samples)
	}
	f.memory = map[string]map[int64]string{}
	for _, s := range f.sessions {
		s.durable = s.received
	}
}

func (f *fakeIngester) Stream(st grpc.BidiStreamingServer[shippb.ToIngester, shippb.ToSidecar]) error {
	msg, err := st.Recv()
	if err != nil {
		return err
	}
	h := msg.GetHello()
	if h == nil || h.Version != 1 {
		return status.Error(codes.FailedPrecondition, "version")
	}
	f.mu.Lock()
	key := string(h.Session)
	s := f.sessions[key]
	resumed := s != nil && bytes.Equal(h.Process, f.process[:])
	if !resumed {
		s = &fakeSession{}
		if len(h.Process) == 0 {
			f.sessions[key] = s
		}
	}
	s.stream++
	stream := s.stream
	w := &shippb.Welcome{Version: 1, Process: slices.Clone(f.process[:]), Ingester: f.id, Received: s.received, Durable: s.durable, Resumed: resumed, WindowBytes: 1 << 20}
	f.mu.Unlock()
	if err := st.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Welcome{Welcome: w}}); err != nil {
		return err
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { close(done); f.changed.Broadcast() }()
	wg.Go(func() { f.ack(st, s, stream, done) })
	var dec ship.Decoder
	for {
		f.mu.Lock()
		for f.stalled && st.Context().Err() == nil {
			f.changed.Wait()
		}
		f.mu.Unlock()
		msg, err := st.Recv()
		if err != nil {
			return err
		}
		if msg.GetHeartbeat() != nil {
			f.set(func() { f.heartbeats++ })
			continue
		}
		if err := f.batch(s, msg.GetBatch(), &dec); err != nil {
			return err
		}
		f.changed.Broadcast()
	}
}

// ack tells of received and durable whenever they changed.
func (f *fakeIngester) ack(st grpc.BidiStreamingServer[shippb.ToIngester, shippb.ToSidecar], s *fakeSession, stream int, done chan struct{}) {
	var received, durable uint64
	for {
		f.mu.Lock()
		for {
			select {
			case <-done:
				f.mu.Unlock()
				return
			default:
			}
			if !f.loseAcks && s.stream == stream && (s.received > received || s.durable > durable || len(s.refused) > 0) {
				break
			}
			f.changed.Wait()
		}
		received, durable = s.received, s.durable
		a := &shippb.Ack{Received: received, Durable: durable, Refused: s.refused}
		s.refused = nil
		f.mu.Unlock()
		if st.Send(&shippb.ToSidecar{Message: &shippb.ToSidecar_Ack{Ack: a}}) != nil {
			return
		}
	}
}

func (f *fakeIngester) batch(s *fakeSession, b *shippb.Batch, dec *ship.Decoder) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case b.Seq <= s.received:
		return nil
	case b.Seq != s.received+1:
		return status.Errorf(codes.InvalidArgument, "batch %d after %d", b.Seq, s.received)
	}
	for _, a := range b.Announce {
		if a.Ref > s.announcedEver {
			return status.Errorf(codes.InvalidArgument, "ref %d after %d", a.Ref, s.announcedEver)
		}
		ls := labels.FromStrings(a.Labels...).String()
		if a.Ref == uint32(len(s.refs)) {
			s.refs = append(s.refs, ls)
		} else if s.refs[a.Ref] != "" {
			return status.Errorf(codes.InvalidArgument, "ref %d announced twice", a.Ref)
		} else {
			s.refs[a.Ref] = ls
		}
		s.announcedEver++
		f.announced++
	}
	var c ship.Columns
	if err := dec.Decode(b.Columns, &c); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	var bad error
	series := func(ref uint32) string {
		if int(ref) >= len(s.refs) || s.refs[ref] == "" {
			bad = status.Errorf(codes.InvalidArgument, "ref %d isn't announced", ref)
			return ""
		}
		return s.refs[ref]
	}
	start := func(st []int64, i int) int64 {
		if len(st) > 0 {
			return st[i]
		}
		return 0
	}
	var refused uint64
	add := func(name string, t int64, v string) {
		if f.refuse != "" && bytes.Contains([]byte(name), []byte(f.refuse)) {
			refused++
			return
		}
		m := f.memory[name]
		if m == nil {
			m = map[int64]string{}
			f.memory[name] = m
		}
		old := m[t]
		if old == "" {
			old = f.durable[name][t]
		}
		if old != "" && old != v {
			f.conflicts = append(f.conflicts, fmt.Sprintf("%s at %d: %s and %s", name, t, old, v))
		}
		m[t] = v
	}
	for i, r := range c.Floats.Ref {
		add(series(r), c.Floats.T[i], fmt.Sprintf("%d %x", start(c.Floats.ST, i), math.Float64bits(c.Floats.V[i])))
	}
	for i, r := range c.Histograms.Ref {
		h := c.Histograms.H[i]
		add(series(r), c.Histograms.T[i], fmt.Sprintf("%d %s %x %v", start(c.Histograms.ST, i), h, math.Float64bits(h.Sum), h.CustomValues))
	}
	for i, r := range c.FloatHistograms.Ref {
		h := c.FloatHistograms.H[i]
		add(series(r), c.FloatHistograms.T[i], fmt.Sprintf("%d %s %x %v", start(c.FloatHistograms.ST, i), h, math.Float64bits(h.Sum), h.CustomValues))
	}
	for _, e := range b.Exemplars {
		f.exemplars[series(e.Ref)] = fmt.Sprint(e.T, math.Float64frombits(e.Value), e.Labels)
	}
	for _, m := range b.Metadata {
		f.metadata[series(m.Ref)] = m.Type + " " + m.Unit + " " + m.Help
		f.families = append(f.families, series(m.Ref)+" "+m.Family+" "+m.Type+" "+m.Unit+" "+m.Help)
	}
	for _, r := range b.Withdraw {
		series(r)
		s.refs[r] = ""
		f.withdrawn++
	}
	if bad != nil {
		f.conflicts = append(f.conflicts, bad.Error())
		return bad
	}
	if refused > 0 {
		s.refused = append(s.refused, &shippb.Refused{Seq: b.Seq, Reason: "test_limit", Samples: refused})
	}
	s.received = b.Seq
	if f.autoFlush {
		f.flushLocked()
	}
	return nil
}

// fakeGateway answers the ring, and claims.
type fakeGateway struct {
	*httptest.Server
	choices *choice.Choices
	noClaim bool // claims are not answered
	claims  int
	mu      sync.Mutex
	members []ring.Member
	changed chan struct{}
	down    bool
	asked   int
	tenant  string
}

func newFakeGateway(t testing.TB, ingesters ...*fakeIngester) *fakeGateway {
	g := &fakeGateway{changed: make(chan struct{}), choices: choice.New(index.New(&historytest.MemoryRows{}))}
	g.set(ingesters...)
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/ha/claim" {
			g.claim(w, r)
			return
		}
		g.mu.Lock()
		g.asked++
		g.tenant = r.Header.Get("X-Scope-OrgID")
		s, ch, down := ring.NewSnapshot(slices.Clone(g.members)), g.changed, g.down
		g.mu.Unlock()
		if down {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		if r.URL.Query().Get("version") == s.Version {
			wait, _ := time.ParseDuration(r.URL.Query().Get("wait"))
			ctx, cancel := context.WithTimeout(r.Context(), wait)
			defer cancel()
			select {
			case <-ch:
			case <-ctx.Done():
			}
			g.mu.Lock()
			s = ring.NewSnapshot(slices.Clone(g.members))
			g.mu.Unlock()
		}
		json.NewEncoder(w).Encode(s)
	}))
	t.Cleanup(g.Close)
	return g
}

func (g *fakeGateway) claim(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	down := g.noClaim
	g.mu.Unlock()
	if down {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	}
	var q choice.Request
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var is []choice.Interval
	var err error
	if tenant := r.Header.Get("X-Scope-OrgID"); q.Replica == "" {
		is, err = g.choices.Decided(r.Context(), tenant, q.Group, q.From, q.Until)
	} else {
		g.mu.Lock()
		g.claims++
		g.mu.Unlock()
		is, err = g.choices.Claim(r.Context(), tenant, q.Group, q.Replica, q.From, q.Until)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": choice.Answer{Intervals: is}})
}

func (g *fakeGateway) set(ingesters ...*fakeIngester) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.members = nil
	for _, f := range ingesters {
		g.members = append(g.members, ring.Member{ID: f.id, Address: f.address, State: ring.Active})
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

package sim

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// node is one process of an ingester.
type node struct {
	w       *world
	id      string // on the ring
	address string
	ing     *ingest.Ingester
	server  *grpc.Server
	cancel  context.CancelFunc
	dead    atomic.Bool   // killed, or gone after its last flush
	ended   chan struct{} // closed when all that it had started has ended
	disk    *disk         // for a commit log; nil: it has none

	// Owned by the schedule.
	leaving bool
	left    string // directory of the disk, for the next process of the id; empty: none
	whole   bool   // all that was received is there

	mu       sync.Mutex
	sessions map[string]*session // by tenant and id
}

// store is history as this process writes it: through stores that fail as the
// world says, and not at all once the process is dead.
func (w *world) store(dead *atomic.Bool) (*history.History, error) {
	decide := w.decide(dead)
	return history.New(history.Options{
		Objects: &historytest.FaultyObjects{Store: &w.objects, Decide: decide},
		Index:   index.New(&heldRows{historytest.HeldRows{Store: &historytest.FaultyRows{Store: &w.rows, Decide: decide}, Held: w.faults.held}, &w.faults}),
	})
}

// decide is what happens to the calls of a process.
func (w *world) decide(dead *atomic.Bool) historytest.Decide {
	return func(op, _ string) historytest.Fault {
		if dead.Load() {
			return historytest.Before
		}
		fault, late := w.faults.write(op)
		if dead.Load() && !late {
			return historytest.Before // the request had not gone out
		}
		return fault
	}
}

// heldRows asks the faults how much of a request fails.
type heldRows struct {
	historytest.HeldRows
	faults *faults
}

func (h *heldRows) Put(ctx context.Context, items []index.Item) error {
	h.faults.mu.Lock()
	rows := historytest.HeldRows{Store: h.Store, Held: h.Held, Whole: h.faults.whole}
	h.faults.mu.Unlock()
	return rows.Put(ctx, items)
}

// startNode starts a process at an address, and makes it known.
func (w *world) startNode(id, address string) error {
	n := &node{w: w, id: id, address: address, ended: make(chan struct{}), sessions: map[string]*session{}}
	h, err := w.store(&n.dead)
	if err != nil {
		return err
	}
	o := w.ingester
	o.Member = id
	var before *node
	if w.hasLog(id) {
		if n.disk, before, err = w.diskFor(id); err != nil {
			return err
		}
		n.left = n.disk.dir
		o.CommitLog, o.CommitLogFiles.Create = n.disk.dir, n.disk.create
	}
	if n.ing, err = ingest.New(o, w.bug.publisher(n, h), w.logger.With("owner", id), prometheus.NewRegistry()); err != nil {
		return err
	}
	n.takeOver(before)
	n.server = grpc.NewServer(
		grpc.MaxRecvMsgSize(4<<20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.StreamInterceptor(n.watch),
	)
	n.ing.Register(n.server)
	l := w.net.listen(address)
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			w.fail(fmt.Errorf("%s: %w", id, err))
		}
	})
	wg.Go(func() {
		// As in cmd/epimetheus: what could not be flushed is missed.
		if err := n.ing.Replay(ctx); err != nil {
			w.fail(fmt.Errorf("%s: replay: %w", n, err))
		}
		w.members.state(settle, id, n.ing.Process(), ring.Active)
		err := n.ing.Run(ctx)
		if n.dead.Load() {
			return
		}
		w.logf("%s has ended: %v", n, err)
		if err == nil {
			w.members.state(0, n.id, n.ing.Process(), ring.Left)
			w.members.forget(2*time.Second, n.id, n.ing.Process())
		}
		n.vanish(w.detect)
	})
	go func() {
		wg.Wait()
		close(n.ended)
	}()
	w.nodes = append(w.nodes, n)
	m := ring.Member{ID: id, Address: "passthrough:///" + address, State: ring.Joining, Process: n.ing.Process(), Memory: n.ing.Memory()}
	w.members.change(0, func(all map[string]ring.Member) { all[id] = m })
	return nil
}

// vanish is the end of the process; the others notice a while after.
func (n *node) vanish(detect time.Duration) {
	n.dead.Store(true)
	n.cancel()
	n.server.Stop()
	p := n.ing.Process()
	// One that has left is off the ring by then.
	n.w.members.change(detect, func(all map[string]ring.Member) {
		if x, ok := all[n.id]; ok && x.Process == p && x.State != ring.Left {
			x.State = ring.Lost
			all[n.id] = x
		}
	})
	n.w.members.forget(detect+n.w.lostFor, n.id, p)
}

// leave ends the process in order.
func (n *node) leave() {
	n.leaving = true
	n.ing.Drain()
	n.w.members.state(0, n.id, n.ing.Process(), ring.Leaving)
	n.w.later(2*time.Second, "", n.cancel)
}

func (n *node) String() string { return n.id + " at " + n.address }

// session is what a process says of a session, and what was in it.
type session struct {
	tenant   string
	replayed atomic.Bool // from a commit log, and not heard of yet

	mu                sync.Mutex
	refs              map[uint32]string // labels
	batches           []batch           // by sequence number, from 1
	received, durable uint64            // as said
	dec               ship.Decoder
	cols              ship.Columns
}

// batch is the samples of a batch.
type batch struct {
	samples []sampleID
	values  []string
	newest  int64
}

// again is the session as another process knows it by the commit log. What it says
// of it is looked at anew.
func (s *session) again() *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &session{tenant: s.tenant, refs: maps.Clone(s.refs), batches: slices.Clone(s.batches)}
	out.replayed.Store(true)
	return out
}

// watch sees all that comes and goes on a stream of the ship protocol.
func (n *node) watch(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if info.FullMethod == shippb.Ship_Stream_FullMethodName {
		ss = &watched{ServerStream: ss, n: n}
	}
	return handle(srv, ss)
}

type watched struct {
	grpc.ServerStream
	n        *node
	s        *session
	received uint64 // that the sidecar has seen
}

func (x *watched) RecvMsg(m any) error {
	if err := x.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	msg := m.(*shippb.ToIngester)
	if h := msg.GetHello(); h != nil {
		key := h.Tenant + " " + hex.EncodeToString(h.Session)
		x.n.mu.Lock()
		if x.s = x.n.sessions[key]; x.s == nil {
			x.s = &session{tenant: h.Tenant, refs: map[uint32]string{}}
			x.n.sessions[key] = x.s
		}
		x.n.mu.Unlock()
		x.received = h.Received
	}
	if b := msg.GetBatch(); b != nil && x.s != nil {
		if err := x.s.batch(x.n.w, b); err != nil {
			x.n.w.fail(fmt.Errorf("%s: batch %d: %w", x.n, b.Seq, err))
		}
	}
	return nil
}

func (x *watched) SendMsg(m any) error {
	if x.n.dead.Load() {
		return errCut
	}
	msg := m.(*shippb.ToSidecar)
	var err error
	if w := msg.GetWelcome(); w != nil {
		w.WindowBytes = x.n.w.windowBytes
		if w.Resumed && x.s.replayed.Swap(false) {
			x.n.w.resumed.Add(1)
		}
		if err = x.s.said(x.n, w.Received, w.Durable); err == nil && w.Resumed && w.Received < x.received {
			err = fmt.Errorf("resumes a session at batch %d, its source has seen that %d was received", w.Received, x.received)
		}
	}
	if a := msg.GetAck(); a != nil {
		x.n.w.bug.ack(x.n, x.s, a)
		if err = x.s.said(x.n, a.Received, a.Durable); err == nil && len(a.Refused) > 0 {
			err = fmt.Errorf("refused: %v", a.Refused)
		}
	}
	if err != nil && !x.n.dead.Load() {
		x.n.w.fail(fmt.Errorf("%s: %w", x.n, err))
	}
	return x.ServerStream.SendMsg(m)
}

// batch takes in what a batch holds, before the ingester does.
func (s *session) batch(w *world, b *shippb.Batch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch n := uint64(len(s.batches)); {
	case b.Seq <= n:
		return nil // once more, after the stream broke
	case b.Seq != n+1:
		return fmt.Errorf("follows batch %d", n)
	}
	for _, a := range b.Announce {
		s.refs[a.Ref] = labels.FromStrings(a.Labels...).String()
	}
	if err := s.dec.Decode(b.Columns, &s.cols); err != nil {
		return err
	}
	var out batch
	add := func(ref uint32, t int64, v string) error {
		id := sampleID{seriesID{s.tenant, s.refs[ref]}, t}
		out.samples, out.values, out.newest = append(out.samples, id), append(out.values, v), max(out.newest, t)
		return w.truth.logged(id, v)
	}
	var errs []error
	for i, x := 0, s.cols.Floats; i < len(x.T); i++ {
		errs = append(errs, add(x.Ref[i], x.T[i], floatValue(x.V[i])))
	}
	for i, x := 0, s.cols.Histograms; i < len(x.T); i++ {
		errs = append(errs, add(x.Ref[i], x.T[i], histogramValue(x.H[i])))
	}
	for i, x := 0, s.cols.FloatHistograms; i < len(x.T); i++ {
		errs = append(errs, add(x.Ref[i], x.T[i], floatHistogramValue(x.H[i])))
	}
	for _, ref := range b.Withdraw {
		delete(s.refs, ref)
	}
	s.batches = append(s.batches, out)
	return errors.Join(errs...)
}

// said takes in what the process is about to say of the session: what it calls
// durable must be in history by now, and history alone.
func (s *session) said(n *node, received, durable uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last := uint64(len(s.batches)); received > last || durable > received {
		return fmt.Errorf("says received %d and durable %d of %d batches", received, durable, last)
	}
	for ; s.received < received; s.received++ {
		n.w.truth.received(n, s.batches[s.received].samples)
	}
	if durable <= s.durable {
		return nil
	}
	var ids []sampleID
	for _, b := range s.batches[s.durable:durable] {
		ids = append(ids, b.samples...)
	}
	s.durable = durable
	if err := n.w.durable(s.tenant, ids); err != nil {
		return fmt.Errorf("says that batches up to %d are durable: %w", durable, err)
	}
	return nil
}

// processes

// alive are the nodes that live, leaving ones included.
func (w *world) alive() []*node {
	w.nodes = slices.DeleteFunc(w.nodes, func(n *node) bool {
		if !n.dead.Load() {
			return false
		}
		w.gone = append(w.gone, n)
		return true
	})
	slices.SortFunc(w.nodes, func(a, b *node) int { return strings.Compare(a.address, b.address) })
	return w.nodes
}

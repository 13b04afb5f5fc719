package sidecar

import (
	"bytes"
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// With several replicas each sample goes to each owner of its series. One that
// is slow or out of reach doesn't hold back the tail as long as another takes the
// samples: it is left behind, its copies of what it doesn't get are lost, and when
// that goes on for a while it is detached, as with one replica.

const (
	// behindFor is how long an owner must keep up before it is waited for again,
	// when its window is full.
	behindFor = 10 * time.Second
	// staleAfter is how long an owner may have received nothing of what is in
	// flight before its copies don't count for queries.
	staleAfter = 3 * time.Second
)

// target is a series in a session.
type target struct {
	session *session
	ref     uint32
}

// refusedBatch is one of which an ingester refused something.
type refusedBatch struct {
	session SessionID
	seq     uint64
}

// routeCopies is the end of route for several replicas.
func (s *shipper) routeCopies(ctx context.Context, i uint32, sl *slot) (*session, uint32) {
	set := uint32(sl.owner) - 1
	if sl.owner == 0 {
		if set = s.split.set(sl.token); set < math.MaxUint16 {
			sl.owner = uint16(set) + 1
		}
	}
	return s.copies(ctx, set, func(k int, ss *session) (uint32, bool) {
		at, ref := s.placeOf(i, sl, k)
		if *at == ss.index {
			return *ref, true
		}
		for j := range s.opts.Replicas {
			// It may have been announced there as another replica.
			if other, r := s.placeOf(i, sl, j); *other == ss.index {
				*at, *other, *ref, *r = *other, *at, *r, *ref
				return *ref, true
			}
		}
		return *ref, s.announceAt(i, sl, ss, at, ref)
	})
}

// placeOf is where replica k of a series is announced.
func (s *shipper) placeOf(i uint32, sl *slot, k int) (at *uint16, ref *uint32) {
	if k == 0 {
		return &sl.session, &sl.ref
	}
	p := s.dict.place(i, k)
	return &p.session, &p.ref
}

// withdraw makes a series unknown in all sessions.
func (s *shipper) withdraw(i uint32, sl *slot) {
	for k := range s.opts.Replicas {
		if at, ref := s.placeOf(i, sl, k); *at != 0 {
			s.sessions[*at].drop(*ref)
			*at = 0
		}
	}
}

// copies returns the first session that a sample for a set of owners goes to and
// the series' ref there, which say gives; the others are then in s.more.
func (s *shipper) copies(ctx context.Context, set uint32, say func(replica int, ss *session) (ref uint32, ok bool)) (*session, uint32) {
	s.more = s.more[:0]
	var first target
	for k, ss := range s.takers(ctx, set) {
		if ss == nil {
			continue
		}
		ref, ok := say(k, ss)
		switch {
		case !ok:
			return nil, 0
		case first.session == nil:
			first = target{ss, ref}
		default:
			s.more = append(s.more, target{ss, ref})
		}
	}
	return first.session, first.ref
}

// takers returns the sessions with a set of owners, nil for one that takes
// nothing at present: its copy is then noted as lost. It waits until one takes
// something, or all are detached.
func (s *shipper) takers(ctx context.Context, set uint32) []*session {
	s.acc.use(set)
	owners := s.split.sets[set].owners
	for {
		s.taking = s.taking[:0]
		some, detached := false, true
		for _, k := range owners {
			o := s.split.owners[k]
			ss := s.willing(ctx, o)
			s.taking = append(s.taking, ss)
			some, detached = some || ss != nil, detached && o.detached
		}
		if some || detached || ctx.Err() != nil {
			break
		}
		s.await(ctx)
	}
	for i, ss := range s.taking {
		if ss == nil {
			s.acc.lost(s.split.owners[owners[i]].member.ID)
		}
	}
	return s.taking
}

// willing returns the session with an owner, nil if that takes nothing.
func (s *shipper) willing(ctx context.Context, o *owner) *session {
	if o.detached {
		return nil
	}
	if o.session == nil {
		if s.ensureSession(ctx, o); o.session == nil {
			s.behind(o, "no session can be had")
			return nil
		}
	}
	if o.session.stuck != nil {
		s.behind(o, "its window stays full")
		return nil
	}
	return o.session
}

// behind notes that an owner was left behind, and detaches it when that goes on.
func (s *shipper) behind(o *owner, why string) {
	now := time.Now()
	if now.Sub(o.behindAt) > behindFor {
		o.behindSince, o.behindAsked = now, now
	}
	o.behindAt = now
	if now.Sub(o.behindSince) > s.opts.DetachAfter && now.Sub(o.behindAsked) > 100*time.Millisecond {
		if o.behindAsked = now; s.canDetach(o) {
			s.detach(o, why)
		}
	}
}

// flushFull flushes the sessions that the last sample went to, as needed.
func (s *shipper) flushFull(ctx context.Context, ss *session) {
	s.flushIfFull(ctx, ss)
	for i := range s.more {
		s.flushIfFull(ctx, s.more[i].session)
	}
}

// flushCopy is flush with several replicas: an owner is waited for only if others
// don't take all that it should have got.
func (s *shipper) flushCopy(ctx context.Context, ss *session) {
	o := ss.owner
	lose := func() {
		s.acc.lost(o.member.ID)
		ss.counted = true
	}
	began := time.Now()
	for !s.trySendStuck(ss) {
		if s.leaveBehind(ctx, ss, began) {
			lose() // the batch stays: it may hold announcements
			return
		}
		s.await(ctx)
	}
	if o.detached || s.sessions[ss.index] != ss {
		lose()
		return
	}
	b := ss.take(&s.enc)
	for {
		if seq, ok := ss.ship.TrySend(b); ok {
			ss.last, ss.counted = seq, false
			s.acc.sent(o.member.ID, ss.id, seq)
			s.metrics.batches.Inc()
			s.metrics.shippedBytes.Add(float64(proto.Size(b)))
			return
		}
		if s.leaveBehind(ctx, ss, began) {
			ss.stuck = b
			lose()
			return
		}
		s.await(ctx)
	}
}

// trySendStuck is true if no batch is stuck any more.
func (s *shipper) trySendStuck(ss *session) bool {
	if ss.stuck != nil {
		seq, ok := ss.ship.TrySend(ss.stuck)
		if !ok {
			return false
		}
		ss.stuck, ss.last = nil, seq
	}
	return true
}

// leaveBehind says whether not to wait any longer for room in a session's window.
func (s *shipper) leaveBehind(ctx context.Context, ss *session, began time.Time) bool {
	o := ss.owner
	if s.sessions[ss.index] != ss || o.detached || ctx.Err() != nil {
		return true
	}
	now := time.Now()
	waited := now.Sub(began)
	if waited < s.opts.DetachAfter/5 && now.Sub(o.behindAt) > behindFor {
		return false
	}
	if s.covered(o) {
		s.behind(o, "its window stays full")
		return true
	}
	if waited > s.opts.DetachAfter && s.canDetach(o) {
		s.detach(o, "its window stays full")
		return true
	}
	return false
}

// covered says whether all that an owner should have got in the present range
// went to others too.
func (s *shipper) covered(o *owner) bool {
	all := true
	s.acc.sets(s.split, func(set *ownerSet) {
		among, other := false, false
		for _, k := range set.owners {
			x := s.split.owners[k]
			among = among || x == o
			other = other || x != o && !x.detached && x.session != nil && x.session.stuck == nil && !s.acc.isLost(x.member.ID)
		}
		all = all && (!among || other)
	})
	return all
}

// tendCopy looks after a session of one of several replicas.
func (s *shipper) tendCopy(ss *session, st *ship.SessionState, now time.Time) {
	if !ss.owner.detached {
		s.trySendStuck(ss)
	}
	current := st.Connected && len(st.Process) > 0 && !ss.owner.detached && ss.stuck == nil && now.Sub(ss.progress) < staleAfter
	if current == ss.current {
		return
	}
	ss.current, ss.process, s.coverageDue = current, st.Process, true
	if current {
		ss.ship.Beat()
	}
}

// refused notes, from any goroutine, that an ingester refused some of a batch.
func (s *shipper) refused(id SessionID, seq uint64) {
	if s.opts.Replicas == 1 {
		return // there is no other copy
	}
	s.metrics.lacking.Inc()
	s.refusalsMu.Lock()
	defer s.refusalsMu.Unlock()
	if n := len(s.refusals); n == 0 || s.refusals[n-1] != (refusedBatch{id, seq}) {
		s.refusals = append(s.refusals, refusedBatch{id, seq})
	}
}

// takeRefusals enters refusals into the ledgers. It comes after the states of
// sessions were read and before what they say is durable is entered.
func (s *shipper) takeRefusals() {
	if s.opts.Replicas == 1 {
		return
	}
	s.refusalsMu.Lock()
	rs := s.refusals
	s.refusals = nil
	s.refusalsMu.Unlock()
	for _, r := range rs {
		s.ledgers(func(l *Ledger) { l.Refused(r.session, r.seq) })
		s.coverageDue = true
	}
}

// declare has sessions say how many copies there are, if that has changed.
func (s *shipper) declare() {
	s.coverageDue = false
	if s.opts.Replicas == 1 {
		return
	}
	c := s.present()
	now := time.Now()
	s.declaredAt.Store(&now)
	if old := s.coverage.Load(); old != nil && proto.Equal(old, c) {
		return
	}
	s.coverage.Store(c)
	for _, ss := range s.sessions {
		if ss != nil {
			ss.ship.Beat()
		}
	}
}

// declared is what a heartbeat says of copies; any goroutine may call it.
func (s *shipper) declared() *shippb.Coverage {
	c := s.coverage.Load()
	if c != nil && time.Since(*s.declaredAt.Load()) > staleAfter {
		// Nobody has looked for a while: what has happened since isn't known.
		return &shippb.Coverage{ReplicationFactor: c.ReplicationFactor}
	}
	return c
}

// present counts the copies of all that was sent and is not durable, and of what
// is being sent.
func (s *shipper) present() *shippb.Coverage {
	n := uint32(s.opts.Replicas)
	c := &shippb.Coverage{ReplicationFactor: n, Copies: n, Zones: n}
	zones := map[string]int{}        // numbered
	current := map[SessionID]int{}   // zone
	currentOwner := map[string]int{} // … by member
	for _, ss := range s.sessions {
		if ss == nil || !ss.current {
			continue
		}
		m := ss.owner.member
		z, ok := zones[m.Failure()]
		if !ok {
			z = len(zones)
			zones[m.Failure()] = z
		}
		current[ss.id], currentOwner[m.ID] = z, z
		c.Holders = append(c.Holders, &shippb.Holder{Member: m.ID, Process: ss.process})
	}
	slices.SortFunc(c.Holders, func(a, b *shippb.Holder) int {
		return cmp.Or(cmp.Compare(a.Member, b.Member), bytes.Compare(a.Process, b.Process))
	})
	if !s.caughtUp || s.split == nil {
		// What was sent before the start isn't known yet.
		c.Copies, c.Zones = 0, 0
		return c
	}
	var in []int // zones of the copies
	least := func() {
		c.Copies = min(c.Copies, uint32(len(in)))
		slices.Sort(in)
		c.Zones = min(c.Zones, uint32(len(slices.Compact(in))))
	}
	s.ledgers(func(l *Ledger) {
		l.Copies(func(copies [][]Sent) {
			in = in[:0]
			for _, sent := range copies {
				zone, all := -1, true
				for _, x := range sent {
					z, ok := current[x.Session]
					zone, all = z, all && ok
				}
				if all && zone >= 0 {
					in = append(in, zone)
				}
			}
			least()
		})
	})
	set := func(set *ownerSet, acc *account) {
		in = in[:0]
		for _, k := range set.owners {
			id := s.split.owners[k].member.ID
			if z, ok := currentOwner[id]; ok && (acc == nil || !acc.isLost(id)) {
				in = append(in, z)
			}
		}
		least()
	}
	for i := range s.split.sets {
		set(&s.split.sets[i], nil)
	}
	s.acc.sets(s.split, func(x *ownerSet) { set(x, s.acc) })
	return c
}

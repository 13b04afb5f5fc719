package sidecar

import (
	"slices"
	"strings"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// split says which member gets a series: the ring of one version, without the
// members that were out of reach. It doesn't change, so what a range gave to a
// member can be told for as long as the ledger refers to it.
type split struct {
	id       SplitID
	ring     *ring.Ring
	excluded map[string]bool
	owners   []*owner // in the order of ring.Active, without the excluded
	index    map[string]uint16

	replicas int // owners of a series, if there are as many
	// With several: the sets of owners that there were so far.
	sets  []ownerSet
	byKey map[setKey]uint32
}

// maxReplicas is the greatest replication factor.
const maxReplicas = 3

// ownerSet are the owners of a series, in their order.
type ownerSet struct {
	name   string   // of the set, whatever the order: a part's Owners
	owners []uint16 // indexes in split.owners
}

// setKey are indexes in split.owners plus one, 0 for none.
type setKey [maxReplicas]uint16

func (s *split) skip(id string) bool { return s.excluded[id] }

func (s *split) member(token uint32) (ring.Member, bool) {
	return s.ring.OwnerExcept(token, s.skip)
}

// set returns the index of the set of owners of a series.
func (s *split) set(token uint32) uint32 {
	ms := s.ring.Owners(token, s.replicas, s.skip)
	var key setKey
	for i, m := range ms {
		key[i] = s.index[m.ID] + 1
	}
	if i, ok := s.byKey[key]; ok {
		return i
	}
	set := ownerSet{}
	ids := make([]string, 0, len(ms))
	for _, m := range ms {
		set.owners = append(set.owners, s.index[m.ID])
		ids = append(ids, m.ID)
	}
	slices.Sort(ids)
	set.name = strings.Join(ids, "\x00")
	s.sets = append(s.sets, set)
	i := uint32(len(s.sets) - 1)
	s.byKey[key] = i
	return i
}

// part returns the name of the part that a series is in.
func (s *split) part(token uint32) string {
	if s.replicas == 1 {
		m, _ := s.member(token) // a split has a member
		return m.ID
	}
	return s.sets[s.set(token)].name
}

// owner is a member of the ring that gets, or got, samples.
type owner struct {
	member  ring.Member
	session *session // nil if there is none

	retryAt time.Time // not to begin a session before
	backoff time.Duration

	detached  bool
	calmSince time.Time // since when a detached owner has been content
	// With several replicas: when it was last left behind, and since when, with
	// pauses of at most behindFor.
	behindAt, behindSince, behindAsked time.Time
	hold                               time.Duration
	detachedAt                         time.Time
}

// resplit makes the split anew: for another ring, or after an owner was detached
// or attached. The range that was being read has been cut.
func (s *shipper) resplit() {
	s.dirty = false
	r, _ := s.ringWatch.present()
	if r == nil {
		return
	}
	r = r.Subset(s.opts.Tenant, s.opts.Shards, s.opts.Replicas)
	if len(r.Active()) == 0 {
		if s.split != nil {
			s.logger.Warn("ring has no active ingester, waiting")
		}
		s.ring, s.split = r, nil
		return
	}
	s.lastSplit++
	sp := &split{id: s.lastSplit, ring: r, excluded: map[string]bool{}, index: map[string]uint16{}, replicas: s.opts.Replicas, byKey: map[setKey]uint32{}}
	for _, m := range r.Active() {
		if o := s.owners[m.ID]; o != nil && o.detached {
			sp.excluded[m.ID] = true
		}
	}
	if len(sp.excluded) == len(r.Active()) {
		// All that are left had been detached: then any is better than none.
		for id := range sp.excluded {
			s.owners[id].detached = false
		}
		clear(sp.excluded)
	}
	for _, m := range r.Active() {
		o := s.owners[m.ID]
		if o == nil {
			o = &owner{member: m}
			s.owners[m.ID] = o
		}
		if o.member.Address != m.Address && o.session != nil {
			o.session.cancel() // it has moved; its session is another process's
		}
		o.member = m
		if !sp.excluded[m.ID] {
			if o.session != nil {
				o.session.counted = false // what comes to it now is another range's
			}
			sp.index[m.ID] = uint16(len(sp.owners))
			sp.owners = append(sp.owners, o)
		}
	}
	s.ring, s.split = r, sp
	s.splits[sp.id] = sp
	s.dict.all(func(_ uint32, sl *slot) { sl.owner = 0 })
	keep := map[SplitID]bool{sp.id: true}
	s.ledgers(func(l *Ledger) {
		for _, id := range l.Splits() {
			keep[id] = true
		}
	})
	for id := range s.splits {
		if !keep[id] {
			delete(s.splits, id)
		}
	}
	s.logger.Info("ring", "version", r.Version(), "owners", len(sp.owners), "detached", len(sp.excluded))
}

// owns says whether an owner gets samples by the present split.
func (s *shipper) owns(o *owner) bool {
	if s.split == nil {
		return false
	}
	_, ok := s.split.index[o.member.ID]
	return ok
}

func (s *shipper) onRing(id string) bool {
	if s.ring == nil {
		return false
	}
	for _, m := range s.ring.Active() {
		if m.ID == id {
			return true
		}
	}
	return false
}

// isLost says whether a member vanished, as the ring has it.
func (s *shipper) isLost(id string) bool {
	if s.ring == nil {
		return false
	}
	return slices.ContainsFunc(s.ring.Snapshot().Members, func(m ring.Member) bool { return m.ID == id && m.State == ring.Lost })
}

// canDetach says whether the tail can go on without an owner: another must be
// there to take its series.
func (s *shipper) canDetach(o *owner) bool {
	r, _ := s.ringWatch.present()
	if r == nil {
		return false
	}
	for _, m := range r.Subset(s.opts.Tenant, s.opts.Shards, s.opts.Replicas).Active() {
		if other := s.owners[m.ID]; m.ID != o.member.ID && (other == nil || !other.detached) {
			return true
		}
	}
	return false
}

// detach leaves an owner out until it has been content for a while.
func (s *shipper) detach(o *owner, why string) {
	now := time.Now()
	if now.Sub(o.detachedAt) > 10*time.Minute {
		o.hold = 0
	}
	o.detached, o.detachedAt, o.calmSince = true, now, time.Time{}
	o.hold = min(max(2*o.hold, s.opts.ReattachAfter), 5*time.Minute)
	s.dirty = true
	s.metrics.detachments.Inc()
	s.logger.Warn("ingester is left out, its series go to the next", "owner", o.member.ID, "reason", why)
	if ss := o.session; ss != nil {
		for _, m := range s.acc.members {
			if slices.ContainsFunc(m.Sent, func(x Sent) bool { return x.Session == ss.id }) {
				s.acc.lost(m.member)
			}
		}
		s.ledgers(func(l *Ledger) { l.Detach(ss.id, ss.received) })
	}
}

package sidecar

import (
	"cmp"
	"slices"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// Ledger is how the sidecar keeps account of what is durable, and the only place
// where positions are compared. It is pure and not safe for concurrent use.
//
// The WAL is read in ranges, in order. What a range became is split among
// members of the ring: for each member that owns some of its series it has a
// part. A part names the sessions in which its samples went out and, for each,
// the last sequence number that belongs to it; it is done when all of these are
// durable. A range is done when its parts are, and the checkpoint is the start
// of the first range that isn't.
//
// When a session ends for good, the parts that are not done because of it go to
// the queue. Take gives out a run of them to be read again; what is read for a
// part are the samples that the split of its range gave to its member, whatever
// the ring is by then. Resent tells in which sessions they went out this time. A
// session that ended meanwhile puts them back into the queue.
type Ledger struct {
	ranges   []*ledgerRange // not done, in the order of the WAL
	next     tail.Position  // where the next range begins: the checkpoint if there is no other
	sessions map[SessionID]uint64
	queued   int // parts in the queue
	lastWork uint64
}

// SessionID names a session within this process.
type SessionID uint64

// SplitID names the state of the ring, and of its members' reachability, by
// which ranges were split.
type SplitID uint64

// Part is what a range, or a run of ranges, gave to one member.
type Part struct {
	Member string
	Sent   []Sent
	// Lost says that some of it was never sent.
	Lost bool
}

// Sent is the last sequence number of a session that belongs to a part.
type Sent struct {
	Session SessionID
	Seq     uint64
}

// Work is a run of adjacent ranges to be read again.
type Work struct {
	ID       uint64
	From, To tail.Position
	Split    SplitID
	Members  []string // the parts concerned: series that Split gave to one of these
}

type ledgerRange struct {
	from, to tail.Position
	split    SplitID
	parts    []ledgerPart // not done
}

type ledgerPart struct {
	member string
	sent   []Sent // not durable yet
	state  partState
	work   uint64 // of a part that is being read again
}

type partState uint8

const (
	partSent    partState = iota // all of it is in sessions that live
	partQueued                   // to be read again
	partReading                  // given out by Take
)

// NewLedger returns a ledger whose first range will begin at from.
func NewLedger(from tail.Position) *Ledger {
	return &Ledger{next: from, sessions: map[SessionID]uint64{}}
}

// Begin makes a session known.
func (l *Ledger) Begin(s SessionID) { l.sessions[s] = 0 }

// Live says whether a session is known and has not ended.
func (l *Ledger) Live(s SessionID) bool {
	_, ok := l.sessions[s]
	return ok
}

// Skip moves the start of the next range to a place that doesn't follow the end
// of the last one: the next file, another epoch, or behind a gap.
func (l *Ledger) Skip(to tail.Position) { l.next = to }

// Add enters the next range, up to to. It begins where the last one ended, or
// where Skip said.
func (l *Ledger) Add(to tail.Position, split SplitID, parts []Part) {
	r := &ledgerRange{from: l.next, to: to, split: split}
	l.next = to
	for _, p := range parts {
		lp := ledgerPart{member: p.Member}
		l.assign(&lp, p)
		if lp.state == partSent && len(lp.sent) == 0 {
			continue
		}
		r.parts = append(r.parts, lp)
	}
	if len(r.parts) > 0 {
		l.ranges = append(l.ranges, r)
	}
}

// assign sets what a part waits for.
func (l *Ledger) assign(lp *ledgerPart, p Part) {
	lp.sent, lp.state, lp.work = nil, partSent, 0
	for _, s := range p.Sent {
		durable, live := l.sessions[s.Session]
		switch {
		case !live:
			p.Lost = true
		case s.Seq > durable:
			lp.sent = append(lp.sent, s)
		}
	}
	if p.Lost {
		// All of it is read again, so what is still under way doesn't matter.
		lp.sent, lp.state = nil, partQueued
		l.queued++
	}
}

// Durable enters that a session's batches up to seq are durable.
func (l *Ledger) Durable(s SessionID, seq uint64) {
	if old, live := l.sessions[s]; !live || seq <= old {
		return
	}
	l.sessions[s] = seq
	l.sweep(func(lp *ledgerPart) {
		lp.sent = slices.DeleteFunc(lp.sent, func(x Sent) bool { return x.Session == s && x.Seq <= seq })
	})
}

// End enters that a session has ended for good.
func (l *Ledger) End(s SessionID) {
	if !l.Live(s) {
		return
	}
	delete(l.sessions, s)
	l.requeue(s, 0)
}

// Detach enters that a session, which may yet live on, is not to be waited for:
// the parts of it that are not received, those behind seq, go to the queue.
func (l *Ledger) Detach(s SessionID, received uint64) { l.requeue(s, received) }

func (l *Ledger) requeue(s SessionID, after uint64) {
	l.sweep(func(lp *ledgerPart) {
		if lp.state != partSent {
			return
		}
		if slices.ContainsFunc(lp.sent, func(x Sent) bool { return x.Session == s && x.Seq > after }) {
			lp.sent, lp.state = nil, partQueued
			l.queued++
		}
	})
}

// sweep applies fn to all parts and drops what is done.
func (l *Ledger) sweep(fn func(*ledgerPart)) {
	l.ranges = slices.DeleteFunc(l.ranges, func(r *ledgerRange) bool {
		for i := range r.parts {
			fn(&r.parts[i])
		}
		r.parts = slices.DeleteFunc(r.parts, func(lp ledgerPart) bool { return lp.state == partSent && len(lp.sent) == 0 })
		return len(r.parts) == 0
	})
}

// Take gives out queued work: the oldest range with queued parts, and those that
// follow it without a hole in the same file with the same parts queued, up to
// about maxBytes of WAL in all. It returns false if nothing is queued. What was
// taken is to be given to Resent or Return.
func (l *Ledger) Take(maxBytes int64) (Work, bool) {
	if l.queued == 0 {
		return Work{}, false
	}
	first := slices.IndexFunc(l.ranges, func(r *ledgerRange) bool { return len(r.queued()) > 0 })
	r := l.ranges[first]
	l.lastWork++
	w := Work{ID: l.lastWork, From: r.from, To: r.to, Split: r.split, Members: r.queued()}
	l.mark(r, w.ID)
	for _, r := range l.ranges[first+1:] {
		if r.from != w.To || !r.to.SameFile(w.From) || r.split != w.Split || r.to.Offset-w.From.Offset > maxBytes || !slices.Equal(r.queued(), w.Members) {
			break
		}
		w.To = r.to
		l.mark(r, w.ID)
	}
	return w, true
}

func (r *ledgerRange) queued() []string {
	var members []string
	for i := range r.parts {
		if r.parts[i].state == partQueued {
			members = append(members, r.parts[i].member)
		}
	}
	slices.Sort(members)
	return members
}

func (l *Ledger) mark(r *ledgerRange, work uint64) {
	for i := range r.parts {
		if lp := &r.parts[i]; lp.state == partQueued {
			lp.state, lp.work = partReading, work
			l.queued--
		}
	}
}

// Resent enters in which sessions the samples of a Work went out. If lost, some
// did not, and all of it goes back to the queue.
func (l *Ledger) Resent(id uint64, sent []Sent, lost bool) {
	l.sweep(func(lp *ledgerPart) {
		if lp.state == partReading && lp.work == id {
			l.assign(lp, Part{Sent: sent, Lost: lost})
		}
	})
}

// Return puts a Work back into the queue.
func (l *Ledger) Return(id uint64) { l.Resent(id, nil, true) }

// Checkpoint is the position up to which everything is durable.
func (l *Ledger) Checkpoint() tail.Position {
	if len(l.ranges) > 0 {
		return l.ranges[0].from
	}
	return l.next
}

// LedgerStats says how full a ledger is.
type LedgerStats struct {
	Open   int // ranges that are not done
	Queued int // of these, ranges with parts to be read again
}

// Stats returns how full the ledger is.
func (l *Ledger) Stats() LedgerStats {
	st := LedgerStats{Open: len(l.ranges)}
	for _, r := range l.ranges {
		for i := range r.parts {
			if r.parts[i].state != partSent {
				st.Queued++
				break
			}
		}
	}
	return st
}

// Splits returns the splits that ranges in the ledger refer to, ascending.
func (l *Ledger) Splits() []SplitID {
	var ids []SplitID
	for _, r := range l.ranges {
		ids = append(ids, r.split)
	}
	slices.SortFunc(ids, func(a, b SplitID) int { return cmp.Compare(a, b) })
	return slices.Compact(ids)
}

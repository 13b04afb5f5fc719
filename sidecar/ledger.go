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
// members of the ring: for each set of members that owns some of its series
// together, each keeping a copy, it has a part. A copy names the sessions in
// which its samples went out and, for each, the sequence numbers that belong to
// it; it is done when all of these are durable, and lost when some of it can't
// become so any more. A part is done when one of its copies is, a range when its
// parts are, and the checkpoint is the start of the first range that isn't.
//
// When the last copy of a part is lost, as a session ends for good, the part goes
// to the queue. Take gives out a run of them to be read again; what is read for a
// part are the samples that the split of its range gave to its owners, whatever
// the ring is by then. Resent tells in which sessions they went out this time:
// as several parts, if the ring of now splits them so, and all of these have to
// be done. If the last copy of one is lost meanwhile, all goes back to the queue.
type Ledger struct {
	ranges   []*ledgerRange // not done, in the order of the WAL
	next     tail.Position  // where the next range begins: the checkpoint if there is no other
	sessions map[SessionID]uint64
	refusals map[SessionID][]refusal
	queued   int // parts in the queue
	lastWork uint64
}

// SessionID names a session within this process.
type SessionID uint64

// SplitID names the state of the ring, and of its members' reachability, by
// which ranges were split.
type SplitID uint64

// Part is what a range, or a run of ranges, gave to one set of owners.
type Part struct {
	Owners string // as the split names the set
	Copies []Copy // one per owner
}

// Copy is a part in the sessions with one owner.
type Copy struct {
	Sent []Sent
	// Lost says that some of it was never sent.
	Lost bool
}

// Sent are the sequence numbers of a session that belong to a copy.
type Sent struct {
	Session    SessionID
	First, Seq uint64 // the first and the last
}

// Work is a run of adjacent ranges to be read again.
type Work struct {
	ID       uint64
	From, To tail.Position
	Split    SplitID
	Owners   []string // the parts concerned: series that Split gave to one of these sets
}

type ledgerRange struct {
	from, to tail.Position
	split    SplitID
	parts    []ledgerPart // not done
}

type ledgerPart struct {
	owners string
	copies []ledgerCopy // of groups that are not done, these lie together
	state  partState
	work   uint64 // of a part that is being read again
}

// ledgerCopy is a copy of the part or, where it was read again and split into
// several, of one of these: a group.
type ledgerCopy struct {
	group int
	sent  []Sent // not durable yet
	lost  bool
	// refused says that the owner refused some of it for good. It doesn't count,
	// then, unless all owners did: they may have refused alike, or not, so all
	// of these are needed.
	refused bool
}

type partState uint8

const (
	partSent    partState = iota // in each group a copy is, or may become, durable
	partQueued                   // to be read again
	partReading                  // given out by Take
)

// refusal are sequence numbers of batches of which something was refused.
type refusal struct{ first, last uint64 }

// maxRefusals bounds what is kept for a session; beyond, the oldest become one,
// with what lies between.
const maxRefusals = 256

// NewLedger returns a ledger whose first range will begin at from.
func NewLedger(from tail.Position) *Ledger {
	return &Ledger{next: from, sessions: map[SessionID]uint64{}, refusals: map[SessionID][]refusal{}}
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
// where Skip said. What parts of a single copy have sent is the ledger's then.
func (l *Ledger) Add(to tail.Position, split SplitID, parts []Part) {
	r := &ledgerRange{from: l.next, to: to, split: split}
	l.next = to
	n := 0
	for i := range parts {
		n += len(parts[i].Copies)
	}
	space := make([]ledgerCopy, 0, n)
	for i := range parts {
		m := len(space) + len(parts[i].Copies)
		lp := ledgerPart{owners: parts[i].Owners, copies: space[len(space):len(space):m]}
		space = space[:m]
		if l.assign(&lp, parts[i:i+1], false, len(parts[i].Copies) == 1); !lp.done() {
			r.parts = append(r.parts, lp)
		}
	}
	if len(r.parts) > 0 {
		l.ranges = append(l.ranges, r)
	}
}

// assign sets what a part waits for: all of groups. lp.copies is empty, with
// room perhaps. What was sent is taken over if it is own.
func (l *Ledger) assign(lp *ledgerPart, groups []Part, lost, own bool) {
	lp.state, lp.work = partSent, 0
	for g := range groups {
		for _, c := range groups[g].Copies {
			lc := ledgerCopy{group: g, lost: c.Lost}
			if own {
				lc.sent = c.Sent[:0] // filtered in place
			}
			for _, s := range c.Sent {
				durable, live := l.sessions[s.Session]
				switch {
				case !live:
					lc.lost = true
				case s.Seq > durable:
					lc.sent = append(lc.sent, s)
				}
				for _, r := range l.refusals[s.Session] {
					lc.refused = lc.refused || r.first <= s.Seq && s.First <= r.last
				}
			}
			if lc.lost {
				lc.sent = nil
			}
			lp.copies = append(lp.copies, lc)
		}
	}
	if lost {
		l.queue(lp)
	} else {
		l.settle(lp)
	}
}

func (l *Ledger) queue(lp *ledgerPart) {
	// All of it is read again, so what is still under way doesn't matter.
	lp.copies, lp.state = nil, partQueued
	l.queued++
}

func (lp *ledgerPart) done() bool { return lp.state == partSent && len(lp.copies) == 0 }

// settle drops the groups of a part that are done, and queues it if one can't be.
func (l *Ledger) settle(lp *ledgerPart) {
	kept := lp.copies[:0]
	for i := 0; i < len(lp.copies); {
		end := i + 1
		for end < len(lp.copies) && lp.copies[end].group == lp.copies[i].group {
			end++
		}
		group := lp.copies[i:end]
		i = end
		done, open := verdict(group)
		if !done && !open {
			l.queue(lp)
			return
		}
		if !done {
			kept = append(kept, group...)
		}
	}
	clear(lp.copies[len(kept):])
	lp.copies = kept
}

// verdict says whether a group is done, or else may yet be.
func verdict(group []ledgerCopy) (done, open bool) {
	if refusedByAll(group) {
		done, open = true, true
		for i := range group {
			done, open = done && len(group[i].sent) == 0, open && !group[i].lost
		}
		return done && open, open
	}
	for i := range group {
		if c := &group[i]; !c.lost && !c.refused {
			done, open = done || len(c.sent) == 0, true
		}
	}
	return done, open
}

func refusedByAll(group []ledgerCopy) bool {
	return !slices.ContainsFunc(group, func(c ledgerCopy) bool { return !c.refused })
}

// Durable enters that a session's batches up to seq are durable.
func (l *Ledger) Durable(s SessionID, seq uint64) {
	if old, live := l.sessions[s]; !live || seq <= old {
		return
	}
	l.sessions[s] = seq
	l.change(func(c *ledgerCopy) bool {
		n := len(c.sent)
		c.sent = slices.DeleteFunc(c.sent, func(x Sent) bool { return x.Session == s && x.Seq <= seq })
		return len(c.sent) < n
	})
}

// Refused enters that some of a batch was refused for good, before what is said
// to be durable with it is. A copy with it counts no more, unless all owners
// refused some of theirs: then all of these copies are needed.
func (l *Ledger) Refused(s SessionID, seq uint64) {
	if !l.Live(s) {
		return
	}
	rs := l.refusals[s]
	switch n := len(rs); {
	case n > 0 && seq <= rs[n-1].last: // told already, or nearly so
	case n > 0 && seq == rs[n-1].last+1:
		rs[n-1].last = seq
	case n >= maxRefusals:
		rs[1].first = rs[0].first
		rs = append(slices.Delete(rs, 0, 1), refusal{seq, seq})
	default:
		rs = append(rs, refusal{seq, seq})
	}
	l.refusals[s] = rs
	l.change(func(c *ledgerCopy) bool {
		if c.refused || !slices.ContainsFunc(c.sent, func(x Sent) bool { return x.Session == s && x.First <= seq && seq <= x.Seq }) {
			return false
		}
		c.refused = true
		return true
	})
}

// End enters that a session has ended for good.
func (l *Ledger) End(s SessionID) {
	if !l.Live(s) {
		return
	}
	delete(l.sessions, s)
	delete(l.refusals, s)
	l.lose(s, 0)
}

// Detach enters that a session, which may yet live on, is not to be waited for:
// the copies in it that are not received, those behind seq, are lost.
func (l *Ledger) Detach(s SessionID, received uint64) { l.lose(s, received) }

func (l *Ledger) lose(s SessionID, after uint64) {
	l.change(func(c *ledgerCopy) bool {
		if !slices.ContainsFunc(c.sent, func(x Sent) bool { return x.Session == s && x.Seq > after }) {
			return false
		}
		c.sent, c.lost = nil, true
		return true
	})
}

// change applies fn to the copies of all parts that are sent, and settles the
// parts of which it has changed one.
func (l *Ledger) change(fn func(*ledgerCopy) bool) {
	l.sweep(func(lp *ledgerPart) {
		if lp.state != partSent {
			return
		}
		changed := false
		for i := range lp.copies {
			changed = fn(&lp.copies[i]) || changed
		}
		if changed {
			l.settle(lp)
		}
	})
}

// sweep applies fn to all parts and drops what is done.
func (l *Ledger) sweep(fn func(*ledgerPart)) {
	l.ranges = slices.DeleteFunc(l.ranges, func(r *ledgerRange) bool {
		for i := range r.parts {
			fn(&r.parts[i])
		}
		r.parts = slices.DeleteFunc(r.parts, func(lp ledgerPart) bool { return lp.done() })
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
	w := Work{ID: l.lastWork, From: r.from, To: r.to, Split: r.split, Owners: r.queued()}
	l.mark(r, w.ID)
	for _, r := range l.ranges[first+1:] {
		if r.from != w.To || !r.to.SameFile(w.From) || r.split != w.Split || r.to.Offset-w.From.Offset > maxBytes || !slices.Equal(r.queued(), w.Owners) {
			break
		}
		w.To = r.to
		l.mark(r, w.ID)
	}
	return w, true
}

func (r *ledgerRange) queued() []string {
	var owners []string
	for i := range r.parts {
		if r.parts[i].state == partQueued {
			owners = append(owners, r.parts[i].owners)
		}
	}
	slices.Sort(owners)
	return owners
}

func (l *Ledger) mark(r *ledgerRange, work uint64) {
	for i := range r.parts {
		if lp := &r.parts[i]; lp.state == partQueued {
			lp.state, lp.work = partReading, work
			l.queued--
		}
	}
}

// Resent enters in which sessions the samples of a Work went out, and as which
// parts. If lost, it is not known, and all of it goes back to the queue.
func (l *Ledger) Resent(id uint64, parts []Part, lost bool) {
	l.sweep(func(lp *ledgerPart) {
		if lp.state == partReading && lp.work == id {
			l.assign(lp, parts, lost, false)
		}
	})
}

// Return puts a Work back into the queue.
func (l *Ledger) Return(id uint64) { l.Resent(id, nil, true) }

// Copies calls fn for each part that is not done, with the sessions of each of
// its copies that are, or may become, complete; with none if it has to be read
// again.
func (l *Ledger) Copies(fn func(copies [][]Sent)) {
	var buf [][]Sent
	for _, r := range l.ranges {
		for i := range r.parts {
			lp := &r.parts[i]
			if lp.state != partSent {
				fn(nil)
				continue
			}
			for k := 0; k < len(lp.copies); {
				end := k + 1
				for end < len(lp.copies) && lp.copies[end].group == lp.copies[k].group {
					end++
				}
				buf = buf[:0]
				group := lp.copies[k:end]
				k = end
				if refusedByAll(group) {
					fn(append(buf, group[0].sent)) // of a sample there may be just one
					continue
				}
				for _, c := range group {
					if !c.lost && !c.refused {
						buf = append(buf, c.sent)
					}
				}
				fn(buf)
			}
		}
	}
}

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

package merge

import (
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// Where a tenant's sources send each series to several ingesters, one that is
// missing need not make a warning. This is the rule of docs/protocols/fetch.md,
// which errs on the side of warning.

const (
	// heardWithin is how old what a source said may be, while an ingester is
	// missing: it speaks every 3 s, and whenever something changed.
	heardWithin = 6 * time.Second
	// spokeWithin is how old it may be to tell of members that have restarted; long before,
	// the ring has told.
	spokeWithin = 15 * time.Second
	// rememberFor is how long it is remembered which sources a member has heard.
	rememberFor = time.Hour
	// maxRemembered bounds the tenants of which that is.
	maxRemembered = 100_000
)

// heard is what a member said of a tenant's sources when it last answered.
type heard struct {
	at       time.Time
	coverage []fetch.Coverage
	// gone is, while it is missing, the first time at which no source said any
	// more that it holds copies: what counts of it was published before. While
	// one still says so it is now.
	gone time.Time
}

// coverage is what is known of one request to all members.
type coverage struct {
	members []ring.Member
	answers []heading     // of those that answered
	missing []ring.Member // those that should have
	newest  map[uint64]fetch.Coverage
	single  bool // a source sends each series to one ingester only
}

// heading is what a member said beside its answer.
type heading struct {
	member ring.Member
	fetch.Header
}

// keyOf tells a member from what it was before it lost its memory.
func keyOf(m *ring.Member) string { return m.ID + "\x00" + m.Memory }

// collect finds what each source said last.
func (c *coverage) collect() {
	for i := range c.answers {
		for _, x := range c.answers[i].Coverage {
			if x.ReplicationFactor < 2 {
				c.single = true
				continue
			}
			if c.newest == nil {
				c.newest = map[uint64]fetch.Coverage{}
			}
			for _, id := range x.Sources {
				if have, ok := c.newest[id]; !ok || x.Age < have.Age {
					c.newest[id] = x
				}
			}
		}
	}
}

// replicated says whether several ingesters get each series of all sources.
func (c *coverage) replicated() bool { return len(c.newest) > 0 && !c.single }

// gone are the processes that hold copies, as the sources say, and that didn't
// answer: how many, and in how many zones.
func (c *coverage) gone(x *fetch.Coverage) (members, zones int) {
	seen := map[string]bool{}
	for _, o := range x.Holders {
		m := ring.Member{ID: o.Member}
		for i := range c.members {
			if c.members[i].ID == o.Member {
				m = c.members[i]
			}
		}
		if slices.ContainsFunc(c.answers, func(h heading) bool {
			return h.member.ID == o.Member && (string(h.Process) == o.Process || len(h.Process) == 0 && len(c.missing) == 0)
		}) {
			continue
		}
		if m.State == ring.Left {
			continue // it has flushed all
		}
		members++
		seen[m.Failure()] = true
	}
	return members, len(seen)
}

// covers says whether all that the missing members may have had is in those that
// answered, or in blocks by now. what is what the missing ones said before.
func (c *coverage) covers(what map[string]heard, now time.Time) bool {
	if !c.replicated() {
		return false
	}
	for i := range c.missing {
		h, ok := what[keyOf(&c.missing[i])]
		if !ok || now.Sub(h.at) > rememberFor {
			return false
		}
		for _, x := range h.coverage {
			if x.ReplicationFactor < 2 {
				return false
			}
			for _, source := range x.Sources {
				if _, ok := c.newest[source]; !ok {
					return false
				}
			}
		}
	}
	for _, x := range c.newest {
		if x.Age > heardWithin || !c.holds(&x) {
			return false
		}
	}
	return true
}

// holder says whether a source counts on copies in a process of a member.
func (c *coverage) holder(key string) bool {
	for _, x := range c.newest {
		if slices.ContainsFunc(x.Holders, func(o fetch.Holder) bool {
			return key == keyOf(&ring.Member{ID: o.Member, Memory: hex.EncodeToString([]byte(o.Process))})
		}) {
			return true
		}
	}
	return false
}

// holds says whether of all that a source has sent a copy is left.
func (c *coverage) holds(x *fetch.Coverage) bool {
	members, zones := c.gone(x)
	return members < x.Copies || zones < x.Zones
}

// restarted says whether processes that are others by now took some sources' last
// copies with them, and whether any went. It is for when no member is missing.
func (c *coverage) restarted() (lacking, some bool) {
	for _, x := range c.newest {
		if x.Age > spokeWithin {
			continue
		}
		if members, _ := c.gone(&x); members > 0 {
			some = true
			lacking = lacking || !c.holds(&x)
		}
	}
	return lacking, some
}

// remember keeps what members said of a tenant's sources, and gives what is known
// of it.
func (h *Heads) remember(tenant string, c *coverage, now time.Time) map[string]heard {
	if len(c.newest) == 0 && len(c.missing) == 0 {
		return nil // one replica, as ever
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.heard[tenant]
	if len(c.newest) > 0 {
		if all == nil {
			if len(h.heard) >= maxRemembered {
				clear(h.heard)
			}
			all = map[string]heard{}
			h.heard[tenant] = all
		}
		for i := range c.answers {
			all[keyOf(&c.answers[i].member)] = heard{at: now, coverage: c.answers[i].Coverage}
		}
	}
	out := map[string]heard{}
	for i := range c.missing {
		key := keyOf(&c.missing[i])
		x, ok := all[key]
		if !ok {
			continue
		}
		if x.gone.IsZero() && len(c.newest) > 0 && !c.holder(key) {
			x.gone = now
			all[key] = x
		}
		if out[key] = x; x.gone.IsZero() {
			x.gone = now
			out[key] = x
		}
	}
	if len(all) > 2*len(c.members)+8 {
		now := map[string]bool{}
		for i := range c.answers {
			now[keyOf(&c.answers[i].member)] = true
		}
		for i := range c.missing {
			now[keyOf(&c.missing[i])] = true
		}
		maps.DeleteFunc(all, func(key string, _ heard) bool { return !now[key] })
	}
	return out
}

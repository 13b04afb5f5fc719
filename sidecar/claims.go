package sidecar

import (
	"sort"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// claims is what a sidecar knows of the claims of a group of replicas, and by
// what rules it claims: docs/protocols/ha.md. It is pure and not safe for
// concurrent use. Times are in ms since the epoch.
type claims struct {
	group string
	lease int64 // ms

	known    []choice.Interval // ascending, disjoint; adjacent ones are of different replicas
	answered map[int64]int64   // when the days were last asked for
	newest   int64             // of the replica's own samples that have been read; noTime: none since the start
	// open are times that something waits for: the tail, a block, what is read
	// again. Since when answers say that they are undecided; 0: none has said so.
	open map[int64]int64
}

// ownership says whose samples of a time are.
type ownership uint8

const (
	undecided ownership = iota
	ours
	others
)

const (
	// maxClaim bounds the interval of a request, well within choice.MaxDays.
	maxClaim = 60 * index.ChoiceDay
	// oldAge is the age from which more than a lease is claimed at once, in ms.
	oldAge = int64(6 * time.Hour / time.Millisecond)
	// maxKnown bounds the intervals that are remembered.
	maxKnown = 200_000
	maxOpen  = 16
	// firstChosen bounds the times that something is chosen for.
	firstChosen = -1 << 59
)

func newClaims(group string, lease time.Duration) *claims {
	return &claims{group: group, lease: lease.Milliseconds(), answered: map[int64]int64{}, newest: noTime, open: map[int64]int64{}}
}

// at is the time that a sample's time stands for: the present where it is ahead of
// the clock by more than the clocks of Prometheus and sidecar may differ.
func (c *claims) at(t int64, now time.Time) int64 {
	if ms := now.UnixMilli(); t > ms+c.lease/4 {
		return ms
	}
	return t
}

// next returns the position of the first known interval that ends after t.
func (c *claims) next(t int64) int {
	return sort.Search(len(c.known), func(i int) bool { return c.known[i].Until > t })
}

// owner says who is chosen at t, as far as it is known.
func (c *claims) owner(replica string, t int64) ownership {
	if t < firstChosen {
		return ours
	}
	i := c.next(t)
	switch {
	case i == len(c.known) || c.known[i].From > t:
		return undecided
	case c.known[i].Replica == replica:
		return ours
	}
	return others
}

// hole returns the first undecided time from from until until.
func (c *claims) hole(from, until int64) (int64, bool) {
	from = max(from, firstChosen)
	for i := c.next(from); i < len(c.known) && c.known[i].From <= from; i++ {
		from = c.known[i].Until
	}
	return from, from < until
}

// renew returns the claim that makes a replica go on to be the chosen one, if it
// is due.
func (c *claims) renew(replica string, now time.Time) (choice.Request, bool) {
	i := c.next(c.newest)
	if i == len(c.known) || c.known[i].From > c.newest || c.known[i].Replica != replica {
		return choice.Request{}, false
	}
	end := c.known[i].Until
	if end-c.newest >= c.lease/4 || i+1 < len(c.known) && c.known[i+1].From == end {
		return choice.Request{}, false
	}
	return choice.Request{Group: c.group, Replica: replica, From: end, Until: c.newest + c.width(c.newest, now)}, true
}

// width is how much is claimed from t on: a lease, and more of what is too old to
// be in the logs of others.
func (c *claims) width(t int64, now time.Time) int64 {
	age := now.UnixMilli() - t
	if age < oldAge {
		return c.lease
	}
	return min(max(c.lease, age/16), maxClaim/2)
}

// want returns what to ask the gateway for, as t is undecided; until is up to
// where it may claim, 0 for the usual. It is false if the time has not come yet.
func (c *claims) want(replica string, t, until int64, now time.Time) (choice.Request, bool) {
	ms := now.UnixMilli()
	since, ok := c.open[t]
	if !ok {
		if len(c.open) >= maxOpen {
			clear(c.open)
		}
		c.open[t] = 0
	}
	from, before := t, (*choice.Interval)(nil)
	if i := c.next(t); i > 0 {
		if x := &c.known[i-1]; t-x.Until <= c.lease {
			before = x
		}
	}
	if until == 0 {
		if before != nil && c.newest != noTime && t-c.newest <= c.lease {
			from = before.Until
		}
		until = t + c.width(t, now)
	}
	claim := choice.Request{Group: c.group, Replica: replica, From: from, Until: min(until, from+maxClaim)}
	if before != nil && before.Replica == replica {
		return claim, true
	}
	day := choice.Day(t)
	asked := min(c.answered[day], c.answered[day-1]) // 0: one of them was not
	switch {
	case ms-asked >= c.lease/12 || asked > ms: // the clock was set back
		return choice.Request{Group: c.group, From: t - index.ChoiceDay, Until: t + 1}, true
	case !c.any(t-index.ChoiceDay, t+1):
		return claim, true
	case ms-t < c.lease || since == 0 || ms-since < c.lease/6:
		return choice.Request{}, false
	}
	return claim, true
}

// any says whether anything is decided from from until until.
func (c *claims) any(from, until int64) bool {
	i := c.next(from)
	return i < len(c.known) && c.known[i].From < until
}

// take takes an answer: all that is decided of the days that its request touches.
func (c *claims) take(q choice.Request, answer []choice.Interval, now time.Time) {
	first, last := choice.Day(q.From), choice.Day(q.Until-1)
	from, until := first*index.ChoiceDay, (last+1)*index.ChoiceDay
	if len(c.known) > maxKnown || len(c.answered) > maxKnown {
		c.known = nil // it is asked for again
		clear(c.answered)
	}
	old := c.known
	c.known = make([]choice.Interval, 0, len(old)+len(answer))
	for _, x := range old {
		c.add(x.From, min(x.Until, from), x.Replica)
	}
	for _, x := range answer {
		c.add(max(x.From, from), min(x.Until, until), x.Replica)
	}
	for _, x := range old {
		c.add(max(x.From, until), x.Until, x.Replica)
	}
	ms := now.UnixMilli()
	for d := first; d <= last; d++ {
		c.answered[d] = ms
	}
	for t, since := range c.open {
		switch {
		case t < from || t >= until:
		case c.owner("", t) != undecided:
			delete(c.open, t)
		case since == 0 || since > ms: // the clock was set back
			c.open[t] = ms
		}
	}
}

func (c *claims) add(from, until int64, replica string) {
	if from >= until {
		return
	}
	if n := len(c.known); n > 0 && c.known[n-1].Until == from && c.known[n-1].Replica == replica {
		c.known[n-1].Until = until
		return
	}
	c.known = append(c.known, choice.Interval{From: from, Until: until, Replica: replica})
}

// chosen says whether a replica is chosen at its newest sample.
func (c *claims) chosen(replica string) bool {
	return c.newest != noTime && c.owner(replica, c.newest) == ours
}

// Package choice decides which of several replicas is the source of a group's
// samples, for each time once and for ever.
//
// Replicas that scrape the same targets and have the same labels are a group.
// Each claims intervals of time, and an interval becomes its own as far as nothing of
// it is another's. The claims of a day are one row of the index, which is only ever replaced by
// one that says more: so no time has two owners, whatever the claimants do, how
// often they repeat themselves and what their clocks show. Who claims what and
// when is for them to find, see docs/protocols/ha.md.
package choice

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Interval is a time for which a replica is chosen.
type Interval = index.Choice

// Request claims an interval, or asks what of it is decided. As JSON it is what
// docs/protocols/ha.md says.
type Request struct {
	Group   string `json:"group"`
	Replica string `json:"replica,omitempty"` // empty: nothing is claimed
	From    int64  `json:"from"`              // ms since the epoch
	Until   int64  `json:"until"`             // ms, exclusive
	Source  string `json:"source,omitempty"`  // of the claimant: tells two of one name from each other; at most MaxSource bytes
}

// Answer says what is decided of the days that an interval touches.
type Answer struct {
	Intervals []Interval `json:"intervals"` // ascending and disjoint
	// Rival is another source that claims by the same name; empty: none is known.
	Rival string `json:"rival,omitempty"`
}

// Bounds of a request.
const (
	MaxReplica = 256      // bytes of a replica's name
	MaxSource  = 64       // bytes
	MaxGroup   = 64 << 10 // bytes of a group's name
	MaxDays    = 70       // that a request touches
)

// ErrInvalid is what an error wraps that is the caller's: its request can't be
// answered.
var ErrInvalid = errors.New("invalid claim")

// ErrContended is what a claim wraps that others have always been faster than.
var ErrContended = errors.New("too many claims at once")

// attempts to replace a row: each one that fails is another's success.
const attempts = 20

// Choices of all groups. Its methods may be called concurrently.
type Choices struct {
	index *index.Index
}

// New returns the choices that an index keeps.
func New(x *index.Index) *Choices { return &Choices{index: x} }

// Claim makes the time from from until until, in ms, the latter exclusive, the
// replica's, up to the first that is another's: what lies behind is claimed by
// whoever goes on there. It returns all intervals of the days that these times
// are in, ascending and disjoint; adjacent ones are of different replicas. It may
// be repeated: after an error, part of it may have happened.
func (c *Choices) Claim(ctx context.Context, tenant, group, replica string, from, until int64) ([]Interval, error) {
	if replica == "" || len(replica) > MaxReplica || !utf8.ValidString(replica) {
		return nil, fmt.Errorf("%w: a replica's name has 1 to %d bytes of UTF-8, this one has %d", ErrInvalid, MaxReplica, len(replica))
	}
	rows, first, err := c.rows(ctx, tenant, group, from, until, true)
	if err != nil {
		return nil, err
	}
	for i := range rows {
		day := (first + int64(i)) * index.ChoiceDay
		more, err := c.claim(ctx, &rows[i], replica, max(from, day), min(until, day+index.ChoiceDay))
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
	}
	return intervals(rows), nil
}

// Decided is Claim without claiming. What was decided just before the call may be
// missing.
func (c *Choices) Decided(ctx context.Context, tenant, group string, from, until int64) ([]Interval, error) {
	rows, _, err := c.rows(ctx, tenant, group, from, until, false)
	if err != nil {
		return nil, err
	}
	return intervals(rows), nil
}

// rows reads the rows of the days of an interval; those that aren't there are
// empty.
func (c *Choices) rows(ctx context.Context, tenant, group string, from, until int64, consistent bool) ([]index.ChoiceRow, int64, error) {
	if len(group) > MaxGroup {
		return nil, 0, fmt.Errorf("%w: the name of a group has %d bytes, the limit is %d", ErrInvalid, len(group), MaxGroup)
	}
	if from >= until || !possible(from) || !possible(until) {
		return nil, 0, fmt.Errorf("%w: from %d until %d ms is no interval", ErrInvalid, from, until)
	}
	first, last := Day(from), Day(until-1)
	if last-first >= MaxDays {
		return nil, 0, fmt.Errorf("%w: from %d until %d ms are %d days, the limit is %d", ErrInvalid, from, until, last-first+1, MaxDays)
	}
	found, err := c.index.Choices(ctx, tenant, group, first, last, consistent)
	if err != nil {
		return nil, 0, err
	}
	rows := make([]index.ChoiceRow, last-first+1)
	for i := range rows {
		rows[i] = index.ChoiceRow{Tenant: tenant, Group: group, Day: first + int64(i)}
	}
	for _, r := range found {
		rows[r.Day-first] = r
	}
	return rows, first, nil
}

// claim makes a part of a day the replica's. It returns true if all of it is.
func (c *Choices) claim(ctx context.Context, row *index.ChoiceRow, replica string, from, until int64) (bool, error) {
	for try := range attempts {
		if err := pause(ctx, try); err != nil {
			return false, err
		}
		end := until
		for _, x := range row.Choices {
			if x.Replica != replica && x.Until > from {
				end = max(from, min(end, x.From))
				break
			}
		}
		choices, changed := fill(row.Choices, Interval{From: from, Until: end, Replica: replica})
		if !changed {
			return end == until, nil
		}
		if len(choices) > index.MaxChoices {
			return false, fmt.Errorf("%w: %d intervals in a day, the limit is %d: do more than one replica, or two of one name, claim in turn?", ErrInvalid, len(choices), index.MaxChoices)
		}
		got, err := c.index.PutChoices(ctx, *row, choices)
		if err != nil && !errors.Is(err, index.ErrConflict) {
			return false, err
		}
		*row = got
		if err == nil {
			return end == until, nil
		}
	}
	return false, fmt.Errorf("claim of tenant %s, replica %s: %w", row.Tenant, replica, ErrContended)
}

// pause before a further attempt.
func pause(ctx context.Context, try int) error {
	if try == 0 {
		return nil
	}
	select {
	case <-time.After(rand.N(time.Duration(try) * 5 * time.Millisecond)):
		return nil
	case <-ctx.Done():
		return fmt.Errorf("claim: %w", ctx.Err())
	}
}

// fill adds what is undecided of an interval to the intervals of a day, and joins
// adjacent ones of the same replica.
func fill(old []Interval, add Interval) ([]Interval, bool) {
	var out []Interval
	put := func(x Interval) {
		if n := len(out); n > 0 && out[n-1].Until == x.From && out[n-1].Replica == x.Replica {
			out[n-1].Until = x.Until
			return
		}
		out = append(out, x)
	}
	changed := false
	undecided := func(from, until int64) {
		if from, until = max(from, add.From), min(until, add.Until); from < until {
			put(Interval{From: from, Until: until, Replica: add.Replica})
			changed = true
		}
	}
	at := add.From
	for _, x := range old {
		undecided(at, x.From)
		put(x)
		at = max(at, x.Until)
	}
	undecided(at, add.Until)
	return out, changed
}

// intervals joins the intervals of rows.
func intervals(rows []index.ChoiceRow) []Interval {
	out := []Interval{}
	for _, r := range rows {
		for _, x := range r.Choices {
			if n := len(out); n > 0 && out[n-1].Until == x.From && out[n-1].Replica == x.Replica {
				out[n-1].Until = x.Until
				continue
			}
			out = append(out, x)
		}
	}
	return slices.Clip(out)
}

// possible says whether a time's day can be a row's.
func possible(t int64) bool { return t > -1<<60 && t < 1<<60 }

// Day is the day that a time in ms is in: the row it belongs to.
func Day(t int64) int64 {
	d := t / index.ChoiceDay
	if t%index.ChoiceDay < 0 {
		d--
	}
	return d
}

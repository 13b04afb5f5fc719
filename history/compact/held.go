package compact

import (
	"context"
	"errors"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// A job can't go on for as long as block rows of one of its tenants can't be
// written or removed, as where DynamoDB throttles by key, or one of its blocks or rows
// can't be read. It must not keep others
// from its slot: after a while it is parked, in a slot that no group falls
// into, and is tried again there, seldom.
const (
	parkedSlots  = 128 // of a level: from this slot on
	maxHeldPause = 10 * time.Minute
)

// heldError is that of a job that waits.
type heldError struct{ err error }

func (e *heldError) Error() string { return e.err.Error() }
func (e *heldError) Unwrap() error { return e.err }

// ofOneBlock says whether an error is of one block or row, and of no other.
func ofOneBlock(err error) bool {
	if _, ok := errors.AsType[*BlockError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*history.PageError](err); ok {
		return true
	}
	_, ok := errors.AsType[*index.RowError](err)
	return ok
}

// heldJob is a job that waits.
type heldJob struct {
	since, next time.Time
	pause       time.Duration
	err         error
}

// carryOn is advance for a job that may be held, or parked.
func (c *Compactor) carryOn(ctx context.Context, v *view, j index.Job) error {
	if twin, ok := v.twin(j); ok {
		// It is on its way into another slot. What is done to one of two would be
		// done to the other too, perhaps when its outputs are long replaced. Of two that
		// are parked everybody frees the same.
		if j.Slot < parkedSlots || twin.Slot >= parkedSlots && j.Slot > twin.Slot {
			twin = j
		}
		return c.step(ctx, twin, index.Job{Level: twin.Level, Slot: twin.Slot, ID: twin.ID})
	}
	h := c.held[j.ID]
	if h != nil && c.now().Before(h.next) {
		return nil
	}
	err := c.advance(ctx, j)
	if _, held := errors.AsType[*heldError](err); !held && !ofOneBlock(err) || ctx.Err() != nil {
		if err == nil && h != nil {
			c.setHeld(j.ID, nil)
		}
		return err
	}
	again := &heldJob{since: c.now(), pause: c.o.Lease, err: err}
	if h != nil {
		again.since, again.pause = h.since, min(2*h.pause, maxHeldPause)
	}
	again.next = c.now().Add(again.pause)
	c.setHeld(j.ID, again)
	if h != nil && j.Slot < parkedSlots {
		err = errors.Join(err, c.park(ctx, j))
	}
	return err
}

// twin is the job in the other one of two slots, where a job is being parked.
func (v *view) twin(j index.Job) (index.Job, bool) {
	for _, x := range v.jobs {
		if x.Level == j.Level && x.Slot != j.Slot && x.ID == j.ID && x.State != index.JobIdle && j.State != index.JobIdle {
			return x, true
		}
	}
	return index.Job{}, false
}

// park frees the slot of a job. Whoever sees the job in both slots frees the
// first one, before anything else.
func (c *Compactor) park(ctx context.Context, j index.Job) error {
	jobs, err := c.o.Index.Jobs(ctx)
	if err := readable(err); err != nil {
		return err
	}
	v := &view{jobs: jobs, taken: taken(err)}
	if _, ok := v.twin(j); ok {
		return nil // another is at it
	}
	if now := v.job(slotKey{j.Level, j.Slot}); now.ID != j.ID || now.State != j.State {
		return nil // it went on
	}
	for slot := parkedSlots; slot < 256; slot++ {
		k := slotKey{j.Level, uint8(slot)} //nolint:gosec // below 256
		old := v.job(k)
		if old.State != index.JobIdle || v.taken[k] {
			continue
		}
		next := j
		next.Slot = k.slot
		if err := c.o.Index.SwapJob(ctx, old, next); err != nil {
			if errors.Is(err, index.ErrConflict) {
				return nil
			}
			return err
		}
		c.logger.Warn("compaction waits: it is parked and tried again, others go on",
			"job", j.ID, "level", j.Level, "state", j.State.String(), "sources", len(j.Sources), "blocks", len(j.Outputs))
		return c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID})
	}
	return nil // then it keeps its slot
}

func (c *Compactor) setHeld(id ulid.ULID, h *heldJob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h == nil {
		delete(c.held, id)
	} else {
		c.held[id] = h
	}
	c.metrics.held.Set(float64(len(c.held)))
}

// forgetHeld forgets jobs that are no more.
func (c *Compactor) forgetHeld(v *view) {
	there := map[ulid.ULID]bool{}
	for _, j := range v.jobs {
		there[j.ID] = there[j.ID] || j.State != index.JobIdle
	}
	for id := range c.held {
		if !there[id] {
			c.setHeld(id, nil)
		}
	}
}

package compact

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// One block, row or job that gives trouble must not keep compaction from the others:
//   - A block that is absent, damaged or impossible is set aside, for good.
//   - One that fails in another way, as where access is denied, is postponed: left out
//     of groups, for longer and longer, and tried again.
//   - A work row that can't be read is made again from its block.
//   - An output that is lost before it is visible is made again from its sources, which
//     are there still.

const (
	strikesUntilAside    = 2
	strikesUntilPostpone = 3
	minPostponed         = 5 * time.Minute
	maxPostponed         = 6 * time.Hour
)

// postponed is a block that could not be read, and not because of what it is.
type postponed struct {
	fails int
	since time.Time
	until time.Time // zero: not postponed yet
	err   error
}

// postpone notes that a block could not be read, or its guard row. The third time in a
// row it is left out for a while.
func (c *Compactor) postpone(block ulid.ULID, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.postponed[block]
	if p == nil {
		p = &postponed{since: c.now()}
		c.postponed[block] = p
	}
	p.err = err
	if p.fails++; p.fails < strikesUntilPostpone {
		return
	}
	pause := min(maxPostponed, minPostponed<<min(p.fails-strikesUntilPostpone, 16))
	p.until = c.now().Add(pause)
	c.logger.Warn("block can't be read at present: it is left out and tried again, others are compacted", "block", block, "again_in", pause, "err", err)
}

// leftOut says whether a block is postponed.
func (c *Compactor) leftOut(block ulid.ULID) bool {
	p := c.postponed[block]
	return p != nil && c.now().Before(p.until)
}

// forgetPostponed forgets what was tried for the last time long ago: it is there no more.
func (c *Compactor) forgetPostponed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for id, p := range c.postponed {
		if !p.until.IsZero() {
			n++
		}
		if !p.until.IsZero() && c.now().Sub(p.until) > maxPostponed {
			delete(c.postponed, id)
		}
	}
	c.metrics.postponed.Set(float64(n))
}

// unreadableRows tells of rows that can't be read, of each once.
func (c *Compactor) unreadableRows(bad index.RowErrors) {
	c.mu.Lock()
	known := c.status.Unreadable
	if c.status.Unreadable = bad; len(known) == 0 {
		c.status.UnreadableSince = c.now()
	}
	c.mu.Unlock()
	for _, e := range bad {
		if !slices.ContainsFunc(known, func(k *index.RowError) bool { return k.Hash == e.Hash && string(k.Range) == string(e.Range) }) {
			c.logger.Error("index row can't be read: it is left out, others are compacted", "hash", e.Hash, "range", fmt.Sprintf("%x", e.Range), "err", e.Err)
		}
	}
	c.metrics.unreadable.Set(float64(len(bad)))
}

// rowLost is in the reason of blocks that are set aside because of their work row.
const rowLost = "its work row can't be read"

// replaceWork sets blocks aside whose work rows are damaged: takeBack makes those anew.
// Rows of a version that isn't known are left to programs that know it.
func (c *Compactor) replaceWork(ctx context.Context, v *view) error {
	var errs []error
	for _, e := range v.bad {
		id, ok := e.WorkOf()
		if !ok || v.busy[id] || !errors.Is(e, index.ErrCorrupt) {
			continue
		}
		a := index.AsideRow{BlockRef: index.BlockRef{Block: id, Object: history.ObjectKey(id)}, Reason: fmt.Sprintf("%s: %v", rowLost, e)}
		if err := c.describe(ctx, &a); err != nil {
			errs = append(errs, fmt.Errorf("block %s, of which the work row can't be read: %w", id, err))
			continue
		}
		if err := c.o.Index.ReplaceWork(ctx, e, a); err != nil {
			errs = append(errs, fmt.Errorf("set block %s aside: %w", id, err))
			continue
		}
		v.aside[id] = true
		v.asideRows = append(v.asideRows, a)
	}
	return errors.Join(errs...)
}

// describe finds out size and level of a block, as far as that can be found out.
func (c *Compactor) describe(ctx context.Context, a *index.AsideRow) error {
	var err error
	if a.ObjectSize, err = c.o.Objects.Size(ctx, a.Object); err != nil {
		if errors.Is(err, object.ErrNotExist) {
			return nil
		}
		return err
	}
	f, err := readFooter(ctx, c.o.Objects, a.BlockRef)
	if err != nil {
		if unreadable(err) != "" {
			return nil
		}
		return err
	}
	if len(f.Tenants) > 0 {
		a.Level, _, err = c.levelOf(ctx, a.BlockRef, &f.Tenants[0])
	}
	return err
}

// takeBack gives blocks back to compaction that were set aside because a program of before
// didn't know their version, or because of their work row.
func (c *Compactor) takeBack(ctx context.Context, v *view) error {
	var errs []error
	for _, a := range v.asideRows {
		if v.busy[a.Block] || !strings.Contains(a.Reason, chunkfmt.ErrVersion.Error()) && !strings.Contains(a.Reason, rowLost) {
			continue
		}
		err := Readmit(ctx, c.o.Objects, c.o.Index, index.JobSource{BlockRef: a.BlockRef, Level: a.Level}, c.o.Ranges)
		if unreadable(err) != "" {
			continue // by this program too
		}
		if err == nil || errors.Is(err, ErrCondemned) {
			err = c.o.Index.DeleteAside(ctx, a.Block)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("take back block %s: %w", a.Block, err))
			continue
		}
		delete(v.aside, a.Block)
		c.logger.Info("block that was set aside can be read: it is compacted", "block", a.Block, "level", a.Level, "reason", a.Reason)
	}
	return errors.Join(errs...)
}

// lostOutput is called if the blocks of a job that isn't published can't be read. The
// second time that it is an output, the job is given up: its sources are as they were.
func (c *Compactor) lostOutput(ctx context.Context, j index.Job, err error) error {
	var bad *BlockError
	if !errors.As(err, &bad) || !slices.ContainsFunc(j.Outputs, func(o index.CompactedRow) bool { return o.Block == bad.Block }) {
		return err
	}
	if reason := unreadable(err); reason != "missing" && reason != "corrupt" {
		return err
	}
	if c.strikes[bad.Block]++; c.strikes[bad.Block] < strikesUntilAside {
		return err
	}
	delete(c.strikes, bad.Block)
	for _, s := range j.Sources {
		state, err := c.o.Index.GuardState(ctx, s.Block)
		if err != nil {
			return err
		}
		if state == index.Condemned { // what was parked twice may have been done long ago
			return c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID})
		}
	}
	next := j
	next.State = index.JobAborted
	if err := c.o.Index.SwapJob(ctx, j, next); err != nil {
		if errors.Is(err, index.ErrConflict) {
			return nil
		}
		return err
	}
	c.metrics.jobs.WithLabelValues(levelLabel(j.Level), "failed").Inc()
	c.logger.Error("block that a compaction has made can't be read: it is made again", "level", j.Level, "block", bad.Block, "object", bad.Object,
		"page", bad.Page, "offset", bad.Offset, "err", bad.Err)
	return c.undo(ctx, next)
}

// undo condemns what an aborted job has made, and removes its rows. Sweepers remove the
// objects.
func (c *Compactor) undo(ctx context.Context, j index.Job) error {
	var ids []ulid.ULID
	for _, o := range j.Outputs {
		// First, so that whoever writes rows still takes them back.
		if err := c.o.Index.Condemn(ctx, o.Block); err != nil {
			return err
		}
		ids = append(ids, o.Block)
	}
	rows, lost, err := c.rowsOf(ctx, outputsOf(j))
	if err != nil {
		return err
	}
	found, err := c.findRows(ctx, j, lost)
	if err != nil {
		return err
	}
	rows = append(rows, found...)
	if err := c.o.Index.DeleteRows(ctx, rows); err != nil {
		return &heldError{fmt.Errorf("rows of blocks that are condemned: %w", err)}
	}
	return c.o.Index.DeleteCompacted(ctx, ids)
}

package compact

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// errLost says that another compactor has taken over.
var errLost = errors.New("another compactor has taken over the job")

// tryGroup merges a group if its slot is free. It says whether it has: then there
// may be more to do.
func (c *Compactor) tryGroup(ctx context.Context, v *view, g *group) (bool, error) {
	if v.taken[g.slotKey] {
		return false, nil
	}
	old := v.job(g.slotKey)
	switch old.State {
	case index.JobIdle:
	case index.JobMerging:
		if !c.expired(old) {
			return false, nil
		}
	default:
		return false, nil
	}
	if sources, err := c.published(ctx, g.sources); err != nil || len(sources) == 0 || g.clean && len(sources) < len(g.sources) {
		if err == nil && g.clean {
			delete(c.cleaner.todo, g.sources[0].Block) // merged meanwhile
		}
		return false, err
	}
	id, err := ulid.New(ulid.Timestamp(c.now()), c.entropy)
	if err != nil {
		return false, fmt.Errorf("new job id: %w", err)
	}
	j := index.Job{Level: g.level, Slot: g.slot, State: index.JobMerging, Owner: c.owner, ID: id}
	if err := c.o.Index.SwapJob(ctx, old, j); err != nil {
		if errors.Is(err, index.ErrConflict) {
			return false, nil
		}
		return false, err
	}
	// What was seen before the slot was ours may be done already.
	worked, err := c.run(ctx, &j, g)
	if errors.Is(err, errLost) {
		c.metrics.jobs.WithLabelValues(levelLabel(g.makes), "lost").Inc()
		return worked, nil
	}
	if j.State == index.JobMerging {
		idle := index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID}
		err = errors.Join(err, c.step(context.WithoutCancel(ctx), j, idle))
	}
	return worked, err
}

// freeSlots frees slots of merges that nobody is at any more. Those that are wanted
// again have been taken over before.
func (c *Compactor) freeSlots(ctx context.Context, v *view) error {
	for _, j := range v.jobs {
		if j.State == index.JobMerging && c.expired(j) {
			if err := c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID}); err != nil {
				return err
			}
		}
	}
	return nil
}

// expired says of a merge whether its slot may be taken: whoever was at it has been silent
// for longer than its lease, or was this compactor.
func (c *Compactor) expired(j index.Job) bool {
	return j.Owner == c.owner || c.now().Sub(c.seen[slotKey{j.Level, j.Slot}].since) >= c.o.Lease
}

// published leaves of sources those that their writers have published. A work
// row of one that is condemned is a remainder. One of which that can't be read is left
// out.
func (c *Compactor) published(ctx context.Context, sources []index.JobSource) ([]index.JobSource, error) {
	var out []index.JobSource
	for _, s := range sources {
		state, err := c.o.Index.GuardState(ctx, s.Block)
		if bad, ok := errors.AsType[*index.RowError](err); ok {
			c.postpone(s.Block, bad)
			continue
		}
		if err != nil {
			return nil, err
		}
		switch state {
		case index.Published:
			out = append(out, s)
		case index.Condemned:
			if err := c.deleteWork(ctx, s); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func (c *Compactor) deleteWork(ctx context.Context, s index.JobSource) error {
	if s.Level > 0 {
		return c.o.Index.DeleteCompacted(ctx, []ulid.ULID{s.Block})
	}
	w := index.NewWorkRow(s.Block)
	w.Object, w.ObjectSize = s.Object, s.ObjectSize
	return c.o.Index.DeleteWork(ctx, w)
}

// run merges the group in a slot that is ours, commits and publishes it. j is the
// job as it was written last.
func (c *Compactor) run(ctx context.Context, j *index.Job, g *group) (bool, error) {
	v, err := c.look(ctx)
	if err != nil {
		return false, err
	}
	var sources []index.JobSource
	if g.clean {
		if x := c.cleaner.todo[g.sources[0].Block]; x != nil {
			if again := c.cleanGroup(v, x); again != nil && again.slotKey == g.slotKey {
				sources, g = again.sources, again
			}
		}
	} else if i := slices.IndexFunc(c.groups(v), func(h *group) bool {
		return h.level == g.level && h.window == g.window && h.tenant == g.tenant
	}); i >= 0 {
		sources = c.groups(v)[i].sources
	}
	all := len(sources)
	if sources, err = c.published(ctx, sources); err != nil || g.clean && len(sources) < all {
		return false, err
	}
	if len(g.thin) > 0 {
		// Others may have come since it was surveyed.
		all, thin, err := c.closed(ctx, v, sources, g.thin)
		if err != nil {
			if ofOneBlock(err) {
				delete(c.cleaner.todo, g.sources[0].Block) // until the next survey
			}
			return false, err
		}
		if len(all) > len(sources) || len(thin) < len(g.thin) {
			delete(c.cleaner.todo, g.sources[0].Block) // until the next survey
			return false, nil
		}
	}
	start := c.now()
	beaten, settled := start, true
	beat := func(ctx context.Context) error {
		now := c.now()
		if now.Sub(beaten) < c.o.Lease/4 {
			return nil
		}
		beaten = now
		next := *j
		next.Beat++
		err := c.o.Index.SwapJob(ctx, *j, next)
		if errors.Is(err, index.ErrConflict) {
			return errLost
		}
		if settled = err == nil; settled {
			*j = next
		} // else it may have been written or not: the next beat writes the same
		return nil
	}
	var outputs []index.CompactedRow
	for {
		if len(sources) == 0 {
			return false, nil
		}
		var taken int
		outputs, taken, err = c.mergeInto(ctx, g, sources, beat)
		if err == nil {
			sources = sources[:taken] // the others are next
			break
		}
		var bad *BlockError
		if !errors.As(err, &bad) || ctx.Err() != nil {
			break
		}
		if unreadable(err) == "" {
			c.postpone(bad.Block, err)
			break
		}
		if sources, err = c.strike(ctx, sources, bad); err != nil {
			break
		}
	}
	if err != nil {
		return false, err
	}
	if !settled {
		next := *j
		next.Beat++
		if err := c.swap(ctx, *j, next); err != nil {
			return false, err
		}
		*j = next
	}
	next := *j
	next.State, next.Owner, next.Sources, next.Outputs = index.JobCommitted, "", sources, outputs
	if err := c.swap(ctx, *j, next); err != nil {
		// It may be committed all the same: then it is carried on, by us or by
		// another. If not, the sweeper finds what was put.
		j.State = index.JobIdle // not ours to release
		return false, err
	}
	*j = next
	c.mu.Lock()
	for _, s := range sources {
		delete(c.postponed, s.Block)
	}
	c.mu.Unlock()
	if err := c.publish(ctx, *j); err != nil {
		return false, err
	}
	c.metrics.jobs.WithLabelValues(levelLabel(g.makes), "done").Inc()
	c.metrics.duration.WithLabelValues(levelLabel(g.makes)).Observe(c.now().Sub(start).Seconds())
	var size int64
	for _, o := range outputs {
		size += o.ObjectSize
	}
	if g.clean {
		c.logger.Info("cleaned", "level", g.makes, "source", g.sources[0].Block, "sources", len(sources), "blocks", len(outputs), "size_bytes", size, "duration", c.now().Sub(start))
		return true, nil
	}
	c.logger.Info("compacted", "level", j.Level, "window_end", windowEnd(g.window, c.o.Ranges[j.Level-1].Milliseconds()), "tenant", g.tenant,
		"sources", len(sources), "blocks", len(outputs), "size_bytes", size, "duration", c.now().Sub(start))
	return true, nil
}

func windowEnd(window, width int64) time.Time {
	_, end := bounds(window, window, width)
	return time.UnixMilli(end).UTC()
}

// swap is SwapJob that tries thrice, for much work is lost if it fails.
func (c *Compactor) swap(ctx context.Context, old, next index.Job) (err error) {
	for range 3 {
		if err = c.o.Index.SwapJob(ctx, old, next); err == nil || ctx.Err() != nil {
			return err
		}
		if errors.Is(err, index.ErrConflict) {
			return errors.Join(errLost, err)
		}
	}
	return err
}

// strike notes that a source can't be read. The second time it is set aside: it
// stays where it is, with its rows, and the others go on without it.
func (c *Compactor) strike(ctx context.Context, sources []index.JobSource, bad *BlockError) ([]index.JobSource, error) {
	i := slices.IndexFunc(sources, func(s index.JobSource) bool { return s.Block == bad.Block })
	if i < 0 {
		return nil, bad
	}
	// Who is late finds blocks gone that others have compacted meanwhile.
	state, err := c.o.Index.GuardState(ctx, bad.Block)
	if err != nil {
		return nil, err
	}
	if state == index.Condemned {
		return nil, errLost
	}
	if c.strikes[bad.Block]++; c.strikes[bad.Block] < strikesUntilAside {
		return sources, nil
	}
	delete(c.strikes, bad.Block)
	s := sources[i]
	reason := unreadable(bad)
	if err := c.o.Index.PutAside(ctx, index.AsideRow{BlockRef: s.BlockRef, Level: s.Level, Reason: bad.Error()}); err != nil {
		return nil, fmt.Errorf("set block %s aside: %w", s.Block, err)
	}
	if err := c.deleteWork(ctx, s); err != nil {
		return nil, fmt.Errorf("set block %s aside: %w", s.Block, err)
	}
	c.metrics.aside.WithLabelValues(reason).Inc()
	c.logger.Error("block can't be read: it is left as it is, and queries go on to name it", "block", s.Block, "object", s.Object,
		"page", bad.Page, "offset", bad.Offset, "reason", reason, "err", bad.Err)
	return slices.Delete(slices.Clone(sources), i, i+1), nil
}

// advance carries a job on if its time has come.
func (c *Compactor) advance(ctx context.Context, j index.Job) error {
	age := c.now().Sub(c.seen[slotKey{j.Level, j.Slot}].since)
	switch {
	case j.State == index.JobCommitted && age >= c.o.Lease: // who committed it would have
		return c.publish(ctx, j)
	case j.State == index.JobPublished && age >= c.o.Grace:
		return c.removeRows(ctx, j)
	case j.State == index.JobRemoved && age >= c.o.Grace:
		return c.removeObjects(ctx, j)
	case j.State == index.JobAborted:
		if err := c.undo(ctx, j); err != nil || age < c.o.Grace {
			return err // as long as it is there, no sweeper takes what readers may know of
		}
		return c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID})
	}
	return nil
}

// step changes a job's state. That another did is no error.
func (c *Compactor) step(ctx context.Context, j, next index.Job) error {
	if err := c.o.Index.SwapJob(ctx, j, next); err != nil && !errors.Is(err, index.ErrConflict) {
		return err
	}
	return nil
}

// publish writes the rows of a committed job. Several may do it at the same time,
// and one may be so late that the job is done, and its outputs even replaced.
func (c *Compactor) publish(ctx context.Context, j index.Job) error {
	// The guard rows come first, so that no sweeper takes what is visible.
	for _, o := range j.Outputs {
		state, err := c.o.Index.Guard(ctx, o.Block, index.Published)
		if err != nil {
			return err
		}
		if state != index.Published {
			return c.abort(ctx, j)
		}
	}
	first, last, err := c.outputRows(ctx, j)
	if err != nil {
		if late, lateErr := c.withdraw(ctx, j.Outputs, nil); late {
			return lateErr
		}
		return c.lostOutput(ctx, j, err)
	}
	again := slices.DeleteFunc(slices.Clone(j.Outputs), func(o index.CompactedRow) bool { return o.Level >= c.top() })
	if len(again) > 0 {
		if err := c.o.Index.PutCompacted(ctx, again); err != nil {
			return fmt.Errorf("work rows: %w", err)
		}
	}
	if bug.Is(bug.RemovedEarly) {
		rows, err := c.sourceRows(ctx, j)
		if err = errors.Join(err, c.o.Index.DeleteRows(ctx, rows)); err != nil {
			return err
		}
	}
	// Of each tenant for itself: the last row is what makes its others count.
	left, err := history.PutRows(ctx, c.o.Index, first)
	if err != nil {
		return fmt.Errorf("block rows: %w", err)
	}
	last = slices.DeleteFunc(last, func(r index.BlockRow) bool { return left[r.Tenant] != nil })
	more, err := history.PutRows(ctx, c.o.Index, last)
	if err != nil {
		return fmt.Errorf("block rows: %w", err)
	}
	if late, err := c.withdraw(ctx, j.Outputs, slices.Concat(first, last)); late || err != nil {
		return err
	}
	for tenant, err := range more {
		if left == nil {
			left = map[string]error{}
		}
		left[tenant] = err
	}
	if len(left) > 0 {
		return &heldError{&history.RowsError{Published: true, Tenants: left}}
	}
	next := j
	next.State = index.JobPublished
	return c.step(ctx, j, next)
}

// outputRows are the rows of a job's outputs: those that say what is replaced
// apart, one for each tenant.
func (c *Compactor) outputRows(ctx context.Context, j index.Job) (first, last []index.BlockRow, err error) {
	byTenant := map[string][]index.BlockRow{}
	for _, o := range j.Outputs {
		f, err := readFooter(ctx, c.o.Objects, o.BlockRef)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range history.Rows(o.BlockRef, o.Level, f.Tenants) {
			byTenant[r.Tenant] = append(byTenant[r.Tenant], r)
		}
	}
	replaced := map[string][]index.RowID{}
	sources, err := c.sourceRows(ctx, j)
	if err != nil {
		return nil, nil, err
	}
	for i := range sources {
		replaced[sources[i].Tenant] = append(replaced[sources[i].Tenant], sources[i].ID())
	}
	for tenant, rows := range byTenant {
		// Queries are mostly about what is new: there they see the last.
		slices.SortFunc(rows, func(a, b index.BlockRow) int { return cmp.Or(cmp.Compare(a.MaxT, b.MaxT), a.Block.Compare(b.Block)) })
		n := len(rows) - 1
		for _, r := range rows[:n] {
			rows[n].Siblings = append(rows[n].Siblings, index.Sibling{RowID: r.ID(), MinT: r.MinT})
		}
		rows[n].Replaces = replaced[tenant]
		first, last = append(first, rows[:n]...), append(last, rows[n])
	}
	byID := func(a, b index.BlockRow) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.MaxT, b.MaxT))
	}
	slices.SortStableFunc(first, byID)
	slices.SortStableFunc(last, byID)
	return first, last, nil
}

// sourceRows are the block rows of a job's sources, but of such that are gone already.
func (c *Compactor) sourceRows(ctx context.Context, j index.Job) ([]index.BlockRow, error) {
	rows, lost, err := c.rowsOf(ctx, j.Sources)
	if err != nil {
		return nil, err
	}
	for id := range lost {
		state, err := c.o.Index.GuardState(ctx, id)
		if err != nil {
			return nil, err
		}
		if state == index.Condemned {
			delete(lost, id) // we are late: all this is done
		}
	}
	found, err := c.findRows(ctx, j, lost)
	return append(rows, found...), err
}

// rowsOf are the block rows of blocks, which follow from them. lost are those that can't
// be read any more.
func (c *Compactor) rowsOf(ctx context.Context, blocks []index.JobSource) (rows []index.BlockRow, lost map[ulid.ULID]bool, err error) {
	lost = map[ulid.ULID]bool{}
	for _, s := range blocks {
		f, err := readFooter(ctx, c.o.Objects, s.BlockRef)
		switch {
		case err == nil:
			rows = append(rows, history.Rows(s.BlockRef, s.Level, f.Tenants)...)
		case unreadable(err) == "":
			return nil, nil, err
		default:
			lost[s.Block] = true
		}
	}
	return rows, lost, nil
}

// findRows looks for the block rows of blocks of a job that can't be read: their tenants
// are among those of the others.
func (c *Compactor) findRows(ctx context.Context, j index.Job, lost map[ulid.ULID]bool) ([]index.BlockRow, error) {
	if len(lost) == 0 {
		return nil, nil
	}
	others, _, err := c.rowsOf(ctx, slices.Concat(j.Sources, outputsOf(j)))
	if err != nil {
		return nil, err
	}
	var out []index.BlockRow
	asked := map[string]bool{}
	for i := range others {
		tenant := others[i].Tenant
		if asked[tenant] {
			continue
		}
		asked[tenant] = true
		rows, err := c.o.Index.AllBlocks(ctx, tenant)
		if err != nil {
			return nil, err
		}
		out = append(out, slices.DeleteFunc(rows, func(r index.BlockRow) bool { return !lost[r.Block] })...)
	}
	return out, nil
}

// outputsOf are the blocks that a job has made.
func outputsOf(j index.Job) (out []index.JobSource) {
	for _, o := range j.Outputs {
		out = append(out, index.JobSource{BlockRef: o.BlockRef, Level: o.Level})
	}
	return out
}

// withdraw takes back the rows of outputs that are condemned: then this job has
// been done long ago, and the outputs have been replaced since. It says whether
// there were any.
func (c *Compactor) withdraw(ctx context.Context, outputs []index.CompactedRow, rows []index.BlockRow) (bool, error) {
	gone := map[ulid.ULID]bool{}
	for _, o := range outputs {
		state, err := c.o.Index.GuardState(ctx, o.Block)
		if err != nil {
			return false, err
		}
		if state == index.Condemned {
			gone[o.Block] = true
		}
	}
	if len(gone) == 0 {
		return false, nil
	}
	var ids []ulid.ULID
	for id := range gone {
		ids = append(ids, id)
	}
	rows = slices.DeleteFunc(rows, func(r index.BlockRow) bool { return !gone[r.Block] })
	return true, errors.Join(c.o.Index.DeleteRows(ctx, rows), c.o.Index.DeleteCompacted(ctx, ids))
}

// abort gives up a job because a sweeper has condemned one of its outputs, which
// takes a merge of a day. Its sources are as they were.
func (c *Compactor) abort(ctx context.Context, j index.Job) error {
	if late, err := c.visible(ctx, j); err != nil {
		return err
	} else if late { // what was parked twice may have been done long ago
		return c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID})
	}
	next := j
	next.State = index.JobAborted
	if err := c.o.Index.SwapJob(ctx, j, next); err != nil {
		if errors.Is(err, index.ErrConflict) {
			return nil // we are late: it was done, and that output has been replaced since
		}
		return err
	}
	c.logger.Warn("outputs of a compaction were taken for orphans: it is done again", "level", j.Level)
	return c.undo(ctx, next)
}

// visible says whether an output of a job has a row: then none of them was taken for
// an orphan.
func (c *Compactor) visible(ctx context.Context, j index.Job) (bool, error) {
	for _, o := range j.Outputs {
		f, err := readFooter(ctx, c.o.Objects, o.BlockRef)
		if err != nil {
			if unreadable(err) == "" {
				return false, err
			}
			continue // it is gone
		}
		for _, t := range f.Tenants {
			rows, err := c.o.Index.AllBlocks(ctx, t.Tenant)
			if err != nil {
				return false, err
			}
			if slices.ContainsFunc(rows, func(r index.BlockRow) bool { return r.Block == o.Block }) {
				return true, nil
			}
		}
	}
	return false, nil
}

func (c *Compactor) removeRows(ctx context.Context, j index.Job) error {
	for _, o := range j.Outputs {
		// Nothing goes while what replaces it is lost.
		if _, err := readFooter(ctx, c.o.Objects, o.BlockRef); err != nil {
			state, guardErr := c.o.Index.GuardState(ctx, o.Block)
			if guardErr != nil || state != index.Condemned { // else it was replaced long ago: we are late
				return errors.Join(err, guardErr)
			}
		}
	}
	rows, err := c.sourceRows(ctx, j)
	if err != nil {
		return err
	}
	if err := c.o.Index.DeleteRows(ctx, rows); err != nil {
		return &heldError{fmt.Errorf("rows of replaced blocks: %w", err)}
	}
	next := j
	next.State = index.JobRemoved
	return c.step(ctx, j, next)
}

func (c *Compactor) removeObjects(ctx context.Context, j index.Job) error {
	for _, s := range j.Sources {
		if err := c.o.Index.Condemn(ctx, s.Block); err != nil {
			return err
		}
		if err := c.o.Objects.Delete(ctx, s.Object); err != nil {
			return &heldError{fmt.Errorf("replaced block %s: %w", s.Block, err)} // who may not delete may compact
		}
		if err := c.deleteWork(ctx, s); err != nil {
			return fmt.Errorf("work row of block %s: %w", s.Block, err)
		}
		c.metrics.replaced.Inc()
	}
	return c.step(ctx, j, index.Job{Level: j.Level, Slot: j.Slot, ID: j.ID})
}

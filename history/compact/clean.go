package compact

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Merges drop what is deleted or past the retention. Blocks that aren't going to be
// merged again, or not soon, are cleaned: written again by themselves, as a job with
// one source.

// cleaner finds blocks to clean. It is of the goroutine in Round.
type cleaner struct {
	reader *history.History

	todo   map[ulid.ULID]index.JobSource
	sights map[ulid.ULID]sight // by deletion
	noted  ulid.ULID           // the last change of deletions that was looked at
	asked  bool                // there are deletions to be cleaned soon
	looked time.Time           // after those, last
	full   time.Time           // when all was looked at, last

	// When a tenant in a block will be past its retention, in ms, by block.
	due        map[ulid.ULID]int64
	retentions *history.Retentions // that due was found by
}

// sight is what was seen when something of a deletion was looked for.
type sight struct {
	clear bool // nothing of it was left
	jobs  map[ulid.ULID]bool
}

// groups are those blocks that can be cleaned at present.
func (c *Compactor) cleanGroups(v *view) []*group {
	var out []*group
	for _, s := range c.cleaner.todo {
		if g := c.cleanGroup(v, s); g != nil {
			out = append(out, g)
		}
	}
	slices.SortFunc(out, func(a, b *group) int { return a.sources[0].Block.Compare(b.sources[0].Block) })
	return out
}

// cleanGroup is the group of a block that is to be cleaned; nil if it can't be at
// present. The slot is that in which it would be merged, so that nobody else takes
// it; blocks that nobody merges, as those of the last level, have slots of their own.
func (c *Compactor) cleanGroup(v *view, s index.JobSource) *group {
	if v.busy[s.Block] || v.aside[s.Block] || s.Level == 0 {
		return nil
	}
	g := &group{makes: s.Level, sources: []index.JobSource{s}, clean: true}
	for _, r := range v.compacted {
		if r.Block == s.Block && r.Level == s.Level && s.Level < c.top() {
			g.level, g.window, g.tenant = r.Level+1, windowOf(r.End, c.o.Ranges[r.Level].Milliseconds()), r.Tenant
			g.slot = slotOf(g.level, g.window, g.tenant)
			return g
		}
	}
	// Merged meanwhile, which its guard row tells, or of a level that was the last when
	// it was written: then nobody merges it.
	g.level = c.top() + 1
	g.slot = slotOf(g.level, int64(binary.BigEndian.Uint64(s.Block[8:])), "") //nolint:gosec // bits
	return g
}

// survey looks for blocks to clean, if it is time. A deletion of which nothing is left
// is noted.
func (c *Compactor) survey(ctx context.Context, v *view) error {
	x := &c.cleaner
	noted, err := c.o.Index.DeletionsNoted(ctx)
	if err != nil {
		return err
	}
	now := c.now()
	full := now.Sub(x.full) >= c.o.CleanAge/4
	if !full && noted == x.noted && (!x.asked || now.Sub(x.looked) < c.o.Grace) {
		return nil
	}
	rows, err := c.o.Index.AllDeletions(ctx)
	if err != nil {
		return err
	}
	// In this order: a merge that begins later sees these deletions, and what others
	// have made by now has rows.
	jobs, err := c.o.Index.Jobs(ctx)
	if err != nil {
		return err
	}
	unfinished := map[ulid.ULID]bool{}
	for _, j := range jobs {
		if j.State != index.JobIdle {
			unfinished[j.ID] = true
		}
	}
	if x.todo == nil || full {
		x.todo = map[ulid.ULID]index.JobSource{}
	}
	var errs []error
	sights, asked := map[ulid.ULID]sight{}, false
	for _, r := range rows {
		if r.Err != nil {
			c.logger.Warn("the deletions of a tenant can't be read: nothing is removed", "tenant", r.Tenant, "err", r.Err)
			continue
		}
		gone := map[ulid.ULID]int64{} // what is to be noted
		for i := range r.Deletions {
			d := &r.Deletions[i]
			if d.Gone != 0 {
				if !full {
					continue
				}
				// An import may have made blocks of any level since.
				left, some, err := c.left(ctx, v, r.Tenant, d, time.UnixMilli(d.Gone).Add(-lateImport))
				switch {
				case err != nil:
					errs = append(errs, fmt.Errorf("deletion %s of tenant %s: %w", d.ID, r.Tenant, err))
				case left:
					gone[d.ID] = 0
				case some:
					gone[d.ID] = now.UnixMilli()
				}
				continue
			}
			asked = asked || d.Clean
			old, seen := x.sights[d.ID]
			if !full && !d.Clean {
				if seen {
					sights[d.ID] = old
				}
				continue
			}
			left, _, err := c.left(ctx, v, r.Tenant, d, time.Time{})
			if err != nil {
				errs = append(errs, fmt.Errorf("deletion %s of tenant %s: %w", d.ID, r.Tenant, err))
			}
			switch {
			case left:
				sights[d.ID] = sight{}
			case !old.clear:
				// What a job under way makes may have been merged without it, and the
				// sources of one may still be there.
				sights[d.ID] = sight{clear: true, jobs: unfinished}
			case anyOf(old.jobs, unfinished):
				sights[d.ID] = old
			default:
				gone[d.ID] = now.UnixMilli()
			}
		}
		if err := c.noteGone(ctx, r, gone); err != nil {
			errs = append(errs, err)
		}
	}
	x.sights, x.asked = sights, asked
	if full {
		if err := c.pastRetention(ctx, v); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		x.noted, x.looked = noted, now
		if full {
			x.full = now
		}
	}
	return errors.Join(errs...)
}

func anyOf(a, b map[ulid.ULID]bool) bool {
	for id := range a {
		if b[id] {
			return true
		}
	}
	return false
}

// lateImport is how long after a block of an import was begun it may become visible.
const lateImport = 24 * time.Hour

// noteGone notes since when nothing is left of deletions, or that there is something
// again. Should the row have changed meanwhile, that is for the next time.
func (c *Compactor) noteGone(ctx context.Context, r index.DeletionsRow, gone map[ulid.ULID]int64) error {
	if len(gone) == 0 {
		return nil
	}
	ds := slices.Clone(r.Deletions)
	for i := range ds {
		if at, ok := gone[ds[i].ID]; ok {
			ds[i].Gone = at
		}
	}
	if err := c.o.Index.PutDeletions(ctx, r, ds); err != nil {
		if errors.Is(err, index.ErrConflict) {
			return nil
		}
		return err
	}
	for _, d := range r.Deletions {
		if at, ok := gone[d.ID]; ok && d.Gone == 0 && at != 0 {
			c.logger.Info("nothing is left of a deletion", "tenant", r.Tenant, "deletion", d.ID)
		}
	}
	return nil
}

// left says whether any block has something of a deletion left, and puts those that
// are to be cleaned on the list. What can't be found out counts as left. With since,
// it looks only at blocks made after that by something else than a flush, and says
// whether there are some.
func (c *Compactor) left(ctx context.Context, v *view, tenant string, d *index.Deletion, since time.Time) (left, some bool, _ error) {
	rows, err := c.o.Index.Blocks(ctx, tenant, d.MinT, d.MaxT, true)
	if err != nil {
		return true, false, err
	}
	aged := c.now().Sub(ulid.Time(d.ID.Time())) >= c.o.CleanAge
	var errs []error
	for _, b := range history.Blocks(rows) {
		if !since.IsZero() && (b.Level == 0 || ulid.Time(b.ID.Time()).Before(since)) {
			continue
		}
		some = true
		if v.aside[b.ID] {
			left = true
			continue
		}
		has, err := c.has(ctx, tenant, &b, d)
		if unreadable(err) != "" {
			// To look again at once, and at all the others too, would be of no use.
			c.logger.Warn("what a block has of a deletion can't be found out", "tenant", tenant, "deletion", d.ID, "block", b.ID, "err", err)
			left = true
			continue
		}
		if err != nil {
			left = true
			errs = append(errs, err)
			continue
		}
		if !has {
			continue
		}
		left = true
		if b.Level > 0 && (d.Clean || aged && b.Level >= c.top()) {
			c.cleaner.todo[b.ID] = index.JobSource{BlockRef: index.BlockRef{Block: b.ID, Object: b.Object, ObjectSize: b.ObjectSize}, Level: b.Level}
		}
	}
	return left, some, errors.Join(errs...)
}

// has says whether a block has any sample or exemplar of a deletion. Chunks don't
// tell: of one that reaches into its time, what is deleted may have been dropped.
func (c *Compactor) has(ctx context.Context, tenant string, b *history.Block, d *index.Deletion) (bool, error) {
	s := c.cleaner.reader.Open(tenant, d.MinT, d.MaxT, []history.Block{*b}, nil)
	set, err := s.Select(ctx, d.Matchers, d.MinT, d.MaxT)
	if err != nil {
		return false, err
	}
	var buf history.Buffer
	for set.Next(ctx) {
		runs, err := set.At().Runs(&buf)
		if err != nil {
			return false, err
		}
		if len(runs) > 0 {
			return true, nil
		}
	}
	if err := set.Err(); err != nil {
		return false, err
	}
	es, err := s.Exemplars(ctx, [][]*labels.Matcher{d.Matchers}, d.MinT, d.MaxT)
	return len(es) > 0, err
}

// pastRetention puts the blocks on the list that have a tenant of which all is past
// its retention.
func (c *Compactor) pastRetention(ctx context.Context, v *view) error {
	x, rs := &c.cleaner, c.o.Retentions()
	if rs.None() {
		x.due = nil
		return nil
	}
	old := x.due
	if x.retentions != rs {
		old = nil
	}
	flushed := map[ulid.ULID]bool{}
	for i := range v.flushes {
		flushed[v.flushes[i].Block] = true
	}
	now := c.now()
	due := map[ulid.ULID]int64{}
	var found []index.BlockRef
	err := eachBlock(ctx, c.o.Objects, func(b index.BlockRef, _ time.Time) {
		if !flushed[b.Block] && !v.busy[b.Block] && !v.aside[b.Block] {
			found = append(found, b)
		}
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range found {
		at, known := old[b.Block]
		if known && at > now.UnixMilli() {
			due[b.Block] = at
			continue
		}
		if !known {
			if state, err := c.o.Index.GuardState(ctx, b.Block); err != nil || state != index.Published {
				errs = append(errs, err)
				continue
			}
		}
		at, err := c.past(ctx, b, rs, now)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		due[b.Block] = at
	}
	x.due, x.retentions = due, rs
	return errors.Join(errs...)
}

// past says when a tenant of a block will be past its retention, the first after now,
// in ms. If there are some already, the block is put on the list.
func (c *Compactor) past(ctx context.Context, b index.BlockRef, rs *history.Retentions, now time.Time) (int64, error) {
	f, err := readFooter(ctx, c.o.Objects, b)
	if err != nil {
		if unreadable(err) != "" {
			return math.MaxInt64, nil // whoever needs it says so
		}
		return 0, err
	}
	next := int64(math.MaxInt64)
	for _, t := range f.Tenants {
		r := rs.Of(t.Tenant)
		if r.Raw <= 0 {
			continue
		}
		if t.MaxT >= r.Horizon(now) {
			next = min(next, t.MaxT+r.Raw.Milliseconds())
			continue
		}
		next = min(next, now.UnixMilli()) // look again
		// What level it is of, its rows tell.
		rows, err := c.o.Index.Blocks(ctx, t.Tenant, t.MinT, t.MaxT, true)
		if err != nil {
			return 0, err
		}
		if i := slices.IndexFunc(rows, func(r index.BlockRow) bool { return r.Block == b.Block }); i >= 0 {
			c.cleaner.todo[b.Block] = index.JobSource{BlockRef: b, Level: rows[i].Level}
			break
		}
	}
	return next, nil
}

package compact

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Merges drop what is deleted or past the retention. Blocks that aren't going to be
// merged again, or not soon, are cleaned: written again by themselves. Blocks of the last
// level that overlap are written again together: when one came late, and before their
// samples go, for summaries alone can't be merged exactly.

// cleaner is what was found of blocks to clean.
type cleaner struct {
	todo   map[ulid.ULID]*cleaning
	sights map[ulid.ULID]sight // by deletion
	noted  ulid.ULID           // the last change of deletions that was looked at
	asked  bool                // there are deletions to be cleaned soon
	looked time.Time           // after those, last
	full   time.Time           // when all was looked at, last
	// When flushes were looked for of which nobody knows, last.
	lookedBack time.Time

	// When a tenant in a block will be past its retention, in ms, by block.
	due        map[ulid.ULID]int64
	retentions *history.Retentions // that due was found by

	// Blocks that no other of the last level overlaps. What comes later and does is
	// found when it is young itself.
	apart map[ulid.ULID]bool
	aged  ulid.ULID // the last block that was asked after though it isn't young any more
}

// cleaning is a block that is to be written again.
type cleaning struct {
	index.JobSource
	window int64             // of the last level, that its newest samples lie in
	with   []index.JobSource // others of the last level, of the same window
	// thin are tenants of which what is past its retention goes, though summaries of it
	// stay. All that overlaps it is in with.
	thin map[string]bool // not to be changed
}

// copy is another one, for a survey while blocks are being cleaned.
func (x *cleaner) copy() *cleaner {
	out := *x
	out.todo = make(map[ulid.ULID]*cleaning, len(x.todo))
	for id, one := range x.todo {
		c := *one
		c.with = slices.Clone(c.with)
		out.todo[id] = &c
	}
	if x.todo == nil {
		out.todo = nil
	}
	return &out
}

// surveyor surveys beside rounds, which may take long where much has to be read.
type surveyor struct {
	done    chan surveyed // has room for one
	running bool
	wg      sync.WaitGroup
}

type surveyed struct {
	found *cleaner
	err   error
}

// surveyBeside takes what the last survey has found, and begins another.
func (c *Compactor) surveyBeside(ctx context.Context, v *view) error {
	var err error
	select {
	case r := <-c.surveyor.done:
		c.surveyor.running = false
		// What was cleaned meanwhile isn't published any more, and so left alone.
		c.cleaner, err = *r.found, r.err
	default:
	}
	if !c.surveyor.running {
		c.surveyor.running = true
		x := c.cleaner.copy()
		c.surveyor.wg.Go(func() {
			err := c.survey(ctx, v, x)
			c.surveyor.done <- surveyed{x, err}
		})
	}
	return err
}

// sight is what was seen when something of a deletion was looked for.
type sight struct {
	clear bool // nothing of it was left
	jobs  map[ulid.ULID]bool
}

// groups are those blocks that can be cleaned at present.
func (c *Compactor) cleanGroups(v *view) []*group {
	var out []*group
	for _, x := range c.cleaner.todo {
		if g := c.cleanGroup(v, x); g != nil {
			out = append(out, g)
		}
	}
	slices.SortFunc(out, func(a, b *group) int { return a.sources[0].Block.Compare(b.sources[0].Block) })
	return out
}

// cleanGroup is the group of a block that is to be cleaned; nil if it can't be at
// present. The slot is that in which it would be merged, so that nobody else takes
// it; blocks that nobody merges, as those of the last level, have slots of their own, by
// their windows: those that may be written together have the same.
func (c *Compactor) cleanGroup(v *view, x *cleaning) *group {
	s := x.JobSource
	if s.Level == 0 {
		return nil
	}
	g := &group{makes: s.Level, sources: append([]index.JobSource{s}, x.with...), clean: true, thin: x.thin}
	for _, s := range g.sources {
		if v.busy[s.Block] || v.aside[s.Block] || c.leftOut(s.Block) {
			return nil
		}
	}
	for _, r := range v.compacted {
		if r.Block == s.Block && r.Level == s.Level && s.Level < c.top() {
			g.level, g.window, g.tenant = r.Level+1, windowOf(r.End, c.o.Ranges[r.Level].Milliseconds()), r.Tenant
			g.slot = slotOf(g.level, g.window, g.tenant)
			return g
		}
	}
	// Merged meanwhile, which its guard row tells, or of a level that was the last when
	// it was written: then nobody merges it.
	g.level, g.window = c.top()+1, x.window
	g.slot = slotOf(g.level, g.window, "")
	return g
}

// survey looks for blocks to clean, if it is time. A deletion of which nothing is left
// is noted.
func (c *Compactor) survey(ctx context.Context, v *view, x *cleaner) error {
	noted, err := c.o.Index.DeletionsNoted(ctx)
	if _, ok := errors.AsType[*index.RowError](err); ok { // whatever it is, it has to be another
		if noted, err = ulid.New(ulid.Timestamp(c.now()), c.entropy); err == nil {
			err = c.o.Index.NoteDeletions(ctx, noted)
		}
	}
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
	if readable(err) != nil {
		return err
	}
	unfinished := map[ulid.ULID]bool{}
	if err != nil {
		unfinished[ulid.ULID{}] = true // one of which nobody knows
	}
	for _, j := range jobs {
		if j.State != index.JobIdle {
			unfinished[j.ID] = true
		}
	}
	if x.todo == nil || full {
		x.todo = map[ulid.ULID]*cleaning{}
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
				left, some, err := c.left(ctx, v, x, r.Tenant, d, time.UnixMilli(d.Gone).Add(-lateImport))
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
			left, _, err := c.left(ctx, v, x, r.Tenant, d, time.Time{})
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
		if err := c.surveyBlocks(ctx, v, x); err != nil {
			errs = append(errs, err)
		}
		if now.Sub(x.lookedBack) >= lookBackEvery {
			if err := c.lookBack(ctx); err != nil {
				errs = append(errs, err)
			} else {
				x.lookedBack = now
			}
		}
	}
	err = errors.Join(errs...)
	if slices.ContainsFunc(errs, func(err error) bool { return !ofOneBlock(err) }) {
		return err
	}
	if err != nil && ctx.Err() == nil {
		// To look at all again at once, for one of them, would be of no use.
		c.metrics.failures.Inc()
		c.logger.Warn("what is deleted or past the retention in some blocks can't be found out, the next survey tries again", "err", err)
	}
	x.noted, x.looked = noted, now
	if full {
		x.full = now
	}
	return ctx.Err()
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
func (c *Compactor) left(ctx context.Context, v *view, x *cleaner, tenant string, d *index.Deletion, since time.Time) (left, some bool, _ error) {
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
			ref := index.BlockRef{Block: b.ID, Object: b.Object, ObjectSize: b.ObjectSize}
			f, err := readFooter(ctx, c.o.Objects, ref)
			if err != nil {
				if unreadable(err) == "" {
					errs = append(errs, err)
				}
				continue
			}
			c.clean(x, ref, b.Level, f, nil)
		}
	}
	return left, some, errors.Join(errs...)
}

// has says whether a block has any sample or exemplar of a deletion, or a window of
// samples that are gone. Chunks don't
// tell: of one that reaches into its time, what is deleted may have been dropped.
func (c *Compactor) has(ctx context.Context, tenant string, b *history.Block, d *index.Deletion) (bool, error) {
	s := c.reader.Open(tenant, d.MinT, d.MaxT, []history.Block{*b}, nil)
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
	if len(es) > 0 || err != nil {
		return len(es) > 0, err
	}
	return s.HasGone(ctx, d.Matchers, d.MinT, d.MaxT)
}

// clean puts a block on the list, with others of the last level or without.
func (c *Compactor) clean(x *cleaner, b index.BlockRef, level index.Level, f *chunkfmt.Footer, with []index.JobSource) {
	one := x.todo[b.Block]
	if one == nil {
		one = &cleaning{JobSource: index.JobSource{BlockRef: b, Level: level}, window: c.lastWindow(f)}
		x.todo[b.Block] = one
	}
	for _, s := range with {
		if !slices.ContainsFunc(one.with, func(o index.JobSource) bool { return o.Block == s.Block }) && len(one.with) < c.o.MaxSources-1 {
			one.with = append(one.with, s)
		}
	}
}

// lastWindow is the window of the last level in which a block's newest samples lie. It
// follows from the block.
func (c *Compactor) lastWindow(f *chunkfmt.Footer) int64 {
	maxt := int64(math.MinInt64)
	for i := range f.Tenants {
		maxt = max(maxt, f.Tenants[i].MaxT)
	}
	return windowOf(maxt, c.o.Ranges[c.top()-1].Milliseconds())
}

// How young a block of the last level is, as a multiple of CleanAge, when it is looked
// whether others overlap it: until then some more may come late.
const (
	overlapFrom  = 1
	overlapUntil = 10
)

// Blocks that are older are asked after too, in turn, in case nobody looked when they
// were young: the blocks of so many tenants in each survey, and until one is found that
// others overlap, so that at most one group of them is written again each time.
const agedTenants = 1000

// surveyBlocks puts the blocks on the list of which enough is past the retention, and
// those of the last level that overlap.
func (c *Compactor) surveyBlocks(ctx context.Context, v *view, x *cleaner) error {
	rs := c.o.Retentions()
	old := x.due
	if x.retentions != rs {
		old = nil
	}
	flushed := map[ulid.ULID]bool{}
	for i := range v.flushes {
		flushed[v.flushes[i].Block] = true
	}
	now := c.now()
	due, apart := map[ulid.ULID]int64{}, map[ulid.ULID]bool{}
	budget, from := agedTenants, x.aged
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
		age := now.Sub(ulid.Time(b.Block.Time()))
		young := age >= overlapFrom*c.o.CleanAge && age < overlapUntil*c.o.CleanAge && !x.apart[b.Block]
		aged := age >= overlapUntil*c.o.CleanAge && !x.apart[b.Block] && budget > 0 && b.Block.Compare(from) > 0
		at, known := old[b.Block]
		if x.apart[b.Block] {
			apart[b.Block] = true
		}
		if rs.None() {
			at, known = math.MaxInt64, true
		}
		if known && at > now.UnixMilli() && !young && !aged {
			due[b.Block] = at
			continue
		}
		state, err := c.o.Index.GuardState(ctx, b.Block)
		if err != nil {
			errs = append(errs, err)
		}
		if state != index.Published {
			continue
		}
		f, err := readFooter(ctx, c.o.Objects, b)
		if err != nil {
			if unreadable(err) == "" {
				errs = append(errs, err)
			} // else whoever needs it says so
			continue
		}
		if aged {
			budget -= len(f.Tenants)
			x.aged = b.Block
		}
		if young || aged {
			o, err := c.overlapping(ctx, v, b, f, nil)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			if len(o.with) > 0 {
				c.clean(x, b, o.level, f, o.with)
				if aged {
					budget = 0
				}
			} else if o.level > 0 {
				apart[b.Block] = true
			}
		}
		if due[b.Block], err = c.past(ctx, v, x, b, f, rs, now); err != nil {
			delete(due, b.Block)
			errs = append(errs, err)
		}
	}
	if budget > 0 {
		x.aged = ulid.ULID{} // that was the last: begin anew
	}
	x.due, x.retentions, x.apart = due, rs, apart
	return errors.Join(errs...)
}

// overlaps are what there is beside a block.
type overlaps struct {
	level index.Level       // of the block; 0: it has no rows
	with  []index.JobSource // that it can be written again with
	// Tenants of which there is something else in the same hours: it can't be read, isn't
	// of the last level yet, or was cut by other widths.
	others map[string]bool
}

// overlapping gives what overlaps a block, if it is of the last level: the other blocks
// of that level, and of the same window, that have something of a tenant in the same
// hours, of those tenants that of has; nil: of all. Blocks that were cut from each other
// by their size have other series, and aren't among them.
func (c *Compactor) overlapping(ctx context.Context, v *view, b index.BlockRef, f *chunkfmt.Footer, of map[string]bool) (out overlaps, err error) {
	if len(f.Tenants) > 0 {
		if out.level, _, err = c.levelOf(ctx, b, &f.Tenants[0]); err != nil {
			return out, err
		}
	}
	if out.level < c.top() {
		return out, nil
	}
	window := c.lastWindow(f)
	type pair struct { // directories of a tenant
		tenant     string
		own, other chunkfmt.Location
	}
	found := map[ulid.ULID]index.JobSource{}
	pairs := map[ulid.ULID][]pair{}
	out.others = map[string]bool{}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(c.queries) // each is of one tenant
	for i := range f.Tenants {
		t := &f.Tenants[i]
		if of != nil && !of[t.Tenant] {
			continue
		}
		g.Go(func() error {
			own := widenTo(t.Windows, rollup.Long)
			rows, err := c.o.Index.Blocks(gctx, t.Tenant, own[0].MinT, own[len(own)-1].MaxT, true)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for i := range rows {
				r := &rows[i]
				switch {
				case r.Block == b.Block || !slices.ContainsFunc(own, func(w chunkfmt.Range) bool { return w.Overlaps(r.MinT, r.MaxT) }):
				case r.Level < c.top() || v.aside[r.Block]:
					out.others[t.Tenant] = true
				default:
					found[r.Block] = index.JobSource{BlockRef: index.BlockRef{Block: r.Block, Object: r.Object, ObjectSize: r.ObjectSize}, Level: r.Level}
					pairs[r.Block] = append(pairs[r.Block], pair{t.Tenant, t.Directory, r.Directory})
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return out, err
	}
	for _, id := range slices.SortedFunc(maps.Keys(found), ulid.ULID.Compare) {
		s := found[id]
		f, err := readFooter(ctx, c.o.Objects, s.BlockRef)
		if err != nil && unreadable(err) == "" {
			return out, err
		}
		may := err == nil && s.Level == out.level && c.lastWindow(f) == window
		for _, p := range pairs[id] {
			if !may {
				out.others[p.tenant] = true
				continue
			}
			same, err := c.mayShareSeries(ctx, b, p.own, s.BlockRef, p.other)
			if err != nil && unreadable(err) == "" {
				return out, err
			}
			if err != nil {
				out.others[p.tenant] = true
			}
			if same {
				out.with = append(out.with, s)
				break
			}
		}
	}
	return out, nil
}

// closed adds to blocks of the last level what overlaps them, and what overlaps that, of
// those tenants of which samples are to go and summaries to stay. It leaves of the tenants
// those of which nothing else overlaps any of all these blocks: samples that go while
// others of the same time stay can't be merged with them any more.
func (c *Compactor) closed(ctx context.Context, v *view, blocks []index.JobSource, tenants map[string]bool) (all []index.JobSource, thin map[string]bool, err error) {
	all, thin = slices.Clone(blocks), maps.Clone(tenants)
	for i := 0; i < len(all) && len(thin) > 0; i++ {
		f, err := readFooter(ctx, c.o.Objects, all[i].BlockRef)
		if err != nil {
			return nil, nil, err
		}
		o, err := c.overlapping(ctx, v, all[i].BlockRef, f, thin)
		if err != nil {
			return nil, nil, err
		}
		if o.level != all[0].Level {
			return all, nil, nil // being replaced
		}
		for t := range o.others {
			delete(thin, t)
		}
		for _, s := range o.with {
			if !slices.ContainsFunc(all, func(a index.JobSource) bool { return a.Block == s.Block }) {
				all = append(all, s)
			}
		}
		if len(all) > c.o.MaxSources { // first these
			return all[:c.o.MaxSources], nil, nil
		}
	}
	return all, thin, nil
}

// mayShareSeries says whether the series of a tenant in a block don't all come before, or
// all behind, those in another.
func (c *Compactor) mayShareSeries(ctx context.Context, a index.BlockRef, aDir chunkfmt.Location, b index.BlockRef, bDir chunkfmt.Location) (bool, error) {
	aFirst, aLast, err := c.ends(ctx, a, aDir)
	if err != nil {
		return false, err
	}
	bFirst, bLast, err := c.ends(ctx, b, bDir)
	if err != nil {
		return false, err
	}
	before := func(x, y labels.Labels) bool {
		return compareKeys(x.Get(model.MetricNameLabel), x, y.Get(model.MetricNameLabel), y) < 0
	}
	return !before(aLast, bFirst) && !before(bLast, aFirst), nil
}

// ends are the first and the last series of a tenant in a block.
func (c *Compactor) ends(ctx context.Context, b index.BlockRef, dir chunkfmt.Location) (first, last labels.Labels, err error) {
	s := &source{block: b, objects: c.o.Objects}
	d, err := s.directory(ctx, dir, dir.Offset, dir.End())
	if err != nil {
		return first, last, err
	}
	pages := d.Pages(nil, math.MinInt64, math.MaxInt64)
	if len(pages) == 0 {
		return first, last, s.error("directory", dir, corrupt("no series"))
	}
	for i, ref := range []*chunkfmt.PageRef{&pages[0], &pages[len(pages)-1]} {
		at := ref.Bytes
		if at == nil {
			if at, err = s.get(ctx, &s.indexes, "series page", ref.Location, ref.Offset, ref.End()); err != nil {
				return first, last, err
			}
		}
		p, err := chunkfmt.ParseSeriesPage(at)
		if err != nil {
			return first, last, s.error("series page", ref.Location, err)
		}
		if i == 0 {
			e, _ := p.Entry(0, math.MinInt64, math.MaxInt64, &s.builder)
			first = e.Labels
		}
		e, _ := p.Entry(p.Len()-1, math.MinInt64, math.MaxInt64, &s.builder)
		last = e.Labels
	}
	return first, last, nil
}

// Blocks are shared: one is written again only when so much of its samples are past
// the retention, or some have been for CleanAge.
const lapsedShare = 4 // a quarter

// past says when something that a tenant of a block has will be past its retention, the
// first after now, in ms. If it is worth while already, the block is put on the list.
func (c *Compactor) past(ctx context.Context, v *view, x *cleaner, b index.BlockRef, f *chunkfmt.Footer, rs *history.Retentions, now time.Time) (int64, error) {
	next := int64(math.MaxInt64)
	level, known := index.Level(0), false
	all := uint64(0)
	type lapse struct {
		tenant  string
		samples uint64
		since   int64
	}
	var lapsed []lapse
	thin := map[string]bool{} // tenants of which summaries stay
	for i := range f.Tenants {
		t := &f.Tenants[i]
		all += max(t.Samples, 1)
		r := rs.Of(t.Tenant)
		if r.Raw <= 0 {
			continue
		}
		after := func(d time.Duration) int64 { return t.MaxT + d.Milliseconds() }
		raw, long := after(r.Raw), after(max(r.Raw, r.Short, r.Long))
		if !known && raw < now.UnixMilli() {
			var err error
			if level, known, err = c.levelOf(ctx, b, t); err != nil {
				return 0, err
			}
			if !known {
				return now.UnixMilli(), nil // being replaced
			}
		}
		h := c.horizons(r, level, true, now)
		since := int64(math.MaxInt64)
		switch {
		case t.MaxT < h.Long:
			since = long
			if !h.Summaries() {
				since = raw
			}
		case t.Samples > 0 && t.MaxT < h.Raw:
			since = raw
			thin[t.Tenant] = true
		case t.Samples == 0 && t.MaxT < h.Short:
			some, err := c.hasShort(ctx, b, t)
			if err != nil {
				return 0, err
			}
			if some {
				since = after(max(r.Raw, r.Short))
				thin[t.Tenant] = true
			}
		}
		if since < math.MaxInt64 {
			lapsed = append(lapsed, lapse{t.Tenant, max(t.Samples, 1), since})
			continue
		}
		for _, at := range []int64{raw, after(max(r.Raw, r.Short)), long} {
			if at += rollup.Long; at > now.UnixMilli() { // horizons move by hours
				next = min(next, at)
			}
		}
		if known && level < c.top() && raw <= now.UnixMilli() {
			next = min(next, now.UnixMilli()) // another level's rules may hold the next time
		}
	}
	if len(lapsed) == 0 {
		return next, nil
	}
	worthwhile := func() bool {
		n, oldest := uint64(0), int64(math.MaxInt64)
		for _, l := range lapsed {
			n += l.samples
			oldest = min(oldest, l.since)
		}
		return n > 0 && (n*lapsedShare >= all || now.Sub(time.UnixMilli(oldest)) >= c.o.CleanAge)
	}
	if !worthwhile() {
		return now.UnixMilli(), nil // look again
	}
	blocks := []index.JobSource{{BlockRef: b, Level: level}}
	if len(thin) > 0 {
		if one := x.todo[b.Block]; one != nil {
			blocks = append(blocks, one.with...)
		}
		var may map[string]bool
		var err error
		if blocks, may, err = c.closed(ctx, v, blocks, thin); err != nil {
			return 0, err
		}
		lapsed = slices.DeleteFunc(lapsed, func(l lapse) bool { return thin[l.tenant] && !may[l.tenant] })
		thin = may
	}
	if len(blocks) > 1 || worthwhile() {
		c.clean(x, b, level, f, blocks[1:])
		x.todo[b.Block].thin = thin
	}
	return now.UnixMilli(), nil
}

// levelOf is what level a block is of, as the row of a tenant in it says; false: there is
// none.
func (c *Compactor) levelOf(ctx context.Context, b index.BlockRef, t *chunkfmt.TenantSummary) (index.Level, bool, error) {
	rows, err := c.o.Index.Blocks(ctx, t.Tenant, t.MinT, t.MaxT, true)
	if err != nil {
		return 0, false, err
	}
	i := slices.IndexFunc(rows, func(r index.BlockRow) bool { return r.Block == b.Block })
	if i < 0 {
		return 0, false, nil
	}
	return rows[i].Level, true, nil
}

// hasShort says whether a tenant that has no samples in a block has short windows.
func (c *Compactor) hasShort(ctx context.Context, b index.BlockRef, t *chunkfmt.TenantSummary) (bool, error) {
	s := &source{block: b, objects: c.o.Objects}
	d, err := s.directory(ctx, t.Directory, t.Directory.Offset, t.Directory.End())
	if err != nil {
		if unreadable(err) == "corrupt" {
			return false, nil // whoever needs it says so
		}
		return false, err
	}
	return slices.ContainsFunc(d.Pages(nil, math.MinInt64, math.MaxInt64), func(p chunkfmt.PageRef) bool { return p.Short.Windows > 0 }), nil
}

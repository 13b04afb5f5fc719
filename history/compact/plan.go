package compact

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// plan says in how many passes over the sources what they have is cut into
// windows, for only so many blocks may be open at the same time. Nearly always it
// is one.
func plan(sources []*source, width int64, atOnce int) []chunkfmt.Range {
	type span struct{ first, last int64 } // windows
	var spans []span
	for _, s := range sources {
		for _, t := range s.tenants {
			for _, r := range t.Windows {
				spans = append(spans, span{windowOf(r.MinT, width), windowOf(r.MaxT, width)})
			}
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var out []chunkfmt.Range
	n := 0
	var first, last int64 // of the pass; n windows, last included
	end := func() {
		if n > 0 {
			mint, maxt := bounds(first, last, width)
			out, n = append(out, chunkfmt.Range{MinT: mint, MaxT: maxt}), 0
		}
	}
	for i, s := range spans {
		from := s.first
		if i > 0 {
			from = max(from, last+1) // what is before is in a pass already
		}
		for w := from; w <= s.last; w++ { // few: a range of a footer is at most a week
			if n == atOnce {
				end()
			}
			if n == 0 {
				first = w
			}
			n, last = n+1, w
		}
	}
	end()
	return out
}

// Bounds of a job, so that its row, and that of a tenant which names what is
// replaced and the siblings, stay below what a row may hold.
const (
	maxWindows  = 1500 // that its sources have samples in; four years of days
	maxReplaced = 6000 // rows of a tenant
	maxOwn      = 500  // blocks of which large tenants still get their own
)

// fit says how many of the sources, from the first on, a job can have.
func fit(sources []*source, width int64) int {
	windows := map[int64]bool{}
	rows := map[string]int{}
	for i, s := range sources {
		for _, t := range s.tenants {
			for _, r := range t.Windows {
				for w := windowOf(r.MinT, width); w <= windowOf(r.MaxT, width); w++ { // a week at most
					windows[w] = true
				}
			}
			if rows[t.Tenant] += len(t.Windows); rows[t.Tenant] > maxReplaced || len(windows) > maxWindows {
				return i
			}
		}
	}
	return len(sources)
}

// view is what there is to do, and what is being done.
type view struct {
	flushes   []index.WorkRow
	compacted []index.CompactedRow
	jobs      []index.Job
	busy      map[ulid.ULID]bool // sources and outputs of jobs
	aside     map[ulid.ULID]bool
	asideRows []index.AsideRow
	bad       index.RowErrors  // what can't be read of all these
	taken     map[slotKey]bool // slots of which the job can't be read
}

// readable drops the error of a list of which some rows can't be read.
func readable(err error) error {
	if _, ok := errors.AsType[index.RowErrors](err); ok {
		return nil
	}
	return err
}

// taken are the slots of jobs that can't be read, as the error of their list says. What
// they name may get into another job: then it is there twice for a while, and counts once.
func taken(err error) map[slotKey]bool {
	bad, _ := errors.AsType[index.RowErrors](err)
	out := map[slotKey]bool{}
	for _, e := range bad {
		if level, slot, ok := e.SlotOf(); ok {
			out[slotKey{level, slot}] = true
		}
	}
	return out
}

func (v *view) job(k slotKey) index.Job {
	for _, j := range v.jobs {
		if j.Level == k.level && j.Slot == k.slot {
			return j
		}
	}
	return index.Job{Level: k.level, Slot: k.slot}
}

const (
	day = int64(24 * time.Hour / time.Millisecond)
	// lateDays is for how many days a flush may still write its work row, by
	// clocks that differ and after outages.
	lateDays = 3
	// firstScan is how far back work rows are looked for where nobody ever has.
	firstScan = 400
	// lookBackDays is how far surveys look for such that came later than that.
	lookBackDays  = 32
	lookBackEvery = 24 * time.Hour
)

// leave notes what can't be read of a list; another error it returns.
func (v *view) leave(err error) error {
	if bad, ok := errors.AsType[index.RowErrors](err); ok {
		v.bad = append(v.bad, bad...)
		return nil
	}
	return err
}

// look lists work rows, then jobs: a block whose job has ended in between is no
// longer busy, and is what its work row says.
func (c *Compactor) look(ctx context.Context) (*view, error) {
	v := &view{busy: map[ulid.ULID]bool{}, aside: map[ulid.ULID]bool{}}
	if err := c.lookForFlushes(ctx, v); err != nil {
		return nil, err
	}
	var err error
	if v.compacted, err = c.o.Index.Compacted(ctx); v.leave(err) != nil {
		return nil, err
	}
	if v.jobs, err = c.o.Index.Jobs(ctx); v.leave(err) != nil {
		return nil, err
	}
	v.taken = taken(err)
	if v.asideRows, err = c.o.Index.Aside(ctx); v.leave(err) != nil {
		return nil, err
	}
	aside := v.asideRows
	for _, a := range aside {
		v.aside[a.Block] = true
	}
	c.unreadableRows(v.bad)
	now, unfinished := c.now(), 0
	for _, j := range v.jobs {
		for _, s := range j.Sources {
			v.busy[s.Block] = true
		}
		for _, o := range j.Outputs {
			v.busy[o.Block] = true
		}
		if j.State != index.JobIdle {
			unfinished++
		}
		k := slotKey{j.Level, j.Slot}
		if s, ok := c.seen[k]; !ok || s.id != j.ID || s.state != j.State || s.beat != j.Beat {
			c.seen[k] = sighting{j.ID, j.State, j.Beat, now}
		}
	}
	pending := make([]int, len(c.o.Ranges))
	oldest := 0.0
	for _, w := range v.flushes {
		pending[0]++
		if t := float64(w.Block.Time()) / 1000; oldest == 0 || t < oldest {
			oldest = t
		}
	}
	for _, r := range v.compacted {
		if int(r.Level) < len(pending) {
			pending[r.Level]++
		}
	}
	for l, n := range pending {
		c.metrics.pending.WithLabelValues(levelLabel(index.Level(l))).Set(float64(n)) //nolint:gosec // few
	}
	c.metrics.oldest.Set(oldest)
	c.metrics.unfinished.Set(float64(unfinished))
	c.metrics.asideNow.Set(float64(len(aside)))
	c.mu.Lock()
	c.status.Pending, c.status.Jobs, c.status.Aside = pending, v.jobs, aside
	c.mu.Unlock()
	return v, nil
}

func (c *Compactor) lookForFlushes(ctx context.Context, v *view) error {
	noted, err := c.o.Index.FirstDay(ctx)
	if bad, ok := errors.AsType[*index.RowError](err); ok {
		c.logger.Error("index row can't be read: all days are looked at once more", "hash", bad.Hash, "err", bad.Err)
		err = c.o.Index.ForgetFirstDay(ctx) // it is but a hint
	}
	if err != nil {
		return err
	}
	today := c.now().UnixMilli() / day
	first := min(noted, today-lateDays) // it is later if a clock was wrong
	if noted == 0 {
		first = today - firstScan
	}
	first = max(1, first)
	empty := true // so far
	for d := first; d <= today+1; d++ {
		rows, err := c.workOf(ctx, d)
		if v.leave(err) != nil {
			return err
		}
		v.flushes = append(v.flushes, rows...)
		if empty = empty && len(rows) == 0 && err == nil; empty && d < today-lateDays {
			first = d + 1
		}
	}
	if first != noted {
		return c.o.Index.SetFirstDay(ctx, noted, first)
	}
	return nil
}

// workOf lists the work rows of the flushes of a day. Where some can't be read the others
// are returned with a RowErrors.
func (c *Compactor) workOf(ctx context.Context, day int64) (rows []index.WorkRow, err error) {
	var bad index.RowErrors
	for shard := range index.WorkShards {
		of, err := c.o.Index.Work(ctx, day, shard)
		if err != nil {
			some, ok := errors.AsType[index.RowErrors](err)
			if !ok {
				return nil, err
			}
			bad = append(bad, some...)
		}
		rows = append(rows, of...)
	}
	if len(bad) > 0 {
		return rows, bad
	}
	return rows, nil
}

// lookBack looks for flushes of days that nobody looks at any more: what was flushed may
// have been put long after it was made, and a compactor's clock may have been wrong. From
// then on compaction looks at these days again.
func (c *Compactor) lookBack(ctx context.Context) error {
	noted, err := c.o.Index.FirstDay(ctx)
	if err != nil {
		return err
	}
	today := c.now().UnixMilli() / day
	for d := max(1, today-lookBackDays); d < min(noted, today-lateDays); d++ {
		rows, err := c.workOf(ctx, d)
		if readable(err) != nil {
			return err
		}
		if len(rows) > 0 || err != nil {
			return c.o.Index.SetFirstDay(ctx, noted, d)
		}
	}
	return nil
}

// group are blocks that are to be merged with each other.
type group struct {
	slotKey
	makes   index.Level // that the outputs have: that of the slot, but of a block that is cleaned its own
	window  int64
	tenant  string // that has blocks of its own; else empty
	sources []index.JobSource
	clean   bool // one block, or several of the last level, written again without what is deleted
	// thin are tenants of which samples go though summaries of them stay, if all of
	// sources are merged.
	thin map[string]bool
}

// Slots of a level: so many groups can be worked on at the same time.
const (
	flushSlots = 12
	slots      = 16
)

// groups are those whose time has come, the lowest level and the oldest first.
func (c *Compactor) groups(v *view) []*group {
	type key struct {
		level  index.Level
		window int64
		tenant string
	}
	all := map[key]*group{}
	add := func(k key, s index.JobSource) {
		if v.busy[s.Block] || v.aside[s.Block] || c.leftOut(s.Block) {
			return
		}
		g := all[k]
		if g == nil {
			g = &group{slotKey: slotKey{k.level, slotOf(k.level, k.window, k.tenant)}, makes: k.level, window: k.window, tenant: k.tenant}
			all[k] = g
		}
		g.sources = append(g.sources, s)
	}
	for i := range v.flushes {
		w := &v.flushes[i]
		add(key{1, windowOf(int64(w.Block.Time()), c.o.Ranges[0].Milliseconds()), ""}, //nolint:gosec // 48 bits
			index.JobSource{BlockRef: w.Ref(), Level: w.Level})
	}
	for _, r := range v.compacted {
		if r.Level < c.top() {
			add(key{r.Level + 1, windowOf(r.End, c.o.Ranges[r.Level].Milliseconds()), r.Tenant}, index.JobSource{BlockRef: r.BlockRef, Level: r.Level})
		}
	}
	var out []*group
	for _, g := range all {
		slices.SortFunc(g.sources, func(a, b index.JobSource) int { return a.Block.Compare(b.Block) })
		if !c.timeHasCome(g) {
			continue
		}
		g.sources = g.sources[:min(len(g.sources), c.o.MaxSources)]
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b *group) int {
		return cmp.Or(cmp.Compare(a.level, b.level), cmp.Compare(a.window, b.window), cmp.Compare(a.tenant, b.tenant))
	})
	return out
}

func slotOf(level index.Level, window int64, tenant string) uint8 {
	if level == 1 {
		return uint8((window%flushSlots + flushSlots) % flushSlots) //nolint:gosec // small
	}
	h := fnv.New32a()
	_, _ = fmt.Fprintf(h, "%d/%s", window, tenant)
	return uint8(h.Sum32() % slots) //nolint:gosec // small
}

// timeHasCome says whether to wait for more blocks. Clocks decide only that.
func (c *Compactor) timeHasCome(g *group) bool {
	if len(g.sources) >= c.o.MaxSources {
		return true
	}
	i := int(g.level) - 1
	width := c.o.Ranges[i]
	_, end := bounds(g.window, g.window, width.Milliseconds())
	now := c.now()
	past := now.Sub(time.UnixMilli(end))
	if i == 0 {
		return past >= width/12 // flushes that are being published
	}
	// The last blocks of the level below are there when its own time has come
	// twice. What is late waits until there is some more of it.
	below := c.o.Ranges[i-1]
	return past >= 2*below &&
		(len(g.sources) >= int(width/below+1)/2 || now.Sub(ulid.Time(g.sources[0].Block.Time())) >= width/2)
}

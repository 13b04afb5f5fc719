package compact

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

// Options of a Compactor. Objects, Index, Dir and Grace are needed.
type Options struct {
	Objects object.Store
	Index   *index.Index
	Dir     string // for blocks while they are written; emptied at the start

	// Ranges are the widths of time of the levels, ascending, each a multiple of
	// the one before, the last at most a week. Default: 2 h, 1 day, 1 week.
	Ranges []time.Duration

	// MaxBlockBytes is where a block is cut by series (default 512 MiB). A tenant
	// that has at least OwnBlockBytes (default 64 MiB) in the blocks that are
	// merged gets blocks of its own.
	MaxBlockBytes, OwnBlockBytes int64

	// Grace is how long blocks stay visible after they have been replaced, and
	// their objects after that: longer than any query and any age of its rows.
	Grace time.Duration

	Interval  time.Duration // between looks at what there is to do; default 1 min
	Lease     time.Duration // after so long without a sign of life another takes over; default 5 min
	OrphanAge time.Duration // of objects that nobody has published, before they go; default 24 h

	// Retentions gives how long what tenants have is kept at present. nil: for ever.
	Retentions func() *history.Retentions
	// CleanAge is after what time what is deleted is removed from blocks of the last
	// level, where nobody has asked for it earlier; default 24 h.
	CleanAge time.Duration

	MaxSources int // blocks merged at the same time; default 64

	Memcached *memcached.Client // where pages of recent blocks are written ahead; nil: there is none

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Defaults of Options, and what isn't worth an option.
const (
	defaultMaxBlockBytes = 512 << 20
	defaultOwnBlockBytes = 64 << 20
	defaultInterval      = time.Minute
	defaultLease         = 5 * time.Minute
	defaultCleanAge      = 24 * time.Hour
	defaultMaxSources    = 64

	// readBudget is how many bytes of ranges all sources of a merge hold together.
	readBudget = 256 << 20
	minRead    = 64 << 10
	maxRead    = 4 << 20
	// openWindows is how many blocks are written at the same time.
	openWindows = 32
)

// DefaultRanges are the widths of the levels.
func DefaultRanges() []time.Duration {
	return []time.Duration{2 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour}
}

func (o *Options) setDefaults() {
	if len(o.Ranges) == 0 {
		o.Ranges = DefaultRanges()
	}
	o.MaxBlockBytes = cmp.Or(o.MaxBlockBytes, defaultMaxBlockBytes)
	o.OwnBlockBytes = cmp.Or(o.OwnBlockBytes, defaultOwnBlockBytes)
	o.Interval = cmp.Or(o.Interval, defaultInterval)
	o.Lease = cmp.Or(o.Lease, defaultLease)
	o.OrphanAge = cmp.Or(o.OrphanAge, DefaultOrphanAge)
	o.CleanAge = cmp.Or(o.CleanAge, defaultCleanAge)
	if o.Retentions == nil {
		o.Retentions = func() *history.Retentions { return nil }
	}
	o.MaxSources = cmp.Or(o.MaxSources, defaultMaxSources)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
}

// Validate reports what is missing or impossible.
func (o *Options) Validate() error {
	switch {
	case o.Objects == nil || o.Index == nil || o.Dir == "":
		return errors.New("compact: an object store, an index and a directory are needed")
	case o.Grace <= 0:
		return errors.New("compact: a grace longer than the longest query is needed")
	case o.MaxBlockBytes < 0 || o.OwnBlockBytes < 0 || o.Interval < 0 || o.Lease < 0 || o.OrphanAge < 0 || o.CleanAge < 0 || o.MaxSources < 0:
		return errors.New("compact: sizes, times and numbers can't be negative")
	case o.MaxSources == 1:
		return errors.New("compact: one block at a time can't be merged with anything")
	}
	return ValidateRanges(o.Ranges)
}

// ValidateRanges says what is wrong with the widths of levels.
func ValidateRanges(ranges []time.Duration) error {
	const week = time.Duration(index.Width) * time.Millisecond
	if len(ranges) > 8 {
		return fmt.Errorf("%d ranges, at most 8 are possible", len(ranges))
	}
	for i, r := range ranges {
		switch {
		case r < time.Second || r > week || week%r != 0:
			return fmt.Errorf("a range of %s: from 1s to a week are possible that a week is a multiple of", r)
		case i > 0 && (r <= ranges[i-1] || r%ranges[i-1] != 0):
			return fmt.Errorf("a range of %s behind %s: each is a multiple of the one before", r, ranges[i-1])
		}
	}
	return nil
}

// Compactor looks for blocks that can be merged, merges them, and removes what
// has been replaced and what nobody has published. Any number of them may work
// on the same stores.
type Compactor struct {
	o       Options
	owner   string
	metrics *metrics
	logger  *slog.Logger
	now     func() time.Time
	entropy io.Reader // for ids
	queries int       // of the index at the same time
	reader  *history.History

	// Of the goroutine in Round.
	seen     map[slotKey]sighting
	strikes  map[ulid.ULID]int // how often a block could not be read
	swept    time.Time
	cleaner  cleaner
	surveyor *surveyor // nil: rounds survey themselves

	mu     sync.Mutex
	status Status
	// Written by the goroutine in Round.
	held      map[ulid.ULID]*heldJob
	postponed map[ulid.ULID]*postponed
}

type slotKey struct {
	level index.Level
	slot  uint8
}

// sighting is since when a job is known to be as it is.
type sighting struct {
	id    ulid.ULID
	state index.JobState
	beat  uint64
	since time.Time
}

// Status is what a Compactor has found and done last.
type Status struct {
	Pending         []int // blocks that wait, by their level
	Jobs            []index.Job
	Aside           []index.AsideRow
	Unreadable      []*index.RowError // rows that are left out
	UnreadableSince time.Time         // some are
	LastRound       time.Time         // that went well
	Err             error             // of the last round
	ErrSince        time.Time
}

// New makes a Compactor; Run starts it.
func New(o Options) (*Compactor, error) {
	o.setDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(o.Dir, "*.block"))
	if err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil {
			return nil, fmt.Errorf("compact: file of an interrupted merge: %w", err)
		}
	}
	id, err := ulid.New(ulid.Now(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	c := &Compactor{
		o: o, owner: id.String(), logger: o.Logger.With("component", "compactor"), now: time.Now, entropy: rand.Reader, queries: 16,
		seen: map[slotKey]sighting{}, strikes: map[ulid.ULID]int{},
		held: map[ulid.ULID]*heldJob{}, postponed: map[ulid.ULID]*postponed{},
	}
	// What it reads of blocks is read once.
	if c.reader, err = history.New(history.Options{Objects: o.Objects, Index: o.Index, PageCacheBytes: -1, RowCacheBytes: -1, Logger: o.Logger}); err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	if c.metrics, err = newMetrics(o.Registerer, len(o.Ranges)); err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	return c, nil
}

// Run works until ctx ends.
func (c *Compactor) Run(ctx context.Context) error {
	c.surveyor = &surveyor{done: make(chan surveyed, 1)}
	defer c.surveyor.wg.Wait()
	for {
		worked, err := c.Round(ctx)
		if ctx.Err() != nil {
			return nil // what was interrupted is done by the next, or by another
		}
		if err != nil {
			c.metrics.failures.Inc()
			c.logger.Warn("compaction fails, trying on", "err", err)
		}
		if worked && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(c.o.Interval):
		}
	}
}

// Round does what there is to do at present: it carries on jobs whose time has
// come, merges once, and looks for orphans now and then. It says whether it has
// merged: then there may be more. An error of one job doesn't keep it from others.
func (c *Compactor) Round(ctx context.Context) (worked bool, err error) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if err == nil {
			c.status.LastRound = c.now()
		} else if c.status.Err == nil {
			c.status.ErrSince = c.now()
		}
		c.status.Err = err
	}()
	v, err := c.look(ctx)
	if err != nil {
		return false, err
	}
	c.forgetHeld(v)
	c.forgetPostponed()
	var errs []error
	if err := c.replaceWork(ctx, v); err != nil {
		errs = append(errs, err)
	}
	if err := c.takeBack(ctx, v); err != nil {
		errs = append(errs, err)
	}
	for _, j := range v.jobs {
		if err := c.carryOn(ctx, v, j); err != nil {
			errs = append(errs, fmt.Errorf("job %s of level %d: %w", j.ID, j.Level, err))
		}
	}
	survey := func(ctx context.Context, v *view) error { return c.survey(ctx, v, &c.cleaner) }
	if c.surveyor != nil {
		survey = c.surveyBeside
	}
	if err := survey(ctx, v); err != nil {
		errs = append(errs, fmt.Errorf("look for what is deleted or past the retention: %w", err))
	}
	for _, g := range append(c.groups(v), c.cleanGroups(v)...) {
		done, err := c.tryGroup(ctx, v, g)
		if err != nil {
			c.metrics.jobs.WithLabelValues(levelLabel(g.makes), "failed").Inc()
			errs = append(errs, fmt.Errorf("compaction to level %d of %d blocks: %w", g.makes, len(g.sources), err))
		}
		if done && g.clean {
			delete(c.cleaner.todo, g.sources[0].Block)
		}
		if worked = worked || done; worked || ctx.Err() != nil {
			break
		}
	}
	if err := c.freeSlots(ctx, v); err != nil {
		errs = append(errs, err)
	}
	c.metrics.cleaning.Set(float64(len(c.cleaner.todo)))
	if now := c.now(); now.Sub(c.swept) >= c.o.OrphanAge/4 {
		if err := c.sweep(ctx); err != nil {
			errs = append(errs, fmt.Errorf("sweep: %w", err))
		} else {
			c.swept = now
		}
	}
	return worked, errors.Join(errs...)
}

// Status is what was found and done last.
func (c *Compactor) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// Conditions is what is wrong at present.
func (c *Compactor) Conditions() []health.Condition {
	s := c.Status()
	var out []health.Condition
	if s.Err != nil {
		out = append(out, health.Condition{Since: s.ErrSince, What: fmt.Sprintf("compaction fails: %v", s.Err)})
	}
	c.mu.Lock()
	for id, h := range c.held {
		out = append(out, health.Condition{Since: h.since, What: fmt.Sprintf("compaction %s waits, others go on: %v", id, h.err)})
	}
	for id, p := range c.postponed {
		if !p.until.IsZero() {
			out = append(out, health.Condition{Since: p.since, What: fmt.Sprintf("block %s is left out and tried again, others are compacted: %v", id, p.err)})
		}
	}
	c.mu.Unlock()
	for _, e := range s.Unreadable {
		out = append(out, health.Condition{Since: s.UnreadableSince, What: fmt.Sprintf("it is left out of compaction: %v", e)})
	}
	for _, a := range s.Aside {
		out = append(out, health.Condition{
			Since: ulid.Time(a.Block.Time()), What: fmt.Sprintf("block %s can't be read and is left as it is: %s", a.Block, a.Reason),
		})
	}
	return out
}

// horizons are what a tenant has past its retention, for compaction: samples of which
// summaries are to stay go by whole windows, and only out of blocks of the last level,
// where all that there is of a time comes together, when they are cleaned.
func (c *Compactor) horizons(r history.Retention, level index.Level, thin bool, now time.Time) history.Horizons {
	h := r.Horizons(now)
	switch {
	case !h.Summaries():
	case !c.rollups(c.top()): // there are none
		h = history.Before(h.Raw)
	case !thin || level < c.top() || !c.rollups(level):
		h = history.Before(h.Long)
	default:
		h.Raw = rollup.EndOf(h.Raw, rollup.Long) - rollup.Long + 1
		h.Short = min(h.Short, h.Raw)
		h.Long = min(h.Long, h.Raw)
	}
	return h
}

// hidden is what a group drops at present; of thin, tenants of which summaries stay, samples too.
func (c *Compactor) hidden(ctx context.Context, g *group, thin map[string]bool) (func(tenant string) *history.Hidden, error) {
	rows, err := c.o.Index.AllDeletions(ctx)
	if err != nil {
		return nil, err
	}
	ds := make(map[string][]index.Deletion, len(rows))
	for _, r := range rows {
		ds[r.Tenant] = r.Deletions
	}
	retentions, now := c.o.Retentions(), c.now()
	return func(tenant string) *history.Hidden {
		return history.NewHidden(ds[tenant], c.horizons(retentions.Of(tenant), g.makes, thin[tenant], now))
	}, nil
}

// Level bounds and widths are in ms.

// width of the windows that the blocks of a level are cut by. Flushes don't end
// on bounds, so those of the first level are only cut where the second will be:
// cutting them at both ends of two hours would make two of each.
func (c *Compactor) width(level index.Level) int64 {
	i := int(min(level, c.top())) - 1
	if i == 0 && len(c.o.Ranges) > 1 {
		i = 1
	}
	return c.o.Ranges[i].Milliseconds()
}

// rollups says whether blocks of a level get summaries of windows: those of a day
// or more do. They are cut on bounds of windows; a block of the first level has but
// the part of a window that was flushed in its time.
func (c *Compactor) rollups(level index.Level) bool {
	return Summarises(c.o.Ranges[min(level, c.top())-1]) // of more levels than there are now, too
}

// Summarises says whether blocks of a level of this width get summaries of windows.
func Summarises(width time.Duration) bool {
	return width >= 24*time.Hour && width%time.Hour == 0
}

func (c *Compactor) top() index.Level { return index.Level(len(c.o.Ranges)) } //nolint:gosec // at most 8

// mergeInto merges blocks, from the first on as many as it says, into others of a
// level and puts those into the object store; nothing of them is visible.
func (c *Compactor) mergeInto(ctx context.Context, g *group, blocks []index.JobSource, beat func(context.Context) error) (_ []index.CompactedRow, taken int, err error) {
	each := min(max(readBudget/int64(6*len(blocks)), minRead), maxRead)
	level := g.makes
	m := &merger{rollups: c.rollups(level)}
	for _, b := range blocks {
		s, err := openSource(ctx, c.o.Objects, b.BlockRef, each)
		if err != nil {
			return nil, 0, err
		}
		m.sources = append(m.sources, s)
	}
	if taken = fit(m.sources, c.width(level)); taken == 0 {
		b := blocks[0]
		return nil, 0, &BlockError{b.Block, b.Object, "footer", b.ObjectSize, fmt.Errorf("%w: its samples lie in more than %d windows of %s, or %d weeks",
			errTooWide, maxWindows, time.Duration(c.width(level))*time.Millisecond, maxReplaced)}
	}
	m.sources = m.sources[:taken]
	thin := g.thin
	if taken < len(g.sources) {
		thin = nil // what is left out, now or before, may overlap the others
	}
	if m.hidden, err = c.hidden(ctx, g, thin); err != nil {
		return nil, 0, err
	}
	o := &outputs{
		objects: c.o.Objects, dir: c.o.Dir, width: c.width(level), level: level, maxBytes: c.o.MaxBlockBytes, ownBytes: c.o.OwnBlockBytes,
		now: c.now, entropy: c.entropy, beat: beat,
		writer: chunkfmt.WriterOptions{Window: history.Window, Rollups: c.rollups(level)},
		shared: map[int64]*output{}, own: map[int64]*output{}, memcached: c.o.Memcached, logger: c.logger,
	}
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, o.abandon())
		// Nobody knows of them yet. Those that stay the sweeper finds.
		for _, row := range o.done {
			_ = c.o.Objects.Delete(context.WithoutCancel(ctx), row.Object)
		}
	}()
	for _, pass := range plan(m.sources, o.width, openWindows) {
		if err := m.merge(ctx, pass.MinT, pass.MaxT, o); err != nil {
			return nil, 0, err
		}
		if err := o.finish(ctx); err != nil {
			return nil, 0, err
		}
	}
	l := levelLabel(level)
	c.metrics.read.WithLabelValues(l).Add(float64(m.samples))
	c.metrics.written.WithLabelValues(l).Add(float64(o.samples))
	c.metrics.bytes.WithLabelValues(l).Add(float64(o.bytes))
	return o.done, taken, nil
}

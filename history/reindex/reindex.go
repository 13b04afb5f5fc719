// Package reindex makes the rows of the index again from the objects alone.
//
// A block says of itself all that its rows need: tenants, times, counts, level. What
// it doesn't say is whether it is still, or already, to be seen: a block that was
// replaced is there for a grace, one that a flush or compaction has not published
// stays until it is swept. Without an index none of them can be told from the others,
// so all that are whole get rows. That is right, for each sample of a tenant counts
// once, however many blocks have it: nothing is lost, and nothing doubled. What it
// costs is that summaries of windows aren't used where blocks overlap, until
// compaction has merged them; so a block of the last level, which compaction would not
// look at any more, becomes one of the level below where one of a lower level lies in
// the same window.
//
// Rows that aren't about blocks can't be made again: deletions that are in force,
// retention is configuration; which replica was chosen when; the engine options that
// sidecars report (they report them again); how far imports are. What a compaction has
// deleted in the last minutes may be there again.
//
// Where rows are left they are believed: a condemned block stays so, sources and
// outputs of a compaction under way are left to it, and no row is written over but block
// rows that can't be read.
package reindex

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/inspect"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Options of a Run. Objects and Index are needed.
type Options struct {
	Objects object.Store
	Index   *index.Index
	Ranges  []time.Duration // as the compactors have them

	// Write says that rows are written; else it is only looked what there is to do.
	Write bool
	// NotEmpty allows to write into an index in which blocks are found.
	NotEmpty bool

	// Report is called with what happens to each block, by one goroutine at a time;
	// it may be nil.
	Report func(Event)
}

// Event is what happens to a block.
type Event struct {
	Block  ulid.ULID
	Action Action
	Level  index.Level // that it gets
	Err    error       // of Unreadable

	Done, All int // blocks
}

// Action says what happens to a block.
type Action string

// What may happen.
const (
	Adopt      Action = "adopt"      // it gets rows
	Repair     Action = "repair"     // it is published, and lacks rows, which it gets
	Keep       Action = "keep"       // it has its rows
	Leave      Action = "leave"      // it is condemned, or part of a compaction under way
	Unreadable Action = "unreadable" // it isn't whole, has no footer, or its guard row can't be read
)

// Result counts blocks by what happens to them.
type Result map[Action]int

// ErrNotEmpty is what Run returns if it would write into an index that knows blocks.
var ErrNotEmpty = errors.New("the index is not empty")

// atOnce is how many blocks are looked at at the same time.
const atOnce = 16

// block is a block that is to be looked at.
type block struct {
	ref   index.BlockRef
	what  *inspect.Block
	guard index.GuardState
	busy  bool // part of a compaction under way
	level index.Level
	err   error // it can't be read
}

// Run looks at all objects and, if that is asked for, makes their rows. It can be
// ended and run again, with NotEmpty. Nothing else should write meanwhile.
func Run(ctx context.Context, o Options) (Result, error) {
	if o.Report == nil {
		o.Report = func(Event) {}
	}
	blocks, err := list(ctx, o.Objects)
	if err != nil {
		return nil, err
	}
	// Of a job that can't be read the blocks get rows too: what is there twice counts once.
	jobs, err := o.Index.Jobs(ctx)
	if _, some := errors.AsType[index.RowErrors](err); err != nil && !some {
		return nil, err
	}
	busy := map[ulid.ULID]bool{}
	for _, j := range jobs {
		for _, s := range j.Sources {
			busy[s.Block] = true
		}
		for _, out := range j.Outputs {
			busy[out.Block] = true
		}
	}
	if err := each(ctx, blocks, func(ctx context.Context, b *block) (err error) {
		b.busy = busy[b.ref.Block]
		b.guard, err = o.Index.GuardState(ctx, b.ref.Block)
		_, damaged := errors.AsType[*index.RowError](err)
		if err != nil && !damaged {
			return err
		}
		guardErr := err
		b.what, err = inspect.Open(ctx, o.Objects, b.ref, func(f *inspect.Fault) { b.err = fmt.Errorf("%s at offset %d: %w", f.Page, f.Offset, f.Err) })
		b.level = index.Level(b.what.Level) //nolint:gosec // a byte
		if damaged {
			b.err = guardErr // nobody knows whether it is to be seen
		}
		return err
	}); err != nil {
		return nil, err
	}
	known := len(busy)
	for _, b := range blocks {
		if b.guard != 0 {
			known++
		}
	}
	if known > 0 && o.Write && !o.NotEmpty {
		return nil, fmt.Errorf("%w: it knows %d of %d blocks", ErrNotEmpty, known, len(blocks))
	}
	lower(blocks, o.Ranges)

	r := Result{}
	var mu sync.Mutex
	first := int64(0) // day of the first flush
	err = each(ctx, blocks, func(ctx context.Context, b *block) error {
		action, err := o.block(ctx, b)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		r[action]++
		if day := index.NewWorkRow(b.ref.Block).Day; action == Adopt && (first == 0 || day < first) {
			first = max(1, day)
		}
		done := 0
		for _, n := range r {
			done += n
		}
		o.Report(Event{Block: b.ref.Block, Action: action, Level: b.level, Err: b.err, Done: done, All: len(blocks)})
		return nil
	})
	if err != nil || !o.Write || first == 0 {
		return r, err
	}
	// Compaction looks for flushes from there on.
	noted, err := o.Index.FirstDay(ctx)
	if err == nil && (noted == 0 || noted > first) {
		err = o.Index.SetFirstDay(ctx, noted, first)
	}
	return r, err
}

// list finds the objects of blocks.
func list(ctx context.Context, objects object.Store) ([]*block, error) {
	var out []*block
	prefix := strings.TrimSuffix(history.ObjectKey(ulid.ULID{}), ulid.ULID{}.String())
	err := objects.List(ctx, prefix, func(i object.Info) error {
		id, err := ulid.ParseStrict(strings.TrimPrefix(i.Key, prefix))
		if err == nil && i.Key == history.ObjectKey(id) {
			out = append(out, &block{ref: index.BlockRef{Block: id, Object: i.Key, ObjectSize: i.Size}})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list blocks: %w", err)
	}
	return out, nil
}

func each(ctx context.Context, blocks []*block, fn func(context.Context, *block) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, b := range blocks {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return fn(gctx, b) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// lower makes blocks of the last level such of the level below where there are
// blocks of lower levels in the same window, of the same tenant or shared.
func lower(blocks []*block, ranges []time.Duration) {
	if len(ranges) == 0 {
		ranges = compact.DefaultRanges()
	}
	top := index.Level(len(ranges)) //nolint:gosec // at most 8
	width := ranges[len(ranges)-1].Milliseconds()
	type place struct {
		tenant string
		window int64
	}
	of := func(b *block) (p place, ok bool) {
		if b.err != nil || len(b.what.Tenants) == 0 {
			return p, false
		}
		_, _, _, maxt := b.what.Totals()
		if p.window = (maxt - 1) / width; maxt <= 0 {
			p.window = maxt/width - 1
		}
		if len(b.what.Tenants) == 1 {
			p.tenant = b.what.Tenants[0].Name
		}
		return p, true
	}
	below := map[place]bool{}
	for _, b := range blocks {
		if p, ok := of(b); ok && b.level > 0 && b.level < top && b.guard != index.Condemned {
			below[p] = true
		}
	}
	for _, b := range blocks {
		if p, ok := of(b); ok && b.guard == 0 && b.level >= top && top > 1 && below[p] {
			b.level = top - 1
		}
	}
}

// block decides about a block and does it.
func (o *Options) block(ctx context.Context, b *block) (Action, error) {
	switch {
	case b.busy || b.guard == index.Condemned:
		return Leave, nil
	case b.err != nil:
		return Unreadable, nil //nolint:nilerr // it is reported
	case b.guard == 0:
		if !o.Write {
			return Adopt, nil
		}
		err := compact.Readmit(ctx, o.Objects, o.Index, index.JobSource{BlockRef: b.ref, Level: b.level}, o.Ranges)
		switch {
		case errors.Is(err, compact.ErrCondemned):
			return Leave, nil
		case errors.Is(err, chunkfmt.ErrCorrupt):
			b.err = err
			return Unreadable, nil
		}
		return Adopt, err
	}
	missing, err := o.missing(ctx, b)
	if err != nil || len(missing) == 0 {
		return Keep, err
	}
	if o.Write {
		err = o.Index.PutBlocks(ctx, missing)
	}
	return Repair, err
}

// missing are the rows that a published block should have and hasn't, or that can't be read.
func (o *Options) missing(ctx context.Context, b *block) ([]index.BlockRow, error) {
	var out []index.BlockRow
	for _, want := range b.what.Rows(b.level) {
		rows, err := o.Index.Blocks(ctx, want.Tenant, want.MaxT, want.MaxT, true)
		if _, damaged := errors.AsType[*index.RowError](err); damaged {
			// It, or another of about that time. What a row says beside what follows from its
			// block is of a compaction under way, and this block isn't part of one.
			rows, err = nil, nil
		}
		if err != nil {
			return nil, err
		}
		there := false
		for i := range rows {
			there = there || rows[i].ID() == want.ID()
		}
		if !there {
			out = append(out, want)
		}
	}
	return out, nil
}

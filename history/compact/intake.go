package compact

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// ErrCondemned is what Intake.Publish wraps if nothing of some blocks is visible,
// because a sweeper took them for orphans, or if they were compacted long ago. To
// put the same samples into new blocks is right in both cases: they count once.
var ErrCondemned = errors.New("blocks are condemned")

// IntakeOptions of an Intake. Objects, Index, Dir and Tenant are needed; Ranges
// are those of the compactors.
type IntakeOptions struct {
	Objects object.Store
	Index   *index.Index
	Dir     string // for blocks while they are written; the caller's
	Tenant  string
	Ranges  []time.Duration

	MaxBlockBytes, OwnBlockBytes int64 // as in Options
}

// Intake puts samples that come from elsewhere into blocks of a tenant, of a level
// from which compaction takes them on. It is not for concurrent use.
type Intake struct {
	o     IntakeOptions
	level index.Level
	top   index.Level
	width int64 // ms
	out   *outputs
}

// NewIntake makes an Intake for samples that come span ms at a time: of the highest
// level that spans no more, but for the last, whose blocks are not merged any more.
func NewIntake(o IntakeOptions, span int64) (*Intake, error) {
	c := Compactor{o: Options{
		Objects: o.Objects, Index: o.Index, Dir: o.Dir, Grace: time.Second, // there is none
		Ranges: o.Ranges, MaxBlockBytes: o.MaxBlockBytes, OwnBlockBytes: o.OwnBlockBytes,
	}}
	c.o.setDefaults()
	if err := c.o.Validate(); err != nil {
		return nil, err
	}
	if o.Tenant == "" {
		return nil, errors.New("compact: samples without a tenant")
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("compact: %w", err)
	}
	i := &Intake{o: o, level: 1, top: c.top()}
	for l := index.Level(2); l < i.top && c.o.Ranges[l-1].Milliseconds() <= span; l++ {
		i.level = l
	}
	i.width = c.width(i.level)
	i.out = &outputs{
		objects: o.Objects, dir: o.Dir, width: i.width, level: i.level, maxBytes: c.o.MaxBlockBytes, ownBytes: c.o.OwnBlockBytes,
		now: time.Now, entropy: rand.Reader, beat: func(ctx context.Context) error { return ctx.Err() },
		writer: chunkfmt.WriterOptions{Window: history.Window, Rollups: c.rollups(i.level)},
		shared: map[int64]*output{}, own: map[int64]*output{}, name: o.Tenant, large: true,
	}
	return i, nil
}

// Level is that of the blocks.
func (i *Intake) Level() index.Level { return i.level }

// Width is that of the windows by which blocks are cut, in ms.
func (i *Intake) Width() int64 { return i.width }

// Window is the first and the last ms of the window that t, in ms, lies in.
func (i *Intake) Window(t int64) (mint, maxt int64) {
	w := windowOf(t, i.width)
	return bounds(w, w, i.width)
}

// Add adds a series, of which it keeps nothing, in order of metric name, then
// labels. The same series may come again with samples of later windows. A block is
// open for each window that had samples since Finish.
func (i *Intake) Add(ctx context.Context, s *chunkfmt.Series) error { return i.out.series(ctx, s, nil) }

// Samples is how many were added.
func (i *Intake) Samples() int64 { return i.out.samples }

// Finish puts what was added into the object store and returns the blocks, of
// which nothing is visible. Afterwards series may come in order once more.
func (i *Intake) Finish(ctx context.Context) ([]index.CompactedRow, error) {
	if err := i.out.finish(ctx); err != nil {
		return nil, err
	}
	done := i.out.done
	i.out.done = nil
	for k := range done {
		if done[k].ObjectSize < i.out.ownBytes {
			done[k].Tenant = "" // it shares blocks, as it would have if it had been flushed
		}
	}
	return done, nil
}

// Abandon removes what isn't finished. The caller calls it at the end.
func (i *Intake) Abandon(ctx context.Context) error {
	err := i.out.abandon()
	// Nobody knows of these. Those that stay a sweeper finds.
	for _, b := range i.out.done {
		_ = i.o.Objects.Delete(context.WithoutCancel(ctx), b.Object)
	}
	i.out.done = nil
	return err
}

// Publish makes blocks that Finish has returned visible, all of them or, if the
// error wraps ErrCondemned, perhaps only some. It may be repeated.
func (i *Intake) Publish(ctx context.Context, blocks []index.CompactedRow) error {
	gone := 0
	for _, b := range blocks {
		err := Publish(ctx, i.o.Objects, i.o.Index, index.JobSource{BlockRef: b.BlockRef, Level: b.Level}, i.work(b))
		switch {
		case errors.Is(err, ErrCondemned), errors.Is(err, object.ErrNotExist):
			gone++
		case err != nil:
			return err
		}
	}
	if gone > 0 {
		return fmt.Errorf("%d of %d: %w", gone, len(blocks), ErrCondemned)
	}
	return nil
}

// work is the work row of a block, nil if it is of the last level.
func (i *Intake) work(b index.CompactedRow) *index.CompactedRow {
	if b.Level >= i.top {
		return nil
	}
	return &b
}

// Publish makes a whole block that replaces nothing visible, as a flush does: work
// row, block rows, guard row. work is its work row if its level is at least 1, nil
// if compaction is not to look at it; a block of level 0 always has one. If the
// block is condemned its rows are taken back, and the error wraps ErrCondemned.
func Publish(ctx context.Context, objects object.Store, x *index.Index, b index.JobSource, work *index.CompactedRow) error {
	f, err := readFooter(ctx, objects, b.BlockRef)
	if err != nil {
		return err
	}
	rows := history.Rows(b.BlockRef, b.Level, f.Tenants)
	switch {
	case b.Level == 0:
		w := index.NewWorkRow(b.Block)
		w.Object, w.ObjectSize = b.Object, b.ObjectSize
		err = x.PutWork(ctx, w)
	case work != nil:
		err = x.PutCompacted(ctx, []index.CompactedRow{*work})
	}
	if err != nil {
		return fmt.Errorf("publish block %s: work row: %w", b.Block, err)
	}
	if err := x.PutBlocks(ctx, rows); err != nil {
		return fmt.Errorf("publish block %s: block rows: %w", b.Block, err)
	}
	state, err := x.Guard(ctx, b.Block, index.Published)
	if err != nil {
		return fmt.Errorf("publish block %s: %w", b.Block, err)
	}
	if state == index.Published {
		return nil
	}
	c := Compactor{o: Options{Index: x}}
	if err := errors.Join(x.DeleteRows(ctx, rows), c.deleteWork(ctx, b)); err != nil {
		return fmt.Errorf("publish block %s: withdraw: %w", b.Block, err)
	}
	return fmt.Errorf("publish block %s: %w", b.Block, ErrCondemned)
}

// Readmit makes a block that lies in the object store visible and lets compaction
// take it on: one that replaces nothing, whose rows are lost or that was set aside.
// A level that its samples contradict, or that there isn't, counts as 0. If the block
// is condemned the error wraps ErrCondemned, if it can't be read it is a *BlockError.
func Readmit(ctx context.Context, objects object.Store, x *index.Index, b index.JobSource, ranges []time.Duration) error {
	if b.ObjectSize == 0 { // it wasn't there when it was set aside
		size, err := objects.Size(ctx, b.Object)
		if err != nil {
			return &BlockError{b.Block, b.Object, "object", 0, err}
		}
		b.ObjectSize = size
	}
	f, err := readFooter(ctx, objects, b.BlockRef)
	if err != nil {
		return err
	}
	source, work := workOf(b, f.Tenants, ranges)
	return Publish(ctx, objects, x, source, work)
}

// workOf gives the level that a block can have, and its work row, as Publish wants
// them.
func workOf(b index.JobSource, tenants []chunkfmt.TenantSummary, ranges []time.Duration) (index.JobSource, *index.CompactedRow) {
	c := Compactor{o: Options{Ranges: ranges}}
	c.o.setDefaults()
	b.Level = min(b.Level, c.top())
	if b.Level == 0 || len(tenants) == 0 {
		b.Level = 0
		return b, nil
	}
	// Compaction merges what lies in one window of the next level.
	width, maxt := c.width(b.Level), tenants[0].MaxT
	next := width
	if b.Level < c.top() {
		next = c.o.Ranges[b.Level].Milliseconds()
	}
	for _, t := range tenants {
		if windowOf(t.MinT, next) != windowOf(maxt, next) || windowOf(t.MaxT, next) != windowOf(maxt, next) {
			b.Level = 0 // it was not cut by these widths
			return b, nil
		}
		maxt = max(maxt, t.MaxT)
	}
	if b.Level == c.top() {
		return b, nil
	}
	window := windowOf(maxt, width)
	_, end := bounds(window, window, width)
	work := &index.CompactedRow{BlockRef: b.BlockRef, Level: b.Level, End: end}
	if len(tenants) == 1 && b.ObjectSize >= c.o.OwnBlockBytes {
		work.Tenant = tenants[0].Tenant
	}
	return b, work
}

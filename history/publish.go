package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// ErrCondemned is what Publish wraps when a sweeper took the block for an orphan
// because publishing it had been interrupted for longer than any grace. Nothing
// of the block is visible. The caller publishes the same data under a new id.
var ErrCondemned = errors.New("block was condemned by a sweeper")

// ObjectKey is where the object of a block is.
func ObjectKey(block ulid.ULID) string { return "blocks/" + block.String() }

// Window is the WriterOptions.Window of blocks that are to be published, in ms:
// what a writer tells apart by windows of this width gets rows of its own.
const Window = index.Width

// RowsError is what Publish and PublishRows return when the rows of some tenants
// could not be written: these are held back. For all other tenants of the call the
// block is durable.
type RowsError struct {
	// Published says that the block is there to stay. PublishRows writes the rows
	// that are left. If it is false no row could be written, all tenants are held
	// back, and the block is published by Publish again.
	Published bool
	Tenants   map[string]error // that are held back, and why
}

func (e *RowsError) Error() string {
	for tenant, err := range e.Tenants {
		return fmt.Sprintf("rows of %d tenants not written, such as of %q: %v", len(e.Tenants), tenant, err)
	}
	return "rows not written"
}

func (e *RowsError) Unwrap() []error { return slices.Collect(maps.Values(e.Tenants)) }

// Publish stores a flushed block of data and makes it visible: object, work row,
// block rows, guard row. When it returns nil the block is durable. After a
// *RowsError it is for some tenants. After any other error than ErrCondemned it may
// be called again with the same arguments, and must be until it returns nil, for
// part of the block may be visible.
func (h *History) Publish(ctx context.Context, block ulid.ULID, data []byte, summary *chunkfmt.Summary) error {
	start := time.Now()
	if summary.Size != int64(len(data)) {
		return fmt.Errorf("publish block %s: summary speaks of %d bytes, there are %d", block, summary.Size, len(data))
	}
	work, rows := flushRows(block, summary)
	if err := h.o.Objects.Put(ctx, work.Object, bytes.NewReader(data), summary.Size); err != nil {
		return fmt.Errorf("publish block %s: %w", block, err)
	}
	if err := h.o.Index.PutWork(ctx, work); err != nil {
		return fmt.Errorf("publish block %s: work row: %w", block, err)
	}
	left, err := PutRows(ctx, h.o.Index, rows)
	if err != nil {
		return fmt.Errorf("publish block %s: block rows: %w", block, err)
	}
	if len(left) > 0 && len(left) == len(summary.Tenants) {
		return fmt.Errorf("publish block %s: %w", block, &RowsError{Tenants: left})
	}
	state, err := h.o.Index.Guard(ctx, block, index.Published)
	if err != nil {
		return fmt.Errorf("publish block %s: %w", block, err)
	}
	if state != index.Published {
		if err := h.withdraw(ctx, work, rows); err != nil {
			return fmt.Errorf("publish block %s: withdraw: %w", block, err)
		}
		return fmt.Errorf("publish block %s: %w", block, ErrCondemned)
	}
	h.metrics.published.Inc()
	h.metrics.publishedBytes.Add(float64(summary.Size))
	h.metrics.publishSeconds.Observe(time.Since(start).Seconds())
	if err := WriteAhead(ctx, h.o.Memcached, work.Object, bytes.NewReader(data), summary, h.now()); err != nil {
		h.o.Logger.Warn("new block not written ahead", "block", block, "err", err)
	}
	if len(left) > 0 {
		return fmt.Errorf("publish block %s: %w", block, &RowsError{Published: true, Tenants: left})
	}
	return nil
}

// PublishRows writes the rows of tenants that Publish has left, in a block that is
// published. When it returns nil the block is durable for them: it is visible, or
// has been replaced and what replaced it is. After a *RowsError that is so for all
// but some. It may be called again, whatever it returned.
func (h *History) PublishRows(ctx context.Context, block ulid.ULID, summary *chunkfmt.Summary, tenants []string) error {
	replaced, err := h.replaced(ctx, block)
	if err != nil || replaced {
		return err
	}
	_, rows := flushRows(block, summary)
	rows = slices.DeleteFunc(rows, func(r index.BlockRow) bool { return !slices.Contains(tenants, r.Tenant) })
	left, err := PutRows(ctx, h.o.Index, rows)
	if err != nil {
		return fmt.Errorf("rows of block %s: %w", block, err)
	}
	if len(left) < len(tenants) {
		// A compaction that has begun meanwhile may have removed the rows just before
		// they were written; one that begins now will.
		if replaced, err = h.replaced(ctx, block); err != nil {
			return err
		}
		if replaced {
			if err := h.o.Index.DeleteRows(ctx, rows); err != nil {
				return fmt.Errorf("rows of block %s, which was replaced: %w", block, err)
			}
			return nil
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("rows of block %s: %w", block, &RowsError{Published: true, Tenants: left})
	}
	return nil
}

// replaced says whether compaction has replaced a published block. While it is
// about to, that is an error.
func (h *History) replaced(ctx context.Context, block ulid.ULID) (bool, error) {
	jobs, err := h.o.Index.Jobs(ctx)
	if err != nil {
		return false, fmt.Errorf("rows of block %s: %w", block, err)
	}
	for _, j := range jobs {
		if slices.ContainsFunc(j.Sources, func(s index.JobSource) bool { return s.Block == block }) {
			return false, fmt.Errorf("rows of block %s: compaction %s is just replacing the block", block, j.ID)
		}
	}
	// In this order: a job ends when its sources are condemned.
	state, err := h.o.Index.GuardState(ctx, block)
	if err != nil {
		return false, fmt.Errorf("rows of block %s: %w", block, err)
	}
	return state == index.Condemned, nil
}

// How rows are written tenant by tenant, where they can't be all at once.
const (
	rowWriters  = 8
	rowPatience = 30 * time.Second // for all of them
)

// PutRows writes block rows and says for which tenants that didn't work. One of them
// costs the others no more than a time-out of the index.
func PutRows(ctx context.Context, x *index.Index, rows []index.BlockRow) (left map[string]error, _ error) {
	err := x.PutBlocks(ctx, rows)
	if err == nil {
		return nil, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	byTenant := map[string][]index.BlockRow{}
	left = map[string]error{}
	for _, r := range index.Left(rows, err) {
		byTenant[r.Tenant] = append(byTenant[r.Tenant], r)
		left[r.Tenant] = err
	}
	if len(byTenant) < 2 {
		return left, nil
	}
	// One may have kept others from being written that were in a request with it. In
	// no particular order: those that fail take long, and those behind may have no turn.
	tctx, cancel := context.WithTimeout(ctx, rowPatience)
	defer cancel()
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(rowWriters)
	for tenant, rows := range byTenant {
		g.Go(func() error {
			if tctx.Err() != nil {
				return nil
			}
			err := x.PutBlocks(tctx, rows)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				delete(left, tenant)
			} else {
				left[tenant] = err
			}
			return nil
		})
	}
	_ = g.Wait() // it has none
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w, after %w", context.Cause(ctx), err)
	}
	return left, nil
}

// withdraw undoes what was written of a condemned block. The sweeper deletes the
// object; should it have done so before we wrote it again, it will find it again.
func (h *History) withdraw(ctx context.Context, work index.WorkRow, rows []index.BlockRow) error {
	byTenant := map[string][]index.RowID{}
	for i := range rows {
		byTenant[rows[i].Tenant] = append(byTenant[rows[i].Tenant], rows[i].ID())
	}
	for tenant, ids := range byTenant {
		if err := h.o.Index.DeleteBlocks(ctx, tenant, ids); err != nil {
			return err
		}
	}
	return h.o.Index.DeleteWork(ctx, work)
}

// flushRows are the rows of a block that was flushed.
func flushRows(block ulid.ULID, summary *chunkfmt.Summary) (index.WorkRow, []index.BlockRow) {
	work := index.NewWorkRow(block)
	work.Object, work.ObjectSize = ObjectKey(block), summary.Size
	return work, Rows(work.Ref(), 0, summary.Tenants)
}

// Rows are the block rows that a block of these tenants has: one for each tenant
// and window. They follow from the block alone.
func Rows(block index.BlockRef, level index.Level, tenants []chunkfmt.TenantSummary) []index.BlockRow {
	var rows []index.BlockRow
	for _, t := range tenants {
		windows := t.Windows
		if len(windows) == 0 {
			windows = []chunkfmt.Range{t.Range}
		}
		for _, w := range windows {
			for _, r := range split(w) {
				rows = append(rows, index.BlockRow{
					Tenant: t.Tenant, Block: block.Block, MinT: r.MinT, MaxT: r.MaxT, Object: block.Object, ObjectSize: block.ObjectSize,
					Directory: t.Directory, Level: level, Series: t.Series, Samples: t.Samples,
				})
			}
		}
	}
	return rows
}

// split cuts a range that is wider than a row may be, which a writer without
// windows gives, into windows (a, b] aligned to the epoch.
func split(r chunkfmt.Range) []chunkfmt.Range {
	var out []chunkfmt.Range
	for uint64(r.MaxT)-uint64(r.MinT) > uint64(index.Width) { //nolint:gosec // MinT <= MaxT
		// The end of the window that MinT is in.
		end := r.MinT - r.MinT%index.Width
		if r.MinT > end {
			end += index.Width
		}
		out = append(out, chunkfmt.Range{MinT: r.MinT, MaxT: end})
		r.MinT = end + 1
	}
	return append(out, r)
}

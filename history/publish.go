package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/oklog/ulid/v2"

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

// Publish stores a flushed block of data and makes it visible: object, work row,
// block rows, guard row. When it returns nil the block is durable. After any
// other error than ErrCondemned it may be called again with the same arguments,
// and must be until it returns nil, for part of the block may be visible.
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
	if err := h.o.Index.PutBlocks(ctx, rows); err != nil {
		return fmt.Errorf("publish block %s: block rows: %w", block, err)
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
	return nil
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

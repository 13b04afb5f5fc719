package history

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
)

const (
	// aheadAge is how old the last sample of a page may be for it to be written
	// ahead: what fresh dashboards look at.
	aheadAge = 6 * time.Hour
	// aheadTimeout is how long that may hold up its caller.
	aheadTimeout = 10 * time.Second
)

// WriteAhead puts the pages of a new block that have samples of the last hours into
// memcached, so that the first queries find them there: directories, label pages and
// series pages, then pages of samples and of windows. It waits for room in memcached's queue, for some
// seconds at most; what isn't put by then is left out. r has the block. An error
// means that the block can't be read, and harms nothing else.
func WriteAhead(ctx context.Context, m *memcached.Client, object string, r io.ReaderAt, summary *chunkfmt.Summary, now time.Time) error {
	if m == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, aheadTimeout)
	defer cancel()
	a := ahead{m: m, object: object, r: r, since: now.Add(-aheadAge).UnixMilli()}
	for i := range summary.Tenants {
		t := &summary.Tenants[i]
		if t.MaxT < a.since {
			continue
		}
		if err := a.indexes(ctx, t); err != nil {
			return fmt.Errorf("write ahead object %s: tenant %q: %w", object, t.Tenant, err)
		}
	}
	for _, at := range a.data {
		if ctx.Err() != nil {
			break
		}
		if _, err := a.put(ctx, at); err != nil {
			return fmt.Errorf("write ahead object %s: %w", object, err)
		}
	}
	return nil
}

type ahead struct {
	m      *memcached.Client
	object string
	r      io.ReaderAt
	since  int64               // ms
	data   []chunkfmt.Location // of pages of samples and windows that are to be put
}

func (a *ahead) put(ctx context.Context, at chunkfmt.Location) ([]byte, error) {
	b := make([]byte, at.Size)
	if n, err := a.r.ReadAt(b, at.Offset); n < len(b) {
		return nil, fmt.Errorf("%d bytes at %d: %w", at.Size, at.Offset, errors.Join(err, io.ErrUnexpectedEOF))
	}
	a.m.SetWaiting(ctx, memcached.Pages, pageKeyAt(a.object, at), b)
	return b, nil
}

// indexes puts what leads to a tenant's data pages, and notes those.
func (a *ahead) indexes(ctx context.Context, t *chunkfmt.TenantSummary) error {
	b, err := a.put(ctx, t.Directory)
	if err != nil {
		return err
	}
	d, err := chunkfmt.ParseDirectory(b)
	if err != nil {
		return err
	}
	if d.Labels.Size > 0 {
		if err := a.labels(ctx, d.Labels); err != nil {
			return err
		}
	}
	for _, ref := range d.Pages(nil, a.since, math.MaxInt64) {
		b := ref.Bytes
		if b == nil {
			if b, err = a.put(ctx, ref.Location); err != nil {
				return err
			}
		}
		p, err := chunkfmt.ParseSeriesPage(b)
		if err != nil {
			return err
		}
		a.data = append(a.data, p.DataPages()...)
		a.data = append(a.data, p.WindowPages(rollup.Long)...)
		a.data = append(a.data, p.WindowPages(rollup.Short)...)
	}
	return nil
}

// labels puts a label page, and the pages of labels with many values.
func (a *ahead) labels(ctx context.Context, at chunkfmt.Location) error {
	b, err := a.put(ctx, at)
	if err != nil {
		return err
	}
	lp, err := chunkfmt.ParseLabelPage(b)
	if err != nil {
		return err
	}
	for _, name := range lp.Names() {
		if values, at := lp.Values(name); values == nil && at.Size > 0 {
			if _, err := a.put(ctx, at); err != nil {
				return err
			}
		}
	}
	return nil
}

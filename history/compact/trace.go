package compact

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Trace is a place that names a tenant.
type Trace struct {
	What  string // kind of place
	Block ulid.ULID
	About string
}

// Traces lists the block rows, work rows, jobs, rows of imports and engine options, and
// objects that name a tenant. Objects
// are asked themselves, by their footers, whether any row names them or not; one that
// can't be read is a trace, for it may. It changes nothing. progress, if not nil, is
// called after each object.
func Traces(ctx context.Context, objects object.Store, x *index.Index, tenant string, progress func(done, all int)) ([]Trace, error) {
	var out []Trace
	rows, err := x.AllBlocks(ctx, tenant)
	if err != nil {
		return nil, err
	}
	at := func(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }
	for _, r := range rows {
		out = append(out, Trace{"block row", r.Block, fmt.Sprintf("%s to %s, level %d, %d samples", at(r.MinT), at(r.MaxT), r.Level, r.Samples)})
	}
	compacted, err := x.Compacted(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := x.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range compacted {
		if r.Tenant == tenant {
			out = append(out, Trace{"work row", r.Block, fmt.Sprintf("level %d", r.Level)})
		}
	}
	for _, j := range jobs {
		for _, o := range j.Outputs {
			if o.Tenant == tenant {
				out = append(out, Trace{"job row", o.Block, j.State.String()})
			}
		}
	}
	remains, err := x.Remains(ctx, tenant)
	if err != nil {
		return nil, err
	}
	for _, id := range remains.Imports {
		out = append(out, Trace{"import row", id, "a block of another system was imported"})
	}
	if remains.Engine {
		out = append(out, Trace{What: "engine row", About: "a sidecar reported the flags of its Prometheus"})
	}
	var blocks []index.BlockRef
	if err := eachBlock(ctx, objects, func(b index.BlockRef, _ time.Time) { blocks = append(blocks, b) }); err != nil {
		return nil, err
	}
	for i, b := range blocks {
		f, err := readFooter(ctx, objects, b)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			if unreadable(err) != "missing" { // else it went meanwhile
				out = append(out, Trace{"object", b.Block, fmt.Sprintf("can't be read: %v", err)})
			}
		default:
			if i := slices.IndexFunc(f.Tenants, func(s chunkfmt.TenantSummary) bool { return s.Tenant == tenant }); i >= 0 {
				t := f.Tenants[i]
				out = append(out, Trace{"object", b.Block, fmt.Sprintf("%s: %s to %s, %d samples", b.Object, at(t.MinT), at(t.MaxT), t.Samples)})
			}
		}
		if progress != nil {
			progress(i+1, len(blocks))
		}
	}
	return out, nil
}

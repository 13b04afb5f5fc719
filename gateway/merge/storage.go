package merge

import (
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// Storage is heads and history as one. It is safe for concurrent use.
type Storage struct {
	heads    *Heads
	history  *history.History
	tenantOf func(context.Context) string
}

// New makes a Storage. tenantOf says whose data a request is about.
func New(heads *Heads, h *history.History, tenantOf func(context.Context) string) *Storage {
	return &Storage{heads, h, tenantOf}
}

// Querier implements storage.Queryable; what it gives is a *Querier.
func (s *Storage) Querier(mint, maxt int64) (storage.Querier, error) {
	return &Querier{s: s, mint: mint, maxt: maxt}, nil
}

// ChunkQuerier implements storage.ChunkQueryable. Chunks are encoded anew, as
// Prometheus encodes them by default.
func (s *Storage) ChunkQuerier(mint, maxt int64) (storage.ChunkQuerier, error) {
	return &chunkQuerier{Querier: &Querier{s: s, mint: mint, maxt: maxt}}, nil
}

type chunkQuerier struct{ *Querier }

func (q *chunkQuerier) Select(ctx context.Context, sorted bool, hints *storage.SelectHints, ms ...*labels.Matcher) storage.ChunkSeriesSet {
	return storage.NewSeriesSetToChunkSet(q.Querier.Select(ctx, sorted, hints, ms...))
}

// ExemplarQuerier implements storage.ExemplarQueryable.
func (s *Storage) ExemplarQuerier(ctx context.Context) (storage.ExemplarQuerier, error) {
	return &exemplarQuerier{ctx, s}, nil
}

type warnKey struct{}

// WithWarn gives a context with which warn is told of warnings for which interfaces of
// Prometheus have no place, such as those of exemplars.
func WithWarn(ctx context.Context, warn func(annotations.Annotations)) context.Context {
	return context.WithValue(ctx, warnKey{}, warn)
}

// Warn tells whoever asked for it with WithWarn.
func Warn(ctx context.Context, ws annotations.Annotations) {
	if warn, ok := ctx.Value(warnKey{}).(func(annotations.Annotations)); ok {
		warn(ws)
	}
}

// exemplarQuerier keeps the context since the interface hands it over there.
type exemplarQuerier struct {
	ctx context.Context //nolint:containedctx // storage.ExemplarQuerier has no other place for it
	s   *Storage
}

func (q *exemplarQuerier) Select(mint, maxt int64, sets ...[]*labels.Matcher) ([]exemplar.QueryResult, error) {
	tenant := q.s.tenantOf(q.ctx)
	as, since, warnings, err := q.s.heads.exemplars(q.ctx, tenant, mint, maxt, sets)
	if err != nil {
		return nil, class(q.ctx, err)
	}
	Warn(q.ctx, warnings)
	snap, err := q.s.snapshot(q.ctx, tenant, mint, maxt, blocks(as), since)
	if err != nil {
		return nil, class(q.ctx, err)
	}
	all, err := snap.Exemplars(q.ctx, sets, mint, maxt)
	if err != nil {
		return nil, class(q.ctx, err)
	}
	for _, a := range as {
		for _, s := range a.value {
			if s.Exemplars = history.CutExemplars(s.Exemplars, snap.Hidden.Of(s.Labels)); len(s.Exemplars) > 0 {
				all = append(all, s)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b chunkfmt.Series) int { return labels.Compare(a.Labels, b.Labels) })
	out := []exemplar.QueryResult{}
	for _, s := range all {
		if n := len(out); n == 0 || !labels.Equal(out[n-1].SeriesLabels, s.Labels) {
			out = append(out, exemplar.QueryResult{SeriesLabels: s.Labels})
		}
		last := &out[len(out)-1]
		last.Exemplars = append(last.Exemplars, s.Exemplars...)
	}
	for i := range out {
		es := out[i].Exemplars
		slices.SortStableFunc(es, chunkfmt.CompareExemplars)
		out[i].Exemplars = slices.CompactFunc(es, func(a, b exemplar.Exemplar) bool { return chunkfmt.CompareExemplars(a, b) == 0 })
	}
	return out, nil
}

// blocks puts together what the headers name.
func blocks[T any](as []answer[T]) []ulid.ULID {
	var out []ulid.ULID
	for _, a := range as {
		out = append(out, a.header.Blocks...)
	}
	slices.SortFunc(out, ulid.ULID.Compare)
	return slices.Compact(out)
}

// snapshot of history after the heads have answered and named the blocks must. A
// member that has left has flushed before: rows kept from before it left, which
// is before since, don't know.
func (s *Storage) snapshot(ctx context.Context, tenant string, mint, maxt int64, must []ulid.ULID, since time.Time) (*history.Snapshot, error) {
	snap, err := s.history.Snapshot(ctx, tenant, mint, maxt, must, since)
	if err == nil {
		snap.Hold, snap.Read = account.From(ctx).Hold, account.From(ctx).Read
	}
	return snap, err
}

// recentMetadata is how far back metadata is looked for in blocks.
const recentMetadata = 2 * time.Hour

// Metadata gives what heads and recent blocks know of a metric, or of all if
// metric is empty, sorted by metric, each entry once.
func (s *Storage) Metadata(ctx context.Context, tenant, metric string) ([]fetch.MetricMetadata, annotations.Annotations, error) {
	out, must, since, warnings, err := s.heads.metadata(ctx, tenant, metric)
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	mint := time.Now().Add(-recentMetadata).UnixMilli()
	snap, err := s.snapshot(ctx, tenant, mint, math.MaxInt64, must, since)
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	old, err := snap.Metadata(ctx, metric, mint, math.MaxInt64)
	if err != nil {
		return nil, nil, class(ctx, err)
	}
	for _, m := range old {
		out = append(out, fetch.MetricMetadata(m))
	}
	slices.SortFunc(out, func(a, b fetch.MetricMetadata) int {
		return cmp.Or(cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Type, b.Type), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Help, b.Help))
	})
	return slices.Compact(out), warnings, nil
}

// Stats asks all ingesters what they hold of a tenant.
func (s *Storage) Stats(ctx context.Context, tenant string, limit int) ([]*fetchpb.StatsResponse, annotations.Annotations, error) {
	return s.heads.Stats(ctx, tenant, limit)
}

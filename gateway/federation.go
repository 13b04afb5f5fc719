package gateway

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// TenantLabel names the tenant of a series where a query is about several.
const TenantLabel = "__tenant_id__"

// originalTenantLabel has what a series itself has as TenantLabel.
const originalTenantLabel = "original_" + TenantLabel

// tenants is a storage whose requests are about one tenant or several: those of
// the context. With several, all series get the TenantLabel, and matchers on it
// choose among the tenants.
type tenants struct{ Storage }

// choose gives the tenants that the matchers on TenantLabel choose, and the other
// matchers.
func choose(all []string, ms []*labels.Matcher) (chosen []string, rest []*labels.Matcher) {
	chosen = slices.Clone(all)
	for _, m := range ms {
		switch m.Name {
		case TenantLabel:
			chosen = slices.DeleteFunc(chosen, func(t string) bool { return !m.Matches(t) })
		case originalTenantLabel:
			rest = append(rest, labels.MustNewMatcher(m.Type, TenantLabel, m.Value))
		default:
			rest = append(rest, m)
		}
	}
	return chosen, rest
}

func withTenantLabel(ls labels.Labels, tenant string) labels.Labels {
	b := labels.NewBuilder(ls)
	if own := ls.Get(TenantLabel); own != "" {
		b.Set(originalTenantLabel, own)
	}
	return b.Set(TenantLabel, tenant).Labels()
}

// Querier implements storage.Queryable.
func (s tenants) Querier(mint, maxt int64) (storage.Querier, error) {
	return &querier{s: s.Storage, mint: mint, maxt: maxt, of: map[string]storage.Querier{}}, nil
}

// ChunkQuerier implements storage.ChunkQueryable.
func (s tenants) ChunkQuerier(mint, maxt int64) (storage.ChunkQuerier, error) {
	q, err := s.Querier(mint, maxt)
	return chunkQuerier{q}, err
}

type chunkQuerier struct{ storage.Querier }

func (q chunkQuerier) Select(ctx context.Context, sorted bool, hints *storage.SelectHints, ms ...*labels.Matcher) storage.ChunkSeriesSet {
	if hints != nil && hints.Func == "series" {
		// Prometheus gives chunks all the same, and none for the same hint to a
		// Querier.
		h := *hints
		h.Func = ""
		hints = &h
	}
	return storage.NewSeriesSetToChunkSet(q.Querier.Select(ctx, sorted, hints, ms...))
}

// querier has a querier for each tenant, so that each has one snapshot.
type querier struct {
	s          Storage
	mint, maxt int64

	alone bool // see merge.Querier.Alone

	mu sync.Mutex
	of map[string]storage.Querier // by tenant
}

// Alone is as that of merge.Querier. Several tenants are read at the same time all the same.
func (q *querier) Alone() { q.alone = true }

// only gives the querier of a request's only tenant.
func (q *querier) only(tenant string) (storage.Querier, error) {
	one, err := q.tenant(tenant)
	if m, ok := one.(*merge.Querier); ok && q.alone {
		m.Alone()
	}
	return one, err
}

func (q *querier) tenant(name string) (storage.Querier, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if one := q.of[name]; one != nil {
		return one, nil
	}
	one, err := q.s.Querier(q.mint, q.maxt)
	if err == nil {
		q.of[name] = one
	}
	return one, err
}

// Selection is what the planner asks for. It is nil if there are several tenants:
// their queries are the engine's.
func (q *querier) Selection(ctx context.Context, newest bool, hints *storage.SelectHints, ms ...*labels.Matcher) *merge.Selection {
	all := tenantsOf(ctx)
	if len(all) != 1 {
		return nil
	}
	one, err := q.only(all[0])
	if err != nil {
		return nil // the engine runs into it
	}
	if m, ok := one.(*merge.Querier); ok {
		return m.Selection(ctx, newest, hints, ms...)
	}
	return nil
}

// SamplesFrom is as that of merge.Querier; for several tenants it doesn't matter.
func (q *querier) SamplesFrom(ctx context.Context) (int64, error) {
	if all := tenantsOf(ctx); len(all) == 1 {
		if one, err := q.tenant(all[0]); err == nil {
			if m, ok := one.(*merge.Querier); ok {
				return m.SamplesFrom(ctx)
			}
		}
	}
	return math.MinInt64, nil
}

// Close implements storage.LabelQuerier.
func (q *querier) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var errs []error
	for _, one := range q.of {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}

// Select implements storage.Querier.
func (q *querier) Select(ctx context.Context, sorted bool, hints *storage.SelectHints, ms ...*labels.Matcher) storage.SeriesSet {
	if len(ms) == 0 {
		return storage.EmptySeriesSet() // as in Prometheus's database
	}
	all := tenantsOf(ctx)
	if len(all) == 1 {
		one, err := q.only(all[0])
		if err != nil {
			return storage.ErrSeriesSet(err)
		}
		return one.Select(ctx, sorted, hints, ms...)
	}
	union := &unionSet{of: all}
	if hints != nil {
		union.limit = hints.Limit
	}
	chosen, rest := choose(all, ms)
	for _, t := range chosen { // all begin to read
		one, err := q.tenant(t)
		if err != nil {
			return storage.ErrSeriesSet(err)
		}
		union.sets = append(union.sets, tenantSet{t, one.Select(WithTenant(ctx, t), sorted, hints, rest...)})
	}
	return union
}

type tenantSet struct {
	tenant string
	storage.SeriesSet
}

// unionSet is the series of several tenants. A label more may change the order,
// so that all are taken before the first is given. They aren't decoded yet.
type unionSet struct {
	of     []string // tenants of the request
	sets   []tenantSet
	limit  int // 0: none
	series []storage.Series
	read   bool
	at     storage.Series
	err    error
}

func (u *unionSet) Next() bool {
	if !u.read {
		u.read = true
		u.series, u.err = u.all()
	}
	if u.err != nil || len(u.series) == 0 {
		return false
	}
	u.at, u.series = u.series[0], u.series[1:]
	return true
}

func (u *unionSet) all() ([]storage.Series, error) {
	var out []storage.Series
	for _, s := range u.sets {
		for s.Next() {
			at := s.At()
			out = append(out, labelledSeries{withTenantLabel(at.Labels(), s.tenant), at})
		}
		if err := s.Err(); err != nil {
			return nil, ofTenant(s.tenant, err)
		}
	}
	slices.SortFunc(out, func(a, b storage.Series) int { return labels.Compare(a.Labels(), b.Labels()) })
	if u.limit > 0 {
		out = out[:min(len(out), u.limit)]
	}
	return out, nil
}

func (u *unionSet) At() storage.Series { return u.at }
func (u *unionSet) Err() error         { return u.err }

func (u *unionSet) Warnings() annotations.Annotations {
	of := map[string]annotations.Annotations{}
	for _, s := range u.sets {
		of[s.tenant] = s.Warnings()
	}
	return together(u.of, of)
}

// together puts together the warnings about tenants, which name theirs, unless they
// are the same for all of a request.
func together(all []string, of map[string]annotations.Annotations) annotations.Annotations {
	count := map[string]int{}
	for _, ws := range of {
		for text := range ws {
			count[text]++
		}
	}
	var out annotations.Annotations
	for tenant, ws := range of {
		for text, w := range ws {
			if count[text] < len(all) {
				w = ofTenant(tenant, w)
			}
			out.Add(w)
		}
	}
	return out
}

// ofTenant names the tenant that an error or a warning is of. That the request was cancelled,
// took too long or met a limit is of all its tenants.
func ofTenant(tenant string, err error) error {
	if _, cancelled := errors.AsType[promql.ErrQueryCanceled](err); cancelled || errors.Is(err, account.ErrLimit) {
		return err
	}
	if _, late := errors.AsType[promql.ErrQueryTimeout](err); late {
		return err
	}
	return fmt.Errorf("tenant %s: %w", tenant, err)
}

type labelledSeries struct {
	labels labels.Labels
	storage.SampleIterable
}

func (s labelledSeries) Labels() labels.Labels { return s.labels }

// each asks all chosen tenants at once, and puts together the sorted strings that
// they give.
func (q *querier) each(ctx context.Context, chosen []string, fn func(ctx context.Context, one storage.Querier) ([]string, annotations.Annotations, error)) ([]string, annotations.Annotations, error) {
	out, warnings, err := ofEach(ctx, chosen, func(ctx context.Context, tenant string) ([]string, annotations.Annotations, error) {
		one, err := q.tenant(tenant)
		if err != nil {
			return nil, nil, err
		}
		return fn(ctx, one)
	})
	slices.Sort(out)
	return slices.Compact(out), warnings, err
}

func limited(names []string, hints *storage.LabelHints) []string {
	if hints != nil && hints.Limit > 0 {
		return names[:min(len(names), hints.Limit)]
	}
	return names
}

// LabelValues implements storage.LabelQuerier.
func (q *querier) LabelValues(ctx context.Context, name string, hints *storage.LabelHints, ms ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	all := tenantsOf(ctx)
	if len(all) == 1 {
		one, err := q.only(all[0])
		if err != nil {
			return nil, nil, err
		}
		return one.LabelValues(ctx, name, hints, ms...)
	}
	chosen, rest := choose(all, ms)
	out, warnings, err := q.each(ctx, chosen, func(ctx context.Context, one storage.Querier) ([]string, annotations.Annotations, error) {
		switch name {
		case TenantLabel:
		case originalTenantLabel:
			return one.LabelValues(ctx, TenantLabel, hints, rest...)
		default:
			return one.LabelValues(ctx, name, hints, rest...)
		}
		names, warnings, err := one.LabelNames(ctx, &storage.LabelHints{Limit: 1}, rest...)
		if len(names) == 0 {
			return nil, warnings, err
		}
		return []string{TenantOf(ctx)}, warnings, err
	})
	return limited(out, hints), warnings, err
}

// LabelNames implements storage.LabelQuerier.
func (q *querier) LabelNames(ctx context.Context, hints *storage.LabelHints, ms ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	all := tenantsOf(ctx)
	if len(all) == 1 {
		one, err := q.only(all[0])
		if err != nil {
			return nil, nil, err
		}
		return one.LabelNames(ctx, hints, ms...)
	}
	chosen, rest := choose(all, ms)
	out, warnings, err := q.each(ctx, chosen, func(ctx context.Context, one storage.Querier) ([]string, annotations.Annotations, error) {
		names, warnings, err := one.LabelNames(ctx, hints, rest...)
		if len(names) > 0 {
			if slices.Contains(names, TenantLabel) {
				names = append(names, originalTenantLabel)
			}
			names = append(names, TenantLabel)
		}
		return names, warnings, err
	})
	return limited(out, hints), warnings, err
}

// SearchLabelNames implements storage.Searcher.
func (q *querier) SearchLabelNames(ctx context.Context, hints *storage.SearchHints, ms ...*labels.Matcher) storage.SearchResultSet {
	names, warnings, err := q.LabelNames(ctx, nil, ms...)
	return found(names, hints, warnings, err)
}

// SearchLabelValues implements storage.Searcher.
func (q *querier) SearchLabelValues(ctx context.Context, name string, hints *storage.SearchHints, ms ...*labels.Matcher) storage.SearchResultSet {
	values, warnings, err := q.LabelValues(ctx, name, nil, ms...)
	return found(values, hints, warnings, err)
}

func found(values []string, hints *storage.SearchHints, warnings annotations.Annotations, err error) storage.SearchResultSet {
	if err != nil {
		return storage.ErrSearchResultSet(err, warnings)
	}
	return storage.NewSearchResultSetFromSlice(storage.ApplySearchHints(values, hints), warnings)
}

// ExemplarQuerier implements storage.ExemplarQueryable.
func (s tenants) ExemplarQuerier(ctx context.Context) (storage.ExemplarQuerier, error) {
	if len(tenantsOf(ctx)) == 1 {
		return s.Storage.ExemplarQuerier(ctx)
	}
	return &exemplarQuerier{ctx, s.Storage}, nil
}

// exemplarQuerier is of several tenants. It keeps the context since the interface hands it
// over there.
type exemplarQuerier struct {
	ctx context.Context //nolint:containedctx // storage.ExemplarQuerier has no other place for it
	s   Storage
}

// Select implements storage.ExemplarQuerier.
func (q *exemplarQuerier) Select(mint, maxt int64, sets ...[]*labels.Matcher) ([]exemplar.QueryResult, error) {
	out, warnings, err := ofEach(q.ctx, tenantsOf(q.ctx), func(ctx context.Context, tenant string) (rs []exemplar.QueryResult, warnings annotations.Annotations, err error) {
		var mine [][]*labels.Matcher
		for _, ms := range sets {
			if chosen, rest := choose([]string{tenant}, ms); len(chosen) > 0 {
				mine = append(mine, rest)
			}
		}
		if len(mine) == 0 {
			return nil, nil, nil
		}
		one, err := q.s.ExemplarQuerier(merge.WithWarn(ctx, func(ws annotations.Annotations) { warnings.Merge(ws) }))
		if err == nil {
			rs, err = one.Select(mint, maxt, mine...)
		}
		for i := range rs {
			rs[i].SeriesLabels = withTenantLabel(rs[i].SeriesLabels, tenant)
		}
		return rs, warnings, err
	})
	if err != nil {
		return nil, err
	}
	merge.Warn(q.ctx, warnings)
	slices.SortFunc(out, func(a, b exemplar.QueryResult) int { return labels.Compare(a.SeriesLabels, b.SeriesLabels) })
	return out, nil
}

// ofEach asks about tenants of the request, all at once, and gives what fn says of them in
// their order.
func ofEach[T any](ctx context.Context, chosen []string, fn func(ctx context.Context, tenant string) ([]T, annotations.Annotations, error)) ([]T, annotations.Annotations, error) {
	lists, warnings := make([][]T, len(chosen)), make([]annotations.Annotations, len(chosen))
	g, groupCtx := errgroup.WithContext(ctx)
	for i, t := range chosen {
		g.Go(func() (err error) {
			lists[i], warnings[i], err = fn(WithTenant(groupCtx, t), t)
			if err != nil && len(tenantsOf(ctx)) > 1 {
				err = ofTenant(t, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	out, of := []T{}, map[string]annotations.Annotations{}
	for i, t := range chosen {
		out = append(out, lists[i]...)
		of[t] = warnings[i]
	}
	return out, together(tenantsOf(ctx), of), nil
}

// metadata is that of the request's tenants, sorted by metric, each entry once.
func (s tenants) metadata(ctx context.Context, metric string) ([]fetch.MetricMetadata, annotations.Annotations, error) {
	all, warnings, err := ofEach(ctx, tenantsOf(ctx), func(ctx context.Context, tenant string) ([]fetch.MetricMetadata, annotations.Annotations, error) {
		return s.Metadata(ctx, tenant, metric)
	})
	seen := map[fetch.MetricMetadata]bool{}
	all = slices.DeleteFunc(all, func(m fetch.MetricMetadata) bool {
		old := seen[m]
		seen[m] = true
		return old
	})
	slices.SortStableFunc(all, func(a, b fetch.MetricMetadata) int { return strings.Compare(a.Metric, b.Metric) })
	return all, warnings, err
}

// stats are those of the request's tenants.
func (s tenants) stats(ctx context.Context, limit int) ([]*fetchpb.StatsResponse, annotations.Annotations, error) {
	return ofEach(ctx, tenantsOf(ctx), func(ctx context.Context, tenant string) ([]*fetchpb.StatsResponse, annotations.Annotations, error) {
		return s.Stats(ctx, tenant, limit)
	})
}

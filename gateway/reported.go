package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

const (
	// reportAge is how long what a tenant's Prometheus was said to have is taken for
	// true: how long another gateway takes to notice a change.
	reportAge = 30 * time.Second
	// reportRetry is how soon what could never be read is read again: until then queries
	// may mean something else than at the tenant's Prometheus.
	reportRetry    = time.Second
	reportTimeout  = 2 * time.Second
	maxReports     = 100_000  // tenants that reports are kept of
	maxVariants    = 32       // engines with different options
	maxReportBytes = 64 << 10 // of a request
)

// EngineReport is the body of POST /api/v1/engine: what of the flags and the
// configuration of a tenant's Prometheus changes what a query means.
type EngineReport struct {
	LookbackDelta      model.Duration `json:"lookback_delta"`
	EnableFeatures     []string       `json:"enable_features"`     // all of them, known to this gateway or not
	EvaluationInterval model.Duration `json:"evaluation_interval"` // 0: it isn't known
}

// reports are what sidecars have told of their Prometheis' engines, as the index
// has it. It is safe for concurrent use.
type reports struct {
	index  *index.Index // nil: there are none
	logger *slog.Logger

	mu      sync.Mutex
	all     map[string]*report
	failing bool // the last row that was asked for couldn't be read
}

type report struct {
	writing sync.Mutex // held while the row is written: what is known is what was written last

	mu    sync.Mutex      // held while the row is read
	known bool            // it has been read, or written
	bad   bool            // it couldn't be read the last time
	next  time.Time       // when it is to be read again
	row   index.EngineRow // LookbackDelta is 0 if there is none
}

// errNotReported is what answers warn of where a tenant's engine options were never
// read.
var errNotReported = errors.New("engine options of the tenant's Prometheus (lookback delta, feature flags, evaluation interval) can't be read from the index, this answer is by those that the gateway is configured with: it may differ from that Prometheus's")

func (s *reports) of(tenant string) *report {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.all[tenant]
	if r == nil {
		if len(s.all) >= maxReports {
			clear(s.all) // rare, and costs a row for each tenant that asks again
		}
		r = &report{}
		s.all[tenant] = r
	}
	return r
}

// get returns what is known of a tenant. Where the row can't be read what was
// known before holds on; if nothing was, it gives errNotReported.
func (s *reports) get(ctx context.Context, tenant string) (row index.EngineRow, found bool, err error) {
	if s.index == nil {
		return row, false, nil
	}
	r := s.of(tenant)
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Now().After(r.next) {
		// Others wait for this read: it doesn't end with the request.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportTimeout)
		defer cancel()
		row, _, err := s.index.Engine(ctx, tenant)
		s.note(tenant, err, r.bad)
		r.bad = err != nil
		age := reportAge
		switch {
		case err == nil:
			r.row, r.known = row, true
		case !r.known:
			age = reportRetry
		}
		r.next = time.Now().Add(age)
	}
	if !r.known {
		return row, false, errNotReported
	}
	return r.row, r.row.LookbackDelta > 0, nil
}

// note logs when rows can't be read any more, once for all tenants, or for the one of which alone
// it is so: was says that it was before.
func (s *reports) note(tenant string, err error, was bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && !was && !s.failing {
		s.logger.Warn("engine options that sidecars reported can't be read, those known before hold on; answers warn where there are none", "tenant", tenant, "err", err)
	}
	s.failing = err != nil
}

// put stores what a sidecar reports. Queries don't wait for that.
func (s *reports) put(ctx context.Context, row index.EngineRow) error {
	r := s.of(row.Tenant)
	r.writing.Lock()
	defer r.writing.Unlock()
	if err := s.index.PutEngine(ctx, row); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.row.Equal(row) {
		s.logger.Info("engine options of the tenant's Prometheus reported", "tenant", row.Tenant,
			"lookback_delta", time.Duration(row.LookbackDelta)*time.Millisecond, "enable_features", row.Features,
			"evaluation_interval", time.Duration(row.EvaluationInterval)*time.Millisecond)
	}
	r.row, r.known, r.next = row, true, time.Now().Add(reportAge)
	return nil
}

// with gives the options of a tenant whose Prometheus has these: its lookback
// delta, its evaluation interval if that is known, and its features beside those that
// all tenants have.
func (o EngineOptions) with(row index.EngineRow) EngineOptions {
	e := EngineOptions{
		LookbackDelta: time.Duration(row.LookbackDelta) * time.Millisecond, EvaluationInterval: o.EvaluationInterval, Features: slices.Clone(o.Features),
	}
	if row.EvaluationInterval > 0 {
		e.EvaluationInterval = time.Duration(row.EvaluationInterval) * time.Millisecond
	}
	for _, f := range row.Features {
		if slices.Contains(Features(), f) && !e.has(f) {
			e.Features = append(e.Features, f)
		}
	}
	return e
}

// variantOf gives the API as tenants have it: with the options of the
// configuration, or those of the tenant's Prometheus. Where several have different
// ones, it is that of tenants with no options of their own. Whoever asked for it with
// merge.WithWarn is told if options can't be known.
func (a *API) variantOf(ctx context.Context, tenants []string) *variant {
	all, warnings, _ := ofEach(ctx, tenants, func(ctx context.Context, tenant string) ([]*variant, annotations.Annotations, error) {
		v, err := a.variantOfOne(ctx, tenant)
		if err != nil {
			return []*variant{v}, annotations.New().Add(err), nil
		}
		return []*variant{v}, nil, nil
	})
	merge.Warn(ctx, warnings)
	if slices.ContainsFunc(all, func(v *variant) bool { return v != all[0] }) {
		return a.variant
	}
	return all[0]
}

// variantOfOne is variantOf one tenant. With an error it is by the options that are known.
func (a *API) variantOfOne(ctx context.Context, tenant string) (*variant, error) {
	if v := a.tenants[tenant]; v != nil {
		return v, nil
	}
	row, found, err := a.reports.get(ctx, tenant)
	if !found {
		return a.variant, err
	}
	e := a.opts.Engine.with(row)
	key := e.key()
	known := func() *variant {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.variants[key]
	}
	if v := known(); v != nil {
		return v, nil
	}
	// To make one takes a tenth of a second of CPU: one at a time, and nobody waits who
	// needs another.
	a.building.Lock()
	defer a.building.Unlock()
	if v := known(); v != nil {
		return v, nil
	}
	// Without metrics: there is no bound on what tenants may report.
	v := a.newVariant(e, nil, a.gatherer)
	v.reported = true
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.variants)-a.configured >= maxVariants {
		for k, v := range a.variants { // any: it is made anew when it is needed
			if v.reported {
				delete(a.variants, k)
				break
			}
		}
	}
	a.variants[key] = v
	return v, nil
}

// engine is POST engine, as docs/api.md says.
func (a *API) engine(w http.ResponseWriter, r *http.Request) {
	if a.reports.index == nil {
		respondError(w, http.StatusNotImplemented, "unavailable", fmt.Errorf("this gateway takes no reports of engine options"))
		return
	}
	var q EngineReport
	if err := posted(w, r, maxReportBytes, &q); err != nil {
		respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("report of engine options: %w", err))
		return
	}
	slices.Sort(q.EnableFeatures)
	row := index.EngineRow{
		Tenant: TenantOf(r.Context()), LookbackDelta: time.Duration(q.LookbackDelta).Milliseconds(), Features: slices.Compact(q.EnableFeatures),
		EvaluationInterval: time.Duration(q.EvaluationInterval).Milliseconds(),
	}
	if err := row.Validate(); err != nil {
		respondError(w, http.StatusBadRequest, "bad_data", err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), claimTimeout)
	defer cancel()
	if err := a.reports.put(ctx, row); err != nil {
		if r.Context().Err() == nil {
			a.logger.Warn("engine options of a tenant can't be stored", "tenant", row.Tenant, "err", err)
		}
		respondError(w, http.StatusServiceUnavailable, "unavailable", err)
		return
	}
	respond(w, struct{}{}, nil)
}

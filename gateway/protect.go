package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/stats"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// Limits of a tenant's queries.
type Limits struct {
	account.Limits
	Queries int // at a time, at one gateway; a few times as many wait. 0: no limit
}

// Prices are what requests cost, in dollars.
type Prices struct {
	MillionObjectGets float64
	MillionIndexReads float64
}

// statusClientGone is Prometheus's code for a client that has gone.
const statusClientGone = 499

// queuePerQuery is how many queries of a tenant wait for each that may run.
const queuePerQuery = 10

// gates let so many queries of each tenant run at a time.
type gates struct {
	mu  sync.Mutex
	all map[string]*gate // of tenants that have some
}

type gate struct {
	free  chan struct{} // has an element for each query that runs
	users int           // that run or wait
}

// tooManyError is what a tenant gets of which too many queries wait already.
type tooManyError struct{ running, waiting int }

func (e tooManyError) Error() string {
	return fmt.Sprintf("%d queries of the tenant are running and %d are waiting (limit gateway.limits.queries is %d): try again later", e.running, e.waiting, e.running)
}

// enter waits until another query of the tenant may run. It gives a tooManyError, or
// why ctx has ended.
func (g *gates) enter(ctx context.Context, tenant string, limit int) (leave func(), err error) {
	if limit <= 0 {
		return func() {}, nil
	}
	g.mu.Lock()
	one := g.all[tenant]
	if one == nil {
		one = &gate{free: make(chan struct{}, limit)}
		g.all[tenant] = one
	}
	if one.users >= limit*(1+queuePerQuery) {
		g.mu.Unlock()
		return nil, tooManyError{limit, one.users - limit}
	}
	one.users++
	g.mu.Unlock()
	gone := func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(g.all, tenant)
		}
	}
	select {
	case one.free <- struct{}{}:
		return func() {
			<-one.free
			gone()
		}, nil
	case <-ctx.Done():
		gone()
		return nil, context.Cause(ctx)
	}
}

// enter waits until another query of each tenant may run, as gates.enter does. Tenants
// come in order, so that no two queries wait for each other.
func (a *API) enter(ctx context.Context, tenants []string) (leave func(), err error) {
	var leaves []func()
	leave = func() {
		for _, l := range leaves {
			l()
		}
	}
	for _, t := range tenants {
		l, err := a.gates.enter(ctx, t, a.limitsOf([]string{t}).Queries)
		if err != nil {
			leave()
			return nil, err
		}
		leaves = append(leaves, l)
	}
	return leave, nil
}

// limitsOf are those of a tenant; of several together, the strictest of each kind, but
// for Queries, which is of each.
func (a *API) limitsOf(tenants []string) Limits {
	of := func(tenant string) Limits {
		if l, ok := a.opts.TenantLimits[tenant]; ok {
			return l
		}
		return a.opts.Limits
	}
	l := of(tenants[0])
	for _, t := range tenants[1:] {
		o := of(t)
		l.Series = strictest(l.Series, o.Series)
		l.Samples = strictest(l.Samples, o.Samples)
		l.Range = strictest(l.Range, o.Range)
		l.Bytes = strictest(l.Bytes, o.Bytes)
	}
	return l
}

// strictest of two limits; 0 is none.
func strictest[N int | int64 | time.Duration](a, b N) N {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// counts says whether a request reads what a tenant has: of such a tenant may have so many
// at a time, whether they are queries or not. Requests of sidecars are none.
func counts(path string) bool {
	switch path {
	case "/api/v1/query", "/api/v1/query_range", "/api/v1/query_exemplars", "/api/v1/read", "/federate",
		"/api/v1/query_explain", "/api/v1/query_range_explain", // which read heads
		"/api/v1/query_cost", "/api/v1/query_range_cost", // likewise
		"/api/v1/series", "/api/v1/labels", "/api/v1/metadata", "/api/v1/status/tsdb", "/api/v1/status/active_series":
		return true
	}
	return strings.HasPrefix(path, "/api/v1/label/") || strings.HasPrefix(path, "/api/v1/search/")
}

// timed says whether the time of a request that counts is bounded here. That of a query
// is the engine's to bound, and a remote read lasts as long as the client takes it.
func timed(path string) bool {
	return path != "/api/v1/query" && path != "/api/v1/query_range" && path != "/api/v1/read"
}

// protect serves a request within the limits of its tenant, and logs it if it was
// slow.
func (a *API) protect(w http.ResponseWriter, r *http.Request, h http.Handler) {
	tenants := tenantsOf(r.Context())
	limits := a.limitsOf(tenants)
	name := strings.Join(tenants, "|")
	ctx, acc, done := a.opts.Memory.Open(r.Context(), limits.Limits)
	defer done()
	r, err := withBody(w, r.WithContext(ctx), a.bodyTimeout)
	if err != nil {
		failBody(w, err)
		return
	}
	if r.URL.Path == "/api/v1/read" {
		w = &readWriter{w, acc}
	}
	if !counts(r.URL.Path) {
		h.ServeHTTP(w, r)
		return
	}
	begin := time.Now()
	bounded, cancel := account.WithTimeout(ctx, a.opts.QueryTimeout)
	defer cancel()
	leave, err := a.enter(bounded, tenants)
	if err != nil {
		a.failToEnter(w, limits, err)
		return
	}
	defer leave()
	params := url.Values{}
	switch r.URL.Path {
	case "/api/v1/query", "/api/v1/query_range":
		// Handlers work on copies of the request: what they parse isn't seen here.
		// These two of Prometheus's overlook an error too.
		_ = r.ParseForm()
		params = r.Form
	}
	if timed(r.URL.Path) {
		r = r.WithContext(bounded)
	}
	h.ServeHTTP(w, r)
	took := time.Since(begin)
	if a.opts.SlowQuery == 0 || took < a.opts.SlowQuery {
		return
	}
	c := acc.Cost()
	a.logger.Warn("slow query", "tenant", name, "path", r.URL.Path, "query", params.Get("query"),
		"start", params.Get("start"), "end", params.Get("end"), "step", params.Get("step"), "time", params.Get("time"),
		"took", took, "series", c.Series, "samples", c.Samples, "windows", c.Windows, "object_gets", c.ObjectGets, "object_bytes", c.ObjectBytes,
		"index_queries", c.IndexQueries, "pages", c.Pages, "pages_cached", c.PagesCached, "pages_memcached", c.PagesMemcached,
		"parts_kept", c.PartsKept, "parts_memcached", c.PartsMemcached, "parts_here", c.PartsHere, "parts_elsewhere", c.PartsElsewhere)
}

// failToEnter answers where enter gave an error.
func (a *API) failToEnter(w http.ResponseWriter, l Limits, err error) {
	var many tooManyError
	var late promql.ErrQueryTimeout
	switch {
	case errors.As(err, &many):
		w.Header().Set("Retry-After", "1")
		respondError(w, http.StatusTooManyRequests, "too_many_requests", err)
	case errors.As(err, &late):
		respondError(w, http.StatusServiceUnavailable, "timeout", fmt.Errorf(
			"query timed out while it waited for others of the tenant (limit gateway.limits.queries is %d, gateway.query_timeout is %s)", l.Queries, a.opts.QueryTimeout))
	case errors.Is(err, account.ErrLimit):
		respondError(w, http.StatusUnprocessableEntity, "execution", err)
	default:
		respondError(w, statusClientGone, "canceled", err)
	}
}

// readWriter makes it the client's fault if a remote read goes beyond a limit:
// Prometheus's handler knows no such errors.
type readWriter struct {
	http.ResponseWriter
	account *account.Account
}

// Unwrap is for http.ResponseController.
func (w *readWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *readWriter) WriteHeader(code int) {
	if code == http.StatusInternalServerError && w.account.Ended() {
		code = http.StatusUnprocessableEntity
	}
	w.ResponseWriter.WriteHeader(code)
}

// Flush implements http.Flusher.
func (w *readWriter) Flush() {
	_ = http.NewResponseController(w.ResponseWriter).Flush() // it can't: nothing is lost
}

// queryStats are Prometheus's, and what the query has cost.
type queryStats struct {
	stats.BuiltinStats

	Cost queryCost `json:"cost"`
}

type queryCost struct {
	account.Cost

	Dollars float64 `json:"dollars"` // for requests to the object store and the index
}

// renderStats is a v1.StatsRenderer, for stats=all.
func (a *API) renderStats(ctx context.Context, s *stats.Statistics, _ string) stats.QueryStats {
	c := account.From(ctx).Cost()
	dollars := (float64(c.ObjectGets)*a.opts.Prices.MillionObjectGets + float64(c.IndexQueries)*a.opts.Prices.MillionIndexReads) / 1e6
	return &queryStats{stats.NewQueryStats(s).Builtin(), queryCost{c, dollars}}
}

// explain answers how a query would be computed. The parameters are those of the
// query, at the path as, and are checked as there.
func (a *API) explain(as string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var warnings annotations.Annotations
		ctx := merge.WithWarn(r.Context(), func(ws annotations.Annotations) { warnings.Merge(ws) })
		ctx, e := plan.WithExplanation(ctx)
		r = r.Clone(ctx)
		r.URL.Path = as
		check := &heldAnswer{header: http.Header{}, code: http.StatusOK}
		a.variantOf(ctx, tenantsOf(ctx)).handler.ServeHTTP(check, r)
		if check.code != http.StatusOK {
			maps.Copy(w.Header(), check.header)
			w.WriteHeader(check.code)
			_, _ = w.Write(check.body) // the client has gone: nobody to tell
			return
		}
		a.answers.take(check.body) // nobody wants it
		respond(w, e, warnings)
	}
}

// heldAnswer keeps an answer.
type heldAnswer struct {
	header http.Header
	code   int
	body   []byte
}

func (h *heldAnswer) Header() http.Header  { return h.header }
func (h *heldAnswer) WriteHeader(code int) { h.code = code }
func (h *heldAnswer) Write(b []byte) (int, error) {
	h.body = append(h.body, b...)
	return len(b), nil
}

package gateway

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

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

// dollars of a query, for requests to the object store and the index.
func (p Prices) dollars(c account.Cost) float64 {
	return (float64(c.ObjectGets)*p.MillionObjectGets + float64(c.IndexQueries)*p.MillionIndexReads) / 1e6
}

// statusClientGone is Prometheus's code for a client that has gone.
const statusClientGone = 499

// DefaultQueries is a sane Limits.Queries, that of Prometheus's --query.max-concurrency: a
// tenant that sends more at a time leaves others their share of a gateway.
const DefaultQueries = 20

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

// enter waits until another query of the tenant may run. It gives an error that wraps
// errTooMany if too many wait already, or why ctx has ended.
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
		waiting := one.users - limit
		g.mu.Unlock()
		return nil, fmt.Errorf("%d queries of the tenant are running and %d are waiting (limit gateway.limits.queries is %d): %w", limit, waiting, limit, errTooMany)
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
		return nil, fmt.Errorf("waiting for other queries of the tenant (limit gateway.limits.queries is %d): %w", limit, context.Cause(ctx))
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
			if len(tenants) > 1 {
				err = fmt.Errorf("tenant %s: %w", t, err)
			}
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
		l.Read = strictest(l.Read, o.Read)
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
// is the engine's to bound.
func timed(path string) bool { return path != "/api/v1/query" && path != "/api/v1/query_range" }

// protect serves a request within the limits of its tenant, and logs it if it was
// slow.
func (a *API) protect(rw *responseWriter, r *http.Request, h http.Handler) {
	w := http.ResponseWriter(rw)
	tenants := tenantsOf(r.Context())
	limits := a.limitsOf(tenants)
	name := strings.Join(tenants, "|")
	ctx, acc, done := a.opts.Memory.Open(r.Context(), name, limits.Limits)
	defer done()
	// What an answer holds is only given back when nobody writes it any more.
	rw.ended = func() error { return context.Cause(ctx) }
	defer context.AfterFunc(ctx, rw.cut)()
	defer rw.close() // first of these
	r, err := a.bodies.withBody(w, r.WithContext(ctx), tenants, a.bodyTimeout)
	if err != nil {
		w.Header().Set("Connection", "close")
		fail(w, err)
		return
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
		fail(w, err)
		return
	}
	defer leave()
	if r.URL.Path == "/api/v1/read" {
		if r, err = boundedRead(r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		// Its answer is read while it is sent.
		rw.until, _ = bounded.Deadline()
		w = &readWriter{ResponseWriter: rw, account: acc, ended: func() error { return context.Cause(bounded) }}
	}
	param := func(string) string { return "" }
	switch r.URL.Path {
	case "/api/v1/query", "/api/v1/query_range":
		// Handlers work on copies of the request: what they parse isn't seen here. These
		// two of Prometheus's overlook an error too, and take a form of several parts,
		// which r.ParseForm would leave out for good.
		_ = r.FormValue("query")
		param = func(name string) string { return plan.Excerpt(r.Form.Get(name)) }
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
	a.logger.Warn("slow query", "tenant", name, "path", plan.Excerpt(r.URL.Path), "query", param("query"),
		"start", param("start"), "end", param("end"), "step", param("step"), "time", param("time"),
		"took", took, "series", c.Series, "samples", c.Samples, "windows", c.Windows, "head_bytes", c.HeadBytes, "object_gets", c.ObjectGets, "object_bytes", c.ObjectBytes,
		"index_queries", c.IndexQueries, "pages", c.Pages, "pages_cached", c.PagesCached, "pages_memcached", c.PagesMemcached,
		"parts_kept", c.PartsKept, "parts_memcached", c.PartsMemcached, "parts_here", c.PartsHere, "parts_elsewhere", c.PartsElsewhere,
		"workers", c.Workers, "dollars", a.opts.Prices.dollars(c))
}

// readWriter gives errors of a remote read the status that they have elsewhere: Prometheus's
// handler knows no limits.
type readWriter struct {
	http.ResponseWriter
	account *account.Account
	ended   func() error // why the request has ended; nil: it hasn't
	begun   bool
}

// Unwrap is for http.ResponseController.
func (w *readWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write implements http.ResponseWriter. What comes too late is an error, of which the
// handler then tells.
func (w *readWriter) Write(p []byte) (int, error) {
	if err := w.ended(); err != nil && !w.begun {
		return 0, err
	}
	w.begun = true
	return w.ResponseWriter.Write(p)
}

// WriteHeader implements http.ResponseWriter.
func (w *readWriter) WriteHeader(code int) {
	w.begun = true
	if code == http.StatusInternalServerError {
		if err := w.ended(); w.account.Ended() {
			code = http.StatusUnprocessableEntity
		} else if err != nil {
			code, _ = errorClass(err)
		}
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
	return &queryStats{stats.NewQueryStats(s).Builtin(), queryCost{c, a.opts.Prices.dollars(c)}}
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

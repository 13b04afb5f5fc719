package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/route"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/httputil"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// PrometheusVersion is the version of the API and of the query language that
// the gateway speaks; clients such as Grafana choose features by it.
const PrometheusVersion = "3.16.0"

// Storage is what the API reads: package gateway/merge, or a test's.
type Storage interface {
	storage.SampleAndChunkQueryable
	storage.ExemplarQueryable
	// Metadata of a metric, or of all if metric is empty, sorted by metric.
	Metadata(ctx context.Context, tenant, metric string) ([]fetch.MetricMetadata, annotations.Annotations, error)
	// Stats of the heads, one for each ingester.
	Stats(ctx context.Context, tenant string, limit int) ([]*fetchpb.StatsResponse, annotations.Annotations, error)
}

// Options of the API.
type Options struct {
	Tenancy Tenancy
	// TenantFederation lets a request name several tenants: a|b.
	TenantFederation bool
	QueryTimeout     time.Duration // 2 minutes by default
	MaxSamples       int           // in memory for one query; 50 million by default
	Engine           EngineOptions
	// Tenants are those whose engine has other options than Engine, by name.
	Tenants map[string]EngineOptions
	// Spread says where queries are computed; its TenantOf is set by New.
	Spread plan.Spread
	// Limits of queries, and TenantLimits of those tenants that have their own, by name.
	Limits              Limits
	TenantLimits        map[string]Limits
	Memory              *account.Memory // of all queries; without it there is no bound
	SlowQuery           time.Duration   // from which on a query is logged; 0: none is
	Prices              Prices
	Flags               map[string]string // shown by status/flags, beside those of the engine
	ListenAddress       string
	Revision, GoVersion string // of this program, shown by status/buildinfo
	Ready               func() error
	Choices             Choices // of replicas; without it claims are answered with 501
	// Index keeps what sidecars report of their Prometheis' engines; without it
	// reports are answered with 501.
	Index *index.Index
	// Deletions is for the admin API; without it, that is off.
	Deletions Deletions
}

func (o *Options) setDefaults() {
	if o.Tenancy == "" {
		o.Tenancy = Single
	}
	if o.QueryTimeout == 0 {
		o.QueryTimeout = 2 * time.Minute
	}
	o.Engine.setDefaults()
	if o.MaxSamples == 0 {
		o.MaxSamples = 50_000_000
	}
	if o.Flags == nil {
		o.Flags = map[string]string{}
	}
	o.Spread.TenantOf = TenantOf
	if o.Memory == nil {
		o.Memory = account.NewMemory(0, prometheus.NewRegistry())
	}
	if o.Ready == nil {
		o.Ready = func() error { return nil }
	}
}

// API is the HTTP API.
type API struct {
	opts       Options
	storage    tenants
	live       *ring.Live
	logger     *slog.Logger
	birth      time.Time
	variant    *variant            // of tenants that have no options of their own
	tenants    map[string]*variant // of those that the configuration has options for
	reports    reports             // of the others
	building   sync.Mutex          // held while a variant is made
	mu         sync.Mutex
	variants   map[string]*variant // by key of their options
	configured int                 // how many of them are of the configuration, and stay
	gatherer   prometheus.Gatherer
	ours       map[string]http.HandlerFunc // in place of Prometheus's, by method and path below /api/v1
	gates      gates
	bodies     bodies
	rivals     rivals
	handler    http.Handler

	bodyTimeout, writeTimeout time.Duration // the constants, but in tests

	answers   streaming
	encodings encodings
}

// New makes the API. It answers below /api/v1/, and /federate.
func New(o Options, s Storage, live *ring.Live, logger *slog.Logger, reg prometheus.Registerer, gatherer prometheus.Gatherer) (*API, error) {
	o.setDefaults()
	a := &API{
		opts: o, storage: tenants{s}, live: live, logger: logger.With("component", "api"), birth: time.Now().UTC(),
		tenants: map[string]*variant{}, variants: map[string]*variant{}, gatherer: gatherer, gates: gates{all: map[string]*gate{}}, bodies: bodies{of: map[string]int{}}, answers: streaming{waiting: map[string]*v1.Response{}},
		bodyTimeout: bodyTimeout, writeTimeout: writeTimeout,
	}
	if err := o.Engine.Validate(); err != nil {
		return nil, err
	}
	a.reports = reports{index: o.Index, logger: a.logger, all: map[string]*report{}}
	of := func(e EngineOptions) *variant {
		v := a.variants[e.key()]
		if v == nil {
			v = a.newVariant(e, reg, gatherer)
			a.variants[e.key()] = v
		}
		return v
	}
	a.variant = of(o.Engine)
	for tenant, e := range o.Tenants {
		if err := e.Validate(); err != nil {
			return nil, fmt.Errorf("tenant %s: %w", tenant, err)
		}
		e.setDefaults()
		a.tenants[tenant] = of(e)
	}
	a.configured = len(a.variants)
	a.ours = map[string]http.HandlerFunc{
		"GET /status/tsdb":           a.wrap(a.tsdbStatus),
		"GET /status/active_series":  a.wrap(a.activeSeries),
		"POST /status/active_series": a.wrap(a.activeSeries),
		"GET /ring":                  a.ring,
		"POST /ha/claim":             a.claim,
		"POST /engine":               a.engine,
	}
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		a.ours[method+" /query_explain"] = a.whenReady(a.explain("/query"))
		a.ours[method+" /query_range_explain"] = a.whenReady(a.explain("/query_range"))
	}
	for _, method := range []string{http.MethodPost, http.MethodPut} {
		a.ours[method+" /admin/tsdb/clean_tombstones"] = a.admin(a.cleanTombstones)
		a.ours[method+" /admin/tsdb/snapshot"] = a.wrap(a.snapshot)
	}
	a.ours["GET /admin/tsdb/deletions"] = a.admin(a.deletions)
	a.ours["POST /admin/tsdb/deletions/cancel"] = a.admin(a.cancelDeletion)
	root := route.New()
	root.Get("/federate", a.whenReady(httputil.CompressionHandler{Handler: http.HandlerFunc(a.federate)}.ServeHTTP))
	mux := http.NewServeMux()
	mux.Handle("/api/v1/", http.StripPrefix("/api/v1", http.HandlerFunc(a.serveV1)))
	mux.Handle("/", root)
	a.handler = mux
	return a, nil
}

// ServeHTTP serves /federate and paths that begin with /api/v1/.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	names, err := a.opts.Tenancy.tenants(r, a.opts.TenantFederation)
	if err != nil {
		respondError(w, http.StatusUnauthorized, "bad_data", err)
		return
	}
	rw := &responseWriter{ResponseWriter: w, answers: &a.answers, encodings: &a.encodings, encoding: encodingOf(r), timeout: a.writeTimeout}
	r = r.WithContext(merge.WithWarn(withTenants(r.Context(), names), rw.warn))
	r.Header = r.Header.Clone()
	r.Header.Del("Accept-Encoding") // it is ours to compress
	a.protect(rw, r, a.handler)
}

// serveV1 serves paths below /api/v1.
func (a *API) serveV1(w http.ResponseWriter, r *http.Request) {
	if names := tenantsOf(r.Context()); len(names) > 1 && strings.HasPrefix(r.URL.Path, "/admin/") {
		respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("an admin request for %d tenants: name one in %s", len(names), TenantHeader))
		return
	}
	if h := a.ours[r.Method+" "+r.URL.Path]; h != nil {
		h(w, r)
		return
	}
	v := a.variantOf(r.Context(), tenantsOf(r.Context()))
	switch r.URL.Path {
	case "/query", "/query_range":
		if r.FormValue("stats") == "all" {
			v.withCost().ServeHTTP(w, r)
			return
		}
	case "/openapi.yaml":
		v = a.variant // it has the description
	case "/metadata":
		if a.opts.Ready() != nil {
			break // the handler says so
		}
		with, err := a.withMetadata(r, r.FormValue("metric"))
		if err != nil {
			a.wrap(func(w http.ResponseWriter, _ *http.Request) { fail(w, err) })(w, r)
			return
		}
		r = with
	case "/search/metric_names":
		r = r.WithContext(context.WithValue(r.Context(), metadataKey{}, metadataRequest{}))
		// Prometheus keeps metadata from one such request to the next, which may be
		// of another tenant.
		v.fresh().ServeHTTP(w, r)
		return
	}
	v.handler.ServeHTTP(w, r)
}

// wrap is what Prometheus puts around most endpoints.
func (a *API) wrap(h http.HandlerFunc) http.HandlerFunc {
	return a.whenReady(httputil.CompressionHandler{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		httputil.SetCORS(w, corsOrigin(), r)
		h(w, r)
	})}.ServeHTTP)
}

// Work computes a part of another gateway's query: plan.Engine.Work. It says what was read for
// it, with an error too.
func (a *API) Work(ctx context.Context, h *history.History, t *plan.Task) ([]byte, account.Cost, error) {
	e := a.variantOf(ctx, []string{t.Tenant}).engine
	// Memory is ours; the limits of a query are the caller's to keep, who says what is left of them.
	ctx, acc, done := a.opts.Memory.Open(WithTenant(ctx, t.Tenant), t.Tenant, t.Left)
	defer done()
	b, err := e.Work(ctx, h, t)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, account.ErrLimit) {
		err = cause
	}
	return b, acc.Cost(), err
}

// whenReady answers 503 until the gateway can serve, as Prometheus does.
func (a *API) whenReady(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := a.opts.Ready(); err != nil {
			http.Error(w, "Service Unavailable", http.StatusServiceUnavailable)
			return
		}
		h(w, r)
	}
}

// ring answers with the ring snapshot; with ?version= and ?wait= it waits until
// the version differs.
func (a *API) ring(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	live := a.live.Ring()
	if v := r.FormValue("version"); v != "" && v == live.Version() {
		wait, err := time.ParseDuration(r.FormValue("wait"))
		if err != nil || wait < 0 || wait > time.Minute {
			respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("wait is %q: give a duration from 0s to 1m", r.FormValue("wait")))
			return
		}
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		live = a.live.Wait(ctx, v)
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(live.Snapshot()); err != nil {
		a.logger.Debug("answer not written", "err", err)
	}
}

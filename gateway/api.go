package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/httputil"

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
	Tenancy      Tenancy
	QueryTimeout time.Duration // 2 minutes by default
	MaxSamples   int           // in memory for one query; 50 million by default
	Engine       EngineOptions
	// Tenants are those whose engine has other options than Engine, by name.
	Tenants             map[string]EngineOptions
	Flags               map[string]string // shown by status/flags
	ListenAddress       string
	Revision, GoVersion string // of this program, shown by status/buildinfo
	Ready               func() error
	Choices             Choices // of replicas; without it claims are answered with 501
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
	if o.Ready == nil {
		o.Ready = func() error { return nil }
	}
}

// API is the HTTP API.
type API struct {
	opts    Options
	storage Storage
	live    *ring.Live
	logger  *slog.Logger
	birth   time.Time
	variant *variant            // of tenants that have no options of their own
	tenants map[string]*variant // of the others
	handler http.Handler
}

// New makes the API. It answers below /api/v1/.
func New(o Options, s Storage, live *ring.Live, logger *slog.Logger, reg prometheus.Registerer, gatherer prometheus.Gatherer) (*API, error) {
	o.setDefaults()
	a := &API{
		opts: o, storage: s, live: live, logger: logger.With("component", "api"), birth: time.Now().UTC(),
		tenants: map[string]*variant{},
	}
	if err := o.Engine.Validate(); err != nil {
		return nil, err
	}
	variants := map[string]*variant{}
	of := func(e EngineOptions) *variant {
		v := variants[e.key()]
		if v == nil {
			v = a.newVariant(e, reg, gatherer)
			variants[e.key()] = v
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
	ours := map[string]http.HandlerFunc{
		"GET /status/tsdb": a.wrap(a.tsdbStatus),
		"GET /ring":        a.ring,
		"POST /ha/claim":   a.claim,
	}
	a.handler = http.StripPrefix("/api/v1", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		tenant, err := o.Tenancy.tenant(req)
		if err != nil {
			respondError(w, http.StatusUnauthorized, "bad_data", err)
			return
		}
		ctx := WithTenant(req.Context(), tenant)
		if req.URL.Path == "/metadata" {
			ctx = context.WithValue(ctx, metadataKey{}, metadataRequest{metric: req.FormValue("metric")})
		}
		req = req.WithContext(ctx)
		if h := ours[req.Method+" "+req.URL.Path]; h != nil {
			h(w, req)
			return
		}
		v := a.variantOf(tenant)
		if req.URL.Path == "/search/metric_names" {
			// Prometheus keeps metadata from one such request to the next, which may
			// be of another tenant.
			v.fresh().ServeHTTP(w, req)
			return
		}
		v.handler.ServeHTTP(w, req)
	}))
	return a, nil
}

// variantOf gives the API as a tenant has it.
func (a *API) variantOf(tenant string) *variant {
	if v := a.tenants[tenant]; v != nil {
		return v
	}
	return a.variant
}

// wrap is what Prometheus puts around most endpoints.
func (a *API) wrap(h http.HandlerFunc) http.HandlerFunc {
	return a.whenReady(httputil.CompressionHandler{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		httputil.SetCORS(w, corsOrigin(), r)
		h(w, r)
	})}.ServeHTTP)
}

// ServeHTTP serves paths that begin with /api/v1/.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.handler.ServeHTTP(w, r) }

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

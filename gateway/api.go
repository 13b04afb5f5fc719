package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grafana/regexp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/route"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/rules"
	"github.com/prometheus/prometheus/scrape"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/features"
	"github.com/prometheus/prometheus/util/httputil"
	"github.com/prometheus/prometheus/util/notifications"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
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
	Tenancy       Tenancy
	QueryTimeout  time.Duration // 2 minutes by default
	LookbackDelta time.Duration // 5 minutes by default
	MaxSamples    int           // in memory for one query; 50 million by default
	// DelayedNameRemoval and ExperimentalFunctions are Prometheus's features of
	// these names.
	DelayedNameRemoval    bool
	ExperimentalFunctions bool
	Flags                 map[string]string // shown by status/flags
	ListenAddress         string
	Revision, GoVersion   string // of this program, shown by status/buildinfo
	Ready                 func() error
}

func (o *Options) setDefaults() {
	if o.Tenancy == "" {
		o.Tenancy = Single
	}
	if o.QueryTimeout == 0 {
		o.QueryTimeout = 2 * time.Minute
	}
	if o.LookbackDelta == 0 {
		o.LookbackDelta = 5 * time.Minute
	}
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
	handler http.Handler
}

// New makes the API. It answers below /api/v1/.
func New(o Options, s Storage, live *ring.Live, logger *slog.Logger, reg prometheus.Registerer, gatherer prometheus.Gatherer) (*API, error) {
	o.setDefaults()
	a := &API{opts: o, storage: s, live: live, logger: logger.With("component", "api"), birth: time.Now().UTC()}
	parse := parser.NewParser(parser.Options{EnableExperimentalFunctions: o.ExperimentalFunctions})
	registry := features.NewRegistry()
	eo := promql.EngineOpts{
		Logger: a.logger, Reg: reg, MaxSamples: o.MaxSamples, Timeout: o.QueryTimeout, LookbackDelta: o.LookbackDelta,
		NoStepSubqueryIntervalFn: func(int64) int64 { return time.Minute.Milliseconds() },
		EnableAtModifier:         true, EnableNegativeOffset: true,
		EnableDelayedNameRemoval: o.DelayedNameRemoval, Parser: parse, FeatureRegistry: registry,
	}
	engine := plan.New(promql.NewEngine(eo), eo)
	cfg := config.DefaultConfig
	cors := regexp.MustCompile("^(?s:.*)$") // Prometheus's default
	api := v1.NewAPI(
		engine, s, nil, s,
		func(context.Context) v1.ScrapePoolsRetriever { return noScraping{} },
		a.targets,
		func(context.Context) v1.AlertmanagerRetriever { return noScraping{} },
		func() config.Config { return cfg },
		o.Flags,
		v1.GlobalURLOptions{ListenAddress: o.ListenAddress, Host: o.ListenAddress, Scheme: "http"},
		a.whenReady,
		noTSDB{}, "", false, false, 0,
		a.logger,
		func(context.Context) v1.RulesRetriever { return noScraping{} },
		5e7, 10, 1<<20, // Prometheus's defaults for remote read
		false,
		cors,
		a.runtimeInfo,
		&v1.PrometheusVersion{
			Version: PrometheusVersion, Revision: o.Revision, Branch: "HEAD",
			BuildUser: "epimetheus", BuildDate: "", GoVersion: o.GoVersion,
		},
		func() []notifications.Notification { return []notifications.Notification{} },
		func() (<-chan notifications.Notification, func(), bool) { return nil, func() {}, false },
		gatherer, reg, nil,
		false, nil, false, false, false,
		o.LookbackDelta, false, false, nil, registry,
		v1.OpenAPIOptions{ExternalURL: "http://" + o.ListenAddress, Version: PrometheusVersion},
		parse, false, o.QueryTimeout,
	)
	r := route.New()
	api.Register(r)
	ours := map[string]http.HandlerFunc{
		"/status/tsdb": a.whenReady(httputil.CompressionHandler{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			httputil.SetCORS(w, cors, r)
			a.tsdbStatus(w, r)
		})}.ServeHTTP),
		"/ring": a.ring,
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
		if h := ours[req.URL.Path]; h != nil && req.Method == http.MethodGet {
			h(w, req)
			return
		}
		r.ServeHTTP(w, req)
	}))
	return a, nil
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

// runtimeInfo is status/runtimeinfo.
func (a *API) runtimeInfo() (v1.RuntimeInfo, error) {
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	cwd, err := os.Getwd()
	if err != nil {
		cwd = ""
	}
	return v1.RuntimeInfo{
		StartTime: a.birth, CWD: cwd, Hostname: host, ServerTime: time.Now().UTC(),
		ReloadConfigSuccess: true, LastConfigTime: a.birth,
		GoroutineCount: runtime.NumGoroutine(), GOMAXPROCS: runtime.GOMAXPROCS(0), GOMEMLIMIT: debug.SetMemoryLimit(-1),
		GOGC: os.Getenv("GOGC"), GODEBUG: os.Getenv("GODEBUG"), StorageRetention: "forever",
	}, nil
}

// tsdbStatus is status/tsdb over the heads of all ingesters.
func (a *API) tsdbStatus(w http.ResponseWriter, r *http.Request) {
	const maxLimit = 10000 // Prometheus's
	limit := 10
	if s := r.FormValue("limit"); s != "" {
		var err error
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 {
			respondError(w, http.StatusBadRequest, "bad_data", errors.New("limit must be a positive number"))
			return
		}
		if limit > maxLimit {
			respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("limit must not exceed %d", maxLimit))
			return
		}
	}
	// Ask for more than wanted: the greatest overall need not be among the
	// greatest of each.
	all, warnings, err := a.storage.Stats(r.Context(), TenantOf(r.Context()), 10*limit)
	if err != nil {
		respondError(w, http.StatusInternalServerError, "internal", err)
		return
	}
	status := v1.TSDBStatus{}
	hs := &status.HeadStats
	byMetric, byLabel, size, byPair := map[string]uint64{}, map[string]uint64{}, map[string]uint64{}, map[string]uint64{}
	add := func(to map[string]uint64, cs []*fetchpb.Count) {
		for _, c := range cs {
			to[c.Name] += c.Value
		}
	}
	for _, s := range all {
		if s.Series == 0 {
			continue
		}
		if hs.NumSeries == 0 {
			hs.MinTime, hs.MaxTime = s.Mint, s.Maxt
		}
		hs.MinTime, hs.MaxTime = min(hs.MinTime, s.Mint), max(hs.MaxTime, s.Maxt)
		hs.NumSeries += s.Series
		hs.ChunkCount += int64(s.Chunks)
		hs.NumLabelPairs += int(s.LabelPairs)
		add(byMetric, s.SeriesByMetric)
		add(size, s.BytesByLabel)
		add(byPair, s.SeriesByPair)
		for _, c := range s.ValuesByLabel { // mostly the same values everywhere
			byLabel[c.Name] = max(byLabel[c.Name], c.Value)
		}
	}
	status.SeriesCountByMetricName = greatest(byMetric, limit)
	status.LabelValueCountByLabelName = greatest(byLabel, limit)
	status.MemoryInBytesByLabelName = greatest(size, limit)
	status.SeriesCountByLabelValuePair = greatest(byPair, limit)
	respond(w, status, warnings)
}

func greatest(m map[string]uint64, limit int) []v1.TSDBStat {
	out := make([]v1.TSDBStat, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		out = append(out, v1.TSDBStat{Name: name, Value: m[name]})
	}
	slices.SortStableFunc(out, func(a, b v1.TSDBStat) int {
		switch {
		case a.Value > b.Value:
			return -1
		case a.Value < b.Value:
			return 1
		}
		return 0
	})
	return out[:min(len(out), limit)]
}

func respond(w http.ResponseWriter, data any, warnings annotations.Annotations) {
	texts, _ := warnings.AsStrings("", 10, 10)
	write(w, http.StatusOK, v1.Response{Status: "success", Data: data, Warnings: texts})
}

func respondError(w http.ResponseWriter, code int, kind string, err error) {
	write(w, code, v1.Response{Status: "error", ErrorType: kind, Error: err.Error()})
}

func write(w http.ResponseWriter, code int, r v1.Response) {
	b, err := json.Marshal(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // the client has gone: nobody to tell
}

// noScraping stands for what a gateway has none of: targets, rules, alerts.
type noScraping struct{}

func (noScraping) ScrapePools() []string                      { return []string{} }
func (noScraping) TargetsActive() map[string][]*scrape.Target { return map[string][]*scrape.Target{} }

func (noScraping) TargetsDropped() map[string][]*scrape.Target { return map[string][]*scrape.Target{} }
func (noScraping) TargetsDroppedCounts() map[string]int        { return map[string]int{} }
func (noScraping) ScrapePoolConfig(pool string) (*config.ScrapeConfig, error) {
	return nil, fmt.Errorf("scrape pool %q not found", pool)
}
func (noScraping) Alertmanagers() []*url.URL            { return nil }
func (noScraping) DroppedAlertmanagers() []*url.URL     { return nil }
func (noScraping) RuleGroups() []*rules.Group           { return nil }
func (noScraping) AlertingRules() []*rules.AlertingRule { return nil }

// noTSDB stands for the local database that a gateway hasn't. The admin API is
// off, so that nothing of it is called but what is harmless.
type noTSDB struct{}

var errNoTSDB = errors.New("a gateway has no database of its own")

func (noTSDB) CleanTombstones() error { return errNoTSDB }
func (noTSDB) Delete(context.Context, int64, int64, ...*labels.Matcher) error {
	return errNoTSDB
}
func (noTSDB) Snapshot(string, bool) error                    { return errNoTSDB }
func (noTSDB) Stats(string, int) (*tsdb.Stats, error)         { return nil, errNoTSDB }
func (noTSDB) BlockMetas() ([]tsdb.BlockMeta, error)          { return []tsdb.BlockMeta{}, nil }
func (noTSDB) WALReplayStatus() (tsdb.WALReplayStatus, error) { return tsdb.WALReplayStatus{}, nil }

// The endpoint for metadata asks the targets. It gets targets made of what the
// ingesters know, and no other endpoint does.

type metadataKey struct{}

type metadataRequest struct{ metric string }

type metadataTargets struct {
	noScraping
	targets []*scrape.Target
}

func (m metadataTargets) TargetsActive() map[string][]*scrape.Target {
	return map[string][]*scrape.Target{"": m.targets}
}

// targets is called for each request with its context.
func (a *API) targets(ctx context.Context) v1.TargetRetriever {
	req, ok := ctx.Value(metadataKey{}).(metadataRequest)
	if !ok {
		return noScraping{}
	}
	all, _, err := a.storage.Metadata(ctx, TenantOf(ctx), req.metric)
	if err != nil {
		a.logger.Warn("metadata not read", "tenant", TenantOf(ctx), "err", err)
		return noScraping{}
	}
	// A target says one thing of a metric: the n-th target says the n-th.
	var stores []metadataStore
	nth := map[string]int{}
	for _, m := range all {
		n := nth[m.Metric]
		nth[m.Metric]++
		if n == len(stores) {
			stores = append(stores, metadataStore{})
		}
		stores[n][m.Metric] = scrape.MetricMetadata{MetricFamily: m.Metric, Type: m.Type, Help: m.Help, Unit: m.Unit}
	}
	var out metadataTargets
	for _, s := range stores {
		t := scrape.NewTarget(labels.EmptyLabels(), &config.ScrapeConfig{}, model.LabelSet{}, model.LabelSet{})
		t.SetMetadataStore(s)
		out.targets = append(out.targets, t)
	}
	return out
}

type metadataStore map[string]scrape.MetricMetadata

func (s metadataStore) ListMetadata() []scrape.MetricMetadata {
	return slices.SortedFunc(maps.Values(s), func(a, b scrape.MetricMetadata) int {
		return strings.Compare(a.MetricFamily, b.MetricFamily)
	})
}

func (s metadataStore) GetMetadata(name string) (scrape.MetricMetadata, bool) {
	m, ok := s[name]
	return m, ok
}
func (s metadataStore) SizeMetadata() int   { return 0 }
func (s metadataStore) LengthMetadata() int { return len(s) }

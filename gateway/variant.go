package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/grafana/regexp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/route"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/features"
	"github.com/prometheus/prometheus/util/notifications"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// EngineOptions are those of the query language that a tenant may have of its
// own, since its Prometheus has.
type EngineOptions struct {
	LookbackDelta time.Duration // 5 minutes by default
	// EvaluationInterval is the step of subqueries that name none; a minute by default.
	EvaluationInterval time.Duration
	Features           []string // of Features
}

func (o *EngineOptions) setDefaults() {
	if o.LookbackDelta == 0 {
		o.LookbackDelta = 5 * time.Minute
	}
	if o.EvaluationInterval == 0 {
		o.EvaluationInterval = time.Minute
	}
}

// Features that change what a query means or what the API offers, by the names
// that Prometheus's --enable-feature has for them.
func Features() []string {
	return []string{
		"promql-binop-fill-modifiers",
		"promql-delayed-name-removal",
		"promql-experimental-functions",
		"promql-per-step-stats",
		"promql-unquoted-utf8-names",
		"query-cost",
		"search-api",
		"type-and-unit-labels",
		"use-start-timestamps",
	}
}

// Validate says what is wrong.
func (o *EngineOptions) Validate() error {
	if o.LookbackDelta < 0 {
		return fmt.Errorf("the lookback delta %s is negative", o.LookbackDelta)
	}
	if o.EvaluationInterval != 0 && o.EvaluationInterval < time.Millisecond {
		return fmt.Errorf("the evaluation interval %s is less than 1ms", o.EvaluationInterval)
	}
	for _, f := range o.Features {
		if !slices.Contains(Features(), f) {
			return fmt.Errorf("feature %q is not one of %s", f, strings.Join(Features(), ", "))
		}
	}
	return nil
}

func (o *EngineOptions) has(feature string) bool { return slices.Contains(o.Features, feature) }

// key is the same for options that mean the same.
func (o *EngineOptions) key() string {
	fs := slices.Clone(o.Features)
	slices.Sort(fs)
	return strings.Join(append([]string{model.Duration(o.LookbackDelta).String(), model.Duration(o.EvaluationInterval).String()}, slices.Compact(fs)...), ",")
}

// variant is Prometheus's API with an engine of certain options.
type variant struct {
	options  EngineOptions
	reported bool // by a sidecar; else of the configuration
	parser   parser.Parser
	engine   *plan.Engine
	handler  http.Handler // paths are those below /api/v1
	// withCost is handler for stats=all. With a renderer of its own the API wouldn't
	// warn of other values. It is made when it is first asked for.
	withCost func() http.Handler
	// fresh makes the handler anew, with nothing kept from other requests.
	fresh func() http.Handler
}

// newEngine makes the engine of a variant: the planner around Prometheus's.
func newEngine(o *Options, e *EngineOptions, parse parser.Parser, registry features.Collector, logger *slog.Logger, reg prometheus.Registerer) *plan.Engine {
	eo := promql.EngineOpts{
		Logger: logger, Reg: reg, MaxSamples: o.MaxSamples, Timeout: o.QueryTimeout, LookbackDelta: e.LookbackDelta,
		NoStepSubqueryIntervalFn: func(int64) int64 { return e.EvaluationInterval.Milliseconds() },
		EnableAtModifier:         true, EnableNegativeOffset: true,
		EnablePerStepStats:       e.has("promql-per-step-stats"),
		EnableDelayedNameRemoval: e.has("promql-delayed-name-removal"),
		EnableTypeAndUnitLabels:  e.has("type-and-unit-labels"),
		UseStartTimestamps:       e.has("use-start-timestamps"),
		EnableQueryCost:          e.has("query-cost"),
		Parser:                   parse, FeatureRegistry: registry,
	}
	return plan.New(promql.NewEngine(eo), eo, o.Spread)
}

// newVariant makes a variant. Its metrics have its options as the label engine;
// without a registerer it has none.
func (a *API) newVariant(e EngineOptions, reg prometheus.Registerer, gatherer prometheus.Gatherer) *variant {
	o := &a.opts
	if reg != nil {
		reg = prometheus.WrapRegistererWith(prometheus.Labels{"engine": e.key()}, reg)
	}
	parse := boundedParser{parser.NewParser(parser.Options{
		EnableExperimentalFunctions: e.has("promql-experimental-functions"),
		EnableBinopFillModifiers:    e.has("promql-binop-fill-modifiers"),
		EnableUnquotedUTF8Names:     e.has("promql-unquoted-utf8-names"),
	})}
	registry := features.NewRegistry()
	engine := newEngine(o, &e, parse, registry, a.logger, reg)
	offered(registry, &e)
	registry.Set(features.API, "admin", o.Deletions != nil)
	flags := maps.Clone(o.Flags)
	flags["query.lookback-delta"] = model.Duration(e.LookbackDelta).String()
	flags["enable-feature"] = strings.Join(e.Features, ",")
	shown := config.DefaultConfig
	shown.GlobalConfig.EvaluationInterval = model.Duration(e.EvaluationInterval)
	// Most of what an API costs to make is its description in OpenAPI, which all have in
	// common: one has it.
	none := []string{"/none"}
	build := func(reg prometheus.Registerer, stats v1.StatsRenderer, described []string) http.Handler {
		api := v1.NewAPI(
			engine, a.storage, nil, a.storage,
			func(context.Context) v1.ScrapePoolsRetriever { return noScraping{} },
			a.targets,
			func(context.Context) v1.AlertmanagerRetriever { return noScraping{} },
			func() config.Config { return shown },
			flags,
			v1.GlobalURLOptions{ListenAddress: o.ListenAddress, Host: o.ListenAddress, Scheme: "http"},
			a.whenReady,
			a.tsdb(), "", o.Deletions != nil, e.has("search-api"), maxSearchLimit,
			a.logger,
			func(context.Context) v1.RulesRetriever { return noScraping{} },
			5e7, 10, 1<<20, // Prometheus's defaults for remote read
			false,
			corsOrigin(),
			a.runtimeInfo,
			&v1.PrometheusVersion{
				Version: PrometheusVersion, Revision: o.Revision, Branch: "HEAD",
				BuildUser: "epimetheus", BuildDate: "", GoVersion: o.GoVersion,
			},
			func() []notifications.Notification { return []notifications.Notification{} },
			subscribe,
			gatherer, reg, stats,
			false, nil, false, false, false,
			e.LookbackDelta, e.has("type-and-unit-labels"), false, nil, registry,
			v1.OpenAPIOptions{IncludePaths: described, ExternalURL: "http://" + o.ListenAddress, Version: PrometheusVersion, MaxSearchLimit: maxSearchLimit},
			parse, e.has("query-cost"), o.QueryTimeout,
		)
		api.ClearCodecs()
		api.InstallCodec(&a.answers)
		r := route.New()
		api.Register(r)
		return r
	}
	described := none
	if a.variant == nil {
		described = nil // all
	}
	return &variant{
		options: e, parser: parse, engine: engine, handler: build(reg, nil, described),
		withCost: sync.OnceValue(func() http.Handler { return build(nil, a.renderStats, none) }),
		fresh:    func() http.Handler { return build(nil, nil, none) },
	}
}

// maxSearchLimit is Prometheus's default of --web.search.max-limit.
const maxSearchLimit = 10_000

// corsOrigin is Prometheus's default of --web.cors.origin.
func corsOrigin() *regexp.Regexp { return regexp.MustCompile("^(?s:.*)$") }

// subscribe refuses a subscription to notifications, since there will be none: the
// answer is 204, after which an EventSource doesn't come again.
func subscribe() (<-chan notifications.Notification, func(), bool) { return nil, func() {}, false }

// offered notes what the API can do, as Prometheus's web package does.
func offered(r features.Collector, e *EngineOptions) {
	for _, name := range []string{
		"label_values_match", "query_warnings", "query_stats", "time_range_series", "time_range_labels", "exclude_alerts",
		"openapi_3.1", "openapi_3.2",
	} {
		r.Enable(features.API, name)
	}
	for _, name := range v1.FuzzAlgorithms() {
		r.Enable(features.API, "search_fuzz_alg_"+name)
	}
	for _, name := range []string{"lifecycle", "remote_write_receiver", "otlp_write_receiver"} {
		r.Set(features.API, name, false)
	}
	r.Set(features.API, "query_cost", e.has("query-cost"))
	r.Set(features.API, "search", e.has("search-api"))
}

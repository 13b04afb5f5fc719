package plan_test

import (
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

// suiteOptions are those of promqltest.NewTestEngine.
var suiteOptions = promql.EngineOpts{
	MaxSamples: promqltest.DefaultMaxSamplesPerQuery, Timeout: 100 * time.Second,
	NoStepSubqueryIntervalFn: func(int64) int64 { return time.Minute.Milliseconds() },
	EnableAtModifier:         true, EnableNegativeOffset: true, EnableDelayedNameRemoval: true, UseStartTimestamps: true,
	Parser: parser.NewParser(promqltest.TestParserOpts),
}

// TestPrometheusSuite runs Prometheus's own acceptance tests of the query
// language through the planner, on heads and blocks.
func TestPrometheusSuite(t *testing.T) {
	engine := plan.New(promqltest.NewTestEngineWithOpts(t, suiteOptions), suiteOptions, plan.Spread{})
	promqltest.RunBuiltinTestsWithStorage(t, engine, gatewaytest.Suite())
}

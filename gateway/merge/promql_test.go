package merge_test

import (
	"testing"

	"github.com/prometheus/prometheus/promql/promqltest"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestPrometheusSuite runs Prometheus's own acceptance tests of the query
// language on heads and blocks. Every sample is shipped to an ingester; about
// half of them are flushed before the others are sent.
func TestPrometheusSuite(t *testing.T) {
	engine := promqltest.NewTestEngine(t, false, 0, promqltest.DefaultMaxSamplesPerQuery)
	promqltest.RunBuiltinTestsWithStorage(t, engine, gatewaytest.Suite())
}

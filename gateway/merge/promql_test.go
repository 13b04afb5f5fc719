package merge_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestPrometheusSuite runs Prometheus's own acceptance tests of the query
// language on heads and blocks. Every sample is shipped to an ingester; about
// half of them are flushed before the others are sent.
func TestPrometheusSuite(t *testing.T) {
	// These files look at counter-reset hints (by the warning about resets in
	// conflict, too).
	hints := []string{"testdata/native_histograms.test", "testdata/range_queries.test"}
	storages := 0
	engine := promqltest.NewTestEngine(t, false, 0, promqltest.DefaultMaxSamplesPerQuery)
	promqltest.RunBuiltinTestsWithStorage(t, engine, func(t testing.TB) storage.Storage {
		storages++
		together := slices.ContainsFunc(hints, func(file string) bool { return strings.HasSuffix(t.Name(), "/"+file) })
		return gatewaytest.NewShipped(gatewaytest.New(t, gatewaytest.Options{Ingesters: 2}), gatewaytest.Splits[storages%len(gatewaytest.Splits)], together)
	})
}

package gateway

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/scrape"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

// The endpoint for metadata asks the targets. It gets targets made of what the
// ingesters know, and no other endpoint does.

type metadataKey struct{}

type metadataRequest struct {
	metric string
	all    []fetch.MetricMetadata
	read   bool // all is there
}

// withMetadata is the request with what is known of a metric.
func (a *API) withMetadata(r *http.Request, metric string) (*http.Request, error) {
	all, warnings, err := a.storage.metadata(r.Context(), metric)
	if err != nil {
		return nil, err
	}
	merge.Warn(r.Context(), warnings)
	return r.WithContext(context.WithValue(r.Context(), metadataKey{}, metadataRequest{all: all, read: true})), nil
}

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
	all := req.all
	if !req.read {
		var err error
		if all, _, err = a.storage.metadata(ctx, req.metric); err != nil {
			a.logger.Warn("metadata not read", "tenant", TenantOf(ctx), "err", err)
			return noScraping{}
		}
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

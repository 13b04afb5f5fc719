package e2e

import (
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestNetworkFails: connections from sidecar and gateways to ingesters, and the
// gossip between all, are cut, stand still, are slow and lossy.
func TestNetworkFails(t *testing.T) {
	t.Parallel()
	s := startShape(t, testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir()), shape{links: true})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	heal := func() {
		t.Helper()
		for i, m := range s.ingesters {
			m.grpc.set(trouble{})
			m.gossip.set(trouble{})
			ringState(t, s.gateways[1], []string{"ingester-0", "ingester-1", "ingester-2"}[i], ring.Active)
		}
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	heal()

	step(t, "one ingester is cut off, one doesn't answer, one is slow")
	s.ingesters[0].grpc.set(trouble{refuse: true})
	s.ingesters[1].grpc.set(trouble{stall: true})
	s.ingesters[2].grpc.set(trouble{delay: 100 * time.Millisecond})
	metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_detached_owners", more(1))
	pause(t.Context(), 3*time.Second)
	n.scraping(t)
	heal()

	step(t, "no ingester can be reached")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{refuse: true})
	}
	pause(t.Context(), 10*time.Second)
	n.scraping(t)
	heal()

	step(t, "an ingester can't be reached by the others' gossip: it is lost for a while")
	s.ingesters[1].gossip.set(trouble{stall: true})
	ringState(t, s.gateways[1], "ingester-1", ring.Lost)
	pause(t.Context(), 5*time.Second)
	heal()

	step(t, "all is slow and lossy")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{delay: 50 * time.Millisecond, loss: 0.3})
		m.gossip.set(trouble{delay: 20 * time.Millisecond, loss: 0.2})
	}
	pause(t.Context(), 15*time.Second)
	n.scraping(t)
	heal()
	keptAccount(t, n)
}

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestReplicas: with two replicas of each series in three zones an ingester is
// killed. While it is missing, and while it comes back, queries lack nothing and
// carry no warning. Afterwards nothing is missing, extra or different.
func TestReplicas(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s := startShape(t, testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir()), shape{replicas: 2})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	eventually(t, 30*time.Second, "two copies of all", func() error {
		v, err := metric(ctx, n.sidecar.url, "epimetheus_sidecar_copies")
		if err == nil && v != 2 {
			err = fmt.Errorf("%v copies", v)
		}
		if err == nil {
			err = lacksNothing(ctx, n, s.gateways[0].url)
		}
		return err
	})

	watch := func(what string, d time.Duration) {
		t.Helper()
		asked := 0
		for end := time.Now().Add(d); time.Now().Before(end); asked++ {
			for _, g := range s.gateways {
				if err := lacksNothing(ctx, n, g.url); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			pause(ctx, 100*time.Millisecond)
		}
		t.Logf("%s: %d queries to each gateway", what, asked)
	}
	watch("before", 8*time.Second)
	s.victim.Kill()
	watch("while an ingester is missing", 15*time.Second)
	covered, err := metric(ctx, s.gateways[0].url, "epimetheus_gateway_covered_requests_total")
	if err != nil || covered == 0 {
		t.Errorf("%v queries did without the ingester, %v", covered, err)
	}
	s.victim.restart(t)
	watch("after it came back", 8*time.Second)
	for _, g := range s.gateways {
		auditLive(t, s, n, g.url, began, time.Now())
	}
	if v, err := metric(ctx, n.sidecar.url, "epimetheus_sidecar_resent_samples_total"); err != nil || v != 0 {
		t.Errorf("%v samples were sent again, %v", v, err)
	}
}

// lacksNothing compares, at one moment, how many samples of the last seconds
// Prometheus and the gateway have of each target.
func lacksNothing(ctx context.Context, n *tenant, gw string) error {
	return comparesWith(ctx, n, gw, "15s] offset 3s")
}

// errWarned is of an answer that carries a warning.
var errWarned = errors.New("warnings")

// comparesWith is lacksNothing for a range and an offset.
func comparesWith(ctx context.Context, n *tenant, gw, samples string) error {
	form := url.Values{
		"query": {`sum by (instance) (count_over_time(up[` + samples + `))`}, "time": {fmt.Sprint(time.Now().UnixMilli()) + "e-3"},
	}
	count := func(base, tenant string) (map[string]string, error) {
		code, r, err := get(ctx, base, "/api/v1/query", tenant, form)
		if err != nil || code != http.StatusOK {
			return nil, fmt.Errorf("%d %s %w", code, r.Error, err)
		}
		if len(r.Warnings) > 0 {
			return nil, fmt.Errorf("%w: %q", errWarned, r.Warnings)
		}
		var v vector
		out := map[string]string{}
		err = json.Unmarshal(r.Data, &v)
		for _, x := range v.Result {
			out[x.Metric["instance"]] = fmt.Sprint(x.Value[1])
		}
		return out, err
	}
	want, err := count(n.prom.URL, "")
	if err != nil {
		return fmt.Errorf("prometheus: %w", err)
	}
	got, err := count(gw, n.name)
	if err != nil {
		return err
	}
	if len(want) == 0 {
		return errors.New("prometheus has nothing")
	}
	if !maps.Equal(want, got) {
		return fmt.Errorf("samples by target: %v, Prometheus has %v", got, want)
	}
	return nil
}

// TestRingChanges: with one replica an ingester is added; one is stopped; one is
// killed, and restarted at once without its disk. At any time an answer has all
// that Prometheus has, but for what was scraped in the last seconds, or warns.
func TestRingChanges(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s := startRoles(t, testenv.S3(t))
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	eventually(t, 30*time.Second, "all samples", func() error { return comparesWith(ctx, n, s.gateways[0].url, "15s] offset 8s") })
	wctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	var asked, warned atomic.Int64
	for _, g := range s.gateways {
		wg.Go(func() {
			for wctx.Err() == nil {
				// A source waits for an owner that takes nothing for up to 5 s, and warns of nothing.
				err := comparesWith(wctx, n, g.url, "15s] offset 8s")
				asked.Add(1)
				switch {
				case errors.Is(err, errWarned):
					warned.Add(1)
				case err != nil && wctx.Err() == nil:
					t.Errorf("%s: %s: %v", time.Now().Format("15:04:05.000"), g.url, err)
				}
				pause(wctx, 50*time.Millisecond)
			}
		})
	}
	pause(ctx, 5*time.Second)
	step(t, "an ingester is added")
	s.addIngester(t)
	pause(ctx, 20*time.Second)
	step(t, "an ingester is stopped")
	s.rest[0].stop(t)
	pause(ctx, 20*time.Second)
	before := warned.Load()
	if n := asked.Load(); n < 100 || before > n/2 {
		t.Errorf("of %d queries %d carry a warning, though nothing is lost", n, before)
	}
	step(t, "an ingester restarts without its disk")
	s.victim.Kill()
	wipe(t, s.victim.dir)
	s.victim.restart(t)
	pause(ctx, 15*time.Second)
	stop()
	wg.Wait()
	t.Logf("%d queries, %d with a warning, %d of them before the restart", asked.Load(), warned.Load(), before)
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())
}

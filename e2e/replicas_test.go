package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
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

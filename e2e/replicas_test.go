package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
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
			err = n.lacksNothing(ctx, s.gateways[0].url, shown{})
		}
		return err
	})

	before := map[string]shown{}
	for _, g := range s.gateways {
		before[g.url] = shown{}
	}
	watch := func(what string, d time.Duration) {
		t.Helper()
		asked := 0
		for end := time.Now().Add(d); time.Now().Before(end); asked++ {
			for _, g := range s.gateways {
				if err := n.lacksNothing(ctx, g.url, before[g.url]); err != nil {
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

// lateBy is how old the newest samples may be that a gateway doesn't have yet: on a
// machine that is busy, or whose disk is, they take a while.
const lateBy = 10 * time.Second

// shown is the time of the newest sample of each target that a gateway has shown.
type shown map[string]int64 // ms

// lacksNothing compares, at one moment, what samples of the last seconds
// Prometheus and a gateway have of each target. The newest may be late; there is no
// hole before others, and what was shown is shown again.
func (n *tenant) lacksNothing(ctx context.Context, gw string, before shown) error {
	now := time.Now().UnixMilli()
	form := url.Values{"query": {"up[15s] offset 3s"}, "time": {fmt.Sprint(now) + "e-3"}}
	// read returns the times, in ms, of each target's samples.
	read := func(base, tenant string) (map[string][]int64, error) {
		code, r, err := get(ctx, base, "/api/v1/query", tenant, form)
		if err != nil || code != http.StatusOK {
			return nil, fmt.Errorf("%d %s %w", code, r.Error, err)
		}
		if len(r.Warnings) > 0 {
			return nil, fmt.Errorf("warnings: %q", r.Warnings)
		}
		var m struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
		if err := json.Unmarshal(r.Data, &m); err != nil {
			return nil, err
		}
		out := map[string][]int64{}
		for _, s := range m.Result {
			for _, v := range s.Values {
				out[s.Metric["instance"]] = append(out[s.Metric["instance"]], int64(math.Round(v[0].(float64)*1000)))
			}
		}
		return out, nil
	}
	want, err := read(n.prom.URL, "")
	if err != nil {
		return fmt.Errorf("prometheus: %w", err)
	}
	got, err := read(gw, n.name)
	if err != nil {
		return err
	}
	if len(want) == 0 {
		return errors.New("prometheus has nothing")
	}
	for target := range got {
		if want[target] == nil {
			return fmt.Errorf("%s: unknown to Prometheus", target)
		}
	}
	for target, all := range want {
		has := got[target]
		newest := int64(0)
		if len(has) > 0 {
			newest = has[len(has)-1]
		}
		due := slices.DeleteFunc(slices.Clone(all), func(t int64) bool {
			return t > max(newest, before[target], now-lateBy.Milliseconds())
		})
		if !slices.Equal(has, due) {
			return fmt.Errorf("%s: at %d there are samples of %v, not of %v; of %d were shown before", target, now, has, due, before[target])
		}
		before[target] = newest
	}
	return nil
}

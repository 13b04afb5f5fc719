package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
)

// response of the query API.
type response struct {
	Status   string
	Error    string
	Warnings []string
	Data     json.RawMessage
}

type vector struct {
	Result []struct {
		Metric map[string]string
		Value  [2]any
	}
}

func get(ctx context.Context, base, path, tenant string, form url.Values) (int, response, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path+"?"+form.Encode(), nil)
	if err != nil {
		return 0, response{}, err
	}
	if tenant != "" {
		req.Header.Set(gateway.TenantHeader, tenant)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, response{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, response{}, err
	}
	var r response
	if err := json.Unmarshal(b, &r); err != nil {
		return resp.StatusCode, r, fmt.Errorf("%s: %w in %.200s", path, err, b)
	}
	return resp.StatusCode, r, nil
}

func query(ctx context.Context, base, tenant, q string) (vector, error) {
	var v vector
	code, r, err := get(ctx, base, "/api/v1/query", tenant, url.Values{"query": {q}})
	if err != nil {
		return v, err
	}
	if code != http.StatusOK {
		return v, fmt.Errorf("query %s: %d %s", q, code, r.Error)
	}
	return v, json.Unmarshal(r.Data, &v)
}

// eventually tries until fn returns nil.
func eventually(t *testing.T, within time.Duration, what string, fn func() error) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			failed.add(fmt.Sprintf("%s: %s: %s: still after %s: %v", time.Now().Format("15:04:05.000"), t.Name(), what, within, err))
			t.Fatalf("%s: still after %s: %v", what, within, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// scenario: two Prometheis are scraped each second with a flush every ten, while
// queries run; an ingester and a sidecar are killed in the middle. Afterwards
// nothing is missing, extra or different. With all but the gateway gone, all
// history is there.
func scenario(t *testing.T, s *stack) {
	ctx := t.Context()
	began := time.Now().Add(-time.Second)
	tenants := []*tenant{startTenant(t, s, "team-a", ""), startTenant(t, s, "team-b", startTimestamps+metadataInWAL+",promql-experimental-functions")}
	gw := s.gateways[len(s.gateways)-1].url

	for _, n := range tenants {
		eventually(t, time.Minute, "first samples of "+n.name, func() error {
			v, err := query(ctx, gw, n.name, `up == 1`)
			if err == nil && len(v.Result) < 2 {
				err = fmt.Errorf("%d series", len(v.Result))
			}
			return err
		})
	}

	// Queries mean what they mean at the tenant's Prometheus: the sidecar tells its
	// flags.
	eventually(t, time.Minute, "functions that team-b's Prometheus has", func() error {
		_, err := query(ctx, gw, "team-b", `mad_over_time(up[1m])`)
		return err
	})
	if _, err := query(ctx, gw, "team-a", `mad_over_time(up[1m])`); err == nil {
		t.Error("team-a has functions that its Prometheus doesn't have")
	}

	// Queries run all the time. While the only gateway is dead they can't be
	// answered; what is answered must be right.
	var queries, refused atomic.Int64
	qctx, stopQueries := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stopQueries()
	for _, n := range tenants {
		wg.Go(func() {
			for qctx.Err() == nil {
				v, err := query(qctx, gw, n.name, `count by (cluster) ({__name__=~".+"})`)
				switch {
				case qctx.Err() != nil: // it was our own end that ended the query
				case err != nil:
					if refused.Add(1) == 1 || len(s.rest) > 0 {
						t.Logf("%s: query not answered: %v", time.Now().Format(time.RFC3339Nano), err)
					}
				case len(v.Result) == 1 && v.Result[0].Metric["cluster"] != "cluster-of-"+n.name, len(v.Result) > 1:
					t.Errorf("tenant %s sees %v", n.name, v.Result)
				default:
					queries.Add(1)
				}
				select {
				case <-qctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}

	pause(ctx, 12*time.Second)
	lag := freshness(t, gw, tenants[0].name)
	t.Logf("newest sample is %s old", lag)
	s.victim.Kill()
	pause(ctx, 5*time.Second)
	tenants[0].sidecar.Kill()
	pause(ctx, 3*time.Second)
	s.victim.restart(t)
	tenants[0].sidecar.restart(t)
	pause(ctx, 15*time.Second)
	stopQueries()
	wg.Wait()
	t.Logf("%d queries answered, %d not", queries.Load(), refused.Load())
	// A busy machine makes one or the other time out.
	if queries.Load() < 50 || len(s.rest) > 0 && refused.Load() > queries.Load()/20 {
		t.Errorf("%d queries were answered, %d were not", queries.Load(), refused.Load())
	}

	// All that was scraped until now must be there, soon.
	to := time.Now()
	for _, n := range tenants {
		for _, g := range s.gateways {
			auditLive(t, s, n, g.url, began, to)
		}
	}
	apiAnswers(t, gw, tenants)

	// Everything stops. Then history alone must have it all.
	to = time.Now()
	for _, n := range tenants {
		if code, err := n.prom.Stop(); err != nil || code != 0 {
			t.Errorf("prometheus: exit code %d, %v", code, err)
		}
	}
	for _, n := range tenants {
		// Its account is published now and then: only what stays so counts.
		since := time.Now()
		eventually(t, time.Minute, "last samples of "+n.name, func() error {
			if err := caughtUp(ctx, n); err != nil {
				since = time.Now()
				return err
			}
			if time.Since(since) < 2*time.Second {
				return errors.New("not for long enough")
			}
			return nil
		})
		n.sidecar.stop(t)
	}
	for _, m := range append([]*member{s.victim}, s.rest...) {
		m.stop(t)
	}
	g := s.gateways[0]
	if g == s.victim {
		g.restart(t)
	} else {
		for _, m := range s.gateways {
			m.stop(t)
		}
		g.restart(t)
	}
	for _, n := range tenants {
		out, err := s.runTool(t, "audit", "--prometheus="+n.prom.Dir, "--external-label=cluster=cluster-of-"+n.name, "--external-label=replica=0",
			"--gateway="+g.url, "--tenant="+n.name, "--from="+began.Format(time.RFC3339Nano), "--to="+to.Add(time.Minute).Format(time.RFC3339Nano))
		if err != nil {
			t.Errorf("history alone, %s: %v\n%s", n.name, err, out)
		} else {
			t.Logf("history alone, %s: %s", n.name, out)
		}
	}
	for _, n := range tenants {
		metadataOfTargets(t, g.url, n)
	}
	g.stop(t)
}

// auditLive compares until nothing differs. from and to are such that Prometheus
// gets no new samples in between: what it has just got isn't at the gateway yet.
func auditLive(t *testing.T, s *stack, n *tenant, gateway string, from, to time.Time) {
	t.Helper()
	logged := n.logged
	if logged == "" {
		logged = n.prom.Dir
	}
	eventually(t, 2*time.Minute, "audit of "+n.name, func() error {
		out, err := s.runTool(t, "audit", "--prometheus="+n.prom.URL, "--prometheus.wal="+logged,
			"--external-label=cluster=cluster-of-"+n.name, "--external-label=replica=0",
			"--gateway="+gateway, "--tenant="+n.name, "--from="+from.Format(time.RFC3339Nano), "--to="+to.Format(time.RFC3339Nano))
		if err == nil && strings.Contains(out, " 0 samples compared") {
			err = errors.New("nothing to compare")
		}
		if err != nil {
			return fmt.Errorf("%w: %s\n%s", err, summaryFirst(out), processStatus(t.Context(), n.sidecar.url))
		}
		t.Logf("%s: %s", n.name, out)
		return nil
	})
}

// summaryFirst is the output of an audit with its last line in front.
func summaryFirst(out string) string {
	out = strings.TrimSpace(out)
	i := strings.LastIndexByte(out, '\n') + 1
	return out[i:] + "\n" + out[:i]
}

// processStatus is what a process says of itself.
func processStatus(ctx context.Context, base string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/status", nil)
	if err != nil {
		return err.Error()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// step logs what follows, so that a test that fails says when.
func step(t *testing.T, what string) {
	t.Helper()
	t.Logf("%s: %s", time.Now().Format("15:04:05.000"), what)
}

// keptAccount looks at the sidecar's own account: nothing was given up.
func keptAccount(t *testing.T, n *tenant) {
	t.Helper()
	for _, m := range []string{"lost_gaps_total", "lost_blocks_total", "bad_blocks_total", "dropped_wal_files_total"} {
		if v, err := metric(t.Context(), n.sidecar.url, "epimetheus_sidecar_"+m); err != nil || v != 0 {
			t.Errorf("%s: %s is %v, %v", n.name, m, v, err)
		}
	}
}

// metricIs waits until a metric of a process is as ok says.
func metricIs(t *testing.T, within time.Duration, base, name string, ok func(float64) bool) {
	t.Helper()
	eventually(t, within, name+" of "+base, func() error {
		v, err := metric(t.Context(), base, name)
		if err == nil && !ok(v) {
			err = fmt.Errorf("it is %v\n%s", v, processStatus(t.Context(), base))
		}
		return err
	})
}

func more(than float64) func(float64) bool { return func(v float64) bool { return v > than } }

// scraping waits until Prometheus has new samples of all of its targets, as its
// own API tells: it is well.
func (n *tenant) scraping(t *testing.T) {
	t.Helper()
	since := time.Now()
	eventually(t, time.Minute, "new samples in Prometheus of "+n.name, func() error {
		v, err := query(t.Context(), n.prom.URL, "", fmt.Sprintf("count(timestamp(scrape_duration_seconds) > %d)", since.Unix()))
		if err == nil && len(v.Result) != 1 {
			err = errors.New("none")
		}
		return err
	})
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// freshness is how old the newest sample is that comes out.
func freshness(t *testing.T, gw, tenant string) time.Duration {
	t.Helper()
	v, err := query(t.Context(), gw, tenant, `max(timestamp(up))`)
	if err != nil || len(v.Result) != 1 {
		t.Fatalf("%v, %v", v, err)
	}
	var sec float64
	if _, err := fmt.Sscan(fmt.Sprint(v.Result[0].Value[1]), &sec); err != nil {
		t.Fatal(err)
	}
	return time.Since(time.UnixMilli(int64(sec * 1000))).Round(time.Millisecond)
}

// caughtUp looks at the sidecar's own account: all of the WAL read, all of it
// received.
func caughtUp(ctx context.Context, n *tenant) error {
	for _, m := range []string{"epimetheus_sidecar_wal_lag_bytes", "epimetheus_sidecar_inflight_bytes", "epimetheus_sidecar_queued_ranges"} {
		v, err := metric(ctx, n.sidecar.url, m)
		if err != nil {
			return err
		}
		if v != 0 {
			return fmt.Errorf("%s is %v", m, v)
		}
	}
	return nil
}

type metadata map[string][]struct{ Type, Unit, Help string }

func getMetadata(ctx context.Context, base, tenant, metric string) (metadata, error) {
	form := url.Values{}
	if metric != "" {
		form.Set("metric", metric)
	}
	code, r, err := get(ctx, base, "/api/v1/metadata", tenant, form)
	if err != nil || code != http.StatusOK {
		return nil, fmt.Errorf("metadata: %d %s %w", code, r.Error, err)
	}
	var m metadata
	return m, json.Unmarshal(r.Data, &m)
}

// sameMetadata returns nil if the gateway knows of all metric families what
// Prometheus knows, by the same names. What is gone from all targets it may know
// too.
func sameMetadata(ctx context.Context, n *tenant, gw string) error {
	want, err := getMetadata(ctx, n.prom.URL, "", "")
	if err != nil {
		return err
	}
	got, err := getMetadata(ctx, gw, n.name, "")
	if err != nil {
		return err
	}
	if len(want) < 50 {
		return fmt.Errorf("prometheus knows of %d families", len(want))
	}
	for family, entries := range want {
		for _, e := range entries {
			if !slices.Contains(got[family], e) {
				return fmt.Errorf("family %s is %v, want %v among them", family, got[family], e)
			}
		}
	}
	for family, entries := range got {
		base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(family, "_bucket"), "_sum"), "_count")
		if base != family && entries[0].Type == "histogram" && want[base] != nil {
			return fmt.Errorf("%s is answered as a family: %v", family, entries)
		}
	}
	return nil
}

// metadataOfTargets: families of the exporter, one by one.
func metadataOfTargets(t *testing.T, gw string, n *tenant) {
	t.Helper()
	for family, want := range map[string]string{
		"test_flapping": "gauge Comes and goes.", "test_requests_total": "counter Requests.", "test_latency_seconds": "histogram Latency.",
		"test_native_seconds": "histogram Native latency.",
	} {
		m, err := getMetadata(t.Context(), gw, n.name, family)
		if err != nil || len(m) != 1 || len(m[family]) != 1 || m[family][0].Type+" "+m[family][0].Help != want {
			t.Errorf("%s: metadata of %s: %v, %v, want %s", n.name, family, m, err, want)
		}
	}
}

// apiAnswers: label and series calls see the tenant's own data, metadata and
// exemplars have come through.
func apiAnswers(t *testing.T, gw string, tenants []*tenant) {
	t.Helper()
	ctx := t.Context()
	for _, n := range tenants {
		var values []string
		call := func(path string, form url.Values, to any) {
			t.Helper()
			code, r, err := get(ctx, gw, path, n.name, form)
			if err != nil || code != http.StatusOK {
				t.Fatalf("%s: %d %s %v", path, code, r.Error, err)
			}
			if len(r.Warnings) > 0 {
				t.Errorf("%s: warnings %v", path, r.Warnings)
			}
			if err := json.Unmarshal(r.Data, to); err != nil {
				t.Fatalf("%s: %v in %.300s", path, err, r.Data)
			}
		}
		call("/api/v1/label/cluster/values", nil, &values)
		if len(values) != 1 || values[0] != "cluster-of-"+n.name {
			t.Errorf("%s: clusters %v", n.name, values)
		}
		var series []map[string]string
		call("/api/v1/series", url.Values{"match[]": {`test_flapping`}}, &series)
		if len(series) == 0 || series[0]["replica"] != "0" {
			t.Errorf("%s: series %v", n.name, series)
		}
		eventually(t, time.Minute, "metadata of "+n.name, func() error { return sameMetadata(ctx, n, gw) })
		metadataOfTargets(t, gw, n)
		var exemplars []struct {
			SeriesLabels map[string]string
			Exemplars    []struct{ Labels map[string]string }
		}
		call("/api/v1/query_exemplars", url.Values{
			"query": {`test_latency_seconds_bucket`}, "start": {"0"}, "end": {fmt.Sprint(time.Now().Unix())},
		}, &exemplars)
		if len(exemplars) == 0 || len(exemplars[0].Exemplars) == 0 || exemplars[0].Exemplars[0].Labels["trace_id"] == "" {
			t.Errorf("%s: exemplars %v", n.name, exemplars)
		}
		v, err := query(ctx, gw, n.name, `histogram_quantile(0.9, rate(test_native_seconds[1m]))`)
		if err != nil || len(v.Result) != 1 {
			t.Errorf("%s: native histogram: %v, %v", n.name, v, err)
		}
	}
	if code, _, err := get(ctx, gw, "/api/v1/query", "", url.Values{"query": {"up"}}); err != nil || code != http.StatusUnauthorized {
		t.Errorf("without a tenant: %d, %v", code, err)
	}
}

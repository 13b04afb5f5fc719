package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/audit"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

const (
	haLease  = 10 * time.Second
	haScrape = time.Second
	haTenant = "team-ha"
)

// TestPairAll and TestPairRoles: two Prometheis scrape the same target, and their
// samples become one series.
func TestPairAll(t *testing.T) {
	t.Parallel()
	pair(t, startAll(t))
}

func TestPairRoles(t *testing.T) {
	t.Parallel()
	pair(t, startRoles(t, testenv.S3(t)))
}

// ways are those of one replica, which the test can make bad: of its sidecar to
// each gateway and each ingester, and of its Prometheus to the target.
type ways struct {
	gateways, ingesters []*link
	target              *link
}

func set(links []*link, b trouble) {
	for _, k := range links {
		k.set(b)
	}
}

// startWays makes the ways. The sidecar gets to know the ingesters by addresses of
// its own, since gateways tell it through a proxy.
func startWays(t *testing.T, s *stack, target string) (w *ways, gateways []string) {
	t.Helper()
	w = &ways{target: startLink(t, target)}
	var mu sync.Mutex
	to := map[string]*link{} // by the ingester's address
	for _, g := range s.gateways {
		u, err := url.Parse(g.url)
		if err != nil {
			t.Fatal(err)
		}
		proxy := httputil.NewSingleHostReverseProxy(u)
		proxy.ModifyResponse = func(r *http.Response) error {
			if r.Request.URL.Path != "/api/v1/ring" || r.StatusCode != http.StatusOK {
				return nil
			}
			var snap ring.Snapshot
			if err := json.NewDecoder(r.Body).Decode(&snap); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for i, m := range snap.Members {
				if to[m.Address] == nil {
					return fmt.Errorf("ingester at %s is unknown", m.Address)
				}
				snap.Members[i].Address = to[m.Address].addr
			}
			b, err := json.Marshal(snap)
			if err != nil {
				return err
			}
			r.Body.Close()
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
			r.Header.Set("Content-Length", fmt.Sprint(len(b)))
			return nil
		}
		srv := httptest.NewServer(proxy)
		t.Cleanup(srv.Close)
		k := startLink(t, strings.TrimPrefix(srv.URL, "http://"))
		w.gateways = append(w.gateways, k)
		gateways = append(gateways, "http://"+k.addr)
	}
	code, body, err := raw(t.Context(), s.gateways[0].url+"/api/v1/ring", haTenant)
	var snap ring.Snapshot
	if err == nil {
		err = json.Unmarshal(body, &snap)
	}
	if err != nil || code != http.StatusOK || len(snap.Members) != len(s.ingesters) {
		t.Fatalf("ring: %d %s, %v", code, body, err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, m := range snap.Members {
		to[m.Address] = startLink(t, m.Address)
		w.ingesters = append(w.ingesters, to[m.Address])
	}
	return w, gateways
}

// raw is the body of an answer.
func raw(ctx context.Context, url, tenant string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set(gateway.TenantHeader, tenant)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, b, err
}

// startReplica starts one of several Prometheis that scrape a target.
func startReplica(t *testing.T, s *stack, name, target string) *tenant {
	t.Helper()
	var gateways []string
	for _, g := range s.gateways {
		gateways = append(gateways, g.url)
	}
	return startReplicaBy(t, s, name, target, gateways)
}

func startReplicaBy(t *testing.T, s *stack, name, target string, gateways []string) *tenant {
	t.Helper()
	n := &tenant{name: name}
	n.prom = testenv.Prometheus(t, "", fmt.Sprintf(`
global:
  scrape_interval: %s
  external_labels: {cluster: c1, replica: %s}
scrape_configs:
- job_name: all
  scrape_native_histograms: true
  static_configs: [{targets: ['%s']}]
  relabel_configs: [{target_label: instance, replacement: target}]
`, haScrape, name, target))
	args := []string{
		"sidecar", "--data.dir=" + n.sidecarDir(s), "--tenant=" + haTenant, "--ha.replica-label=replica",
		"--prometheus.data-dir=" + n.prom.Dir, "--prometheus.url=" + n.prom.URL,
		"--config.file=" + writeFile(t, s.dir, "sidecar-"+name+".yml", fmt.Sprintf("sidecar: {ha: {lease: %s}}\n", haLease)),
	}
	for _, g := range gateways {
		args = append(args, "--gateway.url="+g)
	}
	n.sidecar = s.start(t, testenv.FreeAddr(t), args...)
	return n
}

// pair: the chosen one of two is killed (-9), with its sidecar, and comes back; so
// are an ingester, and each sidecar. Each sample of a time that is a replica's is
// there, none of another's is, and where they changed no more is missing than a
// lease.
func pair(t *testing.T, s *stack) {
	ctx := t.Context()
	began := time.Now().Add(-time.Second)
	target := startExporter(t)
	gw := s.gateways[len(s.gateways)-1].url
	a := startReplica(t, s, "a", target)
	metricIs(t, time.Minute, a.sidecar.url, "epimetheus_sidecar_shipped_samples_total", more(0))
	b := startReplica(t, s, "b", target)
	metricIs(t, time.Minute, b.sidecar.url, "epimetheus_sidecar_dropped_samples_total", more(0))
	pause(ctx, 8*time.Second)
	for n, want := range map[*tenant]float64{a: 1, b: 0} {
		metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_ha_chosen", func(v float64) bool { return v == want })
	}
	if v, err := metric(ctx, b.sidecar.url, "epimetheus_sidecar_shipped_samples_total"); err != nil || v > 5000 {
		t.Errorf("the other replica has sent %v samples, %v", v, err) // metadata counts
	}

	step(t, "the chosen one is killed, with its sidecar")
	a.prom.Kill()
	a.sidecar.Kill()
	killed := time.Now()
	eventually(t, time.Minute, "samples of the other", func() error {
		v, err := query(ctx, gw, haTenant, fmt.Sprintf("timestamp(up) > %d", killed.Add(time.Second).Unix()))
		if err == nil && len(v.Result) != 1 {
			err = errors.New("none")
		}
		return err
	})
	metricIs(t, time.Minute, b.sidecar.url, "epimetheus_sidecar_ha_chosen", func(v float64) bool { return v == 1 })
	t.Logf("the other's samples are there %s after the kill", time.Since(killed).Round(time.Millisecond))
	pause(ctx, 5*time.Second)

	step(t, "it comes back; an ingester and the sidecar of the new one are killed")
	a.restartPrometheus(t)
	a.sidecar.restart(t)
	pause(ctx, 5*time.Second)
	s.victim.Kill()
	b.sidecar.Kill()
	pause(ctx, time.Second)
	s.victim.restart(t)
	b.sidecar.restart(t)
	pause(ctx, 8*time.Second)

	step(t, "and the new one too")
	b.prom.Kill()
	b.sidecar.Kill()
	pause(ctx, haLease)
	b.restartPrometheus(t)
	b.sidecar.restart(t)
	pause(ctx, 2*haLease)

	stopPair(t, gw, began, a, b)
}

// TestPairCut: of two Prometheis that scrape the same target first the chosen one's
// sidecar is cut off from the gateways, where it claims, then from the ingesters,
// then its Prometheus from the target.
func TestPairCut(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s := startRoles(t, testenv.S3(t))
	began := time.Now().Add(-time.Second)
	target := startExporter(t)
	gw := s.gateways[0].url
	chosen := func(n *tenant) {
		t.Helper()
		metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_ha_chosen", func(v float64) bool { return v == 1 })
	}
	way := map[*tenant]*ways{}
	start := func(name string) *tenant {
		w, gateways := startWays(t, s, target)
		n := startReplicaBy(t, s, name, w.target.addr, gateways)
		way[n] = w
		return n
	}
	a := start("a")
	metricIs(t, time.Minute, a.sidecar.url, "epimetheus_sidecar_shipped_samples_total", more(0))
	b := start("b")
	metricIs(t, time.Minute, b.sidecar.url, "epimetheus_sidecar_dropped_samples_total", more(0))
	chosen(a)
	pause(ctx, 5*time.Second)

	step(t, "the chosen one's sidecar is cut off from the gateways: the other is chosen, its own samples wait")
	set(way[a].gateways, trouble{refuse: true})
	chosen(b)
	metricIs(t, time.Minute, a.sidecar.url, "epimetheus_sidecar_ha_held_seconds", more(0))
	pause(ctx, 5*time.Second)
	set(way[a].gateways, trouble{})
	metricIs(t, time.Minute, a.sidecar.url, "epimetheus_sidecar_ha_held_seconds", func(v float64) bool { return v == 0 })
	pause(ctx, 3*time.Second)

	step(t, "the other one's, which is chosen now, doesn't get an answer from them")
	set(way[b].gateways, trouble{stall: true})
	chosen(a)
	pause(ctx, 3*time.Second)
	set(way[b].gateways, trouble{})

	step(t, "the chosen one's sidecar is cut off from the ingesters")
	shipped := "epimetheus_sidecar_shipped_samples_total"
	set(way[a].ingesters, trouble{refuse: true})
	pause(ctx, 2*haLease)
	before, err := metric(ctx, a.sidecar.url, shipped)
	if err != nil {
		t.Fatal(err)
	}
	set(way[a].ingesters, trouble{})
	metricIs(t, time.Minute, a.sidecar.url, shipped, more(before))

	step(t, "the Prometheus of each in turn can't reach the target")
	for _, n := range []*tenant{a, b} {
		way[n].target.set(trouble{refuse: true})
		pause(ctx, 3*time.Second)
		way[n].target.set(trouble{})
		pause(ctx, 2*time.Second)
	}
	stopPair(t, gw, began, a, b)
}

// stopPair stops both, and looks at what is kept.
func stopPair(t *testing.T, gw string, began time.Time, a, b *tenant) {
	t.Helper()
	step(t, "both are stopped")
	for _, n := range []*tenant{a, b} {
		if code, err := n.prom.Stop(); err != nil || code != 0 {
			t.Errorf("prometheus: exit code %d, %v", code, err)
		}
	}
	stopped := time.Now()
	eventually(t, time.Minute, "the account of all replicas", func() error {
		return auditPair(t, gw, began, stopped, a, b)
	})
}

// auditPair compares what is kept with what the replicas have and whose it is.
func auditPair(t *testing.T, gw string, from, to time.Time, replicas ...*tenant) error {
	t.Helper()
	// Whose the times are, as the gateway tells.
	q := choice.Request{Group: `{"cluster":"c1"}`, From: from.UnixMilli(), Until: to.Add(time.Hour).UnixMilli()}
	body, err := json.Marshal(q)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, gw+"/api/v1/ha/claim", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set(gateway.TenantHeader, haTenant)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct{ Data choice.Answer }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	owner := func(at int64) string {
		for _, x := range answer.Data.Intervals {
			if x.From <= at && at < x.Until {
				return x.Replica
			}
		}
		return ""
	}

	got := map[string]map[int64]string{}
	remote, err := audit.NewRemote(gw, map[string]string{gateway.TenantHeader: haTenant})
	if err != nil {
		return err
	}
	defer remote.Close()
	all := func(src audit.Source, fn func(ls labels.Labels, at int64, v string)) error {
		return src.Read(t.Context(), from.UnixMilli(), to.UnixMilli(), func(ls labels.Labels, it chunkenc.Iterator) error {
			for typ := it.Next(); typ != chunkenc.ValNone; typ = it.Next() {
				switch typ {
				case chunkenc.ValFloat:
					at, v := it.At()
					fn(ls, at, fmt.Sprint(math.Float64bits(v)))
				default:
					at, h := it.AtFloatHistogram(nil)
					fn(ls, at, fmt.Sprint(math.Float64bits(h.Sum), h.Count))
				}
			}
			return it.Err()
		})
	}
	if err := all(remote, func(ls labels.Labels, at int64, v string) {
		if got[ls.String()] == nil {
			got[ls.String()] = map[int64]string{}
		}
		got[ls.String()][at] = v
	}); err != nil {
		return err
	}
	kept, others := 0, 0
	have := map[string]map[int64]bool{}
	for _, n := range replicas {
		src, err := audit.NewDir(n.prom.Dir, labels.FromStrings("cluster", "c1"))
		if err != nil {
			return err
		}
		var bad error
		err = all(src, func(ls labels.Labels, at int64, v string) {
			name := ls.String()
			if owner(at) != n.name {
				others++
				return
			}
			if have[name] == nil {
				have[name] = map[int64]bool{}
			}
			have[name][at] = true
			if kept++; got[name][at] != v && bad == nil {
				bad = fmt.Errorf("%s has %s at %d: %s, there is %q", n.name, name, at, v, got[name][at])
			}
		})
		if err = errors.Join(err, bad, src.Close()); err != nil {
			return err
		}
	}
	var times []int64
	for name, samples := range got {
		for at := range samples {
			if !have[name][at] {
				return fmt.Errorf("%s at %d is of %q, which doesn't have it", name, at, owner(at))
			}
			if strings.HasPrefix(name, `{__name__="up"`) {
				times = append(times, at)
			}
		}
	}
	slices.Sort(times)
	// A lease, a quarter of one until the next is claimed, two scrapes; and what a busy
	// machine takes for these.
	bound, worst := (2 * haLease).Milliseconds(), int64(0)
	for i := 1; i < len(times); i++ {
		d := times[i] - times[i-1]
		if worst = max(worst, d); d > bound {
			return fmt.Errorf("a gap of %d ms from %d on, the bound is %d: %v", d, times[i-1], bound, answer.Data.Intervals)
		}
	}
	if n := len(answer.Data.Intervals); n < 2 {
		return fmt.Errorf("nobody took over: %v", answer.Data.Intervals)
	}
	t.Logf("%d samples are there, %d were another's; %d intervals, the widest gap is %d ms", kept, others, len(answer.Data.Intervals), worst)
	return nil
}

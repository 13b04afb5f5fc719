package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestMemcachedKilled: memcached is killed in the middle of queries and comes back,
// empty. No query fails, warns, or misses anything; after it is back it is used again.
func TestMemcachedKilled(t *testing.T) {
	t.Run("all", func(t *testing.T) {
		t.Parallel()
		addr, server := testenv.Memcached(t)
		s := &stack{dir: t.TempDir()}
		config := writeFile(t, s.dir, "epimetheus.yml", commonConfig+memcachedConfig(addr))
		m := s.start(t, testenv.FreeAddr(t), "all", "--config.file="+config, "--data.dir="+filepath.Join(s.dir, "data"), "--grpc.listen-address="+testenv.FreeAddr(t))
		s.gateways, s.ingesters, s.victim = []*member{m}, []*member{m}, m
		memcachedKilled(t, s, server)
	})
	t.Run("roles", func(t *testing.T) {
		t.Parallel()
		addr, server := testenv.Memcached(t)
		s := startShape(t, testenv.S3(t), testenv.DynamoDB(t), shape{more: memcachedConfig(addr)})
		memcachedKilled(t, s, server)
	})
}

func memcachedConfig(addr string) string { return fmt.Sprintf("memcached: {addresses: [%q]}\n", addr) }

func memcachedKilled(t *testing.T, s *stack, server *testenv.Process) {
	const hits, stored = `epimetheus_memcached_gets_total{kind="pages",result="hit"}`, `epimetheus_memcached_sets_total{kind="pages",result="stored"}`
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	gw := s.gateways[len(s.gateways)-1].url
	eventually(t, time.Minute, "first samples", func() error {
		v, err := query(t.Context(), gw, n.name, `up == 1`)
		if err == nil && len(v.Result) < 2 {
			err = fmt.Errorf("%d series", len(v.Result))
		}
		return err
	})

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var answered atomic.Int64
	for _, g := range s.gateways {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				q := []string{`sum(rate(prometheus_tsdb_head_samples_appended_total[20s]))`, `count by (job) (up)`, `max_over_time(process_resident_memory_bytes[30s])`}[i%3]
				form := url.Values{"query": {q}, "start": {fmt.Sprint(began.Unix())}, "end": {fmt.Sprint(time.Now().Unix())}, "step": {"1"}}
				code, r, err := get(ctx, g.url, "/api/v1/query_range", n.name, form)
				// An ingester of a busy machine may take longer than half the query's time.
				r.Warnings = slices.DeleteFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "did not answer") })
				switch {
				case ctx.Err() != nil:
				case err != nil || code != http.StatusOK || len(r.Warnings) > 0:
					t.Errorf("%s: %d, %v, %s, warnings %v", q, code, err, r.Error, r.Warnings)
				default:
					answered.Add(1)
				}
				pause(ctx, 20*time.Millisecond)
			}
		})
	}
	more20 := func(what string) {
		before := answered.Load()
		eventually(t, time.Minute, "answers "+what, func() error {
			if d := answered.Load() - before; d < 20 {
				return fmt.Errorf("%d", d)
			}
			return nil
		})
	}
	metricIs(t, time.Minute, s.victim.url, stored, more(0))
	metricIs(t, time.Minute, gw, hits, more(0))
	more20("before")

	step(t, "kill memcached")
	server.Kill()
	more20("without memcached")
	metricIs(t, time.Minute, gw, `epimetheus_memcached_servers{state="down"}`, more(0))
	more20("with memcached down")

	step(t, "start memcached")
	before, err := metric(t.Context(), gw, hits)
	if err != nil {
		t.Fatal(err)
	}
	server.Restart(t)
	metricIs(t, 2*time.Minute, gw, hits, more(before))
	more20("after")
	cancel()
	wg.Wait()
	auditLive(t, s, n, gw, began, time.Now())
}

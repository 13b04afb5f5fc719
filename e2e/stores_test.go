package e2e

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestStoresDie: the object store and the index are killed while samples flow, at
// the time of a flush or in it, and come back. Nothing is missing, and every
// process stops as it should. The object store, and the processes with each other, speak TLS.
func TestStoresDie(t *testing.T) {
	t.Parallel()
	cert, key := testenv.SelfSigned(t, t.TempDir())
	s := startShape(t, testenv.S3TLS(t), testenv.DynamoDBOn(t, t.TempDir()), shape{
		tls: fmt.Sprintf("grpc_tls: {cert_file: %q, key_file: %q, ca_file: %q}\n", cert, key, cert),
	})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	pause(t.Context(), 12*time.Second)
	s.s3.Kill()
	pause(t.Context(), 8*time.Second)
	s.db.Kill()
	pause(t.Context(), 12*time.Second)
	s.s3.Restart(t)
	pause(t.Context(), 4*time.Second)
	s.db.Restart(t)
	pause(t.Context(), 6*time.Second)
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())
	n.sidecar.stop(t)
	for _, m := range append(append([]*member{s.victim}, s.rest...), s.gateways...) {
		m.stop(t)
	}
}

// faults decides what happens to requests to the stores, in phases.
type faults struct {
	mu    sync.Mutex
	seen  map[historytest.ProxyFault]int
	phase func(store, op string) historytest.ProxyFault
}

func (f *faults) decide(store string) func(op string) historytest.ProxyFault {
	return func(op string) historytest.ProxyFault {
		f.mu.Lock()
		phase := f.phase
		f.mu.Unlock()
		fault := historytest.ProxyPass
		if phase != nil {
			fault = phase(store, op)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.seen[fault]++
		return fault
	}
}

func (f *faults) set(phase func(store, op string) historytest.ProxyFault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.phase = phase
}

// writes says whether an operation has an effect.
func writes(op string) bool {
	return !strings.HasPrefix(op, "Get") && !strings.HasPrefix(op, "Head") && !strings.HasPrefix(op, "List") && op != "Query" && op != "BatchGetItem"
}

// startFaulty starts a stack whose stores fail as the test says.
func startFaulty(t *testing.T) (*stack, *faults) {
	t.Helper()
	f := &faults{seen: map[historytest.ProxyFault]int{}}
	s3, db := testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir())
	return startShape(t, s3, db, shape{
		s3: historytest.S3Proxy(t, s3.Endpoint, f.decide("s3")), db: historytest.DynamoDBProxy(t, db.Endpoint, f.decide("db")),
	}), f
}

// TestStoresFail: object store and index refuse, throttle, cut, time out, and
// fail after having done what they were asked; each dies in the middle of a
// flush; all ingesters die in the middle of one, their disks gone.
func TestStoresFail(t *testing.T) {
	t.Parallel()
	s, f := startFaulty(t)
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	audit := func() {
		t.Helper()
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	flushed := func() {
		t.Helper()
		was, err := metric(t.Context(), s.ingesters[0].url, "epimetheus_ingester_last_flush_timestamp_seconds")
		if err != nil {
			t.Fatal(err)
		}
		metricIs(t, 2*time.Minute, s.ingesters[0].url, "epimetheus_ingester_last_flush_timestamp_seconds", more(was))
	}
	flushed()

	step(t, "of two requests one fails, in one way or another")
	kinds := []historytest.ProxyFault{
		historytest.ProxyThrottle, historytest.ProxyUnprocessed, historytest.ProxyErrorBefore, historytest.ProxyUnavailable,
		historytest.ProxyErrorAfter, historytest.ProxyCutBefore, historytest.ProxyCutAfter,
	}
	var requests atomic.Int64
	f.set(func(_, _ string) historytest.ProxyFault {
		if i := int(requests.Add(1)); i%2 == 0 {
			return kinds[i/2%len(kinds)]
		}
		return historytest.ProxyPass
	})
	pause(t.Context(), 25*time.Second)
	eventually(t, 2*time.Minute, "each fault to happen", func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, k := range kinds {
			if f.seen[k] == 0 {
				return fmt.Errorf("fault %d did not, of %v", k, f.seen)
			}
		}
		return nil
	})
	n.scraping(t)
	f.set(nil)
	audit()

	step(t, "every write fails, but only after it was done")
	f.set(func(_, op string) historytest.ProxyFault {
		if writes(op) {
			return historytest.ProxyErrorAfter
		}
		return historytest.ProxyPass
	})
	metricIs(t, time.Minute, s.ingesters[0].url, "epimetheus_ingester_flush_failures_total", more(0))
	f.set(nil)
	flushed()
	audit()

	step(t, "every store dies in the middle of a flush")
	for _, c := range []struct {
		store string
		p     **testenv.Process
	}{{"s3", &s.s3.Process}, {"db", &s.db.Process}} {
		died := make(chan struct{})
		var once sync.Once
		f.set(func(store, op string) historytest.ProxyFault {
			if store == c.store && writes(op) {
				once.Do(func() {
					(*c.p).Kill()
					close(died)
				})
			}
			return historytest.ProxyPass
		})
		wait(t, died, c.store+" to be written to")
		pause(t.Context(), 3*time.Second)
		*c.p = (*c.p).Restart(t)
		f.set(nil)
	}
	audit()

	step(t, "all ingesters die in the middle of a flush: its object is written, its rows aren't")
	died := make(chan struct{})
	var once sync.Once
	f.set(func(store, op string) historytest.ProxyFault {
		if store == "db" && writes(op) {
			once.Do(func() {
				for _, m := range s.ingesters {
					m.Kill()
				}
				close(died)
			})
			return historytest.ProxyCutBefore
		}
		return historytest.ProxyPass
	})
	wait(t, died, "a flush")
	f.set(nil)
	for _, m := range s.ingesters {
		wipe(t, m.dir)
		m.restart(t)
	}
	audit()

	step(t, "writes are done and never answered")
	f.set(func(_, op string) historytest.ProxyFault {
		if writes(op) {
			return historytest.ProxyHangAfter
		}
		return historytest.ProxyPass
	})
	metricIs(t, 2*time.Minute, s.ingesters[0].url, "epimetheus_ingester_flush_failures_total", more(0))
	n.scraping(t)
	f.set(nil)
	flushed()
	audit()
	keptAccount(t, n)

	f.mu.Lock()
	defer f.mu.Unlock()
	t.Logf("faults: %v", f.seen)
	if f.seen[historytest.ProxyHangAfter] == 0 {
		t.Error("no request hung")
	}
}

// TestTenantHeldBack: the index throttles the rows of one tenant, for many flushes.
// The other's samples become durable, and nobody waits for long. Ingesters are killed
// meanwhile and replay, one loses its disk, one is told to stop; then the rows can be
// written again. Nothing is missing, extra or different, of either.
func TestTenantHeldBack(t *testing.T) {
	t.Parallel()
	var held atomic.Bool
	s3, db := testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir())
	s := startShape(t, s3, db, shape{db: historytest.DynamoDBHolding(t, db.Endpoint, func(hash string) bool { return held.Load() && hash == "b/team-a" })})
	began := time.Now().Add(-time.Second)
	a, b := startTenant(t, s, "team-a", ""), startTenant(t, s, "team-b", "")
	audit := func() {
		t.Helper()
		for _, n := range []*tenant{a, b} {
			auditLive(t, s, n, s.gateways[0].url, began, time.Now())
		}
	}
	holding := func() {
		t.Helper()
		held.Store(true)
		for _, m := range s.ingesters {
			metricIs(t, 2*time.Minute, m.url, "epimetheus_ingester_held_tenants", func(v float64) bool { return v == 1 })
		}
	}
	pause(t.Context(), 12*time.Second)

	step(t, "the rows of a tenant are throttled")
	holding()
	eventually(t, 3*time.Minute, "what is durable of the other tenant to get ahead", func() error {
		open := [2]float64{}
		for i, n := range []*tenant{a, b} {
			var err error
			if open[i], err = metric(t.Context(), n.sidecar.url, "epimetheus_sidecar_open_ranges"); err != nil {
				return err
			}
		}
		if open[0] < open[1]+8 {
			return fmt.Errorf("%v ranges of the one and %v of the other tenant are open", open[0], open[1])
		}
		return nil
	})
	audit()

	step(t, "ingesters are killed: one comes back with its disk, one without")
	for _, m := range s.ingesters[:2] {
		m.Kill()
	}
	wipe(t, s.ingesters[1].dir)
	for _, m := range s.ingesters[:2] {
		m.restart(t)
	}
	audit()

	step(t, "one is told to stop")
	holding()
	if err := s.ingesters[2].Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.ingesters[2].Done():
	case <-time.After(2 * time.Minute): // it tries for one
	}
	if _, err := s.ingesters[2].Stop(); err != nil {
		t.Fatal(err)
	}
	if out := s.ingesters[2].Output(); !strings.Contains(out, `last flush: rows of 1 tenants, such as \"team-a\"`) {
		t.Errorf("it doesn't say whose samples are to be sent again:\n%s", out)
	}
	s.ingesters[2].restart(t)
	audit()

	step(t, "the rows can be written again")
	held.Store(false)
	for _, m := range s.ingesters {
		metricIs(t, 2*time.Minute, m.url, "epimetheus_ingester_held_tenants", func(v float64) bool { return v == 0 })
	}
	audit()
	for _, n := range []*tenant{a, b} {
		keptAccount(t, n)
		n.sidecar.stop(t)
	}
	for _, m := range s.ingesters {
		m.stop(t)
	}
}

// wait waits for something that happens by itself.
func wait(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatalf("waited a minute for %s", what)
	}
}

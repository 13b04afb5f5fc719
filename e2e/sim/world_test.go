package sim

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	tenancy "github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/sidecar"
)

// world is all that there is. One goroutine, that of the schedule, owns what has
// no lock.
type world struct {
	seed    uint64
	dir     string
	rng     *rand.Rand // of the schedule
	logger  *slog.Logger
	bug     *bug
	truth   truth
	net     *network
	members members
	faults  faults
	began   time.Time
	took    time.Duration

	objects historytest.MemoryObjects
	rows    historytest.MemoryRows
	alone   *history.History // without faults and caches
	heads   *merge.Heads
	storage *merge.Storage
	reader  reader

	// What bugs change.
	newReader func(*world, *history.History) (reader, error)

	// What the processes are started with.
	sidecar      sidecar.Options
	ingester     ingest.Options
	windowBytes  uint64
	queryTimeout time.Duration
	detect       time.Duration // until the loss of a member is noticed
	lostFor      time.Duration

	disks    *rand.Rand      // for what becomes of disks
	logShare int             // of four ingesters have a commit log
	logs     map[string]bool // which do, by id
	dirs     int             // made, of disks

	tenants []string
	sources []*source
	nodes   []*node
	gone    []*node

	compaction compact.Options
	compactors []*compactor      // all that were ever started; the last one may live
	sidecars   []*sidecarProcess // all that were ever started
	due        []event           // ascending in time
	ids        int               // of members
	steps      int               // done

	stopScraping, stopQueries chan struct{}
	scrapers, queriers        sync.WaitGroup

	mu                sync.Mutex
	err               error // the first
	log               []string
	queries, complete int
	resumed           atomic.Int64 // sessions that went on after a replay
	verified          int          // samples looked up when they were called durable; under truth.mu
}

// event is what happens on its own, such as the end of a fault.
type event struct {
	at   time.Time
	name string
	do   func()
}

// random is a source of random numbers of its own: what one part of the world
// draws doesn't depend on the others.
func (w *world) random(n uint64) *rand.Rand { return rand.New(rand.NewPCG(w.seed, n)) }

// between draws from lo to hi, both included.
func between[T ~int | ~int64](r *rand.Rand, lo, hi T) T { return lo + T(r.Int64N(int64(hi-lo)+1)) }

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func newWorld(dir string, c config) (*world, error) {
	w := &world{
		seed: c.seed, dir: dir, logger: c.logger, bug: c.bug, truth: truth{samples: map[sampleID]*sample{}}, net: newNetwork(),
		began: time.Now(), stopScraping: make(chan struct{}), stopQueries: make(chan struct{}),
	}
	w.rng = w.random(1)
	w.disks, w.logs = w.random(5), map[string]bool{}
	w.logShare = pick(w.disks, 0, 2, 4, 4)
	r := w.random(2) // for what the world is like
	w.members.all, w.members.allLate = map[string]ring.Member{}, map[string]ring.Member{}
	w.members.delay = pick(r, 0, 0, between(r, 0, 1500*time.Millisecond))
	w.faults.rng, w.faults.delay = w.random(3), between(r, time.Millisecond, 50*time.Millisecond)
	w.detect, w.lostFor = between(r, time.Second, 8*time.Second), between(r, 20*time.Second, 90*time.Second)
	visibility := between(r, 12*time.Second, 30*time.Second)
	w.queryTimeout = visibility / 2
	w.windowBytes = uint64(pick(r, 2<<10, 16<<10, 4<<20))
	w.ingester = ingest.Options{
		RowWidth: history.Window, FlushInterval: between(r, 5*time.Second, 40*time.Second), VisibilityDelay: visibility,
		FinalFlush: between(r, 2*time.Second, 10*time.Second), FlushBytes: 1 << 30, Ring: &w.members.live,
	}
	if r.IntN(3) == 0 { // the head gets full
		w.ingester.FlushBytes = between(r, int64(100<<10), 500<<10)
		w.ingester.MaxBytes = 2 * w.ingester.FlushBytes
	}
	w.sidecar = sidecar.Options{
		PollInterval: pick(r, 100*time.Millisecond, 250*time.Millisecond, time.Second), RangeBytes: int64(pick(r, 2<<10, 16<<10, 1<<20)),
		RangeAge: between(r, time.Second, 5*time.Second), DetachAfter: between(r, time.Second, 5*time.Second),
		ReattachAfter: between(r, 2*time.Second, 10*time.Second), GiveUp: between(r, 6*time.Second, 30*time.Second),
		CheckpointInterval: between(r, time.Second, 5*time.Second), RingWait: between(r, time.Second, 20*time.Second),
		RewindBytesPerSecond: int64(pick(r, 8<<10, 64<<10, 16<<20)), Shards: r.IntN(3),
	}
	w.sidecar.Replicas = pick(w.disks, 1, 1, 2)
	w.compaction = compact.Options{
		Ranges: []time.Duration{30 * time.Second, 2 * time.Minute, 30 * time.Minute}, Interval: between(w.disks, time.Second, 5*time.Second),
		Grace: visibility + w.queryTimeout, Lease: between(w.disks, 5*time.Second, 30*time.Second), OrphanAge: between(w.disks, time.Minute, 3*time.Minute),
		OwnBlockBytes: int64(pick(w.disks, 1, 20<<10, 1<<20)), MaxBlockBytes: int64(pick(w.disks, 20<<10, 1<<20)), MaxSources: pick(w.disks, 2, 8, 64),
	}
	c.bug.prepare(w)
	if err := w.openReaders(visibility); err != nil {
		return nil, err
	}
	for range between(r, 1, 4) {
		w.ids++
		if err := w.startNode(fmt.Sprintf("ingester-%d", w.ids), fmt.Sprintf("address-%d", w.ids)); err != nil {
			return w, err
		}
	}
	// All know those at the beginning.
	w.members.lag = pick(w.disks, 0, 0, between(w.disks, 0, 6*time.Second))
	w.tenants = []string{"a", "bb"}[:between(r, 1, 2)]
	for i := range between(r, 1, 3) {
		s, err := newSource(w, i, w.tenants[i%len(w.tenants)])
		if err != nil {
			return w, err
		}
		w.sources = append(w.sources, s)
		w.scrapers.Go(func() { s.run(w.stopScraping) })
		if err := w.startSidecar(s, filepath.Join(dir, "data-of-"+s.id)); err != nil {
			return w, err
		}
	}
	for range pick(w.disks, 0, 1, 1, 2) {
		if err := w.startCompactor(); err != nil {
			return w, err
		}
	}
	for _, t := range w.tenants {
		w.queriers.Go(func() { w.runQueries(t, w.stopQueries) })
	}
	w.logf("sources %v, ingesters %v, %d replicas, gossip %v and %v, visibility %v, flush %v", w.sources, w.nodes, w.sidecar.Replicas, w.members.delay, w.members.lag, visibility, w.ingester.FlushInterval)
	return w, nil
}

func (w *world) openReaders(visibility time.Duration) (err error) {
	if w.alone, err = history.New(history.Options{Objects: &w.objects, Index: index.New(&w.rows), PageCacheBytes: -1, RowCacheBytes: -1}); err != nil {
		return err
	}
	cached, err := history.New(history.Options{
		Objects:         &historytest.FaultyObjects{Store: &w.objects, Decide: w.faults.read},
		Index:           index.New(&historytest.FaultyRows{Store: &w.rows, Decide: w.faults.read}),
		VisibilityDelay: visibility, PageCacheBytes: 1 << 20,
	})
	if err != nil {
		return err
	}
	w.heads = merge.NewHeads(&w.members.late, w.logger, prometheus.NewRegistry(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(w.net.dialer(gateway)))
	w.storage = merge.New(w.heads, cached, tenancy.TenantOf)
	w.reader = w.gatewayReader
	if w.newReader != nil {
		w.reader, err = w.newReader(w, cached)
	}
	return err
}

// fail notes the first violation, which ends the simulation.
func (w *world) fail(err error) {
	w.logf("VIOLATION: %v", err)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

func (w *world) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *world) logf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf("%8.3f  ", time.Since(w.began).Seconds())+fmt.Sprintf(format, args...))
}

// later does something after a time, between steps or in the middle of one.
func (w *world) later(d time.Duration, name string, do func()) {
	w.due = append(w.due, event{time.Now().Add(d), name, do})
	slices.SortStableFunc(w.due, func(a, b event) int { return a.at.Compare(b.at) })
}

// sleep lets time pass.
func (w *world) sleep(d time.Duration) {
	for end := time.Now().Add(d); ; {
		if len(w.due) == 0 || w.due[0].at.After(end) {
			time.Sleep(time.Until(end))
			return
		}
		e := w.due[0]
		w.due = w.due[1:]
		time.Sleep(time.Until(e.at))
		if e.name != "" {
			w.logf("(%s)", e.name)
		}
		e.do()
	}
}

// drain ends all trouble, shuts the sources down, and waits until the sidecars say
// that all is durable. Then all must be in history.
func (w *world) drain() error {
	w.faults.off()
	w.net.heal()
	for len(w.due) > 0 { // so that who is down comes back
		w.sleep(time.Until(w.due[0].at))
	}
	w.net.heal()
	w.faults.off()
	if len(w.active()) == 0 {
		w.addNode()
	}
	close(w.stopScraping)
	w.scrapers.Wait()
	for _, s := range w.sources {
		s.do(s.shutDown)
	}
	w.logf("sources are shut down")
	const patience = 20 * time.Minute
	for began := time.Now(); ; {
		w.sleep(time.Second)
		var waiting []string
		for _, s := range w.sources {
			st := s.sidecar.Status()
			if st.Time.Before(began.Add(2*time.Second)) || st.Checkpoint != st.Position || st.LagBytes != 0 || st.OpenRanges != 0 {
				waiting = append(waiting, fmt.Sprintf("%s is at %v of %v with %d bytes to read, %d ranges open, %d queued, sessions %+v, ring %q %v",
					s.sidecar.place, st.Checkpoint, st.Position, st.LagBytes, st.OpenRanges, st.QueuedRanges, st.Sessions, st.Ring, st.RingError))
			}
		}
		if err := w.failed(); err != nil {
			return err
		}
		if len(waiting) == 0 {
			w.logf("all is durable after %v", time.Since(began))
			break
		}
		if time.Since(began) > patience {
			return errors.New("not all gets durable: " + strings.Join(waiting, "; "))
		}
	}
	for _, t := range w.tenants {
		if err := w.checkHistory(t, true); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	// When all that is lost is forgotten, and sessions of sidecars that were killed
	// while they had something to send again are (ingesters keep these for ten
	// minutes), the gateway answers without a warning.
	for _, s := range w.sources {
		s.sidecar.cancel()
	}
	close(w.stopQueries)
	w.queriers.Wait()
	w.sleep(11 * time.Minute)
	for _, t := range w.tenants {
		incomplete, err := w.checkQuery(t, math.MinInt64, math.MaxInt64)
		if err := errors.Join(incomplete, err); err != nil {
			return fmt.Errorf("at the end: a query of %s: %w", t, err)
		}
	}
	return w.failed()
}

// close ends all that was started.
func (w *world) close() {
	closed := func(c chan struct{}) {
		select {
		case <-c:
		default:
			close(c)
		}
	}
	w.took = time.Since(w.began)
	if w.failed() != nil {
		for _, p := range w.sidecars {
			w.logf("%s", p.dropped())
		}
	}
	w.faults.off()
	closed(w.stopScraping)
	closed(w.stopQueries)
	w.scrapers.Wait()
	w.queriers.Wait()
	for _, p := range w.sidecars {
		w.net.end(p.place)
		p.cancel()
	}
	for _, p := range w.sidecars {
		<-p.ended
	}
	if w.heads != nil {
		_ = w.heads.Close()
	}
	for _, n := range append(w.nodes, w.gone...) {
		n.vanish(0)
		<-n.ended
	}
	for _, c := range w.compactors {
		c.kill()
	}
	for _, c := range w.compactors {
		<-c.ended
	}
	w.bug.wait()
	for _, s := range w.sources {
		s.cleanUp()
	}
}

// summary says what the simulation has seen.
func (w *world) summary() string {
	return fmt.Sprintf("%v of virtual time, %d samples, %d looked up as durable, %d queries, %d of them complete, %d sessions resumed after a replay, %d compactions",
		w.took.Round(time.Second), len(w.truth.samples), w.verified, w.queries, w.complete, w.resumed.Load(), w.compacted())
}

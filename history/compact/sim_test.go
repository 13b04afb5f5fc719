package compact

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "the seed to run; 0: some")
	simTrace = flag.Bool("sim.trace", false, "print each operation, who does it, and what becomes of it (0: it goes well)")
	simN     = flag.Int("sim.n", 3, "how many seeds to run")
)

// TestSimulation runs flushes, compactors and readers over stores in memory, in
// virtual time, one operation on a store at a time, in an order that the seed
// decides. Operations fail before or after their effect, writes of rows are done
// by halves, processes die at any of them or stand still for a while. Blocks that
// compactors put are lost now and then, and some can't be read by them for hours. Every read
// sees each durable sample once. Series are deleted meanwhile, and one tenant has a
// retention: no read sees what was deleted before it began, or is past the retention,
// and all else. Of another the summaries are kept for longer: of each hour that had
// samples there are some or its summary, which never tells of more than there were. At the end, when all has had its time, there is nothing but the blocks
// of the last level and their rows, without anything that was deleted.
func TestSimulation(t *testing.T) {
	seeds := []uint64{*simSeed}
	if *simSeed == 0 {
		seeds = nil
		for i := range *simN {
			seeds = append(seeds, uint64(i+1)) //nolint:gosec // small
		}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			newSim(t, seed).run()
		})
	}
}

// TestSimulationRepeats: a seed decides all that happens.
func TestSimulationRepeats(t *testing.T) {
	t.Parallel()
	var first *sim
	for range 2 {
		s := newSim(t, 5)
		s.long = 15 * time.Hour
		if s.run(); first == nil {
			first = s
			continue
		}
		if s.ops != first.ops || s.trace.Sum64() != first.trace.Sum64() {
			t.Errorf("%d operations, %x, are %d, %x the second time", first.ops, first.trace.Sum64(), s.ops, s.trace.Sum64())
		}
	}
	if first.counts["side by side"] == 0 {
		t.Error("no rows were written tenant by tenant")
	}
}

// Times of the simulated world.
const (
	simGrace    = 10 * time.Minute
	simLease    = 5 * time.Minute
	simInterval = 2 * time.Minute
	simOrphan   = 6 * time.Hour
	simFlush    = 20 * time.Minute
	simLong     = 40 * time.Hour // how long there are flushes
)

type sim struct {
	t       *testing.T
	r       *rand.Rand
	objects *historytest.MemoryObjects
	rows    *historytest.MemoryRows
	now     time.Time

	arrive  chan *ask
	waiting []*ask
	running int // actors that are neither waiting nor done
	alive   int
	spawned int
	faults  bool
	ending  bool // no more flushes
	readers int  // with a snapshot that they have yet to read
	expiry  time.Time

	held      string // block rows of this tenant can't be written or removed by compactors
	heldUntil time.Time

	denied      byte // objects of which the key ends so, modulo 8, can't be read by compactors
	deniedUntil time.Time

	started, durable map[string]map[string]map[int64]bool // tenant, series, time
	deletions        []*simDeletion
	reads, samples   int
	ops              int
	counts           map[string]int
	trace            hash.Hash64 // of all that was done, by whom, when, and how it ended
	long             time.Duration
	regs             []*prometheus.Registry
}

// simDeletion is a deletion that somebody has asked for.
type simDeletion struct {
	index.Deletion
	tenant   string
	acked    bool // and is in force
	released bool // it may have been cancelled
}

// simRetention is that of tenant t1.
const simRetention = 30 * time.Hour

func simRetentions() *history.Retentions {
	return &history.Retentions{Tenants: map[string]history.Retention{
		"t1": {Raw: simRetention}, "t2": {Raw: 20 * time.Hour, Short: 50 * time.Hour, Long: 1000 * time.Hour},
	}}
}

func simRetentionsOnce() func() *history.Retentions {
	r := simRetentions()
	return func() *history.Retentions { return r }
}

func parseLabels(t *testing.T, text string) labels.Labels {
	t.Helper()
	ls, err := parser.NewParser(parser.Options{}).ParseMetric(text)
	if err != nil {
		t.Fatal(err)
	}
	return ls
}

// gone says of a sample whether it must not be read, or need not be.
func (s *sim) gone(tenant string, ls labels.Labels, t int64, now time.Time) (must, may bool) {
	if t < simRetentions().Of(tenant).Horizons(now).Raw {
		return true, true
	}
	for _, d := range s.deletions {
		if d.tenant == tenant && d.Overlaps(t, t) && d.Matches(ls) {
			may = true
			must = must || d.acked && !d.released
		}
	}
	return must, may
}

// admin deletes, and cancels now and then.
func (s *sim) admin(name string) {
	a := &actor{sim: s, name: name, faulty: true}
	s.spawn(a, func() {
		for {
			a.sleep(time.Duration(s.r.Int64N(int64(2 * time.Hour))))
			if s.ending {
				return
			}
			a.dead, a.frozen = false, time.Time{}
			h := s.history(a)
			if n := len(s.deletions); n > 0 && s.r.IntN(4) == 0 {
				if d := s.deletions[s.r.IntN(n)]; d.acked {
					d.released = true // from now on it may be
					if err := h.Cancel(context.Background(), d.tenant, d.ID); err == nil {
						s.counts["cancelled"]++
					}
				}
				continue
			}
			maxt := s.now.UnixMilli() - s.r.Int64N(5*hour)
			d := &simDeletion{tenant: fmt.Sprintf("t%d", s.r.IntN(5)), Deletion: index.Deletion{MinT: maxt - s.r.Int64N(10*hour), MaxT: maxt}}
			switch s.r.IntN(6) {
			case 0: // the tenant
				d.MinT = math.MinInt64
			case 1:
				d.Matchers = []*labels.Matcher{labels.MustNewMatcher(labels.MatchEqual, model.MetricNameLabel, "m0")}
				d.MinT = math.MinInt64
			default:
				d.Matchers = []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, "i", "[0-2]")}
			}
			s.deletions = append(s.deletions, d)
			id, err := h.Delete(context.Background(), d.tenant, d.MinT, d.MaxT, d.Matchers...)
			if err == nil {
				d.ID, d.acked = id, true
				s.counts["deleted"]++
				if s.r.IntN(2) == 0 {
					_ = h.Clean(context.Background(), d.tenant)
				}
			}
		}
	})
}

// ask is what an actor waits for: its turn.
type ask struct {
	actor *actor
	op    string
	until time.Time // not before
	turn  chan verdict
}

type verdict int

const (
	proceed verdict = iota
	failBefore
	failAfter
	dieBefore
	dieAfter
)

// actor is a process.
type actor struct {
	sim    *sim
	name   string
	id     int // in the order of spawn
	faulty bool
	dead   bool
	frozen time.Time // until when it stands still

	// Rows of tenants that couldn't be written together are written again side by side,
	// tenant by tenant: so many writes are awaited, and done in the order of their keys.
	mu       sync.Mutex
	awaited  int
	together []*rowPut
}

// rowPut is a write of rows that waits for others.
type rowPut struct {
	hash string
	turn chan struct{}
}

var errDead = errors.New("the process is dead")

func newSim(t *testing.T, seed uint64) *sim {
	return &sim{
		t: t, r: rand.New(rand.NewPCG(seed, 7)), objects: &historytest.MemoryObjects{}, rows: &historytest.MemoryRows{},
		now:   time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		trace: fnv.New64a(), long: simLong,
		arrive: make(chan *ask), faults: true, // objects are as old as their ids say
		started: map[string]map[string]map[int64]bool{}, durable: map[string]map[string]map[int64]bool{}, counts: map[string]int{},
	}
}

// wait gives up the turn until the scheduler gives it back.
func (a *actor) wait(op string, until time.Time) verdict {
	q := &ask{actor: a, op: op, until: until, turn: make(chan verdict)}
	a.sim.arrive <- q
	return <-q.turn
}

func (a *actor) sleep(d time.Duration) { a.wait("sleep", a.sim.now.Add(d)) }

// do runs an operation on a store when it is its turn, if at all.
func (a *actor) do(op string, effect func() error) error {
	if a.dead {
		return errDead
	}
	switch a.wait(op, time.Time{}) {
	case failBefore:
		return fmt.Errorf("%s: %w", op, historytest.ErrInjected)
	case failAfter:
		return errors.Join(effect(), fmt.Errorf("%s: %w", op, historytest.ErrInjected))
	case dieBefore:
		a.dead = true
		return errDead
	case dieAfter:
		a.dead = true
		return errors.Join(effect(), errDead)
	default:
		return effect()
	}
}

func (s *sim) spawn(a *actor, body func()) {
	s.running++
	s.alive++
	s.spawned++
	a.id = s.spawned
	go func() {
		a.wait("sleep", time.Time{}) // one at a time from the start
		body()
		s.arrive <- &ask{actor: a, op: "end"}
	}()
}

// schedule gives turns until all actors have ended.
func (s *sim) schedule() {
	for {
		for s.running > 0 {
			q := <-s.arrive
			s.running--
			if q.op == "end" {
				s.alive--
			} else {
				s.waiting = append(s.waiting, q)
			}
		}
		if s.alive == 0 {
			return
		}
		slices.SortFunc(s.waiting, func(x, y *ask) int { return cmp.Compare(x.actor.id, y.actor.id) }) // each waits once
		// Time goes on where all wait for it, and now and then while operations
		// are under way; but no reader takes longer than readers may.
		var can []int
		next := time.Time{}
		for i, q := range s.waiting {
			at := q.until
			if q.actor.frozen.After(at) {
				at = q.actor.frozen
			}
			if !at.After(s.now) {
				can = append(can, i)
			} else if next.IsZero() || at.Before(next) {
				next = at
			}
		}
		switch {
		case len(can) == 0:
			s.advance(next.Sub(s.now))
			if next.After(s.now) { // a reader has to finish first
				for i, q := range s.waiting {
					if strings.HasPrefix(q.actor.name, "reader") {
						q.until, q.actor.frozen = time.Time{}, time.Time{}
						can = append(can, i)
					}
				}
				if len(can) == 0 {
					s.t.Fatal("nobody can go on")
				}
				break
			}
			continue
		case s.r.IntN(200) == 0:
			s.advance(time.Duration(s.r.Int64N(int64(4 * time.Minute))))
		}
		i := can[s.r.IntN(len(can))]
		q := s.waiting[i]
		s.waiting = slices.Delete(s.waiting, i, i+1)
		v := proceed
		if q.op != "sleep" {
			s.ops++
			if s.faults && q.actor.faulty {
				v = s.fault(q.actor)
			}
		}
		_, _ = fmt.Fprintln(s.trace, s.now.UnixMilli(), q.actor.name, q.op, v)
		if *simTrace {
			fmt.Printf("%s %s %s %d\n", s.now.Format(time.RFC3339Nano), q.actor.name, q.op, v)
		}
		s.running++
		q.turn <- v
	}
}

// advance lets time pass, as far as readers allow.
func (s *sim) advance(d time.Duration) {
	to := s.now.Add(d)
	if s.readers > 0 && to.After(s.expiry) {
		to = s.expiry
	}
	if to.After(s.now) {
		s.now = to
	}
}

func (s *sim) fault(a *actor) verdict {
	switch s.r.IntN(400) {
	case 0, 1, 2:
		return failBefore
	case 3, 4, 5:
		return failAfter
	case 6:
		return dieBefore
	case 7:
		return dieAfter
	case 8:
		// Standing still: often long enough to lose a lease, now and then so long
		// that all is done and gone when it goes on.
		a.frozen = s.now.Add(time.Duration(s.r.Int64N(int64([]time.Duration{10 * time.Minute, time.Hour, 10 * time.Hour}[s.r.IntN(3)]))))
		s.counts["frozen"]++
	case 9:
		if s.now.After(s.heldUntil.Add(time.Hour)) {
			s.held = fmt.Sprint("b/t", s.r.IntN(2))
			s.heldUntil = s.now.Add([]time.Duration{20 * time.Minute, time.Hour, 10 * time.Hour}[s.r.IntN(3)])
			s.counts["held back"]++
		}
	case 10:
		if s.now.After(s.deniedUntil.Add(2 * time.Hour)) {
			s.denied = byte(s.r.IntN(8)) //nolint:gosec // small
			s.deniedUntil = s.now.Add([]time.Duration{30 * time.Minute, 2 * time.Hour, 8 * time.Hour}[s.r.IntN(3)])
		}
	}
	return proceed
}

// simRows is the index as a process sees it.
type simRows struct {
	index.Store
	a *actor
}

func (r *simRows) Put(ctx context.Context, items []index.Item) (err error) {
	if len(items) == 0 {
		return nil
	}
	defer func(all []index.Item) { r.a.await(all, err) }(items)
	defer r.a.inOrder(items[0].Hash)()
	var left []index.Key
	items = slices.DeleteFunc(slices.Clone(items), func(it index.Item) bool {
		if r.a.holds(it.Hash) {
			left = append(left, it.Key)
		}
		return r.a.holds(it.Hash)
	})
	// In pieces: nothing spans rows.
	for len(items) > 0 {
		n := 1 + r.a.sim.r.IntN(len(items))
		if err := r.a.do("Put "+items[0].Hash, func() error { return r.Store.Put(ctx, items[:n]) }); err != nil {
			return err
		}
		items = items[n:]
	}
	if len(left) > 0 {
		return &index.PartialError{Left: left, Err: historytest.ErrInjected}
	}
	return nil
}

// inOrder returns when it is the turn of a write; its result is called at the end of it.
func (a *actor) inOrder(hash string) (next func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.awaited == 0 {
		return func() {}
	}
	p := &rowPut{hash, make(chan struct{}, 1)}
	a.together = append(a.together, p)
	if len(a.together) == a.awaited {
		slices.SortFunc(a.together, func(x, y *rowPut) int { return strings.Compare(x.hash, y.hash) })
		a.awaited = 0
		a.together[0].turn <- struct{}{}
	}
	a.mu.Unlock()
	<-p.turn
	a.mu.Lock()
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.together = a.together[1:]; len(a.together) > 0 {
			a.together[0].turn <- struct{}{}
		}
	}
}

// await is told how a write of rows ended: where it was of block rows of several tenants
// and failed, what is left is written by history.PutRows, by each of them for itself.
func (a *actor) await(items []index.Item, err error) {
	if err == nil {
		return
	}
	tenants := map[string]bool{}
	for _, it := range items {
		tenants[it.Hash] = strings.HasPrefix(it.Hash, "b/")
	}
	if partial := (*index.PartialError)(nil); errors.As(err, &partial) {
		tenants = map[string]bool{}
		for _, k := range partial.Left {
			tenants[k.Hash] = strings.HasPrefix(k.Hash, "b/")
		}
	}
	maps.DeleteFunc(tenants, func(_ string, is bool) bool { return !is })
	if len(tenants) > 1 {
		a.mu.Lock()
		a.awaited = len(tenants)
		a.sim.counts["side by side"]++
		a.mu.Unlock()
	}
}

// holds says whether rows with a hash key can't be changed by a compactor.
func (a *actor) holds(hash string) bool {
	return a.sim.faults && hash == a.sim.held && a.sim.now.Before(a.sim.heldUntil) && strings.HasPrefix(a.name, "compactor")
}

func (r *simRows) PutIf(ctx context.Context, it index.Item, old []byte) (current []byte, err error) {
	err = r.a.do("PutIf "+it.Hash, func() error {
		current, err = r.Store.PutIf(ctx, it, old)
		return err
	})
	if errors.Is(err, historytest.ErrInjected) || errors.Is(err, errDead) {
		if errors.Is(err, index.ErrConflict) { // its answer is lost as well
			err = fmt.Errorf("PutIf: %w", historytest.ErrInjected)
		}
		current = nil
	}
	return current, err
}

func (r *simRows) Query(ctx context.Context, q index.Query) (items []index.Item, err error) {
	if strings.HasPrefix(q.Hash, "w/") && q.Hash != "w/compacted" {
		if r.a.dead {
			return nil, errDead
		}
		return r.Store.Query(ctx, q) // very many
	}
	if !strings.HasPrefix(q.Hash, "b/") {
		err = r.a.do("Query "+q.Hash, func() error {
			items, err = r.Store.Query(ctx, q)
			return err
		})
		return items, err
	}
	// Rows of blocks are read page by page, with time in between.
	from := q.From
	for {
		var page []index.Item
		p := q
		p.From, p.Limit = from, 1+r.a.sim.r.IntN(4)
		if err := r.a.do("Query "+q.Hash, func() error {
			page, err = r.Store.Query(ctx, p)
			return err
		}); err != nil {
			return nil, err
		}
		items = append(items, page...)
		if len(page) < p.Limit {
			return items, nil
		}
		from = append(bytes.Clone(page[len(page)-1].Range), 0)
	}
}

func (r *simRows) Delete(ctx context.Context, keys []index.Key) error {
	for len(keys) > 0 {
		if r.a.holds(keys[0].Hash) {
			return fmt.Errorf("Delete %s: %w", keys[0].Hash, historytest.ErrInjected)
		}
		n := 1 + r.a.sim.r.IntN(len(keys))
		if err := r.a.do("Delete "+keys[0].Hash, func() error { return r.Store.Delete(ctx, keys[:n]) }); err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

// simObjects is the object store as a process sees it.
type simObjects struct {
	object.Store
	a *actor
}

func (o *simObjects) Put(ctx context.Context, key string, r io.ReaderAt, size int64) error {
	return o.a.do("Put "+key, func() error {
		if s := o.a.sim; s.faults && strings.HasPrefix(o.a.name, "compactor") && s.r.IntN(15) == 0 {
			s.counts["block lost"]++
			return nil
		}
		return o.Store.Put(ctx, key, r, size)
	})
}

// denied says whether a compactor can't read an object: some, for some time.
func (o *simObjects) denied(key string) bool {
	s := o.a.sim
	if !s.faults || !strings.HasPrefix(o.a.name, "compactor") || s.now.After(s.deniedUntil) || key[len(key)-1]%8 != s.denied {
		return false
	}
	s.counts["denied"]++
	return true
}

func (o *simObjects) Delete(ctx context.Context, key string) error {
	return o.a.do("Delete "+key, func() error { return o.Store.Delete(ctx, key) })
}

func (o *simObjects) GetRange(ctx context.Context, key string, off, n int64) (b []byte, err error) {
	if o.a.name == "reader" { // several at a time, in an order that no seed decides
		return o.Store.GetRange(ctx, key, off, n)
	}
	err = o.a.do("GetRange "+key, func() error {
		if o.denied(key) {
			return fmt.Errorf("GetRange %s: denied: %w", key, historytest.ErrInjected)
		}
		b, err = o.Store.GetRange(ctx, key, off, n)
		return err
	})
	return b, err
}

func (o *simObjects) List(ctx context.Context, prefix string, fn func(object.Info) error) error {
	return o.a.do("List", func() error { return o.Store.List(ctx, prefix, fn) })
}

// entropy is the seed's.
type entropy struct{ r *rand.Rand }

func (e entropy) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(e.r.IntN(256)) //nolint:gosec // a byte
	}
	return len(p), nil
}

func (s *sim) newID() ulid.ULID {
	return ulid.MustNew(ulid.Timestamp(s.now), entropy{s.r})
}

func note(m map[string]map[string]map[int64]bool, c content) {
	for tenant, all := range c {
		if m[tenant] == nil {
			m[tenant] = map[string]map[int64]bool{}
		}
		for key, s := range all {
			if m[tenant][key] == nil {
				m[tenant][key] = map[int64]bool{}
			}
			for _, t := range s.Floats.T {
				m[tenant][key][t] = true
			}
		}
	}
}

// valueAt is what every copy of a sample has.
func valueAt(key string, t int64) float64 { return float64(len(key))*1e6 + float64(t/1000%100_000) }

// flushed is what an ingester has collected until now, with something late.
func (s *sim) flushed() content {
	c := content{}
	add := func(tenant string, i int, from, to int64) {
		ls := labels.FromStrings(model.MetricNameLabel, fmt.Sprintf("m%d", i%2), "i", fmt.Sprint(i))
		out := &chunkfmt.Series{Labels: ls}
		for t := from - from%60_000; t <= to; t += 60_000 * int64(1+s.r.IntN(3)) {
			out.Floats.T, out.Floats.V = append(out.Floats.T, t), append(out.Floats.V, valueAt(ls.String(), t))
		}
		if len(out.Floats.T) > 0 {
			c.add(tenant, out)
		}
	}
	now := s.now.UnixMilli()
	for i := range 5 {
		tenant := fmt.Sprintf("t%d", i)
		if s.r.IntN(3) == 0 {
			continue
		}
		for j := range 1 + i*i { // the last is large
			add(tenant, j, now-simFlush.Milliseconds(), now)
		}
		if s.r.IntN(4) == 0 {
			late := now - s.r.Int64N(20*day)
			add(tenant, s.r.IntN(3), late, late+10*minute)
		}
	}
	return c
}

// ingester flushes now and then, and tries until it is durable; what a dead one
// had, the sources send to another.
func (s *sim) ingester(name string) {
	a := &actor{sim: s, name: name, faulty: true}
	s.spawn(a, func() {
		for {
			a.sleep(simFlush/2 + time.Duration(s.r.Int64N(int64(simFlush))))
			if s.ending {
				return
			}
			c := s.flushed()
			if len(c) == 0 {
				continue
			}
			note(s.started, c)
			for ok := false; !ok; {
				a.dead, a.frozen = false, time.Time{}
				ok = s.flush(a, c)
				if !ok {
					s.counts["ingester died"]++
					a.sleep(time.Minute)
				}
			}
			note(s.durable, c)
			s.counts["flushed"]++
		}
	})
}

func (s *sim) flush(a *actor, c content) bool {
	h := s.history(a)
	data, sum := encode(s.t, c)
	id := s.newID()
	for {
		err := h.Publish(context.Background(), id, data, sum)
		switch {
		case err == nil:
			return true
		case a.dead:
			return false
		case errors.Is(err, history.ErrCondemned):
			s.counts["flush condemned"]++
			id = s.newID()
		}
		a.sleep(10 * time.Second)
	}
}

func (s *sim) history(a *actor) *history.History {
	reg := prometheus.NewRegistry()
	h, err := history.New(history.Options{
		Objects: &simObjects{s.objects, a}, Index: index.New(&simRows{s.rows, a}), PageCacheBytes: -1, RowCacheBytes: -1, Registerer: reg,
		Retentions: simRetentionsOnce(), Now: func() time.Time { return s.now },
	})
	s.regs = append(s.regs, reg)
	if err != nil {
		s.t.Fatal(err)
	}
	return h
}

func (s *sim) compactor(a *actor) *Compactor {
	c, err := New(Options{
		Objects: &simObjects{s.objects, a}, Index: index.New(&simRows{s.rows, a}), Dir: s.t.TempDir(),
		Ranges: []time.Duration{time.Hour, 4 * time.Hour, 24 * time.Hour}, MaxBlockBytes: 20_000, OwnBlockBytes: 3000,
		Grace: simGrace, Interval: simInterval, Lease: simLease, OrphanAge: simOrphan, MaxSources: 12,
		Retentions: simRetentionsOnce(), CleanAge: 5 * time.Hour,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	// It reads several pages at a time, in an order that no seed decides.
	if c.reader, err = history.New(history.Options{Objects: s.objects, Index: index.New(s.rows), PageCacheBytes: -1, RowCacheBytes: -1}); err != nil {
		s.t.Fatal(err)
	}
	c.now = func() time.Time { return s.now }
	c.entropy, c.queries = entropy{s.r}, 1
	return c
}

// compact runs a compactor, that is started again when it has died, until it is
// told to end.
func (s *sim) compact(name string, end func() bool) {
	a := &actor{sim: s, name: name, faulty: true}
	s.spawn(a, func() {
		for !end() {
			a.dead, a.frozen = false, time.Time{}
			c := s.compactor(a)
			for !a.dead && !end() {
				worked, err := c.Round(context.Background())
				if err != nil && !a.dead && !errors.Is(err, historytest.ErrInjected) && (s.counts["block lost"] == 0 || !errors.Is(err, object.ErrNotExist)) {
					s.t.Errorf("%s: %v", name, err)
				}
				if worked {
					s.counts["merged"]++
				}
				a.sleep(simInterval)
			}
			if a.dead {
				s.counts["compactor died"]++
				a.sleep(time.Duration(s.r.Int64N(int64(20 * time.Minute))))
			}
		}
	})
}

// reader takes snapshots, and reads them as late as queries may.
func (s *sim) reader(end func() bool) {
	a := &actor{sim: s, name: "reader"}
	s.spawn(a, func() {
		h := s.history(a)
		for !end() {
			a.sleep(time.Duration(s.r.Int64N(int64(20 * time.Minute))))
			s.read(a, h)
		}
	})
}

func (s *sim) read(a *actor, h *history.History) {
	tenant := fmt.Sprintf("t%d", s.r.IntN(5))
	maxt := s.now.UnixMilli() + hour
	mint := maxt - s.r.Int64N(3*day)
	switch s.r.IntN(4) {
	case 0:
		mint = maxt - 40*day
	case 1:
		maxt = mint + s.r.Int64N(day)
	case 2: // of what was late
		mint = maxt - s.r.Int64N(22*day)
		maxt = mint + s.r.Int64N(4*day)
	}
	want := map[string]map[int64]bool{}
	for key, ts := range s.durable[tenant] {
		want[key] = maps.Clone(ts)
	}
	acked := map[*simDeletion]bool{}
	for _, d := range s.deletions {
		acked[d] = d.acked
	}
	began := s.now
	if s.readers++; s.readers == 1 {
		s.expiry = s.now.Add(simGrace * 9 / 10)
	}
	defer func() { s.readers-- }()
	snap, err := h.Snapshot(context.Background(), tenant, mint, maxt, nil, time.Time{})
	if err != nil {
		s.t.Errorf("snapshot: %v", err)
		return
	}
	a.sleep(time.Duration(s.r.Int64N(int64(simGrace / 2))))
	set, err := snap.Select(context.Background(), nil, mint, maxt)
	if err != nil {
		s.t.Errorf("%s: read of %s: %v", s.now, tenant, err)
		return
	}
	got := map[string]map[int64]bool{}
	for set.Next(context.Background()) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			s.t.Errorf("%s: read of %s: %v", s.now, tenant, err)
			return
		}
		if len(runs) == 0 {
			continue
		}
		ls := set.At().Labels
		one, key := chunkfmt.Merge(runs...), ls.String()
		if got[key] != nil {
			s.t.Errorf("series %s comes twice", key)
		}
		got[key] = map[int64]bool{}
		for i, t := range one.Floats.T {
			if got[key][t] {
				s.t.Errorf("%s at %d comes twice", key, t)
			}
			got[key][t] = true
			s.samples++
			if t < simRetentions().Of(tenant).Horizons(began).Raw {
				s.t.Errorf("%s at %d is past the retention", key, t)
			}
			for _, d := range s.deletions {
				if d.tenant == tenant && acked[d] && !d.released && d.Overlaps(t, t) && d.Matches(ls) {
					s.t.Errorf("%s: %s of %s at %d was deleted: %+v", s.now, key, tenant, t, d)
				}
			}
			if !s.started[tenant][key][t] || one.Floats.V[i] != valueAt(key, t) {
				s.t.Errorf("%s at %d: %v was never written", key, t, one.Floats.V[i])
			}
		}
	}
	if err := set.Err(); err != nil {
		s.t.Errorf("%s: read of %s: %v", s.now, tenant, err)
		return
	}
	missing := 0
	for key, ts := range want {
		for t := range ts {
			if t >= mint && t <= maxt && !got[key][t] {
				if _, may := s.gone(tenant, parseLabels(s.t, key), t, s.now); !may {
					missing++
				}
			}
		}
	}
	if missing > 0 {
		s.t.Errorf("%s: read of %s, %d to %d: %d samples are missing", s.now, tenant, mint, maxt, missing)
	}
	if tenant == "t2" {
		s.readWindows(snap, want, tenant, mint, maxt)
	}
	s.reads++
}

// readWindows sees that of each hour that has samples there are some, or a window, and
// that no window tells of more than there ever were.
func (s *sim) readWindows(snap *history.Snapshot, want map[string]map[int64]bool, tenant string, mint, maxt int64) {
	set, err := snap.SelectWindows(context.Background(), nil, mint, maxt, history.Summaries{Width: rollup.Long})
	if err != nil {
		s.t.Errorf("%s: windows of %s: %v", s.now, tenant, err)
		return
	}
	got := map[string]map[int64]int{}
	for set.Next(context.Background()) {
		buf, key := &history.Buffer{}, set.At().Labels.String()
		got[key] = map[int64]int{}
		w, _, err := set.At().Windows(buf)
		if err != nil {
			s.t.Errorf("%s: windows of %s: %v", s.now, tenant, err)
			return
		}
		w.Expand(0)
		for i, end := range w.End {
			got[key][end] += int(w.Count[i])
		}
		if runs, err := set.At().Runs(buf); err != nil {
			s.t.Errorf("%s: windows of %s: %v", s.now, tenant, err)
		} else if len(runs) > 0 {
			for _, t := range chunkfmt.Merge(runs...).Floats.T {
				got[key][rollup.EndOf(t, rollup.Long)]++
			}
		}
		ever := map[int64]int{}
		for t := range s.started[tenant][key] {
			ever[rollup.EndOf(t, rollup.Long)]++
		}
		for end, n := range got[key] {
			if end-rollup.Long >= mint && n > ever[end] {
				s.t.Errorf("%s: %s of %s: %d samples until %d, there were %d", s.now, key, tenant, n, end, ever[end])
			}
		}
	}
	if err := set.Err(); err != nil {
		s.t.Errorf("%s: windows of %s: %v", s.now, tenant, err)
	}
	all, fewer := 0, 0
	for key, ts := range want {
		ls := parseLabels(s.t, key)
		hours := map[int64]int{}
		for t := range ts {
			end := rollup.EndOf(t, rollup.Long)
			if slices.ContainsFunc(s.deletions, func(d *simDeletion) bool {
				return d.tenant == tenant && d.Overlaps(end-rollup.Long+1, end) && d.Matches(ls)
			}) {
				continue
			}
			if end-rollup.Long >= mint && end <= maxt {
				hours[end]++
			}
		}
		for end, n := range hours {
			if all++; got[key][end] == 0 {
				s.t.Errorf("%s: %s of %s: nothing is left of the hour until %d", s.now, key, tenant, end)
			} else if got[key][end] < n {
				fewer++ // they came when the others were gone
			}
		}
	}
	if fewer > 3+all/10 {
		s.t.Errorf("%s: windows of %s: %d of %d lack samples", s.now, tenant, fewer, all)
	}
	s.counts["windows"] += all
}

func (s *sim) run() {
	stop := s.now.Add(s.long)
	ended := func() bool { return s.ending || s.t.Failed() }
	clock := &actor{sim: s, name: "clock"}
	s.spawn(clock, func() {
		for s.now.Before(stop) && !s.t.Failed() {
			clock.sleep(10 * time.Minute)
		}
		s.ending = true
	})
	s.ingester("ingester-1")
	s.ingester("ingester-2")
	s.compact("compactor-1", ended)
	s.compact("compactor-2", ended)
	s.reader(ended)
	s.reader(ended)
	s.admin("admin")
	s.schedule()
	if s.t.Failed() {
		return
	}
	// Now all goes well: a few days later nothing is left to do.
	s.faults, s.ending = false, false
	stop = s.now.Add(4 * 24 * time.Hour)
	after := func() bool { return !s.now.Before(stop) || s.t.Failed() }
	s.compact("compactor-3", after)
	s.reader(after)
	s.schedule()
	s.checkEnd()
	s.t.Logf("trace %x, %d operations, %d reads of %d samples, %v", s.trace.Sum64(), s.ops, s.reads, s.samples, s.counts)
}

// checkLeft compares all that is in objects with what should be.
func (s *sim) checkLeft(x *index.Index) {
	ctx := s.t.Context()
	left := 0
	for tenant, series := range s.durable {
		rows, err := x.AllBlocks(ctx, tenant)
		if err != nil {
			s.t.Fatal(err)
		}
		rows = slices.DeleteFunc(rows, func(r index.BlockRow) bool {
			_, err := s.objects.Size(ctx, r.Object)
			return err != nil
		})
		h, err := history.New(history.Options{Objects: s.objects, Index: x})
		if err != nil {
			s.t.Fatal(err)
		}
		set, err := h.Open(tenant, math.MinInt64, math.MaxInt64, history.Blocks(rows), nil).Select(ctx, nil, math.MinInt64, math.MaxInt64)
		if err != nil {
			s.t.Fatal(err)
		}
		got := map[string]map[int64]bool{}
		for set.Next(ctx) {
			runs, err := set.At().Runs(&history.Buffer{})
			if err != nil {
				s.t.Fatal(err)
			}
			ls := set.At().Labels
			got[ls.String()] = map[int64]bool{}
			for _, t := range chunkfmt.Merge(runs...).Floats.T {
				got[ls.String()][t] = true
				left++
				if must, _ := s.gone(tenant, ls, t, s.now); must {
					s.t.Errorf("%s of %s at %d is deleted, and in an object", ls, tenant, t)
				}
			}
		}
		if err := set.Err(); err != nil {
			s.t.Fatal(err)
		}
		for key, ts := range series {
			ls := parseLabels(s.t, key)
			for t := range ts {
				if _, may := s.gone(tenant, ls, t, s.now); !may && !got[key][t] {
					s.t.Errorf("%s of %s at %d is lost", key, tenant, t)
				}
			}
		}
		ds, err := x.Deletions(ctx, tenant)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, d := range ds.Deletions {
			if d.Gone == 0 {
				s.t.Errorf("deletion %+v of %s: nobody has noted that nothing is left", d, tenant)
			}
			s.counts["in force"]++
		}
	}
	s.counts["left"] = left
}

// checkEnd sees that objects and rows fit each other and nothing else is left.
func (s *sim) checkEnd() {
	ctx := s.t.Context()
	x := index.New(s.rows)
	named := map[string]int{}
	dangling := 0
	for tenant := range s.started {
		rows, err := x.AllBlocks(ctx, tenant)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, r := range rows {
			if _, err := s.objects.Size(ctx, r.Object); err != nil {
				if state, err := x.GuardState(ctx, r.Block); err != nil || state != index.Condemned {
					s.t.Errorf("row of %s without an object: %s, %v", r.Block, state, err)
				}
				dangling++
				continue
			}
			named[r.Object]++
			if r.Level != 3 {
				s.t.Errorf("block %s of %s is of level %d", r.Block, tenant, r.Level)
			}
		}
	}
	s.checkLeft(x)
	// All of the last level was looked at when it was young.
	c := s.compactor(&actor{sim: s, name: "reader"})
	c.o.Objects, c.o.Index = s.objects, x
	if err := eachBlock(ctx, s.objects, func(b index.BlockRef, _ time.Time) {
		f, err := readFooter(ctx, s.objects, b)
		if err != nil {
			s.t.Fatal(err)
		}
		if o, err := c.overlapping(ctx, &view{}, b, f, nil); err != nil || len(o.with) > 0 {
			s.t.Errorf("block %s overlaps %v, %v", b.Block, o.with, err)
		}
	}); err != nil {
		s.t.Fatal(err)
	}
	if err := s.objects.List(ctx, "", func(i object.Info) error {
		if named[i.Key] == 0 {
			s.t.Errorf("object %s has no row", i.Key)
		}
		return nil
	}); err != nil {
		s.t.Fatal(err)
	}
	jobs, err := x.Jobs(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, j := range jobs {
		if j.State != index.JobIdle || len(j.Sources)+len(j.Outputs) > 0 {
			s.t.Errorf("job %+v", j)
		}
	}
	if rows, err := x.Compacted(ctx); err != nil || len(rows) > 0 {
		s.t.Errorf("work rows %+v, %v", rows, err)
	}
	if rows, err := x.Aside(ctx); err != nil || len(rows) > 0 {
		s.t.Errorf("set aside: %+v, %v", rows, err)
	}
	today := s.now.UnixMilli() / day
	for d := today - 30; d <= today; d++ {
		for shard := range index.WorkShards {
			if rows, err := x.Work(ctx, d, shard); err != nil || len(rows) > 0 {
				s.t.Errorf("work rows %+v, %v", rows, err)
			}
		}
	}
	s.counts["dangling rows"] = dangling
	// Within the grace no object goes that a snapshot names. Only a row that was
	// written by somebody who was hours late makes readers look once more.
	looks := 0
	for _, reg := range s.regs {
		families, err := reg.Gather()
		if err != nil {
			s.t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "epimetheus_history_row_loads_total" && m.GetLabel()[0].GetValue() == "missing_object" {
					looks += int(m.GetCounter().GetValue())
				}
			}
		}
	}
	if s.counts["looks again"] = looks; looks > 0 && dangling == 0 {
		s.t.Errorf("objects were gone before their time: %d reads looked at the rows again", looks)
	}
	s.counts["blocks"] = len(named)
	if s.reads == 0 || s.counts["merged"] == 0 {
		s.t.Error("nothing happened")
	}
}

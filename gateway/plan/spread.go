package plan

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/cache"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
)

// Spread says where parts of leaves are computed and kept.
type Spread struct {
	// TenantOf says whose data a query is about.
	TenantOf func(context.Context) string
	// Results keeps what parts give; nil: nothing is kept.
	Results *Results
	// Workers compute parts; nil: all is computed here.
	Workers Workers

	parting parting
}

// Results keeps what parts of leaves give, by what that depends on: nothing in it
// ever becomes wrong, but what isn't asked for any more goes. They are kept in memory,
// and in memcached, where there is one, for all gateways.
type Results struct {
	cache     *cache.Cache[Key, []byte]
	memcached *memcached.Client
	parts     *prometheus.CounterVec
}

// Key names what a part of a leaf gives.
type Key [sha256.Size]byte

// NewResults makes a cache of so many bytes of memory, before memcached if m isn't
// nil.
func NewResults(maxBytes int64, m *memcached.Client, reg prometheus.Registerer) (*Results, error) {
	r := &Results{
		cache: cache.New[Key, []byte](maxBytes), memcached: m,
		parts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_gateway_query_parts_total",
			Help: "Parts of long queries, by where the result came from: kept (in memory), memcached, here (computed), worker (computed by another gateway).",
		}, []string{"from"}),
	}
	return r, errors.Join(r.cache.Register(reg, "results"), reg.Register(r.parts))
}

func (r *Results) count(from string, n int) {
	if r != nil {
		r.parts.WithLabelValues(from).Add(float64(n))
	}
}

// Workers compute parts of leaves at other gateways.
type Workers interface {
	// Size is how many gateways there are, with the caller.
	Size() int
	// Owner names the gateway that the key falls to.
	Owner(key Key) string
	// Here says whether the caller is that.
	Here(key Key) bool
	// Run computes the part at the gateway that the key falls to, or at another if
	// that fails or is slow. ErrHere: the caller is to compute it. What they read for it goes
	// into the account of ctx, but for series.
	Run(ctx context.Context, key Key, t *Task) ([]byte, error)
	// Patience is how long a caller with nothing else to do waits for a part, before it
	// computes it itself.
	Patience() time.Duration
}

// ErrHere is what Workers give for a part that the caller computes itself.
var ErrHere = errors.New("to be computed here")

// ErrUnlike is what a worker gives for a task that it would understand in another
// way, or not at all: its engine has other options, or it is of another version.
var ErrUnlike = errors.New("worker differs in version or options")

// Version of tasks and of what they give. Gateways of different versions compute
// their parts themselves.
const Version = 10

// Task is some parts of a leaf, one after the other, for another gateway. It has the whole query: a leaf's
// own text would change the meaning of start() and end(), and the places in
// annotations.
type Task struct {
	Tenant     string
	Query      string
	Start, End int64 // ms
	Step       int64 // ms; 0: an instant query
	Lookback   int64 // ms
	// SubqueryStep is that of subqueries that name none, in ms.
	SubqueryStep int64

	// Of the engine.
	StartTimestamps, DelayedNameRemoval, TypeAndUnitLabels bool
	MaxSamples                                             int

	// Left is what the query may still read: samples and bytes.
	Left account.Limits

	Leaf  int  // which, counted from 0
	Split bool // the leaf without its aggregation

	Span, Number int64 // of the first part; span in ms
	From, To     int   // steps, To excluded

	// With Shards it is not of parts, but of all steps of the leaf the Shard-th shard of the
	// series, counted from 0.
	Shard, Shards int
	Heads         [][]merge.HeadSeries // what heads have of the shard

	// Blocks that the query reads and the part may need.
	Blocks []history.Block
	// Hidden is what of them isn't to be read.
	Hidden *history.Hidden
}

// leaf gives the result of the i-th leaf.
func (q *query) leaf(ctx context.Context, i int, sel *merge.Selection) (*partial, error) {
	w, _, err := q.part(ctx, i, sel)
	if err != nil {
		return nil, err
	}
	if len(w.parts) < 2 && w.sharded == nil {
		return w.here(ctx, 0, w.l.Grid.Len())
	}
	run := w.run
	if w.sharded != nil {
		run = w.runShards
	}
	p, err := run(ctx)
	switch {
	case w.sharded != nil && errors.Is(err, ErrGiveUp), // the order matters
		errors.Is(err, errHinted):
		return w.here(ctx, 0, w.l.Grid.Len())
	}
	if p != nil {
		p.annos.Merge(sel.Warnings())
	}
	return p, err
}

// estimate is about what a leaf reads of blocks.
type estimate struct {
	windows, samples int64
}

// estimate of the selection's blocks: by directories, and where it matters by some of the
// lists of series.
func (l *Leaf) estimate(ctx context.Context, sel *merge.Selection, o options) (e estimate, err error) {
	snap, ms := sel.Snapshot(), sel.Matchers()
	if l.width > 0 {
		e.windows, e.samples, err = snap.EstimateWindows(ctx, ms, l.mint(), l.maxt(), l.width)
	} else {
		e.samples, err = snap.Estimate(ctx, ms, l.mint(), l.maxt())
	}
	if err == nil && l.worthParts(e.cost(), o) {
		var share float64
		share, err = snap.Share(ctx, ms, l.mint(), l.maxt())
		e.windows, e.samples = int64(share*float64(e.windows)), int64(share*float64(e.samples))
	}
	if err != nil {
		err = promql.ErrStorage{Err: err}
	}
	return e, err
}

// cost in samples: about so many take the time that a window takes.
func (e estimate) cost() int64 { return e.samples + 8*e.windows }

// part cuts the i-th leaf, and says about what it reads of blocks; nothing if that
// doesn't matter.
func (q *query) part(ctx context.Context, i int, sel *merge.Selection) (_ *work, e estimate, _ error) {
	l := q.leaves[i]
	w := &work{q: q, l: l, leaf: i, sel: sel, parts: []part{{to: l.Grid.Len()}}}
	sp := &q.engine.spread
	if err := sel.Wait(); err != nil {
		return nil, e, err
	}
	if sel.Snapshot() == nil || sp.Results == nil && sp.Workers == nil {
		return w, e, nil
	}
	if l.Grid.Len() < 2 && explanationOf(ctx) == nil && (sp.Workers == nil || sp.Workers.Size() < 2 || !l.shardable()) {
		return w, e, nil
	}
	e, err := l.estimate(ctx, sel, q.opts)
	if err != nil {
		return nil, e, err
	}
	w.span, w.parts = l.cut(e.cost(), q.opts, func(parts []part, span int64) bool {
		return sp.Results == nil || w.mostlyKept(sp.TenantOf(ctx), parts, span)
	})
	w.cost = float64(e.cost()) / float64(l.Grid.Len())
	// What heads have may change: those parts are neither kept nor computed elsewhere.
	w.fresh = make([]bool, len(w.parts))
	w.out = make([]*partial, len(w.parts))
	if len(w.parts) < 2 {
		w.sharded = w.shards(sp.TenantOf(ctx), e.cost())
		return w, e, nil
	}
	sel.HeadTimes(func(mint, maxt int64) {
		first, last := l.numbers(w.span, mint, maxt)
		for k := max(first, w.parts[0].number); k <= min(last, w.parts[len(w.parts)-1].number); k++ {
			w.fresh[k-w.parts[0].number] = true
		}
	})
	tenant := sp.TenantOf(ctx)
	w.keys = make([]Key, len(w.parts))
	for i, p := range w.parts {
		if !w.fresh[i] {
			w.keys[i] = l.key(tenant, w.span, p.number, q.opts, sel.Snapshot().Blocks, sel.Snapshot().Hidden)
		}
	}
	return w, e, nil
}

// work is the computation of a leaf that is parted.
type work struct {
	q     *query
	l     *Leaf
	leaf  int
	sel   *merge.Selection
	span  int64
	parts []part
	cost  float64 // of a step
	fresh []bool  // heads have samples for it
	keys  []Key   // of the others

	sharded []shard // in place of parts; nil: none

	mu  sync.Mutex
	out []*partial
}

// here computes the steps from, up to, without, to.
func (w *work) here(ctx context.Context, from, to int) (*partial, error) {
	only := w.l.only(from, to)
	return run(ctx, only, w.q.opts, func(sums *history.Summaries) storage.SeriesSet {
		return w.sel.Set(only.mint(), only.maxt(), sums)
	}, runtime.GOMAXPROCS(0))
}

// tasksAtOnce bounds the tasks of a leaf that are at other gateways at the same time.
const tasksAtOnce = 64

func (w *work) run(ctx context.Context) (*partial, error) {
	sp := &w.q.engine.spread
	tenant := sp.TenantOf(ctx)
	if err := w.recall(ctx, tenant); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	mine, tasks := w.assign(tenant)
	out := w.send(gctx, g, len(tasks), func(ctx context.Context, i int) error { return w.elsewhere(ctx, tenant, tasks[i]) })
	// Here meanwhile. An error ends what is elsewhere.
	g.Go(func() (err error) {
		defer recovered(w.q.opts.logger, &err)
		if err := w.compute(gctx, mine); err != nil {
			return err
		}
		return out.takeBack(gctx, func(i int) error {
			t := tasks[i]
			if w.out[t.from] != nil {
				return nil
			}
			is := make([]int, 0, t.to-t.from)
			for i := t.from; i < t.to; i++ {
				is = append(is, i)
			}
			return w.compute(gctx, is)
		})
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	mine = mine[:0] // those that nobody else has computed
	for i := range w.out {
		if w.out[i] == nil {
			mine = append(mine, i)
		}
	}
	if err := w.compute(ctx, mine); err != nil {
		return nil, err
	}
	return join(w.out), nil
}

// sent are the tasks of a leaf that are at other gateways.
type sent struct {
	late  time.Time // from when on they are taken back
	tasks []sentTask
}

type sentTask struct {
	back context.CancelCauseFunc
	done chan struct{} // closed when its result is there, or there won't be one
}

// errTakenBack ends a task at other gateways.
var errTakenBack = errors.New("computed by the caller meanwhile")

// send lets g run n tasks, some at a time.
func (w *work) send(ctx context.Context, g *errgroup.Group, n int, run func(ctx context.Context, i int) error) *sent {
	if n == 0 {
		return &sent{}
	}
	s := &sent{late: time.Now().Add(w.q.engine.spread.Workers.Patience()), tasks: make([]sentTask, n)}
	slots := make(chan struct{}, tasksAtOnce)
	for i := range s.tasks {
		ctx, back := context.WithCancelCause(ctx)
		t := sentTask{back, make(chan struct{})}
		s.tasks[i] = t
		g.Go(func() (err error) {
			defer close(t.done)
			defer back(nil)
			defer recovered(w.q.opts.logger, &err)
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil // taken back, or there is an error already
			}
			defer func() { <-slots }()
			if err := run(ctx, i); !errors.Is(err, errTakenBack) {
				return err
			}
			return nil
		})
	}
	return s
}

// takeBack lets here compute, one after the other, the tasks that are late: from the last on,
// which others may not have begun. It gives them up to do so, since what is read counts only
// once, unless their result comes at this moment: here looks.
func (s *sent) takeBack(ctx context.Context, here func(i int) error) error {
	late, cancel := context.WithDeadline(ctx, s.late)
	defer cancel()
	for i, t := range slices.Backward(s.tasks) {
		select {
		case <-t.done: // what nobody could compute waits for the others of its kind
			continue
		case <-late.Done():
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.back(errTakenBack)
		<-t.done
		if err := here(i); err != nil {
			return err
		}
	}
	return nil
}

// neighbours are parts, one after the other, that one gateway computes: the key says
// which.
type neighbours struct {
	from, to int // parts, to excluded
	key      Key
}

// assign says which of the parts that aren't kept are to be computed here, and which at
// other gateways: those where there is so much to do that it pays.
func (w *work) assign(tenant string) (mine []int, elsewhere []neighbours) {
	sp, far := &w.q.engine.spread, float64(w.q.opts.parting.far)
	var due []int
	steps := 0
	for i, p := range w.parts {
		switch {
		case w.fresh[i]:
			mine = append(mine, i)
		case w.out[i] == nil:
			due = append(due, i)
			steps += p.to - p.from
		}
	}
	if sp.Workers == nil || float64(steps)*w.cost < 2*far {
		mine = append(mine, due...)
		slices.Sort(mine)
		return mine, nil
	}
	// The same parts go together whatever the time of the query, for caches to be warm.
	together := int64(1)
	for float64(together)*float64(w.span)/float64(w.l.Grid.Step)*w.cost < far || together*w.span < w.q.opts.parting.taskRanges*w.l.Range {
		together *= 2
	}
	group := func(i int) int64 { return floorDiv(w.parts[i].number, together) }
	for len(due) > 0 {
		n := 1
		for n < len(due) && due[n] == due[0]+n && group(due[n]) == group(due[0]) {
			n++
		}
		t := neighbours{from: due[0], to: due[0] + n}
		t.key = w.l.key(tenant, w.span*together, group(due[0]), w.q.opts, w.sel.Snapshot().Blocks, w.sel.Snapshot().Hidden)
		if sp.Workers.Here(t.key) {
			mine = append(mine, due[:n]...)
		} else {
			elsewhere = append(elsewhere, t)
		}
		due = due[n:]
	}
	slices.Sort(mine)
	return mine, elsewhere
}

// kept gives the result of a part from memory, nil if it isn't there.
func (w *work) kept(ctx context.Context, i int) *partial {
	r := w.q.engine.spread.Results
	if r == nil {
		return nil
	}
	out, _ := r.get(ctx, w.keys[i], w.l, w.q.opts, w.grid(i))
	return out
}

// mostlyKept says whether at least half of some parts, from all over the leaf's time, are in memory.
func (w *work) mostlyKept(tenant string, parts []part, span int64) bool {
	const looks = 8
	snap, looked, have := w.sel.Snapshot(), 0, 0
	for i := 0; i < len(parts); i += (len(parts) + looks - 1) / looks {
		p := parts[i]
		looked++
		if w.q.engine.spread.Results.has(w.l.key(tenant, span, p.number, w.q.opts, snap.Blocks, snap.Hidden), w.l.only(p.from, p.to).Grid) {
			have++
		}
	}
	return 2*have >= looked
}

// grid is that of the steps of a part.
func (w *work) grid(i int) Grid { return w.l.only(w.parts[i].from, w.parts[i].to).Grid }

// recall gets the results that are kept: in memory, else in memcached. It gives errHinted if one is hinted.
func (w *work) recall(ctx context.Context, tenant string) error {
	kept, near := w.keptParts(ctx, tenant)
	if slices.ContainsFunc(w.out, func(p *partial) bool { return p != nil && p.hinted() }) {
		return errHinted
	}
	w.q.engine.spread.Results.count("kept", kept)
	w.q.engine.spread.Results.count("memcached", near)
	account.From(ctx).AddParts(kept, 0)
	account.From(ctx).AddMemcachedParts(near)
	return nil
}

// keptParts gets the results that are in memory, and those that are in memcached, and
// says how many these are.
func (w *work) keptParts(ctx context.Context, tenant string) (kept, near int) {
	r := w.q.engine.spread.Results
	if r == nil {
		return 0, 0
	}
	var absent []int
	for i := range w.parts {
		if w.fresh[i] {
			continue
		}
		if w.out[i] = w.kept(ctx, i); w.out[i] == nil {
			absent = append(absent, i)
		} else {
			kept++
		}
	}
	keys, grids := make([]Key, len(absent)), make([]Grid, len(absent))
	for j, i := range absent {
		keys[j], grids[j] = w.keys[i], w.grid(i)
	}
	for j, p := range r.fromMemcached(ctx, tenant, keys, grids) {
		if p != nil && w.l.recalled(p, w.q.opts) {
			w.out[absent[j]] = p
			near++
		}
	}
	return kept, near
}

// task for another gateway, with the blocks that have samples in mint to maxt.
func (w *work) task(ctx context.Context, tenant string, mint, maxt int64) *Task {
	q := w.q
	t := &Task{
		Tenant: tenant, Query: q.String(), Start: q.stmt.Start.UnixMilli(), End: q.stmt.End.UnixMilli(),
		Step: q.stmt.Interval.Milliseconds(), Lookback: q.stmt.LookbackDelta.Milliseconds(),
		SubqueryStep:    q.engine.opts.NoStepSubqueryIntervalFn(0),
		StartTimestamps: q.opts.startTimestamps, DelayedNameRemoval: q.opts.delayedNameRemoval,
		TypeAndUnitLabels: q.opts.typeAndUnitLabels, MaxSamples: q.opts.maxSamples, Left: account.From(ctx).Left(),
		Leaf: w.leaf, Split: w.l.Agg == nil && w.l.whole != w.l.expr(),
		Hidden: w.sel.Snapshot().Hidden.Within(mint, maxt),
	}
	for _, b := range w.sel.Snapshot().Blocks {
		if b.Overlaps(mint, maxt) {
			t.Blocks = append(t.Blocks, b)
		}
	}
	return t
}

// elsewhere lets a worker compute some parts. It leaves them out if none can.
func (w *work) elsewhere(ctx context.Context, tenant string, n neighbours) error {
	first, last := w.parts[n.from], w.parts[n.to-1]
	q := w.q
	mint, _ := w.l.reads(w.span, first.number)
	_, maxt := w.l.reads(w.span, last.number)
	t := w.task(ctx, tenant, mint, maxt)
	t.Span, t.Number, t.From, t.To = w.span, first.number, first.from, last.to
	b, err := q.engine.spread.Workers.Run(ctx, n.key, t)
	switch {
	case errors.Is(err, ErrHere), errors.Is(err, ErrUnlike):
		return nil
	case err != nil:
		return err
	}
	out, err := received(ctx, b, w.l.only(first.from, last.to).Grid, n.to-n.from)
	if err != nil && !errors.Is(err, errCorrupt) {
		return err
	}
	if err != nil {
		q.opts.logger.Warn("result of a worker can't be read, computed again", "err", err)
		return nil
	}
	if out.hinted() {
		return errHinted
	}
	q.engine.spread.Results.count("worker", n.to-n.from)
	if err := w.sel.AddSeries(out.counts.series, 0); err != nil { // the samples are in its cost
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.set(n.from, n.to, out)
	return nil
}

// set notes the result of the parts from, up to, without, to: it is in the first.
func (w *work) set(from, to int, p *partial) {
	w.out[from] = p
	for i := from + 1; i < to; i++ {
		w.out[i] = &partial{}
	}
}

// compute computes parts here, neighbours in one go, and keeps what may be kept.
func (w *work) compute(ctx context.Context, is []int) error {
	tenant := w.q.engine.spread.TenantOf(ctx)
	for len(is) > 0 {
		n := 1
		for n < len(is) && is[n] == is[n-1]+1 {
			n++
		}
		from, to := w.parts[is[0]].from, w.parts[is[n-1]].to
		lists := w.sel.Snapshot().Stats.IndexQueries.Load()
		all, err := w.here(ctx, from, to)
		if err != nil {
			return err
		}
		w.q.engine.spread.Results.count("here", n)
		account.From(ctx).AddParts(0, n)
		g := w.l.only(from, to).Grid
		// Which part most annotations are of isn't known. And what was read of other blocks, since some were gone, isn't
		// what the key says.
		keep := w.l.keepable(all, w.q.opts) && w.sel.Snapshot().Stats.IndexQueries.Load() == lists
		for _, i := range is[:n] {
			p := w.parts[i]
			if r := w.q.engine.spread.Results; r != nil && !w.fresh[i] && keep {
				if err := r.put(tenant, w.keys[i], w.grid(i), w.l.toKeep(all.slice(g, p.from-from, p.to-from), all, w.q.opts)); err != nil {
					return err
				}
			}
		}
		if to-from < w.l.Grid.Len() && all.hinted() {
			return errHinted
		}
		w.set(is[0], is[0]+n, all)
		is = is[n:]
	}
	return nil
}

// get gives the steps of a grid of what is in memory of a leaf. It is absent if only other steps
// are.
func (r *Results) get(ctx context.Context, key Key, l *Leaf, o options, g Grid) (*partial, bool) {
	b, ok := r.cache.Peek(key)
	if !ok {
		return nil, false
	}
	p, ok := stepsOf(ctx, b, g)
	if !ok || !l.recalled(p, o) {
		return nil, false
	}
	return p, true
}

// has says whether the steps of a grid are in memory.
func (r *Results) has(key Key, g Grid) bool {
	b, ok := r.cache.Peek(key)
	return ok && covers(b, g)
}

// covers says whether a result that was kept has the steps of a grid.
func covers(b []byte, g Grid) bool {
	if len(b) < gridBytes {
		return false
	}
	was := gridOf(b)
	return was.Step == g.Step && was.Start <= g.Start && was.End >= g.End && (g.Start-was.Start)%g.Step == 0
}

// stepsOf gives the steps of a grid of a result that was kept. It is absent if that
// has only others, or can't be read: then it is computed. The account of ctx holds it.
func stepsOf(ctx context.Context, b []byte, g Grid) (*partial, bool) {
	if !covers(b, g) {
		return nil, false
	}
	was := gridOf(b)
	if n := was.Len(); n < g.Len() || n > len(b) { // each step takes bytes
		return nil, false
	}
	p, err := unmarshal(b[gridBytes:], was, 1, holding(ctx))
	if err != nil {
		return nil, false
	}
	from := int((g.Start - was.Start) / g.Step)
	if n := g.Len(); n < was.Len() {
		all := p.annotated
		p = p.slice(was, from, from+n)
		p.annotated = all
	}
	return p, true
}

// expectedBytes is about how long a result is, for how long to wait for it.
const expectedBytes = 16 << 10

// fromMemcached gives for each key the steps of its grid; nil where memcached hasn't
// got them. What is there is in memory from then on.
func (r *Results) fromMemcached(ctx context.Context, tenant string, keys []Key, grids []Grid) []*partial {
	if r.memcached == nil || len(keys) == 0 {
		return nil
	}
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = k.memcached()
	}
	out := make([]*partial, len(keys))
	for i, b := range r.memcached.Get(ctx, memcached.Results, names, int64(len(keys))*expectedBytes) {
		p, ok := stepsOf(ctx, b, grids[i])
		if ok {
			out[i] = p
			r.cache.Put(tenant, keys[i], b, int64(len(b)))
		}
	}
	return out
}

// memcached is where memcached has a result: docs/decisions/0012-memcached.md.
func (k Key) memcached() string {
	return fmt.Sprintf("epi1:results:%d.%d:%s", Version, partialVersion, base64.RawURLEncoding.EncodeToString(k[:]))
}

// put keeps a part's result, unless there are as many steps of it already.
func (r *Results) put(tenant string, key Key, g Grid, p *partial) error {
	if b, ok := r.cache.Peek(key); ok {
		if was := gridOf(b); was.Len() >= g.Len() {
			return nil
		}
	}
	b, err := p.marshal(g)
	if err != nil {
		return err
	}
	b = append(appendGrid(make([]byte, 0, gridBytes+len(b)), g), b...)
	r.cache.Put(tenant, key, b, int64(len(b)))
	r.memcached.Set(memcached.Results, key.memcached(), b)
	return nil
}

// Work computes a task of another gateway's. h are the blocks. It gives ErrUnlike,
// ErrGiveUp, or an error of the query.
func (e *Engine) Work(ctx context.Context, h *history.History, t *Task) ([]byte, error) {
	opts := promql.NewPrometheusQueryOpts(false, time.Duration(t.Lookback)*time.Millisecond, &t.StartTimestamps)
	start, end := time.UnixMilli(t.Start), time.UnixMilli(t.End)
	var planned promql.Query
	var err error
	if t.Step == 0 {
		planned, err = e.NewInstantQuery(ctx, nil, opts, t.Query, start)
	} else {
		planned, err = e.NewRangeQuery(ctx, nil, opts, t.Query, start, end, time.Duration(t.Step)*time.Millisecond)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnlike, err) // the caller's engine takes it
	}
	q, ok := planned.(*query)
	if !ok || t.Leaf < 0 || t.Leaf >= len(q.leaves) {
		return nil, ErrUnlike
	}
	if q.opts.startTimestamps != t.StartTimestamps || q.opts.delayedNameRemoval != t.DelayedNameRemoval ||
		q.opts.typeAndUnitLabels != t.TypeAndUnitLabels || e.opts.NoStepSubqueryIntervalFn(0) != t.SubqueryStep {
		return nil, ErrUnlike
	}
	l := q.leaves[t.Leaf]
	if t.Split && !l.split() || t.From < 0 || t.From >= t.To || t.To > l.Grid.Len() {
		return nil, ErrUnlike
	}
	if t.Shards > 0 {
		return e.workShard(ctx, h, q, l, t)
	}
	// What is kept is kept by parts, of which the task names the first.
	if t.Span <= 0 || floorDiv(l.Grid.At(t.From), t.Span) != t.Number {
		return nil, ErrUnlike
	}
	q.opts.maxSamples = min(q.opts.maxSamples, t.MaxSamples)
	ctx, cancel := context.WithTimeout(ctx, e.opts.Timeout)
	defer cancel()
	p, err := e.workParts(ctx, h, q, l, t)
	if err != nil {
		return nil, err
	}
	p.annos, p.over = tell(p.annos, t.Query), tell(p.over, t.Query)
	return p.marshal(l.only(t.From, t.To).Grid)
}

// open gives the blocks of a task that a leaf reads.
func open(ctx context.Context, h *history.History, t *Task, l *Leaf) *history.Snapshot {
	acc := account.From(ctx)
	snap := h.Open(t.Tenant, l.mint(), l.maxt(), t.Blocks, t.Hidden)
	snap.Hold, snap.Read = acc.Hold, acc.Read
	acc.AddHistory(snap.Stats)
	return snap
}

// workParts gives the parts of a task: those that are kept, and the others computed in
// one go.
func (e *Engine) workParts(ctx context.Context, h *history.History, q *query, l *Leaf, t *Task) (*partial, error) {
	var snap *history.Snapshot
	compute := func(from, to int) (*partial, error) {
		only := l.only(from, to)
		snap = open(ctx, h, t, only)
		return run(ctx, only, q.opts, func(sums *history.Summaries) storage.SeriesSet {
			return merge.Historical(ctx, snap, only.mint(), only.maxt(), sums, merge.Shards{}, nil, l.Selector.LabelMatchers)
		}, 1)
	}
	acc, r := account.From(ctx), e.spread.Results
	parts := l.partsOf(t.Span, t.From, t.To)
	if r == nil {
		p, err := compute(t.From, t.To)
		if err == nil {
			acc.AddParts(0, len(parts))
		}
		return p, err
	}
	out, keys := make([]*partial, len(parts)), make([]Key, len(parts))
	first, last := len(parts), -1 // of those that aren't kept
	for i, p := range parts {
		keys[i] = l.key(t.Tenant, t.Span, p.number, q.opts, t.Blocks, t.Hidden)
		var ok bool
		if out[i], ok = r.get(ctx, keys[i], l, q.opts, l.only(p.from, p.to).Grid); !ok {
			first, last = min(first, i), i
		}
	}
	if last < 0 {
		acc.AddParts(len(parts), 0)
		return join(out), nil
	}
	from, to := parts[first].from, parts[last].to
	all, err := compute(from, to)
	if err != nil {
		return nil, err
	}
	acc.AddParts(first+len(parts)-last-1, last-first+1)
	if l.keepable(all, q.opts) && snap.Stats.IndexQueries.Load() == 0 { // as in work.compute
		g := l.only(from, to).Grid
		for i := first; i <= last; i++ {
			p := parts[i]
			if err := r.put(t.Tenant, keys[i], l.only(p.from, p.to).Grid, l.toKeep(all.slice(g, p.from-from, p.to-from), all, q.opts)); err != nil {
				return nil, err
			}
		}
	}
	return join(slices.Concat(out[:first], []*partial{all}, out[last+1:])), nil
}

// workShard computes the task of a shard, of which nothing is kept: it is of one query.
func (e *Engine) workShard(ctx context.Context, h *history.History, q *query, l *Leaf, t *Task) ([]byte, error) {
	if !l.shardable() || t.From != 0 || t.To != l.Grid.Len() || t.Shard < 0 || t.Shard >= t.Shards || t.Shards > maxShards || l.Grid.Len() > maxShardSteps {
		return nil, ErrUnlike
	}
	q.opts.maxSamples = min(q.opts.maxSamples, t.MaxSamples)
	ctx, cancel := context.WithTimeout(ctx, e.opts.Timeout)
	defer cancel()
	only := *l
	only.shard = true
	in := make([]bool, t.Shards)
	in[t.Shard] = true
	snap := open(ctx, h, t, l)
	p, err := run(ctx, &only, q.opts, func(sums *history.Summaries) storage.SeriesSet {
		return merge.Historical(ctx, snap, l.mint(), l.maxt(), sums, merge.Shards{In: in}, t.Heads, l.Selector.LabelMatchers)
	}, 1)
	if err != nil {
		return nil, err
	}
	account.From(ctx).AddParts(0, 1)
	p.annos, p.over = tell(p.annos, t.Query), tell(p.over, t.Query)
	return p.marshal(l.Grid)
}

// Bounds on what a task may ask for.
const (
	maxShards     = 1 << 12
	maxShardSteps = 11_000 // as of a range query
)

package ingest

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/ingest/commitlog"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// write puts a batch that the head has just taken into the commit log. refs from
// known on were announced by the batch; refused are positions of announcements.
// The caller holds s.mu.
func (r *receiver) write(s *session, b *shippb.Batch, known int, refused []uint32, res *head.Result) {
	g := res.Generation
	if !r.log.Open(g) {
		s.index = 0
		s.written(b.Seq)
		return
	}
	if s.index == 0 || s.generation != g {
		// The logs before this one may be gone when it is read.
		s.index = r.log.Index()
		e := r.log.Entry()
		e.Session(s.index, &commitlog.Session{
			Tenant: s.id.tenant, ID: s.id.id, Source: s.source, First: b.Seq, Previous: s.generation, Refs: known,
		})
		for from := 0; from < known; {
			from += e.Refs(s.index, from, known-from, s.ref)
			r.log.Append(g, e, nil)
			e = r.log.Entry()
		}
		r.log.Append(g, e, nil)
	}
	if res.NewTenant {
		if families := r.head.Families(g, s.id.tenant); len(families) > 0 {
			e := r.log.Entry()
			ms := make([]commitlog.Metadata, len(families))
			for i, f := range families {
				ms[i] = commitlog.Metadata{Family: f.Name, Metric: f.Metric, Type: string(f.Type), Unit: f.Unit, Help: f.Help}
			}
			e.Metadata(s.id.tenant, ms)
			r.log.Append(g, e, nil)
		}
	}
	limited := res.Limited
	if len(limited) > 0 {
		slices.Sort(limited)
		limited = slices.Compact(limited)
	}
	e := r.log.Entry()
	e.Batch(s.index, b, refused, limited)
	seq := b.Seq // the batch need not live as long
	r.log.Append(g, e, func() { s.written(seq) })
}

// ref is what a ref means, for the commit log.
func (s *session) ref(i int) commitlog.Ref {
	ref := uint32(i)
	if !s.refs.Valid(ref) {
		return commitlog.Ref{}
	}
	return commitlog.Ref{Announced: true, Refused: s.refs.Refused(ref), Labels: s.refs.Labels(ref)}
}

// Replay fills the head and makes the sessions that the commit log holds. Before
// that, sources and gateways are sent away. The error is that of ctx: what the log
// doesn't hold, sources send again.
func (i *Ingester) Replay(ctx context.Context) error {
	if i.log == nil {
		return nil
	}
	began := time.Now()
	p := &replay{
		receiver: i.receive, head: i.head, generation: i.log.First(), durableOf: i.log.DurableOf,
		sessions: map[sessionID]*replayed{},
	}
	oldest := began
	for _, g := range i.log.Files() {
		created, err := p.file(ctx, i.log, g)
		if hole := (*commitlog.HoleError)(nil); errors.As(err, &hole) {
			i.logger.Warn("commit log has a hole: sources send again what is behind it", "generation", g,
				"path", hole.Path, "offset", hole.Offset, "size_bytes", hole.Size, "err", hole.Err)
		} else if err != nil {
			return err
		}
		if !created.IsZero() && created.Before(oldest) {
			oldest = created
		}
	}
	resumed := p.finish(began)
	i.log.Replayed(p.samples, resumed, time.Since(began))
	if n := len(i.log.Files()); n > 0 {
		i.logger.Info("commit log replayed", "logs", n, "duration", time.Since(began), "samples", p.samples, "series", i.head.Size().Series,
			"sessions", resumed, "broken_sessions", len(p.sessions)-resumed, "skipped_records", p.skipped)
	}
	if began.Sub(oldest) >= i.opts.FlushInterval || i.head.Current().Bytes() >= i.opts.FlushBytes {
		i.flush.trigger() // it was due before
	}
	i.fetch.starting.Store(false)
	i.receive.starting.Store(false)
	return nil
}

// replay reads logs into the current generation of a head.
type replay struct {
	receiver   *receiver
	head       *head.Head
	generation uint64                     // that all goes to
	durableOf  func(tenant string) uint64 // of the logs' generations
	sessions   map[sessionID]*replayed
	ours       bool // the file being read is of the log's process

	mu      sync.Mutex
	samples int
	skipped int // records
}

// replayed is a session that is being rebuilt. While a file is read it is one
// worker's.
type replayed struct {
	id     sessionID
	source [16]byte
	refs   head.Refs
	next   *head.Refs // its refs in the present file, as far as they are there; nil: refs has them
	want   int        // of next

	gathered gathered // not yet appended

	received, durable uint64
	generation        uint64 // of received
	broken            bool   // a batch is missing
}

// task is a record for the worker that has its session.
type task struct {
	s   *replayed
	rec *commitlog.Record
}

// file replays a log: all of it, or up to the hole that the error names.
func (p *replay) file(ctx context.Context, l *commitlog.Log, generation uint64) (created time.Time, err error) {
	workers := make([]chan task, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for i := range workers {
		workers[i] = make(chan task, 32) // records, of about 100 KiB
		wg.Go(func() {
			w := replayWorker{replay: p, collected: make([]ship.Columns, runtime.GOMAXPROCS(0))}
			for t := range workers[i] {
				w.record(t.s, t.rec)
				t.rec.Release()
			}
			w.appendAll()
			p.mu.Lock()
			defer p.mu.Unlock()
			p.samples += w.samples
			p.skipped += w.skipped
		})
	}
	type place struct {
		s      *replayed
		worker chan task
	}
	byIndex := map[uint64]place{}
	worker := map[*replayed]chan task{}
	var scratch commitlog.Scratch
	only := l.Only(generation)
	durable := func(tenant string) bool { return only != nil && !slices.Contains(only, tenant) }
	err = l.Read(ctx, generation, func(h commitlog.Header) {
		created, p.ours = h.Created, h.Process == l.Process()
	}, func(rec *commitlog.Record) {
		switch rec.Kind {
		case commitlog.KindMetadata:
			// At once: it is older than what batches behind it say.
			if durable(rec.Tenant) {
				return
			}
			if err := rec.Metadata(&scratch, func(m commitlog.Metadata) {
				p.head.AddFamily(rec.Tenant, head.Family{Name: m.Family, Metric: m.Metric, Metadata: metadata.Metadata{
					Type: model.MetricType(m.Type), Unit: m.Unit, Help: m.Help,
				}})
			}); err != nil {
				p.skip()
			}
			return
		case commitlog.KindSession:
			if durable(rec.Session.Tenant) {
				byIndex[rec.Index] = place{}
				return
			}
			id := sessionID{tenant: rec.Session.Tenant, id: rec.Session.ID}
			s := p.sessions[id]
			if s == nil {
				s = &replayed{id: id, source: rec.Session.Source}
				p.sessions[id] = s
			}
			if worker[s] == nil {
				worker[s] = workers[len(worker)%len(workers)]
			}
			byIndex[rec.Index] = place{s, worker[s]}
		}
		at, ok := byIndex[rec.Index]
		if !ok {
			p.skip()
			return
		}
		if at.s == nil {
			rec.Release() // it is durable
			return
		}
		at.worker <- task{at.s, rec}
	})
	for _, w := range workers {
		close(w)
	}
	wg.Wait()
	return created, err
}

func (p *replay) skip() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.skipped++
}

// finish makes sessions of those that can go on, and says how many there are.
func (p *replay) finish(now time.Time) int {
	n := 0
	r := p.receiver
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, s := range p.sessions {
		if s.broken || s.next != nil || s.received == 0 {
			continue
		}
		x := &session{
			id: id, source: s.source, changed: make(chan struct{}, 1), refs: s.refs, received: s.received, durable: s.durable,
			generation: s.generation, lastSeen: now,
		}
		if s.received > s.durable {
			x.marks = []mark{{p.generation, s.received}}
		}
		x.logged.Store(s.received)
		r.sessions[id] = x
		r.announced.Add(x.refs.Bytes())
		n++
	}
	return n
}

// replayWorker replays sessions.
type replayWorker struct {
	*replay
	samples, skipped int

	dec     ship.Decoder
	cols    ship.Columns
	scratch commitlog.Scratch

	used      int         // pieces, of all sessions
	free      []*piece    // others
	waiting   []*replayed // sessions that have some
	chains    chains
	collected []ship.Columns // memory for each core
}

// Samples of many batches are gathered before they are appended, series by series:
// in the order of their coming nearly each would wait for memory several times.
const (
	pieceBits = 12   // samples of a piece
	maxPieces = 1024 // of a worker, of 112 KiB
	blockBits = 10   // refs of a block
)

// piece holds samples of a session.
type piece struct {
	ref   [1 << pieceBits]uint32
	t, st [1 << pieceBits]int64
	v     [1 << pieceBits]float64
}

// gathered are samples of a session, in pieces of which all but the last are full.
type gathered struct {
	pieces []*piece
	n      int // samples
	st     bool
	min    uint32 // refs
	max    uint32
}

// chains lead from one sample of a series to the next, by number plus 1. Adjacent
// refs mostly have adjacent samples, so following chain after chain reads memory
// in order.
type chains struct {
	base              uint32 // the least ref
	first, last, next []int32
}

func grown[E any](s []E, n int) []E { return slices.Grow(s[:0], n)[:n] }

// build makes the chains of what was gathered.
func (c *chains) build(g *gathered) {
	c.base = g.min
	n := int(g.max-g.min) + 1
	c.first, c.last, c.next = grown(c.first, n), grown(c.last, n), grown(c.next, g.n)
	clear(c.first)
	clear(c.next)
	for k, p := range g.pieces {
		from := k << pieceBits
		for i, ref := range p.ref[:min(1<<pieceBits, g.n-from)] {
			at, number := ref-c.base, int32(from+i)
			if c.first[at] == 0 {
				c.first[at] = number + 1
			} else {
				c.next[c.last[at]] = number + 1
			}
			c.last[at] = number
		}
	}
}

// collect replaces out by the samples of the refs of a block, series by series.
func (c *chains) collect(out *ship.Floats, g *gathered, block int) {
	out.Ref, out.T, out.ST, out.V = out.Ref[:0], out.T[:0], out.ST[:0], out.V[:0]
	from := block << blockBits
	for at, next := range c.first[from:min(from+1<<blockBits, len(c.first))] {
		for next != 0 {
			p, i := g.pieces[(next-1)>>pieceBits], (next-1)&(1<<pieceBits-1)
			out.Ref, out.T, out.V = append(out.Ref, c.base+uint32(from+at)), append(out.T, p.t[i]), append(out.V, p.v[i])
			if g.st {
				out.ST = append(out.ST, p.st[i])
			}
			next = c.next[next-1]
		}
	}
}

// blocks is how many collect gives.
func (c *chains) blocks() int { return (len(c.first) + 1<<blockBits - 1) >> blockBits }

// gather takes the floats of a batch.
func (w *replayWorker) gather(s *replayed, c *ship.Floats) {
	g := &s.gathered
	for i := 0; i < len(c.T); {
		at := g.n & (1<<pieceBits - 1)
		if at == 0 {
			if w.used == maxPieces {
				w.appendAll()
			}
			if g.n == 0 {
				w.waiting = append(w.waiting, s)
				g.min, g.max = c.Ref[i], c.Ref[i]
			}
			g.pieces = append(g.pieces, w.piece())
		}
		p := g.pieces[len(g.pieces)-1]
		n := copy(p.ref[at:], c.Ref[i:])
		copy(p.t[at:], c.T[i:])
		copy(p.v[at:], c.V[i:])
		if len(c.ST) > 0 {
			g.st = true
			copy(p.st[at:], c.ST[i:])
		} else {
			clear(p.st[at : at+n])
		}
		g.min, g.max = min(g.min, slices.Min(c.Ref[i:i+n])), max(g.max, slices.Max(c.Ref[i:i+n]))
		g.n += n
		i += n
	}
}

func (w *replayWorker) piece() *piece {
	w.used++
	if n := len(w.free); n > 0 {
		p := w.free[n-1]
		w.free = w.free[:n-1]
		return p
	}
	return &piece{}
}

func (w *replayWorker) appendAll() {
	for _, s := range w.waiting {
		w.appendGathered(s)
	}
	w.waiting = w.waiting[:0]
}

// appendGathered appends what was gathered of a session, on all cores.
func (w *replayWorker) appendGathered(s *replayed) {
	g := &s.gathered
	if g.n == 0 {
		return
	}
	w.chains.build(g)
	blocks := w.chains.blocks()
	counts := make([]int, min(len(w.collected), blocks))
	var wg sync.WaitGroup
	for part := range counts {
		wg.Go(func() {
			cols, refs := &w.collected[part], s.refs.Share()
			for block := part; block < blocks; block += len(counts) {
				if w.chains.collect(&cols.Floats, g, block); len(cols.Floats.T) > 0 {
					res := w.head.Append(s.id.tenant, refs, &head.Batch{Columns: cols, Replayed: true})
					counts[part] += res.Appended + res.Late
				}
			}
		})
	}
	wg.Wait()
	for _, n := range counts {
		w.samples += n
	}
	w.free = append(w.free, g.pieces...)
	w.used -= len(g.pieces)
	g.pieces, g.n, g.st = g.pieces[:0], 0, false
}

func (w *replayWorker) record(s *replayed, rec *commitlog.Record) {
	ok := true
	switch rec.Kind {
	case commitlog.KindSession:
		w.session(s, &rec.Session)
	case commitlog.KindRefs:
		ok = w.refs(s, rec)
	case commitlog.KindBatch:
		ok = w.batch(s, rec)
	}
	if !ok {
		s.broken = true
		w.skipped++
	}
}

func (w *replayWorker) session(s *replayed, rec *commitlog.Session) {
	switch {
	case s.received > 0 && s.received == rec.First-1:
		// It goes on, whole or broken.
	case rec.Previous <= w.durableOf(s.id.tenant):
		s.received, s.durable, s.generation, s.broken = rec.First-1, rec.First-1, rec.Previous, false
	default:
		s.received, s.broken = rec.First-1, true
	}
	s.broken = s.broken || !w.ours
	w.appendGathered(s) // refs are about to mean something else
	s.next, s.want = &head.Refs{}, rec.Refs
	s.complete()
}

// complete begins to use the new refs once they are all there. Until then the old
// ones stay: if the log ends here, the session may be whole without this file.
func (s *replayed) complete() {
	if s.next.Len() == s.want {
		s.refs, s.next = *s.next, nil
	}
}

func (w *replayWorker) refs(s *replayed, rec *commitlog.Record) bool {
	if s.next == nil || rec.From != s.next.Len() {
		return false
	}
	err := rec.Refs(&w.scratch, func(ref commitlog.Ref) error {
		i := uint32(s.next.Len())
		if int(i) == s.want {
			return errTooMany
		}
		s.next.Announce(i, ref.Labels, ref.Refused)
		if !ref.Announced {
			s.next.Withdraw(i)
		}
		return nil
	})
	if err != nil {
		return false
	}
	s.complete()
	return true
}

var errTooMany = errors.New("more refs than the session has")

func (w *replayWorker) batch(s *replayed, rec *commitlog.Record) bool {
	if s.next != nil {
		return false
	}
	if rec.Seq <= s.received {
		return true // there already
	}
	if rec.Seq != s.received+1 && !bug.Is(bug.HoleInLog) {
		s.broken = true // but its samples are worth having
	}
	rest, err := rec.Rest(&w.scratch)
	if err != nil {
		return false
	}
	known := uint32(s.refs.Len())
	if slices.ContainsFunc(rest.GetAnnounce(), func(a *shippb.Series) bool { return a.Ref < known }) {
		w.appendGathered(s) // a ref is about to mean something else
	}
	if !announce(&s.refs, rest.GetAnnounce(), rec.Refused) {
		return false
	}
	if err := w.dec.Decode(rec.Columns, &w.cols); err != nil {
		return false
	}
	if err := checkRefs(&s.refs, &w.cols, rest.GetWithdraw()); err != nil {
		return false
	}
	if len(rec.Limited) > 0 {
		dropRefs(&w.cols, rec.Limited)
	}
	w.gather(s, &w.cols.Floats)
	w.cols.Floats = ship.Floats{Ref: w.cols.Floats.Ref[:0], T: w.cols.Floats.T[:0], ST: w.cols.Floats.ST[:0], V: w.cols.Floats.V[:0]}
	b := head.Batch{Columns: &w.cols, Replayed: true}
	for _, e := range rest.GetExemplars() {
		if _, limited := slices.BinarySearch(rec.Limited, e.Ref); limited || !s.refs.Valid(e.Ref) {
			continue
		}
		if x, ok := exemplarOf(e); ok {
			b.Exemplars = append(b.Exemplars, x)
		}
	}
	for _, m := range rest.GetMetadata() {
		if s.refs.Valid(m.Ref) {
			b.Metadata = append(b.Metadata, metadataOf(m))
		}
	}
	if w.cols.Len() > 0 || len(b.Exemplars) > 0 || len(b.Metadata) > 0 {
		res := w.head.Append(s.id.tenant, &s.refs, &b)
		w.samples += res.Appended + res.Late
	}
	if withdraw := rest.GetWithdraw(); len(withdraw) > 0 {
		w.appendGathered(s)
		for _, ref := range withdraw {
			s.refs.Withdraw(ref)
		}
	}
	s.received, s.generation = rec.Seq, w.generation
	return true
}

// announce is what apply does with announcements, but for the limits, of which
// the log has what came of them: the positions of those that were refused.
func announce(refs *head.Refs, as []*shippb.Series, refused []uint32) bool {
	for i, a := range as {
		ls, err := pairs(a.Labels)
		refuse := len(refused) > 0 && refused[0] == uint32(i)
		if refuse {
			refused = refused[1:]
		}
		if a.Ref >= maxRefs || err != nil && !refuse || !refs.Announce(a.Ref, ls, refuse) {
			return false
		}
	}
	return true
}

// dropRefs removes the samples of refs, which ascend.
func dropRefs(c *ship.Columns, refs []uint32) {
	f, h, fh := &c.Floats, &c.Histograms, &c.FloatHistograms
	f.Ref, f.T, f.ST, f.V = dropRefsOf(refs, f.Ref, f.T, f.ST, f.V)
	h.Ref, h.T, h.ST, h.H = dropRefsOf(refs, h.Ref, h.T, h.ST, h.H)
	fh.Ref, fh.T, fh.ST, fh.H = dropRefsOf(refs, fh.Ref, fh.T, fh.ST, fh.H)
}

func dropRefsOf[V any](drop, refs []uint32, ts, st []int64, vs []V) ([]uint32, []int64, []int64, []V) {
	n := 0
	for i, ref := range refs {
		if _, gone := slices.BinarySearch(drop, ref); gone {
			continue
		}
		refs[n], ts[n], vs[n] = ref, ts[i], vs[i]
		if len(st) > 0 {
			st[n] = st[i]
		}
		n++
	}
	return refs[:n], ts[:n], st[:min(n, len(st))], vs[:n]
}

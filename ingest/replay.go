package ingest

import (
	"context"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
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
			p.lacking = p.lacking || !hole.Torn
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
	// Reading took more memory than the head keeps, and in normal work it may be long
	// until the runtime gives that back.
	debug.FreeOSMemory()
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
	lacking    bool // a file lacks something that was received

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

	untold            untold
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
	if p.lacking {
		r.awaited.all(now)
	}
	for id, s := range p.sessions {
		broken := s.broken || s.next != nil
		if broken || p.lacking {
			r.awaited.add(id.tenant, s.source, now)
		}
		if broken || s.received == 0 {
			continue
		}
		x := &session{
			id: id, source: s.source, changed: make(chan struct{}, 1), refs: s.refs, received: s.received, durable: s.durable,
			generation: s.generation, lastSeen: now, untold: s.untold,
		}
		if s.received > s.durable {
			x.marks = []mark{{p.generation, s.received}}
		}
		x.logged.Store(s.received)
		r.add(x)
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

	used      int            // bytes that are gathered, of all sessions
	free      []*piece       // others
	waiting   []*replayed    // sessions that have some
	collected []ship.Columns // memory for each core
}

// Samples of many batches are gathered before they are appended, series by series:
// in the order of their coming nearly each would wait for memory several times, and
// be encoded for itself.
const (
	binBits     = 8         // refs of a bin: what it has fits into a core's cache
	pieceValues = 256       // of a piece
	maxGathered = 112 << 20 // bytes, of a worker
	pieceBytes  = 8 * pieceValues
	rowBytes    = 16
)

// piece holds values, or the bits of start times, of a bin.
type piece [pieceValues]float64

// row are samples of one time of series whose refs follow each other. Scrapes are
// rows, since refs are given in their order.
type row struct {
	t     int64
	first uint8 // ref within the bin
	more  uint8 // refs behind it
	st    bool  // there are start times
}

// bin has samples of refs next to each other, in the order of their coming.
type bin struct {
	rows       []row
	values, st packed
	n          int // samples
}

// packed are numbers in pieces.
type packed struct {
	pieces []*piece
	n      int
}

// gathered are samples of a session.
type gathered struct {
	bins []bin // by ref
	n    int   // samples
}

func grown[E any](s []E, n int) []E { return slices.Grow(s[:0], n)[:n] }

// gather takes the floats of a batch.
func (w *replayWorker) gather(s *replayed, c *ship.Floats) {
	for i := 0; i < len(c.T); {
		ref, t := c.Ref[i], c.T[i]
		at := ref & (1<<binBits - 1)
		end, most := i+1, min(len(c.T), i+int(1<<binBits-at))
		for end < most && c.Ref[end] == ref+uint32(end-i) && c.T[end] == t {
			end++
		}
		if w.used >= maxGathered {
			w.appendAll()
		}
		g := &s.gathered
		if g.n == 0 {
			w.waiting = append(w.waiting, s)
		}
		k := int(ref >> binBits)
		if k >= len(g.bins) {
			g.bins = slices.Grow(g.bins, k+1-len(g.bins))[:k+1]
		}
		b := &g.bins[k]
		b.rows = append(b.rows, row{t: t, first: uint8(at), more: uint8(end - i - 1), st: len(c.ST) > 0})
		b.values.add(w, c.V[i:end])
		if len(c.ST) > 0 {
			for _, st := range c.ST[i:end] {
				b.st.add(w, []float64{math.Float64frombits(uint64(st))})
			}
		}
		b.n += end - i
		g.n += end - i
		w.used += rowBytes
		i = end
	}
}

func (p *packed) add(w *replayWorker, vs []float64) {
	for len(vs) > 0 {
		at := p.n % pieceValues
		if at == 0 {
			p.pieces = append(p.pieces, w.piece())
		}
		n := copy(p.pieces[len(p.pieces)-1][at:], vs)
		p.n += n
		vs = vs[n:]
	}
}

func (w *replayWorker) piece() *piece {
	w.used += pieceBytes
	if n := len(w.free); n > 0 {
		p := w.free[n-1]
		w.free = w.free[:n-1]
		return p
	}
	return &piece{}
}

// release gives the memory back of what was appended: sessions that have ended, or have
// nothing in the next file, keep none.
func (w *replayWorker) release(g *gathered) {
	for i := range g.bins {
		b := &g.bins[i]
		w.used -= rowBytes*len(b.rows) + pieceBytes*(len(b.values.pieces)+len(b.st.pieces))
		w.free = append(append(w.free, b.values.pieces...), b.st.pieces...)
	}
	*g = gathered{}
}

// sorted replaces out by the samples of a bin, series by series, each in the
// order of their coming. base is the bin's first ref.
func (b *bin) sorted(out *ship.Floats, base uint32) {
	var ends [1 << binBits]int32
	for _, r := range b.rows {
		for ref := range ends[int(r.first) : int(r.first)+int(r.more)+1] {
			ends[int(r.first)+ref]++
		}
	}
	out.Ref, out.T, out.V, out.ST = grown(out.Ref, b.n), grown(out.T, b.n), grown(out.V, b.n), out.ST[:0]
	if b.st.n > 0 {
		out.ST = grown(out.ST, b.n)
	}
	sum := int32(0)
	for i, n := range ends {
		refs := out.Ref[sum : sum+n]
		for k := range refs {
			refs[k] = base + uint32(i)
		}
		ends[i] = sum
		sum += n
	}
	at, starts := 0, 0
	for _, r := range b.rows {
		n := int(r.more) + 1
		to := ends[int(r.first) : int(r.first)+n]
		for len(to) > 0 {
			vs := b.values.pieces[at/pieceValues][at%pieceValues:]
			vs = vs[:min(len(vs), len(to))]
			for i, v := range vs {
				k := to[i]
				to[i]++
				out.T[k], out.V[k] = r.t, v
			}
			at += len(vs)
			to = to[len(vs):]
		}
		if b.st.n == 0 {
			continue
		}
		for _, k := range ends[int(r.first) : int(r.first)+n] {
			if out.ST[k-1] = 0; r.st { // it was counted above
				out.ST[k-1] = int64(math.Float64bits(b.st.pieces[starts/pieceValues][starts%pieceValues]))
				starts++
			}
		}
	}
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
	counts := make([]int, min(len(w.collected), len(g.bins)))
	var next atomic.Int64
	var wg sync.WaitGroup
	for part := range counts {
		wg.Go(func() {
			cols, refs := &w.collected[part], s.refs.Share()
			for {
				k := int(next.Add(1)) - 1
				if k >= len(g.bins) {
					return
				}
				if g.bins[k].n == 0 {
					continue
				}
				g.bins[k].sorted(&cols.Floats, uint32(k)<<binBits)
				res := w.head.Append(s.id.tenant, refs, &head.Batch{Columns: cols, Replayed: true})
				counts[part] += res.Appended + res.Late
			}
		})
	}
	wg.Wait()
	for _, n := range counts {
		w.samples += n
	}
	w.release(g)
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
		s.untold = untold{unsure: rec.First - 1} // its log is gone
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

var (
	errTooMany = errors.New("more refs than the session has")
	errRefs    = errors.New("refs that are not dense, or too many")
)

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
	// Announcements are what apply made of them; of its limits the log has what came
	// of them: the positions of those that were refused.
	known, position, refused := uint32(s.refs.Len()), uint32(0), rec.Refused
	rest, err := rec.Rest(&w.scratch, func(ref uint32, ls labels.Labels, err error) error {
		refuse := len(refused) > 0 && refused[0] == position
		if position++; refuse {
			refused = refused[1:]
		} else if err != nil {
			return err
		}
		if ref < known {
			w.appendGathered(s) // the ref is about to mean something else
		}
		if ref >= maxRefs || !s.refs.Announce(ref, ls, refuse) {
			return errRefs
		}
		return nil
	})
	if err != nil {
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
	for _, f := range rest.GetRefused() {
		f.Seq = rec.Seq
	}
	s.untold.add(rest.GetRefused()) // they have been said, or not
	s.received, s.generation = rec.Seq, w.generation
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

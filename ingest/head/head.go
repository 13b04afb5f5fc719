package head

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

// Head holds the generations of an ingester. See the package comment.
type Head struct {
	maxSeries int          // of a tenant in a generation; 0: no limit
	metadata  atomic.Int64 // bytes about, of all tenants: it is the generations' together

	// A batch is appended under mu held for reading, so that Rotate, which
	// holds it for writing, puts a batch into one generation.
	mu          sync.RWMutex
	generations []*Generation // oldest first; the last one is current
}

// New makes an empty head. maxSeriesPerTenant of 0 means no limit.
func New(maxSeriesPerTenant int) *Head { return NewAt(maxSeriesPerTenant, 1) }

// NewAt is New for a head that goes on counting generations: first is at least 1
// and below 2³¹.
func NewAt(maxSeriesPerTenant int, first uint64) *Head {
	return &Head{maxSeries: maxSeriesPerTenant, generations: []*Generation{newGeneration(first, nil)}}
}

// Generation is what one flush takes.
type Generation struct {
	id       uint64
	previous *Generation // for metadata; nil once frozen

	bytes, samples, series atomic.Int64

	mu      sync.RWMutex
	tenants map[string]*tenantHead
	blocks  map[string][]ulid.ULID // by tenant, once published
}

func newGeneration(id uint64, previous *Generation) *Generation {
	return &Generation{id: id, previous: previous, tenants: map[string]*tenantHead{}}
}

// ID counts generations, from 1 or from what NewAt was given.
func (g *Generation) ID() uint64 { return g.id }

// Samples is how many samples were appended, without those that were dropped.
func (g *Generation) Samples() int64 { return g.samples.Load() }

// Bytes is about how much memory the generation takes.
func (g *Generation) Bytes() int64 { return g.bytes.Load() }

func (g *Generation) tenant(name string) *tenantHead {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.tenants[name]
}

// tenant finds or makes a tenant in a generation. The caller holds h.mu for reading.
func (h *Head) tenant(g *Generation, name string) (_ *tenantHead, created bool) {
	if t := g.tenant(name); t != nil {
		return t, false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.tenants[name]
	if t == nil {
		var previous *tenantHead
		if g.previous != nil {
			previous = g.previous.tenant(name)
		}
		t = newTenantHead(uint32(g.id), previous)
		h.metadata.Add(int64(t.metadata.retain()))
		g.tenants[name] = t
		created = true
	}
	return t, created
}

// Refs are the series that a session has announced, by its refs. The session
// serialises all use.
type Refs struct {
	// In some generation or in none yet; nil: never announced, or withdrawn.
	series []*memSeries
	bytes  int64             // what is announced takes, about
	it     chunkenc.Iterator // scratch
}

// Bytes is about how much memory what is announced takes, whether or not samples
// of it have come.
func (r *Refs) Bytes() int64 { return r.bytes }

func (s *memSeries) announcedBytes() int64 { return seriesBytes + int64(s.labels.ByteSize()) }

// Len is the number of refs ever announced.
func (r *Refs) Len() int { return len(r.series) }

// Announce gives a ref its labels. It is false if the ref is beyond Len: refs
// are dense. Samples of a ref with refuse set are counted and dropped.
func (r *Refs) Announce(ref uint32, ls labels.Labels, refuse bool) bool {
	if int(ref) > len(r.series) {
		return false
	}
	s := &memSeries{labels: ls}
	if refuse {
		s.generation = refusedSeries
	}
	r.bytes += s.announcedBytes()
	if int(ref) == len(r.series) {
		r.series = append(r.series, s)
		return true
	}
	if old := r.series[ref]; old != nil {
		r.bytes -= old.announcedBytes()
	}
	r.series[ref] = s
	return true
}

// Withdraw makes a ref mean nothing. It is false if the ref was not announced.
func (r *Refs) Withdraw(ref uint32) bool {
	if !r.Valid(ref) {
		return false
	}
	r.bytes -= r.series[ref].announcedBytes()
	r.series[ref] = nil
	return true
}

// Valid says whether samples of the ref may be sent.
func (r *Refs) Valid(ref uint32) bool {
	return int(ref) < len(r.series) && r.series[ref] != nil
}

// Labels of an announced ref.
func (r *Refs) Labels(ref uint32) labels.Labels { return r.series[ref].labels }

// Refused says whether a valid ref was announced to be refused.
func (r *Refs) Refused(ref uint32) bool { return r.series[ref].generation == refusedSeries }

// Share gives Refs of the same series for another goroutine. While several append
// at once, each to refs of its own, nothing may be announced or withdrawn.
func (r *Refs) Share() *Refs { return &Refs{series: r.series} }

// Batch is what Append takes. All refs are valid.
type Batch struct {
	Columns   *ship.Columns
	Exemplars []Exemplar
	Metadata  []Metadata
	// Replayed says that the batch was taken before: the limit of series, which
	// depends on the order among sessions, is not applied again. Its floats are
	// sorted by ref.
	Replayed bool
}

// Exemplar of the series ref.
type Exemplar struct {
	Ref uint32
	chunkfmt.Exemplar
}

// Metadata of the series ref. Family names the family of its metric, empty if
// that has the metric's own name.
type Metadata struct {
	Ref    uint32
	Family string
	metadata.Metadata
}

// Result says what became of the samples of a batch.
type Result struct {
	Generation                 uint64
	Appended, Late, Duplicates int
	Refused                    map[Reason]Refusal
	// Limited are the refs refused for ReasonSeriesLimit, as often as they were.
	Limited []uint32
	// NewTenant says that the batch is the first of its tenant in the generation,
	// to which metadata went over from the one before.
	NewTenant bool
}

// Reason why samples were refused, in the form of a metric label's value.
type Reason string

// Reasons for refusals.
const (
	ReasonInvalidSeries Reason = "invalid_series"
	ReasonSeriesLimit   Reason = "series_limit"
	ReasonExemplarLimit Reason = "exemplar_limit"
	ReasonMetadataLimit Reason = "metadata_limit"
	ReasonHistogram     Reason = "invalid_histogram"
)

// Refusal counts what was refused for one reason.
type Refusal struct {
	Samples int
	Example labels.Labels // one of the series
}

// Append adds a batch to the current generation. Bad samples are refused one
// by one, the rest is taken.
func (h *Head) Append(tenant string, refs *Refs, b *Batch) Result {
	h.mu.RLock()
	defer h.mu.RUnlock()
	g := h.generations[len(h.generations)-1]
	t, created := h.tenant(g, tenant)
	a := appender{g: g, t: t, refs: refs, maxSeries: h.maxSeries, result: Result{Generation: g.id, NewTenant: created}}
	if b.Replayed {
		a.maxSeries = 0
	}
	f, hs, fhs := &b.Columns.Floats, &b.Columns.Histograms, &b.Columns.FloatHistograms
	if b.Replayed && len(f.ST) == 0 {
		a.runs(f)
	} else {
		for i, ref := range f.Ref {
			if i%ahead == 0 {
				a.fetch(f.Ref[i:min(i+ahead, len(f.Ref))])
			}
			a.append(ref, sample{t: f.T[i], st: at(f.ST, i), v: f.V[i]})
		}
	}
	for i, ref := range hs.Ref {
		a.append(ref, sample{t: hs.T[i], st: at(hs.ST, i), h: hs.H[i]})
	}
	for i, ref := range fhs.Ref {
		a.append(ref, sample{t: fhs.T[i], st: at(fhs.ST, i), fh: fhs.H[i]})
	}
	a.unlock()
	for _, e := range b.Exemplars {
		s := a.series(e.Ref)
		if s == nil {
			continue
		}
		grown, ok := a.t.addExemplar(s, e.Exemplar)
		if !ok {
			a.refuse(ReasonExemplarLimit, s.labels)
		}
		a.grown += grown
	}
	for _, m := range b.Metadata {
		ls := refs.Labels(m.Ref)
		grown, ok := a.t.metadata.add(ls.Get(model.MetricNameLabel), m.Family, m.Metadata)
		if !ok {
			a.refuse(ReasonMetadataLimit, ls)
		}
		h.metadata.Add(int64(grown))
	}
	if a.any {
		a.t.observe(a.mint, a.maxt)
	}
	g.bytes.Add(int64(a.grown))
	t.bytes.Add(int64(a.grown))
	g.series.Add(int64(a.created))
	n := int64(a.result.Appended + a.result.Late)
	g.samples.Add(n)
	t.samples.Add(n)
	return a.result
}

func at(st []int64, i int) int64 {
	if len(st) == 0 {
		return 0
	}
	return st[i]
}

// appender is the state of one Append.
type appender struct {
	g          *Generation
	t          *tenantHead
	refs       *Refs
	maxSeries  int // 0: no limit
	result     Result
	grown      int // bytes
	created    int // series
	any        bool
	mint, maxt int64

	held *sync.Mutex // a lock of series; nil: none

	fetched byte // means nothing: without it the compiler would leave out the reads
}

// lock takes the lock of a series, unless it is held already.
func (a *appender) lock(s *memSeries) {
	if l := a.t.lock(s); l != a.held {
		a.unlock()
		l.Lock()
		a.held = l
	}
}

func (a *appender) unlock() {
	if a.held != nil {
		a.held.Unlock()
		a.held = nil
	}
}

// runs appends floats without start times that are sorted by ref: the first sample
// of each as append does, and then as many as just go on.
func (a *appender) runs(f *ship.Floats) {
	var scratch [mostBytes]byte
	for i := 0; i < len(f.Ref); {
		ref := f.Ref[i]
		a.append(ref, sample{t: f.T[i], v: f.V[i]})
		i++
		end := i
		for end < len(f.Ref) && f.Ref[end] == ref {
			end++
		}
		if m := a.refs.series[ref]; i < end && m.generation == a.t.generation && a.held != nil {
			n, grown := m.inOrder.extend(f.T[i:end], f.V[i:end], scratch[:])
			a.grown += grown
			a.result.Appended += n
			if n > 0 {
				a.maxt = max(a.maxt, f.T[i+n-1])
			}
			i += n
		}
	}
}

// ahead is of how many series the memory is fetched at once.
const ahead = 16

// fetch reads what appends to refs are about to wait for: where their chunks end.
// The waits overlap here, where one doesn't depend on the other; in append each
// comes alone. With many series there is one for nearly every sample.
func (a *appender) fetch(refs []uint32) {
	for _, ref := range refs {
		m := a.refs.series[ref]
		if m.generation != a.t.generation {
			continue
		}
		if a.held == nil {
			a.lock(m)
		}
		if a.t.lock(m) != a.held {
			continue
		}
		if s := m.inOrder.floats.stream; len(s) > 0 {
			a.fetched += s[len(s)-1]
		}
	}
}

func (a *appender) append(ref uint32, s sample) {
	m := a.series(ref)
	if m == nil {
		return
	}
	if !s.valid() {
		a.refuse(ReasonHistogram, m.labels)
		return
	}
	a.lock(m)
	o, grown, it, err := m.append(&s, a.refs.it)
	a.refs.it = it
	a.grown += grown
	if err != nil {
		a.refuse(ReasonHistogram, m.labels)
		return
	}
	switch o {
	case appended:
		a.result.Appended++
	case appendedLate:
		a.result.Late++
	case duplicate:
		a.result.Duplicates++
	}
	if !a.any {
		a.any, a.mint, a.maxt = true, s.t, s.t
		return
	}
	a.mint, a.maxt = min(a.mint, s.t), max(a.maxt, s.t)
}

// series gives the series of a ref in the current generation, or nil if it is
// refused, which it counts.
func (a *appender) series(ref uint32) *memSeries {
	known := a.refs.series[ref]
	if known.generation == a.t.generation {
		return known
	}
	if known.generation == refusedSeries {
		a.refuse(ReasonInvalidSeries, known.labels)
		return nil
	}
	a.unlock() // it locks the tenant
	s, grown := a.t.getOrCreate(known, a.maxSeries)
	if s == nil {
		a.refuse(ReasonSeriesLimit, known.labels)
		a.result.Limited = append(a.result.Limited, ref)
		return nil
	}
	if grown > 0 {
		a.grown += grown
		a.created++
	}
	a.refs.series[ref] = s
	return s
}

func (a *appender) refuse(reason Reason, ls labels.Labels) {
	if a.result.Refused == nil {
		a.result.Refused = map[Reason]Refusal{}
	}
	r := a.result.Refused[reason]
	if r.Samples == 0 {
		r.Example = ls
	}
	r.Samples++
	a.result.Refused[reason] = r
}

// Rotate freezes the current generation and begins a new one. Batches that
// Append has returned from are in the frozen one or an older one.
func (h *Head) Rotate() *Generation {
	h.mu.Lock()
	defer h.mu.Unlock()
	frozen := h.generations[len(h.generations)-1]
	frozen.previous = nil
	h.generations = append(h.generations, newGeneration(frozen.id+1, frozen))
	return frozen
}

// Current is the generation that batches go to now.
func (h *Head) Current() *Generation {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.generations[len(h.generations)-1]
}

// Published notes blocks, by tenant, that a frozen generation went to and whose
// rows are written. What was noted of other tenants stays.
func (h *Head) Published(g *Generation, blocks map[string][]ulid.ULID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.blocks == nil {
		g.blocks = map[string][]ulid.ULID{}
	}
	maps.Copy(g.blocks, blocks)
}

// Drop lets go of what a frozen generation has of all tenants but those to keep:
// readers find it in blocks.
func (h *Head) Drop(g *Generation, keep func(tenant string) bool) {
	gone := map[string]*tenantHead{}
	g.mu.Lock()
	for name, t := range g.tenants {
		if keep == nil || !keep(name) {
			gone[name] = t
			delete(g.tenants, name)
			delete(g.blocks, name)
		}
	}
	left := len(g.tenants)
	g.mu.Unlock()
	h.mu.Lock()
	if left == 0 {
		h.generations = slices.DeleteFunc(slices.Clone(h.generations), func(x *Generation) bool { return x == g })
	}
	for _, x := range h.generations {
		if x.previous == g {
			x.previous = nil
		}
	}
	h.mu.Unlock()
	for _, t := range gone {
		t.mu.RLock()
		for _, s := range t.series {
			l := t.lock(s)
			l.Lock()
			s.release()
			l.Unlock()
		}
		t.mu.RUnlock()
		h.metadata.Add(int64(t.metadata.release()))
		g.bytes.Add(-t.bytes.Load())
		g.samples.Add(-t.samples.Load())
	}
}

// TenantBytes is about how much memory a generation takes for a tenant.
func (g *Generation) TenantBytes(tenant string) int64 {
	t := g.tenant(tenant)
	if t == nil {
		return 0
	}
	return t.bytes.Load()
}

// readable gives the generations that readers see, oldest first.
func (h *Head) readable() []*Generation {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.generations
}

// Size is what the head holds.
type Size struct {
	Generations int
	Bytes       int64 // about
	Series      int64 // of the current generation
	Samples     int64
	Tenants     int // of the current generation
}

// Size adds up all generations.
func (h *Head) Size() Size {
	s := Size{Bytes: h.metadata.Load()}
	gens := h.readable()
	for _, g := range gens {
		s.Generations++
		s.Bytes += g.bytes.Load()
		s.Samples += g.samples.Load()
	}
	current := gens[len(gens)-1]
	s.Series = current.series.Load()
	current.mu.RLock()
	defer current.mu.RUnlock()
	s.Tenants = len(current.tenants)
	return s
}

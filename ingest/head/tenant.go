package head

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// Bounds on what accompanies the samples of a tenant in a generation.
const (
	maxExemplars         = 100_000 // of a tenant
	maxMetadataPerMetric = 8       // different entries of one metric
	maxMetadataMetrics   = 100_000
)

// tenantHead is what a generation holds of one tenant.
type tenantHead struct {
	generation uint32

	bytes, samples atomic.Int64 // bytes about

	mu       sync.RWMutex
	byHash   hashIndex                      // of series
	series   []*memSeries                   // by ref, in order of creation
	postings map[string]map[string][]uint32 // label name → value → refs, ascending
	pairs    int                            // distinct label pairs
	order    order                          // of series by labels

	exemplars     map[uint32][]chunkfmt.Exemplar // by ref
	exemplarCount int
	metadata      map[string][]metadata.Metadata // by name of the metric family, newest last
	families      map[string]string              // by metric name, where that isn't its family's

	// locks guard the samples of series, many with one lock: a batch mostly goes
	// to series of which one lock after the other guards a run. A lock is never
	// held while mu is awaited; mu may be held while a lock is awaited.
	locks [16]sync.Mutex

	hasSamples bool
	mint, maxt int64 // of all samples; valid with hasSamples
}

func newTenantHead(generation uint32, previous *tenantHead) *tenantHead {
	t := &tenantHead{
		generation: generation,
		postings:   map[string]map[string][]uint32{},
	}
	if previous != nil {
		// Sources announce metadata once; it holds until it changes.
		previous.mu.RLock()
		defer previous.mu.RUnlock()
		if len(previous.metadata) > 0 {
			t.metadata = make(map[string][]metadata.Metadata, len(previous.metadata))
			for k, v := range previous.metadata {
				t.metadata[k] = slices.Clone(v)
			}
			t.families = maps.Clone(previous.families)
		}
	}
	return t
}

// seriesBytes is about what a series takes beside its labels and samples: the
// struct, its places in the index, in postings and in the order by labels.
const seriesBytes = 96 + 12 + 10 + 8

// getOrCreate finds the series with the labels of s or makes it, which uses s
// itself if that is in no generation yet. limit bounds the number of series, 0
// means none; nil is returned where it is reached. grown is in bytes.
func (t *tenantHead) getOrCreate(s *memSeries, limit int) (_ *memSeries, grown int) {
	hash := s.labels.Hash()
	t.mu.RLock()
	found := t.find(hash, s.labels)
	t.mu.RUnlock()
	if found != nil {
		return found, 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if found := t.find(hash, s.labels); found != nil {
		return found, 0
	}
	if limit > 0 && len(t.series) >= limit {
		return nil, 0
	}
	if s.generation != noGeneration {
		s = &memSeries{labels: s.labels}
	}
	s.generation, s.ref = t.generation, uint32(len(t.series))
	t.byHash.add(hash, s.ref)
	t.series = append(t.series, s)
	n := 0
	s.labels.Range(func(l labels.Label) {
		values := t.postings[l.Name]
		if values == nil {
			values = map[string][]uint32{}
			t.postings[l.Name] = values
		}
		refs := values[l.Value]
		if refs == nil {
			t.pairs++
		}
		values[l.Value] = append(refs, s.ref)
		n++
	})
	return s, seriesBytes + int(s.labels.ByteSize()) + 5*n
}

// lock is the one that guards the samples of a series.
func (t *tenantHead) lock(s *memSeries) *sync.Mutex {
	return &t.locks[s.ref/256%uint32(len(t.locks))]
}

func (t *tenantHead) find(hash uint64, ls labels.Labels) *memSeries {
	for ref := range t.byHash.candidates(hash) {
		if s := t.series[ref]; labels.Equal(s.labels, ls) {
			return s
		}
	}
	return nil
}

// observe widens the time range of the tenant.
func (t *tenantHead) observe(mint, maxt int64) {
	t.mu.RLock()
	inside := t.hasSamples && mint >= t.mint && maxt <= t.maxt
	t.mu.RUnlock()
	if inside {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.hasSamples {
		t.hasSamples, t.mint, t.maxt = true, mint, maxt
		return
	}
	t.mint, t.maxt = min(t.mint, mint), max(t.maxt, maxt)
}

func (t *tenantHead) timeRange() (mint, maxt int64, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mint, t.maxt, t.hasSamples
}

// What an exemplar and an entry of metadata take beside their strings, about.
const (
	exemplarBytes = 64
	metadataBytes = 96
)

// addExemplar keeps an exemplar; false means that there is no room. A repeated
// one is dropped. grown is in bytes.
func (t *tenantHead) addExemplar(s *memSeries, e chunkfmt.Exemplar) (grown int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.exemplars == nil {
		t.exemplars = map[uint32][]chunkfmt.Exemplar{}
	}
	es := t.exemplars[s.ref]
	i, found := slices.BinarySearchFunc(es, e, chunkfmt.CompareExemplars)
	if found {
		return 0, true
	}
	if t.exemplarCount >= maxExemplars {
		return 0, false
	}
	t.exemplars[s.ref] = slices.Insert(es, i, e)
	t.exemplarCount++
	return exemplarBytes + int(e.Labels.ByteSize()), true
}

// addMetadata keeps metadata of a metric's family; false means that there is no
// room. grown is in bytes.
func (t *tenantHead) addMetadata(metric, family string, m metadata.Metadata) (grown int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if family == "" {
		family = metric
	}
	if _, known := t.metadata[family]; !known && len(t.metadata) >= maxMetadataMetrics || !t.setFamily(metric, family) {
		return 0, false
	}
	return t.addEntry(family, m)
}

// setFamily notes the family of a metric. The caller holds t.mu, as with addEntry.
func (t *tenantHead) setFamily(metric, family string) bool {
	switch _, known := t.families[metric]; {
	case family == metric:
		delete(t.families, metric)
	case !known && len(t.families) >= 4*maxMetadataMetrics:
		return false
	default:
		if t.families == nil {
			t.families = map[string]string{}
		}
		t.families[metric] = family
	}
	return true
}

func (t *tenantHead) addEntry(family string, m metadata.Metadata) (grown int, ok bool) {
	if t.metadata == nil {
		t.metadata = map[string][]metadata.Metadata{}
	}
	ms, known := t.metadata[family]
	if !known && len(t.metadata) >= maxMetadataMetrics {
		return 0, false
	}
	size := func(m metadata.Metadata) int { return metadataBytes + len(m.Type) + len(m.Unit) + len(m.Help) }
	grown = size(m)
	if i := slices.Index(ms, m); i >= 0 {
		grown -= size(ms[i])
		ms = slices.Delete(ms, i, i+1)
	}
	if len(ms) >= maxMetadataPerMetric {
		grown -= size(ms[0])
		ms = slices.Delete(ms, 0, 1)
	}
	t.metadata[family] = append(ms, m)
	return grown, true
}

// newestMetadata gives the metadata of a metric, and the name of its family if
// that isn't the metric's own.
func (t *tenantHead) newestMetadata(metric string) (m metadata.Metadata, family string) {
	name := metric
	if family = t.families[metric]; family != "" {
		name = family
	}
	if ms := t.metadata[name]; len(ms) > 0 {
		return ms[len(ms)-1], family
	}
	return metadata.Metadata{}, ""
}

// Family is metadata of a metric family, or the name of the family that Metric
// belongs to, if that isn't empty.
type Family struct {
	Metric, Name string
	metadata.Metadata
}

// Families is what a generation that is readable knows of a tenant's metrics,
// entries of one family ascending in age.
func (h *Head) Families(generation uint64, tenant string) []Family {
	gens := h.readable()
	i := slices.IndexFunc(gens, func(g *Generation) bool { return g.id == generation })
	if i < 0 {
		return nil
	}
	t := gens[i].tenant(tenant)
	if t == nil {
		return nil
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	var out []Family
	for name, ms := range t.metadata {
		for _, m := range ms {
			out = append(out, Family{Name: name, Metadata: m})
		}
	}
	for metric, name := range t.families {
		out = append(out, Family{Metric: metric, Name: name})
	}
	return out
}

// AddFamily enters what Families gave into the current generation.
func (h *Head) AddFamily(tenant string, f Family) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	g := h.generations[len(h.generations)-1]
	t, _ := g.getOrCreateTenant(tenant)
	grown := int64(t.addFamily(f))
	g.bytes.Add(grown)
	t.bytes.Add(grown)
}

func (t *tenantHead) addFamily(f Family) (grown int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.Metric == "" {
		grown, _ = t.addEntry(f.Name, f.Metadata)
		return grown
	}
	t.setFamily(f.Metric, f.Name)
	return 0
}

package head

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// maxExemplars bounds those of a tenant in a generation.
const maxExemplars = 100_000 // of a tenant

// tenantHead is what a generation holds of one tenant.
type tenantHead struct {
	generation uint32

	bytes, samples atomic.Int64 // bytes about

	mu       sync.RWMutex
	byHash   hashIndex                      // of series
	series   []*memSeries                   // by ref, in order of creation
	postings map[string]map[string][]uint32 // label name → value → refs, ascending
	pairs    int                            // distinct label pairs
	sorted   map[string][]string            // label name → values, and "" → label names, as of when they were asked for
	order    order                          // of series by labels

	exemplars     map[uint32][]chunkfmt.Exemplar // by ref
	exemplarCount int
	metadata      *tenantMetadata // which later generations have too

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
		metadata:   &tenantMetadata{},
	}
	if previous != nil {
		t.metadata = previous.metadata
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

// exemplarBytes is what one takes beside its labels, about.
const exemplarBytes = 64

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

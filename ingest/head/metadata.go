package head

import (
	"maps"
	"slices"
	"sync"

	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

// Bounds on the metadata of a tenant. Where the bytes are reached nothing new is
// kept.
const (
	maxMetadataPerMetric = 8 // different entries of one metric
	maxMetadataMetrics   = 100_000
	maxMetadataBytes     = 32 << 20
)

// What an entry, and a name in a map, take beside their strings, about.
const (
	metadataBytes = 96
	nameBytes     = 64
)

// tenantMetadata is what a tenant's sources said of its metrics. They announce it once,
// and it holds until it changes: so a generation has what the one before has.
type tenantMetadata struct {
	mu          sync.RWMutex
	generations int                            // that have it; what it takes counts while there are any
	bytes       int                            // about
	entries     map[string][]metadata.Metadata // by name of the metric family, newest last
	families    map[string]string              // by metric name, where that isn't its family's
}

// retain notes another generation that has it. grown, as of all methods, is how many
// bytes more count.
func (t *tenantMetadata) retain() (grown int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.generations++; t.generations == 1 {
		return t.bytes
	}
	return 0
}

// release notes a generation that is gone.
func (t *tenantMetadata) release() (grown int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.generations--; t.generations == 0 {
		return -t.bytes
	}
	return 0
}

// add keeps metadata of a metric's family; false means that there is no room.
func (t *tenantMetadata) add(metric, family string, m metadata.Metadata) (grown int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if family == "" {
		family = metric
	}
	before := t.bytes
	if _, known := t.entries[family]; !known && len(t.entries) >= maxMetadataMetrics || !t.setFamily(metric, family) {
		return 0, false
	}
	ok = t.addEntry(family, m)
	return t.bytes - before, ok
}

// full says whether nothing new is kept. The caller holds t.mu, as with what follows.
func (t *tenantMetadata) full() bool { return t.bytes >= maxMetadataBytes }

// setFamily notes the family of a metric.
func (t *tenantMetadata) setFamily(metric, family string) bool {
	size := func(family string) int { return nameBytes + len(metric) + len(family) }
	old, known := t.families[metric]
	switch {
	case family == metric:
		if known {
			t.bytes -= size(old)
			delete(t.families, metric)
		}
	case known && old == family:
	case t.full() || !known && len(t.families) >= 4*maxMetadataMetrics:
		return false
	default:
		if t.families == nil {
			t.families = map[string]string{}
		}
		if known {
			t.bytes -= size(old)
		}
		t.bytes += size(family)
		t.families[metric] = family
	}
	return true
}

func (t *tenantMetadata) addEntry(family string, m metadata.Metadata) bool {
	size := func(m metadata.Metadata) int { return metadataBytes + len(m.Type) + len(m.Unit) + len(m.Help) }
	ms, known := t.entries[family]
	i := slices.Index(ms, m)
	if i >= 0 { // the newest from now on
		t.entries[family] = append(slices.Delete(ms, i, i+1), m)
		return true
	}
	if t.full() || !known && len(t.entries) >= maxMetadataMetrics {
		return false
	}
	if !known {
		t.bytes += nameBytes + len(family)
	}
	if len(ms) >= maxMetadataPerMetric {
		t.bytes -= size(ms[0])
		ms = slices.Delete(ms, 0, 1)
	}
	if t.entries == nil {
		t.entries = map[string][]metadata.Metadata{}
	}
	t.bytes += size(m)
	t.entries[family] = append(ms, m)
	return true
}

// newest gives the metadata of a metric, and the name of its family if that isn't the
// metric's own.
func (t *tenantMetadata) newest(metric string) (m metadata.Metadata, family string) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	name := metric
	if family = t.families[metric]; family != "" {
		name = family
	}
	if ms := t.entries[name]; len(ms) > 0 {
		return ms[len(ms)-1], family
	}
	return metadata.Metadata{}, ""
}

// Metadata gives the metadata of a metric family, or of all if metric is empty,
// sorted by name; limit bounds the families, 0 means none. One may have several
// entries, the newest last.
func (h *Head) Metadata(tenant, metric string, limit int) ([]fetch.MetricMetadata, fetch.Header) {
	ts, hd := h.view(tenant)
	var out []fetch.MetricMetadata
	if len(ts) == 0 {
		return nil, hd
	}
	// The newest generation has what those before knew.
	t := ts[len(ts)-1].metadata
	t.mu.RLock()
	defer t.mu.RUnlock()
	names := []string{metric}
	if metric == "" {
		names = slices.Sorted(maps.Keys(t.entries))
	}
	for i, n := range names {
		if limit > 0 && i >= limit {
			break
		}
		for _, m := range t.entries[n] {
			out = append(out, fetch.MetricMetadata{Metric: n, Metadata: m})
		}
	}
	return out, hd
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
	th := gens[i].tenant(tenant)
	if th == nil {
		return nil
	}
	t := th.metadata
	t.mu.RLock()
	defer t.mu.RUnlock()
	var out []Family
	for name, ms := range t.entries {
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
	th, _ := h.tenant(h.generations[len(h.generations)-1], tenant)
	t := th.metadata
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.bytes
	if f.Metric == "" {
		t.addEntry(f.Name, f.Metadata)
	} else {
		t.setFamily(f.Metric, f.Name)
	}
	h.metadata.Add(int64(t.bytes - before))
}

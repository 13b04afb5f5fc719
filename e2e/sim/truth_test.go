package sim

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"sync"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/value"
)

// sampleID names a sample: a series of a tenant at a time in ms.
type sampleID struct {
	series seriesID
	t      int64
}

func (id sampleID) String() string {
	ls := id.series.labels
	if len(ls) > 100 {
		ls = ls[:100] + "…"
	}
	return fmt.Sprintf("%s of %s at %d", ls, id.series.tenant, id.t)
}

// seriesID is a tenant and a series' labels in their usual notation.
type seriesID struct{ tenant, labels string }

// truth is every sample that a source has logged, and what is known of each.
type truth struct {
	mu      sync.Mutex
	samples map[sampleID]*sample
}

type sample struct {
	value   string // as of floatValue and the like
	source  *source
	at      place   // in the WAL
	gone    bool    // the source holds it no more
	durable bool    // an ingester said so
	heads   []*node // processes that said that they have received it
}

func (tr *truth) log(id sampleID, s *sample) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.samples[id] = s
}

// logged says whether the source of the series has logged the value at that time.
func (tr *truth) logged(id sampleID, v string) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.same(id, v)
}

func (tr *truth) has(id sampleID) bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.samples[id] != nil
}

// same is logged for a caller who holds mu.
func (tr *truth) same(id sampleID, v string) error {
	s := tr.samples[id]
	switch {
	case s == nil:
		return fmt.Errorf("%v is a sample that no source has logged (%s)", id, v)
	case s.value != v:
		return fmt.Errorf("%v is %s, its source has logged %s", id, v, s.value)
	}
	return nil
}

// received notes what a process says to have in memory.
func (tr *truth) received(n *node, ids []sampleID) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, id := range ids {
		if s := tr.samples[id]; s != nil && !slices.Contains(s.heads, n) {
			s.heads = append(s.heads, n)
		}
	}
}

// inherit notes that a process has all in memory that the one before said to have.
func (tr *truth) inherit(n, before *node) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, s := range tr.samples {
		if slices.Contains(s.heads, before) {
			s.heads = append(s.heads, n)
		}
	}
}

// readable says whether a reader must find a sample: it is durable, or in the
// memory of a process that lives.
func (s *sample) readable() bool {
	return s.durable || slices.ContainsFunc(s.heads, func(n *node) bool { return !n.dead.Load() })
}

// forget notes that a source doesn't hold some of its segments any more. What of
// them a WAL checkpoint has kept counts as gone too: gaps are not filled from
// there.
func (tr *truth) forget(src *source, gone func(seriesID, place) bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for id, s := range tr.samples {
		if s.source == src && gone(id.series, s.at) {
			s.gone = true
		}
	}
}

const stale = "stale"

// floatValue and its like write a value so that equal ones are equal in every
// bit, but for what may change on the way: a staleness marker's kind and
// counter-reset hints.
func floatValue(v float64) string {
	if value.IsStaleNaN(v) {
		return stale
	}
	return "f" + strconv.FormatUint(math.Float64bits(v), 16)
}

func histogramValue(h *histogram.Histogram) string {
	if value.IsStaleNaN(h.Sum) {
		return stale
	}
	return fmt.Sprintf("h%d %x %d %d %x %v %v", h.Schema, math.Float64bits(h.ZeroThreshold), h.ZeroCount, h.Count,
		math.Float64bits(h.Sum), h.PositiveSpans, h.PositiveBuckets)
}

func floatHistogramValue(h *histogram.FloatHistogram) string {
	if value.IsStaleNaN(h.Sum) {
		return stale
	}
	return fmt.Sprintf("fh%d %x %v %v %x %v %v", h.Schema, math.Float64bits(h.ZeroThreshold), h.ZeroCount, h.Count,
		math.Float64bits(h.Sum), h.PositiveSpans, h.PositiveBuckets)
}

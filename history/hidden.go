package history

import (
	"math"
	"slices"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Retention is how long what a tenant has is kept. 0: for ever.
type Retention struct {
	// Raw is of the samples as they were written. What is made of them, such as the
	// summaries in the same block, goes with them.
	Raw time.Duration
}

// Horizon is the time in ms before which samples are past the retention, at now;
// math.MinInt64 if there is none. It moves on by minutes.
func (r Retention) Horizon(now time.Time) int64 {
	if r.Raw <= 0 {
		return math.MinInt64
	}
	return now.Add(-r.Raw).Truncate(time.Minute).UnixMilli()
}

// Retentions says how long samples are kept. nil: for ever.
type Retentions struct {
	Default Retention
	Tenants map[string]Retention // of those that have their own
}

// Of a tenant.
func (r *Retentions) Of(tenant string) Retention {
	if r == nil {
		return Retention{}
	}
	if own, ok := r.Tenants[tenant]; ok {
		return own
	}
	return r.Default
}

// None says that all is kept for ever.
func (r *Retentions) None() bool {
	if r == nil {
		return true
	}
	for _, own := range r.Tenants {
		if own != (Retention{}) {
			return false
		}
	}
	return r.Default == Retention{}
}

// Hidden is what of a tenant is not to be read, whether heads or blocks have it:
// what was deleted, and what is past the retention. nil hides nothing. It doesn't
// change, and is safe for concurrent use.
type Hidden struct {
	// Deletions that are in force; not to be changed.
	Deletions []index.Deletion
	// Before is the time in ms before which all is past the retention;
	// math.MinInt64: there is none.
	Before int64

	named map[string][]int // deletions that are about one metric, by its name
	other []int            // deletions that aren't
}

// NewHidden gives nil where nothing is hidden.
func NewHidden(ds []index.Deletion, before int64) *Hidden {
	if len(ds) == 0 && before == math.MinInt64 {
		return nil
	}
	h := &Hidden{Deletions: ds, Before: before}
	for i := range ds {
		at := slices.IndexFunc(ds[i].Matchers, func(m *labels.Matcher) bool {
			return m.Type == labels.MatchEqual && m.Name == model.MetricNameLabel
		})
		if at < 0 {
			h.other = append(h.other, i)
			continue
		}
		if h.named == nil {
			h.named = map[string][]int{}
		}
		name := ds[i].Matchers[at].Value
		h.named[name] = append(h.named[name], i)
	}
	return h
}

// Within is what is hidden of mint to maxt, both included, in ms; nil if nothing is.
func (h *Hidden) Within(mint, maxt int64) *Hidden {
	if h == nil {
		return nil
	}
	before := h.Before
	if before <= mint {
		before = math.MinInt64
	}
	some := func(d index.Deletion) bool { return d.Overlaps(mint, maxt) }
	n := 0
	for i := range h.Deletions {
		if some(h.Deletions[i]) {
			n++
		}
	}
	if n == len(h.Deletions) && before == h.Before {
		return h
	}
	ds := make([]index.Deletion, 0, n)
	for i := range h.Deletions {
		if some(h.Deletions[i]) {
			ds = append(ds, h.Deletions[i])
		}
	}
	return NewHidden(ds, before)
}

// Of gives the ranges of time in which a series is hidden, ascending and disjoint.
func (h *Hidden) Of(ls labels.Labels) []chunkfmt.Range {
	if h == nil {
		return nil
	}
	var out []chunkfmt.Range
	if h.Before > math.MinInt64 {
		out = append(out, chunkfmt.Range{MinT: math.MinInt64, MaxT: h.Before - 1})
	}
	for _, is := range [...][]int{h.other, h.named[ls.Get(model.MetricNameLabel)]} {
		for _, i := range is {
			if d := &h.Deletions[i]; d.Matches(ls) {
				out = append(out, chunkfmt.Range{MinT: d.MinT, MaxT: d.MaxT})
			}
		}
	}
	return union(out)
}

// union makes ranges ascending and disjoint, with room between them.
func union(rs []chunkfmt.Range) []chunkfmt.Range {
	if len(rs) < 2 {
		return rs
	}
	slices.SortFunc(rs, func(a, b chunkfmt.Range) int {
		switch {
		case a.MinT < b.MinT:
			return -1
		case a.MinT > b.MinT:
			return 1
		}
		return 0
	})
	out := rs[:1]
	for _, r := range rs[1:] {
		last := &out[len(out)-1]
		if last.MaxT == math.MaxInt64 || r.MinT <= last.MaxT+1 {
			last.MaxT = max(last.MaxT, r.MaxT)
			continue
		}
		out = append(out, r)
	}
	return out
}

// Touches says whether anything of a series in (a, b], in ms, is hidden: then what
// was made of all its samples there, such as a window's summary, can't be used.
func (h *Hidden) Touches(ls labels.Labels, a, b int64) bool {
	if h == nil || a >= b {
		return false
	}
	return slices.ContainsFunc(h.Of(ls), func(r chunkfmt.Range) bool { return r.Overlaps(a+1, b) })
}

// All says whether all of mint to maxt, both included, in ms, is hidden, whatever
// the series.
func (h *Hidden) All(mint, maxt int64) bool {
	if h == nil {
		return false
	}
	var rs []chunkfmt.Range
	if h.Before > math.MinInt64 {
		rs = append(rs, chunkfmt.Range{MinT: math.MinInt64, MaxT: h.Before - 1})
	}
	for _, i := range h.other {
		if d := &h.Deletions[i]; len(d.Matchers) == 0 {
			rs = append(rs, chunkfmt.Range{MinT: d.MinT, MaxT: d.MaxT})
		}
	}
	return covers(union(rs), mint, maxt)
}

// covers says whether one of the ranges has all of mint to maxt.
func covers(rs []chunkfmt.Range, mint, maxt int64) bool {
	return slices.ContainsFunc(rs, func(r chunkfmt.Range) bool { return r.MinT <= mint && maxt <= r.MaxT })
}

// Covers says whether all of mint to maxt, both included, in ms, lies in one of the
// ranges that Of has given.
func Covers(hidden []chunkfmt.Range, mint, maxt int64) bool { return covers(hidden, mint, maxt) }

// Cut takes the samples and exemplars out of a series that lie in ranges that Of has
// given. The columns stay in their memory.
func Cut(s *chunkfmt.Series, hidden []chunkfmt.Range) {
	if len(hidden) == 0 {
		return
	}
	cut(s, complement(hidden), 0, 0, 0)
	s.Exemplars = CutExemplars(s.Exemplars, hidden)
}

// CutExemplars is Cut for exemplars alone.
func CutExemplars(es []exemplar.Exemplar, hidden []chunkfmt.Range) []exemplar.Exemplar {
	if len(hidden) == 0 {
		return es
	}
	return slices.DeleteFunc(es, func(e exemplar.Exemplar) bool { return covers(hidden, e.Ts, e.Ts) })
}

// complement gives what lies between and beside ranges, which ascend.
func complement(rs []chunkfmt.Range) []chunkfmt.Range {
	var out []chunkfmt.Range
	from := int64(math.MinInt64)
	for _, r := range rs {
		if r.MinT > from {
			out = append(out, chunkfmt.Range{MinT: from, MaxT: r.MinT - 1})
		}
		if r.MaxT == math.MaxInt64 {
			return out
		}
		from = r.MaxT + 1
	}
	return append(out, chunkfmt.Range{MinT: from, MaxT: math.MaxInt64})
}

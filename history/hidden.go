package history

import (
	"math"
	"slices"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Retention is how long what a tenant has is kept.
type Retention struct {
	// Raw is of the samples as they were written. 0: for ever, and so is all else.
	Raw time.Duration
	// Short and Long are of the summaries of windows of 5 minutes and of an hour. 0, or
	// shorter than what is finer: as long as that.
	Short, Long time.Duration
}

// Horizons are the times in ms before which something is past the retention, or
// math.MinInt64. None is later than that of what is finer.
type Horizons struct {
	Raw         int64 // of samples
	Short, Long int64 // of windows, which are past it if any of their time is before
}

// Before are the horizons where samples and windows are past the retention from the
// same time in ms on; math.MinInt64: nothing is.
func Before(t int64) Horizons { return Horizons{t, t, t} }

// Horizons at now. That of samples moves on by minutes, and the others, where they are
// others, by whole hours.
func (r Retention) Horizons(now time.Time) Horizons {
	if r.Raw <= 0 {
		return Before(math.MinInt64)
	}
	out := Before(now.Add(-r.Raw).Truncate(time.Minute).UnixMilli())
	if r.Short > r.Raw {
		out.Short = wholeHours(now.Add(-r.Short).UnixMilli())
		out.Long = out.Short
	}
	if r.Long > max(r.Raw, r.Short) {
		out.Long = wholeHours(now.Add(-r.Long).UnixMilli())
	}
	return out
}

// wholeHours is the last start of a window of an hour that isn't later.
func wholeHours(t int64) int64 { return rollup.EndOf(t, rollup.Long) - rollup.Long + 1 }

// Of windows of a width, rollup.Short or rollup.Long.
func (h Horizons) Of(width int64) int64 {
	if width == rollup.Long {
		return h.Long
	}
	return h.Short
}

// Summaries says whether some are kept for longer than samples.
func (h Horizons) Summaries() bool { return h.Long < h.Raw }

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
	// Before says what is past the retention.
	Before Horizons

	named map[string][]int // deletions that are about one metric, by its name
	other []int            // deletions that aren't
}

// NewHidden gives nil where nothing is hidden.
func NewHidden(ds []index.Deletion, before Horizons) *Hidden {
	if len(ds) == 0 && before == Before(math.MinInt64) {
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

// Deletes says whether a deletion is about mint to maxt, inclusive, in ms.
func (h *Hidden) Deletes(mint, maxt int64) bool {
	return h != nil && slices.ContainsFunc(h.Deletions, func(d index.Deletion) bool { return d.Overlaps(mint, maxt) })
}

// Within is what is hidden of mint to maxt, both included, in ms; nil if nothing is.
func (h *Hidden) Within(mint, maxt int64) *Hidden {
	if h == nil {
		return nil
	}
	before := h.Before
	for _, t := range []*int64{&before.Raw, &before.Short, &before.Long} {
		if *t <= mint {
			*t = math.MinInt64
		}
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

// Of gives the ranges of time in which samples of a series are hidden, ascending and
// disjoint.
func (h *Hidden) Of(ls labels.Labels) []chunkfmt.Range {
	if h == nil {
		return nil
	}
	return h.of(ls, h.Before.Raw)
}

// OfWindows gives the ranges of time in which windows of a width in ms are hidden, as
// they are if any of their time is, and with them the samples that they would be made of.
func (h *Hidden) OfWindows(ls labels.Labels, width int64) []chunkfmt.Range {
	if h == nil {
		return nil
	}
	return h.of(ls, h.Before.Of(width))
}

// OfAll gives the ranges of time in which nothing of a series can be read.
func (h *Hidden) OfAll(ls labels.Labels) []chunkfmt.Range { return h.OfWindows(ls, rollup.Long) }

func (h *Hidden) of(ls labels.Labels, before int64) []chunkfmt.Range {
	var out []chunkfmt.Range
	if before > math.MinInt64 {
		out = append(out, chunkfmt.Range{MinT: math.MinInt64, MaxT: before - 1})
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
// the series, windows too.
func (h *Hidden) All(mint, maxt int64) bool {
	if h == nil {
		return false
	}
	var rs []chunkfmt.Range
	if h.Before.Long > math.MinInt64 {
		rs = append(rs, chunkfmt.Range{MinT: math.MinInt64, MaxT: h.Before.Long - 1})
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

// Overlap gives what of ranges, which ascend and are apart, lies in others, which do too.
func Overlap(a, b []chunkfmt.Range) []chunkfmt.Range {
	var out []chunkfmt.Range
	for i, j := 0, 0; i < len(a) && j < len(b); {
		if lo, hi := max(a[i].MinT, b[j].MinT), min(a[i].MaxT, b[j].MaxT); lo <= hi {
			out = append(out, chunkfmt.Range{MinT: lo, MaxT: hi})
		}
		if a[i].MaxT < b[j].MaxT {
			i++
		} else {
			j++
		}
	}
	return out
}

// Union makes ranges ascending and apart, with room between them. It keeps a.
func Union(a, b []chunkfmt.Range) []chunkfmt.Range { return union(slices.Concat(a, b)) }

// Without gives what of ranges, which ascend and are apart, lies in none of others, which
// do too.
func Without(rs, others []chunkfmt.Range) []chunkfmt.Range { return subtract(rs, others) }

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

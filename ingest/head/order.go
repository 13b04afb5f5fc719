package head

import (
	"slices"
	"sort"
	"sync"

	"github.com/prometheus/prometheus/model/labels"
)

// fewRefs are sorted by their labels at once: the order of all is copied for each new
// series, and a query for a few has not to wait for that.
const fewRefs = 64

// order is that of a tenant's series by labels, as far as it was asked for. Comparing
// labels is most of what a query that finds many series would cost otherwise.
type order struct {
	mu sync.Mutex
	// Never changed, only replaced.
	refs  []uint32 // by labels
	ranks []uint32 // by ref: where in refs it is
}

// of gives the order of all series, and perhaps of some that came later.
func (o *order) of(series []*memSeries) (refs, ranks []uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	old := o.refs
	if len(old) >= len(series) {
		return o.refs, o.ranks
	}
	more := make([]uint32, 0, len(series)-len(old))
	for ref := len(old); ref < len(series); ref++ {
		more = append(more, uint32(ref))
	}
	slices.SortFunc(more, func(a, b uint32) int { return labels.Compare(series[a].labels, series[b].labels) })
	refs = make([]uint32, 0, len(series))
	for _, ref := range more {
		// Few are new mostly, after the first time.
		n := sort.Search(len(old), func(i int) bool { return labels.Compare(series[old[i]].labels, series[ref].labels) > 0 })
		refs = append(append(refs, old[:n]...), ref)
		old = old[n:]
	}
	refs = append(refs, old...)
	ranks = make([]uint32, len(refs))
	for i, ref := range refs {
		ranks[ref] = uint32(i)
	}
	o.refs, o.ranks = refs, ranks
	return refs, ranks
}

// sort gives refs, or those of all series, in the order of labels. The given ones
// stay as they are.
func (o *order) sort(refs []uint32, all bool, series []*memSeries) []uint32 {
	if !all && len(refs) <= fewRefs {
		out := slices.Clone(refs)
		slices.SortFunc(out, func(a, b uint32) int { return labels.Compare(series[a].labels, series[b].labels) })
		return out
	}
	byLabels, ranks := o.of(series)
	switch {
	case all && len(byLabels) == len(series):
		return byLabels
	case !all && len(refs) < len(byLabels)/16:
		out := make([]uint32, len(refs))
		for i, ref := range refs {
			out[i] = ranks[ref]
		}
		slices.Sort(out)
		for i, rank := range out {
			out[i] = byLabels[rank]
		}
		return out
	}
	// Many: those that are wanted of all.
	wanted := make([]bool, len(byLabels))
	n := len(refs)
	if all {
		n = len(series)
		for i := range series {
			wanted[i] = true
		}
	}
	for _, ref := range refs {
		wanted[ref] = true
	}
	out := make([]uint32, 0, n)
	for _, ref := range byLabels {
		if wanted[ref] {
			out = append(out, ref)
		}
	}
	return out
}

package head

import (
	"slices"

	"github.com/prometheus/prometheus/model/labels"
)

// match gives the series that satisfy all matchers, by ref. The caller holds t.mu
// for reading.
func (t *tenantHead) match(ms []*labels.Matcher) []*memSeries {
	refs, all := t.matchRefs(ms)
	if all {
		return slices.Clone(t.series)
	}
	out := make([]*memSeries, len(refs))
	for i, r := range refs {
		out[i] = t.series[r]
	}
	return out
}

// matchRefs gives the refs of the series that satisfy all matchers, ascending, or
// says that all do. A label that a series lacks has the empty value, as in Prometheus.
// The caller holds t.mu for reading, and doesn't change the result.
func (t *tenantHead) matchRefs(ms []*labels.Matcher) (_ []uint32, all bool) {
	var refs []uint32 // so far, ascending
	restricted := false
	narrow := func(with []uint32) {
		if !restricted {
			refs, restricted = with, true
			return
		}
		refs = intersect(refs, with)
	}
	for _, m := range ms {
		if m.Matches("") {
			continue
		}
		narrow(t.union(m.Name, m, true))
		if len(refs) == 0 {
			return nil, false
		}
	}
	for _, m := range ms {
		if !m.Matches("") {
			continue
		}
		// All series but those whose value of the label doesn't match.
		without := t.union(m.Name, m, false)
		if len(without) == 0 {
			continue
		}
		if !restricted {
			refs, restricted = make([]uint32, len(t.series)), true
			for i := range refs {
				refs[i] = uint32(i)
			}
		}
		refs = subtract(refs, without)
	}
	return refs, !restricted
}

// union gives the series that have the label with a value of which m.Matches is
// want. The result must not be changed.
func (t *tenantHead) union(name string, m *labels.Matcher, want bool) []uint32 {
	values := t.postings[name]
	if want {
		switch set := m.SetMatches(); {
		case m.Type == labels.MatchEqual:
			return values[m.Value]
		case m.Type == labels.MatchRegexp && len(set) > 0:
			var lists [][]uint32
			for _, v := range set {
				if l := values[v]; len(l) > 0 {
					lists = append(lists, l)
				}
			}
			return unite(lists)
		}
	} else if m.Type == labels.MatchNotEqual {
		return values[m.Value]
	}
	var lists [][]uint32
	for v, l := range values {
		if m.Matches(v) == want {
			lists = append(lists, l)
		}
	}
	return unite(lists)
}

// unite merges ascending lists that have nothing in common two by two, as the
// postings of the values of one label.
func unite(lists [][]uint32) []uint32 {
	switch len(lists) {
	case 0:
		return nil
	case 1:
		return lists[0]
	}
	n := 0
	for _, l := range lists {
		n += len(l)
	}
	out := make([]uint32, 0, n)
	for _, l := range lists {
		out = append(out, l...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func intersect(a, b []uint32) []uint32 {
	if len(a) > len(b) {
		a, b = b, a
	}
	out := make([]uint32, 0, len(a))
	for _, x := range a {
		i, found := gallop(b, x)
		if found {
			out = append(out, x)
		}
		b = b[i:]
	}
	return out
}

func subtract(a, b []uint32) []uint32 {
	out := make([]uint32, 0, len(a))
	for _, x := range a {
		i, found := gallop(b, x)
		if !found {
			out = append(out, x)
		}
		b = b[i:]
	}
	return out
}

// gallop finds x in the ascending list b, looking near its start first.
func gallop(b []uint32, x uint32) (int, bool) {
	step := 1
	for step < len(b) && b[step] < x {
		step *= 2
	}
	lo, hi := step/2, min(step+1, len(b))
	i, found := slices.BinarySearch(b[lo:hi], x)
	return lo + i, found
}

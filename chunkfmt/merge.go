package chunkfmt

import (
	"bytes"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/value"
)

// Merge makes one series of runs of samples of the same series that may overlap
// in time and repeat each other: copies from replicas, samples that were sent
// again, late ones. Labels and metadata are taken from the first run that has
// them, exemplars are put together.
//
// Where runs disagree about a timestamp, one total order decides, so that
// merging gives the same result in any order, any number of times: a sample
// beats a staleness marker, a histogram beats a float (one with float counts
// beats one with integer counts), then the greater bits win; counter-reset hints
// don't count. Of equal samples the greater start timestamp is kept.
//
// A counter-reset hint speaks of the sample before in its own run: it is made
// unknown where the result has another one there. Columns of a single run are
// returned as they are, not copied.
func Merge(runs ...*Series) *Series {
	if len(runs) == 1 {
		return runs[0]
	}
	out := &Series{}
	var floats, ints, fhs int // runs that have some
	for _, r := range runs {
		if out.Labels.IsEmpty() {
			out.Labels = r.Labels
		}
		if out.Metadata.IsEmpty() {
			out.Metadata, out.Family = r.Metadata, r.Family
		}
		floats += min(1, len(r.Floats.T))
		ints += min(1, len(r.Histograms.T))
		fhs += min(1, len(r.FloatHistograms.T))
	}
	if floats > 0 {
		cs := make([]column[float64], 0, floats)
		for _, r := range runs {
			if len(r.Floats.T) > 0 {
				cs = append(cs, column[float64]{r.Floats.T, r.Floats.ST, r.Floats.V})
			}
		}
		c := mergeColumns(cs, CompareFloats, nil)
		out.Floats = Floats{c.t, c.st, c.v}
	}
	if ints > 0 {
		cs := make([]column[*histogram.Histogram], 0, ints)
		for _, r := range runs {
			if len(r.Histograms.T) > 0 {
				cs = append(cs, column[*histogram.Histogram]{r.Histograms.T, r.Histograms.ST, r.Histograms.H})
			}
		}
		c := mergeColumns(cs, CompareHistograms, withoutHint)
		out.Histograms = Histograms{c.t, c.st, c.v}
	}
	if fhs > 0 {
		cs := make([]column[*histogram.FloatHistogram], 0, fhs)
		for _, r := range runs {
			if len(r.FloatHistograms.T) > 0 {
				cs = append(cs, column[*histogram.FloatHistogram]{r.FloatHistograms.T, r.FloatHistograms.ST, r.FloatHistograms.H})
			}
		}
		c := mergeColumns(cs, CompareFloatHistograms, withoutFloatHint)
		out.FloatHistograms = FloatHistograms{c.t, c.st, c.v}
	}
	if min(1, floats)+min(1, ints)+min(1, fhs) > 1 {
		dropped := dropAcrossKinds(out)
		if dropped || ints > 0 && fhs > 0 {
			// Rare: no need to find out which hints still hold.
			out.Histograms.H = each(out.Histograms.H, withoutHint)
			out.FloatHistograms.H = each(out.FloatHistograms.H, withoutFloatHint)
		}
	}
	for _, r := range runs {
		out.Exemplars = append(out.Exemplars, r.Exemplars...)
	}
	if len(out.Exemplars) > 1 {
		slices.SortStableFunc(out.Exemplars, CompareExemplars)
		out.Exemplars = slices.CompactFunc(out.Exemplars, func(a, b Exemplar) bool { return CompareExemplars(a, b) == 0 })
	}
	return out
}

// CompareFloats orders two floats of one timestamp: positive if a beats b.
func CompareFloats(a, b float64) int {
	if as, bs := value.IsStaleNaN(a), value.IsStaleNaN(b); as != bs {
		return wins(bs)
	}
	x, y := math.Float64bits(a), math.Float64bits(b)
	switch {
	case x > y:
		return 1
	case x < y:
		return -1
	}
	return 0
}

func wins(yes bool) int {
	if yes {
		return 1
	}
	return -1
}

// CompareHistograms orders two histograms of one timestamp: positive if a beats
// b. Counter-reset hints don't count.
func CompareHistograms(a, b *histogram.Histogram) int {
	if as, bs := value.IsStaleNaN(a.Sum), value.IsStaleNaN(b.Sum); as != bs {
		return wins(bs)
	}
	return bytes.Compare(AppendHistogram(nil, withoutHint(a)), AppendHistogram(nil, withoutHint(b)))
}

// CompareFloatHistograms is CompareHistograms for float counts.
func CompareFloatHistograms(a, b *histogram.FloatHistogram) int {
	if as, bs := value.IsStaleNaN(a.Sum), value.IsStaleNaN(b.Sum); as != bs {
		return wins(bs)
	}
	return bytes.Compare(AppendFloatHistogram(nil, withoutFloatHint(a)), AppendFloatHistogram(nil, withoutFloatHint(b)))
}

// withoutHint gives h with an unknown counter-reset hint. It copies only the
// top of the histogram, its spans and buckets are shared.
func withoutHint(h *histogram.Histogram) *histogram.Histogram {
	if h.CounterResetHint == histogram.UnknownCounterReset || h.CounterResetHint == histogram.GaugeType {
		return h
	}
	c := *h
	c.CounterResetHint = histogram.UnknownCounterReset
	return &c
}

func withoutFloatHint(h *histogram.FloatHistogram) *histogram.FloatHistogram {
	if h.CounterResetHint == histogram.UnknownCounterReset || h.CounterResetHint == histogram.GaugeType {
		return h
	}
	c := *h
	c.CounterResetHint = histogram.UnknownCounterReset
	return &c
}

// each gives the results of fn in new memory.
func each[V any](vs []V, fn func(V) V) []V {
	if len(vs) == 0 {
		return vs
	}
	out := make([]V, len(vs))
	for i, v := range vs {
		out[i] = fn(v)
	}
	return out
}

// column is one kind of samples of one run.
type column[V any] struct {
	t, st []int64
	v     []V
}

func (c *column[V]) start(i int) int64 {
	if c.st == nil {
		return 0
	}
	return c.st[i]
}

// mergeColumns merges runs that each ascend strictly in t. Values that get
// another one before them than they had in their run go through moved, unless
// that is nil.
func mergeColumns[V any](cs []column[V], compare func(a, b V) int, moved func(V) V) column[V] {
	if len(cs) == 1 {
		return cs[0]
	}
	slices.SortStableFunc(cs, func(a, b column[V]) int {
		switch {
		case a.t[0] < b.t[0]:
			return -1
		case a.t[0] > b.t[0]:
			return 1
		}
		return 0
	})
	// Pairwise, so that the usual case, one run after the other or a few late
	// samples beside a long run, is copied in pieces.
	out := cs[0]
	for _, c := range cs[1:] {
		out = mergeTwo(out, c, compare, moved)
	}
	return out
}

func mergeTwo[V any](a, b column[V], compare func(a, b V) int, moved func(V) V) column[V] {
	n := len(a.t) + len(b.t)
	out := column[V]{t: make([]int64, 0, n), v: make([]V, 0, n)}
	if a.st != nil || b.st != nil {
		out.st = make([]int64, 0, n)
	}
	// take appends a piece; follows says that what c has before it is what the
	// result has before it.
	take := func(c *column[V], from, to int, follows bool) {
		at := len(out.v)
		out.t = append(out.t, c.t[from:to]...)
		out.v = append(out.v, c.v[from:to]...)
		if moved != nil && !follows && from < to {
			out.v[at] = moved(out.v[at])
		}
		if out.st == nil {
			return
		}
		if c.st != nil {
			out.st = append(out.st, c.st[from:to]...)
			return
		}
		out.st = append(out.st, make([]int64, to-from)...)
	}
	i, j := 0, 0
	// The last of the result is, or is equal to, what stands before i in a, and
	// before j in b.
	inA, inB := true, true
	for i < len(a.t) && j < len(b.t) {
		switch {
		case a.t[i] < b.t[j]:
			k := i + 1
			if a.t[len(a.t)-1] < b.t[j] {
				k = len(a.t)
			} else {
				for a.t[k] < b.t[j] {
					k++
				}
			}
			take(&a, i, k, inA)
			i, inA, inB = k, true, false
		case a.t[i] > b.t[j]:
			k := j + 1
			if b.t[len(b.t)-1] < a.t[i] {
				k = len(b.t)
			} else {
				for b.t[k] < a.t[i] {
					k++
				}
			}
			take(&b, j, k, inB)
			j, inA, inB = k, false, true
		default:
			order := compare(a.v[i], b.v[j])
			equal := order == 0
			if equal {
				switch start := b.start(j) - a.start(i); {
				case start > 0, start == 0 && inB && !inA:
					order = -1
				}
			}
			if order >= 0 {
				take(&a, i, i+1, inA)
				inA, inB = true, equal
			} else {
				take(&b, j, j+1, inB)
				inA, inB = equal, true
			}
			i, j = i+1, j+1
		}
	}
	take(&a, i, len(a.t), inA)
	take(&b, j, len(b.t), inB)
	return out
}

// dropAcrossKinds removes, where samples of several kinds share a timestamp,
// all but the winner. It says whether there was such a timestamp.
func dropAcrossKinds(s *Series) bool {
	f, h, fh := &s.Floats, &s.Histograms, &s.FloatHistograms
	var dropF, dropH, dropFH []int // indexes, ascending
	i, j, k := 0, 0, 0
	for {
		t, n := int64(math.MaxInt64), 0
		for _, c := range []struct {
			t []int64
			i int
		}{{f.T, i}, {h.T, j}, {fh.T, k}} {
			switch {
			case c.i >= len(c.t):
			case n == 0 || c.t[c.i] < t:
				t, n = c.t[c.i], 1
			case c.t[c.i] == t:
				n++
			}
		}
		if n == 0 {
			break
		}
		atF := i < len(f.T) && f.T[i] == t
		atH := j < len(h.T) && h.T[j] == t
		atFH := k < len(fh.T) && fh.T[k] == t
		if n > 1 {
			// Ranks: 0 none, 1 to 3 a staleness marker, 4 to 6 a sample.
			var rf, rh, rfh int
			if atF {
				rf = 1 + live(f.V[i])
			}
			if atH {
				rh = 2 + live(h.H[j].Sum)
			}
			if atFH {
				rfh = 3 + live(fh.H[k].Sum)
			}
			best := max(rf, rh, rfh)
			if atF && rf < best {
				dropF = append(dropF, i)
			}
			if atH && rh < best {
				dropH = append(dropH, j)
			}
			if atFH && rfh < best {
				dropFH = append(dropFH, k)
			}
		}
		if atF {
			i++
		}
		if atH {
			j++
		}
		if atFH {
			k++
		}
	}
	f.T, f.ST, f.V = without(f.T, dropF), without(f.ST, dropF), without(f.V, dropF)
	h.T, h.ST, h.H = without(h.T, dropH), without(h.ST, dropH), without(h.H, dropH)
	fh.T, fh.ST, fh.H = without(fh.T, dropFH), without(fh.ST, dropFH), without(fh.H, dropFH)
	return len(dropF)+len(dropH)+len(dropFH) > 0
}

func live(v float64) int {
	if value.IsStaleNaN(v) {
		return 0
	}
	return 3
}

// without gives s less the elements at the indexes drop, in new memory.
func without[E any](s []E, drop []int) []E {
	if len(drop) == 0 || s == nil {
		return s
	}
	out := make([]E, 0, len(s)-len(drop))
	from := 0
	for _, d := range drop {
		out = append(out, s[from:d]...)
		from = d + 1
	}
	return append(out, s[from:]...)
}

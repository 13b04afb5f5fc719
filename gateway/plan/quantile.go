package plan

import (
	"math"
	"slices"
)

// gathered is how many steps quantiles takes of each series at a time: as many points
// as a line of the processor's cache holds.
const gathered = 8

// quantiles sets v from all: promql's quantile, at each step.
func (g *group) quantiles(phi float64) {
	at := make([]int, len(g.all)) // by column: how many of its points are done
	var values [gathered][]float64
	for s := range values {
		values[s] = make([]float64, 0, len(g.all))
	}
	for from := 0; from < len(g.n); from += gathered {
		end := min(from+gathered, len(g.n))
		for i := range g.all {
			c := &g.all[i]
			if c.step == nil {
				for s := max(from, c.first); s < min(end, c.first+len(c.v)); s++ {
					values[s-from] = append(values[s-from], c.v[s-c.first])
				}
				continue
			}
			for ; at[i] < len(c.step) && int(c.step[at[i]]) < end; at[i]++ {
				s := int(c.step[at[i]]) - from
				values[s] = append(values[s], c.v[at[i]])
			}
		}
		for s := range values {
			if len(values[s]) > 0 {
				g.v[from+s] = quantile(phi, values[s])
				values[s] = values[s][:0]
			}
		}
	}
	g.all = nil
}

// quantile is promql's for phi from 0 to 1, of at least one value. It changes the
// order of values.
func quantile(phi float64, values []float64) float64 {
	rank := phi * float64(len(values)-1)
	lower := math.Floor(rank)
	weight := rank - lower
	k := int(lower)
	nth(values, k)
	if weight == 0 {
		return values[k]
	}
	return values[k]*(1-weight) + slices.Min(values[k+1:])*weight
}

// nth puts that of the values where sorting would put it which comes at k then, all
// before it to its left and all after it to its right (C. A. R. Hoare, Algorithm 65:
// Find, 1961). NaN comes first, as promql sorts.
func nth(values []float64, k int) {
	lo, hi := 0, len(values)
	for i, v := range values {
		if math.IsNaN(v) {
			values[i], values[lo] = values[lo], v
			lo++
		}
	}
	if k < lo {
		return
	}
	const few = 16
	for tries := 64; hi-lo > few && tries > 0; tries-- { // more than that it takes only where pivots are bad
		a, b, c := values[lo], values[lo+(hi-lo)/2], values[hi-1]
		pivot := max(min(a, b), min(max(a, b), c))
		i, j := lo, hi-1
		for i <= j {
			for values[i] < pivot {
				i++
			}
			for values[j] > pivot {
				j--
			}
			if i <= j {
				values[i], values[j] = values[j], values[i]
				i++
				j--
			}
		}
		switch {
		case k <= j:
			hi = j + 1
		case k >= i:
			lo = i
		default:
			return
		}
	}
	slices.Sort(values[lo:hi])
}

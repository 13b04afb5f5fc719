package rollup

import "math"

// Widen appends to dst the windows of a width that windows w, all columns of them,
// make together. The width is a multiple of theirs. What comes out is what Summarise
// would give, but for Sum and M2, which may be rounded otherwise. They are to be
// later than those that dst has.
func Widen(dst, w *Windows, width int64) {
	d, guessed := 0, int64(math.MinInt64)
	var lost []float64
	if len(w.End) == 0 {
		return
	}
	i := dst.grow(possible(w.End, nil, width))
	for from := 0; from < len(w.End); {
		end := EndOf(w.End[from], width)
		if end > guessed {
			guessed = EndOf(end, guessFor)
			d = decimals(w.Sum[from : from+until(w.End[from:], guessed)])
		}
		to := from + 1
		for to < len(w.End) && w.End[to] <= end {
			to++
		}
		lost = dst.combine(i, w, from, to, end, d, lost[:0])
		from = to
		i++
	}
	dst.shrink(i)
}

// combine fills in window i, which the windows from up to, without, to make. Sum and
// Reset have perhaps so many decimals. What was lost in resets is put into lost.
func (w *Windows) combine(i int, of *Windows, from, to int, end int64, decimals int, lost []float64) []float64 {
	w.End[i] = end
	w.FirstT[i], w.PrevT[i], w.LastT[i] = end, end, end
	for j := from; j < to; j++ {
		w.Flags[i] = w.Flags[i]&^Stale | of.Flags[j]
		if of.Count[j] == 0 {
			continue
		}
		if w.Count[i] == 0 {
			w.FirstT[i], w.FirstV[i] = of.FirstT[j], of.FirstV[j]
			w.PrevT[i], w.PrevV[i] = of.PrevT[j], of.PrevV[j]
			w.Min[i], w.Max[i] = of.Min[j], of.Max[j]
		} else {
			last, first := w.LastV[i], of.FirstV[j]
			if first < last {
				w.Resets[i]++
				lost = append(lost, last)
			}
			if differ(last, first) {
				w.Changes[i]++
			}
			if of.Count[j] == 1 {
				w.PrevT[i], w.PrevV[i] = w.LastT[i], last
			} else {
				w.PrevT[i], w.PrevV[i] = of.PrevT[j], of.PrevV[j]
			}
			if x := of.Min[j]; x < w.Min[i] || w.Min[i] != w.Min[i] {
				w.Min[i] = x
			}
			if x := of.Max[j]; x > w.Max[i] || w.Max[i] != w.Max[i] {
				w.Max[i] = x
			}
		}
		w.Count[i] += of.Count[j]
		w.LastT[i], w.LastV[i] = of.LastT[j], of.LastV[j]
		w.Resets[i] += of.Resets[j]
		if of.Reset[j] != 0 {
			lost = append(lost, of.Reset[j])
		}
		w.Changes[i] += of.Changes[j]
	}
	switch {
	case w.Count[i] == 0:
		return lost
	case w.Flags[i]&Huge != 0:
		w.setHuge(i)
		return lost
	}
	w.Sum[i], _ = total(of.Sum[from:to], decimals)
	if len(lost) > 0 {
		w.Reset[i], _ = total(lost, decimals)
	}
	w.M2[i] = shorten(of.moment(from, to, w.Sum[i]/float64(w.Count[i])))
	return lost
}

// differ: changes() counts it.
func differ(a, b float64) bool { return a != b && (a == a || b == b) }

// mean of window i, which has floats. It is exact where all are equal.
func (w *Windows) mean(i int) float64 {
	if w.M2[i] == 0 {
		return w.FirstV[i]
	}
	return w.Sum[i] / float64(w.Count[i])
}

// moment of the floats of several windows, of which there are some, whose mean is
// given (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
// computing sample variances", 1979). It is 0 where all are equal.
func (w *Windows) moment(from, to int, mean float64) float64 {
	squares, equal := 0., true
	ref, some := 0., false
	for i := from; i < to; i++ {
		if w.Count[i] == 0 {
			continue
		}
		m := w.mean(i)
		if !some {
			ref, some = m, true
		}
		equal = equal && m == ref && w.M2[i] == 0
		d := m - mean
		squares += w.M2[i] + float64(w.Count[i])*d*d
	}
	if equal {
		return 0
	}
	return max(squares, math.SmallestNonzeroFloat64)
}

package rollup

import (
	"cmp"
	"math"
	"slices"

	"github.com/prometheus/prometheus/model/value"
)

// Samples are those of a series that windows are made of. All times are in ms, and
// ascend.
type Samples struct {
	T  []int64   // of floats
	ST []int64   // their start timestamps; nil if none has one
	V  []float64 // with staleness markers

	// Times of native histograms: of those that are staleness markers, and of all others.
	StaleHistograms, Histograms []int64
}

// hugeFloat: see Huge.
const hugeFloat = 0x1p480

// Summariser makes windows of samples. It has memory that it uses again, and is
// not for concurrent use. The zero value is ready.
type Summariser struct {
	t      []int64 // floats without staleness markers
	v      []float64
	st     []int64
	events []event
	lost   []float64 // in resets, of one window
	ints   []int64   // that the floats of one window are
}

// event is a sample of which the floats alone tell nothing.
type event struct {
	t     int64
	flags Flags // Stale or NativeHistograms
}

// Summarise appends the windows of a series to dst, all columns of them. They are
// to be later than those that dst has.
func (s *Summariser) Summarise(dst *Windows, samples *Samples, width int64) {
	t, v, st, hasNaN := s.floats(samples)
	s.histograms(samples)
	events := s.events
	d, guessed := 0, int64(math.MinInt64)
	i := dst.Len()
	dst.grow(possible(t, events, width))
	for n := 0; len(t) > 0 || len(events) > 0; i++ {
		var end int64
		if len(events) == 0 || len(t) > 0 && t[0] < events[0].t {
			end = EndOf(t[0], width)
		} else {
			end = EndOf(events[0].t, width)
		}
		if n == 0 || n > len(t) || t[n-1] > end || n < len(t) && t[n] <= end {
			n = until(t, end) // not as many as in the window before
		}
		if n > 0 && end > guessed {
			// For each day anew, so that it doesn't matter which others are made with it.
			guessed = EndOf(end, guessFor)
			d = decimals(v[:until(t, guessed)])
		}
		dst.End[i] = end
		dst.FirstT[i], dst.PrevT[i], dst.LastT[i] = end, end, end
		last := int64(math.MinInt64)
		if n > 0 {
			if !s.integers(dst, i, t[:n], v[:n], d) {
				s.lost = dst.summarise(i, t[:n], v[:n], d, hasNaN, s.lost[:0])
			}
			last = t[n-1]
			if st != nil {
				for _, x := range st[:n] {
					if x != 0 {
						dst.Flags[i] |= StartTimestamps
						break
					}
				}
				st = st[n:]
			}
			t, v = t[n:], v[n:]
		}
		for len(events) > 0 && events[0].t <= end {
			e := events[0]
			dst.Flags[i] |= e.flags & NativeHistograms
			if e.t > last {
				dst.Flags[i] = dst.Flags[i]&^Stale | e.flags&Stale
			}
			events = events[1:]
		}
	}
	dst.shrink(i)
}

// guessFor is for how long, in ms, it is guessed at once how many decimals samples have.
const guessFor = 24 * Long

// possible is how many windows there are at most that hold a sample.
func possible(t []int64, events []event, width int64) int {
	n := len(t) + len(events)
	if n == 0 {
		return 0
	}
	first, last := int64(math.MaxInt64), int64(math.MinInt64)
	if k := len(t); k > 0 {
		first, last = t[0], t[k-1]
	}
	if k := len(events); k > 0 {
		first, last = min(first, events[0].t), max(last, events[k-1].t)
	}
	if span := uint64(last-first) / uint64(width); span < uint64(n) { //nolint:gosec // last isn't before first
		n = min(n, int(span)+2) //nolint:gosec // less than n
	}
	return n
}

// EndOf is the end of the window that a time is in, all in ms.
func EndOf(t, width int64) int64 {
	q := t / width
	if t%width > 0 {
		q++
	}
	return q * width
}

// until is how many of the times, which ascend, aren't later than end.
func until(t []int64, end int64) int {
	// Windows are short: most often the answer is near.
	n := 0
	for step := 1; n+step <= len(t) && t[n+step-1] <= end; step *= 2 {
		n += step
	}
	hi := len(t)
	for lo := n; lo < hi; {
		mid := int(uint(lo+hi) / 2) //nolint:gosec // not negative
		if t[mid] <= end {
			lo = mid + 1
		} else {
			hi = mid
		}
		n = lo
	}
	return n
}

// floats gives the floats without staleness markers, and begins s.events with those. It
// says also whether some of the floats are NaN.
func (s *Summariser) floats(f *Samples) (t []int64, v []float64, st []int64, hasNaN bool) {
	s.events = s.events[:0]
	t, v, st = f.T, f.V, f.ST
	if !someNaN(v) {
		return t, v, st, false
	}
	for i, x := range v {
		if x != x {
			if value.IsStaleNaN(x) {
				s.events = append(s.events, event{t[i], Stale})
			} else {
				hasNaN = true
			}
		}
	}
	if len(s.events) == 0 {
		return t, v, st, true
	}
	s.t, s.v, s.st = s.t[:0], s.v[:0], s.st[:0]
	for i, x := range v {
		if x == x || !value.IsStaleNaN(x) {
			s.t, s.v = append(s.t, t[i]), append(s.v, x)
			if st != nil {
				s.st = append(s.st, st[i])
			}
		}
	}
	if st == nil {
		return s.t, s.v, nil, hasNaN
	}
	return s.t, s.v, s.st, hasNaN
}

// someNaN says whether there is a NaN.
func someNaN(v []float64) bool {
	const magnitude, inf = 1<<63 - 1, 0x7ff << 52
	var over uint64 // its upper bit: there was one
	for len(v) >= 4 {
		x := (*[4]float64)(v)
		over |= (inf - math.Float64bits(x[0])&magnitude) | (inf - math.Float64bits(x[1])&magnitude)
		over |= (inf - math.Float64bits(x[2])&magnitude) | (inf - math.Float64bits(x[3])&magnitude)
		v = v[4:]
	}
	for _, x := range v {
		over |= inf - math.Float64bits(x)&magnitude
	}
	return over>>63 != 0
}

// histograms puts them among the events.
func (s *Summariser) histograms(samples *Samples) {
	for _, t := range samples.StaleHistograms {
		s.events = append(s.events, event{t, Stale})
	}
	for _, t := range samples.Histograms {
		s.events = append(s.events, event{t, NativeHistograms})
	}
	if len(samples.StaleHistograms)+len(samples.Histograms) > 0 {
		slices.SortFunc(s.events, func(a, b event) int { return cmp.Compare(a.t, b.t) })
	}
}

// ends fills in the first and the last floats of window i, which has at least one.
func (w *Windows) ends(i int, t []int64, v []float64) {
	n := len(v)
	prev := max(0, n-2)
	w.Count[i] = uint32(n) //nolint:gosec // a window has fewer milliseconds
	w.FirstT[i], w.FirstV[i] = t[0], v[0]
	w.PrevT[i], w.PrevV[i] = t[prev], v[prev]
	w.LastT[i], w.LastV[i] = t[n-1], v[n-1]
}

// summarise fills in window i, of at least one float, with decimals as decimals
// gives them. The flags that it knows of are added. What was lost in resets is put
// into lost, which is empty. Without hasNaN there is no NaN.
func (w *Windows) summarise(i int, t []int64, v []float64, decimals int, hasNaN bool, lost []float64) []float64 {
	n := len(v)
	w.ends(i, t, v)
	before, least, greatest := v[0], v[0], v[0]
	changes := uint32(0)
	if hasNaN {
		for _, x := range v[1:] {
			if x < before {
				lost = append(lost, before)
			}
			if x != before && (x == x || before == before) {
				changes++
			}
			if x < least || least != least {
				least = x
			}
			if x > greatest || greatest != greatest {
				greatest = x
			}
			before = x
		}
	} else {
		// Whether it falls can't be foreseen where it does now and then: no branch is to
		// depend on that.
		lost = slices.Grow(lost, n)[:n]
		k := 0
		for _, x := range v[1:] {
			if x != before {
				lost[k] = before
				if x < before {
					k++
				}
				changes++
				if x < least {
					least = x
				}
				if x > greatest {
					greatest = x
				}
			}
			before = x
		}
		lost = lost[:k]
	}
	w.Min[i], w.Max[i], w.Changes[i] = least, greatest, changes
	w.Resets[i] = uint32(len(lost)) //nolint:gosec // fewer than there are floats
	if !(least > -hugeFloat && greatest < hugeFloat) && hasHuge(v) {
		w.setHuge(i)
		return lost
	}
	if len(lost) > 0 {
		w.Reset[i], _ = total(lost, decimals)
	}
	if changes == 0 && least-least == 0 {
		w.Sum[i] = times(v, decimals)
		return lost
	}
	sum, rest := total(v, decimals)
	w.Sum[i], w.M2[i] = sum, moment(v, sum, rest)
	return lost
}

func (w *Windows) setHuge(i int) {
	w.Flags[i] |= Huge
	w.Sum[i], w.Reset[i], w.M2[i] = math.NaN(), math.NaN(), math.NaN()
}

func hasHuge(v []float64) bool {
	for _, x := range v {
		if a := math.Abs(x); a >= hugeFloat && a <= math.MaxFloat64 {
			return true
		}
	}
	return false
}

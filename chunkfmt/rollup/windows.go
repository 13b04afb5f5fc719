package rollup

import "slices"

// Widths of the windows that are stored, in ms.
const (
	Short int64 = 5 * 60 * 1000
	Long  int64 = 60 * 60 * 1000
)

// Windows are summaries of the windows of one series, all of one width: of those
// that hold a sample of any kind, ascending in End. The window of an End is
// (End-width, End], and End is a multiple of the width.
//
// The columns are of one length, but for those that weren't read, which are nil:
// End, Count and Flags are always there. They speak of the window's floats, without
// staleness markers; NaN and ±Inf are floats as any other. FirstV, PrevV, LastV,
// Min and Max are samples, bit for bit.
//
// In a window without floats the times are End, and all else is zero. A window of
// one float has it as first, last but one, and last.
type Windows struct {
	End   []int64 // ms since the epoch
	Count []uint32
	Flags []Flags

	FirstT []int64 // ms
	FirstV []float64
	PrevT  []int64 // the last float but one
	PrevV  []float64
	LastT  []int64
	LastV  []float64

	// Sum is exact if the samples are decimals with few digits, otherwise computed
	// with compensation and rounded once. It is NaN if there is a NaN, or infinities
	// of both signs.
	Sum []float64
	// Min and Max are NaN only if all floats are; of equal ones (0 and -0) the first.
	Min, Max []float64
	// Resets counts the floats that are less than the one before, in the window; Reset
	// is the sum of those before, as exact as Sum: what a counter lost. Nothing is less
	// than NaN.
	Resets []uint32
	Reset  []float64
	// Changes counts the floats that differ from the one before, in the window. All
	// NaN are alike.
	Changes []uint32
	// M2 is the sum of the squares of the differences to the mean, which is Sum/Count,
	// rounded to 40 bits; 0 only if all are equal,
	// NaN if there is a NaN or an infinity. Stored for Long alone.
	M2 []float64

	// Even, if there are any, stand for the columns of times, which are empty until Expand: End, Count, Flags, FirstT,
	// PrevT and LastT.
	Even []Even
}

// Flags of a window.
type Flags uint8

const (
	// Stale says that the last sample, of any kind, is a staleness marker.
	Stale Flags = 1 << iota
	// NativeHistograms says that there is one that is no staleness marker. The columns speak of
	// the floats beside it; no function may do without the samples.
	NativeHistograms
	// StartTimestamps says that a float has one. Functions that look at them need the samples.
	StartTimestamps
	// Huge says that a float, not infinite, has a magnitude of 2^480 or more. Sums may then
	// overflow in one order and not in another: Sum, Reset and M2 are NaN, and functions
	// that use them need the samples.
	Huge

	allFlags = Stale | NativeHistograms | StartTimestamps | Huge
)

// Valid reports whether the flags are such as this package knows.
func (f Flags) Valid() bool { return f&^allFlags == 0 }

// Columns names columns of Windows: what of them is read or written. End, Count and
// Flags always are.
type Columns uint16

// The columns, those that are used together under one name.
const (
	First   Columns = 1 << iota // FirstT and FirstV
	Prev                        // PrevT and PrevV
	Last                        // LastT and LastV
	Sum                         // Sum
	Min                         // Min
	Max                         // Max
	Reset                       // Reset
	Resets                      // Resets
	Changes                     // Changes
	M2                          // M2

	// AllColumns are those of windows that Summarise and Widen have made.
	AllColumns = First | Prev | Last | Sum | Min | Max | Reset | Resets | Changes | M2
)

// Len is the number of windows.
func (w *Windows) Len() int {
	if n := len(w.Even); n > 0 {
		return w.Even[n-1].At + w.Even[n-1].N
	}
	return len(w.End)
}

// Columns that are there.
func (w *Windows) Columns() Columns {
	var c Columns
	for _, x := range []struct {
		is  bool
		col Columns
	}{
		{w.FirstT != nil, First},
		{w.PrevT != nil, Prev},
		{w.LastT != nil, Last},
		{w.Sum != nil, Sum},
		{w.Min != nil, Min},
		{w.Max != nil, Max},
		{w.Reset != nil, Reset},
		{w.Resets != nil, Resets},
		{w.Changes != nil, Changes},
		{w.M2 != nil, M2},
	} {
		if x.is {
			c |= x.col
		}
	}
	return c
}

// Clear removes all windows, and keeps the memory.
func (w *Windows) Clear() {
	*w = Windows{
		End: w.End[:0], Count: w.Count[:0], Flags: w.Flags[:0],
		FirstT: w.FirstT[:0], FirstV: w.FirstV[:0], PrevT: w.PrevT[:0], PrevV: w.PrevV[:0],
		LastT: w.LastT[:0], LastV: w.LastV[:0],
		Sum: w.Sum[:0], Min: w.Min[:0], Max: w.Max[:0],
		Resets: w.Resets[:0], Reset: w.Reset[:0], Changes: w.Changes[:0], M2: w.M2[:0],
		Even: w.Even[:0],
	}
}

// Append puts the windows from i up to, without, j of from behind those of w: their
// columns cols, which from has; End, Count and Flags in any case. Of both, it makes columns of Even if
// they don't both have them.
func (w *Windows) Append(from *Windows, i, j int, cols Columns) {
	if len(from.Even) > 0 && len(w.End) == 0 {
		w.appendEven(from, i, j)
	} else {
		w.Expand(cols)
		from.Expand(cols)
		w.appendTimes(from, i, j, cols)
	}
	if cols&First != 0 {
		w.FirstV = append(w.FirstV, from.FirstV[i:j]...)
	}
	if cols&Prev != 0 {
		w.PrevV = append(w.PrevV, from.PrevV[i:j]...)
	}
	if cols&Last != 0 {
		w.LastV = append(w.LastV, from.LastV[i:j]...)
	}
	if cols&Sum != 0 {
		w.Sum = append(w.Sum, from.Sum[i:j]...)
	}
	if cols&Min != 0 {
		w.Min = append(w.Min, from.Min[i:j]...)
	}
	if cols&Max != 0 {
		w.Max = append(w.Max, from.Max[i:j]...)
	}
	if cols&Reset != 0 {
		w.Reset = append(w.Reset, from.Reset[i:j]...)
	}
	if cols&Resets != 0 {
		w.Resets = append(w.Resets, from.Resets[i:j]...)
	}
	if cols&Changes != 0 {
		w.Changes = append(w.Changes, from.Changes[i:j]...)
	}
	if cols&M2 != 0 {
		w.M2 = append(w.M2, from.M2[i:j]...)
	}
}

// appendTimes is Append of the columns of times.
func (w *Windows) appendTimes(from *Windows, i, j int, cols Columns) {
	w.End = append(w.End, from.End[i:j]...)
	w.Count = append(w.Count, from.Count[i:j]...)
	w.Flags = append(w.Flags, from.Flags[i:j]...)
	if cols&First != 0 {
		w.FirstT = append(w.FirstT, from.FirstT[i:j]...)
	}
	if cols&Prev != 0 {
		w.PrevT = append(w.PrevT, from.PrevT[i:j]...)
	}
	if cols&Last != 0 {
		w.LastT = append(w.LastT, from.LastT[i:j]...)
	}
}

// Slice gives the windows from i up to, without, j, all columns of them. They share the
// memory of w, which has no Even.
func (w *Windows) Slice(i, j int) Windows {
	return Windows{
		End: w.End[i:j], Count: w.Count[i:j], Flags: w.Flags[i:j],
		FirstT: w.FirstT[i:j], FirstV: w.FirstV[i:j], PrevT: w.PrevT[i:j], PrevV: w.PrevV[i:j],
		LastT: w.LastT[i:j], LastV: w.LastV[i:j],
		Sum: w.Sum[i:j], Min: w.Min[i:j], Max: w.Max[i:j],
		Resets: w.Resets[i:j], Reset: w.Reset[i:j], Changes: w.Changes[i:j], M2: w.M2[i:j],
	}
}

// grow adds n windows that are all zero, and gives the index of the first.
func (w *Windows) grow(n int) int {
	at := len(w.End)
	w.End, w.Count, w.Flags = more(w.End, n), more(w.Count, n), more(w.Flags, n)
	w.FirstT, w.FirstV = more(w.FirstT, n), more(w.FirstV, n)
	w.PrevT, w.PrevV = more(w.PrevT, n), more(w.PrevV, n)
	w.LastT, w.LastV = more(w.LastT, n), more(w.LastV, n)
	w.Sum, w.Min, w.Max = more(w.Sum, n), more(w.Min, n), more(w.Max, n)
	w.Resets, w.Reset, w.Changes, w.M2 = more(w.Resets, n), more(w.Reset, n), more(w.Changes, n), more(w.M2, n)
	return at
}

// shrink leaves the first n windows.
func (w *Windows) shrink(n int) {
	w.End, w.Count, w.Flags = w.End[:n], w.Count[:n], w.Flags[:n]
	w.FirstT, w.FirstV = w.FirstT[:n], w.FirstV[:n]
	w.PrevT, w.PrevV = w.PrevT[:n], w.PrevV[:n]
	w.LastT, w.LastV = w.LastT[:n], w.LastV[:n]
	w.Sum, w.Min, w.Max = w.Sum[:n], w.Min[:n], w.Max[:n]
	w.Resets, w.Reset, w.Changes, w.M2 = w.Resets[:n], w.Reset[:n], w.Changes[:n], w.M2[:n]
}

func more[E any](s []E, n int) []E {
	at := len(s)
	s = slices.Grow(s, n)[:at+n]
	clear(s[at:])
	return s
}

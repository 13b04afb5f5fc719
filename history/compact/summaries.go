package compact

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/prometheus/prometheus/model/value"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// Windows of what is merged are those of a source where it alone has a series, and made
// anew of the merged samples elsewhere. Those whose samples are gone can't be made anew:
// of such windows of an hour, of several sources and of the samples that some have, that
// one counts alone which tells of most floats, for it is what the others are parts of, if
// they are. Then samples that are past their retention are dropped, and their windows
// stay.

// summariser makes the windows of one series after the other.
type summariser struct {
	dec chunkfmt.WindowDecoder
	sum rollup.Summariser
	of  [2]windowsOf // of the short windows, and of the long ones
	out chunkfmt.Summaries
}

// windowsOf has memory for the windows of one width.
type windowsOf struct {
	stored, made, all, scratch rollup.Windows
}

// stretch is a run of whole windows of a source.
type stretch struct {
	chunkfmt.Range
	of *source
}

// windows of what a source has of the present series: nil if there are none.
func (s *source) windows(width int64) []chunkfmt.Chunk {
	return s.series.Windows(s.next-1, width, s.mint, s.maxt)
}

// summaries makes the windows of the present series, of which out has all samples, and
// takes out of it what is past its retention. What it returns is good until the next call.
func (m *merger) summaries(ctx context.Context, out *chunkfmt.Series) (*chunkfmt.Summaries, error) {
	x := &m.sums
	x.out = chunkfmt.Summaries{}
	gone := slices.ContainsFunc(m.equal, func(s *source) bool { return s.entry.Gone != nil })
	before, drops := int64(math.MinInt64), false
	if m.drop != nil {
		before, drops = m.drop.Before.Raw, m.drop.Before.Summaries()
	}
	if mint, _ := times(out); !gone && (!drops || mint >= before) {
		drops = false
		if len(out.Histograms.T)+len(out.FloatHistograms.T) > 0 {
			return &x.out, nil // no function could do without the samples
		}
	}
	var deleted []chunkfmt.Range
	if m.drop != nil {
		deleted = m.drop.OfAll(out.Labels)
	}
	kept, all, err := m.kept(ctx, gone, out)
	if err != nil {
		return nil, err
	}
	history.Cut(out, all)
	samples := out.Samples()
	var beside []chunkfmt.Range // the short windows that were made
	for i, width := range []int64{rollup.Short, rollup.Long} {
		of := &x.of[i]
		covered, err := m.stored(ctx, of, width, kept, all, deleted)
		if err != nil {
			return nil, err
		}
		of.made.Clear()
		switch {
		case width == rollup.Short:
			beside = covered
			eachOutside(samples, covered, func(part *rollup.Samples) { x.sum.Summarise(&of.made, part, width) })
		case slices.Equal(beside, covered):
			rollup.Widen(&of.made, &x.of[0].made, width) // as chunkfmt.Writer does
		default:
			eachOutside(samples, covered, func(part *rollup.Samples) {
				of.scratch.Clear()
				x.sum.Summarise(&of.scratch, part, rollup.Short)
				rollup.Widen(&of.made, &of.scratch, width)
			})
		}
		w := together(of)
		if drops || gone {
			w = m.retain(of, w, width, all, before)
		}
		if width == rollup.Short {
			x.out.Short = *w
		} else {
			x.out.Long = *w
		}
	}
	if drops {
		history.Cut(out, []chunkfmt.Range{{MinT: math.MinInt64, MaxT: before - 1}})
		all = history.Union(all, []chunkfmt.Range{{MinT: m.mint, MaxT: before - 1}})
	}
	for _, g := range all {
		if has(&x.out.Short, g) || has(&x.out.Long, g) {
			x.out.Gone = append(x.out.Gone, g)
		}
	}
	return &x.out, nil
}

// has says whether a window ends in a range.
func has(w *rollup.Windows, r chunkfmt.Range) bool {
	i := sort.Search(w.Len(), func(i int) bool { return w.End[i] >= r.MinT })
	return i < w.Len() && w.End[i] <= r.MaxT
}

// widenTo makes ranges such of whole windows, and puts those together that touch.
func widenTo(rs []chunkfmt.Range, width int64) []chunkfmt.Range {
	out := make([]chunkfmt.Range, len(rs))
	for i, r := range rs {
		if r.MinT > math.MinInt64+2*width {
			r.MinT = rollup.EndOf(r.MinT, width) - width + 1
		}
		if r.MaxT < math.MaxInt64-2*width {
			r.MaxT = rollup.EndOf(r.MaxT, width)
		}
		out[i] = r
	}
	return history.Union(out, nil)
}

// kept gives for each source that has some the hours whose samples are gone, and that
// count; and all of them together.
func (m *merger) kept(ctx context.Context, gone bool, out *chunkfmt.Series) (of map[*source][]chunkfmt.Range, all []chunkfmt.Range, err error) {
	if !gone {
		return nil, nil, nil
	}
	type claim struct {
		floats int64
		of     *source // nil: the samples
	}
	claims := map[int64]claim{} // by the end of the hour
	w := &m.sums.of[1].scratch
	for _, s := range m.equal {
		for _, width := range []int64{rollup.Long, rollup.Short} {
			// Of short ones only where there are no long ones, which nobody writes.
			hours := map[int64]int64{}
			for _, g := range widenTo(s.entry.Gone, width) {
				w.Clear()
				if err := m.decode(ctx, s, width, g, w); err != nil {
					return nil, nil, err
				}
				for i, end := range w.End {
					hours[rollup.EndOf(end, rollup.Long)] += int64(w.Count[i])
				}
			}
			for end, n := range hours {
				c, ok := claims[end]
				if !ok || c.of != s && (n > c.floats || n == c.floats && s.block.Block.Compare(c.of.block.Block) < 0) {
					claims[end] = claim{n, s}
				}
			}
		}
	}
	have := map[int64]int64{}
	for i, t := range out.Floats.T {
		if !value.IsStaleNaN(out.Floats.V[i]) {
			have[rollup.EndOf(t, rollup.Long)]++
		}
	}
	of = map[*source][]chunkfmt.Range{}
	for end, c := range claims {
		if n, some := have[end]; !some || n < c.floats {
			r := chunkfmt.Range{MinT: end - rollup.Long + 1, MaxT: end}
			of[c.of], all = append(of[c.of], r), append(all, r)
		}
	}
	for s, rs := range of {
		of[s] = history.Union(rs, nil)
	}
	return of, history.Union(all, nil), nil
}

// stored decodes the windows of sources that stay as they are, and gives the time that
// they cover.
func (m *merger) stored(ctx context.Context, of *windowsOf, width int64, kept map[*source][]chunkfmt.Range, all, deleted []chunkfmt.Range) (covered []chunkfmt.Range, err error) {
	of.stored.Clear()
	void := widenTo(deleted, width)
	var from []stretch
	var before int64 = math.MinInt64 // the end of those so far, as they are sorted by their starts
	for i, s := range m.equal {
		var rs []chunkfmt.Range
		if len(s.entry.Chunks) > 0 {
			mint, maxt := s.span()
			r := widenTo([]chunkfmt.Range{{MinT: mint, MaxT: maxt}}, rollup.Long)[0]
			alone := r.MinT > before
			before = max(before, r.MaxT)
			for _, o := range m.equal[i+1:] {
				if len(o.entry.Chunks) > 0 {
					next, _ := o.span()
					alone = alone && next > r.MaxT
					break
				}
			}
			if cs := s.windows(width); alone && len(cs) > 0 {
				rs = []chunkfmt.Range{{MinT: max(cs[0].MinT, r.MinT), MaxT: min(cs[len(cs)-1].MaxT, r.MaxT)}}
				rs = history.Without(rs, all)
			}
		}
		rs = history.Union(rs, kept[s])
		if len(void) > 0 {
			rs = history.Without(rs, void)
		}
		for _, r := range rs {
			from = append(from, stretch{r, s})
		}
	}
	slices.SortFunc(from, func(a, b stretch) int { return cmp.Compare(a.MinT, b.MinT) })
	for _, r := range from {
		if err := m.decode(ctx, r.of, width, r.Range, &of.stored); err != nil {
			return nil, err
		}
		covered = append(covered, r.Range)
	}
	// Where windows are gone, so are samples, whether a window is left or not.
	return history.Union(covered, all), nil
}

// decode appends the windows of a source that end in a range.
func (m *merger) decode(ctx context.Context, s *source, width int64, in chunkfmt.Range, into *rollup.Windows) error {
	for _, c := range s.windows(width) {
		if !c.Overlaps(in.MinT, in.MaxT) {
			continue
		}
		p, err := s.windowPage(ctx, width, c.Page)
		if err != nil {
			return err
		}
		fail := func(format string, args ...any) error {
			return s.error(windowsPage, c.Page, fmt.Errorf("chunk %d: %w", c.Index, corrupt(format, args...)))
		}
		if p.Width() != width || p.Windows(c.Index) != c.Samples || c.Samples == 0 {
			return fail("it has %d windows of %d ms, its series page says %d of %d", p.Windows(c.Index), p.Width(), c.Samples, width)
		}
		n := into.Len()
		if err := m.sums.dec.Decode(p, c.Index, rollup.AllColumns&^without(width), into); err != nil {
			return s.error(windowsPage, c.Page, err)
		}
		if width == rollup.Short { // they have none
			into.M2 = append(into.M2, make([]float64, into.Len()-n)...)
		}
		end := into.End[n:]
		if end[0]-width+1 != c.MinT || end[len(end)-1] != c.MaxT {
			return fail("its windows span %d to %d, its series page says %d to %d", end[0]-width+1, end[len(end)-1], c.MinT, c.MaxT)
		}
		from := sort.Search(len(end), func(i int) bool { return end[i] >= in.MinT })
		to := sort.Search(len(end), func(i int) bool { return end[i] > in.MaxT })
		if from > 0 || to < len(end) {
			part := into.Slice(n+from, n+max(from, to))
			*into = into.Slice(0, n)
			into.Append(&part, 0, part.Len(), rollup.AllColumns)
		}
		if n > 0 && into.Len() > n && into.End[n-1] >= into.End[n] {
			return fail("it starts before the chunk before it ends")
		}
	}
	return nil
}

// without are the columns that windows of a width don't have.
func without(width int64) rollup.Columns {
	if width == rollup.Short {
		return rollup.M2
	}
	return 0
}

// eachOutside calls fn with the samples that lie between ranges, or beside them, which
// ascend and are apart.
func eachOutside(s *rollup.Samples, ranges []chunkfmt.Range, fn func(*rollup.Samples)) {
	from := int64(math.MinInt64)
	part := func(maxt int64) {
		cut := func(t []int64) []int64 {
			i, j := find(t, from, maxt)
			return t[i:j]
		}
		i, j := find(s.T, from, maxt)
		out := &rollup.Samples{T: s.T[i:j], V: s.V[i:j], StaleHistograms: cut(s.StaleHistograms), Histograms: cut(s.Histograms)}
		if s.ST != nil {
			out.ST = s.ST[i:j]
		}
		if len(out.T)+len(out.StaleHistograms)+len(out.Histograms) > 0 {
			fn(out)
		}
	}
	for _, r := range ranges {
		if r.MinT > from {
			part(r.MinT - 1)
		}
		if r.MaxT == math.MaxInt64 {
			return
		}
		from = r.MaxT + 1
	}
	part(math.MaxInt64)
}

// together puts the windows that were stored and those that were made in order.
func together(of *windowsOf) *rollup.Windows {
	a, b := &of.stored, &of.made
	switch {
	case a.Len() == 0:
		return b
	case b.Len() == 0:
		return a
	}
	of.all.Clear()
	for i, j := 0, 0; i < a.Len() || j < b.Len(); {
		from := i
		for i < a.Len() && (j == b.Len() || a.End[i] < b.End[j]) {
			i++
		}
		of.all.Append(a, from, i, rollup.AllColumns)
		from = j
		for j < b.Len() && (i == a.Len() || b.End[j] <= a.End[i]) {
			j++
		}
		of.all.Append(b, from, j, rollup.AllColumns)
	}
	return &of.all
}

// retain leaves out windows that are past their retention, and such that tell of native
// histograms and are, or will be, without samples.
func (m *merger) retain(of *windowsOf, w *rollup.Windows, width int64, gone []chunkfmt.Range, before int64) *rollup.Windows {
	own := int64(math.MinInt64)
	if m.drop != nil {
		own = m.drop.Before.Of(width)
	}
	of.scratch.Clear()
	for i, end := range w.End {
		if end < own || w.Flags[i]&rollup.NativeHistograms != 0 && (end < before || history.Covers(gone, end, end)) {
			continue
		}
		of.scratch.Append(w, i, i+1, rollup.AllColumns)
	}
	return &of.scratch
}

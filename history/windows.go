package history

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// Summaries are what SelectWindows reads in place of samples.
type Summaries struct {
	Width   int64 // of windows, in ms: rollup.Short or rollup.Long
	Columns rollup.Columns
	// Rest, if not 0, says that PrevV isn't looked at for windows whose last float but one
	// is so many ms before their end, or more.
	Rest int64
	// Elsewhere gives ranges of time in which others than blocks may have samples of
	// a series: in a window that one of them touches, samples are read. nil: there are
	// none.
	Elsewhere func(labels.Labels) []chunkfmt.Range
}

// piece is a run of whole windows that are read from one part.
type piece struct {
	chunkfmt.Range
	part int
}

// SelectWindows is Select, where summaries of windows stand for samples as far as
// may be: Series.Windows gives those, Series.Runs the samples of the rest of the
// time.
//
// A window is given if a single block alone has chunks of the series in it, nothing
// of it is hidden, and nobody else has samples there. One whose samples are gone is
// given in any case, and what others have in that hour doesn't count. Windows that end behind maxt
// are not; the first may begin before mint: of what it says, only that is to be used
// which is about the time from mint on, for what others have of it before isn't looked
// for.
func (s *Snapshot) SelectWindows(ctx context.Context, ms []*labels.Matcher, mint, maxt int64, of Summaries) (*SeriesSet, error) {
	var set *SeriesSet
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		set = &SeriesSet{s: s, gone: math.MinInt64}
		var sets labelSets
		var found []foundWindows
		gone := false
		lo, hi := max(mint, s.MinT), min(maxt, s.MaxT)
		held := tally{s: s}
		defer held.release()
		err := s.seriesPages(ctx, bs, ms, mint, maxt, 0, func(i int, p *chunkfmt.SeriesPage, from, to int64) {
			before := set.index
			defer func() { held.add(set.index - before) }()
			f := foundWindows{block: bs[i], entries: p.SelectWindows(ms, from, to, of.Width)}
			f.series = make([]*Series, len(f.entries))
			found = append(found, f)
			for k := range f.entries {
				e := &f.entries[k]
				if len(bs[i].Ranges) > 1 && !bs[i].holds(&chunkfmt.Entry{Chunks: e.Chunks(from, to), Gone: e.Gone}, from, to) {
					continue
				}
				hidden := s.Hidden.OfWindows(e.Labels, of.Width)
				if covers(hidden, max(from, e.Times.MinT), min(to, e.Times.MaxT)) {
					continue
				}
				if e.Gone != nil && of.Width == rollup.Short {
					set.gone = max(set.gone, goneUntil(onlyLong(e, lo, hi, hidden), lo, hi))
				}
				if !s.keeps(e.Labels) {
					continue
				}
				s.Stats.Series.Add(1)
				set.index += bytesOf(e.Labels, len(e.Windows))
				at, added := sets.add(e.Labels)
				if added {
					set.series = append(set.series, &Series{
						Labels: e.Labels, mint: lo, maxt: hi, hidden: hidden, s: s, summaries: of, samples: s.Hidden.Of(e.Labels),
					})
				}
				f.series[k] = set.series[at]
				f.series[k].found++
				gone = gone || e.Gone != nil
			}
		})
		if err != nil {
			return err
		}
		for i := range found {
			found[i].addParts()
			found[i] = foundWindows{}
		}
		var hours map[*part][]chunkfmt.Range
		if gone {
			if hours, err = set.hours(ctx, &held); err != nil {
				return err
			}
		}
		for _, series := range set.series {
			series.cover(lo > mint, hours)
		}
		slices.SortFunc(set.series, func(a, b *Series) int { return labels.Compare(a.Labels, b.Labels) })
		return set.load(ctx)
	})
	if err != nil {
		return nil, err
	}
	return set, nil
}

// foundWindows is what one series page says.
type foundWindows struct {
	block   *Block
	entries []chunkfmt.WindowEntry
	series  []*Series // of each entry; nil: nothing of it is to be read
}

// addParts gives the series their parts, of which they know how many there will be: they
// are large.
func (f *foundWindows) addParts() {
	for i, s := range f.series {
		if s == nil {
			continue
		}
		if s.parts == nil {
			s.parts = make([]part, 0, s.found)
		}
		s.parts = append(s.parts, part{block: f.block, entry: f.entries[i]})
	}
}

// onlyLong gives the hours that reach into mint to maxt, both included, in ms, of which
// there are but windows of an hour, without what is hidden. Where a series has nothing for
// hours it may give these too.
func onlyLong(e *chunkfmt.WindowEntry, mint, maxt int64, hidden []chunkfmt.Range) []chunkfmt.Range {
	hours := func(rs []chunkfmt.Range) []chunkfmt.Range {
		out := make([]chunkfmt.Range, len(rs))
		for i, r := range rs {
			out[i] = widen(r, rollup.Long)
		}
		return union(out)
	}
	asked := widen(chunkfmt.Range{MinT: mint, MaxT: maxt}, rollup.Long)
	of := func(width int64) (rs []chunkfmt.Range) {
		for _, c := range e.WindowsOf(width, asked.MinT, asked.MaxT) {
			rs = append(rs, chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT})
		}
		return hours(rs)
	}
	return subtract(subtract(Overlap(hours(e.Gone), of(rollup.Long)), of(rollup.Short)), hours(hidden))
}

// widen makes a range one of whole windows.
func widen(r chunkfmt.Range, width int64) chunkfmt.Range {
	if r.MinT > math.MinInt64+2*width {
		r.MinT = rollup.EndOf(r.MinT, width) - width + 1
	}
	if r.MaxT < math.MaxInt64-2*width {
		r.MaxT = rollup.EndOf(r.MaxT, width)
	}
	return r
}

// hours gives the hours in which parts have windows: such parts of which samples are gone and
// whose windows have gaps, where others have something in the same time. What these have in a
// gap counts. To know the gaps it reads the windows' ends.
func (ss *SeriesSet) hours(ctx context.Context, held *tally) (map[*part][]chunkfmt.Range, error) {
	var of []*part
	ends := &SeriesSet{s: ss.s}
	for _, s := range ss.series {
		for i := range s.parts {
			if !s.gapsMatter(i) {
				continue
			}
			p := &s.parts[i]
			of = append(of, p)
			ends.series = append(ends.series, &Series{
				Labels: s.Labels, s: s.s, summaries: Summaries{Width: s.summaries.Width},
				parts: []part{{block: p.block, entry: p.entry, windows: p.entry.Windows}},
			})
		}
	}
	out := make(map[*part][]chunkfmt.Range, len(of))
	var buf windowBuffer
	pages := int64(0)
	for n := 0; ends.Next(ctx); n++ {
		s := ends.At()
		buf.out.Clear()
		for i := range s.parts[0].windows {
			c := &s.parts[0].windows[i]
			if err := s.parts[0].windowPages[i].decodeWindows(&buf, c, &s.summaries, chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT}); err != nil {
				return nil, err
			}
		}
		buf.out.Expand(0)
		var hours []chunkfmt.Range
		for _, end := range buf.out.End {
			if k := len(hours); k == 0 || end > hours[k-1].MaxT {
				hours = append(hours, widen(chunkfmt.Range{MinT: end, MaxT: end}, rollup.Long))
			}
		}
		out[of[n]] = union(hours)
		held.add(rangeBytes*int64(len(hours)) + ends.Held() - pages)
		pages = ends.Held()
	}
	held.add(-pages)
	return out, ends.Err()
}

// gapsMatter says whether the i-th part lacks windows between others of which the samples
// are gone, and somebody else may have something in that time.
func (s *Series) gapsMatter(i int) bool {
	p := &s.parts[i]
	for _, c := range p.entry.Windows {
		if int64(c.Samples)*s.summaries.Width > c.MaxT-c.MinT {
			continue // there is one after the other
		}
		in := func(r chunkfmt.Range) bool { return r.Overlaps(c.MinT, c.MaxT) }
		if !slices.ContainsFunc(p.entry.Gone, in) {
			continue
		}
		for k := range s.parts {
			if k != i && in(s.parts[k].entry.Times) {
				return true
			}
		}
		if s.summaries.Elsewhere != nil && slices.ContainsFunc(s.summaries.Elsewhere(s.Labels), in) {
			return true
		}
	}
	return false
}

// cover decides which windows are read from which part, and of which time samples.
// With cut, the caller doesn't know that nothing before s.mint is to be read, which is
// past the retention: then no window may begin before it. hours are as from
// SeriesSet.hours.
func (s *Series) cover(cut bool, hours map[*part][]chunkfmt.Range) {
	width := s.summaries.Width
	asked := chunkfmt.Range{MinT: s.mint, MaxT: s.maxt}
	clip := func(r chunkfmt.Range) chunkfmt.Range {
		return chunkfmt.Range{MinT: max(r.MinT, asked.MinT), MaxT: min(r.MaxT, asked.MaxT)}
	}
	// Windows that may be read: those that end in the time asked for.
	within := widen(asked, width)
	if within.MaxT > asked.MaxT {
		within.MaxT -= width
	}
	if cut && within.MinT < asked.MinT {
		within.MinT += width
	}
	var voids []chunkfmt.Range // for all parts
	note := func(rs []chunkfmt.Range) {
		for _, r := range rs {
			if r = clip(r); r.MinT <= r.MaxT {
				voids = append(voids, widen(r, width))
			}
		}
	}
	note(s.hidden)
	if s.summaries.Elsewhere != nil {
		note(s.summaries.Elsewhere(s.Labels))
	}
	times := make([]chunkfmt.Range, len(s.parts)) // windows in which there may be samples
	for i := range s.parts {
		times[i] = widen(clip(s.parts[i].entry.Times), width)
	}
	alone := apart(times)
	covered := make([]chunkfmt.Range, 0, len(s.parts)) // of parts, which mostly have one
	s.pieces = make([]piece, 0, len(s.parts))
	for i := range s.parts {
		p := &s.parts[i]
		if n := len(p.entry.Windows); n > 0 {
			may := chunkfmt.Range{MinT: max(p.entry.Windows[0].MinT, within.MinT), MaxT: min(p.entry.Windows[n-1].MaxT, within.MaxT)}
			from := len(covered)
			for _, r := range p.block.Ranges {
				r = widen(r, width)
				if r = (chunkfmt.Range{MinT: max(r.MinT, may.MinT), MaxT: min(r.MaxT, may.MaxT)}); r.MinT <= r.MaxT {
					covered = append(covered, r)
				}
			}
			p.covered = covered[from:len(covered):len(covered)]
		}
	}
	kept := s.kept(width, hours)
	var only []chunkfmt.Range // of all of kept
	for _, k := range kept {
		only = Union(only, k)
	}
	for i := range s.parts {
		p := &s.parts[i]
		if len(p.covered) > 0 && (len(voids) > 0 || !alone[i]) {
			all := slices.Clone(voids)
			if !alone[i] {
				all = s.others(all, i, times, clip)
			}
			p.covered = subtract(union(p.covered), union(all))
		}
		if kept != nil {
			p.covered = Union(subtract(p.covered, only), kept[i])
		}
		for _, r := range p.covered {
			s.pieces = append(s.pieces, piece{r, i})
		}
		given := p.covered
		if only != nil {
			p.covered = Union(p.covered, only) // though it has others there
		}
		if r := clip(p.entry.Times); !covers(p.covered, r.MinT, r.MaxT) {
			p.chunks = slices.DeleteFunc(p.entry.Chunks(s.mint, s.maxt), func(c chunkfmt.Chunk) bool {
				r := clip(chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT})
				return covers(p.covered, r.MinT, r.MaxT) || covers(s.hidden, r.MinT, r.MaxT)
			})
		}
		p.windows = p.entry.Windows
		if len(given) == 0 {
			p.windows = nil
		} else if n := len(p.windows); given[0].MinT > p.windows[0].MaxT || given[len(given)-1].MaxT < p.windows[n-1].MinT {
			p.windows = slices.DeleteFunc(slices.Clone(p.windows), func(c chunkfmt.Chunk) bool {
				return !slices.ContainsFunc(given, func(r chunkfmt.Range) bool { return r.Overlaps(c.MinT, c.MaxT) })
			})
		}
	}
	if !slices.IsSortedFunc(s.pieces, byStart) {
		slices.SortFunc(s.pieces, byStart)
	}
}

// kept gives for each part the windows, of those that may be read, of which the
// samples are gone; nil if there are none. If several have one, it is the first's. hours
// are as for cover.
func (s *Series) kept(width int64, hours map[*part][]chunkfmt.Range) (of [][]chunkfmt.Range) {
	var all []chunkfmt.Range
	for i := range s.parts {
		p := &s.parts[i]
		if p.entry.Gone == nil {
			continue
		}
		gone := make([]chunkfmt.Range, len(p.entry.Gone))
		for j, r := range p.entry.Gone {
			gone[j] = widen(r, width)
		}
		hidden := make([]chunkfmt.Range, len(s.hidden))
		for j, r := range s.hidden {
			hidden[j] = widen(r, width)
		}
		there, known := hours[p]
		for _, c := range p.entry.Windows {
			if !known {
				there = append(there, chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT})
			}
		}
		mine := subtract(subtract(Overlap(Overlap(p.covered, union(gone)), union(there)), union(hidden)), all)
		if len(mine) == 0 {
			continue
		}
		if of == nil {
			of = make([][]chunkfmt.Range, len(s.parts))
		}
		of[i] = mine
		all = Union(all, mine)
	}
	return of
}

func byStart(a, b piece) int { return cmp.Compare(a.MinT, b.MinT) }

// apart says of each range whether none of the others touches it, as far as that is
// quickly seen: they ascend, in the usual case.
func apart(rs []chunkfmt.Range) []bool {
	out := make([]bool, len(rs))
	end := int64(math.MinInt64)
	for i, r := range rs {
		out[i] = i == 0 || r.MinT > end
		end = max(end, r.MaxT)
	}
	start := int64(math.MaxInt64)
	for i := len(rs) - 1; i >= 0; i-- {
		out[i] = out[i] && (i == len(rs)-1 || rs[i].MaxT < start)
		start = min(start, rs[i].MinT)
	}
	return out
}

// others appends the windows in which other parts than the i-th have chunks; times
// are those of all parts.
func (s *Series) others(out []chunkfmt.Range, i int, times []chunkfmt.Range, clip func(chunkfmt.Range) chunkfmt.Range) []chunkfmt.Range {
	for k := range s.parts {
		if k == i || !times[k].Overlaps(times[i].MinT, times[i].MaxT) {
			continue
		}
		for _, c := range s.parts[k].entry.Chunks(s.mint, s.maxt) {
			out = append(out, widen(clip(chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT}), s.summaries.Width))
		}
	}
	return out
}

// subtract leaves of ranges, which ascend, what is in none of others, which ascend
// and don't touch each other.
func subtract(rs, others []chunkfmt.Range) []chunkfmt.Range {
	if len(others) == 0 {
		return rs
	}
	var out []chunkfmt.Range
	for _, r := range rs {
		gone := false
		for _, o := range others {
			if !o.Overlaps(r.MinT, r.MaxT) {
				continue
			}
			if o.MinT > r.MinT {
				out = append(out, chunkfmt.Range{MinT: r.MinT, MaxT: o.MinT - 1})
			}
			if gone = o.MaxT >= r.MaxT; gone {
				break
			}
			r.MinT = o.MaxT + 1
		}
		if !gone {
			out = append(out, r)
		}
	}
	return out
}

// windows is about how many windows Windows will give.
func (s *Series) windows() int {
	n := 0
	for _, p := range s.pieces {
		for _, c := range s.parts[p.part].windows {
			if overlap := min(c.MaxT, p.MaxT) - max(c.MinT, p.MinT); overlap > 0 {
				n += min(c.Samples, int(overlap/s.summaries.Width)+1)
			}
		}
	}
	return n
}

// windowBuffer is memory that windows are decoded into.
type windowBuffer struct {
	dec     chunkfmt.WindowDecoder
	out     rollup.Windows
	scratch rollup.Windows
	covered []chunkfmt.Range
}

// Windows decodes the windows that SelectWindows has found, ascending, with the
// columns that were asked for. They stand for all samples in covered, which are
// whole windows, ascending and apart; Runs gives those of the rest. What is returned
// may have Even, lies in buf, and is good until Windows is called again with it; it isn't to be
// changed, but for an Expand.
func (s *Series) Windows(buf *Buffer) (w *rollup.Windows, covered []chunkfmt.Range, err error) {
	b := &buf.windows
	b.out.Clear()
	b.covered = b.covered[:0]
	for _, p := range s.pieces {
		pt := &s.parts[p.part]
		for i := range pt.windows {
			c := &pt.windows[i]
			if !c.Overlaps(p.MinT, p.MaxT) {
				continue
			}
			if err := pt.windowPages[i].decodeWindows(b, c, &s.summaries, p.Range); err != nil {
				return nil, nil, err
			}
		}
		if n := len(b.covered); n > 0 && b.covered[n-1].MaxT+1 == p.MinT {
			b.covered[n-1].MaxT = p.MaxT
		} else {
			b.covered = append(b.covered, p.Range)
		}
	}
	s.s.Stats.Windows.Add(int64(b.out.Len()))
	return &b.out, b.covered, nil
}

// decodeWindows appends those windows of a chunk to b.out that lie in a range.
func (h *heldPage) decodeWindows(b *windowBuffer, c *chunkfmt.Chunk, of *Summaries, in chunkfmt.Range) error {
	fail := func(err error) error { return h.error(fmt.Errorf("chunk %d: %w", c.Index, err)) }
	if w := h.windows.Width(); w != of.Width {
		return fail(fmt.Errorf("%w: it has windows of %d ms, its series page says %d", chunkfmt.ErrCorrupt, w, of.Width))
	}
	into, whole := &b.out, in.MinT <= c.MinT && c.MaxT <= in.MaxT
	if !whole {
		b.scratch.Clear()
		into = &b.scratch
	}
	n := into.Len()
	if err := b.dec.DecodeEven(h.windows, c.Index, of.Columns, of.Rest, into); err != nil {
		return fail(err)
	}
	k := into.Len() - n
	if k != c.Samples || k == 0 {
		return fail(fmt.Errorf("%w: it has %d windows, its series page says %d", chunkfmt.ErrCorrupt, k, c.Samples))
	}
	switch first, last := into.EndAt(n), into.EndAt(n+k-1); {
	case first-of.Width+1 != c.MinT || last != c.MaxT:
		return fail(fmt.Errorf("%w: its windows span %d to %d, its series page says %d to %d", chunkfmt.ErrCorrupt, first-of.Width+1, last, c.MinT, c.MaxT))
	case whole && n > 0 && into.EndAt(n-1) >= first:
		return fail(fmt.Errorf("%w: it starts before the chunk before it ends", chunkfmt.ErrCorrupt))
	}
	if !whole {
		from := sort.Search(k, func(i int) bool { return into.EndAt(i) >= in.MinT })
		to := sort.Search(k, func(i int) bool { return into.EndAt(i) > in.MaxT })
		b.out.Append(into, from, max(from, to), of.Columns)
	}
	return nil
}

// Raw decodes all samples in mint to maxt, both included, of a series that
// SelectWindows gave, those in windows too. It fetches their pages. What it gives is
// as from Runs.
func (s *Series) Raw(ctx context.Context, buf *Buffer, mint, maxt int64) ([]*chunkfmt.Series, error) {
	raw := &Series{Labels: s.Labels, mint: max(mint, s.mint), maxt: min(maxt, s.maxt), hidden: s.samples, s: s.s}
	if raw.mint > raw.maxt {
		return nil, nil
	}
	for i := range s.parts {
		if cs := s.parts[i].entry.Chunks(raw.mint, raw.maxt); len(cs) > 0 {
			raw.parts = append(raw.parts, part{block: s.parts[i].block, chunks: cs})
		}
	}
	set := &SeriesSet{s: s.s, series: []*Series{raw}}
	if err := set.load(ctx); err != nil {
		return nil, err
	}
	return raw.Runs(buf)
}

// Gone says whether of some of the snapshot's time there are only summaries of windows.
func (s *Snapshot) Gone(ctx context.Context) (bool, error) {
	some := false
	err := s.attempt(ctx, s.MinT, s.MaxT, func(bs []*Block) error {
		held := tally{s: s}
		defer held.release()
		dirs, err := s.directories(ctx, bs, &held)
		some = slices.ContainsFunc(dirs, func(d *chunkfmt.Directory) bool { return d.Gone }) || s.OnlySummaries(s.MinT, s.MaxT, 0)
		return err
	})
	return some, err
}

// HasGone says whether blocks have a window that reaches into mint to maxt, both
// included, in ms, and of which the samples are gone, whatever is hidden.
func (s *Snapshot) HasGone(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) (bool, error) {
	all := chunkfmt.Range{MinT: mint, MaxT: maxt}
	wide := widen(all, rollup.Long)
	some := false
	err := s.attempt(ctx, wide.MinT, wide.MaxT, func(bs []*Block) error {
		held := tally{s: s}
		defer held.release()
		dirs, err := s.directories(ctx, bs, &held)
		if err != nil {
			return err
		}
		gone := &Snapshot{Tenant: s.Tenant, MinT: wide.MinT, MaxT: wide.MaxT, Stats: s.Stats, h: s.h}
		for i, b := range bs {
			if dirs[i].Gone {
				gone.Blocks = append(gone.Blocks, *b)
			}
		}
		for _, width := range []int64{rollup.Short, rollup.Long} {
			if some || len(gone.Blocks) == 0 {
				return nil
			}
			if some, err = gone.hasGone(ctx, ms, all, width); err != nil {
				return err
			}
		}
		return nil
	})
	return some, err
}

func (s *Snapshot) hasGone(ctx context.Context, ms []*labels.Matcher, in chunkfmt.Range, width int64) (bool, error) {
	set, err := s.SelectWindows(ctx, ms, s.MinT, s.MaxT, Summaries{Width: width})
	if err != nil {
		return false, err
	}
	var buf Buffer
	for set.Next(ctx) {
		w, _, err := set.At().Windows(&buf)
		if err != nil {
			return false, err
		}
		w.Expand(0)
		for _, p := range set.At().parts {
			for _, end := range w.End {
				if in.Overlaps(end-width+1, end) && covers(p.entry.Gone, end, end) {
					return true, nil
				}
			}
		}
	}
	return false, set.Err()
}

// EstimateWindows says about how many windows, and samples beside them, a
// SelectWindows would read, from directories alone, as Estimate does; overlaps of
// blocks don't count.
func (s *Snapshot) EstimateWindows(ctx context.Context, ms []*labels.Matcher, mint, maxt, width int64) (windows, samples int64, err error) {
	err = s.estimate(ctx, ms, mint, maxt, func(r *chunkfmt.PageRef, part float64) {
		of := r.Short
		if width == rollup.Long {
			of = r.Long
		}
		windows += int64(math.Ceil(part * float64(of.Windows)))
		samples += int64(part * float64(r.Samples-min(r.Samples, of.Samples)))
	}, func() { windows, samples = 0, 0 })
	return windows, samples, err
}

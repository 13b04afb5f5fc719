package chunkfmt

import (
	"encoding/binary"
	"slices"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// minPerWindow is how many samples windows have on average that pay: with fewer,
// the samples themselves take less.
const minPerWindow = 8

// windowsWriter makes the pages of windows of one series page.
type windowsWriter struct {
	summariser            rollup.Summariser
	shortRows, longRows   rollup.Windows
	short, long           windowBuilder
	shortPages, longPages groupPages
	bytes                 int // of pages
}

// groupPages are pages of one width, of each group in the order of the object.
type groupPages [windowGroups][][]byte

// none notes that the next series has no windows.
func (w *windowsWriter) none(b *seriesBuilder) {
	b.short.perSeries = append(b.short.perSeries, 0)
	b.long.perSeries = append(b.long.perSeries, 0)
}

// add summarises the next series.
func (w *windowsWriter) add(b *seriesBuilder, s *Series, pageBytes int) {
	samples := s.Samples()
	if len(samples.Histograms) > 0 || len(samples.T) < minPerWindow {
		w.none(b) // no function could do without the samples
		return
	}
	w.shortRows.Clear()
	w.longRows.Clear()
	w.summariser.Summarise(&w.shortRows, samples, rollup.Short)
	rollup.Widen(&w.longRows, &w.shortRows, rollup.Long)
	w.put(b, samples, &w.shortRows, &w.longRows, false, pageBytes)
}

// put adds the windows of the next series. If samples are gone, all are kept.
func (w *windowsWriter) put(b *seriesBuilder, samples *rollup.Samples, short, long *rollup.Windows, gone bool, pageBytes int) {
	if !gone && (len(samples.Histograms) > 0 || len(samples.T) < minPerWindow) {
		w.none(b) // no function could do without the samples
		return
	}
	add := func(to *chunkBuilder, of *Summarised, page *windowBuilder, rows *rollup.Windows, pages *groupPages) {
		before := to.total
		if len(rows.End) > 0 && (gone || len(samples.T) >= minPerWindow*len(rows.End)) {
			of.Windows += uint64(len(rows.End))
			of.Samples += uint64(len(samples.T))
			for i, j := 0, 0; i < len(rows.End); i = j {
				j = min(i+maxRunWindows, len(rows.End))
				page.add(rows, i, j)
				to.add(KindWindows, Range{rows.End[i] - page.width + 1, rows.End[j-1]}, j-i)
				if page.size() >= pageBytes {
					w.endPage(to, page, pages)
				}
			}
		}
		to.perSeries = binary.AppendUvarint(to.perSeries, uint64(to.total-before))
	}
	add(&b.short, &b.shortOf, &w.short, short, &w.shortPages)
	add(&b.long, &b.longOf, &w.long, long, &w.longPages)
}

func (w *windowsWriter) endPage(to *chunkBuilder, page *windowBuilder, pages *groupPages) {
	if page.chunks == 0 {
		return
	}
	for g := groupEnds; g <= page.lastGroup(); g++ {
		b := page.page(g)
		if g == groupEnds {
			to.endPage(0, int64(len(b)))
		} else {
			to.endBeside(int64(len(b)))
		}
		pages[g] = append(pages[g], b)
		w.bytes += len(b)
	}
	page.clear()
}

// endSeriesPage writes the pages.
func (w *windowsWriter) endSeriesPage(to *Writer) {
	b := to.series
	w.endPage(&b.long, &w.long, &w.longPages)
	w.endPage(&b.short, &w.short, &w.shortPages)
	write := func(of *chunkBuilder, pages *groupPages) {
		of.offset = to.off
		for _, group := range pages {
			for _, p := range group {
				to.writePage("windows", p)
			}
		}
		*pages = groupPages{}
	}
	write(&b.long, &w.longPages)
	write(&b.short, &w.shortPages)
	w.bytes = 0
}

// windowBuilder collects the chunks of one page of windows of each group.
type windowBuilder struct {
	width  int64
	enc    codec.Encoder
	shapes []builtShape
	known  map[uint64][]int // hash of a shape → candidates in shapes
	last   int              // of shapes, most often that of the next chunk too
	bytes  int              // of shapes
	chunks int
	heads  [windowGroups][]byte // table of chunks
	bodies [windowGroups][]byte

	first, lastV, prev, least, most, ints, deltas []int64
	parts                                         []byte
}

// builtShape is when there were samples in some windows.
type builtShape struct {
	w rollup.Windows // the columns of times
	b []byte
}

// lastGroup is the last group that there is of windows of the width.
func (p *windowBuilder) lastGroup() windowGroup {
	if p.width == rollup.Long {
		return groupMoment
	}
	return groupValues
}

// size is about how large the largest of its pages is so far, in bytes.
func (p *windowBuilder) size() int {
	n := 0
	for g := range p.bodies {
		n = max(n, p.sizeOf(windowGroup(g)))
	}
	return n
}

// total is about how large its pages are together so far, in bytes.
func (p *windowBuilder) total() int {
	n := 0
	for g := range p.bodies {
		n += p.sizeOf(windowGroup(g))
	}
	return n
}

func (p *windowBuilder) sizeOf(g windowGroup) int {
	n := len(p.heads[g]) + len(p.bodies[g])
	if g == groupEnds {
		n += p.bytes
	}
	return n
}

// add appends a chunk of the windows of w from i up to, without, j.
func (p *windowBuilder) add(w *rollup.Windows, i, j int) {
	shape := p.shape(w, i, j)
	p.heads[groupEnds] = binary.AppendUvarint(p.heads[groupEnds], uint64(shape))
	p.values(w, i, j)
	p.chunks++
}

// shape returns the index of the times, which are stored once.
func (p *windowBuilder) shape(w *rollup.Windows, i, j int) int {
	same := func(k int) bool {
		s := &p.shapes[k].w
		return SameTimes(s.End, w.End[i:j]) && slices.Equal(s.Count, w.Count[i:j]) && slices.Equal(s.Flags, w.Flags[i:j]) &&
			SameTimes(s.FirstT, w.FirstT[i:j]) && SameTimes(s.PrevT, w.PrevT[i:j]) && SameTimes(s.LastT, w.LastT[i:j])
	}
	if p.last < len(p.shapes) && same(p.last) {
		return p.last
	}
	h := uint64(j - i)
	for _, x := range []int64{w.FirstT[i], w.LastT[i], w.FirstT[(i+j)/2], w.LastT[(i+j)/2], w.FirstT[j-1], w.LastT[j-1]} {
		h = (h ^ uint64(x)) * 0x9e3779b97f4a7c15
	}
	for _, k := range p.known[h] {
		if same(k) {
			p.last = k
			return k
		}
	}
	if p.known == nil {
		p.known = map[uint64][]int{}
	}
	p.last = len(p.shapes)
	p.known[h] = append(p.known[h], p.last)
	s := builtShape{w: rollup.Windows{
		End: slices.Clone(w.End[i:j]), Count: slices.Clone(w.Count[i:j]), Flags: slices.Clone(w.Flags[i:j]),
		FirstT: slices.Clone(w.FirstT[i:j]), PrevT: slices.Clone(w.PrevT[i:j]), LastT: slices.Clone(w.LastT[i:j]),
	}}
	s.b = p.appendShape(nil, &s.w)
	p.shapes = append(p.shapes, s)
	p.bytes += len(s.b) + 4
	return p.last
}

func (p *windowBuilder) appendShape(dst []byte, w *rollup.Windows) []byte {
	column := func(value func(i int) int64) []int64 {
		p.ints = p.ints[:0]
		for i := range w.End {
			p.ints = append(p.ints, value(i))
		}
		return p.ints
	}
	dst = p.enc.AppendTimes(dst, column(func(i int) int64 { return w.End[i] / p.width }))
	dst = p.enc.AppendNoise(dst, column(func(i int) int64 { return int64(w.Count[i]) }))
	dst = p.enc.AppendNoise(dst, column(func(i int) int64 { return int64(w.Flags[i]) }))
	dst = p.enc.AppendNoise(dst, column(func(i int) int64 {
		if w.Count[i] == 0 {
			return 0
		}
		return w.FirstT[i] - (w.End[i] - p.width + 1)
	}))
	dst = p.enc.AppendNoise(dst, column(func(i int) int64 { return w.End[i] - w.LastT[i] }))
	return p.enc.AppendNoise(dst, column(func(i int) int64 { return w.LastT[i] - w.PrevT[i] }))
}

// values appends the values of windows to the bodies of chunks.
func (p *windowBuilder) values(w *rollup.Windows, i, j int) {
	head := codec.GuessScale(w.LastV[i:j])
	if head == codec.BitsScale || !p.scaled(w, i, j, head) {
		var ok bool
		if head, ok = codec.Scale(w.FirstV[i:j], w.PrevV[i:j], w.LastV[i:j], w.Min[i:j], w.Max[i:j]); !ok {
			head = apart
		} else if !p.scaled(w, i, j, head) { // too many digits
			head = codec.BitsScale
			p.scaled(w, i, j, head)
		}
	}
	var ends [windowParts + 1]int // of the parts so far
	b := p.parts[:0]
	for k := range windowParts {
		if head == apart {
			b = p.appendApart(b, k, w, i, j)
		} else {
			b = p.appendScaled(b, k, head, w, i, j)
		}
		ends[k+1] = len(b)
	}
	p.parts = b
	for g := groupEnds; g <= p.lastGroup(); g++ {
		to := p.bodies[g]
		start := len(to)
		if g == groupEnds {
			to = append(to, head)
		}
		from, end := g.parts()
		for k := from; k < end-1; k++ {
			to = binary.AppendUvarint(to, uint64(ends[k+1]-ends[k]))
		}
		to = append(to, b[ends[from]:ends[end]]...)
		p.bodies[g] = to
		p.heads[g] = binary.AppendUvarint(p.heads[g], uint64(len(to)-start))
	}
}

// scaled takes the values that are samples as integers. It reports false if there
// are such as have none.
func (p *windowBuilder) scaled(w *rollup.Windows, i, j int, scale byte) bool {
	var ok bool
	if p.first, ok = codec.ScaledInts(p.first[:0], w.FirstV[i:j], scale); !ok {
		return false
	}
	if p.lastV, ok = codec.ScaledInts(p.lastV[:0], w.LastV[i:j], scale); !ok {
		return false
	}
	if p.least, ok = codec.ScaledInts(p.least[:0], w.Min[i:j], scale); !ok {
		return false
	}
	if p.most, ok = codec.ScaledInts(p.most[:0], w.Max[i:j], scale); !ok {
		return false
	}
	if p.prev, ok = codec.ScaledInts(p.prev[:0], w.PrevV[i:j], scale); !ok {
		return false
	}
	for k, n := range w.Count[i:j] {
		if n == 0 { // like the one before
			x := int64(0)
			if k > 0 {
				x = p.lastV[k-1]
			}
			p.first[k], p.lastV[k], p.prev[k], p.least[k], p.most[k] = x, x, x, x, x
		}
	}
	return true
}

// appendScaled appends a part of a chunk whose values are integers.
func (p *windowBuilder) appendScaled(b []byte, part int, scale byte, w *rollup.Windows, i, j int) []byte {
	n := j - i
	d := slices.Grow(p.deltas[:0], n)[:n]
	p.deltas = d
	first, last, prev, least, most := p.first[:n], p.lastV[:n], p.prev[:n], p.least[:n], p.most[:n]
	switch part {
	case partEnds:
		b = binary.AppendVarint(b, first[0])
		for k, x := range first[1:] {
			d[k] = x - last[k]
		}
		b = p.enc.AppendNoise(b, d[:n-1])
		for k, x := range last {
			d[k] = x - first[k]
		}
		return p.enc.AppendNoise(b, d)
	case partReset:
		clear(d)
		return p.appendForm(b, scale, w.Reset[i:j], d)
	case partPrev:
		for k, x := range last {
			d[k] = x - prev[k]
		}
		return p.enc.AppendNoise(b, d)
	case partExtrema:
		for k, x := range least {
			d[k] = min(first[k], last[k]) - x
		}
		b = p.enc.AppendNoise(b, d)
		for k, x := range most {
			d[k] = x - max(first[k], last[k])
		}
		return p.enc.AppendNoise(b, d)
	case partSum:
		for k, count := range w.Count[i:j] {
			d[k] = expectedSum(count, least[k], most[k])
		}
		return p.appendForm(b, scale, w.Sum[i:j], d)
	}
	return p.appendApart(b, part, w, i, j)
}

// appendForm appends a column as integers less what is expected, if its values are
// decimals of the scale, as floats otherwise.
func (p *windowBuilder) appendForm(b []byte, scale byte, v []float64, expected []int64) []byte {
	if scale != codec.BitsScale {
		var ok bool
		if p.ints, ok = codec.ScaledInts(p.ints[:0], v, scale); ok {
			for k, x := range expected {
				p.ints[k] -= x
			}
			return p.enc.AppendNoise(append(b, formInts), p.ints)
		}
	}
	return p.enc.AppendFloats(append(b, formFloats), v)
}

// appendApart appends a part of a chunk whose columns are stored each for itself.
func (p *windowBuilder) appendApart(b []byte, part int, w *rollup.Windows, i, j int) []byte {
	switch part {
	case partEnds:
		return p.enc.AppendFloats(p.enc.AppendFloats(b, w.FirstV[i:j]), w.LastV[i:j])
	case partReset:
		return p.enc.AppendFloats(b, w.Reset[i:j])
	case partPrev:
		return p.enc.AppendFloats(b, w.PrevV[i:j])
	case partExtrema:
		return p.enc.AppendFloats(p.enc.AppendFloats(b, w.Min[i:j]), w.Max[i:j])
	case partSum:
		return p.enc.AppendFloats(b, w.Sum[i:j])
	case partCounts:
		p.ints = p.ints[:0]
		for _, x := range w.Resets[i:j] {
			p.ints = append(p.ints, int64(x))
		}
		b = p.enc.AppendNoise(b, p.ints)
		most, all := uint64(0), uint64(0)
		for k := i; k < j; k++ {
			most += uint64(max(w.Count[k], 1) - 1)
			all += uint64(w.Changes[k])
		}
		form := byte(changesPlain)
		if all > most/2 {
			form = changesLess
		}
		p.ints = p.ints[:0]
		for k := i; k < j; k++ {
			x := int64(w.Changes[k])
			if form == changesLess && w.Count[k] > 0 {
				x = int64(w.Count[k]-1) - x
			}
			p.ints = append(p.ints, x)
		}
		return p.enc.AppendNoise(append(b, form), p.ints)
	case partMoment:
		if p.width == rollup.Long {
			b = p.enc.AppendFloats(b, w.M2[i:j])
		}
	}
	return b
}

// page makes the page of a group.
func (p *windowBuilder) page(g windowGroup) []byte {
	b := append(p.parts[:0], byte(allColumns), byte(g))
	b = binary.AppendUvarint(b, uint64(p.width))
	if g == groupEnds {
		b = binary.AppendUvarint(b, uint64(len(p.shapes)))
		for i := range p.shapes {
			b = binary.AppendUvarint(b, uint64(len(p.shapes[i].w.End)))
			b = binary.AppendUvarint(b, uint64(len(p.shapes[i].b)))
		}
	}
	b = binary.AppendUvarint(b, uint64(p.chunks))
	b = append(b, p.heads[g]...)
	if g == groupEnds {
		for i := range p.shapes {
			b = append(b, p.shapes[i].b...)
		}
	}
	b = append(b, p.bodies[g]...)
	p.parts = b
	return appendPage(nil, pageWindows, b, false)
}

// clear makes p ready for the next pages.
func (p *windowBuilder) clear() {
	clear(p.shapes)
	p.shapes, p.chunks, p.bytes, p.last = p.shapes[:0], 0, 0, 0
	for g := range p.bodies {
		p.heads[g], p.bodies[g] = p.heads[g][:0], p.bodies[g][:0]
	}
	clear(p.known)
}

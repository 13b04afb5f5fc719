package chunkfmt

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// Chunk says where a run of samples of one series lies.
type Chunk struct {
	Page    Location // of the data page
	Index   int      // in that page
	Kind    Kind
	MinT    int64 // ms, of the first sample
	MaxT    int64 // ms, of the last sample
	Samples int
}

// Overlaps reports whether the chunk may hold samples of mint to maxt, both included.
func (c Chunk) Overlaps(mint, maxt int64) bool { return c.MinT <= maxt && mint <= c.MaxT }

// Entry is what a series page says of one series.
type Entry struct {
	Labels   labels.Labels
	Metadata metadata.Metadata // zero if unknown
	Family   string            // of metrics that Metadata is about; empty if it has the metric's own name
	// Chunks that overlap the time asked for; of each kind in ascending order
	// of time. Their pages lie in the object in the order of the entries.
	Chunks []Chunk
	// Exemplars are the chunks of exemplars that overlap the time asked for,
	// ascending.
	Exemplars []Chunk
	// Gone are the times, whole windows, ascending and apart, of which only summaries
	// of windows are left. Not to be changed.
	Gone []Range
}

// Parts of a series page, each a number, a length in bytes and as many bytes.
// A reader skips those it does not know.
const (
	partChunks    = 1
	partExemplars = 2
	partMetadata  = 3
	partFamilies  = 4
	partShort     = 5
	partLong      = 6
	partGone      = 7
	// Windows in groups of columns. What knows parts 5 and 6 alone reads samples instead.
	partShortGroups = 8
	partLongGroups  = 9
)

// absent is the id of a label that a series does not have.
const absent = 0

// SeriesPage is a parsed series page. It is safe for concurrent use.
type SeriesPage struct {
	names     []labelColumn // ascending by name
	series    int
	chunks    chunkPart
	exemplars chunkPart
	short     chunkPart // summaries of windows
	long      chunkPart
	metas     []metadata.Metadata
	families  []string // of metas; nil if all have their metric's name
	metaOf    []uint32 // per series, 0 for none, else index+1 into metas
	gone      [][]Range
	goneOf    []uint32 // per series, 0 for none, else index+1 into gone; nil: none is

	labelsOnce sync.Once
	labelPage  *LabelPage // once it was asked for
}

type labelColumn struct {
	name   string
	values []string // ascending
	width  int      // bytes per id: 1, 2 or 4
	ids    []byte   // per series: absent, or index+1 into values
}

// chunkPart are the chunks of all series, in the order of the data pages.
type chunkPart struct {
	pages  []Location
	first  []uint32 // of each page: its first chunk in chunks; one more at the end
	chunks []chunkRef
	of     []uint32 // of each series: its first chunk in chunks; one more at the end
	spans  []span
	// Of windows in groups: how many, and of those behind the first the pages, for each of pages.
	groups int
	beside [windowGroups][]Location
}

type chunkRef struct {
	kind Kind
	span uint32
}

type span struct {
	Range
	samples int
}

// lacking says whether any of so many series doesn't have the label.
func (l *labelColumn) lacking(series int) bool {
	if l.width == 2 {
		for at := 0; at < 2*series; at += 2 {
			if l.ids[at]|l.ids[at+1] == absent {
				return true
			}
		}
		return false
	}
	for s := range series {
		if l.id(s) == absent {
			return true
		}
	}
	return false
}

func (l *labelColumn) id(series int) uint32 {
	switch l.width {
	case 1:
		return uint32(l.ids[series])
	case 2:
		return uint32(binary.LittleEndian.Uint16(l.ids[2*series:]))
	default:
		return binary.LittleEndian.Uint32(l.ids[4*series:])
	}
}

// ParseSeriesPage checks a series page. The page keeps b and must not outlive
// changes to it.
func ParseSeriesPage(b []byte) (*SeriesPage, error) {
	body, err := onlyPage(b, pageSeries)
	if err != nil {
		return nil, fmt.Errorf("series page: %w", err)
	}
	p, c := &SeriesPage{}, over(body)
	p.series = c.Count(1)
	p.names = make([]labelColumn, c.Count(3))
	for i := range p.names {
		l := &p.names[i]
		l.name = c.label()
		l.values = c.ascending()
		l.width = idWidth(len(l.values))
		l.ids = c.Bytes(p.series * l.width)
		if c.Err == nil && (l.name == "" || i > 0 && p.names[i-1].name >= l.name) {
			c.Fail("label names out of order at %q", l.name)
		}
		if c.Err != nil {
			return nil, fmt.Errorf("series page: %w", c.Err)
		}
		for s := range p.series {
			if l.id(s) > uint32(len(l.values)) {
				return nil, fmt.Errorf("series page: %w", corrupt("label %q has %d values, id %d", l.name, len(l.values), l.id(s)))
			}
		}
	}
	c.parts(func(part int, c *cursor) {
		switch part {
		case partChunks:
			p.chunks = c.chunkPart(p.series)
		case partExemplars:
			p.exemplars = c.chunkPart(p.series)
		case partShort:
			p.short = c.chunkPart(p.series)
		case partLong:
			p.long = c.chunkPart(p.series)
		case partShortGroups, partLongGroups:
			windows := &p.short
			if part == partLongGroups {
				windows = &p.long
			}
			if windows.of != nil {
				c.Fail("there are windows in another part too")
				return
			}
			*windows = c.groupPart(p.series)
		case partMetadata:
			p.metadata(c)
		case partFamilies:
			p.readFamilies(c)
		case partGone:
			p.readGone(c)
		default:
			c.B = nil
		}
	})
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("series page: %w", err)
	}
	return p, nil
}

// parts calls read for each part, with a cursor over the part alone.
func (c *cursor) parts(read func(part int, c *cursor)) {
	seen := 0
	for len(c.B) > 0 && c.Err == nil {
		part := c.Bounded("part", math.MaxInt32)
		sub := over(c.Bytes(c.Count(1)))
		if c.Err != nil {
			return
		}
		if part <= seen {
			c.Fail("part %d behind part %d", part, seen)
			return
		}
		seen = part
		read(part, &sub)
		if err := sub.End(); err != nil {
			c.Fail("part %d: %v", part, err)
		}
	}
}

func (p *SeriesPage) metadata(c *cursor) {
	p.metas = make([]metadata.Metadata, c.Count(3))
	for i := range p.metas {
		p.metas[i] = metadata.Metadata{Type: model.MetricType(c.Text()), Unit: c.Text(), Help: c.Text()}
	}
	if p.series > len(c.B) {
		c.Fail("ends early")
		return
	}
	p.metaOf = make([]uint32, p.series)
	for i := range p.metaOf {
		p.metaOf[i] = uint32(c.Bounded("metadata", uint64(len(p.metas))))
	}
}

func (p *SeriesPage) readFamilies(c *cursor) {
	if len(p.metas) > len(c.B) {
		c.Fail("ends early")
		return
	}
	p.families = make([]string, len(p.metas))
	for i := range p.families {
		p.families[i] = c.Text()
	}
}

func (p *SeriesPage) readGone(c *cursor) {
	p.gone = make([][]Range, c.Count(3))
	for i := range p.gone {
		rs := make([]Range, c.Count(2))
		for j := range rs {
			rs[j] = c.timeRange()
			if j > 0 && rs[j-1].MaxT >= rs[j].MinT || rs[j].MaxT%rollup.Short != 0 || (rs[j].MinT-1)%rollup.Short != 0 {
				c.Fail("times that are gone: %d to %d", rs[j].MinT, rs[j].MaxT)
				return
			}
		}
		p.gone[i] = rs
	}
	if p.series > len(c.B) {
		c.Fail("ends early")
		return
	}
	p.goneOf = make([]uint32, p.series)
	for i := range p.goneOf {
		p.goneOf[i] = uint32(c.Bounded("times that are gone", uint64(len(p.gone))))
	}
}

// goneAt gives the times of a series of which only summaries are left.
func (p *SeriesPage) goneAt(i int) []Range {
	if p.goneOf == nil || p.goneOf[i] == 0 {
		return nil
	}
	return p.gone[p.goneOf[i]-1]
}

// goneIn says whether there are windows in mint to maxt, both included, of which the
// samples are gone, and from when to when, cut to whole windows.
func (p *SeriesPage) goneIn(i int, mint, maxt int64) (r Range, some bool) {
	r = Range{math.MaxInt64, math.MinInt64}
	for _, g := range p.goneAt(i) {
		for _, of := range []*chunkPart{&p.short, &p.long} {
			if len(of.of) == 0 || !g.Overlaps(mint, maxt) {
				continue
			}
			for _, ref := range of.chunks[of.of[i]:of.of[i+1]] {
				s := &of.spans[ref.span]
				if lo, hi := max(g.MinT, s.MinT), min(g.MaxT, s.MaxT); lo <= min(hi, maxt) && hi >= mint {
					r.add(Range{lo, hi})
					some = true
				}
			}
		}
	}
	return r, some
}

func (c *cursor) chunkPart(series int) chunkPart { return c.chunksIn(1, series) }

// groupPart is chunkPart for windows in groups.
func (c *cursor) groupPart(series int) (p chunkPart) {
	groups := int(c.Byte())
	if groups < 1 || groups >= int(windowGroups) {
		c.Fail("%d groups of columns", groups)
		return p
	}
	p = c.chunksIn(groups, series)
	p.groups = groups
	if n := len(p.pages); n > 0 {
		offset := p.pages[n-1].End()
		for g := groupPrev; int(g) <= groups; g++ {
			for i := range p.beside[g] {
				p.beside[g][i].Offset = offset
				offset = p.beside[g][i].End()
			}
		}
	}
	return p
}

func (c *cursor) chunksIn(groups, series int) (p chunkPart) {
	offset := c.offset()
	p.pages = make([]Location, c.Count(1+groups))
	p.first = make([]uint32, 1, len(p.pages)+1)
	total := uint64(0)
	size := func() int64 { return int64(c.Bounded("page size", MaxPage+pageHead+pageTail)) }
	for i := range p.pages {
		p.pages[i] = Location{Offset: offset, Size: size()}
		offset = p.pages[i].End()
		total += c.Uvarint()
		for g := groupPrev; int(g) <= groups; g++ {
			p.beside[g] = append(p.beside[g], Location{Size: size()})
		}
		if total > uint64(len(c.B)) {
			c.Fail("%d chunks, %d bytes left", total, len(c.B))
			return p
		}
		p.first = append(p.first, uint32(total))
	}
	p.spans = make([]span, c.Count(3))
	for i := range p.spans {
		p.spans[i] = span{Range: c.timeRange(), samples: c.Bounded("samples of a chunk", MaxChunkSamples)}
	}
	if series > len(c.B) {
		c.Fail("ends early")
		return p
	}
	p.of = make([]uint32, 1, series+1)
	sum := uint64(0)
	for range series {
		n := c.Uvarint()
		if sum += n; n > total || sum > total {
			c.Fail("series have more than the %d chunks", total)
			return p
		}
		p.of = append(p.of, uint32(sum))
	}
	if sum != total {
		c.Fail("series have %d of %d chunks", sum, total)
		return p
	}
	if 2*total > uint64(len(c.B)) {
		c.Fail("ends early")
		return p
	}
	p.chunks = make([]chunkRef, total)
	for i := range p.chunks {
		p.chunks[i] = chunkRef{kind: Kind(c.Byte()), span: uint32(c.Bounded("time range", uint64(len(p.spans))))}
		if p.chunks[i].span == uint32(len(p.spans)) {
			c.Fail("time range %d of %d", p.chunks[i].span, len(p.spans))
			return p
		}
	}
	return p
}

// offset reads an offset in the object.
func (c *cursor) offset() int64 { return int64(c.Bounded("offset", math.MaxInt64/2)) }

// timeRange reads the first instant and the distance of the last.
func (c *cursor) timeRange() Range {
	mint := c.Varint()
	r := Range{MinT: mint, MaxT: int64(uint64(mint) + c.Uvarint())}
	if r.MaxT < r.MinT {
		c.Fail("time range ends before it starts")
	}
	return r
}

func appendTimeRange(dst []byte, r Range) []byte {
	dst = binary.AppendVarint(dst, r.MinT)
	return binary.AppendUvarint(dst, uint64(r.MaxT)-uint64(r.MinT))
}

// ascending reads strings in strictly ascending order: each is the length of
// the start it shares with the one before, and the rest.
func (c *cursor) ascending() []string {
	n := c.Count(2)
	if n == 0 {
		return nil
	}
	out := make([]string, n)
	var last []byte
	// What comes out may be larger than what came in; MaxPage bounds it.
	total := 0
	for i := range out {
		shared := c.Bounded("shared prefix", uint64(len(last)))
		last = append(last[:shared], c.Bytes(c.Count(1))...)
		out[i] = string(last)
		if total += len(last); total > MaxPage || len(last) > MaxLabel {
			c.Fail("strings exceed %d bytes", MaxPage)
		}
		if i > 0 && out[i-1] >= out[i] {
			c.Fail("strings out of order at %q", out[i])
		}
		if c.Err != nil {
			return nil
		}
	}
	return out
}

func appendAscending(dst []byte, ss []string) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(ss)))
	last := ""
	for _, s := range ss {
		n := sharedPrefix(last, s)
		dst = binary.AppendUvarint(dst, uint64(n))
		dst = appendText(dst, s[n:])
		last = s
	}
	return dst
}

func sharedPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

func idWidth(values int) int {
	switch {
	case values < 1<<8:
		return 1
	case values < 1<<16:
		return 2
	default:
		return 4
	}
}

// DataPages are the locations of the pages with the samples of its series. They lie
// one behind the other in the object.
func (p *SeriesPage) DataPages() []Location { return p.chunks.pages }

// Len is the number of series in the page.
func (p *SeriesPage) Len() int { return p.series }

// Matching is how many of its series match all of ms, whatever their times.
func (p *SeriesPage) Matching(ms []*labels.Matcher) (n int) {
	for _, ok := range p.match(ms) {
		if ok {
			n++
		}
	}
	return n
}

// Select returns the series that match all of ms and have a chunk or exemplar
// in mint to maxt, both included, in order of metric name, then labels. Each
// matcher is evaluated once for each distinct value in the page.
func (p *SeriesPage) Select(ms []*labels.Matcher, mint, maxt int64) []Entry {
	return p.SelectSome(ms, mint, maxt, nil)
}

// SelectSome is Select of the series that keep picks, and of those of which samples are gone
// in that time. nil: of all.
func (p *SeriesPage) SelectSome(ms []*labels.Matcher, mint, maxt int64, keep func(labels.Labels) bool) []Entry {
	match := p.match(ms)
	n := 0
	for _, ok := range match {
		if ok {
			n++
		}
	}
	var out []Entry
	var chunks []Chunk // of all
	var builder labels.ScratchBuilder
	for i, ok := range match {
		if !ok {
			continue
		}
		if e, ok := p.entry(i, mint, maxt, &builder, keep, &chunks); ok {
			if out == nil && keep == nil {
				out = make([]Entry, 0, n)
				chunks = slices.Grow(chunks, (n-1)*len(e.Chunks)) // most series have as many
			}
			out = append(out, e)
		}
	}
	return out
}

// WindowEntry is what a series page says of one series to those who would rather
// read summaries of windows than samples.
type WindowEntry struct {
	Labels labels.Labels
	// Times are those of the chunks of samples that overlap the time asked for, and of
	// windows whose samples are gone.
	Times Range
	// Gone is as in Entry: there are no samples there, but windows may be.
	Gone []Range
	// Windows are the chunks of summaries that overlap it, ascending. Their times
	// are those of whole windows, and Samples is how many windows hold some. Where
	// there are such chunks, they tell of all samples of the series in the block.
	Windows []Chunk

	page   *SeriesPage
	series int
}

// Chunks are the chunks of samples that overlap mint to maxt, both included.
func (e *WindowEntry) Chunks(mint, maxt int64) []Chunk {
	return e.page.chunks.select1(e.series, mint, maxt)
}

// WindowsOf gives the chunks of summaries of a width, rollup.Short or rollup.Long, that
// overlap mint to maxt, both included, ascending.
func (e *WindowEntry) WindowsOf(width, mint, maxt int64) []Chunk {
	return e.page.Windows(e.series, width, mint, maxt)
}

// Beside is SeriesPage.Beside.
func (e *WindowEntry) Beside(width int64, page Location, cols rollup.Columns) []Location {
	return e.page.Beside(width, page, cols)
}

// SelectWindows is Select for windows of a width in ms, rollup.Short or rollup.Long:
// of the series that have samples in that time.
func (p *SeriesPage) SelectWindows(ms []*labels.Matcher, mint, maxt, width int64) []WindowEntry {
	windows := p.windows(width)
	keep := p.match(ms)
	n := 0
	for _, ok := range keep {
		if ok {
			n++
		}
	}
	out := make([]WindowEntry, 0, n)
	chunks := make([]Chunk, 0, n) // of all: most series have one
	var builder labels.ScratchBuilder
	for i, ok := range keep {
		if !ok {
			continue
		}
		times, ok := p.chunks.times(i, mint, maxt)
		if p.goneOf != nil {
			if gone, some := p.goneIn(i, mint, maxt); some && ok {
				times.add(gone)
			} else if some {
				times, ok = gone, true
			}
		}
		if !ok {
			continue
		}
		from := len(chunks)
		chunks = windows.appendTo(chunks, i, mint, maxt)
		out = append(out, WindowEntry{Labels: p.labels(i, &builder), Times: times, Gone: p.goneAt(i), Windows: chunks[from:len(chunks):len(chunks)], page: p, series: i})
	}
	return out
}

// Entry returns what the page says of its i-th series, in order of metric name,
// then labels, for those that read all of them, one by one. It is false if there
// is no such series, or if it has nothing in mint to maxt, both included. The
// builder is scratch memory.
func (p *SeriesPage) Entry(i int, mint, maxt int64, builder *labels.ScratchBuilder) (Entry, bool) {
	if i < 0 || i >= p.series {
		return Entry{}, false
	}
	var chunks []Chunk
	return p.entry(i, mint, maxt, builder, nil, &chunks)
}

// entry is Entry of series that there are, and that SelectSome wants. The chunks come behind others in the memory of chunks.
func (p *SeriesPage) entry(i int, mint, maxt int64, builder *labels.ScratchBuilder, keep func(labels.Labels) bool, chunks *[]Chunk) (Entry, bool) {
	from := len(*chunks)
	*chunks = p.chunks.appendTo(*chunks, i, mint, maxt)
	e := Entry{Exemplars: p.exemplars.select1(i, mint, maxt)}
	if to := len(*chunks); to > from {
		e.Chunks = (*chunks)[from:to:to]
	}
	if p.goneOf != nil {
		if _, some := p.goneIn(i, mint, maxt); some {
			e.Gone = p.goneAt(i)
		}
	}
	if e.Chunks == nil && e.Exemplars == nil && e.Gone == nil {
		return Entry{}, false
	}
	e.Labels = p.labels(i, builder)
	if keep != nil && e.Gone == nil && !keep(e.Labels) {
		return Entry{}, false
	}
	if p.metaOf != nil && p.metaOf[i] > 0 {
		e.Metadata = p.metas[p.metaOf[i]-1]
		if p.families != nil {
			e.Family = p.families[p.metaOf[i]-1]
		}
	}
	return e, true
}

// Windows gives the chunks of summaries of a width, rollup.Short or rollup.Long, of
// the i-th series that overlap mint to maxt, both included, ascending.
func (p *SeriesPage) Windows(i int, width, mint, maxt int64) []Chunk {
	return p.windows(width).select1(i, mint, maxt)
}

// WindowPages are the locations of the pages with windows of a width, of all groups. They
// lie one behind the other in the object.
func (p *SeriesPage) WindowPages(width int64) []Location {
	of := p.windows(width)
	out := slices.Clone(of.pages)
	for _, pages := range of.beside {
		out = append(out, pages...)
	}
	return out
}

// Beside are the locations of the pages that have columns of the windows in a page of a
// width beside the page that chunks name, for WindowPage.With.
func (p *SeriesPage) Beside(width int64, page Location, cols rollup.Columns) []Location {
	of := p.windows(width)
	if of.groups == 0 {
		return nil
	}
	i, ok := slices.BinarySearchFunc(of.pages, page.Offset, func(l Location, offset int64) int { return cmp.Compare(l.Offset, offset) })
	if !ok {
		return nil
	}
	var out []Location
	for g := groupPrev; int(g) <= of.groups; g++ {
		if g.wanted(cols) {
			out = append(out, of.beside[g][i])
		}
	}
	return out
}

func (p *SeriesPage) windows(width int64) *chunkPart {
	if width == rollup.Long {
		return &p.long
	}
	return &p.short
}

func (p *SeriesPage) labels(i int, b *labels.ScratchBuilder) labels.Labels {
	b.Reset()
	for j := range p.names {
		if id := p.names[j].id(i); id != absent {
			b.Add(p.names[j].name, p.names[j].values[id-1])
		}
	}
	return b.Labels()
}

// match tells for each series whether it matches all of ms.
func (p *SeriesPage) match(ms []*labels.Matcher) []bool {
	keep := make([]bool, p.series)
	for i := range keep {
		keep[i] = true
	}
	for _, m := range ms {
		j, ok := slices.BinarySearchFunc(p.names, m.Name, func(l labelColumn, name string) int {
			switch {
			case l.name < name:
				return -1
			case l.name > name:
				return 1
			}
			return 0
		})
		if !ok {
			if !m.Matches("") {
				return nil
			}
			continue
		}
		l := &p.names[j]
		good := make([]bool, len(l.values)+1)
		some := m.Matches("")
		good[absent] = some
		for k, v := range l.values {
			good[k+1] = m.Matches(v)
			some = some || good[k+1]
		}
		if !some {
			return nil
		}
		for i := range keep {
			keep[i] = keep[i] && good[l.id(i)]
		}
	}
	return keep
}

// select1 gives the chunks of one series that overlap the range.
func (p *chunkPart) select1(series int, mint, maxt int64) []Chunk {
	return p.appendTo(nil, series, mint, maxt)
}

func (p *chunkPart) appendTo(out []Chunk, series int, mint, maxt int64) []Chunk {
	if len(p.of) == 0 {
		return out
	}
	from, to := p.of[series], p.of[series+1]
	for i := from; i < to; i++ {
		ref := p.chunks[i]
		s := &p.spans[ref.span]
		if !s.Overlaps(mint, maxt) {
			continue
		}
		page := sort.Search(len(p.pages), func(k int) bool { return p.first[k+1] > i })
		if out == nil {
			out = make([]Chunk, 0, to-i)
		}
		out = append(out, Chunk{
			Page: p.pages[page], Index: int(i - p.first[page]), Kind: ref.kind,
			MinT: s.MinT, MaxT: s.MaxT, Samples: s.samples,
		})
	}
	return out
}

// times gives the first and last time of the chunks of one series that overlap the
// range; false if none does.
func (p *chunkPart) times(series int, mint, maxt int64) (r Range, some bool) {
	if len(p.of) == 0 {
		return r, false
	}
	r = Range{math.MaxInt64, math.MinInt64}
	for _, ref := range p.chunks[p.of[series]:p.of[series+1]] {
		if s := &p.spans[ref.span]; s.Overlaps(mint, maxt) {
			r.add(s.Range)
			some = true
		}
	}
	return r, some
}

// LabelNames returns the names of the labels in the page, ascending.
func (p *SeriesPage) LabelNames() []string {
	out := make([]string, len(p.names))
	for i := range p.names {
		out[i] = p.names[i].name
	}
	return out
}

// LabelValues returns the values of a label in the page, ascending; not to be
// changed.
func (p *SeriesPage) LabelValues(name string) []string {
	for i := range p.names {
		if p.names[i].name == name {
			return p.names[i].values
		}
	}
	return nil
}

// seriesBuilder collects one series page.
type seriesBuilder struct {
	series    int
	bytes     int // of distinct names, values and metadata
	names     []*nameBuilder
	byName    map[string]*nameBuilder
	chunks    chunkBuilder
	exemplars chunkBuilder
	short     chunkBuilder
	long      chunkBuilder
	metas     map[familyMetadata]uint32
	metaBytes []byte
	families  []byte
	named     bool // a family has another name than the metric
	metaOf    []byte
	first     string // metric names
	last      string
	times     Range
	samples   uint64

	shortOf, longOf Summarised

	gone    map[string]uint32 // ids, by what lists
	lists   []byte            // of times that are gone, each once
	listsOf []uint32          // per series, up to the last that has one
}

type familyMetadata struct {
	metadata.Metadata
	family string
}

type nameBuilder struct {
	name   string
	ids    map[string]uint32
	values []string
	col    []uint32
	lastID uint32 // of the series before, most often the same
}

// chunkBuilder collects a chunkPart.
type chunkBuilder struct {
	offset    int64
	sizes     []int64
	counts    []int
	beside    [][]int64 // sizes of the pages of further groups, of each page
	inPage    int
	spanIDs   map[span]uint32
	spans     []byte
	refs      []byte
	perSeries []byte
	total     int
}

func newSeriesBuilder() *seriesBuilder {
	return &seriesBuilder{
		byName: map[string]*nameBuilder{}, metas: map[familyMetadata]uint32{},
		times: Range{math.MaxInt64, math.MinInt64},
	}
}

func (b *seriesBuilder) addLabels(ls labels.Labels) {
	ls.Range(func(l labels.Label) {
		n := b.byName[l.Name]
		if n == nil {
			b.bytes += len(l.Name) + b.series
			n = &nameBuilder{name: string([]byte(l.Name)), ids: map[string]uint32{}}
			b.byName[n.name] = n
			b.names = append(b.names, n)
		}
		for len(n.col) < b.series {
			n.col = append(n.col, absent)
		}
		if n.lastID == absent || n.values[n.lastID-1] != l.Value {
			id, ok := n.ids[l.Value]
			if !ok {
				v := string([]byte(l.Value))
				n.values = append(n.values, v)
				id = uint32(len(n.values))
				n.ids[v] = id
				b.bytes += len(v)
			}
			n.lastID = id
		}
		n.col = append(n.col, n.lastID)
	})
}

func (b *seriesBuilder) addMetadata(m metadata.Metadata, family string) {
	if m == (metadata.Metadata{}) {
		b.metaOf = append(b.metaOf, 0)
		return
	}
	id, ok := b.metas[familyMetadata{m, family}]
	if !ok {
		id = uint32(len(b.metas) + 1)
		m = metadata.Metadata{Type: model.MetricType([]byte(m.Type)), Unit: string([]byte(m.Unit)), Help: string([]byte(m.Help))}
		family = string([]byte(family))
		b.metas[familyMetadata{m, family}] = id
		b.families = appendText(b.families, family)
		b.named = b.named || family != ""
		b.metaBytes = appendText(b.metaBytes, string(m.Type))
		b.metaBytes = appendText(b.metaBytes, m.Unit)
		b.metaBytes = appendText(b.metaBytes, m.Help)
		b.bytes += len(m.Unit) + len(m.Help) + len(family)
	}
	b.metaOf = binary.AppendUvarint(b.metaOf, uint64(id))
}

// addGone notes the times that are gone of the series that is being added.
func (b *seriesBuilder) addGone(rs []Range) {
	list := binary.AppendUvarint(nil, uint64(len(rs)))
	for _, r := range rs {
		list = appendTimeRange(list, r)
	}
	id, ok := b.gone[string(list)]
	if !ok {
		if b.gone == nil {
			b.gone = map[string]uint32{}
		}
		id = uint32(len(b.gone) + 1)
		b.gone[string(list)] = id
		b.lists = append(b.lists, list...)
	}
	for len(b.listsOf) < b.series {
		b.listsOf = append(b.listsOf, 0)
	}
	b.listsOf = append(b.listsOf, id)
}

func (b *chunkBuilder) add(kind Kind, r Range, samples int) {
	s := span{r, samples}
	id, ok := b.spanIDs[s]
	if !ok {
		if b.spanIDs == nil {
			b.spanIDs = map[span]uint32{}
		}
		id = uint32(len(b.spanIDs))
		b.spanIDs[s] = id
		b.spans = appendTimeRange(b.spans, r)
		b.spans = binary.AppendUvarint(b.spans, uint64(samples))
	}
	b.refs = append(b.refs, byte(kind))
	b.refs = binary.AppendUvarint(b.refs, uint64(id))
	b.inPage++
	b.total++
}

// endPage notes that the chunks added since the last page are in one of size bytes.
func (b *chunkBuilder) endPage(offset, size int64) {
	if len(b.sizes) == 0 {
		b.offset = offset
	}
	b.sizes = append(b.sizes, size)
	b.counts = append(b.counts, b.inPage)
	b.inPage = 0
}

// endBeside notes the size of the page of the next group that belongs to the last page.
func (b *chunkBuilder) endBeside(size int64) {
	for len(b.beside) < len(b.sizes) {
		b.beside = append(b.beside, nil)
	}
	n := len(b.beside) - 1
	b.beside[n] = append(b.beside[n], size)
}

func (b *chunkBuilder) data() Location {
	l := Location{Offset: b.offset}
	for _, n := range b.sizes {
		l.Size += n
	}
	return l
}

func (b *chunkBuilder) bytes() []byte { return b.append(nil) }

// groupBytes is bytes for windows in groups.
func (b *chunkBuilder) groupBytes() []byte {
	return b.append([]byte{byte(1 + len(b.beside[0]))})
}

func (b *chunkBuilder) append(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(b.offset))
	dst = binary.AppendUvarint(dst, uint64(len(b.sizes)))
	for i := range b.sizes {
		dst = binary.AppendUvarint(dst, uint64(b.sizes[i]))
		dst = binary.AppendUvarint(dst, uint64(b.counts[i]))
		if b.beside != nil {
			for _, n := range b.beside[i] {
				dst = binary.AppendUvarint(dst, uint64(n))
			}
		}
	}
	dst = binary.AppendUvarint(dst, uint64(len(b.spanIDs)))
	dst = append(dst, b.spans...)
	dst = append(dst, b.perSeries...)
	return append(dst, b.refs...)
}

func appendPart(dst []byte, part int, b []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(part))
	dst = binary.AppendUvarint(dst, uint64(len(b)))
	return append(dst, b...)
}

// appendTo appends the page to dst.
func (b *seriesBuilder) appendTo(dst []byte, compress bool) []byte {
	slices.SortFunc(b.names, func(x, y *nameBuilder) int {
		if x.name < y.name {
			return -1
		}
		return 1
	})
	body := binary.AppendUvarint(nil, uint64(b.series))
	body = binary.AppendUvarint(body, uint64(len(b.names)))
	for _, n := range b.names {
		body = n.append(body, b.series)
	}
	body = appendPart(body, partChunks, b.chunks.bytes())
	if b.exemplars.total > 0 {
		body = appendPart(body, partExemplars, b.exemplars.bytes())
	}
	if len(b.metas) > 0 {
		metas := binary.AppendUvarint(nil, uint64(len(b.metas)))
		metas = append(metas, b.metaBytes...)
		body = appendPart(body, partMetadata, append(metas, b.metaOf...))
		if b.named {
			body = appendPart(body, partFamilies, b.families)
		}
	}
	if len(b.gone) > 0 {
		part := append(binary.AppendUvarint(nil, uint64(len(b.gone))), b.lists...)
		for i := range b.series {
			id := uint32(0)
			if i < len(b.listsOf) {
				id = b.listsOf[i]
			}
			part = binary.AppendUvarint(part, uint64(id))
		}
		body = appendPart(body, partGone, part)
	}
	if b.short.total > 0 {
		body = appendPart(body, partShortGroups, b.short.groupBytes())
	}
	if b.long.total > 0 {
		body = appendPart(body, partLongGroups, b.long.groupBytes())
	}
	return appendPage(dst, pageSeries, body, compress)
}

func (n *nameBuilder) append(dst []byte, series int) []byte {
	order := make([]uint32, len(n.values))
	for i := range order {
		order[i] = uint32(i)
	}
	slices.SortFunc(order, func(x, y uint32) int {
		if n.values[x] < n.values[y] {
			return -1
		}
		return 1
	})
	rank := make([]uint32, len(order)+1)
	values := make([]string, len(order))
	for i, o := range order {
		rank[o+1] = uint32(i + 1)
		values[i] = n.values[o]
	}
	dst = appendText(dst, n.name)
	dst = appendAscending(dst, values)
	for len(n.col) < series {
		n.col = append(n.col, absent)
	}
	width := idWidth(len(values))
	for _, id := range n.col {
		id = rank[id]
		switch width {
		case 1:
			dst = append(dst, byte(id))
		case 2:
			dst = binary.LittleEndian.AppendUint16(dst, uint16(id))
		default:
			dst = binary.LittleEndian.AppendUint32(dst, id)
		}
	}
	return dst
}

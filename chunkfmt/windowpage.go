package chunkfmt

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// maxRunWindows is how many windows a chunk of them holds at most: more than a
// week has of five minutes.
const maxRunWindows = 4096

// apart is the head of a chunk of windows whose columns of values are stored each
// for itself; any other is the scale of the integers that they are.
const apart = 0xff

// Forms of the columns of sums and resets in a chunk that isn't apart.
const (
	formFloats = 0 // a column of floats
	formInts   = 1 // integers of the chunk's scale; sums less the count times half of min plus max
)

// noResets is a column of integers that are all 0: what most counters have.
const noResets = "\x01\x00\x00"

// Forms of the column of changes.
const (
	changesPlain = 0
	changesLess  = 1 // how many less there are than could be
)

// WindowPage is a parsed page of window summaries. It is safe for concurrent use.
type WindowPage struct {
	id     uint64 // of this page in the memory of decoders
	group  windowGroup
	width  int64
	shapes []timesColumn // what is said of when there were samples; not in groups behind the first
	chunks []windowChunk
	body   []byte

	beside [windowGroups]*WindowPage // of a page of the first group, those of others that are at hand
}

type windowChunk struct {
	shape uint32
	end   uint32 // it begins where the one before ends
}

// What there is at least in a page, in bytes, so that a page of nothing but counts takes
// no more memory than a few times its size.
const (
	leastShape = 2 + 6 // windows, size; a byte for each column
	leastFirst = 2 + 2 // shape, size; head and a column
	leastOther = 1 + 1 // size; a column
)

// windowGroup says which columns a page of windows has: those that queries want together.
type windowGroup byte

const (
	allColumns   windowGroup = iota // what was written before there were groups
	groupEnds                       // times, first, last, reset
	groupPrev                       // prev
	groupValues                     // min, max, sum, resets, changes
	groupMoment                     // m2
	windowGroups                    // so many, with allColumns
)

// parts of a chunk that pages of the group have, the last excluded.
func (g windowGroup) parts() (from, to int) {
	switch g {
	case groupEnds:
		return partEnds, partPrev
	case groupPrev:
		return partPrev, partExtrema
	case groupValues:
		return partExtrema, partMoment
	case groupMoment:
		return partMoment, windowParts
	default:
		return 0, windowParts
	}
}

// wanted says whether columns lie in a group.
func (g windowGroup) wanted(cols rollup.Columns) bool {
	switch g {
	case groupPrev:
		return cols&rollup.Prev != 0
	case groupValues:
		return cols&(rollup.Min|rollup.Max|rollup.Sum|rollup.Resets|rollup.Changes) != 0
	case groupMoment:
		return cols&rollup.M2 != 0
	default:
		return true
	}
}

// ParseWindowPage checks a page of windows, of whatever group. The page keeps b and must
// not outlive changes to it.
func ParseWindowPage(b []byte) (*WindowPage, error) {
	body, err := onlyPage(b, pageWindows)
	if err != nil {
		return nil, fmt.Errorf("windows page: %w", err)
	}
	p := &WindowPage{id: pageIDs.Add(1)}
	c := over(body)
	if p.width = int64(c.Bounded("width", maxWidth)); p.width == 0 && c.Err == nil {
		if p.group = windowGroup(c.Byte()); p.group == allColumns || p.group >= windowGroups {
			c.Fail("group %d of columns", p.group)
		}
		if p.width = int64(c.Bounded("width", maxWidth)); p.width == 0 {
			c.Fail("width is 0")
		}
	}
	shapes := p.group <= groupEnds
	var sizes []uint64
	if shapes {
		p.shapes = make([]timesColumn, c.Count(leastShape))
		sizes = make([]uint64, len(p.shapes))
	}
	for i := range p.shapes {
		p.shapes[i].n = c.Bounded("windows of a chunk", maxRunWindows)
		sizes[i] = c.Uvarint()
	}
	least := leastOther
	if shapes {
		least = leastFirst
	}
	p.chunks = make([]windowChunk, c.Count(least))
	for i := range p.chunks {
		k := &p.chunks[i]
		if shapes {
			if k.shape = uint32(c.Bounded("shape", math.MaxInt32)); k.shape >= uint32(len(p.shapes)) {
				c.Fail("chunk %d names shape %d of %d", i, k.shape, len(p.shapes))
			}
		}
		k.end = uint32(c.Bounded("bytes of a chunk", MaxPage)) // for now its size
		if c.Err != nil {
			break
		}
	}
	for i, n := range sizes {
		if n > uint64(len(c.B)) {
			c.Fail("shape of %d bytes, %d left", n, len(c.B))
			break
		}
		p.shapes[i].b = c.Bytes(int(n))
	}
	// With all its capacity, so that unpacking may load beyond the end of a chunk.
	p.body = c.B
	from := uint32(0)
	for i := range p.chunks {
		k := &p.chunks[i]
		if k.end > uint32(len(p.body))-from {
			c.Fail("chunk of %d bytes, %d left", k.end, uint32(len(p.body))-from)
			break
		}
		k.end += from
		from = k.end
	}
	if c.Err == nil {
		c.B = c.B[from:]
	}
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("windows page: %w", err)
	}
	return p, nil
}

// maxWidth is the widest window, in ms: a day.
const maxWidth = 24 * 3600 * 1000

// Width is that of all windows in the page, in ms.
func (p *WindowPage) Width() int64 { return p.width }

// Len is the number of chunks in the page.
func (p *WindowPage) Len() int { return len(p.chunks) }

// Windows is the number of windows in chunk i, known before it is decoded; 0 if
// there is no such chunk, or if the page doesn't say.
func (p *WindowPage) Windows(i int) int {
	if i < 0 || i >= len(p.chunks) || len(p.shapes) == 0 {
		return 0
	}
	return p.shapes[p.chunks[i].shape].n
}

// With is the page together with those of other groups of columns, which series pages
// name beside it. Errors wrap ErrCorrupt.
func (p *WindowPage) With(others ...*WindowPage) (*WindowPage, error) {
	if len(others) == 0 {
		return p, nil
	}
	all := *p
	for _, o := range others {
		switch {
		case p.group != groupEnds || o.group <= groupEnds || all.beside[o.group] != nil:
			return nil, fmt.Errorf("windows page: %w", corrupt("columns of group %d beside those of group %d", o.group, p.group))
		case o.width != p.width || len(o.chunks) != len(p.chunks):
			return nil, fmt.Errorf("windows page: %w", corrupt("group %d has %d chunks of windows of %d ms, group %d has %d of %d ms",
				o.group, len(o.chunks), o.width, p.group, len(p.chunks), p.width))
		}
		all.beside[o.group] = o
	}
	return &all, nil
}

// WindowDecoder decodes chunks of windows. It keeps memory between calls, and
// remembers the times of windows: series share them. The zero value is ready. Not
// safe for concurrent use.
type WindowDecoder struct {
	codec codec.Decoder
	known map[shapeKey]knownShape
	times rollup.Windows
	evens []rollup.Even // of known shapes
	one   [1]rollup.Even

	first, last, ints, least, most []int64
	dropped                        []float64
}

type shapeKey struct {
	page  uint64 // id
	shape uint32
}

// knownShape is where a shape lies in the times that a decoder remembers.
type knownShape struct {
	at    int
	empty bool // there are windows without floats
	// The stretches that they are, in evens; none if they would be too many.
	from, to int
}

// windowsPerStretch is how many windows a stretch has on average, at least, that pays.
const windowsPerStretch = 3

// rememberedWindows bounds the windows whose times a decoder remembers, of about 40
// bytes each: a year of blocks of a week with windows of an hour, of ten targets.
const rememberedWindows = 1 << 17

// Decode appends the windows of chunk i of p to dst: End, Count, Flags and the
// columns cols, which are those that dst has if it has windows already. A page in groups
// has to be of the first, With those of the columns. If it returns an error, dst is as before.
func (d *WindowDecoder) Decode(p *WindowPage, i int, cols rollup.Columns, dst *rollup.Windows) error {
	if i < 0 || i >= len(p.chunks) || p.group > groupEnds {
		return fmt.Errorf("windows page: %w", corrupt("chunk %d of %d in group %d", i, len(p.chunks), p.group))
	}
	shape := p.chunks[i].shape
	out := *dst
	empty, err := d.appendTimes(p, shape, cols, &out)
	if err == nil {
		n := p.shapes[shape].n
		err = d.values(p, i, cols, &out, len(out.End)-n, n, empty)
	}
	if err != nil {
		return fmt.Errorf("windows page: chunk %d: %w", i, err)
	}
	*dst = out
	return nil
}

// besideEven are the columns that can be decoded without those of times.
const besideEven = rollup.First | rollup.Prev | rollup.Last | rollup.Reset

// DecodeEven is Decode, but leaves times as Even where that pays and dst has no other windows. If rest isn't 0,
// PrevV may then be anything for windows whose last float but one is so many ms before their end, or more.
func (d *WindowDecoder) DecodeEven(p *WindowPage, i int, cols rollup.Columns, rest int64, dst *rollup.Windows) error {
	if i >= 0 && i < len(p.chunks) && p.group <= groupEnds && len(dst.End) == 0 && cols&^besideEven == 0 {
		shape := p.chunks[i].shape
		es, err := d.stretches(p, shape)
		if len(es) > 0 {
			out, n, need := *dst, p.shapes[shape].n, cols
			if rest > 0 && cols&rollup.Prev != 0 && !slices.ContainsFunc(es, func(e rollup.Even) bool { return e.Prev < rest }) {
				need &^= rollup.Prev
				out.PrevV = extend(out.PrevV, n)
			}
			if err = d.values(p, i, need, &out, 0, n, false); err == nil {
				out.AppendEvens(es)
				*dst = out
			}
		}
		switch {
		case err != nil:
			return fmt.Errorf("windows page: chunk %d: %w", i, err)
		case len(es) > 0:
			return nil
		}
	}
	dst.Expand(cols)
	return d.Decode(p, i, cols, dst)
}

// stretches are those of a shape, good until the next call; none if it is better taken by columns.
func (d *WindowDecoder) stretches(p *WindowPage, shape uint32) ([]rollup.Even, error) {
	if e, ok := stretch(p.shapes[shape].b, p.shapes[shape].n, p.width); ok {
		d.one[0] = e
		return d.one[:], nil
	}
	k, ok := d.known[shapeKey{p.id, shape}]
	if !ok {
		var err error
		if k, err = d.shape(p, shape); err != nil {
			return nil, err
		}
	}
	return d.evens[k.from:k.to], nil
}

// appendTimes appends the columns of times of a shape, and says whether there are windows
// without floats.
func (d *WindowDecoder) appendTimes(p *WindowPage, shape uint32, cols rollup.Columns, out *rollup.Windows) (empty bool, err error) {
	n := p.shapes[shape].n
	k, ok := d.known[shapeKey{p.id, shape}]
	if !ok {
		if e, ok := stretch(p.shapes[shape].b, n, p.width); ok {
			out.AppendTimes(&e, cols)
			return false, nil
		}
		if k, err = d.shape(p, shape); err != nil {
			return false, err
		}
	}
	at := k.at
	out.End = append(out.End, d.times.End[at:at+n]...)
	out.Count = append(out.Count, d.times.Count[at:at+n]...)
	out.Flags = append(out.Flags, d.times.Flags[at:at+n]...)
	if cols&rollup.First != 0 {
		out.FirstT = append(out.FirstT, d.times.FirstT[at:at+n]...)
	}
	if cols&rollup.Prev != 0 {
		out.PrevT = append(out.PrevT, d.times.PrevT[at:at+n]...)
	}
	if cols&rollup.Last != 0 {
		out.LastT = append(out.LastT, d.times.LastT[at:at+n]...)
	}
	return k.empty, nil
}

// shape puts a shape of p into d.times, and gives where it lies there.
func (d *WindowDecoder) shape(p *WindowPage, shape uint32) (knownShape, error) {
	key := shapeKey{p.id, shape}
	n := p.shapes[shape].n
	at := len(d.times.End)
	if d.known == nil || at+n > rememberedWindows {
		d.known = map[shapeKey]knownShape{}
		d.times.Clear()
		d.evens = d.evens[:0]
		at = 0
	}
	if err := d.decodeShape(p.shapes[shape].b, n, p.width); err != nil {
		d.known = nil // what was appended is in the way
		return knownShape{}, err
	}
	k := knownShape{at: at, empty: slices.Contains(d.times.Count[at:], 0), from: len(d.evens)}
	d.evens = d.times.AppendStretches(d.evens, at, n/windowsPerStretch, p.width)
	k.to = len(d.evens)
	for at, i := 0, k.from; i < k.to; i++ {
		d.evens[i].At = at
		at += d.evens[i].N
	}
	d.known[key] = k
	return k, nil
}

// decodeShape appends the times of n windows to d.times, and checks them.
func (d *WindowDecoder) decodeShape(b []byte, n int, width int64) error {
	w, at := &d.times, len(d.times.End)
	var err error
	column := func(into []int64) []int64 {
		if err == nil {
			into, b, err = d.codec.Ints(into[:0], b, n)
		}
		return into
	}
	w.End = slices.Grow(w.End, n+8) // the codec would take just as much as it needs
	if w.End, b, err = d.codec.Times(w.End, b, n); err != nil {
		return err
	}
	count, flags := column(d.first), column(d.last)
	first, last, prev := column(d.ints), column(d.least), column(d.most)
	d.first, d.last, d.ints, d.least, d.most = count, flags, first, last, prev
	if err != nil {
		return err
	}
	if len(b) > 0 {
		return corrupt("%d bytes behind a shape", len(b))
	}
	w.End = w.End[:at+n]
	w.Count, w.Flags = extend(w.Count, n), extend(w.Flags, n)
	w.FirstT, w.PrevT, w.LastT = extend(w.FirstT, n), extend(w.PrevT, n), extend(w.LastT, n)
	ends, counts, flagsOf := w.End[at:][:n], w.Count[at:][:n], w.Flags[at:][:n]
	firsts, prevs, lasts := w.FirstT[at:][:n], w.PrevT[at:][:n], w.LastT[at:][:n]
	count, flags, first, last, prev = count[:n], flags[:n], first[:n], last[:n], prev[:n]
	if err := scaleEnds(ends, width); err != nil {
		return err
	}
	bad, said := int64(0), int64(0)
	for i, end := range ends {
		f, l, v, k := first[i], last[i], prev[i], count[i]
		// From the start of the window, exclusive, to its end. What is not in order is
		// negative, or makes a difference so.
		bad |= f | l | v | (width - 1 - f) | (width - 1 - l) | (width - 1 - v) | k | (width - k) | flags[i]
		if bad >= 0 {
			bad |= width - 1 - f - l - v
		}
		said |= flags[i]
		counts[i], flagsOf[i] = uint32(k), rollup.Flags(flags[i])
		firsts[i], prevs[i], lasts[i] = end-width+1+f, end-l-v, end-l
		if k == 0 {
			firsts[i] = end
			if f|l|v != 0 {
				bad = -1
			}
		}
	}
	if bad < 0 || said > math.MaxUint8 || !rollup.Flags(said).Valid() {
		return corrupt("there are windows of no samples")
	}
	return nil
}

// scaleEnds makes times of the numbers of windows, which have to ascend.
func scaleEnds(ends []int64, width int64) error {
	limit := math.MaxInt64 / width
	before := -limit
	for i, end := range ends {
		if end <= before || end >= limit {
			return corrupt("windows out of order")
		}
		before = end
		ends[i] = end * width
	}
	return nil
}

// stretch is what n windows are that differ in nothing but where they lie, as those of
// a target do that was never missed: that is made faster than found. It reports false
// if they are others.
func stretch(b []byte, n int, width int64) (rollup.Even, bool) {
	at, step, b, ok := codec.Grid(b)
	if !ok || step != 1 && n > 1 {
		return rollup.Even{}, false
	}
	var c [5]int64
	for i := range c {
		if c[i], b, ok = codec.Const(b); !ok {
			return rollup.Even{}, false
		}
	}
	count, flags, first, last, prev := c[0], c[1], c[2], c[3], c[4]
	limit := math.MaxInt64 / width
	if at <= -limit || at >= limit-int64(n) || count <= 0 || count > width || flags < 0 || flags > math.MaxUint8 || !rollup.Flags(flags).Valid() ||
		first < 0 || last < 0 || prev < 0 || first >= width || last >= width || prev > width-1-last-first || len(b) > 0 {
		return rollup.Even{}, false
	}
	return rollup.Even{
		N: n, End: at * width, Width: width, Count: uint32(count), Flags: rollup.Flags(flags),
		First: width - 1 - first, Prev: last + prev, Last: last,
	}, true
}

// Parts of a chunk, each with its size before them but for the last of a group: what isn't
// asked for is skipped.
const (
	partEnds    = iota // first, last
	partReset          // reset
	partPrev           // prev
	partExtrema        // min, max
	partSum            // sum
	partCounts         // resets, changes
	partMoment         // m2, if there is one
	windowParts
)

// needs are the parts that have to be decoded for columns.
func needs(cols rollup.Columns, head byte) (parts [windowParts]bool) {
	has := func(c rollup.Columns) bool { return cols&c != 0 }
	parts[partSum] = has(rollup.Sum)
	parts[partExtrema] = has(rollup.Min|rollup.Max) || parts[partSum] && head != apart
	parts[partReset] = has(rollup.Reset)
	parts[partPrev] = has(rollup.Prev)
	parts[partEnds] = has(rollup.First|rollup.Last) || head != apart && (parts[partPrev] || parts[partExtrema])
	parts[partCounts] = has(rollup.Resets | rollup.Changes)
	parts[partMoment] = has(rollup.M2)
	return parts
}

// chunk takes apart a chunk of a page, which has so many of the parts.
func (p *WindowPage) chunk(i int, parts *[windowParts][]byte) (head byte, err error) {
	from := uint32(0)
	if i > 0 {
		from = p.chunks[i-1].end
	}
	c := over(p.body[from:p.chunks[i].end])
	n := uint64(len(c.B))
	if p.group <= groupEnds {
		head = c.Byte()
	}
	first, to := p.group.parts()
	var size [windowParts]int
	for k := first; k < to-1; k++ {
		size[k] = c.Bounded("part", n)
	}
	for k := first; k < to-1; k++ {
		parts[k] = c.Bytes(size[k])
	}
	parts[to-1] = c.B
	return head, c.Err
}

// values appends the columns of values of n windows, which are a chunk of p, to w, which has
// their times from index at on, if not only besideEven are wanted.
func (d *WindowDecoder) values(p *WindowPage, chunk int, cols rollup.Columns, w *rollup.Windows, at, n int, empty bool) error {
	var part [windowParts][]byte
	head, err := p.chunk(chunk, &part)
	if err != nil {
		return err
	}
	for g := groupPrev; p.group == groupEnds && g < windowGroups; g++ {
		if !g.wanted(cols) {
			continue
		}
		if p.beside[g] == nil {
			return corrupt("columns of group %d are not there", g)
		}
		if _, err := p.beside[g].chunk(chunk, &part); err != nil {
			return fmt.Errorf("group %d: %w", g, err)
		}
	}
	v := windowValues{WindowDecoder: d, w: w, at: at, n: n, head: head, empty: empty}
	for i, is := range needs(cols, head) {
		if !is {
			continue
		}
		rest, err := v.part(i, part[i], cols)
		if err != nil {
			return err
		}
		if len(rest) > 0 {
			return corrupt("%d bytes behind part %d", len(rest), i)
		}
	}
	return nil
}

// windowValues decodes the values of n windows, which begin at index at of w.
type windowValues struct {
	*WindowDecoder
	w     *rollup.Windows
	at, n int
	head  byte
	empty bool // there are windows without floats
}

func (v *windowValues) part(i int, b []byte, cols rollup.Columns) (rest []byte, err error) {
	switch i {
	case partEnds:
		return v.endsPart(b, cols)
	case partReset:
		return v.resetPart(b)
	case partPrev:
		return v.prevPart(b)
	case partExtrema:
		return v.extremaPart(b, cols)
	case partSum:
		return v.sumPart(b)
	case partCounts:
		return v.countsPart(b, cols)
	default:
		return v.momentPart(b)
	}
}

// floats appends integers of the chunk's scale as floats, 0 where there are no
// samples.
func (v *windowValues) floats(dst []float64, ints []int64) ([]float64, error) {
	at := len(dst)
	dst = extend(dst, v.n)
	if !codec.ScaledFloats(dst[at:], ints, v.head) {
		return dst, corrupt("scale %d", v.head)
	}
	if v.empty {
		for i, n := range v.w.Count[v.at:] {
			if n == 0 {
				dst[at+i] = 0
			}
		}
	}
	return dst, nil
}

// extend makes s longer by n elements, whatever they are.
func extend[E any](s []E, n int) []E {
	at := len(s)
	if cap(s)-at < n {
		s = append(make([]E, 0, max(at+n, 2*cap(s))), s...)
	}
	return s[:at+n]
}

// column appends a column of floats that is stored for itself.
func (v *windowValues) column(dst *[]float64, b []byte, wanted bool) ([]byte, error) {
	if !wanted {
		var err error
		v.dropped, b, err = v.codec.Floats(v.dropped[:0], b, v.n)
		return b, err
	}
	out, rest, err := v.codec.Floats(*dst, b, v.n)
	*dst = out
	return rest, err
}

func (v *windowValues) endsPart(b []byte, cols rollup.Columns) (rest []byte, err error) {
	w := v.w
	if v.head == apart {
		if b, err = v.column(&w.FirstV, b, cols&rollup.First != 0); err != nil {
			return nil, err
		}
		return v.column(&w.LastV, b, cols&rollup.Last != 0)
	}
	start, k := binary.Varint(b)
	if k <= 0 {
		return nil, corrupt("bad varint")
	}
	// first is where it is from the last before, last where that is from first.
	if v.first, b, err = v.codec.Ints(append(v.first[:0], 0), b[k:], v.n-1); err != nil {
		return nil, err
	}
	if v.last, b, err = v.codec.Ints(v.last[:0], b, v.n); err != nil {
		return nil, err
	}
	first, last := v.first[:v.n], v.last[:v.n]
	if v.head == 0 && !v.empty && cols&(rollup.First|rollup.Last) == rollup.First|rollup.Last {
		// What most counters are.
		k, l := len(w.FirstV), len(w.LastV)
		w.FirstV, w.LastV = extend(w.FirstV, v.n), extend(w.LastV, v.n)
		sumEnds(start, first, last, w.FirstV[k:], w.LastV[l:])
		return b, nil
	}
	at := start
	for i := range first {
		at += first[i]
		first[i] = at
		at += last[i]
		last[i] = at
	}
	if cols&rollup.First != 0 {
		if w.FirstV, err = v.floats(w.FirstV, first); err != nil {
			return nil, err
		}
	}
	if cols&rollup.Last != 0 {
		w.LastV, err = v.floats(w.LastV, last)
	}
	return b, err
}

// sumEnds makes of first and last what they are, from what they are from each other, and floats of them.
func sumEnds(at int64, first, last []int64, firstV, lastV []float64) {
	last, firstV, lastV = last[:len(first)], firstV[:len(first)], lastV[:len(first)]
	for i, d := range first {
		l := last[i]
		first[i] = at + d
		firstV[i] = float64(at + d)
		at += d + l
		last[i] = at
		lastV[i] = float64(at)
	}
}

func (v *windowValues) prevPart(b []byte) (rest []byte, err error) {
	if v.head == apart {
		return v.column(&v.w.PrevV, b, true)
	}
	if v.ints, b, err = v.codec.Ints(v.ints[:0], b, v.n); err != nil {
		return nil, err
	}
	prev := v.ints[:v.n]
	for i, l := range v.last[:v.n] {
		prev[i] = l - prev[i]
	}
	v.w.PrevV, err = v.floats(v.w.PrevV, prev)
	return b, err
}

func (v *windowValues) extremaPart(b []byte, cols rollup.Columns) (rest []byte, err error) {
	w := v.w
	if v.head == apart {
		if b, err = v.column(&w.Min, b, cols&rollup.Min != 0); err != nil {
			return nil, err
		}
		return v.column(&w.Max, b, cols&rollup.Max != 0)
	}
	if v.least, b, err = v.codec.Ints(v.least[:0], b, v.n); err != nil {
		return nil, err
	}
	if v.most, b, err = v.codec.Ints(v.most[:0], b, v.n); err != nil {
		return nil, err
	}
	least, most := v.least[:v.n], v.most[:v.n]
	last := v.last[:v.n]
	for i, f := range v.first[:v.n] {
		least[i] = min(f, last[i]) - least[i]
		most[i] += max(f, last[i])
	}
	if cols&rollup.Min != 0 {
		if w.Min, err = v.floats(w.Min, least); err != nil {
			return nil, err
		}
	}
	if cols&rollup.Max != 0 {
		w.Max, err = v.floats(w.Max, most)
	}
	return b, err
}

func (v *windowValues) sumPart(b []byte) (rest []byte, err error) {
	if v.head == apart {
		return v.column(&v.w.Sum, b, true)
	}
	ints, b, err := v.form(&v.w.Sum, b)
	if err != nil || ints == nil {
		return b, err
	}
	least, most := v.least[:v.n], v.most[:v.n]
	for i, n := range v.w.Count[v.at:] {
		ints[i] += expectedSum(n, least[i], most[i])
	}
	v.w.Sum, err = v.floats(v.w.Sum, ints)
	return b, err
}

// expectedSum is about what so many values between two are together.
func expectedSum(n uint32, least, most int64) int64 { return int64(n) * (least + most) / 2 }

// form decodes a column that is of floats or of integers, in the latter case gives
// those.
func (v *windowValues) form(dst *[]float64, b []byte) (ints []int64, rest []byte, err error) {
	if len(b) == 0 {
		return nil, nil, corrupt("ends early")
	}
	switch {
	case b[0] == formFloats:
		rest, err = v.column(dst, b[1:], true)
		return nil, rest, err
	case b[0] == formInts && v.head != codec.BitsScale:
		v.ints, rest, err = v.codec.Ints(v.ints[:0], b[1:], v.n)
		return v.ints, rest, err
	}
	return nil, nil, corrupt("column of form %d", b[0])
}

func (v *windowValues) resetPart(b []byte) (rest []byte, err error) {
	if v.head == apart {
		return v.column(&v.w.Reset, b, true)
	}
	if string(b) == noResets {
		at := len(v.w.Reset)
		v.w.Reset = extend(v.w.Reset, v.n)
		clear(v.w.Reset[at:])
		return nil, nil
	}
	ints, b, err := v.form(&v.w.Reset, b)
	if err != nil || ints == nil {
		return b, err
	}
	v.w.Reset, err = v.floats(v.w.Reset, ints)
	return b, err
}

func (v *windowValues) countsPart(b []byte, cols rollup.Columns) (rest []byte, err error) {
	w := v.w
	if v.ints, b, err = v.codec.Ints(v.ints[:0], b, v.n); err != nil {
		return nil, err
	}
	if cols&rollup.Resets != 0 {
		for _, x := range v.ints {
			w.Resets = append(w.Resets, uint32(x))
		}
	}
	if len(b) == 0 || b[0] > changesLess {
		return nil, corrupt("form of changes")
	}
	less := b[0] == changesLess
	if v.ints, b, err = v.codec.Ints(v.ints[:0], b[1:], v.n); err != nil {
		return nil, err
	}
	if cols&rollup.Changes != 0 {
		for i, x := range v.ints {
			if n := w.Count[v.at+i]; less && n > 0 {
				x = int64(n-1) - x
			}
			w.Changes = append(w.Changes, uint32(x))
		}
	}
	return b, nil
}

func (v *windowValues) momentPart(b []byte) (rest []byte, err error) {
	return v.column(&v.w.M2, b, true)
}

package chunkfmt

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
)

// Directory tells which pages a tenant has in a block. It is safe for
// concurrent use.
type Directory struct {
	Times   Range
	Series  uint64
	Samples uint64
	Level   int // WriterOptions.Level; 0 also where it isn't noted
	// Gone says that of some samples only summaries of windows are left.
	Gone bool
	// Labels is the location of the label page. Its Size is 0 if there is
	// none, which is so if there is at most one series page: that page's
	// LabelPage method then tells the same.
	Labels Location

	pages []PageRef
}

// PageRef is what a directory says of one series page.
type PageRef struct {
	Location             // of the series page
	Data        Location // of all data pages of its series, which lie together
	FirstMetric string   // metric name of its first series
	LastMetric  string   // and of its last
	Times       Range    // of all its samples and exemplars, and of windows whose samples are gone
	Series      uint64
	Samples     uint64
	Short, Long Summarised

	// Bytes is the page itself, if it came with the directory; else nil.
	Bytes []byte
}

// Summarised says of windows of one width how many there are summaries of, and of
// how many samples those were made.
type Summarised struct {
	Windows, Samples uint64
}

// Lists of pages in a directory. A reader skips those it does not know.
const (
	listSeries  = 1
	listWindows = 2
	listLevel   = 3
)

// ParseDirectory checks the bytes at a TenantSummary's Directory. The result
// keeps b.
func ParseDirectory(b []byte) (*Directory, error) {
	d, typ := &Directory{}, pageDirectory
	if len(b) > 0 {
		if t := pageType(b[0]) &^ pageZstd; t == pageGoneDirectory || t == pageGroupsDirectory {
			d.Gone, typ = true, t
		}
	}
	body, rest, err := openPage(b, typ)
	if err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	c := over(body)
	self := c.offset()
	d.Times = c.timeRange()
	d.Series, d.Samples = c.Uvarint(), c.Uvarint()
	if size := c.Bounded("label page", MaxPage+pageHead+pageTail); size > 0 {
		d.Labels = Location{Offset: c.offset(), Size: int64(size)}
	}
	c.parts(func(list int, c *cursor) {
		switch list {
		case listSeries:
			d.pages = c.pageRefs()
		case listWindows:
			for i := range d.pages {
				p := &d.pages[i]
				p.Short = Summarised{Windows: c.Uvarint(), Samples: c.Uvarint()}
				p.Long = Summarised{Windows: c.Uvarint(), Samples: c.Uvarint()}
			}
		case listLevel:
			d.Level = c.Bounded("level", 255)
		default:
			c.B = nil
		}
	})
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	with := Location{Offset: self + int64(len(b)-len(rest)), Size: int64(len(rest))}
	for i := range d.pages {
		if p := &d.pages[i]; p.Offset >= with.Offset && p.End() <= with.End() {
			p.Bytes = rest[p.Offset-with.Offset : p.End()-with.Offset]
		}
	}
	return d, nil
}

func (c *cursor) pageRefs() []PageRef {
	offset := c.offset()
	refs := make([]PageRef, c.Count(9))
	last := ""
	name := func() string {
		shared := c.Bounded("shared prefix", uint64(len(last)))
		s := last[:shared] + c.Text()
		if s < last {
			c.Fail("metric names out of order at %q", s)
		}
		last = s
		return s
	}
	for i := range refs {
		p := &refs[i]
		p.Location = Location{Offset: offset, Size: int64(c.Bounded("series page", MaxPage+pageHead+pageTail))}
		offset += p.Size
		p.Data = Location{Offset: c.offset(), Size: c.offset()}
		p.FirstMetric, p.LastMetric = name(), name()
		p.Times = c.timeRange()
		p.Series, p.Samples = c.Uvarint(), c.Uvarint()
		if c.Err != nil {
			return nil
		}
	}
	return refs
}

// Pages returns the series pages that may hold series that match all of ms and
// have samples in mint to maxt, both included; all pages for no matchers and
// math.MinInt64 to math.MaxInt64. They lie in ascending order in the object.
func (d *Directory) Pages(ms []*labels.Matcher, mint, maxt int64) []PageRef {
	var out []PageRef
	for _, p := range d.pages {
		if p.Times.Overlaps(mint, maxt) && p.mayMatch(ms) {
			out = append(out, p)
		}
	}
	return out
}

func (p *PageRef) mayMatch(ms []*labels.Matcher) bool {
	for _, m := range ms {
		if m.Name != model.MetricNameLabel {
			continue
		}
		if p.FirstMetric == p.LastMetric {
			if !m.Matches(p.FirstMetric) {
				return false
			}
			continue
		}
		switch m.Type {
		case labels.MatchEqual:
			if m.Value < p.FirstMetric || m.Value > p.LastMetric {
				return false
			}
		case labels.MatchRegexp:
			if names := m.SetMatches(); len(names) > 0 {
				some := false
				for _, n := range names {
					some = some || n >= p.FirstMetric && n <= p.LastMetric
				}
				if !some {
					return false
				}
			} else if prefix := m.Prefix(); prefix != "" {
				if p.LastMetric < prefix || p.FirstMetric > prefix && p.FirstMetric[:min(len(prefix), len(p.FirstMetric))] > prefix {
					return false
				}
			}
		}
	}
	return true
}

// append appends the directory's page, which will lie at offset in the object.
func (d *Directory) append(dst []byte, offset int64, compress bool) []byte {
	body := binary.AppendUvarint(nil, uint64(offset))
	body = appendTimeRange(body, d.Times)
	body = binary.AppendUvarint(body, d.Series)
	body = binary.AppendUvarint(body, d.Samples)
	body = binary.AppendUvarint(body, uint64(d.Labels.Size))
	if d.Labels.Size > 0 {
		body = binary.AppendUvarint(body, uint64(d.Labels.Offset))
	}
	if len(d.pages) > 0 {
		list := binary.AppendUvarint(nil, uint64(d.pages[0].Offset))
		list = binary.AppendUvarint(list, uint64(len(d.pages)))
		last := ""
		name := func(s string) {
			n := sharedPrefix(last, s)
			list = binary.AppendUvarint(list, uint64(n))
			list = appendText(list, s[n:])
			last = s
		}
		for _, p := range d.pages {
			list = binary.AppendUvarint(list, uint64(p.Size))
			list = binary.AppendUvarint(list, uint64(p.Data.Offset))
			list = binary.AppendUvarint(list, uint64(p.Data.Size))
			name(p.FirstMetric)
			name(p.LastMetric)
			list = appendTimeRange(list, p.Times)
			list = binary.AppendUvarint(list, p.Series)
			list = binary.AppendUvarint(list, p.Samples)
		}
		body = appendPart(body, listSeries, list)
		body = d.appendWindows(body)
	}
	if d.Level > 0 {
		body = appendPart(body, listLevel, binary.AppendUvarint(nil, uint64(d.Level)))
	}
	typ := pageDirectory
	if d.Gone {
		typ = pageGroupsDirectory
	}
	return appendPage(dst, typ, body, compress)
}

// appendWindows appends the list of windows, if there are any.
func (d *Directory) appendWindows(body []byte) []byte {
	var list []byte
	some := false
	for i := range d.pages {
		for _, x := range []Summarised{d.pages[i].Short, d.pages[i].Long} {
			list = binary.AppendUvarint(list, x.Windows)
			list = binary.AppendUvarint(list, x.Samples)
			some = some || x != Summarised{}
		}
	}
	if !some {
		return body
	}
	return appendPart(body, listWindows, list)
}

// Footer tells which tenants a block holds.
type Footer struct {
	Version int
	Tenants []TenantSummary // ascending by Tenant
}

// TenantSummary is what a block holds of one tenant: all that its index rows need.
type TenantSummary struct {
	Tenant string
	Range  // of all samples and exemplars; MinT > MaxT never
	// Windows are the ranges of the samples in each window of
	// WriterOptions.Window that has any, ascending; just Range without windows.
	Windows   []Range
	Series    uint64
	Samples   uint64 // without exemplars
	Directory Location
	// Gone is as in the tenant's Directory. Not known from a footer.
	Gone bool
}

// Summary describes a finished block.
type Summary struct {
	Size    int64 // bytes
	Tenants []TenantSummary
}

const (
	// Version is the newest format version that this package knows. It writes it where
	// samples are gone, and else firstVersion: what earlier programs can read, they may.
	Version = 3

	firstVersion = 1

	headerSize  = 8
	trailerSize = 16
	magic       = "EPIBLOCK"
)

// FooterTail is how many bytes from the end of an object to read first: enough
// for the footer of a block with few tenants.
const FooterTail = 4 << 10

// TailError says that more bytes from the end of the object are needed to
// parse its footer.
type TailError struct {
	Need int64 // bytes
}

func (e *TailError) Error() string {
	return fmt.Sprintf("the footer takes the last %d bytes of the block", e.Need)
}

// ParseFooter reads the footer from the last bytes of an object of objectSize
// bytes. If tail is too short, the error is a *TailError that says how much to
// read; else errors wrap ErrCorrupt or ErrVersion.
func ParseFooter(tail []byte, objectSize int64) (*Footer, error) {
	if objectSize < headerSize+trailerSize || int64(len(tail)) > objectSize {
		return nil, fmt.Errorf("footer: %w", corrupt("an object of %d bytes is no block", objectSize))
	}
	if len(tail) < trailerSize {
		return nil, &TailError{Need: min(FooterTail, objectSize)}
	}
	trailer := tail[len(tail)-trailerSize:]
	if string(trailer[8:]) != magic {
		return nil, fmt.Errorf("footer: %w", corrupt("no block: its last bytes are %q", trailer[8:]))
	}
	version := binary.LittleEndian.Uint32(trailer[4:])
	if version < firstVersion || version > Version {
		return nil, fmt.Errorf("footer: %w: %d, this program reads %d to %d", ErrVersion, version, firstVersion, Version)
	}
	size := int64(binary.LittleEndian.Uint32(trailer))
	if size > objectSize-headerSize-trailerSize || size > MaxPage+pageHead+pageTail {
		return nil, fmt.Errorf("footer: %w", corrupt("footer of %d bytes in an object of %d", size, objectSize))
	}
	if need := size + trailerSize; int64(len(tail)) < need {
		return nil, &TailError{Need: need}
	}
	body, err := onlyPage(tail[int64(len(tail))-trailerSize-size:len(tail)-trailerSize], pageFooter)
	if err != nil {
		return nil, fmt.Errorf("footer: %w", err)
	}
	f, c := &Footer{Version: int(version)}, over(body)
	f.Tenants = make([]TenantSummary, c.Count(8))
	for i := range f.Tenants {
		t := &f.Tenants[i]
		t.Tenant = c.Text()
		t.Directory = Location{Offset: c.offset(), Size: c.offset()}
		t.Series, t.Samples = c.Uvarint(), c.Uvarint()
		t.Windows = make([]Range, c.Count(2))
		for j := range t.Windows {
			t.Windows[j] = c.timeRange()
			if j == 0 {
				t.Range = t.Windows[0]
			} else if t.Windows[j].MinT <= t.MaxT {
				c.Fail("windows out of order")
			}
			t.MaxT = t.Windows[j].MaxT
		}
		if c.Err == nil && len(t.Windows) == 0 {
			c.Fail("tenant %q has no samples", t.Tenant)
		}
		if c.Err == nil && i > 0 && f.Tenants[i-1].Tenant >= t.Tenant {
			c.Fail("tenants out of order at %q", t.Tenant)
		}
		if c.Err == nil && t.Directory.End() > objectSize-trailerSize-size {
			c.Fail("directory of tenant %q lies behind the end", t.Tenant)
		}
		if c.Err != nil {
			break
		}
	}
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("footer: %w", err)
	}
	return f, nil
}

func appendFooter(dst []byte, tenants []TenantSummary, compress bool) []byte {
	body := binary.AppendUvarint(nil, uint64(len(tenants)))
	for i := range tenants {
		t := &tenants[i]
		body = appendText(body, t.Tenant)
		body = binary.AppendUvarint(body, uint64(t.Directory.Offset))
		body = binary.AppendUvarint(body, uint64(t.Directory.Size))
		body = binary.AppendUvarint(body, t.Series)
		body = binary.AppendUvarint(body, t.Samples)
		body = binary.AppendUvarint(body, uint64(len(t.Windows)))
		for _, w := range t.Windows {
			body = appendTimeRange(body, w)
		}
	}
	page := appendPage(nil, pageFooter, body, compress)
	version := uint32(firstVersion)
	if slices.ContainsFunc(tenants, func(t TenantSummary) bool { return t.Gone }) {
		version = Version
	}
	return append(dst, appendTrailer(page, version)...)
}

// appendTrailer appends what follows the page of the footer.
func appendTrailer(page []byte, version uint32) []byte {
	dst := binary.LittleEndian.AppendUint32(page, uint32(len(page)))
	dst = binary.LittleEndian.AppendUint32(dst, version)
	return append(dst, magic...)
}

// windowOf numbers the window (a, b] of the given width, in ms, that t lies in.
func windowOf(t, width int64) int64 {
	w := t / width
	if r := t % width; r < 0 || r == 0 {
		w--
	}
	return w
}

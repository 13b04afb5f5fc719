// Package inspect looks at blocks as they lie in the object store: what is in them,
// and whether all of it is as it was written and as the index says.
//
// Verify reads every byte. It checks the checksum of every page, those that nothing
// names too, follows directories, series pages and label pages to every chunk,
// decodes it, and compares what it finds with what is said of it on the way: counts,
// times, order. It goes on behind a fault and reports each with the block, the page
// and the offset. Memory is bounded by a few pages and by what the series page at
// hand names.
package inspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Fault is something that is not as it should be.
type Fault struct {
	Block  ulid.ULID
	Page   string // what kind; "object" and "rows" for what is wrong with these
	Offset int64  // bytes, of the page in the object
	Err    error
}

func (f *Fault) String() string {
	return fmt.Sprintf("block %s: %s at offset %d: %v", f.Block, f.Page, f.Offset, f.Err)
}

// Pages counts pages of a kind.
type Pages struct {
	Count    int   `json:"count"`
	Bytes    int64 `json:"bytes"`
	Unpacked int64 `json:"unpackedBytes"` // their bodies
}

// Tenant is what a block has of a tenant.
type Tenant struct {
	Name    string `json:"tenant"`
	MinT    int64  `json:"minTime"` // ms
	MaxT    int64  `json:"maxTime"` // ms
	Series  uint64 `json:"series"`
	Samples uint64 `json:"samples"`
}

// Block is what is in a block.
type Block struct {
	ID      ulid.ULID        `json:"block"`
	Object  string           `json:"object"`
	Size    int64            `json:"sizeBytes"`
	Level   int              `json:"level"` // as its directories note it
	Tenants []Tenant         `json:"tenants"`
	Pages   map[string]Pages `json:"pages,omitempty"` // by kind

	footer *chunkfmt.Footer
}

// Totals are those of all tenants.
func (b *Block) Totals() (series, samples uint64, mint, maxt int64) {
	mint, maxt = math.MaxInt64, math.MinInt64
	for _, t := range b.Tenants {
		series, samples = series+t.Series, samples+t.Samples
		mint, maxt = min(mint, t.MinT), max(maxt, t.MaxT)
	}
	return series, samples, mint, maxt
}

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", chunkfmt.ErrCorrupt, fmt.Sprintf(format, args...))
}

// checker works on one block.
type checker struct {
	objects object.Store
	ref     index.BlockRef
	report  func(*Fault)
	out     *Block
	err     error // of the store, which ends it

	walk, meta, data reader
	beside           [3]reader // of pages of windows with further columns
	dec              chunkfmt.Decoder
	windows          chunkfmt.WindowDecoder
}

// reader holds one range of the object.
type reader struct {
	at  int64
	buf []byte
}

func (r *reader) holds(l chunkfmt.Location) bool {
	return l.Offset >= r.at && l.End() <= r.at+int64(len(r.buf))
}

// readBytes is how much is read at a time.
const readBytes = 8 << 20

func (c *checker) fault(page string, offset int64, err error) {
	c.report(&Fault{c.ref.Block, page, offset, err})
}

// get returns n bytes at off, which are good until the reader is used again; nil
// if they can't be had, which is reported.
func (c *checker) get(ctx context.Context, r *reader, page string, off, n int64) []byte {
	if off < 0 || n <= 0 || off > c.ref.ObjectSize-n {
		c.fault(page, off, bad("%d bytes there would end behind the object's %d", n, c.ref.ObjectSize))
		return nil
	}
	if !r.holds(chunkfmt.Location{Offset: off, Size: n}) {
		b, err := c.objects.GetRange(ctx, c.ref.Object, off, min(max(n, readBytes), c.ref.ObjectSize-off))
		switch {
		case errors.Is(err, object.ErrNotExist), errors.Is(err, io.ErrUnexpectedEOF):
			c.fault("object", off, err)
			return nil
		case err != nil:
			c.err = cmp.Or(c.err, err)
			return nil
		}
		r.at, r.buf = off, b
	}
	return r.buf[off-r.at:][:n:n]
}

// open reads the footer, nil if there is none.
func (c *checker) open(ctx context.Context) *chunkfmt.Footer {
	for n := int64(chunkfmt.FooterTail); ; {
		n = min(n, c.ref.ObjectSize)
		tail := c.get(ctx, &reader{}, "footer", c.ref.ObjectSize-n, n)
		if tail == nil {
			return nil
		}
		f, err := chunkfmt.ParseFooter(tail, c.ref.ObjectSize)
		var short *chunkfmt.TailError
		if errors.As(err, &short) && short.Need > n && short.Need <= c.ref.ObjectSize {
			n = short.Need
			continue
		}
		if err != nil {
			c.fault("footer", c.ref.ObjectSize-n, err)
			return nil
		}
		c.out.footer = f
		for _, t := range f.Tenants {
			c.out.Tenants = append(c.out.Tenants, Tenant{t.Tenant, t.MinT, t.MaxT, t.Series, t.Samples})
		}
		return f
	}
}

func newChecker(objects object.Store, ref index.BlockRef, report func(*Fault)) *checker {
	return &checker{objects: objects, ref: ref, report: report, out: &Block{
		ID: ref.Block, Object: ref.Object, Size: ref.ObjectSize, Pages: map[string]Pages{},
	}}
}

// Find says where the object of a block is; the error wraps object.ErrNotExist if
// there is none.
func Find(ctx context.Context, objects object.Store, block ulid.ULID) (index.BlockRef, error) {
	key := history.ObjectKey(block)
	size, err := objects.Size(ctx, key)
	return index.BlockRef{Block: block, Object: key, ObjectSize: size}, err
}

// Open says what a block holds, from its footer and its first directory.
func Open(ctx context.Context, objects object.Store, ref index.BlockRef, report func(*Fault)) (*Block, error) {
	c := newChecker(objects, ref, report)
	if f := c.open(ctx); f != nil && len(f.Tenants) > 0 {
		c.directory(ctx, &f.Tenants[0])
	}
	return c.out, c.err
}

// Count is Open, and counts the pages: it reads the whole object, but decodes
// nothing of it.
func Count(ctx context.Context, objects object.Store, ref index.BlockRef, report func(*Fault)) (*Block, error) {
	c := newChecker(objects, ref, report)
	if f := c.open(ctx); f != nil && len(f.Tenants) > 0 {
		c.directory(ctx, &f.Tenants[0])
	}
	c.walkPages(ctx)
	return c.out, c.err
}

// Verify checks all of a block. An error is of the store: then it is not known how
// the block is.
func Verify(ctx context.Context, objects object.Store, ref index.BlockRef, report func(*Fault)) (*Block, error) {
	c := newChecker(objects, ref, report)
	c.walkPages(ctx)
	if f := c.open(ctx); f != nil {
		for i := range f.Tenants {
			if err := ctx.Err(); err != nil {
				return c.out, context.Cause(ctx)
			}
			c.tenant(ctx, &f.Tenants[i])
		}
	}
	return c.out, c.err
}

// trailerBytes lie behind the last page: its size, a version, the magic.
const trailerBytes = 16

// walkPages checks all pages from front to back.
func (c *checker) walkPages(ctx context.Context) {
	off := int64(chunkfmt.HeaderSize)
	b := c.get(ctx, &c.walk, "object", 0, off)
	if b == nil {
		return
	}
	if err := chunkfmt.CheckHeader(b); err != nil {
		c.fault("object", 0, err)
	}
	for end := c.ref.ObjectSize - trailerBytes; off < end && c.err == nil && ctx.Err() == nil; {
		b := c.get(ctx, &c.walk, "page", off, min(chunkfmt.PageHead, end-off))
		if b == nil {
			return
		}
		size, err := chunkfmt.PageSize(b)
		if err == nil && size > end-off {
			err = bad("it would end behind the last page")
		}
		if err != nil {
			c.fault("page", off, fmt.Errorf("%w; pages behind it can't be told apart", err))
			return
		}
		if b = c.get(ctx, &c.walk, "page", off, size); b == nil {
			return
		}
		info, err := chunkfmt.CheckPage(b)
		if err != nil {
			c.fault(info.Kind+" page", off, err)
		}
		p := c.out.Pages[info.Kind]
		p.Count++
		p.Bytes += info.Size
		p.Unpacked += info.Unpacked
		c.out.Pages[info.Kind] = p
		off += size
	}
}

func (c *checker) directory(ctx context.Context, t *chunkfmt.TenantSummary) *chunkfmt.Directory {
	at := t.Directory
	b := c.get(ctx, &reader{}, "directory", at.Offset, at.Size)
	if b == nil {
		return nil
	}
	d, err := chunkfmt.ParseDirectory(b)
	if err != nil {
		c.fault("directory", at.Offset, err)
		return nil
	}
	c.out.Level = max(c.out.Level, d.Level)
	return d
}

// tenant checks all that a block has of a tenant.
func (c *checker) tenant(ctx context.Context, t *chunkfmt.TenantSummary) {
	at := t.Directory
	d := c.directory(ctx, t)
	if d == nil {
		return
	}
	if d.Times != t.Range || d.Series != t.Series || d.Samples != t.Samples {
		c.fault("directory", at.Offset, bad("tenant %q: it says %d series, %d samples, %d to %d ms; the footer says %d, %d, %d to %d",
			t.Tenant, d.Series, d.Samples, d.Times.MinT, d.Times.MaxT, t.Series, t.Samples, t.MinT, t.MaxT))
	}
	// Not Pages: it leaves out what can't overlap.
	pages := d.Pages(nil, math.MinInt64, math.MaxInt64)
	var series, samples uint64
	last := key{}
	metrics := map[string]bool{}
	for i := range pages {
		p := &pages[i]
		if c.err != nil || ctx.Err() != nil {
			return
		}
		b := p.Bytes
		if b == nil {
			if b = c.get(ctx, &c.meta, "series page", p.Offset, p.Size); b == nil {
				continue
			}
		}
		page, err := chunkfmt.ParseSeriesPage(b)
		if err != nil {
			c.fault("series page", p.Offset, err)
			continue
		}
		series += p.Series
		samples += p.Samples
		last = c.seriesPage(ctx, p, page, last, metrics)
	}
	if series != d.Series || samples != d.Samples {
		c.fault("directory", at.Offset, bad("tenant %q: its pages have %d series and %d samples, itself %d and %d", t.Tenant, series, samples, d.Series, d.Samples))
	}
	c.labels(ctx, t, d, metrics)
}

// key orders series.
type key struct {
	metric string
	labels labels.Labels
	some   bool
}

// seriesPage checks a series page and the pages that it names. It returns the key
// of its last series.
func (c *checker) seriesPage(ctx context.Context, p *chunkfmt.PageRef, page *chunkfmt.SeriesPage, last key, metrics map[string]bool) key {
	entries := page.Select(nil, math.MinInt64, math.MaxInt64)
	complain := func(format string, args ...any) { c.fault("series page", p.Offset, bad(format, args...)) }
	var samples uint64
	times := chunkfmt.Range{MinT: math.MaxInt64, MaxT: math.MinInt64}
	var at chunkfmt.Location // of the page at hand
	var data *chunkfmt.DataPage
	open := func(kind string, l chunkfmt.Location) bool {
		if l == at {
			return data != nil
		}
		at, data = l, nil
		b := c.get(ctx, &c.data, kind, l.Offset, l.Size)
		if b == nil {
			return false
		}
		d, err := chunkfmt.ParseDataPage(b)
		if err != nil {
			c.fault(kind, l.Offset, err)
			return false
		}
		data = d
		return true
	}
	each := func(kind string, chunks []chunkfmt.Chunk, ls labels.Labels, gone []chunkfmt.Range) {
		for i := range chunks {
			k := &chunks[i]
			times.MinT, times.MaxT = min(times.MinT, k.MinT), max(times.MaxT, k.MaxT)
			if kind == dataPage {
				samples += uint64(k.Samples) //nolint:gosec // not negative
			}
			if open(kind, k.Page) {
				if err := c.chunk(data, k, gone); err != nil {
					c.fault(kind, k.Page.Offset, fmt.Errorf("chunk %d, of %s: %w", k.Index, ls, err))
				}
			}
		}
	}
	for i := range entries {
		e := &entries[i]
		k := key{e.Labels.Get(model.MetricNameLabel), e.Labels, true}
		if last.some && cmp.Or(cmp.Compare(last.metric, k.metric), labels.Compare(last.labels, k.labels)) >= 0 {
			complain("series %s behind %s", k.labels, last.labels)
		}
		last = k
		metrics[k.metric] = true
		if k.metric < p.FirstMetric || k.metric > p.LastMetric {
			complain("series %s in a page of metrics %q to %q", k.labels, p.FirstMetric, p.LastMetric)
		}
		each(dataPage, e.Chunks, e.Labels, e.Gone)
	}
	for i := range entries {
		each("exemplar page", entries[i].Exemplars, entries[i].Labels, nil)
	}
	for _, width := range []int64{rollup.Short, rollup.Long} {
		c.windowPages(ctx, page.SelectWindows(nil, math.MinInt64, math.MaxInt64, width), width, &times)
	}
	if len(entries) != page.Len() || uint64(page.Len()) != p.Series || samples != p.Samples { //nolint:gosec // not negative
		complain("it has %d series (%d with samples) and %d samples; the directory says %d and %d", page.Len(), len(entries), samples, p.Series, p.Samples)
	}
	if len(entries) > 0 && times != p.Times {
		complain("its samples, and what is gone, span %d to %d ms; the directory says %d to %d", times.MinT, times.MaxT, p.Times.MinT, p.Times.MaxT)
	}
	return last
}

const dataPage = "data page"

// chunk decodes a chunk and compares it with what its series page says, also of times
// of which all samples are gone.
func (c *checker) chunk(d *chunkfmt.DataPage, k *chunkfmt.Chunk, gone []chunkfmt.Range) error {
	if k.Index >= d.Len() || d.Kind(k.Index) != k.Kind {
		return bad("the page has %d chunks, and not one of kind %s there", d.Len(), k.Kind)
	}
	var t []int64
	var err error
	switch k.Kind {
	case chunkfmt.KindFloat:
		var f chunkfmt.Floats
		err = c.dec.Floats(d, k.Index, &f)
		t = f.T
	case chunkfmt.KindHistogram:
		var h chunkfmt.Histograms
		err = d.Histograms(k.Index, &h)
		t = h.T
	case chunkfmt.KindFloatHistogram:
		var h chunkfmt.FloatHistograms
		err = d.FloatHistograms(k.Index, &h)
		t = h.T
	case chunkfmt.KindExemplar:
		es, exErr := d.Exemplars(k.Index, nil)
		err = exErr
		for _, e := range es {
			t = append(t, e.Ts)
		}
	default:
		err = bad("unknown kind")
	}
	if err != nil {
		return err
	}
	if len(t) != k.Samples || len(t) == 0 || t[0] != k.MinT || t[len(t)-1] != k.MaxT {
		return bad("it has %d samples; its series page says %d from %d to %d ms", len(t), k.Samples, k.MinT, k.MaxT)
	}
	for i := 0; i < len(t) && gone != nil; i++ {
		if history.Covers(gone, t[i], t[i]) {
			return bad("there is a sample at %d ms, of a time of which all are gone", t[i])
		}
	}
	for i := 1; i < len(t); i++ {
		if t[i-1] > t[i] || t[i-1] == t[i] && k.Kind != chunkfmt.KindExemplar {
			return bad("sample at %d behind %d ms", t[i], t[i-1])
		}
	}
	return nil
}

// windowPages decodes the summaries of windows, and adds those whose samples are gone to
// the times.
func (c *checker) windowPages(ctx context.Context, entries []chunkfmt.WindowEntry, width int64, times *chunkfmt.Range) {
	const kind = "window page"
	cols := rollup.AllColumns
	if width == rollup.Short {
		cols &^= rollup.M2 // which those of an hour have alone
	}
	var at chunkfmt.Location
	var page *chunkfmt.WindowPage
	for n := range entries {
		for _, k := range entries[n].Windows {
			if k.Page != at {
				at = k.Page
				page = c.windowPage(ctx, kind, at, entries[n].Beside(width, at, cols))
			}
			if page == nil {
				continue
			}
			var w rollup.Windows
			err := c.windows.Decode(page, k.Index, cols, &w)
			if err == nil && w.Len() != k.Samples {
				err = bad("it has %d windows, its series page says %d", w.Len(), k.Samples)
			}
			if err == nil && page.Width() != width {
				err = bad("its windows are of %d ms, its series page says %d", page.Width(), width)
			}
			for i, end := range w.End {
				if err == nil && history.Covers(entries[n].Gone, end, end) {
					times.MinT, times.MaxT = min(times.MinT, w.FirstT[i]), max(times.MaxT, end)
				}
			}
			if err != nil {
				c.fault(kind, at.Offset, fmt.Errorf("chunk %d, of %s: %w", k.Index, entries[n].Labels, err))
			}
		}
	}
}

// windowPage reads a page of windows and those with further columns of them; nil if one can't be
// had, which is reported.
func (c *checker) windowPage(ctx context.Context, kind string, at chunkfmt.Location, beside []chunkfmt.Location) *chunkfmt.WindowPage {
	read := func(r *reader, l chunkfmt.Location) *chunkfmt.WindowPage {
		b := c.get(ctx, r, kind, l.Offset, l.Size)
		if b == nil {
			return nil
		}
		p, err := chunkfmt.ParseWindowPage(b)
		if err != nil {
			c.fault(kind, l.Offset, err)
			return nil
		}
		return p
	}
	page := read(&c.data, at)
	others := make([]*chunkfmt.WindowPage, len(beside))
	whole := page != nil
	for i, l := range beside {
		r := &c.beside[i%len(c.beside)]
		if c.data.holds(l) {
			r = &c.data
		}
		others[i] = read(r, l)
		whole = whole && others[i] != nil
	}
	if !whole {
		return nil
	}
	page, err := page.With(others...)
	if err != nil {
		c.fault(kind, at.Offset, err)
		return nil
	}
	return page
}

// labels checks a label page and its values.
func (c *checker) labels(ctx context.Context, t *chunkfmt.TenantSummary, d *chunkfmt.Directory, metrics map[string]bool) {
	if d.Labels.Size == 0 {
		return
	}
	const kind = "label page"
	b := c.get(ctx, &reader{}, kind, d.Labels.Offset, d.Labels.Size)
	if b == nil {
		return
	}
	p, err := chunkfmt.ParseLabelPage(b)
	if err != nil {
		c.fault(kind, d.Labels.Offset, err)
		return
	}
	for _, m := range p.Metrics() {
		if !metrics[m] {
			c.fault(kind, d.Labels.Offset, bad("tenant %q has no series of metric %q", t.Tenant, m))
		}
	}
	if len(p.Metrics()) < len(metrics) {
		c.fault(kind, d.Labels.Offset, bad("tenant %q has %d metrics, it names %d", t.Tenant, len(metrics), len(p.Metrics())))
	}
	for _, name := range p.Names() {
		if name == model.MetricNameLabel {
			continue
		}
		_, at := p.Values(name)
		if at.Size == 0 {
			continue
		}
		b := c.get(ctx, &reader{}, "label values page", at.Offset, at.Size)
		if b == nil {
			continue
		}
		if _, err := p.ParseValues(b); err != nil {
			c.fault("label values page", at.Offset, fmt.Errorf("label %q: %w", name, err))
		}
	}
}

// Rows are those that follow from the block; none if its footer can't be read.
func (b *Block) Rows(level index.Level) []index.BlockRow {
	if b.footer == nil {
		return nil
	}
	return history.Rows(index.BlockRef{Block: b.ID, Object: b.Object, ObjectSize: b.Size}, level, b.footer.Tenants)
}

// Rows compares the rows that a block has in the index with those that follow from
// the block.
func Rows(ctx context.Context, x *index.Index, b *Block, report func(*Fault)) error {
	for _, want := range b.Rows(0) {
		rows, err := x.Blocks(ctx, want.Tenant, want.MaxT, want.MaxT, true)
		if err != nil {
			return err
		}
		there := false
		for i := range rows {
			got := &rows[i]
			if got.ID() != want.ID() {
				continue
			}
			there = true
			if got.MinT != want.MinT || got.Object != want.Object || got.ObjectSize != want.ObjectSize || got.Directory != want.Directory ||
				got.Series != want.Series || got.Samples != want.Samples {
				report(&Fault{b.ID, "rows", 0, fmt.Errorf("tenant %q, %d to %d ms: the row says %d to %d, object %s of %d bytes, directory at %d, %d series, %d samples",
					want.Tenant, want.MinT, want.MaxT, got.MinT, got.MaxT, got.Object, got.ObjectSize, got.Directory.Offset, got.Series, got.Samples)})
			}
		}
		if !there {
			report(&Fault{b.ID, "rows", 0, fmt.Errorf("tenant %q has no row for %d to %d ms: queries don't find these samples", want.Tenant, want.MinT, want.MaxT)})
		}
	}
	return nil
}

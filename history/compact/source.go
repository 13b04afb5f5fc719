package compact

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// BlockError says which block can't be read, and where. It wraps
// object.ErrNotExist if its object is absent, chunkfmt.ErrCorrupt,
// chunkfmt.ErrVersion or io.ErrUnexpectedEOF if it is not as it was written.
type BlockError struct {
	Block  ulid.ULID
	Object string
	Page   string // what kind
	Offset int64  // bytes
	Err    error
}

func (e *BlockError) Error() string {
	return fmt.Sprintf("block %s: object %s: %s at offset %d: %v", e.Block, e.Object, e.Page, e.Offset, e.Err)
}

func (e *BlockError) Unwrap() error { return e.Err }

// errTooWide says that a block has samples in so many windows that what replaces
// it could not be named in a row.
var errTooWide = errors.New("block spans too much time to be compacted")

// unreadable says why a block can't be read now or later, "" if another attempt
// may work.
func unreadable(err error) string {
	switch {
	case errors.Is(err, object.ErrNotExist):
		return "missing"
	case errors.Is(err, chunkfmt.ErrVersion):
		return "version"
	case errors.Is(err, errTooWide):
		return "too_wide"
	case errors.Is(err, chunkfmt.ErrCorrupt), errors.Is(err, io.ErrUnexpectedEOF):
		return "corrupt"
	}
	return ""
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", chunkfmt.ErrCorrupt, fmt.Sprintf(format, args...))
}

// pager holds one range of an object.
type pager struct {
	at  int64
	buf []byte
}

// find returns the bytes at l if they are at hand. They never change.
func (p *pager) find(l chunkfmt.Location) []byte {
	if l.Offset < p.at || l.End() > p.at+int64(len(p.buf)) {
		return nil
	}
	return p.buf[l.Offset-p.at:][:l.Size:l.Size]
}

// source reads a block front to back, series by series. It holds a few ranges
// of readBytes, a series page and a data page.
type source struct {
	block     index.BlockRef
	objects   object.Store
	readBytes int64
	tenants   []chunkfmt.TenantSummary
	total     uint64 // samples of all of them

	mint, maxt int64 // what is to be read

	// Of the present tenant.
	tenant int // of tenants; as many as those at the end
	refs   []chunkfmt.PageRef
	series *chunkfmt.SeriesPage
	next   int // series of the page
	// The present series.
	entry  chunkfmt.Entry
	metric string

	front, indexes     pager
	samples, exemplars dataPages

	wins    [2]windowPages // short and long
	dec     chunkfmt.Decoder
	builder labels.ScratchBuilder
}

// dataPages are those of samples, or of exemplars.
type dataPages struct {
	pager
	page *chunkfmt.DataPage // the last one
	at   chunkfmt.Location
}

// windowPages are those of one width.
type windowPages struct {
	of   []pager              // the first, and those with other columns of the same windows
	page *chunkfmt.WindowPage // the last one
	at   chunkfmt.Location
}

// openSource reads the footer of a block.
func openSource(ctx context.Context, objects object.Store, b index.BlockRef, readBytes int64) (*source, error) {
	f, err := readFooter(ctx, objects, b)
	if err != nil {
		return nil, err
	}
	s := &source{block: b, objects: objects, readBytes: readBytes, tenants: f.Tenants}
	for i := range s.tenants {
		s.total += s.tenants[i].Samples
	}
	return s, nil
}

// readFooter says what a block holds.
func readFooter(ctx context.Context, objects object.Store, b index.BlockRef) (*chunkfmt.Footer, error) {
	for n := int64(chunkfmt.FooterTail); ; {
		n = min(n, b.ObjectSize)
		tail, err := objects.GetRange(ctx, b.Object, b.ObjectSize-n, n)
		if err != nil {
			return nil, &BlockError{b.Block, b.Object, "footer", b.ObjectSize - n, err}
		}
		f, err := chunkfmt.ParseFooter(tail, b.ObjectSize)
		var short *chunkfmt.TailError
		if errors.As(err, &short) && short.Need > n && short.Need <= b.ObjectSize {
			n = short.Need
			continue
		}
		if err != nil {
			return nil, &BlockError{b.Block, b.Object, "footer", b.ObjectSize - n, err}
		}
		for _, t := range f.Tenants {
			for _, w := range t.Windows {
				if uint64(w.MaxT)-uint64(w.MinT) > uint64(index.Width) { //nolint:gosec // MinT <= MaxT
					err := corrupt("tenant %q has samples from %d to %d ms in one window: it was not written for an index", t.Tenant, w.MinT, w.MaxT)
					return nil, &BlockError{b.Block, b.Object, "footer", b.ObjectSize - n, err}
				}
			}
		}
		return f, nil
	}
}

// start goes to the first tenant that has something in mint to maxt, in ms.
func (s *source) start(mint, maxt int64) {
	s.mint, s.maxt = mint, maxt
	s.tenant = -1
	s.front, s.indexes, s.samples, s.exemplars, s.wins = pager{}, pager{}, dataPages{}, dataPages{}, [2]windowPages{}
	s.nextTenant()
}

// nextTenant leaves the present tenant.
func (s *source) nextTenant() {
	s.refs, s.series, s.entry = nil, nil, chunkfmt.Entry{}
	for s.tenant++; s.tenant < len(s.tenants); s.tenant++ {
		for _, w := range s.tenants[s.tenant].Windows {
			if w.Overlaps(s.mint, s.maxt) {
				return
			}
		}
	}
}

// at is the present tenant.
func (s *source) at() (string, bool) {
	if s.tenant >= len(s.tenants) {
		return "", false
	}
	return s.tenants[s.tenant].Tenant, true
}

// enter reads the directory of the present tenant.
func (s *source) enter(ctx context.Context) error {
	t := &s.tenants[s.tenant]
	// What a small tenant has lies right before its directory: one read fetches
	// it, and often those of the next tenants.
	from := t.Directory.Offset
	if s.tenant > 0 {
		if end := s.tenants[s.tenant-1].Directory.End(); end <= from && t.Directory.End()-end <= s.readBytes {
			from = end
		}
	} else if t.Directory.End() <= s.readBytes {
		from = 0
	}
	d, err := s.directory(ctx, t.Directory, from, s.block.ObjectSize)
	if err != nil {
		return err
	}
	s.refs = d.Pages(nil, s.mint, s.maxt)
	s.series, s.metric, s.entry = nil, "", chunkfmt.Entry{}
	return nil
}

// directory reads the one at l; from and end are as of get.
func (s *source) directory(ctx context.Context, l chunkfmt.Location, from, end int64) (*chunkfmt.Directory, error) {
	const page = "directory"
	b, err := s.get(ctx, &s.front, page, l, from, end)
	if err != nil {
		return nil, err
	}
	d, err := chunkfmt.ParseDirectory(b)
	if err != nil {
		return nil, s.error(page, l, err)
	}
	return d, nil
}

func (s *source) error(page string, at chunkfmt.Location, err error) error {
	return &BlockError{s.block.Block, s.block.Object, page, at.Offset, err}
}

// get returns the bytes at l. If they have to be read, as much from from on is
// as readBytes allow, up to end.
func (s *source) get(ctx context.Context, p *pager, page string, l chunkfmt.Location, from, end int64) ([]byte, error) {
	if l.Offset < 0 || l.Size <= 0 || l.Offset > s.block.ObjectSize-l.Size {
		return nil, s.error(page, l, corrupt("%d bytes there would end behind the object's %d", l.Size, s.block.ObjectSize))
	}
	for _, q := range []*pager{p, &s.front} {
		if b := q.find(l); b != nil {
			return b, nil
		}
	}
	from = min(from, l.Offset)
	n := max(l.End(), min(end, s.block.ObjectSize, from+s.readBytes)) - from
	p.buf = nil // before there are two
	b, err := s.objects.GetRange(ctx, s.block.Object, from, n)
	if err == nil && int64(len(b)) != n {
		err = fmt.Errorf("read %d of %d bytes: %w", len(b), n, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return nil, s.error(page, l, err)
	}
	p.at, p.buf = from, b
	return p.find(l), nil
}

// nextSeries goes to the next series of the tenant. It returns false at its end.
func (s *source) nextSeries(ctx context.Context) (bool, error) {
	for {
		if s.series == nil {
			if len(s.refs) == 0 {
				return false, nil
			}
			ref := &s.refs[0]
			b := ref.Bytes
			if b == nil {
				var err error
				end := s.refs[len(s.refs)-1].End()
				if b, err = s.get(ctx, &s.indexes, "series page", ref.Location, ref.Offset, end); err != nil {
					return false, err
				}
			}
			var err error
			if s.series, err = chunkfmt.ParseSeriesPage(b); err != nil {
				return false, s.error("series page", ref.Location, err)
			}
			s.next = 0
		}
		for s.next < s.series.Len() {
			e, ok := s.series.Entry(s.next, s.mint, s.maxt, &s.builder)
			s.next++
			if !ok {
				continue
			}
			metric := e.Labels.Get(model.MetricNameLabel)
			if !s.entry.Labels.IsEmpty() && compareKeys(s.metric, s.entry.Labels, metric, e.Labels) >= 0 {
				return false, s.error("series page", s.refs[0].Location, corrupt("series %s behind %s", e.Labels, s.entry.Labels))
			}
			if err := e.Labels.Validate(func(l labels.Label) error {
				if l.Name == "" || l.Value == "" {
					return corrupt("series %s has an empty label", e.Labels)
				}
				return nil
			}); err != nil {
				return false, s.error("series page", s.refs[0].Location, err)
			}
			s.entry, s.metric = e, metric
			return true, nil
		}
		s.series, s.refs = nil, s.refs[1:]
	}
}

// compareKeys orders the series of a tenant as blocks do.
func compareKeys(aMetric string, a labels.Labels, bMetric string, b labels.Labels) int {
	return cmp.Or(cmp.Compare(aMetric, bMetric), labels.Compare(a, b))
}

// span is the time that the present series may have samples in.
func (s *source) span() (mint, maxt int64) {
	for i, c := range s.entry.Chunks {
		if i == 0 {
			mint, maxt = c.MinT, c.MaxT
		}
		mint, maxt = min(mint, c.MinT), max(maxt, c.MaxT)
	}
	return max(mint, s.mint), min(maxt, s.maxt)
}

func (s *source) page(ctx context.Context, of *dataPages, name string, at chunkfmt.Location, end int64) (*chunkfmt.DataPage, error) {
	if of.page != nil && of.at == at {
		return of.page, nil
	}
	b, err := s.get(ctx, &of.pager, name, at, at.Offset, end)
	if err != nil {
		return nil, err
	}
	d, err := chunkfmt.ParseDataPage(b)
	if err != nil {
		return nil, s.error(name, at, err)
	}
	of.page, of.at = d, at
	return d, nil
}

const windowsPage = "windows page"

func (s *source) windowPage(ctx context.Context, width int64, at chunkfmt.Location) (*chunkfmt.WindowPage, error) {
	w := &s.wins[0]
	if width == rollup.Long {
		w = &s.wins[1]
	}
	if w.page != nil && w.at == at {
		return w.page, nil
	}
	all := s.series.WindowPages(width)
	region := chunkfmt.Location{Offset: all[0].Offset, Size: all[len(all)-1].End() - all[0].Offset}
	beside := s.series.Beside(width, at, rollup.AllColumns&^without(width))
	var p *chunkfmt.WindowPage
	var others []*chunkfmt.WindowPage
	for i, l := range append([]chunkfmt.Location{at}, beside...) {
		// All at once, or of each group as much.
		from, end, k := region.Offset, region.End(), 0
		if region.Size > s.readBytes {
			from, end, k = l.Offset, min(end, l.Offset+s.readBytes/int64(1+len(beside))), i
		}
		for len(w.of) <= k {
			w.of = append(w.of, pager{})
		}
		b, err := s.get(ctx, &w.of[k], windowsPage, l, from, end)
		if err != nil {
			return nil, err
		}
		page, err := chunkfmt.ParseWindowPage(b)
		if err != nil {
			return nil, s.error(windowsPage, l, err)
		}
		if i == 0 {
			p = page
		} else {
			others = append(others, page)
		}
	}
	p, err := p.With(others...)
	if err != nil {
		return nil, s.error(windowsPage, at, err)
	}
	w.page, w.at = p, at
	return p, nil
}

// read appends the samples of the present series to run, which ends before them.
func (s *source) read(ctx context.Context, run *chunkfmt.Series) error {
	hists, floatHists := len(run.Histograms.T), len(run.FloatHistograms.T)
	for i := range s.entry.Chunks {
		c := &s.entry.Chunks[i]
		d, err := s.page(ctx, &s.samples, "data page", c.Page, max(s.refs[0].Data.End(), c.Page.End()))
		if err != nil {
			return err
		}
		switch c.Kind {
		case chunkfmt.KindFloat:
			f, n := &run.Floats, len(run.Floats.T)
			if err = s.dec.Floats(d, c.Index, f); err == nil {
				var from, to int
				from, to, err = s.cut(c, f.T, n)
				f.T, f.ST, f.V = trim(f.T, n, from, to), trim(f.ST, n, from, to), trim(f.V, n, from, to)
			}
		case chunkfmt.KindHistogram:
			h, n := &run.Histograms, len(run.Histograms.T)
			if err = d.Histograms(c.Index, h); err == nil {
				var from, to int
				from, to, err = s.cut(c, h.T, n)
				h.T, h.ST, h.H = trim(h.T, n, from, to), trim(h.ST, n, from, to), trim(h.H, n, from, to)
			}
		case chunkfmt.KindFloatHistogram:
			h, n := &run.FloatHistograms, len(run.FloatHistograms.T)
			if err = d.FloatHistograms(c.Index, h); err == nil {
				var from, to int
				from, to, err = s.cut(c, h.T, n)
				h.T, h.ST, h.H = trim(h.T, n, from, to), trim(h.ST, n, from, to), trim(h.H, n, from, to)
			}
		default:
			err = corrupt("a chunk of kind %d", c.Kind)
		}
		if err != nil {
			return s.error("data page", c.Page, fmt.Errorf("chunk %d: %w", c.Index, err))
		}
	}
	// A hint speaks of the sample before, which this block may not have seen.
	if n := hists; n > 0 && n < len(run.Histograms.H) && run.Histograms.H[n].CounterResetHint != histogram.GaugeType {
		h := *run.Histograms.H[n]
		h.CounterResetHint = histogram.UnknownCounterReset
		run.Histograms.H[n] = &h
	}
	if n := floatHists; n > 0 && n < len(run.FloatHistograms.H) && run.FloatHistograms.H[n].CounterResetHint != histogram.GaugeType {
		h := *run.FloatHistograms.H[n]
		h.CounterResetHint = histogram.UnknownCounterReset
		run.FloatHistograms.H[n] = &h
	}
	return nil
}

// cut checks the times of a chunk, which start at index n of t, and says which
// of them are to be read.
func (s *source) cut(c *chunkfmt.Chunk, t []int64, n int) (from, to int, err error) {
	from, to = n, len(t)
	switch {
	case to-n != c.Samples || to == n:
		return 0, 0, corrupt("it has %d samples, its series page says %d", to-n, c.Samples)
	case t[n] != c.MinT || t[to-1] != c.MaxT:
		return 0, 0, corrupt("it spans %d to %d, its series page says %d to %d", t[n], t[to-1], c.MinT, c.MaxT)
	}
	for i := max(n, 1); i < to; i++ {
		if t[i-1] >= t[i] {
			return 0, 0, corrupt("sample at %d behind %d", t[i], t[i-1])
		}
	}
	for from < to && t[from] < s.mint {
		from++
	}
	for to > from && t[to-1] > s.maxt {
		to--
	}
	return from, to, nil
}

// trim leaves of what was appended at index n only the elements from to to.
func trim[E any](e []E, n, from, to int) []E {
	if e == nil || from == n && to == len(e) {
		return e
	}
	return append(e[:n], e[from:to]...)
}

// readExemplars appends the exemplars of the present series.
func (s *source) readExemplars(ctx context.Context, dst []exemplar.Exemplar) ([]exemplar.Exemplar, error) {
	for i := range s.entry.Exemplars {
		c := &s.entry.Exemplars[i]
		d, err := s.page(ctx, &s.exemplars, "exemplar page", c.Page, s.block.ObjectSize)
		if err != nil {
			return dst, err
		}
		es, err := d.Exemplars(c.Index, nil)
		if err != nil {
			return dst, s.error("exemplar page", c.Page, err)
		}
		for _, e := range es {
			if e.Ts >= s.mint && e.Ts <= s.maxt {
				dst = append(dst, e)
			}
		}
	}
	return dst, nil
}

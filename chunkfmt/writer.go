package chunkfmt

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// WriterOptions tune a Writer; the zero value is right for most.
type WriterOptions struct {
	PageBytes    int // a data page is cut when it reaches this size; default 256 KiB, at most 1 MiB
	PageSeries   int // a series page is cut at the latest when it has so many series; default 4096, at most 65536
	ChunkSamples int // the most samples in a chunk; default 2048, at most MaxChunkSamples
	// Window is the width in ms of the windows (a, b], aligned to the epoch,
	// by which TenantSummary.Windows tells times apart; 0 for one window.
	Window int64
	// Level is how often what the block holds was merged, as its index rows say
	// it; directories note it. At most 255.
	Level int
	// Rollups adds summaries of windows, where they are smaller than the samples.
	Rollups bool
	// Uncompressed leaves series, label and directory pages uncompressed.
	// Samples are packed all the same.
	Uncompressed bool
}

func (o *WriterOptions) setDefaults() {
	within := func(v *int, fallback, limit int) {
		if *v <= 0 {
			*v = fallback
		}
		*v = min(*v, limit)
	}
	within(&o.PageBytes, 256<<10, 1<<20)
	within(&o.PageSeries, 4096, 1<<16)
	within(&o.ChunkSamples, 2048, MaxChunkSamples)
	o.Level = max(0, min(o.Level, 255))
	o.Window = max(o.Window, 0)
}

// smallTenant is up to which size the only series page of a tenant is read with
// its directory.
const smallTenant = 32 << 10

// maxSeriesBytes is how much text a series page holds at most, but for its last
// series.
const maxSeriesBytes = 4 << 20

// maxLabelBytes is from how much text of labels on a block is full. Of what comes then
// there is room for one more series in pages of labels, whatever it has.
const maxLabelBytes = MaxPage / 2

// maxWindowBytes is how much of pages of windows is held before the series page
// that names them is ended.
const maxWindowBytes = 16 << 20

// Writer writes one block front to back. It holds one data page and the series
// and label pages of one tenant in memory. After an error it is of no more use,
// and neither is what it wrote. Not safe for concurrent use.
type Writer struct {
	w   io.Writer
	o   WriterOptions
	err error
	off int64 // bytes written

	// Of the tenant being written.
	open    bool
	tenant  TenantSummary
	times   map[int64]Range // by window of WriterOptions.Window
	metric  string          // of the last series
	last    labels.Labels
	labels  labelBuilder
	pages   []PageRef // their offsets are relative to the start of indexes
	indexes []byte    // series pages, which follow all data

	// Of the series page being filled.
	series    *seriesBuilder
	data      pageBuilder
	classic   classic
	exemplars pageBuilder
	exPages   [][]byte // that follow the data pages
	windows   windowsWriter
	buf       []byte

	tenants []TenantSummary
}

// NewWriter starts a block on w.
func NewWriter(w io.Writer, o WriterOptions) *Writer {
	o.setDefaults()
	out := &Writer{w: w, o: o}
	out.windows.short.width, out.windows.long.width = rollup.Short, rollup.Long
	out.write([]byte(magic))
	return out
}

func (w *Writer) write(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.off += int64(n)
	if err != nil {
		w.err = fmt.Errorf("write block at %d: %w", w.off, err)
	}
}

// writePage writes a page, which is empty if it would have been too large.
func (w *Writer) writePage(what string, b []byte) {
	if len(b) == 0 && w.err == nil {
		w.err = fmt.Errorf("%w: tenant %q: %s page of more than %d bytes", ErrInvalid, w.tenant.Tenant, what, MaxPage)
	}
	w.write(b)
}

// Size is about how large the block would be if it were closed now, in bytes.
func (w *Writer) Size() int64 {
	n := w.off + int64(w.data.size()+w.exemplars.size()+len(w.indexes)) + int64(64*len(w.tenants))
	for _, p := range w.exPages {
		n += int64(len(p))
	}
	n += int64(w.windows.bytes + w.windows.short.total() + w.windows.long.total())
	if w.series != nil {
		n += int64(16 * w.series.series)
	}
	return n
}

// Full says whether the block should end: it has as many bytes, or the tenant's labels
// as much text as their pages may have.
func (w *Writer) Full(maxBytes int64) bool {
	return w.Size() >= maxBytes || w.labels.bytes >= maxLabelBytes
}

// Add appends a series. Tenants come in ascending order; a tenant's series in
// ascending order of metric name ("" if none), then labels.Compare, each once.
// Errors wrap ErrOrder or ErrInvalid, or are those of the underlying writer.
// Add keeps nothing of s.
func (w *Writer) Add(tenant string, s *Series) error {
	if w.err == nil {
		w.err = w.add(tenant, s, nil)
	}
	return w.err
}

// Summaries are the windows of a series, where they are known.
type Summaries struct {
	// Short and Long are those of all samples, and of those that are gone, with all
	// columns. Those of a width are left out if they take more than the samples, and
	// none is gone.
	Short, Long rollup.Windows
	// Gone are times, whole short windows, ascending and apart, in which there were
	// samples of which nothing but the windows is left. The series has none there.
	Gone []Range
}

// AddSummarised is Add for a series whose windows are known. It keeps nothing of sums.
func (w *Writer) AddSummarised(tenant string, s *Series, sums *Summaries) error {
	if w.err == nil {
		w.err = w.add(tenant, s, sums)
	}
	return w.err
}

func (w *Writer) add(tenant string, s *Series, sums *Summaries) error {
	if err := s.valid(); err != nil {
		return fmt.Errorf("tenant %q: series %s: %w", tenant, s.Labels, err)
	}
	metric := s.Labels.Get(model.MetricNameLabel)
	switch {
	case !w.open || tenant > w.tenant.Tenant:
		w.endTenant()
		w.open = true
		w.tenant = TenantSummary{Tenant: string([]byte(tenant)), Range: Range{math.MaxInt64, math.MinInt64}}
		w.times = map[int64]Range{}
	case tenant < w.tenant.Tenant:
		return fmt.Errorf("%w: tenant %q behind %q", ErrOrder, tenant, w.tenant.Tenant)
	default:
		if o := cmp.Or(cmp.Compare(metric, w.metric), labels.Compare(s.Labels, w.last)); o <= 0 {
			return fmt.Errorf("%w: tenant %q: series %s behind %s", ErrOrder, tenant, s.Labels, w.last)
		}
		if n := w.series; n != nil && (n.series >= w.o.PageSeries || n.series >= w.o.PageSeries/2 && metric != w.metric || n.bytes > maxSeriesBytes || w.windows.bytes > maxWindowBytes) {
			w.endSeriesPage()
		}
	}
	w.metric, w.last = string([]byte(metric)), s.Labels.Copy()
	w.labels.add(w.metric, s.Labels)
	if w.series == nil {
		w.series = newSeriesBuilder()
		w.series.first = w.metric
	}
	w.series.last = w.metric
	w.series.addLabels(s.Labels)
	w.series.addMetadata(s.Metadata, s.Family)
	w.addChunks(s)
	switch {
	case sums != nil:
		if err := w.addSummaries(s, sums); err != nil {
			return fmt.Errorf("tenant %q: series %s: %w", tenant, s.Labels, err)
		}
	case w.o.Rollups:
		w.windows.add(w.series, s, w.o.PageBytes)
	default:
		w.windows.none(w.series)
	}
	w.series.series++
	w.tenant.Series++
	return w.err
}

// addSummaries adds windows that are known.
func (w *Writer) addSummaries(s *Series, sums *Summaries) error {
	for i, g := range sums.Gone {
		if g.MinT > g.MaxT || i > 0 && sums.Gone[i-1].MaxT >= g.MinT || (g.MinT-1)%rollup.Short != 0 || g.MaxT%rollup.Short != 0 {
			return fmt.Errorf("%w: gone are %v", ErrInvalid, sums.Gone)
		}
	}
	w.windows.put(w.series, s.Samples(), &sums.Short, &sums.Long, len(sums.Gone) > 0, w.o.PageBytes)
	if len(sums.Gone) == 0 {
		return nil
	}
	w.series.addGone(sums.Gone)
	w.tenant.Gone = true
	for _, of := range []*rollup.Windows{&sums.Short, &sums.Long} {
		var times []int64
		k := 0
		for i, end := range of.End {
			for k < len(sums.Gone) && sums.Gone[k].MaxT < end {
				k++
			}
			if k < len(sums.Gone) && sums.Gone[k].MinT <= end {
				times = append(times, of.FirstT[i], end)
			}
		}
		if len(times) > 0 {
			w.noteTimes(times)
		}
	}
	return nil
}

func (s *Series) valid() error {
	if err := validColumns("float", s.Floats.T, s.Floats.ST, len(s.Floats.V)); err != nil {
		return err
	}
	if err := validColumns("histogram", s.Histograms.T, s.Histograms.ST, len(s.Histograms.H)); err != nil {
		return err
	}
	if err := validColumns("float histogram", s.FloatHistograms.T, s.FloatHistograms.ST, len(s.FloatHistograms.H)); err != nil {
		return err
	}
	for _, h := range s.Histograms.H {
		if err := ValidHistogram(h); err != nil {
			return err
		}
	}
	for _, h := range s.FloatHistograms.H {
		if err := ValidFloatHistogram(h); err != nil {
			return err
		}
	}
	for i := 1; i < len(s.Exemplars); i++ {
		if s.Exemplars[i-1].Ts > s.Exemplars[i].Ts {
			return fmt.Errorf("%w: exemplar at %d behind %d", ErrOrder, s.Exemplars[i].Ts, s.Exemplars[i-1].Ts)
		}
	}
	return s.Labels.Validate(func(l labels.Label) error {
		if l.Name == "" {
			return fmt.Errorf("%w: empty label name", ErrInvalid)
		}
		if l.Value == "" {
			return fmt.Errorf("%w: label %q is empty", ErrInvalid, l.Name)
		}
		return nil
	})
}

func validColumns(what string, t, st []int64, values int) error {
	if len(t) != values || st != nil && len(st) != len(t) {
		return fmt.Errorf("%w: %s columns of %d, %d and %d", ErrInvalid, what, len(t), len(st), values)
	}
	for i := 1; i < len(t); i++ {
		if t[i-1] >= t[i] {
			return fmt.Errorf("%w: %s sample at %d behind %d", ErrOrder, what, t[i], t[i-1])
		}
	}
	return nil
}

// addChunks cuts the samples of s into chunks.
func (w *Writer) addChunks(s *Series) {
	b := w.series
	before := b.chunks.total
	w.classic.set(w.metric, s.Labels)
	cut := func(kind Kind, t, st []int64, i, j int, values func(dst []byte) []byte) {
		if st != nil {
			st = st[i:j]
			if !slices.ContainsFunc(st, func(x int64) bool { return x != 0 }) {
				st = nil
			}
		}
		if kind == KindFloat {
			w.data.addFloats(&w.classic, t[i:j], st, s.Floats.V[i:j])
		} else {
			w.data.add(kind, t[i:j], st, values)
		}
		b.chunks.add(kind, Range{t[i], t[j-1]}, j-i)
		b.samples += uint64(j - i)
		w.tenant.Samples += uint64(j - i)
		w.noteTimes(t[i:j])
		if w.data.size() >= w.o.PageBytes {
			w.endDataPage()
		}
	}
	for i, j := 0, 0; i < len(s.Floats.T); i = j {
		j = min(i+w.o.ChunkSamples, len(s.Floats.T))
		cut(KindFloat, s.Floats.T, s.Floats.ST, i, j, nil)
	}
	for i, j := 0, 0; i < len(s.Histograms.T); i = j {
		j = w.cutHistograms(i, len(s.Histograms.T), func(k int) int {
			return len(s.Histograms.H[k].PositiveBuckets) + len(s.Histograms.H[k].NegativeBuckets)
		})
		cut(KindHistogram, s.Histograms.T, s.Histograms.ST, i, j, func(dst []byte) []byte {
			return appendHistograms(&w.data.enc, dst, s.Histograms.H[i:j])
		})
	}
	for i, j := 0, 0; i < len(s.FloatHistograms.T); i = j {
		j = w.cutHistograms(i, len(s.FloatHistograms.T), func(k int) int {
			return len(s.FloatHistograms.H[k].PositiveBuckets) + len(s.FloatHistograms.H[k].NegativeBuckets)
		})
		cut(KindFloatHistogram, s.FloatHistograms.T, s.FloatHistograms.ST, i, j, func(dst []byte) []byte {
			return appendFloatHistograms(&w.data.enc, dst, s.FloatHistograms.H[i:j])
		})
	}
	b.chunks.perSeries = binary.AppendUvarint(b.chunks.perSeries, uint64(b.chunks.total-before))

	before = b.exemplars.total
	for es := range slices.Chunk(s.Exemplars, w.o.ChunkSamples) {
		t := make([]int64, len(es))
		for i := range es {
			t[i] = es[i].Ts
		}
		w.exemplars.add(KindExemplar, t, nil, func(dst []byte) []byte { return appendExemplars(dst, es) })
		b.exemplars.add(KindExemplar, Range{t[0], t[len(t)-1]}, len(t))
		w.noteTimes(t)
		if w.exemplars.size() >= w.o.PageBytes {
			w.endExemplarPage()
		}
	}
	b.exemplars.perSeries = binary.AppendUvarint(b.exemplars.perSeries, uint64(b.exemplars.total-before))
}

// cutHistograms returns the end of a chunk that begins at i.
func (w *Writer) cutHistograms(i, n int, buckets func(k int) int) (j int) {
	total := 0
	for j = i; j < n && j-i < w.o.ChunkSamples; j++ {
		// A chunk stays far below a page, whatever its codec makes of it; and who wants a few samples decodes all of it.
		if total += buckets(j) + 4; total > maxChunkBuckets/64 && j > i {
			break
		}
	}
	return j
}

func (w *Writer) noteTimes(t []int64) {
	r := Range{t[0], t[len(t)-1]}
	w.series.times.add(r)
	w.tenant.add(r)
	if w.o.Window == 0 {
		return
	}
	for len(t) > 0 {
		k := windowOf(t[0], w.o.Window)
		n := len(t)
		if windowOf(t[n-1], w.o.Window) != k {
			n, _ = slices.BinarySearchFunc(t, k, func(x, k int64) int {
				if windowOf(x, w.o.Window) <= k {
					return -1
				}
				return 1
			})
		}
		r := Range{t[0], t[n-1]}
		if had, ok := w.times[k]; ok {
			r.add(had)
		}
		w.times[k] = r
		t = t[n:]
	}
}

func (w *Writer) endDataPage() {
	w.buf = w.data.appendTo(w.buf[:0], pageData)
	w.series.chunks.endPage(w.off, int64(len(w.buf)))
	w.writePage("data", w.buf)
}

func (w *Writer) endExemplarPage() {
	w.exPages = append(w.exPages, w.exemplars.appendTo(nil, pageExemplars))
	w.series.exemplars.endPage(0, int64(len(w.exPages[len(w.exPages)-1])))
}

func (w *Writer) endSeriesPage() {
	b := w.series
	if b == nil {
		return
	}
	if w.data.chunks > 0 {
		w.endDataPage()
	}
	if w.exemplars.chunks > 0 {
		w.endExemplarPage()
	}
	b.exemplars.offset = w.off
	for _, p := range w.exPages {
		w.writePage("exemplar", p)
	}
	w.exPages = nil
	w.windows.endSeriesPage(w)
	start := len(w.indexes)
	w.indexes = b.appendTo(w.indexes, !w.o.Uncompressed)
	if len(w.indexes) == start {
		w.writePage("series", nil)
	}
	w.pages = append(w.pages, PageRef{
		Location: Location{Offset: int64(start), Size: int64(len(w.indexes) - start)}, Data: b.chunks.data(),
		FirstMetric: b.first, LastMetric: b.last, Times: b.times, Series: uint64(b.series), Samples: b.samples, Short: b.shortOf, Long: b.longOf,
	})
	w.series = nil
}

func (w *Writer) endTenant() {
	if !w.open {
		return
	}
	w.endSeriesPage()
	if w.tenant.MinT > w.tenant.MaxT { // nothing but labels
		w.tenant.Range = Range{}
	}
	w.tenant.Windows = []Range{w.tenant.Range}
	if len(w.times) > 0 {
		w.tenant.Windows = slices.SortedFunc(maps.Values(w.times), func(a, b Range) int { return cmp.Compare(a.MinT, b.MinT) })
	}
	for i := range w.pages {
		if w.pages[i].Times.MinT > w.pages[i].Times.MaxT {
			w.pages[i].Times = Range{}
		}
	}
	d := Directory{Times: w.tenant.Range, Series: w.tenant.Series, Samples: w.tenant.Samples, Level: w.o.Level, Gone: w.tenant.Gone, pages: w.pages}
	var page []byte
	if len(w.pages) == 1 && len(w.indexes) <= smallTenant {
		// The directory lies before its only series page and is read with it.
		// Its own length decides what it says: try until it is as expected.
		d.pages[0].Offset = w.off
		for {
			page = d.append(page[:0], w.off, false)
			if at := w.off + int64(len(page)); at != d.pages[0].Offset {
				d.pages[0].Offset = at
				continue
			}
			break
		}
		w.tenant.Directory = Location{Offset: w.off, Size: int64(len(page) + len(w.indexes))}
		w.writePage("directory", page)
		w.write(w.indexes)
	} else {
		for i := range d.pages {
			d.pages[i].Offset += w.off
		}
		w.write(w.indexes)
		if len(d.pages) > 1 {
			pages, size := w.labels.appendTo(nil, w.off, !w.o.Uncompressed)
			if size == 0 {
				w.writePage("label", nil)
			}
			w.write(pages)
			d.Labels = Location{Offset: w.off - int64(size), Size: int64(size)}
		}
		page = d.append(nil, w.off, !w.o.Uncompressed)
		w.tenant.Directory = Location{Offset: w.off, Size: int64(len(page))}
		w.writePage("directory", page)
	}
	w.tenants = append(w.tenants, w.tenant)
	w.open, w.labels, w.pages, w.indexes = false, labelBuilder{}, nil, w.indexes[:0]
}

// Close writes the rest of the block. It does not close the underlying writer.
func (w *Writer) Close() (*Summary, error) {
	w.endTenant()
	footer := appendFooter(nil, w.tenants, !w.o.Uncompressed)
	if len(footer) <= trailerSize {
		w.writePage("footer", nil)
	}
	w.write(footer)
	if w.err != nil {
		return nil, w.err
	}
	w.err = fmt.Errorf("block is closed: %w", io.ErrClosedPipe)
	return &Summary{Size: w.off, Tenants: w.tenants}, nil
}

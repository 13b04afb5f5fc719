package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/cache"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// PageError says which page of which object could not be read. It wraps
// object.ErrNotExist if the object is absent, chunkfmt.ErrCorrupt or
// chunkfmt.ErrVersion if the page is not as it was written or of a later version.
type PageError struct {
	Object       string
	Page         string // what kind
	Offset, Size int64  // bytes
	Err          error
}

func (e *PageError) Error() string {
	return fmt.Sprintf("object %s: %s at offset %d, %d bytes: %v", e.Object, e.Page, e.Offset, e.Size, e.Err)
}

func (e *PageError) Unwrap() error { return e.Err }

// pageKind is how the bytes at a location are to be understood.
type pageKind uint8

const (
	directoryPage pageKind = iota + 1
	labelPage
	labelValuesPage
	seriesPage
	dataPage
	windowPage
)

func (k pageKind) String() string {
	return [...]string{"page", "directory", "label page", "label values", "series page", "data page", "windows page"}[k]
}

// page is a parsed page: one of its fields is set, by its kind.
type page struct {
	directory *chunkfmt.Directory
	labels    *chunkfmt.LabelPage
	values    *chunkfmt.LabelValues
	series    *chunkfmt.SeriesPage
	data      *chunkfmt.DataPage
	windows   *chunkfmt.WindowPage
}

// pageKey: objects never change, so a page is known by its place.
type pageKey struct {
	object string
	offset int64
	kind   pageKind
}

// want is a page to fetch.
type want struct {
	object string
	at     chunkfmt.Location
	kind   pageKind
	labels *chunkfmt.LabelPage // that the label values belong to
	bytes  []byte              // the page, if it came with another
}

func (w *want) key() pageKey { return pageKey{w.object, w.at.Offset, w.kind} }

func (w *want) error(err error) error {
	return &PageError{Object: w.object, Page: w.kind.String(), Offset: w.at.Offset, Size: w.at.Size, Err: err}
}

// memory is about how many bytes the page takes when it is parsed, as far as that is known
// before.
func (w *want) memory() int64 {
	switch w.kind {
	case directoryPage, seriesPage:
		return 4 * w.at.Size
	case labelPage, labelValuesPage:
		return 8 * w.at.Size // strings, unpacked
	default:
		return w.at.Size
	}
}

// parse verifies a page and says about how many bytes of memory it takes.
func (w *want) parse(b []byte) (p page, size int64, err error) {
	size = w.memory()
	switch w.kind {
	case directoryPage:
		p.directory, err = chunkfmt.ParseDirectory(b)
	case labelPage:
		p.labels, err = chunkfmt.ParseLabelPage(b)
	case labelValuesPage:
		p.values, err = w.labels.ParseValues(b)
	case seriesPage:
		if p.series, err = chunkfmt.ParseSeriesPage(b); err == nil {
			size += 80 * int64(p.series.Len())
		}
	case windowPage:
		if p.windows, err = chunkfmt.ParseWindowPage(b); err == nil {
			size += 64 * int64(p.windows.Len())
		}
	default:
		if p.data, err = chunkfmt.ParseDataPage(b); err == nil {
			size += 64 * int64(p.data.Len())
		}
	}
	return p, size, err
}

const (
	// maxGap is how many bytes between two wanted pages are read along rather
	// than asked for twice: about what a request's latency is worth.
	maxGap = 256 << 10
	// maxRun is where a run of near pages is cut, so that its parts are read at
	// the same time, and how much of an object is read along at most for the sake of few
	// GETs.
	maxRun = 8 << 20
	// getsPerCall is how many GETs one call has under way.
	getsPerCall = 32
)

// fetching says how pages are to be got.
type fetching struct {
	tenant string // whose they are
	// runs, if not 0, is into how many GETs the pages of an object are put if they
	// lie close together: if what lies between them isn't more than maxRun, and no GET
	// gets larger than that.
	runs int
	hold func(bytes int64) // as Snapshot.Hold, of what is read at the moment
	read func(bytes int64) // as Snapshot.Read
}

// fetch gets pages for the snapshot. seriesRuns is fetching.runs.
func (s *Snapshot) fetch(ctx context.Context, seriesRuns int, wants []want) ([]page, error) {
	how := fetching{tenant: s.Tenant, runs: seriesRuns, hold: s.Hold, read: s.Read}
	if how.hold == nil {
		how.hold = func(int64) {}
	}
	if how.read == nil {
		how.read = func(int64) {}
	}
	return s.h.fetch(ctx, s.Stats, how, wants)
}

// fetch gets pages from memory, memcached or the object store; out[i] is wants[i].
// Pages that others load are waited for, after our own are on their way.
func (h *History) fetch(ctx context.Context, stats *Stats, how fetching, wants []want) ([]page, error) {
	out := make([]page, len(wants))
	stats.Pages.Add(int64(len(wants)))
	pending := make([]int, len(wants))
	for i := range pending {
		pending[i] = i
	}
	first := true
	for len(pending) > 0 {
		var mine, others []pendingPage
		for _, i := range pending {
			v, load, claimed := h.pages.Get(wants[i].key())
			switch {
			case load == nil:
				out[i] = v
				stats.PagesCached.Add(1)
			case claimed:
				mine = append(mine, pendingPage{i, load})
			default:
				others = append(others, pendingPage{i, load})
			}
		}
		if err := h.load(ctx, stats, how, wants, mine, out); err != nil {
			return nil, err
		}
		pending = pending[:0]
		for _, p := range others {
			v, again, err := p.load.Wait(ctx)
			if err != nil {
				return nil, err
			}
			if again {
				pending = append(pending, p.i)
				continue
			}
			out[p.i] = v
			if first {
				stats.PagesCached.Add(1)
			}
		}
		first = false
	}
	return out, nil
}

// pendingPage is a page that is being loaded for wants[i].
type pendingPage struct {
	i    int
	load *cache.Load[page]
}

// load fetches the pages that this caller has claimed and finishes every claim,
// whatever happens.
func (h *History) load(ctx context.Context, stats *Stats, how fetching, wants []want, mine []pendingPage, out []page) error {
	if len(mine) == 0 {
		return nil
	}
	finish := func(p pendingPage, b []byte, err error) error {
		w := &wants[p.i]
		var v page
		var size int64
		if err == nil {
			if v, size, err = w.parse(b); err != nil {
				h.corrupt(w, err)
			}
		}
		if err != nil {
			err = w.error(err)
		}
		h.pages.Finish(ctx, how.tenant, w.key(), p.load, v, size, err)
		out[p.i] = v
		return err
	}
	var absent []pendingPage
	for _, p := range mine {
		w := &wants[p.i]
		if w.bytes == nil {
			absent = append(absent, p)
			continue
		}
		v, size, err := w.parse(w.bytes)
		if err != nil {
			// What it came with is kept, so these bytes would come again and again,
			// though only that read may have been bad: it is read by itself.
			h.corrupt(w, err)
			absent = append(absent, p)
			continue
		}
		h.pages.Finish(ctx, how.tenant, w.key(), p.load, v, size, nil)
		out[p.i] = v
	}
	absent = h.fromMemcached(ctx, stats, how, wants, absent, out)
	var g errgroup.Group
	g.SetLimit(getsPerCall)
	runs, size := coalesce(how, wants, absent), int64(0)
	for _, run := range runs {
		size += run.at.Size
	}
	how.read(size) // perhaps it ends ctx: then nothing is asked for
	for _, run := range runs {
		g.Go(func() error {
			how.hold(run.at.Size)
			defer how.hold(-run.at.Size)
			b, err := h.get(ctx, stats, run.object, run.at)
			var errs []error
			for _, p := range run.pages {
				w := &wants[p.i]
				var pageBytes []byte
				if err == nil {
					pageBytes = b[w.at.Offset-run.at.Offset:][:w.at.Size]
					if len(run.pages) > 1 || int64(len(b)) != w.at.Size {
						// A page that is kept must not keep the whole run.
						pageBytes = slices.Clone(pageBytes)
					}
				}
				pageErr := finish(p, pageBytes, err)
				if pageErr == nil {
					h.o.Memcached.Set(memcached.Pages, w.memcachedKey(), pageBytes)
				}
				errs = append(errs, pageErr)
			}
			return errors.Join(errs...)
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return firstError(err)
	}
	return nil
}

// memcachedKey is where memcached has the page: docs/decisions/0012-memcached.md.
func (w *want) memcachedKey() string { return pageKeyAt(w.object, w.at) }

func pageKeyAt(object string, at chunkfmt.Location) string {
	b := append(make([]byte, 0, 96), "epi1:pages:"...)
	b = append(append(b, object...), ':')
	b = append(strconv.AppendInt(b, at.Offset, 10), ':')
	return string(strconv.AppendInt(b, at.Size, 10))
}

// fromMemcached gets those of the claimed pages that memcached has, finishes their
// claims, and returns the others.
func (h *History) fromMemcached(ctx context.Context, stats *Stats, how fetching, wants []want, ps []pendingPage, out []page) []pendingPage {
	if h.o.Memcached == nil || len(ps) == 0 {
		return ps
	}
	keys := make([]string, len(ps))
	expected := int64(0)
	for i, p := range ps {
		keys[i] = wants[p.i].memcachedKey()
		expected += wants[p.i].at.Size
	}
	var rest []pendingPage
	for i, b := range h.o.Memcached.Get(ctx, memcached.Pages, keys, expected) {
		p := ps[i]
		w := &wants[p.i]
		if int64(len(b)) != w.at.Size {
			rest = append(rest, p)
			continue
		}
		v, size, err := w.parse(b)
		if err != nil { // nobody puts such a page; the object store knows
			h.corrupt(w, err)
			rest = append(rest, p)
			continue
		}
		stats.PagesMemcached.Add(1)
		h.pages.Finish(ctx, how.tenant, w.key(), p.load, v, size, nil)
		out[p.i] = v
	}
	return rest
}

func (h *History) corrupt(w *want, err error) {
	h.metrics.corrupt.Inc()
	h.o.Logger.Error("page can't be read", "object", w.object, "page", w.kind.String(), "offset", w.at.Offset, "size_bytes", w.at.Size, "err", err)
}

// firstError picks one of many joined errors, one of an absent object if there
// is one, for that decides what is done.
func firstError(err error) error {
	joined, ok := err.(interface{ Unwrap() []error }) // of this level only: a PageError is to stay whole
	if !ok {
		return err
	}
	all := joined.Unwrap()
	if i := slices.IndexFunc(all, func(e error) bool { return errors.Is(e, object.ErrNotExist) }); i >= 0 {
		return firstError(all[i])
	}
	return firstError(all[0])
}

// get is one ranged GET.
func (h *History) get(ctx context.Context, stats *Stats, key string, at chunkfmt.Location) ([]byte, error) {
	select {
	case h.gets <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-h.gets }()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	stats.ObjectGets.Add(1)
	b, err := h.o.Objects.GetRange(ctx, key, at.Offset, at.Size)
	if err != nil {
		return nil, err
	}
	stats.ObjectBytes.Add(int64(len(b)))
	if int64(len(b)) != at.Size {
		return nil, fmt.Errorf("read %d of %d bytes: %w", len(b), at.Size, io.ErrUnexpectedEOF)
	}
	return b, nil
}

// run is a range of an object that holds pages.
type run struct {
	object string
	at     chunkfmt.Location
	pages  []pendingPage
}

// coalesce puts near pages together.
func coalesce(how fetching, wants []want, ps []pendingPage) []run {
	slices.SortFunc(ps, func(a, b pendingPage) int {
		x, y := &wants[a.i], &wants[b.i]
		return cmp.Or(cmp.Compare(x.object, y.object), cmp.Compare(x.at.Offset, y.at.Offset))
	})
	var out []run
	start := 0 // of the runs of the present object
	for _, p := range ps {
		w := &wants[p.i]
		next := run{object: w.object, at: w.at, pages: []pendingPage{p}}
		if n := len(out); n > start && out[start].object != w.object {
			out = append(out[:start], fewer(how, out[start:])...)
			start = len(out)
		} else if n > start && next.gap(&out[n-1]) <= maxGap && out[n-1].join(&next) {
			continue
		}
		out = append(out, next)
	}
	return append(out[:start], fewer(how, out[start:])...)
}

// gap is what lies between a run and the one before, in bytes.
func (r *run) gap(before *run) int64 { return r.at.Offset - before.at.End() }

// join puts the next run to this one, unless they are too much for one GET.
func (r *run) join(next *run) bool {
	end := max(r.at.End(), next.at.End())
	if end-r.at.Offset > maxRun {
		return false
	}
	r.at.Size = end - r.at.Offset
	r.pages = append(r.pages, next.pages...)
	return true
}

// fewer joins runs of an object over the least gaps, as how says.
func fewer(how fetching, runs []run) []run {
	if how.runs == 0 || len(runs) <= how.runs {
		return runs
	}
	least := make([]int, len(runs)-1) // runs, but the first, by the gap before them
	for i := range least {
		least[i] = i + 1
	}
	gap := func(i int) int64 { return runs[i].gap(&runs[i-1]) }
	slices.SortStableFunc(least, func(a, b int) int { return cmp.Compare(gap(a), gap(b)) })
	over := make([]bool, len(runs))
	between := int64(0)
	for _, i := range least[:len(runs)-how.runs] {
		if between += max(0, gap(i)); between > maxRun {
			break
		}
		over[i] = true
	}
	out := runs[:1]
	for i := 1; i < len(runs); i++ {
		if !over[i] || !out[len(out)-1].join(&runs[i]) {
			out = append(out, runs[i])
		}
	}
	return out
}

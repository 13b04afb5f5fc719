package history

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// want names a page of a block, if it lies in it at all.
func (b *Block) want(kind pageKind, at chunkfmt.Location) (want, error) {
	w := want{object: b.Object, at: at, kind: kind}
	if at.Offset < 0 || at.Size <= 0 || at.Offset > b.ObjectSize-at.Size {
		return w, w.error(fmt.Errorf("%w: it would end behind the object's %d bytes", chunkfmt.ErrCorrupt, b.ObjectSize))
	}
	return w, nil
}

// directories fetches those of all blocks, and holds them.
func (s *Snapshot) directories(ctx context.Context, bs []*Block, held *tally) ([]*chunkfmt.Directory, error) {
	wants := make([]want, len(bs))
	for i, b := range bs {
		var err error
		if wants[i], err = b.want(directoryPage, b.Directory); err != nil {
			return nil, err
		}
		held.add(wants[i].memory())
	}
	pages, err := s.fetch(ctx, 0, wants)
	if err != nil {
		return nil, err
	}
	out := make([]*chunkfmt.Directory, len(pages))
	for i := range pages {
		out[i] = pages[i].directory
	}
	return out, nil
}

// labelPages fetches the label page of each block that has one and that pick
// picks, and holds them; nil for others.
func (s *Snapshot) labelPages(ctx context.Context, bs []*Block, dirs []*chunkfmt.Directory, held *tally, pick func(i int) bool) ([]*chunkfmt.LabelPage, error) {
	var wants []want
	var of []int
	for i, b := range bs {
		if dirs[i].Labels.Size == 0 || !pick(i) {
			continue
		}
		w, err := b.want(labelPage, dirs[i].Labels)
		if err != nil {
			return nil, err
		}
		held.add(w.memory())
		wants, of = append(wants, w), append(of, i)
	}
	pages, err := s.fetch(ctx, 0, wants)
	if err != nil {
		return nil, err
	}
	out := make([]*chunkfmt.LabelPage, len(bs))
	for j, i := range of {
		out[i] = pages[j].labels
	}
	return out, nil
}

// found is what a block has of the series that match.
type found struct {
	block   *Block
	entries []chunkfmt.Entry
	bytes   int64 // of memory that these take, about
}

const (
	// entryBytes is about what a series of a block takes beside labels and chunks.
	entryBytes = 256
	chunkBytes = 64
	rangeBytes = 16
)

// bytesOf is about how much memory a series of a block takes.
func bytesOf(ls labels.Labels, chunks int) int64 {
	return entryBytes + int64(ls.ByteSize()) + chunkBytes*int64(chunks) //nolint:gosec // bytes in memory
}

// tally keeps account of memory that one read takes.
type tally struct {
	s     *Snapshot
	bytes int64
}

func (t *tally) add(bytes int64) {
	if t.s.Hold != nil {
		t.s.Hold(bytes)
	}
	t.bytes += bytes
}

// release gives all of it back.
func (t *tally) release() { t.add(-t.bytes) }

// find returns the series that match all of ms and have samples or exemplars in
// mint to maxt, or summaries of windows whose samples are gone, for each block, but for
// what is hidden, and for those that aren't kept, as far as nothing of them is gone. It holds
// them.
func (s *Snapshot) find(ctx context.Context, bs []*Block, ms []*labels.Matcher, mint, maxt int64, held *tally) ([]found, error) {
	out := make([]found, len(bs))
	for i, b := range bs {
		out[i].block = b
	}
	err := s.entries(ctx, bs, ms, mint, maxt, 0, s.Hidden.Of, func(i int, es []chunkfmt.Entry) {
		before := out[i].bytes
		for k := range es {
			out[i].bytes += bytesOf(es[k].Labels, len(es[k].Chunks)+len(es[k].Exemplars))
		}
		if out[i].entries == nil {
			out[i].entries = es
		} else {
			out[i].entries = append(out[i].entries, es...)
		}
		held.add(out[i].bytes - before)
	})
	return out, err
}

// entries calls read with such series, those of one page at a time, and which of bs they are
// of, in order. seriesRuns is as for fetch.
func (s *Snapshot) entries(ctx context.Context, bs []*Block, ms []*labels.Matcher, mint, maxt int64, seriesRuns int, hidden func(labels.Labels) []chunkfmt.Range, read func(i int, es []chunkfmt.Entry)) error {
	return s.seriesPages(ctx, bs, ms, mint, maxt, seriesRuns, func(i int, p *chunkfmt.SeriesPage, lo, hi int64) {
		es, n := p.SelectSome(ms, lo, hi, s.keep), 0
		for k := range es {
			if bs[i].holds(&es[k], lo, hi) && shows(&es[k], lo, hi, hidden(es[k].Labels)) {
				es[n] = es[k]
				n++
			}
		}
		s.Stats.Series.Add(int64(n))
		read(i, es[:n])
	})
}

// seriesPages calls read for each series page that may have series that match all
// of ms in mint to maxt, and which of bs it is of, in order; lo to hi is what of that
// time is to be read from the block. seriesRuns is as for fetch.
func (s *Snapshot) seriesPages(ctx context.Context, bs []*Block, ms []*labels.Matcher, mint, maxt int64, seriesRuns int, read func(i int, p *chunkfmt.SeriesPage, lo, hi int64)) error {
	mint, maxt = max(mint, s.MinT), min(maxt, s.MaxT)
	held := tally{s: s}
	defer held.release()
	dirs, err := s.directories(ctx, bs, &held)
	if err != nil {
		return err
	}
	refs := make([][]chunkfmt.PageRef, len(bs))
	for i, b := range bs {
		lo, hi := b.clip(mint, maxt)
		refs[i] = dirs[i].Pages(ms, lo, hi)
	}
	if err := s.prune(ctx, bs, dirs, refs, ms); err != nil {
		return err
	}
	if s.expect != nil {
		samples := int64(0)
		for i, b := range bs {
			for k := range refs[i] {
				if r := &refs[i][k]; s.whole(b, r, ms, mint, maxt) {
					samples += int64(r.Samples) //nolint:gosec // as many as an object can have
				}
			}
		}
		if s.expect(0, samples); ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	var wants []want
	var of []int
	memory := int64(0)
	for i, b := range bs {
		for _, r := range refs[i] {
			w, err := b.want(seriesPage, r.Location)
			if err != nil {
				return err
			}
			w.bytes = r.Bytes
			wants, of = append(wants, w), append(of, i)
			memory += w.memory()
		}
	}
	held.add(memory)
	pages, err := s.fetch(ctx, seriesRuns, wants)
	if err != nil {
		return err
	}
	for j, i := range of {
		lo, hi := bs[i].clip(mint, maxt)
		read(i, pages[j].series, lo, hi)
		if ctx.Err() != nil { // perhaps for what has been read
			return context.Cause(ctx)
		}
	}
	return nil
}

// whole says whether it is sure that all samples of a page that may match are wanted.
func (s *Snapshot) whole(b *Block, r *chunkfmt.PageRef, ms []*labels.Matcher, mint, maxt int64) bool {
	lo, hi := b.clip(mint, maxt)
	if s.keep != nil || len(b.Ranges) > 1 || r.Times.MinT < lo || r.Times.MaxT > hi || r.FirstMetric != r.LastMetric {
		return false
	}
	if slices.ContainsFunc(ms, func(m *labels.Matcher) bool { return m.Name != model.MetricNameLabel }) {
		return false
	}
	return !s.Hidden.Deletes(lo, hi) && (s.Hidden == nil || lo >= s.Hidden.Before.Raw)
}

// Estimate says about how many samples a Select would read, from directories
// alone: at least as many as there are, but that the samples of a page are taken to
// be spread evenly over its time.
func (s *Snapshot) Estimate(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) (samples int64, err error) {
	mint = s.samplesFrom(mint)
	err = s.estimate(ctx, ms, mint, maxt, func(r *chunkfmt.PageRef, part float64) {
		samples += int64(part * float64(r.Samples))
	}, func() { samples = 0 })
	return samples, err
}

// EstimateSeries says about how many series a Select would give, by directories and Share: as
// many as blocks of the same time have together, at the time when they have most.
func (s *Snapshot) EstimateSeries(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) (series int64, err error) {
	err = s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		series = 0
		held := tally{s: s}
		defer held.release()
		dirs, err := s.directories(ctx, bs, &held)
		if err != nil {
			return err
		}
		type change struct{ at, series int64 }
		var changes []change
		for i, b := range bs {
			lo, hi := b.clip(max(mint, s.MinT), min(maxt, s.MaxT))
			n := int64(0)
			for _, r := range dirs[i].Pages(ms, lo, hi) {
				n += int64(r.Series) //nolint:gosec // as many as an object can have
			}
			changes = append(changes, change{lo, n}, change{hi, -n})
		}
		slices.SortFunc(changes, func(a, b change) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(b.series, a.series)) })
		now := int64(0)
		for _, c := range changes {
			now += c.series
			series = max(series, now)
		}
		return nil
	})
	if err != nil || series == 0 {
		return 0, err
	}
	share, err := s.Share(ctx, ms, mint, maxt)
	return int64(math.Round(share * float64(series))), err
}

// estimate calls add for each series page that may match, with how much of it lies
// in the time asked for; and again, after clear.
func (s *Snapshot) estimate(ctx context.Context, ms []*labels.Matcher, mint, maxt int64, add func(r *chunkfmt.PageRef, part float64), clear func()) error {
	return s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		clear()
		held := tally{s: s}
		defer held.release()
		dirs, err := s.directories(ctx, bs, &held)
		if err != nil {
			return err
		}
		for i, b := range bs {
			lo, hi := b.clip(max(mint, s.MinT), min(maxt, s.MaxT))
			for _, r := range dirs[i].Pages(ms, lo, hi) {
				add(&r, float64(min(hi, r.Times.MaxT)-max(lo, r.Times.MinT)+1)/float64(r.Times.MaxT-r.Times.MinT+1))
			}
		}
		return nil
	})
}

// sharePages is how many series pages Share looks at.
const sharePages = 16

// Share is about which share of what Estimate and EstimateWindows count is of series that
// match all of ms, 0 to 1: as of the series in some of the pages that they count.
func (s *Snapshot) Share(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) (share float64, err error) {
	err = s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		held := tally{s: s}
		defer held.release()
		dirs, err := s.directories(ctx, bs, &held)
		if err != nil {
			return err
		}
		var all, some []want
		for i, b := range bs {
			lo, hi := b.clip(max(mint, s.MinT), min(maxt, s.MaxT))
			for _, r := range dirs[i].Pages(ms, lo, hi) {
				w, err := b.want(seriesPage, r.Location)
				if err != nil {
					return err
				}
				w.bytes = r.Bytes
				all = append(all, w)
			}
		}
		n := min(len(all), sharePages)
		for i := range n {
			some = append(some, all[i*len(all)/n])
			held.add(some[i].memory())
		}
		pages, err := s.fetch(ctx, 0, some)
		if err != nil {
			return err
		}
		matching, series := 0, 0
		for _, p := range pages {
			matching, series = matching+p.series.Matching(ms), series+p.series.Len()
		}
		share = float64(matching) / float64(max(series, 1))
		return nil
	})
	return share, err
}

// clip cuts a range to what is to be read from the block at all.
func (b *Block) clip(mint, maxt int64) (lo, hi int64) {
	return max(mint, b.Ranges[0].MinT), min(maxt, b.Ranges[len(b.Ranges)-1].MaxT)
}

// holds says whether any chunk of a series lies, in part, in what is to be read
// from the block. Only blocks with gaps between their ranges need the look.
func (b *Block) holds(e *chunkfmt.Entry, mint, maxt int64) bool {
	if len(b.Ranges) == 1 {
		return true
	}
	return slices.ContainsFunc(b.Ranges, func(r chunkfmt.Range) bool {
		lo, hi := max(mint, r.MinT), min(maxt, r.MaxT)
		in := func(c chunkfmt.Chunk) bool { return c.Overlaps(lo, hi) }
		return lo <= hi && (slices.ContainsFunc(e.Chunks, in) || slices.ContainsFunc(e.Exemplars, in) ||
			slices.ContainsFunc(e.Gone, func(r chunkfmt.Range) bool { return r.Overlaps(lo, hi) }))
	})
}

// shows drops those chunks of a series of which all in mint to maxt is hidden, and
// what is gone if all of it is. It says whether there is anything else.
func shows(e *chunkfmt.Entry, mint, maxt int64, hidden []chunkfmt.Range) bool {
	if len(hidden) == 0 {
		return true
	}
	gone := func(c chunkfmt.Chunk) bool { return covers(hidden, max(mint, c.MinT), min(maxt, c.MaxT)) }
	e.Chunks = slices.DeleteFunc(slices.Clone(e.Chunks), gone)
	e.Exemplars = slices.DeleteFunc(slices.Clone(e.Exemplars), gone)
	if !slices.ContainsFunc(e.Gone, func(r chunkfmt.Range) bool {
		r.MinT, r.MaxT = max(r.MinT, mint), min(r.MaxT, maxt)
		return r.MinT <= r.MaxT && !covers(hidden, r.MinT, r.MaxT)
	}) {
		e.Gone = nil
	}
	return len(e.Chunks)+len(e.Exemplars)+len(e.Gone) > 0
}

// prune drops series pages of metrics that carry no label value that could
// match, where reading the label page to know so pays.
func (s *Snapshot) prune(ctx context.Context, bs []*Block, dirs []*chunkfmt.Directory, refs [][]chunkfmt.PageRef, ms []*labels.Matcher) error {
	var useful []*labels.Matcher
	for _, m := range ms {
		if m.Name != model.MetricNameLabel && !m.Matches("") {
			useful = append(useful, m)
		}
	}
	if len(useful) == 0 {
		return nil
	}
	// A label page costs a round trip before the series pages can be asked for.
	const tooSmall = 128 << 10
	held := tally{s: s}
	defer held.release()
	lps, err := s.labelPages(ctx, bs, dirs, &held, func(i int) bool {
		var size int64
		for _, r := range refs[i] {
			size += r.Size
		}
		return size > tooSmall && size > 2*dirs[i].Labels.Size
	})
	if err != nil {
		return err
	}
	for i, lp := range lps {
		if lp == nil {
			continue
		}
		metrics, known := carriers(lp, useful)
		if !known {
			continue
		}
		refs[i] = slices.DeleteFunc(refs[i], func(r chunkfmt.PageRef) bool {
			j := sort.SearchStrings(metrics, r.FirstMetric)
			return j == len(metrics) || metrics[j] > r.LastMetric
		})
	}
	return nil
}

// carriers returns the names of the metrics, ascending, that carry for each
// matcher a value that matches. known is false if the label page can't tell.
func carriers(lp *chunkfmt.LabelPage, ms []*labels.Matcher) (metrics []string, known bool) {
	for _, m := range ms {
		values, at := lp.Values(m.Name)
		if values == nil && at.Size > 0 {
			continue // in a page of their own: not worth another GET
		}
		var carry []string
		if values != nil {
			carry = matching(values, m)
		}
		if known {
			carry = slices.DeleteFunc(carry, func(name string) bool {
				_, ok := slices.BinarySearch(metrics, name)
				return !ok
			})
		}
		metrics, known = carry, true
	}
	return metrics, known
}

func matching(values *chunkfmt.LabelValues, m *labels.Matcher) []string {
	if m.Type == labels.MatchEqual {
		return slices.Clone(values.Metrics(m.Value))
	}
	set := map[string]struct{}{}
	for _, v := range values.Values() {
		if m.Matches(v) {
			for _, name := range values.Metrics(v) {
				set[name] = struct{}{}
			}
		}
	}
	out := make([]string, 0, len(set))
	for name := range set {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

package plan

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/schema"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// ErrGiveUp is what a kernel, or a worker, gives for a leaf whose data are such that
// the engine has to do it.
var ErrGiveUp = errors.New("not for a kernel")

// batch is how many series are decoded at the same time: their results wait for
// their turn to be put together.
const batch = 128

// batchSteps bounds the steps of the series of a batch, all together: their points are
// to stay in the caches of processors.
const batchSteps = 128 << 10

// buffers are those of queries that have ended.
//
//nolint:gochecknoglobals // scratch memory
var buffers = sync.Pool{New: func() any { return new(merge.Buffer) }}

// slotsOf are slots of queries that have ended, with their memory for points.
//
//nolint:gochecknoglobals // scratch memory
var slotsOf = sync.Pool{New: func() any { return new(make([]slot, 0, batch)) }}

// slot has room for the computation of one series.
type slot struct {
	series *merge.Series
	labels labels.Labels // as stored
	out    points
	annos  annotations.Annotations
	raw    []int32 // steps that summaries can't tell, ascending
}

// drop leaves a slot nothing but memory for its next use; histograms belong to results.
func (s *slot) drop() {
	was := s.out
	*s = slot{out: points{step: was.step, v: was.v}, raw: s.raw}
	if was.mem.again && was.mem.bytes() < maxNativeMemory {
		s.out.mem, s.out.hstep, s.out.h = was.mem, was.hstep, was.h
		clear(s.out.h)
	}
}

// maxNativeMemory bounds what a slot keeps for histograms, in bytes.
const maxNativeMemory = 1 << 20

// worker computes series, one after the other.
type worker struct {
	k   *kernel
	buf *merge.Buffer
	win *windows // nil: summaries are of no use
}

// eval computes a series: from its summaries, if it has some.
func (w *worker) eval(s *slot) error {
	s.raw = s.raw[:0]
	if w.win != nil {
		if done, err := w.win.eval(w, s); done || err != nil {
			return err
		}
	}
	if w.k.natives != nil {
		w.buf.Whole = w.k.natives.whole
		err := w.columns(s)
		if w.buf.Whole = nil; !errors.Is(err, errHollow) {
			return err
		}
	}
	return w.columns(s)
}

// columns computes a series from its samples.
func (w *worker) columns(s *slot) error {
	cols, err := s.series.Columns(w.buf)
	if err != nil {
		return promql.ErrStorage{Err: err}
	}
	return w.k.eval(s.labels, cols, known{w.buf.Times(), w.buf.Values(), w.buf.Falls()}, &s.out, &s.annos)
}

// run computes a leaf over the series of a set, several at a time.
func run(ctx context.Context, l *Leaf, o options, open func(*history.Summaries) storage.SeriesSet, atOnce int) (*partial, error) {
	if sums := l.summaries(o); sums != nil {
		p, err := runOver(ctx, l, o, open(sums), sums, atOnce)
		if !errors.Is(err, errNeedsSamples) {
			return p, err
		}
	}
	return runOver(ctx, l, o, open(nil), nil, atOnce)
}

func runOver(ctx context.Context, l *Leaf, o options, set storage.SeriesSet, sums *history.Summaries, atOnce int) (_ *partial, err error) {
	r := newResult(l, o)
	acc := account.From(ctx)
	steps := l.Grid.Len()
	base := 6 * 8 * int64(steps) * int64(atOnce+1) // counts
	held := int64(0)
	hold := func(bytes int64) {
		acc.Hold(bytes - held)
		held = bytes
	}
	hold(base)
	defer func() {
		if err != nil {
			hold(0) // there is no result: the engine may do it
		}
	}()
	total := newCounts(steps)
	ws := make([]worker, 0, atOnce)
	more := func() {
		buf, _ := buffers.Get().(*merge.Buffer)
		ws = append(ws, worker{newKernel(l, o), buf, newWindows(l, o, sums)})
	}
	more()
	defer func() {
		for i := range ws {
			ws[i].k.done()
			buffers.Put(ws[i].buf)
		}
	}()
	// Points wait for their turn, and their memory is noted after each batch.
	pooled, _ := slotsOf.Get().(*[]slot)
	slots := (*pooled)[:0:min(batch, max(atOnce, batchSteps/steps))]
	used := 0 // slots
	defer func() {
		slots = slots[:used]
		for i := range slots {
			slots[i].drop()
		}
		if steps <= batchSteps {
			slotsOf.Put(pooled)
		}
	}()
	most := cap(slots)
	if sums == nil {
		most = min(most, 4*atOnce) // for a start: there may be histograms
	}
	for rest := true; rest; {
		slots = slots[:0]
		for len(slots) < most {
			if rest = set.Next(); !rest {
				break
			}
			s, ok := set.At().(*merge.Series)
			if !ok {
				return nil, ErrGiveUp // not of one tenant
			}
			slots = slots[:len(slots)+1]
			used = max(used, len(slots))
			next := &slots[len(slots)-1]
			next.series, next.labels, next.annos = s, s.Labels(), nil
		}
		if err := ctx.Err(); err != nil {
			return &partial{annotated: r.annotated}, err
		}
		for len(slots) >= worthWorkers && len(ws) < atOnce {
			more()
		}
		for i := range ws {
			ws[i].k.given = nil
		}
		if err := evaluate(ctx, o.logger, ws, slots, (*worker).eval); err != nil {
			return &partial{annotated: r.annotated}, err
		}
		if sums != nil {
			// Where there are no samples any more, summaries tell what can be told.
			if total.series == 0 && needSamples(slots) && slots[0].series.OnlySummaries(l.mint(), l.maxt()) == nil {
				hold(0)
				if r, ok := set.(interface{ Release() }); ok {
					r.Release()
				}
				return nil, errNeedsSamples
			}
			patch := func(w *worker, s *slot) error { return w.win.patch(ctx, w, s) }
			if err := evaluate(ctx, o.logger, ws, slots, patch); err != nil {
				return &partial{annotated: r.annotated}, err
			}
		}
		total.series += int64(len(slots))
		for i := range slots {
			if err := r.add(&slots[i]); err != nil {
				return &partial{annotated: r.annotated}, err
			}
		}
		scratch := int64(0)
		for i := range ws {
			scratch += int64(ws[i].k.frames.bytes)
		}
		natives := int64(0)
		for i := range slots {
			natives += slots[i].out.mem.bytes()
		}
		if most = cap(slots); natives > 0 {
			most = min(most, max(atOnce, batchSteps/8/steps))
		}
		hold(base + scratch + natives + r.bytes())
		if f, ok := set.(interface{ Forget() }); ok {
			f.Forget() // the slots
		}
	}
	if err := set.Err(); err != nil {
		return &partial{annotated: r.annotated}, fmt.Errorf("expanding series: %w", err)
	}
	r.annos.Merge(set.Warnings())
	for i := range ws {
		ws[i].k.frames.clear()
		ws[i].win.counted(&ws[i].k.counts)
		total.merge(&ws[i].k.counts)
	}
	series, err := r.finish()
	out := &partial{series: series, counts: total, annotated: r.annotated}
	if r.fold != nil {
		out.slab = r.fold.slab
	}
	return out, err
}

// recovered is deferred in goroutines: as in the engine, a bug ends a query and not
// the process.
func recovered(logger *slog.Logger, err *error) {
	if p := recover(); p != nil {
		logger.Error("runtime panic during query evaluation", "err", p, "stacktrace", string(debug.Stack()))
		*err = fmt.Errorf("unexpected error: %v", p)
	}
}

// worthWorkers are as many series as are worth more than one worker.
const worthWorkers = 4

// evaluate calls eval for the slots, shared out among the workers.
func evaluate(ctx context.Context, logger *slog.Logger, ws []worker, slots []slot, eval func(*worker, *slot) error) error {
	if len(slots) < worthWorkers {
		ws = ws[:1]
	}
	some := func(w int) (err error) {
		defer recovered(logger, &err)
		// Neighbours: they share pages, times, and the integers that buckets of
		// a histogram are based on.
		for i := w * len(slots) / len(ws); i < (w+1)*len(slots)/len(ws); i++ {
			if err := eval(&ws[w], &slots[i]); err != nil {
				return err
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return nil
	}
	if len(ws) == 1 {
		return some(0)
	}
	var g errgroup.Group
	for w := range ws {
		g.Go(func() error { return some(w) })
	}
	return g.Wait()
}

// result is what a leaf gives, put together series by series in their order.
type result struct {
	leaf *Leaf
	opts options
	annotated

	// The function drops the name, or with delayed name removal says that it is to
	// be dropped at the end of the query.
	drops bool

	fold *fold // with an aggregation
	// unnamed are hashes of the labels without the name, where the fold gets them
	// so: series that differ in their names alone become one, or an error, and the
	// engine sees to that.
	unnamed map[uint64]struct{}
	// oneName: the selector fixes the name, and no group is by it. Series don't become one
	// then, unless they have other metadata labels.
	oneName bool

	present []bool // by step; of absent_over_time

	series []partialSeries // without any of these
	held   int64           // samples in series, as the engine counts them
}

func newResult(l *Leaf, o options) *result {
	fn := l.function()
	r := &result{leaf: l, opts: o, drops: l.Call != nil && fn != "last_over_time" && fn != "first_over_time"}
	if l.Agg != nil {
		r.fold = newFold(l)
		if r.drops && !o.delayedNameRemoval {
			r.unnamed = map[uint64]struct{}{}
			r.fold.nameless = true
			r.oneName = l.fixesName() && !o.typeAndUnitLabels && !slices.ContainsFunc(l.Agg.Grouping, schema.IsMetadataLabel)
		}
	}
	if fn == "absent_over_time" {
		r.present = make([]bool, l.Grid.Len())
	}
	return r
}

// add puts in the points of the next series. It gives ErrGiveUp if the engine has
// to do it.
func (r *result) add(s *slot) error {
	r.annos.Merge(s.annos)
	if s.out.empty() {
		return nil
	}
	if fn := r.leaf.function(); fn == "rate" || fn == "increase" {
		warnOfName(r.leaf, r.opts, s, &r.annos)
	}
	switch {
	case r.present != nil:
		for _, k := range s.out.step {
			r.present[k] = true
		}
		for _, k := range s.out.hstep {
			r.present[k] = true
		}
	case r.fold != nil:
		ls := s.labels
		switch {
		case r.unnamed == nil:
		case !r.oneName:
			ls = ls.DropReserved(schema.IsMetadataLabel)
			hash := ls.Hash()
			if _, ok := r.unnamed[hash]; ok {
				return ErrGiveUp
			}
			r.unnamed[hash] = struct{}{}
		case named(ls):
			return ErrGiveUp // rare
		}
		if r.fold.held > int64(r.opts.maxSamples) {
			return promql.ErrTooManySamples("query execution")
		}
		return r.fold.add(s.labels, ls, &s.out, &r.over)
	default:
		one := s.out.series(r.leaf.Grid)
		one.Metric, one.DropName = s.labels, r.drops
		r.held += int64(len(one.Floats))
		for _, h := range one.Histograms {
			r.held += int64(histogramSize(h.H))
		}
		if r.held > int64(r.opts.maxSamples) {
			return promql.ErrTooManySamples("query execution")
		}
		r.series = append(r.series, partialSeries{one, s.labels})
	}
	return nil
}

// bytes is about how much memory the result takes.
func (r *result) bytes() int64 {
	const point = 16
	if r.fold != nil {
		return r.fold.bytes()
	}
	return point * r.held
}

func (r *result) finish() ([]partialSeries, error) {
	switch {
	case r.fold != nil:
		// An aggregation that chooses series leaves them their names, as far as the function does.
		return r.fold.finish(r.drops && (r.opts.delayedNameRemoval || r.fold.top != nil), &r.over)
	case r.present != nil:
		return absent(r.leaf, r.present), nil
	}
	return r.series, nil
}

// warnOfName says that a metric doesn't look like a counter, as the engine does.
func warnOfName(l *Leaf, o options, s *slot, annos *annotations.Annotations) {
	name := s.labels.Get(model.MetricNameLabel)
	if name == "" || len(s.out.step) == 0 {
		return
	}
	pos := l.Call.Args[0].PositionRange()
	if o.typeAndUnitLabels {
		t := s.labels.Get(model.MetricTypeLabel)
		if t != string(model.MetricTypeCounter) && t != string(model.MetricTypeHistogram) {
			annos.Add(annotations.NewPossibleNonCounterLabelInfo(name, t, pos))
		}
		return
	}
	if !likeCounter(name) {
		annos.Add(annotations.NewPossibleNonCounterInfo(name, pos))
	}
}

// likeCounter says whether a metric is named as counters are.
func likeCounter(name string) bool {
	return slices.ContainsFunc([]string{"_total", "_sum", "_count", "_bucket"}, func(suffix string) bool { return strings.HasSuffix(name, suffix) })
}

// absent gives 1 where no series was present.
func absent(l *Leaf, present []bool) []partialSeries {
	s := promql.Series{Metric: absentLabels(l.Selector), DropName: true}
	for i, p := range present {
		if !p {
			s.Floats = append(s.Floats, promql.FPoint{T: l.Grid.At(i), F: 1})
		}
	}
	if s.Floats == nil {
		return nil
	}
	return []partialSeries{{Series: s}}
}

// absentLabels is promql's createLabelsForAbsentFunction.
func absentLabels(vs *parser.VectorSelector) labels.Labels {
	b := labels.NewBuilder(labels.EmptyLabels())
	has := map[string]bool{}
	for _, m := range vs.LabelMatchers {
		switch {
		case schema.IsMetadataLabel(m.Name):
		case m.Type == labels.MatchEqual && !has[m.Name]:
			b.Set(m.Name, m.Value)
			has[m.Name] = true
		default:
			b.Del(m.Name)
		}
	}
	return b.Labels()
}

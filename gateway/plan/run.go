package plan

import (
	"context"
	"errors"
	"fmt"
	"runtime"
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

	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
)

// errGiveUp: the data are such that the engine has to do it.
var errGiveUp = errors.New("not for a kernel")

// batch is how many series are decoded at the same time: their results wait for
// their turn to be put together.
const batch = 128

// buffers are those of queries that have ended.
//
//nolint:gochecknoglobals // scratch memory
var buffers = sync.Pool{New: func() any { return new(merge.Buffer) }}

// slot has room for the computation of one series.
type slot struct {
	series *merge.Series
	labels labels.Labels // as stored
	out    points
	annos  annotations.Annotations
}

// run computes a leaf over the series of a set.
func run(ctx context.Context, l *Leaf, o options, set storage.SeriesSet) ([]promql.Series, counts, annotations.Annotations, error) {
	var annos annotations.Annotations
	var f *fold
	if l.Agg != nil {
		f = newFold(l)
	}
	// As the engine does it: the function drops the name, or says that it is to be
	// dropped at the end of the query.
	fn := l.function()
	drops := l.Call != nil && fn != "last_over_time" && fn != "first_over_time"
	delayed := drops && o.delayedNameRemoval
	// Series that differ in their names alone become one, or an error: the engine
	// sees to that.
	var unnamed map[uint64]struct{}
	if drops && !delayed && f != nil {
		unnamed = map[uint64]struct{}{}
	}
	var out []promql.Series
	total := newCounts(l.Grid.Len())
	var held int64
	var present []bool // absent_over_time
	if fn == "absent_over_time" {
		present = make([]bool, l.Grid.Len())
	}

	workers := runtime.GOMAXPROCS(0)
	type worker struct {
		k   *kernel
		buf *merge.Buffer
	}
	ws := make([]worker, workers)
	for i := range ws {
		buf, _ := buffers.Get().(*merge.Buffer)
		ws[i] = worker{newKernel(l, o), buf}
		defer buffers.Put(buf)
	}
	slots := make([]slot, batch)
	for more := true; more; {
		n := 0
		for n < batch {
			if more = set.Next(); !more {
				break
			}
			s, ok := set.At().(*merge.Series)
			if !ok {
				return nil, counts{}, nil, fmt.Errorf("series of type %T", set.At())
			}
			slots[n].series, slots[n].labels, slots[n].annos = s, s.Labels(), nil
			n++
		}
		if err := ctx.Err(); err != nil {
			return nil, counts{}, annos, err
		}
		one := func(w *worker, s *slot) error {
			cols, err := s.series.Columns(w.buf)
			if err != nil {
				return promql.ErrStorage{Err: err}
			}
			return w.k.eval(s.labels, cols, &s.out, &s.annos)
		}
		if n < 4 {
			for i := range n {
				if err := one(&ws[0], &slots[i]); err != nil {
					return nil, counts{}, annos, err
				}
			}
		} else {
			var g errgroup.Group
			for w := range ws {
				g.Go(func() error {
					// Neighbours: they share pages, times, and the integers that buckets of
					// a histogram are based on.
					for i := w * n / workers; i < (w+1)*n/workers; i++ {
						if err := one(&ws[w], &slots[i]); err != nil {
							return err
						}
						if ctx.Err() != nil {
							return ctx.Err()
						}
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				return nil, counts{}, annos, err
			}
		}
		for i := range n {
			s := &slots[i]
			annos.Merge(s.annos)
			total.series++
			if s.out.empty() {
				continue
			}
			if fn == "rate" || fn == "increase" {
				warnOfName(l, o, s, &annos)
			}
			if present != nil {
				for _, k := range s.out.step {
					present[k] = true
				}
				for _, k := range s.out.hstep {
					present[k] = true
				}
				continue
			}
			ls := s.labels
			if f != nil {
				if drops && !o.delayedNameRemoval {
					ls = ls.DropReserved(schema.IsMetadataLabel)
				}
				if unnamed != nil {
					hash := ls.Hash()
					if _, ok := unnamed[hash]; ok {
						return nil, counts{}, nil, errGiveUp
					}
					unnamed[hash] = struct{}{}
				}
				if err := f.add(ls, &s.out, &annos); err != nil {
					return nil, counts{}, annos, err
				}
				continue
			}
			one := s.out.series(l.Grid)
			one.Metric, one.DropName = ls, drops
			held += int64(len(one.Floats))
			for _, h := range one.Histograms {
				held += int64(histogramSize(h.H))
			}
			if held > int64(o.maxSamples) {
				return nil, counts{}, annos, promql.ErrTooManySamples("query execution")
			}
			out = append(out, one)
		}
	}
	if err := set.Err(); err != nil {
		return nil, counts{}, annos, fmt.Errorf("expanding series: %w", err)
	}
	annos.Merge(set.Warnings())
	for i := range ws {
		total.merge(&ws[i].k.counts)
	}
	switch {
	case f != nil:
		out = f.finish(delayed)
	case present != nil:
		out = absent(l, present)
	}
	return out, total, annos, nil
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
	for _, suffix := range []string{"_total", "_sum", "_count", "_bucket"} {
		if strings.HasSuffix(name, suffix) {
			return
		}
	}
	annos.Add(annotations.NewPossibleNonCounterInfo(name, pos))
}

// absent gives 1 where no series was present.
func absent(l *Leaf, present []bool) []promql.Series {
	s := promql.Series{Metric: absentLabels(l.Selector), DropName: true}
	for i, p := range present {
		if !p {
			s.Floats = append(s.Floats, promql.FPoint{T: l.Grid.At(i), F: 1})
		}
	}
	if s.Floats == nil {
		return nil
	}
	return []promql.Series{s}
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

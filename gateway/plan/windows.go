package plan

import (
	"context"
	"errors"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/promql"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// query is what a leaf asks of summaries.
func (l *Leaf) query(o options) *rollup.Query {
	return &rollup.Query{
		Function: l.function(), Range: l.Range, StartTimestamps: o.startTimestamps,
		Start: l.Grid.Start - l.offset(), Step: l.Grid.Step, Steps: l.Grid.Len(),
	}
}

// summaries that answer the leaf, where there are some; nil: none would.
func (l *Leaf) summaries(o options) *history.Summaries {
	if l.width == 0 {
		return nil
	}
	q := l.query(o)
	columns, ok := q.Columns(l.width)
	if !ok {
		return nil
	}
	return &history.Summaries{Width: l.width, Columns: columns, Rest: q.Rest(l.width)}
}

// errNeedsSamples: summaries tell too little for them to be worth while.
var errNeedsSamples = errors.New("needs samples")

// needSamples reports whether a good part of the results needs samples, of series
// that have summaries. All samples are then better read at once.
func needSamples(slots []slot) bool {
	points, raw := 0, 0
	for i := range slots {
		points += len(slots[i].out.step)
		raw += len(slots[i].raw)
	}
	return raw > 16 && raw > points/4
}

// windows computes a leaf's function for one series after the other, from summaries.
// It is for one goroutine.
type windows struct {
	leaf *Leaf
	opts options
	all  bool // summaries are made of all samples, for tests
	eva  *rollup.Evaluator
	res  rollup.Result

	more points // of steps that needed samples
	one  points
}

func newWindows(l *Leaf, o options, sums *history.Summaries) *windows {
	if sums == nil {
		return nil
	}
	eva, ok := rollup.NewEvaluator(*l.query(o), sums.Width)
	if !ok {
		return nil
	}
	return &windows{leaf: l, opts: o, all: o.summarise, eva: eva}
}

// counted adds the samples that were counted so far.
func (x *windows) counted(c *counts) {
	if x != nil {
		x.eva.Samples(c.window, c.read)
	}
}

// eval computes the points that summaries tell, and notes the steps of which they
// don't. It reports false if the series has no summaries.
func (x *windows) eval(w *worker, s *slot) (done bool, err error) {
	win, err := s.series.Windows(w.buf, x.all)
	switch {
	case err != nil:
		return false, promql.ErrStorage{Err: err}
	case win == nil:
		return false, nil
	}
	s.out.reset()
	res := &x.res
	res.Step, res.Value, res.Raw = s.out.step, s.out.v, s.raw
	x.eva.Eval(win, res)
	s.out.step, s.out.v, s.raw = res.Step, res.Value, res.Raw
	return true, nil
}

// patch computes the steps of a slot that need samples.
func (x *windows) patch(ctx context.Context, w *worker, s *slot) error {
	if len(s.raw) == 0 {
		return nil
	}
	x.more.reset()
	for i := 0; i < len(s.raw); {
		j := i + 1
		for j < len(s.raw) && s.raw[j] == s.raw[j-1]+1 {
			j++
		}
		from := s.raw[i]
		part := x.leaf.only(int(from), int(s.raw[j-1])+1)
		if err := s.series.OnlySummaries(part.mint(), part.maxt()); err != nil {
			s.annos.Add(err)
		}
		cols, err := s.series.ColumnsOf(ctx, w.buf, part.mint(), part.maxt())
		if err != nil {
			return promql.ErrStorage{Err: err}
		}
		k := newKernel(part, x.opts)
		err = k.eval(s.labels, cols, unknown(cols), &x.one, &s.annos)
		k.done()
		if err != nil {
			return err
		}
		w.k.counts.add(&k.counts, int(from))
		x.more.append(&x.one, from)
		i = j
	}
	s.out.insert(&x.more)
	return nil
}

// append puts the points of later steps behind those of p; step 0 is step from.
func (p *points) append(o *points, from int32) {
	for i, step := range o.step {
		p.step, p.v = append(p.step, step+from), append(p.v, o.v[i])
	}
	for i, step := range o.hstep {
		p.hstep, p.h = append(p.hstep, step+from), append(p.h, o.h[i])
	}
	o.mem = nativeMemory{} // p has the histograms
}

// insert puts points of other steps between those of p.
func (p *points) insert(o *points) {
	p.step, p.v = zip(p.step, p.v, o.step, o.v)
	p.hstep, p.h = zip(p.hstep, p.h, o.hstep, o.h)
}

// zip puts b between a, by their steps, which differ.
func zip[V float64 | *histogram.FloatHistogram](aStep []int32, a []V, bStep []int32, b []V) ([]int32, []V) {
	i, j := len(a)-1, len(b)-1
	aStep, a = append(aStep, bStep...), append(a, b...)
	for k := len(a) - 1; j >= 0; k-- {
		if i >= 0 && aStep[i] > bStep[j] {
			aStep[k], a[k] = aStep[i], a[i]
			i--
		} else {
			aStep[k], a[k] = bStep[j], b[j]
			j--
		}
	}
	return aStep, a
}

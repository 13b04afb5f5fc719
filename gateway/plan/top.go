package plan

import (
	"container/heap"
	"math"
	"slices"
	"sort"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/schema"
)

// top are the series that topk(), bottomk() or limitk() chooses: promql's aggregationK. For each
// group and step a heap holds the points that are chosen so far; which of equal points stay depends on how
// heaps move them, so these are moved as there. Most points don't get in, and cost a comparison.
type top struct {
	op     parser.ItemType
	k      int
	series []topSeries // of which some point has been in a heap; in order
}

type topSeries struct {
	labels labels.Labels   // as stored
	points []promql.FPoint // of a shard: all that have been in a heap
}

// chosen is a point in a heap.
type chosen struct {
	v      float64
	series int32 // in top
}

// ranking is a heap of the points chosen of a group at a step, that which goes next first.
type ranking struct {
	points []chosen
	bottom bool
}

func (r *ranking) Len() int { return len(r.points) }

func (r *ranking) Less(i, j int) bool {
	a, b := r.points[i].v, r.points[j].v
	if math.IsNaN(a) {
		return true
	}
	if r.bottom {
		return a > b
	}
	return a < b
}

func (r *ranking) Swap(i, j int) { r.points[i], r.points[j] = r.points[j], r.points[i] }
func (r *ranking) Push(any)      {} // not used: it takes memory for each point
func (r *ranking) Pop() any      { return nil }

// push is heap.Push.
func (r *ranking) push(c chosen) {
	r.points = append(r.points, c)
	heap.Fix(r, len(r.points)-1)
}

// replace puts a point in the place of the first.
func (r *ranking) replace(c chosen) {
	r.points[0] = c
	heap.Fix(r, 0)
}

// topOf is the parameter of an aggregation that chooses series, if a kernel computes it: for others the
// engine has errors, or gives nothing.
func topOf(n *parser.AggregateExpr) (k int, ok bool) {
	if n.Op != parser.TOPK && n.Op != parser.BOTTOMK && n.Op != parser.LIMITK {
		return 0, false
	}
	p, ok := n.Param.(*parser.NumberLiteral)
	if !ok || !(p.Val >= 1 && p.Val <= math.MaxInt32) {
		return 0, false
	}
	return int(p.Val), true
}

// chooses says whether the leaf's aggregation chooses series.
func (l *Leaf) chooses() bool {
	if l.Agg == nil {
		return false
	}
	_, ok := topOf(l.Agg)
	return ok
}

// add chooses among what is in the group and the points of the next series, and says how many points
// more there are.
func (t *top) add(g *group, series labels.Labels, p *points, shard *Grid) (more int64) {
	id := int32(-1)
	for i, s := range p.step {
		x, r := p.v[i], &g.top[s]
		full := len(r.points) >= t.k
		if full {
			least := g.v[s]
			switch t.op {
			case parser.TOPK:
				if !(least < x || math.IsNaN(least) && !math.IsNaN(x)) {
					continue
				}
			case parser.BOTTOMK:
				if !(least > x || math.IsNaN(least) && !math.IsNaN(x)) {
					continue
				}
			default:
				continue
			}
		}
		if id < 0 {
			id = int32(len(t.series))
			t.series = append(t.series, topSeries{labels: series})
		}
		if full {
			r.replace(chosen{x, id})
		} else {
			r.bottom = t.op == parser.BOTTOMK
			r.push(chosen{x, id})
			more++
		}
		g.v[s] = r.points[0].v
		if shard != nil {
			one := &t.series[id]
			one.points = append(one.points, promql.FPoint{T: shard.At(int(s)), F: x})
			more++
		}
	}
	return more
}

// all gives the series of which some point has been in a heap: those of a shard with these points.
func (t *top) all(dropName bool) []partialSeries {
	out := make([]partialSeries, len(t.series))
	for i, s := range t.series {
		out[i] = partialSeries{promql.Series{Metric: s.labels, DropName: dropName, Floats: s.points}, s.labels}
	}
	return out
}

// finish gives the series chosen, with the points at which they were.
func (t *top) finish(groups []*group, g Grid, dropName bool) []partialSeries {
	out := t.all(dropName)
	for _, of := range groups {
		for step := range of.top {
			for _, c := range of.top[step].points {
				s := &out[c.series]
				s.Floats = append(s.Floats, promql.FPoint{T: g.At(step), F: c.v})
			}
		}
	}
	if g.Len() == 1 {
		return t.ranked(groups, out)
	}
	return slices.DeleteFunc(out, func(s partialSeries) bool { return len(s.Floats) == 0 })
}

// ranked are the series of one step, group by group in the order that the engine gives them.
func (t *top) ranked(groups []*group, all []partialSeries) (out []partialSeries) {
	for _, of := range groups {
		r := &of.top[0]
		if t.op != parser.LIMITK && len(r.points) > 1 {
			sort.Sort(sort.Reverse(r))
		}
		for _, c := range r.points {
			out = append(out, all[c.series])
		}
	}
	return out
}

// finishShard gives the series of a shard of which points were chosen at any time: the others would
// not be chosen among all series either, and whatever is chosen doesn't depend on them. The first
// series of each group comes once more without points: one of histograms, which aren't chosen, may say where
// in the order the group is.
func (t *top) finishShard(groups []*group, dropName bool) []partialSeries {
	out := t.all(dropName)
	for _, g := range groups {
		out = append(out, partialSeries{promql.Series{Metric: g.first, DropName: dropName}, g.first})
	}
	return out
}

// combineTop chooses among what shards have chosen, which is in the order of series.
func (l *Leaf) combineTop(series []partialSeries, o options) ([]partialSeries, error) {
	f, drops := newFold(l), false
	for i := range series {
		s := &series[i]
		ls := s.Metric
		if s.DropName && !o.delayedNameRemoval {
			ls = ls.DropReserved(schema.IsMetadataLabel)
		}
		var p points
		for _, x := range s.Floats {
			p.add(int((x.T-l.Grid.Start)/l.Grid.Step), x.F)
		}
		drops = s.DropName
		f.top.add(f.group(s.order, ls), s.order, &p, nil)
	}
	return f.finish(drops, nil)
}

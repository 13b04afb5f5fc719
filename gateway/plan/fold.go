package plan

import (
	"math"
	"slices"
	"sync"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/schema"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/kahansum"
)

// fold is an aggregation of the points of many series, which come in the order
// in which the engine would see them: promql's rangeEvalAgg and aggregation.
type fold struct {
	leaf     *Leaf
	grouping []string // sorted
	without  bool
	steps    int
	mem      *columns
	index    map[uint64]int // of groups, by hash of their labels
	groups   []*group       // in the order of their first series
	builder  *labels.Builder
	buf      []byte
	phi      float64 // of QUANTILE
	top      *top    // of TOPK, BOTTOMK and LIMITK
	held     int64   // points in groups' columns and heaps
	natives  int64   // bytes of sums of histograms
	nameless bool    // the labels that the engine adds up have no names, whatever those have that come here

	slab *[]promql.FPoint // that the results lie in; nil: they have memory of their own
}

// group has, for each step, what has been put together so far.
type group struct {
	labels labels.Labels
	first  labels.Labels // of its first series
	n      []uint32      // samples; 0: none yet. Of SUM not how many
	from   int           // the steps from it up to, without, to have n, and maybe others; of SUM
	to     int
	v      []float64   // floatValue of promql's groupedAggregation
	c      []float64   // floatKahanC; of SUM and AVG
	mean   []float64   // floatMean; of STDDEV and STDVAR, of AVG where a sum overflowed
	inc    []bool      // floatIncrementalMean; nil: nowhere
	all    []column    // heap, by series; of QUANTILE
	top    []ranking   // heap, by step; of TOPK, BOTTOMK and LIMITK. v is the first of it
	native *nativeSums // of SUM and AVG; nil: there are no histograms
}

// column are the points of one series.
type column struct {
	first int     // step
	step  []int32 // nil: those from first on
	v     []float64
}

// copyOf copies points.
func copyOf(p *points) column {
	c := column{first: int(p.step[0]), v: slices.Clone(p.v)}
	if int(p.step[len(p.step)-1])-c.first != len(p.step)-1 {
		c.step = slices.Clone(p.step)
	}
	return c
}

// newGroup has room for what the aggregation needs.
func newGroup(op parser.ItemType, steps int, mem *columns) *group {
	g := &group{n: take(&mem.counts, steps)}
	switch op {
	case parser.SUM, parser.AVG:
		g.v, g.c = take(&mem.floats, steps), take(&mem.floats, steps)
	case parser.STDDEV, parser.STDVAR:
		g.v, g.mean = take(&mem.floats, steps), take(&mem.floats, steps)
	case parser.MIN, parser.MAX, parser.QUANTILE:
		g.v = take(&mem.floats, steps)
	case parser.TOPK, parser.BOTTOMK, parser.LIMITK:
		g.v, g.top = take(&mem.floats, steps), make([]ranking, steps)
	}
	return g
}

// columns is memory of groups that are done with, for the next ones.
type columns struct {
	counts [][]uint32
	floats [][]float64
}

// maxColumns bounds what is kept, in bytes.
const maxColumns = 4 << 20

// columnsOf are those of folds that are finished.
//
//nolint:gochecknoglobals // scratch memory
var columnsOf = sync.Pool{New: func() any { return new(columns) }}

// take gives a column of zeros.
func take[T uint32 | float64](from *[][]T, steps int) []T {
	if n := len(*from); n > 0 {
		c := (*from)[n-1]
		if *from = (*from)[:n-1]; steps <= cap(c) {
			c = c[:steps]
			clear(c)
			return c
		}
	}
	return make([]T, steps)
}

// release gives back the memory of all groups, which aren't used any more.
func (f *fold) release() {
	left := maxColumns / (8*f.steps + 1)
	for _, g := range f.groups[:min(len(f.groups), left/3)] {
		f.mem.counts = append(f.mem.counts, g.n)
		for _, c := range [][]float64{g.v, g.c, g.mean} {
			if c != nil {
				f.mem.floats = append(f.mem.floats, c)
			}
		}
	}
	f.groups = nil
	columnsOf.Put(f.mem)
	f.mem = nil
}

func newFold(l *Leaf) *fold {
	f := &fold{
		leaf: l, without: l.Agg.Without, steps: l.Grid.Len(), index: map[uint64]int{},
		builder: labels.NewBuilder(labels.EmptyLabels()),
	}
	f.mem, _ = columnsOf.Get().(*columns)
	f.phi, _ = quantileOf(l.Agg)
	if k, ok := topOf(l.Agg); ok {
		f.top = &top{op: l.Agg.Op, k: k}
	}
	f.grouping = slices.Clone(l.Agg.Grouping)
	if f.without {
		f.grouping = append(f.grouping, model.MetricNameLabel, model.MetricTypeLabel, model.MetricUnitLabel)
	}
	slices.Sort(f.grouping)
	return f
}

// group of a series, of which the function has left the labels ls.
func (f *fold) group(series, ls labels.Labels) *group {
	var hash uint64
	switch {
	case f.without:
		hash, f.buf = ls.HashWithoutLabels(f.buf, f.grouping...)
	case len(f.grouping) > 0:
		hash, f.buf = ls.HashForLabels(f.buf, f.grouping...)
	}
	if i, ok := f.index[hash]; ok {
		return f.groups[i]
	}
	g := newGroup(f.leaf.Agg.Op, f.steps, f.mem)
	g.first = series
	f.builder.Reset(ls)
	switch {
	case f.without:
		f.builder.Del(f.grouping...)
		schema.Metadata{}.SetToLabels(f.builder)
		g.labels = f.builder.Labels()
	case len(f.grouping) > 0:
		f.builder.Keep(f.grouping...)
		g.labels = f.builder.Labels()
	default:
		g.labels = labels.EmptyLabels()
	}
	f.index[hash] = len(f.groups)
	f.groups = append(f.groups, g)
	return g
}

// add puts in the points of the next series. If there are histograms where they
// can't be put together here, it gives ErrGiveUp.
func (f *fold) add(series, ls labels.Labels, p *points, annos *annotations.Annotations) error {
	op := f.leaf.Agg.Op
	if len(p.h) > 0 {
		switch op {
		case parser.LIMITK:
			return ErrGiveUp
		case parser.SUM, parser.AVG:
			if f.leaf.shard { // they aren't added up in another order
				return ErrGiveUp
			}
		case parser.COUNT, parser.GROUP:
		case parser.TOPK, parser.BOTTOMK:
			annos.Add(annotations.NewHistogramIgnoredInAggregationInfo(op.String(), f.leaf.Agg.PosRange))
		default:
			annos.Add(annotations.NewHistogramIgnoredInAggregationInfo(op.String(), f.leaf.Agg.Expr.PositionRange()))
		}
	}
	g := f.group(series, ls)
	if g.native != nil {
		p = g.native.without(p)
	}
	switch op {
	case parser.SUM:
		g.sum(p)
	case parser.AVG:
		for i, s := range p.step {
			g.n[s]++
			g.average(int(s), p.v[i])
		}
	case parser.MIN:
		for i, s := range p.step {
			if x := p.v[i]; g.n[s] == 0 || g.v[s] > x || math.IsNaN(g.v[s]) {
				g.v[s] = x
			}
			g.n[s]++
		}
	case parser.MAX:
		for i, s := range p.step {
			if x := p.v[i]; g.n[s] == 0 || g.v[s] < x || math.IsNaN(g.v[s]) {
				g.v[s] = x
			}
			g.n[s]++
		}
	case parser.QUANTILE:
		if len(p.step) > 0 {
			for _, s := range p.step {
				g.n[s]++
			}
			g.all = append(g.all, copyOf(p))
			f.held += int64(len(p.step))
		}
	case parser.TOPK, parser.BOTTOMK, parser.LIMITK:
		var shard *Grid
		if f.leaf.shard {
			shard = &f.leaf.Grid
		}
		f.held += f.top.add(g, series, p, shard)
	case parser.COUNT, parser.GROUP:
		for _, s := range p.step {
			g.n[s]++
		}
		for _, s := range p.hstep {
			g.n[s]++
		}
	case parser.STDDEV, parser.STDVAR:
		for i, s := range p.step {
			x := p.v[i]
			g.n[s]++
			switch {
			case g.n[s] > 1:
				delta := x - g.mean[s]
				g.mean[s] += delta / float64(g.n[s])
				g.v[s] += delta * (x - g.mean[s])
			case math.IsNaN(x), math.IsInf(x, 0):
				g.mean[s], g.v[s] = x, math.NaN()
			default:
				g.mean[s] = x
			}
		}
	}
	if len(p.h) > 0 && (op == parser.SUM || op == parser.AVG) {
		return f.addNatives(g, ls, p, annos)
	}
	return nil
}

// addNatives adds the histograms of a series to a group.
func (f *fold) addNatives(g *group, ls labels.Labels, p *points, annos *annotations.Annotations) error {
	if g.native == nil {
		g.native = &nativeSums{avg: f.leaf.Agg.Op == parser.AVG, cells: make([]nativeCell, f.steps)}
		f.natives += nativeCellBytes * int64(f.steps)
	}
	name := ls.Get(model.MetricNameLabel)
	if f.nameless {
		name = ""
	}
	before := g.native.bytes
	err := g.native.add(f.leaf, name, p, g, annos)
	f.natives += g.native.bytes - before
	return err
}

// sum adds the points of a series, as kahansum.Inc does, whose call for each point takes
// longer than the sum. What rounding takes off is a float, and what Inc finds by looking which of two numbers is
// greater comes of six operations without that. (O. Møller, "Quasi double-precision in floating point addition",
// 1965; D. E. Knuth, The Art of Computer Programming 2, 4.2.2.) Where there is no sum yet it is 0; a first -0 is
// lost, as it is when the compensation, which is never -0, is added in the end.
func (g *group) sum(p *points) {
	for from := 0; from < len(p.step); {
		// A run of steps that follow each other: nearly always all of them.
		first, n := int(p.step[from]), len(p.step)-from
		if int(p.step[len(p.step)-1])-first != n-1 {
			for n = 1; from+n < len(p.step) && int(p.step[from+n]) == first+n; {
				n++
			}
		}
		xs, vs, cs := p.v[from:from+n], g.v[first:first+n], g.c[first:first+n]
		for i := 0; i < n; i++ {
			if i += sumFinite(vs[i:], cs[i:], xs[i:]); i == n {
				break
			}
			if g.n[first+i] == 0 {
				vs[i] = xs[i]
			} else {
				vs[i], cs[i] = kahansum.Inc(xs[i], vs[i], cs[i])
			}
		}
		g.has(first, first+n)
		from += n
	}
}

// sumFinite adds xs to the sums vs with the compensations cs, up to the first where something is no number, or too great, and
// says how many these are. It is not inlined, for what it needs to stay in registers.
//
//go:noinline
func sumFinite(vs, cs, xs []float64) int {
	vs, cs = vs[:len(xs)], cs[:len(xs)]
	for i, x := range xs {
		v := vs[i]
		sum := v + x
		part := sum - v
		off := (v - (sum - part)) + (x - part)
		if off-off != 0 {
			return i
		}
		vs[i] = sum
		cs[i] += off
	}
	return len(xs)
}

// has notes that there are points at steps from from up to, without, to. For a sum it doesn't matter how many.
func (g *group) has(from, to int) {
	if g.from <= from && to <= g.to {
		return
	}
	n := g.n[from:to]
	for i := range n {
		n[i] = 1
	}
	if from <= g.to && g.from <= to || g.from == g.to {
		if g.from == g.to {
			g.from, g.to = from, to
		}
		g.from, g.to = min(g.from, from), max(g.to, to)
	}
}

// average adds to the mean of a step, whose n is up to date.
func (g *group) average(s int, x float64) {
	n := float64(g.n[s])
	if n == 1 {
		g.v[s] = x
		return
	}
	if g.inc == nil || !g.inc[s] {
		v, c := kahansum.Inc(x, g.v[s], g.c[s])
		if !math.IsInf(v, 0) {
			g.v[s], g.c[s] = v, c
			return
		}
		if g.inc == nil {
			g.inc, g.mean = make([]bool, len(g.n)), make([]float64, len(g.n))
		}
		g.inc[s] = true
		g.mean[s] = g.v[s] / (n - 1)
		g.c[s] /= n - 1
	}
	q := (n - 1) / n
	g.mean[s], g.c[s] = kahansum.Inc(x/n, q*g.mean[s], q*g.c[s])
}

// bytes is about how much memory it takes.
func (f *fold) bytes() int64 {
	step, point := int64(3*8), int64(8)
	if f.top != nil {
		step, point = 6*8, 16
	}
	return step*int64(len(f.groups))*int64(f.steps) + point*f.held + f.natives
}

// finish gives the results, in the engine's order; or those of a shard, if they can be
// put together with others. The fold is of no use after it.
func (f *fold) finish(dropName bool, annos *annotations.Annotations) ([]partialSeries, error) {
	defer f.release()
	if f.top != nil {
		if f.leaf.shard {
			return f.top.finishShard(f.groups, dropName), nil
		}
		return f.top.finish(f.groups, f.leaf.Grid, dropName), nil
	}
	out := make([]partialSeries, 0, len(f.groups))
	for _, g := range f.groups {
		if f.leaf.shard {
			ss, ok := f.shardSeries(g, dropName)
			if !ok {
				return nil, ErrGiveUp
			}
			out = append(out, ss...)
			continue
		}
		if f.leaf.Agg.Op == parser.QUANTILE {
			g.quantiles(f.phi)
		}
		var histograms []promql.HPoint
		if g.native != nil {
			histograms = g.native.finish(f.leaf, g, annos)
		}
		if floats := g.floats(f.leaf, f.room()); len(floats)+len(histograms) > 0 {
			out = append(out, partialSeries{promql.Series{Metric: g.labels, DropName: dropName, Floats: floats, Histograms: histograms}, g.first})
		}
	}
	return out, nil
}

// slabs are memory of results that quantiles were made of.
//
//nolint:gochecknoglobals // scratch memory
var slabs = sync.Pool{New: func() any { return new([]promql.FPoint) }}

// room gives memory for the points of the next group; nil, if results are kept.
func (f *fold) room() []promql.FPoint {
	if f.leaf.over == nil {
		return nil
	}
	if f.slab == nil {
		f.slab, _ = slabs.Get().(*[]promql.FPoint)
		*f.slab = slices.Grow((*f.slab)[:0], len(f.groups)*f.steps)
	}
	s := *f.slab
	n := len(s) + f.steps
	*f.slab = s[:n]
	return s[len(s):len(s):n]
}

// floats gives the results at the steps that have one, in room if that isn't nil.
func (g *group) floats(l *Leaf, room []promql.FPoint) []promql.FPoint {
	steps := 0
	for _, n := range g.n {
		if n > 0 {
			steps++
		}
	}
	if steps == 0 {
		return nil
	}
	floats := room
	if floats == nil {
		floats = make([]promql.FPoint, 0, steps)
	}
	t := l.Grid.Start
	if l.Agg.Op == parser.SUM { // most are
		vs, cs := g.v[:len(g.n)], g.c[:len(g.n)]
		for i, n := range g.n {
			if n > 0 {
				floats = append(floats, promql.FPoint{T: t, F: vs[i] + cs[i]})
			}
			t += l.Grid.Step
		}
		return floats
	}
	for i, n := range g.n {
		if n > 0 {
			floats = append(floats, promql.FPoint{T: t, F: g.value(l.Agg.Op, i)})
		}
		t += l.Grid.Step
	}
	return floats
}

func (g *group) value(op parser.ItemType, i int) float64 {
	n := float64(g.n[i])
	switch op {
	case parser.SUM:
		return g.v[i] + g.c[i]
	case parser.AVG:
		if g.inc != nil && g.inc[i] {
			return g.mean[i] + g.c[i]
		}
		return g.v[i]/n + g.c[i]/n
	case parser.COUNT:
		return n
	case parser.GROUP:
		return 1
	case parser.STDVAR:
		return g.v[i] / n
	case parser.STDDEV:
		return math.Sqrt(g.v[i] / n)
	}
	return g.v[i]
}

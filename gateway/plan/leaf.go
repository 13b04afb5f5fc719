package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/parser/posrange"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
)

// Leaf is a part of a query that a kernel computes.
type Leaf struct {
	// Grid on which the engine will read the result.
	Grid Grid
	// Agg is the aggregation on top, nil if there is none.
	Agg *parser.AggregateExpr
	// Call is the range function, nil for a plain selector.
	Call *parser.Call
	// Selector of the series. Its Offset is set: a window ends that much before
	// each time of the grid.
	Selector *parser.VectorSelector
	// Range of the windows in ms, which are open to the left. That of a plain
	// selector is the lookback delta.
	Range int64

	// width of the windows whose summaries answer it, where there are some, in ms; 0: it
	// needs samples.
	width int64

	// once, in: as in place.
	once bool
	in   []subquery
	// plain: the selector stands by itself. The engine is as good at it, but where
	// there are no samples any more, heads give the newest without their chunks, or it is sparse.
	plain bool
	// sparse: most samples are between the steps, of which there are many enough for parts to be kept: the
	// engine would decode all samples each time.
	sparse bool
	given  bool // up: the engine computes it

	// shard: of some series only. An aggregation gives what combine needs.
	shard bool

	params []float64
	whole  parser.Expr       // what the leaf stood for at first
	slot   *parser.ParenExpr // what stands in the leaf's place
	over   *parser.ParenExpr // what stands for histogram_quantile() of slot; nil: there is none
	phi    float64           // of that
	copied parser.Expr       // in slot, or in over: copies result
	result standIn           // in copied: its selector, and what that gives to the engine
	counts counts            // of samples, once it has been computed
}

// mint and maxt are the first and the last time of samples that the leaf may
// need.
func (l *Leaf) mint() int64 { return l.Grid.Start - l.offset() - l.Range + 1 }
func (l *Leaf) maxt() int64 { return l.Grid.At(l.Grid.Len()-1) - l.offset() }

func (l *Leaf) offset() int64 { return l.Selector.Offset.Milliseconds() }

// function is the name of the range function, empty for a plain selector.
func (l *Leaf) function() string {
	if l.Call == nil {
		return ""
	}
	return l.Call.Func.Name
}

// expr is what the leaf stands for in the query.
func (l *Leaf) expr() parser.Expr {
	switch {
	case l.Agg != nil:
		return l.Agg
	case l.Call != nil:
		return l.Call
	}
	return l.Selector
}

func (l *Leaf) String() string {
	if l.width > 0 {
		return fmt.Sprintf("%s %s, of summaries of %s", l.expr(), l.Grid, model.Duration(time.Duration(l.width)*time.Millisecond))
	}
	return fmt.Sprintf("%s %s", l.expr(), l.Grid)
}

// hints for storage, as the engine would give them.
func (l *Leaf) hints() *storage.SelectHints {
	h := &storage.SelectHints{Start: l.mint(), End: l.maxt(), Step: l.Grid.Step, Func: l.function()}
	if l.Call != nil {
		h.Range = l.Range
	} else if l.Agg != nil {
		h.Func = l.Agg.Op.String()
	}
	return h
}

// newest: of each series only the newest sample matters.
func (l *Leaf) newest() bool { return l.Call == nil && l.Grid.Len() == 1 }

// functions over range vectors that may be leaves.
//
//nolint:gochecknoglobals // a constant table
var functions = map[string]bool{
	"absent_over_time": true, "avg_over_time": true, "changes": true, "count_over_time": true, "delta": true, "deriv": true,
	"double_exponential_smoothing": true, "first_over_time": true, "idelta": true, "increase": true, "irate": true,
	"last_over_time": true, "mad_over_time": true, "max_over_time": true, "min_over_time": true, "predict_linear": true,
	"present_over_time": true, "quantile_over_time": true, "rate": true, "resets": true, "stddev_over_time": true,
	"stdvar_over_time": true, "sum_over_time": true, "ts_of_first_over_time": true, "ts_of_last_over_time": true,
	"ts_of_max_over_time": true, "ts_of_min_over_time": true,
}

// aggregations that a kernel computes.
//
//nolint:gochecknoglobals // a constant table
var aggregations = map[parser.ItemType]bool{
	parser.SUM: true, parser.AVG: true, parser.MIN: true, parser.MAX: true, parser.COUNT: true, parser.GROUP: true,
	parser.STDDEV: true, parser.STDVAR: true,
}

// looksAtSelector are functions that the engine evaluates otherwise if their argument
// is a selector.
//
//nolint:gochecknoglobals // a constant table
var looksAtSelector = map[string]bool{"timestamp": true, "start_timestamp": true, "absent": true}

func isSelector(e parser.Expr) bool {
	for {
		switch n := e.(type) {
		case *parser.ParenExpr:
			e = n.Expr
		case *parser.StepInvariantExpr:
			e = n.Expr
		case *parser.VectorSelector:
			return true
		default:
			return false
		}
	}
}

// planner walks through a query.
type planner struct {
	lookback int64 // ms
	long     int64 // as of parting
	noStep   func(rangeMillis int64) int64
	leaves   []*Leaf
}

// place is where in a query an expression stands.
type place struct {
	grid Grid
	// once: evaluated at the first time of the grid of what is around.
	once bool
	in   []subquery // the innermost last
}

// subquery that a leaf is in.
type subquery struct {
	grid        Grid  // of what is around
	offset, rng int64 // ms
}

// standIn is the selector that stands for a leaf, and its series: the leaf's result.
type standIn struct {
	matcher *labels.Matcher // the selector is known by it; it matches nothing
	series  []storage.Series
	annos   annotations.Annotations
	read    int // series that the engine has
}

// Next implements storage.SeriesSet.
func (s *standIn) Next() bool {
	if s.read == len(s.series) {
		return false
	}
	s.read++
	return true
}

// At implements storage.SeriesSet.
func (s *standIn) At() storage.Series { return s.series[s.read-1] }

// Err implements storage.SeriesSet.
func (*standIn) Err() error { return nil }

// Warnings implements storage.SeriesSet.
func (s *standIn) Warnings() annotations.Annotations { return s.annos }

// standInOf finds the stand-in that has these matchers; nil: they are those of a selector of the query.
func standInOf(leaves []*Leaf, ms []*labels.Matcher) *standIn {
	for _, l := range leaves {
		if len(ms) == 1 && ms[0] == l.result.matcher {
			return &l.result
		}
	}
	return nil
}

// walk takes the leaves out of e, and gives what is to stand in its place.
func (p *planner) walk(e parser.Expr, at place) parser.Expr {
	switch n := e.(type) {
	case *parser.VectorSelector:
		if l := p.plain(n, at); l != nil {
			return p.take(l)
		}
	case *parser.AggregateExpr:
		if l := p.aggregate(n, at); l != nil {
			return p.take(l)
		}
		n.Expr = p.walk(n.Expr, at)
		if n.Param != nil {
			n.Param = p.walk(n.Param, at)
		}
	case *parser.Call:
		if n.Func.Name == "info" {
			break
		}
		if l := p.call(n, at); l != nil {
			return p.take(l)
		}
		if looksAtSelector[n.Func.Name] && isSelector(n.Args[0]) {
			break
		}
		for i := range n.Args {
			n.Args[i] = p.walk(n.Args[i], at)
		}
		if n.Func.Name == "histogram_quantile" {
			return p.overBuckets(n)
		}
	case *parser.StepInvariantExpr:
		at.once, at.grid.End = true, at.grid.Start
		n.Expr = p.walk(n.Expr, at)
	case *parser.SubqueryExpr:
		if n.Timestamp != nil {
			break
		}
		if !at.grid.bounded() {
			break
		}
		step := n.Step.Milliseconds()
		if step == 0 {
			step = p.noStep(n.Range.Milliseconds())
		}
		s := subquery{at.grid, n.OriginalOffset.Milliseconds(), n.Range.Milliseconds()}
		at.in = append(slices.Clip(at.in), s)
		at.grid = at.grid.subquery(s.offset, s.rng, step)
		n.Expr = p.walk(n.Expr, at)
	case *parser.ParenExpr:
		n.Expr = p.walk(n.Expr, at)
	case *parser.UnaryExpr:
		n.Expr = p.walk(n.Expr, at)
	case *parser.BinaryExpr:
		n.LHS, n.RHS = p.walk(n.LHS, at), p.walk(n.RHS, at)
	}
	return e
}

// take notes the leaf, and gives what stands for it.
func (p *planner) take(l *Leaf) parser.Expr {
	p.leaves = append(p.leaves, l)
	l.whole = l.expr()
	pos := l.whole.PositionRange()
	l.copy(pos)
	l.slot = &parser.ParenExpr{PosRange: pos, Expr: l.copied}
	return l.slot
}

// copy makes what copies the result, at the place in the query of what it is the result of.
func (l *Leaf) copy(pos posrange.PositionRange) {
	l.result.matcher = labels.MustNewMatcher(labels.MatchEqual, model.MetricNameLabel, "")
	sel := &parser.VectorSelector{LabelMatchers: []*labels.Matcher{l.result.matcher}, PosRange: pos}
	l.copied = &parser.Call{
		Func:     parser.Functions["last_over_time"],
		Args:     parser.Expressions{&parser.MatrixSelector{VectorSelector: sel, Range: time.Millisecond, EndPos: pos.End}},
		PosRange: pos,
	}
}

// stands says whether a query is the leaf, and nothing else, as it has been taken.
func (l *Leaf) stands(e parser.Expr) bool {
	for e != l.slot && (l.over == nil || e != l.over || l.over.Expr != l.copied) {
		p, ok := e.(*parser.ParenExpr)
		if !ok {
			return false
		}
		e = p.Expr
	}
	return l.slot.Expr == l.copied
}

// giveUp puts back what the leaf stands for.
func (l *Leaf) giveUp() { l.slot.Expr, l.given = l.whole, true }

// split leaves the aggregation to the engine, and keeps the function. It reports
// whether there is one left.
func (l *Leaf) split() bool {
	if l.Agg == nil || l.Call == nil {
		return false
	}
	agg := *l.Agg
	l.copy(l.Call.PositionRange())
	agg.Expr = l.copied
	l.slot.Expr, l.Agg = &agg, nil
	return true
}

// plain is the leaf of a selector that stands by itself, if summaries could answer it, the newest sample does, or parts
// of it pay.
func (p *planner) plain(vs *parser.VectorSelector, at place) *Leaf {
	l := p.selector(vs, at)
	if l == nil {
		return nil
	}
	l.Range, l.plain = p.lookback, true
	l.sparse = l.Grid.Step >= l.Range && l.maxt()-l.mint() >= p.long
	if !l.newest() && !l.sparse && l.query(options{}).Width() == 0 {
		return nil
	}
	return l
}

// quantileOf is the parameter of a quantile() that a kernel computes: others have warnings.
func quantileOf(n *parser.AggregateExpr) (phi float64, ok bool) {
	if n.Op != parser.QUANTILE {
		return 0, false
	}
	p, ok := n.Param.(*parser.NumberLiteral)
	if !ok || !(p.Val >= 0 && p.Val <= 1) {
		return 0, false
	}
	return p.Val, true
}

func (p *planner) aggregate(n *parser.AggregateExpr, at place) *Leaf {
	_, isQuantile := quantileOf(n)
	if _, isTop := topOf(n); !isTop && !isQuantile && !aggregations[n.Op] {
		return nil
	}
	switch e := n.Expr.(type) {
	case *parser.VectorSelector:
		if l := p.selector(e, at); l != nil {
			l.Agg, l.Range = n, p.lookback
			return l
		}
	case *parser.Call:
		if e.Func.Name == "absent_over_time" {
			return nil
		}
		if l := p.call(e, at); l != nil {
			l.Agg = n
			return l
		}
	}
	return nil
}

func (p *planner) call(n *parser.Call, at place) *Leaf {
	if !functions[n.Func.Name] {
		return nil
	}
	var l *Leaf
	var params []float64
	for _, a := range n.Args {
		switch a := a.(type) {
		case *parser.MatrixSelector:
			vs, ok := a.VectorSelector.(*parser.VectorSelector)
			if !ok || l != nil {
				return nil
			}
			if l = p.selector(vs, at); l == nil {
				return nil
			}
			l.Range = a.Range.Milliseconds()
		case *parser.NumberLiteral:
			params = append(params, a.Val)
		default:
			return nil
		}
	}
	if l == nil || l.Range <= 0 {
		return nil
	}
	l.Call, l.params = n, params
	return l
}

// selector begins a leaf.
func (p *planner) selector(vs *parser.VectorSelector, at place) *Leaf {
	if vs.Anchored || vs.Smoothed || !at.grid.bounded() {
		return nil
	}
	offset := vs.OriginalOffset
	if vs.Timestamp != nil {
		if !at.once || len(at.in) > 0 {
			return nil
		}
		offset += time.Duration(at.grid.Start-*vs.Timestamp) * time.Millisecond
	}
	vs.Offset = offset
	return &Leaf{Grid: at.grid, Selector: vs, once: at.once, in: at.in}
}

// describe gives the plan as text: the expression that the engine evaluates, with
// the leaves by number, and the leaves.
func describe(e parser.Expr, leaves []*Leaf) string {
	var b strings.Builder
	for i, l := range leaves {
		if l.given {
			continue
		}
		was := l.slot.Expr
		l.slot.Expr = &parser.VectorSelector{Name: fmt.Sprintf("leaf_%d", i+1)}
		defer func() { l.slot.Expr = was }()
	}
	fmt.Fprintf(&b, "engine: %s\n", e)
	for i, l := range leaves {
		if l.given {
			continue
		}
		fmt.Fprintf(&b, "leaf_%d: %s\n", i+1, l)
	}
	return b.String()
}

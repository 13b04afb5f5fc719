package plan

import (
	"context"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
)

// Explanation says how a query would be computed, and about what it would read.
type Explanation struct {
	// Plan is the expression that the engine evaluates, with the leaves by number, and
	// the leaves.
	Plan      string              `json:"plan"`
	Leaves    []LeafExplanation   `json:"leaves"`
	Selectors []SelectExplanation `json:"selectors"` // those that the engine reads itself
	Blocks    int                 `json:"blocks"`    // that are visible in the query's time
	Samples   int64               `json:"samples"`   // of blocks: all estimates together
	// Exceeds are limits that the query would go beyond, about: of its time, series, and samples,
	// those of heads and summaries too, but not of parts whose results are at hand.
	Exceeds []account.Excess `json:"exceeds"`
}

// LeafExplanation is about a leaf.
type LeafExplanation struct {
	Expr    string         `json:"expr"`
	Samples int64          `json:"samples"` // of blocks, about: of the pages that may have some
	Window  model.Duration `json:"window"`  // of the summaries that stand for samples where there are some; 0: none would do
	Windows int64          `json:"windows"` // summaries, about; samples are those beside them
	Steps   int            `json:"steps"`
	Span    model.Duration `json:"span"` // of a part; 0: the leaf isn't cut
	Parts   int            `json:"parts"`
	Shards  int            `json:"shards"`    // of the series, in place of parts
	Fresh   int            `json:"fresh"`     // parts that need samples of heads
	Kept    int            `json:"kept"`      // parts whose results are at hand
	Here    int            `json:"here"`      // other parts, or shards, that this gateway would compute, fresh ones included
	Others  int            `json:"elsewhere"` // parts or shards that other gateways would compute
}

// SelectExplanation is about a selector that the engine reads.
type SelectExplanation struct {
	Expr    string `json:"expr"`
	Samples int64  `json:"samples"` // of blocks, about
}

type explainKey struct{}

// WithExplanation makes queries that are executed with the context fill in the
// explanation, and give no samples.
func WithExplanation(ctx context.Context) (context.Context, *Explanation) {
	e := &Explanation{Leaves: []LeafExplanation{}, Selectors: []SelectExplanation{}, Exceeds: []account.Excess{}}
	return context.WithValue(ctx, explainKey{}, e), e
}

func explanationOf(ctx context.Context) *Explanation {
	e, _ := ctx.Value(explainKey{}).(*Explanation)
	return e
}

// explain reads what heads have and directories of blocks, and no samples of those.
func (q *query) explain(ctx context.Context, e *Explanation) *promql.Result {
	empty := &promql.Result{Value: promql.Vector{}}
	if q.stmt == nil {
		return empty
	}
	if q.stmt.Interval > 0 {
		empty.Value = promql.Matrix{}
	}
	acc := account.From(ctx)
	if e.Exceeds = acc.Exceeds(q.one.mint, q.one.maxt, 0, 0); len(e.Exceeds) > 0 {
		e.Plan = q.Plan()
		return empty // what heads have of so much time isn't read
	}
	ctx, cancel := context.WithTimeout(ctx, q.engine.opts.Timeout)
	defer cancel()
	querier, err := q.one.Queryable.Querier(q.one.mint, q.one.maxt)
	if err != nil {
		return &promql.Result{Err: err}
	}
	defer querier.Close()
	s, ok := querier.(selector)
	if !ok {
		e.Plan = q.Plan()
		return empty
	}
	if err := q.leavePlain(ctx, s); err != nil {
		return &promql.Result{Err: err}
	}
	e.Plan = q.Plan()
	var series, samples int64 // that count to limits, about
	count := func(sel *merge.Selection, mint, maxt, ofBlocks int64, share float64) error {
		n, fresh := sel.HeadCounts()
		old, err := sel.Snapshot().EstimateSeries(ctx, sel.Matchers(), mint, maxt)
		if share > 0 {
			series += max(n, old)
		}
		samples += fresh + int64(share*float64(ofBlocks))
		return err
	}
	read := func(hints *storage.SelectHints, ms []*labels.Matcher) (*merge.Selection, error) {
		sel := s.Selection(ctx, false, hints, ms...)
		if sel == nil {
			return nil, nil //nolint:nilnil // of several tenants
		}
		if err := sel.Wait(); err != nil {
			return nil, err
		}
		if snap := sel.Snapshot(); snap != nil {
			e.Blocks = max(e.Blocks, len(snap.Blocks))
		}
		return sel, nil
	}
	for i, l := range q.leaves {
		if l.given {
			continue
		}
		sel, err := read(l.hints(), l.Selector.LabelMatchers)
		if sel == nil || err != nil {
			return &promql.Result{Value: empty.Value, Err: err}
		}
		w, est, err := q.part(ctx, i, sel)
		if err != nil {
			return &promql.Result{Err: err}
		}
		one := LeafExplanation{
			Expr: l.expr().String(), Samples: est.samples, Steps: l.Grid.Len(),
			Window: model.Duration(time.Duration(l.width) * time.Millisecond), Windows: est.windows,
			Span: model.Duration(time.Duration(w.span) * time.Millisecond), Parts: len(w.parts),
		}
		for i := range w.sharded {
			if w.sharded[i].here {
				one.Here++
			} else {
				one.Others++
			}
		}
		switch {
		case len(w.sharded) > 0:
			one.Shards, one.Parts = len(w.sharded), 0
		case len(w.parts) > 1:
			tenant := q.engine.spread.TenantOf(ctx)
			w.keptParts(ctx, tenant)
			for i, p := range w.out {
				if w.fresh[i] {
					one.Fresh++
				} else if p != nil {
					one.Kept++
				}
			}
			mine, elsewhere := w.assign(tenant)
			one.Here = len(mine)
			for _, t := range elsewhere {
				one.Others += t.to - t.from
			}
		default:
			one.Here++
		}
		e.Leaves = append(e.Leaves, one)
		e.Samples += one.Samples
		if sel.Snapshot() != nil {
			share := 1 - float64(one.Kept)/float64(max(one.Parts, 1))
			if err := count(sel, l.mint(), l.maxt(), est.samples+est.windows, share); err != nil {
				return &promql.Result{Err: err}
			}
		}
	}
	parser.Inspect(q.stmt.Expr, func(n parser.Node, path []parser.Node) error {
		vs, ok := n.(*parser.VectorSelector)
		if !ok || standInOf(q.leaves, vs.LabelMatchers) != nil {
			return nil
		}
		one := SelectExplanation{Expr: vs.String()}
		var sel *merge.Selection
		if sel, err = read(nil, vs.LabelMatchers); err != nil || sel == nil || sel.Snapshot() == nil {
			return err
		}
		mint, maxt := q.one.mint, q.one.maxt
		if one.Samples, err = sel.Snapshot().Estimate(ctx, vs.LabelMatchers, mint, maxt); err != nil {
			return err
		}
		e.Selectors = append(e.Selectors, one)
		e.Samples += one.Samples
		return count(sel, mint, maxt, one.Samples, 1)
	})
	if err != nil {
		return &promql.Result{Err: err}
	}
	e.Exceeds = acc.Exceeds(q.one.mint, q.one.maxt, series, samples)
	return empty
}

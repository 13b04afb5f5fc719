package plan

import (
	"context"
	"errors"
	"log/slog"
	"sort"
	"sync"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/schema"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/prometheus/prometheus/util/stats"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
)

// Engine is a promql.QueryEngine whose storage is that of package merge.
type Engine struct {
	inner  *promql.Engine
	opts   promql.EngineOpts
	spread Spread

	summarise bool // see options
}

// New wraps an engine, which was made with o.
func New(inner *promql.Engine, o promql.EngineOpts, s Spread) *Engine {
	if s.parting.samples == 0 {
		s.parting = usual
	}
	if o.LookbackDelta == 0 {
		o.LookbackDelta = 5 * time.Minute // the engine's default
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.NoStepSubqueryIntervalFn == nil {
		o.NoStepSubqueryIntervalFn = func(int64) int64 { return time.Minute.Milliseconds() }
	}
	return &Engine{inner: inner, opts: o, spread: s}
}

// options are what kernels need to know of the engine's options.
type options struct {
	startTimestamps    bool
	delayedNameRemoval bool
	typeAndUnitLabels  bool
	maxSamples         int
	parting            parting
	logger             *slog.Logger
	summarise          bool // everything, for tests: as if there were summaries of all samples
}

// NewInstantQuery implements promql.QueryEngine.
func (e *Engine) NewInstantQuery(ctx context.Context, q storage.Queryable, opts promql.QueryOpts, qs string, ts time.Time) (promql.Query, error) {
	one := &snapshot{Queryable: q}
	inner, err := e.inner.NewInstantQuery(ctx, one, opts, qs, ts)
	if err != nil {
		return nil, err
	}
	return e.plan(inner, one, opts), nil
}

// NewRangeQuery implements promql.QueryEngine.
func (e *Engine) NewRangeQuery(ctx context.Context, q storage.Queryable, opts promql.QueryOpts, qs string, start, end time.Time, interval time.Duration) (promql.Query, error) {
	one := &snapshot{Queryable: q}
	inner, err := e.inner.NewRangeQuery(ctx, one, opts, qs, start, end, interval)
	if err != nil {
		return nil, err
	}
	return e.plan(inner, one, opts), nil
}

// plan takes the leaves out of a query.
func (e *Engine) plan(inner promql.Query, one *snapshot, opts promql.QueryOpts) *query {
	q := &query{Query: inner, engine: e, one: one}
	stmt, ok := inner.Statement().(*parser.EvalStmt)
	if !ok {
		return q
	}
	q.stmt = stmt
	q.opts = options{
		startTimestamps: e.opts.UseStartTimestamps, delayedNameRemoval: e.opts.EnableDelayedNameRemoval,
		typeAndUnitLabels: e.opts.EnableTypeAndUnitLabels, maxSamples: e.opts.MaxSamples,
		parting: e.spread.parting, logger: e.opts.Logger, summarise: e.summarise,
	}
	if opts != nil && opts.UseStartTimestamps() != nil {
		q.opts.startTimestamps = *opts.UseStartTimestamps()
	}
	g := Grid{Start: stmt.Start.UnixMilli(), End: stmt.End.UnixMilli(), Step: stmt.Interval.Milliseconds()}
	if g.Step == 0 {
		g.Step = 1 // as the engine does for an instant
	}
	q.grid = g
	q.need = needOf(stmt.Expr, g, e.opts.NoStepSubqueryIntervalFn)
	one.mint, one.maxt = promql.FindMinMaxTime(stmt)
	one.alone = len(parser.ExtractSelectors(stmt.Expr)) == 1
	p := &planner{lookback: stmt.LookbackDelta.Milliseconds(), long: e.spread.parting.long, noStep: e.opts.NoStepSubqueryIntervalFn}
	// The limits of the feature query-cost count what the engine reads itself.
	if g.bounded() && !e.opts.EnableQueryCost {
		stmt.Expr = p.walk(stmt.Expr, place{grid: g})
	}
	q.leaves, one.leaves = p.leaves, p.leaves
	for _, l := range q.leaves {
		l.width = l.query(q.opts).Width()
	}
	return q
}

// query computes the leaves before the engine evaluates the rest.
type query struct {
	promql.Query
	engine *Engine
	stmt   *parser.EvalStmt
	opts   options
	grid   Grid
	one    *snapshot
	leaves []*Leaf
	need   *need // of the engine; nil: there is no statement

	answer promql.Matrix // of a query that is a leaf and nothing else
	points int           // in answer, and what that was made of, as the engine counts them

	mu     sync.Mutex
	cancel context.CancelFunc
}

// Plan describes the plan; without leaves all is the engine's.
func (q *query) Plan() string { return describe(q.stmt.Expr, q.leaves) }

// Exec implements promql.Query.
func (q *query) Exec(ctx context.Context) *promql.Result {
	acc := account.From(ctx)
	if e := explanationOf(ctx); e != nil {
		return q.explain(ctx, e)
	}
	if err := acc.CheckRange(q.one.mint, q.one.maxt); err != nil {
		return &promql.Result{Err: err}
	}
	if acc != nil {
		q.one.hold = &engineHold{account: acc, samples: q.Query.Stats().Samples, window: q.lookback(), need: q.need}
		if q.need != nil {
			once := q.need.once()
			acc.Hold(once)
			defer acc.Hold(-once)
		}
		if err := context.Cause(ctx); errors.Is(err, account.ErrLimit) {
			return &promql.Result{Err: err} // the engine takes it before it looks
		}
	}
	r := q.exec(ctx)
	switch {
	case errors.Is(context.Cause(ctx), account.ErrLimit):
		// It was ended: the engine says that it was cancelled, or didn't notice.
		return &promql.Result{Err: context.Cause(ctx), Warnings: r.Warnings}
	case r.Err == nil:
		if err := acc.CheckAnswer(answerBytes(r.Value)); err != nil {
			return &promql.Result{Err: err, Warnings: r.Warnings}
		}
	}
	return r
}

// lookback is the query's lookback delta, ms.
func (q *query) lookback() int64 {
	if q.stmt == nil {
		return 0
	}
	return q.stmt.LookbackDelta.Milliseconds()
}

// answerBytes is about how long an answer is as JSON.
func answerBytes(v parser.Value) int64 {
	const point, bucket = 30, 60 // bytes
	size := func(ls labels.Labels, floats int, hs []promql.HPoint) int64 {
		n := ls.ByteSize() + 16*uint64(ls.Len()) + uint64(point*floats)
		for _, h := range hs {
			n += uint64(bucket * (3 + len(h.H.PositiveBuckets) + len(h.H.NegativeBuckets))) //nolint:gosec // a length
		}
		return int64(n) //nolint:gosec // bytes in memory
	}
	n := int64(0)
	switch v := v.(type) {
	case promql.Matrix:
		for i := range v {
			n += size(v[i].Metric, len(v[i].Floats), v[i].Histograms)
		}
	case promql.Vector:
		for i := range v {
			var hs []promql.HPoint
			if v[i].H != nil {
				hs = []promql.HPoint{{H: v[i].H}}
			}
			n += size(v[i].Metric, 1, hs)
		}
	}
	return n
}

func (q *query) exec(ctx context.Context) *promql.Result {
	if len(q.leaves) == 0 {
		r := q.Query.Exec(ctx)
		q.one.hold.end()
		return r
	}
	ctx, cancel := context.WithTimeout(ctx, q.engine.opts.Timeout)
	defer cancel()
	q.mu.Lock()
	q.cancel = cancel
	q.mu.Unlock()
	if err := q.one.open(); err != nil {
		return &promql.Result{Err: err}
	}
	defer q.one.close()
	if annos, err := q.compute(ctx); err != nil {
		return &promql.Result{Err: err, Warnings: annos}
	}
	r := q.Query.Exec(ctx)
	q.one.hold.end()
	if r.Err == nil && q.answer != nil {
		r.Value = q.finished()
	}
	q.account()
	return r
}

// takeQuantiles puts what histogram_quantile() gives of a leaf's result in the place
// of that, if it stands over the leaf.
func (q *query) takeQuantiles(ctx context.Context, l *Leaf, p *partial) error {
	if q.opts.delayedNameRemoval || l.over == nil || l.slot.Expr != l.copied {
		return nil
	}
	points := 0
	for i := range p.series {
		points += len(p.series[i].Floats)
	}
	if points > q.opts.maxSamples {
		return promql.ErrTooManySamples("query execution")
	}
	if series, ok := l.quantiles(ctx, p.series); ok {
		p.series, l.over.Expr = series, l.copied
		q.points = points
		if p.slab != nil && pointBytes*cap(*p.slab) <= maxColumns {
			slabs.Put(p.slab) // nothing has the points any more
			p.slab = nil
		}
	}
	return nil
}

// takeAsAnswer takes a leaf's result for that of the query, if the leaf is all that the
// query is: the engine would only copy it, point by point, which takes longer than
// many a leaf. It reports false if the engine has to look at it.
func (q *query) takeAsAnswer(l *Leaf, series []partialSeries) (bool, error) {
	if q.opts.delayedNameRemoval || len(q.leaves) != 1 || !l.stands(q.stmt.Expr) {
		return false, nil
	}
	m := make(promql.Matrix, len(series))
	points := 0
	for i := range series {
		m[i] = series[i].Series
		if m[i].DropName {
			m[i].Metric = m[i].Metric.DropReserved(schema.IsMetadataLabel)
		}
		points += pointsOf(&m[i])
	}
	switch {
	case points > q.opts.maxSamples:
		return false, promql.ErrTooManySamples("query execution")
	case m.ContainsSameLabelset(): // that is an error of the engine's
		return false, nil
	}
	q.answer, q.points = m, q.points+points
	return true, nil
}

// pointsOf are those of a series, as the engine counts them.
func pointsOf(s *promql.Series) int {
	n := len(s.Floats)
	for _, h := range s.Histograms {
		n += histogramSize(h.H)
	}
	return n
}

// finished is the answer in the form that the engine would give it.
func (q *query) finished() parser.Value {
	q.Stats().Samples.UpdatePeak(q.points)
	if q.stmt.Interval != 0 || !q.stmt.Start.Equal(q.stmt.End) {
		sort.Sort(q.answer)
		return q.answer
	}
	v := make(promql.Vector, len(q.answer))
	for i, s := range q.answer {
		v[i] = promql.Sample{Metric: s.Metric, T: q.grid.Start, DropName: s.DropName}
		if len(s.Histograms) > 0 {
			v[i].H = s.Histograms[0].H
		} else {
			v[i].F = s.Floats[0].F
		}
	}
	return v
}

// account makes the query's statistics those of the engine alone: it has counted
// the points of the leaves' results, not the samples that these were made of. The
// peak stays that of the engine, which has less in memory.
func (q *query) account() {
	all := q.Query.Stats().Samples
	for _, l := range q.leaves {
		c := l.counts
		all.IncrementSeries(c.series)
		s := all
		if len(l.in) > 0 {
			s = childSamples(l.Grid)
		}
		for i := range c.window {
			switch {
			case l.once:
				for step := range q.grid.Len() {
					s.IncrementSamplesAtStep(step, c.window[i])
				}
				s.IncrementSamplesReadAtStep(0, c.read[i])
			default:
				s.IncrementSamplesAtStep(i, c.window[i])
				s.IncrementSamplesReadAtStep(i, c.read[i])
			}
		}
		for i := len(l.in) - 1; i >= 0; i-- { // as the engine does it
			in := &l.in[i]
			outer := all
			if i > 0 {
				outer = childSamples(in.grid)
			}
			consumer := stats.SubqueryConsumer{
				Start: in.grid.Start, Interval: in.grid.Step, NumSteps: in.grid.Len(), Offset: in.offset, Range: in.rng,
			}
			outer.MergeTotalSamplesFromSubquery(s, consumer)
			outer.MergeSamplesReadFromSubquery(s, consumer)
			s = outer
		}
	}
}

func childSamples(g Grid) *stats.QuerySamples {
	return stats.NewChildWithStepTracking(g.Start, g.End, g.Step)
}

// Cancel implements promql.Query.
func (q *query) Cancel() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.cancel != nil {
		q.cancel()
	}
	q.Query.Cancel()
}

// selector is a querier that the planner can read: a merge.Querier, or what has one
// below. The others, such as one of several tenants, are the engine's: they give
// nil.
type selector interface {
	Selection(ctx context.Context, newest bool, hints *storage.SelectHints, ms ...*labels.Matcher) *merge.Selection
	// SamplesFrom is the first time in ms of which there may be samples, or summaries
	// are all that is left.
	SamplesFrom(ctx context.Context) (int64, error)
}

// compute fills in the results of all leaves. With an error come the annotations of the leaves
// so far.
func (q *query) compute(ctx context.Context) (annos annotations.Annotations, err error) {
	sels := make([]*merge.Selection, len(q.leaves))
	s, ok := q.one.querier.(selector)
	if ok {
		if err := q.leavePlain(ctx, s); err != nil {
			return nil, err
		}
	}
	for i, l := range q.leaves { // all begin to read
		if ok && !l.given {
			sels[i] = s.Selection(ctx, l.newest(), l.hints(), l.Selector.LabelMatchers...)
		}
	}
	for i, l := range q.leaves {
		if sels[i] == nil {
			l.giveUp()
			continue
		}
		p, err := q.leaf(ctx, i, sels[i])
		if errors.Is(err, ErrGiveUp) && l.split() {
			p, err = q.leaf(ctx, i, sels[i])
		}
		if errors.Is(err, ErrGiveUp) {
			l.giveUp()
			continue
		}
		if p != nil {
			l.result.annos = p.all()
			annos.Merge(l.result.annos)
		}
		if err != nil {
			const where = "expression evaluation" // as the engine says
			switch ctx.Err() {
			case context.Canceled:
				err = promql.ErrQueryCanceled(where)
			case context.DeadlineExceeded:
				err = promql.ErrQueryTimeout(where)
			}
			return annos, err
		}
		p.counts.begin()
		if err := q.takeQuantiles(ctx, l, p); err != nil {
			return annos, err
		}
		taken, err := q.takeAsAnswer(l, p.series)
		if err != nil {
			return annos, err
		}
		if l.counts = p.counts; taken {
			continue
		}
		l.result.series = make([]storage.Series, len(p.series))
		if h := q.one.hold; h != nil {
			for j := range p.series {
				h.label(p.series[j].Metric)
				h.copies += seriesBytes + pointBytes*int64(pointsOf(&p.series[j].Series))
			}
			h.end()
		}
		for j := range p.series {
			l.counts.without(&p.series[j].Series, l.Grid)
			l.result.series[j] = promql.NewStorageSeries(p.series[j].Series)
		}
	}
	return annos, nil
}

// leavePlain leaves selectors that stand by themselves to the engine, if there are
// samples of all their time, and they aren't sparse.
func (q *query) leavePlain(ctx context.Context, s selector) error {
	for _, l := range q.leaves {
		if !l.plain || l.newest() || l.sparse || q.opts.summarise {
			continue
		}
		from, err := s.SamplesFrom(ctx)
		if err != nil {
			return promql.ErrStorage{Err: err}
		}
		if l.mint() >= from {
			l.giveUp()
		}
	}
	return nil
}

// snapshot lets all selectors of a query read from one querier.
type snapshot struct {
	storage.Queryable
	mint, maxt int64
	alone      bool // the query has one selector
	leaves     []*Leaf

	querier storage.Querier // nil: not open
	hold    *engineHold     // nil: nobody keeps account
}

func (s *snapshot) open() (err error) {
	s.querier, err = s.made(s.mint, s.maxt)
	return err
}

// made makes a querier.
func (s *snapshot) made(mint, maxt int64) (storage.Querier, error) {
	q, err := s.Queryable.Querier(mint, maxt)
	if a, ok := q.(interface{ Alone() }); ok && s.alone {
		a.Alone()
	}
	return q, err
}

func (s *snapshot) close() {
	_ = s.querier.Close() // of a merge.Storage: gives no error
	s.querier = nil
}

// Querier implements storage.Queryable.
func (s *snapshot) Querier(mint, maxt int64) (storage.Querier, error) {
	if s.querier == nil { // there are no leaves
		q, err := s.made(mint, maxt)
		if err != nil {
			return nil, err
		}
		return owned{q, s.hold}, nil
	}
	return shared{owned{s.querier, s.hold}, s.leaves}, nil
}

// owned is what the engine reads from.
type owned struct {
	storage.Querier
	hold *engineHold
}

// Select tells the account what the engine makes of the series.
func (o owned) Select(ctx context.Context, sorted bool, h *storage.SelectHints, ms ...*labels.Matcher) storage.SeriesSet {
	return o.hold.over(o.Querier.Select(ctx, sorted, h, ms...), h)
}

// shared is closed by its owner, and has the results of leaves.
type shared struct {
	owned
	leaves []*Leaf
}

func (shared) Close() error { return nil }

// Select gives a leaf's result to the selector that stands for it. Its annotations come
// to the engine when it evaluates that selector: of those with the same text it keeps the last.
func (s shared) Select(ctx context.Context, sorted bool, h *storage.SelectHints, ms ...*labels.Matcher) storage.SeriesSet {
	if r := standInOf(s.leaves, ms); r != nil {
		return r
	}
	return s.owned.Select(ctx, sorted, h, ms...)
}

package plan

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/kahansum"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// shardable: it can be computed for some of the series, and for the others, and be put
// together. Where the order of values in a group matters it can't.
func (l *Leaf) shardable() bool {
	switch {
	case l.function() == "absent_over_time":
		return false
	case l.Agg == nil:
		return true
	}
	switch l.Agg.Op {
	case parser.SUM, parser.AVG, parser.MIN, parser.MAX, parser.COUNT, parser.GROUP, parser.TOPK, parser.BOTTOMK:
		return true
	}
	return false
}

// shardColumns is how many series a shard gives of each group: the sum with its
// compensation apart, and how many values it is of.
func shardColumns(op parser.ItemType) int {
	switch op {
	case parser.SUM:
		return 2
	case parser.AVG:
		return 3
	}
	return 1
}

// maxShardBytes bounds the samples of heads that go with a shard, on the average, and
// maxTaskBytes what goes with one, with labels: a gateway takes messages of 4 MiB.
const (
	maxShardBytes = 2 << 20
	maxTaskBytes  = 3 << 20
)

// taskBytes is about how long what heads have is in a message.
func taskBytes(heads [][]merge.HeadSeries) (bytes int) {
	for _, list := range heads {
		for i := range list {
			list[i].Labels.Range(func(l labels.Label) { bytes += len(l.Name) + len(l.Value) + 8 })
			for _, c := range list[i].Chunks {
				bytes += len(c.Data) + 24
			}
			bytes += 8
		}
	}
	return bytes
}

// shard of a leaf's series.
type shard struct {
	key  Key
	here bool
	out  *partial
}

// shards gives those of a leaf that costs so many samples; none if it isn't to be cut.
func (w *work) shards(tenant string, cost int64) []shard {
	sp := &w.q.engine.spread
	if sp.Workers == nil || !w.l.shardable() || w.l.Grid.Len() > maxShardSteps {
		return nil
	}
	n := min(int64(sp.Workers.Size()), cost/max(1, w.q.opts.parting.shard))
	if n < 2 || w.sel.HeadBytes() > maxShardBytes*n {
		return nil
	}
	out := make([]shard, n)
	var owners []string
	for i := range out {
		// A gateway has one shard, and the same of each query over these series: its
		// caches are warm.
		for salt := range 8 * n {
			out[i].key = w.l.shardKey(tenant, int64(i), n, salt)
			if owner := sp.Workers.Owner(out[i].key); !slices.Contains(owners, owner) {
				owners = append(owners, owner)
				break
			}
		}
		out[i].here = sp.Workers.Here(out[i].key)
	}
	return out
}

func (l *Leaf) shardKey(tenant string, i, n, salt int64) Key {
	h := sha256.New()
	fmt.Fprintf(h, "shard %q", tenant)
	for _, m := range l.Selector.LabelMatchers {
		fmt.Fprintf(h, " %q", m.String())
	}
	var b []byte
	for _, x := range []int64{i, n, salt} {
		b = binary.BigEndian.AppendUint64(b, uint64(x)) //nolint:gosec // small
	}
	h.Write(b)
	return Key(h.Sum(nil))
}

// runShards computes the shards, here and elsewhere, and puts them together.
func (w *work) runShards(ctx context.Context) (*partial, error) {
	n := len(w.sharded)
	heads := w.sel.HeadShards(uint64(n)) //nolint:gosec // small
	tenant := w.q.engine.spread.TenantOf(ctx)
	g, gctx := errgroup.WithContext(ctx)
	var away []int
	for i := range w.sharded {
		if !w.sharded[i].here {
			away = append(away, i)
		}
	}
	out := w.send(gctx, g, len(away), func(ctx context.Context, k int) (err error) {
		i := away[k]
		w.sharded[i].out, err = w.shardElsewhere(ctx, tenant, i, heads[i])
		return err
	})
	var outs []*partial
	// Here, all in one go, those that others don't compute.
	here := func(ctx context.Context, which func(*shard) bool) error {
		in, some := make([]bool, n), 0
		for i := range w.sharded {
			if in[i] = which(&w.sharded[i]); in[i] {
				some++
			}
		}
		if some == 0 {
			return nil
		}
		l := *w.l
		l.shard = true
		p, err := run(ctx, &l, w.q.opts, func(sums *history.Summaries) storage.SeriesSet {
			return w.sel.ShardSet(l.mint(), l.maxt(), sums, merge.Shards{In: in})
		}, runtime.GOMAXPROCS(0))
		if err != nil {
			return err
		}
		outs = append(outs, p)
		w.q.engine.spread.Results.count("here", some)
		account.From(ctx).AddParts(0, some)
		return nil
	}
	g.Go(func() (err error) {
		defer recovered(w.q.opts.logger, &err)
		if err := here(gctx, func(s *shard) bool { return s.here }); err != nil {
			return err
		}
		return out.takeBack(gctx, func(k int) error {
			one := &w.sharded[away[k]]
			if one.out != nil {
				return nil
			}
			one.here = true
			return here(gctx, func(s *shard) bool { return s == one })
		})
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := here(ctx, func(s *shard) bool { return !s.here && s.out == nil }); err != nil {
		return nil, err
	}
	for i := range w.sharded {
		if out := w.sharded[i].out; out != nil {
			outs = append(outs, out)
		}
	}
	return w.l.combine(outs, w.q.opts)
}

// shardElsewhere lets a worker compute a shard. It gives nil if none can.
func (w *work) shardElsewhere(ctx context.Context, tenant string, i int, heads [][]merge.HeadSeries) (*partial, error) {
	if taskBytes(heads) > maxTaskBytes {
		return nil, nil //nolint:nilnil // as documented
	}
	t := w.task(ctx, tenant, w.l.mint(), w.l.maxt())
	t.To, t.Shard, t.Shards, t.Heads = w.l.Grid.Len(), i, len(w.sharded), heads
	b, err := w.q.engine.spread.Workers.Run(ctx, w.sharded[i].key, t)
	switch {
	case errors.Is(err, ErrHere), errors.Is(err, ErrUnlike):
		return nil, nil //nolint:nilnil // as documented
	case err != nil:
		return nil, err
	}
	out, err := received(ctx, b, w.l.Grid, 1)
	if err == nil && !w.l.fits(out) {
		err = errCorrupt
	}
	if err != nil && !errors.Is(err, errCorrupt) {
		return nil, err
	}
	if err != nil {
		w.q.opts.logger.Warn("result of a worker can't be read, computed again", "err", err)
		return nil, nil //nolint:nilnil // as documented
	}
	w.q.engine.spread.Results.count("worker", 1)
	return out, account.From(ctx).AddSeries(out.counts.series, 0) // the samples are in its cost
}

// fits: a shard's result has what combine relies on.
func (l *Leaf) fits(p *partial) bool {
	if len(p.counts.window) != l.Grid.Len() {
		return false
	}
	if l.Agg == nil {
		return true
	}
	if l.chooses() {
		return !slices.ContainsFunc(p.series, func(s partialSeries) bool { return len(s.Histograms) > 0 })
	}
	k := shardColumns(l.Agg.Op)
	if len(p.series)%k != 0 {
		return false
	}
	for i := range p.series {
		s, first := &p.series[i], &p.series[i/k*k]
		if len(s.Histograms) > 0 || !labels.Equal(s.Metric, first.Metric) || len(s.Floats) != len(first.Floats) {
			return false
		}
		for j := range s.Floats {
			if s.Floats[j].T != first.Floats[j].T {
				return false
			}
		}
	}
	return true
}

// combine puts the results of a leaf's shards together. It gives ErrGiveUp where the
// engine may have got another result, by adding in another order.
func (l *Leaf) combine(ps []*partial, o options) (*partial, error) {
	out := &partial{counts: newCounts(l.Grid.Len())}
	for _, p := range ps {
		out.counts.merge(&p.counts)
		out.merge(&p.annotated)
	}
	if l.Agg == nil || l.chooses() {
		for _, p := range ps {
			out.series = append(out.series, p.series...)
		}
	} else {
		k := shardColumns(l.Agg.Op)
		at := map[uint64][]*sharedGroup{} // by hash of the labels
		var all []*sharedGroup
		for _, p := range ps {
			for i := 0; i < len(p.series); i += k {
				s := p.series[i : i+k]
				hash := s[0].Metric.Hash()
				j := slices.IndexFunc(at[hash], func(g *sharedGroup) bool { return labels.Equal(g.of.Metric, s[0].Metric) })
				var g *sharedGroup
				if j >= 0 {
					g = at[hash][j]
				} else {
					g = &sharedGroup{of: s[0], total: newGroup(l.Agg.Op, l.Grid.Len(), new(columns))}
					at[hash], all = append(at[hash], g), append(all, g)
				}
				if labels.Compare(s[0].order, g.of.order) < 0 {
					g.of.order = s[0].order
				}
				g.add(l, s)
			}
		}
		for _, g := range all {
			floats, ok := g.total.points(l)
			if !ok {
				return nil, ErrGiveUp
			}
			if g.of.Floats = floats; floats != nil {
				out.series = append(out.series, g.of)
			}
		}
	}
	slices.SortFunc(out.series, func(a, b partialSeries) int { return labels.Compare(a.order, b.order) })
	var err error
	if l.chooses() {
		out.series, err = l.combineTop(out.series, o)
	}
	return out, err
}

// sharedGroup is a group of which several shards have series.
type sharedGroup struct {
	of    partialSeries
	total *group
}

// add puts in what a shard has of the group.
func (g *sharedGroup) add(l *Leaf, s []partialSeries) {
	t := g.total
	for j, p := range s[0].Floats {
		i, x := int((p.T-l.Grid.Start)/l.Grid.Step), p.F
		switch l.Agg.Op {
		case parser.SUM, parser.AVG:
			if t.n[i] == 0 {
				t.v[i] = x
			} else {
				t.v[i], t.c[i] = kahansum.Inc(x, t.v[i], t.c[i])
			}
			t.c[i] += s[1].Floats[j].F
			if l.Agg.Op == parser.AVG {
				t.n[i] += uint32(s[2].Floats[j].F)
			} else {
				t.n[i]++
			}
		case parser.COUNT:
			t.n[i] += uint32(x)
		case parser.GROUP:
			t.n[i]++
		case parser.MIN:
			if t.n[i] == 0 || t.v[i] > x || math.IsNaN(t.v[i]) {
				t.v[i] = x
			}
			t.n[i]++
		case parser.MAX:
			if t.n[i] == 0 || t.v[i] < x || math.IsNaN(t.v[i]) {
				t.v[i] = x
			}
			t.n[i]++
		}
	}
}

// points of a group; not ok if a sum went beyond all numbers: that depends on the
// order.
func (g *group) points(l *Leaf) (out []promql.FPoint, ok bool) {
	op := l.Agg.Op
	for i, n := range g.n {
		if n == 0 {
			continue
		}
		if (op == parser.SUM || op == parser.AVG) && math.IsInf(g.v[i], 0) {
			return nil, false
		}
		out = append(out, promql.FPoint{T: l.Grid.At(i), F: g.value(op, i)})
	}
	return out, true
}

// shardSeries gives the series that a shard has of a group.
func (f *fold) shardSeries(g *group, dropName bool) (out []partialSeries, ok bool) {
	op := f.leaf.Agg.Op
	columns := make([][]promql.FPoint, shardColumns(op))
	for i, n := range g.n {
		if n == 0 {
			continue
		}
		values := [3]float64{0, 0, float64(n)}
		if op == parser.SUM || op == parser.AVG {
			if math.IsInf(g.v[i], 0) || g.inc != nil && g.inc[i] {
				return nil, false
			}
			values[0], values[1] = g.v[i], g.c[i]
		} else {
			values[0] = g.value(op, i)
		}
		for k := range columns {
			columns[k] = append(columns[k], promql.FPoint{T: f.leaf.Grid.At(i), F: values[k]})
		}
	}
	// A group of histograms, which don't count, has no points, but a place in the order.
	for _, c := range columns {
		out = append(out, partialSeries{promql.Series{Metric: g.labels, DropName: dropName, Floats: c}, g.first})
	}
	return out, true
}

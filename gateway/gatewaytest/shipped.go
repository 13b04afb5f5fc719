package gatewaytest

import (
	"context"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
)

// Split says of the i-th of n samples of a series whether it goes to a block,
// and whether to a head.
type Split func(i, n int) (block, head bool)

// Splits are some that differ.
//
//nolint:gochecknoglobals // a constant table
var Splits = []Split{
	func(i, n int) (bool, bool) { return i < (n+1)/2, i >= (n+1)/2 },
	func(i, _ int) (bool, bool) { return i%2 == 0, i%2 == 1 },
	func(i, n int) (bool, bool) { return i >= n/2, i < n/2 },
	func(i, _ int) (bool, bool) { return i%4 < 2, true },
}

// Shipped is a Prometheus storage that ships what is appended: for each commit a
// part is flushed to a block before the rest goes to heads. What was flushed
// stays in the heads for the visibility delay: it is read twice and merged.
type Shipped struct {
	storage.Queryable
	storage.ChunkQueryable
	storage.Appendable // nil: the suite uses AppenderV2

	c     *Cluster
	where Split
	// together: all samples of a series of histograms go to where its first does.
	together bool
	// An ingester acknowledges at once in a new session, then in intervals.
	blocks, heads *Shipper
}

// NewShipped makes a Shipped on a cluster, which it closes. With together, all
// samples of a series of histograms go to one place: a counter-reset hint is not
// known where one sample comes from a block and the next from a head, and some
// tests look at hints.
func NewShipped(c *Cluster, where Split, together bool) *Shipped {
	return &Shipped{
		Queryable: c.Storage, ChunkQueryable: c.Storage, c: c, where: where, together: together,
		blocks: c.Shipper(gateway.DefaultTenant), heads: c.Shipper(gateway.DefaultTenant),
	}
}

// Suite gives storages for promqltest.RunBuiltinTestsWithStorage, with two
// ingesters each, and Splits in turn.
func Suite() func(testing.TB) storage.Storage {
	// These files look at counter-reset hints (by the warning about resets in
	// conflict, too).
	hints := []string{"testdata/native_histograms.test", "testdata/range_queries.test"}
	storages := 0
	return func(t testing.TB) storage.Storage {
		storages++
		together := slices.ContainsFunc(hints, func(file string) bool { return strings.HasSuffix(t.Name(), "/"+file) })
		return NewShipped(New(t, Options{Ingesters: 2}), Splits[storages%len(Splits)], together)
	}
}

// StartTime implements storage.Storage.
func (*Shipped) StartTime() (int64, error) { return math.MinInt64, nil }

// Close implements storage.Storage.
func (s *Shipped) Close() error { return s.c.Close() }

// AppenderV2 implements storage.AppendableV2.
func (s *Shipped) AppenderV2(ctx context.Context) storage.AppenderV2 {
	return &appender{s: s, ctx: ctx, series: map[string][]Sample{}}
}

type appender struct {
	s      *Shipped
	ctx    context.Context     //nolint:containedctx // storage.AppenderV2 has no other place for it
	series map[string][]Sample // by labels
}

func (a *appender) Append(_ storage.SeriesRef, ls labels.Labels, st, t int64, v float64, h *histogram.Histogram, fh *histogram.FloatHistogram, o storage.AppendV2Options) (storage.SeriesRef, error) {
	key := ls.String()
	a.series[key] = append(a.series[key], Sample{
		Labels: ls, T: t, ST: st, V: v, H: h, FH: fh, Exemplars: slices.Clone(o.Exemplars), Metadata: o.Metadata,
	})
	return 1, nil
}

func (a *appender) Rollback() error { return nil }

func (a *appender) SetOptions(*storage.AppendOptions) {}

func (a *appender) Commit() error {
	var blocks, heads []Sample
	for k, key := range slices.Sorted(maps.Keys(a.series)) {
		ss := a.series[key]
		// The suite has float histograms only; most of what clients send is whole.
		integers := !slices.ContainsFunc(ss, func(p Sample) bool { return p.FH == nil || whole(p.FH) == nil })
		histograms := slices.ContainsFunc(ss, func(p Sample) bool { return p.H != nil || p.FH != nil })
		for i, p := range ss {
			block, head := a.s.where(i, len(ss))
			if a.s.together && histograms {
				block, head = a.s.where(k, len(a.series))
			}
			if integers {
				p.H, p.FH = whole(p.FH), nil
			}
			if block {
				blocks = append(blocks, p)
			}
			if head {
				heads = append(heads, p)
			}
		}
	}
	ctx, cancel := context.WithTimeout(a.ctx, time.Minute)
	defer cancel()
	if err := a.s.blocks.Send(ctx, blocks...); err != nil {
		return err
	}
	if err := a.s.c.Flush(ctx); err != nil {
		return err
	}
	return a.s.heads.Send(ctx, heads...)
}

// whole gives the histogram with integer counts that equals fh, or nil.
func whole(fh *histogram.FloatHistogram) *histogram.Histogram {
	h := &histogram.Histogram{
		CounterResetHint: fh.CounterResetHint, Schema: fh.Schema, Sum: fh.Sum, ZeroThreshold: fh.ZeroThreshold,
		Count: uint64(fh.Count), ZeroCount: uint64(fh.ZeroCount),
		PositiveSpans: fh.PositiveSpans, NegativeSpans: fh.NegativeSpans, CustomValues: fh.CustomValues,
	}
	deltas := func(counts []float64) []int64 {
		var out []int64
		var last int64
		for _, c := range counts {
			out = append(out, int64(c)-last)
			last = int64(c)
		}
		return out
	}
	h.PositiveBuckets, h.NegativeBuckets = deltas(fh.PositiveBuckets), deltas(fh.NegativeBuckets)
	if h.Validate() != nil || !h.ToFloat(nil).Equals(fh) {
		return nil
	}
	return h
}

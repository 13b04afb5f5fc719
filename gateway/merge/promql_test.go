package merge_test

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
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestPrometheusSuite runs Prometheus's own acceptance tests of the query
// language on heads and blocks. Every sample is shipped to an ingester; about
// half of them are flushed before the others are sent. What was flushed stays
// in the heads for the visibility delay: it is read twice and merged.
func TestPrometheusSuite(t *testing.T) {
	splits := []split{
		func(i, n int) (bool, bool) { return i < (n+1)/2, i >= (n+1)/2 },
		func(i, _ int) (bool, bool) { return i%2 == 0, i%2 == 1 },
		func(i, n int) (bool, bool) { return i >= n/2, i < n/2 },
		func(i, _ int) (bool, bool) { return i%4 < 2, true },
	}
	// A counter-reset hint is not known where one sample comes from a block and
	// the next from a head. These files look at hints (by the warning about
	// resets in conflict, too), so here a series of histograms is in one place.
	hints := []string{"testdata/native_histograms.test", "testdata/range_queries.test"}
	storages := 0
	engine := promqltest.NewTestEngine(t, false, 0, promqltest.DefaultMaxSamplesPerQuery)
	promqltest.RunBuiltinTestsWithStorage(t, engine, func(t testing.TB) storage.Storage {
		c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2})
		storages++
		return &shipped{
			Queryable: c.Storage, ChunkQueryable: c.Storage, c: c,
			where:    splits[storages%len(splits)],
			together: slices.ContainsFunc(hints, func(file string) bool { return strings.HasSuffix(t.Name(), "/"+file) }),
			blocks:   c.Shipper(gateway.DefaultTenant), heads: c.Shipper(gateway.DefaultTenant),
		}
	})
}

// split says of the i-th of n samples of a series whether it goes to a block,
// and whether to a head.
type split func(i, n int) (block, head bool)

// shipped is a Prometheus storage that ships what is appended.
type shipped struct {
	storage.Queryable
	storage.ChunkQueryable
	storage.Appendable // nil: the suite uses AppenderV2

	c     *gatewaytest.Cluster
	where split
	// together: all samples of a series of histograms go to where its first does.
	together bool
	// An ingester acknowledges at once in a new session, then in intervals.
	blocks, heads *gatewaytest.Shipper
}

func (*shipped) StartTime() (int64, error) { return math.MinInt64, nil }
func (s *shipped) Close() error            { return s.c.Close() }

func (s *shipped) AppenderV2(ctx context.Context) storage.AppenderV2 {
	return &appender{s: s, ctx: ctx, series: map[string][]gatewaytest.Sample{}}
}

type appender struct {
	s      *shipped
	ctx    context.Context                 //nolint:containedctx // storage.AppenderV2 has no other place for it
	series map[string][]gatewaytest.Sample // by labels
}

func (a *appender) Append(_ storage.SeriesRef, ls labels.Labels, st, t int64, v float64, h *histogram.Histogram, fh *histogram.FloatHistogram, o storage.AppendV2Options) (storage.SeriesRef, error) {
	key := ls.String()
	a.series[key] = append(a.series[key], gatewaytest.Sample{
		Labels: ls, T: t, ST: st, V: v, H: h, FH: fh, Exemplars: slices.Clone(o.Exemplars), Metadata: o.Metadata,
	})
	return 1, nil
}

func (a *appender) Rollback() error { return nil }

func (a *appender) SetOptions(*storage.AppendOptions) {}

func (a *appender) Commit() error {
	var blocks, heads []gatewaytest.Sample
	for k, key := range slices.Sorted(maps.Keys(a.series)) {
		ss := a.series[key]
		// The suite has float histograms only; most of what clients send is whole.
		integers := !slices.ContainsFunc(ss, func(p gatewaytest.Sample) bool { return p.FH == nil || whole(p.FH) == nil })
		histograms := slices.ContainsFunc(ss, func(p gatewaytest.Sample) bool { return p.H != nil || p.FH != nil })
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

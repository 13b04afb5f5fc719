package sim

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	tenancy "github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// found is what a reader has found of a tenant.
type found map[sampleID]string

// add enters the samples of a series, which must ascend in time.
func (f found) add(series seriesID, s *chunkfmt.Series) error {
	one := func(t int64, v string) error {
		id := sampleID{series, t}
		if _, twice := f[id]; twice {
			return fmt.Errorf("%v was found twice", id)
		}
		f[id] = v
		return nil
	}
	for i, t := range s.Floats.T {
		if err := one(t, floatValue(s.Floats.V[i])); err != nil {
			return err
		}
	}
	for i, t := range s.Histograms.T {
		if err := one(t, histogramValue(s.Histograms.H[i])); err != nil {
			return err
		}
	}
	for i, t := range s.FloatHistograms.T {
		if err := one(t, floatHistogramValue(s.FloatHistograms.H[i])); err != nil {
			return err
		}
	}
	return nil
}

// all matches every series.
func all() *labels.Matcher { return labels.MustNewMatcher(labels.MatchRegexp, "__name__", ".+") }

// read reads a snapshot of history.
func read(ctx context.Context, snap *history.Snapshot, tenant string, mint, maxt int64) (found, error) {
	f := found{}
	set, err := snap.Select(ctx, []*labels.Matcher{all()}, mint, maxt)
	if err != nil {
		return nil, err
	}
	for set.Next(ctx) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			return nil, err
		}
		if err := f.add(seriesID{tenant, set.At().Labels.String()}, chunkfmt.Merge(runs...)); err != nil {
			return nil, err
		}
	}
	return f, set.Err()
}

// history reads history alone, with nothing cached and no faults.
func (w *world) history(tenant string, mint, maxt int64) (found, error) {
	ctx := context.Background()
	snap, err := w.alone.Snapshot(ctx, tenant, mint, maxt, nil, time.Now())
	if err != nil {
		return nil, err
	}
	return read(ctx, snap, tenant, mint, maxt)
}

// durable checks that samples, which an ingester calls durable, are in history.
func (w *world) durable(tenant string, ids []sampleID) error {
	mint, maxt := int64(math.MaxInt64), int64(math.MinInt64)
	for _, id := range ids {
		mint, maxt = min(mint, id.t), max(maxt, id.t)
	}
	if mint > maxt {
		return nil // withdrawals only
	}
	f, err := w.history(tenant, mint, maxt)
	if err != nil {
		return err
	}
	w.truth.mu.Lock()
	defer w.truth.mu.Unlock()
	for _, id := range ids {
		v, ok := f[id]
		if !ok {
			return fmt.Errorf("%v is not in history", id)
		}
		if err := w.truth.same(id, v); err != nil {
			return err
		}
		w.truth.samples[id].durable = true
		w.verified++
	}
	return nil
}

// checkHistory checks that history has nothing that was not logged, and all that
// was ever called durable. At the end it must have all that sources hold.
func (w *world) checkHistory(tenant string, end bool) error {
	must := w.truth.all(tenant, math.MinInt64, math.MaxInt64, func(s *sample) bool { return s.durable || end && !s.gone })
	f, err := w.history(tenant, math.MinInt64, math.MaxInt64)
	if err != nil {
		return fmt.Errorf("history of %s: %w", tenant, err)
	}
	if err := w.truth.compare(f, must, func(*sample) bool { return true }); err != nil {
		return fmt.Errorf("history of %s: %w", tenant, err)
	}
	return nil
}

// all gives the samples of a tenant for which which is true.
func (tr *truth) all(tenant string, mint, maxt int64, which func(*sample) bool) []sampleID {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	var ids []sampleID
	for id, s := range tr.samples {
		if id.series.tenant == tenant && mint <= id.t && id.t <= maxt && which(s) {
			ids = append(ids, id)
		}
	}
	return ids
}

// compare checks what a reader has found: nothing but what was logged, and of must
// all that still must be there.
func (tr *truth) compare(f found, must []sampleID, still func(*sample) bool) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for id, v := range f {
		if err := tr.same(id, v); err != nil {
			return err
		}
	}
	missing, example := 0, ""
	for _, id := range must {
		if _, ok := f[id]; !ok && still(tr.samples[id]) {
			missing++
			s := tr.samples[id]
			if x := fmt.Sprintf("%v, logged at %v of %s (durable: %v, in heads of %v)", id, s.at, s.source.id, s.durable, s.heads); example == "" || x < example {
				example = x
			}
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d of %d samples were not found, such as %s", missing, len(must), example)
	}
	return nil
}

// reader answers a query for all series of a tenant. warned says that fresh
// samples may be missing.
type reader func(ctx context.Context, tenant string, mint, maxt int64) (f found, warned annotations.Annotations, err error)

// gatewayReader reads as a gateway does.
func (w *world) gatewayReader(ctx context.Context, tenant string, mint, maxt int64) (found, annotations.Annotations, error) {
	q, err := w.storage.Querier(mint, maxt)
	if err != nil {
		return nil, nil, err
	}
	defer q.Close()
	f := found{}
	set := q.Select(tenancy.WithTenant(ctx, tenant), true, nil, all())
	var it chunkenc.Iterator
	for set.Next() {
		series, last := seriesID{tenant, set.At().Labels().String()}, int64(math.MinInt64)
		it = set.At().Iterator(it)
		for kind := it.Next(); kind != chunkenc.ValNone; kind = it.Next() {
			var t int64
			var v string
			switch kind {
			case chunkenc.ValHistogram:
				at, h := it.AtHistogram(nil)
				t, v = at, histogramValue(h)
			case chunkenc.ValFloatHistogram:
				at, h := it.AtFloatHistogram(nil)
				t, v = at, floatHistogramValue(h)
			default:
				at, x := it.At()
				t, v = at, floatValue(x)
			}
			if t <= last {
				return nil, nil, fmt.Errorf("series %v: %d after %d", series, t, last)
			}
			last = t
			f[sampleID{series, t}] = v
		}
		if err := it.Err(); err != nil {
			return nil, nil, err
		}
	}
	return f, set.Warnings(), set.Err()
}

// checkQuery runs a query. It must give nothing that wasn't logged and, unless it
// warns, all that is durable or in a living ingester's memory. It says why the
// answer is not complete, if it isn't: that by itself is no violation.
func (w *world) checkQuery(tenant string, mint, maxt int64) (incomplete, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), w.queryTimeout)
	defer cancel()
	must := w.truth.all(tenant, mint, maxt, (*sample).readable)
	f, warned, err := w.reader(ctx, tenant, mint, maxt)
	if err != nil {
		return err, nil // a store failed, or it took too long: no answer is no wrong one
	}
	if len(warned) > 0 {
		must, incomplete = nil, errors.Join(warned.AsErrors()...)
	}
	if err := w.truth.compare(f, must, (*sample).readable); err != nil {
		return nil, fmt.Errorf("query of %s from %d to %d: %w", tenant, mint, maxt, err)
	}
	return incomplete, nil
}

// runQueries asks from time to time, until stop is closed.
func (w *world) runQueries(tenant string, stop <-chan struct{}) {
	rng := w.random(200 + uint64(len(tenant)))
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.Int64N(int64(4 * time.Second)))):
		}
		mint, maxt := int64(math.MinInt64), int64(math.MaxInt64)
		if rng.IntN(3) == 0 {
			mint = time.Now().UnixMilli() - rng.Int64N(120_000)
			maxt = mint + rng.Int64N(60_000)
		}
		incomplete, err := w.checkQuery(tenant, mint, maxt)
		if err != nil {
			w.fail(err)
		}
		w.mu.Lock()
		w.queries++
		if incomplete == nil {
			w.complete++
		}
		w.mu.Unlock()
	}
}

package merge

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

// Selection is what a selector reads: the answers of the heads, and the blocks of
// history. Parts of its time can be read one by one, here or elsewhere.
type Selection struct {
	q          *Querier
	ctx        context.Context //nolint:containedctx // of the query, for what is read later
	matchers   []*labels.Matcher
	hints      storage.SelectHints
	mint, maxt int64 // inclusive, ms
	newest     bool  // of each series only the newest sample is wanted

	wait     func() // until the fields below are set
	err      error
	warnings annotations.Annotations
	heads    [][]fetch.Series // of the ingesters, each ascending in labels
	bytes    int64            // of these, about
	snap     *history.Snapshot

	series atomic.Int64 // the most that one set of them has given
}

func newSelection(ctx context.Context, q *Querier, hints *storage.SelectHints, ms []*labels.Matcher) *Selection {
	// Matchers may be used by their owner as soon as the caller returns.
	s := &Selection{q: q, ctx: ctx, matchers: slices.Clone(ms), mint: q.mint, maxt: q.maxt}
	if hints != nil {
		s.hints = *hints
		s.mint, s.maxt = max(s.mint, hints.Start), min(s.maxt, hints.End)
	}
	return s
}

// labelsOnly: it is the series API that asks.
func (s *Selection) labelsOnly() bool { return s.hints.Func == "series" }

// open asks the heads, and then lists the blocks.
func (s *Selection) open(ctx context.Context) {
	if s.mint > s.maxt {
		return
	}
	tenant := s.q.s.tenantOf(ctx)
	labelsOnly := s.labelsOnly()
	if !labelsOnly {
		// Of a PromQL query that is known already, of remote read it isn't.
		if s.err = account.From(ctx).CheckRange(s.mint, s.maxt); s.err != nil {
			return
		}
	}
	if labelsOnly {
		// Which series have anything left, only their chunks tell.
		hides, err := s.q.s.history.Hides(ctx, tenant, s.mint, s.maxt)
		if err != nil {
			s.err = class(ctx, err)
			return
		}
		labelsOnly = !hides
	}
	fq := fetch.Query{Tenant: tenant, MinT: s.mint, MaxT: s.maxt, Matchers: s.matchers, LabelsOnly: labelsOnly, Newest: s.newest}
	must, since, err := s.ask(ctx, fq)
	if err == nil {
		s.snap, err = s.q.snapshot(ctx, must, since)
	}
	if err == nil && fq.Newest && s.snap.Hidden.Deletes(s.mint, s.maxt) {
		// The newest may be deleted, and the one before not. The blocks that are listed will
		// do, see snapshot.
		fq.Newest = false
		_, _, err = s.ask(ctx, fq)
	}
	s.err = class(ctx, err)
}

// ask asks the heads. It gives the blocks that they name, and when these have to be
// listed at the earliest.
func (s *Selection) ask(ctx context.Context, q fetch.Query) (must []ulid.ULID, since time.Time, _ error) {
	acc := account.From(ctx)
	var coming atomic.Int64                     // bytes
	defer func() { acc.Hold(-coming.Load()) }() // after an error
	q.Took = func(bytes int64) {
		coming.Add(bytes)
		acc.Hold(bytes)
		acc.Read(bytes)
	}
	q.Keep = s.q.keep
	as, since, warnings, err := ask(ctx, s.q.s.heads, q.Tenant, func(ctx context.Context, c *fetch.Client) ([][]fetch.Series, fetch.Header, error) {
		return c.Select(ctx, q)
	})
	if err != nil {
		return nil, since, err
	}
	s.warnings.Merge(warnings)
	s.heads = nil
	bytes := int64(0)
	for _, a := range as {
		for _, list := range a.value {
			for i := range list {
				for _, c := range list[i].Chunks {
					bytes += int64(len(c.Data))
				}
			}
			if len(list) > 0 {
				s.heads = append(s.heads, list)
				bytes += seriesBytes * int64(len(list))
			}
		}
	}
	acc.AddHeadBytes(bytes)
	acc.Read(bytes - coming.Load()) // of an ingester in this process all
	acc.Hold(bytes - s.bytes - coming.Swap(0))
	s.bytes = bytes
	return blocks(as), since, nil
}

// seriesBytes is about what a series of a head takes beside its samples; labels are
// kept for all queries.
const seriesBytes = 128

// Wait waits until the heads have answered and the blocks are listed, and gives
// why they can't be.
func (s *Selection) Wait() error {
	s.wait()
	return s.err
}

// Warnings of the heads. Wait first.
func (s *Selection) Warnings() annotations.Annotations { return s.warnings }

// Snapshot is the list of blocks that the query reads; nil if its time is empty.
// Wait first.
func (s *Selection) Snapshot() *history.Snapshot { return s.snap }

// Matchers of the selector; not to be changed.
func (s *Selection) Matchers() []*labels.Matcher { return s.matchers }

// HeadSeries is what a head has of a series.
type HeadSeries = fetch.Series

// HeadBytes is about what the heads have given, in bytes. Wait first.
func (s *Selection) HeadBytes() int64 { return s.bytes }

// HeadCounts is how many series heads have given, and how many samples, those of replicas
// each. Wait first.
func (s *Selection) HeadCounts() (series, samples int64) {
	seen := map[uint64]struct{}{} // by hash
	for _, h := range s.heads {
		for i := range h {
			seen[h[i].Labels.Hash()] = struct{}{}
			for k := range h[i].Chunks {
				samples += int64(h[i].Chunks[k].Samples())
			}
		}
	}
	return int64(len(seen)), samples
}

// HeadShards gives what heads have of each of n shards. Wait first. It is good for longer
// than the Querier: requests to other gateways may still be read from when nobody waits for
// them any more.
func (s *Selection) HeadShards(n uint64) [][][]HeadSeries {
	s.q.leave()
	out := make([][][]HeadSeries, n)
	var buf []byte
	for _, list := range s.heads {
		of := make([][]HeadSeries, n)
		for i := range list {
			var k uint64
			k, buf = shardOf(list[i].Labels, n, buf)
			of[k] = append(of[k], list[i])
		}
		for k := range of {
			if len(of[k]) > 0 {
				out[k] = append(out[k], of[k])
			}
		}
	}
	return out
}

// Shards are some of the shards that series are in by the hash of their labels. Series
// that only differ in metadata labels, such as the name, are in the same.
type Shards struct {
	In []bool // by number of the shard; empty: all series
}

// shardOf is the same in all gateways, whatever libraries they were built with: what a
// package has for the hash of labels may change with its version.
func shardOf(ls labels.Labels, n uint64, buf []byte) (uint64, []byte) {
	buf = buf[:0]
	ls.Range(func(l labels.Label) {
		switch l.Name {
		case model.MetricNameLabel, model.MetricTypeLabel, model.MetricUnitLabel:
			return
		}
		const end = 0xff // is in no text
		buf = append(append(buf, l.Name...), end)
		buf = append(append(buf, l.Value...), end)
	})
	return xxhash.Sum64(buf) % n, buf
}

// HeadTimes calls fn with the time of each chunk that a head has for the selector,
// inclusive, in ms, in no order. Wait first.
func (s *Selection) HeadTimes(fn func(mint, maxt int64)) {
	for _, h := range s.heads {
		for i := range h {
			for _, c := range h[i].Chunks {
				fn(c.MinT, c.MaxT)
			}
		}
	}
}

// AddSeries tells the account of samples that were read, or are about to be, of the
// first so many series of a part of the time. Parts have the same series, more or
// less: only those count that no part has had so many of.
func (s *Selection) AddSeries(series, samples int64) error {
	for {
		was := s.series.Load()
		if s.series.CompareAndSwap(was, max(was, series)) {
			return account.From(s.ctx).AddSeries(max(0, series-was), samples)
		}
	}
}

// Set gives the series that have samples in mint to maxt, inclusive, in ms, or
// summaries of those, if any are wanted. The caller keeps none of them. It begins to
// read at once, see Querier.Alone.
func (s *Selection) Set(mint, maxt int64, sums *history.Summaries) storage.SeriesSet {
	return s.ShardSet(mint, maxt, sums, Shards{})
}

// ShardSet is Set of some shards of the series.
func (s *Selection) ShardSet(mint, maxt int64, sums *history.Summaries, shards Shards) storage.SeriesSet {
	set := &seriesSet{ctx: s.ctx, account: account.From(s.ctx), of: s, streams: true, sums: sums, in: shards.In}
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.q.closed {
		return storage.ErrSeriesSet(errClosed)
	}
	set.wait = s.q.begin(func() {
		s.wait()
		s.read(s.ctx, set, max(mint, s.mint), min(maxt, s.maxt))
	})
	return set
}

// read fills in a set.
func (s *Selection) read(ctx context.Context, set *seriesSet, mint, maxt int64) {
	set.mint, set.maxt, set.shard, set.shards, set.left = mint, maxt, s.hints.ShardIndex, s.hints.ShardCount, s.hints.Limit
	if s.hints.Limit <= 0 {
		set.left = -1
	}
	set.warnings = s.warnings
	if set.err = s.err; s.err != nil || mint > maxt {
		return
	}
	set.heads, set.snap, set.labelsOnly = slices.Clone(s.heads), s.snap, s.labelsOnly()
	if set.labelsOnly {
		lss, err := s.snap.Series(ctx, s.matchers, mint, maxt)
		if err != nil {
			set.err = class(ctx, err)
			return
		}
		old := make([]fetch.Series, 0, len(lss))
		for _, ls := range lss {
			old = append(old, fetch.Series{Labels: ls})
			set.held += seriesBytes + int64(ls.ByteSize()) //nolint:gosec // bytes in memory
		}
		set.account.Hold(set.held) // until Release, or the request's end: the caller keeps labels
		if set.err = class(ctx, ctx.Err()); set.err != nil {
			return
		}
		if len(old) > 0 {
			set.heads = append(set.heads, old)
		}
		return
	}
	set.readHistory(ctx, s.snap, s.matchers)
}

// Historical gives series of a snapshot of history, and of what heads have for it, in
// some shards, with samples in mint to maxt, inclusive, in ms, or summaries of those, if
// any are wanted. It begins to read before it returns.
func Historical(ctx context.Context, snap *history.Snapshot, mint, maxt int64, sums *history.Summaries, shards Shards, heads [][]HeadSeries, ms []*labels.Matcher) storage.SeriesSet {
	set := &seriesSet{
		ctx: ctx, wait: done, mint: mint, maxt: maxt, left: -1, account: account.From(ctx), streams: true, sums: sums,
		in: shards.In, heads: slices.Clone(heads), snap: snap,
	}
	set.readHistory(ctx, snap, ms)
	return set
}

package worker

import (
	"fmt"
	"math"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

//nolint:gosec // numbers of leaves and steps, levels
func request(t *plan.Task) *workpb.RunRequest {
	r := &workpb.RunRequest{
		Version: plan.Version, Tenant: t.Tenant, Query: []byte(t.Query), Start: t.Start, End: t.End, Step: t.Step, Lookback: t.Lookback,
		SubqueryStep: t.SubqueryStep, StartTimestamps: t.StartTimestamps, DelayedNameRemoval: t.DelayedNameRemoval, TypeAndUnitLabels: t.TypeAndUnitLabels,
		MaxSamples: int64(t.MaxSamples), Leaf: uint32(t.Leaf), Split: t.Split, Span: t.Span, Number: t.Number,
		From: uint32(t.From), To: uint32(t.To), Blocks: make([]*workpb.Block, len(t.Blocks)),
	}
	for i := range t.Blocks {
		b := &t.Blocks[i]
		out := &workpb.Block{
			Id: b.ID[:], Object: b.Object, ObjectSize: b.ObjectSize, DirectoryOffset: b.Directory.Offset, DirectorySize: b.Directory.Size,
			Level: uint32(b.Level), Series: b.Series, Samples: b.Samples,
		}
		for _, x := range b.Ranges {
			out.Ranges = append(out.Ranges, x.MinT, x.MaxT)
		}
		r.Blocks[i] = out
	}
	r.Shard, r.Shards = uint32(t.Shard), uint32(t.Shards)
	r.LeftSamples, r.LeftBytes = uint64(t.Left.Samples), uint64(t.Left.Read)
	for _, list := range t.Heads {
		out := &workpb.HeadList{Series: make([]*workpb.HeadSeries, len(list))}
		for i := range list {
			s := &workpb.HeadSeries{}
			list[i].Labels.Range(func(l labels.Label) { s.Labels = append(s.Labels, l.Name, l.Value) })
			for _, c := range list[i].Chunks {
				s.Chunks = append(s.Chunks, &workpb.HeadChunk{Encoding: uint32(c.Encoding), Mint: c.MinT, Maxt: c.MaxT, Data: c.Data})
			}
			out.Series[i] = s
		}
		r.Heads = append(r.Heads, out)
	}
	if h := t.Hidden; h != nil {
		r.Before, r.BeforeShort, r.BeforeLong = &h.Before.Raw, &h.Before.Short, &h.Before.Long
		for i := range h.Deletions {
			d := &h.Deletions[i]
			out := &workpb.Deletion{Id: d.ID[:], Mint: d.MinT, Maxt: d.MaxT}
			for _, m := range d.Matchers {
				out.Matchers = append(out.Matchers, &workpb.Matcher{Type: uint32(m.Type), Name: []byte(m.Name), Value: []byte(m.Value)})
			}
			r.Deletions = append(r.Deletions, out)
		}
	}
	return r
}

// hidden reads what of the blocks isn't to be read.
func hidden(r *workpb.RunRequest) (*history.Hidden, error) {
	before := history.Before(math.MinInt64)
	if r.Before != nil && r.BeforeShort != nil && r.BeforeLong != nil {
		before = history.Horizons{Raw: r.GetBefore(), Short: r.GetBeforeShort(), Long: r.GetBeforeLong()}
	}
	ds := make([]index.Deletion, len(r.GetDeletions()))
	for i, d := range r.GetDeletions() {
		out := &ds[i]
		if len(d.GetId()) != len(out.ID) || d.GetMint() > d.GetMaxt() {
			return nil, fmt.Errorf("deletion %d: id of %d bytes, want 16; from %d to %d ms", i, len(d.GetId()), d.GetMint(), d.GetMaxt())
		}
		out.ID, out.MinT, out.MaxT = ulid.ULID(d.GetId()), d.GetMint(), d.GetMaxt()
		for _, m := range d.GetMatchers() {
			if m.GetType() > uint32(labels.MatchNotRegexp) {
				return nil, fmt.Errorf("deletion %d: matcher of type %d", i, m.GetType())
			}
			matcher, err := labels.NewMatcher(labels.MatchType(m.GetType()), string(m.GetName()), string(m.GetValue()))
			if err != nil {
				return nil, fmt.Errorf("deletion %d: %w", i, err)
			}
			out.Matchers = append(out.Matchers, matcher)
		}
	}
	return history.NewHidden(ds, before), nil
}

// heads reads what heads have.
func heads(r *workpb.RunRequest) ([][]fetch.Series, error) {
	var out [][]fetch.Series
	for _, l := range r.GetHeads() {
		list := make([]fetch.Series, len(l.GetSeries()))
		for i, s := range l.GetSeries() {
			var err error
			if list[i].Labels, err = fetch.ToLabels(s.GetLabels()); err != nil {
				return nil, err
			}
			if i > 0 && labels.Compare(list[i-1].Labels, list[i].Labels) >= 0 {
				return nil, fmt.Errorf("series %s of a head after %s", list[i].Labels, list[i-1].Labels)
			}
			for _, c := range s.GetChunks() {
				if c.GetEncoding() > math.MaxUint8 || c.GetMint() > c.GetMaxt() {
					return nil, fmt.Errorf("chunk of encoding %d from %d to %d ms", c.GetEncoding(), c.GetMint(), c.GetMaxt())
				}
				list[i].Chunks = append(list[i].Chunks, fetch.Chunk{
					Encoding: chunkenc.Encoding(c.GetEncoding()), MinT: c.GetMint(), MaxT: c.GetMaxt(), Data: c.GetData(),
				})
			}
		}
		out = append(out, list)
	}
	return out, nil
}

// limit of a request.
func limit(n uint64) int64 { return int64(min(n, math.MaxInt64)) } //nolint:gosec // bounded

// cost writes what was read for a task.
//
//nolint:gosec // counts are not negative
func cost(c account.Cost) *workpb.Cost {
	return &workpb.Cost{
		Samples: uint64(c.Samples), Windows: uint64(c.Windows), ObjectGets: uint64(c.ObjectGets), ObjectBytes: uint64(c.ObjectBytes),
		Pages: uint64(c.Pages), PagesCached: uint64(c.PagesCached), PagesMemcached: uint64(c.PagesMemcached),
		PartsKept: uint64(c.PartsKept), PartsComputed: uint64(c.PartsHere),
	}
}

// maxCount bounds each count of a cost: thousands may be added up.
const maxCount = 1 << 50

// costOf reads a cost.
func costOf(c *workpb.Cost) (out account.Cost, err error) {
	count := func(n uint64) int64 {
		if n > maxCount {
			err = fmt.Errorf("the cost of a part has a count of %d, want 2^50 at most", n)
		}
		return int64(min(n, maxCount)) //nolint:gosec // bounded
	}
	out = account.Cost{
		Samples: count(c.GetSamples()), Windows: count(c.GetWindows()), ObjectGets: count(c.GetObjectGets()), ObjectBytes: count(c.GetObjectBytes()),
		Pages: count(c.GetPages()), PagesCached: count(c.GetPagesCached()), PagesMemcached: count(c.GetPagesMemcached()),
		PartsKept: count(c.GetPartsKept()), PartsHere: count(c.GetPartsComputed()),
	}
	return out, err
}

// task reads a request. What it says of objects is checked when they are read.
func task(r *workpb.RunRequest) (*plan.Task, error) {
	t := &plan.Task{
		Tenant: r.GetTenant(), Query: string(r.GetQuery()), Start: r.GetStart(), End: r.GetEnd(), Step: r.GetStep(), Lookback: r.GetLookback(),
		SubqueryStep: r.GetSubqueryStep(), StartTimestamps: r.GetStartTimestamps(), DelayedNameRemoval: r.GetDelayedNameRemoval(), TypeAndUnitLabels: r.GetTypeAndUnitLabels(),
		MaxSamples: int(r.GetMaxSamples()), Leaf: int(r.GetLeaf()), Split: r.GetSplit(), Span: r.GetSpan(), Number: r.GetNumber(),
		From: int(r.GetFrom()), To: int(r.GetTo()), Blocks: make([]history.Block, len(r.GetBlocks())),
		Shard: int(r.GetShard()), Shards: int(r.GetShards()),
		Left: account.Limits{Samples: limit(r.GetLeftSamples()), Read: limit(r.GetLeftBytes())},
	}
	const most = math.MaxInt64 / int64(time.Millisecond)
	if t.Step < 0 || t.Step > most || t.Lookback < 0 || t.Lookback > most || t.Span < 0 || t.Span > most || (t.Span == 0) != (t.Shards > 0) {
		return nil, fmt.Errorf("step %d, lookback %d, span %d, %d shards: want 0 to %d ms, and a span or shards", t.Step, t.Lookback, t.Span, t.Shards, most)
	}
	for i, b := range r.GetBlocks() {
		out := &t.Blocks[i]
		if len(b.GetId()) != len(out.ID) || len(b.GetRanges()) == 0 || len(b.GetRanges())%2 != 0 {
			return nil, fmt.Errorf("block %d: id of %d bytes, want 16; %d times, want an even number", i, len(b.GetId()), len(b.GetRanges()))
		}
		*out = history.Block{
			ID: ulid.ULID(b.GetId()), Object: b.GetObject(), ObjectSize: b.GetObjectSize(),
			Directory: chunkfmt.Location{Offset: b.GetDirectoryOffset(), Size: b.GetDirectorySize()},
			Level:     index.Level(b.GetLevel()), Series: b.GetSeries(), Samples: b.GetSamples(), //nolint:gosec // shown only
		}
		for j := 0; j < len(b.GetRanges()); j += 2 {
			out.Ranges = append(out.Ranges, chunkfmt.Range{MinT: b.GetRanges()[j], MaxT: b.GetRanges()[j+1]})
		}
	}
	var err error
	if t.Heads, err = heads(r); err != nil {
		return nil, err
	}
	t.Hidden, err = hidden(r)
	return t, err
}

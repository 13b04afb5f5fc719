package ingest

import (
	"slices"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// reasonFuture is why a sample is refused that is too far ahead of the clock. It
// would be in the way for long: of blocks by time, of what the newest sample is.
const reasonFuture head.Reason = "future"

// refuseFuture takes the samples out of a batch that are more than ship.MaxFuture
// ahead of now. What is left is in cols, and in the batch that is returned: so the
// commit log has only what was taken, and a replay refuses nothing.
func refuseFuture(b *shippb.Batch, cols *ship.Columns, refs *head.Refs, now time.Time) (*shippb.Batch, head.Refusal) {
	limit := now.Add(ship.MaxFuture).UnixMilli()
	var refused head.Refusal
	late := func(ref []uint32, ts []int64) []bool {
		if len(ts) == 0 || slices.Max(ts) <= limit {
			return nil
		}
		out := make([]bool, len(ts))
		for i, t := range ts {
			if out[i] = t > limit; !out[i] {
				continue
			}
			if refused.Samples == 0 {
				refused.Example = refs.Labels(ref[i])
			}
			refused.Samples++
		}
		return out
	}
	f, h, fh := &cols.Floats, &cols.Histograms, &cols.FloatHistograms
	if d := late(f.Ref, f.T); d != nil {
		f.Ref, f.T, f.ST, f.V = without(f.Ref, d), without(f.T, d), without(f.ST, d), without(f.V, d)
	}
	if d := late(h.Ref, h.T); d != nil {
		h.Ref, h.T, h.ST, h.H = without(h.Ref, d), without(h.T, d), without(h.ST, d), without(h.H, d)
	}
	if d := late(fh.Ref, fh.T); d != nil {
		fh.Ref, fh.T, fh.ST, fh.H = without(fh.Ref, d), without(fh.T, d), without(fh.ST, d), without(fh.H, d)
	}
	if refused.Samples == 0 {
		return b, refused
	}
	var enc ship.Encoder // it is rare
	return &shippb.Batch{
		Seq: b.Seq, Announce: b.Announce, Columns: enc.Encode(nil, cols), Exemplars: b.Exemplars, Metadata: b.Metadata, Withdraw: b.Withdraw,
	}, refused
}

// without removes the elements that are to be dropped, in place. A column that
// isn't there stays so.
func without[E any](s []E, drop []bool) []E {
	if len(s) == 0 {
		return s
	}
	n := 0
	for i, d := range drop {
		if !d {
			s[n] = s[i]
			n++
		}
	}
	clear(s[n:])
	return s[:n]
}

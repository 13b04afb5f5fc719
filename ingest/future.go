package ingest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// reasonFuture is why a sample is refused that is too far ahead of the clock. It
// would be in the way for long: of blocks by time, of what the newest sample is.
const reasonFuture head.Reason = "future"

// A batch waits while its samples are in the future by the clock of this machine
// but not by that of the source's: one of the two is wrong, and if it is ours, what
// would be refused would be lost. The source sends elsewhere meanwhile, or its WAL
// keeps the samples.
const (
	clockPoll = time.Second
	// clockWait is when a stream is ended that waits, since nothing is read from
	// it: the hello of the next says what the source's clock is by then.
	clockWait = 10 * time.Second
)

// errClocks is that of a batch that waits.
var errClocks = errors.New("clocks differ")

// hearClock notes what the source's machine has for the time. The caller holds
// s.mu.
func (s *session) hearClock(ms int64) {
	s.clock, s.clockAt = ms, time.Now()
}

// clocksDiffer says by how much the source's clock is ahead of now if samples have
// to wait for that. The caller holds s.mu.
func (s *session) clocksDiffer(cols *ship.Columns, exemplars []*shippb.Exemplar, now time.Time) time.Duration {
	if s.clock == 0 {
		return 0
	}
	source := s.clock + time.Since(s.clockAt).Milliseconds()
	ours, theirs := now.Add(ship.MaxFuture).UnixMilli(), source+ship.MaxFuture.Milliseconds()
	for _, ts := range [][]int64{cols.Floats.T, cols.Histograms.T, cols.FloatHistograms.T} {
		if len(ts) == 0 || slices.Max(ts) <= ours {
			continue
		}
		if slices.ContainsFunc(ts, func(t int64) bool { return t > ours && t <= theirs }) {
			return time.Duration(source-now.UnixMilli()) * time.Millisecond
		}
	}
	if slices.ContainsFunc(exemplars, func(e *shippb.Exemplar) bool { return e.T > ours && e.T <= theirs }) {
		return time.Duration(source-now.UnixMilli()) * time.Millisecond
	}
	return 0
}

// applyWhenPossible is apply, again while it waits for clocks, or for the next
// generation.
func (r *receiver) applyWhenPossible(ctx context.Context, s *session, b *shippb.Batch, dec *ship.Decoder, cols *ship.Columns) error {
	end, warned := time.Now().Add(clockWait), false
	for {
		err := r.apply(s, b, dec, cols)
		s.mu.Lock()
		ahead := s.waiting
		s.mu.Unlock()
		switch {
		case errors.Is(err, errWindows):
			if !warned {
				r.logger.Warn("samples of a tenant are from too many weeks: what follows waits for the next flush", "tenant", s.id.tenant, "limit", maxWindows)
			}
			end, warned = time.Now().Add(clockWait), true
		case !errors.Is(err, errClocks):
			return err
		}
		if time.Now().After(end) {
			return status.Errorf(codes.Unavailable, "samples are ahead of the clock of ingester %s, which says %s; the clock of their source is %s ahead of it: see to the clocks, nothing is taken meanwhile",
				r.member, r.now().UTC().Format(time.RFC3339), ahead.Round(time.Second))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(clockPoll):
		}
	}
}

// waits notes that the session waits for clocks, or not any more. The caller holds
// s.mu.
func (r *receiver) waits(s *session, ahead time.Duration) {
	if before := s.waiting; (before == 0) != (ahead == 0) {
		if ahead != 0 {
			r.logger.Warn("clocks of this ingester and of a source differ: its samples would be from the future, and wait",
				"tenant", s.id.tenant, "source", fmt.Sprintf("%x", s.source), "source_is_ahead_by", ahead.Round(time.Second))
		} else {
			r.logger.Info("clocks of this ingester and of a source agree again", "tenant", s.id.tenant, "source", fmt.Sprintf("%x", s.source))
		}
	}
	s.waiting = ahead
}

// clocks says how many sessions wait for clocks, and for one how much its source
// is ahead.
func (r *receiver) clocks() (n int, ahead time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions {
		s.mu.Lock()
		if s.waiting != 0 && (s.stream != nil || time.Since(s.lastSeen) < silenceLimit) {
			n++
			ahead = s.waiting
		}
		s.mu.Unlock()
	}
	return n, ahead
}

// refuseFuture takes the samples and exemplars out of a batch that are more than
// ship.MaxFuture ahead of now. Refs are valid. What is left is in cols, and in the batch that is returned: so the
// commit log has only what was taken, and a replay refuses nothing.
func refuseFuture(b *shippb.Batch, cols *ship.Columns, refs *head.Refs, now time.Time) (*shippb.Batch, head.Refusal) {
	limit := now.Add(ship.MaxFuture).UnixMilli()
	return refuseTimes(b, cols, refs, func(t int64) bool { return t > limit })
}

// refuseTimes is refuseFuture for times that are bad.
func refuseTimes(b *shippb.Batch, cols *ship.Columns, refs *head.Refs, bad func(t int64) bool) (*shippb.Batch, head.Refusal) {
	var refused head.Refusal
	late := func(ref []uint32, ts []int64) []bool {
		if !slices.ContainsFunc(ts, bad) {
			return nil
		}
		out := make([]bool, len(ts))
		for i, t := range ts {
			if out[i] = bad(t); !out[i] {
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
	exemplars := b.Exemplars
	if slices.ContainsFunc(exemplars, func(e *shippb.Exemplar) bool { return bad(e.T) }) {
		exemplars = nil
		for _, e := range b.Exemplars {
			if !bad(e.T) {
				exemplars = append(exemplars, e)
				continue
			}
			if refused.Samples == 0 {
				refused.Example = refs.Labels(e.Ref)
			}
			refused.Samples++
		}
	}
	if refused.Samples == 0 {
		return b, refused
	}
	var enc ship.Encoder // it is rare
	return &shippb.Batch{
		Seq: b.Seq, Announce: b.Announce, Columns: enc.Encode(nil, cols), Exemplars: exemplars, Metadata: b.Metadata, Withdraw: b.Withdraw,
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

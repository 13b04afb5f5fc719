package sidecar

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// rewindState is what reading a range again needs beside the live tail's state.
type rewindState struct {
	split *split
	parts map[string]bool // by their owners
	// seen holds the sample of greatest timestamp per series within what is read
	// again, since the slot's belongs to the live tail.
	seen map[uint32]lastSample
}

type lastSample struct {
	t    int64 // ms
	kind sampleKind
}

// wants says whether a sample of what is read again is to be sent, and as what.
func (rw *rewindState) wants(i uint32, sl *slot, r resolved, t int64, kind sampleKind) (sampleKind, bool) {
	if !rw.parts[rw.split.part(r.token)] {
		return kind, false
	}
	if kind == kindNone {
		return kind, true
	}
	last, ok := rw.seen[i]
	if ok && last.t == t {
		return kind, false
	}
	if !ok {
		// What it was before the range isn't known: most likely what it is now.
		last = lastSample{noTime, sl.kind}
	}
	kind = kind.as(last.kind)
	if t > last.t {
		rw.seen[i] = lastSample{t, kind}
	}
	return kind, true
}

// roomForMore says whether something may be read beside the live tail, which
// comes first: only what the windows have room for.
func (s *shipper) roomForMore() bool {
	for _, o := range s.split.owners {
		if o.session == nil {
			continue
		}
		if st := o.session.ship.State(); 2*st.InflightBytes > st.WindowBytes {
			return false
		}
	}
	return true
}

// readAgain reads one queued Work and sends it. It returns true if there was one.
func (s *shipper) readAgain(ctx context.Context) bool {
	now := time.Now()
	if now.Before(s.nextRewind) || s.dirty || s.ledger.queued == 0 || !s.roomForMore() {
		return false
	}
	w, ok := s.take(ctx, s.ledger, 4*s.opts.RangeBytes)
	if !ok {
		return false
	}
	err := tail.ReadRange(ctx, s.files, w.From, w.To, s.logger, s.tailMetrics, func(b *tail.Batch) error {
		if len(b.Series) > 0 {
			return nil // all in the dictionary
		}
		if err := s.undecidedAgain(b); err != nil {
			return err
		}
		s.samples(ctx, b)
		return ctx.Err()
	})
	parts := s.endWork(ctx)
	s.nextRewind = now.Add(time.Duration(float64(w.To.Offset-w.From.Offset) / float64(s.opts.RewindBytesPerSecond) * float64(time.Second)))
	switch {
	case err == nil:
		s.rewindFails = 0
		if bug.Is(bug.ResentIsDone) {
			parts = nil
		}
		s.ledger.Resent(w.ID, parts, false)
	case ctx.Err() != nil:
		s.ledger.Return(w.ID)
	case errors.Is(err, errUndecided):
		s.nextRewind = now.Add(time.Second)
		s.ledger.Return(w.ID)
	case errors.Is(err, fs.ErrNotExist) || s.rewindFails >= 5:
		// What can't be read any more is read from blocks.
		s.rewindFails = 0
		s.logger.Warn("range of WAL can't be read again", "from", w.From.String(), "to", w.To.String(), "err", err)
		s.openGap("range_gone")
		s.ledger.Resent(w.ID, sentOf(parts), false)
	default:
		s.rewindFails++
		s.nextRewind = now.Add(time.Second)
		s.metrics.readErrors.Inc()
		s.once("rewind").Warn("range of WAL can't be read again, trying on", "from", w.From.String(), "to", w.To.String(), "err", err)
		s.ledger.Return(w.ID)
	}
	return true
}

// take gives out queued work of a ledger, and makes what is routed from now on
// part of it, until endWork.
func (s *shipper) take(ctx context.Context, l *Ledger, maxBytes int64) (Work, bool) {
	s.cut(ctx, s.tail.Position())
	w, ok := l.Take(maxBytes)
	if !ok || s.dirty {
		if ok {
			l.Return(w.ID)
		}
		return w, false
	}
	by := s.splits[w.Split]
	if bug.Is(bug.LatestRing) {
		by = s.split
	}
	s.rewind = &rewindState{split: by, parts: map[string]bool{}, seen: map[uint32]lastSample{}}
	for _, owners := range w.Owners {
		s.rewind.parts[owners] = true
	}
	return w, true
}

// endWork sends what is left of a work, and returns what became of all of it.
func (s *shipper) endWork(ctx context.Context) []Part {
	s.flushAll(ctx)
	parts := s.acc.parts(s.split)
	s.acc, s.rewind = &account{}, nil
	return parts
}

// sentOf takes the parts as far as they were sent.
func sentOf(parts []Part) []Part {
	for i := range parts {
		for k := range parts[i].Copies {
			parts[i].Copies[k].Lost = false
		}
	}
	return parts
}

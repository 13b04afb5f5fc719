package sidecar

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// readTail reads about one range's worth. It says whether there may be more to read
// now, and whether it has come to the end of what there is.
func (s *shipper) readTail(ctx context.Context) (more, end bool) {
	for n := int64(0); n < s.opts.RangeBytes && !s.dirty && s.fatal == nil && ctx.Err() == nil; {
		b, err := s.tail.Next()
		if errors.Is(err, io.EOF) {
			s.endRange(ctx, false)
			return false, true
		}
		if br, ok := errors.AsType[*tail.BreakError](err); ok {
			s.jumped(ctx, br)
			if br.Moved() {
				return true, false
			}
			n += br.To.Offset - br.From.Offset
			continue
		}
		if err != nil {
			s.metrics.readErrors.Inc()
			s.once("wal_read").Warn("WAL can't be read, trying on", "err", err)
			return false, false
		}
		if s.hold(b) {
			s.tail.Unread(b)
			s.endRange(ctx, true)
			return false, false
		}
		n += b.To.Offset - b.From.Offset
		s.record(ctx, b)
		s.renewClaim()
	}
	return true, false
}

// record takes a record of the live tail into the range that is being read.
func (s *shipper) record(ctx context.Context, b *tail.Batch) {
	if !b.From.SameFile(s.rangeEnd) {
		s.cut(ctx, b.From)
		s.agent = s.dir.Agent() // it may have begun only now
	}
	if !s.open {
		s.open, s.began, s.rangeSize = true, time.Now(), 0
	}
	s.rangeSize += b.To.Offset - b.From.Offset
	s.rangeEnd = b.To
	s.samples(ctx, b)
	s.endRange(ctx, true)
}

// endRange ends the range if it is large or old enough, or the split changes.
func (s *shipper) endRange(ctx context.Context, more bool) {
	switch {
	case s.dirty, s.rangeSize >= s.opts.RangeBytes, s.open && time.Since(s.began) >= s.opts.RangeAge:
		s.cut(ctx, s.tail.Position())
	case !more && !s.open && s.tail.Position() != s.rangeEnd:
		// Records that carry nothing for us, or a new and still empty segment.
		s.cut(ctx, s.tail.Position())
	}
}

// cut ends the range that is being read and enters it into the ledger. The next
// begins at next.
func (s *shipper) cut(ctx context.Context, next tail.Position) {
	if s.open {
		s.flushAll(ctx)
		s.ledger.Add(s.rangeEnd, s.split.id, s.acc.parts(s.split))
		for i := range s.acc.members {
			if s.opts.Replicas > 1 && s.acc.members[i].Lost {
				s.metrics.skipped.Inc()
			}
		}
		s.acc = &account{}
		s.open, s.rangeSize = false, 0
	}
	if next != s.rangeEnd {
		s.ledger.Skip(next)
	}
	s.rangeEnd = next
}

// jumped takes in that the tail goes on at another place, or behind a record that
// it can't read.
func (s *shipper) jumped(ctx context.Context, b *tail.BreakError) {
	if b.Moved() {
		s.cut(ctx, b.To)
	}
	if b.Kind == tail.BreakReplaced {
		if err := s.dict.fork(b.To, b.Carried); err != nil {
			s.dictionaryTrouble(err)
		}
		s.gcDone, s.gcNext = -1, -1
	}
	s.openGap(string(b.Kind))
}

// collect forgets series that Prometheus has dropped, once it has written a WAL
// checkpoint without them and no sample of theirs has to be read again. These may
// lie behind what that checkpoint stands for, up to the segment that was the last
// when it was written.
func (s *shipper) collect(ctx context.Context) {
	done := s.ledger.Checkpoint()
	s.dict.forget(done, s.releaseSlot)
	n, err := s.dir.LastCheckpoint()
	if err != nil || n <= s.gcDone || done.InCheckpoint || done.Epoch != s.tail.Position().Epoch {
		return
	}
	if n != s.gcNext {
		_, last, err := s.dir.Segments()
		if err != nil {
			return // the next time
		}
		s.gcNext, s.gcFrom = n, last
	}
	if done.Segment <= n || done.Segment < s.gcFrom {
		return
	}
	err = tail.CheckpointSeries(ctx, s.dir, n, s.logger, s.tailMetrics, func(series []record.RefSeries) {
		for i := range series {
			s.dict.touch(uint64(series[i].Ref), n)
		}
	})
	if err != nil {
		s.once("wal_checkpoint").Warn("WAL checkpoint can't be read, trying on", "err", err)
		return
	}
	gone, err := s.dict.sweep(n, s.releaseSlot)
	if err != nil {
		s.dictionaryTrouble(err)
	}
	s.gcDone = n
	s.metrics.seriesGone.Add(float64(gone))
	s.logger.Info("series gone from the WAL forgotten", "checkpoint", n, "gone", gone, "series", s.dict.count)
}

// releaseSlot withdraws a series everywhere before its slot is used for another.
func (s *shipper) releaseSlot(i uint32) {
	sl := s.dict.at(i)
	s.withdraw(i, sl)
	for _, v := range s.versions.list {
		key := extraKey{i, v.id}
		delete(s.others, key)
		for _, ss := range s.sessions {
			if ss == nil {
				continue
			}
			if ref, ok := ss.extra[key]; ok {
				ss.drop(ref)
				delete(ss.extra, key)
			}
		}
	}
}

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
	split   *split
	members map[string]bool
	// seen holds the sample of greatest timestamp per series within what is read
	// again, since the slot's belongs to the live tail.
	seen map[uint32]lastSample
	// other holds what a series is under a label version that isn't its slot's.
	other map[extraKey]resolved
}

type lastSample struct {
	t    int64 // ms
	kind sampleKind
}

type resolved struct {
	token uint32
	drop  dropReason
}

// extraKey names a series under a label version that isn't the one in its slot.
type extraKey struct {
	slot    uint32
	version uint16
}

// readAgain reads one queued Work and sends it. It returns true if there was one.
func (s *shipper) readAgain(ctx context.Context) bool {
	now := time.Now()
	if now.Before(s.nextRewind) || s.dirty || s.ledger.queued == 0 {
		return false
	}
	for _, o := range s.split.owners {
		if o.session == nil {
			continue
		}
		// The live tail comes first: only what the windows have room for.
		if st := o.session.ship.State(); 2*st.InflightBytes > st.WindowBytes {
			return false
		}
	}
	s.cut(ctx, s.tail.Position())
	w, ok := s.ledger.Take(4 * s.opts.RangeBytes)
	if !ok || s.dirty {
		if ok {
			s.ledger.Return(w.ID)
		}
		return false
	}
	by := s.splits[w.Split]
	if bug.Is(bug.LatestRing) {
		by = s.split
	}
	s.rewind = &rewindState{split: by, members: map[string]bool{}, seen: map[uint32]lastSample{}, other: map[extraKey]resolved{}}
	for _, m := range w.Members {
		s.rewind.members[m] = true
	}
	var err error
	if w.From.Epoch != s.tail.Position().Epoch {
		err = fs.ErrNotExist // of a log that has been replaced
	} else {
		err = tail.ReadRange(ctx, s.dir, w.From, w.To, s.logger, s.tailMetrics, func(b *tail.Batch) error {
			if len(b.Series) > 0 {
				return nil // all in the dictionary
			}
			s.version = s.versions.at(b.From)
			s.samples(ctx, b)
			return ctx.Err()
		})
		s.flushAll(ctx)
	}
	sent, lost := s.acc.all()
	s.acc, s.rewind = &account{}, nil
	s.nextRewind = now.Add(time.Duration(float64(w.To.Offset-w.From.Offset) / float64(s.opts.RewindBytesPerSecond) * float64(time.Second)))
	switch {
	case err == nil:
		s.rewindFails = 0
		if bug.Is(bug.ResentIsDone) {
			sent = nil
		}
		s.ledger.Resent(w.ID, sent, lost)
	case ctx.Err() != nil:
		s.ledger.Return(w.ID)
	case errors.Is(err, fs.ErrNotExist) || s.rewindFails >= 5:
		s.rewindFails = 0
		s.metrics.rangesLost.Inc()
		s.logger.Warn("range of WAL to be sent again is gone", "from", w.From.String(), "to", w.To.String(), "err", err)
		s.ledger.Resent(w.ID, sent, false)
	default:
		s.rewindFails++
		s.nextRewind = now.Add(time.Second)
		s.metrics.readErrors.Inc()
		s.once("rewind").Warn("range of WAL can't be read again, trying on", "from", w.From.String(), "to", w.To.String(), "err", err)
		s.ledger.Return(w.ID)
	}
	return true
}

// routeAgain is route for a range that is read again.
func (s *shipper) routeAgain(ctx context.Context, i uint32, sl *slot, t int64, kind sampleKind) (*session, uint32, sampleKind) {
	rw := s.rewind
	var r resolved
	own := sl.version == s.version.id
	if own {
		r = resolved{sl.token, sl.drop}
	} else {
		key := extraKey{i, s.version.id}
		var ok bool
		if r, ok = rw.other[key]; !ok {
			raw, err := s.dict.labels(i)
			if err != nil {
				s.dictionaryTrouble(err)
				return nil, 0, 0
			}
			_, r.token, r.drop = s.version.apply(raw)
			rw.other[key] = r
		}
	}
	if r.drop != dropNot {
		return nil, 0, 0
	}
	if m, ok := rw.split.member(r.token); !ok || !rw.members[m.ID] {
		return nil, 0, 0
	}
	if kind != kindNone {
		last, ok := rw.seen[i]
		if ok && last.t == t {
			return nil, 0, 0
		}
		if !ok {
			// What it was before the range isn't known: most likely what it is now.
			last = lastSample{noTime, sl.kind}
		}
		kind = kind.as(last.kind)
		if t > last.t {
			rw.seen[i] = lastSample{t, kind}
		}
	}
	var o *owner
	if own {
		o = s.ownerOf(sl)
	} else {
		m, _ := s.split.member(r.token)
		o = s.split.owners[s.split.index[m.ID]]
	}
	ss := s.sessionOf(ctx, o)
	if ss == nil {
		s.acc.lost(o.member.ID)
		return nil, 0, 0
	}
	if own {
		if sl.session != ss.index && !s.announce(i, sl, ss) {
			return nil, 0, 0
		}
		return ss, sl.ref, kind
	}
	key := extraKey{i, s.version.id}
	ref, ok := ss.extra[key]
	if !ok {
		raw, err := s.dict.labels(i)
		if err != nil {
			s.dictionaryTrouble(err)
			return nil, 0, 0
		}
		ls, _, _ := s.version.apply(raw)
		ref = ss.say(ls)
		ss.extra[key] = ref
	}
	return ss, ref, kind
}

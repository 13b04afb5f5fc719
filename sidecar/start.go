package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// start finds out where to begin.
func (s *shipper) start(ctx context.Context) error {
	pos, err := s.startPosition(ctx)
	if err != nil {
		return err
	}
	s.agent = s.dir.Agent()
	if s.dict.mark.Before(pos) && s.cp.Position != nil {
		if err := s.rebuild(ctx, pos); err != nil {
			return err
		}
	}
	s.files.Release(pos)
	s.ledger = NewLedger(pos)
	s.tail = tail.New(s.files, pos, s.logger, s.tailMetrics)
	s.rangeEnd = pos
	s.logger.Info("tailing WAL", "segment", pos.Segment, "offset", pos.Offset, "position", pos.String(), "agent", s.agent, "series", s.dict.count)
	return nil
}

// startPosition is where to go on: at the checkpoint, if the log is still the
// one that was read before; otherwise in a new epoch.
func (s *shipper) startPosition(ctx context.Context) (tail.Position, error) {
	epoch := s.dict.mark.Epoch
	if p := s.cp.Position; p != nil {
		epoch = max(epoch, p.Epoch, s.cp.Epoch)
		s.files.DropFrom(epoch + 1)
		pos, carried, err := *p, true, error(nil)
		if epoch == p.Epoch {
			pos, carried, err = s.files.Verify(*p, s.cp.Files)
		} else {
			// What came after the checkpoint was another log already: which part
			// of it is in common isn't remembered.
			err = tail.ErrDifferent
		}
		switch {
		case err == nil && pos.Epoch == p.Epoch:
			return pos, nil
		case err == nil:
			s.logger.Warn("WAL was rewritten since it was read", "checkpoint", p.String(), "next", pos.String())
			s.tailMetrics.Replaced()
			s.openGap(string(tail.BreakReplaced))
			return pos, s.dict.fork(pos, carried)
		case !errors.Is(err, tail.ErrDifferent):
			return *p, fmt.Errorf("compare WAL with what it was: %w", err)
		}
		s.logger.Warn("WAL is another than the one read before, reading it from its start", "checkpoint", p.String())
		s.tailMetrics.Replaced()
		s.openGap(string(tail.BreakReplaced))
		epoch++
	} else {
		s.files.DropFrom(0)
		if s.dict.count > 0 {
			epoch++ // the dictionary is of a log that isn't known any more
		}
	}
	warned := false
	for {
		pos, err := s.dir.Start(epoch)
		switch {
		case err == nil && epoch > 0:
			return pos, s.dict.fork(pos, false)
		case !errors.Is(err, tail.ErrNoWAL):
			return pos, err
		}
		if !warned {
			warned = true
			s.logger.Info("waiting for Prometheus to begin its WAL", "dir", s.dir.WAL())
		}
		if sleep(ctx, time.Second); ctx.Err() != nil {
			return pos, ctx.Err()
		}
	}
}

// rebuild reads the series before pos, which the dictionary doesn't know.
func (s *shipper) rebuild(ctx context.Context, pos tail.Position) error {
	from, err := s.dir.Start(pos.Epoch)
	if err != nil {
		return err
	}
	s.logger.Info("rebuilding the dictionary from the WAL", "from", from.String(), "to", pos.String())
	t := tail.New(s.files, from, s.logger, s.tailMetrics)
	t.SeriesOnly()
	for tries := 0; tries < 5 && t.Position().Before(pos); {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b, err := t.Next()
		var br *tail.BreakError
		if errors.Is(err, io.EOF) || errors.As(err, &br) {
			tries++
			continue
		}
		if err != nil {
			return fmt.Errorf("rebuild dictionary: %w", err)
		}
		for i := range b.Series {
			if _, _, err := s.dict.define(uint64(b.Series[i].Ref), b.Series[i].Labels, b.From); err != nil {
				return err
			}
		}
	}
	return nil
}

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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
	s.resumeAt = pos
	if pos.Before(s.dict.mark) && pos.Epoch == s.dict.mark.Epoch {
		s.resumeAt = s.dict.mark
	}
	if s.dict.mark.Before(pos) && s.cp.Position != nil {
		if err := s.rebuild(ctx, pos); err != nil {
			return err
		}
	}
	s.ledger = NewLedger(pos)
	s.tail = tail.New(s.dir, pos, s.logger, s.tailMetrics)
	s.rangeEnd = pos
	s.logger.Info("tailing WAL", "segment", pos.Segment, "offset", pos.Offset, "position", pos.String(), "agent", s.agent, "series", s.dict.count)
	return nil
}

func (s *shipper) startPosition(ctx context.Context) (tail.Position, error) {
	epoch := uint32(0)
	if p := s.cp.Position; p != nil {
		info, err := os.Stat(s.dir.File(*p))
		switch {
		case p.InCheckpoint, errors.Is(err, fs.ErrNotExist):
			return *p, nil // if it is gone, the tail sees to it
		case err != nil:
			return *p, fmt.Errorf("segment of the checkpoint: %w", err)
		case info.Size() >= p.Offset && (s.cp.Inode == 0 || s.cp.Inode == inode(s.dir.File(*p))):
			return *p, nil
		}
		s.logger.Warn("WAL is another than the one read before, reading it from its start", "segment", p.Segment, "offset", p.Offset)
		epoch = p.Epoch + 1
		s.dict.newEpoch()
	}
	warned := false
	for {
		pos, err := s.dir.Start(epoch)
		if !errors.Is(err, tail.ErrNoWAL) {
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
	t := tail.New(s.dir, from, s.logger, s.tailMetrics)
	defer t.Close()
	t.SeriesOnly()
	for tries := 0; tries < 5 && t.Position().Before(pos); {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b, err := t.Next()
		if errors.Is(err, io.EOF) {
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

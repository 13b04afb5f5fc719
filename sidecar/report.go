package sidecar

import (
	"time"
)

// report publishes metrics and the status.
func (s *shipper) report(now time.Time) {
	m := s.metrics
	s.agent = s.dir.Agent()
	st := Status{
		Position: s.tail.Position(), Checkpoint: s.ledger.Checkpoint(), Series: s.dict.count, DictionaryBytes: s.dict.size,
		Agent: s.agent, Time: now, Replicas: s.opts.Replicas, Copies: 1,
	}
	if n, err := s.dir.Size(st.Position); err == nil {
		st.LagBytes = n
	}
	if s.newestT > 0 {
		st.NewestSample = time.UnixMilli(s.newestT)
		s.lagMS.Store(max(0, now.UnixMilli()-s.newestT))
		m.newest.Set(float64(s.newestT) / 1000)
	}
	s.ledgers(func(l *Ledger) {
		n := l.Stats()
		st.OpenRanges += n.Open
		st.QueuedRanges += n.Queued
	})
	s.queue.Store(uint32(st.QueuedRanges))
	s.declare()
	if c := s.coverage.Load(); c != nil {
		st.Copies = int(c.Copies)
	}
	m.copies.Set(float64(st.Copies))
	st.KeptBytes = s.files.Stats().Deleted
	if g := s.blocks.gap; g != nil {
		st.Gap = &GapStatus{Reason: g.Reason, Since: g.Since, Newest: time.UnixMilli(g.Newest)}
	}
	for _, f := range s.blocks.fills {
		x := FillStatus{Block: f.block.ULID.String(), Reason: f.reason, Samples: f.block.NumSamples, MinTime: time.UnixMilli(f.block.MinTime), MaxTime: time.UnixMilli(f.block.MaxTime)}
		if f.reader != nil {
			x.Read = f.reader.Progress().Samples
		}
		st.Fills = append(st.Fills, x)
	}
	if s.split != nil {
		st.Ring = s.ring.Version()
	}
	if v := s.versions.present; v != nil {
		st.LabelsKnown, st.ExternalLabels = true, v.external
	}
	var inflight int64
	var detached int
	for _, ss := range s.sessions {
		if ss == nil {
			continue
		}
		x := ss.ship.State()
		inflight += x.InflightBytes
		st.Sessions = append(st.Sessions, SessionStatus{
			Owner: ss.owner.member.ID, Address: ss.owner.member.Address, Connected: x.Connected, Detached: ss.owner.detached,
			Sent: x.Sent, Received: x.Received, Durable: x.Durable, InflightBytes: x.InflightBytes, LastAnswer: x.LastAnswer, Began: ss.began,
		})
	}
	for _, o := range s.owners {
		if o.detached {
			detached++
		}
	}
	m.lagBytes.Set(float64(st.LagBytes))
	m.series.Set(float64(st.Series))
	m.dictionary.Set(float64(st.DictionaryBytes))
	m.segment.Set(float64(st.Position.Segment))
	m.held.Set(float64(st.Checkpoint.Segment))
	m.rangesOpen.Set(float64(st.OpenRanges))
	m.rangesQueued.Set(float64(st.QueuedRanges))
	m.blocksQueued.Set(float64(len(st.Fills)))
	m.gapOpen.Set(0)
	if st.Gap != nil {
		m.gapOpen.Set(1)
	}
	kept := s.files.Stats()
	m.keptFiles.Set(float64(kept.Files))
	m.keptBytes.Set(float64(kept.Deleted))
	m.sessions.Set(float64(len(st.Sessions)))
	m.inflight.Set(float64(inflight))
	m.detached.Set(float64(detached))
	s.publish(st)
}

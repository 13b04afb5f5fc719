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
	s.queue.Store(uint32(s.openRewinds(st.QueuedRanges)))
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
	st.LabelsError = s.choosing.lack
	m.chosen.Set(1)
	if v := s.versions.present; v != nil {
		st.LabelsKnown, st.ExternalLabels = true, v.external
		if v.replica != "" {
			r := &ReplicaStatus{Name: v.replica, Chosen: s.claimsOf(v).chosen(v.replica)}
			if err := s.choosing.claimer.lastError(); err != nil {
				r.Error = err.Error()
			}
			if st.Replica = r; !r.Chosen {
				m.chosen.Set(0)
			}
		}
	}
	m.heldBack.Set(0)
	if since := s.choosing.since; !since.IsZero() {
		st.HeldSince = &since
		m.heldBack.Set(now.Sub(since).Seconds())
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
	m.keptDropped.Add(float64(kept.Dropped - s.keptDropped))
	s.keptDropped = kept.Dropped
	m.sessions.Set(float64(len(st.Sessions)))
	m.inflight.Set(float64(inflight))
	m.detached.Set(float64(detached))
	s.note(&st, now)
	s.publish(st)
}

// openRewinds is what ingesters are told of ranges that are sent again, given how
// many are queued: the last one is open until all that was sent is received, since
// queries see it only then.
func (s *shipper) openRewinds(queued int) int {
	if queued > 0 {
		s.rewinding, s.resent = true, nil
		return queued
	}
	if !s.rewinding {
		return 0
	}
	if s.resent == nil {
		s.resent = map[SessionID]uint64{}
		for _, ss := range s.sessions {
			if ss != nil {
				s.resent[ss.id] = ss.last
			}
		}
	}
	for _, ss := range s.sessions {
		if ss != nil && ss.received < s.resent[ss.id] {
			return 1
		}
	}
	s.rewinding, s.resent = false, nil
	return 0
}

// lagNoted is from how many bytes of unread WAL on a sidecar is said to be behind.
const lagNoted = 32 << 20

// note says what is degraded.
func (s *shipper) note(st *Status, now time.Time) {
	h := s.health
	_, ringErr := s.ringWatch.present()
	h.Note("ring", ringErr != nil, "the ring can't be had from a gateway, the one known last is used: %v", ringErr)
	h.Note("split", s.split == nil, "there is no active ingester to send to: samples wait in the WAL")
	labelsErr := s.external.lastError()
	h.Note("labels", labelsErr != nil, "the external labels of Prometheus can't be had, those known last are used: %v", labelsErr)
	for id, o := range s.owners {
		var broke error
		if ss := o.session; ss != nil && now.Sub(ss.progress) > s.opts.DetachAfter {
			broke = ss.ship.State().Broke
		}
		switch {
		case o.detached && broke != nil:
			h.Note("owner "+id, true, "ingester %s takes nothing, its series go to others: %v", id, broke)
		case o.detached:
			h.Note("owner "+id, true, "ingester %s is slow or out of reach: its series go to others", id)
		default:
			h.Note("owner "+id, broke != nil, "ingester %s takes nothing, samples wait in the WAL: %v", id, broke)
		}
	}
	if c := s.choosing.claimer; c != nil {
		rival := c.rivalSource()
		h.Note("rival", rival != "", "another sidecar, of source %s, claims by this replica's name: samples are doubled, give each Prometheus a replica label of its own", rival)
	}
	h.Note("replica", s.choosing.lack != "", "%s", s.choosing.lack)
	if r := st.Replica; r != nil {
		h.Note("chosen", r.Error != "", "which replica is chosen can't be asked for: %s", r.Error)
	}
	h.Note("held", st.HeldSince != nil && now.Sub(*st.HeldSince) > 2*s.opts.Lease, "samples wait in the WAL: it isn't known which replica is chosen")
	h.Note("lag", st.LagBytes > lagNoted, "%d bytes of WAL are not read yet", st.LagBytes)
	h.Note("again", st.QueuedRanges > 0, "%d ranges are being read and sent again because an ingester lost them", st.QueuedRanges)
	gap := ""
	if st.Gap != nil {
		gap = st.Gap.Reason
	}
	h.Note("gap", st.Gap != nil, "samples of the WAL may not have been read (%s): they come from Prometheus's blocks, as it writes them", gap)
	h.Note("dropped", s.files.Stats().Dropped > 0, "WAL that Prometheus deleted was let go beyond keep_wal_bytes: it comes from blocks")
}

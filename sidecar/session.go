package sidecar

import (
	"context"
	"math"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// link is the network side of a session; see ship.Session for the contract.
type link interface {
	TrySend(*shippb.Batch) (seq uint64, ok bool)
	State() ship.SessionState
	Run(context.Context) error
	Beat()
}

// session is one session with an owner, with the batch that is being filled.
type session struct {
	id     SessionID
	index  uint16 // in slots
	owner  *owner
	ship   link
	cancel context.CancelFunc

	cols      ship.Columns
	announce  []*shippb.Series
	withdraw  []uint32
	exemplars []*shippb.Exemplar
	metadata  []*shippb.Metadata
	bytes     int // about the encoded size of all of these

	nextRef uint32
	free    []uint32 // withdrawn refs that may be used anew
	extra   map[extraKey]uint32

	told bool // it carried metadata that came from Prometheus's API

	// stuck is a batch that found no room when its owner was detached. It is
	// sent, if ever, before anything else: it holds announcements.
	stuck *shippb.Batch
	// counted says that what is in the batch being filled, of a detached owner,
	// has been entered as lost.
	counted bool
	// abandoned says that the ledger doesn't wait any more for what was not
	// received when its owner, off the ring, got out of reach.
	abandoned bool

	// With several replicas: its copies count for queries.
	current bool
	process []byte // of the ingester, valid with current

	last     uint64 // sequence number of the last batch
	durable  uint64
	received uint64
	progress time.Time // when received last grew, or nothing was in flight
	began    time.Time
}

// batchBytes is at what size, about, a batch is sent. The protocol's limit is 1 MiB
// as encoded, and an ingester takes no message of more than 4 MiB, however often it
// is sent. So all that goes into a batch as a whole has a bound: labels
// (maxLabelsBytes), metadata (maxFamilyEntryBytes, maxFamilyEntries), and these.
const (
	batchBytes = 256 << 10
	// Of a histogram, buckets and what else there is a number of: of 10 bytes each,
	// at most.
	maxHistogramParts = 20_000
	// Of an exemplar's labels. Prometheus takes 128 characters.
	maxExemplarBytes = 4 << 10
	// In one batch. What is more goes with the next.
	maxWithdrawals  = 32_000
	withdrawalBytes = 4 // about
)

func histogramParts(h *histogram.Histogram) int {
	return len(h.PositiveSpans) + len(h.NegativeSpans) + len(h.PositiveBuckets) + len(h.NegativeBuckets) + len(h.CustomValues)
}

func floatHistogramParts(h *histogram.FloatHistogram) int {
	return len(h.PositiveSpans) + len(h.NegativeSpans) + len(h.PositiveBuckets) + len(h.NegativeBuckets) + len(h.CustomValues)
}

// newRef returns a ref for a series to be announced.
func (ss *session) newRef() uint32 {
	if n := len(ss.free); n > 0 {
		r := ss.free[n-1]
		ss.free = ss.free[:n-1]
		return r
	}
	ss.nextRef++
	return ss.nextRef - 1
}

// say announces labels and returns their ref.
func (ss *session) say(ls labels.Labels) uint32 {
	p := &shippb.Series{Ref: ss.newRef(), Labels: pairs(ls)}
	ss.announce = append(ss.announce, p)
	ss.bytes += int(ls.ByteSize()) + 16
	return p.Ref
}

func (ss *session) drop(ref uint32) {
	ss.withdraw = append(ss.withdraw, ref)
	ss.bytes += withdrawalBytes
}

func (ss *session) float(ref uint32, st, t int64, v float64) {
	c := &ss.cols.Floats
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.V = append(c.Ref, ref), append(c.T, t), append(c.V, v)
	ss.bytes += 12
}

func (ss *session) histogram(ref uint32, st, t int64, h *histogram.Histogram) {
	c := &ss.cols.Histograms
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.H = append(c.Ref, ref), append(c.T, t), append(c.H, h)
	ss.bytes += 40 + 4*(len(h.PositiveSpans)+len(h.NegativeSpans)+len(h.PositiveBuckets)+len(h.NegativeBuckets)) + 8*len(h.CustomValues)
}

func (ss *session) floatHistogram(ref uint32, st, t int64, h *histogram.FloatHistogram) {
	c := &ss.cols.FloatHistograms
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.H = append(c.Ref, ref), append(c.T, t), append(c.H, h)
	ss.bytes += 48 + 4*(len(h.PositiveSpans)+len(h.NegativeSpans)) + 8*(len(h.PositiveBuckets)+len(h.NegativeBuckets)+len(h.CustomValues))
}

// startTimes appends to a column that stays nil while no sample has one.
func startTimes(col []int64, n int, st int64) []int64 {
	switch {
	case len(col) > 0:
		return append(col, st)
	case st == 0:
		return col[:0]
	}
	for range n {
		col = append(col, 0)
	}
	return append(col, st)
}

func (ss *session) exemplar(e *shippb.Exemplar) {
	ss.exemplars = append(ss.exemplars, e)
	ss.bytes += proto.Size(e) + 4
}

func (ss *session) describe(ref uint32, family string, m metadata.Metadata) {
	p := &shippb.Metadata{Ref: ref, Family: family, Type: string(m.Type), Unit: m.Unit, Help: m.Help}
	ss.metadata = append(ss.metadata, p)
	ss.bytes += proto.Size(p) + 4
}

func pairs(ls labels.Labels) []string {
	out := make([]string, 0, 2*ls.Len())
	ls.Range(func(l labels.Label) { out = append(out, l.Name, l.Value) })
	return out
}

// full says whether the batch being filled holds anything but withdrawals.
func (ss *session) full() bool {
	return ss.cols.Len() > 0 || len(ss.announce) > 0 || len(ss.exemplars) > 0 || len(ss.metadata) > 0
}

// take returns the batch being filled and begins another.
func (ss *session) take(enc *ship.Encoder) *shippb.Batch {
	n := min(len(ss.withdraw), maxWithdrawals)
	b := &shippb.Batch{
		Announce: ss.announce, Withdraw: ss.withdraw[:n:n], Columns: enc.Encode(nil, &ss.cols),
		Exemplars: ss.exemplars, Metadata: ss.metadata,
	}
	ss.free = append(ss.free, b.Withdraw...)
	ss.cols.Reset()
	ss.announce, ss.exemplars, ss.metadata = nil, nil, nil
	ss.withdraw = ss.withdraw[n:]
	ss.bytes = withdrawalBytes * len(ss.withdraw)
	return b
}

// lostAfter is for how many times DetachAfter a lost ingester is waited for: long
// enough for one that restarts and has its commit log.
const lostAfter = 3

// sessionOf returns the session with an owner, and waits if none can be had at
// once. It returns nil if the owner is, or gets, detached.
func (s *shipper) sessionOf(ctx context.Context, o *owner) *session {
	if o.session != nil && !o.detached {
		return o.session
	}
	for began := time.Now(); ; {
		if o.detached || ctx.Err() != nil {
			return nil
		}
		if s.ensureSession(ctx, o); o.session != nil {
			return o.session
		}
		if time.Since(began) > s.opts.DetachAfter && s.canDetach(o) {
			s.detach(o, "no session can be had")
			return nil
		}
		s.await(ctx)
	}
}

// ensureSession begins a session with an owner that has none, unless the last
// one ended just now.
func (s *shipper) ensureSession(ctx context.Context, o *owner) {
	now := time.Now()
	if o.session != nil || now.Before(o.retryAt) {
		return
	}
	s.lastSession++
	ss := &session{id: s.lastSession, owner: o, extra: map[extraKey]uint32{}, progress: now, began: now}
	index := 0
	for i := 1; i < len(s.sessions) && index == 0; i++ {
		if s.sessions[i] == nil {
			index = i
		}
	}
	if index == 0 {
		if len(s.sessions) > math.MaxUint16 {
			return
		}
		index = len(s.sessions)
		s.sessions = append(s.sessions, nil)
	}
	ss.index = uint16(index)
	s.sessions[index] = ss
	o.session = ss
	ss.ship = s.connect(o.member)
	s.ledgers(func(l *Ledger) { l.Begin(ss.id) })
	// run ends it, after all else.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ss.cancel = cancel
	s.group.Go(func() error {
		_ = ss.ship.Run(ctx) // its end shows in its state
		return nil
	})
}

// dial is the usual connect.
func (s *shipper) dial(m ring.Member) link {
	id := s.lastSession // it is for the one that was just made
	logger := s.logger.With("owner", m.ID)
	return ship.NewSession(ship.SessionOptions{
		Address: m.Address, Tenant: s.opts.Tenant, Source: s.source, Client: s.opts.Version,
		DialOptions: s.opts.DialOptions, GiveUp: s.opts.GiveUp,
		Heartbeat: func() *shippb.Heartbeat {
			return &shippb.Heartbeat{LagMs: s.lagMS.Load(), OpenRewinds: s.queue.Load(), Coverage: s.declared()}
		},
		Notify: s.notify,
		Refused: func(r *shippb.Refused) {
			s.refused(id, r.Seq)
			s.metrics.refuse(r.Reason, r.Samples)
			logger.Debug("ingester refused samples", "reason", r.Reason, "samples", r.Samples, "example", r.Example)
		},
	}, logger)
}

// announce makes a series known in a session.
func (s *shipper) announce(i uint32, sl *slot, ss *session) bool {
	return s.announceAt(i, sl, ss, &sl.session, &sl.ref)
}

// announceAt is announce for the replica that at and ref are of.
func (s *shipper) announceAt(i uint32, sl *slot, ss *session, at *uint16, ref *uint32) bool {
	raw, err := s.dict.labels(i)
	if err != nil {
		s.dictionaryTrouble(err)
		return false
	}
	v := s.version
	ls, _, _ := v.apply(raw)
	if *at != 0 {
		s.sessions[*at].drop(*ref)
	}
	*at, *ref = ss.index, ss.say(ls)
	if sl.metadata != 0 {
		if m, err := s.dict.metadata(i); err == nil {
			s.describeWAL(ss, *ref, raw.Get(model.MetricNameLabel), metadataOf(m))
		}
	}
	return true
}

func (s *shipper) flushIfFull(ctx context.Context, ss *session) {
	if ss.bytes >= batchBytes {
		s.flush(ctx, ss)
	}
}

func (s *shipper) flushAll(ctx context.Context) {
	for i := 1; i < len(s.sessions); i++ {
		if ss := s.sessions[i]; ss != nil && ss.full() {
			s.flush(ctx, ss)
		}
	}
}

// flush sends the batch that is being filled, and waits for room in the window.
// If there is none in time the owner is detached and the part lost.
func (s *shipper) flush(ctx context.Context, ss *session) {
	if s.opts.Replicas > 1 {
		s.flushCopy(ctx, ss)
		return
	}
	member := ss.owner.member.ID
	if s.owns(ss.owner) && !s.sendStuck(ctx, ss) {
		s.acc.lost(member)
		ss.counted = true
		return
	}
	if ss.owner.detached || ss.stuck != nil {
		// It stays: it may hold announcements that later batches rely on. An
		// owner that is left out gets nothing new: what is there is entered once.
		if !ss.counted {
			ss.counted = true
			s.acc.lost(member)
		}
		return
	}
	b := ss.take(&s.enc)
	for began := time.Now(); ; {
		if seq, ok := ss.ship.TrySend(b); ok {
			ss.last = seq
			s.acc.sent(member, ss.id, seq)
			s.metrics.batches.Inc()
			s.metrics.shippedBytes.Add(float64(proto.Size(b)))
			return
		}
		if s.sessions[ss.index] != ss {
			s.acc.lost(member) // it has ended
			return
		}
		if ctx.Err() != nil {
			ss.stuck, ss.counted = b, true
			s.acc.lost(member)
			return
		}
		if !ss.owner.detached && time.Since(began) > s.opts.DetachAfter && s.canDetach(ss.owner) {
			s.detach(ss.owner, "its window stays full")
		}
		if ss.owner.detached {
			ss.stuck, ss.counted = b, true
			s.acc.lost(member)
			return
		}
		s.await(ctx)
	}
}

// sendStuck sends the batch that goes before all others to an owner that gets
// samples, and waits for room as flush does. It is false if the batch couldn't be
// sent: then nothing can, and each range that has samples for the owner, this one
// too, must be read again.
func (s *shipper) sendStuck(ctx context.Context, ss *session) bool {
	for began := time.Now(); ss.stuck != nil; {
		if seq, ok := ss.ship.TrySend(ss.stuck); ok {
			ss.stuck, ss.last = nil, seq
			return true
		}
		if s.sessions[ss.index] != ss || ss.owner.detached || ctx.Err() != nil {
			return false
		}
		if time.Since(began) > s.opts.DetachAfter && s.canDetach(ss.owner) {
			s.detach(ss.owner, "its window stays full")
			return false
		}
		s.await(ctx)
	}
	return true
}

// await waits, in the middle of a record, for news of sessions and takes them in.
func (s *shipper) await(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-s.wake:
	case <-time.After(20 * time.Millisecond):
	}
	s.pump()
	s.tend(ctx)
}

// pump takes in what sessions and owners came to.
func (s *shipper) pump() {
	now := time.Now()
	for i := 1; i < len(s.sessions); i++ {
		ss := s.sessions[i]
		if ss == nil {
			continue
		}
		st := ss.ship.State()
		s.takeRefusals()
		if st.Durable > ss.durable {
			ss.durable = st.Durable
			s.ledgers(func(l *Ledger) { l.Durable(ss.id, st.Durable) })
		}
		if st.Ended != nil {
			s.endSession(ss, st.Ended)
			continue
		}
		if st.Received > ss.received || st.InflightBytes == 0 {
			ss.received, ss.progress = st.Received, now
			ss.owner.backoff = 0
		}
		o := ss.owner
		if s.opts.Replicas > 1 {
			s.tendCopy(ss, &st, now)
		}
		switch {
		case o.detached:
			if ss.stuck != nil {
				if seq, ok := ss.ship.TrySend(ss.stuck); ok {
					ss.stuck, ss.last = nil, seq
				}
			}
			if !st.Connected || ss.stuck != nil || 2*st.InflightBytes > st.WindowBytes {
				o.calmSince = time.Time{}
			} else if o.calmSince.IsZero() {
				o.calmSince = now
			}
		case !s.owns(o):
			// Not on the ring, or leaving it: it gets nothing new, and what it
			// has received it may yet make durable. One that is lost for others
			// too, and hasn't come back soon, will not.
			if !st.Connected && now.Sub(st.LastAnswer) > lostAfter*s.opts.DetachAfter && s.isLost(o.member.ID) {
				ss.cancel()
			}
			if !ss.abandoned && !st.Connected && now.Sub(st.LastAnswer) > s.opts.DetachAfter {
				ss.abandoned = true
				s.ledgers(func(l *Ledger) { l.Detach(ss.id, ss.received) })
			}
		case !st.Connected && now.Sub(st.LastAnswer) > s.opts.DetachAfter && s.canDetach(o):
			s.detach(o, "it is out of reach")
		case now.Sub(ss.progress) > 2*s.opts.DetachAfter && s.canDetach(o):
			s.detach(o, "it has received nothing for a while")
		}
	}
	if s.acc.changed {
		s.acc.changed, s.coverageDue = false, true
	}
	if s.coverageDue {
		s.declare()
	}
}

// endSession takes in that a session has ended for good.
func (s *shipper) endSession(ss *session, err error) {
	ss.cancel()
	o := ss.owner
	if ss.durable < ss.last {
		s.metrics.sessionsEnded.Inc()
		s.logger.Info("session with ingester ended, sending again what isn't durable", "owner", o.member.ID, "batches", ss.last-ss.durable, "err", err)
	} else {
		s.logger.Debug("session with ingester ended", "owner", o.member.ID, "err", err)
	}
	if ss.full() {
		s.acc.lost(o.member.ID)
	}
	s.ledgers(func(l *Ledger) { l.End(ss.id) })
	s.sessions[ss.index] = nil
	o.session = nil
	s.dict.all(func(_ uint32, sl *slot) {
		if sl.session == ss.index {
			sl.session = 0
		}
	})
	s.dict.allPlaces(func(p *place) {
		if p.session == ss.index {
			p.session = 0
		}
	})
	s.coverageDue = true
	if ss.told {
		s.families.forget()
	}
	o.calmSince = time.Time{}
	if ss.last > 0 && ss.received > 0 {
		o.backoff = 0
	}
	o.retryAt = time.Now().Add(o.backoff)
	o.backoff = min(max(2*o.backoff, 100*time.Millisecond), 10*time.Second)
}

// endIdle closes the sessions with members that are not on the ring any more, or
// leave it, once nothing of them is waited for, and sends withdrawals that found
// no batch to go with.
func (s *shipper) endIdle() {
	for i := 1; i < len(s.sessions); i++ {
		ss := s.sessions[i]
		if ss == nil || s.split == nil {
			continue
		}
		if !s.owns(ss.owner) && !ss.owner.detached && (!ss.full() || ss.counted) && ss.durable == ss.last {
			ss.cancel()
			continue
		}
		if len(ss.withdraw) > 0 && !ss.full() && ss.stuck == nil {
			b := ss.take(&s.enc)
			if seq, ok := ss.ship.TrySend(b); ok {
				ss.last = seq
			} else {
				ss.stuck = b
			}
		}
		if ss.stuck != nil && !ss.owner.detached {
			if seq, ok := ss.ship.TrySend(ss.stuck); ok {
				ss.stuck, ss.last, ss.counted = nil, seq, false
			}
		}
	}
	for id, o := range s.owners {
		if o.session == nil && (!s.onRing(id)) {
			s.health.Note("owner "+id, false, "")
			delete(s.owners, id)
		}
	}
}

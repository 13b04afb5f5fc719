package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/record"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// shipper reads the WAL and sends it. One goroutine runs it and owns all of it,
// but for what says otherwise.
type shipper struct {
	opts        Options
	logger      *slog.Logger
	metrics     *metrics
	tailMetrics *tail.Metrics
	dir         *tail.Dir
	source      [16]byte
	dict        *dictionary
	cp          *checkpoint
	versions    *labelVersions
	ringWatch   *ringWatch
	external    *externalLabels
	publish     func(Status)           // called from time to time
	connect     func(ring.Member) link // makes a session's network side

	wake  chan struct{} // cap 1; written to by all goroutines
	group *errgroup.Group
	lagMS atomic.Int64 // read by sessions for heartbeats
	queue atomic.Uint32

	ledger   *Ledger
	tail     *tail.Tail
	enc      ship.Encoder
	agent    bool
	resumeAt tail.Position // up to where the WAL was read before this start

	// The range that is being read: since ledger's end, up to rangeEnd.
	open      bool
	rangeEnd  tail.Position
	rangeSize int64
	began     time.Time
	acc       *account
	version   *labelVersion // in force for the record at hand

	ring      *ring.Ring // what split was made of
	split     *split
	splits    map[SplitID]*split
	dirty     bool // split has to be made anew
	lastSplit SplitID

	owners      map[string]*owner // by member id
	sessions    []*session        // by index; [0] is nil
	lastSession SessionID

	rewind      *rewindState // non-nil while a Work is being read
	nextRewind  time.Time
	rewindFails int

	newestT        int64
	lastCheckpoint time.Time
	lastCollect    time.Time
	lastStatus     time.Time
	lastData       time.Time
	lastIdle       time.Time
	gcDone         int
	warned         map[string]bool
	counts         sampleCounts
	fatal          error // of our own data directory
}

// sampleCounts are added to the metrics once per record: counters are dear when
// bumped once per sample.
type sampleCounts struct {
	floats, histograms, floatHistograms, exemplars, metadata int
	resent, unknown, equal, placeholder                      int
	drop                                                     [dropReasons]int
}

// rewindState is what reading a range again needs beside the live tail's state.
type rewindState struct {
	split   *split
	members map[string]bool
	version *labelVersion
	// seen holds the greatest timestamp per series within what is read again,
	// since the slot's belongs to the live tail.
	seen map[uint32]int64
	// other holds what a series is under a label version that isn't its slot's.
	other map[extraKey]resolved
}

type resolved struct {
	token uint32
	drop  dropReason
}

func (s *shipper) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run sends until ctx is done.
func (s *shipper) run(ctx context.Context) error {
	s.group = &errgroup.Group{} // of the sessions
	defer func() {
		for _, ss := range s.sessions {
			if ss != nil {
				ss.cancel()
			}
		}
		s.group.Wait()
	}()
	s.sessions = []*session{nil}
	s.owners = map[string]*owner{}
	s.splits = map[SplitID]*split{}
	s.acc = &account{}
	s.warned = map[string]bool{}
	s.gcDone = -1
	if err := s.start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer s.tail.Close()
	for turn := 0; ctx.Err() == nil; turn++ {
		if s.fatal != nil {
			return s.fatal
		}
		s.housekeep(ctx)
		if s.split == nil || s.versions.present == nil {
			s.wait(ctx, s.opts.PollInterval)
			continue
		}
		more := s.readTail(ctx)
		s.flushAll(ctx)
		again := false
		if !more || turn%4 == 3 {
			again = s.readAgain(ctx)
		}
		switch {
		case more:
			s.lastData = time.Now()
		case !again:
			pause := s.opts.PollInterval
			if time.Since(s.lastData) > 10*time.Second {
				pause *= 2
			}
			s.wait(ctx, pause)
		}
	}
	// What is under way stays under way: the checkpoint says from where on it
	// has to be sent again.
	return s.saveCheckpoint()
}

// wait waits for d, and looks after sessions meanwhile.
func (s *shipper) wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-s.wake:
			s.pump()
		}
	}
}

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
		if err := sleep(ctx, time.Second); err != nil {
			return pos, err
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

// readTail reads about one range's worth. It returns true if there may be more.
func (s *shipper) readTail(ctx context.Context) bool {
	for n := int64(0); n < s.opts.RangeBytes && !s.dirty && s.fatal == nil && ctx.Err() == nil; {
		b, err := s.tail.Next()
		if errors.Is(err, io.EOF) {
			s.endRange(ctx, false)
			return false
		}
		if err != nil {
			s.metrics.readErrors.Inc()
			s.warn("wal_read", "WAL can't be read, trying on", "err", err)
			return false
		}
		n += b.To.Offset - b.From.Offset
		s.record(ctx, b)
	}
	return true
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
	s.version = s.versions.at(b.From)
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
		s.ledger.Add(s.rangeEnd, s.split.id, s.acc.parts)
		s.acc = &account{}
		s.open, s.rangeSize = false, 0
	}
	if next != s.rangeEnd {
		s.ledger.Skip(next)
	}
	if next.Epoch != s.rangeEnd.Epoch {
		s.dict.newEpoch()
		s.gcDone = -1
	}
	s.rangeEnd = next
}

// samples routes what a record holds.
func (s *shipper) samples(ctx context.Context, b *tail.Batch) {
	c := &s.counts
	*c = sampleCounts{}
	if s.agent && b.From.InCheckpoint && (len(b.Samples) > 0 || len(b.Histograms) > 0 || len(b.FloatHistograms) > 0) {
		c.placeholder = len(b.Samples) + len(b.Histograms) + len(b.FloatHistograms)
		s.count()
		return
	}
	for i := range b.Series {
		x := &b.Series[i]
		slot, isNew, err := s.dict.define(uint64(x.Ref), x.Labels, b.From)
		if err != nil {
			s.dictionaryTrouble(err)
			continue
		}
		if isNew && s.rewind == nil {
			s.resolve(slot, s.dict.at(slot), x.Labels)
		}
	}
	for i := range b.Samples {
		x := &b.Samples[i]
		if ss, ref := s.route(ctx, uint64(x.Ref), x.T, b.From, true); ss != nil {
			ss.float(ref, x.ST, x.T, x.V)
			c.floats++
			s.flushIfFull(ctx, ss)
		}
	}
	for i := range b.Histograms {
		x := &b.Histograms[i]
		if ss, ref := s.route(ctx, uint64(x.Ref), x.T, b.From, true); ss != nil {
			ss.histogram(ref, x.ST, x.T, x.H)
			c.histograms++
			s.flushIfFull(ctx, ss)
		}
	}
	for i := range b.FloatHistograms {
		x := &b.FloatHistograms[i]
		if ss, ref := s.route(ctx, uint64(x.Ref), x.T, b.From, true); ss != nil {
			ss.floatHistogram(ref, x.ST, x.T, x.FH)
			c.floatHistograms++
			s.flushIfFull(ctx, ss)
		}
	}
	for i := range b.Exemplars {
		x := &b.Exemplars[i]
		if ss, ref := s.route(ctx, uint64(x.Ref), x.T, b.From, false); ss != nil {
			e := &shippb.Exemplar{Ref: ref, T: x.T, Value: math.Float64bits(x.V), Labels: pairs(x.Labels)}
			ss.exemplars = append(ss.exemplars, e)
			ss.bytes += proto.Size(e) + 4
			c.exemplars++
			s.flushIfFull(ctx, ss)
		}
	}
	for i := range b.Metadata {
		x := &b.Metadata[i]
		if slot, ok := s.dict.lookup(uint64(x.Ref), b.From); ok && s.rewind == nil {
			if err := s.dict.describe(slot, uint64(x.Ref), *x); err != nil {
				s.dictionaryTrouble(err)
			}
		}
		if ss, ref := s.route(ctx, uint64(x.Ref), 0, b.From, false); ss != nil {
			ss.describe(ref, *x)
			c.metadata++
			s.flushIfFull(ctx, ss)
		}
	}
	s.count()
}

func (ss *session) describe(ref uint32, m record.RefMetadata) {
	p := &shippb.Metadata{Ref: ref, Type: string(record.ToMetricType(m.Type)), Unit: m.Unit, Help: m.Help}
	ss.metadata = append(ss.metadata, p)
	ss.bytes += proto.Size(p) + 4
}

func (s *shipper) count() {
	c, m := &s.counts, s.metrics
	add := func(typ string, n int) {
		if n > 0 {
			m.shipped.WithLabelValues(typ).Add(float64(n))
			if s.rewind != nil {
				m.resent.Add(float64(n))
			}
		}
	}
	add("float", c.floats)
	add("histogram", c.histograms)
	add("float_histogram", c.floatHistograms)
	add("exemplar", c.exemplars)
	add("metadata", c.metadata)
	if s.rewind != nil {
		return // what isn't sent was counted the first time
	}
	drop := func(reason string, n int) {
		if n > 0 {
			m.dropped.WithLabelValues(reason).Add(float64(n))
		}
	}
	drop("unknown_ref", c.unknown)
	drop("equal_timestamp", c.equal)
	drop("agent_checkpoint", c.placeholder)
	for r := dropRelabelled; r < dropReasons; r++ {
		drop(r.String(), c.drop[r])
	}
	if c.unknown > 0 {
		s.warn("unknown_ref", "WAL holds samples of series that no record explains", "segment", s.rangeEnd.Segment, "offset", s.rangeEnd.Offset)
	}
}

// route returns the session that a sample goes to and its series' ref there; nil
// if it isn't sent now. isSample is false for what may share a timestamp.
func (s *shipper) route(ctx context.Context, ref uint64, t int64, pos tail.Position, isSample bool) (*session, uint32) {
	i, ok := s.dict.lookup(ref, pos)
	if !ok {
		s.counts.unknown++
		return nil, 0
	}
	sl := s.dict.at(i)
	if s.rewind != nil {
		return s.routeAgain(ctx, i, sl, t, isSample)
	}
	if sl.version != s.version.id {
		raw, err := s.dict.labels(i)
		if err != nil {
			s.dictionaryTrouble(err)
			s.counts.unknown++
			return nil, 0
		}
		s.resolve(i, sl, raw)
	}
	if sl.drop != dropNot {
		s.counts.drop[sl.drop]++
		return nil, 0
	}
	if isSample {
		if t == sl.lastT {
			s.counts.equal++
			return nil, 0
		}
		if t > sl.lastT {
			sl.lastT = t
			s.newestT = max(s.newestT, t)
		}
	}
	o := s.ownerOf(sl)
	ss := s.sessionOf(ctx, o)
	if ss == nil {
		s.acc.lost(o.member.ID)
		return nil, 0
	}
	if sl.session != ss.index && !s.announce(i, sl, ss) {
		return nil, 0
	}
	return ss, sl.ref
}

// routeAgain is route for a range that is read again.
func (s *shipper) routeAgain(ctx context.Context, i uint32, sl *slot, t int64, isSample bool) (*session, uint32) {
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
				return nil, 0
			}
			_, r.token, r.drop = s.version.apply(raw)
			rw.other[key] = r
		}
	}
	if r.drop != dropNot {
		return nil, 0
	}
	if m, ok := rw.split.member(r.token); !ok || !rw.members[m.ID] {
		return nil, 0
	}
	if isSample {
		if last, ok := rw.seen[i]; ok && last == t {
			return nil, 0
		} else if !ok || t > last {
			rw.seen[i] = t
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
		return nil, 0
	}
	if own {
		if sl.session != ss.index && !s.announce(i, sl, ss) {
			return nil, 0
		}
		return ss, sl.ref
	}
	key := extraKey{i, s.version.id}
	ref, ok := ss.extra[key]
	if !ok {
		raw, err := s.dict.labels(i)
		if err != nil {
			s.dictionaryTrouble(err)
			return nil, 0
		}
		ls, _, _ := s.version.apply(raw)
		ref = ss.say(ls)
		ss.extra[key] = ref
	}
	return ss, ref
}

// resolve computes what a series is under the version in force.
func (s *shipper) resolve(i uint32, sl *slot, raw labels.Labels) {
	if sl.session != 0 {
		s.sessions[sl.session].drop(sl.ref)
		sl.session = 0
	}
	_, sl.token, sl.drop = s.version.apply(raw)
	sl.version, sl.owner = s.version.id, 0
	if sl.drop != dropNot && sl.drop != dropRelabelled {
		s.warn(sl.drop.String(), "series is not sent", "reason", sl.drop.String(), "series", raw.String())
	}
}

func (s *shipper) ownerOf(sl *slot) *owner {
	if sl.owner == 0 {
		m, _ := s.split.member(sl.token) // a split has a member
		sl.owner = s.split.index[m.ID] + 1
	}
	return s.split.owners[sl.owner-1]
}

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
		if s.ensureSession(o); o.session != nil {
			return o.session
		}
		if time.Since(began) > s.opts.DetachAfter && s.canDetach(o) {
			s.detach(o, "no session can be had")
			return nil
		}
		s.await(ctx, 20*time.Millisecond)
	}
}

// announce makes a series known in a session.
func (s *shipper) announce(i uint32, sl *slot, ss *session) bool {
	raw, err := s.dict.labels(i)
	if err != nil {
		s.dictionaryTrouble(err)
		return false
	}
	v := s.version
	ls, _, _ := v.apply(raw)
	if sl.session != 0 {
		s.sessions[sl.session].drop(sl.ref)
	}
	sl.session, sl.ref = ss.index, ss.say(ls)
	if sl.metadata != 0 {
		if m, err := s.dict.metadata(i); err == nil {
			ss.describe(sl.ref, m)
		}
	}
	return true
}

// say announces labels and returns their ref.
func (ss *session) say(ls labels.Labels) uint32 {
	p := &shippb.Series{Ref: ss.newRef(), Labels: pairs(ls)}
	ss.announce = append(ss.announce, p)
	ss.bytes += int(ls.ByteSize()) + 16
	return p.Ref
}

func pairs(ls labels.Labels) []string {
	out := make([]string, 0, 2*ls.Len())
	ls.Range(func(l labels.Label) { out = append(out, l.Name, l.Value) })
	return out
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
	member := ss.owner.member.ID
	if ss.owner.detached || ss.stuck != nil {
		// It stays: it may hold announcements that later batches rely on.
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
		s.await(ctx, 20*time.Millisecond)
	}
}

// await waits, in the middle of a record, for news of sessions and takes them in.
func (s *shipper) await(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-s.wake:
	case <-time.After(d):
	}
	s.pump()
	s.tend()
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
		if st.Durable > ss.durable {
			ss.durable = st.Durable
			s.ledger.Durable(ss.id, st.Durable)
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
			// has received it may yet make durable.
			if !ss.abandoned && !st.Connected && now.Sub(st.LastAnswer) > s.opts.DetachAfter {
				ss.abandoned = true
				s.ledger.Detach(ss.id, ss.received)
			}
		case !st.Connected && now.Sub(st.LastAnswer) > s.opts.DetachAfter && s.canDetach(o):
			s.detach(o, "it is out of reach")
		case now.Sub(ss.progress) > 2*s.opts.DetachAfter && s.canDetach(o):
			s.detach(o, "it has received nothing for a while")
		}
	}
}

// ensureSession begins a session with an owner that has none, unless the last
// one ended just now.
func (s *shipper) ensureSession(o *owner) {
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
	s.ledger.Begin(ss.id)
	ctx, cancel := context.WithCancel(context.Background()) // canceled when run ends
	ss.cancel = cancel
	s.group.Go(func() error {
		ss.ship.Run(ctx) // its end shows in its state
		return nil
	})
}

// dial is the usual connect.
func (s *shipper) dial(m ring.Member) link {
	logger := s.logger.With("owner", m.ID)
	return ship.NewSession(ship.SessionOptions{
		Address: m.Address, Tenant: s.opts.Tenant, Source: s.source, Client: s.opts.Version,
		DialOptions: s.opts.DialOptions, GiveUp: s.opts.GiveUp,
		Heartbeat: func() *shippb.Heartbeat {
			return &shippb.Heartbeat{LagMs: s.lagMS.Load(), OpenRewinds: s.queue.Load()}
		},
		Notify: s.notify,
		Refused: func(r *shippb.Refused) {
			s.metrics.refuse(r.Reason, r.Samples)
			logger.Debug("ingester refused samples", "reason", r.Reason, "samples", r.Samples, "example", r.Example)
		},
	}, logger)
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
	s.ledger.End(ss.id)
	s.sessions[ss.index] = nil
	o.session = nil
	s.dict.all(func(_ uint32, sl *slot) {
		if sl.session == ss.index {
			sl.session = 0
		}
	})
	o.calmSince = time.Time{}
	if ss.last > 0 && ss.received > 0 {
		o.backoff = 0
	}
	o.retryAt = time.Now().Add(o.backoff)
	o.backoff = min(max(2*o.backoff, 100*time.Millisecond), 10*time.Second)
}

// canDetach says whether the tail can go on without an owner: another must be
// there to take its series.
func (s *shipper) canDetach(o *owner) bool {
	r, _ := s.ringWatch.present()
	if r == nil {
		return false
	}
	for _, m := range r.Subset(s.opts.Tenant, s.opts.Shards).Active() {
		if other := s.owners[m.ID]; m.ID != o.member.ID && (other == nil || !other.detached) {
			return true
		}
	}
	return false
}

// detach leaves an owner out until it has been content for a while.
func (s *shipper) detach(o *owner, why string) {
	now := time.Now()
	if now.Sub(o.detachedAt) > 10*time.Minute {
		o.hold = 0
	}
	o.detached, o.detachedAt, o.calmSince = true, now, time.Time{}
	o.hold = min(max(2*o.hold, s.opts.ReattachAfter), 5*time.Minute)
	s.dirty = true
	s.metrics.detachments.Inc()
	s.logger.Warn("ingester is left out, its series go to the next", "owner", o.member.ID, "reason", why)
	if ss := o.session; ss != nil {
		for _, p := range s.acc.parts {
			for _, x := range p.Sent {
				if x.Session == ss.id {
					s.acc.lost(p.Member)
				}
			}
		}
		s.ledger.Detach(ss.id, ss.received)
	}
}

// resplit makes the split anew: for another ring, or after an owner was detached
// or attached. The range that was being read has been cut.
func (s *shipper) resplit() {
	s.dirty = false
	r, _ := s.ringWatch.present()
	if r == nil {
		return
	}
	r = r.Subset(s.opts.Tenant, s.opts.Shards)
	if len(r.Active()) == 0 {
		if s.split != nil {
			s.logger.Warn("ring has no active ingester, waiting")
		}
		s.ring, s.split = r, nil
		return
	}
	s.lastSplit++
	sp := &split{id: s.lastSplit, ring: r, excluded: map[string]bool{}, index: map[string]uint16{}}
	for _, m := range r.Active() {
		if o := s.owners[m.ID]; o != nil && o.detached {
			sp.excluded[m.ID] = true
		}
	}
	if len(sp.excluded) == len(r.Active()) {
		// All that are left had been detached: then any is better than none.
		for id := range sp.excluded {
			s.owners[id].detached = false
		}
		clear(sp.excluded)
	}
	for _, m := range r.Active() {
		o := s.owners[m.ID]
		if o == nil {
			o = &owner{member: m}
			s.owners[m.ID] = o
		}
		if o.member.Address != m.Address && o.session != nil {
			o.session.cancel() // it has moved; its session is another process's
		}
		o.member = m
		if !sp.excluded[m.ID] {
			sp.index[m.ID] = uint16(len(sp.owners))
			sp.owners = append(sp.owners, o)
		}
	}
	s.ring, s.split = r, sp
	s.splits[sp.id] = sp
	s.dict.all(func(_ uint32, sl *slot) { sl.owner = 0 })
	keep := map[SplitID]bool{sp.id: true}
	for _, id := range s.ledger.Splits() {
		keep[id] = true
	}
	for id := range s.splits {
		if !keep[id] {
			delete(s.splits, id)
		}
	}
	s.logger.Info("ring", "version", r.Version(), "owners", len(sp.owners), "detached", len(sp.excluded))
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
	s.rewind = &rewindState{split: s.splits[w.Split], members: map[string]bool{}, seen: map[uint32]int64{}, other: map[extraKey]resolved{}}
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
		s.warn("rewind", "range of WAL can't be read again, trying on", "from", w.From.String(), "to", w.To.String(), "err", err)
		s.ledger.Return(w.ID)
	}
	return true
}

// housekeep does what is due, between two reads of the tail.
func (s *shipper) housekeep(ctx context.Context) {
	now := time.Now()
	s.pump()
	if r, _ := s.ringWatch.present(); r != nil && (s.ring == nil || r.Version() != s.ring.Version()) {
		s.dirty = true
	}
	if s.dirty {
		if s.split != nil {
			s.cut(ctx, s.tail.Position())
		}
		s.resplit()
	}
	if ls, known := s.external.present(); known {
		s.takeLabels(ctx, ls)
	}
	if now.Sub(s.lastIdle) >= time.Second {
		s.lastIdle = now
		s.endIdle()
	}
	if now.Sub(s.lastCollect) >= s.opts.CheckpointInterval {
		s.lastCollect = now
		s.collect(ctx)
	}
	s.tend()
}

// tend does what is due and may be done in the middle of a record too.
func (s *shipper) tend() {
	now := time.Now()
	for id, o := range s.owners {
		if !o.detached {
			continue
		}
		if !s.onRing(id) {
			o.detached = false // endIdle sees to its session
			continue
		}
		s.ensureSession(o)
		if !o.calmSince.IsZero() && now.Sub(o.calmSince) >= o.hold {
			o.detached, s.dirty = false, true
			o.session.counted = false
			s.logger.Info("ingester gets samples again", "owner", o.member.ID)
		}
	}
	if now.Sub(s.lastCheckpoint) >= s.opts.CheckpointInterval {
		s.lastCheckpoint = now
		if err := s.saveCheckpoint(); err != nil {
			s.metrics.checkpointErr.Inc()
			s.warn("checkpoint", "checkpoint can't be written, trying on", "err", err)
		}
	}
	if now.Sub(s.lastStatus) >= time.Second {
		s.lastStatus = now
		s.report(now)
	}
}

// takeLabels makes changed external labels or relabelling hold from here on.
func (s *shipper) takeLabels(ctx context.Context, ls labels.Labels) {
	p := s.versions.present
	if p != nil && labels.Equal(p.external, ls) && s.resumeAt == (tail.Position{}) {
		return
	}
	if p == nil || !labels.Equal(p.external, ls) || !sameRelabel(p.relabel, s.opts.RelabelConfigs) {
		// What was read before this start was sent under the labels of then.
		from := s.tail.Position()
		if from.Before(s.resumeAt) {
			from = s.resumeAt
		}
		if s.split != nil {
			s.cut(ctx, s.tail.Position())
		}
		if s.versions.add(from, ls, s.opts.RelabelConfigs) {
			s.metrics.labelChanges.Inc()
			s.logger.Info("external labels", "external_labels", ls.String(), "relabel_configs", len(s.opts.RelabelConfigs), "position", from.String())
		}
	}
	s.resumeAt = tail.Position{}
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
			delete(s.owners, id)
		}
	}
}

// owns says whether an owner gets samples by the present split.
func (s *shipper) owns(o *owner) bool {
	if s.split == nil {
		return false
	}
	_, ok := s.split.index[o.member.ID]
	return ok
}

func (s *shipper) onRing(id string) bool {
	if s.ring == nil {
		return false
	}
	for _, m := range s.ring.Active() {
		if m.ID == id {
			return true
		}
	}
	return false
}

// collect forgets series that Prometheus has dropped, once it has written a WAL
// checkpoint without them and nothing before that has to be read again.
func (s *shipper) collect(ctx context.Context) {
	done := s.ledger.Checkpoint()
	s.dict.forget(done, s.releaseSlot)
	s.versions.forget(done)
	n, err := s.dir.LastCheckpoint()
	if err != nil || n <= s.gcDone || done.InCheckpoint || done.Segment <= n || done.Epoch != s.tail.Position().Epoch {
		return
	}
	err = tail.CheckpointSeries(ctx, s.dir, n, s.logger, s.tailMetrics, func(series []record.RefSeries) {
		for i := range series {
			s.dict.touch(uint64(series[i].Ref), n)
		}
	})
	if err != nil {
		s.warn("wal_checkpoint", "WAL checkpoint can't be read, trying on", "err", err)
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
	if sl.session != 0 {
		s.sessions[sl.session].drop(sl.ref)
		sl.session = 0
	}
	for _, ss := range s.sessions {
		if ss == nil || len(ss.extra) == 0 {
			continue
		}
		for key, ref := range ss.extra {
			if key.slot == i {
				ss.drop(ref)
				delete(ss.extra, key)
			}
		}
	}
}

func (s *shipper) saveCheckpoint() error {
	if s.fatal != nil {
		return s.fatal
	}
	// First the dictionary: a checkpoint promises what lies before it.
	if err := s.dict.setMark(s.tail.Position()); err != nil {
		return err
	}
	pos := s.ledger.Checkpoint()
	s.cp.Position = &pos
	s.cp.Inode = 0
	if !pos.InCheckpoint {
		s.cp.Inode = inode(s.dir.File(pos))
	}
	s.cp.Labels = s.versions.file()
	if err := s.cp.save(s.opts.DataDir); err != nil {
		return err
	}
	s.metrics.checkpoints.Inc()
	return nil
}

// report publishes metrics and the status.
func (s *shipper) report(now time.Time) {
	m := s.metrics
	s.agent = s.dir.Agent()
	st := Status{
		Position: s.tail.Position(), Checkpoint: s.ledger.Checkpoint(), Series: s.dict.count, DictionaryBytes: s.dict.size,
		Gaps: s.tail.Gaps(), Agent: s.agent, Time: now,
	}
	if n, err := s.dir.Size(st.Position); err == nil {
		st.LagBytes = n
	}
	if s.newestT > 0 {
		st.NewestSample = time.UnixMilli(s.newestT)
		s.lagMS.Store(max(0, now.UnixMilli()-s.newestT))
		m.newest.Set(float64(s.newestT) / 1000)
	}
	l := s.ledger.Stats()
	st.OpenRanges, st.QueuedRanges = l.Open, l.Queued
	s.queue.Store(uint32(l.Queued))
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
	m.rangesOpen.Set(float64(l.Open))
	m.rangesQueued.Set(float64(l.Queued))
	m.sessions.Set(float64(len(st.Sessions)))
	m.inflight.Set(float64(inflight))
	m.detached.Set(float64(detached))
	s.publish(st)
}

// dictionaryTrouble makes run end: without the dictionary samples would be lost,
// and a start reads again what there is from the checkpoint, which stays.
func (s *shipper) dictionaryTrouble(err error) {
	if s.fatal == nil {
		s.fatal = err
	}
}

// warn logs the first time of a kind.
func (s *shipper) warn(kind, text string, args ...any) {
	if s.warned[kind] {
		return
	}
	s.warned[kind] = true
	s.logger.Warn(text, args...)
}

package sidecar

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
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
	health      *health.Board
	files       *tail.Files
	blocks      *blocks
	listBlocks  func() ([]backfill.Block, []*backfill.BadBlockError, error) // of Prometheus
	dict        *dictionary
	cp          *checkpoint
	versions    *labelVersions
	ringWatch   *ringWatch
	external    *externalLabels
	families    *families
	choosing    choosing
	publish     func(Status)           // called from time to time
	connect     func(ring.Member) link // makes a session's network side

	wake  chan struct{} // cap 1; written to by all goroutines
	group *errgroup.Group
	lagMS atomic.Int64 // read by sessions for heartbeats
	queue atomic.Uint32

	ledger *Ledger
	tail   *tail.Tail
	enc    ship.Encoder
	agent  bool

	// The range that is being read: since ledger's end, up to rangeEnd.
	open      bool
	rangeEnd  tail.Position
	rangeSize int64
	began     time.Time
	acc       *account
	version   *labelVersion // the present one, by which slots are resolved
	others    map[extraKey]resolved

	// With several replicas of each series.
	more        []target // where route sends a sample to beside what it returns
	taking      []*session
	coverageDue bool                            // what was declared may not hold any more
	caughtUp    bool                            // all that the WAL held at the start was read
	coverage    atomic.Pointer[shippb.Coverage] // read by sessions for heartbeats; nil with one replica
	declaredAt  atomic.Pointer[time.Time]       // when that was last looked at
	refusalsMu  sync.Mutex
	refusals    []refusedBatch // not entered into ledgers yet

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
	nextFill    time.Time
	wblDue      bool
	keptDropped int // files let go, as of the last report
	rewindFails int
	rewinding   bool                 // see openRewinds
	resent      map[SessionID]uint64 // … last batches that must be received

	newestT        int64 // of the samples sent, ms
	sentBefore     int64 // no later one was sent by the process before, ms
	nextLabels     time.Time
	saving         *saving // nil: no checkpoint is being written
	lastCheckpoint time.Time
	lastCollect    time.Time
	lastStatus     time.Time
	lastData       time.Time
	lastIdle       time.Time
	lastKeep       time.Time
	gcDone         int // the WAL checkpoint without whose series the dictionary is
	gcNext, gcFrom int // the one to do next, once all before segment gcFrom is durable
	warned         map[string]bool
	counts         sampleCounts
	fatal          error // of our own data directory
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
		_ = s.group.Wait() // they return nil
		if s.saving != nil {
			<-s.saving.done
		}
	}()
	s.sessions = []*session{nil}
	s.owners = map[string]*owner{}
	s.splits = map[SplitID]*split{}
	s.acc = &account{}
	s.others = map[extraKey]resolved{}
	s.version = s.versions.present
	s.warned = map[string]bool{}
	s.gcDone, s.gcNext = -1, -1
	if err := s.start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	for turn := 0; ctx.Err() == nil; turn++ {
		if s.fatal != nil {
			return s.fatal
		}
		s.housekeep(ctx)
		if s.split == nil || s.versions.present == nil {
			s.wait(ctx, s.opts.PollInterval)
			continue
		}
		s.takeClaims()
		more, end := s.readTail(ctx)
		s.flushAll(ctx)
		s.sendFamilies(ctx)
		again := false
		held := !s.choosing.since.IsZero()
		if end && !held {
			s.coverageDue = s.coverageDue || !s.caughtUp
			s.caughtUp = true
			s.blocks.current(s.tail.Position())
			if s.wblDue && s.roomForMore() {
				s.sendWBL(ctx)
			}
		}
		if !more || turn%4 == 3 {
			again = s.readAgain(ctx) || s.fillOn(ctx)
		}
		switch {
		case more:
			s.lastData = time.Now()
		case !again:
			pause := s.opts.PollInterval
			if !held && time.Since(s.lastData) > 10*time.Second {
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
	if ls, loaded, known := s.external.present(); known {
		s.takeLabels(ctx, ls, loaded)
	}
	if now.Sub(s.lastIdle) >= time.Second {
		s.lastIdle = now
		s.endIdle()
		s.blocks.finish()
	}
	if now.Sub(s.lastCollect) >= s.opts.CheckpointInterval {
		s.lastCollect = now
		s.collect(ctx)
		s.lookAtBlocks()
	}
	s.tend(ctx)
}

// keepFrom is the place in the log that is there now from which on its segments
// are kept.
func (s *shipper) keepFrom() tail.Position {
	if done := s.ledger.Checkpoint(); done.Epoch == s.tail.Position().Epoch {
		return done
	}
	return s.tail.Position()
}

// tend does what is due and may be done in the middle of a record too.
func (s *shipper) tend(ctx context.Context) {
	now := time.Now()
	for id, o := range s.owners {
		if !o.detached {
			continue
		}
		if !s.onRing(id) {
			o.detached = false // endIdle sees to its session
			continue
		}
		s.ensureSession(ctx, o)
		if !o.calmSince.IsZero() && now.Sub(o.calmSince) >= o.hold {
			o.detached, s.dirty = false, true
			o.session.counted = false
			s.logger.Info("ingester gets samples again", "owner", o.member.ID)
		}
	}
	if now.Sub(s.lastKeep) >= time.Second {
		// While samples wait for room, for hours maybe, Prometheus goes on to
		// write segments and to delete them.
		s.lastKeep = now
		if err := s.files.Keep(s.keepFrom()); err != nil {
			s.once("keep").Warn("WAL segments can't be kept, trying on", "err", err)
		}
	}
	s.tendCheckpoint(now)
	if now.Sub(s.lastStatus) >= time.Second {
		s.lastStatus = now
		s.report(now)
	}
}

// dictionaryTrouble makes run end: without the dictionary samples would be lost,
// and a start reads again what there is from the checkpoint, which stays.
func (s *shipper) dictionaryTrouble(err error) {
	if s.fatal == nil {
		s.fatal = err
	}
}

// once returns a logger the first time it is asked for one of a kind, then one
// that logs nothing: what repeats is counted.
func (s *shipper) once(kind string) *slog.Logger {
	if s.warned[kind] {
		return slog.New(slog.DiscardHandler)
	}
	s.warned[kind] = true
	return s.logger
}

package ingest

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
)

// sessionID is what the client chose; it counts under its tenant only.
type sessionID struct {
	tenant string
	id     [16]byte
}

// sourceID is a source of a tenant.
type sourceID struct {
	tenant string
	source [16]byte
}

// session is an ordered run of batches from one source.
type session struct {
	id     sessionID
	source [16]byte

	// changed has room for one: the stream is to look at the numbers.
	changed chan struct{}

	mu       sync.Mutex // held while a batch is applied
	refs     head.Refs
	received uint64
	durable  uint64
	told     uint64 // durable, as the stream has last sent it
	marks    []mark // ascending in both
	stream   *stream
	lastSeen time.Time // of the end of the last stream
	removed  bool      // it has ended
	lag      time.Duration
	rewinds  uint32
	// succeeded: its source has begun another session while it had no stream.
	succeeded bool

	untold untold

	// What the source's machine had for the time when it last said so.
	clock   int64 // ms; 0: it has not said
	clockAt time.Time
	waiting time.Duration // of clocks that differ: by how much; 0: it doesn't wait

	// For the commit log, if there is one.
	generation uint64        // that the last batch was applied to; 0: none yet
	index      uint64        // in the log of that generation; 0: not in it yet
	logged     atomic.Uint64 // batches up to this one are written, or won't be
}

// mark says that batches up to seq are in the generation or older ones.
type mark struct {
	generation uint64
	seq        uint64
}

// stream is the connection that a session has at present.
type stream struct {
	cancel func(error)
	done   chan struct{} // closed when the handler has let go of the session
}

// applied notes a batch. The caller holds s.mu.
func (s *session) applied(seq, generation uint64, durable uint64) {
	s.received, s.generation = seq, generation
	if generation <= durable {
		s.durable = seq
		return
	}
	if n := len(s.marks); n > 0 && s.marks[n-1].generation == generation {
		s.marks[n-1].seq = seq
		return
	}
	s.marks = append(s.marks, mark{generation, seq})
}

// flushed moves durable on: generations up to the one given are durable.
func (s *session) flushed(generation uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(s.marks) && s.marks[n].generation <= generation {
		s.durable = max(s.durable, s.marks[n].seq) // a batch may have been durable as it was applied
		n++
	}
	if n > 0 {
		s.marks = append(s.marks[:0], s.marks[n:]...)
		s.wake()
	}
}

// written notes that batches up to seq are in the commit log, or won't be. It may
// be called with and without s.mu held, and out of order where a log ends early.
func (s *session) written(seq uint64) {
	for {
		old := s.logged.Load()
		if seq <= old {
			return
		}
		if s.logged.CompareAndSwap(old, seq) {
			s.wake()
			return
		}
	}
}

// wake makes the stream look at the numbers.
func (s *session) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

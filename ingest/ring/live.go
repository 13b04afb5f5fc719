package ring

import (
	"context"
	"sync"
	"time"
)

// Live is the present snapshot, for any number of readers and waiters. The zero
// value holds an empty one.
type Live struct {
	mu      sync.Mutex
	ring    *Ring
	changed chan struct{} // closed at the next change; nil: nobody waits
}

// Set replaces the snapshot. It wakes waiters if the version differs.
func (l *Live) Set(s Snapshot) {
	r := New(s)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ring != nil && l.ring.Version() == r.Version() {
		return
	}
	r.since = time.Now()
	l.ring = r
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// Ring is the present ring.
func (l *Live) Ring() *Ring {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.get()
}

func (l *Live) get() *Ring {
	if l.ring == nil {
		l.ring = New(NewSnapshot(nil))
	}
	return l.ring
}

// Wait returns the ring as soon as its version differs from the one given, or
// the present one when ctx is done.
func (l *Live) Wait(ctx context.Context, version string) *Ring {
	for {
		l.mu.Lock()
		r := l.get()
		if r.Version() != version {
			l.mu.Unlock()
			return r
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return r
		}
	}
}

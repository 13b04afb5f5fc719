package ingest

import (
	"sync"
	"time"
)

// awaitFor bounds how long a source is awaited: it is connected again after seconds,
// or is away itself.
const awaitFor = time.Minute

// awaited are sources that have to send again what the commit log lacked, and that
// have not been heard since: until they say how much that is, answers have to warn.
// It is safe for concurrent use.
type awaited struct {
	mu      sync.Mutex
	sources map[string]map[[16]byte]time.Time // by tenant: until when
	unknown time.Time                         // until then there may be others, of tenants not in heard
	heard   map[string]bool
}

// add awaits a source.
func (a *awaited) add(tenant string, source [16]byte, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sources == nil {
		a.sources = map[string]map[[16]byte]time.Time{}
	}
	if a.sources[tenant] == nil {
		a.sources[tenant] = map[[16]byte]time.Time{}
	}
	a.sources[tenant][source] = now.Add(awaitFor)
}

// all awaits a source of each tenant: it isn't known which there were.
func (a *awaited) all(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unknown, a.heard = now.Add(awaitFor), map[string]bool{}
}

// hear notes that a source has said how much it has to send again.
func (a *awaited) hear(tenant string, source [16]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.sources[tenant], source)
	if a.heard != nil {
		a.heard[tenant] = true
	}
}

// of says whether a source of the tenant is awaited.
func (a *awaited) of(tenant string, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, until := range a.sources[tenant] {
		if now.Before(until) {
			return true
		}
	}
	return now.Before(a.unknown) && !a.heard[tenant]
}

// any says whether some source is awaited.
func (a *awaited) any(now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, sources := range a.sources {
		if len(sources) > 0 {
			return true
		}
	}
	return now.Before(a.unknown)
}

// expire forgets those that are awaited no longer.
func (a *awaited) expire(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for tenant, sources := range a.sources {
		for source, until := range sources {
			if now.After(until) {
				delete(sources, source)
			}
		}
		if len(sources) == 0 {
			delete(a.sources, tenant)
		}
	}
	if now.After(a.unknown) {
		a.heard = nil
	}
}

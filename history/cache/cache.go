// Package cache keeps pages and rows near, bounded in bytes.
//
// What is in a Cache never changes, so nothing is ever invalidated: the least
// recently used goes when the bound is passed. A key that several callers miss
// at once is loaded by one of them; the others wait. Loading itself is the
// caller's: one request may load many keys.
package cache

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Cache maps keys to immutable values. It is safe for concurrent use.
type Cache[K comparable, V any] struct {
	maxBytes int64

	mu       sync.Mutex
	bytes    int64
	entries  map[K]*list.Element // of *entry[K, V]
	recent   *list.List          // most recently used first
	loading  map[K]*Load[V]
	hits     uint64
	misses   uint64
	waits    uint64
	evicted  uint64
	oversize uint64
}

type entry[K comparable, V any] struct {
	key   K
	value V
	bytes int64
}

// overheadBytes is about what an entry takes beside its value.
const overheadBytes = 200

// New makes a cache of at most maxBytes. With 0 it keeps nothing, but still lets
// one caller load for all that miss at once.
func New[K comparable, V any](maxBytes int64) *Cache[K, V] {
	return &Cache[K, V]{maxBytes: maxBytes, entries: map[K]*list.Element{}, recent: list.New(), loading: map[K]*Load[V]{}}
}

// Load is a value that is being loaded.
type Load[V any] struct {
	done  chan struct{}
	value V
	err   error
}

// errAbandoned is what waiters get whose loader gave up because it was
// cancelled itself; they load on their own.
var errAbandoned = errors.New("loader was cancelled")

// Get returns a value if it is there. Otherwise it returns a Load: if mine is
// true, the caller is to load the value and must call Finish, whatever happens;
// else another caller does that, see Wait.
func (c *Cache[K, V]) Get(key K) (value V, load *Load[V], mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.entries[key]; ok {
		c.hits++
		c.recent.MoveToFront(e)
		return e.Value.(*entry[K, V]).value, nil, false
	}
	if l, ok := c.loading[key]; ok {
		c.waits++
		return value, l, false
	}
	c.misses++
	l := &Load[V]{done: make(chan struct{})}
	c.loading[key] = l
	return value, l, true
}

// Peek returns a value if it is there. It is for values that callers can do
// without: nobody waits for one.
func (c *Cache[K, V]) Peek(key K) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		c.misses++
		return value, false
	}
	c.hits++
	c.recent.MoveToFront(e)
	return e.Value.(*entry[K, V]).value, true
}

// Finish gives the value, of about so many bytes, to all that wait for it and
// keeps it. With an error nothing is kept.
func (c *Cache[K, V]) Finish(key K, l *Load[V], value V, bytes int64, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		err = errAbandoned
	}
	l.value, l.err = value, err
	c.mu.Lock()
	if c.loading[key] == l {
		delete(c.loading, key)
	}
	if err == nil {
		c.add(key, value, bytes)
	}
	c.mu.Unlock()
	close(l.done)
}

// Wait returns what another caller loads. again is true if that caller was
// cancelled: the caller is to call Get once more.
func (l *Load[V]) Wait(ctx context.Context) (value V, again bool, err error) {
	select {
	case <-ctx.Done():
		return value, false, context.Cause(ctx)
	case <-l.done:
		if errors.Is(l.err, errAbandoned) {
			return value, true, nil
		}
		return l.value, false, l.err
	}
}

// Put keeps a value in place of what is there.
func (c *Cache[K, V]) Put(key K, value V, bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(key, value, bytes)
}

// Remove lets go of a value.
func (c *Cache[K, V]) Remove(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
}

func (c *Cache[K, V]) remove(key K) {
	if e, ok := c.entries[key]; ok {
		c.bytes -= e.Value.(*entry[K, V]).bytes
		c.recent.Remove(e)
		delete(c.entries, key)
	}
}

func (c *Cache[K, V]) add(key K, value V, bytes int64) {
	c.remove(key)
	bytes += overheadBytes
	// One value must not drive out all others.
	if bytes > c.maxBytes/4 {
		c.oversize++
		return
	}
	for c.bytes+bytes > c.maxBytes {
		c.remove(c.recent.Back().Value.(*entry[K, V]).key)
		c.evicted++
	}
	c.entries[key] = c.recent.PushFront(&entry[K, V]{key: key, value: value, bytes: bytes})
	c.bytes += bytes
}

// Bytes is what the cache holds.
func (c *Cache[K, V]) Bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

// Register publishes the cache's state as metrics with a label cache="name".
func (c *Cache[K, V]) Register(reg prometheus.Registerer, name string) error {
	labels := prometheus.Labels{"cache": name}
	counter := func(metric, help string, v *uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: metric, Help: help, ConstLabels: labels}, func() float64 {
			c.mu.Lock()
			defer c.mu.Unlock()
			return float64(*v)
		})
	}
	var errs []error
	for _, m := range []prometheus.Collector{
		counter("epimetheus_cache_hits_total", "Look-ups that the cache answered.", &c.hits),
		counter("epimetheus_cache_misses_total", "Look-ups that led to a load.", &c.misses),
		counter("epimetheus_cache_waits_total", "Look-ups that waited for another's load.", &c.waits),
		counter("epimetheus_cache_evictions_total", "Values that went for lack of room.", &c.evicted),
		counter("epimetheus_cache_oversize_total", "Values that were too large to keep.", &c.oversize),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "epimetheus_cache_bytes", Help: "Memory that the values take, about.", ConstLabels: labels,
		}, func() float64 { return float64(c.Bytes()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "epimetheus_cache_max_bytes", Help: "Memory that the values may take.", ConstLabels: labels,
		}, func() float64 { return float64(c.maxBytes) }),
	} {
		errs = append(errs, reg.Register(m))
	}
	return errors.Join(errs...)
}

// Package cache keeps pages and rows near, bounded in bytes.
//
// What is in a Cache never changes, so nothing is ever invalidated. When the bound
// is passed, values go: those of tenants that have not used the cache for long
// first, else those of the tenant that has most; of a tenant the least recently
// used. So a tenant alone may have all of it, and none that uses it is pushed below
// an equal share by another.
//
// A key that several callers miss at once is loaded by one of them; the others
// wait. Loading itself is the caller's: one request may load many keys.
package cache

import (
	"container/heap"
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
	turned   int64                // bytes that were ever put in: the clock
	entries  map[K]*list.Element  // of *entry[K, V]
	tenants  map[string]*share[K] // that have entries
	heaviest shares[K]            // a heap of them
	used     *list.List           // of them, the most recently active first
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
	share *share[K]
}

// share is what the cache has of a tenant.
type share[K comparable] struct {
	tenant string
	bytes  int64
	recent *list.List // of its entries, the most recently used first
	last   int64      // when it used the cache last, by the clock
	at     int        // in the heap
	inUsed *list.Element
}

// shares is a heap: the first has most bytes.
type shares[K comparable] []*share[K]

func (h shares[K]) Len() int           { return len(h) }
func (h shares[K]) Less(i, j int) bool { return h[i].bytes > h[j].bytes }

func (h shares[K]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}

func (h *shares[K]) Push(x any) {
	s := x.(*share[K])
	s.at = len(*h)
	*h = append(*h, s)
}

func (h *shares[K]) Pop() any {
	old := *h
	s := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return s
}

// overheadBytes is about what an entry takes beside its value.
const overheadBytes = 200

// New makes a cache of at most maxBytes. With 0 it keeps nothing, but still lets
// one caller load for all that miss at once.
func New[K comparable, V any](maxBytes int64) *Cache[K, V] {
	return &Cache[K, V]{
		maxBytes: maxBytes, entries: map[K]*list.Element{}, loading: map[K]*Load[V]{},
		tenants: map[string]*share[K]{}, used: list.New(),
	}
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
		return c.touch(e), nil, false
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
	return c.touch(e), true
}

// Finish gives the value, of about so many bytes, to all that wait for it and
// keeps it, as the tenant's. With an error nothing is kept; once ctx, that of the
// load, has ended the error is its caller's own, and no matter of those that wait:
// whatever a store makes of a context that ends, its cause among them.
func (c *Cache[K, V]) Finish(ctx context.Context, tenant string, key K, l *Load[V], value V, bytes int64, err error) {
	if err != nil && (ctx.Err() != nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		err = errAbandoned
	}
	l.value, l.err = value, err
	c.mu.Lock()
	if c.loading[key] == l {
		delete(c.loading, key)
	}
	if err == nil {
		c.add(tenant, key, value, bytes)
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

// Put keeps a value, as the tenant's, in place of what is there.
func (c *Cache[K, V]) Put(tenant string, key K, value V, bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(tenant, key, value, bytes)
}

// Remove lets go of a value.
func (c *Cache[K, V]) Remove(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
}

func (c *Cache[K, V]) remove(key K) {
	if e, ok := c.entries[key]; ok {
		c.drop(e)
	}
}

// drop removes an entry, and its tenant's share if that was all of it.
func (c *Cache[K, V]) drop(e *list.Element) {
	x := e.Value.(*entry[K, V])
	s := x.share
	delete(c.entries, x.key)
	s.recent.Remove(e)
	s.bytes -= x.bytes
	c.bytes -= x.bytes
	if s.recent.Len() > 0 {
		heap.Fix(&c.heaviest, s.at)
		return
	}
	heap.Remove(&c.heaviest, s.at)
	c.used.Remove(s.inUsed)
	delete(c.tenants, s.tenant)
}

// touch notes that an entry is used.
func (c *Cache[K, V]) touch(e *list.Element) V {
	x := e.Value.(*entry[K, V])
	x.share.recent.MoveToFront(e)
	c.active(x.share)
	return x.value
}

// active notes that a tenant uses the cache.
func (c *Cache[K, V]) active(s *share[K]) {
	s.last = c.turned
	c.used.MoveToFront(s.inUsed)
}

// evict lets one value go.
func (c *Cache[K, V]) evict() {
	s := c.used.Back().Value.(*share[K])
	if c.turned-s.last <= c.maxBytes {
		// All have used it since as much was put in as there is room for.
		s = c.heaviest[0]
	}
	c.drop(s.recent.Back())
	c.evicted++
}

func (c *Cache[K, V]) add(tenant string, key K, value V, bytes int64) {
	c.remove(key)
	bytes += overheadBytes
	// One value must not drive out all others.
	if bytes > c.maxBytes/4 {
		c.oversize++
		return
	}
	c.turned += bytes
	s := c.tenants[tenant]
	if s == nil {
		s = &share[K]{tenant: tenant, recent: list.New()}
		c.tenants[tenant] = s
		s.inUsed = c.used.PushFront(s)
		heap.Push(&c.heaviest, s)
	}
	c.active(s)
	c.entries[key] = s.recent.PushFront(&entry[K, V]{key: key, value: value, bytes: bytes, share: s})
	s.bytes += bytes
	c.bytes += bytes
	heap.Fix(&c.heaviest, s.at)
	for c.bytes > c.maxBytes {
		c.evict()
	}
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

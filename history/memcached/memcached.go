// Package memcached keeps values that never change in memcached servers: a cache
// that processes share and that outlives them.
//
// What comes out of it is what was put in under that key, or nothing: a value is
// framed with a checksum over its key and itself, and whatever servers do (hang,
// die, forget, answer something else) is a miss, soon. No method returns an error of
// a server; metrics and the log tell of them. Keys, frames and times are specified
// in docs/decisions/0012-memcached.md.
package memcached

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bradfitz/gomemcache/memcache"
	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// Kind is what a value is.
type Kind uint8

// Kinds of values.
const (
	Pages   Kind = iota // pages of blocks
	Results             // results of parts of queries
)

func (k Kind) String() string { return [...]string{"pages", "results"}[k] }

// MaxValue is how long a value may be, in bytes: what fits into an item of 1 MiB,
// memcached's default limit, with its key and header.
const MaxValue = 1<<20 - 512

const (
	defaultPatience = 50 * time.Millisecond
	patiencePerMiB  = 10 * time.Millisecond // more, for what a Get expects
	requestTimeout  = time.Second           // of one request, whole
	drainTimeout    = 2 * time.Second       // for what is queued at the end
	probeTimeout    = 100 * time.Millisecond
	refreshEvery    = 30 * time.Second // names are resolved again
	resolveTimeout  = 5 * time.Second
	probeEvery      = time.Second // servers that are down are looked at
	expiration      = 7 * 24 * time.Hour
	keysPerRequest  = 64
	requestsAtOnce  = 16       // per server
	setters         = 4        // goroutines that put values
	queueBytes      = 64 << 20 // of values that are to be put
	queueItems      = 8192
	valueOverhead   = 128 // of a queued value, about, in bytes
)

// Options of a Client.
type Options struct {
	// Addresses are host:port. A name stands for all addresses it resolves to.
	Addresses []string
	// Patience is how long a Get waits for small values; default 50 ms.
	Patience   time.Duration
	Logger     *slog.Logger          // nil: nothing is logged
	Registerer prometheus.Registerer // nil: metrics are nowhere
}

// ValidateAddress says what is wrong with one of Options.Addresses.
func ValidateAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err == nil && (host == "" || port == "") {
		err = errors.New("host or port is missing")
	}
	if err != nil {
		return fmt.Errorf("%q is not host:port: %w", address, err)
	}
	return nil
}

// Client gets and puts values. It is safe for concurrent use. A nil *Client has
// nothing and keeps nothing.
type Client struct {
	addresses []string
	logger    *slog.Logger
	metrics   *metrics

	queue       chan item
	room        *semaphore.Weighted // of the queue, in bytes
	queuedBytes atomic.Int64        // likewise

	mu      sync.RWMutex
	servers []*server
	closed  bool
	gets    sync.WaitGroup // requests of Get that run; under mu, not begun once closed

	patience time.Duration

	// For tests.
	timeout time.Duration
	lookup  func(ctx context.Context, host string) ([]string, error)
}

// item is a value to be put; value is framed.
type item struct {
	kind  Kind
	key   string
	value []byte
	bytes int64 // of the queue's room that it takes
}

// New makes a client and looks up its servers. It starts nothing; values are put,
// and servers watched, while Run runs.
func New(ctx context.Context, o Options) (*Client, error) {
	if len(o.Addresses) == 0 {
		return nil, errors.New("memcached: no addresses")
	}
	for _, a := range o.Addresses {
		if err := ValidateAddress(a); err != nil {
			return nil, fmt.Errorf("memcached: %w", err)
		}
	}
	c := &Client{
		addresses: o.Addresses, logger: o.Logger,
		queue: make(chan item, queueItems), room: semaphore.NewWeighted(queueBytes),
		patience: o.Patience, timeout: requestTimeout, lookup: net.DefaultResolver.LookupHost,
	}
	if c.logger == nil {
		c.logger = slog.New(slog.DiscardHandler)
	}
	if c.patience == 0 {
		c.patience = defaultPatience
	}
	c.logger = c.logger.With("component", "memcached")
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	var err error
	if c.metrics, err = newMetrics(o.Registerer, c); err != nil {
		return nil, fmt.Errorf("memcached: %w", err)
	}
	c.refresh(ctx)
	return c, nil
}

// Run puts what is queued, resolves names anew, and probes servers that are down,
// until ctx ends, and then some seconds at most for what is queued. The client has
// nothing after that.
func (c *Client) Run(ctx context.Context) error {
	drain, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(drain, c.close)() // cuts what is under way
	var g errgroup.Group
	for range setters {
		g.Go(func() error {
			c.put(ctx, drain)
			return nil
		})
	}
	refresh, probe := time.NewTicker(refreshEvery), time.NewTicker(probeEvery)
	defer refresh.Stop()
	defer probe.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-refresh.C:
			c.refresh(ctx)
		case <-probe.C:
			c.probe()
		}
	}
	defer time.AfterFunc(drainTimeout, cancel).Stop()
	err := g.Wait()
	c.close()
	c.gets.Wait()
	return err
}

// close makes all Gets miss and cuts all connections.
func (c *Client) close() {
	c.mu.Lock()
	c.closed = true
	servers := c.servers
	c.mu.Unlock()
	for _, s := range servers {
		s.cut()
	}
}

// Get gives for each key its value, nil where there is none. The values expected
// have so many bytes together, about: it waits the longer. It returns early what it
// has if ctx ends.
func (c *Client) Get(ctx context.Context, kind Kind, keys []string, expected int64) [][]byte {
	out := make([][]byte, len(keys))
	if c == nil || len(keys) == 0 {
		return out
	}
	requests, release := c.requests(kind, keys)
	defer release()
	if len(requests) == 0 {
		return out
	}
	wait, cancel := context.WithTimeout(ctx, c.patience+time.Duration(expected>>20)*patiencePerMiB)
	defer cancel()
	type answer struct {
		r     *request
		items map[string]*memcache.Item
		err   error
	}
	answers := make(chan answer, len(requests)) // late ones find room too
	for _, r := range requests {
		// Ends within c.timeout, or when the client is closed; Run waits for it.
		c.gets.Go(func() {
			start := time.Now()
			items, err := r.get(wait, keys)
			if err == nil {
				c.metrics.getSeconds.Observe(time.Since(start).Seconds())
			}
			answers <- answer{r, items, err}
		})
	}
	gets := c.metrics.gets[kind]
	for left := len(requests); left > 0; left-- {
		var a answer
		select {
		case a = <-answers:
		case <-wait.Done():
			select {
			case a = <-answers: // it was there in time
			default:
				c.late(ctx, kind, requests)
				return out
			}
		}
		a.r.answered = true
		switch {
		case errors.Is(a.err, errBusy):
			gets.skipped.Add(float64(len(a.r.at)))
			continue
		case a.err != nil:
			gets.failed.Add(float64(len(a.r.at)))
			a.r.server.failed(c.logger, a.err)
			continue
		}
		a.r.server.worked()
		for _, i := range a.r.at {
			it := a.items[keys[i]]
			if it == nil {
				gets.missed.Inc()
				continue
			}
			v, ok := unframe(keys[i], it.Value)
			if !ok {
				gets.damaged.Inc()
				continue
			}
			gets.hit.Inc()
			out[i] = v
		}
	}
	return out
}

// late notes requests that are not answered in time. If the caller itself has gone,
// the servers are not to blame.
func (c *Client) late(ctx context.Context, kind Kind, requests []*request) {
	blamed := map[*server]bool{}
	for _, r := range requests {
		if r.answered {
			continue
		}
		c.metrics.gets[kind].late.Add(float64(len(r.at)))
		if ctx.Err() == nil && r.sent.Load() && !blamed[r.server] {
			blamed[r.server] = true
			r.server.failed(c.logger, errLate)
		}
	}
}

// errLate is why a server counts as down that answers, but too late.
var errLate = errors.New("no answer in time")

// request asks one server for some of the keys of a Get.
type request struct {
	server   *server
	at       []int // indexes of keys
	sent     atomic.Bool
	answered bool
}

// get sends the request once the server has a slot.
func (r *request) get(ctx context.Context, all []string) (map[string]*memcache.Item, error) {
	keys := make([]string, len(r.at))
	for i, at := range r.at {
		keys[i] = all[at]
	}
	select {
	case r.server.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, errBusy
	}
	defer func() { <-r.server.slots }()
	r.sent.Store(true)
	return r.server.client.GetMulti(keys)
}

// requests shares the keys out to the servers that are up. Call release when no more
// of them is begun.
func (c *Client) requests(kind Kind, keys []string) (out []*request, release func()) {
	c.mu.RLock()
	if c.closed {
		return nil, c.mu.RUnlock
	}
	open := map[*server]*request{}
	for i, key := range keys {
		s := pick(c.servers, key)
		if s == nil || s.isDown() || !legal(key) {
			c.metrics.gets[kind].skipped.Inc()
			continue
		}
		r := open[s]
		if r == nil || len(r.at) == keysPerRequest {
			r = &request{server: s}
			open[s] = r
			out = append(out, r)
		}
		r.at = append(r.at, i)
	}
	return out, c.mu.RUnlock
}

// legal reports whether memcached takes the key.
func legal(key string) bool {
	if key == "" || len(key) > 250 {
		return false
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] == 0x7f {
			return false
		}
	}
	return true
}

// Set queues a value to be put, and never waits: if the queue is full, it is
// dropped. It keeps nothing of value.
func (c *Client) Set(kind Kind, key string, value []byte) {
	if c == nil || !c.wanted(kind, key, value) {
		return
	}
	bytes := queued(key, value)
	if !c.room.TryAcquire(bytes) {
		c.metrics.sets[kind].dropped.Inc()
		return
	}
	select {
	case c.queue <- c.framed(kind, key, value, bytes):
	default:
		c.drop(kind, bytes)
	}
}

// SetWaiting is Set that waits for room in the queue, until ctx ends.
func (c *Client) SetWaiting(ctx context.Context, kind Kind, key string, value []byte) {
	if c == nil || !c.wanted(kind, key, value) {
		return
	}
	bytes := queued(key, value)
	if c.room.Acquire(ctx, bytes) != nil {
		c.metrics.sets[kind].dropped.Inc()
		return
	}
	select {
	case c.queue <- c.framed(kind, key, value, bytes):
	case <-ctx.Done():
		c.drop(kind, bytes)
	}
}

// queued is how much of the queue's room a value takes.
func queued(key string, value []byte) int64 { return int64(len(key) + len(value) + valueOverhead) }

func (c *Client) framed(kind Kind, key string, value []byte, bytes int64) item {
	c.queuedBytes.Add(bytes)
	return item{kind: kind, key: key, value: frame(key, value), bytes: bytes}
}

// drop gives back the room of a value that isn't queued after all.
func (c *Client) drop(kind Kind, bytes int64) {
	c.metrics.sets[kind].dropped.Inc()
	c.free(bytes)
}

func (c *Client) free(bytes int64) {
	c.queuedBytes.Add(-bytes)
	c.room.Release(bytes)
}

// wanted says whether a value is worth queueing.
func (c *Client) wanted(kind Kind, key string, value []byte) bool {
	sets := c.metrics.sets[kind]
	if len(value) > MaxValue || !legal(key) {
		sets.oversize.Inc()
		return false
	}
	if s := c.pick(key); s == nil || s.isDown() {
		sets.skipped.Inc()
		return false
	}
	return true
}

func (c *Client) pick(key string) *server {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return nil
	}
	return pick(c.servers, key)
}

// put empties the queue until ctx ends, and then what is in it until drain does.
func (c *Client) put(ctx, drain context.Context) {
	for {
		select {
		case it := <-c.queue:
			c.putOne(drain, &it)
			continue
		default:
		}
		select {
		case it := <-c.queue:
			c.putOne(drain, &it)
		case <-ctx.Done():
			if len(c.queue) == 0 || drain.Err() != nil {
				return
			}
		}
	}
}

func (c *Client) putOne(ctx context.Context, it *item) {
	defer c.free(it.bytes)
	sets := c.metrics.sets[it.kind]
	s := c.pick(it.key)
	if s == nil || s.isDown() {
		sets.skipped.Inc()
		return
	}
	err := s.set(ctx, &memcache.Item{Key: it.key, Value: it.value, Expiration: int32(expiration.Seconds())})
	if err == nil {
		sets.stored.Inc()
		s.worked()
		return
	}
	sets.failed.Inc()
	// A server that is full says so, and is well.
	if ctx.Err() == nil && broken(err) {
		s.failed(c.logger, err)
	}
}

// The frame of a value is the xxhash64 of its key, a line feed and itself, before
// it.
const frameBytes = 8

func sum(key string, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.WriteString(key) // a hash never fails
	_, _ = d.WriteString("\n")
	_, _ = d.Write(value)
	return d.Sum64()
}

func frame(key string, value []byte) []byte {
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, frameBytes+len(value)), sum(key, value))
	return append(b, value...)
}

func unframe(key string, b []byte) ([]byte, bool) {
	if len(b) < frameBytes || binary.LittleEndian.Uint64(b) != sum(key, b[frameBytes:]) {
		return nil, false
	}
	return b[frameBytes:], true
}

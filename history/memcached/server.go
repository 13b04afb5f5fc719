package memcached

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/bradfitz/gomemcache/memcache"
	"github.com/cespare/xxhash/v2"
)

// server is one memcached.
type server struct {
	address string // ip:port
	hash    uint64 // of address
	client  *memcache.Client
	prober  *memcache.Client
	slots   chan struct{} // holds one for each request under way

	mu       sync.Mutex
	failures int // in a row
	down     bool
	retry    time.Time     // not before, if down
	pause    time.Duration // until the next probe
	conns    map[*conn]struct{}
	gone     bool
}

const (
	failuresToDown = 3
	minPause       = time.Second
	maxPause       = 30 * time.Second
)

// errBusy says that all of a server's slots were taken.
var errBusy = errors.New("too many requests under way")

func newServer(address string, timeout time.Duration) *server {
	s := &server{
		address: address, hash: xxhash.Sum64String(address), slots: make(chan struct{}, requestsAtOnce),
		pause: minPause, conns: map[*conn]struct{}{},
	}
	client := func(timeout time.Duration) *memcache.Client {
		c := memcache.NewFromSelector(only{addr(address)})
		c.Timeout, c.MaxIdleConns, c.DialContext = timeout, requestsAtOnce, s.dial
		return c
	}
	s.client, s.prober = client(timeout), client(probeTimeout)
	return s
}

// only is the selector of a client of one server.
type only struct{ addr }

func (o only) PickServer(string) (net.Addr, error)     { return o.addr, nil }
func (o only) Each(fn func(addr net.Addr) error) error { return fn(o.addr) }

type addr string

func (a addr) Network() string { return "tcp" }
func (a addr) String() string  { return string(a) }

// pick gives the server of a key: the one with the greatest hash over both, so
// that keys of others stay where they are when one comes or goes.
func pick(servers []*server, key string) *server {
	if len(servers) == 0 {
		return nil
	}
	h := xxhash.Sum64String(key)
	return slices.MaxFunc(servers, func(a, b *server) int { return cmp.Compare(mix(h^a.hash), mix(h^b.hash)) })
}

// mix is the finalizer of splitmix64 (Steele, Lea and Flood 2014): each bit of x
// changes each bit of the result with a probability of a half.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// set puts an item, once there is a slot.
func (s *server) set(ctx context.Context, it *memcache.Item) error {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.slots }()
	return s.client.Set(it)
}

func (s *server) isDown() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down
}

// worked notes a request that was answered in time.
func (s *server) worked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures, s.pause = 0, minPause
}

// failed notes one that was not.
func (s *server) failed(logger *slog.Logger, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures++
	if s.gone || s.down || s.failures < failuresToDown {
		return
	}
	s.down, s.retry = true, time.Now().Add(s.pause)
	if s.pause == minPause { // else it was well for but a moment
		logger.Warn("server is down, going on without it", "server", s.address, "err", err)
	}
	s.pause = min(2*s.pause, maxPause)
}

// probe asks a server that is down whether it is still so, if it is time. It is up
// again on trial: one more failure is enough.
func (s *server) probe(logger *slog.Logger) {
	s.mu.Lock()
	due := s.down && !s.gone && !time.Now().Before(s.retry)
	s.mu.Unlock()
	if !due {
		return
	}
	err := s.prober.Ping()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.retry, s.pause = time.Now().Add(s.pause), min(2*s.pause, maxPause)
		return
	}
	s.down, s.failures = false, failuresToDown-1
	logger.Info("server answers again", "server", s.address)
}

// broken tells failures of a server from what it says of a value.
func broken(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errAnswer)
}

func (s *server) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc, server: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return nil, errors.Join(net.ErrClosed, nc.Close())
	}
	s.conns[c] = struct{}{}
	return c, nil
}

// cut ends all connections, for good.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	for c := range s.conns {
		_ = c.Conn.Close() // whoever uses it gets the error
	}
	clear(s.conns)
}

// errAnswer is what an answer gives that no memcached should give.
var errAnswer = errors.New("not an answer of memcached")

// conn looks at the answers that pass through it, so that the client can't be made
// to take memory, or wait, for what a broken server announces: values are no longer
// than MaxValue, no more than were asked for, and the deadline that stands when an
// answer begins stands for all of it.
type conn struct {
	net.Conn
	server *server

	begun  bool // an answer, and not ended
	values int  // of this answer
	body   int  // bytes left of the present value and its line's end
	line   []byte
}

// maxLine is how long a line of an answer may be: "VALUE", a key, numbers.
const maxLine = 512

// Close implements net.Conn.
func (c *conn) Close() error {
	c.server.mu.Lock()
	delete(c.server.conns, c)
	c.server.mu.Unlock()
	return c.Conn.Close()
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	if c.begun {
		return nil
	}
	return c.Conn.SetDeadline(t)
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if bad := c.look(b[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (c *conn) look(b []byte) error {
	for len(b) > 0 {
		c.begun = true
		if c.body > 0 {
			n := min(c.body, len(b))
			c.body, b = c.body-n, b[n:]
			continue
		}
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		b = rest
		if len(c.line)+len(line) > maxLine {
			return fmt.Errorf("%w: a line of more than %d bytes", errAnswer, maxLine)
		}
		c.line = append(c.line, line...)
		if !whole {
			return nil
		}
		fields := bytes.Fields(c.line)
		if len(fields) < 4 || string(fields[0]) != "VALUE" {
			c.begun, c.values = false, 0
		} else {
			size, err := strconv.ParseUint(string(fields[3]), 10, 32)
			if err != nil || size > MaxValue+frameBytes {
				return fmt.Errorf("%w: a value of %q bytes", errAnswer, fields[3])
			}
			if c.values++; c.values > keysPerRequest {
				return fmt.Errorf("%w: more than %d values", errAnswer, keysPerRequest)
			}
			c.body = int(size) + 2
		}
		c.line = c.line[:0]
	}
	return nil
}

// refresh resolves the addresses. A name that can't be resolved keeps its servers.
func (c *Client) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	c.mu.RLock()
	before := c.servers
	c.mu.RUnlock()
	var addresses []string
	failed := false
	for _, a := range c.addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			continue // validated
		}
		ips, err := c.lookup(ctx, host)
		if err != nil {
			failed = true
			c.metrics.lookupFailures.Inc()
			if len(before) == 0 {
				c.logger.Warn("name of memcached servers not resolved, trying on", "name", host, "err", err)
			}
		}
		for _, ip := range ips {
			addresses = append(addresses, net.JoinHostPort(ip, port))
		}
	}
	if failed {
		// Which of them were of that name isn't known: none goes.
		for _, s := range before {
			addresses = append(addresses, s.address)
		}
	}
	slices.Sort(addresses)
	addresses = slices.Compact(addresses)
	var after []*server
	for _, a := range addresses {
		if i := slices.IndexFunc(before, func(s *server) bool { return s.address == a }); i >= 0 {
			after = append(after, before[i])
			continue
		}
		after = append(after, newServer(a, c.timeout))
	}
	c.mu.Lock()
	if c.closed {
		after = nil
	}
	c.servers = after
	c.mu.Unlock()
	for _, s := range before {
		if !slices.Contains(after, s) {
			s.cut()
		}
	}
}

// probe looks at servers that are down, all at once.
func (c *Client) probe() {
	c.mu.RLock()
	servers := c.servers
	c.mu.RUnlock()
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(func() { s.probe(c.logger) })
	}
	wg.Wait()
}

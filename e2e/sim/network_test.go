package sim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// network carries bytes in memory between named places. What one connection
// carries keeps its order, as TCP has it; connections overtake each other, and
// what is under way is lost when one breaks.
type network struct {
	mu        sync.Mutex
	listeners map[string]*bufconn.Listener // by address
	links     map[[2]string]*link
	ended     map[string]bool // places that are no more
}

// link is how well the way from one place to another works.
type link struct {
	mu      sync.Mutex
	cut     bool // nothing gets through, and connections break
	silent  bool // with cut: new connections get no answer instead of a refusal
	stalled bool // nothing gets through for now
	delay   time.Duration
	changed chan struct{} // closed at the next change
	conns   map[*conn]bool
}

var errCut = errors.New("the network is cut")

func newNetwork() *network {
	return &network{listeners: map[string]*bufconn.Listener{}, links: map[[2]string]*link{}, ended: map[string]bool{}}
}

func (n *network) link(from, to string) *link {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.links[[2]string{from, to}]
	if l == nil {
		l = &link{changed: make(chan struct{}), conns: map[*conn]bool{}, cut: n.ended[from]}
		n.links[[2]string{from, to}] = l
	}
	return l
}

// end cuts a place off for good.
func (n *network) end(from string) {
	n.mu.Lock()
	n.ended[from] = true
	var links []*link
	for k, l := range n.links {
		if k[0] == from {
			links = append(links, l)
		}
	}
	n.mu.Unlock()
	for _, l := range links {
		l.set(func() { l.cut, l.stalled, l.silent = true, false, false })
	}
}

// heal makes all links work but those of places that are no more.
func (n *network) heal() {
	n.mu.Lock()
	links := map[*link]bool{}
	for k, l := range n.links {
		links[l] = n.ended[k[0]]
	}
	n.mu.Unlock()
	for l, ended := range links {
		if !ended {
			l.set(func() { l.cut, l.silent, l.stalled, l.delay = false, false, false, 0 })
		}
	}
}

func (n *network) listen(address string) *bufconn.Listener {
	l := bufconn.Listen(64 << 10)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[address] = l
	return l
}

// dialer dials from a place.
func (n *network) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		link := n.link(from, address)
		if err := link.pass(ctx.Done()); err != nil {
			link.mu.Lock()
			silent := link.silent
			link.mu.Unlock()
			if silent {
				<-ctx.Done()
			}
			return nil, err
		}
		n.mu.Lock()
		l := n.listeners[address]
		n.mu.Unlock()
		if l == nil {
			return nil, fmt.Errorf("nobody listens at %s", address)
		}
		inner, err := l.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: inner, link: link, closed: make(chan struct{})}
		link.mu.Lock()
		defer link.mu.Unlock()
		if link.cut {
			inner.Close()
			return nil, errCut
		}
		link.conns[c] = true
		return c, nil
	}
}

// set changes the link, and breaks its connections if it is cut then.
func (l *link) set(change func()) {
	l.mu.Lock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
	var broken []*conn
	if l.cut {
		for c := range l.conns {
			broken = append(broken, c)
		}
	}
	l.mu.Unlock()
	for _, c := range broken {
		c.Close()
	}
}

// pass waits until the link lets something through.
func (l *link) pass(done <-chan struct{}) error {
	for {
		l.mu.Lock()
		cut, stalled, delay, changed := l.cut, l.stalled, l.delay, l.changed
		l.mu.Unlock()
		switch {
		case cut:
			return errCut
		case stalled:
			select {
			case <-changed:
			case <-done:
				return errCut
			}
			continue
		case delay > 0:
			select {
			case <-time.After(delay):
			case <-done:
				return errCut
			}
		}
		return nil
	}
}

// conn is the dialling side's end of a connection.
type conn struct {
	net.Conn
	link   *link
	once   sync.Once
	closed chan struct{}
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		if err := c.link.pass(c.closed); err != nil {
			return 0, err
		}
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	if err := c.link.pass(c.closed); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *conn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.link.mu.Lock()
		delete(c.link.conns, c)
		c.link.mu.Unlock()
	})
	return c.Conn.Close()
}

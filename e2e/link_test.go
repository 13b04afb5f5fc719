package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// link is a way to an address, TCP and UDP, that a test can make bad.
type link struct {
	addr, target string

	mu      sync.Mutex
	bad     trouble
	changed chan struct{} // closed when bad changes
	conns   map[net.Conn]bool
}

// trouble is what is wrong with a link.
type trouble struct {
	refuse bool          // connections are closed, and so are new ones
	stall  bool          // nothing gets through, nobody is told
	delay  time.Duration // of each packet
	loss   float64       // share of UDP packets, and of TCP connections each second, that are lost
}

// startLink makes a link to a target that need not be there yet.
func startLink(t *testing.T, target string) *link {
	t.Helper()
	return startLinkOn(t, "127.0.0.1", target)
}

func startLinkOn(t *testing.T, host, target string) *link {
	t.Helper()
	k := &link{target: target, conns: map[net.Conn]bool{}, changed: make(chan struct{})}
	var lc net.ListenConfig
	var l net.Listener
	var pc net.PacketConn
	for i := 0; ; i++ { // one port that is free for both
		var err error
		if l, err = lc.Listen(t.Context(), "tcp", host+":0"); err == nil {
			if pc, err = lc.ListenPacket(t.Context(), "udp", l.Addr().String()); err == nil {
				break
			}
			l.Close()
		}
		if i == 10 {
			t.Fatal(err)
		}
	}
	k.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { k.accept(ctx, l, &wg) })
	wg.Go(func() { k.packets(ctx, pc) })
	t.Cleanup(func() {
		cancel()
		l.Close()
		pc.Close()
		k.set(trouble{refuse: true})
		wg.Wait()
	})
	return k
}

// set makes the link as bad as said; the zero value heals it.
func (k *link) set(b trouble) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.bad = b
	close(k.changed)
	k.changed = make(chan struct{})
	if b.refuse {
		k.cut()
	}
}

// cut closes all connections. The caller holds k.mu.
func (k *link) cut() {
	for c := range k.conns {
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.SetLinger(0) // a reset
		}
		c.Close()
	}
	clear(k.conns)
}

func (k *link) state() (trouble, chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.bad, k.changed
}

// pass waits until what was read may go on.
func (k *link) pass(ctx context.Context) {
	for {
		b, changed := k.state()
		if !b.stall {
			pause(ctx, b.delay)
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (k *link) accept(ctx context.Context, l net.Listener, wg *sync.WaitGroup) {
	wg.Go(func() {
		for ctx.Err() == nil {
			pause(ctx, time.Second)
			k.mu.Lock()
			if k.bad.loss > rand.Float64() {
				k.cut()
			}
			k.mu.Unlock()
		}
	})
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if b, _ := k.state(); b.refuse {
			c.Close()
			continue
		}
		wg.Go(func() {
			k.pass(ctx)
			var d net.Dialer
			to, err := d.DialContext(ctx, "tcp", k.target)
			if err != nil {
				c.Close()
				return
			}
			k.mu.Lock()
			k.conns[c], k.conns[to] = true, true
			if k.bad.refuse || ctx.Err() != nil {
				k.cut()
			}
			k.mu.Unlock()
			wg.Go(func() { k.copy(ctx, to, c) })
			k.copy(ctx, c, to)
		})
	}
}

func (k *link) copy(ctx context.Context, to, from net.Conn) {
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.conns, to)
		delete(k.conns, from)
		to.Close()
		from.Close()
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		k.pass(ctx)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// packets forwards one way: who answers knows the address of who asked.
func (k *link) packets(ctx context.Context, pc net.PacketConn) {
	target, err := net.ResolveUDPAddr("udp", k.target)
	if err != nil {
		return
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		b, _ := k.state()
		if b.refuse || b.stall || b.loss > rand.Float64() {
			continue
		}
		pause(ctx, min(b.delay, 50*time.Millisecond)) // a queue in one
		_, _ = pc.WriteTo(buf[:n], target)            // lost, as UDP is
	}
}

// ringState waits until a gateway has a member in a state.
func ringState(t *testing.T, gw *member, id string, want ring.State) {
	t.Helper()
	eventually(t, time.Minute, fmt.Sprint(id, " to be ", want, " on the ring"), func() error {
		members, err := ringMembers(t.Context(), gw)
		if err != nil {
			return err
		}
		if !slices.Contains(members[id], want) {
			return fmt.Errorf("ring is %v", members)
		}
		return nil
	})
}

// ringGone waits until a member is on the ring no more, but perhaps as one that
// was lost before.
func ringGone(t *testing.T, gw *member, id string) {
	t.Helper()
	eventually(t, time.Minute, id+" to leave the ring", func() error {
		members, err := ringMembers(t.Context(), gw)
		if slices.ContainsFunc(members[id], func(s ring.State) bool { return s != ring.Lost }) {
			err = fmt.Errorf("ring is %v", members)
		}
		return err
	})
}

// ringMembers are the states of the members, as a gateway tells sidecars. One may
// be there and have been lost before.
func ringMembers(ctx context.Context, gw *member) (map[string][]ring.State, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, gw.url+"/ring", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var s ring.Snapshot
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return nil, err
	}
	states := map[string][]ring.State{}
	for _, m := range s.Members {
		states[m.ID] = append(states[m.ID], m.State)
	}
	return states, nil
}

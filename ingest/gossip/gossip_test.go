package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

func TestMain(m *testing.M) {
	// A probe under way at Shutdown ends by its own timeout; memberlist doesn't
	// wait for it.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

type node struct {
	*Gossip
	live *ring.Live
	addr string
	stop func()
}

// create makes a member that does not run: it can vanish without leaving.
func create(t *testing.T, id, addr string, join ...string) *node {
	t.Helper()
	n := &node{live: &ring.Live{}, addr: addr}
	if n.addr == "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		n.addr = l.Addr().String()
		l.Close()
	}
	var err error
	n.Gossip, err = New(Options{
		ID: id, Bind: n.addr, Join: join, Member: ring.Member{Address: "addr-of-" + id, Zone: "z"},
	}, n.live, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func start(t *testing.T, id string, join ...string) *node {
	t.Helper()
	n := create(t, id, "", join...)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Logf("run: %v", err)
		}
	})
	n.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(n.stop)
	return n
}

// await waits until the ring as seen by n is as told: "id=state id=state".
func await(t *testing.T, n *node, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	got, version := "", ""
	for ctx.Err() == nil {
		r := n.live.Wait(ctx, version)
		version = r.Version()
		got = ""
		for i, m := range r.Snapshot().Members {
			if i > 0 {
				got += " "
			}
			got += fmt.Sprintf("%s=%s", m.ID, m.State)
		}
		if got == want {
			return
		}
	}
	t.Fatalf("members are %q, want %q", got, want)
}

func TestMembersComeAndGo(t *testing.T) {
	a := start(t, "a")
	b := start(t, "b", a.addr)
	c := create(t, "c", "")
	if _, err := c.list.Join([]string{a.addr}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b, c} {
		n.SetState(ring.Active)
	}
	for _, n := range []*node{a, b, c} {
		await(t, n, "a=active b=active c=active")
	}
	// One leaves as it should.
	b.SetState(ring.Leaving)
	await(t, a, "a=active b=leaving c=active")
	b.SetState(ring.Left)
	b.stop()
	await(t, a, "a=active c=active")
	// One goes before it has flushed all.
	d := start(t, "d", a.addr)
	d.SetState(ring.Leaving)
	await(t, a, "a=active c=active d=leaving")
	d.stop()
	await(t, a, "a=active c=active d=lost")
	// One vanishes.
	if err := c.list.Shutdown(); err != nil {
		t.Fatal(err)
	}
	await(t, a, "a=active c=lost d=lost")
}

// One that has left is not taken for lost where the word of it takes long to go out.
func TestLeftIsTold(t *testing.T) {
	a := start(t, "a")
	b := start(t, "b", a.addr)
	for _, n := range []*node{a, b} {
		n.SetState(ring.Active)
	}
	for _, n := range []*node{a, b} {
		await(t, n, "a=active b=active")
	}
	update, busy := b.update, 2
	b.update = func(within time.Duration) error {
		if busy--; busy >= 0 {
			return errors.New("not yet")
		}
		return update(within)
	}
	b.SetState(ring.Left)
	b.stop()
	await(t, a, "a=active")
}

// A lost member stays until its sources have sent again what it held; those that
// come later know of it; one that comes back as it was is lost no more, one that
// comes back without its memory is there twice.
func TestLost(t *testing.T) {
	var resending atomic.Bool
	resending.Store(true)
	with := func(id, addr, process string, o Options, join ...string) *node {
		n := &node{live: &ring.Live{}, addr: addr}
		if n.addr == "" {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			n.addr = l.Addr().String()
			l.Close()
		}
		o.ID, o.Bind, o.Join = id, n.addr, join
		o.Member = ring.Member{Address: "addr-of-" + id, Process: process}
		var err error
		if n.Gossip, err = New(o, n.live, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err != nil {
			t.Fatal(err)
		}
		if o.LostFor == 0 { // it will vanish: no Run, which would leave
			if _, err := n.list.Join(join); err != nil {
				t.Fatal(err)
			}
		} else {
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			wg.Go(func() { _ = n.Run(ctx) })
			t.Cleanup(func() { cancel(); wg.Wait() })
		}
		n.SetState(ring.Active)
		return n
	}
	vanish := func(n *node) {
		if err := n.list.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
	grace := Options{LostGrace: 500 * time.Millisecond, LostFor: time.Hour}
	first := grace
	first.Resending = resending.Load
	a := with("a", "", "1", first)
	b := with("b", "", "1", Options{}, a.addr)
	await(t, a, "a=active b=active")
	vanish(b)
	await(t, a, "a=active b=lost")
	c := with("c", "", "1", grace, a.addr)
	await(t, c, "a=active b=lost c=active")

	// As it was.
	b2 := with("b", b.addr, "1", Options{}, a.addr)
	for _, n := range []*node{a, b2, c} {
		await(t, n, "a=active b=active c=active")
	}
	// Without its memory: SetState(Left) is not said, the process is another.
	vanish(b2)
	b3 := with("b", b.addr, "2", grace, a.addr)
	for _, n := range []*node{a, c, b3} {
		await(t, n, "a=active b=lost b=active c=active")
	}
	// Its sources are done.
	resending.Store(false)
	for _, n := range []*node{a, c, b3} {
		await(t, n, "a=active b=active c=active")
	}
}

func TestBadAddress(t *testing.T) {
	_, err := New(Options{ID: "x", Bind: "nonsense"}, &ring.Live{}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err == nil {
		t.Error("an address without a port was taken")
	}
}

// A new member waits until the others can have heard of it, and no longer.
func TestSettle(t *testing.T) {
	a := create(t, "a", "")
	defer a.Close()
	b := start(t, "b", a.addr)
	b.Settle(t.Context())
	if d := time.Since(b.began); d < settleTime {
		t.Errorf("settled after %s", d)
	}
	known := false
	for _, m := range a.live.Ring().Snapshot().Members {
		known = known || m.ID == "b"
	}
	if !known {
		t.Error("the other hasn't heard of it")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b.began = time.Now().Add(time.Hour)
	b.Settle(ctx)
}

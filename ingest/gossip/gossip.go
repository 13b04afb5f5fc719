// Package gossip spreads the members of the ring among ingesters and gateways
// with hashicorp/memberlist, and keeps a ring.Live up to date with them.
//
// What a member says of itself (address, zone, state) travels in memberlist's
// node metadata. A member that went without saying so is kept as lost for a
// time, so that readers can warn; one that said left before it went is gone.
// Gateways take part to know the ingesters; they are not on the ring.
package gossip

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// Options of a Gossip. ID, Bind are required.
type Options struct {
	ID        string   // unique and stable: tokens are a function of it
	Bind      string   // host:port to listen on, TCP and UDP
	Advertise string   // host:port that others reach it by; empty: Bind
	Join      []string // host:port of others; names are resolved at each try
	// Member is what goes on the ring: the address of the gRPC server, the
	// zone, the process.
	// A gateway leaves Address empty.
	Member  ring.Member
	LostFor time.Duration // how long a vanished member is kept as lost
}

// Gossip takes part in the gossip. Make one with New, then Run it.
type Gossip struct {
	opts   Options
	live   *ring.Live
	logger *slog.Logger
	list   *memberlist.Memberlist

	mu    sync.Mutex
	state ring.State
	peers map[string]peer
}

type peer struct {
	meta meta
	lost time.Time // when it vanished; zero: it is there
}

// meta is the node metadata: at most 512 bytes as JSON.
type meta struct {
	Address string     `json:"a,omitempty"`
	Zone    string     `json:"z,omitempty"`
	State   ring.State `json:"s,omitempty"`
	Process string     `json:"p,omitempty"`
}

const (
	joinTimeout  = 5 * time.Second
	joinEvery    = 10 * time.Second // anew, so that parts that lost each other meet again
	leaveTimeout = 2 * time.Second
	updateWithin = 2 * time.Second
)

// New opens the gossip port. A member starts as joining.
func New(o Options, live *ring.Live, logger *slog.Logger, reg prometheus.Registerer) (*Gossip, error) {
	host, portText, err := net.SplitHostPort(o.Bind)
	if err != nil {
		return nil, fmt.Errorf("gossip address %q: %w (give host:port)", o.Bind, err)
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, fmt.Errorf("gossip address %q: the port is not a number", o.Bind)
	}
	if o.LostFor <= 0 {
		o.LostFor = 5 * time.Minute
	}
	g := &Gossip{opts: o, live: live, logger: logger.With("component", "gossip"), state: ring.Joining, peers: map[string]peer{}}
	c := memberlist.DefaultLANConfig()
	c.Name = o.ID
	c.BindAddr, c.BindPort = host, port
	if c.BindAddr == "" {
		c.BindAddr = "0.0.0.0"
	}
	c.AdvertisePort = port
	if o.Advertise != "" {
		ahost, aport, err := net.SplitHostPort(o.Advertise)
		if err != nil {
			return nil, fmt.Errorf("gossip advertise address %q: %w (give host:port)", o.Advertise, err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), joinTimeout)
		defer cancel()
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, ahost)
		if err != nil || len(ips) == 0 {
			return nil, fmt.Errorf("gossip advertise address %q: %w", o.Advertise, err)
		}
		c.AdvertiseAddr = ips[0].IP.String()
		if c.AdvertisePort, err = strconv.Atoi(aport); err != nil {
			return nil, fmt.Errorf("gossip advertise address %q: the port is not a number", o.Advertise)
		}
	}
	// A crash is to be noticed within a few seconds.
	c.ProbeInterval, c.ProbeTimeout, c.SuspicionMult = 500*time.Millisecond, 300*time.Millisecond, 3
	c.PushPullInterval = 10 * time.Second
	c.GossipInterval = 100 * time.Millisecond
	c.DeadNodeReclaimTime = time.Second // a restarted member may come back under its id with another address
	c.Delegate, c.Events = g, g
	c.Logger = slog.NewLogLogger(logger.With("component", "memberlist").Handler(), slog.LevelDebug)
	if g.list, err = memberlist.Create(c); err != nil {
		return nil, fmt.Errorf("listen for gossip on %s: %w", o.Bind, err)
	}
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gossip_members", Help: "Processes that take part in the gossip, this one included.",
	}, func() float64 { return float64(g.list.NumMembers()) }))
	return g, nil
}

// Run joins the others and keeps the ring up to date until ctx ends; then it
// leaves.
func (g *Gossip) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var joined time.Time
	for warned := false; ; {
		if len(g.opts.Join) > 0 && time.Since(joined) > joinEvery {
			joined = time.Now()
			if _, err := g.list.Join(g.opts.Join); err != nil && g.list.NumMembers() <= 1 && !warned {
				warned = true
				g.logger.Warn("no other member reached yet, trying on", "join", g.opts.Join, "err", err)
			}
		}
		g.forgetLost(time.Now())
		select {
		case <-ctx.Done():
			err := g.list.Leave(leaveTimeout)
			return errors.Join(err, g.list.Shutdown())
		case <-tick.C:
		}
	}
}

// Close ends the gossip without a word to the others, where Run was not called.
func (g *Gossip) Close() error { return g.list.Shutdown() }

// SetState says to all what state this member is in.
func (g *Gossip) SetState(s ring.State) error {
	g.mu.Lock()
	g.state = s
	g.mu.Unlock()
	if err := g.list.UpdateNode(updateWithin); err != nil {
		return fmt.Errorf("spread state %s: %w", s, err)
	}
	return nil
}

func (g *Gossip) forgetLost(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, p := range g.peers {
		if !p.lost.IsZero() && now.Sub(p.lost) > g.opts.LostFor {
			g.logger.Info("lost member forgotten", "owner", id)
			delete(g.peers, id)
		}
	}
	g.publish()
}

// publish puts the peers onto the ring. The caller holds g.mu.
func (g *Gossip) publish() {
	var ms []ring.Member
	for id, p := range g.peers {
		if p.meta.Address == "" {
			continue
		}
		m := ring.Member{ID: id, Address: p.meta.Address, Zone: p.meta.Zone, State: p.meta.State, Process: p.meta.Process}
		if !p.lost.IsZero() {
			m.State = ring.Lost
		}
		ms = append(ms, m)
	}
	g.live.Set(ring.NewSnapshot(ms))
}

func (g *Gossip) see(n *memberlist.Node) {
	var m meta
	if err := json.Unmarshal(n.Meta, &m); err != nil {
		g.logger.Warn("member speaks another language, left out", "owner", n.Name, "err", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.peers[n.Name] = peer{meta: m}
	g.publish()
}

// NotifyJoin implements memberlist.EventDelegate.
func (g *Gossip) NotifyJoin(n *memberlist.Node) { g.see(n) }

// NotifyUpdate implements memberlist.EventDelegate.
func (g *Gossip) NotifyUpdate(n *memberlist.Node) { g.see(n) }

// NotifyLeave implements memberlist.EventDelegate: the node left or is dead.
func (g *Gossip) NotifyLeave(n *memberlist.Node) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, known := g.peers[n.Name]
	if !known {
		return
	}
	// One that goes while it is leaving has not flushed all.
	if p.meta.Address == "" || p.meta.State == ring.Left {
		delete(g.peers, n.Name)
	} else {
		p.lost = time.Now()
		g.peers[n.Name] = p
		g.logger.Warn("member vanished", "owner", n.Name, "addr", p.meta.Address)
	}
	g.publish()
}

// NodeMeta implements memberlist.Delegate.
func (g *Gossip) NodeMeta(limit int) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := meta{Address: g.opts.Member.Address, Zone: g.opts.Member.Zone}
	if m.Address != "" {
		m.State, m.Process = g.state, g.opts.Member.Process
	}
	b, err := json.Marshal(m)
	if err != nil || len(b) > limit {
		g.logger.Error("member can't be announced: address and zone are too long", "size_bytes", len(b), "limit", limit)
		return nil
	}
	return b
}

// NotifyMsg implements memberlist.Delegate; no user messages are sent.
func (*Gossip) NotifyMsg([]byte) {}

// GetBroadcasts implements memberlist.Delegate.
func (*Gossip) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState implements memberlist.Delegate.
func (*Gossip) LocalState(bool) []byte { return nil }

// MergeRemoteState implements memberlist.Delegate.
func (*Gossip) MergeRemoteState([]byte, bool) {}

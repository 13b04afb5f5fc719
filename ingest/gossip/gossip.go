// Package gossip spreads the members of the ring among ingesters and gateways
// with hashicorp/memberlist, and keeps a ring.Live up to date with them.
//
// What a member says of itself (address, zone, state, process) travels in
// memberlist's node metadata. A member that went without saying left, or came
// back as another process, is lost: it stays on the ring as such, so that readers
// can warn, until its sources have sent again what it held. Whether one still does
// is what ingesters hear from them, and say in their metadata. Who is lost is
// exchanged among members too, so that one that comes later knows.
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
	// zone, the process, its memory.
	// A gateway leaves Address empty.
	Member ring.Member
	// Worker is the address of a gateway's gRPC server, for other gateways.
	Worker string
	// LostGrace is how long a lost member stays lost at least: sources need some
	// time to notice, and to say that they are sending again. 1 minute.
	LostGrace time.Duration
	// LostFor is how long it stays at most, whatever sources say. 1 hour.
	LostFor time.Duration
	// Resending says whether a source has told this ingester that it is sending
	// again, or hasn't said for a while whether it is. Nil for a gateway.
	Resending func() bool
}

// Gossip takes part in the gossip. Make one with New, then Run it.
type Gossip struct {
	opts   Options
	live   *ring.Live
	logger *slog.Logger
	list   *memberlist.Memberlist
	update func(within time.Duration) error // memberlist's UpdateNode
	began  time.Time

	telling   sync.Mutex // held while others are told what is new of this member
	mu        sync.Mutex
	state     ring.State
	resending bool
	peers     map[string]meta      // that are there, by id
	lost      map[lostID]lost      // members that vanished
	forgotten map[lostID]time.Time // when, of such that may yet be told of by others
}

// lostID is what a member had received in a life, or several with its commit log.
type lostID struct{ id, memory string }

type lost struct {
	meta  meta
	since time.Time
}

// lostMessage is a lost member as members tell each other: JSON.
type lostMessage struct {
	ID    string `json:"id"`
	Meta  meta   `json:"meta"`
	Since int64  `json:"since"` // ms since the epoch
}

// maxLost bounds how many lost members are believed in.
const maxLost = 10_000

// meta is the node metadata: at most 512 bytes as JSON.
type meta struct {
	Address string     `json:"a,omitempty"`
	Zone    string     `json:"z,omitempty"`
	State   ring.State `json:"s,omitempty"`
	Process string     `json:"p,omitempty"`
	Memory  string     `json:"m,omitempty"`
	// Resending: a source is sending again what a lost ingester held.
	Resending bool `json:"r,omitempty"`
	// Worker is the address at which a gateway computes parts of others' queries.
	Worker string `json:"w,omitempty"`
}

const (
	joinTimeout  = 5 * time.Second
	joinEvery    = 10 * time.Second // anew, so that parts that lost each other meet again
	leaveTimeout = 2 * time.Second
	updateWithin = 2 * time.Second
	leftTries    = 5 // each updateWithin at most
	// settleTime is how long a member is joining at least.
	settleTime = 3 * time.Second
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
	if o.LostGrace <= 0 {
		o.LostGrace = time.Minute
	}
	if o.LostFor <= 0 {
		o.LostFor = time.Hour
	}
	if o.Member.Memory == "" {
		o.Member.Memory = o.Member.Process
	}
	g := &Gossip{
		opts: o, live: live, logger: logger.With("component", "gossip"), state: ring.Joining, began: time.Now(),
		peers: map[string]meta{}, lost: map[lostID]lost{}, forgotten: map[lostID]time.Time{},
	}
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
	g.update = g.list.UpdateNode
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
		g.tellResending()
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

// Settle waits until the others can have heard of this member, or ctx ends: before
// it is active, and gets samples, those that read are to know of it.
func (g *Gossip) Settle(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Until(g.began.Add(settleTime))):
	}
}

// SetState says to all what state this member is in. On a machine that is very busy they
// may hear of it a little later.
func (g *Gossip) SetState(s ring.State) {
	g.mu.Lock()
	g.state = s
	g.mu.Unlock()
	err := g.tell()
	// Of this they hear now or never: the farewell with which Run ends takes the place of
	// what is still on its way, and they would take the member for lost.
	for try := 1; err != nil && s == ring.Left && try < leftTries; try++ {
		err = g.tell()
	}
	if err != nil { // it is still on its way
		g.logger.Warn("the state of this member has not been passed on yet, others hear of it later", "state", s, "err", err)
	}
}

// tell spreads what is known of this member, one call after the other: of two at the same time the one that has looked
// first may be told last, and stay what others know.
func (g *Gossip) tell() error {
	g.telling.Lock()
	defer g.telling.Unlock()
	return g.update(updateWithin)
}

// tellResending spreads whether a source is sending again, where that changed.
func (g *Gossip) tellResending() {
	if g.opts.Resending == nil {
		return
	}
	now := g.opts.Resending()
	g.mu.Lock()
	changed := g.resending != now
	g.resending = now
	g.mu.Unlock()
	if !changed {
		return
	}
	if err := g.tell(); err != nil {
		g.logger.Warn("whether sources are sending again is not told, trying on", "err", err)
		g.mu.Lock()
		g.resending = !now
		g.mu.Unlock()
	}
}

// forgetLost takes lost members off the ring whose sources have sent again what
// they held.
func (g *Gossip) forgetLost(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	resending := g.resending
	for _, m := range g.peers {
		resending = resending || m.Resending
	}
	for id, l := range g.lost {
		switch age := now.Sub(l.since); {
		case age > g.opts.LostFor:
			g.logger.Warn("lost member forgotten, though its sources have not said that they have sent all again", "owner", id.id, "duration", age)
		case age > g.opts.LostGrace && !resending:
			g.logger.Info("lost member forgotten: its sources have sent again what it held", "owner", id.id, "duration", age)
		default:
			continue
		}
		delete(g.lost, id)
		g.forgotten[id] = now
	}
	for id, at := range g.forgotten {
		if now.Sub(at) > 2*g.opts.LostFor {
			delete(g.forgotten, id)
		}
	}
	g.publish()
}

// publish puts the members onto the ring. The caller holds g.mu.
func (g *Gossip) publish() {
	var ms []ring.Member
	for id, m := range g.peers {
		if m.Address != "" {
			ms = append(ms, m.member(id, m.State))
		}
	}
	for id, l := range g.lost {
		ms = append(ms, l.meta.member(id.id, ring.Lost))
	}
	g.live.Set(ring.NewSnapshot(ms))
}

func (m meta) member(id string, state ring.State) ring.Member {
	return ring.Member{ID: id, Address: m.Address, Zone: m.Zone, State: state, Process: m.Process, Memory: m.Memory}
}

// lose notes that a member is there no more, in the life that m tells of. The
// caller holds g.mu.
func (g *Gossip) lose(id string, m meta, since time.Time) {
	l := lostID{id, m.Memory}
	if _, known := g.lost[l]; known || m.Address == "" || m.State == ring.Left || len(g.lost) >= maxLost {
		return
	}
	g.lost[l] = lost{m, since}
	g.logger.Warn("member is lost: its sources send again what it held", "owner", id, "addr", m.Address)
}

// Workers are the addresses at which gateways that are there compute parts of each
// other's queries, by id.
func (g *Gossip) Workers() map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[string]string{}
	for id, m := range g.peers {
		if m.Worker != "" {
			out[id] = m.Worker
		}
	}
	return out
}

func (g *Gossip) see(n *memberlist.Node) {
	var m meta
	if err := json.Unmarshal(n.Meta, &m); err != nil {
		g.logger.Warn("member speaks another language, left out", "owner", n.Name, "err", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if before, known := g.peers[n.Name]; known && before.Memory != m.Memory {
		g.lose(n.Name, before, time.Now()) // it restarted, without its memory
	}
	delete(g.lost, lostID{n.Name, m.Memory}) // it was out of reach only
	g.peers[n.Name] = m
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
	m, known := g.peers[n.Name]
	if !known {
		return
	}
	delete(g.peers, n.Name)
	// One that goes while it is leaving has not flushed all.
	g.lose(n.Name, m, time.Now())
	g.publish()
}

// NodeMeta implements memberlist.Delegate.
func (g *Gossip) NodeMeta(limit int) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := meta{Address: g.opts.Member.Address, Zone: g.opts.Member.Zone, Worker: g.opts.Worker}
	if m.Address != "" {
		m.State, m.Process, m.Memory, m.Resending = g.state, g.opts.Member.Process, g.opts.Member.Memory, g.resending
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

// LocalState implements memberlist.Delegate: who is lost.
func (g *Gossip) LocalState(bool) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]lostMessage, 0, len(g.lost))
	for id, l := range g.lost {
		out = append(out, lostMessage{id.id, l.meta, l.since.UnixMilli()})
	}
	b, err := json.Marshal(out)
	if err != nil {
		g.logger.Error("lost members can't be told", "err", err)
	}
	return b
}

// MergeRemoteState implements memberlist.Delegate.
func (g *Gossip) MergeRemoteState(b []byte, _ bool) {
	if len(b) == 0 {
		return
	}
	var in []lostMessage
	if err := json.Unmarshal(b, &in); err != nil {
		g.logger.Warn("another member's list of lost ones can't be read", "err", err)
		return
	}
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range in {
		id := lostID{m.ID, m.Meta.Memory}
		since := time.UnixMilli(m.Since)
		_, forgotten := g.forgotten[id]
		if there, ok := g.peers[m.ID]; (ok && there.Memory == m.Meta.Memory) || forgotten || now.Sub(since) > g.opts.LostFor {
			continue
		}
		if since.After(now) {
			since = now // clocks differ
		}
		g.lose(m.ID, m.Meta, since)
	}
	g.publish()
}

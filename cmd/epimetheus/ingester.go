package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/gossip"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// grpcFlags are of roles that serve gRPC.
type grpcFlags struct{ listen, advertise string }

// addGRPCFlags adds the flags; who are those that call.
func addGRPCFlags(cmd *kingpin.CmdClause, listen, who string) *grpcFlags {
	f := &grpcFlags{}
	cmd.Flag("grpc.listen-address", "Address for "+who+".").Default(listen).StringVar(&f.listen)
	cmd.Flag("grpc.advertise-address", "Address by which "+who+" reach this process, where it is another: host:port.").StringVar(&f.advertise)
	return f
}

// gossipFlags are of roles that take part in the gossip.
type gossipFlags struct {
	listen, advertise, id string
	join                  []string
}

func addGossipFlags(cmd *kingpin.CmdClause) *gossipFlags {
	f := &gossipFlags{}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	cmd.Flag("gossip.listen-address", "Address for gossip, TCP and UDP.").Default(":9011").StringVar(&f.listen)
	cmd.Flag("gossip.advertise-address", "Address by which other members reach this one, where it is another: host:port.").StringVar(&f.advertise)
	cmd.Flag("gossip.join", "Gossip address of another member: host:port; a name may stand for many. Repeat for more.").StringsVar(&f.join)
	cmd.Flag("gossip.member-id", "Unique and lasting name of this member; its place on the ring follows from it.").Default(host).StringVar(&f.id)
	return f
}

func addIngester(app *kingpin.Application, commands map[string]command) {
	cmd := app.Command("ingester", "Receive samples, keep them, flush them into blocks.")
	wf, rf, gf := addWebFlags(cmd, ":9012"), addGRPCFlags(cmd, ":9010", "sidecars and gateways"), addGossipFlags(cmd)
	commands[cmd.FullCommand()] = func(g *global) error {
		p, err := newProcess("ingester", g, wf)
		if err != nil {
			return err
		}
		st, err := p.openStores(true)
		if err != nil {
			return err
		}
		defer st.close()
		live := &ring.Live{}
		if !wf.dataDirSet {
			// A container's own file system, most likely: gone when it restarts.
			p.config.Ingester.CommitLog = false
		}
		if err := p.addIngester(st, rf, gf.id, live, func(m ring.Member, ing *ingest.Ingester) (membership, error) {
			return p.addGossip(gf, live, gossip.Options{Member: m, Resending: ing.Resending})
		}); err != nil {
			return err
		}
		p.addMemcached(st)
		return p.run()
	}
}

// How long the ring gets to tell all that a member is leaving, before the last
// flush.
const leaveNotice = 2 * time.Second

// membership is an ingester's place on the ring.
type membership interface {
	SetState(s ring.State)
	// Settle waits until it is known to all, or ctx ends.
	Settle(ctx context.Context)
}

// addIngester adds an ingester. join makes its member known, and adds what keeps
// it so.
func (p *process) addIngester(st *stores, rf *grpcFlags, id string, live *ring.Live, join func(m ring.Member, ing *ingest.Ingester) (membership, error)) error {
	c := p.config.Ingester
	logDir := ""
	if c.CommitLog {
		logDir = filepath.Join(p.flags.dataDir, "commitlog")
	}
	ing, err := ingest.New(ingest.Options{
		Member: id, RowWidth: index.Width,
		FlushInterval: time.Duration(c.FlushInterval), FlushBytes: int64(c.FlushBytes), MaxBytes: int64(c.MaxBytes),
		VisibilityDelay: time.Duration(c.VisibilityDelay), FinalFlush: time.Duration(c.LeaveTimeout), Limits: c.Limits, CommitLog: logDir, Ring: live,
	}, st.history, p.logger, p.reg)
	if err != nil {
		return err
	}
	l, err := listen("grpc.listen-address", rf.listen)
	if err != nil {
		return err
	}
	address, err := reachable(rf.advertise, l.Addr())
	if err != nil {
		return fmt.Errorf("--grpc.advertise-address: %w", err)
	}
	// The ingester is stopped first, while all that it needs still runs.
	var place membership
	p.addRun("ingester", func(ctx context.Context) error {
		// Until then it is joining: it gets nothing, and queries know of it.
		if err := ing.Replay(ctx); err != nil {
			p.logger.Info("stopped before the commit log was replayed; the next start does it", "err", err)
			return nil
		}
		place.Settle(ctx)
		place.SetState(ring.Active)
		if err := ing.Run(ctx); err != nil {
			return err // what is not flushed is missed: to the others it vanishes
		}
		place.SetState(ring.Left)
		return nil
	}, func() {
		ing.Drain()
		place.SetState(ring.Leaving)
		time.Sleep(leaveNotice)
	})
	server := p.newGRPCServer()
	ing.Register(server)
	p.addGRPC(server, l)
	if place, err = join(ring.Member{ID: id, Address: address, Zone: p.config.Ring.Zone, Process: ing.Process(), Memory: ing.Memory()}, ing); err != nil {
		return err
	}
	p.ready = append(p.ready, check{"ring", func() error {
		for _, m := range live.Ring().Active() {
			if m.ID == id {
				return nil
			}
		}
		return fmt.Errorf("member %s is not active", id)
	}})
	p.health = append(p.health, ing.Health().Conditions)
	p.status = append(p.status, section{"Head", func(*http.Request) [][]string { return headTable(ing) }})
	return nil
}

// Windows of HTTP/2, in bytes: a stream of 2 GB/s within a data centre (0.5 ms), of 10 MB/s around the world (100 ms).
// Of its own gRPC measures what a connection takes, by a ping with each message to an idle one, which costs more than
// many a query.
const (
	streamWindow = 1 << 20
	connWindow   = 4 << 20
)

func (p *process) newGRPCServer() *grpc.Server {
	return grpc.NewServer(append(p.config.GRPCTLS.interceptors(),
		grpc.Creds(p.asServer),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.MaxRecvMsgSize(4<<20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)...)
}

// addGRPC serves until it is stopped.
func (p *process) addGRPC(s *grpc.Server, l net.Listener) {
	p.group.Add(func() error {
		if err := s.Serve(l); err != nil {
			return fmt.Errorf("grpc server: %w", err)
		}
		return nil
	}, func(error) {
		// Streams of sidecars don't end by themselves: no graceful stop.
		s.Stop()
	})
}

// addGossip takes part in the gossip.
func (p *process) addGossip(f *gossipFlags, live *ring.Live, o gossip.Options) (*gossip.Gossip, error) {
	o.ID, o.Bind, o.Advertise, o.Join = f.id, f.listen, f.advertise, append(f.join, p.config.Ring.Join...)
	g, err := gossip.New(o, live, p.logger, p.reg)
	if err != nil {
		return nil, err
	}
	p.addRun("gossip", g.Run, nil)
	return g, nil
}

func headTable(ing *ingest.Ingester) [][]string {
	s := ing.Size()
	n := func(v int64) string { return strconv.FormatInt(v, 10) }
	return [][]string{
		{"", ""},
		{"tenants", strconv.Itoa(s.Tenants)},
		{"series", n(s.Series)},
		{"samples", n(s.Samples)},
		{"generations", strconv.Itoa(s.Generations)},
		{"bytes", n(s.Bytes)},
		{"commit log", ing.LogStatus()},
	}
}

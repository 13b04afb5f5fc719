package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/gossip"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

func addGateway(app *kingpin.Application, commands map[string]command) {
	cmd := app.Command("gateway", "Answer the Prometheus HTTP API over ingesters and history.")
	wf, rf, gf := addWebFlags(cmd, ":9009"), addGRPCFlags(cmd, ":9014", "other gateways"), addGossipFlags(cmd)
	admin := addAdminFlag(cmd)
	commands[cmd.FullCommand()] = func(g *global) error {
		p, err := newProcess("gateway", g, wf)
		if err != nil {
			return err
		}
		st, err := p.openStores(true)
		if err != nil {
			return err
		}
		defer st.close()
		live := &ring.Live{}
		// Gateways are each other's workers.
		l, err := listen("grpc.listen-address", rf.listen)
		if err != nil {
			return err
		}
		address, err := reachable(rf.advertise, l.Addr())
		if err != nil {
			return fmt.Errorf("--grpc.advertise-address: %w", err)
		}
		members, err := p.addGossip(gf, live, gossip.Options{Worker: address})
		if err != nil {
			return err
		}
		pool := worker.NewPool(gf.id, func() []worker.Peer {
			var out []worker.Peer
			for id, address := range members.Workers() {
				out = append(out, worker.Peer{ID: id, Address: address})
			}
			return out
		}, p.logger, p.reg, p.dialOptions()...)
		st.closers = append(st.closers, pool.Close)
		api, err := p.addGateway(st, live, nil, pool, *admin)
		if err != nil {
			return err
		}
		server := p.newGRPCServer()
		worker.NewServer(func(ctx context.Context, t *plan.Task) ([]byte, account.Cost, error) {
			return api.Work(ctx, st.history, t)
		}, p.logger, p.reg).Register(server)
		p.addGRPC(server, l)
		p.status = append(p.status, section{"Gateways", func(*http.Request) [][]string {
			rows := [][]string{{"gateway", "address"}}
			peers := members.Workers()
			for _, id := range slices.Sorted(maps.Keys(peers)) {
				rows = append(rows, []string{id, peers[id]})
			}
			return rows
		}})
		p.addMemcached(st)
		return p.run()
	}
}

// dialOptions are for connections to ingesters and gateways.
func (p *process) dialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(p.asClient),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		// One that was out of reach for long is asked again soon after it isn't any more: by
		// gRPC's defaults it might be two minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}, MinConnectTimeout: 5 * time.Second,
		}),
	}
}

// addAdminFlag is Prometheus's flag.
func addAdminFlag(cmd *kingpin.CmdClause) *bool {
	return cmd.Flag("web.enable-admin-api", "Enable API endpoints for admin control actions: to delete series, and to list and cancel deletions.").Bool()
}

// addGateway adds the API. local are ingesters of this process, by address; workers is
// nil where there are no other gateways; admin turns on the admin API.
func (p *process) addGateway(st *stores, live *ring.Live, local map[string]fetch.Local, workers plan.Workers, admin bool) (*gateway.API, error) {
	heads := merge.NewHeads(live, p.logger, p.reg, p.dialOptions()...)
	for address, l := range local {
		heads.AddLocal(address, l)
	}
	st.closers = append(st.closers, heads.Close)
	storage := merge.New(heads, st.history, gateway.TenantOf)
	c := p.config.Gateway
	results, err := plan.NewResults(int64(c.ResultBytes), st.memcached, p.reg)
	if err != nil {
		return nil, err
	}
	var deletions gateway.Deletions
	if admin {
		deletions = st.history
	}
	api, err := gateway.New(gateway.Options{
		Tenancy: p.config.Tenancy, QueryTimeout: time.Duration(c.QueryTimeout), MaxSamples: c.MaxSamples,
		Engine: c.engine(), Tenants: c.tenants(), TenantFederation: c.TenantFederation,
		Spread: plan.Spread{Results: results, Workers: workers},
		Limits: c.Limits.limits(), TenantLimits: c.tenantLimits(), Memory: account.NewMemory(int64(c.QueryMemory), p.reg),
		SlowQuery: time.Duration(c.SlowQuery), Prices: gateway.Prices(c.Prices),
		Flags: p.shownFlags(admin), ListenAddress: (*p.flags.web.WebListenAddresses)[0],
		Revision: revision(), GoVersion: runtime.Version(), Ready: p.isReady,
		Choices: choice.New(st.index), Deletions: deletions, Index: st.index,
	}, storage, live, p.logger, p.reg, p.reg)
	if err != nil {
		return nil, err
	}
	p.health = append(p.health, func() []health.Condition { return ringConditions(live.Ring()) })
	p.mux.Handle("/api/v1/", api)
	p.mux.Handle("/federate", api)
	p.mux.Handle("/federate/", api)
	p.mux.HandleFunc("GET /ring", serveRing(live, heads))
	p.status = append(p.status, section{"Ring", func(r *http.Request) [][]string { return ringTable(r.Context(), live, heads) }})
	return api, nil
}

// ringConditions says what is wrong with the ring; since is when it became what it
// is.
func ringConditions(r *ring.Ring) []health.Condition {
	var out []health.Condition
	add := func(format string, args ...any) {
		out = append(out, health.Condition{What: fmt.Sprintf(format, args...), Since: r.Since()})
	}
	for _, m := range r.Snapshot().Members {
		if m.State == ring.Lost {
			add("ingester %s at %s vanished: answers warn until its sources have sent again what it held", m.ID, m.Address)
		}
	}
	if len(r.Active()) == 0 {
		add("no ingester is active: there are no fresh samples")
	}
	return out
}

// shownFlags are the flags that clients look at, by Prometheus's names.
func (p *process) shownFlags(admin bool) map[string]string {
	c := p.config.Gateway
	return map[string]string{
		"query.timeout":        c.QueryTimeout.String(),
		"query.max-samples":    strconv.Itoa(c.MaxSamples),
		"web.enable-admin-api": strconv.FormatBool(admin),
		"web.listen-address":   (*p.flags.web.WebListenAddresses)[0],
	}
}

// ringMember is a member as the status page and GET /ring show it.
type ringMember struct {
	ring.Member
	Share  float64 `json:"share"`            // of the token space, 0 to 1
	Series *int64  `json:"series,omitempty"` // in its current generation; absent where it doesn't answer
}

// ringMembers asks each member for its series.
func ringMembers(ctx context.Context, live *ring.Live, heads *merge.Heads) []ringMember {
	r := live.Ring()
	shares := r.Shares()
	series := heads.Series(ctx)
	out := []ringMember{}
	for _, m := range r.Snapshot().Members {
		one := ringMember{Member: m}
		if m.State == ring.Active {
			one.Share = shares[m.ID]
		}
		if n, ok := series[m.ID]; ok && m.State != ring.Lost {
			one.Series = &n
		}
		out = append(out, one)
	}
	return out
}

// serveRing is GET /ring.
func serveRing(live *ring.Live, heads *merge.Heads) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		b, err := json.Marshal(map[string]any{"version": live.Ring().Version(), "members": ringMembers(r.Context(), live, heads)})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(b) // the client has gone: nobody to tell
	}
}

// ringTable shows members, states, shares and series.
func ringTable(ctx context.Context, live *ring.Live, heads *merge.Heads) [][]string {
	rows := [][]string{{"member", "address", "zone", "state", "share", "series"}}
	for _, m := range ringMembers(ctx, live, heads) {
		n := "?"
		if m.Series != nil {
			n = strconv.FormatInt(*m.Series, 10)
		}
		rows = append(rows, []string{m.ID, m.Address, m.Zone, string(m.State), fmt.Sprintf("%.1f %%", 100*m.Share), n})
	}
	return rows
}

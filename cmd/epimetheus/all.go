package main

import (
	"context"

	"github.com/alecthomas/kingpin/v2"

	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

func addAll(app *kingpin.Application, commands map[string]command) {
	cmd := app.Command("all", "An ingester, a gateway and a compactor in one process, on a data directory.")
	wf, rf := addWebFlags(cmd, ":9009"), addGRPCFlags(cmd, ":9010", "sidecars and gateways")
	admin := addAdminFlag(cmd)
	commands[cmd.FullCommand()] = func(g *global) error {
		p, err := newProcess("all", g, wf)
		if err != nil {
			return err
		}
		st, err := p.openStores(false)
		if err != nil {
			return err
		}
		defer st.close()
		live := &ring.Live{}
		local := map[string]fetch.Local{}
		if err := p.addIngester(st, rf, "all", live, func(m ring.Member, ing *ingest.Ingester) (membership, error) {
			local[m.Address] = ing
			a := &alone{m, live}
			a.SetState(ring.Joining)
			return a, nil
		}); err != nil {
			return err
		}
		if _, err := p.addGateway(st, live, local, nil, *admin); err != nil {
			return err
		}
		if p.config.Compactor.Enabled {
			if err := p.addCompactor(st); err != nil {
				return err
			}
		}
		p.addMemcached(st)
		return p.run()
	}
}

// alone is the membership in a ring of one, which needs no gossip.
type alone struct {
	member ring.Member
	live   *ring.Live
}

// SetState implements membership.
func (a *alone) SetState(s ring.State) {
	m := a.member
	m.State = s
	a.live.Set(ring.NewSnapshot([]ring.Member{m}))
}

// Settle implements membership.
func (*alone) Settle(context.Context) {}

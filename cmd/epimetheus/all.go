package main

import (
	"github.com/alecthomas/kingpin/v2"

	"github.com/epimetheus-tsdb/epimetheus/ingest"
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
		if err := p.addIngester(st, rf, "all", live, func(m ring.Member, _ *ingest.Ingester) (func(ring.State) error, error) {
			// A ring of one needs no gossip.
			set := func(s ring.State) error {
				m.State = s
				live.Set(ring.NewSnapshot([]ring.Member{m}))
				return nil
			}
			return set, set(ring.Joining)
		}); err != nil {
			return err
		}
		if _, err := p.addGateway(st, live, nil, *admin); err != nil {
			return err
		}
		if p.config.Compactor.Enabled {
			if err := p.addCompactor(st); err != nil {
				return err
			}
		}
		return p.run()
	}
}

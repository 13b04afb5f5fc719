package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history/compact"
)

func addTenant(tool *kingpin.CmdClause, commands map[string]command) {
	tenant := tool.Command("tenant", "Delete a tenant, and see that nothing is left of it.")

	del := tenant.Command("delete", "Delete all samples of a tenant up to now, soon from all blocks. Stop its senders first: what they send of a later time is kept.")
	var name, dataDir string
	del.Arg("tenant", "Its name.").Required().StringVar(&name)
	del.Flag("data.dir", dataDirHelp).Default("data").StringVar(&dataDir)
	commands[del.FullCommand()] = func(g *global) error {
		return withStores(g, dataDir, func(ctx context.Context, _ *process, st *stores) error {
			id, err := st.history.Delete(ctx, name, math.MinInt64, time.Now().UnixMilli())
			if err != nil {
				return err
			}
			if err := st.history.Clean(ctx, name); err != nil {
				return err
			}
			remains, err := st.index.Remains(ctx, name)
			if err != nil {
				return err
			}
			if err := st.index.DeleteRemains(ctx, remains); err != nil {
				return err
			}
			fmt.Printf("deletion %s of tenant %s is in force: gateways give nothing of it within seconds, compactors remove it.\n"+
				"`epimetheus tool tenant verify-deleted %s` says when nothing is left, hours later.\n", id, name, name)
			return nil
		})
	}

	verify := tenant.Command("verify-deleted", "List the rows and objects that name a tenant; every object is asked. Exit code 1 if there are any. "+
		"Samples that an ingester still has in memory, or in its commit log, are not seen: they come to objects with the next flush.")
	verify.Arg("tenant", "Its name.").Required().StringVar(&name)
	verify.Flag("data.dir", dataDirHelp).Default("data").StringVar(&dataDir)
	commands[verify.FullCommand()] = func(g *global) error {
		return withStores(g, dataDir, func(ctx context.Context, _ *process, st *stores) error {
			b := newBar(os.Stderr)
			traces, err := compact.Traces(ctx, st.objects, st.index, name, func(done, all int) {
				b.draw(float64(done)/float64(all), fmt.Sprintf("%d objects", done))
			})
			b.clear()
			if err != nil {
				return err
			}
			for _, t := range traces {
				fmt.Printf("%s\t%s\t%s\n", t.What, t.Block, t.About)
			}
			ds, err := st.history.Deletions(ctx, name)
			if err != nil {
				return err
			}
			for _, d := range ds {
				fmt.Printf("in force: deletion %s of %s\n", d.ID, ulid.Time(d.ID.Time()).UTC().Format(time.RFC3339))
			}
			if len(traces) > 0 {
				fmt.Printf("%d rows and objects name tenant %s\n", len(traces), name)
				return errSaid
			}
			fmt.Printf("no block row, work row, job, import or object names tenant %s\n", name)
			return nil
		})
	}
}

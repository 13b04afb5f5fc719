package main

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"github.com/alecthomas/kingpin/v2"

	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

func addCompactor(app *kingpin.Application, commands map[string]command) {
	cmd := app.Command("compactor", "Make few large blocks of many small ones, and remove what has been replaced.")
	wf := addWebFlags(cmd, ":9015")
	commands[cmd.FullCommand()] = func(g *global) error {
		p, err := newProcess("compactor", g, wf)
		if err != nil {
			return err
		}
		st, err := p.openStores(true)
		if err != nil {
			return err
		}
		defer st.close()
		if err := p.addCompactor(st); err != nil {
			return err
		}
		p.addMemcached(st)
		return p.run()
	}
}

// graceDelays is how many visibility delays replaced blocks stay. One is longer
// than the longest query and the age of its rows.
const graceDelays = 2

// addCompactor adds a compactor.
func (p *process) addCompactor(st *stores) error {
	c := p.config.Compactor
	o := compact.Options{
		Objects: st.objects, Index: st.index, Dir: filepath.Join(p.flags.dataDir, "compact"), MaxBlockBytes: int64(c.BlockBytes),
		Grace: graceDelays * time.Duration(p.config.Ingester.VisibilityDelay), Retentions: p.settings.retentions.Load, Memcached: st.memcached, Logger: p.logger, Registerer: p.reg,
	}
	for _, r := range c.Ranges {
		o.Ranges = append(o.Ranges, time.Duration(r))
	}
	compactor, err := compact.New(o)
	if err != nil {
		return err
	}
	p.addRun("compactor", compactor.Run, nil)
	p.health = append(p.health, compactor.Conditions)
	p.status = append(p.status, section{"Compaction", func(*http.Request) [][]string { return compactionTable(compactor.Status()) }})
	return nil
}

func compactionTable(s compact.Status) [][]string {
	rows := [][]string{{"", ""}}
	for level, n := range s.Pending {
		rows = append(rows, []string{fmt.Sprintf("blocks of level %d that wait", level), strconv.Itoa(n)})
	}
	for _, j := range s.Jobs {
		if j.State != index.JobIdle {
			rows = append(rows, []string{
				fmt.Sprintf("job %s, to level %d", j.ID, j.Level), fmt.Sprintf("%s, %d blocks become %d", j.State, len(j.Sources), len(j.Outputs)),
			})
		}
	}
	for _, a := range s.Aside {
		rows = append(rows, []string{"set aside: " + a.Block.String(), a.Reason})
	}
	last := "none yet"
	if !s.LastRound.IsZero() {
		last = s.LastRound.UTC().Format(time.RFC3339)
	}
	return append(rows, []string{"last look at what there is to do", last})
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/internal/audit"
)

func addTool(app *kingpin.Application, commands map[string]command) {
	tool := app.Command("tool", "Look after an installation.")

	check := tool.Command("check-config", "Say what is wrong with a configuration file.")
	file := check.Arg("file", "The file.").Required().String()
	commands[check.FullCommand()] = func(*global) error {
		if _, err := loadConfig(*file); err != nil {
			return err
		}
		fmt.Printf("%s is valid\n", *file)
		return nil
	}

	table := tool.Command("create-table", "Create the DynamoDB table that the configuration names, if it is absent.")
	commands[table.FullCommand()] = func(g *global) error {
		c, err := loadConfig(g.configFile)
		if err != nil {
			return err
		}
		if c.Index.Type != "dynamodb" {
			return fmt.Errorf("index.type is %q: only dynamodb has a table", c.Index.Type)
		}
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		db, err := index.NewDynamoDB(ctx, dynamoDBOptions(c.Index.DynamoDB), prometheus.NewRegistry())
		if err != nil {
			return err
		}
		if err := db.CreateTable(ctx); err != nil {
			return err
		}
		fmt.Printf("table %s is there\n", c.Index.DynamoDB.Table)
		return nil
	}

	addOrphans(tool, commands)
	addTenant(tool, commands)
	addStatus(tool, commands)
	addAudit(tool, commands)
	addImport(tool, commands)
	addExport(tool, commands)
	addBlocks(tool, commands)
	addReindex(tool, commands)
}

func addOrphans(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("orphans", "List the objects that nobody has published and that a compactor will remove; nothing is changed.")
	f := &webFlags{}
	cmd.Flag("data.dir", "Data directory, where the stores are in it; 'epimetheus all' must not be running on it.").Default("data").StringVar(&f.dataDir)
	age := cmd.Flag("age", "How old objects are at least.").Default(compact.DefaultOrphanAge.String()).Duration()
	commands[cmd.FullCommand()] = func(g *global) error {
		c, err := loadConfig(g.configFile)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		p := &process{role: "tool", config: c, flags: f, logger: promslog.New(&g.log), reg: prometheus.NewRegistry()}
		st, err := p.openStores(false)
		if err != nil {
			return err
		}
		defer st.close()
		found, err := compact.Orphans(ctx, st.objects, st.index, time.Now(), *age)
		if err != nil {
			return err
		}
		for _, o := range found {
			state := "not published"
			if o.Condemned {
				state = "condemned"
			}
			fmt.Printf("%s\t%d bytes\t%s\n", o.Object, o.ObjectSize, state)
		}
		fmt.Printf("%d objects\n", len(found))
		return nil
	}
}

// maxStatusBytes bounds what a process may answer.
const maxStatusBytes = 16 << 20

func addStatus(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("status", "Show how a process is doing: what is degraded, how far a sidecar's backfill is, the ring.")
	url := cmd.Arg("url", "Of its web endpoint.").Default("http://localhost:9013").String()
	commands[cmd.FullCommand()] = func(*global) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(*url, "/")+"/status", nil)
		if err != nil {
			return fmt.Errorf("url %q: %w", *url, err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return fmt.Errorf("ask for the status: %w", err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("ask for the status: %s answered %s: is it the web endpoint of an Epimetheus?", *url, resp.Status)
		}
		_, err = io.Copy(os.Stdout, io.LimitReader(resp.Body, maxStatusBytes))
		return err
	}
}

func addAudit(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("audit", "Compare every sample of a Prometheus with what the gateway returns. Exit code 1 if any is missing, extra or different.")
	var prom, walDir, gw, tenant, from, to string
	external := map[string]string{}
	var window time.Duration
	var most int
	cmd.Flag("prometheus", "URL of a Prometheus, or its data directory; of an agent, its data directory.").Required().StringVar(&prom)
	cmd.Flag("prometheus.wal", "Data directory of that Prometheus where --prometheus is a URL: tells samples that it logged and then rejected from extra ones.").StringVar(&walDir)
	cmd.Flag("external-label", "External label of that Prometheus where it is a data directory: name=value. Repeat for more.").StringMapVar(&external)
	cmd.Flag("gateway", "URL of the gateway.").Required().StringVar(&gw)
	cmd.Flag("tenant", "Tenant, where the gateway wants one.").StringVar(&tenant)
	cmd.Flag("from", "Begin: RFC 3339, or a duration before now.").Default("2h").StringVar(&from)
	cmd.Flag("to", "End: RFC 3339, or a duration before now.").Default("30s").StringVar(&to)
	cmd.Flag("window", "Time that is compared at once: memory grows with it.").Default("10m").DurationVar(&window)
	cmd.Flag("show", "How many differences to show.").Default("20").IntVar(&most)
	commands[cmd.FullCommand()] = func(*global) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		now := time.Now()
		mint, err := parseTime(from, now)
		if err != nil {
			return fmt.Errorf("--from: %w", err)
		}
		maxt, err := parseTime(to, now)
		if err != nil {
			return fmt.Errorf("--to: %w", err)
		}
		if mint > maxt {
			return fmt.Errorf("--from %s is after --to %s", from, to)
		}
		ls := labels.FromMap(external)
		src, err := promSource(prom, ls)
		if err != nil {
			return fmt.Errorf("--prometheus: %w", err)
		}
		defer src.Close()
		headers := map[string]string{}
		if tenant != "" {
			headers[gateway.TenantHeader] = tenant
		}
		dst, err := audit.NewRemote(gw, headers)
		if err != nil {
			return fmt.Errorf("--gateway: %w", err)
		}
		defer dst.Close()
		b := newBar(os.Stderr)
		o := audit.Options{
			MinT: mint, MaxT: maxt, Window: window, MaxReports: most,
			Report:   func(d audit.Difference) { fmt.Println(d) },
			Progress: func(done float64, r audit.Result) { b.draw(done, fmt.Sprintf("%d samples", r.Compared)) },
		}
		if walDir == "" && isDir(prom) {
			walDir = prom
		}
		if walDir != "" {
			o.Logged = audit.NewWAL(walDir, ls)
		}
		r, err := audit.Run(ctx, src, dst, o)
		b.end()
		if err != nil {
			return err
		}
		fmt.Printf("%d series, %d samples compared: %d missing, %d extra, %d different", r.Series, r.Compared, r.Missing, r.Extra, r.Different)
		if r.Rejected > 0 {
			fmt.Printf("; %d that Prometheus logged and then rejected are at the gateway", r.Rejected)
		}
		fmt.Println()
		if !r.OK() {
			return errSaid
		}
		if r.Compared == 0 {
			return errors.New("nothing was compared: neither side has a sample in that time")
		}
		return nil
	}
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

func promSource(prom string, external labels.Labels) (audit.Source, error) {
	if strings.HasPrefix(prom, "http://") || strings.HasPrefix(prom, "https://") {
		return audit.NewRemote(prom, nil)
	}
	if !isDir(filepath.Join(prom, "wal")) {
		return nil, fmt.Errorf("%s is neither a URL nor a data directory of Prometheus (it has no folder wal)", prom)
	}
	if !isDir(filepath.Join(prom, "chunks_head")) {
		return audit.NewWAL(prom, external), nil // of an agent: it has nothing else
	}
	return audit.NewDir(prom, external)
}

// parseTime gives ms since the epoch.
func parseTime(s string, now time.Time) (int64, error) {
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t.UnixMilli(), nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d).UnixMilli(), nil
	}
	return 0, fmt.Errorf("%q is neither a time such as 2026-01-02T15:04:05Z nor a duration such as 2h", s)
}

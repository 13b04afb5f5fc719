package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb/fileutil"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/transfer"
)

// toolStores opens the stores of the configuration for a tool that runs beside the
// system, or instead of it where they are in a data directory.
func toolStores(g *global, dataDir string) (*process, *stores, error) {
	c, err := loadConfig(g.configFile)
	if err != nil {
		return nil, nil, err
	}
	c.Gateway.CacheBytes = min(c.Gateway.CacheBytes, toolCacheBytes)
	p := &process{role: "tool", config: c, flags: &webFlags{dataDir: dataDir}, logger: promslog.New(&g.log), reg: prometheus.NewRegistry()}
	st, err := p.openStores(false)
	return p, st, err
}

// withStores runs a tool on the stores of the configuration, until it is told to end.
func withStores(g *global, dataDir string, run func(ctx context.Context, p *process, st *stores) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	p, st, err := toolStores(g, dataDir)
	if err != nil {
		return err
	}
	defer st.close()
	return run(ctx, p, st)
}

// toolCacheBytes is enough for what reads each page once.
const toolCacheBytes = 64 * mib

const dataDirHelp = "Data directory: for files while they are written, and for the stores, where they are in it; then 'epimetheus all' must not be running on it."

func addImport(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("import", "Take blocks of Prometheus, Thanos or Mimir into history. It can be ended at any time, and goes on where it was when it is run again. "+
		"Exit code 1 if not all of them could be read.")
	var from, tenant, dataDir string
	var again bool
	s3 := object.S3Options{}
	o := transfer.ImportOptions{AddLabels: map[string]string{}}
	cmd.Arg("blocks", "A block, a folder of blocks such as the data directory of a Prometheus, or s3://bucket/prefix.").Required().StringVar(&from)
	cmd.Flag("tenant", "Whose history they become part of.").Default(gateway.DefaultTenant).StringVar(&tenant)
	cmd.Flag("drop-label", "External label, as Thanos notes them, that series don't get: the one that tells replicas apart, say. Repeat for more.").StringsVar(&o.DropLabels)
	cmd.Flag("add-label", "Label that all series get that have no such: name=value. Repeat for more.").StringMapVar(&o.AddLabels)
	cmd.Flag("again", "Import blocks that were imported before once more.").BoolVar(&again)
	cmd.Flag("data.dir", dataDirHelp).Default("data").StringVar(&dataDir)
	cmd.Flag("s3.endpoint", "URL of the S3 server of s3://…; empty for AWS.").StringVar(&s3.Endpoint)
	cmd.Flag("s3.region", "Its region.").StringVar(&s3.Region)
	cmd.Flag("s3.path-style", "Name the bucket in the path.").BoolVar(&s3.PathStyle)
	commands[cmd.FullCommand()] = func(g *global) error {
		for name := range o.AddLabels {
			if !model.UTF8Validation.IsValidLabelName(name) || name == model.MetricNameLabel {
				return fmt.Errorf("--add-label: %q is not the name of a label", name)
			}
		}
		return withStores(g, dataDir, func(ctx context.Context, p *process, st *stores) (err error) {
			o.Tenant, o.Again, o.Objects, o.Index = tenant, again, st.objects, st.index
			o.MaxBlockBytes, o.Ranges = int64(p.config.Compactor.BlockBytes), p.ranges()
			var release func() error
			if o.Dir, release, err = workFolder(filepath.Join(dataDir, "import")); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, release()) }()
			if rest, ok := strings.CutPrefix(from, "s3://"); ok {
				s3.Bucket, s3.Prefix, _ = strings.Cut(rest, "/")
				if s3.Prefix = strings.Trim(s3.Prefix, "/"); s3.Prefix != "" {
					s3.Prefix += "/"
				}
				bucket, err := object.NewS3(ctx, s3, prometheus.NewRegistry())
				if err != nil {
					return fmt.Errorf("%s: %w", from, err)
				}
				o.Blocks = transfer.Bucket(bucket, o.Dir)
			} else {
				o.Blocks = transfer.Directory(from)
			}
			b := newBar(os.Stderr)
			o.Report = func(e transfer.Event) { reportImport(b, os.Stdout, e) }
			r, err := transfer.Import(ctx, o)
			b.end()
			if r != nil {
				fmt.Printf("%d blocks imported (%d samples), %d were imported before, %d skipped, %d failed; %d have parts that can't be read\n",
					r.Imported, r.Samples, r.Before, r.Skipped, r.Failed, r.Faulty)
			}
			switch {
			case ctx.Err() != nil:
				return errors.New("ended before all is imported: run it again, and it goes on from here")
			case err != nil:
				return err
			case r.Imported+r.Before+r.Skipped+r.Failed == 0:
				return fmt.Errorf("%s has no blocks", from)
			case !r.OK():
				return errSaid
			}
			return nil
		})
	}
}

// workFolder makes a folder that is empty, and nobody else's until it is released.
func workFolder(dir string) (_ string, release func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	lock, _, err := fileutil.Flock(filepath.Join(dir, "lock"))
	if err != nil {
		return "", nil, fmt.Errorf("%s is in use: is another import under way? Give this one another --data.dir (%w)", dir, err)
	}
	work := filepath.Join(dir, "blocks")
	if err := errors.Join(os.RemoveAll(work), os.MkdirAll(work, 0o755)); err != nil {
		return "", nil, errors.Join(err, lock.Release())
	}
	return work, func() error { return errors.Join(os.RemoveAll(work), lock.Release()) }, nil
}

func reportImport(b *bar, out io.Writer, e transfer.Event) {
	say := func(format string, args ...any) {
		b.clear()
		fmt.Fprintf(out, format+"\n", args...)
	}
	if e.Block == nil {
		say("FAILED: %v", e.Err)
		return
	}
	name := fmt.Sprintf("block %s (%s to %s)", e.Block.ULID, showTime(e.Block.MinTime), showTime(e.Block.MaxTime))
	switch e.Kind {
	case transfer.Started:
		if !b.terminal {
			say("%s: %d samples of %d series", name, e.Block.Samples, e.Block.Series)
		}
	case transfer.Resumed:
		say("%s: goes on behind %d of %d samples", name, e.Samples, e.Block.Samples)
	case transfer.Unit:
		if !b.terminal {
			say("block %s: %d of %d samples are in history", e.Block.ULID, e.Samples, e.Block.Samples)
		}
	case transfer.Fault:
		say("FAULT: %v", e.Err)
	case transfer.Failed:
		say("FAILED: %v", e.Err)
	case transfer.Skipped:
		say("%s: skipped: %v", name, e.Err)
	case transfer.Imported:
		say("%s: %d samples imported", name, e.Samples)
	case transfer.Before:
		switch {
		case e.Err != nil:
			say("FAULT: %s: %v (--again tries anew)", name, e.Err)
		case !b.terminal:
			say("%s: was imported before", name)
		}
	}
	done := 1.0
	if e.All > 0 {
		done = min(1, float64(e.Done)/float64(e.All))
	}
	b.draw(done, fmt.Sprintf("%.1f of %.1f M samples", float64(e.Done)/1e6, float64(e.All)/1e6))
}

func showTime(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04Z") }

func addExport(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("export", "Write what history has of a tenant as blocks of Prometheus. What ingesters have not flushed yet isn't in it.")
	var from, to, tenant, dataDir string
	var match []string
	o := transfer.ExportOptions{External: map[string]string{}}
	cmd.Arg("folder", "That the blocks are put in; absent or empty.").Required().StringVar(&o.Dir)
	cmd.Flag("tenant", "Whose history.").Default(gateway.DefaultTenant).StringVar(&tenant)
	cmd.Flag("from", "Begin: RFC 3339, or a duration before now; without it the first sample.").StringVar(&from)
	cmd.Flag("to", "End: RFC 3339, or a duration before now.").Default("0s").StringVar(&to)
	cmd.Flag("match", "Series selector, such as '{job=\"node\"}'; without it all series. Repeat for more: a series that one of them selects is exported.").StringsVar(&match)
	cmd.Flag("block-range", "Time that a block spans, aligned to the epoch: a multiple of 2h, up to 744h (31 days).").Default("24h").DurationVar(&o.Range)
	cmd.Flag("external-label", "Label that all exported series have, and that is written to each block's meta.json, where Thanos looks for it, instead: name=value. Repeat for more.").StringMapVar(&o.External)
	cmd.Flag("data.dir", dataDirHelp).Default("data").StringVar(&dataDir)
	commands[cmd.FullCommand()] = func(g *global) error {
		now := time.Now()
		o.MinT = math.MinInt64
		var err error
		if from != "" {
			if o.MinT, err = parseTime(from, now); err != nil {
				return fmt.Errorf("--from: %w", err)
			}
		}
		if o.MaxT, err = parseTime(to, now); err != nil {
			return fmt.Errorf("--to: %w", err)
		}
		if o.MinT > o.MaxT {
			return fmt.Errorf("--from %s is after --to %s", from, to)
		}
		if len(match) > 0 {
			if o.Selectors, err = parser.NewParser(parser.Options{}).ParseMetricSelectors(match); err != nil {
				return fmt.Errorf("--match: %w", err)
			}
		}
		return withStores(g, dataDir, func(ctx context.Context, _ *process, st *stores) error {
			o.Tenant, o.History = tenant, st.history
			b := newBar(os.Stderr)
			o.Report = func(e transfer.Exported) {
				b.clear()
				fmt.Printf("%s: %s to %s, %d series, %d samples\n", e.Dir, showTime(e.MinTime), showTime(e.MaxTime), e.Series, e.Samples)
				b.draw(e.Done, "")
			}
			r, err := transfer.Export(ctx, o)
			b.end()
			if ctx.Err() != nil {
				return errors.New("ended before all is exported: empty the folder and run it again")
			}
			if err != nil {
				return err
			}
			fmt.Printf("%d blocks, %d samples\n", r.Blocks, r.Samples)
			if r.Gone {
				fmt.Println("Of some of this time there are only summaries of windows: they aren't exported, see retention.5m and retention.1h.")
			}
			return nil
		})
	}
}

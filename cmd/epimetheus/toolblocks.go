package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/inspect"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/history/reindex"
)

// storesFlags are the flags of tools that look at stores.
func storesFlags(cmd *kingpin.CmdClause) *string {
	return cmd.Flag("data.dir", "Data directory, where the stores are in it; 'epimetheus all' must not be running on it.").Default("data").String()
}

// listed is a line of tool blocks ls.
type listed struct {
	Block   ulid.ULID   `json:"block"`
	Level   index.Level `json:"level"`
	MinT    int64       `json:"minTime"` // ms
	MaxT    int64       `json:"maxTime"` // ms
	Series  uint64      `json:"series"`
	Samples uint64      `json:"samples"`
	Size    int64       `json:"objectBytes"`
	State   string      `json:"state"`
	Object  string      `json:"object"`
}

// selection says which blocks of a tenant are meant.
type selection struct {
	tenant, from, to string
	level            int
}

func (s *selection) flags(cmd *kingpin.CmdClause) {
	cmd.Flag("tenant", "Whose blocks.").Default(gateway.DefaultTenant).StringVar(&s.tenant)
	cmd.Flag("from", "Only blocks with samples from then on: RFC 3339, or a duration before now.").StringVar(&s.from)
	cmd.Flag("to", "Only blocks with samples until then.").StringVar(&s.to)
	cmd.Flag("level", "Only blocks of a level; 0 are flushes.").Default("-1").IntVar(&s.level)
}

// blocks lists them as the index has them.
func (s *selection) blocks(ctx context.Context, x *index.Index) ([]listed, error) {
	mint, maxt, now := int64(math.MinInt64), int64(math.MaxInt64), time.Now()
	var err error
	if s.from != "" {
		if mint, err = parseTime(s.from, now); err != nil {
			return nil, fmt.Errorf("--from: %w", err)
		}
	}
	if s.to != "" {
		if maxt, err = parseTime(s.to, now); err != nil {
			return nil, fmt.Errorf("--to: %w", err)
		}
	}
	rows, err := x.Blocks(ctx, s.tenant, mint, maxt, true)
	if err != nil {
		return nil, err
	}
	aside, err := x.Aside(ctx)
	if err != nil {
		return nil, err
	}
	replaced := map[index.RowID]bool{}
	for i := range rows {
		for _, id := range rows[i].Replaces {
			replaced[id] = true
		}
	}
	at := map[ulid.ULID]int{}
	var out []listed
	for i := range rows {
		r := &rows[i]
		if s.level >= 0 && int(r.Level) != s.level {
			continue
		}
		if j, ok := at[r.Block]; ok {
			out[j].MinT, out[j].MaxT = min(out[j].MinT, r.MinT), max(out[j].MaxT, r.MaxT)
			continue
		}
		at[r.Block] = len(out)
		l := listed{r.Block, r.Level, r.MinT, r.MaxT, r.Series, r.Samples, r.ObjectSize, "visible", r.Object}
		switch {
		case replaced[r.ID()]:
			l.State = "replaced"
		case slices.ContainsFunc(aside, func(a index.AsideRow) bool { return a.Block == r.Block }):
			l.State = "aside"
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b listed) int {
		return cmp.Or(cmp.Compare(a.MinT, b.MinT), cmp.Compare(a.MaxT, b.MaxT), a.Block.Compare(b.Block))
	})
	return out, nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows of cells.
func table(w io.Writer, rows [][]any) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		for i, c := range r {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, c)
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

func addBlocks(tool *kingpin.CmdClause, commands map[string]command) {
	blocks := tool.Command("blocks", "Look at the blocks of history.")
	addBlocksLs(blocks, commands)
	addBlocksInspect(blocks, commands)
	addBlocksVerify(blocks, commands)
	addBlocksRestore(blocks, commands)
}

func addBlocksLs(blocks *kingpin.CmdClause, commands map[string]command) {
	cmd := blocks.Command("ls", "List the blocks of a tenant, as the index has them. Blocks may hold other tenants too: sizes are of whole objects.")
	dir := storesFlags(cmd)
	var s selection
	s.flags(cmd)
	asJSON := cmd.Flag("json", "Print JSON.").Bool()
	commands[cmd.FullCommand()] = func(g *global) error {
		return withStores(g, *dir, func(ctx context.Context, _ *process, st *stores) error {
			all, err := s.blocks(ctx, st.index)
			if err != nil {
				return err
			}
			if *asJSON {
				return printJSON(all)
			}
			rows := [][]any{{"BLOCK", "LEVEL", "FROM", "TO", "SERIES", "SAMPLES", "BYTES", "STATE"}}
			for _, b := range all {
				rows = append(rows, []any{b.Block, b.Level, showTime(b.MinT), showTime(b.MaxT), b.Series, b.Samples, b.Size, b.State})
			}
			return table(os.Stdout, rows)
		})
	}
}

// printFault is a check's report: a line for each.
func printFault(n *int) func(*inspect.Fault) {
	return func(f *inspect.Fault) {
		*n++
		fmt.Printf("FAULT: %v\n", f)
	}
}

func parseBlocks(ids []string) ([]ulid.ULID, error) {
	out := make([]ulid.ULID, len(ids))
	for i, s := range ids {
		var err error
		if out[i], err = ulid.ParseStrict(s); err != nil {
			return nil, fmt.Errorf("%q is not the id of a block: %w", s, err)
		}
	}
	return out, nil
}

func addBlocksInspect(blocks *kingpin.CmdClause, commands map[string]command) {
	cmd := blocks.Command("inspect", "Show what is in blocks: tenants, times, counts, pages. Reads the whole objects.")
	dir := storesFlags(cmd)
	ids := cmd.Arg("block", "Ids of blocks.").Required().Strings()
	asJSON := cmd.Flag("json", "Print JSON.").Bool()
	commands[cmd.FullCommand()] = func(g *global) error {
		return withStores(g, *dir, func(ctx context.Context, _ *process, st *stores) error {
			faults := 0
			list, err := parseBlocks(*ids)
			if err != nil {
				return err
			}
			var all []*inspect.Block
			for _, id := range list {
				ref, err := inspect.Find(ctx, st.objects, id)
				if err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				report := printFault(&faults)
				if *asJSON {
					report = func(f *inspect.Fault) { faults++; fmt.Fprintf(os.Stderr, "FAULT: %v\n", f) }
				}
				b, err := inspect.Count(ctx, st.objects, ref, report)
				if err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				if all = append(all, b); !*asJSON {
					if err := showBlock(ctx, st.index, b); err != nil {
						return err
					}
				}
			}
			if *asJSON {
				if err := printJSON(all); err != nil {
					return err
				}
			}
			if faults > 0 {
				return errSaid
			}
			return nil
		})
	}
}

func showBlock(ctx context.Context, x *index.Index, b *inspect.Block) error {
	guard, err := x.GuardState(ctx, b.ID)
	if err != nil {
		return err
	}
	state := guard.String()
	if guard == 0 {
		state = "not published"
	}
	series, samples, _, _ := b.Totals()
	fmt.Printf("block %s, %s: level %d, %s, %d bytes, %d series, %d samples, %.3f bytes per sample\n",
		b.ID, b.Object, b.Level, state, b.Size, series, samples, float64(b.Size)/float64(max(samples, 1)))
	rows := [][]any{{"PAGES", "COUNT", "BYTES", "UNPACKED"}}
	for _, kind := range slices.Sorted(maps.Keys(b.Pages)) {
		p := b.Pages[kind]
		rows = append(rows, []any{kind, p.Count, p.Bytes, p.Unpacked})
	}
	rows = append(rows, []any{}, []any{"TENANT", "FROM", "TO", "SERIES", "SAMPLES"})
	for _, t := range b.Tenants {
		rows = append(rows, []any{t.Name, showTime(t.MinT), showTime(t.MaxT), t.Series, t.Samples})
	}
	return table(os.Stdout, rows)
}

func addBlocksVerify(blocks *kingpin.CmdClause, commands map[string]command) {
	cmd := blocks.Command("verify", "Check every page of blocks, all that is in them, and their rows: those named, or all of a tenant. "+
		"Prints a line for each fault. Exit code 1 if there is any.")
	dir := storesFlags(cmd)
	ids := cmd.Arg("block", "Ids of blocks.").Strings()
	var s selection
	s.flags(cmd)
	commands[cmd.FullCommand()] = func(g *global) error {
		return withStores(g, *dir, func(ctx context.Context, _ *process, st *stores) error {
			list, err := parseBlocks(*ids)
			if err != nil {
				return err
			}
			if len(list) == 0 {
				all, err := s.blocks(ctx, st.index)
				if err != nil {
					return err
				}
				for _, b := range all {
					list = append(list, b.Block)
				}
			}
			faults := 0
			var size int64
			b := newBar(os.Stderr)
			for i, id := range list {
				b.draw(float64(i)/float64(len(list)), fmt.Sprintf("block %s", id))
				n, err := verifyBlock(ctx, st, id, func(f *inspect.Fault) {
					faults++
					b.clear()
					fmt.Printf("FAULT: %v\n", f)
				})
				if err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				size += n
			}
			b.clear()
			fmt.Printf("%d blocks, %d bytes: %d faults\n", len(list), size, faults)
			if faults > 0 {
				return errSaid
			}
			return nil
		})
	}
}

// verifyBlock checks a block and its rows.
func verifyBlock(ctx context.Context, st *stores, id ulid.ULID, report func(*inspect.Fault)) (sizeBytes int64, err error) {
	ref, err := inspect.Find(ctx, st.objects, id)
	if errors.Is(err, object.ErrNotExist) {
		report(&inspect.Fault{Block: id, Page: "object", Err: err})
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	b, err := inspect.Verify(ctx, st.objects, ref, report)
	if err != nil {
		return ref.ObjectSize, err
	}
	// The rows of one that is being replaced go before its guard row says so.
	guard, err := st.index.GuardState(ctx, id)
	if err != nil || guard != index.Published {
		return ref.ObjectSize, err
	}
	jobs, err := st.index.Jobs(ctx)
	if err != nil {
		return ref.ObjectSize, err
	}
	for _, j := range jobs {
		if slices.ContainsFunc(j.Sources, func(s index.JobSource) bool { return s.Block == id }) ||
			slices.ContainsFunc(j.Outputs, func(o index.CompactedRow) bool { return o.Block == id }) {
			return ref.ObjectSize, nil
		}
	}
	return ref.ObjectSize, inspect.Rows(ctx, st.index, b, report)
}

func addBlocksRestore(blocks *kingpin.CmdClause, commands map[string]command) {
	cmd := blocks.Command("restore", "Give blocks that compaction has set aside back to it, if they are whole now.")
	dir := storesFlags(cmd)
	ids := cmd.Arg("block", "Ids of blocks.").Required().Strings()
	commands[cmd.FullCommand()] = func(g *global) error {
		return withStores(g, *dir, func(ctx context.Context, p *process, st *stores) error {
			list, err := parseBlocks(*ids)
			if err != nil {
				return err
			}
			aside, err := st.index.Aside(ctx)
			if err != nil {
				return err
			}
			for _, id := range list {
				i := slices.IndexFunc(aside, func(a index.AsideRow) bool { return a.Block == id })
				if i < 0 {
					return fmt.Errorf("block %s is not set aside", id)
				}
				faults := 0
				if _, err := verifyBlock(ctx, st, id, printFault(&faults)); err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				if faults > 0 {
					return fmt.Errorf("block %s stays set aside: it is still not whole", id)
				}
				if err := compact.Readmit(ctx, st.objects, st.index, index.JobSource{BlockRef: aside[i].BlockRef, Level: aside[i].Level}, p.ranges()); err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				if err := st.index.DeleteAside(ctx, id); err != nil {
					return fmt.Errorf("block %s: %w", id, err)
				}
				fmt.Printf("block %s will be compacted\n", id)
			}
			return nil
		})
	}
}

// ranges are those of the compactors.
func (p *process) ranges() []time.Duration {
	var out []time.Duration
	for _, r := range p.config.Compactor.Ranges {
		out = append(out, time.Duration(r))
	}
	return out
}

func addReindex(tool *kingpin.CmdClause, commands map[string]command) {
	cmd := tool.Command("reindex", "Make the rows of the index again from the objects, where it was lost. Without --write it only says what there is to do. "+
		"Ingesters and compactors must not be running.")
	dir := storesFlags(cmd)
	write := cmd.Flag("write", "Write the rows.").Bool()
	notEmpty := cmd.Flag("not-empty", "Write even if the index knows blocks: rows that are there stay as they are. For a run that was ended, or an index of which a part is left.").Bool()
	verbose := cmd.Flag("verbose", "Print a line for each block.").Bool()
	commands[cmd.FullCommand()] = func(g *global) error {
		return withStores(g, *dir, func(ctx context.Context, p *process, st *stores) error {
			b := newBar(os.Stderr)
			r, err := reindex.Run(ctx, reindex.Options{
				Objects: st.objects, Index: st.index, Ranges: p.ranges(), Write: *write, NotEmpty: *notEmpty,
				Report: func(e reindex.Event) {
					if *verbose || e.Action == reindex.Unreadable {
						b.clear()
						fmt.Printf("%s: %s, level %d", e.Block, e.Action, e.Level)
						if e.Err != nil {
							fmt.Printf(": %v", e.Err)
						}
						fmt.Println()
					}
					b.draw(float64(e.Done)/float64(e.All), fmt.Sprintf("%d of %d blocks", e.Done, e.All))
				},
			})
			b.end()
			if errors.Is(err, reindex.ErrNotEmpty) {
				return fmt.Errorf("%w: if that is as it should be, add --not-empty", err)
			}
			if err != nil {
				return err
			}
			fmt.Printf("%d blocks without rows, %d with rows that are missing, %d as they should be, %d condemned or being compacted, %d unreadable\n",
				r[reindex.Adopt], r[reindex.Repair], r[reindex.Keep], r[reindex.Leave], r[reindex.Unreadable])
			if !*write {
				fmt.Println("nothing was written: add --write")
			}
			if r[reindex.Unreadable] > 0 {
				return errSaid
			}
			return nil
		})
	}
}

package transfer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime/debug"
	"slices"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunks"
	tsdbindex "github.com/prometheus/prometheus/tsdb/index"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
)

// ImportOptions of an Import. Blocks, Objects, Index, Dir and Tenant are needed.
type ImportOptions struct {
	Blocks  Blocks
	Objects object.Store
	Index   *index.Index
	Dir     string // for blocks while they are written; used by nobody else
	Tenant  string

	// Ranges and MaxBlockBytes are those of the compactors.
	Ranges        []time.Duration
	MaxBlockBytes int64

	// DropLabels are external labels that series do not get: those that tell
	// replicas apart. AddLabels are such that all series get. Series that have a
	// label of their own keep it, as in Prometheus.
	DropLabels []string
	AddLabels  map[string]string

	// Again imports blocks that were imported before.
	Again bool

	// Report is called with what happens, in order; it may be nil.
	Report func(Event)

	unitSamples int // for tests
	fail        func(step string) error
}

// Event is something that Import reports.
type Event struct {
	Block *Block // nil for a folder that is no block
	Kind  EventKind
	Err   error // of a Fault or a Failed

	// Of all blocks that are to be imported.
	Done, All uint64 // samples
	// Samples of the block that are in history, those of earlier runs included.
	Samples uint64
}

// EventKind says what an Event is about.
type EventKind int

// Kinds of events.
const (
	Started  EventKind = iota // a block is being imported, from its start
	Resumed                   // a block is being imported, from where an earlier run was
	Unit                      // more of the block is in history
	Fault                     // a part of the block can't be read; the rest goes on
	Failed                    // the block can't be imported; the next goes on
	Imported                  // the block is in history, but for its faults
	Before                    // the block was imported by an earlier run; with Err if that had faults
	Skipped                   // the block is not to be imported; Err says why
)

// ImportResult counts blocks.
type ImportResult struct {
	Imported, Before, Skipped, Failed int
	Faulty                            int    // of Imported and Before: parts could not be read
	Samples                           uint64 // by this run
}

// OK says whether all is in history that was to be.
func (r *ImportResult) OK() bool { return r.Failed == 0 && r.Faulty == 0 }

// Why a block is skipped.
var (
	ErrDownsampled = errors.New("it is downsampled: history has raw samples only")
	ErrDeleted     = errors.New("it is marked for deletion: what it was compacted into has its samples")
)

// errFaults says that a block was imported before, in part.
var errFaults = errors.New("parts of it could not be read when it was imported")

const (
	// A unit of work is what is read and published at a time: so many samples or
	// bytes of labels at the most, but for a series that alone has more.
	unitSamples = 96 << 20
	unitLabels  = 32 << 20
	// unitWindows is how many blocks are written at the same time.
	unitWindows = 16
)

// Import takes blocks into history. It goes on after a block that fails; an error
// is one of the stores, or ctx's.
func Import(ctx context.Context, o ImportOptions) (*ImportResult, error) {
	if o.Report == nil {
		o.Report = func(Event) {}
	}
	if o.fail == nil {
		o.fail = func(string) error { return nil }
	}
	o.unitSamples = cmp.Or(o.unitSamples, unitSamples)
	blocks, bad, err := o.Blocks.List(ctx)
	if err != nil {
		return nil, err
	}
	r := &ImportResult{}
	for _, b := range bad {
		r.Failed++
		o.Report(Event{Kind: Failed, Err: b})
	}
	i := importer{o: &o, result: r}
	for k := range blocks {
		if o.skip(&blocks[k]) == nil {
			i.all += blocks[k].Samples
		}
	}
	for k := range blocks {
		b := &blocks[k]
		if err := o.skip(b); err != nil {
			r.Skipped++
			o.Report(Event{Block: b, Kind: Skipped, Err: err, Done: i.done, All: i.all})
			continue
		}
		done := i.done
		err := i.block(ctx, b)
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		i.done = done + b.Samples
		if _, ok := errors.AsType[*BlockError](err); ok {
			r.Failed++
			o.Report(Event{Block: b, Kind: Failed, Err: err, Done: i.done, All: i.all})
			continue
		}
		if err != nil {
			return r, fmt.Errorf("block %s: %w", b.ULID, err)
		}
	}
	return r, nil
}

func (o *ImportOptions) skip(b *Block) error {
	switch {
	case b.Deleted:
		return ErrDeleted
	case b.Resolution > 0:
		return fmt.Errorf("%w (%s)", ErrDownsampled, time.Duration(b.Resolution)*time.Millisecond)
	}
	return nil
}

// external are the labels that the series of a block get.
func (o *ImportOptions) external(b *Block) labels.Labels {
	m := maps.Clone(b.External)
	for _, name := range o.DropLabels {
		delete(m, name)
	}
	maps.Copy(m, o.AddLabels)
	return labels.FromMap(m)
}

type importer struct {
	o         *ImportOptions
	result    *ImportResult
	done, all uint64 // samples
}

// block imports a block. A *BlockError is of the block; all others end the import.
func (i *importer) block(ctx context.Context, b *Block) (err error) {
	o := i.o
	external := o.external(b)
	id := index.ImportID{Tenant: o.Tenant, Source: b.ULID}
	sum := sha256.Sum256(external.Bytes(nil))
	copy(id.Labels[:], sum[:])
	row, err := o.Index.Import(ctx, id)
	if err != nil {
		return err
	}
	if row.Done && !o.Again {
		i.result.Before++
		e := Event{Block: b, Kind: Before, Samples: row.Samples, Done: i.done + b.Samples, All: i.all}
		if row.Faults > 0 {
			i.result.Faulty++
			e.Err = fmt.Errorf("%w: %d", errFaults, row.Faults)
		}
		o.Report(e)
		return nil
	}
	in, err := compact.NewIntake(compact.IntakeOptions{
		Objects: o.Objects, Index: o.Index, Dir: o.Dir, Tenant: o.Tenant, Ranges: o.Ranges, MaxBlockBytes: o.MaxBlockBytes,
	}, b.MaxTime-b.MinTime)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Abandon(ctx)) }()
	kind := Resumed
	if row.Done || row.Level != in.Level() || row.Width != in.Width() {
		// Anew, and with other levels than before there are other windows.
		next := index.Import{ID: id, Level: in.Level(), Width: in.Width(), MinT: math.MinInt64}
		if row, err = o.Index.SwapImport(ctx, row, next); err != nil {
			return i.conflict(err)
		}
		kind = Started
	}
	dir, release, err := o.Blocks.Local(ctx, b)
	if errors.Is(err, object.ErrNotExist) {
		err = &BlockError{b.ULID.String(), err} // it was deleted meanwhile
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	i.done += min(row.Samples, b.Samples)
	o.Report(Event{Block: b, Kind: kind, Samples: row.Samples, Done: i.done, All: i.all})
	r := &reading{importer: i, block: b, dir: dir, external: external, in: in, row: row}
	if err := r.run(ctx); err != nil {
		return err
	}
	i.result.Imported++
	if r.row.Faults > 0 {
		i.result.Faulty++
	}
	o.Report(Event{Block: b, Kind: Imported, Samples: r.row.Samples, Done: i.done, All: i.all})
	return nil
}

func (i *importer) conflict(err error) error {
	if errors.Is(err, index.ErrConflict) {
		return fmt.Errorf("%w: another import of the block is under way", err)
	}
	return err
}

// reading is the import of a block.
type reading struct {
	*importer
	block    *Block
	dir      string
	external labels.Labels
	in       *compact.Intake
	row      index.Import

	open   *backfill.Reader
	faults uint64 // of the unit
	buf    window
}

// run imports the rest of the block, unit by unit.
func (r *reading) run(ctx context.Context) (err error) {
	list, err := openList(r.dir)
	if err != nil {
		return &BlockError{r.block.ULID.String(), err}
	}
	defer func() { err = errors.Join(err, list.close()) }()
	if err := r.settle(ctx); err != nil {
		return err
	}
	// All samples lie from MinTime on and before MaxTime, or are not of the block.
	_, end := r.in.Window(max(r.block.MinTime, r.block.MaxTime-1))
	mint, _ := r.in.Window(r.block.MinTime)
	mint = max(mint, r.row.MinT)
	for mint <= end {
		maxt := min(end, mint+unitWindows*r.in.Width()-1)
		if err := r.pass(ctx, list, mint, maxt); err != nil {
			return err
		}
		if maxt == end {
			break
		}
		mint = maxt + 1
	}
	next := r.row
	next.Done = true
	r.row, err = r.o.Index.SwapImport(ctx, r.row, next)
	return r.conflict(err)
}

// settle publishes what an earlier run may not have.
func (r *reading) settle(ctx context.Context) error {
	if len(r.row.Outputs) == 0 {
		return nil
	}
	err := r.in.Publish(ctx, r.row.Outputs)
	next := r.row
	next.Outputs = nil
	if errors.Is(err, compact.ErrCondemned) {
		// It stood still for a day. What it has put is gone, or was compacted.
		next.MinT, next.Ref, next.Samples, next.Faults = math.MinInt64, 0, 0, 0
	} else if err != nil {
		return err
	}
	r.row, err = r.o.Index.SwapImport(ctx, r.row, next)
	return r.conflict(err)
}

// pass imports the samples of mint to maxt, both included, in ms.
func (r *reading) pass(ctx context.Context, list *list, mint, maxt int64) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	r.open, err = backfill.Open(backfill.Block{ULID: r.block.ULID, Dir: r.dir}, mint, maxt) //nolint:contextcheck // nothing in it waits
	if err != nil {
		return &BlockError{r.block.ULID.String(), err}
	}
	defer func() { err = errors.Join(err, r.open.Close()) }()
	ref := uint64(0)
	if r.row.MinT == mint {
		ref = r.row.Ref
	}
	for {
		unit, next, bad, err := list.unit(ctx, ref, mint, maxt, r.external, r.o.unitSamples)
		if err != nil {
			return &BlockError{r.block.ULID.String(), err}
		}
		for _, err := range bad {
			r.fault(err)
		}
		if len(unit) == 0 && len(bad) == 0 {
			return nil
		}
		if err := r.unit(ctx, unit, mint, next); err != nil {
			return err
		}
		ref = next
	}
}

func (r *reading) fault(err error) {
	r.faults++
	r.o.Report(Event{Block: r.block, Kind: Fault, Err: err, Done: r.done, All: r.all})
}

// unit imports some series and notes that the import goes on at next.
func (r *reading) unit(ctx context.Context, unit []listed, mint int64, next uint64) error {
	before := r.in.Samples()
	for k := 0; k < len(unit); {
		// External labels may make one series of two.
		n := k + 1
		for n < len(unit) && labels.Equal(unit[n].labels, unit[k].labels) {
			n++
		}
		if err := r.series(ctx, unit[k:n]); err != nil {
			return err
		}
		k = n
	}
	outputs, err := r.in.Finish(ctx)
	if err != nil {
		return err
	}
	if err := r.o.fail("put"); err != nil {
		return err
	}
	samples := uint64(r.in.Samples() - before) //nolint:gosec // grows
	to := r.row
	to.MinT, to.Ref, to.Outputs = mint, next, outputs
	to.Samples, to.Faults = to.Samples+samples, to.Faults+r.faults
	row, err := r.o.Index.SwapImport(ctx, r.row, to)
	if err != nil {
		// The blocks stay: it may have been noted, and another may have published them
		// since. If not, sweepers find them.
		return r.conflict(err)
	}
	r.row, r.faults = row, 0
	if err := r.o.fail("noted"); err != nil {
		return err
	}
	if err := r.in.Publish(ctx, outputs); err != nil {
		return err
	}
	if err := r.o.fail("published"); err != nil {
		return err
	}
	to = r.row
	to.Outputs = nil
	if r.row, err = r.o.Index.SwapImport(ctx, r.row, to); err != nil {
		return r.conflict(err)
	}
	r.result.Samples += samples
	r.done += samples
	r.o.Report(Event{Block: r.block, Kind: Unit, Samples: r.row.Samples, Done: r.done, All: r.all})
	return nil
}

// series imports a series, window by window.
func (r *reading) series(ctx context.Context, same []listed) error {
	if len(same) == 1 {
		return r.read(ctx, same[0], func(s *chunkfmt.Series) error { return r.in.Add(ctx, s) })
	}
	var parts []*chunkfmt.Series
	for _, l := range same {
		if err := r.read(ctx, l, func(s *chunkfmt.Series) error {
			parts = append(parts, s)
			r.buf = window{} // it is theirs
			return nil
		}); err != nil {
			return err
		}
	}
	slices.SortStableFunc(parts, func(a, b *chunkfmt.Series) int { return cmp.Compare(first(a), first(b)) })
	for k := 0; k < len(parts); {
		_, maxt := r.in.Window(first(parts[k]))
		n := k + 1
		for n < len(parts) && first(parts[n]) <= maxt {
			n++
		}
		if err := r.in.Add(ctx, chunkfmt.Merge(parts[k:n]...)); err != nil {
			return err
		}
		k = n
	}
	return nil
}

// first is the time of a series' first sample.
func first(s *chunkfmt.Series) int64 {
	t := int64(math.MaxInt64)
	for _, c := range [][]int64{s.Floats.T, s.Histograms.T, s.FloatHistograms.T} {
		if len(c) > 0 {
			t = min(t, c[0])
		}
	}
	return t
}

// read gives the samples of a series, one window after the other. What it gives
// is valid until the call returns.
func (r *reading) read(ctx context.Context, l listed, give func(*chunkfmt.Series) error) error {
	if err := r.open.Seek(uint64(l.ref)); err != nil { //nolint:contextcheck // nothing in it waits
		return &BlockError{r.block.ULID.String(), err}
	}
	r.buf.reset(l.labels)
	for {
		s, err := r.open.Next(ctx)
		var corrupt *backfill.CorruptError
		switch {
		case errors.As(err, &corrupt) && corrupt.Series == uint64(l.ref):
			r.fault(corrupt)
			continue
		case errors.As(err, &corrupt), errors.Is(err, io.EOF):
			return r.buf.flush(give) // of a later series, or of none
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return &BlockError{r.block.ULID.String(), err}
		case s.Ref != uint64(l.ref):
			return r.buf.flush(give) // it has no samples in this time
		}
		if err := r.buf.add(s, r.in, give); err != nil {
			return err
		}
		if !s.More {
			return r.buf.flush(give)
		}
	}
}

// listed is a series of a block.
type listed struct {
	ref    storage.SeriesRef
	metric string
	labels labels.Labels // those that it has in history
}

// list lists the series of a block.
type list struct {
	block *tsdb.Block
	index tsdb.IndexReader
}

func openList(dir string) (_ *list, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recovered(&err)
	// OpenBlock only reads: it is tsdb.Open that repairs and tidies up.
	b, err := tsdb.OpenBlock(nil, dir, nil, nil)
	if err != nil {
		return nil, err
	}
	x, err := b.Index()
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return &list{b, x}, nil
}

func (l *list) close() error { return errors.Join(l.index.Close(), l.block.Close()) }

// recovered makes an error of a panic of Prometheus's decoders, or of a fault in a
// mapped file.
func recovered(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("it can't be read: %v", p)
	}
}

// unit lists the series from a ref on that may have samples in mint to maxt, as
// many as make a unit, in history's order. next is where the following one begins.
// bad are series that can't be read; if there are neither, that was all.
func (l *list) unit(ctx context.Context, ref uint64, mint, maxt int64, external labels.Labels, samples int) (unit []listed, next uint64, bad []error, err error) {
	defer recovered(&err)
	if ref > math.MaxUint32 { // refs have 32 bits, and Seek cuts them off
		return nil, ref, nil, nil
	}
	name, value := tsdbindex.AllPostingsKey()
	p, err := l.index.Postings(ctx, name, value)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("list of series: %w", err)
	}
	more := p.Next()
	if ref > 0 && more {
		more = p.Seek(storage.SeriesRef(ref))
	}
	var scratch labels.ScratchBuilder
	builder := labels.NewBuilder(labels.EmptyLabels())
	var metas []chunks.Meta
	size, most := 0, 0
	for next = ref; more && size < unitLabels && most < samples; more = p.Next() {
		ref := p.At()
		next = uint64(ref) + 1
		if err := l.index.Series(ref, &scratch, &metas); err != nil {
			bad = append(bad, fmt.Errorf("series %d: %w", ref, err))
			continue
		}
		n := 0
		for _, m := range metas {
			if m.MinTime <= maxt && m.MaxTime >= mint {
				n++
			}
		}
		if n == 0 {
			continue
		}
		builder.Reset(scratch.Labels())
		external.Range(func(x labels.Label) {
			if builder.Get(x.Name) == "" {
				builder.Set(x.Name, x.Value)
			}
		})
		ls := builder.Labels().Copy()
		unit = append(unit, listed{ref, ls.Get(model.MetricNameLabel), ls})
		size += 64 + int(ls.ByteSize()) //nolint:gosec // small
		most += 120 * n
	}
	if err := p.Err(); err != nil {
		return nil, 0, nil, fmt.Errorf("list of series: %w", err)
	}
	slices.SortFunc(unit, func(a, b listed) int {
		return cmp.Or(cmp.Compare(a.metric, b.metric), labels.Compare(a.labels, b.labels))
	})
	return unit, next, bad, nil
}

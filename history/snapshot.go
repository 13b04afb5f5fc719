package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Block is a visible block of one tenant.
type Block struct {
	ID         ulid.ULID
	Object     string
	ObjectSize int64 // bytes
	Directory  chunkfmt.Location
	Level      index.Level
	Series     uint64 // of the tenant in the block
	Samples    uint64 // likewise

	// Ranges are those of the block's rows that are visible, ascending, disjoint.
	// Samples outside of them are not to be read from this block: another row,
	// perhaps of a block that replaced part of it, stands for them.
	Ranges []chunkfmt.Range
}

// Overlaps reports whether the block may have samples in mint to maxt, inclusive, in
// ms, that are to be read from it.
func (b *Block) Overlaps(mint, maxt int64) bool {
	return slices.ContainsFunc(b.Ranges, func(r chunkfmt.Range) bool { return r.Overlaps(mint, maxt) })
}

// Snapshot is the list of a tenant's blocks that one query reads, and what that
// has cost. It is safe for concurrent use and needs no closing.
type Snapshot struct {
	// Tenant, and the time that the snapshot is good for, in ms, inclusive.
	Tenant     string
	MinT, MaxT int64
	Blocks     []Block // ordered by first time, then id; not to be changed
	// Hidden is what of this time isn't read, though blocks have it.
	Hidden *Hidden
	Stats  *Stats
	// Hold is told of bytes of memory that are taken, or given back if negative, for what
	// is read and found in blocks: what a GET brings until its pages are parsed, series pages, and
	// series until a SeriesSet has them. To end the read it ends its context. It is called
	// concurrently. nil: nobody wants to know.
	Hold func(bytes int64)
	// Read is told of bytes that are about to be asked of the object store, in the same way.
	Read func(bytes int64)

	h      *History
	keep   func(labels.Labels) bool    // as in Only; nil: all
	expect func(series, samples int64) // as in Expecting; nil: nobody wants to know
}

// Only is the snapshot for one Select or SelectWindows of those series that keep picks. Of the
// others no samples are read.
func (s *Snapshot) Only(keep func(labels.Labels) bool) *Snapshot {
	only := *s
	only.keep = keep
	return &only
}

// Expecting is the snapshot for one Select that says, before it reads pages of samples, how
// many series and samples its set has, as Series.Samples counts them: as soon as it knows of so
// many at the least, and again when it knows exactly. Who wants no more of it ends its context.
func (s *Snapshot) Expecting(expect func(series, samples int64)) *Snapshot {
	expecting := *s
	expecting.expect = expect
	return &expecting
}

func (s *Snapshot) keeps(ls labels.Labels) bool { return s.keep == nil || s.keep(ls) }

// rowSetKey: queries of about the same time share a set of rows.
type rowSetKey struct {
	tenant     string
	mint, maxt int64 // on bounds of rowSetAlign
}

// rowSetAlign is a day in ms.
const rowSetAlign = int64(24 * time.Hour / time.Millisecond)

// rowSet is a list of rows as it was at a time.
type rowSet struct {
	rows   []index.BlockRow
	loaded time.Time // before the rows were read
	// known are blocks that have no row in the set, as was known when it was
	// read: a block's samples may all lie outside the set's time, and a block
	// may have been replaced.
	known map[ulid.ULID]bool
}

func (s *rowSet) covers(must []ulid.ULID) bool {
	return !slices.ContainsFunc(must, func(id ulid.ULID) bool {
		return !s.known[id] && !slices.ContainsFunc(s.rows, func(r index.BlockRow) bool { return r.Block == id })
	})
}

func (s *rowSet) sizeBytes() int64 {
	n := 100 + 40*len(s.known)
	for i := range s.rows {
		n += s.rows[i].SizeBytes()
	}
	return int64(n)
}

// Snapshot lists the blocks of a tenant that are visible in mint to maxt, both
// included, in ms. Blocks in must have been published before the call; if they
// have rows in that time, they are in the snapshot, or what replaced them is. Rows
// that were read before since are read anew: the ring changed then, and a member
// that left may have published blocks that nobody names.
func (h *History) Snapshot(ctx context.Context, tenant string, mint, maxt int64, must []ulid.ULID, since time.Time) (*Snapshot, error) {
	h.metrics.snapshots.Inc()
	s := &Snapshot{Tenant: tenant, MinT: mint, MaxT: maxt, Stats: &Stats{}, h: h}
	if mint > maxt {
		return s, nil
	}
	hidden, err := h.hidden(ctx, tenant)
	if err != nil {
		return nil, fmt.Errorf("snapshot of tenant %s: %w", tenant, err)
	}
	if s.hide(hidden); s.MinT > maxt {
		return s, nil
	}
	rows, err := h.rowSet(ctx, s.Stats, tenant, s.MinT, maxt, must, since)
	if err != nil {
		return nil, fmt.Errorf("snapshot of tenant %s: %w", tenant, err)
	}
	s.Blocks = Blocks(visible(rows.rows, s.MinT, maxt))
	s.Stats.Blocks.Store(int64(len(s.Blocks)))
	return s, nil
}

// hide keeps what is hidden in the snapshot's time, and lets that begin behind the
// retention of what is kept longest.
func (s *Snapshot) hide(hidden *Hidden) {
	s.Hidden = hidden.Within(s.MinT, s.MaxT)
	if s.Hidden != nil {
		s.MinT = max(s.MinT, s.Hidden.Before.Long)
	}
}

// samplesFrom is the first time in ms, from mint on, of which there may be samples.
func (s *Snapshot) samplesFrom(mint int64) int64 {
	if mint = max(mint, s.MinT); s.Hidden != nil {
		mint = max(mint, s.Hidden.Before.Raw)
	}
	return mint
}

// OnlySummaries says whether there may be blocks, between mint and maxt, both included,
// in ms, of a time of which only summaries of windows may be read, or with a width only
// those of wider windows.
func (s *Snapshot) OnlySummaries(mint, maxt, width int64) bool {
	if s == nil || s.Hidden == nil {
		return false
	}
	h := s.Hidden.Before
	until := h.Raw
	if width != 0 {
		until = h.Of(width)
	}
	if until <= max(mint, h.Long) {
		return false
	}
	mint, maxt = max(mint, h.Long), min(maxt, until-1)
	return mint <= maxt && slices.ContainsFunc(s.Blocks, func(b Block) bool { return b.Overlaps(mint, maxt) })
}

// Open makes a snapshot of blocks that another process has listed, of which some
// is hidden.
func (h *History) Open(tenant string, mint, maxt int64, blocks []Block, hidden *Hidden) *Snapshot {
	s := &Snapshot{Tenant: tenant, MinT: mint, MaxT: maxt, Blocks: blocks, Stats: &Stats{}, h: h}
	s.hide(hidden)
	s.Stats.Blocks.Store(int64(len(blocks)))
	return s
}

func alignDown(t int64) int64 {
	if t < math.MinInt64+rowSetAlign {
		return math.MinInt64
	}
	if m := t % rowSetAlign; m < 0 {
		return t - m - rowSetAlign
	} else {
		return t - m
	}
}

func alignUp(t int64) int64 {
	if t > math.MaxInt64-rowSetAlign {
		return math.MaxInt64
	}
	return alignDown(t) + rowSetAlign - 1
}

// rowSet gives the rows of a time around mint to maxt, from memory if they are
// fresh enough and must is known to be seen.
func (h *History) rowSet(ctx context.Context, stats *Stats, tenant string, mint, maxt int64, must []ulid.ULID, since time.Time) (*rowSet, error) {
	key := rowSetKey{tenant, alignDown(mint), alignUp(maxt)}
	reason := "absent"
	for {
		set, load, mine := h.rows.Get(key)
		if load != nil && !mine {
			var again bool
			var err error
			if set, again, err = load.Wait(ctx); err != nil {
				return nil, err
			}
			if again {
				continue
			}
		}
		if set != nil {
			switch {
			case h.now().Sub(set.loaded) >= h.o.VisibilityDelay/2:
				reason = "expired"
			case set.loaded.Before(since):
				reason = "ring_changed"
			case !set.covers(must):
				reason = "unseen_block"
			default:
				stats.IndexCached.Add(1)
				return set, nil
			}
			// Another caller may have put a newer one there meanwhile, which
			// we then drop too: a read more, no harm.
			h.rows.Remove(key)
			if h.o.VisibilityDelay > 0 {
				continue
			}
		}
		set, err := h.loadRows(ctx, stats, key, reason, must)
		if mine {
			var size int64
			if set != nil {
				size = set.sizeBytes()
			}
			h.rows.Finish(ctx, tenant, key, load, set, size, err)
		}
		return set, err
	}
}

func (h *History) loadRows(ctx context.Context, stats *Stats, key rowSetKey, reason string, must []ulid.ULID) (*rowSet, error) {
	set := &rowSet{loaded: h.now()}
	h.metrics.rowLoads.WithLabelValues(reason).Inc()
	stats.IndexQueries.Add(1)
	var err error
	if set.rows, err = h.o.Index.Blocks(ctx, key.tenant, key.mint, key.maxt, true); err != nil {
		return nil, err
	}
	if len(must) > 0 {
		set.known = make(map[ulid.ULID]bool, len(must))
		for _, id := range must {
			set.known[id] = true
		}
	}
	return set, nil
}

// visible drops what is outside of mint to maxt and what is replaced by a row
// that may be honoured: one of which every sibling that overlaps the range is
// there. A row that is dropped itself still replaces: its data contain theirs.
func visible(rows []index.BlockRow, mint, maxt int64) []index.BlockRow {
	in := func(lo, hi int64) bool { return lo <= maxt && mint <= hi }
	there := map[index.RowID]bool{}
	replacing := false
	for i := range rows {
		if in(rows[i].MinT, rows[i].MaxT) {
			there[rows[i].ID()] = true
			replacing = replacing || len(rows[i].Replaces) > 0
		}
	}
	replaced := map[index.RowID]bool{}
	for i := range rows {
		r := &rows[i]
		if !replacing || !in(r.MinT, r.MaxT) || len(r.Replaces) == 0 {
			continue
		}
		if !slices.ContainsFunc(r.Siblings, func(s index.Sibling) bool { return in(s.MinT, s.MaxT) && !there[s.RowID] }) {
			for _, id := range r.Replaces {
				replaced[id] = true
			}
		}
	}
	out := make([]index.BlockRow, 0, len(there))
	for i := range rows {
		if id := rows[i].ID(); there[id] && !replaced[id] {
			out = append(out, rows[i])
		}
	}
	return out
}

// Blocks puts the rows of a tenant, ascending, together by their blocks, ordered as in
// a Snapshot.
func Blocks(rows []index.BlockRow) []Block {
	out := make([]Block, 0, len(rows))
	at := make(map[ulid.ULID]int, len(rows))
	for i := range rows { // ascending by MaxT
		r := &rows[i]
		times := chunkfmt.Range{MinT: r.MinT, MaxT: r.MaxT}
		if j, ok := at[r.Block]; ok {
			b := &out[j]
			if last := &b.Ranges[len(b.Ranges)-1]; times.MinT <= last.MaxT {
				last.MaxT = max(last.MaxT, times.MaxT) // no writer's, but no harm
			} else {
				b.Ranges = append(b.Ranges, times)
			}
			continue
		}
		at[r.Block] = len(out)
		out = append(out, Block{
			ID: r.Block, Object: r.Object, ObjectSize: r.ObjectSize, Directory: r.Directory, Level: r.Level,
			Series: r.Series, Samples: r.Samples, Ranges: []chunkfmt.Range{times},
		})
	}
	slices.SortFunc(out, func(a, b Block) int {
		return cmp.Or(cmp.Compare(a.Ranges[0].MinT, b.Ranges[0].MinT), a.ID.Compare(b.ID))
	})
	return out
}

// hides says whether all that a block has in mint to maxt is hidden.
func (s *Snapshot) hides(b *Block, mint, maxt int64) bool {
	return s.Hidden != nil && !slices.ContainsFunc(b.readable(mint, maxt), func(r chunkfmt.Range) bool { return !s.Hidden.All(r.MinT, r.MaxT) })
}

// maxLooks is how often a read looks at the rows anew because an object was
// absent. More than once is rare.
const maxLooks = 8

// attempt runs read over the snapshot's blocks that overlap mint to maxt. If an
// object turns out to be absent, it looks at the rows once more: if they have
// changed, or if the block is condemned, so that its row is but a remainder, it
// runs read again, over what is visible now.
func (s *Snapshot) attempt(ctx context.Context, mint, maxt int64, read func(blocks []*Block) error) error {
	mint, maxt = max(mint, s.MinT), min(maxt, s.MaxT)
	overlapping := func(all []Block) []*Block {
		var out []*Block
		for i := range all {
			if mint <= maxt && all[i].Overlaps(mint, maxt) && !s.hides(&all[i], mint, maxt) {
				out = append(out, &all[i])
			}
		}
		return out
	}
	err := read(overlapping(s.Blocks))
	condemned := map[ulid.ULID]bool{}
	for look := 0; look < maxLooks && errors.Is(err, object.ErrNotExist); look++ {
		var gone *PageError
		if !errors.As(err, &gone) {
			return err
		}
		rows, loadErr := s.h.loadRows(ctx, s.Stats, rowSetKey{s.Tenant, s.MinT, s.MaxT}, "missing_object", nil)
		if loadErr != nil {
			return errors.Join(err, loadErr)
		}
		for i := range rows.rows {
			r := &rows.rows[i]
			if r.Object != gone.Object || condemned[r.Block] {
				continue
			}
			state, guardErr := s.h.o.Index.GuardState(ctx, r.Block)
			if guardErr != nil {
				return errors.Join(err, guardErr)
			}
			if state != index.Condemned {
				s.h.metrics.missing.Inc()
				return err
			}
			condemned[r.Block] = true
		}
		rest := slices.DeleteFunc(rows.rows, func(r index.BlockRow) bool { return condemned[r.Block] })
		err = read(overlapping(Blocks(visible(rest, s.MinT, s.MaxT))))
	}
	return err
}

package sidecar

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// blocks keeps account of Prometheus's own blocks: which of them hold samples
// that the WAL didn't give. These are filled: read, and sent like ranges of the
// WAL. It is pure but for its file, and its caller lists the blocks.
//
// What is known of a block is told by its sources: the blocks of level 1 that
// went into it, itself if it is one. A source is known when all of its samples
// are durable: because the tail had read the WAL beyond the moment at which the
// block was there, and the checkpoint has passed that place; or because it was
// filled. At the first start none is, which makes a backfill of what there is.
//
// While a gap is open, every block with a source that isn't known is filled. A
// gap stays open until Prometheus has compacted all that may have been in it (its
// head up to the gap's newest possible sample, and its out-of-order log), and what
// was in blocks then is known. Blocks that it writes later don't count: there may
// always be one that isn't durable yet.
type blocks struct {
	logger  *slog.Logger
	metrics *metrics

	first    bool // nothing was planned yet: the first start
	known    map[ulid.ULID]bool
	gap      *gap
	fills    []*fill // in the order in which they are read
	listed   []backfill.Block
	waiting  []seenBlock // listed, until the tail has read all that was there then
	seen     []seenBlock // … until the checkpoint has passed
	bad      map[string]bool
	gaveUp   bool   // an agent's gap, once
	filled   uint64 // samples, since this start
	changed  bool
	progress time.Time // when the file was last written for progress alone
}

// gap is a stretch of the log that was not, or may not have been, read.
type gap struct {
	Reason string    `json:"reason"` // the first one
	Since  time.Time `json:"since"`
	// Newest is the greatest time, in ms, of a sample in it: when it ended.
	Newest int64 `json:"newest"`
	// WBL is the last segment of the out-of-order log when it ended; -1: there
	// was nothing in it.
	WBL int `json:"wbl"`

	// left are the sources that weren't known when all that may have been in the
	// gap was first found to be in blocks; nil before. After a restart it is found
	// again.
	left map[ulid.ULID]bool
}

// fill is a block that is read and sent.
type fill struct {
	block  backfill.Block
	reason string
	mint   int64 // ms: older samples are left out
	ledger *Ledger
	reader *backfill.Reader // nil before it is begun, and when it was read to its end
	begun  bool
	read   bool // to its end; not all may be durable
	gone   bool // deleted before it was read
	// retryAt is when it may be opened again, after it couldn't be read.
	retryAt time.Time
}

type seenBlock struct {
	sources []ulid.ULID
	at      tail.Position
}

// Reasons for fills, beside those of gaps.
const (
	reasonBackfill = "backfill"
	reasonImported = "imported"
)

type blocksFile struct {
	Version int         `json:"version"` // of this format: 1
	Known   []ulid.ULID `json:"known"`
	Gap     *gap        `json:"gap,omitempty"`
	Fills   []fillFile  `json:"fills,omitempty"`
}

type fillFile struct {
	Block   ulid.ULID   `json:"block"`
	Sources []ulid.ULID `json:"sources"`
	Reason  string      `json:"reason"`
	From    int64       `json:"from"` // ref of the first series that isn't durable
	MinTime int64       `json:"min_time"`
}

func blocksPath(dir string) string { return filepath.Join(dir, "blocks.json") }

func loadBlocks(dir string, logger *slog.Logger, m *metrics) (*blocks, error) {
	b := &blocks{
		logger: logger, metrics: m,
		known: map[ulid.ULID]bool{}, bad: map[string]bool{},
	}
	raw, err := os.ReadFile(blocksPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		b.first = true
		return b, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the account of blocks: %w", err)
	}
	var f blocksFile
	if err := json.Unmarshal(raw, &f); err != nil {
		return nil, fmt.Errorf("account of blocks %s: %w; if it can't be repaired remove it: all blocks are then sent again", blocksPath(dir), err)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("account of blocks %s is of version %d, this program knows version 1", blocksPath(dir), f.Version)
	}
	for _, id := range f.Known {
		b.known[id] = true
	}
	b.gap = f.Gap
	for _, x := range f.Fills {
		b.fills = append(b.fills, &fill{
			block: backfill.Block{ULID: x.Block, Sources: x.Sources}, reason: x.Reason, mint: x.MinTime,
			ledger: NewLedger(tail.Position{Offset: x.From}),
		})
	}
	return b, nil
}

// encode returns the new content of the file, nil if there is nothing new.
func (b *blocks) encode() ([]byte, error) {
	if b.first {
		return nil, nil
	}
	if !b.changed && (len(b.fills) == 0 || time.Since(b.progress) < 5*time.Second) {
		return nil, nil
	}
	f := blocksFile{Version: 1, Gap: b.gap, Known: make([]ulid.ULID, 0, len(b.known))}
	for id := range b.known {
		f.Known = append(f.Known, id)
	}
	slices.SortFunc(f.Known, ulid.ULID.Compare)
	for _, x := range b.fills {
		f.Fills = append(f.Fills, fillFile{
			Block: x.block.ULID, Sources: x.block.Sources, Reason: x.reason, From: x.ledger.Checkpoint().Offset, MinTime: x.mint,
		})
	}
	raw, err := json.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("save the account of blocks: %w", err)
	}
	b.changed, b.progress = false, time.Now()
	return append(raw, '\n'), nil
}

func writeBlocks(dir string, b []byte) error {
	if err := writeFile(blocksPath(dir), b); err != nil {
		return fmt.Errorf("save the account of blocks: %w", err)
	}
	return nil
}

// open opens a gap that may hold samples up to newest, in ms, or widens the one
// that is open. wbl is the last segment of the out-of-order log.
func (b *blocks) open(reason string, newest int64, wbl int) {
	if g := b.gap; g != nil {
		if newest > g.Newest || wbl > g.WBL {
			g.Newest, g.WBL, g.left = max(g.Newest, newest), max(g.WBL, wbl), nil
			b.changed = true
		}
		return
	}
	b.gap = &gap{Reason: reason, Since: time.Now().UTC(), Newest: newest, WBL: wbl}
	b.changed = true
	// What was seen may hold samples of the gap.
	b.waiting, b.seen = nil, nil
	b.metrics.gaps.Inc()
	if b.gaveUp {
		return // of an agent: told
	}
	b.logger.Warn("samples of the WAL may not have been read, they will be read from Prometheus's blocks", "reason", reason)
}

// list takes in the blocks that there are, newest first, and those of which only the folder
// could be read. maxAge bounds the backfill; 0 for no bound, less for none at all.
func (b *blocks) list(listed []backfill.Block, bad []ulid.ULID, now time.Time, maxAge time.Duration) {
	b.listed = listed
	present := map[ulid.ULID]bool{}
	for _, id := range bad {
		present[id] = true
	}
	for _, x := range listed {
		for _, id := range x.Sources {
			present[id] = true
		}
		present[x.Rewrites] = true
	}
	for id := range b.known {
		if !present[id] {
			delete(b.known, id)
			b.changed = true
		}
	}
	if b.first {
		b.first, b.changed = false, true
		b.plan(now, maxAge)
	}
	wanted := map[ulid.ULID]*fill{}
	for _, f := range b.fills {
		wanted[f.block.ULID] = f // by what rewrites it
		for _, id := range f.block.Sources {
			wanted[id] = f
		}
	}
	// Up to where the head was compacted. Late samples are compacted beyond.
	frontier := int64(noTime)
	for _, x := range listed {
		if !x.Stale && !x.OutOfOrder && b.knows(x.Sources) {
			frontier = max(frontier, x.MaxTime)
		}
	}
	waiting := b.waiting[:0:0]
	for _, x := range listed {
		if x.Rewrites != (ulid.ULID{}) && b.known[x.Rewrites] {
			b.know(x.Sources) // less than what was read
		}
		if b.knows(x.Sources) || b.filling(x.ULID) || b.hasSeen(x.Sources) {
			continue
		}
		reason, mint := "", int64(noTime)
		if b.gap != nil {
			reason = b.gap.Reason
		}
		for _, id := range append(slices.Clone(x.Sources), x.Rewrites) {
			// It was compacted, or rewritten, before it was read.
			if f := wanted[id]; f != nil && reason == "" {
				reason, mint = f.reason, f.mint
			}
		}
		if reason == "" && x.Level == 1 && !x.OutOfOrder && !x.Stale && x.Rewrites == (ulid.ULID{}) && x.MaxTime <= frontier {
			// Prometheus writes the head's blocks one behind the other. Somebody
			// has put this one there, and the WAL has nothing of it.
			reason = reasonImported
		}
		if reason == "" {
			waiting = append(waiting, seenBlock{sources: x.Sources})
			continue
		}
		b.fills = append(b.fills, &fill{block: x, reason: reason, mint: mint, ledger: NewLedger(tail.Position{})})
		b.changed = true
		b.logger.Info("block of Prometheus will be read", "block", x.ULID, "reason", reason, "series", x.NumSeries, "samples", x.NumSamples)
	}
	b.waiting = waiting
	b.settle(present, bad)
	b.sort()
}

// plan decides about what is there at the first start.
func (b *blocks) plan(now time.Time, maxAge time.Duration) {
	mint := int64(noTime)
	if maxAge > 0 {
		mint = now.Add(-maxAge).UnixMilli()
	}
	var samples uint64
	for _, x := range b.listed {
		if maxAge < 0 || x.MaxTime <= mint {
			b.know(x.Sources)
			continue
		}
		samples += x.NumSamples
		b.fills = append(b.fills, &fill{block: x, reason: reasonBackfill, mint: mint, ledger: NewLedger(tail.Position{})})
	}
	if len(b.fills) > 0 {
		b.logger.Info("history in Prometheus's blocks will be sent, newest first", "blocks", len(b.fills), "samples", samples)
	}
}

// settle finds the folders of fills that were loaded, and drops those whose block
// is gone.
func (b *blocks) settle(present map[ulid.ULID]bool, bad []ulid.ULID) {
	b.fills = slices.DeleteFunc(b.fills, func(f *fill) bool {
		if !f.begun && b.knows(f.block.Sources) {
			b.changed = true
			return true // what it was compacted of has been read meanwhile
		}
		i := slices.IndexFunc(b.listed, func(x backfill.Block) bool { return x.ULID == f.block.ULID })
		if i >= 0 {
			if !f.begun {
				f.block = b.listed[i]
			}
			f.gone = false
			return false
		}
		if f.begun && !f.gone || slices.Contains(bad, f.block.ULID) {
			return false // its files are open, or it may be listed again
		}
		b.changed = true
		if !present[f.block.ULID] && !slices.ContainsFunc(f.block.Sources, func(id ulid.ULID) bool { return present[id] }) {
			b.metrics.blocksLost.Inc()
			b.logger.Warn("block of Prometheus is gone before it was read: it was deleted, by Prometheus's retention perhaps", "block", f.block.ULID)
		}
		return true
	})
}

// sort puts gaps before the backfill, and of each the newest first; what has been
// begun stays in front.
func (b *blocks) sort() {
	rank := func(f *fill) int {
		switch {
		case f.begun:
			return 0
		case f.reason != reasonBackfill:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(b.fills, func(x, y *fill) int {
		if r := rank(x) - rank(y); r != 0 || rank(x) == 0 {
			return r
		}
		switch {
		case x.block.MaxTime > y.block.MaxTime:
			return -1
		case x.block.MaxTime < y.block.MaxTime:
			return 1
		}
		return 0
	})
}

func (b *blocks) knows(sources []ulid.ULID) bool {
	for _, id := range sources {
		if !b.known[id] {
			return false
		}
	}
	return true
}

func (b *blocks) know(sources []ulid.ULID) {
	for _, id := range sources {
		if !b.known[id] {
			b.known[id], b.changed = true, true
		}
	}
}

func (b *blocks) filling(id ulid.ULID) bool {
	return slices.ContainsFunc(b.fills, func(f *fill) bool { return f.block.ULID == id })
}

func (b *blocks) hasSeen(sources []ulid.ULID) bool {
	for _, id := range sources {
		if !b.known[id] && !slices.ContainsFunc(b.seen, func(s seenBlock) bool { return slices.Contains(s.sources, id) }) {
			return false
		}
	}
	return true
}

// current says that the tail has read, up to at, all that was there when the
// blocks were listed last.
func (b *blocks) current(at tail.Position) {
	for _, w := range b.waiting {
		w.at = at
		b.seen = append(b.seen, w)
	}
	b.waiting = nil
}

// passed says that all before pos is durable.
func (b *blocks) passed(pos tail.Position) {
	b.seen = slices.DeleteFunc(b.seen, func(s seenBlock) bool {
		if pos.Before(s.at) {
			return false
		}
		b.know(s.sources)
		return true
	})
}

// next returns the fill to read on, nil if there is none.
func (b *blocks) next() *fill {
	for _, f := range b.fills {
		if !f.read && !f.gone && f.block.Dir != "" && !time.Now().Before(f.retryAt) {
			return f
		}
	}
	return nil
}

// finish drops the fills of which all is durable.
func (b *blocks) finish() {
	b.fills = slices.DeleteFunc(b.fills, func(f *fill) bool {
		if !f.read || len(f.ledger.ranges) > 0 {
			return false
		}
		if f.reader != nil {
			f.reader.Close()
			f.reader = nil
		}
		b.know(f.block.Sources)
		b.changed = true
		b.logger.Info("block of Prometheus is durable", "block", f.block.ULID, "reason", f.reason, "left", len(b.fills)-1)
		return true
	})
}

// close closes a gap if all that may have been in it is in blocks, and these are
// known. minValid is the time, in ms, below which Prometheus's WAL checkpoint says
// that all in-order samples are in blocks; firstWBL is the first segment of the
// out-of-order log, -1 if there is none. Both were read before the blocks were
// listed.
func (b *blocks) close(minValid int64, firstWBL int) {
	g := b.gap
	if g == nil || b.first {
		return
	}
	if g.left == nil && !b.compacted(minValid, firstWBL) {
		return
	}
	begin := g.left == nil
	if begin {
		g.left = map[ulid.ULID]bool{}
	}
	open := false
	for _, x := range b.listed {
		if b.knows(x.Sources) {
			continue
		}
		for _, id := range x.Sources {
			if begin && !b.known[id] {
				g.left[id] = true
			}
			open = open || g.left[id] && !b.known[id]
		}
		open = open || g.left[x.Rewrites]
	}
	if open {
		return
	}
	b.gap, b.changed = nil, true
	b.logger.Info("gap in the WAL is filled from Prometheus's blocks", "reason", g.Reason, "since", g.Since)
}

// compacted says whether all that may have been in the gap is in the blocks that
// are listed, or was.
func (b *blocks) compacted(minValid int64, firstWBL int) bool {
	g := b.gap
	if g.WBL >= 0 && firstWBL >= 0 && firstWBL <= g.WBL {
		return false
	}
	return minValid > g.Newest || slices.ContainsFunc(b.listed, func(x backfill.Block) bool {
		return !x.OutOfOrder && !x.Stale && x.MaxTime > g.Newest
	})
}

// giveUp ends a gap that can't be filled, of an agent: it has no blocks.
func (b *blocks) giveUp() {
	if b.gap == nil {
		return
	}
	if !b.gaveUp {
		b.gaveUp = true
		b.logger.Warn("samples of the WAL were not read and are lost: an agent has no blocks to read them from", "reason", b.gap.Reason)
	}
	b.metrics.gapsLost.Inc()
	b.gap, b.changed = nil, true
}

func (b *blocks) closeReaders() {
	for _, f := range b.fills {
		if f.reader != nil {
			f.reader.Close()
			f.reader = nil
		}
	}
}

package index

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/oklog/ulid/v2"
)

// Versions of values.
const (
	compactedVersion = 1
	asideVersion     = 1
	jobVersion       = 1
	dayVersion       = 1
)

// Hash keys of compaction. Each holds few rows.
const (
	compactedHash = workPrefix + "compacted"
	asideHash     = workPrefix + "aside"
	jobHash       = "compaction/jobs"
	dayHash       = "compaction/day"
)

// BlockRef says where a block is.
type BlockRef struct {
	Block      ulid.ULID
	Object     string // key in the object store
	ObjectSize int64  // bytes
}

// Ref is the block that the row is about.
func (w *WorkRow) Ref() BlockRef { return BlockRef{w.Block, w.Object, w.ObjectSize} }

// CompactedRow is the work row of a block that compaction has made and will look
// at again.
type CompactedRow struct {
	BlockRef
	Level  Level  // at least 1
	End    int64  // of the window of time (a, b] that the block was made for: b, in ms since the epoch
	Tenant string // if the block is of this tenant alone because that is large; else empty
}

// AsideRow names a block that compaction can't read and leaves alone.
type AsideRow struct {
	BlockRef
	Level  Level
	Reason string
}

// JobState is how far a compaction is.
type JobState uint8

// States of a job, in order.
const (
	JobIdle      JobState = 0 // nothing is done here
	JobMerging   JobState = 1 // Owner merges; nothing of it is visible
	JobCommitted JobState = 2 // the outputs are in the object store; their rows are being written
	JobPublished JobState = 3 // the outputs are visible and replace the sources
	JobRemoved   JobState = 4 // the sources have no block rows any more
	JobAborted   JobState = 5 // nothing of it is visible, nor will be; the outputs are to be condemned
)

func (s JobState) String() string {
	if int(s) < len(jobStates) {
		return jobStates[s]
	}
	return fmt.Sprintf("job state %d", uint8(s))
}

var jobStates = [...]string{"idle", "merging", "committed", "published", "removed", "aborted"} //nolint:gochecknoglobals // a table

// JobSource is a block that a compaction replaces.
type JobSource struct {
	BlockRef
	Level Level
}

// Job is a compaction in one of a fixed number of slots. It is changed by Swap
// only, so whoever changes it knows what it was.
type Job struct {
	Level Level // that the outputs have, but for a block that is cleaned
	Slot  uint8 // with Level, the row's key
	State JobState
	Owner string // who merges, while State is JobMerging
	ID    ulid.ULID
	Beat  uint64 // grows while the owner lives

	// From JobCommitted on.
	Sources []JobSource
	Outputs []CompactedRow
}

func appendRef(b []byte, r *BlockRef) []byte {
	b = append(b, r.Block[:]...)
	b = appendText(b, r.Object)
	return binary.AppendUvarint(b, uint64(r.ObjectSize)) //nolint:gosec // not negative
}

func (d *decoder) ref() (r BlockRef) {
	copy(r.Block[:], d.Bytes(ulidSize))
	r.Object = d.Text()
	if r.ObjectSize = d.size(); r.Object == "" {
		d.Fail("no object")
	}
	return r
}

func (d *decoder) time() int64 {
	b := d.Bytes(8)
	if b == nil {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b) ^ 1<<63) //nolint:gosec // bits
}

func appendCompacted(b []byte, r *CompactedRow) []byte {
	b = append(b, byte(r.Level))
	b = append(b, timeKey(r.End)...)
	b = appendText(b, r.Tenant)
	return appendRef(b, &r.BlockRef)
}

func (d *decoder) compacted() (r CompactedRow) {
	r.Level, r.End, r.Tenant = Level(d.Byte()), d.time(), d.Text()
	if r.Level == 0 {
		d.Fail("level 0")
	}
	r.BlockRef = d.ref()
	return r
}

// PutCompacted writes work rows of blocks that compaction has made.
func (x *Index) PutCompacted(ctx context.Context, rows []CompactedRow) error {
	items := make([]Item, len(rows))
	for i := range rows {
		r := &rows[i]
		items[i] = seal(Key{Hash: compactedHash, Range: r.Block[:]}, appendCompacted([]byte{compactedVersion}, r))
	}
	return x.store.Put(ctx, items)
}

// Compacted returns the work rows of blocks that compaction has made, ordered by
// block id. Where some can't be read the others are returned with a RowErrors.
func (x *Index) Compacted(ctx context.Context) ([]CompactedRow, error) {
	items, err := x.store.Query(ctx, Query{Hash: compactedHash, Consistent: true})
	if err != nil {
		return nil, fmt.Errorf("work rows of compacted blocks: %w", err)
	}
	return decodeAll(items, func(it Item) (CompactedRow, error) {
		d, err := open(it, compactedVersion)
		if err != nil {
			return CompactedRow{}, err
		}
		r := d.compacted()
		if !bytes.Equal(it.Range, r.Block[:]) {
			d.Fail("another block than its key's")
		}
		return r, d.End()
	})
}

// DeleteCompacted removes work rows.
func (x *Index) DeleteCompacted(ctx context.Context, blocks []ulid.ULID) error {
	keys := make([]Key, len(blocks))
	for i := range blocks {
		keys[i] = Key{Hash: compactedHash, Range: blocks[i][:]}
	}
	return x.store.Delete(ctx, keys)
}

// PutAside notes that a block is left alone.
func (x *Index) PutAside(ctx context.Context, r AsideRow) error {
	b := append([]byte{asideVersion}, byte(r.Level))
	b = appendText(b, r.Reason)
	return x.store.Put(ctx, []Item{seal(Key{Hash: asideHash, Range: r.Block[:]}, appendRef(b, &r.BlockRef))})
}

// Aside returns the blocks that are left alone, ordered by id. Where some rows can't be
// read the others are returned with a RowErrors.
func (x *Index) Aside(ctx context.Context) ([]AsideRow, error) {
	items, err := x.store.Query(ctx, Query{Hash: asideHash, Consistent: true})
	if err != nil {
		return nil, fmt.Errorf("rows of blocks set aside: %w", err)
	}
	return decodeAll(items, func(it Item) (AsideRow, error) {
		d, err := open(it, asideVersion)
		if err != nil {
			return AsideRow{}, err
		}
		r := AsideRow{Level: Level(d.Byte()), Reason: d.Text()}
		r.BlockRef = d.ref()
		if !bytes.Equal(it.Range, r.Block[:]) {
			d.Fail("another block than its key's")
		}
		return r, d.End()
	})
}

// WorkOf says of which block a row that can't be read is the work row, or says that it
// is set aside; false: it is another kind of row.
func (e *RowError) WorkOf() (block ulid.ULID, ok bool) {
	if !strings.HasPrefix(e.Hash, workPrefix) || len(e.Range) < ulidSize {
		return block, false
	}
	copy(block[:], e.Range)
	return block, true
}

// SlotOf says of which slot a row that can't be read is the job; false: it is another
// kind of row.
func (e *RowError) SlotOf() (level Level, slot uint8, ok bool) {
	if e.Hash != jobHash || len(e.Range) != 2 {
		return 0, 0, false
	}
	return Level(e.Range[0]), e.Range[1], true
}

// ReplaceWork sets a block aside in place of its work row, which can't be read.
func (x *Index) ReplaceWork(ctx context.Context, e *RowError, r AsideRow) error {
	if err := x.PutAside(ctx, r); err != nil || e.Hash == asideHash {
		return err
	}
	return x.store.Delete(ctx, []Key{{Hash: e.Hash, Range: e.Range}})
}

// DeleteAside takes back PutAside.
func (x *Index) DeleteAside(ctx context.Context, block ulid.ULID) error {
	return x.store.Delete(ctx, []Key{{Hash: asideHash, Range: block[:]}})
}

func (j *Job) encode() Item {
	b := append([]byte{jobVersion}, byte(j.State))
	b = appendText(b, j.Owner)
	b = append(b, j.ID[:]...)
	b = binary.AppendUvarint(b, j.Beat)
	b = binary.AppendUvarint(b, uint64(len(j.Sources)))
	for i := range j.Sources {
		s := &j.Sources[i]
		b = appendRef(append(b, byte(s.Level)), &s.BlockRef)
	}
	b = binary.AppendUvarint(b, uint64(len(j.Outputs)))
	for i := range j.Outputs {
		b = appendCompacted(b, &j.Outputs[i])
	}
	return seal(Key{Hash: jobHash, Range: []byte{byte(j.Level), j.Slot}}, b)
}

func decodeJob(it Item) (Job, error) {
	var j Job
	d, err := open(it, jobVersion)
	if err != nil {
		return j, err
	}
	if len(it.Range) != 2 {
		return j, fmt.Errorf("%w: range key of %d bytes", ErrCorrupt, len(it.Range))
	}
	j.Level, j.Slot = Level(it.Range[0]), it.Range[1]
	if j.State = JobState(d.Byte()); int(j.State) >= len(jobStates) {
		d.Fail("%s", j.State)
	}
	j.Owner = d.Text()
	copy(j.ID[:], d.Bytes(ulidSize))
	j.Beat = d.Uvarint()
	j.Sources = make([]JobSource, d.Count(ulidSize+3))
	for i := range j.Sources {
		j.Sources[i].Level = Level(d.Byte())
		j.Sources[i].BlockRef = d.ref()
	}
	j.Outputs = make([]CompactedRow, d.Count(ulidSize+12))
	for i := range j.Outputs {
		j.Outputs[i] = d.compacted()
	}
	return j, d.End()
}

// Jobs returns the jobs of all slots that have ever been used, by level and slot. Where
// some can't be read the others are returned with a RowErrors.
func (x *Index) Jobs(ctx context.Context) ([]Job, error) {
	items, err := x.store.Query(ctx, Query{Hash: jobHash, Consistent: true})
	if err != nil {
		return nil, fmt.Errorf("jobs of compaction: %w", err)
	}
	return decodeAll(items, decodeJob)
}

// SwapJob changes what is in a slot from old, as it was read, to next. The zero
// Job but for Level and Slot stands for a slot that was never used. If the slot
// holds something else the error wraps ErrConflict; if it holds next already, the
// call succeeds.
func (x *Index) SwapJob(ctx context.Context, old, next Job) error {
	if old.Level != next.Level || old.Slot != next.Slot {
		return fmt.Errorf("job of level %d, slot %d: changed to level %d, slot %d", old.Level, old.Slot, next.Level, next.Slot)
	}
	var before []byte
	if old.ID != (ulid.ULID{}) {
		before = old.encode().Value
	}
	if _, err := x.store.PutIf(ctx, next.encode(), before); err != nil {
		return fmt.Errorf("job %s of level %d, slot %d: %s: %w", next.ID, next.Level, next.Slot, next.State, err)
	}
	return nil
}

// FirstDay returns the first day, since the epoch, that may have work rows of
// flushes: 0 if that was never noted. If that can't be read the error is a *RowError.
func (x *Index) FirstDay(ctx context.Context) (int64, error) {
	items, err := x.store.Query(ctx, Query{Hash: dayHash, Consistent: true})
	if err != nil || len(items) == 0 {
		return 0, err
	}
	d, err := open(items[0], dayVersion)
	if err != nil {
		return 0, rowError(items[0], err)
	}
	day := d.size()
	if err := d.End(); err != nil {
		return 0, rowError(items[0], err)
	}
	return day, nil
}

// ForgetFirstDay makes FirstDay return 0.
func (x *Index) ForgetFirstDay(ctx context.Context) error {
	return x.store.Delete(ctx, []Key{{Hash: dayHash, Range: []byte{0}}})
}

// SetFirstDay changes what FirstDay returns from old to day. That it was changed
// meanwhile is no error: another has done it.
func (x *Index) SetFirstDay(ctx context.Context, old, day int64) error {
	item := func(day int64) Item {
		return seal(Key{Hash: dayHash, Range: []byte{0}}, binary.AppendUvarint([]byte{dayVersion}, uint64(day))) //nolint:gosec // not negative
	}
	var before []byte
	if old != 0 {
		before = item(old).Value
	}
	if _, err := x.store.PutIf(ctx, item(day), before); err != nil && !errors.Is(err, ErrConflict) {
		return fmt.Errorf("first day with work: %w", err)
	}
	return nil
}

// Condemn says of a block that it is being deleted, whatever was decided before:
// of one that was published, because it has no rows any more.
func (x *Index) Condemn(ctx context.Context, block ulid.ULID) error {
	state, err := x.Guard(ctx, block, Condemned)
	if err != nil || state == Condemned {
		return err
	}
	if _, err := x.store.PutIf(ctx, encodeGuard(block, Condemned), encodeGuard(block, Published).Value); err != nil {
		return fmt.Errorf("guard row of block %s: %w", block, err)
	}
	return nil
}

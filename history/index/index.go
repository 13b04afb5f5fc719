package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/oklog/ulid/v2"
)

// RowError says which row can't be used. It wraps ErrCorrupt or ErrVersion.
type RowError struct {
	Hash  string
	Range []byte
	Err   error
}

func (e *RowError) Error() string {
	return fmt.Sprintf("index row %x of %q: %v", e.Range, e.Hash, e.Err)
}

func (e *RowError) Unwrap() error { return e.Err }

func rowError(it Item, err error) error { return &RowError{Hash: it.Hash, Range: it.Range, Err: err} }

// RowErrors says which rows of a list can't be used. The others are returned with it.
type RowErrors []*RowError

func (e RowErrors) Error() string {
	if len(e) == 1 {
		return e[0].Error()
	}
	return fmt.Sprintf("%d index rows can't be read, such as: %v", len(e), e[0])
}

// Unwrap returns the errors.
func (e RowErrors) Unwrap() []error {
	out := make([]error, len(e))
	for i := range e {
		out[i] = e[i]
	}
	return out
}

// decodeAll gives the rows that can be read. Its error, if any, is a RowErrors.
func decodeAll[R any](items []Item, decode func(Item) (R, error)) ([]R, error) {
	rows := make([]R, 0, len(items))
	var bad RowErrors
	for _, it := range items {
		r, err := decode(it)
		if err != nil {
			bad = append(bad, &RowError{Hash: it.Hash, Range: it.Range, Err: err})
			continue
		}
		rows = append(rows, r)
	}
	if len(bad) > 0 {
		return rows, bad
	}
	return rows, nil
}

// Index is what the rows of a Store mean. Its methods may be called concurrently;
// every write may be repeated.
type Index struct {
	store Store
}

// New makes an Index over a Store.
func New(s Store) *Index { return &Index{store: s} }

// PutBlocks writes block rows, in no particular order. Of its error, Left says what
// is not written.
func (x *Index) PutBlocks(ctx context.Context, rows []BlockRow) error {
	items := make([]Item, len(rows))
	for i := range rows {
		var err error
		if items[i], err = rows[i].encode(); err != nil {
			return err
		}
	}
	return x.store.Put(ctx, items)
}

// Left gives of the rows that PutBlocks was called with those that are perhaps not
// written, from the error that it returned.
func Left(rows []BlockRow, err error) []BlockRow {
	var partial *PartialError
	if !errors.As(err, &partial) {
		return rows
	}
	left := map[string]bool{}
	for _, k := range partial.Left {
		left[k.Hash] = true
	}
	return slices.DeleteFunc(slices.Clone(rows), func(r BlockRow) bool { return !left[blockHash(r.Tenant)] })
}

// Blocks returns the block rows of a tenant that overlap mint to maxt, both
// included, ordered by maximum time, then id. With consistent it misses none
// that was written before the call.
func (x *Index) Blocks(ctx context.Context, tenant string, mint, maxt int64, consistent bool) ([]BlockRow, error) {
	if mint > maxt {
		return nil, nil
	}
	last := int64(math.MaxInt64)
	if maxt < math.MaxInt64-Width {
		last = maxt + Width
	}
	items, err := x.store.Query(ctx, Query{
		Hash: blockHash(tenant), From: timeKey(mint), To: append(timeKey(last), bytes.Repeat([]byte{0xff}, ulidSize)...),
		Consistent: consistent,
	})
	if err != nil {
		return nil, fmt.Errorf("block rows of tenant %s: %w", tenant, err)
	}
	rows := make([]BlockRow, 0, len(items))
	for _, it := range items {
		r, err := decodeBlockRow(tenant, it)
		if err != nil {
			return nil, rowError(it, err)
		}
		if r.MinT <= maxt {
			rows = append(rows, r)
		}
	}
	return rows, nil
}

// DeleteBlocks removes block rows of a tenant.
func (x *Index) DeleteBlocks(ctx context.Context, tenant string, ids []RowID) error {
	keys := make([]Key, len(ids))
	for i, id := range ids {
		keys[i] = Key{Hash: blockHash(tenant), Range: id.key()}
	}
	return x.store.Delete(ctx, keys)
}

// DeleteRows removes block rows, perhaps of many tenants.
func (x *Index) DeleteRows(ctx context.Context, rows []BlockRow) error {
	keys := make([]Key, len(rows))
	for i := range rows {
		keys[i] = Key{Hash: blockHash(rows[i].Tenant), Range: rows[i].ID().key()}
	}
	return x.store.Delete(ctx, keys)
}

// AllBlocks returns all block rows of a tenant, consistently, in the order of Blocks.
func (x *Index) AllBlocks(ctx context.Context, tenant string) ([]BlockRow, error) {
	return x.Blocks(ctx, tenant, math.MinInt64, math.MaxInt64, true)
}

// PutWork writes a work row.
func (x *Index) PutWork(ctx context.Context, w WorkRow) error {
	items, err := w.encode()
	if err != nil {
		return err
	}
	return x.store.Put(ctx, items)
}

// Work returns the work rows of a day and shard, ordered by block id, of which some may
// be left out: then the error is a RowErrors.
func (x *Index) Work(ctx context.Context, day int64, shard int) ([]WorkRow, error) {
	items, err := x.store.Query(ctx, Query{Hash: workHash(day, shard), Consistent: true})
	if err != nil {
		return nil, fmt.Errorf("work rows of day %d, shard %d: %w", day, shard, err)
	}
	return decodeWork(day, shard, items)
}

// decodeWork puts the parts of rows together.
func decodeWork(day int64, shard int, items []Item) ([]WorkRow, error) {
	parts, err := decodeAll(items, func(it Item) (WorkRow, error) { return decodeWorkRow(day, shard, it) })
	var rows []WorkRow
	for _, p := range parts {
		if n := len(rows); n > 0 && rows[n-1].Block == p.Block {
			rows[n-1].Tenants = append(rows[n-1].Tenants, p.Tenants...)
			continue
		}
		rows = append(rows, p)
	}
	return rows, err
}

// DeleteWork removes a work row.
func (x *Index) DeleteWork(ctx context.Context, w WorkRow) error {
	items, err := w.encode()
	if err != nil {
		return err
	}
	keys := make([]Key, len(items))
	for i := range items {
		keys[i] = items[i].Key
	}
	return x.store.Delete(ctx, keys)
}

// Guard decides that a block is published or condemned, unless that is decided
// already, and returns what holds.
func (x *Index) Guard(ctx context.Context, block ulid.ULID, s GuardState) (GuardState, error) {
	it := encodeGuard(block, s)
	current, err := x.store.PutIf(ctx, it, nil)
	if err == nil {
		return s, nil
	}
	if !errors.Is(err, ErrConflict) || current == nil {
		return 0, fmt.Errorf("guard row of block %s: %w", block, err)
	}
	it.Value = current
	got, err := decodeGuard(it)
	if err != nil {
		return 0, rowError(it, err)
	}
	return got, nil
}

// GuardState returns what is decided about a block, 0 if nothing is.
func (x *Index) GuardState(ctx context.Context, block ulid.ULID) (GuardState, error) {
	items, err := x.store.Query(ctx, Query{Hash: guardHash(block), Consistent: true})
	if err != nil {
		return 0, fmt.Errorf("guard row of block %s: %w", block, err)
	}
	if len(items) == 0 {
		return 0, nil
	}
	s, err := decodeGuard(items[0])
	if err != nil {
		return 0, rowError(items[0], err)
	}
	return s, nil
}

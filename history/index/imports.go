package index

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/oklog/ulid/v2"
)

const importVersion = 1

// ImportID names the import of a block of another system.
type ImportID struct {
	Tenant string
	Source ulid.ULID // the block's own id there
	// Labels is a digest of what labels the import gives to series: with others
	// it is another import.
	Labels [8]byte
}

func importHash(tenant string) string { return "i/" + tenant }

func (id *ImportID) key() Key {
	return Key{Hash: importHash(id.Tenant), Range: append(id.Source[:], id.Labels[:]...)}
}

// Import says how far an import is. It is changed by SwapImport only.
type Import struct {
	ID    ImportID
	Done  bool
	Level Level // that its blocks get
	Width int64 // ms, of the windows that they are cut by

	// MinT and Ref are where it goes on: at the series of the source with that ref,
	// or the next behind it, with its samples from MinT on, in ms. All before is in
	// blocks: those of Outputs, which may not be published, and others, which are.
	MinT    int64
	Ref     uint64
	Outputs []CompactedRow

	Samples uint64 // that were imported so far
	Faults  uint64 // parts of the source that could not be read

	value []byte // as it was read; nil for one that isn't there
}

func (r *Import) encode() Item {
	done := byte(0)
	if r.Done {
		done = 1
	}
	b := []byte{importVersion, done, byte(r.Level)}
	b = binary.AppendUvarint(b, uint64(r.Width)) //nolint:gosec // not negative
	b = append(b, timeKey(r.MinT)...)
	b = binary.AppendUvarint(b, r.Ref)
	b = binary.AppendUvarint(b, r.Samples)
	b = binary.AppendUvarint(b, r.Faults)
	b = binary.AppendUvarint(b, uint64(len(r.Outputs)))
	for i := range r.Outputs {
		b = appendCompacted(b, &r.Outputs[i])
	}
	return seal(r.ID.key(), b)
}

func decodeImport(id ImportID, it Item) (Import, error) {
	r := Import{ID: id, value: it.Value}
	d, err := open(it, importVersion)
	if err != nil {
		return r, err
	}
	r.Done = d.Byte() != 0
	r.Level, r.Width = Level(d.Byte()), d.size()
	r.MinT, r.Ref = d.time(), d.Uvarint()
	r.Samples, r.Faults = d.Uvarint(), d.Uvarint()
	if n := d.Count(ulidSize + 12); n > 0 {
		r.Outputs = make([]CompactedRow, n)
	}
	for i := range r.Outputs {
		r.Outputs[i] = d.compacted()
	}
	return r, d.End()
}

// Import returns how far an import is, consistently; one that never began has
// Level 0.
func (x *Index) Import(ctx context.Context, id ImportID) (Import, error) {
	k := id.key()
	items, err := x.store.Query(ctx, Query{Hash: k.Hash, From: k.Range, To: k.Range, Consistent: true})
	if err != nil {
		return Import{}, fmt.Errorf("row of the import of block %s: %w", id.Source, err)
	}
	if len(items) == 0 {
		return Import{ID: id}, nil
	}
	r, err := decodeImport(id, items[0])
	if err != nil {
		return r, rowError(items[0], err)
	}
	return r, nil
}

// SwapImport changes an import from old, as Import or SwapImport has returned it,
// to next, which it returns. If it has changed since, the error wraps ErrConflict.
func (x *Index) SwapImport(ctx context.Context, old, next Import) (Import, error) {
	it := next.encode()
	if _, err := x.store.PutIf(ctx, it, old.value); err != nil {
		return old, fmt.Errorf("row of the import of block %s: %w", next.ID.Source, err)
	}
	next.value = it.Value
	return next, nil
}

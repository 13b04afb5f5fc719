package index

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
)

const deletionsVersion = 1

// MaxDeletions bounds the deletions of a tenant that are in force.
const MaxDeletions = 4096

// Hash key of deletions, and what its range keys begin with.
const (
	deletionsHash    = "deletions"
	deletionsChanged = 0 // the whole key of the row that says that something changed
	deletionsTenant  = 1 // before the tenant
)

// Deletion hides samples of a tenant, whenever they arrive, until it is cancelled.
type Deletion struct {
	ID         ulid.ULID // its time is when it was asked for
	MinT, MaxT int64     // of the samples, ms since the epoch, inclusive

	// Matchers that all have to match a series; none: all series.
	Matchers []*labels.Matcher

	// Clean asks compactors not to wait with what is in blocks of the last level.
	Clean bool
	// Gone is when a compactor has found no block that has any of it left, ms since
	// the epoch; 0: not yet.
	Gone int64
}

// Matches says whether the deletion is about a series.
func (d *Deletion) Matches(ls labels.Labels) bool {
	for _, m := range d.Matchers {
		if !m.Matches(ls.Get(m.Name)) {
			return false
		}
	}
	return true
}

// Overlaps says whether any instant of mint to maxt, both included, is of the deletion.
func (d *Deletion) Overlaps(mint, maxt int64) bool { return d.MinT <= maxt && mint <= d.MaxT }

// DeletionsRow has the deletions of a tenant that are in force.
type DeletionsRow struct {
	Tenant    string
	Deletions []Deletion // in the order in which they were made
	// Err is of a row, of AllDeletions, that can't be read: it has no deletions then.
	Err error

	value []byte // as it was read; nil for a row that isn't there
}

func deletionsKey(tenant string) Key {
	return Key{Hash: deletionsHash, Range: append([]byte{deletionsTenant}, tenant...)}
}

// ErrTooManyDeletions is what PutDeletions wraps where a row can't hold them.
var ErrTooManyDeletions = errors.New("too many deletions in force")

func (r *DeletionsRow) encode() (Item, error) {
	if r.Tenant == "" {
		return Item{}, errors.New("deletions row: no tenant")
	}
	if len(r.Deletions) > MaxDeletions {
		return Item{}, fmt.Errorf("%w: %d, the limit is %d", ErrTooManyDeletions, len(r.Deletions), MaxDeletions)
	}
	b := binary.AppendUvarint([]byte{deletionsVersion}, uint64(len(r.Deletions)))
	for i := range r.Deletions {
		d := &r.Deletions[i]
		if d.MinT > d.MaxT {
			return Item{}, fmt.Errorf("deletion %s of tenant %s: from %d to %d ms", d.ID, r.Tenant, d.MinT, d.MaxT)
		}
		b = append(b, d.ID[:]...)
		b = append(append(b, timeKey(d.MinT)...), timeKey(d.MaxT)...)
		clean := byte(0)
		if d.Clean {
			clean = 1
		}
		b = append(append(b, clean), timeKey(d.Gone)...)
		b = AppendMatchers(b, d.Matchers)
	}
	if len(b)+checksumSize > MaxValue {
		return Item{}, fmt.Errorf("%w: %d take %d bytes, the limit is %d", ErrTooManyDeletions, len(r.Deletions), len(b), MaxValue)
	}
	return seal(deletionsKey(r.Tenant), b), nil
}

// AppendMatchers appends matchers as a deletion has them in its row.
func AppendMatchers(b []byte, ms []*labels.Matcher) []byte {
	b = binary.AppendUvarint(b, uint64(len(ms)))
	for _, m := range ms {
		b = append(b, byte(m.Type)) //nolint:gosec // 0 to 3: =, !=, =~, !~
		b = appendText(b, m.Name)
		b = appendText(b, m.Value)
	}
	return b
}

func (d *decoder) matchers() []*labels.Matcher {
	n := d.Count(3)
	if n == 0 {
		return nil
	}
	out := make([]*labels.Matcher, 0, n)
	for range n {
		t := labels.MatchType(d.Byte())
		name, value := d.Text(), d.Text()
		if d.Err != nil {
			return nil
		}
		if t > labels.MatchNotRegexp {
			d.Fail("unknown type of a matcher")
			return nil
		}
		m, err := labels.NewMatcher(t, name, value)
		if err != nil {
			d.Fail("%s", err)
			return nil
		}
		out = append(out, m)
	}
	return out
}

func decodeDeletionsRow(it Item) (DeletionsRow, error) {
	if len(it.Range) < 2 || it.Range[0] != deletionsTenant {
		return DeletionsRow{}, fmt.Errorf("%w: range key", ErrCorrupt)
	}
	r := DeletionsRow{Tenant: string(it.Range[1:]), value: it.Value}
	d, err := open(it, deletionsVersion)
	if err != nil {
		return r, err
	}
	r.Deletions = make([]Deletion, d.Count(ulidSize+8+8+1+8+1))
	for i := range r.Deletions {
		x := &r.Deletions[i]
		copy(x.ID[:], d.Bytes(ulidSize))
		x.MinT, x.MaxT = d.time(), d.time()
		x.Clean = d.Byte() != 0
		x.Gone = d.time()
		x.Matchers = d.matchers()
		if d.Err == nil && x.MinT > x.MaxT {
			d.Fail("a deletion of no time")
		}
	}
	return r, d.End()
}

// Deletions returns those of a tenant that are in force, consistently.
func (x *Index) Deletions(ctx context.Context, tenant string) (DeletionsRow, error) {
	k := deletionsKey(tenant).Range
	rows, err := x.deletions(ctx, Query{Hash: deletionsHash, From: k, To: k, Consistent: true})
	if err != nil {
		return DeletionsRow{}, err
	}
	if len(rows) == 0 {
		return DeletionsRow{Tenant: tenant}, nil
	}
	return rows[0], rows[0].Err
}

// AllDeletions returns those of all tenants that ever had any, ordered by tenant,
// consistently. That one row can't be read is no error of the others.
func (x *Index) AllDeletions(ctx context.Context) ([]DeletionsRow, error) {
	return x.deletions(ctx, Query{Hash: deletionsHash, From: []byte{deletionsTenant}, Consistent: true})
}

func (x *Index) deletions(ctx context.Context, q Query) ([]DeletionsRow, error) {
	items, err := x.store.Query(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("rows of deletions: %w", err)
	}
	rows := make([]DeletionsRow, len(items))
	for i, it := range items {
		if rows[i], err = decodeDeletionsRow(it); err != nil {
			rows[i].Deletions, rows[i].Err = nil, rowError(it, err)
		}
	}
	return rows, nil
}

// PutDeletions replaces a row that Deletions or AllDeletions has returned by one
// with these deletions, if it hasn't changed since; else the error wraps ErrConflict.
func (x *Index) PutDeletions(ctx context.Context, r DeletionsRow, ds []Deletion) error {
	if r.Err != nil {
		return r.Err
	}
	old := r.value
	r.Deletions = ds
	it, err := r.encode()
	if err != nil {
		return err
	}
	if _, err := x.store.PutIf(ctx, it, old); err != nil {
		return fmt.Errorf("deletions of tenant %s: %w", r.Tenant, err)
	}
	return nil
}

// NoteDeletions makes DeletionsNoted return another id than before: readers then
// read the deletions anew. It is called after PutDeletions.
func (x *Index) NoteDeletions(ctx context.Context, id ulid.ULID) error {
	k := Key{Hash: deletionsHash, Range: []byte{deletionsChanged}}
	if err := x.store.Put(ctx, []Item{seal(k, append([]byte{deletionsVersion}, id[:]...))}); err != nil {
		return fmt.Errorf("row of the last change of deletions: %w", err)
	}
	return nil
}

// DeletionsNoted returns the id that was noted last, zero if there never was a deletion.
func (x *Index) DeletionsNoted(ctx context.Context) (id ulid.ULID, _ error) {
	k := []byte{deletionsChanged}
	items, err := x.store.Query(ctx, Query{Hash: deletionsHash, From: k, To: k, Consistent: true})
	if err != nil || len(items) == 0 {
		return id, err
	}
	d, err := open(items[0], deletionsVersion)
	if err != nil {
		return id, rowError(items[0], err)
	}
	copy(id[:], d.Bytes(ulidSize))
	if err := d.End(); err != nil {
		return id, rowError(items[0], err)
	}
	return id, nil
}

package index

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// Bounds of an engine row.
const (
	MaxFeatures     = 64  // of a row
	MaxFeatureBytes = 128 // of a feature's name
)

// EngineRow says how the Prometheus of a tenant evaluates queries, as it has been
// told by flags and its configuration.
type EngineRow struct {
	Tenant             string
	LookbackDelta      int64    // ms, at least 1
	Features           []string // by the names that --enable-feature has, ascending, known to us or not
	EvaluationInterval int64    // ms; 0: it isn't known
}

const engineVersion = 1

func engineKey(tenant string) Key { return Key{Hash: "o/" + tenant, Range: []byte{0}} }

// Validate says what of a row is impossible.
func (r *EngineRow) Validate() error {
	if r.Tenant == "" || r.LookbackDelta < 1 || r.EvaluationInterval < 0 || len(r.Features) > MaxFeatures {
		return fmt.Errorf("engine row of tenant %q: lookback delta of %d ms, at least 1 is possible; evaluation interval of %d ms, at least 0; %d features, at most %d are possible",
			r.Tenant, r.LookbackDelta, r.EvaluationInterval, len(r.Features), MaxFeatures)
	}
	for i, f := range r.Features {
		if f == "" || len(f) > MaxFeatureBytes || i > 0 && r.Features[i-1] >= f {
			return fmt.Errorf("engine row of tenant %q: feature %.40q is empty, longer than %d bytes, or not in ascending order", r.Tenant, f, MaxFeatureBytes)
		}
	}
	return nil
}

func (r *EngineRow) encode() (Item, error) {
	if err := r.Validate(); err != nil {
		return Item{}, err
	}
	b := binary.AppendUvarint([]byte{engineVersion}, uint64(r.LookbackDelta)) //nolint:gosec // validated
	b = binary.AppendUvarint(b, uint64(len(r.Features)))
	for _, f := range r.Features {
		b = appendText(b, f)
	}
	if r.EvaluationInterval > 0 {
		b = binary.AppendUvarint(b, uint64(r.EvaluationInterval)) //nolint:gosec // validated
	}
	return seal(engineKey(r.Tenant), b), nil
}

func decodeEngineRow(tenant string, it Item) (EngineRow, error) {
	r := EngineRow{Tenant: tenant}
	d, err := open(it, engineVersion)
	if err != nil {
		return r, err
	}
	r.LookbackDelta = d.within(math.MaxInt64)
	if n := d.Count(2); n > 0 {
		r.Features = make([]string, n)
	}
	for i := range r.Features {
		r.Features[i] = d.Text()
	}
	if len(d.B) > 0 { // else the sidecar doesn't know it
		r.EvaluationInterval = d.within(math.MaxInt64)
	}
	if err := d.End(); err != nil {
		return r, err
	}
	if err := r.Validate(); err != nil {
		return r, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return r, nil
}

// Engine returns the engine row of a tenant; found is false if there is none. One
// that was written just before may not be found.
func (x *Index) Engine(ctx context.Context, tenant string) (r EngineRow, found bool, err error) {
	k := engineKey(tenant)
	items, err := x.store.Query(ctx, Query{Hash: k.Hash})
	if err != nil {
		return EngineRow{}, false, fmt.Errorf("engine row of tenant %s: %w", tenant, err)
	}
	if len(items) == 0 {
		return EngineRow{}, false, nil
	}
	if r, err = decodeEngineRow(tenant, items[0]); err != nil {
		return EngineRow{}, false, rowError(items[0], err)
	}
	return r, true, nil
}

// PutEngine writes an engine row over what is there.
func (x *Index) PutEngine(ctx context.Context, r EngineRow) error {
	it, err := r.encode()
	if err != nil {
		return err
	}
	return x.store.Put(ctx, []Item{it})
}

// Equal reports whether two rows say the same.
func (r EngineRow) Equal(o EngineRow) bool {
	return r.Tenant == o.Tenant && r.LookbackDelta == o.LookbackDelta && r.EvaluationInterval == o.EvaluationInterval && slices.Equal(r.Features, o.Features)
}

package index

import (
	"context"
	"fmt"

	"github.com/oklog/ulid/v2"
)

// Remains are rows of a tenant that say something else than what blocks it has.
type Remains struct {
	Imports []ulid.ULID // blocks of other systems whose import is noted
	Engine  bool        // there is an engine row
	keys    []Key
}

// Remains returns them.
func (x *Index) Remains(ctx context.Context, tenant string) (r Remains, err error) {
	imports, err := x.store.Query(ctx, Query{Hash: importHash(tenant), Consistent: true})
	if err != nil {
		return r, fmt.Errorf("rows of imports of tenant %s: %w", tenant, err)
	}
	for _, it := range imports {
		var id ulid.ULID
		copy(id[:], it.Range)
		r.Imports, r.keys = append(r.Imports, id), append(r.keys, it.Key)
	}
	engine, err := x.store.Query(ctx, Query{Hash: engineKey(tenant).Hash, Consistent: true})
	if err != nil {
		return r, fmt.Errorf("engine row of tenant %s: %w", tenant, err)
	}
	for _, it := range engine {
		r.Engine, r.keys = true, append(r.keys, it.Key)
	}
	return r, nil
}

// DeleteRemains removes them: what is imported again after that is read from its
// start.
func (x *Index) DeleteRemains(ctx context.Context, r Remains) error {
	if len(r.keys) == 0 {
		return nil
	}
	return x.store.Delete(ctx, r.keys)
}

package historytest

import (
	"testing"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// TestRemains: what is left of a tenant beside its blocks is found, and removed, and
// nothing of others is.
func TestRemains(t *testing.T) {
	onIndexes(t, func(t *testing.T, s index.Store) {
		ctx, x := t.Context(), index.New(s)
		source := ulid.MustNew(7, nil)
		for _, tenant := range []string{"a", "a/b"} {
			r, err := x.Import(ctx, index.ImportID{Tenant: tenant, Source: source})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := x.SwapImport(ctx, r, r); err != nil {
				t.Fatal(err)
			}
			if err := x.PutEngine(ctx, index.EngineRow{Tenant: tenant, LookbackDelta: 1}); err != nil {
				t.Fatal(err)
			}
		}
		want := func(tenant string, imports int, engine bool) index.Remains {
			t.Helper()
			r, err := x.Remains(ctx, tenant)
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Imports) != imports || imports > 0 && r.Imports[0] != source || r.Engine != engine {
				t.Errorf("%s: %+v", tenant, r)
			}
			return r
		}
		r := want("a", 1, true)
		for range 2 {
			if err := x.DeleteRemains(ctx, r); err != nil {
				t.Fatal(err)
			}
		}
		if err := x.DeleteRemains(ctx, want("a", 0, false)); err != nil {
			t.Fatal(err)
		}
		want("a/b", 1, true)
	})
}

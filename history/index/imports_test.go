package index

import (
	"errors"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

func testImport() Import {
	return Import{
		ID:   ImportID{Tenant: "acme", Source: testULID(3), Labels: [8]byte{1, 2, 3}},
		Done: true, Level: 2, Width: 86_400_000, MinT: -5, Ref: 1 << 40, Samples: 7, Faults: 1,
		Outputs: []CompactedRow{{BlockRef: BlockRef{testULID(4), "blocks/x", 100}, Level: 2, End: math.MaxInt64, Tenant: "acme"}},
	}
}

func TestImport(t *testing.T) {
	store, err := NewBolt(t.TempDir()+"/index.db", prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	x, ctx := New(store), t.Context()
	want := testImport()
	none, err := x.Import(ctx, want.ID)
	if err != nil || none.Level != 0 || none.Done {
		t.Fatalf("%+v, %v", none, err)
	}
	r, err := x.SwapImport(ctx, none, want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := x.Import(ctx, want.ID)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r, got, cmp.AllowUnexported(Import{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	next := r
	next.Outputs, next.Samples = nil, 8
	if _, err := x.SwapImport(ctx, r, next); err != nil {
		t.Fatal(err)
	}
	next.Samples = 9
	if _, err := x.SwapImport(ctx, r, next); !errors.Is(err, ErrConflict) {
		t.Errorf("changed behind our back: %v", err)
	}
	other := want.ID
	other.Labels[0]++
	if r, err := x.Import(ctx, other); err != nil || r.Level != 0 {
		t.Errorf("with other labels: %+v, %v", r, err)
	}
}

func FuzzDecodeImport(f *testing.F) {
	r := testImport()
	it := r.encode()
	f.Add(it.Value[:len(it.Value)-4])
	f.Fuzz(func(t *testing.T, body []byte) {
		id := testImport().ID
		r, err := decodeImport(id, seal(id.key(), body))
		if err != nil {
			return
		}
		r.value = nil
		again, err := decodeImport(id, r.encode())
		if err != nil {
			t.Fatal(err)
		}
		again.value = nil
		if d := cmp.Diff(r, again, cmp.AllowUnexported(Import{})); d != "" {
			t.Fatal(d)
		}
	})
}

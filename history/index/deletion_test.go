package index

import (
	"errors"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
)

func testDeletions() []Deletion {
	return []Deletion{
		{ID: testULID(1), MinT: math.MinInt64, MaxT: 5},
		{ID: testULID(2), MinT: -7, MaxT: math.MaxInt64, Clean: true, Gone: 1_700_000_000_000, Matchers: []*labels.Matcher{
			labels.MustNewMatcher(labels.MatchEqual, "__name__", "m"), labels.MustNewMatcher(labels.MatchNotEqual, "a", ""),
			labels.MustNewMatcher(labels.MatchRegexp, "b", "x|y.*"), labels.MustNewMatcher(labels.MatchNotRegexp, "ü", "z+"),
		}},
	}
}

func compareDeletions() cmp.Option {
	return cmp.Options{
		cmp.Comparer(func(a, b *labels.Matcher) bool { return a.String() == b.String() }),
		cmpopts.IgnoreUnexported(DeletionsRow{}),
	}
}

// TestDeletions follows a tenant's row in a store: it is replaced only by who has
// seen it as it is.
func TestDeletions(t *testing.T) {
	db, err := NewBolt(filepath.Join(t.TempDir(), "index.db"), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	x, ctx := New(db), t.Context()
	if id, err := x.DeletionsNoted(ctx); err != nil || id.Time() != 0 {
		t.Fatalf("at first: %s, %v", id, err)
	}
	for _, tenant := range []string{"b", "a", "\xffno\x00"} {
		r, err := x.Deletions(ctx, tenant)
		if err != nil || len(r.Deletions) != 0 || r.Tenant != tenant {
			t.Fatalf("%+v, %v", r, err)
		}
		if err := x.PutDeletions(ctx, r, testDeletions()); err != nil {
			t.Fatal(err)
		}
		if err := x.PutDeletions(ctx, r, nil); !errors.Is(err, ErrConflict) {
			t.Errorf("over one that is another: %v", err)
		}
	}
	if err := x.NoteDeletions(ctx, testULID(7)); err != nil {
		t.Fatal(err)
	}
	if id, err := x.DeletionsNoted(ctx); err != nil || id != testULID(7) {
		t.Errorf("noted: %s, %v", id, err)
	}
	all, err := x.AllDeletions(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []DeletionsRow{{Tenant: "a", Deletions: testDeletions()}, {Tenant: "b", Deletions: testDeletions()}, {Tenant: "\xffno\x00", Deletions: testDeletions()}}
	if d := cmp.Diff(want, all, compareDeletions()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	r, err := x.Deletions(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := x.PutDeletions(ctx, r, r.Deletions[:1]); err != nil {
		t.Fatal(err)
	}
	if r, err = x.Deletions(ctx, "a"); err != nil || len(r.Deletions) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestDeletionsTooMany(t *testing.T) {
	r := DeletionsRow{Tenant: "a", Deletions: make([]Deletion, MaxDeletions+1)}
	if _, err := r.encode(); !errors.Is(err, ErrTooManyDeletions) {
		t.Errorf("by number: %v", err)
	}
	r.Deletions = []Deletion{{Matchers: []*labels.Matcher{labels.MustNewMatcher(labels.MatchEqual, "a", strings.Repeat("x", MaxValue))}}}
	if _, err := r.encode(); !errors.Is(err, ErrTooManyDeletions) {
		t.Errorf("by bytes: %v", err)
	}
	r.Deletions = []Deletion{{MinT: 1}}
	if _, err := r.encode(); err == nil {
		t.Error("a deletion of no time can be written")
	}
}

func FuzzDecodeDeletions(f *testing.F) {
	r := DeletionsRow{Tenant: "acme", Deletions: testDeletions()}
	it, err := r.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(it.Range, it.Value[:len(it.Value)-4])
	f.Fuzz(func(t *testing.T, rng, body []byte) {
		r, err := decodeDeletionsRow(seal(Key{Hash: deletionsHash, Range: rng}, body))
		if err != nil {
			return
		}
		if len(r.Deletions) > MaxDeletions {
			return
		}
		again, err := r.encode()
		if err != nil {
			t.Fatalf("decoded row can't be encoded: %v", err)
		}
		r2, err := decodeDeletionsRow(again)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(r, r2, compareDeletions()); d != "" {
			t.Fatal(d)
		}
	})
}

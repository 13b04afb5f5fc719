package ring

import (
	"fmt"
	"math"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
)

func members(n int) []Member {
	var ms []Member
	for i := range n {
		ms = append(ms, Member{ID: fmt.Sprintf("ingester-%d", i), Address: fmt.Sprintf("10.0.0.%d:9010", i), State: Active})
	}
	return ms
}

func series(i int) labels.Labels {
	return labels.FromStrings("__name__", "up", "instance", fmt.Sprint(i))
}

// The hash places series for years: it must never change.
func TestTokenIsStable(t *testing.T) {
	for _, c := range []struct {
		tenant string
		ls     labels.Labels
		want   uint32
	}{
		{"default", labels.FromStrings("__name__", "up", "job", "node"), 0x3657bfa7},
		{"other", labels.FromStrings("__name__", "up", "job", "node"), 0x2fd82f83},
		{"", labels.EmptyLabels(), 0x54705cbb},
	} {
		if got := Token(c.tenant, c.ls); got != c.want {
			t.Errorf("Token(%q, %s) = %#x, want %#x", c.tenant, c.ls, got, c.want)
		}
	}
}

func TestVersionIsOrderFree(t *testing.T) {
	a, b := members(4), members(4)
	b[0], b[3] = b[3], b[0]
	if x, y := NewSnapshot(a).Version, NewSnapshot(b).Version; x != y {
		t.Errorf("same members in another order: %s and %s", x, y)
	}
	b[2].State = Leaving
	if x, y := NewSnapshot(a).Version, NewSnapshot(b).Version; x == y {
		t.Errorf("a state changed, the version didn't: %s", x)
	}
}

func TestOwnersAreFairAndMoveLittle(t *testing.T) {
	const n = 20000
	before := New(NewSnapshot(members(10)))
	after := New(NewSnapshot(members(11)))
	count, moved := map[string]int{}, 0
	for i := range n {
		tok := Token("default", series(i))
		a, ok := before.Owner(tok)
		if !ok {
			t.Fatal("no owner")
		}
		count[a.ID]++
		if b, _ := after.Owner(tok); b.ID != a.ID {
			moved++
			if b.ID != "ingester-10" {
				t.Fatalf("series %d moved from %s to %s, which was there before", i, a.ID, b.ID)
			}
		}
	}
	for id, c := range count {
		if c < n/10*7/10 || c > n/10*13/10 {
			t.Errorf("%s owns %d of %d series", id, c, n)
		}
	}
	if moved < n/11/2 || moved > n/11*2 {
		t.Errorf("%d of %d series moved to the eleventh member", moved, n)
	}
}

func TestSharesAddUpToOne(t *testing.T) {
	for _, n := range []int{1, 2, 7} {
		sum := 0.0
		for _, s := range New(NewSnapshot(members(n))).Shares() {
			sum += s
		}
		if math.Abs(sum-1) > 1e-9 {
			t.Errorf("%d members: shares add up to %v", n, sum)
		}
	}
}

func TestOnlyActiveMembersOwn(t *testing.T) {
	ms := members(3)
	ms[0].State, ms[1].State = Leaving, Joining
	r := New(NewSnapshot(ms))
	for i := range 100 {
		if m, ok := r.Owner(Token("t", series(i))); !ok || m.ID != "ingester-2" {
			t.Fatalf("owner %q, %v", m.ID, ok)
		}
	}
	if _, ok := New(Snapshot{}).Owner(1); ok {
		t.Error("an empty ring has an owner")
	}
	if _, ok := r.OwnerExcept(1, func(string) bool { return true }); ok {
		t.Error("an owner although all are to be skipped")
	}
}

func TestSubset(t *testing.T) {
	r := New(NewSnapshot(members(10)))
	got := r.Subset("team-a", 3, 1)
	if len(got.Active()) != 3 {
		t.Fatalf("subset has %d members", len(got.Active()))
	}
	in := map[string]bool{}
	for _, m := range got.Active() {
		in[m.ID] = true
	}
	for i := range 100 {
		if m, _ := got.Owner(Token("team-a", series(i))); !in[m.ID] {
			t.Fatalf("owner %s is not in the subset", m.ID)
		}
	}
	if r.Subset("team-a", 0, 1) != r || r.Subset("team-a", 10, 1) != r {
		t.Error("a subset of all is another ring")
	}
	// One more member changes at most one member of a subset.
	kept := 0
	for _, m := range New(NewSnapshot(members(11))).Subset("team-a", 3, 1).Active() {
		if in[m.ID] {
			kept++
		}
	}
	if kept < 2 {
		t.Errorf("only %d of 3 members of the subset stayed", kept)
	}
}

// zoned puts the members into n zones by turns, with the rest in none.
func zoned(ms []Member, zones, without int) []Member {
	for i := range ms {
		if i >= without {
			ms[i].Zone = fmt.Sprint("zone-", i%zones)
		}
	}
	return ms
}

func ids(ms []Member) map[string]bool {
	out := map[string]bool{}
	for _, m := range ms {
		out[m.ID] = true
	}
	return out
}

func TestOwners(t *testing.T) {
	for _, c := range []struct{ members, zones, without int }{
		{1, 1, 0}, {2, 1, 0}, {2, 2, 0}, {3, 3, 0}, {6, 3, 0}, {9, 2, 0}, {7, 1, 0}, {7, 3, 7}, {8, 2, 3}, {12, 5, 2},
	} {
		for n := 1; n <= 3; n++ {
			ms := zoned(members(c.members), c.zones, c.without)
			r := New(NewSnapshot(ms))
			for i := range 60 {
				tok := Token("t", series(i))
				var skipped string
				if i%3 == 0 && c.members > 1 {
					skipped = fmt.Sprint("ingester-", i%c.members)
				}
				skip := func(id string) bool { return id == skipped }
				got := r.Owners(tok, n, skip)
				zones, all := map[string]bool{}, map[string]bool{}
				left := 0
				for k := range ms {
					if ms[k].ID != skipped {
						all[ms[k].Failure()] = true
						left++
					}
				}
				for k := range got {
					zones[got[k].Failure()] = true
				}
				has := ids(got)
				if len(has) != len(got) || len(got) != min(n, left) || has[skipped] {
					t.Fatalf("%+v, %d owners without %q: %v", c, n, skipped, got)
				}
				if len(zones) != min(n, len(all)) {
					t.Fatalf("%+v, %d owners: %d zones of %d: %v", c, n, len(zones), len(all), got)
				}
				if first, _ := r.OwnerExcept(tok, skip); got[0].ID != first.ID {
					t.Fatalf("first owner %s, want %s", got[0].ID, first.ID)
				}
				// One that is none of them goes: nothing changes.
				other := ms[i%c.members].ID
				if !has[other] && other != skipped {
					less := New(NewSnapshot(append(append([]Member{}, ms[:i%c.members]...), ms[i%c.members+1:]...)))
					for k, m := range less.Owners(tok, n, skip) {
						if m.ID != got[k].ID {
							t.Fatalf("%+v: owners %v, and without %s %v", c, got, other, less.Owners(tok, n, skip))
						}
					}
				}
				// One comes: at most it is new among them.
				more := New(NewSnapshot(append(append([]Member{}, ms...), Member{ID: "new", Zone: fmt.Sprint("zone-", i%(c.zones+1)), State: Active})))
				for _, m := range more.Owners(tok, n, skip) {
					if m.ID != "new" && !has[m.ID] {
						t.Fatalf("%+v: owners %v, and with one more %v", c, got, more.Owners(tok, n, skip))
					}
				}
			}
		}
	}
	if got := New(Snapshot{}).Owners(1, 2, nil); len(got) != 0 {
		t.Errorf("owners on an empty ring: %v", got)
	}
}

func TestSubsetHoldsZones(t *testing.T) {
	r := New(NewSnapshot(zoned(members(12), 3, 0)))
	for i := range 50 {
		for n := 1; n <= 7; n++ {
			tenant := fmt.Sprint("team-", i)
			sub := r.Subset(tenant, n, 3)
			zones := map[string]int{}
			for _, m := range sub.Active() {
				zones[m.Zone]++
			}
			if want := max(n, 3); len(sub.Active()) != want {
				t.Fatalf("%d members, want %d", len(sub.Active()), want)
			}
			for z, k := range zones {
				if len(zones) != 3 || k > (max(n, 3)+2)/3 {
					t.Fatalf("%d members of %s: %v", k, z, sub.Active())
				}
			}
		}
	}
}

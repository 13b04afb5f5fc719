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
	got := r.Subset("team-a", 3)
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
	if r.Subset("team-a", 0) != r || r.Subset("team-a", 10) != r {
		t.Error("a subset of all is another ring")
	}
	// One more member changes at most one member of a subset.
	kept := 0
	for _, m := range New(NewSnapshot(members(11))).Subset("team-a", 3).Active() {
		if in[m.ID] {
			kept++
		}
	}
	if kept < 2 {
		t.Errorf("only %d of 3 members of the subset stayed", kept)
	}
}

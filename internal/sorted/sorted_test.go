package sorted_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/internal/sorted"
)

// A union has what sorting all and dropping repeated names gives, and leaves the lists as they are.
func TestUnion(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var lists, before [][]string
		var want []string
		for range r.IntN(6) {
			var list []string
			for i := range r.IntN(12) {
				if r.IntN(3) > 0 {
					list = append(list, fmt.Sprintf("%02d", i))
				}
			}
			lists, before, want = append(lists, list), append(before, slices.Clone(list)), append(want, list...)
		}
		slices.Sort(want)
		want = slices.Compact(want)
		got := sorted.Union(slices.Clone(lists)...)
		if !slices.Equal(got, want) {
			t.Fatalf("the union of %q is %q", lists, got)
		}
		for i := range lists {
			if !slices.Equal(lists[i], before[i]) {
				t.Fatalf("the list %q was changed to %q", before[i], lists[i])
			}
		}
	}
}

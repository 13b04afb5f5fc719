package head

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
)

// TestOrder sorts few and many of a tenant's series, while more come.
func TestOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var series []*memSeries
	var o order
	for _, n := range []int{1, 3, fewRefs, fewRefs + 1, 500, 5000, 5001, 6000} {
		for len(series) < n {
			series = append(series, &memSeries{labels: labels.FromStrings("a", strconv.Itoa(rng.IntN(50)), "b", strconv.Itoa(len(series)))})
		}
		for _, some := range []int{0, 1, 2, fewRefs, fewRefs + 1, 400, n} {
			refs := make([]uint32, 0, some)
			for _, i := range rng.Perm(n)[:min(some, n)] {
				refs = append(refs, uint32(i))
			}
			given := slices.Clone(refs)
			got := o.sort(refs, some == n, series)
			want := slices.Clone(given)
			slices.SortFunc(want, func(a, b uint32) int { return labels.Compare(series[a].labels, series[b].labels) })
			if !slices.Equal(got, want) {
				t.Errorf("%d of %d series: %v, want %v", some, n, got, want)
			}
			if !slices.Equal(refs, given) {
				t.Errorf("%d of %d series: what was given has changed", some, n)
			}
		}
	}
}

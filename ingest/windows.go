package ingest

import (
	"errors"
	"math"
	"slices"
	"sync"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// maxWindows bounds the windows of index rows that a tenant's samples lie in, in one
// generation: each is a row, and a flush that writes hundreds of thousands holds back
// everybody. It is that of 19 years.
const maxWindows = 1000

// reasonWindows is why samples of a batch are refused that alone would pass it.
const reasonWindows head.Reason = "too_many_weeks"

// errWindows is that of a batch that waits for the next generation.
var errWindows = errors.New("too many windows of time in this generation")

// windows are those of the tenants in the current generation, (a, b] by b / width.
type windows struct {
	width int64 // ms; 0: there is no bound

	mu         sync.Mutex
	generation uint64
	tenants    map[string][]int64 // ascending
}

// of finds the windows of a batch, ascending: the first maxWindows. all is false if there
// are more.
func (w *windows) of(cols *ship.Columns, exemplars []*shippb.Exemplar) (found []int64, all bool) {
	all = true
	from, to := int64(math.MaxInt64), int64(math.MinInt64) // the window of the last one
	note := func(t int64) {
		if t > from && t <= to {
			return
		}
		k := w.window(t)
		from, to = (k-1)*w.width, k*w.width
		if i, ok := slices.BinarySearch(found, k); ok {
			return
		} else if len(found) < maxWindows {
			found = slices.Insert(found, i, k)
			return
		}
		all = false
	}
	for _, ts := range [][]int64{cols.Floats.T, cols.Histograms.T, cols.FloatHistograms.T} {
		for _, t := range ts {
			note(t)
		}
	}
	for _, e := range exemplars {
		note(e.T)
	}
	return found, all
}

func (w *windows) window(t int64) int64 {
	k := t / w.width
	if t > 0 && t%w.width != 0 {
		k++
	}
	return k
}

// take adds windows to those of a tenant, if that is not too many in the generation.
func (w *windows) take(tenant string, generation uint64, of []int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.generation != generation {
		w.generation, w.tenants = generation, map[string][]int64{}
	}
	have := w.tenants[tenant]
	all := have
	for _, k := range of {
		if i, ok := slices.BinarySearch(all, k); !ok {
			if len(all) == len(have) {
				all = slices.Clone(have)
			}
			all = slices.Insert(all, i, k)
		}
	}
	if len(all) > maxWindows {
		return false
	}
	w.tenants[tenant] = all
	return true
}

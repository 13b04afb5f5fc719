package compact

import (
	"maps"
	"slices"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// plan says in how many passes over the sources what they have is cut into
// windows, for only so many blocks may be open at the same time. Nearly always it
// is one.
func plan(sources []*source, width int64, atOnce int) []chunkfmt.Range {
	set := map[int64]bool{}
	for _, s := range sources {
		for _, t := range s.tenants {
			for _, r := range t.Windows {
				for w := windowOf(r.MinT, width); w <= windowOf(r.MaxT, width); w++ {
					set[w] = true
				}
			}
		}
	}
	var out []chunkfmt.Range
	for ws := range slices.Chunk(slices.Sorted(maps.Keys(set)), atOnce) {
		mint, maxt := bounds(ws[0], ws[len(ws)-1], width)
		out = append(out, chunkfmt.Range{MinT: mint, MaxT: maxt})
	}
	return out
}

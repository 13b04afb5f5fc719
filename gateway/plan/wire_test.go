package plan

import (
	"testing"

	"github.com/prometheus/prometheus/promql/parser/posrange"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/stretchr/testify/require"
)

// An annotation of a worker's is the same as one of the engine's.
func TestTell(t *testing.T) {
	const query = "rate(up[5m])"
	var as annotations.Annotations
	as.Add(annotations.NewPossibleNonCounterInfo("up", posrange.PositionRange{Start: 5, End: 7}))
	as.Add(annotations.NewMixedFloatsHistogramsWarning("up", posrange.PositionRange{Start: 5, End: 7}))
	g := Grid{Start: 0, End: 0, Step: 1}
	b, err := (&partial{counts: newCounts(1), annos: tell(as, query)}).marshal(g)
	require.NoError(t, err)
	p, err := unmarshal(b, g)
	require.NoError(t, err)

	want := annotations.Annotations{}
	want.Add(annotations.NewPossibleNonCounterInfo("up", posrange.PositionRange{Start: 5, End: 7}))
	want.Add(annotations.NewMixedFloatsHistogramsWarning("up", posrange.PositionRange{Start: 5, End: 7}))
	for key := range want {
		require.Equal(t, key, p.annos[key].Error())
	}
	require.Len(t, p.annos, len(want))
	wantWarnings, wantInfos := want.AsStrings(query, 0, 0)
	warnings, infos := p.annos.AsStrings(query, 0, 0)
	require.Equal(t, wantWarnings, warnings)
	require.Equal(t, wantInfos, infos)
}

package plan

import (
	"encoding/binary"
	"hash/crc32"
	"slices"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser/posrange"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
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

// What isn't at a step of the grid has no place in a result.
func TestHistogramBesideTheGrid(t *testing.T) {
	g := Grid{Start: 1000, End: 3000, Step: 1000}
	for _, ts := range []int64{1000, 3000, 0, 1500, 4000} {
		p := &partial{counts: newCounts(3), series: []partialSeries{{Series: promql.Series{Histograms: []promql.HPoint{{T: ts, H: tsdbutil.GenerateTestFloatHistogram(3)}}}}}}
		b, err := p.marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(b, g)
		if ts == 1000 || ts == 3000 {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, errCorrupt)
		}
	}
}

// FuzzPartial: whatever bytes come, they are refused or have the form of what is
// written.
func FuzzPartial(f *testing.F) {
	g := Grid{Start: 1000, End: 3000, Step: 1000}
	p := &partial{counts: newCounts(3), annos: annotations.Annotations{}}
	p.annos.Add(&told{text: "a", located: "a (1:1)", info: true})
	h := tsdbutil.GenerateTestFloatHistogram(3)
	p.series = []partialSeries{
		{Series: promql.Series{Metric: labels.FromStrings("job", "x"), Floats: []promql.FPoint{{T: 1000, F: 1}, {T: 3000, F: 2}}}, order: labels.FromStrings("__name__", "y", "job", "x")},
		{Series: promql.Series{Metric: labels.FromStrings("job", "z"), DropName: true, Histograms: []promql.HPoint{{T: 2000, H: h}}}, order: labels.FromStrings("job", "z")},
	}
	b, err := p.marshal(g)
	require.NoError(f, err)
	got, err := unmarshal(b, g)
	require.NoError(f, err)
	require.Equal(f, p, got)
	f.Add(b[:len(b)-4])
	f.Fuzz(func(t *testing.T, body []byte) {
		b := binary.LittleEndian.AppendUint32(slices.Clip(body), crc32.Checksum(body, castagnoli))
		p, err := unmarshal(b, g)
		if err != nil {
			return
		}
		again, err := p.marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(again, g)
		require.NoError(t, err)
		for _, s := range p.series {
			for _, h := range s.Histograms {
				for it := h.H.AllBucketIterator(); it.Next(); {
					_ = it.At()
				}
			}
		}
	})
}

package plan

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"runtime"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser/posrange"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/prometheus/prometheus/util/annotations"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
)

func free(int64) error { return nil }

// An annotation of a worker's is the same as one of the engine's.
func TestTell(t *testing.T) {
	const query = "rate(up[5m])"
	var as annotations.Annotations
	as.Add(annotations.NewPossibleNonCounterInfo("up", posrange.PositionRange{Start: 5, End: 7}))
	as.Add(annotations.NewMixedFloatsHistogramsWarning("up", posrange.PositionRange{Start: 5, End: 7}))
	g := Grid{Start: 0, End: 0, Step: 1}
	var over annotations.Annotations // the same text from another place
	over.Add(annotations.NewPossibleNonCounterInfo("up", posrange.PositionRange{Start: 0, End: 12}))
	b, err := (&partial{counts: newCounts(1), annotated: annotated{tell(as, query), tell(over, query)}}).marshal(g)
	require.NoError(t, err)
	p, err := unmarshal(b, g, 1, free)
	require.NoError(t, err)
	_, infos := p.over.AsStrings(query, 0, 0)
	require.Len(t, infos, 1)
	require.Contains(t, infos[0], "(1:1)")

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
	_, infos = p.all().AsStrings(query, 0, 0)
	require.Len(t, infos, 1)
	require.Contains(t, infos[0], "(1:1)", "that of the aggregation is the later")
}

// What isn't at a step of the grid has no place in a result.
func TestHistogramBesideTheGrid(t *testing.T) {
	g := Grid{Start: 1000, End: 3000, Step: 1000}
	for _, ts := range []int64{1000, 3000, 0, 1500, 4000} {
		p := &partial{counts: newCounts(3), series: []partialSeries{{Series: promql.Series{Histograms: []promql.HPoint{{T: ts, H: tsdbutil.GenerateTestFloatHistogram(3)}}}}}}
		b, err := p.marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(b, g, 1, free)
		if ts == 1000 || ts == 3000 {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, errCorrupt)
		}
	}
}

// Bytes that become much more in memory are refused before it is taken: where there are
// more series than were read, by what the account can't hold.
func TestMemoryOfResults(t *testing.T) {
	g := Grid{Start: 0, End: 0, Step: 1}
	const n = 1 << 20
	make := func(read int64, annos int, series []byte) []byte {
		b := []byte{partialVersion, 1, 0, 0}
		b = binary.AppendVarint(b, read)
		b = binary.AppendUvarint(b, uint64(annos))
		for range annos {
			b = append(b, 0, 0, 0)
		}
		if series == nil {
			b = append(b, 0)
		} else {
			b = append(binary.AppendUvarint(b, n), bytes.Repeat(series, n)...)
		}
		return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	}
	h, err := (&prompb.Histogram{Count: &prompb.Histogram_CountFloat{}, PositiveSpans: []prompb.BucketSpan{{}, {}, {}, {}}}).Marshal()
	require.NoError(t, err)
	errFull := errors.New("full")
	for name, b := range map[string][]byte{
		"series":      make(n, 0, []byte{2, 0, 0, 0}),
		"labels":      make(n, 0, []byte{2, 1, 0, 0, 0, 0}),
		"annotations": make(n, n, nil),
		"histograms":  make(n, 0, append([]byte{2, 0, 0, 1, byte(len(h))}, h...)),
	} {
		const most = 1 << 20
		held := int64(0)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := unmarshal(b, g, 1, func(bytes int64) error {
			if held += bytes; held > most {
				return errFull
			}
			return nil
		})
		runtime.ReadMemStats(&after)
		require.ErrorIs(t, err, errFull, name)
		require.Zero(t, held, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(2*most), name)
	}
	reg := prometheus.NewRegistry()
	ctx, acc, done := account.NewMemory(1<<26, reg).Open(t.Context(), "", account.Limits{})
	defer done()
	_, err = received(ctx, make(n, 0, []byte{2, 0, 0, 0}), g, 1)
	require.ErrorIs(t, err, account.ErrLimit)
	require.True(t, acc.Ended())
	_, err = unmarshal(make(n/4, 0, []byte{2, 0, 0, 0}), g, 1, free)
	require.ErrorIs(t, err, errCorrupt)
	_, err = unmarshal(make(n/4, 0, []byte{2, 0, 0, 0}), g, 2, free)
	require.NoError(t, err)
}

// A step has one point.
func TestPointsTwice(t *testing.T) {
	g := Grid{Start: 0, End: 2, Step: 1}
	h := tsdbutil.GenerateTestFloatHistogram(1)
	for _, s := range []promql.Series{
		{Floats: []promql.FPoint{{T: 1}, {T: 1}}}, {Floats: []promql.FPoint{{T: 2}, {T: 1}}}, {Histograms: []promql.HPoint{{T: 1, H: h}, {T: 1, H: h}}},
	} {
		b, err := (&partial{counts: newCounts(3), series: []partialSeries{{Series: s}}}).marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(b, g, 1, free)
		require.ErrorIs(t, err, errCorrupt)
	}
}

// Series count to limits: no fewer than none were read, and no more than sums can have.
func TestImpossibleSeries(t *testing.T) {
	g := Grid{Start: 0, End: 0, Step: 1}
	for _, n := range []int64{-1, 1<<50 + 1} {
		p := &partial{counts: newCounts(1)}
		p.counts.series = n
		b, err := p.marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(b, g, 1, free)
		require.ErrorIs(t, err, errCorrupt)
	}
}

// FuzzPartial: whatever bytes come, they are refused or have the form of what is
// written.
func FuzzPartial(f *testing.F) {
	g := Grid{Start: 1000, End: 3000, Step: 1000}
	p := &partial{counts: newCounts(3)}
	p.annos.Add(&told{text: "a", located: "a (1:1)", info: true})
	p.over.Add(&told{text: "b", located: "b (1:1)"})
	h := tsdbutil.GenerateTestFloatHistogram(3)
	p.series = []partialSeries{
		{Series: promql.Series{Metric: labels.FromStrings("job", "x"), Floats: []promql.FPoint{{T: 1000, F: 1}, {T: 3000, F: 2}}}, order: labels.FromStrings("__name__", "y", "job", "x")},
		{Series: promql.Series{Metric: labels.FromStrings("job", "z"), DropName: true, Histograms: []promql.HPoint{{T: 2000, H: h}}}, order: labels.FromStrings("job", "z")},
	}
	b, err := p.marshal(g)
	require.NoError(f, err)
	got, err := unmarshal(b, g, 1, free)
	require.NoError(f, err)
	require.Equal(f, p, got)
	f.Add(b[:len(b)-4])
	f.Fuzz(func(t *testing.T, body []byte) {
		b := binary.LittleEndian.AppendUint32(slices.Clip(body), crc32.Checksum(body, castagnoli))
		held := int64(0)
		p, err := unmarshal(b, g, 1, func(bytes int64) error {
			held += bytes
			return nil
		})
		require.GreaterOrEqual(t, held, int64(0))
		if err != nil {
			require.Zero(t, held)
			return
		}
		again, err := p.marshal(g)
		require.NoError(t, err)
		_, err = unmarshal(again, g, 1, free)
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

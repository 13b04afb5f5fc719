package merge

import (
	"math"
	"sort"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// millis is ms since the epoch. (An alias, so that Seek is chunkenc.Iterator's,
// and go vet doesn't take it for a failed io.Seeker.)
type millis = int64

// iterator walks over the columns of a series, all kinds by time.
type iterator struct {
	s       *chunkfmt.Series
	f, h, g int // next of floats, histograms, float histograms
	kind    chunkenc.ValueType
	t       int64
	i       int // of the present sample in its columns
	begun   bool
	err     error // there is nothing to walk over then

	buffer Buffer // s may lie in its memory
}

func (it *iterator) reset(s *chunkfmt.Series, err error) {
	*it = iterator{s: s, err: err, buffer: it.buffer}
}

func (it *iterator) Next() chunkenc.ValueType {
	it.begun = true
	s := it.s
	it.kind, it.t = chunkenc.ValNone, math.MaxInt64
	if it.f < len(s.Floats.T) {
		it.kind, it.t, it.i = chunkenc.ValFloat, s.Floats.T[it.f], it.f
	}
	if it.h < len(s.Histograms.T) && (it.kind == chunkenc.ValNone || s.Histograms.T[it.h] < it.t) {
		it.kind, it.t, it.i = chunkenc.ValHistogram, s.Histograms.T[it.h], it.h
	}
	if it.g < len(s.FloatHistograms.T) && (it.kind == chunkenc.ValNone || s.FloatHistograms.T[it.g] < it.t) {
		it.kind, it.t, it.i = chunkenc.ValFloatHistogram, s.FloatHistograms.T[it.g], it.g
	}
	switch it.kind {
	case chunkenc.ValFloat:
		it.f++
	case chunkenc.ValHistogram:
		it.h++
	case chunkenc.ValFloatHistogram:
		it.g++
	}
	return it.kind
}

func (it *iterator) Seek(t millis) chunkenc.ValueType {
	if it.begun && (it.kind == chunkenc.ValNone || it.t >= t) {
		return it.kind
	}
	it.f = seek(it.s.Floats.T, it.f, t)
	it.h = seek(it.s.Histograms.T, it.h, t)
	it.g = seek(it.s.FloatHistograms.T, it.g, t)
	return it.Next()
}

// seek finds the first index from i on whose time is t or later. Steps of a
// query are near each other, so it looks near i first.
func seek(ts []int64, i int, t int64) int {
	step := 1
	for i+step < len(ts) && ts[i+step] < t {
		step *= 2
	}
	lo, hi := i+step/2, min(i+step+1, len(ts))
	if lo > hi {
		return hi
	}
	return lo + sort.Search(hi-lo, func(k int) bool { return ts[lo+k] >= t })
}

func (it *iterator) At() (int64, float64) { return it.t, it.s.Floats.V[it.i] }

// The engine keeps and changes the histograms that it is given.

func (it *iterator) AtHistogram(h *histogram.Histogram) (int64, *histogram.Histogram) {
	src := it.s.Histograms.H[it.i]
	if h == nil {
		return it.t, src.Copy()
	}
	src.CopyTo(h)
	return it.t, h
}

func (it *iterator) AtFloatHistogram(fh *histogram.FloatHistogram) (int64, *histogram.FloatHistogram) {
	if it.kind == chunkenc.ValHistogram {
		return it.t, it.s.Histograms.H[it.i].ToFloat(fh)
	}
	src := it.s.FloatHistograms.H[it.i]
	if fh == nil {
		return it.t, src.Copy()
	}
	src.CopyTo(fh)
	return it.t, fh
}

func (it *iterator) AtT() int64 { return it.t }

func (it *iterator) AtST() int64 {
	var st []int64
	switch it.kind {
	case chunkenc.ValFloat:
		st = it.s.Floats.ST
	case chunkenc.ValHistogram:
		st = it.s.Histograms.ST
	case chunkenc.ValFloatHistogram:
		st = it.s.FloatHistograms.ST
	}
	if st == nil {
		return 0
	}
	return st[it.i]
}

func (it *iterator) Err() error { return it.err }

// trim makes out the columns of s cut to [mint, maxt]; the slices share memory with s.
func trim(out, s *chunkfmt.Series, mint, maxt int64) {
	*out = *s
	cut := func(ts []int64) (int, int) {
		i := sort.Search(len(ts), func(i int) bool { return ts[i] >= mint })
		return i, i + sort.Search(len(ts)-i, func(k int) bool { return ts[i+k] > maxt })
	}
	starts := func(st []int64, i, j int) []int64 {
		if st == nil {
			return nil
		}
		return st[i:j]
	}
	i, j := cut(s.Floats.T)
	out.Floats = chunkfmt.Floats{T: s.Floats.T[i:j], ST: starts(s.Floats.ST, i, j), V: s.Floats.V[i:j]}
	i, j = cut(s.Histograms.T)
	out.Histograms = chunkfmt.Histograms{T: s.Histograms.T[i:j], ST: starts(s.Histograms.ST, i, j), H: s.Histograms.H[i:j]}
	i, j = cut(s.FloatHistograms.T)
	out.FloatHistograms = chunkfmt.FloatHistograms{T: s.FloatHistograms.T[i:j], ST: starts(s.FloatHistograms.ST, i, j), H: s.FloatHistograms.H[i:j]}
}

// Extent is the time of the first and the last sample, how many there are, and how many
// points of floats, of 16 bytes, take as much memory as one of them.
func (it *iterator) Extent() (mint, maxt int64, samples, size int) {
	mint, maxt, size = math.MaxInt64, math.MinInt64, 1
	times := func(ts []int64) {
		if n := len(ts); n > 0 {
			mint, maxt = min(mint, ts[0]), max(maxt, ts[n-1])
			samples += n
		}
	}
	times(it.s.Floats.T)
	times(it.s.Histograms.T)
	times(it.s.FloatHistograms.T)
	const fields = 168 // of a histogram, as it counts itself
	if len(it.s.Histograms.T) > 0 {
		h := it.s.Histograms.H[0]
		size = (fields + 8*(len(h.PositiveSpans)+len(h.NegativeSpans)+len(h.PositiveBuckets)+len(h.NegativeBuckets)+len(h.CustomValues))) / 16
	} else if len(it.s.FloatHistograms.T) > 0 {
		size = it.s.FloatHistograms.H[0].Size() / 16
	}
	return mint, maxt, samples, size
}

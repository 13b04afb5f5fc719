package transfer

import (
	"math"
	"sort"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
)

// window collects the samples that a series has in one window of time.
type window struct {
	s    chunkfmt.Series
	some bool
	maxt int64 // of the window
}

func (w *window) reset(ls labels.Labels) {
	f, h, fh := &w.s.Floats, &w.s.Histograms, &w.s.FloatHistograms
	clear(h.H)
	clear(fh.H)
	w.s = chunkfmt.Series{
		Labels:          ls,
		Floats:          chunkfmt.Floats{T: f.T[:0], V: f.V[:0]},
		Histograms:      chunkfmt.Histograms{T: h.T[:0], H: h.H[:0]},
		FloatHistograms: chunkfmt.FloatHistograms{T: fh.T[:0], H: fh.H[:0]},
	}
	w.some, w.maxt = false, math.MinInt64
}

// flush gives what is in the window, if anything is.
func (w *window) flush(give func(*chunkfmt.Series) error) error {
	if !w.some {
		return nil
	}
	s := w.s // its columns may be kept, if the window is given up
	if err := give(&s); err != nil {
		return err
	}
	w.reset(s.Labels)
	return nil
}

// add takes a piece of a series in, and gives away windows that are complete.
// Pieces come in order of time.
func (w *window) add(s *backfill.Series, in *compact.Intake, give func(*chunkfmt.Series) error) error {
	f, h, fh := s.Floats, s.Histograms, s.FloatHistograms
	for len(f.T)+len(h.T)+len(fh.T) > 0 {
		t := min(head(f.T), head(h.T), head(fh.T))
		if t > w.maxt {
			if err := w.flush(give); err != nil {
				return err
			}
			_, w.maxt = in.Window(t)
		}
		w.some = true
		n := before(f.T, w.maxt)
		w.s.Floats.ST = appendST(w.s.Floats.ST, len(w.s.Floats.T), f.ST, n)
		w.s.Floats.T, w.s.Floats.V = append(w.s.Floats.T, f.T[:n]...), append(w.s.Floats.V, f.V[:n]...)
		f = rest(f, n)
		n = before(h.T, w.maxt)
		w.s.Histograms.ST = appendST(w.s.Histograms.ST, len(w.s.Histograms.T), h.ST, n)
		w.s.Histograms.T = append(w.s.Histograms.T, h.T[:n]...)
		for _, x := range h.V[:n] {
			w.s.Histograms.H = append(w.s.Histograms.H, x.Copy()) // the reader uses it again
		}
		h = rest(h, n)
		n = before(fh.T, w.maxt)
		w.s.FloatHistograms.ST = appendST(w.s.FloatHistograms.ST, len(w.s.FloatHistograms.T), fh.ST, n)
		w.s.FloatHistograms.T = append(w.s.FloatHistograms.T, fh.T[:n]...)
		for _, x := range fh.V[:n] {
			w.s.FloatHistograms.H = append(w.s.FloatHistograms.H, x.Copy())
		}
		fh = rest(fh, n)
	}
	return nil
}

func head(t []int64) int64 {
	if len(t) == 0 {
		return math.MaxInt64
	}
	return t[0]
}

// before is how many times are not behind maxt.
func before(t []int64, maxt int64) int {
	if n := len(t); n == 0 || t[n-1] <= maxt {
		return n
	}
	return sort.Search(len(t), func(i int) bool { return t[i] > maxt })
}

func rest[V float64 | *histogram.Histogram | *histogram.FloatHistogram](c backfill.Column[V], n int) backfill.Column[V] {
	c.T, c.V = c.T[n:], c.V[n:]
	if len(c.ST) > 0 {
		c.ST = c.ST[n:]
	}
	return c
}

// appendST appends n start timestamps to a column that has had some, or a column
// of had samples of which none had one.
func appendST(st []int64, had int, more []int64, n int) []int64 {
	if len(more) == 0 && st == nil {
		return nil
	}
	if st == nil {
		st = make([]int64, had, had+n)
	}
	if len(more) == 0 {
		return append(st, make([]int64, n)...)
	}
	return append(st, more[:n]...)
}

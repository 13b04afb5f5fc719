package plan

import (
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/util/stats"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
)

// pointBytes is what the engine takes for a point, which is a sample in its counts.
const pointBytes = 16

// seriesBytes is about what it takes for a series beside its points and labels.
const seriesBytes = 96

// engineHold lets a query's account hold what the engine has in memory: the samples that
// it counts against its limit. The engine tells of them afterwards, the most that there
// were so far: of a range function after each series, of a selector after all, of a subquery
// when that is done. What it makes meanwhile is estimated, series by series, as it begins to
// read them. It is for the goroutine that the engine works in.
type engineHold struct {
	account *account.Account
	samples *stats.QuerySamples // the engine's
	window  int64               // lookback delta, ms
	need    *need               // nil: of nothing else

	copies  int64 // bytes that results of leaves take once more, as the engine copies them
	peak    int   // samples at the most, as far as the engine has told
	pending int64 // estimated bytes since that has risen
	labels  int64 // bytes of labels that functions may make
	held    int64 // bytes that the account holds
}

// add notes bytes that the engine is about to take.
func (h *engineHold) add(bytes int64) {
	h.settle()
	h.pending += bytes
	const atOnce = 4 << 10 // to tell the account of each series takes as long as to read a short one
	if all := h.sure() + h.pending; all < h.held || all > h.held+atOnce {
		h.hold(all)
	}
}

// sure is what the engine has taken, as far as it has told, in bytes.
func (h *engineHold) sure() int64 { return max(pointBytes*int64(h.peak), h.copies) + h.labels }

// label notes a series of which functions may make longer labels.
func (h *engineHold) label(ls labels.Labels) {
	if h.need != nil {
		h.labels += h.need.each(ls)
	}
}

// settle looks at what the engine has told.
func (h *engineHold) settle() {
	if h.samples.PeakSamples > h.peak {
		h.peak, h.pending = h.samples.PeakSamples, 0
	}
}

// end is called when the engine has made the result.
func (h *engineHold) end() {
	if h == nil {
		return
	}
	h.settle()
	h.hold(h.sure())
}

func (h *engineHold) hold(bytes int64) {
	h.account.Hold(bytes - h.held)
	h.held = bytes
}

// over gives the series of a set to the engine, which selected them with hints.
func (h *engineHold) over(set storage.SeriesSet, hints *storage.SelectHints) storage.SeriesSet {
	if h == nil || h.account == nil || hints == nil {
		return set
	}
	s := &heldSet{SeriesSet: set, hold: h, window: max(h.window, hints.Range), step: hints.Step, steps: 1}
	if s.step > 0 {
		first := hints.Range // of the first step
		if first == 0 {
			first = h.window
		}
		s.steps = max(1, (hints.End-hints.Start-first+1)/s.step+1)
	}
	return s
}

// heldSet is a set of series as the engine reads them.
type heldSet struct {
	storage.SeriesSet
	hold         *engineHold
	step, window int64 // ms
	steps        int64 // at the most
	room         []heldSeries
	at           *heldSeries
}

// Next implements storage.SeriesSet.
func (s *heldSet) Next() bool {
	if !s.SeriesSet.Next() {
		return false
	}
	if len(s.room) == 0 {
		s.room = make([]heldSeries, 32)
	}
	s.at, s.room = &s.room[0], s.room[1:]
	*s.at = heldSeries{s.SeriesSet.At(), s}
	s.hold.label(s.at.Labels())
	return true
}

// At implements storage.SeriesSet.
func (s *heldSet) At() storage.Series { return s.at }

type heldSeries struct {
	storage.Series
	of *heldSet
}

// Iterator implements storage.SampleIterable.
func (s *heldSeries) Iterator(it chunkenc.Iterator) chunkenc.Iterator {
	fresh := it == nil
	it = s.Series.Iterator(it)
	d, ok := it.(interface {
		// Extent is the time of the first and the last sample, how many there are, and
		// how many points of floats take as much memory as one of them.
		Extent() (mint, maxt int64, samples, size int)
	})
	if !ok {
		return it
	}
	mint, maxt, samples, size := d.Extent()
	if samples == 0 {
		return it
	}
	points := s.of.steps
	if s.of.step > 0 {
		points = min(points, (maxt-mint+s.of.window)/s.of.step+1)
	}
	if fresh { // what was decoded stays: timestamp() keeps one for each series
		points += int64(samples)
	}
	s.of.hold.add(seriesBytes + pointBytes*int64(size)*points)
	return it
}

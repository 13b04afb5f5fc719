package merge

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
)

// inHeads gives the times of what heads have of a series: summaries of blocks don't
// know of it.
func (s *seriesSet) inHeads(ls labels.Labels) (times []chunkfmt.Range) {
	for _, h := range s.heads {
		i, ok := slices.BinarySearchFunc(h, ls, func(a fetch.Series, b labels.Labels) int { return labels.Compare(a.Labels, b) })
		if !ok {
			continue
		}
		for _, c := range h[i].Chunks {
			times = append(times, chunkfmt.Range{MinT: c.MinT, MaxT: c.MaxT})
		}
	}
	return times
}

// from selects what history has.
func (s *seriesSet) from(ctx context.Context, snap *history.Snapshot, ms []*labels.Matcher) (*history.SeriesSet, error) {
	if s.sums == nil {
		return snap.Select(ctx, ms, s.mint, s.maxt)
	}
	of := *s.sums
	if len(s.heads) > 0 {
		of.Elsewhere = s.inHeads // now: what is given is taken off
	}
	return snap.SelectWindows(ctx, ms, s.mint, s.maxt, of)
}

// Windows gives summaries of the series in the time that was selected. What blocks
// have none of, and what several blocks or heads have, is read and summarised here.
// They may have Even, and lie in the memory of buf: they are good until it is used again, and aren't
// to be changed, but for an Expand. nil: blocks have no summaries at all of it, and Columns is to be
// read; unless always.
func (s *Series) Windows(buf *Buffer, always bool) (*rollup.Windows, error) {
	stored := &rollup.Windows{}
	hidden := s.hidden
	if s.old != nil {
		w, covered, err := s.old.Windows(&buf.old)
		if err != nil {
			return nil, err
		}
		if len(covered) > 0 {
			if len(s.heads) > 0 {
				// They have something there only if blocks have no samples of it any more.
				hidden = history.Union(hidden, covered)
			}
			stored, always = w, true
		}
	}
	if !always {
		return nil, nil //nolint:nilnil // as documented
	}
	var runs []*chunkfmt.Series // of the rest of the time
	if s.old != nil {
		var err error
		if runs, err = s.old.Runs(&buf.old); err != nil {
			return nil, err
		}
	}
	cols, err := s.merged(buf, runs, s.mint, s.maxt, hidden)
	if err != nil {
		return nil, err
	}
	samples := cols.Samples()
	if len(samples.T)+len(samples.Histograms)+len(samples.StaleHistograms) == 0 {
		return stored, nil
	}
	buf.fresh.Clear()
	buf.summariser.Summarise(&buf.fresh, samples, s.summaries.Width)
	if stored.Len() == 0 {
		return &buf.fresh, nil
	}
	stored.Expand(s.summaries.Columns)
	together(&buf.windows, stored, &buf.fresh, s.summaries.Columns)
	return &buf.windows, nil
}

// ColumnsOf gives the samples in mint to maxt, inclusive, in ms, like Columns, but also
// where there are summaries of them.
func (s *Series) ColumnsOf(ctx context.Context, buf *Buffer, mint, maxt int64) (*chunkfmt.Series, error) {
	var runs []*chunkfmt.Series
	if s.old != nil {
		var err error
		if runs, err = s.old.Raw(ctx, &buf.old, mint, maxt); err != nil {
			return nil, err
		}
	}
	return s.merged(buf, runs, mint, maxt, s.hiddenSamples)
}

// OnlySummaries is the warning that mint to maxt, inclusive, in ms, is partly of a time of
// which there are no samples any more; nil if it isn't.
func (s *Series) OnlySummaries(mint, maxt int64) error {
	mint, maxt = max(mint, s.mint), min(maxt, s.maxt)
	if err := onlySummaries(s.snap, mint, maxt, 0); err != nil || s.old == nil {
		return err
	}
	if until := s.old.GoneUntil(mint, maxt); until > math.MinInt64 {
		return warning(until+1, "samples", hourly)
	}
	return nil
}

// hourly is when summaries of an hour answer.
const hourly = "at times, steps, ranges and offsets of whole hours"

// finer is all but summaries of an hour.
const finer = "samples and summaries of 5 minutes"

// onlySummaries is for who reads samples, or with a width in ms windows, where blocks
// have but windows, or but wider ones.
func onlySummaries(snap *history.Snapshot, mint, maxt, width int64) error {
	if !snap.OnlySummaries(mint, maxt, width) {
		return nil
	}
	h := snap.Hidden.Before
	if width != 0 {
		return warning(h.Short, finer, hourly)
	}
	when := hourly
	if h.Short < h.Raw {
		// Since when isn't said: parts of a query would say different times.
		when += ", and of whole 5 minutes where summaries of such are left"
	}
	return warning(h.Raw, "samples", when)
}

func showTime(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }

// warning says from what time in ms on there is something, and when summaries answer
// what is before.
func warning(from int64, what, when string) error {
	return fmt.Errorf("%w: %s from before %s are past their retention; what is left of them are summaries, which answer instant selectors, rate, increase, delta, irate, idelta, changes, resets, and the *_over_time functions count, sum, avg, min, max, first, last, present, absent, stddev and stdvar (these two by the hour alone) %s",
		annotations.PromQLWarning, what, showTime(from), when)
}

// together puts windows into dst that are in a or in b, in order of time. Both have
// the columns.
func together(dst, a, b *rollup.Windows, columns rollup.Columns) {
	dst.Clear()
	for i, j := 0, 0; i < a.Len() || j < b.Len(); {
		from := i
		for i < a.Len() && (j == b.Len() || a.End[i] < b.End[j]) {
			i++
		}
		dst.Append(a, from, i, columns)
		from = j
		for j < b.Len() && (i == a.Len() || b.End[j] <= a.End[i]) {
			j++
		}
		dst.Append(b, from, j, columns)
	}
}

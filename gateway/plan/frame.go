package plan

import (
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
)

// frame is what a leaf makes of a column of times alone: where in it the samples of each window are, and what a rate takes
// of their times. All series of a target have the same column, and share the frame.
type frame struct {
	times []int64
	name  uint64 // of times, the last one; 0: none
	win   spans
	held  []stretch // what lies in windows, each sample once

	rates     rollup.Ranges // of rate(), increase() and delta()
	rateSteps []int32       // of each of these

	edges []int32 // of sums and extremes that overlap: those of all windows, ascending, each once
	over  []blocksOf

	series int64 // that have it, and whose samples are to be counted
}

// stretch are samples that follow each other: those from from up to, without, to.
type stretch struct{ from, to int32 }

// blocksOf says which blocks, from a up to, without, b, the window of a step is made of. Block a begins at edges[a].
type blocksOf struct{ step, a, b int32 }

// set makes a frame of a column.
func (f *frame) set(times []int64, l *Leaf, uses uses) {
	f.times = append(f.times[:0], times...)
	f.win.find(times, l.Grid, l.offset(), l.Range)
	f.held, f.rateSteps, f.edges, f.over, f.series = f.held[:0], f.rateSteps[:0], f.edges[:0], f.over[:0], 0
	f.name = 0
	done := int32(0)
	for i, hi := range f.win.hi {
		from := max(done, f.win.lo[i])
		if n := len(f.held); from < hi && n > 0 && f.held[n-1].to == from {
			f.held[n-1].to = hi
		} else if from < hi {
			f.held = append(f.held, stretch{from, hi})
		}
		done = hi
	}
	if uses.rates {
		f.rates.Set(l.function(), l.Range, times, l.Grid.Start-l.offset(), l.Grid.Step, f.win.lo, f.win.hi)
		for i, hi := range f.win.hi {
			if hi-f.win.lo[i] >= 2 {
				f.rateSteps = append(f.rateSteps, int32(i)) //nolint:gosec // no more than maxSteps
			}
		}
	}
	if uses.blocks {
		f.cut()
	}
}

// cut finds the edges of all windows, and of which blocks between those each is made.
func (f *frame) cut() {
	lo, hi := f.win.lo, f.win.hi
	for len(lo) > 0 || len(hi) > 0 {
		var e int32
		if len(hi) == 0 || len(lo) > 0 && lo[0] <= hi[0] {
			e, lo = lo[0], lo[1:]
		} else {
			e, hi = hi[0], hi[1:]
		}
		if n := len(f.edges); n == 0 || f.edges[n-1] != e {
			f.edges = append(f.edges, e)
		}
	}
	a, b := int32(0), int32(0)
	for i, hi := range f.win.hi {
		lo := f.win.lo[i]
		for f.edges[a] < lo {
			a++
		}
		for f.edges[b] < hi {
			b++
		}
		if hi > lo {
			f.over = append(f.over, blocksOf{int32(i), a, b}) //nolint:gosec // no more than maxSteps
		}
	}
}

// size is about how much memory a frame takes, in bytes.
func (f *frame) size() int { return 8*len(f.times) + frameStep*len(f.win.lo) }

// frameStep is what a step takes in a frame, at most, in bytes: two indexes; a rate's step, range and place.
const frameStep = 2*4 + 4 + 12 + 8 + 32

// uses says what a leaf needs of frames.
type uses struct {
	rates  bool
	blocks bool // windows share so much that it pays to put them together from blocks
}

// frames are those of a leaf's series so far, while they take no more than maxFrames.
type frames struct {
	leaf   *Leaf
	uses   uses
	counts *counts // what series of frames that are gone count for

	index map[frameKey]*frame
	named map[uint64]*frame // those that have the name still
	last  *frame
	bytes int
	spare []*frame
}

// frameKey tells most columns of times from each other.
type frameKey struct {
	n           int
	first, last int64
}

// maxFrames bounds the memory of frames, in bytes: those of some dozens of targets over a day.
const maxFrames = 4 << 20

// of gives the frame of a column. Columns of the same name, if not 0, are the same.
func (s *frames) of(times []int64, name uint64) *frame {
	if name == 0 {
		return s.find(times)
	}
	if f := s.last; f != nil && f.name == name {
		return f
	}
	if f := s.named[name]; f != nil && f.name == name {
		s.last = f
		return f
	}
	f := s.find(times)
	f.name = name
	s.named[name] = f
	return f
}

func (s *frames) find(times []int64) *frame {
	if s.last != nil && chunkfmt.SameTimes(s.last.times, times) {
		return s.last
	}
	var key frameKey
	if n := len(times); n > 0 {
		key = frameKey{n, times[0], times[n-1]}
	}
	f := s.index[key]
	if f != nil && chunkfmt.SameTimes(f.times, times) {
		s.last = f
		return f
	}
	if f != nil {
		s.bytes -= f.size()
		s.count(f)
	} else {
		if s.bytes > maxFrames {
			s.clear()
		}
		if n := len(s.spare); n > 0 {
			f, s.spare = s.spare[n-1], s.spare[:n-1]
		} else {
			f = new(frame)
		}
		s.index[key] = f
	}
	f.set(times, s.leaf, s.uses)
	s.bytes += f.size()
	s.last = f
	return f
}

// count adds what the series of a frame count for.
func (s *frames) count(f *frame) {
	if f.series > 0 {
		s.counts.floats(&f.win, f.times, s.leaf, f.series)
		f.series = 0
	}
}

// clear counts all frames, and drops them.
func (s *frames) clear() {
	for key, f := range s.index {
		s.count(f)
		s.spare = append(s.spare, f)
		delete(s.index, key)
	}
	clear(s.named)
	s.last, s.bytes = nil, 0
}

package plan

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Grid are the times at which an expression is evaluated: Start, Start+Step and
// so on, up to End, in ms. Step is positive.
type Grid struct {
	Start, End, Step int64
}

// maxSteps bounds the grids that are computed here: memory goes with their length.
// That is a year in steps of half a minute; the engine does the others.
const maxSteps = 1 << 20

// maxTime bounds their times, in ms: adding ranges, offsets and spans to those
// doesn't overflow.
const maxTime = 1 << 61

// bounded: there is a time, and neither too many nor such that are absurd.
func (g Grid) bounded() bool {
	return g.Step > 0 && -maxTime <= g.Start && g.Start <= g.End && g.End <= maxTime && (g.End-g.Start)/g.Step < maxSteps
}

// Len is the number of times.
func (g Grid) Len() int {
	if g.End < g.Start {
		return 0
	}
	return int((g.End-g.Start)/g.Step) + 1
}

// At is the i-th time.
func (g Grid) At(i int) int64 { return g.Start + int64(i)*g.Step }

func (g Grid) String() string {
	if g.Len() == 1 {
		return fmt.Sprintf("at %d", g.Start)
	}
	return fmt.Sprintf("%d steps of %s from %d", g.Len(), time.Duration(g.Step)*time.Millisecond, g.Start)
}

// subquery is the grid of a subquery of an expression with grid g: promql's
// subqueryEvaluationTimes, for one without @.
func (g Grid) subquery(offset, rng, step int64) Grid {
	end := g.Start + (g.End-g.Start)/g.Step*g.Step
	from := g.Start - offset - rng
	start := step * (from / step)
	if start <= from {
		start += step
	}
	return Grid{Start: start, End: end - offset, Step: step}
}

// gridBytes is how long a grid is that goes before a result in memory.
const gridBytes = 24

func appendGrid(b []byte, g Grid) []byte {
	for _, x := range []int64{g.Start, g.End, g.Step} {
		b = binary.LittleEndian.AppendUint64(b, uint64(x)) //nolint:gosec // bits
	}
	return b
}

func gridOf(b []byte) Grid {
	at := func(i int) int64 { return int64(binary.LittleEndian.Uint64(b[i:])) } //nolint:gosec // bits
	return Grid{Start: at(0), End: at(8), Step: at(16)}
}

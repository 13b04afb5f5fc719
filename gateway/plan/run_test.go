package plan

import (
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/history"
)

// A bug in a kernel ends the query, in whichever goroutine it is.
func TestPanicEndsQuery(t *testing.T) {
	slots := make([]slot, batch) // without series: a nil pointer
	ws := []worker{{}, {}}
	err := evaluate(t.Context(), slog.New(slog.DiscardHandler), ws, slots, (*worker).eval)
	require.ErrorContains(t, err, "unexpected error")
	require.False(t, strings.Contains(err.Error(), "\n"))
}

// A sample matters to parts up to its own, however absurd its time is.
func TestNumbersOfAbsurdTimes(t *testing.T) {
	const span = 3_600_000
	for _, offset := range []time.Duration{-time.Hour, 0, time.Hour} {
		l := &Leaf{Range: 300_000, Selector: &parser.VectorSelector{Offset: offset}}
		for _, times := range [][2]int64{{math.MinInt64, math.MaxInt64}, {math.MinInt64 + 5, 0}, {0, math.MaxInt64 - 5}, {-5, 5}} {
			first, last := l.numbers(span, times[0], times[1])
			if own := offset.Milliseconds() / span; first > own || last < own-1 || first > last {
				t.Errorf("%d to %d, offset %s: parts %d to %d", times[0], times[1], offset, first, last)
			}
		}
	}
}

// Series of a storage that has no columns are the engine's.
func TestForeignSeries(t *testing.T) {
	s := storage.NewListSeries(labels.FromStrings("a", "b"), nil)
	open := func(*history.Summaries) storage.SeriesSet { return storage.TestSeriesSet(s) }
	_, err := run(t.Context(), &Leaf{Grid: Grid{Step: 1}, Selector: &parser.VectorSelector{}}, options{}, open, 1)
	require.ErrorIs(t, err, ErrGiveUp)
}

// Memory goes with the number of steps, so a query can't have any number of them,
// and absurd times don't overflow.
func TestBoundedSteps(t *testing.T) {
	o := promql.EngineOpts{MaxSamples: 1, Timeout: time.Minute, EnableAtModifier: true, EnableNegativeOffset: true, Parser: parser.NewParser(parser.Options{})}
	e := New(promql.NewEngine(o), o, Spread{})
	const absurd = 9223372036854774 // s; in ms almost 1<<63
	for _, c := range []struct {
		expr       string
		start, end time.Time
		step       time.Duration
		leaves     int
	}{
		{`max_over_time(sum(x)[30d:1m])`, time.Unix(1e9, 0), time.Unix(1e9+3600, 0), time.Minute, 1},
		{`max_over_time(sum(x)[100y:1ms])`, time.Unix(1e9, 0), time.Unix(1e9+3600, 0), time.Minute, 0},
		{`max_over_time(max_over_time(sum(x)[1h:1m])[100y:1ms])`, time.Unix(1e9, 0), time.Unix(1e9+3600, 0), time.Minute, 0},
		{`sum(x) + sum(x @ 5)`, time.Unix(0, 0), time.Unix(absurd, 0), time.Hour, 0},
		{`sum(x)`, time.Unix(-absurd, 0), time.Unix(absurd, 0), 1e8 * time.Second, 0},
		{`sum(rate(x[5m]))`, time.Unix(absurd, 0), time.Unix(absurd+1, 0), time.Millisecond, 0},
		{`max_over_time(sum(x)[1h:1m])`, time.Unix(-absurd, 0), time.Unix(-absurd+1, 0), time.Millisecond, 0},
	} {
		q, err := e.NewRangeQuery(t.Context(), nil, nil, c.expr, c.start, c.end, c.step)
		require.NoError(t, err)
		planned, ok := q.(*query)
		require.True(t, ok)
		require.Len(t, planned.leaves, c.leaves, c.expr)
	}
}

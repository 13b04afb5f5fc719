package plan

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"
)

// A bug in a kernel ends the query, in whichever goroutine it is.
func TestPanicEndsQuery(t *testing.T) {
	slots := make([]slot, batch) // without series: a nil pointer
	ws := []worker{{}, {}}
	err := evaluate(t.Context(), slog.New(slog.DiscardHandler), ws, slots)
	require.ErrorContains(t, err, "unexpected error")
	require.False(t, strings.Contains(err.Error(), "\n"))
}

// Series of a storage that has no columns are the engine's.
func TestForeignSeries(t *testing.T) {
	s := storage.NewListSeries(labels.FromStrings("a", "b"), nil)
	_, err := run(t.Context(), &Leaf{Grid: Grid{Step: 1}, Selector: &parser.VectorSelector{}}, options{}, storage.TestSeriesSet(s), 1)
	require.ErrorIs(t, err, errGiveUp)
}

package plan

import (
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/stretchr/testify/require"
)

// What is said of labels is no less than the engine makes of them, and of what dashboards do no
// more than that.
func TestNeedOfLabels(t *testing.T) {
	series := labels.FromStrings("a", "0123456789", "b", "01")
	for expr, want := range map[string]int64{
		`up`: 0,
		`label_replace(up, "c", "$1", "a", "(.*)")`:                                            10 + 2,
		`label_replace(up, "c", "x$1$$1y", "a", "(.*)")`:                                       10 + 7,
		`label_replace(up, "c", "$1:${2}", "a", "(.)(.*)")`:                                    10 + 7, // beside each other
		`label_replace(up, "c", "$1$2", "a", "(.(.*))")`:                                       20 + 4,
		`label_replace(up, "c", "$x$x$0", "a", "(?P<x>.*)")`:                                   30 + 6,
		`label_replace(up, "c", "$none", "a", "(.*)")`:                                         5,
		`label_join(up, "c", "--", "a", "a", "b")`:                                             30 + 6, // b may be as long as a
		`sum by (c) (label_join(up, "c", "", "a", "a")) + on (c) group_left rate(x[5m])`:       20,
		`label_replace(label_replace(up, "c", "$1$1", "a", "(.*)"), "c", "$1$1", "c", "(.*)")`: 40 + 2*4 + 4,
		`label_replace(label_replace(up, "c", "$1", "a", "(.*)"), "d", "$1", "b", "(.*)")`:     2 * 12,
	} {
		e, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
		require.NoError(t, err)
		require.Equal(t, want, needOf(e, Grid{}, nil).each(series), expr)
	}
	expr := `up`
	for range 100 {
		expr = `label_replace(` + expr + `, "a", "$1$1$1$1$1$1$1$1", "a", "(.*)")`
	}
	e, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	require.NoError(t, err)
	require.EqualValues(t, maxLabels, needOf(e, Grid{}, nil).each(series))
}

func TestNeedOfSubqueries(t *testing.T) {
	hour := Grid{End: time.Hour.Milliseconds(), Step: 60_000}
	for expr, want := range map[string]int64{
		`rate(up[5m])`:                                   0,
		`max_over_time(up[5m:1s])`:                       16 * 3900,
		`max_over_time(up[5m:])`:                         16 * 3900 / 30,
		`max_over_time(vector(1)[5m:1s])`:                48 * 3900,
		`max_over_time(sum_over_time(up[1h:1s])[1h:1m])`: 16*120 + 16*3*3600,
		`max_over_time(vector(1)[292y:1ms])`:             48 * (292*365*86_400_000 + 3_600_000),
	} {
		e, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
		require.NoError(t, err)
		require.Equal(t, want, needOf(e, hour, func(int64) int64 { return 30_000 }).once(), expr)
	}
}

package rollup

// Query is a function over ranges of one series, at several times.
type Query struct {
	// Function by its PromQL name; empty: an instant selector.
	Function string
	// Range, or the lookback delta of an instant selector, in ms: ranges are
	// (t-Range, t].
	Range int64
	// Start is the first time t, and Step, positive, what lies between two of Steps
	// times, all in ms. A selector's offset has been taken off.
	Start, Step int64
	Steps       int
	// StartTimestamps says that the function looks at them, if it is one that can.
	StartTimestamps bool
}

// function is what is to be known of one.
type function struct {
	columns Columns
	// tail: the newest floats decide, so that a range needs no whole windows.
	tail bool
	// needs are the flags of windows that are of no use to it.
	needs Flags
	// starts: it looks at start timestamps, if the query does.
	starts bool
	// rates: it is rate(), increase() or delta().
	rates bool
	// long: windows of at least that width have what it needs.
	long bool
	run  func(e *Evaluator)
}

//nolint:gochecknoglobals // a constant table
var functions = map[string]function{
	"":                  {columns: Last, tail: true, run: (*Evaluator).instant},
	"last_over_time":    {columns: Last, tail: true, run: (*Evaluator).last},
	"present_over_time": {columns: Last, tail: true, run: (*Evaluator).last},
	"absent_over_time":  {columns: Last, tail: true, run: (*Evaluator).last},
	"irate":             {columns: Last | Prev, tail: true, starts: true, run: (*Evaluator).instantRate},
	"idelta":            {columns: Last | Prev, tail: true, run: (*Evaluator).instantRate},
	"first_over_time":   {columns: First, run: (*Evaluator).first},
	"count_over_time":   {run: (*Evaluator).count},
	"min_over_time":     {columns: Min, run: (*Evaluator).extreme},
	"max_over_time":     {columns: Max, run: (*Evaluator).extreme},
	"changes":           {columns: First | Last | Changes, run: (*Evaluator).changes},
	"resets":            {columns: First | Last | Resets, starts: true, run: (*Evaluator).changes},
	"sum_over_time":     {columns: Sum, needs: Huge, run: (*Evaluator).sum},
	"avg_over_time":     {columns: Sum, needs: Huge, run: (*Evaluator).sum},
	"rate":              {columns: First | Last | Reset, needs: Huge, starts: true, rates: true, run: (*Evaluator).rate},
	"increase":          {columns: First | Last | Reset, needs: Huge, starts: true, rates: true, run: (*Evaluator).rate},
	"delta":             {columns: First | Last, rates: true, run: (*Evaluator).rate},
	"stddev_over_time":  {columns: First | Sum | M2, needs: Huge, long: true, run: (*Evaluator).deviation},
	"stdvar_over_time":  {columns: First | Sum | M2, needs: Huge, long: true, run: (*Evaluator).deviation},
}

// Columns that the query needs of windows of a width, in ms. It reports false if
// such windows can't answer it.
func (q *Query) Columns(width int64) (Columns, bool) {
	f, ok := functions[q.Function]
	switch {
	case !ok, q.Steps <= 0, q.Range <= 0:
		return 0, false
	case q.Start%width != 0, q.Steps > 1 && q.Step%width != 0:
		return 0, false
	case f.tail:
		return f.columns, true
	case q.Range < width, f.long && width < Long:
		return 0, false
	case q.Range%width != 0:
		return f.columns | Last | Prev, true
	}
	return f.columns, true
}

// Rest is how far ranges stick out of whole windows of a width, at their old ends, in ms: of the last float but one
// of a window the query looks at none that is as far from the window's end. 0: it looks at all, if at any.
func (q *Query) Rest(width int64) int64 {
	if functions[q.Function].tail {
		return 0
	}
	return q.Range % width
}

// most that a range may stick out of whole windows: a few scrapes. More than two
// samples can't be told from the window that they are in.
const (
	mostOfLong  = 2 * 60 * 1000 // ms
	mostOfShort = 30 * 1000
)

// Width is that of the widest windows, among those that are stored, that are likely
// to answer the query; 0: none is.
func (q *Query) Width() int64 {
	for _, w := range []struct{ width, most int64 }{{Long, mostOfLong}, {Short, mostOfShort}} {
		_, ok := q.Columns(w.width)
		if ok && (functions[q.Function].tail || q.Range%w.width <= w.most) {
			return w.width
		}
	}
	return 0
}

// Result is what a series gives.
type Result struct {
	// Step and Value are the points, ascending by the number of the step.
	Step  []int32
	Value []float64
	// Raw are the steps that need the samples, ascending. They have no point.
	Raw []int32
}

func (r *Result) add(step int, v float64) {
	r.Step = append(r.Step, int32(step)) //nolint:gosec // a slice has fewer
	r.Value = append(r.Value, v)
}

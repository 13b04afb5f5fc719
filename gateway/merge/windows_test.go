package merge

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
)

// Parts of a query, which gateways compute from what is hidden of their time, warn as the whole query would: what
// is the same is shown once.
func TestPartsWarnAlike(t *testing.T) {
	const hour = 3_600_000
	all := history.NewHidden(nil, history.Horizons{Raw: 100 * hour, Short: 50 * hour, Long: 10 * hour})
	warn := func(mint, maxt int64) string {
		t.Helper()
		snap := &history.Snapshot{
			MinT: max(mint, 10*hour), MaxT: maxt, Hidden: all.Within(mint, maxt),
			Blocks: []history.Block{{Ranges: []chunkfmt.Range{{MinT: 0, MaxT: 200 * hour}}}},
		}
		err := onlySummaries(snap, mint, maxt, 0)
		require.Error(t, err)
		return err.Error()
	}
	whole := warn(0, 150*hour)
	for _, from := range []int64{9 * hour, 20 * hour, 50 * hour, 60 * hour, 99 * hour} {
		require.Equal(t, whole, warn(from, from+2*hour))
	}
}

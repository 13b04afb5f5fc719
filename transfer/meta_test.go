package transfer

import (
	"fmt"
	"math"
	"strings"
	"testing"
)

// TestMetaTimes: times that are beyond reason are refused with the reason.
func TestMetaTimes(t *testing.T) {
	for _, x := range []struct {
		mint, maxt int64
		ok         bool
	}{
		{-1000, 1_700_000_000_000, true},
		{0, math.MaxInt64, false},
		{math.MinInt64, 0, false},
		{math.MaxInt64 - 5, math.MaxInt64 - 1, false},
	} {
		_, err := parseMeta(fmt.Appendf(nil, `{"ulid":"01M8CGNFW1N9W7JHAG65G1BEM8","version":1,"minTime":%d,"maxTime":%d}`, x.mint, x.maxt))
		if (err == nil) != x.ok || err != nil && !strings.Contains(err.Error(), "history has room") {
			t.Errorf("%d to %d: %v", x.mint, x.maxt, err)
		}
	}
}

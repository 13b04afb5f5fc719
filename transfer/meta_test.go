package transfer

import (
	"fmt"
	"math"
	"strings"
	"testing"
)

// TestMetaTimes: times that are beyond reason are refused with the reason.
func TestMetaTimes(t *testing.T) {
	const now = 1_700_000_000_000
	for _, x := range []struct {
		mint, maxt int64
		want       string // of the error; empty: it is taken
	}{
		{-1000, 1000, ""},
		{now, now, ""},
		{now, now + 2*366*24*hour, ""},
		{0, math.MaxInt64, "history has room"},
		{math.MinInt64, 0, "history has room"},
		{math.MaxInt64 - 5, math.MaxInt64 - 1, "history has room"},
		{now, now - 1, "maxTime 1699999999999 is before minTime 1700000000000"},
		{0, now, "minTime 0, maxTime 1700000000000: the block spans 19675 days"},
		{-maxTime, maxTime, "the block spans"},
	} {
		_, err := parseMeta(fmt.Appendf(nil, `{"ulid":"01M8CGNFW1N9W7JHAG65G1BEM8","version":1,"minTime":%d,"maxTime":%d}`, x.mint, x.maxt))
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%d to %d: %v", x.mint, x.maxt, err)
		}
	}
}

package sidecar

import (
	"testing"
	"time"
)

// Changed labels hold from when Prometheus took them, but not for what was sent
// already, which may be ahead of the clock.
func TestLabelsSince(t *testing.T) {
	now := time.UnixMilli(1_800_000_000_000)
	for _, c := range []struct {
		name                  string
		loaded, newest, since time.Duration // from now
	}{
		{"nothing sent since", -time.Minute, -time.Hour, -time.Minute},
		{"sent since", -time.Hour, -time.Second, -time.Second + time.Millisecond},
		{"a target is ahead", -time.Hour, 5 * time.Minute, 5*time.Minute + time.Millisecond},
		{"further than can be", -time.Hour, time.Hour, 10*time.Minute + time.Millisecond},
	} {
		if got, want := labelsSince(now.Add(c.loaded), now, now.Add(c.newest).UnixMilli()), now.Add(c.since).UnixMilli(); got != want {
			t.Errorf("%s: since %v, want %v", c.name, time.UnixMilli(got).Sub(now), c.since)
		}
	}
}

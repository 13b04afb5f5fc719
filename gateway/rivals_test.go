package gateway

import (
	"fmt"
	"testing"
	"time"
)

func TestRivals(t *testing.T) {
	var r rivals
	now := time.Unix(1_700_000_000, 0)
	c := claimant{"t", "g", "a"}
	see := func(source, want string) {
		t.Helper()
		now = now.Add(30 * time.Second)
		if got := r.see(c, source, now); got != want {
			t.Errorf("rival of %s is %q, want %q", source, got, want)
		}
	}
	see("1", "")
	see("1", "")
	see("2", "") // it may have come in the other's place
	see("2", "")
	see("1", "2")
	see("1", "2")
	see("2", "1")
	see("", "")
	other := c
	other.replica = "b"
	if got := r.see(other, "3", now); got != "" {
		t.Errorf("a replica of another name has the rival %q", got)
	}
	// One of them has been stopped.
	for range 21 {
		r.see(c, "2", now)
		now = now.Add(30 * time.Second)
	}
	see("2", "")
	for i := range 3 * maxClaimants {
		r.see(claimant{"t", "g", fmt.Sprint(i)}, "1", now)
	}
	if len(r.all) > maxClaimants {
		t.Errorf("%d names are kept", len(r.all))
	}
}

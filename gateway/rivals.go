package gateway

import (
	"sync"
	"time"
)

// rivals notices sources that claim by one replica's name: whose samples would be
// doubled. One that claims where another has just done may have come in its place,
// with a new data directory; if the other claims again after that, there are two.
type rivals struct {
	mu  sync.Mutex
	all map[claimant]*claims
}

type claimant struct{ tenant, group, replica string }

type claims struct {
	last, before string // sources
	seen         time.Time
	rivals       time.Time // when both were last seen; zero: never
}

const (
	// rivalsFor is how long they are remembered: some leases.
	rivalsFor = 10 * time.Minute
	// maxClaimants bounds of how many names it is.
	maxClaimants = 10_000
)

// see notes a claim, and gives the other source that claims by that name, or "".
func (r *rivals) see(c claimant, source string, now time.Time) string {
	if source == "" {
		return ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	x := r.all[c]
	if x == nil || now.Sub(x.seen) > rivalsFor {
		if r.all == nil || len(r.all) >= maxClaimants {
			r.all = map[claimant]*claims{}
		}
		x = &claims{last: source}
		r.all[c] = x
	}
	x.seen = now
	if x.last != source {
		if x.before == source {
			x.rivals = now
		}
		x.last, x.before = source, x.last
	}
	if x.rivals.IsZero() || now.Sub(x.rivals) > rivalsFor {
		return ""
	}
	return x.before
}

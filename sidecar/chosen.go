package sidecar

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// errUndecided stops what is read again before a sample of which it isn't known
// whether it is to be sent.
var errUndecided = errors.New("not decided yet which replica is chosen")

// choosing is the shipper's account of which replica is chosen. Where the label
// that tells replicas apart is dropped, a sample is sent only if the claims of its
// group say that its time is this replica's. Before a sample of which they say
// nothing yet the tail stops: the WAL keeps what waits.
type choosing struct {
	claimer *claimer
	groups  map[string]*claims
	// clock is what the samples of the present record are measured by. It stands
	// while a record is held, so that what is asked for doesn't change.
	clock time.Time
	since time.Time // when the tail was stopped; zero: it isn't
	lack  string    // what keeps the replica's name from being known
}

// splitReplica takes the replica's label off the external labels. Without one
// nothing is chosen.
func splitReplica(ls labels.Labels, label string) (labels.Labels, string, error) {
	if label == "" {
		return ls, "", nil
	}
	name := ls.Get(label)
	if name == "" {
		return ls, "", fmt.Errorf("external label %q isn't set: it is to name this Prometheus among its replicas (ha.replica_label), set it to another value at each", label)
	}
	return labels.NewBuilder(ls).Del(label).Labels(), name, nil
}

// groupOf names those replicas that have the same external labels but for the one
// that tells them apart.
func groupOf(external labels.Labels) string {
	b, err := json.Marshal(external)
	if err != nil {
		return external.String() // strings can always be marshalled
	}
	return string(b)
}

// claimsOf returns the claims of the group of a version of the labels.
func (s *shipper) claimsOf(v *labelVersion) *claims {
	if v.claims == nil {
		g := groupOf(v.external)
		if s.choosing.groups[g] == nil {
			s.choosing.groups[g] = newClaims(g, s.opts.Lease)
		}
		v.claims = s.choosing.groups[g]
	}
	return v.claims
}

// takeClaims takes in what gateways have answered.
func (s *shipper) takeClaims() {
	for _, a := range s.choosing.claimer.take() {
		if c := s.choosing.groups[a.request.Group]; c != nil {
			c.take(a.request, a.intervals, time.Now())
		}
	}
}

// ourTime says whether samples of a time are sent, as far as replicas are
// concerned, under a version of the labels that has a replica.
func (s *shipper) ourTime(v *labelVersion, t int64) bool {
	c := s.claimsOf(v)
	return c.owner(v.replica, c.at(t, s.choosing.clock)) == ours
}

// undecidedTime is the first time, of those seen, that nothing is known of.
type undecidedTime struct {
	v *labelVersion
	t int64
}

func (s *shipper) seeTime(u *undecidedTime, t int64, live bool) {
	v := s.version
	if !v.holds(t) {
		v = s.versions.at(t)
	}
	if v.replica == "" {
		return
	}
	c := s.claimsOf(v)
	at := c.at(t, s.choosing.clock)
	if c.owner(v.replica, at) == undecided {
		if u.v == nil || at < u.t {
			u.v, u.t = v, at
		}
		return
	}
	if live && at == t {
		c.newest = max(c.newest, t)
	}
}

// undecided returns the first time in a record of which it isn't known whose it
// is; no version if there is none. What there is is live where it comes from the
// tail.
func (s *shipper) undecided(b *tail.Batch, live bool) (u undecidedTime) {
	if !s.versions.chosen || s.agent && b.From.InCheckpoint {
		return u
	}
	for i := range b.Samples {
		s.seeTime(&u, b.Samples[i].T, live)
	}
	for i := range b.Histograms {
		s.seeTime(&u, b.Histograms[i].T, live)
	}
	for i := range b.FloatHistograms {
		s.seeTime(&u, b.FloatHistograms[i].T, live)
	}
	for i := range b.Exemplars {
		s.seeTime(&u, b.Exemplars[i].T, false)
	}
	return u
}

// askFor asks for what is undecided, if the time for it has come. until is up to
// where it may be claimed, 0 for the usual.
func (s *shipper) askFor(u undecidedTime, until int64) {
	if q, ok := s.claimsOf(u.v).want(u.v.replica, u.t, until, time.Now()); ok {
		s.choosing.claimer.ask(q)
	}
}

// hold says whether a record that the tail has just read has to wait.
func (s *shipper) hold(b *tail.Batch) bool {
	h := &s.choosing
	if h.since.IsZero() {
		h.clock = time.Now()
	}
	u := s.undecided(b, true)
	if u.v == nil {
		h.since = time.Time{}
		return false
	}
	if h.since.IsZero() {
		h.since = h.clock
	}
	s.askFor(u, 0)
	return true
}

// renewClaim makes a chosen replica go on to be so.
func (s *shipper) renewClaim() {
	v := s.version
	if v == nil || v.replica == "" {
		return
	}
	if q, ok := s.claimsOf(v).renew(v.replica, time.Now()); ok {
		s.choosing.claimer.ask(q)
	}
}

// undecidedAgain is errUndecided if a record that is read again has to wait.
func (s *shipper) undecidedAgain(b *tail.Batch) error {
	s.choosing.clockNow()
	u := s.undecided(b, false)
	if u.v == nil {
		return nil
	}
	s.askFor(u, 0)
	return errUndecided
}

// undecidedBlock says whether a block has times of which it isn't known whose they
// are. All of them are claimed that are nobody's.
func (s *shipper) undecidedBlock(f *fill) bool {
	if !s.versions.chosen {
		return false
	}
	s.choosing.clockNow()
	for i, v := range s.versions.list {
		until := int64(math.MaxInt64)
		if i+1 < len(s.versions.list) {
			until = s.versions.list[i+1].since
		}
		from := max(f.block.MinTime, f.mint, v.since)
		if until = min(f.block.MaxTime, until); v.replica == "" || from >= until {
			continue
		}
		c := s.claimsOf(v)
		from, until = c.at(from, s.choosing.clock), c.at(until-1, s.choosing.clock)+1
		if t, ok := c.hole(from, until); ok {
			s.askFor(undecidedTime{v, t}, until)
			return true
		}
	}
	return false
}

// clockNow sets the clock, unless a record is held that is measured by it.
func (h *choosing) clockNow() {
	if h.since.IsZero() {
		h.clock = time.Now()
	}
}

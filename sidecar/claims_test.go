package sidecar

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

func interval(from, until int64, replica string) choice.Interval {
	return choice.Interval{From: from, Until: until, Replica: replica}
}

func TestClaimsKnown(t *testing.T) {
	const day = index.ChoiceDay
	c := newClaims("g", time.Minute)
	now := time.UnixMilli(10 * day)
	c.take(choice.Request{From: 0, Until: 1}, []choice.Interval{interval(10, 20, "a"), interval(20, day, "b")}, now)
	c.take(choice.Request{From: day, Until: 2*day - 1}, []choice.Interval{interval(day, day+5, "b"), interval(day+10, day+20, "a")}, now)
	want := []choice.Interval{interval(10, 20, "a"), interval(20, day+5, "b"), interval(day+10, day+20, "a")}
	if d := cmp.Diff(want, c.known); d != "" {
		t.Error(d)
	}
	// An answer stands for all of its days, and for nothing else.
	c.take(choice.Request{From: 0, Until: 1}, []choice.Interval{interval(10, 20, "a"), interval(20, day+5, "b")}, now)
	if d := cmp.Diff(want, c.known); d != "" {
		t.Error(d)
	}
	c.take(choice.Request{From: -5, Until: 5}, []choice.Interval{interval(-3, 20, "a"), interval(20, day, "b")}, now)
	want[0].From = -3
	if d := cmp.Diff(want, c.known); d != "" {
		t.Error(d)
	}
	for at, want := range map[int64]ownership{-4: undecided, -3: ours, 19: ours, 20: others, day: others, day + 4: others, day + 5: undecided, day + 9: undecided, day + 10: ours, day + 20: undecided} {
		if got := c.owner("a", at); got != want {
			t.Errorf("at %d: %d, want %d", at, got, want)
		}
	}
	for _, x := range []struct{ from, until, hole int64 }{{-10, 50, -10}, {0, day, -1}, {0, day + 6, day + 5}, {day + 5, day + 6, day + 5}, {day + 12, day + 30, day + 20}, {day + 12, day + 20, -1}} {
		hole, ok := c.hole(x.from, x.until)
		if !ok {
			hole = -1
		}
		if hole != x.hole {
			t.Errorf("hole from %d until %d: %d, want %d", x.from, x.until, hole, x.hole)
		}
	}
}

func TestClaimRules(t *testing.T) {
	const lease = 60_000
	base := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ms := base.UnixMilli()
	fresh := func(known ...choice.Interval) *claims {
		c := newClaims("g", time.Minute)
		c.take(choice.Request{From: ms - index.ChoiceDay, Until: ms + 1}, known, base)
		return c
	}
	want := func(name string, c *claims, t0, until int64, now time.Time, want choice.Request) {
		t.Helper()
		got, ok := c.want("a", t0, until, now)
		if ok != (want.Until != 0) || ok && (want.Group == "" && cmp.Diff(want, choice.Request{Replica: got.Replica, From: got.From, Until: got.Until}) != "") {
			t.Errorf("%s: %+v %v, want %+v", name, got, ok, want)
		}
	}
	asks := choice.Request{From: ms - index.ChoiceDay, Until: ms + 1}
	claims := func(from, until int64) choice.Request { return choice.Request{Replica: "a", From: from, Until: until} }

	c := newClaims("g", time.Minute)
	want("nothing is known", c, ms, 0, base, asks)
	want("nothing is decided", fresh(), ms, 0, base, claims(ms, ms+lease))
	want("its own, just ended, but what it has scraped since isn't known", fresh(interval(ms-500_000, ms-lease, "a")), ms, 0, base, claims(ms, ms+lease))
	c = fresh(interval(ms-500_000, ms-lease, "a"))
	c.newest = ms - lease
	want("its own, just ended", c, ms, 0, base, claims(ms-lease, ms+lease))
	c.newest--
	want("its own, just ended, but it has a hole of its own", c, ms, 0, base, claims(ms, ms+lease))
	want("its own, too long ago", fresh(interval(ms-500_000, ms-lease-1, "a")), ms, 0, base, choice.Request{})
	want("another's", fresh(interval(ms-500_000, ms, "b")), ms, 0, base, choice.Request{})
	c = fresh(interval(ms-500_000, ms, "b"))
	for s := range 60 {
		now := base.Add(time.Duration(s) * time.Second)
		if s%5 == 0 && s > 0 {
			want("another's: ask again", c, ms, 0, now, asks)
			c.take(asks, []choice.Interval{interval(ms-500_000, ms, "b")}, now)
		}
		want("another's: wait", c, ms, 0, now, choice.Request{})
	}
	c.take(asks, []choice.Interval{interval(ms-500_000, ms, "b")}, base.Add(time.Minute))
	c.newest = ms - 5
	want("another's: a lease ago", c, ms, 0, base.Add(time.Minute), claims(ms, ms+lease))
	c.take(asks, []choice.Interval{interval(ms-500_000, ms+lease/2, "b")}, base.Add(time.Minute))
	want("another's: and then it isn't", c, ms+lease/2, 0, base.Add(time.Minute), choice.Request{})

	// Cut off for long: who is chosen goes first.
	later := base.Add(time.Hour)
	c = newClaims("g", time.Minute)
	want("after an outage", c, ms, 0, later, asks)
	c.take(asks, []choice.Interval{interval(ms-500_000, ms, "b")}, later)
	want("after an outage", c, ms, 0, later, choice.Request{})
	later = later.Add(10 * time.Second)
	want("after an outage", c, ms, 0, later, asks)
	c.take(asks, []choice.Interval{interval(ms-500_000, ms, "b")}, later)
	want("after an outage", c, ms, 0, later, claims(ms, ms+lease))

	// What is old is claimed in larger pieces; blocks as a whole.
	later = base.Add(16 * 24 * time.Hour)
	c = fresh()
	c.take(asks, nil, later)
	want("old", c, ms, 0, later, claims(ms, ms+index.ChoiceDay))
	want("a block", c, ms, ms+5, later, claims(ms, ms+5))
	want("a large block", c, ms, ms+100*index.ChoiceDay, later, claims(ms, ms+maxClaim))

	renew := func(name string, newest int64, want choice.Request, known ...choice.Interval) {
		t.Helper()
		c := fresh(known...)
		c.newest = newest
		got, ok := c.renew("a", base)
		got.Group = ""
		if ok != (want.Until != 0) || ok && cmp.Diff(want, got) != "" {
			t.Errorf("%s: %+v %v, want %+v", name, got, ok, want)
		}
	}
	renew("none", ms, choice.Request{})
	renew("early", ms, choice.Request{}, interval(ms-1000, ms+lease/4, "a"))
	renew("due", ms, claims(ms+lease/4-1, ms+lease), interval(ms-1000, ms+lease/4-1, "a"))
	renew("another's", ms, choice.Request{}, interval(ms-1000, ms+lease/4-1, "b"))
	renew("another is next", ms, choice.Request{}, interval(ms-1000, ms+100, "a"), interval(ms+100, ms+200, "b"))
	renew("nothing was read yet", noTime, choice.Request{}, interval(ms-1000, ms+100, "a"))

	// What lies ahead stands for the present.
	for ahead, want := range map[int64]int64{-5: -5, lease / 4: lease / 4, lease/4 + 1: 0, 1 << 60: 0} {
		if got := c.at(ms+ahead, base); got != ms+want {
			t.Errorf("%d ms ahead: %d, want %d", ahead, got-ms, want)
		}
	}
}

// claimSeeds is how many runs the model has.
const claimSeeds = 60

// replicaModel is a Prometheus and its sidecar, as far as claims go. Times are in
// ms.
type replicaModel struct {
	name         string
	skew         int64 // of its clock
	phase        int64
	scraping, up bool // Prometheus, sidecar
	cut          bool // from the gateway
	wal          []int64
	pos          int
	claims       *claims
	busy         bool
	heldClock    int64
	shipped      map[int64]bool
	dropped      map[int64]bool
}

// TestClaimsModel has two or three replicas with skewed clocks, which crash, come
// back, read again what they have sent, and lose requests and answers. Each time is
// one replica's, nothing of what it has of its times is lost, and whatever another has
// scraped, something that was kept is near.
func TestClaimsModel(t *testing.T) {
	for seed := range uint64(claimSeeds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			runClaimsModel(t, seed, false)
		})
	}
}

// TestClaimsCalm: while nothing worse happens than that requests fail, and clocks
// differ by less than a lease, whoever is chosen stays so, at the stated price.
func TestClaimsCalm(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			runClaimsModel(t, seed, true)
		})
	}
}

func runClaimsModel(t *testing.T, seed uint64, calm bool) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 7))
	const scrape, lease, tick = 15_000, 60_000, 500
	fault := historytest.None
	rows := &historytest.FaultyRows{Store: &historytest.MemoryRows{}, Decide: func(string, string) historytest.Fault { return fault }}
	choices := choice.New(index.New(rows))
	now := time.Date(2026, 3, 1, 23, 0, 0, 0, time.UTC).UnixMilli() // over midnight
	began := now
	var all []*replicaModel
	for i := range 2 + rnd.IntN(2) {
		skew := rnd.Int64N(2_000)
		if rnd.IntN(3) == 0 {
			skew = rnd.Int64N(300_000) - 150_000
		}
		if calm {
			skew = rnd.Int64N(50_000)
		}
		all = append(all, &replicaModel{
			name: fmt.Sprint("replica ", i), skew: skew, phase: rnd.Int64N(scrape), scraping: true, up: true,
			claims: newClaims("g", lease*time.Millisecond), shipped: map[int64]bool{}, dropped: map[int64]bool{},
		})
	}
	type event struct {
		at int64
		do func()
	}
	var events []event
	after := func(d int64, do func()) { events = append(events, event{now + d, do}) }
	claims := 0
	ask := func(r *replicaModel, q choice.Request) {
		if r.busy {
			return
		}
		r.busy = true
		of := r.claims
		latency := 1 + rnd.Int64N(1500)
		after(latency, func() {
			fault = historytest.None
			if k := rnd.IntN(12); k < 2 {
				fault = []historytest.Fault{historytest.Before, historytest.After}[k]
			}
			if r.cut {
				fault = historytest.Before
			}
			var is []choice.Interval
			var err error
			if q.Replica == "" {
				is, err = choices.Decided(t.Context(), "t", q.Group, q.From, q.Until)
			} else {
				if is, err = choices.Claim(t.Context(), "t", q.Group, q.Replica, q.From, q.Until); err == nil {
					claims++
				}
			}
			lost := rnd.IntN(12) == 0
			after(1+rnd.Int64N(500), func() {
				if r.claims != of {
					return // a process before
				}
				r.busy = false
				if err == nil && !lost {
					of.take(q, is, time.UnixMilli(now+r.skew))
				}
			})
		})
	}
	read := func(r *replicaModel) {
		for n := 0; n < 200 && r.pos < len(r.wal); n++ {
			t0 := r.wal[r.pos]
			if r.heldClock == 0 {
				r.heldClock = now + r.skew
			}
			at := r.claims.at(t0, time.UnixMilli(r.heldClock))
			switch r.claims.owner(r.name, at) {
			case undecided:
				if q, ok := r.claims.want(r.name, at, 0, time.UnixMilli(now+r.skew)); ok {
					ask(r, q)
				}
				return
			case ours:
				r.shipped[t0] = true
			case others:
				r.dropped[t0] = true
			}
			r.heldClock = 0
			r.pos++
			if at == t0 {
				r.claims.newest = max(r.claims.newest, t0)
			}
			if q, ok := r.claims.renew(r.name, time.UnixMilli(now+r.skew)); ok {
				ask(r, q)
			}
		}
	}
	restart := func(r *replicaModel) {
		r.up, r.busy, r.heldClock = true, false, 0
		r.claims = newClaims("g", lease*time.Millisecond)
		r.pos = max(0, r.pos-rnd.IntN(200))
	}
	step := func() {
		now += tick
		due := events
		events = nil
		for _, e := range due {
			if e.at <= now {
				e.do()
			} else {
				events = append(events, e)
			}
		}
		for _, r := range all {
			if clock := now + r.skew; r.scraping && (clock-r.phase)/scrape != (clock-tick-r.phase)/scrape {
				r.wal = append(r.wal, clock)
			}
			if r.up {
				read(r)
			}
		}
	}
	const hours = 3
	for range hours * 3600 * 1000 / tick {
		step()
		if calm || rnd.IntN(500) > 0 {
			continue
		}
		r, away := all[rnd.IntN(len(all))], rnd.Int64N(600_000)
		switch rnd.IntN(5) {
		case 0:
			r.scraping = false
			after(away, func() { r.scraping = true })
		case 1:
			r.up = false
			after(away, func() { restart(r) })
		case 2: // the machine
			r.scraping, r.up = false, false
			after(away, func() { r.scraping = true; restart(r) })
		case 3:
			r.cut = true
			after(away, func() { r.cut = false })
		case 4: // the gateways
			for _, r := range all {
				r.cut = true
			}
			after(away/2, func() {
				for _, r := range all {
					r.cut = false
				}
			})
		}
	}
	scraped := now
	for _, r := range all {
		r.cut, r.scraping = false, false
		if !r.up {
			restart(r)
		}
	}
	read2 := func() bool {
		return slices.ContainsFunc(all, func(r *replicaModel) bool { return !r.up || r.pos < len(r.wal) })
	}
	for i := 0; read2(); i++ {
		for _, r := range all {
			r.scraping, r.cut = false, false
		}
		if step(); i > 3600*1000/tick {
			t.Fatal("a replica never gets to know whose its samples are")
		}
	}
	fault = historytest.None
	final, err := choices.Decided(t.Context(), "t", "g", now-20*3600_000, now+3600_000)
	if err != nil {
		t.Fatal(err)
	}
	ownerAt := func(t0 int64) string {
		for _, x := range final {
			if x.From <= t0 && t0 < x.Until {
				return x.Replica
			}
		}
		return ""
	}
	// A claim for each three quarters of a lease, and some whose answers are lost.
	if calm {
		var between []choice.Interval // the beginning and the end apart
		for _, x := range final {
			if x.Until > began+5*lease && x.From < scraped-2*lease {
				between = append(between, x)
			}
		}
		if most := hours * 3600_000 / (lease * 3 / 4) * 5 / 4; len(between) != 1 || claims > most {
			t.Errorf("%d claims, want at most %d: %v", claims, most, final)
		}
	}
	var kept []int64
	for _, r := range all {
		for t0 := range r.shipped {
			kept = append(kept, t0)
			if got := ownerAt(t0); got != r.name {
				t.Errorf("%s sent a sample of %d, which is of %q", r.name, t0, got)
			}
		}
		for _, t0 := range r.wal {
			if ownerAt(t0) == r.name && !r.shipped[t0] {
				t.Errorf("%s has a sample of %d, which is its own, and didn't send it", r.name, t0)
			}
			if r.shipped[t0] && r.dropped[t0] {
				t.Errorf("%s sent a sample of %d, and dropped it", r.name, t0)
			}
		}
	}
	slices.Sort(kept)
	kept = slices.Compact(kept)
	const bound = lease + lease/4 + 2*scrape
	worst := int64(0)
	for _, r := range all {
		for _, t0 := range r.wal {
			i, _ := slices.BinarySearch(kept, t0)
			near := int64(1 << 60)
			if i < len(kept) {
				near = kept[i] - t0
			}
			if i > 0 {
				near = min(near, t0-kept[i-1])
			}
			if worst = max(worst, near); near > bound {
				t.Fatalf("%s had a sample of %d: nothing within %d ms of it was kept", r.name, t0, near)
			}
		}
	}
	// Where there is a gap that is longer, nobody has scraped all the time.
	for i := 1; i < len(kept); i++ {
		if kept[i]-kept[i-1] <= bound {
			continue
		}
		for _, r := range all {
			last, hole := kept[i-1], int64(0)
			for _, t0 := range r.wal {
				if t0 > last && t0 <= kept[i] {
					hole = max(hole, t0-last)
					last = t0
				}
			}
			if hole = max(hole, kept[i]-last); hole <= 2*scrape {
				t.Errorf("nothing was kept between %d and %d, and %s had samples all the time", kept[i-1], kept[i], r.name)
			}
		}
	}
	t.Logf("%d replicas, %d intervals, %d claims, %d samples kept, at most %d ms from what was scraped", len(all), len(final), claims, len(kept), worst)
}

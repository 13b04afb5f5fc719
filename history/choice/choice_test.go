package choice

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stores are all kinds of index.
func stores(t *testing.T, test func(*testing.T, index.Store)) {
	t.Helper()
	for name, open := range map[string]func(testing.TB) index.Store{
		"memory":   func(testing.TB) index.Store { return &historytest.MemoryRows{} },
		"embedded": func(t testing.TB) index.Store { return historytest.Bolt(t, prometheus.NewRegistry()) },
		"dynamodb": func(t testing.TB) index.Store { return historytest.DynamoDB(t, prometheus.NewRegistry()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

const day = index.ChoiceDay

func TestClaim(t *testing.T) {
	t.Parallel()
	stores(t, func(t *testing.T, s index.Store) {
		c := New(index.New(s))
		claim := func(group, replica string, from, until int64, want ...Interval) {
			t.Helper()
			for range 2 { // it may be repeated
				got, err := c.Claim(t.Context(), "acme", group, replica, from, until)
				if err != nil {
					t.Fatalf("%s claims from %d until %d: %v", replica, from, until, err)
				}
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("%s claims from %d until %d (-want +got):\n%s", replica, from, until, d)
				}
			}
			got, err := c.Decided(t.Context(), "acme", group, from, until)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("decided from %d until %d (-want +got):\n%s", from, until, d)
			}
		}
		is := func(from, until int64, replica string) Interval {
			return Interval{From: from, Until: until, Replica: replica}
		}
		claim("g", "a", 1000, 2000, is(1000, 2000, "a"))
		claim("g", "a", 2000, 3000, is(1000, 3000, "a"))
		claim("g", "b", 1500, 3500, is(1000, 3000, "a"))
		claim("g", "b", 3000, 3500, is(1000, 3000, "a"), is(3000, 3500, "b"))
		claim("g", "a", 2500, 4000, is(1000, 3000, "a"), is(3000, 3500, "b"))
		claim("g", "a", 3500, 3600, is(1000, 3000, "a"), is(3000, 3500, "b"), is(3500, 3600, "a"))
		claim("g", "b", 0, 5000, is(0, 1000, "b"), is(1000, 3000, "a"), is(3000, 3500, "b"), is(3500, 3600, "a"))
		claim("g", "a", 0, 5000, is(0, 1000, "b"), is(1000, 3000, "a"), is(3000, 3500, "b"), is(3500, 3600, "a"))
		claim("g", "a", 3300, 5000, is(0, 1000, "b"), is(1000, 3000, "a"), is(3000, 3500, "b"), is(3500, 3600, "a"))
		claim("g", "a", 3550, 5000, is(0, 1000, "b"), is(1000, 3000, "a"), is(3000, 3500, "b"), is(3500, 5000, "a"))
		// Groups and tenants know nothing of each other.
		claim("other", "b", 0, 10, is(0, 10, "b"))
		claim("", "b", 0, 10, is(0, 10, "b"))
		if got, err := c.Decided(t.Context(), "acm", "g", 0, 5000); err != nil || len(got) != 0 {
			t.Errorf("another tenant has %v, %v", got, err)
		}
		// Over days, also before the epoch.
		claim("days", "a", -5, 5, is(-5, 5, "a"))
		claim("days", "b", 3*day-5, 3*day, is(3*day-5, 3*day, "b"))
		claim("days", "a", -2*day, 4*day, is(-2*day, 3*day-5, "a"), is(3*day-5, 3*day, "b"))
		claim("days", "a", 3*day, 4*day+1, is(3*day, 4*day+1, "a"))
		if got, err := c.Decided(t.Context(), "acme", "days", 2*day, 2*day+1); err != nil || cmp.Diff([]Interval{is(2*day, 3*day-5, "a"), is(3*day-5, 3*day, "b")}, got) != "" {
			t.Errorf("of one day: %v, %v", got, err)
		}
	})
}

func TestImpossible(t *testing.T) {
	t.Parallel()
	c := New(index.New(&historytest.MemoryRows{}))
	for name, f := range map[string]func() error{
		"no replica": func() error { _, err := c.Claim(t.Context(), "t", "g", "", 0, 1); return err },
		"long replica": func() error {
			_, err := c.Claim(t.Context(), "t", "g", strings.Repeat("r", MaxReplica+1), 0, 1)
			return err
		},
		"replica not UTF8": func() error { _, err := c.Claim(t.Context(), "t", "g", "\xff", 0, 1); return err },
		"long group": func() error {
			_, err := c.Claim(t.Context(), "t", strings.Repeat("g", MaxGroup+1), "r", 0, 1)
			return err
		},
		"empty":          func() error { _, err := c.Claim(t.Context(), "t", "g", "r", 1, 1); return err },
		"backwards":      func() error { _, err := c.Claim(t.Context(), "t", "g", "r", 2, 1); return err },
		"too wide":       func() error { _, err := c.Claim(t.Context(), "t", "g", "r", 0, MaxDays*day+1); return err },
		"all time":       func() error { _, err := c.Claim(t.Context(), "t", "g", "r", math.MinInt64, math.MaxInt64); return err },
		"read backwards": func() error { _, err := c.Decided(t.Context(), "t", "g", 2, 1); return err },
	} {
		if err := f(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := c.Claim(t.Context(), "t", "g", "r", 1, 1+MaxDays*day-1); err != nil {
		t.Errorf("the widest claim: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Claim(ctx, "t", "g", "r", 0, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// A day that is full refuses more.
	full := make([]Interval, index.MaxChoices)
	for i := range full {
		full[i] = Interval{From: int64(i) * 1000, Until: int64(i)*1000 + 1000, Replica: fmt.Sprint("r", i%2)}
	}
	if _, err := c.index.PutChoices(t.Context(), index.ChoiceRow{Tenant: "t", Group: "full"}, full); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Claim(t.Context(), "t", "full", "r2", index.MaxChoices*1000, day); !errors.Is(err, ErrInvalid) {
		t.Errorf("a day that is full: %v", err)
	}
}

// TestModel has claimants that overlap, repeat themselves and meet a store that
// fails, before and after the effect. What was once decided stays, and no time has
// two owners.
func TestModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			rows := &historytest.MemoryRows{}
			const span = 3 * day
			var g errgroup.Group
			said := make([][][]Interval, 4)
			for w := range said {
				rnd := rand.New(rand.NewPCG(seed, uint64(w)))
				faulty := historytest.FaultyRows{Store: rows, Decide: func(string, string) historytest.Fault {
					switch rnd.IntN(10) {
					case 0:
						return historytest.Before
					case 1:
						return historytest.After
					}
					return historytest.None
				}}
				c := New(index.New(&faulty))
				g.Go(func() error {
					for range 60 {
						from := rnd.Int64N(span)
						until := from + 1 + rnd.Int64N(span/20)
						got, err := c.Claim(t.Context(), "t", "g", fmt.Sprint("replica ", w), from, until)
						if errors.Is(err, historytest.ErrInjected) || errors.Is(err, ErrContended) {
							continue
						}
						if err != nil {
							return err
						}
						said[w] = append(said[w], got)
						if hole := undecided(got, from, until); hole >= 0 && !slices.ContainsFunc(got, func(x Interval) bool {
							return x.Until > from && x.From < hole && x.Replica != fmt.Sprint("replica ", w)
						}) {
							return fmt.Errorf("claimed from %d until %d, but %d is undecided: %v", from, until, hole, got)
						}
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			final, err := New(index.New(rows)).Decided(t.Context(), "t", "g", 0, 2*span)
			if err != nil {
				t.Fatal(err)
			}
			for i := 1; i < len(final); i++ {
				if final[i].From < final[i-1].Until {
					t.Fatalf("%v and %v overlap", final[i-1], final[i])
				}
			}
			for _, answers := range said {
				for _, answer := range answers {
					for _, x := range answer {
						if !covered(final, x) {
							t.Fatalf("%v was decided, and isn't any more", x)
						}
					}
				}
			}
		})
	}
}

// undecided returns the first time without an owner, -1 if there is none.
func undecided(all []Interval, from, until int64) int64 {
	for _, x := range all {
		if x.From <= from && from < x.Until {
			from = x.Until
		}
	}
	if from < until {
		return from
	}
	return -1
}

func covered(all []Interval, x Interval) bool {
	for _, y := range all {
		if y.From <= x.From && x.Until <= y.Until {
			return x.Replica == y.Replica
		}
	}
	return false
}

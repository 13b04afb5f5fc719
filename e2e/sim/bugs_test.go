package sim

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	tenancy "github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	inside "github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// bug is a mistake that is put back into the write path, at a seam between its
// parts where there is one. A nil bug is none.
type bug struct {
	name    string
	first   uint64     // seed to begin with
	inside  inside.Bug // where there is no seam
	setUp   func(*world)
	wrap    func(b *bug, n *node, next publish) publish
	falsify func(b *bug, n *node, s *session, a *shippb.Ack) // s is locked

	started sync.WaitGroup
	mu      sync.Mutex
	frozen  map[*node]bool
}

func (b *bug) prepare(w *world) {
	if b != nil && b.setUp != nil {
		b.setUp(w)
	}
}

// publish is that method of an ingest.Publisher.
type publish func(ctx context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error

// publisher is history as a process publishes to it.
type publisher struct {
	*history.History
	publish publish
}

func (p publisher) Publish(ctx context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error {
	return p.publish(ctx, id, data, sum)
}

func (b *bug) publisher(n *node, h *history.History) ingest.Publisher {
	if b == nil || b.wrap == nil {
		return h
	}
	return publisher{h, b.wrap(b, n, h.Publish)}
}

func (b *bug) ack(n *node, s *session, a *shippb.Ack) {
	if b == nil || b.falsify == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b.falsify(b, n, s, a)
}

// after does something later, unless the process dies before.
func (b *bug) after(n *node, d time.Duration, fn func() error) {
	b.started.Go(func() {
		for time.Sleep(d); !n.dead.Load() && fn() != nil; time.Sleep(time.Second) {
		}
	})
}

// wait until what the bug has started has ended.
func (b *bug) wait() {
	if b != nil {
		b.started.Wait()
	}
}

func (b *bug) freeze(n *node, v bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.frozen == nil {
		b.frozen = map[*node]bool{}
	}
	b.frozen[n] = v
}

func bugs() []*bug {
	return []*bug{
		{
			name: "durable before the row", first: 1,
			wrap: func(b *bug, n *node, next publish) publish {
				return func(_ context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error {
					b.after(n, time.Second, func() error { return next(context.Background(), id, data, sum) })
					return nil
				}
			},
		},
		{
			// As if an ingester compared positions in the WAL, here times: what lies
			// before something durable is taken for durable.
			name: "one number for tail and re-sent batches of a session", first: 9,
			falsify: func(_ *bug, _ *node, s *session, a *shippb.Ack) {
				var newest int64
				for _, x := range s.batches[:a.Durable] {
					newest = max(newest, x.newest)
				}
				for a.Durable < a.Received && s.batches[a.Durable].newest <= newest {
					a.Durable++
				}
			},
		},
		{name: "series to re-send chosen by the latest ring", first: 1, inside: inside.LatestRing},
		{name: "a second crash during re-sending is forgotten", first: 2, inside: inside.ResentIsDone},
		{
			// A block that can't be published is put aside, and the next goes first.
			// Only when that is there, both are called durable.
			name: "generation 6 durable before 5", first: 1,
			wrap: func(b *bug, n *node, next publish) publish {
				odd := false
				return func(ctx context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error {
					if odd = !odd; odd {
						b.freeze(n, true)
						b.after(n, 2*n.w.ingester.FlushInterval, func() error { return next(context.Background(), id, data, sum) })
						return nil
					}
					if err := next(ctx, id, data, sum); err != nil {
						odd = !odd // it is tried again
						return err
					}
					b.freeze(n, false)
					return nil
				}
			},
			falsify: func(b *bug, n *node, s *session, a *shippb.Ack) {
				b.mu.Lock()
				defer b.mu.Unlock()
				if b.frozen[n] {
					a.Durable = s.durable
				}
			},
		},
		{
			name: "a generation dropped before its rows are visible", first: 1,
			setUp: func(w *world) { w.ingester.VisibilityDelay = 1 },
		},
		{
			name: "heads read after rows", first: 2,
			setUp: func(w *world) { w.newReader = rowsFirst },
		},
		{
			name: "a segment replaced under the reader", first: 3, inside: inside.SameFile,
		},
		{name: "generation 6 durable before 5 for the held-back tenant", first: 10, inside: inside.HeldIsDurable},
		{
			// A sweeper takes what is being published for an orphan, and its writer does
			// not see that it has lost.
			name: "orphan sweep against a slow flush", first: 7,
			setUp: func(w *world) { w.compaction.OrphanAge = 100 * time.Millisecond },
			wrap: func(_ *bug, _ *node, next publish) publish {
				return func(ctx context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error {
					if err := next(ctx, id, data, sum); !errors.Is(err, history.ErrCondemned) {
						return err
					}
					return nil
				}
			},
		},
		{name: "a replaced row removed too early", first: 1, inside: inside.RemovedEarly},
		{name: "a hole in the commit log", first: 4, inside: inside.HoleInLog},
	}
}

// rowsFirst reads the list of blocks, then the heads.
func rowsFirst(w *world, cached *history.History) (reader, error) {
	none, err := history.New(history.Options{Objects: &historytest.MemoryObjects{}, Index: index.New(&historytest.MemoryRows{})})
	if err != nil {
		return nil, err
	}
	heads := &world{storage: merge.New(w.heads, none, tenancy.TenantOf)}
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(w.seed, 4))
	return func(ctx context.Context, tenant string, mint, maxt int64) (found, annotations.Annotations, error) {
		snap, err := cached.Snapshot(ctx, tenant, mint, maxt, nil, w.members.late.Ring().Since())
		if err != nil {
			return nil, nil, err
		}
		mu.Lock()
		d := time.Duration(rng.Int64N(int64(w.queryTimeout / 2)))
		mu.Unlock()
		time.Sleep(d)
		f, warned, err := heads.gatewayReader(ctx, tenant, mint, maxt)
		if err != nil {
			return nil, nil, err
		}
		old, err := read(ctx, snap, tenant, mint, maxt)
		if err != nil {
			return nil, nil, err
		}
		maps.Copy(f, old)
		return f, warned, nil
	}, nil
}

// TestBites puts each bug back: some seed must find it. It begins with one that did,
// as docs/simulation.md records. With -sim.rate it counts how many do.
func TestBites(t *testing.T) {
	const patience, steps = 400, 60 // some are found by one seed in twenty only
	for _, b := range bugs() {
		t.Run(b.name, func(t *testing.T) {
			defer inside.Set(b.inside)()
			if *rateFlag {
				b.rate(t, steps)
				return
			}
			for seed := b.first; seed < b.first+patience; seed++ {
				if w, err := run(t, config{seed: seed, steps: steps, bug: b}); err != nil {
					t.Logf("seed %d, step %d of %d: %v", seed, w.steps+1, steps, err)
					return
				}
			}
			t.Errorf("not found by %d seeds of %d steps", patience, steps)
		})
	}
}

func (b *bug) rate(t *testing.T, steps int) {
	t.Helper()
	var caught []uint64
	for seed := uint64(1); seed <= uint64(*seedsFlag); seed++ {
		if _, err := run(t, config{seed: seed, steps: steps, bug: b}); err != nil {
			caught = append(caught, seed)
		}
	}
	t.Logf("%d of %d seeds, %d steps each: %v", len(caught), *seedsFlag, steps, caught)
}

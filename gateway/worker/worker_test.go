package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// serve starts gateways that compute parts by run, which is told which they are. Tests that
// count runs are in a bubble: the network isn't, so time stands still while a gateway is asked,
// and none is taken for slow, whatever the machine.
func serve(t *testing.T, n int, run func(ctx context.Context, i int, task *plan.Task) ([]byte, error)) ([]worker.Peer, []*grpc.Server) {
	t.Helper()
	return serveCosts(t, n, func(ctx context.Context, i int, task *plan.Task) ([]byte, account.Cost, error) {
		b, err := run(ctx, i, task)
		return b, account.Cost{}, err
	})
}

// serveCosts is serve of those that say what they read.
func serveCosts(t *testing.T, n int, run func(ctx context.Context, i int, task *plan.Task) ([]byte, account.Cost, error)) (peers []worker.Peer, servers []*grpc.Server) {
	t.Helper()
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		g := grpc.NewServer()
		worker.NewServer(func(ctx context.Context, task *plan.Task) ([]byte, account.Cost, error) {
			return run(ctx, i, task)
		},
			slog.New(slog.DiscardHandler), prometheus.NewRegistry()).Register(g)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = g.Serve(l) // ends with Stop
		}()
		t.Cleanup(func() {
			g.Stop()
			<-done
		})
		peers = append(peers, worker.Peer{ID: fmt.Sprint("gateway-", i), Address: l.Addr().String()})
		servers = append(servers, g)
	}
	return peers, servers
}

func pool(t *testing.T, self string, peers []worker.Peer) *worker.Pool {
	t.Helper()
	p := worker.NewPool(self, func() []worker.Peer { return peers }, slog.New(slog.DiscardHandler), prometheus.NewRegistry(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

func task() *plan.Task {
	return &plan.Task{
		Tenant: "t", Query: "rate(x[5m])", Start: -5, End: 10_000, Step: 10, Lookback: 300_000, SubqueryStep: 20_000, StartTimestamps: true, TypeAndUnitLabels: true,
		MaxSamples: 7, Leaf: 1, Split: true, Span: 3_600_000, Number: -1, From: 3, To: 9,
		Blocks: []history.Block{{
			ID: ulid.MustNew(1, nil), Object: "blocks/x", ObjectSize: 12, Directory: chunkfmt.Location{Offset: 3, Size: 4},
			Level: 2, Series: 5, Samples: 6, Ranges: []chunkfmt.Range{{MinT: -7, MaxT: 8}, {MinT: 10, MaxT: 12}},
		}},
		Hidden: history.NewHidden([]index.Deletion{
			{ID: ulid.MustNew(2, nil), MinT: -4, MaxT: 9, Matchers: []*labels.Matcher{labels.MustNewMatcher(labels.MatchNotEqual, "a", "b")}},
			{ID: ulid.MustNew(3, nil), MinT: 1, MaxT: 1},
		}, history.Horizons{Raw: -6, Short: -60, Long: -600}),
	}
}

func key(i int) plan.Key { return plan.Key{byte(i), byte(i >> 8)} }

// A part goes to the gateway that its key names, whoever asks, with all of it.
func TestPartsGoToOneGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		at := map[plan.Key]int{}
		var now plan.Key
		peers, _ := serve(t, 3, func(_ context.Context, i int, got *plan.Task) ([]byte, error) {
			require.Equal(t, task(), got)
			mu.Lock()
			defer mu.Unlock()
			if was, ok := at[now]; ok {
				require.Equal(t, was, i)
			}
			at[now] = i
			return []byte{byte(i)}, nil
		})
		a, b := pool(t, "gateway-0", peers), pool(t, "gateway-1", peers)
		here := [3]int{}
		for i := range 100 {
			mu.Lock()
			now = key(i)
			mu.Unlock()
			for j, p := range []*worker.Pool{a, b} {
				if p.Here(now) {
					here[j]++
					continue
				}
				out, err := p.Run(t.Context(), now, task())
				require.NoError(t, err)
				require.Len(t, out, 1)
			}
			require.False(t, a.Here(now) && b.Here(now))
		}
		require.Greater(t, here[0], 10)
		require.Greater(t, here[1], 10)
	})
}

// A gateway that is gone costs a try, and the caller computes what nobody else does.
func TestGatewaysDie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs [3]atomic.Int64
		peers, servers := serve(t, 3, func(_ context.Context, i int, _ *plan.Task) ([]byte, error) {
			runs[i].Add(1)
			return []byte("x"), nil
		})
		p := pool(t, "gateway-0", peers)
		servers[1].Stop()
		here := 0
		for i := range 60 {
			if p.Here(key(i)) {
				continue
			}
			out, err := p.Run(t.Context(), key(i), task())
			if errors.Is(err, plan.ErrHere) {
				here++
				continue
			}
			require.NoError(t, err)
			require.Equal(t, "x", string(out))
		}
		require.Positive(t, here) // where gateway-1 is first and gateway-0 next
		require.Greater(t, runs[2].Load(), int64(15))
		servers[2].Stop()
		for i := range 20 {
			if !p.Here(key(i)) {
				_, err := p.Run(t.Context(), key(i), task())
				require.ErrorIs(t, err, plan.ErrHere)
			}
		}
	})
}

// That a gateway fails is logged when it begins, not for each part.
func TestFailuresLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fails atomic.Bool
		peers, _ := serve(t, 1, func(context.Context, int, *plan.Task) ([]byte, error) {
			if fails.Load() {
				return nil, errors.New("disk on fire")
			}
			return []byte("x"), nil
		})
		var log bytes.Buffer
		p := worker.NewPool("caller", func() []worker.Peer { return peers }, slog.New(slog.NewTextHandler(&log, nil)), prometheus.NewRegistry(),
			grpc.WithTransportCredentials(insecure.NewCredentials()))
		defer p.Close()
		for round := range 2 {
			for _, f := range []bool{true, false} {
				fails.Store(f)
				for i := range 20 {
					if !p.Here(key(i)) {
						_, err := p.Run(t.Context(), key(i), task())
						require.Equal(t, f, err != nil)
					}
				}
			}
			require.Equal(t, round+1, strings.Count(log.String(), "disk on fire"), log.String())
		}
	})
}

// What the engine has to see, and what a worker would understand in another way, is
// told and not tried elsewhere. Other failures are.
func TestOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fails atomic.Pointer[error]
		var runs atomic.Int64
		peers, _ := serve(t, 3, func(context.Context, int, *plan.Task) ([]byte, error) {
			runs.Add(1)
			return nil, *fails.Load()
		})
		p := pool(t, "somebody else", peers)
		for _, c := range []struct {
			fails, want error
			runs        int64
		}{
			{plan.ErrGiveUp, plan.ErrGiveUp, 1},
			{plan.ErrUnlike, plan.ErrUnlike, 1},
			{errors.New("disk on fire"), plan.ErrHere, 2},
		} {
			fails.Store(&c.fails)
			k := key(0)
			for i := 1; p.Here(k); i++ {
				k = key(i)
			}
			runs.Store(0)
			_, err := p.Run(t.Context(), k, task())
			require.ErrorIs(t, err, c.want)
			require.LessOrEqual(t, runs.Load(), c.runs)
		}
	})
}

// What gateways have read for a task goes into the account of the query, whether it came to a result or
// not; what can't have been read, and its result, doesn't count.
func TestCosts(t *testing.T) {
	want := account.Cost{
		Samples: 1, Windows: 2, ObjectGets: 3, ObjectBytes: 4, Pages: 5, PagesCached: 6, PagesMemcached: 7, PartsKept: 8, PartsElsewhere: 9, Workers: 1,
	}
	read := want
	read.Workers, read.PartsElsewhere, read.PartsHere = 0, 0, 9
	twice := account.Cost{
		Samples: 2, Windows: 4, ObjectGets: 6, ObjectBytes: 8, Pages: 10, PagesCached: 12, PagesMemcached: 14, PartsKept: 16, PartsElsewhere: 18, Workers: 2,
	}
	hostile := read
	hostile.ObjectBytes = -1
	large := read
	large.Samples = 1<<50 + 1
	broken := errors.New("broken \xff")
	for name, c := range map[string]struct {
		read   account.Cost
		fails  error
		limits account.Limits
		err    error
		cost   account.Cost
		runs   int64
	}{
		"a result":        {read: read, cost: want, runs: 1},
		"declined":        {read: read, fails: plan.ErrGiveUp, err: plan.ErrGiveUp, cost: want, runs: 1},
		"not understood":  {read: read, fails: fmt.Errorf("%w: 1:5: \xff", plan.ErrUnlike), err: plan.ErrUnlike, cost: want, runs: 1},
		"beyond a limit":  {read: read, fails: fmt.Errorf("reading: %w", account.ErrLimit), err: plan.ErrHere, cost: want, runs: 1},
		"too many points": {read: read, fails: promql.ErrTooManySamples("here"), err: plan.ErrHere, cost: want, runs: 1},
		"nothing read":    {fails: plan.ErrUnlike, err: plan.ErrUnlike, runs: 1},
		"broken":          {read: read, fails: broken, err: plan.ErrHere, cost: twice, runs: 2},
		"hostile":         {read: hostile, err: plan.ErrHere, runs: 2},
		"large":           {read: large, err: plan.ErrHere, runs: 2},
		"hostile error":   {read: hostile, fails: plan.ErrGiveUp, err: plan.ErrGiveUp, runs: 1},
		"within a limit":  {read: read, limits: account.Limits{Samples: 1}, cost: want, runs: 1},
		"large error":     {read: large, fails: broken, limits: account.Limits{Samples: 1}, err: plan.ErrHere, runs: 2},
		"bytes beyond":    {read: read, limits: account.Limits{Read: 3}, err: account.ErrLimit, cost: want, runs: 1},
		"samples beyond":  {read: account.Cost{Samples: 2}, fails: broken, limits: account.Limits{Samples: 1}, err: account.ErrLimit, cost: account.Cost{Samples: 2, Workers: 1}, runs: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var runs atomic.Int64
				peers, _ := serveCosts(t, 2, func(_ context.Context, _ int, x *plan.Task) ([]byte, account.Cost, error) {
					runs.Add(1)
					if x.Left != c.limits {
						t.Errorf("%+v left, want %+v", x.Left, c.limits)
					}
					return []byte("x"), c.read, c.fails
				})
				p := pool(t, "caller", peers)
				k := key(0) // of which the caller is the last in line
				for i := 1; pool(t, "caller", peers[:1]).Here(k) || pool(t, "caller", peers[1:]).Here(k); i++ {
					k = key(i)
				}
				ctx, acc, done := account.NewMemory(0, prometheus.NewRegistry()).Open(t.Context(), "t", c.limits)
				defer done()
				x := task()
				x.Left = acc.Left()
				_, err := p.Run(ctx, k, x)
				if c.err == nil {
					require.NoError(t, err)
				} else {
					require.ErrorIs(t, err, c.err)
				}
				require.Equal(t, c.cost, acc.Cost())
				require.Equal(t, c.runs, runs.Load())
			})
		})
	}
}

// The text of a query may be no UTF-8, in a comment.
func TestTextOfQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := task()
		want.Query = "rate(x[5m]) # \xff"
		peers, _ := serve(t, 1, func(_ context.Context, _ int, got *plan.Task) ([]byte, error) {
			require.Equal(t, want, got)
			return []byte("x"), nil
		})
		p := pool(t, "caller", peers)
		k := key(0)
		for i := 1; p.Here(k); i++ {
			k = key(i)
		}
		_, err := p.Run(t.Context(), k, want)
		require.NoError(t, err)
	})
}

// Whatever a task is, the worker goes on.
func TestBadTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int64
		peers, _ := serve(t, 1, func(_ context.Context, _ int, x *plan.Task) ([]byte, error) {
			runs.Add(1)
			return []byte{x.Query[10]}, nil // a bug
		})
		p := pool(t, "caller", peers)
		k := key(0)
		for i := 1; p.Here(k); i++ {
			k = key(i)
		}
		for _, change := range []func(x *plan.Task){
			func(x *plan.Task) { x.Step = math.MaxInt64 / 1000 },
			func(x *plan.Task) { x.Lookback = math.MaxInt64 },
			func(x *plan.Task) { x.Span = math.MaxInt64 },
			func(x *plan.Task) { x.Blocks[0].Ranges = nil },
		} {
			x := task()
			change(x)
			_, err := p.Run(t.Context(), k, x)
			require.ErrorIs(t, err, plan.ErrHere)
		}
		require.Zero(t, runs.Load())
		x := task()
		x.Query = "x"
		_, err := p.Run(t.Context(), k, x)
		require.ErrorIs(t, err, plan.ErrHere)
		require.Equal(t, int64(1), runs.Load())
		_, err = p.Run(t.Context(), k, task())
		require.NoError(t, err)
	})
}

// A slow gateway is overtaken by the next, and told to stop.
func TestHedge(t *testing.T) {
	var hung, stopped atomic.Int64
	peers, _ := serve(t, 2, func(ctx context.Context, i int, _ *plan.Task) ([]byte, error) {
		if i == 0 {
			hung.Add(1)
			<-ctx.Done()
			stopped.Add(1)
			return nil, context.Cause(ctx)
		}
		return []byte("fast"), nil
	})
	p := pool(t, "caller", peers)
	last := pool(t, "caller", peers[1:]) // is a gateway before the caller, if not the first?
	for i := 0; hung.Load() == 0; i++ {
		if p.Here(key(i)) || last.Here(key(i)) {
			continue
		}
		out, err := p.Run(t.Context(), key(i), task())
		require.NoError(t, err)
		require.Equal(t, "fast", string(out))
	}
	require.Eventually(t, func() bool { return stopped.Load() == hung.Load() }, time.Minute, time.Millisecond)
}

// A part is waited for as long as its caller wants it, however long others took; callers learn
// how long that is.
func TestSlowParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bufconn.Listen(256 << 10)
		g := grpc.NewServer()
		worker.NewServer(func(ctx context.Context, _ *plan.Task) ([]byte, account.Cost, error) {
			select {
			case <-ctx.Done():
				return nil, account.Cost{}, context.Cause(ctx)
			case <-time.After(5 * time.Second):
				return []byte("x"), account.Cost{}, nil
			}
		}, slog.New(slog.DiscardHandler), prometheus.NewRegistry()).Register(g)
		served := make(chan struct{})
		go func() {
			defer close(served)
			_ = g.Serve(l) // ends with Stop
		}()
		newPool := func() *worker.Pool {
			return worker.NewPool("caller", func() []worker.Peer { return []worker.Peer{{ID: "slow", Address: "passthrough:slow"}} },
				slog.New(slog.DiscardHandler), prometheus.NewRegistry(), grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		}
		p, patient := newPool(), newPool()
		k := key(0)
		for i := 1; p.Here(k); i++ {
			k = key(i)
		}
		out, err := patient.Run(t.Context(), k, task())
		require.NoError(t, err)
		require.Equal(t, "x", string(out))
		require.NoError(t, patient.Close())
		late := 0
		for range 20 {
			ctx, cancel := context.WithCancelCause(t.Context())
			taken := errors.New("taken back")
			stop := time.AfterFunc(p.Patience(), func() { cancel(taken) })
			if _, err := p.Run(ctx, k, task()); err != nil {
				require.ErrorIs(t, err, taken)
				late++
			}
			stop.Stop()
			cancel(nil)
		}
		require.Positive(t, late)
		require.Less(t, late, 10)
		require.NoError(t, p.Close())
		g.Stop()
		<-served
	})
}

// A query that is cancelled ends at the worker too.
func TestCancel(t *testing.T) {
	var started, ended atomic.Int64
	peers, _ := serve(t, 2, func(ctx context.Context, _ int, _ *plan.Task) ([]byte, error) {
		started.Add(1)
		<-ctx.Done()
		ended.Add(1)
		return nil, context.Cause(ctx)
	})
	p := pool(t, "caller", peers)
	ctx, cancel := context.WithCancel(t.Context())
	k := key(0)
	for i := 1; p.Here(k); i++ {
		k = key(i)
	}
	done := make(chan error)
	go func() {
		_, err := p.Run(ctx, k, task())
		done <- err
	}()
	require.Eventually(t, func() bool { return started.Load() > 0 }, time.Minute, time.Millisecond)
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	require.Eventually(t, func() bool { return ended.Load() == started.Load() }, time.Minute, time.Millisecond)
}

// A tenant with many parts doesn't hold up one with few, and doesn't get more in
// line than it may.
func TestTenantsTakeTurns(t *testing.T) {
	go1 := make(chan struct{})
	var mu sync.Mutex
	var order []string
	peers, _ := serve(t, 1, func(_ context.Context, _ int, x *plan.Task) ([]byte, error) {
		<-go1
		mu.Lock()
		defer mu.Unlock()
		order = append(order, x.Tenant)
		time.Sleep(time.Millisecond) // longer than it takes to begin one's turn
		return []byte("x"), nil
	})
	p := pool(t, "caller", peers)
	k := key(0)
	for i := 1; p.Here(k); i++ {
		k = key(i)
	}
	ask := func(tenant string, n int, g *sync.WaitGroup) {
		for range n {
			g.Go(func() {
				x := task()
				x.Tenant = tenant
				_, _ = p.Run(t.Context(), k, x) // computed by the caller after a while
			})
		}
		time.Sleep(300 * time.Millisecond) // all are in line
	}
	var g sync.WaitGroup
	ask("many", 100, &g)
	ask("few", 3, &g)
	close(go1)
	g.Wait()
	last := 0
	for i, tenant := range order {
		if tenant == "few" {
			last = i
		}
	}
	require.NotZero(t, last)
	require.Less(t, last, 30, "of %d: %v", len(order), order)
}

// Requests that wait don't take all memory: beyond a bound the caller computes its parts.
func TestBytesThatWait(t *testing.T) {
	release := make(chan struct{})
	s := worker.NewServer(func(context.Context, *plan.Task) ([]byte, account.Cost, error) {
		<-release
		return []byte("x"), account.Cost{}, nil
	}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	heads := []*workpb.HeadList{{Series: []*workpb.HeadSeries{{Chunks: []*workpb.HeadChunk{{Data: make([]byte, 4<<20)}}}}}}
	run := func(tenant string) error {
		_, err := s.Run(t.Context(), &workpb.RunRequest{Version: plan.Version, Tenant: tenant, Span: 1, Heads: heads})
		return err
	}
	const n = 80
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- run(fmt.Sprint(i)) }()
	}
	for range n - 63 { // 63 of somewhat more than 4 MiB are less than 256 MiB
		require.Equal(t, codes.ResourceExhausted, status.Code(<-errs))
	}
	close(release)
	for range 63 {
		require.NoError(t, <-errs)
	}
	require.NoError(t, run("a"))
}

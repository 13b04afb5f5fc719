package cache

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBound(t *testing.T) {
	const n, size = 10, 1000
	c := New[int, int](n * (size + overheadBytes))
	for i := range 3 * n {
		c.Put("", i, i, size)
		if c.Bytes() > c.maxBytes {
			t.Fatalf("%d bytes of %d", c.Bytes(), c.maxBytes)
		}
		if v, _, _ := c.Get(0); v != 0 { // used, so it stays
			t.Fatal("wrong value")
		}
	}
	if _, l, mine := c.Get(0); l != nil || mine {
		t.Error("the most used went")
	}
	if _, l, _ := c.Get(n); l == nil {
		t.Error("the least used stayed")
	}
	c.Put("", 99, 1, 10*n*size)
	if _, l, _ := c.Get(99); l == nil {
		t.Error("a value larger than the cache stayed")
	}
	c.Put("", 29, 29, 2*size)
	c.Remove(29)
	if _, l, _ := c.Get(29); l == nil {
		t.Error("a removed value stayed")
	}
}

// TestShares: of tenants that use the cache, one that reads without end pushes none
// below its equal share; one that uses it no more goes; one alone has it all.
func TestShares(t *testing.T) {
	const size = 1000
	c := New[string, int](40 * (size + overheadBytes))
	put := func(tenant string, i int) {
		c.Put(tenant, fmt.Sprint(tenant, i), i, size)
		if c.Bytes() > c.maxBytes {
			t.Fatalf("%d bytes of %d", c.Bytes(), c.maxBytes)
		}
	}
	there := func(tenant string, n int) (out int) {
		for i := range n {
			if _, ok := c.Peek(fmt.Sprint(tenant, i)); ok {
				out++
			}
		}
		return out
	}
	for i := range 40 {
		put("alone", i)
	}
	if n := there("alone", 40); n != 40 {
		t.Fatalf("%d of 40 of a tenant alone", n)
	}
	for i := range 10 {
		put("small", i)
	}
	for i := range 15 {
		put("medium", i)
	}
	for i := range 1000 {
		put("hostile", i)
		if small, medium := there("small", 10), there("medium", 15); small != 10 || medium < 10 {
			t.Fatalf("after %d of another: %d of 10, %d of 15, when an equal share is 10", i, small, medium)
		}
	}
	if n := there("alone", 40); n != 0 {
		t.Errorf("%d of a tenant that uses it no more", n)
	}
	// Whoever wants more than a share gets just that.
	for i := range 1000 {
		put("medium", i%30)
		put("hostile", i)
		there("small", 10)
	}
	if small, medium := there("small", 10), c.tenants["medium"].bytes/(size+overheadBytes); small != 10 || medium < 14 || medium > 16 {
		t.Errorf("%d of 10, %d of 30 where 15 are fair", small, medium)
	}
	for _, s := range c.tenants {
		for e := s.recent.Front(); e != nil; {
			next := e.Next()
			c.drop(e)
			e = next
		}
	}
	if c.Bytes() != 0 || len(c.tenants)+len(c.heaviest)+c.used.Len()+len(c.entries) != 0 {
		t.Errorf("%d bytes, %d tenants, %d in the heap, %d in use, %d entries of nothing", c.Bytes(), len(c.tenants), len(c.heaviest), c.used.Len(), len(c.entries))
	}
}

func TestZeroKeepsNothing(t *testing.T) {
	c := New[int, int](0)
	_, l, mine := c.Get(1)
	if !mine {
		t.Fatal("not mine")
	}
	c.Finish(t.Context(), "", 1, l, 5, 8, nil)
	if _, l, mine := c.Get(1); l == nil || !mine {
		t.Error("it was kept")
	}
}

func TestOneLoadsForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New[string, int](1 << 20)
		var loads atomic.Int32
		get := func(ctx context.Context) (int, error) {
			for {
				v, l, mine := c.Get("k")
				switch {
				case l == nil:
					return v, nil
				case mine:
					loads.Add(1)
					time.Sleep(time.Second)   // in the bubble: until all others wait
					err := context.Cause(ctx) // as stores give it while a body comes
					c.Finish(ctx, "", "k", l, 7, 10, err)
					return 7, err
				}
				v, again, err := l.Wait(ctx)
				if !again {
					return v, err
				}
			}
		}
		cancelled, cancel := context.WithCancelCause(t.Context())
		limit := errors.New("this query's own limit")
		cancel(limit)
		var g errgroup.Group
		g.Go(func() error {
			// The first loader is cancelled: another goes on in its place.
			if _, err := get(cancelled); !errors.Is(err, limit) {
				t.Errorf("cancelled loader: %v", err)
			}
			return nil
		})
		synctest.Wait() // it loads
		for range 20 {
			g.Go(func() error {
				v, err := get(t.Context())
				if v != 7 {
					t.Errorf("got %d", v)
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if n := loads.Load(); n != 2 {
			t.Errorf("%d loads, want 2", n)
		}
	})
}

func TestErrorIsSharedAndNotKept(t *testing.T) {
	c := New[string, int](1 << 20)
	_, l, _ := c.Get("k")
	_, waiter, mine := c.Get("k")
	if mine {
		t.Fatal("two loaders")
	}
	broken := errors.New("broken")
	c.Finish(t.Context(), "", "k", l, 0, 0, broken)
	if _, again, err := waiter.Wait(t.Context()); again || !errors.Is(err, broken) {
		t.Errorf("again %v, %v", again, err)
	}
	if _, _, mine := c.Get("k"); !mine {
		t.Error("the error was kept")
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := New[int, int](10_000)
	if err := c.Register(reg, "pages"); err != nil {
		t.Fatal(err)
	}
	if err := New[int, int](1).Register(reg, "rows"); err != nil {
		t.Fatal(err)
	}
	c.Put("", 1, 1, 800)
	c.Get(1)
	c.Get(2)
	c.Get(2)
	for _, m := range []string{
		"epimetheus_cache_hits_total", "epimetheus_cache_misses_total", "epimetheus_cache_waits_total", "epimetheus_cache_evictions_total",
		"epimetheus_cache_oversize_total", "epimetheus_cache_bytes", "epimetheus_cache_max_bytes",
	} {
		if n, err := testutil.GatherAndCount(reg, m); n != 2 || err != nil {
			t.Errorf("%s: %d series, %v", m, n, err)
		}
	}
}

package memcached

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bradfitz/gomemcache/memcache"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start makes a client and runs it until the test ends. Unless change says
// otherwise it has all the time it needs: a busy machine is no failure.
func start(t *testing.T, change func(*Client), addresses ...string) *Client {
	t.Helper()
	c, err := New(t.Context(), Options{Addresses: addresses, Registerer: prometheus.NewPedanticRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	c.patience, c.timeout = time.Minute, time.Minute
	if change != nil {
		change(c)
	}
	c.servers = nil
	c.refresh(t.Context()) // with that time-out
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

// stored waits until all that was queued is dealt with.
func stored(t *testing.T, c *Client) {
	t.Helper()
	if err := c.room.Acquire(t.Context(), queueBytes); err != nil {
		t.Fatal(err)
	}
	c.room.Release(queueBytes)
}

func value(n int) []byte { return bytes.Repeat([]byte("a"), n) }

func (c *Client) getOne(t *testing.T, key string) []byte {
	t.Helper()
	return c.Get(t.Context(), Pages, []string{key}, 0)[0]
}

func count(c prometheus.Counter) int { return int(testutil.ToFloat64(c)) }

func TestSetAndGet(t *testing.T) {
	a, _ := testenv.Memcached(t)
	b, _ := testenv.Memcached(t)
	c := start(t, nil, a, b)
	want := map[string][]byte{"large": value(MaxValue), "empty": {}}
	for i := range 300 {
		want["k"+strconv.Itoa(i)] = value(i)
	}
	keys := slices.Sorted(maps.Keys(want))
	for _, k := range keys {
		c.SetWaiting(t.Context(), Pages, k, want[k])
	}
	stored(t, c)
	got := c.Get(t.Context(), Pages, append(keys, "absent"), 1<<20)
	for i, k := range keys {
		if got[i] == nil || !bytes.Equal(got[i], want[k]) {
			t.Errorf("%s: %d bytes, want %d", k, len(got[i]), len(want[k]))
		}
	}
	if got[len(keys)] != nil {
		t.Error("a value that nobody has put")
	}
	if n := count(c.metrics.gets[Pages].hit); n != len(keys) {
		t.Errorf("%d hits, want %d", n, len(keys))
	}
	c.Set(Pages, "too large", value(MaxValue+1))
	c.Set(Results, "not a key", nil)
	if n := count(c.metrics.sets[Pages].oversize); n != 1 {
		t.Errorf("%d oversize", n)
	}
	for _, s := range c.servers {
		if s.isDown() {
			t.Errorf("%s is down", s.address)
		}
	}
}

func TestNilHasNothing(t *testing.T) {
	var c *Client
	c.Set(Pages, "k", nil)
	c.SetWaiting(t.Context(), Pages, "k", nil)
	if c.Get(t.Context(), Pages, []string{"k"}, 0)[0] != nil {
		t.Error("a value")
	}
}

// TestForeignValues: what is not as we put it under that key is a miss.
func TestForeignValues(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	c := start(t, nil, addr)
	mc := memcache.New(addr)
	defer mc.Close()
	ours := frame("ours", value(100))
	flipped := bytes.Clone(ours)
	flipped[50] ^= 1
	for key, v := range map[string][]byte{
		"short": []byte("x"), "text": []byte("a value of another program"), "ours": flipped, "other": ours, "cut": frame("cut", value(100))[:50],
	} {
		if err := mc.Set(&memcache.Item{Key: key, Value: v}); err != nil {
			t.Fatal(err)
		}
		if got := c.getOne(t, key); got != nil {
			t.Errorf("%s: %q", key, got)
		}
	}
	if n := count(c.metrics.gets[Pages].damaged); n != 5 {
		t.Errorf("%d damaged, want 5", n)
	}
	if err := mc.Set(&memcache.Item{Key: "ours", Value: ours}); err != nil {
		t.Fatal(err)
	}
	if got := c.getOne(t, "ours"); !bytes.Equal(got, value(100)) {
		t.Errorf("%q", got)
	}
}

// TestHangingServer: nobody waits for a server that is silent for longer than
// patience (the requests themselves may take an hour here), and after three such
// waits nobody asks it any more, until a probe is answered.
func TestHangingServer(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	x := testenv.StartToxic(t, addr)
	c := start(t, func(c *Client) { c.timeout = time.Hour }, x.Addr)
	c.Set(Pages, "k", value(10))
	stored(t, c)
	if c.getOne(t, "k") == nil {
		t.Fatal("not there")
	}
	c.patience = time.Millisecond
	x.Set(testenv.Hang)
	for range 50 {
		if c.getOne(t, "k") != nil {
			t.Fatal("a value of a server that hangs")
		}
	}
	if late, skipped := count(c.metrics.gets[Pages].late), count(c.metrics.gets[Pages].skipped); late != 3 || skipped != 47 {
		t.Errorf("%d late, %d skipped, want 3 and 47", late, skipped)
	}
	if n := testutil.ToFloat64(c.metrics.gets[Pages].failed); n != 0 {
		t.Errorf("%v failed", n)
	}
	before := x.Requests.Load()
	c.Set(Pages, "k", value(10))
	c.SetWaiting(t.Context(), Pages, "k", value(10))
	if n := count(c.metrics.sets[Pages].skipped); n != 2 || x.Requests.Load() != before {
		t.Errorf("%d puts skipped, %d requests", n, x.Requests.Load()-before)
	}
	s := c.servers[0]
	probe := func() {
		s.mu.Lock()
		s.retry = time.Time{}
		s.mu.Unlock()
		s.probe(c.logger)
	}
	probe()
	if !s.isDown() {
		t.Fatal("up, and hangs")
	}
	x.Set(testenv.Pure)
	c.patience = time.Minute
	for s.isDown() { // a probe has 100 ms
		probe()
	}
	if !bytes.Equal(c.getOne(t, "k"), value(10)) {
		t.Error("not there after the server has recovered")
	}
	// It hangs again: one wait is enough while it is on trial.
	s.mu.Lock()
	s.failures = failuresToDown - 1
	s.mu.Unlock()
	x.Set(testenv.Hang)
	c.patience = time.Millisecond
	c.getOne(t, "k")
	if !s.isDown() {
		t.Error("still up")
	}
}

// TestCallerGone: a server isn't to blame for a query that was cancelled.
func TestCallerGone(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	x := testenv.StartToxic(t, addr)
	x.Set(testenv.Hang)
	c := start(t, func(c *Client) { c.timeout = time.Hour }, x.Addr)
	for range 10 {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if c.Get(ctx, Pages, []string{"k"}, 0)[0] != nil {
			t.Fatal("a value")
		}
	}
	if c.servers[0].isDown() {
		t.Error("down")
	}
}

func TestBadServers(t *testing.T) {
	for _, bad := range []testenv.Toxin{testenv.Garbage, testenv.Damage, testenv.Cut} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			addr, _ := testenv.Memcached(t)
			x := testenv.StartToxic(t, addr)
			c := start(t, nil, x.Addr)
			for i := range 10 {
				c.Set(Pages, "k"+strconv.Itoa(i), value(100<<10))
			}
			stored(t, c)
			if c.getOne(t, "k1") == nil {
				t.Fatal("not there")
			}
			x.Set(bad)
			for i := range 10 {
				if v := c.getOne(t, "k"+strconv.Itoa(i)); v != nil {
					t.Fatalf("%d bytes of a bad server", len(v))
				}
			}
			if bad == testenv.Damage {
				if n := count(c.metrics.gets[Pages].damaged); n != 10 {
					t.Errorf("%d damaged", n)
				}
				return // it is one that works, but for a link that doesn't
			}
			if !c.servers[0].isDown() {
				t.Error("up")
			}
		})
	}
}

func TestServerDies(t *testing.T) {
	a, process := testenv.Memcached(t)
	b, _ := testenv.Memcached(t)
	c := start(t, nil, a, b)
	var keys []string
	for i := range 100 {
		keys = append(keys, "k"+strconv.Itoa(i))
		c.Set(Pages, keys[i], value(10))
	}
	stored(t, c)
	process.Kill()
	hits := 0
	for range 5 {
		hits = 0
		for i, v := range c.Get(t.Context(), Pages, keys, 0) {
			if v != nil {
				hits++
			}
			if there := pick(c.servers, keys[i]).address == b; there != (v != nil) {
				t.Fatalf("%s: there %v, on the server that lives %v", keys[i], v != nil, there)
			}
		}
	}
	if hits < 20 || hits > 80 {
		t.Errorf("%d of 100 keys were on one of two servers", hits)
	}
	if n := testutil.CollectAndCount(c.metrics.getSeconds); n != 1 {
		t.Error("no durations")
	}
}

// TestFullServer: one that has no room says so, and is up.
func TestFullServer(t *testing.T) {
	addr, _ := testenv.Memcached(t, "-M", "-m", "2")
	c := start(t, nil, addr)
	for i := range 100 {
		c.SetWaiting(t.Context(), Pages, "k"+strconv.Itoa(i), value(500<<10))
	}
	stored(t, c)
	if n := count(c.metrics.sets[Pages].failed); n == 0 {
		t.Error("nothing was refused: the test doesn't test what it should")
	}
	if c.servers[0].isDown() {
		t.Error("down")
	}
	if n := count(c.metrics.sets[Pages].stored); n > 0 && c.getOne(t, "k0") == nil {
		t.Error("what was stored is gone")
	}
}

// TestLastValuesAreStored: what is queued when the client is stopped is put.
func TestLastValuesAreStored(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	c, err := New(t.Context(), Options{Addresses: []string{addr}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		c.Set(Pages, "k"+strconv.Itoa(i), value(1000))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if n := count(c.metrics.sets[Pages].stored); n != 100 || c.queuedBytes.Load() != 0 {
		t.Errorf("%d of 100 stored, %d bytes queued", n, c.queuedBytes.Load())
	}
	if c.getOne(t, "k1") != nil {
		t.Error("a value after the end")
	}
	c.Set(Pages, "k", nil)
	if n := count(c.metrics.sets[Pages].skipped); n != 1 {
		t.Errorf("%d skipped after the end", n)
	}
}

// TestQueueIsBounded: sets beyond it are dropped at once, and counted.
func TestQueueIsBounded(t *testing.T) {
	addr, _ := testenv.Memcached(t)
	c, err := New(t.Context(), Options{Addresses: []string{addr}}) // not run: nothing leaves the queue
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		c.Set(Pages, "k"+strconv.Itoa(i), value(1<<19))
	}
	if n := count(c.metrics.sets[Pages].dropped); n < 200-queueBytes>>19 || n > 100 {
		t.Errorf("%d dropped", n)
	}
	if n := c.queuedBytes.Load(); n > queueBytes || n < queueBytes/2 {
		t.Errorf("%d bytes queued", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := count(c.metrics.sets[Pages].dropped)
	c.SetWaiting(ctx, Pages, "k", value(1<<20-512))
	if n := count(c.metrics.sets[Pages].dropped); n != before+1 {
		t.Errorf("%d dropped, want %d", n, before+1)
	}
}

func TestFewKeysMove(t *testing.T) {
	var servers []*server
	for i := range 10 {
		servers = append(servers, newServer(fmt.Sprintf("10.0.0.%d:11211", i), time.Second))
	}
	perServer := map[string]int{}
	for i := range 10_000 {
		key := "epi1:pages:blocks/" + strconv.Itoa(i)
		with, without := pick(servers, key), pick(servers[:9], key)
		perServer[with.address]++
		if with != servers[9] && with != without {
			t.Fatalf("%s moved from %s to %s when another went", key, with.address, without.address)
		}
	}
	for a, n := range perServer {
		if n < 800 || n > 1200 {
			t.Errorf("%s has %d of 10,000 keys", a, n)
		}
	}
}

func TestNamesAreResolvedAgain(t *testing.T) {
	a, _ := testenv.Memcached(t)
	_, port, err := net.SplitHostPort(a)
	if err != nil {
		t.Fatal(err)
	}
	var ips atomic.Pointer[[]string]
	ips.Store(&[]string{"127.0.0.1", "127.0.0.9"})
	c := start(t, func(c *Client) {
		c.lookup = func(context.Context, string) ([]string, error) {
			if p := ips.Load(); p != nil {
				return *p, nil
			}
			return nil, errors.New("no such host")
		}
	}, "memcached.example:"+port)
	addresses := func() string {
		var out []string
		for _, s := range c.servers {
			out = append(out, strings.TrimSuffix(s.address, ":"+port))
		}
		return strings.Join(out, " ")
	}
	if got := addresses(); got != "127.0.0.1 127.0.0.9" {
		t.Fatal(got)
	}
	stays := c.servers[0]
	ips.Store(&[]string{"127.0.0.1", "127.0.0.1"})
	c.refresh(t.Context())
	if got := addresses(); got != "127.0.0.1" || c.servers[0] != stays {
		t.Error(got)
	}
	c.Set(Pages, "k", value(1))
	stored(t, c)
	ips.Store(nil)
	c.refresh(t.Context())
	if got := addresses(); got != "127.0.0.1" || c.getOne(t, "k") == nil {
		t.Errorf("after a failed look-up: %s", got)
	}
}

func TestValidate(t *testing.T) {
	for _, bad := range []string{"", "host", ":11211", "host:", "a b"} {
		if _, err := New(t.Context(), Options{Addresses: []string{bad}}); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, err := New(t.Context(), Options{}); err == nil {
		t.Error("no addresses were taken")
	}
}

// TestDrippingAnswer: the deadline is of the whole answer.
func TestDrippingAnswer(t *testing.T) {
	c := &conn{server: newServer("x:1", time.Second)}
	ours, theirs := net.Pipe()
	c.Conn = ours
	defer ours.Close()
	defer theirs.Close()
	go func() {
		for range 3 {
			if _, err := theirs.Write([]byte("VALUE k 0 1\r\nx\r\n")); err != nil {
				return
			}
		}
	}()
	if err := c.SetDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	c.begun = true // an answer has
	if err := c.SetDeadline(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	var ne net.Error
	if _, err := c.Read(make([]byte, 100)); !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("the deadline was moved: %v", err)
	}
}

// FuzzAnswers: whatever a server says, no value longer than an item gets through
// to who takes memory for it, and cutting the bytes elsewhere changes nothing.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte("VALUE k 0 3 7\r\nabc\r\nEND\r\n"), uint64(1))
	f.Add([]byte("VALUE k 0 4294967295\r\n"), uint64(2))
	f.Add([]byte("VALUE k 0 1048576\r\n"+strings.Repeat("x", 600)), uint64(3))
	f.Add([]byte(strings.Repeat("VALUE k 0 0\r\n\r\n", 70)), uint64(4))
	f.Add([]byte("STORED\r\nERROR\r\n\r\n\n\nVALUE\r\n"+strings.Repeat("x", 600)), uint64(5))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		whole := &conn{}
		want := whole.look(b)
		parts := &conn{}
		rnd := rand.New(rand.NewPCG(seed, 0))
		var got error
		for rest := b; len(rest) > 0 && got == nil; {
			n := 1 + rnd.IntN(len(rest))
			got = parts.look(rest[:n])
			rest = rest[n:]
			if parts.body > MaxValue+frameBytes+2 || len(parts.line) > maxLine {
				t.Fatalf("%d bytes of a value, %d of a line", parts.body, len(parts.line))
			}
		}
		if (want == nil) != (got == nil) {
			t.Fatalf("whole: %v, in parts: %v", want, got)
		}
		if want == nil && (whole.body != parts.body || whole.begun != parts.begun || whole.values != parts.values) {
			t.Fatalf("whole %d %v %d, in parts %d %v %d", whole.body, whole.begun, whole.values, parts.body, parts.begun, parts.values)
		}
	})
}

func FuzzFrame(f *testing.F) {
	f.Add("k", []byte("value"), uint(3))
	f.Fuzz(func(t *testing.T, key string, v []byte, at uint) {
		b := frame(key, v)
		if got, ok := unframe(key, b); !ok || !bytes.Equal(got, v) {
			t.Fatal("not as framed")
		}
		b[at%uint(len(b))] ^= 1
		if _, ok := unframe(key, b); ok {
			t.Fatal("a damaged value was taken")
		}
		if _, ok := unframe(key+"x", frame(key, v)); ok {
			t.Fatal("a value of another key was taken")
		}
	})
}

package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/commitlog"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// crash is what a process leaves that was killed now: a copy of its directory.
func crash(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	copyLog(t, dir, to)
	return to
}

func copyLog(t *testing.T, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // durable meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func logged(dir string) Options { return Options{CommitLog: dir} }

// again is a hello that goes on with the session of c.
func again(h *shippb.Hello, c *client, next, received uint64) *shippb.Hello {
	return &shippb.Hello{
		Version: ship.Version, Tenant: h.Tenant, Source: h.Source, Session: h.Session, NextSeq: next, Process: c.welcome.Process, Received: received,
	}
}

func TestRestartResumes(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x", "y"}, 0, 1000, 1, 1, 1000, 2))
	c.send(c.batch(2, 0, nil, 0, 2000, 3))
	c.await(2, 0)

	after := start(t, logged(crash(t, dir)))
	if after.Process() == e.Process() {
		t.Error("a restart can't be told on the ring")
	}
	if after.Memory() != e.Memory() {
		t.Error("a restart with its log passes for a loss")
	}
	if start(t, logged(t.TempDir())).Memory() == e.Memory() {
		t.Error("a restart without its log passes for none")
	}
	want := map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 3}, `{__name__="y"}`: {1000, 2}}
	if d := cmp.Diff(want, after.inHead("a")); d != "" {
		t.Error(d)
	}
	if n := after.counted("epimetheus_ingester_commitlog_replayed_samples_total"); n != 3 {
		t.Errorf("%v samples counted", n)
	}
	if n := after.counted("epimetheus_ingester_commitlog_replayed_sessions_total"); n != 1 {
		t.Errorf("%v sessions counted", n)
	}
	r := after.mustOpen(again(h, c, 4, 2))
	if w := r.welcome; !w.Resumed || w.Received != 2 || w.Durable != 0 || string(w.Process) != string(c.welcome.Process) {
		t.Fatalf("welcome %v", w)
	}
	r.send(r.batch(3, 0, nil, 1, 3000, 4))
	r.await(3, 0)

	// The flush, in another generation than the batches were received in, makes
	// all of them durable; then the logs are gone.
	flush(t, after)
	r.await(3, 3)
	want[`{__name__="y"}`] = []float64{1000, 2, 3000, 4}
	got, _ := after.inBlocks("a")
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if names, _ := filepath.Glob(filepath.Join(after.opts.CommitLog, "*.log")); len(names) != 0 {
		t.Errorf("left: %v", names)
	}

	// Announcements of generations whose logs are gone still hold, over two restarts.
	r.send(r.batch(4, 0, nil, 0, 4000, 5))
	r.await(4, 3)
	second := start(t, logged(crash(t, after.opts.CommitLog)))
	r2 := second.mustOpen(again(h, r, 5, 4))
	if w := r2.welcome; !w.Resumed || w.Received != 4 || w.Durable != 3 {
		t.Fatalf("welcome %v", w)
	}
	r2.send(r2.batch(5, 2, []string{"z"}, 1, 5000, 6, 2, 5000, 7))
	r2.await(5, 3)
	third := start(t, logged(crash(t, second.opts.CommitLog)))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {4000, 5}, `{__name__="y"}`: {5000, 6}, `{__name__="z"}`: {5000, 7}}, third.inHead("a")); d != "" {
		t.Error(d)
	}
	r3 := third.mustOpen(again(h, r, 6, 5))
	if w := r3.welcome; !w.Resumed || w.Received != 5 || w.Durable != 3 {
		t.Fatalf("welcome %v", w)
	}
	flush(t, third)
	r3.awaitAtLeast(5, 5)
}

// A clean end flushes: nothing is left to be replayed, and what a restarted
// process is asked to go on with it doesn't know.
func TestRestartAfterAnEnd(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	flush(t, e)
	c.await(1, 1)
	after := start(t, logged(crash(t, dir)))
	if n := after.Size().Samples; n != 0 {
		t.Errorf("%d samples", n)
	}
	r := after.mustOpen(again(h, c, 2, 1))
	if r.welcome.Resumed {
		t.Error("resumed")
	}
	r.ends(codes.NotFound)
}

// Where the log has less than a source was told, the session has ended.
func TestLostTailEndsSessions(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	hs := []*shippb.Hello{hello("a"), hello("a")}
	cs := []*client{e.mustOpen(hs[0]), e.mustOpen(hs[1])}
	for i, c := range cs {
		c.send(c.batch(1, 0, []string{fmt.Sprint("m", i)}, 0, 1000, 1))
		c.await(1, 0)
	}
	whole := crash(t, dir)
	path := filepath.Join(whole, "00000001.log")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cs[0].send(cs[0].batch(2, 0, nil, 0, 2000, 1))
	cs[0].await(2, 0)
	lost := crash(t, dir)
	if err := os.WriteFile(filepath.Join(lost, "00000001.log"), append(b, 1, 2, 3), 0o600); err != nil {
		t.Fatal(err)
	}
	after := start(t, logged(lost))
	if d := cmp.Diff(map[string][]float64{`{__name__="m0"}`: {1000, 1}, `{__name__="m1"}`: {1000, 1}}, after.inHead("a")); d != "" {
		t.Error(d)
	}
	// One has lost a batch, and comes again and again; the other has not.
	for range 2 {
		r := after.mustOpen(again(hs[0], cs[0], 3, 2))
		if r.welcome.Resumed {
			t.Error("resumed with a batch missing")
		}
		r.ends(codes.NotFound)
	}
	if r := after.mustOpen(again(hs[1], cs[1], 2, 1)); !r.welcome.Resumed || r.welcome.Received != 1 {
		t.Errorf("welcome %v", r.welcome)
	}
	// A source that has not heard of its batch sends it again.
	after = start(t, logged(whole))
	r := after.mustOpen(again(hs[0], cs[0], 3, 1))
	if !r.welcome.Resumed || r.welcome.Received != 1 {
		t.Errorf("welcome %v", r.welcome)
	}
	r.send(r.batch(2, 0, nil, 0, 2000, 1))
	r.await(2, 0)
}

// limitedDisk has room for some bytes.
type limitedDisk struct {
	room *atomic.Int64
	*os.File
}

func (d limitedDisk) Write(b []byte) (int, error) {
	if d.room.Add(-int64(len(b))) < 0 {
		return 0, errors.New("no space left on device")
	}
	return d.File.Write(b)
}

func limited(room *atomic.Int64) commitlog.Options {
	return commitlog.Options{Create: func(path string) (commitlog.File, error) {
		f, err := os.Create(path)
		return limitedDisk{room, f}, err
	}}
}

// On a full disk ingest goes on, a crash ends the sessions that are not whole, and
// the next generation is logged again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	room := &atomic.Int64{}
	room.Store(1 << 20)
	o := logged(dir)
	o.CommitLogFiles = limited(room)
	e := start(t, o)
	names := []string{"whole", "torn", "new"}
	hs, cs := map[string]*shippb.Hello{}, map[string]*client{}
	for _, n := range names[:2] {
		hs[n] = hello("a")
		cs[n] = e.mustOpen(hs[n])
		cs[n].send(cs[n].batch(1, 0, []string{n}, 0, 1000, 1))
		cs[n].await(1, 0)
	}
	room.Store(0)
	cs["torn"].send(cs["torn"].batch(2, 0, nil, 0, 2000, 2))
	cs["torn"].await(2, 0)
	room.Store(1 << 20)
	hs["new"] = hello("a")
	cs["new"] = e.mustOpen(hs["new"])
	cs["new"].send(cs["new"].batch(1, 0, []string{"new"}, 0, 1000, 1))
	cs["new"].await(1, 0)
	cs["torn"].send(cs["torn"].batch(3, 0, nil, 0, 3000, 2))
	cs["torn"].await(3, 0)
	if got := e.counted("epimetheus_ingester_commitlog_ended_total"); got != 1 || e.counted("epimetheus_ingester_commitlog_open") != 0 {
		t.Errorf("%v logs ended, open %v", got, e.counted("epimetheus_ingester_commitlog_open"))
	}
	if s := e.LogStatus(); !strings.Contains(s, "ended early") {
		t.Errorf("status %q", s)
	}
	resumes := func(dir string, want map[string]uint64) {
		t.Helper()
		after := start(t, logged(dir))
		for n, c := range cs {
			e.receive.mu.Lock()
			s := e.receive.sessions[sessionID{"a", [16]byte(hs[n].Session)}]
			e.receive.mu.Unlock()
			r := after.mustOpen(again(hs[n], c, s.received+1, s.received))
			if received := want[n]; received == 0 && r.welcome.Resumed || received > 0 && (!r.welcome.Resumed || r.welcome.Received != received) {
				t.Errorf("%s: welcome %v, want %d", n, r.welcome, received)
			}
		}
	}
	resumes(crash(t, dir), map[string]uint64{"whole": 1})

	// A generation later, while the one with the hole is not durable.
	frozen := e.head.Rotate()
	for n, seq := range map[string]uint64{"whole": 2, "torn": 4, "new": 2} {
		cs[n].send(cs[n].batch(seq, 0, nil, 0, 4000, 2))
		cs[n].await(seq, 0)
	}
	if e.counted("epimetheus_ingester_commitlog_open") != 1 || e.LogStatus() != "on" {
		t.Error("not open in the next generation")
	}
	resumes(crash(t, dir), map[string]uint64{"whole": 2})

	// Once it is durable all are whole.
	e.durable(durability{generation: frozen.ID()}, nil)
	for n, seq := range map[string]uint64{"whole": 2, "torn": 4, "new": 2} {
		cs[n].await(seq, seq-1)
	}
	resumes(crash(t, dir), map[string]uint64{"whole": 2, "torn": 4, "new": 2})
}

// A log that somebody removed is a hole, not a durable generation.
func TestRemovedLog(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	e.head.Rotate()
	c.send(c.batch(2, 0, nil, 0, 2000, 2))
	c.await(2, 0)
	whole := crash(t, dir)
	if r := start(t, logged(crash(t, dir))).mustOpen(again(h, c, 3, 2)); !r.welcome.Resumed || r.welcome.Received != 2 || r.welcome.Durable != 0 {
		t.Errorf("welcome %v", r.welcome)
	}
	os.Remove(filepath.Join(whole, "00000001.log"))
	after := start(t, logged(whole))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {2000, 2}}, after.inHead("a")); d != "" {
		t.Error(d)
	}
	r := after.mustOpen(again(h, c, 3, 2))
	if r.welcome.Resumed {
		t.Errorf("resumed with a log missing: %v", r.welcome)
	}
	r.ends(codes.NotFound)

	// Another log's sessions are not this one's.
	other := crash(t, dir)
	os.Remove(filepath.Join(other, "state.json"))
	after = start(t, logged(other))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 2}}, after.inHead("a")); d != "" {
		t.Error(d)
	}
	r = after.mustOpen(again(h, c, 3, 2))
	if r.welcome.Resumed {
		t.Errorf("resumed from another log: %v", r.welcome)
	}
	r.ends(codes.NotFound)
}

// All that a batch can hold comes back, and what was refused stays refused.
func TestReplayOfEverything(t *testing.T) {
	dir := t.TempDir()
	o := logged(dir)
	o.Limits = Limits{Series: 4, LabelValueBytes: 20}
	e := start(t, o)
	h := hello("a")
	c := e.mustOpen(h)
	b := c.batch(1, 0, []string{"x", strings.Repeat("refused", 10), "gone", "h", "fh", "too_many"}, 0, 1000, 1, 1, 1000, 1, 2, 1000, 1, 5, 1000, 1)
	h1 := &histogram.Histogram{Count: 5, Sum: 4, ZeroThreshold: 0.1, PositiveSpans: []histogram.Span{{Length: 1}}, PositiveBuckets: []int64{5}}
	cols := ship.Columns{
		Floats:          ship.Floats{Ref: []uint32{0, 1, 2}, T: []int64{1000, 1000, 1000}, ST: []int64{1, 0, 0}, V: []float64{1, 1, 1}},
		Histograms:      ship.Histograms{Ref: []uint32{3}, T: []int64{1000}, H: []*histogram.Histogram{h1}},
		FloatHistograms: ship.FloatHistograms{Ref: []uint32{4, 5, 5}, T: []int64{1000, 1000, 2000}, H: []*histogram.FloatHistogram{h1.ToFloat(nil), h1.ToFloat(nil), h1.ToFloat(nil)}},
	}
	b.Columns = c.encoder.Encode(nil, &cols)
	b.Exemplars = []*shippb.Exemplar{{Ref: 0, T: 1000, Value: math.Float64bits(1), Labels: []string{"trace", "1"}}}
	b.Metadata = []*shippb.Metadata{{Ref: 0, Type: "counter", Help: "what it is"}, {Ref: 3, Family: "family", Type: "histogram", Unit: "seconds"}}
	b.Withdraw = []uint32{2}
	c.send(b)
	c.await(1, 0)
	c.send(c.batch(2, 0, nil, 0, 2000, math.Float64frombits(0x7ff0000000000002), 1, 2000, 2, 5, 2000, 1))
	c.await(2, 0)
	// The last series takes the place of the refused one in the next generation.
	state := func(e *env) string {
		var out strings.Builder
		fmt.Fprintln(&out, e.Size().Series, e.Size().Samples)
		found, err := e.selected("a")
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range found {
			for _, ch := range s.Chunks {
				fmt.Fprintf(&out, "%s %v %x\n", s.Labels, ch.Encoding, ch.Data)
			}
		}
		series, _ := e.head.Exemplars("a", math.MinInt64, math.MaxInt64, [][]*labels.Matcher{{labels.MustNewMatcher(labels.MatchEqual, model.MetricNameLabel, "x")}})
		for _, s := range series {
			fmt.Fprintln(&out, s.Labels, s.Exemplars)
		}
		ms, _ := e.head.Metadata("a", "", 0)
		for _, m := range ms {
			fmt.Fprintln(&out, m)
		}
		return out.String()
	}
	after := start(t, Options{CommitLog: crash(t, dir)}) // with other limits
	if d := cmp.Diff(state(e), state(after)); d != "" {
		t.Error(d)
	}
	if n := after.Size().Series; n != 4 {
		t.Errorf("%d series", n)
	}
	r := after.mustOpen(again(h, c, 3, 2))
	if !r.welcome.Resumed {
		t.Fatal("not resumed")
	}
	r.send(r.batch(3, 0, nil, 2, 3000, 1)) // withdrawn
	r.ends(codes.InvalidArgument)

	// Metadata was announced once; it holds in later generations, and is in their
	// logs.
	flush(t, e)
	c.send(c.batch(3, 0, nil, 0, 3000, 1))
	c.await(3, 2)
	after = start(t, Options{CommitLog: crash(t, dir)})
	of := func(e *env) (out []string) {
		ms, _ := e.head.Metadata("a", "", 0)
		for _, m := range ms {
			out = append(out, fmt.Sprint(m))
		}
		return out
	}
	if d := cmp.Diff(of(e), of(after)); d != "" || len(of(after)) < 2 {
		t.Errorf("metadata %v: %s", of(after), d)
	}
}

// Before the log is replayed nobody gets half an answer.
func TestNotBeforeReplay(t *testing.T) {
	e := &env{t: t, reg: prometheus.NewRegistry()}
	o := logged(t.TempDir())
	o.Member, o.RowWidth = "m", index.Width
	i, err := New(o, nil, promslog.NewNopLogger(), e.reg)
	if err != nil {
		t.Fatal(err)
	}
	defer i.log.Close()
	e.Ingester = i
	e.serve(t)
	if _, err := e.open(hello("a")); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "starting") {
		t.Errorf("stream: %v", err)
	}
	if _, err := e.selected("a"); status.Code(errors.Unwrap(err)) != codes.Unavailable && !strings.Contains(err.Error(), "starting") {
		t.Errorf("select: %v", err)
	}
	if err := i.Replay(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := e.open(hello("a")); err != nil {
		t.Error(err)
	}
}

// The shipped client goes on after a restart, without a batch sent twice that was
// received.
func TestClientOverRestarts(t *testing.T) {
	dir := t.TempDir()
	e := start(t, logged(dir))
	var target atomic.Pointer[env]
	target.Store(e)
	o := ship.SessionOptions{Address: "passthrough:ingester", Tenant: "a", MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond}
	o.DialOptions = append(o.DialOptions, dialer(func() *env { return target.Load() }))
	s := ship.NewSession(o, promslog.NewNopLogger())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	var enc ship.Encoder
	want := []float64{}
	for n := range 60 {
		b := &shippb.Batch{}
		if n == 0 {
			b.Announce = []*shippb.Series{{Ref: 0, Labels: []string{model.MetricNameLabel, "x"}}}
		}
		at := float64(n + 1)
		b.Columns = enc.Encode(nil, &ship.Columns{Floats: ship.Floats{Ref: []uint32{0}, T: []int64{int64(at)}, V: []float64{at}}})
		want = append(want, at, at)
		for {
			if _, ok := s.TrySend(b); ok {
				break
			}
			if err := s.State().Ended; err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if n%20 == 19 {
			// Batches are under way, or not yet acknowledged.
			for s.State().Received < uint64(n-5) {
				time.Sleep(time.Millisecond)
			}
			e.server.Stop()
			e = start(t, logged(crash(t, e.opts.CommitLog)))
			target.Store(e)
		}
	}
	for s.State().Received < 60 {
		if err := s.State().Ended; err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: want}, e.inHead("a")); d != "" {
		t.Error(d)
	}
	flush(t, e)
	for s.State().Durable < 60 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Whenever the process is killed: what a source was told is there.
func TestCrashAnywhere(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	e := start(t, logged(dir))
	const sessions = 4
	var told [sessions]atomic.Uint64 // received
	var durable [sessions]atomic.Uint64
	hs, cs := make([]*shippb.Hello, sessions), make([]*client, sessions)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for n := range sessions {
		hs[n] = hello("a")
		cs[n] = e.mustOpen(hs[n])
		window := make(chan struct{}, 20)
		wg.Go(func() { // sends
			pace := rand.New(rand.NewPCG(seed, uint64(n)+2))
			for seq := uint64(1); ctx.Err() == nil; seq++ {
				var names []string
				if seq == 1 {
					names = []string{fmt.Sprint("s", n), fmt.Sprint("churn", n)}
				}
				b := cs[n].batch(seq, 0, names, 0, float64(seq), float64(seq))
				if seq%10 == 0 {
					// The second ref means something else from here on.
					b.Announce = []*shippb.Series{{Ref: 1, Labels: []string{model.MetricNameLabel, fmt.Sprint("churn", n), "at", fmt.Sprint(seq)}}}
				}
				if seq%10 == 9 {
					b.Withdraw = []uint32{1}
				}
				if err := cs[n].stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Batch{Batch: b}}); err != nil {
					if ctx.Err() == nil && !errors.Is(err, io.EOF) {
						t.Error(err)
					}
					return
				}
				select {
				case window <- struct{}{}:
				case <-ctx.Done():
				}
				if pace.IntN(20) == 0 {
					time.Sleep(time.Duration(pace.IntN(3)) * time.Millisecond)
				}
			}
		})
		wg.Go(func() { // hears
			for received := uint64(0); ; {
				m, err := cs[n].stream.Recv()
				if err != nil {
					return
				}
				a := m.GetAck()
				told[n].Store(a.Received)
				durable[n].Store(a.Durable)
				for ; received < a.Received; received++ {
					select {
					case <-window:
					case <-ctx.Done(): // the last ones may be missing in it
					}
				}
			}
		})
	}
	flushed := make(chan struct{})
	wg.Go(func() {
		defer close(flushed)
		pause := rand.New(rand.NewPCG(seed, 99))
		for ctx.Err() == nil {
			time.Sleep(time.Duration(pause.IntN(60)) * time.Millisecond)
			if err := e.Flush(context.WithoutCancel(ctx)); err != nil {
				t.Error(err)
			}
		}
	})
	resumed := 0
	for round := range 12 {
		time.Sleep(time.Duration(rnd.IntN(80)) * time.Millisecond)
		var was, safe [sessions]uint64
		for n := range sessions {
			safe[n] = durable[n].Load()
			was[n] = told[n].Load()
		}
		after := start(t, logged(crash(t, dir)))
		inBlocks, _ := e.inBlocks("a")
		got := after.inHead("a")
		for n := range sessions {
			name := fmt.Sprintf(`{__name__="s%d"}`, n)
			have := map[float64]bool{}
			for i := 0; i < len(got[name]); i += 2 {
				have[got[name][i]] = true
			}
			for i := 0; i < len(inBlocks[name]); i += 2 {
				have[inBlocks[name][i]] = true
			}
			for seq := uint64(1); seq <= was[n]; seq++ {
				if !have[float64(seq)] {
					t.Errorf("round %d, session %d: batch %d of %d received is missing", round, n, seq, was[n])
					break
				}
			}
			h := again(hs[n], cs[n], was[n]+100, was[n])
			r := after.mustOpen(h)
			if !r.welcome.Resumed {
				continue
			}
			resumed++
			if w := r.welcome; w.Received < was[n] || w.Durable < safe[n] {
				t.Errorf("round %d, session %d: welcome %v, was told %d, %d", round, n, w, was[n], safe[n])
			}
			// What it calls received is there; what it calls durable is in blocks.
			for seq := uint64(1); seq <= r.welcome.Received; seq++ {
				if !have[float64(seq)] {
					t.Errorf("round %d, session %d: batch %d of %d resumed is missing", round, n, seq, r.welcome.Received)
					break
				}
			}
			blocks := map[float64]bool{}
			for i := 0; i < len(inBlocks[name]); i += 2 {
				blocks[inBlocks[name][i]] = true
			}
			for seq := uint64(1); seq <= r.welcome.Durable; seq++ {
				if !blocks[float64(seq)] {
					t.Errorf("round %d, session %d: batch %d of %d durable is in no block", round, n, seq, r.welcome.Durable)
					break
				}
			}
			if seq := r.welcome.Received + 1; rnd.IntN(2) == 0 {
				b := r.batch(seq, 0, nil, 0, float64(seq), float64(seq))
				r.send(b)
				r.awaitAtLeast(seq, 0)
			}
		}
	}
	cancel()
	for _, c := range cs {
		c.cancel()
	}
	wg.Wait()
	<-flushed
	if resumed < 2*sessions { // of 12: how many depends on where the copies were taken
		t.Errorf("%d sessions resumed of %d: there was little to test", resumed, 12*sessions)
	}
}

// What was gathered comes out series by series, each in the order of its coming.
func TestGathering(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	type one struct {
		ref   uint32
		t, st int64
		v     float64
	}
	w := replayWorker{}
	for _, starts := range []bool{false, true, false} { // memory is used again
		var s replayed
		var want []one
		for batch := range 30 {
			var c ship.Floats
			scrape := one{}
			for range rnd.IntN(2000) {
				o := one{uint32(100 + rnd.IntN(5000)), int64(rnd.IntN(100)), 0, rnd.Float64()}
				if rnd.IntN(20) > 0 { // as in a scrape
					o.ref, o.t = scrape.ref+1, scrape.t
				}
				scrape = o
				if starts && batch%5 == 3 {
					o.st = int64(rnd.IntN(3))
					c.ST = append(c.ST, o.st)
				}
				c.Ref, c.T, c.V = append(c.Ref, o.ref), append(c.T, o.t), append(c.V, o.v)
				want = append(want, o)
			}
			w.gather(&s, &c)
		}
		slices.SortStableFunc(want, func(a, b one) int { return int(a.ref) - int(b.ref) })
		var got []one
		var cols ship.Floats
		for k := range s.gathered.bins {
			s.gathered.bins[k].sorted(&cols, uint32(k)<<binBits)
			for i := range cols.Ref {
				o := one{cols.Ref[i], cols.T[i], 0, cols.V[i]}
				if len(cols.ST) > 0 {
					o.st = cols.ST[i]
				}
				got = append(got, o)
			}
		}
		if d := cmp.Diff(want, got, cmp.AllowUnexported(one{})); d != "" {
			t.Error(d)
		}
		if w.release(&s.gathered); w.used != 0 {
			t.Errorf("%d bytes are left", w.used)
		}
	}
}

// A replay gives the head that the batches gave, whatever came with them.
func TestReplayIsTheSame(t *testing.T) {
	dir := t.TempDir()
	o := logged(dir)
	o.Limits.Series = 400
	e := start(t, o)
	rnd := rand.New(rand.NewPCG(3, 4))
	for n := range 5 {
		s := &session{id: sessionID{tenant: "a", id: [16]byte{byte(n)}}, changed: make(chan struct{}, 1)}
		var dec ship.Decoder
		var cols ship.Columns
		var enc ship.Encoder
		alive := map[uint32]bool{}
		for seq := uint64(1); seq <= 60; seq++ {
			b := &shippb.Batch{Seq: seq}
			for ref := range uint32(150) {
				if !alive[ref] && (seq == 1 || rnd.IntN(3) == 0) || rnd.IntN(500) == 0 {
					alive[ref] = true
					b.Announce = append(b.Announce, &shippb.Series{Ref: ref, Labels: []string{model.MetricNameLabel, "m", "x", fmt.Sprint(rnd.IntN(600))}})
				}
			}
			refs := slices.Sorted(maps.Keys(alive))
			c := ship.Columns{}
			for _, ref := range refs {
				c.Floats.Ref, c.Floats.T, c.Floats.V = append(c.Floats.Ref, ref), append(c.Floats.T, int64(seq)*15_000-int64(rnd.IntN(20_000))), append(c.Floats.V, float64(rnd.IntN(10)))
			}
			b.Columns = enc.Encode(nil, &c)
			if seq%7 == 0 {
				for _, ref := range refs {
					if rnd.IntN(10) == 0 {
						b.Withdraw = append(b.Withdraw, ref)
						delete(alive, ref)
					}
				}
			}
			if err := e.receive.apply(s, b, &dec, &cols); err != nil {
				t.Fatal(err)
			}
		}
		for s.logged.Load() < 60 {
			time.Sleep(time.Millisecond)
		}
	}
	after := start(t, logged(crash(t, dir)))
	if d := cmp.Diff(e.inHead("a"), after.inHead("a")); d != "" {
		t.Error(d)
	}
	if a, b := e.Size(), after.Size(); a.Series != b.Series || a.Series != 400 {
		t.Errorf("%d series became %d", a.Series, b.Series)
	}
}

// An old log is flushed at once: it would have been by now.
func TestOldLogIsFlushed(t *testing.T) {
	dir := t.TempDir()
	o := logged(dir)
	e := start(t, o)
	c := e.mustOpen(hello("a"))
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	select {
	case <-start(t, logged(crash(t, dir))).flush.now:
		t.Error("a young log is flushed at once")
	default:
	}
	time.Sleep(1100 * time.Millisecond)
	o = logged(crash(t, dir))
	o.FlushInterval = time.Second
	select {
	case <-start(t, o).flush.now:
	default:
		t.Error("an old log isn't flushed")
	}
}

// What the commit log lacks answers warn of, until the sources say themselves what they
// send again.
func TestLacksAreResent(t *testing.T) {
	dir := t.TempDir()
	room := &atomic.Int64{}
	room.Store(1 << 20)
	o := logged(dir)
	o.CommitLogFiles = limited(room)
	e := start(t, o)
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	whole := crash(t, dir)
	room.Store(0)
	c.send(c.batch(2, 0, nil, 0, 2000, 1))
	c.await(2, 0)
	full := crash(t, dir)

	// Neither a crash nor a torn tail lacks anything by itself.
	path := filepath.Join(whole, "00000001.log")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(b, 100, 0, 0, 0, 1), 0o600); err != nil {
		t.Fatal(err)
	}
	after := start(t, logged(whole))
	if after.receive.resending("a") {
		t.Error("a torn tail passes for a loss")
	}
	// Yet the source may know more.
	after.mustOpen(again(h, c, 3, 2)).ends(codes.NotFound)
	if !after.receive.resending("a") || after.receive.resending("b") || !after.Resending() {
		t.Error("a source is not awaited that was told more than there is")
	}

	after = start(t, logged(full))
	if !after.receive.resending("a") || !after.receive.resending("b") || !after.Resending() {
		t.Error("a log that has ended early lacks nothing")
	}
	after.mustOpen(again(h, c, 3, 2)).ends(codes.NotFound)
	if !after.receive.resending("a") {
		t.Error("not awaited before it has said anything")
	}
	for tenant, source := range map[string][]byte{"a": h.Source, "b": make([]byte, 16)} {
		beat := hello(tenant)
		beat.Source = source
		n := after.mustOpen(beat)
		if err := n.stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Heartbeat{Heartbeat: &shippb.Heartbeat{}}}); err != nil {
			t.Fatal(err)
		}
		n.send(n.batch(1, 0, nil))
		n.await(1, 0) // after the heartbeat
		if after.receive.resending(tenant) {
			t.Errorf("%s is awaited although it has spoken", tenant)
		}
	}
	if !after.receive.resending("c") || after.receive.awaited.of("c", time.Now().Add(awaitFor)) {
		t.Error("a tenant that isn't heard is not awaited, or for ever")
	}
	after.receive.expire(time.Now().Add(2 * awaitFor))
	if after.receive.awaited.heard != nil || len(after.receive.awaited.sources) > 0 {
		t.Error("kept for ever")
	}
}

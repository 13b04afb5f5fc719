package ingest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc/codes"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

// flushHeld flushes what can be, and doesn't try again what is held back.
func flushHeld(t *testing.T, e *env) {
	t.Helper()
	if err := e.flush.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (e *env) notInHead(t *testing.T, tenant string) {
	t.Helper()
	if got := e.inHead(tenant); len(got) > 0 {
		t.Errorf("%s is in the head still: %v", tenant, got)
	}
}

func (e *env) in(t *testing.T, tenant string, blocks int, want ...float64) {
	t.Helper()
	got, n := e.inBlocks(tenant)
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: want}, got); d != "" || n != blocks {
		t.Errorf("%s: %d blocks, want %d: %s", tenant, n, blocks, d)
	}
}

// A tenant whose rows can't be written holds back nobody but itself: not what is
// durable, not memory, not the flushes after.
func TestHeldBack(t *testing.T) {
	e := start(t, logged(t.TempDir()))
	a, b := e.mustOpen(hello("a")), e.mustOpen(hello("b"))
	for _, c := range []*client{a, b} {
		c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
		c.await(1, 0)
	}
	e.hold("a")
	flushHeld(t, e)
	b.await(1, 1)
	e.in(t, "b", 1, 1000, 1)
	if _, n := e.inBlocks("a"); n != 0 {
		t.Error("a has rows")
	}
	if n := e.counted("epimetheus_ingester_held_tenants"); n != 1 {
		t.Errorf("%v tenants are held back", n)
	}
	full := e.Size().Bytes
	e.flush.drop(time.Now().Add(time.Hour))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1}}, e.inHead("a")); d != "" {
		t.Error("what isn't durable must stay readable:", d)
	}
	e.notInHead(t, "b")
	if n := e.Size().Bytes; n >= full || n == 0 {
		t.Errorf("%d bytes, %d before what is durable was dropped", n, full)
	}
	if names, _ := filepath.Glob(filepath.Join(e.opts.CommitLog, "*.log")); len(names) != 1 {
		t.Errorf("logs: %v", names)
	}

	// Trying again changes nothing.
	if left, progress := e.flush.retryOnce(t.Context()); left != 1 || progress {
		t.Errorf("%d left, progress %v", left, progress)
	}

	// The next generation can be written. It isn't durable before the one before.
	for _, c := range []*client{a, b} {
		c.send(c.batch(2, 0, nil, 0, 2000, 2))
	}
	a.await(2, 0)
	b.await(2, 1)
	e.hold()
	flushHeld(t, e)
	b.await(2, 2)
	a.send(a.batch(3, 0, nil, 0, 3000, 3))
	a.await(3, 0)
	e.in(t, "a", 1, 2000, 2)
	if left, progress := e.flush.retryOnce(t.Context()); left != 0 || !progress {
		t.Errorf("%d left, progress %v", left, progress)
	}
	a.await(3, 2)
	e.in(t, "a", 2, 1000, 1, 2000, 2)
	e.flush.drop(time.Now().Add(time.Hour))
	if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {3000, 3}}, e.inHead("a")); d != "" {
		t.Error("after all is durable:", d)
	}
	if names, _ := filepath.Glob(filepath.Join(e.opts.CommitLog, "*.log")); len(names) != 1 {
		t.Errorf("logs: %v", names)
	}
	if n := e.counted("epimetheus_ingester_held_tenants"); n != 0 {
		t.Errorf("%v tenants are held back", n)
	}
}

// All rows of a block may fail while others go through.
func TestHeldBackAlone(t *testing.T) {
	e := start(t, Options{})
	a := e.mustOpen(hello("a"))
	a.send(a.batch(1, 0, []string{"x"}, 0, 1000, 1))
	a.await(1, 0)
	e.hold("a")
	flushHeld(t, e)
	b := e.mustOpen(hello("b"))
	b.send(b.batch(1, 0, []string{"x"}, 0, 1000, 1))
	b.await(1, 0)
	flushHeld(t, e)
	b.await(1, 1)
	e.hold()
	// A sweeper comes first.
	id := e.flush.held[0].id
	if err := e.condemn(id); err != nil {
		t.Fatal(err)
	}
	if left, _ := e.flush.retryOnce(t.Context()); left != 1 {
		t.Error("a condemned block was published")
	}
	if left, _ := e.flush.retryOnce(t.Context()); left != 0 {
		t.Error("not published under another id")
	}
	a.await(1, 1)
	e.in(t, "a", 1, 1000, 1)
	if _, hd, err := e.head.Select(t.Context(), queryAll("a")); err != nil || len(hd.Blocks) != 1 || hd.Blocks[0] == id {
		t.Errorf("the head names %v, %v; %s was condemned", hd.Blocks, err, id)
	}
}

// After a crash the log has what is held back, and nothing of the others.
func TestHeldBackOverRestarts(t *testing.T) {
	on := newStores(t)
	e := startOn(t, logged(t.TempDir()), on)
	ha, hb := hello("a"), hello("b")
	a, b := e.mustOpen(ha), e.mustOpen(hb)
	e.hold("a")
	for seq := range uint64(3) { // three generations
		for _, c := range []*client{a, b} {
			var names []string
			if seq == 0 {
				names = []string{"x"}
			}
			c.send(c.batch(seq+1, 0, names, 0, float64(seq+1)*1000, float64(seq+1)))
		}
		a.await(seq+1, 0)
		b.await(seq+1, seq)
		if seq < 2 {
			flushHeld(t, e)
			b.await(seq+1, seq+1)
		}
	}
	for restart := range 3 {
		after := startOn(t, logged(crash(t, e.opts.CommitLog)), on)
		if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {1000, 1, 2000, 2, 3000, 3}}, after.inHead("a")); d != "" {
			t.Errorf("restart %d: %s", restart, d)
		}
		if restart == 0 {
			if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {3000, 3}}, after.inHead("b")); d != "" {
				t.Error("what is durable is replayed:", d)
			}
		} else {
			after.notInHead(t, "b")
		}
		a2, b2 := after.mustOpen(again(ha, a, 4, 3)), after.mustOpen(again(hb, b, 4, 3))
		if w := a2.welcome; !w.Resumed || w.Received != 3 || w.Durable != 0 {
			t.Fatalf("restart %d: a: welcome %v", restart, w)
		}
		if restart == 0 {
			if w := b2.welcome; !w.Resumed || w.Received != 3 || w.Durable != 2 {
				t.Fatalf("restart %d: b: welcome %v", restart, w)
			}
		} else {
			b2.ends(codes.NotFound) // all of it is durable: the log doesn't know it
		}
		after.hold("a")
		flushHeld(t, after)
		if restart == 0 {
			b2.await(3, 3)
			after.in(t, "b", 3, 1000, 1, 2000, 2, 3000, 3)
		}
		e, a, b = after, a2, b2
	}
	e.hold()
	if left, _ := e.flush.retryOnce(t.Context()); left != 0 {
		t.Errorf("%d blocks left", left)
	}
	a.await(3, 3)
	e.in(t, "a", 1, 1000, 1, 2000, 2, 3000, 3)
	if names, _ := filepath.Glob(filepath.Join(e.opts.CommitLog, "*.log")); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
	after := startOn(t, logged(crash(t, e.opts.CommitLog)), on)
	if n := after.Size().Samples; n != 0 {
		t.Errorf("%d samples are replayed after all is durable", n)
	}
}

// A log that is lost breaks the sessions that need it, over more than one restart.
func TestHeldBackWithoutItsLog(t *testing.T) {
	on := newStores(t)
	e := startOn(t, logged(t.TempDir()), on)
	h := hello("a")
	a := e.mustOpen(h)
	e.hold("a")
	for seq := range uint64(3) {
		var names []string
		if seq == 0 {
			names = []string{"x"}
		}
		a.send(a.batch(seq+1, 0, names, 0, float64(seq+1)*1000, float64(seq+1)))
		a.await(seq+1, 0)
		flushHeld(t, e)
	}
	for restart := range 2 {
		dir := crash(t, e.opts.CommitLog)
		if restart == 0 {
			remove(t, filepath.Join(dir, "00000001.log"))
		}
		after := startOn(t, logged(dir), on)
		if d := cmp.Diff(map[string][]float64{`{__name__="x"}`: {2000, 2, 3000, 3}}, after.inHead("a")); d != "" {
			t.Errorf("restart %d: %s", restart, d)
		}
		if restart == 1 {
			a2 := after.mustOpen(again(h, a, 4, 3))
			if a2.welcome.Resumed {
				t.Errorf("restart %d: a session without its first batch is resumed: %v", restart, a2.welcome)
			}
			a2.ends(codes.NotFound)
		}
		after.hold("a")
		flushHeld(t, after)
		e = after
	}
}

// The logs that are kept for a tenant that is held back are bounded in bytes: the
// oldest go, and after a crash its sources send again. Nobody else's do.
func TestHeldBackLogsAreBounded(t *testing.T) {
	on := newStores(t)
	o := logged(t.TempDir())
	o.CommitLogFiles.MaxHeldBytes = 1000
	e := startOn(t, o, on)
	ha, hb := hello("a"), hello("b")
	a, b := e.mustOpen(ha), e.mustOpen(hb)
	e.hold("a")
	want := map[string][]float64{`{__name__="x"}`: nil}
	const flushes = 12
	for seq := uint64(1); seq <= flushes; seq++ {
		var names []string
		if seq == 1 {
			names = []string{"x"}
		}
		for _, c := range []*client{a, b} {
			c.send(c.batch(seq, 0, names, 0, float64(seq)*1000, float64(seq)))
		}
		a.await(seq, 0)
		b.awaitAtLeast(seq, 0)
		flushHeld(t, e)
		want[`{__name__="x"}`] = append(want[`{__name__="x"}`], float64(seq)*1000, float64(seq))
	}
	bytes, logs := int64(0), 0
	for _, name := range files(t, e.opts.CommitLog) {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		bytes += info.Size()
		logs++
	}
	if logs == 0 || logs >= flushes || bytes > 1000 {
		t.Errorf("%d logs of %d bytes are kept", logs, bytes)
	}
	if n := e.counted("epimetheus_ingester_commitlog_let_go_total"); n != float64(flushes-logs) {
		t.Errorf("%v logs were let go, %d are there", n, logs)
	}
	e.note()
	if cs := e.Health().Conditions(); !slices.ContainsFunc(cs, func(c health.Condition) bool {
		return strings.Contains(c.What, fmt.Sprintf("the commit logs of %d flushes were removed", flushes-logs))
	}) {
		t.Errorf("health says %v", cs)
	}
	if d := cmp.Diff(want, e.inHead("a")); d != "" {
		t.Error(d)
	}
	b.awaitAtLeast(flushes, flushes)

	after := startOn(t, logged(crash(t, e.opts.CommitLog)), on)
	after.hold("a")
	a2 := after.mustOpen(again(ha, a, flushes+1, flushes))
	if a2.welcome.Resumed {
		t.Errorf("a session without its first batches is resumed: %v", a2.welcome)
	}
	a2.ends(codes.NotFound)

	// When all is written the logs may go in peace.
	e.hold()
	if !e.flush.retryUntil(t.Context(), time.Millisecond) {
		t.Error("something is held back")
	}
	e.note()
	if n := e.counted("epimetheus_ingester_commitlog_held_bytes"); n != 0 || e.log.LetGo() != 0 || len(files(t, e.opts.CommitLog)) > 0 {
		t.Errorf("%v bytes, %d let go, files %v", n, e.log.LetGo(), files(t, e.opts.CommitLog))
	}
	if d := cmp.Diff([]health.Condition(nil), e.Health().Conditions()); d != "" {
		t.Error(d)
	}
	e.in(t, "a", flushes, want[`{__name__="x"}`]...)
}

// files are the logs of a directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// manyTenants is a Publisher that can't write the rows of some tenants.
type manyTenants struct {
	held      map[string]bool
	published []string
}

func (p *manyTenants) rows(tenants []string, published bool) error {
	e := &history.RowsError{Published: published, Tenants: map[string]error{}}
	for _, t := range tenants {
		if p.held[t] {
			e.Tenants[t] = historytest.ErrInjected
		} else {
			p.published = append(p.published, t)
		}
	}
	if len(e.Tenants) == 0 {
		return nil
	}
	e.Published = published || len(e.Tenants) < len(tenants)
	return fmt.Errorf("rows: %w", e)
}

func (p *manyTenants) Publish(_ context.Context, _ ulid.ULID, _ []byte, summary *chunkfmt.Summary) error {
	var all []string
	for _, t := range summary.Tenants {
		all = append(all, t.Tenant)
	}
	return p.rows(all, false)
}

func (p *manyTenants) PublishRows(_ context.Context, _ ulid.ULID, _ *chunkfmt.Summary, tenants []string) error {
	return p.rows(tenants, true)
}

func fill(i *Ingester, tenant string, series int) {
	var refs head.Refs
	cols := &ship.Columns{}
	for n := range series {
		refs.Announce(uint32(n), labels.FromStrings(model.MetricNameLabel, fmt.Sprint("m", n)), false)
		cols.Floats.Ref, cols.Floats.T, cols.Floats.V = append(cols.Floats.Ref, uint32(n)), append(cols.Floats.T, 1), append(cols.Floats.V, 1)
	}
	i.head.Append(tenant, &refs, &head.Batch{Columns: cols})
}

// Who leaves tries what is held back once more, and says what it had to leave.
func TestLeaveWhileHeldBack(t *testing.T) {
	for _, heals := range []bool{false, true} {
		t.Run(fmt.Sprintf("heals: %v", heals), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &manyTenants{held: map[string]bool{"a": true}}
				i, err := New(Options{Member: "m", RowWidth: index.Width, FinalFlush: 20 * time.Second}, p, promslog.NewNopLogger(), prometheus.NewRegistry())
				if err != nil {
					t.Fatal(err)
				}
				fill(i, "a", 1)
				fill(i, "b", 1)
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- i.Run(ctx) }()
				time.Sleep(time.Hour) // pauses have grown
				synctest.Wait()
				if d := cmp.Diff([]string{"b"}, p.published); d != "" {
					t.Fatal(d)
				}
				if c := i.Health().Conditions(); len(c) != 1 || !strings.Contains(c[0].What, `"a"`) {
					t.Errorf("health: %v", c)
				}
				if heals {
					p.held = nil
				}
				began := time.Now()
				cancel()
				err = <-ended
				switch {
				case heals && (err != nil || !cmp.Equal(p.published, []string{"b", "a"})):
					t.Errorf("published %v, %v", p.published, err)
				case !heals && (!errors.Is(err, historytest.ErrInjected) || !strings.Contains(err.Error(), `"a"`)):
					t.Errorf("nothing is said of a: %v", err)
				}
				if d := time.Since(began); d > 21*time.Second {
					t.Errorf("it took %s", d)
				}
			})
		})
	}
}

// What is held back is bounded, and the bound is that of the tenants concerned.
func TestHeldBackIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &manyTenants{held: map[string]bool{"a": true, "small": true}}
		i, err := New(Options{Member: "m", RowWidth: index.Width, FlushBytes: 100_000, MaxBytes: 400_000}, p, promslog.NewNopLogger(), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		waits := func(tenant string) bool {
			i.note()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return i.admit(ctx, tenant) != nil
		}
		flush := func() {
			if err := i.flush.flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			i.flush.drop(time.Now().Add(time.Hour))
		}
		fill(i, "small", 1)
		n := 0
		for ; !waits("a"); n++ {
			fill(i, "a", 50)
			fill(i, "b", 50)
			flush()
		}
		if size := i.Size().Bytes; n < 2 || size > 120_000 {
			t.Errorf("%d bytes are held back after %d flushes", size, n)
		}
		if waits("b") || waits("small") {
			t.Error("others wait too")
		}
		p.held = nil
		if left, _ := i.flush.retryOnce(t.Context()); left != 0 {
			t.Errorf("%d left", left)
		}
		i.flush.drop(time.Now().Add(time.Hour))
		if waits("a") {
			t.Error("it waits although nothing is held back")
		}
		if size := i.Size().Bytes; size != 0 {
			t.Errorf("%d bytes left", size)
		}

		// Not without end either, however little it is.
		p.held = map[string]bool{"small": true}
		for n = 0; n < 100 && !waits("small"); n++ {
			fill(i, "small", 1)
			flush()
		}
		if n != heldGenerations {
			t.Errorf("it waits after %d generations", n)
		}
	})
}

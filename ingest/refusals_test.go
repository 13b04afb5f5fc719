package ingest

import (
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"google.golang.org/grpc/codes"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// What was refused is told with the answer that makes the batch received, or before
// it, though acknowledgements are lost with their stream and the process with its
// memory.
func TestRefusalsOutliveStreams(t *testing.T) {
	dir := t.TempDir()
	e := start(t, Options{CommitLog: dir, Limits: Limits{Series: 1}})
	h := hello("a")
	c := e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.await(1, 0)
	c.send(c.batch(2, 1, []string{"y"}, 1, 1000, 1))
	c.send(c.batch(3, 0, nil, 0, 2000, 1))
	c.await(3, 0) // but as far as the source knows, the stream has broken before that
	flush(t, e)
	c.cancel()

	tells := func(e *env, durable uint64) {
		t.Helper()
		c := e.mustOpen(again(h, c, 4, 1))
		if w := c.welcome; !w.Resumed || w.Received != 1 || w.Durable > 1 {
			t.Errorf("welcome %v although a refusal of batch 2 was not told", w)
		}
		for _, seq := range []uint64{2, 3} { // as the welcome has it
			c.send(c.batch(seq, 0, nil, 0, 9000, 1))
		}
		c.await(3, durable)
		if len(c.refused) != 1 || c.refused[0].Seq != 2 || c.refused[0].Reason != "series_limit" || c.refused[0].Samples != 1 {
			t.Errorf("refused %v", c.refused)
		}
		c.cancel()
		// Who has been told as received what was refused has been told of that too.
		c = e.mustOpen(again(h, c, 4, 3))
		if w := c.welcome; !w.Resumed || w.Received != 3 || w.Durable != durable {
			t.Errorf("welcome %v", w)
		}
		c.send(c.batch(4, 0, nil, 0, 3000, 1))
		if c.await(4, durable); len(c.refused) != 0 {
			t.Errorf("told again: %v", c.refused)
		}
	}
	tells(e, 3)

	// Killed, and started again.
	dir = t.TempDir()
	e = start(t, Options{CommitLog: dir, Limits: Limits{Series: 1}})
	c = e.mustOpen(h)
	c.send(c.batch(1, 0, []string{"x"}, 0, 1000, 1))
	c.send(c.batch(2, 1, []string{"y"}, 1, 1000, 1))
	c.send(c.batch(3, 0, nil, 0, 2000, 1))
	c.await(3, 0)
	tells(start(t, Options{CommitLog: crash(t, dir), Limits: Limits{Series: 1}}), 0)

	// What can't be told any more: another session.
	flush(t, e)
	c.send(c.batch(4, 0, nil, 0, 3000, 1))
	c.await(4, 3)
	if r := start(t, logged(crash(t, dir))).mustOpen(again(h, c, 5, 2)); r.welcome.Resumed {
		t.Errorf("welcome %v although the log is gone that knew of refusals", r.welcome)
	} else {
		r.ends(codes.NotFound)
	}
}

// Refusals are bounded for a source that doesn't read of them.
func TestRefusalsAreBounded(t *testing.T) {
	e := start(t, Options{Limits: Limits{LabelValueBytes: 1}})
	h := hello("a")
	c := e.mustOpen(h)
	long := strings.Repeat("ü", 500_000)
	b := c.batch(1, 0, nil)
	b.Announce = []*shippb.Series{{Ref: 0, Labels: []string{model.MetricNameLabel, long}}}
	c.send(b)
	n := uint64(1)
	for range 3 * maxRefused { // more than fit: it waits until they are told
		n++
		c.send(c.batch(n, 0, nil, 0, 1000, 1))
	}
	c.awaitAtLeast(n, 0)
	if len(c.refused) != 3*maxRefused {
		t.Errorf("%d refusals were told", len(c.refused))
	}
	last := uint64(0)
	for _, r := range c.refused {
		if r.Seq <= last || r.Samples != 1 || len(r.Example) > 2*maxExample {
			t.Fatalf("after batch %d: %v", last, r)
		}
		last = r.Seq
	}
	c.cancel()
	if w := e.mustOpen(again(h, c, n+1, n)).welcome; !w.Resumed || w.Received != n {
		t.Errorf("welcome %v", w)
	}
	c = e.mustOpen(again(h, c, n+1, 2))
	if c.welcome.Resumed {
		t.Errorf("welcome %v although refusals are forgotten", c.welcome)
	}
	c.ends(codes.NotFound)
}

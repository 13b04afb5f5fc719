package ingest

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// However many weeks a tenant's samples are in, a flush writes a bounded number of rows.
func TestWindowsAreBounded(t *testing.T) {
	e := start(t, Options{})
	c := e.mustOpen(hello("a"))
	weeks := func(seq uint64, from, n int, ahead int64) *shippb.Batch {
		var cols ship.Columns
		for i := range n {
			cols.Floats.Ref, cols.Floats.T, cols.Floats.V = append(cols.Floats.Ref, 0), append(cols.Floats.T, int64(from+i)*index.Width+ahead), append(cols.Floats.V, 1)
		}
		b := c.batch(seq, 0, nil)
		b.Columns = c.encoder.Encode(nil, &cols)
		return b
	}
	const first = -1_000_000
	b := weeks(1, first, 100_000, 0)
	b.Announce = []*shippb.Series{{Ref: 0, Labels: []string{"__name__", "x"}}}
	b.Exemplars = []*shippb.Exemplar{{Ref: 0, T: math.MinInt64, Labels: []string{"trace", "1"}}}
	c.send(b)
	c.await(1, 0)
	if len(c.refused) != 1 || c.refused[0].Reason != "too_many_weeks" || c.refused[0].Samples != 100_000-maxWindows+1 {
		t.Fatalf("refused %v", c.refused)
	}
	// What is in these weeks is taken, and others in the next generation. Another
	// tenant has its own.
	c.send(weeks(2, first, maxWindows, -1))
	c.await(2, 0)
	c.send(weeks(3, 0, 1, 1000))
	other := e.mustOpen(hello("b"))
	other.send(other.batch(1, 0, []string{"y"}, 0, 1000, 1))
	other.await(1, 0)
	s := &session{id: sessionID{tenant: "a"}, changed: make(chan struct{}, 1)}
	if err := e.receive.apply(s, weeks(1, 1, 1, 1000), &ship.Decoder{}, &ship.Columns{}); !errors.Is(err, errWindows) {
		t.Errorf("one week more: %v", err)
	}
	flush(t, e)
	c.awaitAtLeast(3, 2)
	if len(c.refused) != 1 {
		t.Errorf("refused %v", c.refused)
	}
	rows, err := e.index.Blocks(t.Context(), "a", math.MinInt64, time.Now().UnixMilli(), true)
	if err != nil || len(rows) > maxWindows+1 {
		t.Errorf("%d rows, %v", len(rows), err)
	}
}

package head

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

// Metadata counts as memory, all of it, as long as a generation has it, and is bounded.
func TestMetadataMemory(t *testing.T) {
	h := New(0)
	var refs Refs
	refs.Announce(0, labels.FromStrings("__name__", "x"), false)
	add := func(ms ...Metadata) int {
		return h.Append("a", &refs, &Batch{Columns: &ship.Columns{}, Metadata: ms}).Refused[ReasonMetadataLimit].Samples
	}
	const n, size = 100, 10_000
	long := func(i int) string { return fmt.Sprint(i, strings.Repeat("l", size)) }
	grows := func(what string, least int64, fn func()) {
		t.Helper()
		before := h.Size().Bytes
		if fn(); h.Size().Bytes-before < least || h.Size().Bytes-before > least*11/10 {
			t.Errorf("%s: %d bytes more, want %d", what, h.Size().Bytes-before, least)
		}
	}
	grows("names of families", n*size, func() {
		for i := range n {
			add(Metadata{Ref: 0, Family: long(i), Metadata: metadata.Metadata{Help: "h"}})
		}
	})
	grows("help", n*size, func() {
		for i := range n {
			add(Metadata{Ref: 0, Family: fmt.Sprint(i), Metadata: metadata.Metadata{Help: long(i)}})
		}
	})
	grows("the same again", 0, func() {
		add(Metadata{Ref: 0, Family: fmt.Sprint(n - 1), Metadata: metadata.Metadata{Help: long(n - 1)}})
	})

	// The next generation has it too: it is the same, counts once, and until both are gone.
	first := h.Rotate()
	grows("inherited", 0, func() { add() })
	grows("dropped", 0, func() { h.Drop(first, nil) })
	if all, _ := h.Metadata("a", "", 0); len(all) != 2*n {
		t.Errorf("%d entries left", len(all))
	}

	refused := 0
	for i := range 2 * maxMetadataBytes / size {
		refused += add(Metadata{Ref: 0, Family: fmt.Sprint("more", i), Metadata: metadata.Metadata{Help: long(i)}})
	}
	if s := h.Size().Bytes; refused == 0 || s < maxMetadataBytes || s > maxMetadataBytes*11/10 {
		t.Errorf("%d refused, %d bytes", refused, s)
	}
	h.Rotate()
	second := h.Rotate() // in which the tenant had nothing
	h.Drop(h.readable()[0], nil)
	h.Drop(second, nil)
	if s := h.Size().Bytes; s != 0 {
		t.Errorf("%d bytes are left of nothing", s)
	}
}

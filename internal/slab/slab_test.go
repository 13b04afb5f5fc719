package slab_test

import (
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/internal/slab"
)

// Pieces don't overlap, and what was given back comes again.
func TestTake(t *testing.T) {
	var s slab.Slab[int]
	for round := range 3 {
		var all [][]int
		for i := range 200 {
			p := s.Take(i % 37)
			if len(p) != i%37 || cap(p) != len(p) {
				t.Fatalf("%d elements and room for %d, want %d", len(p), cap(p), i%37)
			}
			for k := range p {
				p[k] = i
			}
			all = append(all, p)
		}
		for i, p := range all {
			for _, x := range p {
				if x != i {
					t.Fatalf("piece %d has an element of piece %d", i, x)
				}
			}
		}
		size := s.Size()
		s.Reset(size)
		if round > 0 && s.Take(1) == nil || s.Size() != size {
			t.Errorf("memory of %d elements, was of %d", s.Size(), size)
		}
		s.Reset(size)
	}
	if s.Reset(10); s.Size() != 0 {
		t.Errorf("it keeps %d elements", s.Size())
	}
}

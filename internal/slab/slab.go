// Package slab gives out memory in pieces of larger ones, which are used again.
package slab

// Slab gives out slices, which are good until Reset. The zero value is ready. Not safe for concurrent use.
type Slab[T any] struct {
	blocks [][]T // full ones, and the one in use
	spare  [][]T
	size   int // of all, elements
}

// maxBlock bounds how much more memory is taken than is asked for, in elements.
const maxBlock = 1 << 14

// Take gives n elements, which may have any value, and no room behind them.
func (s *Slab[T]) Take(n int) []T {
	k := len(s.blocks) - 1
	if k < 0 || cap(s.blocks[k])-len(s.blocks[k]) < n {
		if m := len(s.spare); m > 0 && cap(s.spare[m-1]) >= n {
			s.blocks, s.spare = append(s.blocks, s.spare[m-1][:0]), s.spare[:m-1]
		} else {
			b := make([]T, 0, max(n, min(s.size, maxBlock)))
			s.size += cap(b)
			s.blocks = append(s.blocks, b)
		}
		k = len(s.blocks) - 1
	}
	b := s.blocks[k]
	s.blocks[k] = b[:len(b)+n]
	return b[len(b) : len(b)+n : len(b)+n]
}

// Size is how many elements it has memory for.
func (s *Slab[T]) Size() int { return s.size }

// Reset says that what was given out isn't used any more. The memory is kept if it is of no more than most elements.
func (s *Slab[T]) Reset(most int) {
	if s.size > most {
		*s = Slab[T]{}
		return
	}
	s.spare, s.blocks = append(s.spare, s.blocks...), s.blocks[:0]
}

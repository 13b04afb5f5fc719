package head

import "iter"

// hashIndex finds the refs of series by the hash of their labels: an open hash
// table with linear probing, of 8 bytes a slot. A map of Go takes more than twice
// the memory. Nothing is ever removed. The zero value is empty.
type hashIndex struct {
	slots []uint64 // upper half of the hash, ref + 1; 0 is an empty slot
	n     int
}

// add adds a ref under a hash, under which there may be others.
func (x *hashIndex) add(hash uint64, ref uint32) {
	if 4*(x.n+1) > 3*len(x.slots) {
		old := x.slots
		x.slots = make([]uint64, max(8, 2*len(old)))
		for _, s := range old {
			if s != 0 {
				x.put(s)
			}
		}
	}
	x.put(hash&^(1<<32-1) | uint64(ref+1))
	x.n++
}

func (x *hashIndex) put(slot uint64) {
	mask := uint64(len(x.slots) - 1)
	i := slot >> 32 & mask
	for x.slots[i] != 0 {
		i = (i + 1) & mask
	}
	x.slots[i] = slot
}

// candidates are the refs added under the hash, and perhaps some others.
func (x *hashIndex) candidates(hash uint64) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if len(x.slots) == 0 {
			return
		}
		mask := uint64(len(x.slots) - 1)
		for i := hash >> 32 & mask; x.slots[i] != 0; i = (i + 1) & mask {
			if x.slots[i]>>32 == hash>>32 && !yield(uint32(x.slots[i])-1) {
				return
			}
		}
	}
}

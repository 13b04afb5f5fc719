package tail

import (
	"cmp"
	"fmt"
)

// Position is a place in a source's WAL: the end of a whole record, or the start
// of a file. Positions of one source are ordered by Compare.
type Position struct {
	// Epoch counts how often the WAL was found to be another than the one read
	// before (rewritten, wiped, restored).
	Epoch uint32 `json:"epoch"`
	// InCheckpoint says that the position lies in WAL checkpoint number
	// Checkpoint, not in the log itself. Segment and Offset then name a file in
	// that checkpoint's folder.
	InCheckpoint bool  `json:"in_checkpoint,omitempty"`
	Checkpoint   int   `json:"checkpoint,omitempty"`
	Segment      int   `json:"segment"`
	Offset       int64 `json:"offset"` // bytes from the start of the file
}

// Compare returns -1, 0 or 1 where p lies before, at, or behind q. A WAL
// checkpoint N stands for the segments up to N, so it lies between N and N+1.
func (p Position) Compare(q Position) int {
	pMajor, pMinor := p.major()
	qMajor, qMinor := q.major()
	return cmp.Or(
		cmp.Compare(p.Epoch, q.Epoch),
		cmp.Compare(pMajor, qMajor),
		cmp.Compare(pMinor, qMinor),
		cmp.Compare(p.Segment, q.Segment),
		cmp.Compare(p.Offset, q.Offset),
	)
}

// Before says whether p lies before q.
func (p Position) Before(q Position) bool { return p.Compare(q) < 0 }

// SameFile says whether p and q lie in one file.
func (p Position) SameFile(q Position) bool {
	p.Offset, q.Offset = 0, 0
	return p == q
}

func (p Position) major() (segment, inCheckpoint int) {
	if p.InCheckpoint {
		return p.Checkpoint, 1
	}
	return p.Segment, 0
}

func (p Position) String() string {
	if p.InCheckpoint {
		return fmt.Sprintf("%d/checkpoint.%08d/%08d/%d", p.Epoch, p.Checkpoint, p.Segment, p.Offset)
	}
	return fmt.Sprintf("%d/%08d/%d", p.Epoch, p.Segment, p.Offset)
}

// Package bug names mistakes that the simulation (e2e/sim) puts back into the
// code, to show that it would catch them, where they can't be put back from
// outside. No other program sets one.
package bug

import "sync/atomic"

// Bug is a mistake.
type Bug int32

// Mistakes of a sidecar, then of an ingester, then of a compactor.
const (
	None Bug = iota
	// LatestRing chooses the series to be sent again by the ring of now, not by
	// the one that the range was split by.
	LatestRing
	// ResentIsDone has the ledger forget what was sent again, before it is durable.
	ResentIsDone
	// SameFile takes a file that was written anew for the one that was read.
	SameFile
	// HoleInLog goes on with a commit log after a write that failed, and neither a
	// replay nor a session that goes on takes notice of batches that are missing.
	HoleInLog
	// HeldIsDurable tells the sessions of a tenant that is held back what is durable
	// by the newest generation alone.
	HeldIsDurable
	// RemovedEarly removes the rows that a compaction replaces before it writes those
	// of its outputs.
	RemovedEarly
)

var present atomic.Int32 //nolint:gochecknoglobals // so that no other code has to know of it

// Is says whether the mistake is to be made.
func Is(b Bug) bool { return Bug(present.Load()) == b }

// Set makes a mistake be made from now on, and undo ends that.
func Set(b Bug) (undo func()) {
	old := present.Swap(int32(b))
	return func() { present.Store(old) }
}

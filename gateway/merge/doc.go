// Package merge puts heads and history together into one storage.Querier, as
// Prometheus's engine wants it.
//
// A query sees one snapshot: each selector asks the heads first, and the index
// rows are read after the first heads have answered. A generation of a head
// stays readable until its block is visible to all, so that nothing falls
// between the two; what both have is merged by chunkfmt.Merge, so that nothing
// is doubled. Heads name the blocks that their readable generations went to;
// rows are refreshed until these are seen.
//
// An ingester that does not answer, or one that vanished, makes a warning, not
// an error. History that can't be read is an error.
package merge

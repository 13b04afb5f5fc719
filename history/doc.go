// Package history is where blocks live: it publishes them, finds them through the
// index, and fetches the pages of them that a query needs.
//
// Writing. Publish puts the object, then its work row, then its block rows, then
// its guard row; when it returns nil the block is durable: in the object store and
// found by every reader that looks from then on. It may be repeated at any point.
//
// Reading. A query takes one Snapshot: the list of blocks that are visible for a
// tenant and a time. All its selectors read from that list and so see the same
// data. Snapshots are cheap: the rows of a tenant and time are kept for half of
// the visibility delay at most, and read anew when the caller names a block that
// is not among them. From a snapshot, Select gives series with their samples,
// Series, LabelNames, LabelValues and Metadata read directories, label pages and
// series pages only, Exemplars also pages of exemplars.
//
// Pages are fetched from memcached, if there is one, else by ranged GETs, near ones
// together, several at a time, each by one caller for all that want it, and kept in
// memory. What is new is written ahead into memcached. Every page is verified
// by its checksum. What can't be read is an error that names object, page and
// offset, never a gap; an object that is absent makes a snapshot look at the rows
// once more first, for compaction may have replaced it.
//
// Package object keeps the bytes, package index the rows, chunkfmt knows what is
// in them. Merging several blocks' samples, and those of heads, is left to the
// caller (chunkfmt.Merge).
package history

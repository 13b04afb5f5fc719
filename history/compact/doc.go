// Package compact makes few large blocks of many small ones, and removes what is
// no longer needed.
//
// Levels. What was flushed in two hours becomes blocks of the first level, a day
// of these blocks of the second, a week of those blocks of the third. All tenants
// share blocks, but for large ones, which get their own. A block that would pass
// its size goes on in another one.
//
// Blocks of a day or more get summaries of windows (docs/formats/rollup.md) beside
// the samples: those of the blocks that are merged, where one alone has a series, or
// made of what was merged. They are cut on bounds of windows, but know
// nothing of late samples in other blocks: who reads them looks for those.
//
// Merging. Blocks are read front to back, side by side. What they have of each
// series is put together (chunkfmt.Merge decides where they disagree) and written
// into files, cut by windows of time. A merge holds one series with its samples,
// and of each block a few pages and ranges, whatever their size. A block that
// can't be read is set aside: its rows stay, and queries go on to name it.
//
// Jobs. A compaction is a row in one of a fixed number of slots, changed by
// conditional writes only. Who merges holds a lease on its slot; from the commit
// on, the row says all that is left to do, and anybody may carry on: publish the
// outputs, wait, remove the sources' rows, wait, remove their objects. Each step
// may be repeated, by several at the same time, and by one that is hours late. A job
// that waits for block rows of a tenant that can't be written is parked elsewhere, so
// that its slot is free.
// The order of writing, and why it is safe, is in docs/formats/index.md and
// docs/decisions/0008-compaction.md; TestSimulation tries it.
//
// Deletion and retention. Merges drop what is deleted, or past the retention, when
// they begin. Blocks that have some of it and won't be merged soon are cleaned: a job
// with one source, or several of the last level that overlap, and outputs of the same
// level or none. Summaries may stay when samples go. See docs/decisions/0011-deletion.md.
//
// A sweep removes objects that nobody has published within a day.
package compact

// Package backfill reads a Prometheus's own blocks, and its out-of-order log: what
// is in its data directory but not, or no longer, in the WAL. It only ever opens
// files for reading.
//
// A Lister names the blocks from their meta.json alone. A Reader goes through one
// of them by series, in the order of the block's series refs, and gives the
// samples that Prometheus's querier would give: in time order, each timestamp
// once, without what was deleted through the API, staleness markers and start
// timestamps bit for bit, counter reset hints as the chunks have them. It holds
// the block's files open, so a block that Prometheus deletes meanwhile can be read
// to its end. Work can be resumed at any series.
//
// Memory is bounded by the index's table of contents, which Prometheus's reader
// keeps, and one piece of one series: a long series comes in several pieces, and
// all buffers are used again. Nothing here starts a goroutine.
//
// What is corrupt is reported and passed over: a chunk costs its own samples, an
// index entry those of its series. The files are memory-mapped, so a disk that
// can't be read shows as a fault; that, and a panic of Prometheus's decoders, is
// made such an error too.
//
// Which blocks to read, at which rate and what was read already is for the caller
// to keep.
package backfill

// Package head keeps what an ingester has received and not yet flushed, of all
// its tenants, in memory.
//
// The head is a sequence of generations. Samples go to the current one; at a
// flush it is frozen and a new one begins (Rotate). A batch belongs to exactly
// one generation. A frozen generation stays readable after its block is
// published, until the visibility delay has passed (Drop), so that a reader who
// asks heads first and rows second misses nothing. Each generation holds its
// own series and postings, and is dropped whole.
//
// In-order samples of a series go to a chunk of Prometheus's chunkenc (XOR2,
// which carries start timestamps, or a histogram encoding with start
// timestamps); samples that come late go to a side list. A sample that is there
// already is dropped. Samples that differ for one timestamp are both kept: the
// order of chunkfmt.Merge decides when they are read or flushed.
//
// A Head is safe for concurrent use. Sessions own their Refs and serialise
// calls on them.
package head

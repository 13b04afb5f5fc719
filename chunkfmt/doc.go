// Package chunkfmt is the block format of Epimetheus: one immutable object
// that holds the samples of many series, perhaps of many tenants, as columns.
//
// A block is written front to back by a Writer that is fed series in the order
// (tenant, metric name, labels). It is read piecewise: a reader fetches the
// directory of a tenant, from there the label page or the series pages that can
// match, and from those the data pages with the samples. Every page carries a
// CRC32C and its length, and every parser in this package treats its input as
// hostile: it returns an error that wraps ErrCorrupt, never panics, and takes
// memory in proportion to the bytes it is given, within the limits stated in
// docs/formats/block.md. How many samples a chunk decodes to is known before
// (Chunk.Samples, DataPage.Samples) and at most MaxChunkSamples.
//
// Columns are packed by package codec. Timestamps are stored once per data page
// for all chunks that have the same, and buckets of classic histograms as
// differences to a neighbouring bucket where that pays.
//
// The package is pure: it knows no network, no clock and no goroutine. Fetching
// and caching of pages is left to package history. The layout is specified in
// docs/formats/block.md.
package chunkfmt

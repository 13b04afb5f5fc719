// Package transfer moves samples between history and the blocks of Prometheus,
// Thanos and Mimir, which share a format: Import takes such blocks into the history
// of a tenant, Export writes them from it.
//
// An export writes the series of a block into a file first, and then the blocks one after
// the other: Prometheus's writers take much memory for each.
//
// Both stream: what they hold in memory depends on how many series there are, not
// on how many samples. An import keeps in the index how far it is, so that it can
// be killed at any point and goes on where it was, on any machine; a block that was
// imported is skipped from then on, so that an import can be repeated to fetch what
// is new. Samples that get into history twice all the same count once there.
//
// What a block holds comes over bit for bit: floats with the payloads of their NaNs,
// staleness markers, native histograms with integer and float counts and with custom
// buckets, start timestamps. Blocks of Prometheus hold neither exemplars nor metadata.
package transfer

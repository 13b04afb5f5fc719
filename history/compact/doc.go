// Package compact makes few large blocks of many small ones.
//
// A merge reads blocks front to back, side by side, puts together what they have
// of each series (chunkfmt.Merge decides where they disagree) and writes it into
// new blocks: cut by windows of time, by size, and with large tenants apart. It
// holds one series with its samples, and of each block a page and a few ranges,
// whatever their size.
package compact

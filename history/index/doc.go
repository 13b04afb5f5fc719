// Package index keeps the rows by which blocks are found: in DynamoDB, or in one
// local file.
//
// It has two layers. A Store is an ordered store of small rows with a hash key
// and a range key, with two implementations, DynamoDB and Bolt. An Index is, once
// over any Store, what the rows mean: block rows, by which readers find the
// blocks of a tenant and a time; work rows, by which compaction finds what there
// is to do without scanning anything; guard rows, by which a writer and a sweeper
// of orphans agree on whether a block exists.
//
// No block row spans more time than Width, so a reader that asks for rows whose
// maximum time lies in [mint, maxt+Width] misses nothing. What rows are written
// when, so that a crash at any point does no harm, is left to package history.
//
// What a Store returns is treated as hostile: every row has a version and a
// checksum over its key and value, every length is checked before it is used.
// The encoding is specified in docs/formats/index.md.
package index

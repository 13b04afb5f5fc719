// Package worker lets gateways compute parts of each other's queries: the
// protocol of docs/protocols/work.md, both ends.
//
// A Pool sends a part to the gateway that its key falls to, by rendezvous hashing
// over those that gossip knows, so that what a part reads and gives is in one
// gateway's caches. If that gateway fails or is slow, the next in line gets the
// part too; the last resort is always the caller itself. A Server computes parts
// one after the other for each tenant in turn, so many at a time as there are
// processors.
package worker

// Package fetch is the fetch protocol, both ends of which are in other
// processes: a gateway reads the head of an ingester with it. It holds the
// generated messages (fetchpb), the chunks they carry, and a Client.
//
// docs/protocols/fetch.md is the specification.
package fetch

// Package ship is the ship protocol, by which a sidecar sends samples to
// ingesters: the generated messages (shippb), the columns that carry the
// samples, and the client end. The server end is package ingest.
//
// docs/protocols/ship.md is the specification.
package ship

// Version of the protocol, in Hello and Welcome.
const Version = 1

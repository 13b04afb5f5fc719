// Package ship is the ship protocol, by which a sidecar sends samples to
// ingesters: the generated messages (shippb), the columns that carry the
// samples, and the client end. The server end is package ingest.
//
// docs/protocols/ship.md is the specification.
package ship

import "time"

// Version of the protocol, in Hello and Welcome.
const Version = 1

// MaxFuture is how far ahead of the ingester's clock a sample may be. It is
// Prometheus's own limit for what it scrapes.
const MaxFuture = 10 * time.Minute

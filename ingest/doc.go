// Package ingest is an ingester: it receives samples from sidecars over the
// ship protocol, keeps them in a head, answers gateways over the fetch
// protocol, and flushes the head into blocks.
//
// An Ingester has no durable state. Receiver keeps the sessions of sidecars and
// tells each what is received and durable; Flusher rotates the head, writes one
// block for all tenants, has it published (package history), and only then lets
// the Receiver say durable. What an ingester loses is read again at the source.
package ingest

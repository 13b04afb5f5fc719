// Package sidecar stands beside a Prometheus: it tails the WAL in that
// Prometheus's data directory, sends the samples to the ingesters that own them,
// and remembers what is durable.
//
// Its pieces: tail (a package of its own) turns the WAL into records; the
// dictionary knows, on disk, what each of Prometheus's series refs means and, in
// some tens of bytes of memory per series, where the series goes; owners hold a
// session of the ship protocol each (ingest/ship); the ledger keeps account of
// ranges of the WAL until every session concerned says durable. One goroutine,
// that of shipper, owns all of these but the sessions' network side. Beside it
// one goroutine watches the ring at a gateway, one the external labels of
// Prometheus, and one asks it for metadata of metrics.
//
// What it promises: every sample in the WAL reaches an ingester and, if that
// ingester dies before the sample is durable, another one. It can be killed at
// any time and goes on from its checkpoint; samples sent again are the same
// bits and dropped as duplicates further on. Exceptions are counted by reason in
// epimetheus_sidecar_dropped_samples_total, and refusals by ingesters in
// epimetheus_sidecar_refused_samples_total.
package sidecar

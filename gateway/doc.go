// Package gateway answers the Prometheus HTTP API over everything that
// ingesters hold and history keeps. It has no state: any number of gateways
// stand side by side.
//
// The API is Prometheus's own web/api/v1 over a storage of ours (package
// gateway/merge) and Prometheus's engine, once for each set of engine options that
// tenants have (variant.go). What differs: the tenants of a request
// (federation.go), metadata and cardinality, which come from heads and history,
// /federate, how answers are encoded (respond.go), and the endpoints that speak of
// scraping, which are empty but valid (absent.go).
package gateway

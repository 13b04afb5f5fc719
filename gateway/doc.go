// Package gateway answers the Prometheus HTTP API over everything that
// ingesters hold and history keeps. It has no state: any number of gateways
// stand side by side.
//
// The API is Prometheus's own web/api/v1 over a storage of ours (package
// gateway/merge) and Prometheus's engine. What differs stands in api.go: the
// tenant of a request, metadata and cardinality, which come from the ingesters,
// and the endpoints that speak of scraping, which are empty but valid.
package gateway

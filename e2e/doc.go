// Package e2e tests the built binary against the real thing: Prometheus, an S3
// server, a DynamoDB server. One scenario runs against `epimetheus all` and
// against separate roles.
package e2e

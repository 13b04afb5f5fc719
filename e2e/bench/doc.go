// Package bench measures the built binary in processes of its own as in production: the
// write path, from the WAL of a Prometheus to blocks, and queries, beside a Prometheus
// server with the same samples. It has no code but benchmarks; docs/benchmarks.md shows
// what they give and how to run them.
package bench

// Package bench measures the built binary on the write path, from the WAL of a
// Prometheus to blocks, in processes of their own as in production. It has no
// code but benchmarks; docs/benchmarks.md shows what they give and how to run
// them.
package bench

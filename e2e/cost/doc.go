// Package cost works out what fleets cost on AWS: the code that flushes, publishes
// and compacts runs for weeks of virtual time over stores in memory that count what
// S3 and DynamoDB would bill. `make cost` prints it; docs/benchmarks.md explains it.
package cost

// Package sim is a seeded simulation of the whole write path in one process and
// in virtual time (testing/synctest): the real sidecars, ingesters, history and
// gateway's storage, between models of what is around them. The models are
// Prometheus, which writes its WAL with its own packages, the network, the ring,
// and stores that fail before or after the effect. docs/simulation.md says what
// is checked, how to reproduce a failure and which bugs it was shown to find.
//
// The schedule (schedule_test.go) does one thing to the world (world_test.go) per
// step. The truth (truth_test.go) remembers every sample that a source
// (source_test.go) has logged. What an ingester says is taken from its streams
// (node_test.go) and held against what a reader finds (check_test.go). Bugs are
// put back at seams between the parts (bugs_test.go) to see that they are caught.
package sim

// Package rollup is the algebra of window summaries: what is kept of the samples
// of one series in windows of time, so that most of PromQL's functions can be
// computed without the samples.
//
// Three steps make a result. Summarise makes Windows of the samples of a series,
// Widen makes wider windows of them, and an Evaluator puts the windows of a range
// together and finishes a function, as Prometheus's engine does it on the samples.
// What the results are worth, function by function, is in docs/formats/rollup.md.
//
// The package is pure: no network, clock or goroutine.
package rollup

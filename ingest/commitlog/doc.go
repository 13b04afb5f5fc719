// Package commitlog is an ingester's optional local log: what its sessions have
// applied to the head, so that a restarted process need not ask every source
// again.
//
// A Log is a directory with a file per generation of the head. Sessions encode
// what they applied into entries (Entry) and Append them; Run writes what is
// queued, many sessions in one write, and calls back when it is written. A file
// is a prefix of what was appended for its generation: after the first write
// that fails nothing is added to it. When a generation is durable its file goes
// (Durable). Replay reads what is left after a restart.
//
// The log is never the only copy of anything, so nothing here may stop an
// ingester: trouble is logged, counted, and leaves a hole that Replay's caller
// sees in the sessions' numbers. docs/formats/commitlog.md is the specification.
package commitlog

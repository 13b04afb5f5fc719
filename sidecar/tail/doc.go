// Package tail reads the write-ahead log of a Prometheus, server or agent, while
// that Prometheus writes it. It only ever opens files for reading.
//
// A Tail starts at a Position and returns one decoded record per call of Next,
// in the order in which Prometheus wrote them, and io.EOF where there is nothing
// more for now. It never blocks and starts no goroutine: when to look again is
// for the caller to say. A Position is always the end of a whole record, so a
// reader that stops there and one that starts there meet exactly, whatever
// fragment of an unfinished record lay behind it when it was taken.
//
// What can be wrong with a log is handled here: a torn record at the end of the
// newest segment is waited for, one that a newer segment follows is left out and
// counted; a corrupt segment is left at the corruption for the next one, counted
// and logged once; records of a type that this version doesn't know are counted,
// logged once and left out. Segments that Prometheus truncated before they were
// read are a gap: the Tail goes on at the newest WAL checkpoint and says so.
//
// Memory is bounded by the largest record: one page, one record and its decoded
// form.
package tail

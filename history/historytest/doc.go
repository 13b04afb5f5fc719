// Package historytest holds the contracts of object.Store and index.Store as test
// suites, opens real servers for them, and wraps stores so that they fail as
// stores do: before an effect, after it, slowly, with torn or damaged reads.
//
// A new back end is right when it passes TestObjects or TestIndex.
package historytest

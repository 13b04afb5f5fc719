// Package plan runs what pays of a PromQL query over columns of samples, and
// gives the rest to Prometheus's engine.
//
// An Engine is a promql.QueryEngine around Prometheus's own. After the query has
// been parsed and preprocessed by that, the planner looks for leaves: a range
// function over a selector, such as rate(x[5m]), and an aggregation over that or
// over a plain selector, such as sum by (job) (rate(x[5m])). A leaf is computed
// by a kernel over whole columns, and the engine gets its result in the leaf's
// place: last_over_time(S[1ms]), where S is a selector whose series are there
// already and have a point at each step of the evaluation. What is around the
// leaves, and what the planner doesn't know, is the engine's.
//
// # Agreement
//
// A planned query gives what the engine alone gives:
//
//   - For each series, kernels do the engine's arithmetic in the engine's order,
//     or call the engine's own function on a window of points. What is kept from
//     one window to the next (sum_over_time and avg_over_time of windows that
//     overlap) is summed with compensation and may differ by 1e-12 of the sum of
//     absolute values.
//   - Aggregations add up, and choose, in the order of the series, as the engine does.
//   - Histograms are added up bucket by bucket in that order, and where layouts differ
//     by the methods of the engine's own. Their rates look at the first and the last sample of
//     a window, and at those before resets.
//   - Warnings and infos, and the place in the query that they name, are the same.
//
// These are no leaves: anything under info(); selectors that are anchored or
// smoothed; selectors with @ below a subquery or in what isn't evaluated once;
// functions with parameters that aren't literals; more than a million steps; plain selectors outside of an
// aggregation, where there is little to gain but in an instant query, for which heads give
// a sample in place of chunks, and in one of a day or more at steps no shorter than the lookback delta, of which
// parts are kept; count_values and limit_ratio, which are
// the engine's over a leaf: nobody has found that a kernel would pay.
package plan

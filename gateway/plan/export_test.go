package plan

// Tight makes the parts of leaves, and tasks for other gateways, as small as tests want
// them.
func Tight(s Spread) Spread {
	minute := hour / 60
	s.parting = parting{samples: 1, far: 30, spans: []int64{minute, 5 * minute, 20 * minute, hour, 4 * hour, 24 * hour}, steps: 1}
	return s
}

// TightShards makes shards of all leaves that can be cut so.
func TightShards(s Spread) Spread {
	s.parting = parting{samples: 1}
	return s
}

// Summarised makes an engine that summarises all samples, where summaries would do:
// as if blocks and heads had such of everything.
func Summarised(e *Engine) *Engine {
	e.summarise = true
	return e
}

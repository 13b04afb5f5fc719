package gateway

import "time"

// Encode is for tests.
var Encode = encode

// Engines is how many engines with different options there are.
func (a *API) Engines() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.variants)
}

// SetBodyTimeout changes how long a body may take. It is for before the first request.
func (a *API) SetBodyTimeout(d time.Duration) { a.bodyTimeout = d }

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

// SetTimeouts changes how long a body and a piece of an answer may take. It is for before
// the first request.
func (a *API) SetTimeouts(d time.Duration) { a.bodyTimeout, a.writeTimeout = d, d }

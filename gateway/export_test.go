package gateway

// Encode is for tests.
var Encode = encode

// Engines is how many engines with different options there are.
func (a *API) Engines() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.variants)
}

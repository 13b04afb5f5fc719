package gateway

import (
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// ServePipe serves on connections in memory, which hold 64 KiB, until stop is called: a clock of
// testing/synctest goes on while they are waited for.
func ServePipe(t *testing.T, h http.Handler) (dial func() net.Conn, stop func()) {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	server, served := &http.Server{Handler: h}, make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l) // ends with Close
	}()
	dial = func() net.Conn {
		c, err := l.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	return dial, func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-served
	}
}

// ReadSlowly reads to the end, so many bytes every 100 ms, and says how many there were.
func ReadSlowly(r io.Reader, each int64) (int, error) {
	for n := 0; ; time.Sleep(100 * time.Millisecond) {
		some, err := io.CopyN(io.Discard, r, each)
		if n += int(some); errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
}

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

package gateway

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A handler that writes all of its answer at once, as Prometheus's do, gives a slow client no less time
// than one that writes pieces.
func TestSlowReaderOfOneWrite(t *testing.T) {
	const size, timeout = 96 << 20, time.Second // more than sockets hold
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rw := &responseWriter{ResponseWriter: w, answers: &streaming{}, encodings: &encodings{}, timeout: timeout}
		defer rw.close()
		n, err := rw.Write(make([]byte, size))
		if n != size || err != nil {
			t.Errorf("%d bytes written: %v", n, err)
		}
	}))
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
	require.NoError(t, err)
	resp, err := server.Client().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	n := 0
	for {
		some, err := io.CopyN(io.Discard, resp.Body, 4<<20)
		n += int(some)
		if err != nil {
			require.ErrorIs(t, err, io.EOF)
			break
		}
		time.Sleep(100 * time.Millisecond) // what a slow client does
	}
	require.Equal(t, size, n)
}

// An answer may pause: a deadline is of a write, also where HTTP/2 resets a stream when it passes.
func TestAnswerThatPauses(t *testing.T) {
	const timeout = 300 * time.Millisecond
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rw := &responseWriter{ResponseWriter: w, answers: &streaming{}, encodings: &encodings{}, timeout: timeout}
		defer rw.close()
		for _, piece := range []string{"one", " two", " three"} {
			if _, err := rw.Write([]byte(piece)); err != nil {
				t.Error(err)
			}
			rw.Flush()
			time.Sleep(2 * timeout) // what it reads takes
		}
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
	require.NoError(t, err)
	resp, err := server.Client().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "one two three", string(b))
}

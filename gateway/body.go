package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
)

// Bounds on the body of a request, which is read before the request takes one of its
// tenant's places: a client that is slow to send it holds nothing but its connection.
const (
	bodyTimeout  = 30 * time.Second
	maxBody      = 10 << 20 // as Go's for forms
	maxReadBytes = 32 << 20 // of a remote read, compressed: Prometheus's
)

// errBodyTooLarge and errBodyTooSlow are the client's fault.
var (
	errBodyTooLarge = errors.New("the body of the request is too large")
	errBodyTooSlow  = errors.New("the body of the request came too slowly")
)

// maxBodies is how many bodies of requests of a tenant are waited for at a time, at one
// gateway.
const maxBodies = 1000

// bodies counts those that are waited for.
type bodies struct {
	mu sync.Mutex
	of map[string]int // by tenant; none is 0
}

// begin counts one of each tenant until end is called, or gives an error that wraps
// errTooMany.
func (b *bodies) begin(tenants []string) (end func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, t := range tenants {
		if b.of[t] >= maxBodies {
			return nil, fmt.Errorf("the bodies of %d requests of the tenant are still to come: %w", maxBodies, errTooMany)
		}
	}
	for _, t := range tenants {
		b.of[t]++
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, t := range tenants {
			if b.of[t]--; b.of[t] == 0 {
				delete(b.of, t)
			}
		}
	}, nil
}

// withBody gives a request whose body is in memory, of the account until the request
// ends. After an error, which is why the body can't be had, the connection is to be
// closed: the rest isn't read.
func (b *bodies) withBody(w http.ResponseWriter, r *http.Request, tenants []string, timeout time.Duration) (*http.Request, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return r, nil
	}
	end, err := b.begin(tenants)
	if err != nil {
		return nil, err
	}
	defer end()
	return withBody(w, r, timeout)
}

func withBody(w http.ResponseWriter, r *http.Request, timeout time.Duration) (*http.Request, error) {
	most := int64(maxBody)
	if r.URL.Path == "/api/v1/read" {
		most = maxReadBytes
	}
	tooLarge := fmt.Errorf("%w: the limit is %d bytes", errBodyTooLarge, most)
	if r.ContentLength > most {
		return nil, tooLarge
	}
	ctx, c := r.Context(), http.NewResponseController(w)
	deadline := time.Now().Add(timeout)
	// A writer that knows no deadlines is none of a connection's.
	_ = c.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	b, err := io.ReadAll(&heldReader{io.LimitReader(r.Body, most+1), account.From(ctx)})
	stopped := stop()
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, account.ErrLimit):
		return nil, cause
	case errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(deadline): // which ends ctx too
		return nil, fmt.Errorf("%w: the limit is %s", errBodyTooSlow, timeout)
	case !stopped:
		return nil, cause
	case err != nil:
		return nil, problem{fmt.Errorf("body of the request: %w", err)}
	case int64(len(b)) > most:
		return nil, tooLarge
	}
	// From here on a read of the connection is to last: it tells when the client goes.
	_ = c.SetReadDeadline(time.Time{})
	r = r.WithContext(ctx)
	r.Body = io.NopCloser(bytes.NewReader(b))
	return r, nil
}

// heldReader tells an account of what is read.
type heldReader struct {
	io.Reader
	account *account.Account
}

func (r *heldReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.account.Hold(int64(n))
	return n, err
}

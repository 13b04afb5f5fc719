package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
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

// withBody gives a request whose body is in memory, of the account until the request
// ends. The error is why the body can't be had.
func withBody(w http.ResponseWriter, r *http.Request, timeout time.Duration) (*http.Request, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return r, nil
	}
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
		return nil, fmt.Errorf("body of the request: %w", err)
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

// failBody answers where withBody gave an error. The connection ends: the rest of the
// body isn't read.
func failBody(w http.ResponseWriter, err error) {
	w.Header().Set("Connection", "close")
	switch {
	case errors.Is(err, errBodyTooLarge):
		respondError(w, http.StatusRequestEntityTooLarge, "bad_data", err)
	case errors.Is(err, errBodyTooSlow):
		respondError(w, http.StatusRequestTimeout, "timeout", err)
	case errors.Is(err, account.ErrLimit):
		respondError(w, http.StatusUnprocessableEntity, "execution", err)
	case errors.Is(err, context.Canceled):
		respondError(w, statusClientGone, "canceled", err)
	default:
		respondError(w, http.StatusBadRequest, "bad_data", err)
	}
}

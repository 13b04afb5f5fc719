package gateway

import (
	"context"
	"errors"
	"net/http"

	"github.com/prometheus/prometheus/promql"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
)

// problem is an error that is the client's.
type problem struct{ error }

// errTooMany is what errors of a tenant wrap that has too many requests at a time.
var errTooMany = errors.New("try again later")

// errorClass gives the status of an answer with an error, and Prometheus's name for its
// kind.
func errorClass(err error) (code int, kind string) {
	_, isProblem := errors.AsType[problem](err)
	_, cancelled := errors.AsType[promql.ErrQueryCanceled](err)
	_, late := errors.AsType[promql.ErrQueryTimeout](err)
	switch {
	case errors.Is(err, errBodyTooLarge):
		return http.StatusRequestEntityTooLarge, "bad_data"
	case errors.Is(err, errBodyTooSlow):
		return http.StatusRequestTimeout, "timeout"
	case isProblem:
		return http.StatusBadRequest, "bad_data"
	case errors.Is(err, errTooMany):
		return http.StatusTooManyRequests, "too_many_requests"
	case errors.Is(err, account.ErrLimit):
		return http.StatusUnprocessableEntity, "execution"
	case late:
		return http.StatusServiceUnavailable, "timeout"
	case cancelled, errors.Is(err, context.Canceled):
		return statusClientGone, "canceled"
	}
	return http.StatusInternalServerError, "internal"
}

// fail answers with an error.
func fail(w http.ResponseWriter, err error) {
	code, kind := errorClass(err)
	if code == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	respondError(w, code, kind, err)
}

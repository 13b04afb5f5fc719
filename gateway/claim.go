package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

// Choices are claims of replicas: package history/choice.
type Choices interface {
	Claim(ctx context.Context, tenant, group, replica string, from, until int64) ([]choice.Interval, error)
	Decided(ctx context.Context, tenant, group string, from, until int64) ([]choice.Interval, error)
}

const (
	maxClaimBytes = choice.MaxGroup + 16<<10
	claimTimeout  = 10 * time.Second
)

// posted reads what a sidecar sends of one tenant, in at most so many bytes.
func posted(w http.ResponseWriter, r *http.Request, maxBytes int64, to any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBytes)).Decode(to); err != nil {
		return err
	}
	if n := len(tenantsOf(r.Context())); n > 1 {
		return fmt.Errorf("it is for %d tenants: name one in %s", n, TenantHeader)
	}
	return nil
}

// claim is POST ha/claim, as docs/protocols/ha.md says.
func (a *API) claim(w http.ResponseWriter, r *http.Request) {
	if a.opts.Choices == nil {
		respondError(w, http.StatusNotImplemented, "unavailable", errors.New("this gateway takes no claims of replicas"))
		return
	}
	var q choice.Request
	if err := posted(w, r, maxClaimBytes, &q); err != nil {
		respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("claim of a replica: %w", err))
		return
	}
	if len(q.Source) > choice.MaxSource {
		respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("claim of a replica: source of %d bytes, the limit is %d", len(q.Source), choice.MaxSource))
		return
	}
	tenant := TenantOf(r.Context())
	ctx, cancel := context.WithTimeout(r.Context(), claimTimeout)
	defer cancel()
	var is []choice.Interval
	var err error
	switch ahead := time.Until(time.UnixMilli(q.Until)); {
	case q.Replica == "":
		is, err = a.opts.Choices.Decided(ctx, tenant, q.Group, q.From, q.Until)
	case ahead > ship.MaxFuture:
		// Claimed by a clock that is wrong, that time would be lost to all others.
		err = fmt.Errorf("%w: it reaches %s ahead of this gateway's clock, the limit is %s: see that the clocks of the sidecar and the gateway are right",
			choice.ErrInvalid, ahead.Truncate(time.Second), ship.MaxFuture)
	default:
		is, err = a.opts.Choices.Claim(ctx, tenant, q.Group, q.Replica, q.From, q.Until)
	}
	switch {
	case err == nil:
		answer := choice.Answer{Intervals: is}
		if q.Replica != "" {
			answer.Rival = a.rivals.see(claimant{tenant, q.Group, q.Replica}, q.Source, time.Now())
		}
		respond(w, answer, nil)
	case errors.Is(err, choice.ErrInvalid):
		respondError(w, http.StatusBadRequest, "bad_data", err)
	default:
		if r.Context().Err() == nil {
			a.logger.Warn("claim of a replica failed", "tenant", tenant, "err", err)
		}
		respondError(w, http.StatusServiceUnavailable, "unavailable", err)
	}
}

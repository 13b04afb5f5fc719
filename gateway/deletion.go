package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/util/annotations"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// Deletions are those of tenants that are in force: package history.
type Deletions interface {
	Delete(ctx context.Context, tenant string, mint, maxt int64, ms ...*labels.Matcher) (ulid.ULID, error)
	Cancel(ctx context.Context, tenant string, id ulid.ULID) error
	Clean(ctx context.Context, tenant string) error
	Deletions(ctx context.Context, tenant string) ([]index.Deletion, error)
}

// adminTimeout bounds a change of deletions.
const adminTimeout = 10 * time.Second

// adminTSDB is what Prometheus's handlers of the admin API find in place of a
// database. They are called for one tenant at a time.
type adminTSDB struct {
	noTSDB
	deletions Deletions
	logger    *slog.Logger
}

// Delete is one selector of delete_series. The deletion stays in force, so it ends
// now at the latest, where Prometheus's ends with the last sample that there is.
func (d adminTSDB) Delete(ctx context.Context, mint, maxt int64, ms ...*labels.Matcher) error {
	maxt = min(maxt, time.Now().UnixMilli())
	if mint > maxt || len(ms) == 0 {
		return nil // {} selects nothing in Prometheus's database, either
	}
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	id, err := d.deletions.Delete(ctx, TenantOf(ctx), mint, maxt, ms...)
	if err == nil {
		d.logger.Info("series deleted", "tenant", TenantOf(ctx), "deletion", id.String(), "match", selector(ms), "mint", mint, "maxt", maxt)
	}
	return err
}

// selector is a text for matchers that the parser of selectors takes.
func selector(ms []*labels.Matcher) string {
	texts := make([]string, len(ms))
	for i, m := range ms {
		texts[i] = m.String()
	}
	return "{" + strings.Join(texts, ",") + "}"
}

var errAdminDisabled = errors.New("admin APIs disabled")

// admin is around what of the admin API is ours: it has to be on, and is about one
// tenant.
func (a *API) admin(h func(ctx context.Context, tenant string, r *http.Request) (any, error)) http.HandlerFunc {
	return a.wrap(func(w http.ResponseWriter, r *http.Request) {
		if a.opts.Deletions == nil {
			respondError(w, http.StatusInternalServerError, "unavailable", errAdminDisabled)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), adminTimeout)
		defer cancel()
		data, err := h(ctx, TenantOf(ctx), r)
		switch {
		case errors.Is(err, history.ErrNoDeletion):
			respondError(w, http.StatusNotFound, "not_found", err)
		case err != nil:
			fail(w, err)
		case data == nil:
			w.WriteHeader(http.StatusNoContent)
		default:
			respond(w, data, annotations.Annotations(nil))
		}
	})
}

// deletion is one of GET admin/tsdb/deletions.
type deletion struct {
	ID      string     `json:"id"`
	Created time.Time  `json:"created"`
	Match   string     `json:"match"`
	Start   *time.Time `json:"start,omitempty"` // absent: from the first sample on
	End     time.Time  `json:"end"`
	Clean   bool       `json:"clean"`
	Gone    *time.Time `json:"gone,omitempty"` // absent: there may be something of it in blocks
}

func (a *API) deletions(ctx context.Context, tenant string, _ *http.Request) (any, error) {
	ds, err := a.opts.Deletions.Deletions(ctx, tenant)
	if err != nil {
		return nil, err
	}
	out := make([]deletion, len(ds))
	for i, d := range ds {
		out[i] = deletion{
			ID: d.ID.String(), Created: ulid.Time(d.ID.Time()).UTC(), Match: selector(d.Matchers), End: time.UnixMilli(d.MaxT).UTC(), Clean: d.Clean,
		}
		if d.MinT > v1.MinTime.UnixMilli() {
			start := time.UnixMilli(d.MinT).UTC()
			out[i].Start = &start
		}
		if d.Gone != 0 {
			gone := time.UnixMilli(d.Gone).UTC()
			out[i].Gone = &gone
		}
	}
	return out, nil
}

func (a *API) cancelDeletion(ctx context.Context, tenant string, r *http.Request) (any, error) {
	id, err := ulid.ParseStrict(r.FormValue("id"))
	if err != nil {
		return nil, badParam("id", fmt.Errorf("%w: give an id of GET /api/v1/admin/tsdb/deletions", err))
	}
	if err := a.opts.Deletions.Cancel(ctx, tenant, id); err != nil {
		return nil, err
	}
	a.logger.Info("deletion cancelled", "tenant", tenant, "deletion", id.String())
	return nil, nil //nolint:nilnil // no data is status 204
}

// cleanTombstones asks compactors, and doesn't wait for them.
func (a *API) cleanTombstones(ctx context.Context, tenant string, _ *http.Request) (any, error) {
	return nil, a.opts.Deletions.Clean(ctx, tenant)
}

// snapshot is refused: history is in the object store already.
func (a *API) snapshot(w http.ResponseWriter, r *http.Request) {
	if a.opts.Deletions == nil {
		respondError(w, http.StatusInternalServerError, "unavailable", errAdminDisabled)
		return
	}
	respondError(w, http.StatusNotImplemented, "unavailable",
		errors.New("a gateway makes no snapshots: all blocks are in the object store, copy that and the index"))
}

// tsdb is what Prometheus's admin API works on.
func (a *API) tsdb() v1.TSDBAdminStats {
	if a.opts.Deletions == nil {
		return noTSDB{}
	}
	return adminTSDB{deletions: a.opts.Deletions, logger: a.logger}
}

package history

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// knownDeletions are those of all tenants, as they were at a time. It isn't changed.
type knownDeletions struct {
	noted   ulid.ULID // before the rows were read
	tenants map[string][]index.Deletion
	bad     map[string]error // of tenants whose row can't be read
	loaded  time.Time        // before the rows were read
	checked time.Time        // when they were known to be all, last
	tried   time.Time        // when that could not be found out, last
}

const (
	// deletionsAge is after what time a reader asks whether deletions have changed.
	deletionsAge = 2 * time.Second
	// lookTimeout bounds that, where what is known can be used without.
	lookTimeout = 2 * time.Second
	// retryLook is after what time a failed look is tried again meanwhile.
	retryLook = 10 * time.Second
)

// hidden is what of a tenant is hidden at present.
func (h *History) hidden(ctx context.Context, tenant string) (*Hidden, error) {
	k, err := h.deletions(ctx)
	if err != nil {
		return nil, err
	}
	if err := k.bad[tenant]; err != nil {
		return nil, err
	}
	var r *Retentions
	if h.o.Retentions != nil {
		r = h.o.Retentions()
	}
	return NewHidden(k.tenants[tenant], r.Of(tenant).Horizons(h.now())), nil
}

// Hides says whether anything of a tenant is hidden in mint to maxt, both included,
// in ms.
func (h *History) Hides(ctx context.Context, tenant string, mint, maxt int64) (bool, error) {
	hidden, err := h.hidden(ctx, tenant)
	return hidden.Within(mint, maxt) != nil, err
}

// SamplesFrom is the first time in ms of which a tenant may have samples, where
// summaries of windows are kept for longer; else math.MinInt64.
func (h *History) SamplesFrom(ctx context.Context, tenant string) (int64, error) {
	hidden, err := h.hidden(ctx, tenant)
	if err != nil || hidden == nil || !hidden.Before.Summaries() {
		return math.MinInt64, err
	}
	return hidden.Before.Raw, nil
}

// deletions gives those that were in force seconds ago. While the index can't be
// read, they may be as old as rows may be.
func (h *History) deletions(ctx context.Context) (*knownDeletions, error) {
	fresh := func(k *knownDeletions) bool {
		if k == nil || h.o.VisibilityDelay == 0 {
			return false
		}
		now := h.now()
		return now.Sub(k.checked) < deletionsAge || now.Sub(k.tried) < retryLook && h.usable(k)
	}
	if k := h.known.Load(); fresh(k) {
		return k, nil
	}
	select {
	case h.looking <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-h.looking }()
	old := h.known.Load()
	if fresh(old) {
		return old, nil
	}
	look := ctx
	if old != nil && h.usable(old) {
		var cancel context.CancelFunc
		look, cancel = context.WithTimeout(ctx, lookTimeout)
		defer cancel()
	}
	k, err := h.loadDeletions(look, old)
	if err != nil {
		if old == nil || !h.usable(old) || ctx.Err() != nil {
			return nil, err
		}
		h.o.Logger.Warn("changes of deletions can't be read, those known before are used", "err", err)
		again := *old
		again.tried = h.now()
		k = &again
	}
	h.known.CompareAndSwap(old, k) // but for one who has changed them meanwhile
	return k, nil
}

// usable: it is as young as rows have to be.
func (h *History) usable(k *knownDeletions) bool {
	return h.now().Sub(k.checked) < h.o.VisibilityDelay/2
}

// loadDeletions reads all, if they have changed since old.
func (h *History) loadDeletions(ctx context.Context, old *knownDeletions) (*knownDeletions, error) {
	now := h.now()
	noted, err := h.o.Index.DeletionsNoted(ctx)
	if _, ok := errors.AsType[*index.RowError](err); ok {
		// It only says whether there were changes. A compactor writes it anew.
		h.o.Logger.Error("which deletion was the last can't be read: all are read", "err", err)
		old, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Now and then all the same: whoever has made one may have died before it was noted.
	if old != nil && old.noted == noted && now.Sub(old.loaded) < h.o.VisibilityDelay/2 {
		same := *old
		same.checked = now
		return &same, nil
	}
	rows, err := h.o.Index.AllDeletions(ctx)
	if err != nil {
		return nil, err
	}
	k := &knownDeletions{noted: noted, tenants: map[string][]index.Deletion{}, bad: map[string]error{}, loaded: now, checked: now}
	for _, r := range rows {
		if r.Err != nil {
			k.bad[r.Tenant] = r.Err
			h.o.Logger.Error("the deletions of a tenant can't be read: its queries fail", "tenant", r.Tenant, "err", r.Err)
		}
		if len(r.Deletions) > 0 {
			k.tenants[r.Tenant] = r.Deletions
		}
	}
	return k, nil
}

// ErrNoDeletion is what Cancel wraps where there is none of that id.
var ErrNoDeletion = errors.New("no such deletion is in force")

// Delete hides the samples of mint to maxt, both included, in ms, of the series that
// match all of ms; with none, of all series. It is in force for all readers within
// seconds of its return, for samples that come later too, until it is cancelled.
func (h *History) Delete(ctx context.Context, tenant string, mint, maxt int64, ms ...*labels.Matcher) (ulid.ULID, error) {
	id, err := ulid.New(ulid.Timestamp(h.now()), rand.Reader)
	if err != nil {
		return id, fmt.Errorf("id of a deletion: %w", err)
	}
	err = h.changeDeletions(ctx, tenant, func(ds []index.Deletion) ([]index.Deletion, error) {
		if slices.ContainsFunc(ds, func(d index.Deletion) bool { return d.ID == id }) {
			return ds, nil // of an attempt whose answer was lost
		}
		return append(ds, index.Deletion{ID: id, MinT: mint, MaxT: maxt, Matchers: ms}), nil
	})
	return id, err
}

// Cancel ends a deletion: what is still there of it can be read again, within
// seconds.
func (h *History) Cancel(ctx context.Context, tenant string, id ulid.ULID) error {
	found := false // by an attempt whose answer was lost, too
	return h.changeDeletions(ctx, tenant, func(ds []index.Deletion) ([]index.Deletion, error) {
		left := slices.DeleteFunc(ds, func(d index.Deletion) bool { return d.ID == id })
		if found = found || len(left) < len(ds); !found {
			return nil, fmt.Errorf("%s: %w", id, ErrNoDeletion)
		}
		return left, nil
	})
}

// Clean asks compactors to remove what is deleted from blocks of the last level
// soon.
func (h *History) Clean(ctx context.Context, tenant string) error {
	return h.changeDeletions(ctx, tenant, func(ds []index.Deletion) ([]index.Deletion, error) {
		for i := range ds {
			ds[i].Clean = true
		}
		return ds, nil
	})
}

// Deletions of a tenant that are in force, in the order in which they were made.
func (h *History) Deletions(ctx context.Context, tenant string) ([]index.Deletion, error) {
	r, err := h.o.Index.Deletions(ctx, tenant)
	return r.Deletions, err
}

// changeAttempts to replace the row: each one that fails is another's success.
const changeAttempts = 20

func (h *History) changeDeletions(ctx context.Context, tenant string, change func([]index.Deletion) ([]index.Deletion, error)) error {
	for try := range changeAttempts {
		if try > 0 {
			select {
			case <-time.After(mathrand.N(time.Duration(try) * 5 * time.Millisecond)):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		r, err := h.o.Index.Deletions(ctx, tenant)
		if err != nil {
			return err
		}
		ds, err := change(slices.Clone(r.Deletions))
		if err != nil {
			return fmt.Errorf("tenant %s: %w", tenant, err)
		}
		err = h.o.Index.PutDeletions(ctx, r, ds)
		if errors.Is(err, index.ErrConflict) {
			continue
		}
		if err != nil {
			return err
		}
		id, err := ulid.New(ulid.Timestamp(h.now()), rand.Reader)
		if err != nil {
			return fmt.Errorf("id of a change: %w", err)
		}
		err = h.o.Index.NoteDeletions(ctx, id)
		h.known.Store(nil)
		return err
	}
	return fmt.Errorf("deletions of tenant %s: %w", tenant, index.ErrConflict)
}

package ingest

import (
	"context"
	"errors"
	"maps"
	mrand "math/rand/v2"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// Bounds on what is held back.
const (
	heldShare       = 4  // of the memory that the head may take, one part in so many is for what is held back
	heldGenerations = 16 // of a tenant
	heldPauseMin    = time.Second
	heldPauseMax    = time.Minute
)

// heldBlock is a block that isn't durable for some tenants, since their rows could
// not be written. See docs/decisions/0010-rows-of-some-tenants-later.md.
type heldBlock struct {
	g        *head.Generation
	block                           // without data once it is published
	tenants  map[string]error       // that it isn't durable for; under flusher.mu
	byTenant map[string][]ulid.ULID // of the generation
}

// durability is up to where all is durable.
type durability struct {
	generation uint64              // all generations up to this one, except
	held       map[string][]uint64 // these, ascending, by tenant
}

// of is the generation up to which all of a tenant is durable.
func (d *durability) of(tenant string) uint64 {
	held := d.held[tenant]
	if bug.Is(bug.HeldIsDurable) && !slices.Contains(held, d.generation) {
		return d.generation
	}
	if len(held) > 0 {
		return held[0] - 1
	}
	return d.generation
}

// durability is what is durable now. The caller holds f.mu.
func (f *flusher) durability() durability {
	d := durability{generation: f.generation, held: map[string][]uint64{}}
	for _, b := range f.held {
		for tenant := range b.tenants {
			if gs := d.held[tenant]; len(gs) == 0 || gs[len(gs)-1] != b.g.ID() {
				d.held[tenant] = append(gs, b.g.ID())
			}
		}
	}
	return d
}

// tell says what is durable. failed can't be, ever.
func (f *flusher) tell(failed map[string]error) {
	f.telling <- struct{}{}
	defer func() { <-f.telling }()
	f.mu.Lock()
	d := f.durability()
	f.mu.Unlock()
	f.metrics.held.Set(float64(len(d.held)))
	f.flushed(d, failed)
}

// heldBack is how many tenants are held back, and why one of them is.
func (f *flusher) heldBack() (tenants int, tenant string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[string]bool{}
	for _, b := range f.held {
		for t, e := range b.tenants {
			if all[t] = true; tenant == "" || t < tenant {
				tenant, err = t, e
			}
		}
	}
	return len(all), tenant, err
}

// retry tries blocks again that are held back, until ctx ends.
func (f *flusher) retry(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.anew:
		}
		f.retryUntil(ctx, heldPauseMax)
	}
}

// retryUntil tries with jittered, growing pauses until nothing is held back any
// more or ctx ends, and says whether nothing is.
func (f *flusher) retryUntil(ctx context.Context, pauseMax time.Duration) bool {
	for pause := heldPauseMin; ; {
		select {
		case f.retrying <- struct{}{}:
		case <-ctx.Done():
			return false
		}
		left, progress := f.retryOnce(ctx)
		<-f.retrying
		if left == 0 {
			return true
		}
		if progress {
			pause = heldPauseMin
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause/2 + mrand.N(pause)):
		}
		pause = min(2*pause, pauseMax)
	}
}

// retryOnce tries each block once that is held back, oldest first, but those of
// which all tenants have just failed.
func (f *flusher) retryOnce(ctx context.Context) (left int, progress bool) {
	f.mu.Lock()
	blocks := slices.Clone(f.held)
	f.mu.Unlock()
	failed := map[string]bool{}
	for _, b := range blocks {
		f.mu.Lock()
		tenants := slices.Sorted(maps.Keys(b.tenants))
		f.mu.Unlock()
		if ctx.Err() != nil || !slices.ContainsFunc(tenants, func(t string) bool { return !failed[t] }) {
			continue
		}
		var err error
		if b.data != nil {
			err = f.publisher.Publish(ctx, b.id, b.data, b.summary)
		} else {
			err = f.publisher.PublishRows(ctx, b.id, b.summary, tenants)
		}
		var rows *history.RowsError
		switch {
		case err == nil:
			rows = &history.RowsError{Published: true}
		case !errors.As(err, &rows):
			f.metrics.failures.Inc()
			f.logger.Debug("block not published for some tenants, trying on", "block", b.id, "generation", b.g.ID(), "tenants", len(tenants), "err", err)
			old := b.id
			if err := b.rename(err); err != nil {
				f.logger.Error("block can't be given another id", "err", err)
			}
			f.renamed(b, old)
			for _, t := range tenants {
				failed[t] = true
			}
			continue
		default:
			f.metrics.failures.Inc()
		}
		if rows.Published {
			b.data = nil
		}
		for t := range rows.Tenants {
			failed[t] = true
		}
		progress = f.written(b, rows.Tenants) || progress
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.held), progress
}

// renamed notes the id of a block that got another one.
func (f *flusher) renamed(b *heldBlock, old ulid.ULID) {
	for tenant := range b.tenants {
		ids := b.byTenant[tenant]
		if i := slices.Index(ids, old); i >= 0 {
			ids[i] = b.id
		}
	}
}

// written notes that a block is durable but for the tenants left. It says whether
// that is news.
func (f *flusher) written(b *heldBlock, left map[string]error) bool {
	if left == nil {
		left = map[string]error{}
	}
	f.mu.Lock()
	if len(left) == len(b.tenants) {
		b.tenants = left
		f.mu.Unlock()
		return false
	}
	before := b.tenants
	b.tenants = left
	f.held = slices.DeleteFunc(f.held, func(x *heldBlock) bool { return len(x.tenants) == 0 })
	done := map[string][]ulid.ULID{}
	for tenant := range before {
		_, still := left[tenant]
		if still || slices.ContainsFunc(f.held, func(x *heldBlock) bool {
			_, there := x.tenants[tenant]
			return there && x.g == b.g
		}) {
			continue
		}
		done[tenant] = b.byTenant[tenant]
		f.waiting = append(f.waiting, published{g: b.g, tenant: tenant, at: time.Now()})
	}
	n := len(f.held)
	f.mu.Unlock()
	f.head.Published(b.g, done)
	f.tell(nil)
	f.logger.Info("rows written that had been held back", "block", b.id, "generation", b.g.ID(), "tenants", len(before)-len(left), "blocks_left", n)
	return true
}

// crowd finds the tenants that may take nothing new, since too much of theirs is
// held back; what they hold is counted as bytes.
func (f *flusher) crowd(maxBytes int64) (crowded map[string]bool, bytes int64) {
	f.mu.Lock()
	tenants := map[string]map[*head.Generation]bool{}
	for _, b := range f.held {
		for t := range b.tenants {
			if tenants[t] == nil {
				tenants[t] = map[*head.Generation]bool{f.head.Current(): true}
			}
			tenants[t][b.g] = true
		}
	}
	f.mu.Unlock()
	each := map[string]int64{}
	for t, gs := range tenants {
		for g := range gs {
			each[t] += g.TenantBytes(t)
		}
		bytes += each[t]
	}
	crowded = map[string]bool{}
	for t, n := range each {
		fair := maxBytes / heldShare / int64(len(each))
		if len(tenants[t]) > heldGenerations || bytes >= maxBytes/heldShare && n >= fair {
			crowded[t] = true
		}
	}
	return crowded, bytes
}

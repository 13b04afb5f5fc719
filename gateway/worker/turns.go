package worker

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// errBusy is what a tenant gets of which too much waits already.
var errBusy = errors.New("too many parts of the tenant's queries are waiting")

// turns lets so many work at a time. Those that wait get their turn by tenant, one
// of each, so that a tenant with many doesn't hold up one with few.
type turns struct {
	max int // that wait, of one tenant

	mu     sync.Mutex
	free   int
	queues map[string][]chan struct{} // by tenant, those that wait; none is empty
	order  []string                   // of tenants: whose turn is next
}

func newTurns(atOnce, maxWaiting int) *turns {
	return &turns{max: maxWaiting, free: atOnce, queues: map[string][]chan struct{}{}}
}

// wait waits for a turn, which ends with done. It gives errBusy, or why ctx has
// ended.
func (t *turns) wait(ctx context.Context, tenant string) (done func(), err error) {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return t.done, nil
	}
	q := t.queues[tenant]
	if len(q) >= t.max {
		t.mu.Unlock()
		return nil, errBusy
	}
	if len(q) == 0 {
		t.order = append(t.order, tenant)
	}
	mine := make(chan struct{})
	t.queues[tenant] = append(q, mine)
	t.mu.Unlock()
	select {
	case <-mine:
		return t.done, nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	q = t.queues[tenant]
	if i := slices.Index(q, mine); i >= 0 {
		if q = slices.Delete(q, i, i+1); len(q) > 0 {
			t.queues[tenant] = q
		} else {
			delete(t.queues, tenant)
			t.order = slices.DeleteFunc(t.order, func(x string) bool { return x == tenant })
		}
		return nil, context.Cause(ctx)
	}
	t.next() // the turn came at the same time
	return nil, context.Cause(ctx)
}

func (t *turns) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next()
}

// next gives a turn that has become free to whom it belongs. The caller holds
// t.mu.
func (t *turns) next() {
	if len(t.order) == 0 {
		t.free++
		return
	}
	tenant := t.order[0]
	t.order = t.order[1:]
	q := t.queues[tenant]
	close(q[0])
	if q = q[1:]; len(q) > 0 {
		t.queues[tenant] = q
		t.order = append(t.order, tenant)
	} else {
		delete(t.queues, tenant)
	}
}

func (t *turns) waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, q := range t.queues {
		n += len(q)
	}
	return n
}

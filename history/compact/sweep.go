package compact

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Orphan is an object that no row names and that is old enough to go.
type Orphan struct {
	index.BlockRef
	Condemned bool // already; its object is what is left
	Age       time.Duration
}

// DefaultOrphanAge is how old objects are when a sweep looks after them.
const DefaultOrphanAge = 24 * time.Hour

// Orphans lists the objects of blocks older than age that are not published and
// not part of a job: what a sweep condemns and deletes. It changes nothing. Blocks of
// which the guard row can't be read are in the error.
func Orphans(ctx context.Context, objects object.Store, x *index.Index, now time.Time, age time.Duration) ([]Orphan, error) {
	out, _, bad, err := orphans(ctx, objects, x, now, age)
	return out, errors.Join(err, bad)
}

// errIndexLost is what keeps a sweep from removing everything: an index that was
// lost, or another one, knows no block.
var errIndexLost = errors.New("the index seems to be lost, nothing is removed")

// manyOrphans are more than any crash leaves.
const manyOrphans = 32

// orphans is Orphans, and says how many blocks are older than age.
func orphans(ctx context.Context, objects object.Store, x *index.Index, now time.Time, age time.Duration) (out []Orphan, blocks int, bad, err error) {
	jobs, err := x.Jobs(ctx)
	if err != nil {
		return nil, 0, nil, err
	}
	named := map[ulid.ULID]bool{}
	for _, j := range jobs {
		for _, o := range j.Outputs {
			named[o.Block] = true
		}
	}
	var old []Orphan
	err = eachBlock(ctx, objects, func(b index.BlockRef, modified time.Time) {
		// By both clocks: the store's, and that of who made it.
		if of := min(now.Sub(modified), now.Sub(ulid.Time(b.Block.Time()))); of >= age && !named[b.Block] {
			old = append(old, Orphan{BlockRef: b, Age: of})
		}
	})
	if err != nil {
		return nil, 0, nil, err
	}
	var rows []error
	for _, o := range old {
		state, err := x.GuardState(ctx, o.Block)
		if _, ok := errors.AsType[*index.RowError](err); ok {
			rows = append(rows, err)
			continue
		}
		if err != nil {
			return nil, 0, nil, err
		}
		if o.Condemned = state == index.Condemned; state != index.Published {
			out = append(out, o)
		}
	}
	return out, len(old), errors.Join(rows...), nil
}

// eachBlock calls fn with all objects of blocks, and when they were written.
func eachBlock(ctx context.Context, objects object.Store, fn func(b index.BlockRef, modified time.Time)) error {
	prefix := strings.TrimSuffix(history.ObjectKey(ulid.ULID{}), ulid.ULID{}.String())
	err := objects.List(ctx, prefix, func(i object.Info) error {
		id, err := ulid.ParseStrict(strings.TrimPrefix(i.Key, prefix))
		if err == nil && i.Key == history.ObjectKey(id) { // else it is not ours
			fn(index.BlockRef{Block: id, Object: i.Key, ObjectSize: i.Size}, i.Modified)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list blocks: %w", err)
	}
	return nil
}

// sweep condemns orphans, and deletes those that are twice as old as they have to be for
// that, and that somebody else, or an earlier sweep, has condemned. That one of them fails
// is no error of the sweep: the next tries it again.
func (c *Compactor) sweep(ctx context.Context) error {
	all, blocks, bad, err := orphans(ctx, c.o.Objects, c.o.Index, c.now(), c.o.OrphanAge)
	if err != nil {
		return err
	}
	unknown := 0
	for _, o := range all {
		if !o.Condemned {
			unknown++
		}
	}
	if unknown >= manyOrphans && unknown > blocks/2 {
		return fmt.Errorf("%w: nobody has published %d of %d blocks; `epimetheus tool reindex` makes its rows again, `epimetheus tool orphans` lists the blocks", errIndexLost, unknown, blocks)
	}
	failed := 0
	for _, o := range all {
		err := c.sweepOrphan(ctx, o)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			failed++
			bad = errors.Join(bad, fmt.Errorf("orphan %s: %w", o.Block, err))
		}
	}
	if bad != nil {
		c.metrics.failures.Inc()
		c.logger.Warn("some objects that nobody has published stay until the next sweep", "objects", failed, "err", bad)
	}
	return nil
}

func (c *Compactor) sweepOrphan(ctx context.Context, o Orphan) error {
	if !o.Condemned {
		state, err := c.o.Index.Guard(ctx, o.Block, index.Condemned)
		if err != nil {
			return err
		}
		if state == index.Published {
			return nil // its writer was faster
		}
		c.metrics.orphans.WithLabelValues("condemned").Inc()
		c.logger.Info("nobody has published a block: it is condemned", "block", o.Block, "object", o.Object, "size_bytes", o.ObjectSize)
	}
	// Its writer may have got as far as writing rows, and readers may see them.
	if err := c.removeOrphanRows(ctx, o.BlockRef); err != nil {
		return err
	}
	if !o.Condemned || o.Age < 2*c.o.OrphanAge {
		return nil
	}
	if err := c.o.Objects.Delete(ctx, o.Object); err != nil {
		return err
	}
	c.metrics.orphans.WithLabelValues("deleted").Inc()
	return nil
}

func (c *Compactor) removeOrphanRows(ctx context.Context, b index.BlockRef) error {
	f, err := readFooter(ctx, c.o.Objects, b)
	switch {
	case err == nil:
		if err := c.o.Index.DeleteRows(ctx, history.Rows(b, 0, f.Tenants)); err != nil {
			return fmt.Errorf("rows of orphan %s: %w", b.Block, err)
		}
	case unreadable(err) == "":
		return err
	}
	for _, level := range []index.Level{0, 1} {
		if err := c.deleteWork(ctx, index.JobSource{BlockRef: b, Level: level}); err != nil {
			return fmt.Errorf("work row of orphan %s: %w", b.Block, err)
		}
	}
	return nil
}

package historytest

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// ErrInjected is what an injected failure wraps.
var ErrInjected = errors.New("injected failure")

// Fault is what a wrapper does to one call.
type Fault int

// Faults.
const (
	None    Fault = iota
	Before        // fails and does nothing
	After         // does it, then fails, as when an answer is lost
	Torn          // a read gives fewer bytes or rows, without an error; a write of rows does half of it and fails
	Corrupt       // a read gives a flipped bit, without an error
	Missing       // a read finds nothing
)

// Decide says what happens to a call. It may block, which makes a slow store.
// op is the method's name, key the object's key or the row's hash key.
type Decide func(op, key string) Fault

// FaultyObjects is an object.Store that fails as Decide says.
type FaultyObjects struct {
	object.Store
	Decide Decide
}

func injected(op, key string) error { return fmt.Errorf("%s %s: %w", op, key, ErrInjected) }

// do runs a call that has no result.
func do(decide Decide, op, key string, call func() error) error {
	switch decide(op, key) {
	case Before, Torn:
		return injected(op, key)
	case After:
		if err := call(); err != nil {
			return err
		}
		return injected(op, key)
	default:
		return call()
	}
}

// Put implements object.Store.
func (f *FaultyObjects) Put(ctx context.Context, key string, r io.ReaderAt, size int64) error {
	return do(f.Decide, "Put", key, func() error { return f.Store.Put(ctx, key, r, size) })
}

// Delete implements object.Store.
func (f *FaultyObjects) Delete(ctx context.Context, key string) error {
	return do(f.Decide, "Delete", key, func() error { return f.Store.Delete(ctx, key) })
}

// List implements object.Store.
func (f *FaultyObjects) List(ctx context.Context, prefix string, fn func(object.Info) error) error {
	return do(f.Decide, "List", prefix, func() error { return f.Store.List(ctx, prefix, fn) })
}

// Size implements object.Store.
func (f *FaultyObjects) Size(ctx context.Context, key string) (int64, error) {
	switch f.Decide("Size", key) {
	case Before, After:
		return 0, injected("Size", key)
	case Missing:
		return 0, fmt.Errorf("size of %s: %w", key, object.ErrNotExist)
	default:
		return f.Store.Size(ctx, key)
	}
}

// GetRange implements object.Store.
func (f *FaultyObjects) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	fault := f.Decide("GetRange", key)
	switch fault {
	case Before, After:
		return nil, injected("GetRange", key)
	case Missing:
		return nil, fmt.Errorf("get %s: %w", key, object.ErrNotExist)
	}
	b, err := f.Store.GetRange(ctx, key, off, n)
	if err != nil || len(b) == 0 {
		return b, err
	}
	switch fault {
	case Torn:
		b = b[:len(b)/2]
	case Corrupt:
		b[len(b)/2] ^= 0x10
	}
	return b, nil
}

// FaultyRows is an index.Store that fails as Decide says.
type FaultyRows struct {
	index.Store
	Decide Decide
}

func hashOf(k []index.Key) string {
	if len(k) == 0 {
		return ""
	}
	return k[0].Hash
}

// Put implements index.Store.
func (f *FaultyRows) Put(ctx context.Context, items []index.Item) error {
	key := ""
	if len(items) > 0 {
		key = items[0].Hash
	}
	switch f.Decide("Put", key) {
	case Before:
		return injected("Put", key)
	case Torn:
		return errors.Join(f.Store.Put(ctx, items[:len(items)/2]), injected("Put", key))
	case After:
		return errors.Join(f.Store.Put(ctx, items), injected("Put", key))
	default:
		return f.Store.Put(ctx, items)
	}
}

// PutIf implements index.Store.
func (f *FaultyRows) PutIf(ctx context.Context, item index.Item, old []byte) ([]byte, error) {
	switch f.Decide("PutIf", item.Hash) {
	case Before, Torn:
		return nil, injected("PutIf", item.Hash)
	case After:
		_, err := f.Store.PutIf(ctx, item, old)
		return nil, errors.Join(err, injected("PutIf", item.Hash))
	default:
		return f.Store.PutIf(ctx, item, old)
	}
}

// Query implements index.Store.
func (f *FaultyRows) Query(ctx context.Context, q index.Query) ([]index.Item, error) {
	fault := f.Decide("Query", q.Hash)
	switch fault {
	case Before, After:
		return nil, injected("Query", q.Hash)
	case Missing:
		return nil, nil
	}
	items, err := f.Store.Query(ctx, q)
	if err != nil || len(items) == 0 {
		return items, err
	}
	switch fault {
	case Torn:
		items = items[:len(items)/2]
	case Corrupt:
		v := items[len(items)/2].Value
		v[len(v)/2] ^= 0x10
	}
	return items, nil
}

// Delete implements index.Store.
func (f *FaultyRows) Delete(ctx context.Context, keys []index.Key) error {
	return do(f.Decide, "Delete", hashOf(keys), func() error { return f.Store.Delete(ctx, keys) })
}

// HeldRows is an index.Store in which rows of some hash keys can't be written.
type HeldRows struct {
	index.Store
	Held  func(hash string) bool
	Whole bool // nor can rows that are written together with such
}

// Put implements index.Store.
func (h *HeldRows) Put(ctx context.Context, items []index.Item) error {
	var rest []index.Item
	var left []index.Key
	for _, it := range items {
		if h.Held(it.Hash) {
			left = append(left, it.Key)
		} else {
			rest = append(rest, it)
		}
	}
	if len(left) == 0 {
		return h.Store.Put(ctx, items)
	}
	err := injected("Put", left[0].Hash)
	if h.Whole {
		return err
	}
	if len(rest) > 0 {
		if err := h.Store.Put(ctx, rest); err != nil {
			return err
		}
	}
	return &index.PartialError{Left: left, Err: err}
}

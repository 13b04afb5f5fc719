package historytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// MemoryObjects is an object.Store in memory, for tests that write much or run in
// a bubble of testing/synctest. The zero value is empty.
type MemoryObjects struct {
	mu      sync.Mutex
	objects map[string]memoryObject
}

type memoryObject struct {
	data     []byte
	modified time.Time
}

func checkObject(ctx context.Context, key string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("object %.40q: %w", key, err)
	}
	return object.ValidKey(key)
}

func (m *MemoryObjects) get(key string) (memoryObject, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[key]
	if !ok {
		return o, fmt.Errorf("object %s: %w", key, object.ErrNotExist)
	}
	return o, nil
}

// Put implements object.Store.
func (m *MemoryObjects) Put(ctx context.Context, key string, r io.ReaderAt, size int64) error {
	if err := checkObject(ctx, key); err != nil {
		return err
	}
	b := make([]byte, size)
	if n, err := r.ReadAt(b, 0); n < len(b) {
		return fmt.Errorf("put %s: %w", key, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.objects == nil {
		m.objects = map[string]memoryObject{}
	}
	m.objects[key] = memoryObject{b, time.Now()}
	return nil
}

// GetRange implements object.Store.
func (m *MemoryObjects) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if err := checkObject(ctx, key); err != nil {
		return nil, err
	}
	if off < 0 || n < 0 || off+n < off {
		return nil, fmt.Errorf("get %s: impossible range of %d bytes at %d", key, n, off)
	}
	o, err := m.get(key)
	if err != nil {
		return nil, err
	}
	if off+n > int64(len(o.data)) {
		return nil, fmt.Errorf("get %s: %d bytes at %d of %d: %w", key, n, off, len(o.data), io.ErrUnexpectedEOF)
	}
	return bytes.Clone(o.data[off : off+n]), nil
}

// Size implements object.Store.
func (m *MemoryObjects) Size(ctx context.Context, key string) (int64, error) {
	if err := checkObject(ctx, key); err != nil {
		return 0, err
	}
	o, err := m.get(key)
	return int64(len(o.data)), err
}

// Delete implements object.Store.
func (m *MemoryObjects) Delete(ctx context.Context, key string) error {
	if err := checkObject(ctx, key); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, key)
	return nil
}

// List implements object.Store.
func (m *MemoryObjects) List(ctx context.Context, prefix string, fn func(object.Info) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %.40q: %w", prefix, err)
	}
	m.mu.Lock()
	all := maps.Clone(m.objects)
	m.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !strings.HasPrefix(key, prefix) {
			continue
		}
		if err := fn(object.Info{Key: key, Size: int64(len(all[key].data)), Modified: all[key].modified}); err != nil {
			return err
		}
	}
	return nil
}

// MemoryRows is an index.Store in memory, as MemoryObjects is an object.Store.
type MemoryRows struct {
	mu   sync.Mutex
	rows map[string]map[string][]byte // hash key → range key → value
}

func checkRow(it index.Item) error {
	switch {
	case it.Hash == "" || len(it.Hash) > index.MaxHash || !utf8.ValidString(it.Hash):
		return fmt.Errorf("hash key %.40q of %d bytes", it.Hash, len(it.Hash))
	case len(it.Range) == 0 || len(it.Range) > index.MaxRange:
		return fmt.Errorf("range key of %d bytes below %.40q", len(it.Range), it.Hash)
	case len(it.Value) == 0 || len(it.Value) > index.MaxValue:
		return fmt.Errorf("value of %d bytes below %.40q", len(it.Value), it.Hash)
	}
	return nil
}

// put is called with mu held.
func (m *MemoryRows) put(it index.Item) {
	if m.rows == nil {
		m.rows = map[string]map[string][]byte{}
	}
	if m.rows[it.Hash] == nil {
		m.rows[it.Hash] = map[string][]byte{}
	}
	m.rows[it.Hash][string(it.Range)] = bytes.Clone(it.Value)
}

// Put implements index.Store.
func (m *MemoryRows) Put(ctx context.Context, items []index.Item) error {
	errs := []error{ctx.Err()}
	for _, it := range items {
		errs = append(errs, checkRow(it))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("put rows: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range items {
		m.put(it)
	}
	return nil
}

// PutIf implements index.Store.
func (m *MemoryRows) PutIf(ctx context.Context, item index.Item, old []byte) ([]byte, error) {
	if err := errors.Join(ctx.Err(), checkRow(item)); err != nil {
		return nil, fmt.Errorf("put row: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	current, there := m.rows[item.Hash][string(item.Range)]
	if there && bytes.Equal(current, item.Value) {
		return bytes.Clone(current), nil
	}
	if there != (old != nil) || !bytes.Equal(current, old) {
		return bytes.Clone(current), fmt.Errorf("row %x of %s: %w", item.Range, item.Hash, index.ErrConflict)
	}
	m.put(item)
	return item.Value, nil
}

// Query implements index.Store.
func (m *MemoryRows) Query(ctx context.Context, q index.Query) ([]index.Item, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("query below %.40q: %w", q.Hash, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var items []index.Item
	for _, r := range slices.Sorted(maps.Keys(m.rows[q.Hash])) {
		if r < string(q.From) || (q.To != nil && r > string(q.To)) {
			continue
		}
		items = append(items, index.Item{Key: index.Key{Hash: q.Hash, Range: []byte(r)}, Value: bytes.Clone(m.rows[q.Hash][r])})
		if len(items) == q.Limit {
			break
		}
	}
	return items, nil
}

// Delete implements index.Store.
func (m *MemoryRows) Delete(ctx context.Context, keys []index.Key) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete rows: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range keys {
		delete(m.rows[k.Hash], string(k.Range))
	}
	return nil
}

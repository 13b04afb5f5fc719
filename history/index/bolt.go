package index

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Bolt is a Store in one local file. Every write is synced before it returns;
// every read is consistent, and a Query is a snapshot.
//
// A row's key in the file is the length of Hash in two bytes, big-endian, then
// Hash, then Range.
type Bolt struct {
	db      *bolt.DB
	metrics *metrics
}

// boltBucket holds the rows of this layout; another layout gets another name.
const boltBucket = "rows1"

// lockTimeout is how long another process may keep the file.
const lockTimeout = 2 * time.Second

// NewBolt opens the file at path, which is made if it is absent. Only one
// process at a time can have it open.
func NewBolt(path string, reg prometheus.Registerer) (*Bolt, error) {
	o := *bolt.DefaultOptions
	o.Timeout = lockTimeout
	o.FreelistType = bolt.FreelistMapType
	db, err := bolt.Open(path, 0o600, &o)
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("index file %s is in use by another process", path)
	}
	if err != nil {
		return nil, fmt.Errorf("index file %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists([]byte(boltBucket))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("index file %s: %w", path, errors.Join(err, db.Close()))
	}
	return &Bolt{db: db, metrics: newMetrics(reg)}, nil
}

// Close closes the file, after the calls that are under way.
func (b *Bolt) Close() error { return b.db.Close() }

// Check implements the same check as other stores have; an open file needs none.
func (b *Bolt) Check(context.Context) error { return nil }

func boltKey(hash string, rng []byte) []byte {
	k := make([]byte, 0, 2+len(hash)+len(rng))
	k = binary.BigEndian.AppendUint16(k, uint16(len(hash))) //nolint:gosec // at most MaxHash
	k = append(k, hash...)
	return append(k, rng...)
}

// do runs one counted transaction.
func (b *Bolt) do(ctx context.Context, op string, rows int, tx func(func(*bolt.Tx) error) error, fn func(*bolt.Bucket) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("index %s: %w", op, err)
	}
	start := time.Now()
	err := tx(func(tx *bolt.Tx) error { return fn(tx.Bucket([]byte(boltBucket))) })
	switch {
	case err == nil:
		b.metrics.observe(op, start, "ok")
		b.metrics.rows.WithLabelValues(op).Add(float64(rows))
	case errors.Is(err, ErrConflict):
		b.metrics.observe(op, start, "conflict")
	default:
		b.metrics.observe(op, start, "error")
		err = fmt.Errorf("index %s: %w", op, err)
	}
	return err
}

// Put implements Store. All rows are written, or none.
func (b *Bolt) Put(ctx context.Context, items []Item) error {
	for _, it := range items {
		if err := it.validate(); err != nil {
			return err
		}
	}
	return b.do(ctx, opPut, len(items), b.db.Update, func(rows *bolt.Bucket) error {
		for _, it := range items {
			if err := rows.Put(boltKey(it.Hash, it.Range), it.Value); err != nil {
				return err
			}
		}
		return nil
	})
}

// PutIf implements Store.
func (b *Bolt) PutIf(ctx context.Context, item Item, old []byte) (current []byte, err error) {
	if err := item.validate(); err != nil {
		return nil, err
	}
	err = b.do(ctx, opPutIf, 1, b.db.Update, func(rows *bolt.Bucket) error {
		k := boltKey(item.Hash, item.Range)
		current = bytes.Clone(rows.Get(k))
		if current != nil && bytes.Equal(current, item.Value) {
			return nil
		}
		if (current == nil) != (old == nil) || !bytes.Equal(current, old) {
			return fmt.Errorf("row %x of %s: %w", item.Range, item.Hash, ErrConflict)
		}
		current = item.Value
		return rows.Put(k, item.Value)
	})
	if err != nil && !errors.Is(err, ErrConflict) {
		current = nil
	}
	return current, err
}

// Query implements Store.
func (b *Bolt) Query(ctx context.Context, q Query) ([]Item, error) {
	if err := q.validate(); err != nil {
		return nil, err
	}
	var items []Item
	prefix := boltKey(q.Hash, nil)
	err := b.do(ctx, opQuery, 0, b.db.View, func(rows *bolt.Bucket) error {
		items = nil
		c := rows.Cursor()
		for k, v := c.Seek(boltKey(q.Hash, q.From)); bytes.HasPrefix(k, prefix); k, v = c.Next() {
			rng := k[len(prefix):]
			if q.To != nil && bytes.Compare(rng, q.To) > 0 {
				break
			}
			items = append(items, Item{Key: Key{Hash: q.Hash, Range: bytes.Clone(rng)}, Value: bytes.Clone(v)})
			if len(items) == q.Limit {
				break
			}
		}
		return nil
	})
	b.metrics.rows.WithLabelValues(opQuery).Add(float64(len(items)))
	return items, err
}

// Delete implements Store. All rows are removed, or none.
func (b *Bolt) Delete(ctx context.Context, keys []Key) error {
	for _, k := range keys {
		if err := k.validate(); err != nil {
			return err
		}
	}
	return b.do(ctx, opDelete, len(keys), b.db.Update, func(rows *bolt.Bucket) error {
		for _, k := range keys {
			if err := rows.Delete(boltKey(k.Hash, k.Range)); err != nil {
				return err
			}
		}
		return nil
	})
}

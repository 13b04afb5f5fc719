package cost

import (
	"context"
	"io"
	"strings"
	"sync"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// bill counts what S3 and DynamoDB (on demand) charge for. What belongs to a tenant
// or grows with bytes is scaled from the fleet that is simulated to the fleet meant.
type bill struct {
	// tenants and bytes are how many of the fleet one simulated stands for.
	tenants, bytes float64

	mu     sync.Mutex
	writes map[string]float64 // write units by what was written
	reads  map[string]float64 // read units
	puts   map[string]float64 // requests that cost what a PUT does
	gets   float64
	read   float64 // bytes
}

func newBill(tenants, bytes float64) *bill {
	return &bill{tenants: tenants, bytes: bytes, writes: map[string]float64{}, reads: map[string]float64{}, puts: map[string]float64{}}
}

// totals adds up.
func total(m map[string]float64) (sum float64) {
	for _, v := range m {
		sum += v
	}
	return sum
}

// since returns what came after an earlier state.
func (b *bill) since(o *bill) *bill {
	d := newBill(b.tenants, b.bytes)
	for k, v := range b.writes {
		d.writes[k] = v - o.writes[k]
	}
	for k, v := range b.reads {
		d.reads[k] = v - o.reads[k]
	}
	for k, v := range b.puts {
		d.puts[k] = v - o.puts[k]
	}
	d.gets, d.read = b.gets-o.gets, b.read-o.read
	return d
}

func (b *bill) snapshot() *bill {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.since(newBill(b.tenants, b.bytes))
}

const (
	partBytes = 64 << 20 // as object.S3Options.PartBytes is by default
	writeUnit = 1 << 10  // bytes
	readUnit  = 4 << 10  // bytes, read consistently; half a unit otherwise
	// nameBytes is what DynamoDB counts for the names of a row's three attributes.
	nameBytes = 3
)

func units(bytes, unit int) float64 { return float64(max(1, (bytes+unit-1)/unit)) }

func itemBytes(it index.Item) int {
	return nameBytes + len(it.Hash) + len(it.Range) + len(it.Value)
}

// kind says what a row is, and how many of the fleet's it stands for.
func (b *bill) kind(hash string) (string, float64) {
	switch {
	case strings.HasPrefix(hash, "b/"):
		return "block rows", b.tenants
	case strings.HasPrefix(hash, "g/"):
		return "guard rows", 1
	case strings.HasPrefix(hash, "w/"):
		return "work rows", 1
	case strings.HasPrefix(hash, "compaction/"):
		return "job rows", 1
	}
	return "other rows", b.tenants
}

// rows is an index.Store that counts.
type rows struct {
	index.Store
	bill *bill
	mu   sync.Mutex
	size map[string]int // of each row, as it was written last
}

func (r *rows) key(k index.Key) string { return k.Hash + "\x00" + string(k.Range) }

func (r *rows) wrote(what string, items ...index.Item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bill.mu.Lock()
	defer r.bill.mu.Unlock()
	for _, it := range items {
		kind, times := r.bill.kind(it.Hash)
		// A write that replaces a greater row costs what that did.
		n := max(itemBytes(it), r.size[r.key(it.Key)])
		r.bill.writes[kind+what] += times * units(n, writeUnit)
		r.size[r.key(it.Key)] = itemBytes(it)
	}
}

// Put implements index.Store.
func (r *rows) Put(ctx context.Context, items []index.Item) error {
	r.wrote("", items...)
	return r.Store.Put(ctx, items)
}

// PutIf implements index.Store: a condition that fails costs the same.
func (r *rows) PutIf(ctx context.Context, it index.Item, old []byte) ([]byte, error) {
	r.wrote("", it)
	return r.Store.PutIf(ctx, it, old)
}

// Delete implements index.Store.
func (r *rows) Delete(ctx context.Context, keys []index.Key) error {
	r.mu.Lock()
	r.bill.mu.Lock()
	for _, k := range keys {
		kind, times := r.bill.kind(k.Hash)
		r.bill.writes[kind+" removed"] += times * units(r.size[r.key(k)], writeUnit)
		delete(r.size, r.key(k))
	}
	r.bill.mu.Unlock()
	r.mu.Unlock()
	return r.Store.Delete(ctx, keys)
}

// Query implements index.Store.
func (r *rows) Query(ctx context.Context, q index.Query) ([]index.Item, error) {
	items, err := r.Store.Query(ctx, q)
	n := 0
	for _, it := range items {
		n += itemBytes(it)
	}
	u := units(n, readUnit)
	if !q.Consistent {
		u /= 2
	}
	r.bill.mu.Lock()
	defer r.bill.mu.Unlock()
	kind, times := r.bill.kind(q.Hash)
	r.bill.reads[kind] += times * u
	return items, err
}

// stored is how many bytes the rows have, of the fleet meant, as DynamoDB bills
// storage: 100 bytes more for each.
func (r *rows) stored() (bytes float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, n := range r.size {
		_, times := r.bill.kind(k)
		bytes += times * float64(n+100)
	}
	return bytes
}

// objects is an object.Store that counts.
type objects struct {
	object.Store
	bill *bill
	what string // who writes
}

// Put implements object.Store: one request, or one for each part and two more.
func (o *objects) Put(ctx context.Context, key string, r io.ReaderAt, size int64) error {
	n := 1.0
	if scaled := float64(size) * o.bill.bytes; scaled > partBytes {
		n = float64(int64(scaled+partBytes-1)/partBytes) + 2
	}
	o.bill.mu.Lock()
	o.bill.puts[o.what] += n
	o.bill.mu.Unlock()
	return o.Store.Put(ctx, key, r, size)
}

// GetRange implements object.Store.
func (o *objects) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	// Reads ahead are of bounded size: a greater object takes more of them.
	times := max(1, float64(n)*o.bill.bytes/(4<<20))
	o.bill.mu.Lock()
	o.bill.gets += times
	o.bill.read += float64(n) * o.bill.bytes
	o.bill.mu.Unlock()
	return o.Store.GetRange(ctx, key, off, n)
}

// List implements object.Store: a thousand keys a request, each as dear as a PUT.
func (o *objects) List(ctx context.Context, prefix string, fn func(object.Info) error) error {
	n := 0
	err := o.Store.List(ctx, prefix, func(i object.Info) error { n++; return fn(i) })
	o.bill.mu.Lock()
	o.bill.puts["lists"] += units(n, 1000)
	o.bill.mu.Unlock()
	return err
}

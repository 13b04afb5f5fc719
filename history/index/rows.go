package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

// ErrCorrupt is what reading a row wraps that is not as it was written.
var ErrCorrupt = errors.New("corrupt row")

// ErrVersion is what reading a row wraps that a later version of this program has written.
var ErrVersion = errors.New("unknown version of a row")

// Width is the widest range of time that a block row may span, in ms: a week.
// It is part of the format: readers rely on it.
const Width = int64(7 * 24 * time.Hour / time.Millisecond)

// WorkShards is into how many hash keys the work rows of a day are spread.
const WorkShards = 16

// The versions of values that this program writes.
const (
	blockVersion = 1
	workVersion  = 1
	guardVersion = 1
)

// Level is how far a block has been compacted; 0 is a flush.
type Level uint8

// RowID names a block row of a tenant.
type RowID struct {
	MaxT  int64 // ms since the epoch
	Block ulid.ULID
}

// Sibling is another output of the same compaction.
type Sibling struct {
	RowID
	MinT int64 // ms since the epoch
}

// BlockRow says what a block has of a tenant in a range of time of at most Width.
// A block that spans more has several rows, each for the samples in its range
// and no others.
type BlockRow struct {
	Tenant     string
	Block      ulid.ULID
	MinT, MaxT int64  // ms since the epoch, of the first and last sample, inclusive
	Object     string // key in the object store
	ObjectSize int64  // bytes
	Directory  chunkfmt.Location
	Level      Level
	Series     uint64 // of the tenant in the block, not only in the row's range
	Samples    uint64 // likewise

	// Replaces are the rows that this one and its Siblings stand for. A reader
	// that sees this row, and all siblings that overlap its query, drops them.
	Replaces []RowID
	Siblings []Sibling
}

// ID names the row among those of its tenant.
func (r *BlockRow) ID() RowID { return RowID{MaxT: r.MaxT, Block: r.Block} }

// SizeBytes is about how much memory the row takes.
func (r *BlockRow) SizeBytes() int {
	return 160 + len(r.Object) + 24*len(r.Replaces) + 32*len(r.Siblings)
}

// WorkRow names a block that compaction is to look at, and its tenants.
type WorkRow struct {
	Day        int64 // of the block's id, days since the epoch
	Shard      int   // below WorkShards
	Block      ulid.ULID
	Object     string
	ObjectSize int64 // bytes
	Level      Level
	Tenants    []string // ascending; may be empty, for the block knows its tenants
}

// NewWorkRow gives the row its day and shard, which follow from the block's id.
func NewWorkRow(block ulid.ULID) WorkRow {
	const dayMs = uint64(24 * time.Hour / time.Millisecond)
	return WorkRow{Block: block, Day: int64(block.Time() / dayMs), Shard: int(block[15]) % WorkShards} //nolint:gosec // 48 bits
}

// GuardState is what has been decided about a block: at first that it is published
// or condemned, and of a published one, when it has been replaced, that it is
// condemned. That is for good.
type GuardState uint8

// States of a guard row.
const (
	Published GuardState = 1 // its writer has written all its rows
	Condemned GuardState = 2 // it has no rows, or is to have none, and is being deleted
)

func (s GuardState) String() string {
	switch s {
	case Published:
		return "published"
	case Condemned:
		return "condemned"
	default:
		return fmt.Sprintf("guard state %d", uint8(s))
	}
}

// Hash keys. A tenant's name never gets into another kind's hash keys, for the
// kind comes first.
func blockHash(tenant string) string { return "b/" + tenant }

const workPrefix = "w/"

func workHash(day int64, shard int) string { return fmt.Sprintf("%s%d/%d", workPrefix, day, shard) }

func guardHash(block ulid.ULID) string { return "g/" + block.String() }

// timeKey keeps the order of times as bytes.
func timeKey(t int64) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(t)^1<<63) //nolint:gosec // bits
}

const (
	ulidSize     = 16
	rowIDSize    = 8 + ulidSize
	siblingSize  = rowIDSize + 8
	checksumSize = 4
)

func (id RowID) key() []byte { return append(timeKey(id.MaxT), id.Block[:]...) }

func parseRowID(b []byte) RowID {
	var id RowID
	id.MaxT = int64(binary.BigEndian.Uint64(b) ^ 1<<63) //nolint:gosec // bits
	copy(id.Block[:], b[8:])
	return id
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal appends the checksum over key and value.
func seal(k Key, value []byte) Item {
	return Item{Key: k, Value: binary.BigEndian.AppendUint32(value, checksum(k, value))}
}

func checksum(k Key, value []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(k.Hash))
	sum = crc32.Update(sum, castagnoli, k.Range)
	return crc32.Update(sum, castagnoli, value)
}

// open checks a value's checksum and version and returns what is between.
func open(it Item, version byte) (*decoder, error) { //nolint:unparam // all are at their first version
	if len(it.Value) < 1+checksumSize {
		return nil, fmt.Errorf("%w: value of %d bytes", ErrCorrupt, len(it.Value))
	}
	body := it.Value[:len(it.Value)-checksumSize]
	if binary.BigEndian.Uint32(it.Value[len(body):]) != checksum(it.Key, body) {
		return nil, fmt.Errorf("%w: checksum mismatch", ErrCorrupt)
	}
	if body[0] != version {
		return nil, fmt.Errorf("%w: %d, this program reads %d", ErrVersion, body[0], version)
	}
	return &decoder{untrusted.Reader{B: body[1:], Kind: ErrCorrupt}}, nil
}

// decoder reads the fields of rows.
type decoder struct{ untrusted.Reader }

// size reads a size or offset in bytes.
func (d *decoder) size() int64 { return int64(d.Bounded("size", math.MaxInt64/2)) }

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// spanTooWide holds also where the difference overflows.
func spanTooWide(mint, maxt int64) bool {
	return uint64(maxt)-uint64(mint) > uint64(Width) //nolint:gosec // mint <= maxt
}

func (r *BlockRow) validate() error {
	switch {
	case r.Tenant == "":
		return fmt.Errorf("block row of %s: no tenant", r.Block)
	case r.Object == "":
		return fmt.Errorf("block row of %s: no object", r.Block)
	case r.MinT > r.MaxT || spanTooWide(r.MinT, r.MaxT):
		return fmt.Errorf("block row of %s: from %d to %d ms is not a range of at most %d ms", r.Block, r.MinT, r.MaxT, Width)
	case r.Directory.Offset < 0 || r.Directory.Size <= 0 || r.Directory.Offset > r.ObjectSize-r.Directory.Size:
		return fmt.Errorf("block row of %s: directory of %d bytes at %d in an object of %d", r.Block, r.Directory.Size, r.Directory.Offset, r.ObjectSize)
	}
	return nil
}

func (r *BlockRow) encode() (Item, error) {
	if err := r.validate(); err != nil {
		return Item{}, err
	}
	b := []byte{blockVersion, byte(r.Level)}
	b = binary.AppendUvarint(b, uint64(r.MaxT)-uint64(r.MinT)) //nolint:gosec // MinT <= MaxT
	b = appendText(b, r.Object)
	b = binary.AppendUvarint(b, uint64(r.ObjectSize))       //nolint:gosec // validated
	b = binary.AppendUvarint(b, uint64(r.Directory.Offset)) //nolint:gosec // validated
	b = binary.AppendUvarint(b, uint64(r.Directory.Size))   //nolint:gosec // validated
	b = binary.AppendUvarint(b, r.Series)
	b = binary.AppendUvarint(b, r.Samples)
	b = binary.AppendUvarint(b, uint64(len(r.Replaces)))
	for _, id := range r.Replaces {
		b = append(b, id.key()...)
	}
	b = binary.AppendUvarint(b, uint64(len(r.Siblings)))
	for _, s := range r.Siblings {
		b = append(append(b, s.key()...), timeKey(s.MinT)...)
	}
	return seal(Key{Hash: blockHash(r.Tenant), Range: r.ID().key()}, b), nil
}

func decodeBlockRow(tenant string, it Item) (BlockRow, error) {
	r := BlockRow{Tenant: tenant}
	if len(it.Range) != rowIDSize {
		return r, fmt.Errorf("%w: range key of %d bytes", ErrCorrupt, len(it.Range))
	}
	id := parseRowID(it.Range)
	r.MaxT, r.Block = id.MaxT, id.Block
	d, err := open(it, blockVersion)
	if err != nil {
		return r, err
	}
	r.Level = Level(d.Byte())
	r.MinT = int64(uint64(r.MaxT) - d.Uvarint()) //nolint:gosec // validated below
	r.Object = d.Text()
	r.ObjectSize = d.size()
	r.Directory.Offset, r.Directory.Size = d.size(), d.size()
	r.Series, r.Samples = d.Uvarint(), d.Uvarint()
	if n := d.Count(rowIDSize); n > 0 {
		r.Replaces = make([]RowID, n)
		for i := range r.Replaces {
			r.Replaces[i] = parseRowID(d.Bytes(rowIDSize))
		}
	}
	if n := d.Count(siblingSize); n > 0 {
		r.Siblings = make([]Sibling, n)
		for i := range r.Siblings {
			b := d.Bytes(siblingSize)
			r.Siblings[i] = Sibling{RowID: parseRowID(b), MinT: int64(binary.BigEndian.Uint64(b[rowIDSize:]) ^ 1<<63)} //nolint:gosec // bits
		}
	}
	if err := d.End(); err != nil {
		return r, err
	}
	if err := r.validate(); err != nil {
		return r, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return r, nil
}

// maxTenantBytes is how much of a work row's value its tenants may take; what is
// more goes to further rows.
const maxTenantBytes = 256 << 10

// encode gives one item, or more if there are many tenants.
func (w *WorkRow) encode() ([]Item, error) {
	if w.Shard < 0 || w.Shard >= WorkShards || w.Object == "" {
		return nil, fmt.Errorf("work row of %s: shard %d, object %q", w.Block, w.Shard, w.Object)
	}
	var items []Item
	tenants := w.Tenants
	for part := 0; part == 0 || len(tenants) > 0; part++ {
		n, size := 0, 0
		for n < len(tenants) && (n == 0 || size+len(tenants[n]) < maxTenantBytes) {
			size += len(tenants[n]) + 2
			n++
		}
		b := []byte{workVersion, byte(w.Level)}
		b = appendText(b, w.Object)
		b = binary.AppendUvarint(b, uint64(w.ObjectSize)) //nolint:gosec // not negative
		b = binary.AppendUvarint(b, uint64(n))
		for _, t := range tenants[:n] {
			b = appendText(b, t)
		}
		tenants = tenants[n:]
		items = append(items, seal(Key{
			Hash: workHash(w.Day, w.Shard), Range: binary.BigEndian.AppendUint16(w.Block[:], uint16(part)), //nolint:gosec // few
		}, b))
	}
	return items, nil
}

// decodeWorkRow reads a part of a row.
func decodeWorkRow(day int64, shard int, it Item) (WorkRow, error) {
	w := WorkRow{Day: day, Shard: shard}
	if len(it.Range) != ulidSize+2 {
		return w, fmt.Errorf("%w: range key of %d bytes", ErrCorrupt, len(it.Range))
	}
	d, err := open(it, workVersion)
	if err != nil {
		return w, err
	}
	copy(w.Block[:], it.Range)
	w.Level = Level(d.Byte())
	w.Object = d.Text()
	w.ObjectSize = d.size()
	w.Tenants = make([]string, d.Count(1))
	for i := range w.Tenants {
		w.Tenants[i] = d.Text()
	}
	return w, d.End()
}

func encodeGuard(block ulid.ULID, s GuardState) Item {
	return seal(Key{Hash: guardHash(block), Range: []byte{0}}, []byte{guardVersion, byte(s)})
}

func decodeGuard(it Item) (GuardState, error) {
	d, err := open(it, guardVersion)
	if err != nil {
		return 0, err
	}
	s := GuardState(d.Byte())
	if err := d.End(); err != nil {
		return 0, err
	}
	if s != Published && s != Condemned {
		return 0, fmt.Errorf("%w: %s", ErrCorrupt, s)
	}
	return s, nil
}

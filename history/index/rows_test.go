package index

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

func testULID(n byte) ulid.ULID {
	id := ulid.MustNew(1_700_000_000_000+uint64(n), nil)
	id[15] = n
	return id
}

func testBlockRow() BlockRow {
	return BlockRow{
		Tenant: "acme", Block: testULID(1), MinT: 1_700_000_000_000, MaxT: 1_700_000_000_000 + Width, Object: "blocks/01",
		ObjectSize: 1 << 30, Directory: chunkfmt.Location{Offset: 1000, Size: 200}, Level: 2, Series: 10, Samples: 1 << 40,
		Replaces: []RowID{{MaxT: -5, Block: testULID(2)}, {MaxT: math.MaxInt64, Block: testULID(3)}},
		Siblings: []Sibling{{RowID: RowID{MaxT: 7, Block: testULID(4)}, MinT: math.MinInt64}},
	}
}

func TestBlockRowRoundTrip(t *testing.T) {
	small := BlockRow{
		Tenant: "a", Block: testULID(9), MinT: math.MinInt64, MaxT: math.MinInt64, Object: "o", ObjectSize: 1,
		Directory: chunkfmt.Location{Size: 1},
	}
	late := small
	late.MinT, late.MaxT = math.MaxInt64-Width, math.MaxInt64
	for _, want := range []BlockRow{testBlockRow(), small, late} {
		it, err := want.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeBlockRow(want.Tenant, it)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

func TestBlockRowInvalid(t *testing.T) {
	for name, change := range map[string]func(*BlockRow){
		"no tenant":            func(r *BlockRow) { r.Tenant = "" },
		"no object":            func(r *BlockRow) { r.Object = "" },
		"too wide":             func(r *BlockRow) { r.MinT-- },
		"far too wide":         func(r *BlockRow) { r.MinT, r.MaxT = math.MinInt64, math.MaxInt64 },
		"backwards":            func(r *BlockRow) { r.MinT = r.MaxT + 1 },
		"no directory":         func(r *BlockRow) { r.Directory.Size = 0 },
		"directory behind end": func(r *BlockRow) { r.Directory.Offset = r.ObjectSize - r.Directory.Size + 1 },
		"directory overflows":  func(r *BlockRow) { r.Directory.Offset, r.Directory.Size = math.MaxInt64, math.MaxInt64 },
		"directory before":     func(r *BlockRow) { r.Directory.Offset = -1 },
	} {
		r := testBlockRow()
		change(&r)
		if _, err := r.encode(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRowDamage(t *testing.T) {
	r := testBlockRow()
	it, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	wantErr := func(name string, it Item, want error) {
		t.Helper()
		if _, err := decodeBlockRow("acme", it); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	for i := range it.Value {
		bad := it
		bad.Value = append([]byte(nil), it.Value...)
		bad.Value[i] ^= 1
		wantErr("flipped bit", bad, ErrCorrupt)
		bad.Value = it.Value[:i]
		wantErr("cut", bad, ErrCorrupt)
	}
	moved := it
	moved.Range = append([]byte(nil), it.Range...)
	moved.Range[3] ^= 1
	wantErr("moved in time", moved, ErrCorrupt)
	moved = it
	moved.Hash = blockHash("other")
	wantErr("moved to another tenant", moved, ErrCorrupt)
	wantErr("later version", seal(it.Key, []byte{blockVersion + 1, 1, 2, 3}), ErrVersion)
	wantErr("trailing bytes", seal(it.Key, append(append([]byte(nil), it.Value[:len(it.Value)-4]...), 0)), ErrCorrupt)
	wantErr("huge count", seal(it.Key, []byte{blockVersion, 0, 0, 1, 'o', 9, 0, 1, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x7f, 0}), ErrCorrupt)
}

func TestWorkRow(t *testing.T) {
	w := NewWorkRow(testULID(35))
	if w.Day != 1_700_000_000_035/86_400_000 || w.Shard != 35%WorkShards {
		t.Errorf("day %d, shard %d", w.Day, w.Shard)
	}
	w.Object, w.ObjectSize, w.Level = "blocks/x", 123, 1
	for _, n := range []int{0, 1, 3, 20_000} {
		w.Tenants = make([]string, n)
		for i := range w.Tenants {
			w.Tenants[i] = strings.Repeat(string(rune('a'+i%26)), 20+i%30)
		}
		items, err := w.encode()
		if err != nil {
			t.Fatal(err)
		}
		for _, it := range items {
			if len(it.Value) > MaxValue {
				t.Errorf("%d tenants: value of %d bytes", n, len(it.Value))
			}
		}
		rows, err := decodeWork(w.Day, w.Shard, items)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]WorkRow{w}, rows); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

func FuzzDecodeRows(f *testing.F) {
	r := testBlockRow()
	it, err := r.encode()
	if err != nil {
		f.Fatal(err)
	}
	w := NewWorkRow(testULID(1))
	w.Object, w.Tenants = "o", []string{"a", "b"}
	work, err := w.encode()
	if err != nil {
		f.Fatal(err)
	}
	engine, err := (&EngineRow{Tenant: "acme", LookbackDelta: 300_000, Features: []string{"a", "b"}, EvaluationInterval: 15_000}).encode()
	if err != nil {
		f.Fatal(err)
	}
	for _, it := range []Item{it, work[0], encodeGuard(testULID(1), Published), engine} {
		f.Add(it.Range, it.Value[:len(it.Value)-4])
	}
	f.Fuzz(func(t *testing.T, rng, body []byte) {
		// The checksum is made to fit, or nothing would get past it.
		k := Key{Hash: blockHash("acme"), Range: rng}
		if r, err := decodeBlockRow("acme", seal(k, append([]byte(nil), body...))); err == nil {
			again, err := r.encode()
			if err != nil {
				t.Fatalf("decoded row can't be encoded: %v", err)
			}
			r2, err := decodeBlockRow("acme", again)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(r, r2); d != "" {
				t.Fatal(d)
			}
		}
		if r, err := decodeEngineRow("acme", seal(k, append([]byte(nil), body...))); err == nil {
			again, err := r.encode()
			if err != nil {
				t.Fatalf("decoded row can't be encoded: %v", err)
			}
			if r2, err := decodeEngineRow("acme", again); err != nil || !r.Equal(r2) {
				t.Fatalf("%v, %v, want %v", r2, err, r)
			}
		}
		_, _ = decodeWorkRow(1, 2, seal(k, append([]byte(nil), body...)))
		_, _ = decodeGuard(seal(k, append([]byte(nil), body...)))
	})
}

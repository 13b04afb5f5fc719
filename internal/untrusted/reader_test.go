package untrusted_test

import (
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

var errBroken = errors.New("broken")

func TestReader(t *testing.T) {
	b := []byte{7}
	b = binary.AppendUvarint(b, math.MaxUint64)
	b = binary.AppendVarint(b, math.MinInt64)
	b = binary.AppendVarint(b, -3)
	b = binary.LittleEndian.AppendUint32(b, 1<<31)
	b = binary.LittleEndian.AppendUint64(b, 1<<63)
	b = append(b, 2, 'a', 'b', 1, 'c', 200, 1)
	r := untrusted.Reader{B: b, Kind: errBroken}
	if r.Byte() != 7 || r.Uvarint() != math.MaxUint64 || r.Varint() != math.MinInt64 || r.Varint() != -3 || r.Uint32() != 1<<31 || r.Uint64() != 1<<63 ||
		r.Text() != "ab" || string(r.Sized()) != "c" || r.Bounded("size", 200) != 200 {
		t.Error("other values than were written")
	}
	if err := r.End(); err != nil {
		t.Error(err)
	}
}

// TestHostile has bytes that end too early, or say that more follows than does: every read of them fails, takes
// nothing, and so do all after it.
func TestHostile(t *testing.T) {
	long := []byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1}
	for _, c := range []struct {
		name string
		b    []byte
		read func(r *untrusted.Reader) bool // reports whether it gave something
	}{
		{"byte", nil, func(r *untrusted.Reader) bool { return r.Byte() != 0 }},
		{"uvarint", nil, func(r *untrusted.Reader) bool { return r.Uvarint() != 0 }},
		{"uvarint that goes on", []byte{0xff, 0xff}, func(r *untrusted.Reader) bool { return r.Uvarint() != 0 }},
		{"uvarint of too many bytes", long, func(r *untrusted.Reader) bool { return r.Uvarint() != 0 }},
		{"varint of too many bytes", long, func(r *untrusted.Reader) bool { return r.Varint() != 0 }},
		{"uint32", []byte{1, 2, 3}, func(r *untrusted.Reader) bool { return r.Uint32() != 0 }},
		{"uint64", []byte{1, 2, 3, 4, 5, 6, 7}, func(r *untrusted.Reader) bool { return r.Uint64() != 0 }},
		{"count", []byte{3, 1, 2, 3, 4, 5}, func(r *untrusted.Reader) bool { return r.Count(2) != 0 }},
		{"count beyond an int", binary.AppendUvarint(nil, math.MaxUint64), func(r *untrusted.Reader) bool { return r.Count(1) != 0 }},
		{"bounded", []byte{3}, func(r *untrusted.Reader) bool { return r.Bounded("size", 2) != 0 }},
		{"bytes", []byte{1}, func(r *untrusted.Reader) bool { return r.Bytes(2) != nil }},
		{"less than no bytes", []byte{1}, func(r *untrusted.Reader) bool { return r.Bytes(-1) != nil }},
		{"text", []byte{2, 'a'}, func(r *untrusted.Reader) bool { return r.Text() != "" }},
		{"left over", []byte{2}, func(r *untrusted.Reader) bool { return r.End() == nil }},
	} {
		r := untrusted.Reader{B: c.b, Kind: errBroken}
		if c.read(&r) || !errors.Is(r.Err, errBroken) || r.B != nil {
			t.Errorf("%s: error %v, %d bytes left", c.name, r.Err, len(r.B))
		}
		first := r.Err
		if r.Byte() != 0 || r.Uvarint() != 0 || r.Varint() != 0 || r.Uint32() != 0 || r.Uint64() != 0 || r.Count(1) != 0 || r.Text() != "" || r.Sized() != nil {
			t.Errorf("%s: something is read after an error", c.name)
		}
		if r.End() != first { //nolint:errorlint // the very same
			t.Errorf("%s: %v, and then %v", c.name, first, r.Err)
		}
	}
	r := untrusted.Reader{B: []byte{9}, Kind: errBroken}
	r.Bounded("series", 8)
	if !strings.Contains(r.Err.Error(), "series is 9, limit 8") {
		t.Error(r.Err)
	}
}

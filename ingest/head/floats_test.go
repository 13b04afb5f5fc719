package head

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"

	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// same compares the bytes of a chunk with those that chunkenc gives.
func compareFloats(t *testing.T, ts []int64, vs []float64) {
	t.Helper()
	c := chunkenc.NewXOR2Chunk()
	app, err := c.Appender()
	if err != nil {
		t.Fatal(err)
	}
	var f floats
	for i := range ts {
		app.Append(0, ts[i], vs[i])
		if i == 0 {
			f.start(ts[0], vs[0])
		} else {
			f.append(ts[i], vs[i])
		}
		if !bytes.Equal(f.bytes(), c.Bytes()) {
			t.Fatalf("after sample %d, %d: %v:\n%x, chunkenc has\n%x", i, ts[i], vs[i], f.bytes(), c.Bytes())
		}
	}
	if f.mint() != ts[0] {
		t.Errorf("begins at %d, want %d", f.mint(), ts[0])
	}
	// Several at once, cut at any place.
	scratch := make([]byte, mostBytes)
	for step := 1; step <= len(ts)+1; step = step*3/2 + 1 {
		var r run
		grown := 0
		for i := 0; i < len(ts); {
			s := sample{t: ts[i], v: vs[i]}
			g, err := r.append(&s)
			if err != nil {
				t.Fatal(err)
			}
			end := min(len(ts), i+1+step)
			n, more := r.extend(ts[i+1:end], vs[i+1:end], scratch)
			if grown += g + more; n != end-i-1 {
				t.Fatalf("took %d samples of %d", n, end-i-1)
			}
			i = end
		}
		if g := &r.floats; !bytes.Equal(g.bytes(), c.Bytes()) || g.t != f.t || g.tDelta != f.tDelta || g.stale != f.stale || g.free != f.free || grown != cap(g.stream) {
			t.Fatalf("in steps of %d: %x, %d bytes, want %x", step, g.bytes(), grown, c.Bytes())
		}
	}
}

func TestFloatsAreThoseOfChunkenc(t *testing.T) {
	for _, kind := range gen.Kinds() {
		c := gen.Config{Series: 60, Targets: 6, Start: 1_700_000_000_000, Interval: 15000, Seed: uint64(kind), Churn: 3}
		c.End = c.Start + chunkSamples*c.Interval
		for _, s := range c.AllSeries() {
			var ts []int64
			var vs []float64
			for it := s.Iter(c); ; {
				at, v, ok := it.Next()
				if !ok {
					break
				}
				ts, vs = append(ts, at), append(vs, v)
			}
			if len(ts) > 0 {
				compareFloats(t, ts, vs)
			}
		}
	}
	stale := math.Float64frombits(value.StaleNaN)
	compareFloats(t, []int64{-5, -4, 0, 1, 1 << 40, 1<<40 + 1, 1<<40 + 2}, []float64{stale, stale, 1, stale, math.Inf(1), math.NaN(), stale})
	compareFloats(t, []int64{math.MinInt64, 0, math.MaxInt64}, []float64{0, math.Copysign(0, -1), math.MaxFloat64})
}

// FuzzFloats takes pairs of a time difference and a value from the input.
func FuzzFloats(f *testing.F) {
	f.Add([]byte("0123456789abcdefghijklmnopqrstuvwxyz"))
	f.Add([]byte{1, 0, 1, 1, 0, 2, 2, 1, 3, 200, 2, 4, 1, 3, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		var ts []int64
		var vs []float64
		at, v := int64(1_700_000_000_000), uint64(0)
		for len(b) >= 3 && len(ts) < chunkSamples {
			switch b[0] % 4 {
			case 0:
				at += int64(b[1]) + 1
			case 1:
				at += 15000
			case 2:
				at += int64(b[1])<<12 + 1
			case 3:
				at += int64(b[1])<<33 + 1
			}
			switch b[0] / 4 % 4 {
			case 0:
				v = math.Float64bits(float64(b[2]))
			case 1:
				v ^= uint64(b[2]) << (b[0] / 16 * 4)
			case 2:
				v = value.StaleNaN
			case 3:
				if len(b) >= 11 {
					v = binary.LittleEndian.Uint64(b[3:])
					b = b[8:]
				}
			}
			b = b[3:]
			ts, vs = append(ts, at), append(vs, math.Float64frombits(v))
		}
		if len(ts) > 0 {
			compareFloats(t, ts, vs)
		}
	})
}

package fetch

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
)

// iterated decodes with Prometheus's iterator.
func iterated(data []byte) (ts []int64, vs []uint64, err error) {
	c := chunkenc.NewXOR2Chunk()
	c.Reset(data)
	it := c.Iterator(nil)
	for it.Next() == chunkenc.ValFloat {
		t, v := it.At()
		ts, vs = append(ts, t), append(vs, math.Float64bits(v))
	}
	return ts, vs, it.Err()
}

func bitsOf(vs []float64) []uint64 {
	var out []uint64
	for _, v := range vs {
		out = append(out, math.Float64bits(v))
	}
	return out
}

// series gives samples with jumps of each size that the encoding tells apart.
func series(r *rand.Rand, n int) (ts []int64, vs []float64) {
	t, v := r.Int64N(1<<42)-1<<20, math.Floor(r.Float64()*1e6)
	for range n {
		ts, vs = append(ts, t), append(vs, v)
		t += 15_000
		switch r.IntN(12) {
		case 0:
			t += r.Int64N(2000)
		case 1:
			t += r.Int64N(400_000)
		case 2:
			t += r.Int64N(1 << 40)
		}
		switch r.IntN(8) {
		case 0, 1, 2:
		case 3:
			v += float64(r.IntN(100))
		case 4:
			v = r.NormFloat64()
		case 5:
			v = math.Float64frombits(r.Uint64())
		case 6:
			v = math.Float64frombits(value.StaleNaN)
		default:
			v *= 1.5
		}
	}
	return ts, vs
}

func xor2Chunk(tb testing.TB, ts []int64, vs []float64) []byte {
	tb.Helper()
	c := chunkenc.NewXOR2Chunk()
	app, err := c.Appender()
	if err != nil {
		tb.Fatal(err)
	}
	for i, t := range ts {
		app.Append(0, t, vs[i])
	}
	return slices.Clone(c.Bytes())
}

func TestXOR2(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 0))
		ts, vs := series(r, r.IntN(127)) // with more there are start timestamps
		data := xor2Chunk(t, ts, vs)
		var d xor2
		gotT, gotV, err := d.append(data, nil, nil)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !slices.Equal(gotT, ts) || !slices.Equal(bitsOf(gotV), bitsOf(vs)) {
			t.Fatalf("seed %d: other samples", seed)
		}
		for cut := xor2Header; cut < len(data)-1; cut += 1 + len(data)/20 {
			if _, _, err := d.append(data[:cut], nil, nil); err == nil {
				t.Fatalf("seed %d: no error about %d of %d bytes", seed, cut, len(data))
			}
		}
	}
}

func FuzzXOR2(f *testing.F) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		ts, vs := series(r, 1+r.IntN(40))
		f.Add(xor2Chunk(f, ts, vs))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if !plainXOR2(data) {
			return
		}
		var d xor2
		ts, vs, err := d.append(data, nil, nil)
		if err != nil {
			return // Prometheus's reader makes something up where few bits are lacking
		}
		wantT, wantV, err := iterated(data)
		if err != nil || !slices.Equal(ts, wantT) || !slices.Equal(bitsOf(vs), wantV) {
			t.Fatalf("%v %x, Prometheus %v %x, %v", ts, bitsOf(vs), wantT, wantV, err)
		}
	})
}

func BenchmarkXOR2(b *testing.B) {
	for _, kind := range []string{"constant", "counter", "noise"} {
		r := rand.New(rand.NewPCG(1, 2))
		var ts []int64
		var vs []float64
		v := 1000.0
		for i := range 120 {
			ts = append(ts, 1_700_000_000_000+int64(i)*15_000)
			switch kind {
			case "counter":
				v += float64(r.IntN(200))
			case "noise":
				v = r.NormFloat64()
			}
			vs = append(vs, v)
		}
		data := xor2Chunk(b, ts, vs)
		b.Run(kind+"/iterator", func(b *testing.B) {
			var it chunkenc.Iterator
			for b.Loop() {
				c := chunkenc.NewXOR2Chunk()
				c.Reset(data)
				it = c.Iterator(it)
				for it.Next() != chunkenc.ValNone {
					it.At()
				}
			}
			b.ReportMetric(float64(b.N)*120/b.Elapsed().Seconds()/1e6, "Msamples/s")
		})
		b.Run(kind+"/bulk", func(b *testing.B) {
			var d xor2
			var t []int64
			var v []float64
			for b.Loop() {
				t, v, _ = d.append(data, t[:0], v[:0])
			}
			b.ReportMetric(float64(b.N)*120/b.Elapsed().Seconds()/1e6, "Msamples/s")
		})
	}
}

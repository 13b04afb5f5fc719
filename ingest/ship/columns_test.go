package ship

import (
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
)

func bits(vs []float64) []uint64 {
	out := make([]uint64, len(vs))
	for i, v := range vs {
		out[i] = math.Float64bits(v)
	}
	return out
}

func sampleColumns() *Columns {
	stale := math.Float64frombits(0x7ff0000000000002)
	return &Columns{
		Floats: Floats{
			Ref: []uint32{7, 0, math.MaxUint32, 7},
			T:   []int64{1_700_000_000_000, 1_700_000_000_000, math.MinInt64, math.MaxInt64},
			ST:  []int64{0, 1_700_000_000_001, 1, 1_600_000_000_000},
			V:   []float64{1.5, stale, math.Inf(-1), math.Copysign(0, -1)},
		},
		Histograms: Histograms{
			Ref: []uint32{1, 2}, T: []int64{5, 6},
			H: []*histogram.Histogram{tsdbutil.GenerateTestHistogram(3), tsdbutil.GenerateTestCustomBucketsHistogram(2)},
		},
		FloatHistograms: FloatHistograms{
			Ref: []uint32{3}, T: []int64{-5}, ST: []int64{-5},
			H: []*histogram.FloatHistogram{tsdbutil.GenerateTestFloatHistogram(9)},
		},
	}
}

func TestColumnsRoundTrip(t *testing.T) {
	for name, c := range map[string]*Columns{"all": sampleColumns(), "none": {}} {
		var got Columns
		b := new(Encoder).Encode(nil, c)
		if err := new(Decoder).Decode(b, &got); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !reflect.DeepEqual(bits(got.Floats.V), bits(c.Floats.V)) {
			t.Errorf("%s: values %v, want %v", name, got.Floats.V, c.Floats.V)
		}
		got.Floats.V, c.Floats.V = nil, nil
		if got.Len() != c.Len() || c.Len() > 0 && !reflect.DeepEqual(&got, c) {
			t.Errorf("%s: got %+v, want %+v", name, got, c)
		}
	}
}

func TestDecodeRejects(t *testing.T) {
	good := new(Encoder).Encode(nil, sampleColumns())
	for n := range good {
		var c Columns
		if err := new(Decoder).Decode(good[:n], &c); n > 0 && !errors.Is(err, ErrColumns) {
			t.Errorf("cut to %d of %d bytes: %v", n, len(good), err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(new(Encoder).Encode(nil, sampleColumns()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var c Columns
		if err := new(Decoder).Decode(b, &c); err != nil {
			if !errors.Is(err, ErrColumns) {
				t.Fatalf("error of another class: %v", err)
			}
			return
		}
		// What was taken goes round.
		var again Columns
		if err := new(Decoder).Decode(new(Encoder).Encode(nil, &c), &again); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(bits(c.Floats.V), bits(again.Floats.V)) || !reflect.DeepEqual(c.Floats.T, again.Floats.T) {
			t.Fatal("floats differ after a round trip")
		}
	})
}

func scrape(n int) *Columns {
	r := rand.New(rand.NewPCG(1, 2))
	c := &Columns{}
	for i := range n {
		c.Floats.Ref = append(c.Floats.Ref, uint32(i))
		c.Floats.T = append(c.Floats.T, 1_700_000_000_000+int64(i/500))
		c.Floats.V = append(c.Floats.V, float64(r.IntN(1e6)))
	}
	return c
}

func BenchmarkEncode(b *testing.B) {
	c, e := scrape(5000), new(Encoder)
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = e.Encode(buf[:0], c)
	}
	b.ReportMetric(float64(len(buf))/5000, "B/sample")
	b.ReportMetric(float64(b.N)*5000/b.Elapsed().Seconds()/1e6, "Msamples/s")
}

func BenchmarkDecode(b *testing.B) {
	buf := new(Encoder).Encode(nil, scrape(5000))
	var c Columns
	d := new(Decoder)
	b.ReportAllocs()
	for b.Loop() {
		if err := d.Decode(buf, &c); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*5000/b.Elapsed().Seconds()/1e6, "Msamples/s")
}

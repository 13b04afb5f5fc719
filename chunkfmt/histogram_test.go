package chunkfmt

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/value"
)

var oddFloats = []float64{
	0, math.Copysign(0, -1), 1, -1, 0.1, 1e300, math.SmallestNonzeroFloat64, -math.SmallestNonzeroFloat64, math.MaxFloat64,
	math.Inf(1), math.Inf(-1), math.NaN(), math.Float64frombits(value.StaleNaN), math.Float64frombits(0xfff8000000001234),
	math.Float64frombits(0x7ff0000000000001), 1 << 53, 1<<53 + 2, -(1 << 62), 1e22, 123456.789,
}

func oddFloat(r *rand.Rand) float64 {
	switch r.IntN(3) {
	case 0:
		return oddFloats[r.IntN(len(oddFloats))]
	case 1:
		return math.Float64frombits(r.Uint64())
	default:
		return float64(r.IntN(1000)) / 10
	}
}

func randomSpans(r *rand.Rand) (spans []histogram.Span, buckets int) {
	for range r.IntN(4) {
		s := histogram.Span{Offset: int32(r.IntN(20) - 5), Length: uint32(r.IntN(6))}
		spans = append(spans, s)
		buckets += int(s.Length)
	}
	return spans, buckets
}

func randomHistogram(r *rand.Rand) *histogram.Histogram {
	h := &histogram.Histogram{
		CounterResetHint: histogram.CounterResetHint(r.IntN(4)), Schema: int32(r.IntN(13) - 4),
		Count: r.Uint64() >> r.IntN(64), Sum: oddFloat(r),
	}
	if r.IntN(4) == 0 {
		h.Schema = histogram.CustomBucketsSchema
		for range r.IntN(5) {
			h.CustomValues = append(h.CustomValues, oddFloat(r))
		}
	}
	if r.IntN(2) == 0 {
		h.ZeroThreshold, h.ZeroCount = oddFloat(r), r.Uint64()>>r.IntN(64)
	}
	ints := func(n int) (out []int64) {
		for range n {
			out = append(out, int64(r.Uint64()>>r.IntN(64)))
		}
		return out
	}
	var n int
	h.PositiveSpans, n = randomSpans(r)
	h.PositiveBuckets = ints(n)
	h.NegativeSpans, n = randomSpans(r)
	h.NegativeBuckets = ints(n)
	return h
}

func randomFloatHistogram(r *rand.Rand) *histogram.FloatHistogram {
	h := randomHistogram(r)
	f := &histogram.FloatHistogram{
		CounterResetHint: h.CounterResetHint, Schema: h.Schema, Count: oddFloat(r), Sum: h.Sum,
		ZeroThreshold: h.ZeroThreshold, ZeroCount: oddFloat(r),
		PositiveSpans: h.PositiveSpans, NegativeSpans: h.NegativeSpans, CustomValues: h.CustomValues,
	}
	for range h.PositiveBuckets {
		f.PositiveBuckets = append(f.PositiveBuckets, oddFloat(r))
	}
	for range h.NegativeBuckets {
		f.NegativeBuckets = append(f.NegativeBuckets, oddFloat(r))
	}
	return f
}

// bitEqual compares deeply, floats by their bits, nil equal to empty.
func bitEqual(a, b any) bool { return bitEqualValue(reflect.ValueOf(a), reflect.ValueOf(b)) }

func bitEqualValue(a, b reflect.Value) bool {
	switch a.Kind() {
	case reflect.Pointer:
		return bitEqualValue(a.Elem(), b.Elem())
	case reflect.Float64:
		return math.Float64bits(a.Float()) == math.Float64bits(b.Float())
	case reflect.Slice:
		if a.Len() != b.Len() {
			return false
		}
		for i := range a.Len() {
			if !bitEqualValue(a.Index(i), b.Index(i)) {
				return false
			}
		}
		return true
	case reflect.Struct:
		for i := range a.NumField() {
			if !bitEqualValue(a.Field(i), b.Field(i)) {
				return false
			}
		}
		return true
	default:
		return a.Equal(b)
	}
}

func TestHistogramRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		h, f := randomHistogram(r), randomFloatHistogram(r)
		b := AppendHistogram([]byte("x"), h)
		b = AppendFloatHistogram(b, f)
		h2, rest, err := DecodeHistogram(b[1:])
		if err != nil || !bitEqual(h, h2) {
			t.Fatalf("%v\n%v\n%v", err, h, h2)
		}
		f2, rest, err := DecodeFloatHistogram(rest)
		if err != nil || len(rest) != 0 || !bitEqual(f, f2) {
			t.Fatalf("%v\n%v\n%v", err, f, f2)
		}
		for n := range len(b) - 1 {
			if _, _, err := DecodeHistogram(b[1 : 1+n]); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
		}
	}
}

func FuzzDecodeHistogram(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		f.Add(AppendHistogram(nil, randomHistogram(r)))
		f.Add(AppendFloatHistogram(nil, randomFloatHistogram(r)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, _, err := DecodeHistogram(b); err == nil {
			if err := ValidHistogram(h); err != nil {
				t.Fatal(err)
			}
			again := AppendHistogram(nil, h)
			h2, rest, err := DecodeHistogram(again)
			if err != nil || len(rest) != 0 || !bitEqual(h, h2) || !bytes.Equal(again, AppendHistogram(nil, h2)) {
				t.Fatalf("%v %v %v", err, h, h2)
			}
		} else if !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		if h, _, err := DecodeFloatHistogram(b); err == nil {
			again := AppendFloatHistogram(nil, h)
			h2, rest, err := DecodeFloatHistogram(again)
			if err != nil || len(rest) != 0 || !bitEqual(h, h2) {
				t.Fatalf("%v %v %v", err, h, h2)
			}
		} else if !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

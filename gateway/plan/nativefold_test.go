package plan

import (
	"fmt"
	"math"
	"math/rand"
	"testing"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/util/annotations"
)

// What is added up by the indexes of buckets is, to the bit, what the methods of the engine's histograms give.
func TestNativeSums(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	number := func() float64 {
		if rnd.Intn(50) == 0 {
			return []float64{0, math.Copysign(0, -1), 1e299, 1.7e308, math.Inf(1), math.NaN(), -3}[rnd.Intn(7)]
		}
		if rnd.Intn(2) == 0 {
			return 1000 * rnd.Float64() // of which three add up to what two parts can be of in two ways
		}
		return math.Exp(20 * rnd.NormFloat64())
	}
	random := func(kind int) *histogram.FloatHistogram {
		h := &histogram.FloatHistogram{
			CounterResetHint: histogram.CounterResetHint(rnd.Intn(4)), Count: number(), Sum: number(), Schema: 2,
		}
		side := func(at int32) (spans []histogram.Span, buckets []float64) {
			for i := range rnd.Intn(4) {
				if i > 0 && rnd.Intn(10) == 0 {
					spans = append(spans, histogram.Span{Offset: 2})
				}
				spans = append(spans, histogram.Span{Offset: at + int32(rnd.Intn(12)), Length: uint32(1 + rnd.Intn(6))})
				for range spans[len(spans)-1].Length {
					buckets = append(buckets, number())
				}
				at = 0
			}
			return spans, buckets
		}
		switch {
		case kind == 0:
			h.Schema, h.CustomValues = histogram.CustomBucketsSchema, []float64{1, 2, 3, 5, 8, 13, 21, 34, 55, 89}
			h.PositiveSpans, h.PositiveBuckets = []histogram.Span{{Offset: int32(rnd.Intn(4)), Length: 2}}, []float64{number(), number()}
			return h
		case rnd.Intn(30) == 0:
			h.Schema = int32([]int{1, 4}[rnd.Intn(2)])
		case rnd.Intn(30) == 0:
			h.ZeroThreshold = 1.5
		case kind == 1:
			h.ZeroThreshold = 0.01
		}
		h.ZeroCount = number()
		h.PositiveSpans, h.PositiveBuckets = side(-3)
		h.NegativeSpans, h.NegativeBuckets = side(5)
		return h
	}
	leaf := func(op parser.ItemType) *Leaf {
		return &Leaf{Grid: Grid{Step: 1}, Agg: &parser.AggregateExpr{Op: op, Expr: &parser.VectorSelector{}}}
	}
	dense := 0
	for i := range 4000 {
		op := []parser.ItemType{parser.SUM, parser.AVG}[i%2]
		l := leaf(op)
		var both [2]string
		var hs []*histogram.FloatHistogram
		kind := rnd.Intn(3)
		for range 1 + rnd.Intn(6) {
			hs = append(hs, random(kind))
		}
		for k := range both {
			s := nativeSums{avg: op == parser.AVG, cells: make([]nativeCell, 1)}
			g := newGroup(op, 1, new(columns))
			var annos annotations.Annotations
			for _, h := range hs {
				p := &points{hstep: []int32{0}, h: []*histogram.FloatHistogram{h}}
				if k == 1 && s.cells[0].h == nil { // from the first on
					s.cells[0].h = &histogram.FloatHistogram{}
				}
				if err := s.add(l, "x", p, g, &annos); err != nil {
					t.Fatal(err)
				}
			}
			if k == 0 && len(hs) > 1 && s.cells[0].h == nil {
				dense++
			}
			for _, p := range s.finish(l, g, &annos) {
				both[k] += fmt.Sprintf("%v hint %d bits", p.H.TestExpression(), p.H.CounterResetHint)
				for _, x := range append(append([]float64{p.H.Count, p.H.Sum, p.H.ZeroCount}, p.H.PositiveBuckets...), p.H.NegativeBuckets...) {
					if math.IsNaN(x) {
						x = math.NaN()
					}
					both[k] += fmt.Sprintf(" %x", math.Float64bits(x))
				}
				both[k] += fmt.Sprint(p.H.PositiveSpans, p.H.NegativeSpans)
			}
		}
		if both[0] != both[1] {
			t.Fatalf("%s of %v:\n%s\nwant\n%s", op, hs, both[0], both[1])
		}
	}
	if dense < 1000 {
		t.Errorf("only %d were added up by indexes", dense)
	}
}

package chunkfmt

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/prometheus/prometheus/model/histogram"
)

// A stand-alone histogram begins with a byte of flags: bits 0 and 1 are the
// counter-reset hint, the others say which parts follow.
const (
	histHint     = 3
	histZero     = 4  // zero threshold and zero count
	histPositive = 8  // positive spans and buckets
	histNegative = 16 // negative spans and buckets
	histCustom   = 32 // custom values
	histFloat    = 64 // counts are floats
)

// AppendHistogram appends a self-delimiting encoding of h to dst. Everything
// but the difference between nil and empty slices survives bit for bit. The
// spans of h must cover exactly its buckets (see ValidHistogram), or
// DecodeHistogram will refuse it.
func AppendHistogram(dst []byte, h *histogram.Histogram) []byte {
	flags := byte(h.CounterResetHint) & histHint
	if h.ZeroCount != 0 || math.Float64bits(h.ZeroThreshold) != 0 {
		flags |= histZero
	}
	dst = appendHistogramHead(dst, flags, h.Schema, h.Sum, len(h.PositiveSpans), len(h.NegativeSpans), len(h.CustomValues))
	dst = binary.AppendUvarint(dst, h.Count)
	if flags&histZero != 0 {
		dst = appendFloat(dst, h.ZeroThreshold)
		dst = binary.AppendUvarint(dst, h.ZeroCount)
	}
	for _, side := range []struct {
		spans   []histogram.Span
		buckets []int64
	}{{h.PositiveSpans, h.PositiveBuckets}, {h.NegativeSpans, h.NegativeBuckets}} {
		if len(side.spans) == 0 {
			continue
		}
		dst = appendSpans(dst, side.spans)
		for _, b := range side.buckets {
			dst = binary.AppendVarint(dst, b)
		}
	}
	return appendCustom(dst, h.CustomValues)
}

// DecodeHistogram reads what AppendHistogram wrote and returns the bytes behind
// it. What it allocates is bounded by a multiple of len(b); errors wrap
// ErrCorrupt.
func DecodeHistogram(b []byte) (h *histogram.Histogram, rest []byte, err error) {
	c := over(b)
	h = &histogram.Histogram{}
	flags := c.histogramHead(&h.CounterResetHint, &h.Schema, &h.Sum, false)
	h.Count = c.Uvarint()
	if flags&histZero != 0 {
		h.ZeroThreshold = c.float()
		h.ZeroCount = c.Uvarint()
	}
	side := func(flag byte) (spans []histogram.Span, buckets []int64) {
		if flags&flag == 0 {
			return nil, nil
		}
		spans, n := c.spans()
		if n > 0 {
			buckets = make([]int64, n)
		}
		for i := range buckets {
			buckets[i] = c.Varint()
		}
		return spans, buckets
	}
	h.PositiveSpans, h.PositiveBuckets = side(histPositive)
	h.NegativeSpans, h.NegativeBuckets = side(histNegative)
	h.CustomValues = c.custom(flags)
	if c.Err != nil {
		return nil, nil, fmt.Errorf("histogram: %w", c.Err)
	}
	return h, c.B, nil
}

// AppendFloatHistogram is AppendHistogram for float counts.
func AppendFloatHistogram(dst []byte, h *histogram.FloatHistogram) []byte {
	flags := byte(h.CounterResetHint)&histHint | histFloat
	if math.Float64bits(h.ZeroCount) != 0 || math.Float64bits(h.ZeroThreshold) != 0 {
		flags |= histZero
	}
	dst = appendHistogramHead(dst, flags, h.Schema, h.Sum, len(h.PositiveSpans), len(h.NegativeSpans), len(h.CustomValues))
	dst = appendFloat(dst, h.Count)
	if flags&histZero != 0 {
		dst = appendFloat(dst, h.ZeroThreshold)
		dst = appendFloat(dst, h.ZeroCount)
	}
	for _, side := range []struct {
		spans   []histogram.Span
		buckets []float64
	}{{h.PositiveSpans, h.PositiveBuckets}, {h.NegativeSpans, h.NegativeBuckets}} {
		if len(side.spans) == 0 {
			continue
		}
		dst = appendSpans(dst, side.spans)
		for _, b := range side.buckets {
			dst = appendFloat(dst, b)
		}
	}
	return appendCustom(dst, h.CustomValues)
}

// DecodeFloatHistogram reads what AppendFloatHistogram wrote and returns the
// bytes behind it, bounded as DecodeHistogram is.
func DecodeFloatHistogram(b []byte) (h *histogram.FloatHistogram, rest []byte, err error) {
	c := over(b)
	h = &histogram.FloatHistogram{}
	flags := c.histogramHead(&h.CounterResetHint, &h.Schema, &h.Sum, true)
	h.Count = c.float()
	if flags&histZero != 0 {
		h.ZeroThreshold = c.float()
		h.ZeroCount = c.float()
	}
	side := func(flag byte) (spans []histogram.Span, buckets []float64) {
		if flags&flag == 0 {
			return nil, nil
		}
		spans, n := c.spans()
		if n > 0 {
			buckets = make([]float64, n)
		}
		for i := range buckets {
			buckets[i] = c.float()
		}
		return spans, buckets
	}
	h.PositiveSpans, h.PositiveBuckets = side(histPositive)
	h.NegativeSpans, h.NegativeBuckets = side(histNegative)
	h.CustomValues = c.custom(flags)
	if c.Err != nil {
		return nil, nil, fmt.Errorf("float histogram: %w", c.Err)
	}
	return h, c.B, nil
}

// ValidHistogram reports, with an error that wraps ErrInvalid, whether the
// spans of h cover exactly its buckets. Histograms for which they do not can't
// be stored; Prometheus never appends such.
func ValidHistogram(h *histogram.Histogram) error {
	return validSpans(h.PositiveSpans, len(h.PositiveBuckets), h.NegativeSpans, len(h.NegativeBuckets))
}

// ValidFloatHistogram is ValidHistogram for float counts.
func ValidFloatHistogram(h *histogram.FloatHistogram) error {
	return validSpans(h.PositiveSpans, len(h.PositiveBuckets), h.NegativeSpans, len(h.NegativeBuckets))
}

func validSpans(pos []histogram.Span, posBuckets int, neg []histogram.Span, negBuckets int) error {
	if spanBuckets(pos) != uint64(posBuckets) || spanBuckets(neg) != uint64(negBuckets) {
		return fmt.Errorf("%w: histogram spans cover %d positive and %d negative buckets, there are %d and %d",
			ErrInvalid, spanBuckets(pos), spanBuckets(neg), posBuckets, negBuckets)
	}
	return nil
}

func spanBuckets(spans []histogram.Span) (n uint64) {
	for _, s := range spans {
		n += uint64(s.Length)
	}
	return n
}

func appendHistogramHead(dst []byte, flags byte, schema int32, sum float64, positive, negative, custom int) []byte {
	if positive > 0 {
		flags |= histPositive
	}
	if negative > 0 {
		flags |= histNegative
	}
	if custom > 0 {
		flags |= histCustom
	}
	dst = append(dst, flags)
	dst = binary.AppendVarint(dst, int64(schema))
	return appendFloat(dst, sum)
}

func (c *cursor) histogramHead(hint *histogram.CounterResetHint, schema *int32, sum *float64, floats bool) (flags byte) {
	flags = c.Byte()
	if flags&0x80 != 0 || (flags&histFloat != 0) != floats {
		c.Fail("histogram flags %#x", flags)
	}
	*hint = histogram.CounterResetHint(flags & histHint)
	s := c.Varint()
	if s != int64(int32(s)) {
		c.Fail("histogram schema %d", s)
	}
	*schema = int32(s)
	*sum = c.float()
	return flags
}

func appendSpans(dst []byte, spans []histogram.Span) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(spans)))
	for _, s := range spans {
		dst = binary.AppendVarint(dst, int64(s.Offset))
		dst = binary.AppendUvarint(dst, uint64(s.Length))
	}
	return dst
}

// spans reads spans and the number of buckets they cover, each of which takes
// at least one of the bytes that follow.
func (c *cursor) spans() (spans []histogram.Span, buckets int) {
	spans = make([]histogram.Span, c.Count(2))
	var n uint64
	for i := range spans {
		off, length := c.Varint(), c.Uvarint()
		if off != int64(int32(off)) || length > math.MaxUint32 {
			c.Fail("histogram span %d, %d", off, length)
			return nil, 0
		}
		spans[i] = histogram.Span{Offset: int32(off), Length: uint32(length)}
		n += length
	}
	if n > uint64(len(c.B)) {
		c.Fail("histogram has %d buckets and %d bytes left", n, len(c.B))
		return nil, 0
	}
	return spans, int(n)
}

func appendCustom(dst []byte, values []float64) []byte {
	if len(values) == 0 {
		return dst
	}
	dst = binary.AppendUvarint(dst, uint64(len(values)))
	for _, v := range values {
		dst = appendFloat(dst, v)
	}
	return dst
}

func (c *cursor) custom(flags byte) []float64 {
	if flags&histCustom == 0 {
		return nil
	}
	values := make([]float64, c.Count(1))
	for i := range values {
		values[i] = c.float()
	}
	return values
}

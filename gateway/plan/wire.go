package plan

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"unsafe"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/util/annotations"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

// The version of the form of a partial in caches and between gateways, docs/protocols/work.md, and of
// what kernels compute: with either it is raised, see TestVersionOfResults. A reader that
// doesn't know a version computes the part itself.
const partialVersion = 3

// errCorrupt: not what was written.
var errCorrupt = errors.New("corrupt result of a part")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// marshal writes a result on a grid.
func (p *partial) marshal(g Grid) ([]byte, error) {
	size := 128 + 4*len(p.counts.window)
	for i := range p.series {
		size += 256 + 9*len(p.series[i].Floats)
	}
	b := append(make([]byte, 0, size), partialVersion)
	b = binary.AppendUvarint(b, uint64(len(p.counts.window)))
	for i := range p.counts.window {
		b = binary.AppendVarint(b, p.counts.window[i])
		b = binary.AppendVarint(b, p.counts.read[i])
	}
	b = binary.AppendVarint(b, p.counts.series)
	text := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	b = binary.AppendUvarint(b, uint64(len(p.annos)+len(p.over)))
	for i, set := range []annotations.Annotations{p.annos, p.over} {
		for _, err := range set {
			var a *told
			if !errors.As(err, &a) {
				return nil, fmt.Errorf("annotation of type %T can't be sent", err)
			}
			flag := byte(2 * i)
			if a.info {
				flag |= 1
			}
			b = append(b, flag)
			text(a.text)
			text(a.located)
		}
	}
	set := func(ls labels.Labels) {
		b = binary.AppendUvarint(b, uint64(ls.Len()))
		ls.Range(func(l labels.Label) {
			text(l.Name)
			text(l.Value)
		})
	}
	b = binary.AppendUvarint(b, uint64(len(p.series)))
	for i := range p.series {
		s := &p.series[i]
		flag := byte(0)
		if s.DropName {
			flag |= 1
		}
		same := labels.Equal(s.order, s.Metric)
		if same {
			flag |= 2
		}
		b = append(b, flag)
		set(s.Metric)
		if !same {
			set(s.order)
		}
		b = binary.AppendUvarint(b, uint64(len(s.Floats)))
		before := int64(0)
		for _, f := range s.Floats {
			k := (f.T - g.Start) / g.Step
			b = binary.AppendVarint(b, k-before)
			before = k
		}
		for _, f := range s.Floats {
			b = binary.LittleEndian.AppendUint64(b, math.Float64bits(f.F))
		}
		b = binary.AppendUvarint(b, uint64(len(s.Histograms)))
		for _, h := range s.Histograms {
			ph := prompb.FromFloatHistogram(h.T, h.H)
			hb, err := ph.Marshal()
			if err != nil {
				return nil, err
			}
			b = append(binary.AppendUvarint(b, uint64(len(hb))), hb...)
		}
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

// mostColumns is the most series that a group has in the result of a shard.
const mostColumns = 3

// unmarshal reads what marshal has written for a grid. It keeps nothing of b. hold is told
// of memory before that is taken, and what of it is given back; its error ends the reading.
// It has no more series than were read, by its own account, which is of the most of its
// parts, and each of them no more points than there are steps.
func unmarshal(b []byte, g Grid, parts int, hold func(bytes int64) error) (_ *partial, err error) {
	if len(b) < 5 || b[0] != partialVersion {
		return nil, fmt.Errorf("%w: version or length", errCorrupt)
	}
	body := b[:len(b)-4]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[len(body):]) {
		return nil, fmt.Errorf("%w: checksum", errCorrupt)
	}
	r := reader{Reader: untrusted.Reader{B: body[1:], Kind: errCorrupt}, hold: hold}
	p, err := r.partial(g, parts)
	if r.Err != nil {
		err = r.Err
	}
	if err != nil {
		r.took = 0
	}
	if settled := r.settle(); err == nil {
		err = settled
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// partial reads a result. If r has an Err afterwards, it is of no use.
func (r *reader) partial(g Grid, parts int) (*partial, error) {
	steps := g.Len()
	if n := r.Count(2); n != steps {
		return nil, fmt.Errorf("%w: %d steps, want %d", errCorrupt, n, steps)
	}
	r.take(2 * 8 * steps)
	p := &partial{counts: newCounts(steps)}
	for i := range steps {
		p.counts.window[i], p.counts.read[i] = r.Varint(), r.Varint()
	}
	const most = 1 << 50 // so that sums don't overflow
	if p.counts.series = r.Varint(); p.counts.series < 0 || p.counts.series > most {
		return nil, fmt.Errorf("%w: %d series", errCorrupt, p.counts.series)
	}
	for range r.Count(3) {
		if !r.take(128) {
			break
		}
		flag := r.Byte()
		a := &told{info: flag&1 != 0, text: r.text(), located: r.text()}
		if flag&2 != 0 {
			p.over.Add(a)
		} else {
			p.annos.Add(a)
		}
	}
	n := r.Count(4)
	if int64(n)/mostColumns/int64(parts) > max(1, p.counts.series) {
		return nil, fmt.Errorf("%w: %d series of %d", errCorrupt, n, p.counts.series)
	}
	if r.take(n * int(unsafe.Sizeof(partialSeries{}))) {
		p.series = make([]partialSeries, 0, n)
	}
	var builder labels.ScratchBuilder
	set := func() labels.Labels {
		builder.Reset()
		const label = 32 // in the builder
		n := r.Count(2)
		if !r.take(label * n) {
			return labels.EmptyLabels()
		}
		for range n {
			name := r.text()
			builder.Add(name, r.text())
		}
		builder.Sort()
		r.take(-label * n)
		return builder.Labels()
	}
	for range n {
		var s partialSeries
		flag := r.Byte()
		s.DropName = flag&1 != 0
		s.Metric = set()
		if s.order = s.Metric; flag&2 == 0 {
			s.order = set()
		}
		if err := r.points(&s, g, steps); err != nil {
			return nil, err
		}
		if r.Err != nil {
			break
		}
		p.series = append(p.series, s)
	}
	if r.Err != nil || len(r.B) > 0 {
		return nil, fmt.Errorf("%w: length", errCorrupt)
	}
	return p, nil
}

// points reads those of a series.
func (r *reader) points(s *partialSeries, g Grid, steps int) error {
	if n := r.Count(9); n > 0 && r.take(16*n) {
		s.Floats = make([]promql.FPoint, n)
		k := int64(0)
		for i := range s.Floats {
			d := r.Varint()
			if k += d; k < 0 || k >= int64(steps) || i > 0 && d <= 0 {
				return fmt.Errorf("%w: step %d of %d", errCorrupt, k, steps)
			}
			s.Floats[i].T = g.At(int(k))
		}
		for i := range s.Floats {
			s.Floats[i].F = math.Float64frombits(r.Uint64())
		}
	}
	n := r.Count(1)
	if n == 0 || !r.take(16*n) {
		return nil
	}
	s.Histograms = make([]promql.HPoint, n)
	before := g.Start - 1
	for i := range s.Histograms {
		b := r.Sized()
		// A span takes two bytes at the least, and eight in memory, twice while it is read.
		const fields = 512
		if !r.take(fields + 8*len(b)) {
			return nil
		}
		var ph prompb.Histogram
		if err := ph.Unmarshal(b); err != nil {
			return fmt.Errorf("%w: %w", errCorrupt, err)
		}
		h := ph.ToFloatHistogram()
		if ph.Timestamp <= before || ph.Timestamp > g.At(steps-1) || (ph.Timestamp-g.Start)%g.Step != 0 {
			return fmt.Errorf("%w: a histogram at %d", errCorrupt, ph.Timestamp)
		}
		before = ph.Timestamp
		if !ph.IsFloatHistogram() {
			return fmt.Errorf("%w: an integer histogram", errCorrupt)
		}
		if err := sound(h); err != nil {
			return fmt.Errorf("%w: histogram: %w", errCorrupt, err)
		}
		s.Histograms[i] = promql.HPoint{T: ph.Timestamp, H: h}
		r.take(16*histogramSize(h) - fields - 8*len(b))
	}
	return nil
}

// sound is what Validate finds but for counts below zero, which a result may have where a stored histogram may not: whoever
// walks through its buckets expects it.
func sound(h *histogram.FloatHistogram) error {
	err := h.Validate()
	if errors.Is(err, histogram.ErrHistogramNegativeBucketCount) || errors.Is(err, histogram.ErrHistogramNegativeCount) {
		return nil
	}
	return err
}

// reader reads the fields of results.
type reader struct {
	untrusted.Reader // Err is hold's too

	hold       func(int64) error
	took, told int64 // bytes of memory, and those that hold was told of
}

// take notes bytes of memory that are about to be taken, or aren't needed any more. It
// reports false, and r is bad, if they aren't to be had.
func (r *reader) take(bytes int) bool {
	const atOnce = 32 << 10 // to tell of each would take as long as to read it
	if r.took += int64(bytes); r.took > r.told {
		more := max(r.took-r.told, atOnce)
		r.told += more
		if err := r.hold(more); err != nil && r.Err == nil {
			r.B, r.Err = nil, err
		}
	}
	return r.Err == nil
}

// settle tells how much was taken in the end.
func (r *reader) settle() error {
	more := r.took - r.told
	r.told = r.took
	return r.hold(more)
}

// text reads one that is held in memory.
func (r *reader) text() string {
	b := r.Sized()
	if !r.take(len(b) + 2) {
		return ""
	}
	return string(b)
}

// holding lets an account hold what a result takes in memory.
func holding(ctx context.Context) func(bytes int64) error {
	acc := account.From(ctx)
	return func(bytes int64) error {
		if acc.Hold(bytes); bytes > 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil
	}
}

// received reads the result of another gateway: an errCorrupt, or why ctx has ended.
func received(ctx context.Context, b []byte, g Grid, parts int) (*partial, error) {
	hold := holding(ctx)
	if err := hold(int64(len(b))); err != nil {
		return nil, err
	}
	defer func() { _ = hold(-int64(len(b))) }() // gives no error
	return unmarshal(b, g, parts, hold)
}

// told is an annotation of a part that was computed elsewhere, or of one that may
// be: its text, and the text with the place in the query.
type told struct {
	text, located string
	info          bool
	at            bool // the place is asked for
}

// Error implements error.
func (a *told) Error() string {
	if a.at {
		return a.located
	}
	return a.text
}

// Unwrap gives the class.
func (a *told) Unwrap() error {
	if a.info {
		return annotations.PromQLInfo
	}
	return annotations.PromQLWarning
}

// SetQuery is called before annotations are shown; with an empty query, without
// places.
func (a *told) SetQuery(query string) { a.at = query != "" }

// Merge is called with an annotation of the same text.
func (a *told) Merge(error) error { return a }

// tell makes all annotations such that can be sent.
func tell(as annotations.Annotations, query string) annotations.Annotations {
	var out annotations.Annotations
	for text, err := range as {
		info := errors.Is(err, annotations.PromQLInfo)
		// AsStrings tells it the query; there is one.
		ws, is := annotations.Annotations{text: err}.AsStrings(query, 0, 0)
		if all := slices.Concat(ws, is); len(all) == 1 {
			out.Add(&told{text: text, located: all[0], info: info})
		}
	}
	return out
}

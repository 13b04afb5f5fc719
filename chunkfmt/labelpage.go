package chunkfmt

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"sync"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
)

// LabelPage tells which label names and values a tenant's part of a block has.
// Few values stand in the page itself; many in pages of their own, which lie
// together, so that reading one label's takes one more GET. It is safe for
// concurrent use.
type LabelPage struct {
	metrics []string
	names   []labelEntry // ascending by name
}

type labelEntry struct {
	name   string
	values *LabelValues
	at     Location
	of     func() *LabelValues // in place of values; nil: there is none
}

// LabelValues are the values of one label and the metrics that carry them. It
// is safe for concurrent use.
type LabelValues struct {
	metrics []string // of the label page; nil for __name__
	values  []string // ascending
	sets    [][]uint32
	setOf   []uint32

	// find sets sets and setOf, once, where they are seldom asked for. May be nil.
	find func()
	once sync.Once
}

// found says that sets and setOf are wanted.
func (v *LabelValues) found() {
	if v.find != nil {
		v.once.Do(v.find)
	}
}

// labelInlineBytes is how large a label's values may be to stand in the label page.
const labelInlineBytes = 16 << 10

// labelPartBytes is how much text one label-values page holds, but for its last
// value.
const labelPartBytes = 1 << 20

// ParseLabelPage checks a label page.
func ParseLabelPage(b []byte) (*LabelPage, error) {
	body, err := onlyPage(b, pageLabels)
	if err != nil {
		return nil, fmt.Errorf("label page: %w", err)
	}
	p, c := &LabelPage{}, over(body)
	p.metrics = c.ascending()
	p.names = make([]labelEntry, c.Count(2))
	for i := range p.names {
		n := &p.names[i]
		n.name = c.Text()
		if c.Err == nil && (n.name == "" || i > 0 && p.names[i-1].name >= n.name) {
			c.Fail("label names out of order at %q", n.name)
		}
		if size := c.Uvarint(); size > 0 {
			if size > MaxPage {
				c.Fail("label values of %d bytes", size)
			}
			n.at = Location{Offset: c.offset(), Size: int64(size)}
			continue
		}
		n.values = &LabelValues{metrics: p.metrics}
		n.values.read(&c)
		if c.Err != nil {
			return nil, fmt.Errorf("label page: %w", c.Err)
		}
	}
	if err := c.End(); err != nil {
		return nil, fmt.Errorf("label page: %w", err)
	}
	return p, nil
}

// Names returns all label names, ascending, __name__ among them if any series
// has it.
func (p *LabelPage) Names() []string {
	out := make([]string, 0, len(p.names)+1)
	for i := range p.names {
		out = append(out, p.names[i].name)
	}
	if len(p.metrics) > 1 || len(p.metrics) == 1 && p.metrics[0] != "" {
		i, _ := slices.BinarySearch(out, model.MetricNameLabel)
		out = slices.Insert(out, i, model.MetricNameLabel)
	}
	return out
}

// Metrics returns all metric names, ascending; "" is among them if a series has
// none. Not to be changed.
func (p *LabelPage) Metrics() []string { return p.metrics }

// Values returns the values of a label, or, if v is nil, where to read them:
// at.Size is 0 if no series has the label, else v is what ParseValues makes of
// the bytes at that location.
func (p *LabelPage) Values(name string) (v *LabelValues, at Location) {
	if name == model.MetricNameLabel {
		values := p.metrics
		if len(values) > 0 && values[0] == "" {
			values = values[1:]
		}
		return &LabelValues{values: values}, Location{}
	}
	i := sort.Search(len(p.names), func(i int) bool { return p.names[i].name >= name })
	if i == len(p.names) || p.names[i].name != name {
		return nil, Location{}
	}
	if of := p.names[i].of; of != nil {
		return of(), Location{}
	}
	return p.names[i].values, p.names[i].at
}

// ParseValues reads the label values at a location that Values gave.
func (p *LabelPage) ParseValues(b []byte) (*LabelValues, error) {
	v := &LabelValues{metrics: p.metrics}
	for len(b) > 0 {
		body, rest, err := openPage(b, pageLabelValues)
		if err != nil {
			return nil, fmt.Errorf("label values: %w", err)
		}
		c := over(body)
		v.read(&c)
		if err := c.End(); err != nil {
			return nil, fmt.Errorf("label values: %w", err)
		}
		b = rest
	}
	return v, nil
}

// read appends values, and the sets of metrics that carry them.
func (v *LabelValues) read(c *cursor) {
	values := c.ascending()
	if len(v.values) > 0 && len(values) > 0 && v.values[len(v.values)-1] >= values[0] {
		c.Fail("label values out of order")
	}
	base := uint32(len(v.sets))
	for range c.Count(2) {
		set := make([]uint32, c.Count(1))
		next := uint64(0)
		for j := range set {
			d := c.Uvarint()
			if d >= uint64(len(v.metrics)) || next+d >= uint64(len(v.metrics)) {
				c.Fail("metric %d of %d", next+d, len(v.metrics))
				return
			}
			set[j] = uint32(next + d)
			next += d + 1
		}
		v.sets = append(v.sets, set)
	}
	sets := uint32(len(v.sets)) - base
	if len(values) > len(c.B) {
		c.Fail("ends early")
		return
	}
	for range values {
		id := uint32(c.Bounded("set of metrics", uint64(sets)))
		if id >= sets {
			c.Fail("set of metrics %d of %d", id, sets)
			return
		}
		v.setOf = append(v.setOf, base+id)
	}
	v.values = append(v.values, values...)
}

// Values returns all values, ascending; not to be changed.
func (v *LabelValues) Values() []string { return v.values }

// Metrics returns the names of the metrics that carry a value, ascending.
func (v *LabelValues) Metrics(value string) []string {
	i, ok := slices.BinarySearch(v.values, value)
	if !ok {
		return nil
	}
	if v.metrics == nil { // the label is the metric name
		return v.values[i : i+1]
	}
	v.found()
	set := v.sets[v.setOf[i]]
	out := make([]string, len(set))
	for j, id := range set {
		out[j] = v.metrics[id]
	}
	return out
}

// Of returns the values that a metric carries, ascending.
func (v *LabelValues) Of(metric string) []string {
	var out []string
	if v.metrics == nil {
		if _, ok := slices.BinarySearch(v.values, metric); ok {
			out = append(out, metric)
		}
		return out
	}
	id, ok := slices.BinarySearch(v.metrics, metric)
	if !ok {
		return nil
	}
	v.found()
	has := make([]bool, len(v.sets))
	for i, set := range v.sets {
		_, has[i] = slices.BinarySearch(set, uint32(id))
	}
	for i, s := range v.values {
		if has[v.setOf[i]] {
			out = append(out, s)
		}
	}
	return out
}

// LabelPage tells of the labels of this page alone: all of a tenant's, if the
// tenant has one series page and so no label page. It is kept with the page, beside which it takes little.
func (p *SeriesPage) LabelPage() *LabelPage {
	p.labelsOnce.Do(func() { p.labelPage = p.makeLabelPage() })
	return p.labelPage
}

func (p *SeriesPage) makeLabelPage() *LabelPage {
	out := &LabelPage{metrics: []string{""}, names: make([]labelEntry, 0, len(p.names))}
	metrics := p.metricColumn()
	nameless := metrics == nil || metrics.lacking(p.series)
	switch {
	case metrics != nil && nameless:
		out.metrics = append(out.metrics, metrics.values...)
	case metrics != nil:
		out.metrics = metrics.values
	}
	first := uint32(0) // id of the first of out.metrics, where absent is one
	if metrics != nil && !nameless {
		first = 1
	}
	for i := range p.names {
		if l := &p.names[i]; l.name != model.MetricNameLabel {
			out.names = append(out.names, labelEntry{name: l.name, of: func() *LabelValues { return p.labelValues(l, metrics, out.metrics, first) }})
		}
	}
	return out
}

// labelValues are those of a label. Which metrics carry them is found when it is asked for, and not kept with the page:
// it may take more than that.
func (p *SeriesPage) labelValues(l, names *labelColumn, metrics []string, first uint32) *LabelValues {
	v := &LabelValues{metrics: metrics, values: l.values}
	v.find = func() {
		v.sets, v.setOf = make([][]uint32, len(l.values)), make([]uint32, len(l.values))
		for s := range p.series {
			id := l.id(s)
			if id == absent {
				continue
			}
			metric, set := uint32(0), v.sets[id-1]
			if names != nil {
				metric = names.id(s) - first
			}
			if len(set) == 0 || set[len(set)-1] != metric {
				v.sets[id-1] = append(set, metric)
			}
		}
		for j := range v.setOf {
			v.setOf[j] = uint32(j)
		}
	}
	return v
}

func (p *SeriesPage) metricColumn() *labelColumn {
	for i := range p.names {
		if p.names[i].name == model.MetricNameLabel {
			return &p.names[i]
		}
	}
	return nil
}

// labelBuilder collects a tenant's label page.
type labelBuilder struct {
	metrics []string
	names   map[string]*labelNameBuilder
	order   []*labelNameBuilder
	bytes   int // about as many as all pages together take, unpacked
}

type labelNameBuilder struct {
	name   string
	values map[string]*labelValueBuilder
	last   *labelValueBuilder
}

type labelValueBuilder struct {
	value   string
	metrics []uint32 // ascending
}

func (b *labelBuilder) add(metric string, ls labels.Labels) {
	if n := len(b.metrics); n == 0 || b.metrics[n-1] != metric {
		b.metrics = append(b.metrics, string([]byte(metric)))
		b.bytes += len(metric) + 2*binary.MaxVarintLen32
	}
	id := uint32(len(b.metrics) - 1)
	if b.names == nil {
		b.names = map[string]*labelNameBuilder{}
	}
	ls.Range(func(l labels.Label) {
		if l.Name == model.MetricNameLabel {
			return
		}
		n := b.names[l.Name]
		if n == nil {
			n = &labelNameBuilder{name: string([]byte(l.Name)), values: map[string]*labelValueBuilder{}}
			b.names[n.name] = n
			b.order = append(b.order, n)
			b.bytes += len(n.name) + 4*binary.MaxVarintLen32
		}
		v := n.last
		if v == nil || v.value != l.Value {
			if v = n.values[l.Value]; v == nil {
				v = &labelValueBuilder{value: string([]byte(l.Value))}
				n.values[v.value] = v
				b.bytes += len(v.value) + 3*binary.MaxVarintLen32
			}
			n.last = v
		}
		if k := len(v.metrics); k == 0 || v.metrics[k-1] != id {
			v.metrics = append(v.metrics, id)
			b.bytes++ // or two, but most sets are like others
		}
	})
}

// appendTo appends the pages with values and then the label page to dst, whose
// start is at offset in the object, and returns how large the label page is.
func (b *labelBuilder) appendTo(dst []byte, offset int64, compress bool) (out []byte, size int) {
	slices.SortFunc(b.order, func(x, y *labelNameBuilder) int {
		if x.name < y.name {
			return -1
		}
		return 1
	})
	start := len(dst)
	page := appendAscending(nil, b.metrics)
	page = binary.AppendUvarint(page, uint64(len(b.order)))
	for _, n := range b.order {
		page = appendText(page, n.name)
		values := make([]*labelValueBuilder, 0, len(n.values))
		for _, v := range n.values {
			values = append(values, v)
		}
		slices.SortFunc(values, func(x, y *labelValueBuilder) int {
			if x.value < y.value {
				return -1
			}
			return 1
		})
		if len(values) <= labelInlineBytes/2 {
			if part := appendLabelValues(nil, values); len(part) <= labelInlineBytes {
				page = append(binary.AppendUvarint(page, 0), part...)
				continue
			}
		}
		from := len(dst)
		for len(values) > 0 {
			k, n := 0, 0
			for k < len(values) && n < labelPartBytes {
				n += len(values[k].value) + 2*len(values[k].metrics) + 2
				k++
			}
			dst = appendPage(dst, pageLabelValues, appendLabelValues(nil, values[:k]), compress)
			values = values[k:]
		}
		page = binary.AppendUvarint(page, uint64(len(dst)-from))
		page = binary.AppendUvarint(page, uint64(offset+int64(from-start)))
	}
	before := len(dst)
	dst = appendPage(dst, pageLabels, page, compress)
	return dst, len(dst) - before
}

func appendLabelValues(dst []byte, values []*labelValueBuilder) []byte {
	ss := make([]string, len(values))
	ids := map[string]int{}
	var sets, of, key []byte
	for i, v := range values {
		ss[i] = v.value
		key = binary.AppendUvarint(key[:0], uint64(len(v.metrics)))
		next := uint32(0)
		for _, m := range v.metrics {
			key = binary.AppendUvarint(key, uint64(m-next))
			next = m + 1
		}
		id, ok := ids[string(key)]
		if !ok {
			id = len(ids)
			ids[string(key)] = id
			sets = append(sets, key...)
		}
		of = binary.AppendUvarint(of, uint64(id))
	}
	dst = appendAscending(dst, ss)
	dst = binary.AppendUvarint(dst, uint64(len(ids)))
	dst = append(dst, sets...)
	return append(dst, of...)
}

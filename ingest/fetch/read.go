package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// Columns are series of one generation. They are good until the next ones are read.
type Columns struct {
	Generation uint64
	Refs       []uint32
	Counts     []uint32 // of chunks, by series; nil: there are no chunks
	Chunks     []Chunk  // one series after the other
	Data       []byte   // of all chunks, one after the other, of columns that are sent
}

// Fill makes p the message for columns of which all chunks begin at, or after, about
// mint. It uses the memory of p, and p that of the columns.
func (c *Columns) Fill(p *fetchpb.ReadResponse, mint int64) {
	p.Generation, p.Refs, p.Chunks, p.Data = c.Generation, c.Refs, c.Counts, c.Data
	p.Encodings, p.Mint, p.Span, p.Sizes = p.Encodings[:0], p.Mint[:0], p.Span[:0], p.Sizes[:0]
	for i := range c.Chunks {
		x := &c.Chunks[i]
		p.Encodings, p.Mint = append(p.Encodings, byte(x.Encoding)), append(p.Mint, x.MinT-mint)
		p.Span, p.Sizes = append(p.Span, uint64(x.MaxT-x.MinT)), append(p.Sizes, uint32(len(x.Data))) //nolint:gosec // as in the message
		mint = x.MinT
	}
}

// Append appends the series that columns are; labels gives them theirs, if it isn't
// nil. They share memory with the columns.
func (c *Columns) Append(dst []Series, labels func(ref uint32) labels.Labels) []Series {
	chunks := c.Chunks
	for i, ref := range c.Refs {
		var s Series
		if labels != nil {
			s.Labels = labels(ref)
		}
		if c.Counts != nil {
			n := c.Counts[i]
			s.Chunks, chunks = chunks[:n:n], chunks[n:]
		}
		dst = append(dst, s)
	}
	return dst
}

// memory is what an answer lies in.
type memory struct {
	messages []message // the first used of them are this answer's
	used     int
	refs     []uint32
	series   []Series
}

// message is what one lies in.
type message struct {
	buffer []byte // as it has come
	chunks []Chunk
}

// next is what the next message lies in.
func (m *memory) next() *message {
	if m.used == len(m.messages) {
		m.messages = append(m.messages, message{})
	}
	m.used++
	return &m.messages[m.used-1]
}

// memories are those of queries that have ended.
//
//nolint:gochecknoglobals // scratch memory
var memories = sync.Pool{New: func() any { return new(memory) }}

// maxMemory bounds what one query leaves to the next, in bytes.
const maxMemory = 16 << 20

// release leaves the memory to the next query.
func (m *memory) release() {
	bytes := columnBytes * cap(m.series)
	for i := range m.messages {
		bytes += cap(m.messages[i].buffer) + columnBytes*cap(m.messages[i].chunks)
	}
	if bytes > maxMemory {
		return
	}
	clear(m.series) // of their labels
	m.used, m.refs, m.series = 0, m.refs[:0], m.series[:0]
	memories.Put(m)
}

// columns is the reverse of Fill. They share memory with the message.
func (m *message) columns(p *fetchpb.ReadResponse, mint int64) (*Columns, error) {
	n := len(p.Encodings)
	if len(p.Mint) != n || len(p.Span) != n || len(p.Sizes) != n || len(p.Chunks) != len(p.Refs) && len(p.Chunks)+n > 0 {
		return nil, fmt.Errorf("%w: columns of different lengths", errProtocol)
	}
	total := uint64(0)
	for _, k := range p.Chunks {
		total += uint64(k)
	}
	if total != uint64(n) {
		return nil, fmt.Errorf("%w: series of %d chunks have %d", errProtocol, total, n)
	}
	m.chunks = slices.Grow(m.chunks[:0], n)[:n]
	c := &Columns{Generation: p.Generation, Refs: p.Refs, Counts: p.Chunks, Chunks: m.chunks}
	data := p.Data
	for i, size := range p.Sizes {
		if uint64(size) > uint64(len(data)) || p.Span[i] > math.MaxInt64 {
			return nil, fmt.Errorf("%w: a chunk of %d bytes where %d are left", errProtocol, size, len(data))
		}
		mint += p.Mint[i]
		c.Chunks[i] = Chunk{Encoding: chunkenc.Encoding(p.Encodings[i]), MinT: mint, MaxT: mint + int64(p.Span[i]), Data: data[:size:size]} //nolint:gosec // checked
		data = data[size:]
	}
	return c, nil
}

// columnBytes is about what a series takes beside its chunks, or a chunk beside its data.
const columnBytes = 48

// list is what a generation has.
type list struct {
	generation uint64
	refs       []uint32
	series     []Series
}

// read is Select by references.
func (c *Client) read(ctx context.Context, q Query) ([][]Series, Header, error) {
	mem := new(memory)
	if q.Keep != nil {
		mem, _ = memories.Get().(*memory)
		q.Keep(mem.release)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	codec := newCodec(mem)
	stream, err := c.rpc.Read(ctx, &fetchpb.ReadRequest{
		Tenant: q.Tenant, Mint: q.MinT, Maxt: q.MaxT, Matchers: FromMatchers(q.Matchers),
		LabelsOnly: q.LabelsOnly, Limit: uint32(q.Limit), Newest: q.Newest, //nolint:gosec // of series
	}, grpc.ForceCodecV2(codec))
	if err != nil {
		return nil, Header{}, err
	}
	var hd Header
	var found []*Columns
	for first := true; ; first = false {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) && !first {
			break
		}
		if err != nil {
			return nil, hd, err
		}
		if first {
			if hd, err = toHeader(m.Header); err != nil {
				return nil, hd, err
			}
			continue
		}
		if q.Took != nil {
			q.Took(int64(len(m.Data)) + columnBytes*int64(len(m.Refs)+len(m.Sizes)))
		}
		cols, err := codec.at.columns(m, q.MinT)
		if err != nil {
			return nil, hd, err
		}
		found = append(found, cols)
	}
	var out [][]Series
	for len(found) > 0 {
		l := list{generation: found[0].Generation}
		n, series := 0, 0
		for ; n < len(found) && found[n].Generation == l.generation; n++ {
			series += len(found[n].Refs)
		}
		at := len(mem.series)
		mem.refs, mem.series = slices.Grow(mem.refs[:0], series), slices.Grow(mem.series, series)
		for _, cols := range found[:n] {
			mem.refs, mem.series = append(mem.refs, cols.Refs...), cols.Append(mem.series, nil)
		}
		l.refs, l.series = mem.refs, mem.series[at:]
		found = found[n:]
		if err := c.name(ctx, string(hd.Start), q.Tenant, &l); err != nil {
			return nil, hd, err
		}
		out = append(out, l.series)
	}
	return out, hd, nil
}

// maxAsked bounds the refs of a request, of which each takes 5 bytes at most: an
// ingester takes messages of 4 MiB.
const maxAsked = 512 << 10

// name gives the series of a generation their labels.
func (c *Client) name(ctx context.Context, start, tenant string, l *list) error {
	at := scope{start, tenant, l.generation}
	for unknown := range slices.Chunk(c.names.get(at, l), c.atOnce) {
		if err := c.ask(ctx, at, l, unknown); err != nil {
			return err
		}
		c.names.put(at, l, unknown)
	}
	return nil
}

// ask asks for the labels of some series of a list.
func (c *Client) ask(ctx context.Context, at scope, l *list, unknown []int) error {
	refs := make([]uint32, len(unknown))
	for i, k := range unknown {
		refs[i] = l.refs[k]
	}
	stream, err := c.rpc.Series(ctx, &fetchpb.SeriesRequest{Tenant: at.tenant, Start: []byte(at.start), Generation: at.generation, Refs: refs})
	if err != nil {
		return err
	}
	got := 0
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		err = eachLabels(m, func(ls labels.Labels) error {
			if got == len(unknown) {
				return fmt.Errorf("%w: labels of more series than were asked for", errProtocol)
			}
			l.series[unknown[got]].Labels = ls
			got++
			return nil
		})
		if err != nil {
			return err
		}
	}
	if got < len(unknown) {
		return fmt.Errorf("%w: labels of %d series, %d were asked for", errProtocol, got, len(unknown))
	}
	return nil
}

// eachLabels calls fn with the label sets of a message.
func eachLabels(m *fetchpb.SeriesResponse, fn func(labels.Labels) error) error {
	var b labels.ScratchBuilder
	pairs := m.Pairs
	for _, n := range m.Labels {
		if uint64(len(pairs)) < 2*uint64(n) {
			return fmt.Errorf("%w: labels without names and values", errProtocol)
		}
		b.Reset()
		last := ""
		for i := range 2 * n {
			if int(pairs[i]) >= len(m.Symbols) {
				return fmt.Errorf("%w: symbol %d of %d", errProtocol, pairs[i], len(m.Symbols))
			}
			if i%2 == 1 {
				name := m.Symbols[pairs[i-1]]
				if name <= last {
					return fmt.Errorf("%w: label name %q after %q", errProtocol, name, last)
				}
				b.Add(name, m.Symbols[pairs[i]])
				last = name
			}
		}
		pairs = pairs[2*n:]
		if err := fn(b.Labels()); err != nil {
			return err
		}
	}
	if len(pairs) > 0 {
		return fmt.Errorf("%w: names and values of no series", errProtocol)
	}
	return nil
}

// LabelSets makes messages for label sets.
type LabelSets struct {
	m       *fetchpb.SeriesResponse
	symbols map[string]uint32
	size    int
}

// Add adds one.
func (s *LabelSets) Add(ls labels.Labels) {
	if s.m == nil {
		s.m, s.symbols, s.size = &fetchpb.SeriesResponse{}, map[string]uint32{}, 0
	}
	n := uint32(0)
	ls.Range(func(l labels.Label) {
		s.m.Pairs = append(s.m.Pairs, s.symbol(l.Name), s.symbol(l.Value))
		s.size += 4
		n++
	})
	s.m.Labels = append(s.m.Labels, n)
}

func (s *LabelSets) symbol(text string) uint32 {
	i, ok := s.symbols[text]
	if !ok {
		i = uint32(len(s.m.Symbols))
		s.symbols[text] = i
		s.m.Symbols = append(s.m.Symbols, text)
		s.size += len(text) + 4
	}
	return i
}

// Bytes is about how long the message is by now.
func (s *LabelSets) Bytes() int { return s.size }

// Take gives the message with those that were added since the last; nil: none.
func (s *LabelSets) Take() *fetchpb.SeriesResponse {
	m := s.m
	s.m = nil
	return m
}

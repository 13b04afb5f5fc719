package commitlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"sync"
	"unicode/utf8"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/untrusted"
)

// Sizes and bounds of docs/formats/commitlog.md.
const (
	frameSize     = 8 // before a payload
	maxPayload    = 16 << 20
	maxUnpacked   = 16 << 20 // of a part that is compressed
	maxTenant     = 150
	maxRefs       = 1 << 24
	maxGeneration = 1<<31 - 1

	refsAtOnce = 512 << 10 // bytes of entries at which a record of refs ends
)

// Kind of a record.
type Kind byte

// The kinds of records.
const (
	KindSession  Kind = 1
	KindRefs     Kind = 2
	KindBatch    Kind = 3
	KindMetadata Kind = 4
)

// States of a ref, and forms of metadata, on disk.
const (
	refNone      = 0
	refAnnounced = 1
	refRefused   = 2

	metadataOfFamily = 1
	familyOfMetric   = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrRecord is wrapped by errors of records that are not as the format has them.
var ErrRecord = errors.New("invalid record")

// Session is what a session's first record of a generation says.
type Session struct {
	Tenant     string
	ID, Source [16]byte
	First      uint64 // number of its first batch in the generation
	Previous   uint64 // generation of the batch before that; 0: none
	Refs       int    // refs that follow
}

// Ref is what a ref of a session means. The zero value means nothing.
type Ref struct {
	Labels    labels.Labels
	Announced bool
	Refused   bool
}

// Metadata is an entry of what a tenant's generation inherits: metadata of
// Family or, if Metric isn't empty, that the metric belongs to it.
type Metadata struct {
	Family, Metric   string
	Type, Unit, Help string
}

// Entry is one or more records on their way into a log. Take one with Log.Entry,
// fill it, give it to Log.Append.
type Entry struct {
	buf     []byte // records, framed
	scratch []byte
	err     error // the first record that can't be written
}

// begin starts a record and returns where its frame is.
func (e *Entry) begin(k Kind) int {
	at := len(e.buf)
	e.buf = append(e.buf, make([]byte, frameSize)...)
	e.buf = append(e.buf, byte(k))
	return at
}

// end fills in the frame at the offset given.
func (e *Entry) end(at int) {
	payload := e.buf[at+frameSize:]
	if len(payload) > maxPayload {
		e.err = fmt.Errorf("record of %d bytes, the limit is %d", len(payload), maxPayload)
		e.buf = e.buf[:at]
		return
	}
	binary.LittleEndian.PutUint32(e.buf[at:], uint32(len(payload)))
	binary.LittleEndian.PutUint32(e.buf[at+4:], crc32.Checksum(payload, castagnoli))
}

func (e *Entry) uvarint(u uint64) { e.buf = binary.AppendUvarint(e.buf, u) }

// packed appends scratch, compressed.
func (e *Entry) packed() {
	if len(e.scratch) > maxUnpacked {
		e.err = fmt.Errorf("part of %d bytes, the limit is %d", len(e.scratch), maxUnpacked)
		return
	}
	at, most := len(e.buf), s2.MaxEncodedLen(len(e.scratch))
	if cap(e.buf)-at < most {
		e.buf = append(make([]byte, 0, 2*at+most), e.buf...)
	}
	e.buf = e.buf[:at+len(s2.Encode(e.buf[at:at+most], e.scratch))]
}

// Session adds what begins a session in a generation.
func (e *Entry) Session(index uint64, s *Session) {
	at := e.begin(KindSession)
	e.uvarint(index)
	e.buf = appendText(e.buf, s.Tenant)
	e.buf = append(e.buf, s.ID[:]...)
	e.buf = append(e.buf, s.Source[:]...)
	e.uvarint(s.First)
	e.uvarint(s.Previous)
	e.uvarint(uint64(s.Refs))
	e.end(at)
}

// Refs adds what refs mean, beginning with from, until there are n or the record
// is large. It returns how many it has added; more go into another entry.
func (e *Entry) Refs(index uint64, from, n int, ref func(int) Ref) int {
	b, added := e.scratch[:0], 0
	for ; added < n && len(b) < refsAtOnce; added++ {
		b = appendRef(b, ref(from+added))
	}
	e.scratch = b
	at := e.begin(KindRefs)
	e.uvarint(index)
	e.uvarint(uint64(from))
	e.packed()
	e.end(at)
	return added
}

func appendRef(b []byte, r Ref) []byte {
	switch {
	case !r.Announced:
		return append(b, refNone)
	case r.Refused:
		b = append(b, refRefused)
	default:
		b = append(b, refAnnounced)
	}
	b = binary.AppendUvarint(b, uint64(r.Labels.Len()))
	r.Labels.Range(func(l labels.Label) {
		b = appendText(appendText(b, l.Name), l.Value)
	})
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// Batch adds a batch. refused are the positions of the announcements that were
// refused, limited the refs of which samples were refused because of the limit of
// series: both strictly ascending.
func (e *Entry) Batch(index uint64, b *shippb.Batch, refused, limited []uint32) {
	at := e.begin(KindBatch)
	e.uvarint(index)
	e.uvarint(b.Seq)
	e.ascending(refused)
	e.ascending(limited)
	e.uvarint(uint64(len(b.Columns)))
	e.buf = append(e.buf, b.Columns...)
	if len(b.Announce)+len(b.Withdraw)+len(b.Exemplars)+len(b.Metadata)+len(b.Refused) > 0 {
		rest := &shippb.Batch{Announce: b.Announce, Withdraw: b.Withdraw, Exemplars: b.Exemplars, Metadata: b.Metadata, Refused: b.Refused}
		var err error
		if e.scratch, err = (proto.MarshalOptions{}).MarshalAppend(e.scratch[:0], rest); err != nil {
			e.err = fmt.Errorf("batch %d: %w", b.Seq, err)
		}
		e.packed()
	}
	e.end(at)
}

func (e *Entry) ascending(refs []uint32) {
	e.uvarint(uint64(len(refs)))
	next := uint32(0)
	for _, r := range refs {
		e.uvarint(uint64(r - next))
		next = r + 1
	}
}

// Metadata adds what a tenant's generation inherits.
func (e *Entry) Metadata(tenant string, ms []Metadata) {
	for len(ms) > 0 {
		b, n := e.scratch[:0], 0
		for n < len(ms) && len(b) < refsAtOnce {
			m := &ms[n]
			n++
			if m.Metric != "" {
				b = appendText(appendText(append(b, familyOfMetric), m.Metric), m.Family)
				continue
			}
			b = appendText(append(b, metadataOfFamily), m.Family)
			b = appendText(appendText(appendText(b, m.Type), m.Unit), m.Help)
		}
		e.scratch, ms = b, ms[n:]
		at := e.begin(KindMetadata)
		e.buf = appendText(e.buf, tenant)
		e.packed()
		e.end(at)
	}
}

// Record is a record that was read. Its fields are those of its kind; slices lie
// in the payload.
type Record struct {
	Kind    Kind
	Index   uint64  // of the session; not of metadata
	Session Session // KindSession

	From int // KindRefs: the first ref

	Seq              uint64   // KindBatch
	Refused, Limited []uint32 // …
	Columns          []byte   // …

	Tenant string // KindMetadata

	packed  []byte // compressed part of refs, batch, metadata
	payload []byte
	pool    *sync.Pool // where Release puts it
}

// Parse replaces r by the record in a payload. What is compressed stays so: that
// is for Refs, Rest and Metadata.
func (r *Record) Parse(payload []byte) error {
	*r = Record{Refused: r.Refused[:0], Limited: r.Limited[:0], payload: r.payload, pool: r.pool}
	d := over(payload)
	r.Kind = Kind(d.Byte())
	if r.Kind == KindMetadata {
		r.Tenant = d.tenant()
		r.packed, d.B = d.B, nil
		return d.Err
	}
	r.Index = d.Uvarint()
	switch r.Kind {
	case KindSession:
		s := &r.Session
		s.Tenant = d.tenant()
		copy(s.ID[:], d.Bytes(16))
		copy(s.Source[:], d.Bytes(16))
		s.First, s.Previous = d.Uvarint(), d.Uvarint()
		refs := d.Uvarint()
		if s.First == 0 || s.Previous > maxGeneration || refs > maxRefs {
			d.Fail("number out of range")
		}
		s.Refs = int(refs)
	case KindRefs:
		from := d.Uvarint()
		if from > maxRefs {
			d.Fail("ref out of range")
		}
		r.From = int(from)
		r.packed, d.B = d.B, nil
	case KindBatch:
		r.Seq = d.Uvarint()
		r.Refused = d.ascending(r.Refused)
		r.Limited = d.ascending(r.Limited)
		r.Columns = d.Sized()
		r.packed, d.B = d.B, nil
	default:
		d.Fail("unknown kind")
	}
	if len(d.B) > 0 {
		d.Fail("bytes behind the last field")
	}
	return d.Err
}

// Scratch is memory for what is decompressed, to be reused.
type Scratch struct {
	b, other []byte
	builder  labels.ScratchBuilder
}

func (s *Scratch) unpack(b []byte) ([]byte, error) {
	n, err := s2.DecodedLen(b)
	if err != nil {
		return nil, fmt.Errorf("%w: compression header: %w", ErrRecord, err)
	}
	if n > maxUnpacked {
		return nil, fmt.Errorf("%w: %d bytes decompressed, the limit is %d", ErrRecord, n, maxUnpacked)
	}
	if cap(s.b) < n {
		s.b = make([]byte, n)
	}
	out, err := s2.Decode(s.b[:n], b)
	if err != nil {
		return nil, fmt.Errorf("%w: decompress: %w", ErrRecord, err)
	}
	return out, nil
}

// Refs gives the refs of a record of that kind, from r.From on, to fn, until it
// returns an error.
func (r *Record) Refs(s *Scratch, fn func(Ref) error) error {
	b, err := s.unpack(r.packed)
	if err != nil {
		return err
	}
	d := over(b)
	d.src = string(b)
	for len(d.B) > 0 {
		var ref Ref
		switch state := d.Byte(); state {
		case refNone:
		case refAnnounced, refRefused:
			ref = Ref{Announced: true, Refused: state == refRefused}
			s.builder.Reset()
			last := ""
			for n := d.Uvarint(); n > 0 && d.Err == nil; n-- {
				name, value := d.text(), d.text()
				if name <= last && d.Err == nil {
					d.Fail("label names out of order")
				}
				last = name
				s.builder.Add(name, value)
			}
			if d.Err == nil {
				ref.Labels = s.builder.Labels()
			}
		default:
			d.Fail("unknown state of a ref")
		}
		if d.Err != nil {
			return d.Err
		}
		if err := fn(ref); err != nil {
			return err
		}
	}
	return nil
}

// Numbers of fields in ship.proto.
const (
	batchAnnounce = 2
	seriesRef     = 1
	seriesLabels  = 2
)

// Rest is what a batch has beside seq and columns; nil if there is nothing. Its
// announcements are given to announce instead, in their order, until that returns an
// error: a replay has as many as there are series. The labels of one are in order,
// or there is an error.
func (r *Record) Rest(s *Scratch, announce func(ref uint32, ls labels.Labels, err error) error) (*shippb.Batch, error) {
	if len(r.packed) == 0 {
		return nil, nil
	}
	b, err := s.unpack(r.packed)
	if err != nil {
		return nil, err
	}
	text := string(b) // texts are parts of it
	other := s.other[:0]
	for at := 0; at < len(b); {
		number, kind, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return nil, fmt.Errorf("%w: batch %d: %w", ErrRecord, r.Seq, protowire.ParseError(n))
		}
		size := protowire.ConsumeFieldValue(number, kind, b[at+n:])
		if size < 0 {
			return nil, fmt.Errorf("%w: batch %d: %w", ErrRecord, r.Seq, protowire.ParseError(size))
		}
		end := at + n + size
		if number != batchAnnounce || kind != protowire.BytesType {
			other = append(other, b[at:end]...)
			at = end
			continue
		}
		v, _ := protowire.ConsumeBytes(b[at+n:])
		ref, ls, invalid, err := s.series(v, text[end-len(v):end])
		if err != nil {
			return nil, fmt.Errorf("%w: batch %d: %w", ErrRecord, r.Seq, err)
		}
		if err := announce(ref, ls, invalid); err != nil {
			return nil, err
		}
		at = end
	}
	s.other = other
	rest := &shippb.Batch{}
	if err := proto.Unmarshal(other, rest); err != nil {
		return nil, fmt.Errorf("%w: batch %d: %w", ErrRecord, r.Seq, err)
	}
	return rest, nil
}

// ErrLabels is that of an announcement whose labels make no series.
var ErrLabels = errors.New("labels out of order, empty or of invalid UTF-8")

// series reads a message Series. text is what b is, as a string.
func (s *Scratch) series(b []byte, text string) (ref uint32, ls labels.Labels, invalid, _ error) {
	s.builder.Reset()
	name, last, named := "", "", false
	for at := 0; at < len(b); {
		number, kind, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return 0, ls, nil, protowire.ParseError(n)
		}
		at += n
		size := protowire.ConsumeFieldValue(number, kind, b[at:])
		if size < 0 {
			return 0, ls, nil, protowire.ParseError(size)
		}
		switch {
		case number == seriesRef && kind == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(b[at:])
			ref = uint32(v) //nolint:gosec // as protobuf has it
		case number == seriesLabels && kind == protowire.BytesType:
			v, _ := protowire.ConsumeBytes(b[at:])
			t := text[at+size-len(v) : at+size]
			if !utf8.ValidString(t) {
				invalid = ErrLabels
			}
			if named = !named; named {
				name = t
				break
			}
			if name <= last { // none is empty
				invalid = ErrLabels
			}
			last = name
			s.builder.Add(name, t)
		}
		at += size
	}
	if named {
		invalid = ErrLabels
	}
	if invalid == nil {
		ls = s.builder.Labels()
	}
	return ref, ls, invalid, nil
}

// Metadata gives the entries of a record of that kind to fn.
func (r *Record) Metadata(s *Scratch, fn func(Metadata)) error {
	b, err := s.unpack(r.packed)
	if err != nil {
		return err
	}
	d := over(b)
	for len(d.B) > 0 {
		var m Metadata
		switch d.Byte() {
		case metadataOfFamily:
			m.Family, m.Type, m.Unit, m.Help = d.text(), d.text(), d.text(), d.text()
		case familyOfMetric:
			m.Metric, m.Family = d.text(), d.text()
			if m.Metric == "" && d.Err == nil {
				d.Fail("metric without a name")
			}
		default:
			d.Fail("unknown form of metadata")
		}
		if d.Err != nil {
			return d.Err
		}
		fn(m)
	}
	return nil
}

// reader reads the fields of records.
type reader struct {
	untrusted.Reader

	src string // if not empty, what ends where B does: texts are parts of it
}

func over(b []byte) reader { return reader{Reader: untrusted.Reader{B: b, Kind: ErrRecord}} }

func (d *reader) text() string {
	b := d.Sized()
	if d.src == "" {
		return string(b)
	}
	end := len(d.src) - len(d.B)
	return d.src[end-len(b) : end]
}

func (d *reader) tenant() string {
	t := d.text()
	if (t == "" || len(t) > maxTenant) && d.Err == nil {
		d.Fail("tenant of impossible length")
	}
	return t
}

func (d *reader) ascending(refs []uint32) []uint32 {
	n := d.Uvarint()
	if n > uint64(len(d.B)) { // a ref takes a byte at least
		d.Fail("count of refs that the record can't hold")
		return refs
	}
	next := uint64(0)
	for range n {
		u := d.Uvarint()
		if u > math.MaxUint32 || next+u > math.MaxUint32 {
			d.Fail("ref out of range")
		}
		if d.Err != nil {
			return refs
		}
		refs = append(refs, uint32(next+u))
		next += u + 1
	}
	return refs
}

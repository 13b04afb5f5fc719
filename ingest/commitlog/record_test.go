package commitlog

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

var (
	exampleSession = Session{Tenant: "tenant", ID: [16]byte{1, 2}, Source: [16]byte{3}, First: 300, Previous: 4, Refs: 3}
	exampleRefs    = []Ref{
		{Announced: true, Labels: labels.FromStrings("__name__", "up", "job", strings.Repeat("long", 100))},
		{},
		{Announced: true, Refused: true},
	}
	exampleBatch = &shippb.Batch{
		Seq: 300, Columns: []byte("columns"), Withdraw: []uint32{1, 2},
		Announce:  []*shippb.Series{{Ref: 3, Labels: []string{"__name__", "x"}}, {Ref: 4}},
		Exemplars: []*shippb.Exemplar{{Ref: 3, T: -1, Value: 7, Labels: []string{"trace", "x"}}},
		Metadata:  []*shippb.Metadata{{Ref: 3, Type: "counter", Help: "help"}},
		Refused:   []*shippb.Refused{{Seq: 300, Reason: "series_limit", Samples: 3, Example: "x"}},
	}
	exampleMetadata = []Metadata{{Family: "x", Type: "counter", Unit: "bytes", Help: "…"}, {Family: "x", Metric: "x_total"}}
)

// examples are all kinds of records.
func examples() []func(*Entry) {
	return []func(*Entry){
		func(e *Entry) { e.Session(9, &exampleSession) },
		func(e *Entry) { e.Refs(9, 0, 3, func(i int) Ref { return exampleRefs[i] }) },
		func(e *Entry) { e.Batch(9, exampleBatch, []uint32{1}, []uint32{0, 2, 1<<32 - 1}) },
		func(e *Entry) { e.Batch(9, &shippb.Batch{Seq: 301}, nil, nil) },
		func(e *Entry) { e.Metadata("tenant", exampleMetadata) },
	}
}

func TestRecords(t *testing.T) {
	var records []*Record
	e := &Entry{}
	for _, fill := range examples() {
		fill(e)
	}
	if e.err != nil {
		t.Fatal(e.err)
	}
	data := append(header([16]byte{1}, 1, time.UnixMilli(1)), e.buf...)
	var h Header
	if _, err := read(t.Context(), bytes.NewReader(data), int64(len(data)), 1, func(got Header) { h = got }, func(r *Record) {
		records = append(records, r)
	}); err != nil {
		t.Fatal(err)
	}
	if h.Process != [16]byte{1} || h.Generation != 1 || h.Created.UnixMilli() != 1 || len(records) != 5 {
		t.Fatalf("header %+v, %d records", h, len(records))
	}
	var s Scratch
	if r := records[0]; r.Kind != KindSession || r.Index != 9 || r.Session != exampleSession {
		t.Errorf("session %+v", r)
	}
	var refs []Ref
	if err := records[1].Refs(&s, func(r Ref) error { refs = append(refs, r); return nil }); err != nil || records[1].Kind != KindRefs || records[1].From != 0 {
		t.Errorf("refs: %+v, %v", records[1], err)
	}
	if d := cmp.Diff(exampleRefs, refs, cmp.Comparer(labels.Equal)); d != "" {
		t.Error(d)
	}
	r := records[2]
	rest, err := restOf(t, r, &s)
	if err != nil {
		t.Fatal(err)
	}
	rest.Seq, rest.Columns = r.Seq, r.Columns
	if d := cmp.Diff(exampleBatch, rest, protocmp.Transform()); d != "" || r.Kind != KindBatch || r.Index != 9 {
		t.Errorf("%+v %s", r, d)
	}
	if d := cmp.Diff([]uint32{1}, r.Refused) + cmp.Diff([]uint32{0, 2, 1<<32 - 1}, r.Limited); d != "" {
		t.Error(d)
	}
	if rest, err := restOf(t, records[3], &s); rest != nil || err != nil || records[3].Seq != 301 || len(records[3].Columns) != 0 {
		t.Errorf("empty batch: %+v, %v, %v", records[3], rest, err)
	}
	var ms []Metadata
	if err := records[4].Metadata(&s, func(m Metadata) { ms = append(ms, m) }); err != nil || records[4].Tenant != "tenant" {
		t.Error(err)
	}
	if d := cmp.Diff(exampleMetadata, ms); d != "" {
		t.Error(d)
	}
}

// restOf is Rest with its announcements. They are those of protobuf's own decoder.
func restOf(t *testing.T, r *Record, s *Scratch) (*shippb.Batch, error) {
	t.Helper()
	var as []*shippb.Series
	var bad error
	rest, err := r.Rest(s, func(ref uint32, ls labels.Labels, invalid error) error {
		a := &shippb.Series{Ref: ref}
		ls.Range(func(l labels.Label) { a.Labels = append(a.Labels, l.Name, l.Value) })
		as = append(as, a)
		bad = errors.Join(bad, invalid)
		return nil
	})
	if err != nil || bad != nil || rest == nil {
		return nil, errors.Join(err, bad)
	}
	b, err := s.unpack(r.packed)
	if err != nil {
		t.Fatal(err)
	}
	want := &shippb.Batch{}
	if err := proto.Unmarshal(b, want); err != nil {
		t.Errorf("protobuf can't read it: %v", err)
	}
	rest.Announce = as
	if len(want.Announce) != len(as) {
		t.Errorf("%d announcements, want %d", len(as), len(want.Announce))
	}
	for i, a := range want.Announce {
		a.ProtoReflect().SetUnknown(nil)
		if !proto.Equal(a, as[i]) {
			t.Errorf("announcement %v, want %v", as[i], a)
		}
	}
	return rest, nil
}

// Many refs and much metadata go into several records, none of them large.
func TestManyRefs(t *testing.T) {
	ref := Ref{Announced: true, Labels: labels.FromStrings("__name__", strings.Repeat("x", 1000))}
	e, n, added := &Entry{}, 5000, 0
	for added < n {
		before := added
		added += e.Refs(1, added, n-added, func(int) Ref { return ref })
		if added == before || added-before > 1000 {
			t.Fatalf("%d refs in a record", added-before)
		}
	}
	ms := make([]Metadata, 3000)
	for i := range ms {
		ms[i] = Metadata{Family: "x", Help: strings.Repeat("x", 1000)}
	}
	e.Metadata("t", ms)
	data := append(header([16]byte{}, 1, time.Now()), e.buf...)
	var s Scratch
	refs, entries := 0, 0
	if _, err := read(t.Context(), bytes.NewReader(data), int64(len(data)), 1, func(Header) {}, func(r *Record) {
		var err error
		if r.Kind == KindRefs {
			if r.From != refs {
				t.Errorf("refs from %d follow %d", r.From, refs)
			}
			err = r.Refs(&s, func(Ref) error { refs++; return nil })
		} else {
			err = r.Metadata(&s, func(Metadata) { entries++ })
		}
		if err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if refs != n || entries != len(ms) {
		t.Errorf("%d refs, %d entries of metadata", refs, entries)
	}
}

func TestRecordBeyondTheLimit(t *testing.T) {
	l := open(t, t.TempDir(), Options{})
	stop := start(t, l)
	defer stop()
	mustAdd(l, 1, 1, strings.Repeat("x", maxPayload))
	if l.Err() == nil {
		t.Error("a record that can't be read was written")
	}
	e := &Entry{}
	e.Batch(1, &shippb.Batch{Metadata: []*shippb.Metadata{{Help: strings.Repeat("x", maxUnpacked)}}}, nil, nil)
	if e.err == nil {
		t.Error("a part that can't be read was taken")
	}
}

// FuzzRecord reads hostile payloads as all that they may be.
func FuzzRecord(f *testing.F) {
	for _, fill := range examples() {
		e := &Entry{}
		fill(e)
		f.Add(e.buf[frameSize:])
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		var r Record
		if err := r.Parse(payload); err != nil {
			if !errors.Is(err, ErrRecord) {
				t.Errorf("error of another kind: %v", err)
			}
			return
		}
		var s Scratch
		e := &Entry{}
		switch r.Kind {
		case KindSession:
			e.Session(r.Index, &r.Session)
		case KindRefs:
			var refs []Ref
			if err := r.Refs(&s, func(r Ref) error { refs = append(refs, r); return nil }); err != nil {
				return
			}
			e.Refs(r.Index, r.From, len(refs), func(i int) Ref { return refs[i-r.From] })
		case KindBatch:
			rest, err := restOf(t, &r, &s)
			if err != nil {
				return
			}
			if rest == nil {
				rest = &shippb.Batch{}
			}
			rest.Seq, rest.Columns = r.Seq, r.Columns
			e.Batch(r.Index, rest, r.Refused, r.Limited)
		case KindMetadata:
			var ms []Metadata
			if err := r.Metadata(&s, func(m Metadata) { ms = append(ms, m) }); err != nil {
				return
			}
			e.Metadata(r.Tenant, ms)
		}
		if e.err != nil || len(e.buf) == 0 {
			return
		}
		// What could be read says the same once it is written.
		var again Record
		size := frameSize + int(uint32(e.buf[0])|uint32(e.buf[1])<<8|uint32(e.buf[2])<<16)
		if err := again.Parse(e.buf[frameSize:min(size, len(e.buf))]); err != nil {
			t.Fatalf("%x after %x: %v", e.buf, payload, err)
		}
		if again.Kind != r.Kind || again.Index != r.Index || again.Session != r.Session || again.Seq != r.Seq || again.Tenant != r.Tenant ||
			!bytes.Equal(again.Columns, r.Columns) || !cmp.Equal(again.Refused, r.Refused) || !cmp.Equal(again.Limited, r.Limited) {
			t.Errorf("%+v became %+v", r, again)
		}
		if r.Kind == KindBatch {
			a, errA := restOf(t, &r, &s)
			b, errB := restOf(t, &again, &s)
			if errA != nil || errB != nil || a != nil && b != nil && !proto.Equal(strip(a), strip(b)) {
				t.Errorf("%v (%v) became %v (%v)", a, errA, b, errB)
			}
		}
	})
}

// strip removes what a writer never puts there.
func strip(b *shippb.Batch) *shippb.Batch {
	b.Seq, b.Columns = 0, nil
	b.ProtoReflect().SetUnknown(nil)
	return b
}

// FuzzRead reads hostile files.
func FuzzRead(f *testing.F) {
	data, _ := sample(f)
	f.Add(data)
	f.Add(data[:len(data)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		n, at, err := readAll(t, data)
		if err == nil && at != int64(len(data)) || at > int64(len(data)) || n > len(data)/frameSize {
			t.Errorf("%d records up to %d of %d bytes, %v", n, at, len(data), err)
		}
	})
}

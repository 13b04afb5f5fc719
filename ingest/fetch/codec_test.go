package fetch

import (
	"testing"

	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// FuzzUnmarshal: a message is what protobuf takes it for.
func FuzzUnmarshal(f *testing.F) {
	c := Columns{Generation: 7, Refs: []uint32{0, 2}, Counts: []uint32{2, 1}, Chunks: []Chunk{
		{Encoding: chunkenc.EncXOR2, MinT: 1100, MaxT: 1200, Data: []byte("first")},
		{Encoding: Sample, MinT: 1500, MaxT: 1500, Data: []byte("12345678")},
	}, Data: []byte("first12345678")}
	m := &fetchpb.ReadResponse{}
	c.Fill(m, 1000)
	for _, m := range []*fetchpb.ReadResponse{{}, {Header: header}, m, {Data: []byte("alone")}} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, b...)) // the last data, and all of the rest
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte("\x48\x01")) // data that are a number
	f.Fuzz(func(t *testing.T, b []byte) {
		var want, got fetchpb.ReadResponse
		werr, err := proto.Unmarshal(b, &want), unmarshal(b, &got)
		if (werr == nil) != (err == nil) {
			t.Fatalf("%v, protobuf says %v", err, werr)
		}
		if err == nil && !proto.Equal(&want, &got) {
			t.Fatalf("%v, protobuf has %v", &got, &want)
		}
	})
}

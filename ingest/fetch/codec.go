package fetch

import (
	"slices"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// codec reads the answers of one Read. The data of chunks, which are most of them, stay where
// they have come to: in the memory of the answer, which a later one uses again. Protobuf
// would copy them out of what gRPC has put together.
type codec struct {
	encoding.CodecV2
	memory *memory
	at     *message // where the last message lies
}

func newCodec(m *memory) *codec {
	return &codec{CodecV2: encoding.GetCodecV2(grpcproto.Name), memory: m}
}

// dataField is the number of ReadResponse.data.
const dataField = 9

// Unmarshal implements encoding.CodecV2.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*fetchpb.ReadResponse)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	c.at = c.memory.next()
	c.at.buffer = slices.Grow(c.at.buffer[:0], data.Len())[:data.Len()]
	data.CopyTo(c.at.buffer)
	return unmarshal(c.at.buffer, m)
}

// unmarshal is proto.Unmarshal of a message that is empty. The data of chunks are part of b.
func unmarshal(b []byte, m *fetchpb.ReadResponse) error {
	merge := proto.UnmarshalOptions{Merge: true}
	from := 0 // of what m has not got yet
	for at := 0; at < len(b); {
		number, kind, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return protowire.ParseError(n)
		}
		size := protowire.ConsumeFieldValue(number, kind, b[at+n:])
		if size < 0 {
			return protowire.ParseError(size)
		}
		end := at + n + size
		if number == dataField && kind == protowire.BytesType {
			if err := merge.Unmarshal(b[from:at], m); err != nil {
				return err
			}
			data, _ := protowire.ConsumeBytes(b[at+n : end])
			m.Data, from = data, end
		}
		at = end
	}
	return merge.Unmarshal(b[from:], m)
}

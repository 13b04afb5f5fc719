package chunkfmt

import (
	"encoding/binary"
	"hash/crc32"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Location is where a page, or a run of adjacent pages, lies in its object.
type Location struct {
	Offset int64 // bytes from the start of the object
	Size   int64 // bytes
}

// End is the offset of the first byte behind l.
func (l Location) End() int64 { return l.Offset + l.Size }

// Range is a range of time, both ends included.
type Range struct {
	MinT, MaxT int64 // ms since the epoch
}

// Overlaps reports whether any instant of mint to maxt, both included, lies in r.
func (r Range) Overlaps(mint, maxt int64) bool { return r.MinT <= maxt && mint <= r.MaxT }

func (r *Range) add(t Range) {
	r.MinT = min(r.MinT, t.MinT)
	r.MaxT = max(r.MaxT, t.MaxT)
}

const (
	// MaxPage is the largest page, in bytes, before and after decompression.
	MaxPage = 64 << 20

	// maxRatio bounds how far a compressed page may grow.
	maxRatio = 200

	pageHead = 1 + binary.MaxVarintLen32 // at most
	pageTail = 4
)

// A page is a byte of type, the length of the body as a varint, the body, and
// the CRC32C of all that.
type pageType byte

const (
	pageData        pageType = 1
	pageExemplars   pageType = 2
	pageSeries      pageType = 3
	pageLabels      pageType = 4
	pageLabelValues pageType = 5
	pageDirectory   pageType = 6
	pageFooter      pageType = 7
	pageWindows     pageType = 8
	// pageGoneDirectory is a directory with Gone: programs that don't know of it fail
	// rather than miss what is in windows alone.
	pageGoneDirectory pageType = 9
	// pageGroupsDirectory is such with windows in groups, which programs that don't know of
	// them would miss too.
	pageGroupsDirectory pageType = 10

	pageZstd pageType = 0x80 // the body is its length and a zstd frame
)

//nolint:gochecknoglobals // a constant table, and coders without state that are dear to make
var (
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	zstdEncoder = sync.OnceValue(newZstdEncoder)
	zstdDecoder = sync.OnceValue(newZstdDecoder)
)

func newZstdEncoder() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}

func newZstdDecoder() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(MaxPage), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
}

// appendPage appends a page with body to dst, compressed if asked and worth it.
// It appends nothing if the body is larger than MaxPage.
func appendPage(dst []byte, typ pageType, body []byte, compress bool) []byte {
	if len(body) > MaxPage {
		return dst
	}
	start := len(dst)
	if compress && len(body) >= 64 {
		packed := binary.AppendUvarint(nil, uint64(len(body)))
		packed = zstdEncoder().EncodeAll(body, packed)
		if len(packed) < len(body)-len(body)/16 && len(body) <= maxRatio*len(packed) {
			body, typ = packed, typ|pageZstd
		}
	}
	dst = append(dst, byte(typ))
	dst = binary.AppendUvarint(dst, uint64(len(body)))
	dst = append(dst, body...)
	return binary.LittleEndian.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// openPage checks the page at the start of b and returns its body, which may
// share memory with b, and the bytes behind the page.
func openPage(b []byte, typ pageType) (body, rest []byte, err error) {
	c := over(b)
	got := pageType(c.Byte())
	n := c.Bounded("page length", MaxPage)
	body = c.Bytes(n)
	sum := c.Uint32()
	if c.Err != nil {
		return nil, nil, c.Err
	}
	if got&^pageZstd != typ {
		return nil, nil, corrupt("page has type %d, not %d", got&^pageZstd, typ)
	}
	if crc32.Checksum(b[:len(b)-len(c.B)-pageTail], castagnoli) != sum {
		return nil, nil, corrupt("page of type %d: checksum mismatch", typ)
	}
	if got&pageZstd != 0 {
		if body, err = unpackBody(body); err != nil {
			return nil, nil, err
		}
	}
	return body, c.B, nil
}

func unpackBody(packed []byte) ([]byte, error) {
	c := over(packed)
	n := c.Bounded("unpacked page length", min(MaxPage, maxRatio*uint64(len(packed))))
	if c.Err != nil {
		return nil, c.Err
	}
	body, err := zstdDecoder().DecodeAll(c.B, make([]byte, 0, n))
	if err != nil || len(body) != n {
		return nil, corrupt("page does not unpack to %d bytes: %v", n, err)
	}
	return body, nil
}

// onlyPage is openPage for bytes that must hold nothing else.
func onlyPage(b []byte, typ pageType) (body []byte, err error) {
	body, rest, err := openPage(b, typ)
	if err == nil && len(rest) > 0 {
		return nil, corrupt("%d bytes behind a page of type %d", len(rest), typ)
	}
	return body, err
}

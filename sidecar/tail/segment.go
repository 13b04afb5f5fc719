package tail

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math"
	"os"

	"github.com/prometheus/prometheus/tsdb/wlog"
)

// The WAL's page and the header of a record in it, as in tsdb/wlog/wlog.go.
const (
	pageBytes   = 32 * 1024
	headerBytes = 7
	recFull     = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// segment reads the records of one file from an offset on.
type segment struct {
	f    io.ReaderAt
	r    *wlog.LiveReader
	base int64 // offset in the file at which the reader's counting begins
	end  int64 // offset behind the last whole record
	skip bool  // the reader still has to give back the synthetic record
}

// newSegment reads a file from offset on, which must be the end of a record or 0.
// The file stays the caller's to close.
//
// Reading begins at the page that holds offset, since pages are what the format
// is aligned to. What lies before offset in that page needs no reading: the
// LiveReader is given one valid record of exactly that many bytes instead, so
// that it comes out at offset with its page alignment right.
func newSegment(f *os.File, offset int64, logger *slog.Logger, metrics *wlog.LiveReaderMetrics) (*segment, error) {
	inPage := offset % pageBytes
	if offset < 0 || (inPage > 0 && inPage < headerBytes) {
		return nil, fmt.Errorf("read %s at %d: no record ends there", f.Name(), offset)
	}
	s := &segment{f: f, base: offset - inPage, end: offset}
	// Reads are at places of the reader's own, so that readers can share a file.
	var r io.Reader = io.NewSectionReader(f, offset, math.MaxInt64-offset)
	if inPage > 0 {
		r = &prefixed{prefix: bytes.NewReader(syntheticRecord(int(inPage))), r: r}
		s.skip = true
	}
	s.r = wlog.NewLiveReader(logger, metrics, r)
	return s, nil
}

// next moves on to the next whole record. If it returns false, err says why;
// io.EOF means that there is no further one now.
func (s *segment) next() bool {
	if s.skip {
		if !s.r.Next() {
			return false
		}
		s.skip = false
	}
	if !s.r.Next() {
		return false
	}
	s.end = s.base + s.r.Offset()
	return true
}

func (s *segment) record() []byte { return s.r.Record() }

func (s *segment) err() error { return s.r.Err() }

// torn says whether something that isn't padding follows the last whole record.
func (s *segment) torn() bool {
	var b [1]byte
	if _, err := s.f.ReadAt(b[:], s.end); err != nil {
		return false
	}
	if b[0] != 0 {
		return true
	}
	nextPage := (s.end/pageBytes + 1) * pageBytes
	if _, err := s.f.ReadAt(b[:], nextPage); err != nil {
		return false
	}
	return b[0] != 0
}

// syntheticRecord returns a full, uncompressed record of n bytes, header
// included.
func syntheticRecord(n int) []byte {
	b := make([]byte, n)
	b[0] = recFull
	binary.BigEndian.PutUint16(b[1:], uint16(n-headerBytes))
	binary.BigEndian.PutUint32(b[3:], crc32.Checksum(b[headerBytes:], castagnoli))
	return b
}

// prefixed reads prefix, then r. It is io.MultiReader but for one thing: at the
// end of r it says io.EOF without giving r up, since a live file grows.
type prefixed struct {
	prefix *bytes.Reader
	r      io.Reader
}

func (p *prefixed) Read(b []byte) (int, error) {
	if p.prefix != nil {
		if p.prefix.Len() > 0 {
			return p.prefix.Read(b)
		}
		p.prefix = nil
	}
	return p.r.Read(b)
}

package commitlog

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	magic      = "EPICLOG1"
	headerSize = 44
)

// Header is what a file says of itself.
type Header struct {
	Process    [16]byte
	Generation uint64
	Created    time.Time
}

func header(process [16]byte, generation uint64, created time.Time) []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = append(b, process[:]...)
	b = binary.LittleEndian.AppendUint64(b, generation)
	b = binary.LittleEndian.AppendUint64(b, uint64(created.UnixMilli()))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func parseHeader(b []byte) (Header, error) {
	if len(b) < headerSize || string(b[:len(magic)]) != magic {
		return Header{}, errors.New("no header of a commit log")
	}
	if crc32.Checksum(b[:headerSize-4], castagnoli) != binary.LittleEndian.Uint32(b[headerSize-4:]) {
		return Header{}, errors.New("checksum of the header differs")
	}
	return Header{
		Process: [16]byte(b[8:24]), Generation: binary.LittleEndian.Uint64(b[24:]),
		Created: time.UnixMilli(int64(binary.LittleEndian.Uint64(b[32:]))),
	}, nil
}

// checkVersion refuses a log that is well but of a version not known here.
func checkVersion(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("commit log: %w", err)
	}
	defer f.Close()
	b := make([]byte, len(magic))
	if _, err := io.ReadFull(f, b); err != nil {
		return nil // a torn one, of which Read tells
	}
	last := len(magic) - 1
	if string(b[:last]) == magic[:last] && b[last] != magic[last] {
		return fmt.Errorf("commit log: %s is of version %q, this program knows version %d: stop the ingester with the newer program, which empties the log, or remove it", path, b[last], version)
	}
	return nil
}

// HoleError is where a log ends before its file does.
type HoleError struct {
	Path   string
	Offset int64 // of the first record that isn't there
	Size   int64 // of the file
	// Torn says that the file ends within a record: a kill may do so. Otherwise the
	// process before has received what is not in the file.
	Torn bool
	Err  error // what was found instead
}

// errTorn is of a file that ends within a record.
var errTorn = errors.New("the file ends within a record")

func (e *HoleError) Error() string {
	return fmt.Sprintf("%s ends at %d of %d bytes: %v", e.Path, e.Offset, e.Size, e.Err)
}

func (e *HoleError) Unwrap() error { return e.Err }

// Files are the generations whose logs are to be replayed, ascending.
func (l *Log) Files() []uint64 { return l.replay }

// Only is for which tenants what the log of a generation holds is not durable; nil:
// for all.
func (l *Log) Only(generation uint64) []string { return l.heldAtStart[generation] }

// DurableOf is the newest generation up to which all of a tenant was durable when
// the log was opened.
func (l *Log) DurableOf(tenant string) uint64 {
	durable := l.durableAtStart
	for g, tenants := range l.heldAtStart {
		if slices.Contains(tenants, tenant) {
			durable = min(durable, g-1)
		}
	}
	return durable
}

// Read reads the log of a generation: begin is called with its header, then fn
// with each record, which fn may keep, and give back to Release. A HoleError says
// that the log ends there; any other error is that of ctx.
func (l *Log) Read(ctx context.Context, generation uint64, begin func(Header), fn func(*Record)) error {
	path := l.path(generation)
	f, err := os.Open(path)
	if err != nil {
		return &HoleError{Path: path, Err: err}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return &HoleError{Path: path, Err: err}
	}
	at, err := read(ctx, f, info.Size(), generation, begin, fn)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return &HoleError{Path: path, Offset: at, Size: info.Size(), Torn: errors.Is(err, errTorn), Err: err}
}

// Release says that the record and what lies in it is not used any more.
func (r *Record) Release() { r.pool.Put(r) }

func grown(b []byte, n int) []byte {
	if cap(b) < n {
		b = make([]byte, n+n/8)
	}
	return b[:n]
}

// read is Read for the bytes of a log. It returns where the log ends.
func read(ctx context.Context, src io.Reader, size int64, generation uint64, begin func(Header), fn func(*Record)) (int64, error) {
	pool := &sync.Pool{}
	pool.New = func() any { return &Record{pool: pool} }
	r := bufio.NewReaderSize(src, 1<<20)
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = errTorn // it was just created
		}
		return 0, fmt.Errorf("header: %w", err)
	}
	h, err := parseHeader(b)
	if err != nil {
		return 0, err
	}
	if h.Generation != generation {
		return 0, fmt.Errorf("it is the log of generation %d", h.Generation)
	}
	begin(h)
	at := int64(headerSize)
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return at, context.Cause(ctx)
		}
		if _, err := io.ReadFull(r, b[:frameSize]); err != nil {
			if errors.Is(err, io.EOF) {
				return at, nil
			}
			return at, fmt.Errorf("frame: %w", errTorn)
		}
		length, sum := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		if length == 0 || length > maxPayload {
			return at, fmt.Errorf("record of %d bytes", length)
		}
		if int64(length) > size-at-frameSize {
			return at, fmt.Errorf("record of %d bytes: %w", length, errTorn)
		}
		rec := pool.Get().(*Record)
		rec.payload = grown(rec.payload, int(length))
		payload := rec.payload
		if _, err := io.ReadFull(r, payload); err != nil {
			return at, fmt.Errorf("record of %d bytes: %w", length, err)
		}
		if crc32.Checksum(payload, castagnoli) != sum {
			return at, fmt.Errorf("checksum of a record of %d bytes differs", length)
		}
		if err := rec.Parse(payload); err != nil {
			return at, err
		}
		fn(rec)
		at += frameSize + int64(length)
	}
}

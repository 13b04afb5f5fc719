package tail

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
)

var (
	// ErrNotPrometheus is returned for a folder that is no data directory of a
	// Prometheus.
	ErrNotPrometheus = errors.New("not a Prometheus data directory")
	// ErrNoWAL is returned while a data directory has no WAL segment yet.
	ErrNoWAL = errors.New("no WAL segment yet")
)

// Dir is the data directory of a Prometheus.
type Dir struct {
	path string
	log  string // name of the folder of the log that is meant
}

// OpenDir checks that path is the data directory of a Prometheus, server or
// agent. An empty folder passes: Prometheus may be about to start in it.
func OpenDir(path string) (*Dir, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w: it doesn't exist; give the folder that Prometheus has as --storage.tsdb.path (or --storage.agent.path)", path, ErrNotPrometheus)
	case err != nil:
		return nil, fmt.Errorf("data directory: %w", err)
	case !info.IsDir():
		return nil, fmt.Errorf("%s: %w: it is a file", path, ErrNotPrometheus)
	}
	d := &Dir{path: path, log: "wal"}
	if isDir(d.WAL()) {
		if _, err := os.ReadDir(d.WAL()); err != nil {
			return nil, fmt.Errorf("data directory: %w; run as the user that Prometheus runs as, or one that may read its files", err)
		}
		return d, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w; run as the user that Prometheus runs as, or one that may read its files", err)
	}
	for _, sub := range []string{"data", "data-agent"} {
		if isDir(filepath.Join(path, sub, "wal")) {
			return nil, fmt.Errorf("%s: %w: it has no wal folder; did you mean %s?", path, ErrNotPrometheus, filepath.Join(path, sub))
		}
	}
	if isDir(filepath.Join(path, "chunks_head")) {
		return d, nil
	}
	for _, e := range entries {
		if n := e.Name(); n != "lock" && n != "lost+found" && n != "queries.active" {
			return nil, fmt.Errorf("%s: %w: it has no wal folder but other files, such as %q", path, ErrNotPrometheus, n)
		}
	}
	return d, nil
}

// Path returns the data directory.
func (d *Dir) Path() string { return d.path }

// WAL returns the folder of the write-ahead log.
func (d *Dir) WAL() string { return filepath.Join(d.path, d.log) }

// OutOfOrder returns d with its out-of-order log (WBL) in the place of its WAL.
// That one has the WAL's format and no WAL checkpoints.
func (d *Dir) OutOfOrder() *Dir { return &Dir{path: d.path, log: wlog.WblDirName} }

// Agent says whether the directory belongs to a Prometheus agent: one with a WAL
// but without a head's memory-mapped chunks, which a server makes as soon as it
// has a WAL, and without blocks: somebody may have removed these chunks, to have
// the server make them anew.
func (d *Dir) Agent() bool {
	if !isDir(d.WAL()) || isDir(filepath.Join(d.path, "chunks_head")) {
		return false
	}
	entries, err := os.ReadDir(d.path)
	return err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		_, err := ulid.ParseStrict(e.Name())
		return err == nil && e.IsDir()
	})
}

// Start returns the position at which a first start begins: in the newest WAL
// checkpoint if there is one, else the first segment.
func (d *Dir) Start(epoch uint32) (Position, error) {
	first, last, err := d.Segments()
	if err != nil {
		return Position{}, err
	}
	if last < 0 {
		return Position{}, ErrNoWAL // even if there is a checkpoint: Prometheus always has a segment
	}
	dir, n, err := wlog.LastCheckpoint(d.WAL())
	switch {
	case errors.Is(err, record.ErrNotFound):
		return Position{Epoch: epoch, Segment: first}, nil
	case err != nil:
		return Position{}, fmt.Errorf("newest WAL checkpoint: %w", err)
	}
	cf, cl, err := wlog.Segments(dir)
	if err != nil {
		return Position{}, fmt.Errorf("files of WAL checkpoint %d: %w", n, err)
	}
	if cl < 0 {
		return Position{Epoch: epoch, Segment: max(n+1, first)}, nil
	}
	return Position{Epoch: epoch, InCheckpoint: true, Checkpoint: n, Segment: cf}, nil
}

// Segments returns the first and the last segment in the WAL, -1 and -1 if there
// are none.
func (d *Dir) Segments() (first, last int, err error) {
	first, last, err = wlog.Segments(d.WAL())
	if errors.Is(err, fs.ErrNotExist) {
		return -1, -1, nil
	}
	if err != nil {
		return -1, -1, fmt.Errorf("list WAL segments: %w", err)
	}
	return first, last, nil
}

// LastCheckpoint returns the number of the newest WAL checkpoint, -1 if there is
// none.
func (d *Dir) LastCheckpoint() (int, error) {
	_, n, err := wlog.LastCheckpoint(d.WAL())
	if errors.Is(err, record.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("newest WAL checkpoint: %w", err)
	}
	return n, nil
}

// Size returns the bytes of WAL behind p that are on disk now: how far a reader
// at p has still to go.
func (d *Dir) Size(p Position) (int64, error) {
	entries, err := os.ReadDir(d.WAL())
	if err != nil {
		return 0, fmt.Errorf("size of WAL: %w", err)
	}
	segment, _ := p.major()
	var n int64
	for _, e := range entries {
		k, err := strconv.Atoi(e.Name())
		if err != nil || strings.Contains(e.Name(), ".") || k < segment || (p.InCheckpoint && k == segment) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // truncated in between
		}
		n += info.Size()
		if k == segment {
			n -= min(p.Offset, info.Size())
			n -= d.padding(p, info.Size())
		}
	}
	return n, nil
}

// padding is how many bytes behind p are the zeros with which Prometheus fills
// the last page of a segment that it closes: nothing is left to read there.
func (d *Dir) padding(p Position, size int64) int64 {
	rest := size - p.Offset
	if p.InCheckpoint || size%pageBytes != 0 || rest <= 0 || rest >= pageBytes {
		return 0
	}
	f, err := os.Open(d.File(p))
	if err != nil {
		return 0
	}
	defer f.Close()
	b := make([]byte, rest)
	if _, err := f.ReadAt(b, p.Offset); err != nil || len(bytes.TrimLeft(b, "\x00")) > 0 {
		return 0
	}
	return rest
}

// File returns the path of the file that p lies in.
func (d *Dir) File(p Position) string {
	if p.InCheckpoint {
		return wlog.SegmentName(wlog.CheckpointDir(d.WAL(), p.Checkpoint), p.Segment)
	}
	return wlog.SegmentName(d.WAL(), p.Segment)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

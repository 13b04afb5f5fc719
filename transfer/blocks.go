package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Block is a block of Prometheus's format, as its meta.json describes it.
type Block struct {
	ULID             ulid.ULID
	MinTime, MaxTime int64 // its samples lie in [MinTime, MaxTime), ms
	Samples, Series  uint64

	// External are the labels that all of its series have beside their own, as
	// Thanos and Mimir note them; those that are only theirs ("__…") left out.
	External map[string]string
	// Resolution is how far apart the samples of a downsampled block are, in ms; 0
	// for raw ones.
	Resolution int64
	// Deleted says that the block is marked for deletion.
	Deleted bool

	dir   string        // of a local one
	files []object.Info // of one in a bucket
}

// BlockError says which block can't be used.
type BlockError struct {
	Block string
	Err   error
}

func (e *BlockError) Error() string { return fmt.Sprintf("block %s: %v", e.Block, e.Err) }

// Unwrap returns the cause.
func (e *BlockError) Unwrap() error { return e.Err }

// Blocks is where blocks are.
type Blocks interface {
	// List returns the blocks, the newest first, and an error for each folder that
	// looks like a block and isn't one.
	List(ctx context.Context) (blocks []Block, bad []*BlockError, err error)
	// Local gives a folder with the block, which can be read until release is called.
	Local(ctx context.Context, b *Block) (dir string, release func() error, err error)
}

const (
	metaFile     = "meta.json"
	deletionMark = "deletion-mark.json"
	// maxMetaBytes bounds a meta.json, which names the blocks that went into a block.
	maxMetaBytes = 64 << 20
	// maxTime is so far from the ends of an int64 that windows can be told about any time
	// before it, in ms; a hundred million years.
	maxTime = math.MaxInt64 / 3
	// maxSpan bounds the windows that are looked for in a block. What is compacted without a
	// bound spans what there is; thirty years of that is more than there can be.
	maxSpan = 30 * 366 * 24 * time.Hour
)

func parseMeta(raw []byte) (Block, error) {
	var m struct {
		ULID    ulid.ULID `json:"ulid"`
		MinTime int64     `json:"minTime"`
		MaxTime int64     `json:"maxTime"`
		Version int       `json:"version"`
		Stats   struct {
			NumSamples uint64 `json:"numSamples"`
			NumSeries  uint64 `json:"numSeries"`
		} `json:"stats"`
		Thanos struct {
			Labels     map[string]string `json:"labels"`
			Downsample struct {
				Resolution int64 `json:"resolution"`
			} `json:"downsample"`
		} `json:"thanos"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return Block{}, fmt.Errorf("%s: %w", metaFile, err)
	}
	switch {
	case m.Version != 1:
		return Block{}, fmt.Errorf("%s has version %d; this program knows version 1", metaFile, m.Version)
	case m.ULID == (ulid.ULID{}):
		return Block{}, fmt.Errorf("%s has no ulid", metaFile)
	case m.MinTime < -maxTime || m.MaxTime > maxTime:
		return Block{}, fmt.Errorf("%s: minTime %d, maxTime %d: history has room for times of %d to %d ms; was the block written with times in another unit?",
			metaFile, m.MinTime, m.MaxTime, -maxTime, maxTime)
	case m.MaxTime < m.MinTime:
		return Block{}, fmt.Errorf("%s: maxTime %d is before minTime %d", metaFile, m.MaxTime, m.MinTime)
	case m.MaxTime-m.MinTime > maxSpan.Milliseconds():
		return Block{}, fmt.Errorf("%s: minTime %d, maxTime %d: the block spans %d days, at most %d are possible; was it written with times in another unit?",
			metaFile, m.MinTime, m.MaxTime, (m.MaxTime-m.MinTime)/(24*time.Hour).Milliseconds(), maxSpan/(24*time.Hour))
	}
	b := Block{
		ULID: m.ULID, MinTime: m.MinTime, MaxTime: m.MaxTime, Samples: m.Stats.NumSamples, Series: m.Stats.NumSeries,
		External: map[string]string{}, Resolution: m.Thanos.Downsample.Resolution,
	}
	for name, value := range m.Thanos.Labels {
		if !strings.HasPrefix(name, "__") && value != "" {
			b.External[name] = value
		}
	}
	return b, nil
}

func newestFirst(blocks []Block) {
	slices.SortFunc(blocks, func(a, b Block) int {
		if a.MaxTime != b.MaxTime {
			return int(max(-1, min(1, b.MaxTime-a.MaxTime)))
		}
		return b.ULID.Compare(a.ULID)
	})
}

// directory are blocks in a local folder.
type directory struct{ dir string }

// Directory are the blocks in dir: the data directory of a Prometheus, or any other
// folder with blocks in it, or a block itself. Only blocks are read: what
// Prometheus has in its head and WAL is not in them.
func Directory(dir string) Blocks { return directory{dir} }

func (d directory) List(context.Context) (blocks []Block, bad []*BlockError, err error) {
	if _, err := os.Stat(filepath.Join(d.dir, metaFile)); err == nil {
		b, err := readMeta(d.dir)
		if err != nil {
			return nil, []*BlockError{{d.dir, err}}, nil //nolint:nilerr // it is in bad
		}
		return []Block{b}, nil, nil
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list blocks: %w", err)
	}
	for _, e := range entries {
		if _, err := ulid.ParseStrict(e.Name()); err != nil || !e.IsDir() {
			continue
		}
		dir := filepath.Join(d.dir, e.Name())
		b, err := readMeta(dir)
		if err != nil {
			bad = append(bad, &BlockError{dir, err})
			continue
		}
		blocks = append(blocks, b)
	}
	newestFirst(blocks)
	return blocks, bad, nil
}

func readMeta(dir string) (Block, error) {
	f, err := os.Open(filepath.Join(dir, metaFile))
	if err != nil {
		return Block{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxMetaBytes))
	if err != nil {
		return Block{}, fmt.Errorf("%s: %w", metaFile, err)
	}
	b, err := parseMeta(raw)
	b.dir = dir
	if _, err := os.Stat(filepath.Join(dir, deletionMark)); err == nil {
		b.Deleted = true
	}
	return b, err
}

func (d directory) Local(_ context.Context, b *Block) (string, func() error, error) {
	return b.dir, func() error { return nil }, nil
}

// bucket are blocks in an object store.
type bucket struct {
	objects object.Store
	dir     string
}

// Bucket are the blocks in an object store, each in a "folder" named by its id, as
// Thanos and Mimir (there below the tenant) have them. One at a time is copied to
// dir.
func Bucket(objects object.Store, dir string) Blocks { return bucket{objects, dir} }

func (b bucket) List(ctx context.Context) (blocks []Block, bad []*BlockError, err error) {
	files := map[ulid.ULID][]object.Info{}
	if err := b.objects.List(ctx, "", func(i object.Info) error {
		folder, _, ok := strings.Cut(i.Key, "/")
		if id, err := ulid.ParseStrict(folder); ok && err == nil {
			files[id] = append(files[id], i)
		}
		return nil
	}); err != nil {
		return nil, nil, fmt.Errorf("list blocks: %w", err)
	}
	for id, fs := range files {
		meta := slices.IndexFunc(fs, func(i object.Info) bool { return i.Key == id.String()+"/"+metaFile })
		deleted := slices.ContainsFunc(fs, func(i object.Info) bool { return i.Key == id.String()+"/"+deletionMark })
		if meta < 0 {
			if !deleted {
				bad = append(bad, &BlockError{id.String(), errors.New("has no " + metaFile + ": its upload or its deletion isn't complete")})
			}
			continue
		}
		raw, err := b.objects.GetRange(ctx, fs[meta].Key, 0, min(fs[meta].Size, maxMetaBytes))
		if errors.Is(err, object.ErrNotExist) {
			bad = append(bad, &BlockError{id.String(), err}) // it was deleted meanwhile
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("block %s: %w", id, err)
		}
		m, err := parseMeta(raw)
		if err == nil && m.ULID != id {
			err = fmt.Errorf("%s is of block %s", metaFile, m.ULID)
		}
		if err != nil {
			bad = append(bad, &BlockError{id.String(), err})
			continue
		}
		m.files, m.Deleted = fs, deleted
		blocks = append(blocks, m)
	}
	slices.SortFunc(bad, func(a, b *BlockError) int { return strings.Compare(a.Block, b.Block) })
	newestFirst(blocks)
	return blocks, bad, nil
}

// copyBytes is how much is copied at a time.
const copyBytes = 16 << 20

func (b bucket) Local(ctx context.Context, block *Block) (dir string, release func() error, err error) {
	dir = filepath.Join(b.dir, block.ULID.String())
	release = func() error { return os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			err = errors.Join(err, release())
		}
	}()
	if err := release(); err != nil { // of a run that was killed
		return "", nil, err
	}
	for _, f := range block.files {
		name := strings.TrimPrefix(f.Key, block.ULID.String()+"/")
		if name != metaFile && name != "index" && name != "tombstones" && !strings.HasPrefix(name, "chunks/") {
			continue
		}
		if err := b.copy(ctx, f, filepath.Join(dir, filepath.FromSlash(name))); err != nil {
			return "", nil, fmt.Errorf("copy block %s: %w", block.ULID, err)
		}
	}
	return dir, release, nil
}

func (b bucket) copy(ctx context.Context, from object.Info, to string) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for off := int64(0); off < from.Size; off += copyBytes {
		part, err := b.objects.GetRange(ctx, from.Key, off, min(copyBytes, from.Size-off))
		if err != nil {
			return err
		}
		if _, err := f.Write(part); err != nil {
			return err
		}
	}
	return nil
}

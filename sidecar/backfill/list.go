package backfill

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/tsdb"
)

// maxMetaBytes bounds meta.json. It names the blocks of two hours that a block
// was made of, some 30 bytes each.
const maxMetaBytes = 16 << 20

// Block is a complete block in a Prometheus's data directory, as its meta.json
// describes it.
type Block struct {
	ULID ulid.ULID
	Dir  string

	// Its samples lie in [MinTime, MaxTime); ms.
	MinTime, MaxTime int64

	// Level is 1 for a block that was written from the head, and grows by one
	// with each compaction. Sources are the level 1 blocks that went into it,
	// ascending; those of a level 1 block are itself. A level 1 block may be
	// compacted, and gone, before anybody has listed it; so whether a block has
	// new data is told by its Sources, whose ULIDs say when they were written.
	Level   int
	Sources []ulid.ULID // not to be changed

	// Rewrites is the block that this one replaces without the samples that were
	// deleted through the API, or zero. Prometheus gives such a block level 1 and
	// a new ULID as its only source, however old and compacted it is; nothing in it
	// is new.
	Rewrites ulid.ULID

	// OutOfOrder says that all of it was out of order. A block compacted from
	// such and others isn't marked.
	OutOfOrder bool
	// Stale says that it was made of some of the head's series, those that had
	// ended; nothing follows from it for the other series in its time range.
	Stale bool

	// As counted when the block was written, deleted samples included.
	NumSamples, NumSeries uint64
}

// BadBlockError says why a block's folder was left out.
type BadBlockError struct {
	ULID ulid.ULID // as the folder's name has it
	Dir  string
	Err  error
}

func (e *BadBlockError) Error() string { return fmt.Sprintf("block %s: %v", e.Dir, e.Err) }

// Unwrap returns the cause.
func (e *BadBlockError) Unwrap() error { return e.Err }

// Lister lists the blocks of a data directory. It reads each meta.json once:
// Prometheus changes it only to count tombstones and failed compactions. It isn't
// safe for concurrent use.
type Lister struct {
	dir   string
	known map[string]Block // by name of folder
}

// NewLister returns a Lister of the blocks in data directory dir.
func NewLister(dir string) *Lister {
	return &Lister{dir: dir, known: map[string]Block{}}
}

// List returns the blocks, newest MaxTime first. Folders that look like blocks but
// have no valid meta.json are left out, named in bad, and looked at again by the
// next call: somebody may be copying blocks into the directory. Folders that
// Prometheus is still writing or already deleting have other names and are no
// blocks. err is of the data directory itself.
func (l *Lister) List() (blocks []Block, bad []*BadBlockError, err error) {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list blocks: %w", err)
	}
	known := make(map[string]Block, len(l.known))
	for _, e := range entries {
		// As isBlockDir in tsdb/db.go.
		id, err := ulid.ParseStrict(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		b, ok := l.known[e.Name()]
		if !ok {
			dir := filepath.Join(l.dir, e.Name())
			if b, err = readMeta(dir); err != nil {
				bad = append(bad, &BadBlockError{id, dir, err})
				continue
			}
		}
		known[e.Name()] = b
		blocks = append(blocks, b)
	}
	l.known = known
	slices.SortFunc(blocks, func(a, b Block) int {
		return cmp.Or(cmp.Compare(b.MaxTime, a.MaxTime), cmp.Compare(b.MinTime, a.MinTime), b.ULID.Compare(a.ULID))
	})
	return blocks, bad, nil
}

func readMeta(dir string) (Block, error) {
	f, err := os.Open(filepath.Join(dir, "meta.json"))
	if err != nil {
		return Block{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxMetaBytes+1))
	switch {
	case err != nil:
		return Block{}, fmt.Errorf("meta.json: %w", err)
	case len(raw) > maxMetaBytes:
		return Block{}, fmt.Errorf("meta.json has more than %d bytes", maxMetaBytes)
	}
	var m tsdb.BlockMeta
	if err := json.Unmarshal(raw, &m); err != nil {
		return Block{}, fmt.Errorf("meta.json: %w", err)
	}
	if m.Version != 1 {
		return Block{}, fmt.Errorf("meta.json has version %d; this one knows version 1", m.Version)
	}
	if m.ULID == (ulid.ULID{}) || m.MaxTime < m.MinTime {
		return Block{}, fmt.Errorf("meta.json: ulid %v, minTime %d, maxTime %d can't be", m.ULID, m.MinTime, m.MaxTime)
	}
	b := Block{
		ULID:       m.ULID,
		Dir:        dir,
		MinTime:    m.MinTime,
		MaxTime:    m.MaxTime,
		Level:      m.Compaction.Level,
		Sources:    m.Compaction.Sources,
		OutOfOrder: m.Compaction.FromOutOfOrder(),
		// Selected series are the same in all that matters here. Prometheus
		// itself doesn't write such blocks.
		Stale:      m.Compaction.FromStaleSeries() || m.Compaction.FromSelectedSeries(),
		NumSamples: m.Stats.NumSamples,
		NumSeries:  m.Stats.NumSeries,
	}
	if b.Level == 1 && len(m.Compaction.Parents) == 1 {
		b.Rewrites = m.Compaction.Parents[0].ULID // zero where it came from the head
	}
	return b, nil
}

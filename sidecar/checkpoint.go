package sidecar

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// checkpoint is what the sidecar keeps in the file checkpoint.json in its data
// directory: from where on it has to send again after a restart.
type checkpoint struct {
	Version int    `json:"version"` // of this format: 1
	Source  string `json:"source"`  // 16 bytes in hex; made once
	// Position is the start of the first range that isn't durable. Nil before
	// the first start has found a WAL.
	Position *tail.Position `json:"position,omitempty"`
	// Epoch is that of the log which Files tells of: what is read now. Position
	// may be of one before.
	Epoch uint32 `json:"epoch"`
	// Files says how far each file of the log was known, to see
	// that it is still that file.
	Files []tail.Known `json:"files,omitempty"`
	// Labels are the versions of external labels and relabelling, ascending.
	Labels []labelVersionFile `json:"labels,omitempty"`
	// Newest is the greatest timestamp that was sent, in ms.
	Newest  int64     `json:"newest,omitempty"`
	Updated time.Time `json:"updated"`
}

const checkpointVersion = 1

func checkpointPath(dir string) string { return filepath.Join(dir, "checkpoint.json") }

// loadCheckpoint reads the checkpoint, or makes one for a new source.
func loadCheckpoint(dir string) (*checkpoint, error) {
	b, err := os.ReadFile(checkpointPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		var id [16]byte
		rand.Read(id[:])
		c := &checkpoint{Version: checkpointVersion, Source: hex.EncodeToString(id[:])}
		b, err := c.encode()
		if err != nil {
			return nil, err
		}
		return c, writeCheckpoint(dir, b)
	}
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	c := &checkpoint{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w; if it can't be repaired remove it: all of the WAL is then sent again", checkpointPath(dir), err)
	}
	if c.Version != checkpointVersion {
		return nil, fmt.Errorf("checkpoint %s is of version %d, this program knows version %d", checkpointPath(dir), c.Version, checkpointVersion)
	}
	if id, err := hex.DecodeString(c.Source); err != nil || len(id) != 16 {
		return nil, fmt.Errorf("checkpoint %s: source %q isn't 16 bytes in hex", checkpointPath(dir), c.Source)
	}
	return c, nil
}

func (c *checkpoint) source() (id [16]byte) {
	b, _ := hex.DecodeString(c.Source)
	copy(id[:], b)
	return id
}

// encode returns the content of the file.
func (c *checkpoint) encode() ([]byte, error) {
	c.Updated = time.Now().UTC()
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("save checkpoint: %w", err)
	}
	return append(b, '\n'), nil
}

func writeCheckpoint(dir string, b []byte) error {
	if err := writeFile(checkpointPath(dir), b); err != nil {
		return fmt.Errorf("save checkpoint: %w", err)
	}
	return nil
}

// writeFile replaces a file so that a crash leaves the old or the new one.
func writeFile(path string, b []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return replaceFile(tmp, path)
}

// replaceFile renames a synced file over another and syncs the folder.
func replaceFile(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(to))
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// saving is a checkpoint on its way to disk. A goroutine of its own writes it:
// samples don't wait for a disk that takes seconds to sync.
type saving struct {
	pos        tail.Position
	dict       *dictionarySync // nil: it is on disk
	blocks     []byte          // of the account of blocks; nil: it hasn't changed
	checkpoint []byte
	began      time.Time
	done       chan struct{} // closed when err is known
	err        error
}

// saveCheckpoint writes a checkpoint and waits for it.
func (s *shipper) saveCheckpoint() error {
	if s.saving != nil {
		s.noteCheckpoint(s.endCheckpoint())
	}
	if err := s.beginCheckpoint(); err != nil {
		return err
	}
	return s.endCheckpoint()
}

// beginCheckpoint begins to write a checkpoint; none may be being written.
func (s *shipper) beginCheckpoint() error {
	if s.fatal != nil {
		return s.fatal
	}
	pos := s.ledger.Checkpoint()
	x := &saving{pos: pos, began: time.Now(), done: make(chan struct{})}
	s.blocks.passed(pos)
	s.tail.Note()
	known, err := s.files.Known(s.tail.Position())
	if err != nil {
		return err
	}
	s.cp.Position, s.cp.Epoch, s.cp.Files, s.cp.Labels = &pos, s.tail.Position().Epoch, known, s.versions.file()
	s.cp.Newest = max(s.cp.Newest, s.newestT)
	if x.checkpoint, err = s.cp.encode(); err != nil {
		return err
	}
	if x.dict, err = s.dict.setMark(s.tail.Position()); err != nil {
		return err
	}
	if x.blocks, err = s.blocks.encode(); err != nil {
		x.dict.end(err)
		return err
	}
	s.saving = x
	go func() { // endCheckpoint waits for it
		defer close(x.done)
		x.err = x.write(s.opts.DataDir)
	}()
	return nil
}

// write may be called by any goroutine.
func (x *saving) write(dir string) error {
	// First the dictionary and the account of blocks: a checkpoint promises what
	// lies before it.
	if err := x.dict.write(); err != nil {
		return err
	}
	if x.blocks != nil {
		if err := writeBlocks(dir, x.blocks); err != nil {
			return err
		}
	}
	return writeCheckpoint(dir, x.checkpoint)
}

// endCheckpoint waits for the checkpoint that is being written, and takes in what
// came of it.
func (s *shipper) endCheckpoint() error {
	x := s.saving
	<-x.done
	s.saving = nil
	x.dict.end(x.err)
	if x.err != nil {
		s.blocks.changed = s.blocks.changed || x.blocks != nil
		return x.err
	}
	s.files.Release(x.pos)
	s.metrics.checkpoints.Inc()
	return nil
}

// tendCheckpoint writes a checkpoint when one is due.
func (s *shipper) tendCheckpoint(now time.Time) {
	if s.saving != nil {
		select {
		case <-s.saving.done:
			s.noteCheckpoint(s.endCheckpoint())
		default:
			if took := now.Sub(s.saving.began); took > 10*s.opts.CheckpointInterval {
				s.health.Note("checkpoint", true, "the checkpoint has been under way to the disk of --data.dir for %s, a restart will send more than necessary again", took.Round(time.Second))
			}
			return
		}
	}
	if now.Sub(s.lastCheckpoint) >= s.opts.CheckpointInterval {
		s.lastCheckpoint = now
		if err := s.beginCheckpoint(); err != nil {
			s.noteCheckpoint(err)
		}
	}
}

func (s *shipper) noteCheckpoint(err error) {
	s.health.Note("checkpoint", err != nil, "the checkpoint can't be written, a restart will send more than necessary again: %v", err)
	if err != nil {
		s.metrics.checkpointErr.Inc()
		s.once("checkpoint").Warn("checkpoint can't be written, trying on", "err", err)
	}
}

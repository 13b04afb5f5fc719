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
		return c, c.save(dir)
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

// save writes the checkpoint so that a crash leaves the old or the new one.
func (c *checkpoint) save(dir string) error {
	c.Updated = time.Now().UTC()
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("save checkpoint: %w", err)
	}
	if err := writeFile(checkpointPath(dir), append(b, '\n')); err != nil {
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
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s *shipper) saveCheckpoint() error {
	if s.fatal != nil {
		return s.fatal
	}
	// First the dictionary and the account of blocks: a checkpoint promises what
	// lies before it.
	if err := s.dict.setMark(s.tail.Position()); err != nil {
		return err
	}
	pos := s.ledger.Checkpoint()
	s.blocks.passed(pos)
	if err := s.blocks.save(); err != nil {
		return err
	}
	s.tail.Note()
	known, err := s.files.Known(s.tail.Position())
	if err != nil {
		return err
	}
	s.cp.Position, s.cp.Epoch, s.cp.Files, s.cp.Labels = &pos, s.tail.Position().Epoch, known, s.versions.file()
	s.cp.Newest = max(s.cp.Newest, s.newestT)
	if err := s.cp.save(s.opts.DataDir); err != nil {
		return err
	}
	s.files.Release(pos)
	s.metrics.checkpoints.Inc()
	return nil
}

package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Files is a Store of files below a folder.
//
// An object is written to a temporary file, synced, renamed, and its folder is
// synced, so that after a crash it is there whole or not at all.
type Files struct {
	root    string
	tmp     string
	metrics *metrics
}

// tempFolder holds what is being written. No key has such a segment.
const tempFolder = ".tmp"

// abandonedAfter is how old a temporary file is before it is taken for the
// leftover of a crash.
const abandonedAfter = time.Hour

// NewFiles opens the folder root, which is made if it is absent, and removes
// what a crash has left half-written in it.
func NewFiles(root string, reg prometheus.Registerer) (*Files, error) {
	f := &Files{root: root, tmp: filepath.Join(root, tempFolder), metrics: newMetrics(reg)}
	if err := mkdirSynced(f.tmp); err != nil {
		return nil, fmt.Errorf("object folder: %w", err)
	}
	left, err := os.ReadDir(f.tmp)
	if err != nil {
		return nil, fmt.Errorf("object folder: %w", err)
	}
	for _, e := range left {
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < abandonedAfter {
			continue // gone meanwhile, or being written by another process
		}
		if err := os.Remove(filepath.Join(f.tmp, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("object folder: %w", err)
		}
	}
	return f, nil
}

// Check reports whether the folder can be written to.
func (f *Files) Check(context.Context) error {
	file, err := os.CreateTemp(f.tmp, "check-")
	if err != nil {
		return fmt.Errorf("object folder %s can't be written to: %w", f.root, err)
	}
	return errors.Join(file.Close(), os.Remove(file.Name()))
}

func (f *Files) path(key string) (string, error) {
	if err := ValidKey(key); err != nil {
		return "", err
	}
	return filepath.Join(f.root, filepath.FromSlash(key)), nil
}

// Put implements Store.
func (f *Files) Put(ctx context.Context, key string, r io.ReaderAt, size int64) (err error) {
	defer func(start time.Time) { f.metrics.observe(opPut, start, err) }(time.Now())
	path, err := f.path(key)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	if err := f.put(path, r, size); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	f.metrics.writtenBytes.Add(float64(size))
	return nil
}

func (f *Files) put(path string, r io.ReaderAt, size int64) error {
	tmp, err := os.CreateTemp(f.tmp, "put-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails once it is renamed
	n, err := io.Copy(tmp, io.NewSectionReader(r, 0, size))
	if err == nil && n != size {
		err = fmt.Errorf("the source has %d bytes instead of %d: %w", n, size, io.ErrUnexpectedEOF)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := mkdirSynced(dir); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// GetRange implements Store.
func (f *Files) GetRange(ctx context.Context, key string, off, n int64) (b []byte, err error) {
	defer func(start time.Time) { f.metrics.observe(opGet, start, err) }(time.Now())
	path, err := f.path(key)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(ctx.Err(), checkRange(key, off, n)); err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, fileError("get", key, err)
	}
	defer file.Close()
	// The length is asked first: n may come from a damaged row.
	info, err := file.Stat()
	if err != nil {
		return nil, fileError("get", key, err)
	}
	if info.IsDir() {
		return nil, fileError("get", key, fs.ErrNotExist)
	}
	if off+n > info.Size() {
		return nil, fmt.Errorf("get %s: %d bytes at %d of an object of %d: %w", key, n, off, info.Size(), io.ErrUnexpectedEOF)
	}
	b = make([]byte, n)
	if _, err := file.ReadAt(b, off); err != nil {
		return nil, fileError("get", key, err)
	}
	f.metrics.readBytes.Add(float64(n))
	return b, nil
}

// Size implements Store.
func (f *Files) Size(ctx context.Context, key string) (size int64, err error) {
	defer func(start time.Time) { f.metrics.observe(opHead, start, err) }(time.Now())
	path, err := f.path(key)
	if err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("size of %s: %w", key, err)
	}
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, fileError("size of", key, err)
	}
	return info.Size(), nil
}

// Delete implements Store.
func (f *Files) Delete(ctx context.Context, key string) (err error) {
	defer func(start time.Time) { f.metrics.observe(opDelete, start, err) }(time.Now())
	path, err := f.path(key)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil // Remove would take an empty folder
	}
	if err := os.Remove(path); err != nil && !isNotExist(err) {
		return fileError("delete", key, err)
	}
	return nil
}

// List implements Store.
func (f *Files) List(ctx context.Context, prefix string, fn func(Info) error) (err error) {
	defer func(start time.Time) { f.metrics.observe(opList, start, err) }(time.Now())
	// Only what is below the prefix's last whole folder is walked.
	folder := ""
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		folder = prefix[:i]
		if err := ValidKey(folder); err != nil {
			return err
		}
	}
	err = filepath.WalkDir(filepath.Join(f.root, filepath.FromSlash(folder)), func(path string, d fs.DirEntry, err error) error {
		switch {
		case isNotExist(err):
			return nil // deleted while we walked
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
		if d.IsDir() {
			if path == f.tmp {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(f.root, path)
		if err != nil {
			return err
		}
		key := filepath.ToSlash(rel)
		if !strings.HasPrefix(key, prefix) || ValidKey(key) != nil {
			return nil //nolint:nilerr // not ours
		}
		info, err := d.Info()
		if isNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(Info{Key: key, Size: info.Size(), Modified: info.ModTime()})
	})
	if err != nil {
		return fmt.Errorf("list %s: %w", prefix, err)
	}
	return nil
}

// isNotExist holds also for a key below another object, which is no folder.
func isNotExist(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

func fileError(attempt, key string, err error) error {
	if isNotExist(err) {
		return fmt.Errorf("%s %s: %w", attempt, key, ErrNotExist)
	}
	return fmt.Errorf("%s %s: %w", attempt, key, err)
}

// mkdirSynced makes a folder and those above it durable.
func mkdirSynced(dir string) error {
	info, err := os.Stat(dir)
	if err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s is not a folder", dir)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if parent == dir {
		return err
	}
	if err := mkdirSynced(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

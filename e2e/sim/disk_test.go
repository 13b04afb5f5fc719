package sim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing/synctest"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/commitlog"
)

// disk is the data directory of an ingester with a commit log, in the life of one
// process.
type disk struct {
	dir string

	mu     sync.Mutex
	full   int           // how many of the next writes fail; -1: all
	slow   time.Duration // each write and sync takes so long
	failed bool          // one has: what was received since may not be in the log
	synced map[string]int64
}

// create is commitlog.Options.Create.
func (d *disk) create(path string) (commitlog.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600) // APPEND: for who goes on after Truncate
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.synced[filepath.Base(path)] = 0
	return &diskFile{File: f, d: d}, nil
}

type diskFile struct {
	*os.File
	d *disk
}

// turn waits as long as a call takes, and says whether it fails.
func (d *disk) turn() bool {
	d.mu.Lock()
	slow := d.slow
	d.mu.Unlock()
	if slow > 0 {
		time.Sleep(slow)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full == 0 {
		return false
	}
	d.full = max(-1, d.full-1)
	d.failed = true
	return true
}

func (f *diskFile) Write(b []byte) (int, error) {
	if f.d.turn() {
		n, err := f.File.Write(b[:len(b)/3])
		return n, errors.Join(err, syscall.ENOSPC)
	}
	return f.File.Write(b)
}

func (f *diskFile) Sync() error {
	info, err := f.Stat() // what is written meanwhile may not be in it
	if err != nil {
		return err
	}
	f.d.mu.Lock()
	slow := f.d.slow
	f.d.mu.Unlock()
	if slow > 0 {
		time.Sleep(slow)
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.synced[filepath.Base(f.Name())] = info.Size()
	return nil
}

func (d *disk) set(full int, slow time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full, d.slow = full, slow
}

// hasLog says whether the ingester of an id has a commit log: it is the same at
// each start.
func (w *world) hasLog(id string) bool {
	x, known := w.logs[id]
	if !known {
		x = w.disks.IntN(4) < w.logShare
		w.logs[id] = x
	}
	return x
}

// diskFor is the disk that a process of an id starts with: that of the one before,
// or an empty one. before is the process that has used it.
func (w *world) diskFor(id string) (d *disk, before *node, err error) {
	d = &disk{synced: map[string]int64{}}
	for _, n := range append(w.alive(), w.gone...) {
		if n.id == id && n.dead.Load() && n.left != "" {
			d.dir, n.left = n.left, ""
			return d, n, nil
		}
	}
	w.dirs++
	d.dir = filepath.Join(w.dir, fmt.Sprintf("disk-%d", w.dirs))
	return d, nil, os.MkdirAll(d.dir, 0o700)
}

// crash leaves the disk of a process as it is at this moment, for the next one:
// mostly with all that was written, sometimes, as after a crash of the machine,
// with what was synced and part of the rest, or not at all.
func (w *world) crash(n *node) (how string, err error) {
	if n.disk == nil {
		return "", nil
	}
	synctest.Wait() // nobody is in the midst of writing a file
	kind := w.disks.IntN(6)
	if n.left = ""; kind == 0 {
		return ", its disk is gone", nil
	}
	w.dirs++
	to := filepath.Join(w.dir, fmt.Sprintf("disk-%d", w.dirs))
	if err := os.MkdirAll(to, 0o700); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(n.disk.dir)
	if err != nil {
		return "", err
	}
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	machine := kind == 1
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(n.disk.dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if synced, own := n.disk.synced[e.Name()]; own && machine {
			kept := between(w.disks, min(synced, int64(len(b))), int64(len(b)))
			if clear(b[kept:]); w.disks.IntN(2) == 0 { // else the file system had noted its length
				b = b[:kept]
			}
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), b, 0o600); err != nil {
			return "", err
		}
	}
	n.left, n.whole = to, !machine && !n.disk.failed
	switch {
	case machine:
		return " with its machine", nil
	case n.disk.failed:
		return " with a log that could not be written for a while", nil
	}
	return " with its log", nil
}

// disturbDisk makes the disk of a commit log full or slow for a while. Often its
// process dies of that soon after, or somebody restarts it.
func (w *world) disturbDisk() string {
	var with []*node
	for _, n := range w.alive() {
		if n.disk != nil {
			with = append(with, n)
		}
	}
	if len(with) == 0 {
		return ""
	}
	n := pick(w.rng, with...)
	if w.rng.IntN(2) == 0 {
		w.later(between(w.rng, 2*time.Second, 8*time.Second), "the one with the disk dies too", func() {
			if !n.dead.Load() {
				w.logf("%s", w.kill(n))
			}
		})
	}
	d, slow := between(w.rng, 100*time.Millisecond, 20*time.Second), between(w.rng, 5*time.Millisecond, time.Second)
	how := pick(w.rng, "full", "full for a moment", "full for a moment", "slow")
	switch how {
	case "full":
		n.disk.set(-1, 0)
	case "full for a moment":
		n.disk.set(between(w.rng, 1, 3), 0)
		return fmt.Sprintf("disk of %v is %s", n, how)
	default:
		n.disk.set(0, slow)
	}
	w.later(d, fmt.Sprintf("disk of %v is well again", n), func() { n.disk.set(0, 0) })
	return fmt.Sprintf("disk of %v is %s for %v", n, how, d)
}

// takeOver gives a process what the one before has known by its commit log: its
// sessions and, if nothing of the log was lost, all that it has called received.
func (n *node) takeOver(before *node) {
	if before == nil || before.ing.Memory() != n.ing.Memory() {
		return
	}
	before.mu.Lock()
	defer before.mu.Unlock()
	for key, s := range before.sessions {
		n.sessions[key] = s.again()
	}
	if before.whole {
		n.w.truth.inherit(n, before)
	}
}

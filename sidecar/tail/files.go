package tail

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/prometheus/tsdb/wlog"

	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

// Files holds on to the files of the log from the sidecar's checkpoint on, so
// that they can be read whatever Prometheus deletes: by an open file each and,
// where the file system allows it, by a hard link in a folder of the sidecar's
// own, which outlives a restart. Prometheus's own folder is only read.
//
// It also knows what was read of each file. That is how a log that is another
// than the one read before is told: Prometheus repairs its log by writing
// segments of the same numbers anew, and a volume may be restored or wiped.
//
// It is not safe for concurrent use.
type Files struct {
	dir     *Dir
	logger  *slog.Logger
	metrics *wlog.LiveReaderMetrics

	links    string // folder of the hard links
	linkable bool   // false after a link could not be made
	maxBytes int64  // of files that Prometheus has deleted

	kept    map[Position]*kept // by the start of the file
	deleted int64              // bytes that only live because they are kept, as of the last Keep
	dropped int                // files let go for the bound although they were still wanted
}

type kept struct {
	start Position
	f     *os.File
	link  string // path; empty if there is none
	// read is up to where the file is known: by the ledger or the dictionary.
	read int64
	// sum is the CRC32C of the first summed bytes.
	sum    uint32
	summed int64
}

// Known is what is remembered of a file over a restart.
type Known struct {
	File  Position `json:"file"`  // the start of it
	Bytes int64    `json:"bytes"` // up to where it is known
	CRC   uint32   `json:"crc32c"`
}

// KeptStats says how much is kept.
type KeptStats struct {
	Files   int
	Deleted int64 // bytes of files that Prometheus has deleted
	Dropped int   // files that were let go, for the bound, though still wanted
}

// NewFiles opens the folder for hard links, which may hold some from before; with
// links empty there are none. Files that Prometheus has deleted are kept up to
// maxBytes in all.
func NewFiles(dir *Dir, links string, maxBytes int64, logger *slog.Logger, metrics *Metrics) (*Files, error) {
	x := &Files{
		dir: dir, logger: logger, metrics: metrics.live, links: links, linkable: links != "", maxBytes: maxBytes,
		kept: map[Position]*kept{},
	}
	if links == "" {
		return x, nil
	}
	if err := os.MkdirAll(links, 0o700); err != nil {
		return nil, fmt.Errorf("folder for links to WAL segments: %w", err)
	}
	entries, err := os.ReadDir(links)
	if err != nil {
		return nil, fmt.Errorf("folder for links to WAL segments: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(links, e.Name())
		start, ok := parseLink(e.Name())
		if !ok {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			x.Close()
			return nil, fmt.Errorf("link to WAL segment: %w", err)
		}
		x.kept[start] = &kept{start: start, f: f, link: path}
	}
	return x, nil
}

func linkName(p Position) string {
	if p.InCheckpoint {
		return fmt.Sprintf("%d-c%08d-%08d", p.Epoch, p.Checkpoint, p.Segment)
	}
	return fmt.Sprintf("%d-%08d", p.Epoch, p.Segment)
}

func parseLink(name string) (Position, bool) {
	var p Position
	if n, err := fmt.Sscanf(name, "%d-c%d-%d", &p.Epoch, &p.Checkpoint, &p.Segment); err == nil && n == 3 {
		p.InCheckpoint = true
		return p, linkName(p) == name
	}
	p = Position{}
	if n, err := fmt.Sscanf(name, "%d-%d", &p.Epoch, &p.Segment); err == nil && n == 2 {
		return p, linkName(p) == name
	}
	return p, false
}

// Close closes all files. The links stay.
func (x *Files) Close() {
	for _, k := range x.kept {
		k.f.Close()
	}
	clear(x.kept)
}

func fileOf(p Position) Position {
	p.Offset = 0
	return p
}

// get returns the file that p lies in, and keeps it from now on. A file that is
// neither kept nor there gives fs.ErrNotExist.
func (x *Files) get(p Position) (*kept, error) {
	start := fileOf(p)
	if k := x.kept[start]; k != nil {
		return k, nil
	}
	f, err := os.Open(x.dir.File(p))
	if err != nil {
		return nil, err
	}
	k := &kept{start: start, f: f}
	x.link(k)
	x.kept[start] = k
	return k, nil
}

// hold keeps all files of the WAL checkpoint that p lies in, from p's on: Prometheus
// deletes it as a whole once there is a newer one. It returns the number of the last.
// A checkpoint that isn't there, or may be about to go, gives fs.ErrNotExist.
func (x *Files) hold(p Position) (last int, err error) {
	last = -1
	for k := range x.kept {
		if k.InCheckpoint && k.Epoch == p.Epoch && k.Checkpoint == p.Checkpoint {
			last = max(last, k.Segment)
		}
	}
	if last >= p.Segment {
		return last, nil // by hold
	}
	_, last, err = wlog.Segments(filepath.Dir(x.dir.File(p)))
	var held []*kept
	// The last one first: where a crash leaves the link to one, it leaves those to
	// all behind it.
	for n := last; err == nil && n >= p.Segment; n-- {
		var k *kept
		if k, err = x.get(Position{Epoch: p.Epoch, InCheckpoint: true, Checkpoint: p.Checkpoint, Segment: n}); err == nil {
			held = append(held, k)
		}
	}
	if err == nil {
		// While it is the newest, nobody has begun to delete it.
		var newest int
		if newest, err = x.dir.LastCheckpoint(); err == nil && (newest != p.Checkpoint || last < p.Segment) {
			err = fmt.Errorf("WAL checkpoint %d: %w", p.Checkpoint, fs.ErrNotExist)
		}
	}
	if err != nil {
		for _, k := range held {
			x.drop(k)
		}
		return -1, err
	}
	return last, nil
}

// has says whether a file is kept.
func (x *Files) has(p Position) bool { return x.kept[fileOf(p)] != nil }

// knows says whether something is known of the log of an epoch.
func (x *Files) knows(epoch uint32) bool {
	for _, k := range x.kept {
		if k.start.Epoch == epoch && k.read > 0 {
			return true
		}
	}
	return false
}

func (x *Files) link(k *kept) {
	if !x.linkable {
		return
	}
	path := filepath.Join(x.links, linkName(k.start))
	_ = os.Remove(path) // of a file that was replaced
	err := os.Link(x.dir.File(k.start), path)
	switch {
	case err == nil:
		own, err1 := k.f.Stat()
		linked, err2 := os.Stat(path)
		if err := errors.Join(err1, err2); err != nil || !os.SameFile(own, linked) {
			_ = os.Remove(path) // it was replaced since it was opened
			return
		}
		k.link = path
	case errors.Is(err, fs.ErrNotExist): // deleted since it was opened
	default:
		x.linkable = false
		x.logger.Info("WAL segments can't be linked, they are kept by open files only: what Prometheus deletes while the sidecar is stopped is read from blocks", "err", err)
	}
}

// rename makes a file one of another epoch.
func (x *Files) rename(k *kept, epoch uint32) {
	delete(x.kept, k.start)
	k.start.Epoch = epoch
	x.kept[k.start] = k
	if k.link != "" {
		to := filepath.Join(x.links, linkName(k.start))
		if err := os.Rename(k.link, to); err == nil {
			k.link = to
		}
	}
}

func (x *Files) drop(k *kept) {
	k.f.Close()
	if k.link != "" {
		_ = os.Remove(k.link)
	}
	delete(x.kept, k.start)
}

// ascending returns the kept files in the order of the log.
func (x *Files) ascending() []*kept {
	out := make([]*kept, 0, len(x.kept))
	for _, k := range x.kept {
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b *kept) int { return a.start.Compare(b.start) })
	return out
}

// Keep takes hold of the segments behind from, a place in the log that is there
// now, and lets go of the oldest deleted ones beyond the bound.
func (x *Files) Keep(from Position) error {
	first, last, err := x.dir.Segments()
	if err != nil {
		return err
	}
	n := from.Segment
	if from.InCheckpoint {
		n = from.Checkpoint + 1
	}
	for n = max(n, first); n >= 0 && n <= last; n++ {
		if _, err := x.get(Position{Epoch: from.Epoch, Segment: n}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("keep WAL segment: %w", err)
		}
	}
	x.deleted = 0
	all := x.ascending()
	for _, k := range slices.Backward(all) {
		named, err := x.named(k)
		if err != nil {
			return err
		}
		if named == sameFile {
			continue
		}
		info, err := k.f.Stat()
		if err != nil {
			return fmt.Errorf("stat kept WAL segment: %w", err)
		}
		if x.deleted+info.Size() > x.maxBytes {
			x.dropped++
			x.logger.Warn("WAL segment that Prometheus has deleted is let go, what it held is read from blocks",
				"segment", k.start.Segment, "kept_bytes", x.deleted, "limit", x.maxBytes)
			x.drop(k)
			continue
		}
		x.deleted += info.Size()
	}
	return nil
}

// Release lets go of the files before the one that p lies in. If p is the start of
// one, the last before of which something is known stays: something has to be
// there to compare with.
func (x *Files) Release(p Position) {
	all := x.ascending()
	n, _ := slices.BinarySearchFunc(all, fileOf(p), func(k *kept, p Position) int { return k.start.Compare(p) })
	if p.Offset == 0 {
		for n--; n > 0 && all[n].read == 0; n-- {
		}
	}
	for i := range n {
		x.drop(all[i])
	}
}

// DropFrom lets go of the files of an epoch and of later ones: of a life that
// ended before it noted them.
func (x *Files) DropFrom(epoch uint32) {
	for _, k := range x.kept {
		if k.start.Epoch >= epoch {
			x.drop(k)
		}
	}
}

// Stats says how much is kept.
func (x *Files) Stats() KeptStats {
	return KeptStats{Files: len(x.kept), Deleted: x.deleted, Dropped: x.dropped}
}

// Known returns what is to be remembered of the files of a log, given where the
// tail is.
func (x *Files) Known(at Position) ([]Known, error) {
	var out []Known
	for _, k := range x.ascending() {
		if k.start.Epoch != at.Epoch || (k.read == 0 && !k.start.Before(fileOf(at))) {
			continue
		}
		err := k.sumTo(k.read)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			continue // somebody has cut it: nothing to compare with
		}
		if err != nil {
			return nil, fmt.Errorf("checksum of WAL file %v: %w", k.start, err)
		}
		out = append(out, Known{File: k.start, Bytes: k.summed, CRC: k.sum})
	}
	return out, nil
}

// sumTo brings the checksum up to n bytes.
func (k *kept) sumTo(n int64) error {
	if n < k.summed {
		k.sum, k.summed = 0, 0
	}
	sum, err := sum(k.f, k.sum, k.summed, n)
	if err != nil {
		return err
	}
	k.sum, k.summed = sum, n
	return nil
}

// sum extends the CRC32C of the first from bytes of a file to n bytes. A file
// that has fewer gives io.ErrUnexpectedEOF.
func sum(f io.ReaderAt, crc uint32, from, n int64) (uint32, error) {
	buf := make([]byte, min(n-from, 256<<10))
	for from < n {
		b := buf[:min(n-from, int64(len(buf)))]
		if m, err := f.ReadAt(b, from); m < len(b) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		crc = crc32.Update(crc, castagnoli, b)
		from += int64(len(b))
	}
	return crc, nil
}

// sameness says what the name of a kept file stands for now.
type sameness int

const (
	sameFile sameness = iota
	otherFile
	noFile
)

func (x *Files) named(k *kept) (sameness, error) {
	info, err := os.Stat(x.dir.File(k.start))
	if errors.Is(err, fs.ErrNotExist) {
		return noFile, nil
	}
	if err != nil {
		return noFile, fmt.Errorf("stat WAL segment: %w", err)
	}
	own, err := k.f.Stat()
	if err != nil {
		return noFile, fmt.Errorf("stat kept WAL segment: %w", err)
	}
	if os.SameFile(info, own) || bug.Is(bug.SameFile) {
		return sameFile, nil
	}
	return otherFile, nil
}

// errUnsettled is returned where the log is being changed: look again.
var errUnsettled = errors.New("log is being changed")

// diverged compares the kept segments of an epoch with what is on disk under
// their names. It returns true and the place from which on the log on disk is
// another; known is false if nothing of the two is in common, and then the log
// has to be read from its start. Segments written anew with the same records
// as far as they are known are no other log: the new file is kept instead.
//
// at is where the tail is: what lies before its file was read to the end, so a
// file with more records than are known of it is another one. patience is whether
// to wait, with errUnsettled, where segments at the end of the log are absent, as
// they are while Prometheus repairs it.
func (x *Files) diverged(at Position, patience bool) (from Position, known, changed bool, err error) {
	epoch := at.Epoch
	first, last, err := x.dir.Segments()
	if err != nil {
		return from, false, false, err
	}
	if last < 0 {
		return from, false, false, errUnsettled
	}
	verified := false // something before is in common
	var before *kept  // the last file that is
	for _, k := range x.ascending() {
		if k.start.Epoch != epoch || k.start.InCheckpoint {
			continue
		}
		if k.start.Segment < first {
			continue // truncated
		}
		if before != nil && before.start.Segment+1 < k.start.Segment && k.start.Segment <= at.Segment {
			return Position{Epoch: epoch + 1, Segment: before.start.Segment + 1}, verified, true, nil // what is between isn't known
		}
		named, err := x.named(k)
		if err != nil {
			return from, false, false, err
		}
		switch {
		case named == sameFile:
			if k.start.Segment < at.Segment && x.goesOn(k.f, k.read) {
				return Position{Epoch: epoch + 1, Segment: k.start.Segment, Offset: k.read}, verified || k.read > 0, true, nil
			}
			verified, before = verified || k.read > 0, k
		case named == noFile && k.read == 0 && k.start.Segment >= at.Segment:
			x.drop(k)
		case named == noFile && !verified:
			return from, false, true, nil
		case named == noFile && patience:
			return from, false, false, errUnsettled
		case named == noFile:
			// The log ends before, and may go on there.
			return Position{Epoch: epoch + 1, Segment: before.start.Segment, Offset: before.read}, true, true, nil
		default:
			n, err := x.adopt(k)
			if err != nil {
				return from, false, false, err
			}
			if n < k.read {
				if n == 0 && !verified {
					return from, false, true, nil
				}
				return Position{Epoch: epoch + 1, Segment: k.start.Segment, Offset: n}, true, true, nil
			}
			if k.start.Segment < at.Segment && x.goesOn(k.f, k.read) {
				return Position{Epoch: epoch + 1, Segment: k.start.Segment, Offset: k.read}, verified || k.read > 0, true, nil
			}
			verified, before = verified || k.read > 0, k
		}
	}
	return from, false, false, nil
}

// goesOn says whether a whole record follows in a file at offset.
func (x *Files) goesOn(f *os.File, offset int64) bool {
	seg, err := newSegment(f, offset, x.logger, x.metrics)
	return err == nil && seg.next()
}

// adopt compares a kept file with the one that has its name now, up to what is
// known of it. If all of that is in common, the new file is kept instead. It
// returns the end of the last whole record in common.
func (x *Files) adopt(k *kept) (int64, error) {
	f, err := os.Open(x.dir.File(k.start))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, errUnsettled
	}
	if err != nil {
		return 0, fmt.Errorf("open WAL segment: %w", err)
	}
	n, err := common(k.f, f, k.read)
	if err != nil || n < k.read {
		f.Close()
		if err != nil {
			return 0, fmt.Errorf("compare WAL segment %d with what it was: %w", k.start.Segment, err)
		}
		return x.lastRecord(k, n)
	}
	k.f.Close()
	k.f, k.link = f, ""
	x.link(k)
	return n, nil
}

// common returns how many of the first n bytes of two files are equal, up to the
// first that differ.
func common(a, b io.ReaderAt, n int64) (int64, error) {
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < n; {
		want := int(min(n-off, int64(len(x))))
		i, err1 := a.ReadAt(x[:want], off)
		j, err2 := b.ReadAt(y[:want], off)
		for _, err := range []error{err1, err2} {
			if err != nil && !errors.Is(err, io.EOF) {
				return 0, err
			}
		}
		m := min(i, j)
		for p := range m {
			if x[p] != y[p] {
				return off + int64(p), nil
			}
		}
		off += int64(m)
		if m < want {
			return off, nil
		}
	}
	return n, nil
}

// lastRecord returns the end of the last whole record within the first n bytes.
func (x *Files) lastRecord(k *kept, n int64) (int64, error) {
	seg, err := newSegment(k.f, 0, x.logger, x.metrics)
	if err != nil {
		return 0, err
	}
	end := int64(0)
	for seg.next() && seg.end <= n {
		end = seg.end
	}
	return end, nil
}

// Verify compares what is remembered of the files of a log, ascending, with what
// is there, and takes hold of what is. pos is where reading is to go on. It
// returns where to go on really: pos itself if the log is still that log. If it
// isn't, the place is in a new epoch; carried is then whether all before that
// place is still the log that was read before. If nothing can be told to be, the
// error is ErrDifferent.
func (x *Files) Verify(pos Position, remembered []Known) (start Position, carried bool, err error) {
	first, last, err := x.dir.Segments()
	if err != nil {
		return pos, false, err
	}
	if last < 0 {
		return pos, true, nil // none yet, or wiped: the tail sees to it
	}
	other := func(at Position) (Position, bool, error) {
		// What is before at is in common; and of that, pos on has to be sent.
		at.Epoch = pos.Epoch
		for _, k := range x.ascending() {
			if k.start.Epoch == pos.Epoch && k.start.Before(fileOf(at)) {
				x.rename(k, pos.Epoch+1)
			}
		}
		if pos.Before(at) {
			at = pos
		}
		at.Epoch++
		return at, true, nil
	}
	verified := false
	for i, r := range remembered {
		if !r.File.InCheckpoint && r.File.Segment < first {
			if k := x.kept[r.File]; k != nil {
				k.read = r.Bytes
			}
			continue // truncated
		}
		if r.File.InCheckpoint {
			if _, err := x.hold(r.File); errors.Is(err, fs.ErrNotExist) {
				continue // made way for a newer one
			} else if err != nil {
				return pos, false, fmt.Errorf("keep WAL checkpoint: %w", err)
			}
		}
		linked := x.kept[r.File]
		f, err := os.Open(x.dir.File(r.File))
		switch {
		case errors.Is(err, fs.ErrNotExist) && r.File.InCheckpoint:
			if linked != nil {
				linked.read = r.Bytes
			}
			continue // made way for a newer one
		case errors.Is(err, fs.ErrNotExist):
			if !verified {
				return pos, false, ErrDifferent
			}
			// The log ends before, and may go on there.
			before := remembered[i-1]
			at := before.File
			at.Offset = before.Bytes
			return other(at)
		case err != nil:
			return pos, false, fmt.Errorf("open WAL: %w", err)
		}
		crc, err := sum(f, 0, 0, r.Bytes)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			f.Close()
			return pos, false, fmt.Errorf("read WAL file %v: %w", r.File, err)
		}
		if err == nil && crc == r.CRC {
			if linked != nil {
				linked.f.Close()
				linked.f = f
			} else {
				linked = &kept{start: r.File, f: f}
				x.link(linked)
				x.kept[r.File] = linked
			}
			linked.read, linked.sum, linked.summed = r.Bytes, crc, r.Bytes
			verified = verified || r.Bytes > 0
			if i < len(remembered)-1 && x.goesOn(f, r.Bytes) {
				if !verified {
					return pos, false, ErrDifferent
				}
				return other(Position{InCheckpoint: r.File.InCheckpoint, Checkpoint: r.File.Checkpoint, Segment: r.File.Segment, Offset: r.Bytes})
			}
			continue
		}
		f.Close()
		n := int64(0)
		if linked != nil && !r.File.InCheckpoint {
			linked.read = r.Bytes
			if n, err = x.adopt(linked); err != nil {
				return pos, false, err
			}
		}
		if r.File.InCheckpoint || (n == 0 && !verified) {
			return pos, false, ErrDifferent
		}
		return other(Position{Segment: r.File.Segment, Offset: n})
	}
	if pos.Offset == 0 && !verified {
		return pos, false, ErrDifferent // nothing says that it isn't
	}
	return pos, true, nil
}

// ErrDifferent is returned by Verify where nothing of a log is in common with
// the one remembered.
var ErrDifferent = errors.New("WAL is another than the one read before")

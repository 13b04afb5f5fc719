package tail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
)

// Metrics are the metrics of all readers of one source.
type Metrics struct {
	records *prometheus.CounterVec
	trouble *prometheus.CounterVec
	live    *wlog.LiveReaderMetrics
}

// NewMetrics registers the metrics with reg, which may be nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		records: promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_wal_records_read_total",
			Help: "Records read from the WAL, by type.",
		}, []string{"type"}),
		trouble: promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_wal_troubles_total",
			Help: "What was wrong with the WAL: corrupt segments left at the corruption, torn records, records that can't be decoded or are of an unknown type, gaps where segments were gone before they were read, logs that were replaced by another.",
		}, []string{"trouble"}),
		// Registered with nothing: its one metric would look as if a Prometheus
		// spoke of its own WAL.
		live: wlog.NewLiveReaderMetrics(nil),
	}
	for _, t := range []string{"corrupt_segment", "torn_record", "undecodable_record", "unknown_record_type", "gap", "replaced"} {
		m.trouble.WithLabelValues(t)
	}
	return m
}

// Replaced counts a log that was found to be another before it was tailed.
func (m *Metrics) Replaced() { m.trouble.WithLabelValues(string(BreakReplaced)).Inc() }

// Tail follows the WAL of a data directory. It isn't safe for concurrent use.
type Tail struct {
	dir     *Dir
	files   *Files
	logger  *slog.Logger
	metrics *Metrics
	dec     *decoder
	types   [256]prometheus.Counter

	seg  *segment // of the open file; nil if none
	file *kept    // that seg reads
	pos  Position // in seg: the end of the last whole record returned or left out
	next bool     // a newer segment was seen since the last read of seg
	last int      // number of the last file of the WAL checkpoint that pos is in
	// tries counts how often reading failed at pos, since a live file may be
	// read in mid-write.
	tries int
	// unsettled is since when the log has been in a state between two.
	unsettled time.Time
	jump      *BreakError // what Next is to return
	unread    *Batch      // likewise

	warned map[string]bool
}

// BreakError is an error of Tail.Next: reading goes on, but something before To was
// not read.
type BreakError struct {
	Kind     BreakKind
	From, To Position
	// Carried says, where the log was replaced, that all before To is in common
	// with the log that was read before.
	Carried bool
}

// Moved says whether reading goes on in another file. If not, it does so behind a
// record that can't be read.
func (b *BreakError) Moved() bool { return !b.From.SameFile(b.To) }

// BreakKind says why a tail jumped.
type BreakKind string

// Kinds of breaks. What lies between From and To was not read, but for
// BreakReplaced, where To begins a new epoch. The last two are of a record that may
// hold samples, or explain some, and go on behind it.
const (
	BreakGap      BreakKind = "gap"             // segments were gone before they were read
	BreakCorrupt  BreakKind = "corrupt_segment" // the rest of a segment can't be read
	BreakReplaced BreakKind = "replaced"        // the log was rewritten, restored or wiped

	BreakUnknown     BreakKind = "unknown_record_type" // of a later Prometheus
	BreakUndecodable BreakKind = "undecodable_record"
)

func (b *BreakError) Error() string {
	return fmt.Sprintf("WAL: %s from %v to %v", b.Kind, b.From, b.To)
}

// corruptTries is how often a corruption is read again before it is believed.
const corruptTries = 3

// settleTime is how long a log without its last segments is taken for one that
// Prometheus is about to repair.
const settleTime = 10 * time.Second

// New returns a Tail that goes on at from.
func New(files *Files, from Position, logger *slog.Logger, metrics *Metrics) *Tail {
	return &Tail{
		dir:     files.dir,
		files:   files,
		logger:  logger,
		metrics: metrics,
		dec:     newDecoder(logger),
		pos:     from,
		warned:  map[string]bool{},
	}
}

// SeriesOnly makes the tail leave out all but series records, undecoded.
func (t *Tail) SeriesOnly() { t.dec.seriesOnly = true }

// Position returns the end of the last whole record that was returned or left
// out: where another Tail goes on.
func (t *Tail) Position() Position {
	if t.unread != nil {
		return t.unread.From
	}
	return t.pos
}

// Unread makes the next call of Next return the batch again that the last one has
// returned. Until then the tail's position is before it.
func (t *Tail) Unread(b *Batch) { t.unread = b }

// Next returns the next record, or io.EOF if there is none now; a later call may
// find one. A *BreakError says that the tail jumped; the next call goes on from there.
// Other errors are those of the file system: the tail keeps its place and may
// be asked again.
func (t *Tail) Next() (*Batch, error) {
	if b := t.unread; b != nil {
		t.unread = nil
		return b, nil
	}
	for {
		if b := t.jump; b != nil {
			t.jump = nil
			return nil, b
		}
		if t.seg == nil {
			if err := t.open(); err != nil {
				return nil, err
			}
			continue // open may have chosen another place
		}
		if t.seg.next() {
			from := t.pos
			t.pos.Offset = t.seg.end
			t.tries = 0
			b, kind := t.decode(t.seg.record())
			switch {
			case b != nil:
				b.From, b.To = from, t.pos
				return b, nil
			case kind != "" && !t.dec.seriesOnly:
				return nil, &BreakError{Kind: kind, From: from, To: t.pos}
			}
			continue
		}
		if err := t.seg.err(); errors.Is(err, fs.ErrClosed) {
			t.seg = nil // it was let go
			continue
		} else if !errors.Is(err, io.EOF) {
			if more := t.corrupt(err); more {
				continue
			}
			return nil, io.EOF
		}
		if t.pos.InCheckpoint {
			t.leave()
			continue
		}
		if t.next {
			// The segment was finished before it was read to its end.
			if t.seg.torn() {
				t.trouble("torn_record").Warn("WAL segment ends with a torn record", "offset", t.pos.Offset)
			}
			t.leave()
			continue
		}
		switch ok, err := t.followed(); {
		case err != nil:
			return nil, err // io.EOF among them
		case !ok:
			return nil, io.EOF
		}
	}
}

// Note notes in the files how far they are known.
func (t *Tail) Note() {
	if t.file != nil {
		t.file.read = max(t.file.read, t.pos.Offset)
	}
}

// followed finds out how it goes on at the end of the open segment. It returns
// true if there is more to read: then next is set, or another place was chosen.
func (t *Tail) followed() (bool, error) {
	named, err := t.files.named(t.file)
	if err != nil {
		return false, err
	}
	after := fileOf(t.pos)
	after.Segment++
	if named == sameFile {
		t.unsettled = time.Time{}
		_, err := os.Stat(t.dir.File(after))
		t.next = err == nil
		return t.next, nil
	}
	if named == noFile {
		first, _, err := t.dir.Segments()
		switch {
		case err != nil:
			return false, err
		case first < 0:
			return false, nil // wiped, or about to be filled again
		case first > t.pos.Segment && (t.files.has(after) || first == after.Segment):
			t.next = true // truncated
			return true, nil
		case first > t.pos.Segment:
			return true, t.gap()
		}
	}
	return t.other()
}

// other looks whether the log is another than the one read so far, and begins a
// new epoch if it is. It returns false where the log has to settle first.
func (t *Tail) other() (bool, error) {
	t.Note()
	patience := t.unsettled.IsZero() || time.Since(t.unsettled) < settleTime
	to, known, changed, err := t.files.diverged(t.pos, patience)
	if errors.Is(err, errUnsettled) {
		if t.unsettled.IsZero() {
			t.unsettled = time.Now()
		}
		return false, nil
	}
	t.unsettled = time.Time{}
	if err != nil {
		return false, err
	}
	if !changed {
		// The same records in a new file, or between two looks at the folder.
		if k := t.files.kept[fileOf(t.pos)]; t.seg == nil || k == nil || k != t.file || k.f != t.seg.f {
			t.seg, t.file = nil, nil
			return true, nil
		}
		return false, nil
	}
	if !known {
		if to, err = t.dir.Start(t.pos.Epoch + 1); errors.Is(err, ErrNoWAL) {
			return false, nil
		} else if err != nil {
			return false, err
		}
	}
	t.metrics.trouble.WithLabelValues(string(BreakReplaced)).Inc()
	t.logger.Warn("WAL was rewritten or replaced by another", "segment", t.pos.Segment, "offset", t.pos.Offset, "next", to.String(), "in_common_before", known)
	t.jump = &BreakError{Kind: BreakReplaced, From: t.pos, To: to, Carried: known}
	t.move(to)
	return true, nil
}

// open opens the file at pos, or moves pos to where reading can go on.
func (t *Tail) open() error {
	var err error
	if t.pos.InCheckpoint {
		t.last, err = t.files.hold(t.pos)
	}
	var k *kept
	if err == nil {
		k, err = t.files.get(t.pos)
	}
	if err == nil {
		seg, err := newSegment(k.f, t.pos.Offset, t.logger, t.metrics.live)
		if err != nil {
			return err
		}
		t.seg, t.file, t.next = seg, k, false
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open WAL: %w", err)
	}
	if t.pos.InCheckpoint {
		return t.gap() // that checkpoint made way for a newer one
	}
	first, last, err := t.dir.Segments()
	switch {
	case err != nil:
		return err
	case first > t.pos.Segment:
		return t.gap()
	case last >= 0 && last < t.pos.Segment:
		if _, err := t.other(); err != nil || t.jump != nil {
			return err
		}
		if last < t.pos.Segment-1 && !t.files.knows(t.pos.Epoch) {
			// Nothing is there to compare with, and the numbers went back.
			start, err := t.dir.Start(t.pos.Epoch + 1)
			if err != nil {
				return err
			}
			t.metrics.trouble.WithLabelValues(string(BreakReplaced)).Inc()
			t.logger.Warn("WAL was replaced by another, reading it from its start", "segment", t.pos.Segment, "next", start.String())
			t.jump = &BreakError{Kind: BreakReplaced, From: t.pos, To: start}
			t.move(start)
			return nil
		}
	}
	return io.EOF
}

// gap goes on at the next kept segment, or the newest WAL checkpoint, because
// what pos names is gone.
func (t *Tail) gap() error {
	start, err := t.dir.Start(t.pos.Epoch)
	if errors.Is(err, ErrNoWAL) {
		return io.EOF
	}
	if err != nil {
		return err
	}
	for _, k := range t.files.ascending() {
		if k.start.Epoch == t.pos.Epoch && !k.start.InCheckpoint && t.pos.Before(k.start) && k.start.Before(start) {
			start = k.start
			break
		}
	}
	if start.Before(t.pos) {
		// The newest WAL checkpoint is older than what is gone.
		first, _, err := t.dir.Segments()
		if err != nil {
			return err
		}
		if first <= t.pos.Segment && !t.pos.InCheckpoint {
			return io.EOF
		}
		start = Position{Epoch: t.pos.Epoch, Segment: first}
	}
	t.metrics.trouble.WithLabelValues(string(BreakGap)).Inc()
	t.logger.Warn("WAL was truncated before it was read", "segment", t.pos.Segment, "offset", t.pos.Offset, "next", start.String())
	t.jump = &BreakError{Kind: BreakGap, From: t.pos, To: start}
	t.move(start)
	return nil
}

// leave goes on to the next file.
func (t *Tail) leave() {
	p := fileOf(t.pos)
	p.Segment++
	if p.InCheckpoint && p.Segment > t.last {
		p = Position{Epoch: p.Epoch, Segment: p.Checkpoint + 1}
	}
	t.move(p)
}

func (t *Tail) move(p Position) {
	t.Note()
	t.seg, t.file, t.pos, t.next, t.tries = nil, nil, p, false, 0
}

// corrupt handles an error of the reader that isn't io.EOF. It returns true if
// reading goes on in another file.
func (t *Tail) corrupt(err error) bool {
	t.Note()
	file := t.file
	t.seg, t.file = nil, nil
	t.tries++
	if t.tries < corruptTries {
		return false
	}
	if !t.pos.InCheckpoint {
		after := fileOf(t.pos)
		after.Segment++
		named, err := t.files.named(file)
		if err == nil && named == otherFile {
			// Prometheus has repaired it.
			t.seg, t.file, t.tries = nil, file, 0
			if _, err := t.other(); err != nil {
				t.logger.Debug("WAL can't be compared with what it was", "err", err)
			}
			return t.jump != nil
		}
		if _, err := os.Stat(t.dir.File(after)); err != nil && !t.files.has(after) {
			return false // nothing to go on with; Prometheus will repair it or roll over
		}
	}
	t.metrics.trouble.WithLabelValues(string(BreakCorrupt)).Inc()
	t.logger.Warn("WAL segment is corrupt, going on with the next", "segment", t.pos.Segment, "offset", t.pos.Offset, "err", err)
	from := t.pos
	t.leave()
	t.jump = &BreakError{Kind: BreakCorrupt, From: from, To: t.pos}
	return true
}

// decode returns nil for records that are left out, and as which kind of a break
// if samples may be missing for that.
func (t *Tail) decode(rec []byte) (b *Batch, kind BreakKind) {
	b, err := t.dec.decode(rec)
	switch {
	case errors.Is(err, errUnknownType):
		kind = BreakUnknown
		t.trouble(string(kind)).Warn("WAL holds records of a type that this version doesn't know", "offset", t.pos.Offset, "err", err)
	case err != nil:
		t.trouble(string(BreakUndecodable)).Warn("WAL record can't be decoded", "offset", t.pos.Offset, "err", err)
		if rt := t.dec.b.Type; rt != record.Exemplars && rt != record.Metadata {
			kind = BreakUndecodable
		}
	}
	if rt := t.dec.b.Type; t.types[rt] == nil {
		t.types[rt] = t.metrics.records.WithLabelValues(rt.String())
	}
	t.types[t.dec.b.Type].Inc()
	return b, kind
}

// trouble counts and, the first time for this tail and class, returns a logger
// that logs.
func (t *Tail) trouble(class string) *slog.Logger {
	t.metrics.trouble.WithLabelValues(class).Inc()
	if t.warned[class] {
		return slog.New(slog.DiscardHandler)
	}
	t.warned[class] = true
	return t.logger.With("segment", t.pos.Segment)
}

// ReadRange reads the records in [from, to), which lie in one file, again and
// gives them to fn. It reads from the page that holds from, not the whole file.
// A file that isn't kept gives fs.ErrNotExist.
func ReadRange(ctx context.Context, files *Files, from, to Position, logger *slog.Logger, metrics *Metrics, fn func(*Batch) error) error {
	if !from.SameFile(to) {
		return fmt.Errorf("read range %v to %v: not in one file", from, to)
	}
	k := files.kept[fileOf(from)]
	if k == nil {
		return fmt.Errorf("read range %v to %v: %w", from, to, fs.ErrNotExist)
	}
	t := New(files, from, logger, metrics)
	seg, err := newSegment(k.f, from.Offset, logger, metrics.live)
	if err != nil {
		return fmt.Errorf("read range: %w", err)
	}
	for t.pos.Offset < to.Offset {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !seg.next() {
			return fmt.Errorf("read range %v to %v: stopped at %d: %w", from, to, t.pos.Offset, seg.err())
		}
		start := t.pos
		t.pos.Offset = seg.end
		b, _ := t.decode(seg.record()) // what it can't read opened a gap the first time
		if b == nil {
			continue
		}
		b.From, b.To = start, t.pos
		if err := fn(b); err != nil {
			return err
		}
	}
	return nil
}

// CheckpointSeries gives fn the series of WAL checkpoint n.
func CheckpointSeries(ctx context.Context, dir *Dir, n int, logger *slog.Logger, metrics *Metrics, fn func([]record.RefSeries)) error {
	folder := wlog.CheckpointDir(dir.WAL(), n)
	first, last, err := wlog.Segments(folder)
	if err != nil {
		return fmt.Errorf("files of WAL checkpoint %d: %w", n, err)
	}
	dec := newDecoder(logger)
	dec.seriesOnly = true
	for k := first; k >= 0 && k <= last; k++ {
		f, err := os.Open(wlog.SegmentName(folder, k))
		if err != nil {
			return fmt.Errorf("WAL checkpoint %d: %w", n, err)
		}
		seg, err := newSegment(f, 0, logger, metrics.live)
		if err != nil {
			f.Close()
			return fmt.Errorf("WAL checkpoint %d: %w", n, err)
		}
		for seg.next() {
			if err := ctx.Err(); err != nil {
				f.Close()
				return err
			}
			if b, err := dec.decode(seg.record()); err == nil && b != nil {
				fn(b.Series)
			}
		}
		err = seg.err()
		torn := seg.torn()
		f.Close()
		if !errors.Is(err, io.EOF) || torn {
			return fmt.Errorf("WAL checkpoint %d, file %d: incomplete: %w", n, k, err)
		}
	}
	return nil
}

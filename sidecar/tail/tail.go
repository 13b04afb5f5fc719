package tail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"

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

// Tail follows the WAL of a data directory. It isn't safe for concurrent use.
type Tail struct {
	dir     *Dir
	logger  *slog.Logger
	metrics *Metrics
	dec     *decoder
	types   [256]prometheus.Counter

	seg  *segment // the open file; nil if none
	pos  Position // in seg: the end of the last whole record returned or left out
	next bool     // a newer segment was seen since the last read of seg
	// tries counts how often reading failed at pos, since a live file may be
	// read in mid-write.
	tries int
	gaps  int // how often segments were gone before they were read

	warned map[string]bool
}

// corruptTries is how often a corruption is read again before it is believed.
const corruptTries = 3

// New returns a Tail that goes on at from.
func New(dir *Dir, from Position, logger *slog.Logger, metrics *Metrics) *Tail {
	return &Tail{
		dir:     dir,
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
func (t *Tail) Position() Position { return t.pos }

// Gaps returns how often the tail found segments gone that it had not read.
func (t *Tail) Gaps() int { return t.gaps }

// Close closes the open file.
func (t *Tail) Close() {
	t.seg.close()
	t.seg = nil
}

// Next returns the next record, or io.EOF if there is none now; a later call may
// find one. Other errors are those of the file system: the tail keeps its place
// and may be asked again.
func (t *Tail) Next() (*Batch, error) {
	for {
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
			if b := t.decode(t.seg.record()); b != nil {
				b.From, b.To = from, t.pos
				return b, nil
			}
			continue
		}
		if err := t.seg.err(); !errors.Is(err, io.EOF) {
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

// followed finds out how it goes on at the end of the open segment. It returns
// true if there is more to read: then next is set, or another file was chosen.
func (t *Tail) followed() (bool, error) {
	after := t.pos
	after.Segment, after.Offset = t.pos.Segment+1, 0
	if _, err := os.Stat(t.dir.File(after)); err == nil {
		t.next = true
		return true, nil
	}
	// No newer segment. Is the open file still the one of that name?
	info, err := os.Stat(t.dir.File(t.pos))
	if err == nil {
		own, err := t.seg.f.Stat()
		if err != nil {
			return false, fmt.Errorf("stat open segment %d: %w", t.pos.Segment, err)
		}
		if os.SameFile(info, own) {
			return false, nil
		}
		return true, t.replaced()
	}
	first, last, err := t.dir.Segments()
	switch {
	case err != nil:
		return false, err
	case last < 0:
		return false, nil // wiped, or about to be filled again
	case first > t.pos.Segment:
		return true, t.gap()
	case last < t.pos.Segment:
		return true, t.replaced()
	default:
		return false, nil // between two looks at the folder; next time
	}
}

// open opens the file at pos, or moves pos to where reading can go on.
func (t *Tail) open() error {
	seg, err := openSegment(t.dir.File(t.pos), t.pos.Offset, t.logger, t.metrics.live)
	if err == nil {
		t.seg, t.next = seg, false
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
	case last < t.pos.Segment-1 && last >= 0:
		return t.replaced()
	}
	return io.EOF
}

// gap goes on at the newest WAL checkpoint because what pos names is gone.
func (t *Tail) gap() error {
	start, err := t.dir.Start(t.pos.Epoch)
	if errors.Is(err, ErrNoWAL) {
		return io.EOF
	}
	if err != nil {
		return err
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
	t.gaps++
	t.metrics.trouble.WithLabelValues("gap").Inc()
	t.logger.Warn("WAL was truncated before it was read", "segment", t.pos.Segment, "offset", t.pos.Offset, "next", start.String())
	t.move(start)
	return nil
}

// replaced begins a new epoch at the start of what is there now. All of it is
// read, and sent, again: what of it was read before can't be told from here.
func (t *Tail) replaced() error {
	start, err := t.dir.Start(t.pos.Epoch + 1)
	if errors.Is(err, ErrNoWAL) {
		return io.EOF
	}
	if err != nil {
		return err
	}
	t.metrics.trouble.WithLabelValues("replaced").Inc()
	t.logger.Warn("WAL was replaced by another, reading it from its start", "segment", t.pos.Segment, "offset", t.pos.Offset, "next", start.String())
	t.move(start)
	return nil
}

// leave goes on to the next file.
func (t *Tail) leave() {
	p := t.pos
	p.Offset = 0
	p.Segment++
	if p.InCheckpoint {
		if _, err := os.Stat(t.dir.File(p)); err != nil {
			p = Position{Epoch: p.Epoch, Segment: p.Checkpoint + 1}
		}
	}
	t.move(p)
}

func (t *Tail) move(p Position) {
	t.seg.close()
	t.seg, t.pos, t.next, t.tries = nil, p, false, 0
}

// corrupt handles an error of the reader that isn't io.EOF. It returns true if
// reading goes on in another file.
func (t *Tail) corrupt(err error) bool {
	t.seg.close()
	t.seg = nil
	t.tries++
	if t.tries < corruptTries {
		return false
	}
	if !t.pos.InCheckpoint {
		after := t.pos
		after.Segment, after.Offset = t.pos.Segment+1, 0
		if _, err := os.Stat(t.dir.File(after)); err != nil {
			return false // nothing to go on with; Prometheus will repair it or roll over
		}
	}
	t.metrics.trouble.WithLabelValues("corrupt_segment").Inc()
	t.logger.Warn("WAL segment is corrupt, going on with the next", "segment", t.pos.Segment, "offset", t.pos.Offset, "err", err)
	t.leave()
	return true
}

// decode returns nil for records that are left out.
func (t *Tail) decode(rec []byte) *Batch {
	b, err := t.dec.decode(rec)
	switch {
	case errors.Is(err, errUnknownType):
		t.trouble("unknown_record_type").Warn("WAL holds records of a type that this version doesn't know", "offset", t.pos.Offset, "err", err)
	case err != nil:
		t.trouble("undecodable_record").Warn("WAL record can't be decoded", "offset", t.pos.Offset, "err", err)
	}
	if rt := t.dec.b.Type; t.types[rt] == nil {
		t.types[rt] = t.metrics.records.WithLabelValues(rt.String())
	}
	t.types[t.dec.b.Type].Inc()
	return b
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
// A file that is gone gives fs.ErrNotExist.
func ReadRange(ctx context.Context, dir *Dir, from, to Position, logger *slog.Logger, metrics *Metrics, fn func(*Batch) error) error {
	if !from.SameFile(to) {
		return fmt.Errorf("read range %v to %v: not in one file", from, to)
	}
	t := New(dir, from, logger, metrics)
	defer t.Close()
	seg, err := openSegment(dir.File(from), from.Offset, logger, metrics.live)
	if err != nil {
		return fmt.Errorf("read range: %w", err)
	}
	t.seg = seg
	for t.pos.Offset < to.Offset {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !seg.next() {
			return fmt.Errorf("read range %v to %v: stopped at %d: %w", from, to, t.pos.Offset, seg.err())
		}
		start := t.pos
		t.pos.Offset = seg.end
		b := t.decode(seg.record())
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
		seg, err := openSegment(wlog.SegmentName(folder, k), 0, logger, metrics.live)
		if err != nil {
			return fmt.Errorf("WAL checkpoint %d: %w", n, err)
		}
		for seg.next() {
			if err := ctx.Err(); err != nil {
				seg.close()
				return err
			}
			if b, err := dec.decode(seg.record()); err == nil && b != nil {
				fn(b.Series)
			}
		}
		err = seg.err()
		torn := seg.torn()
		seg.close()
		if !errors.Is(err, io.EOF) || torn {
			return fmt.Errorf("WAL checkpoint %d, file %d: incomplete: %w", n, k, err)
		}
	}
	return nil
}

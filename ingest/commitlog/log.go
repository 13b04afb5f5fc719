package commitlog

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/tsdb/fileutil"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/internal/bug"
)

const (
	version     = 1
	versionHeld = 2 // of state.json, where something is held back
	stateName   = "state.json"
	lockName    = "lock"
	suffix      = ".log"

	maxQueued = 32 << 20 // bytes
	syncEvery = time.Second
)

// File is a log on its way to the disk. Close may be called while the others are.
type File interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Close() error
}

// Options of a Log.
type Options struct {
	// Create makes a file that isn't there yet; nil: in the file system. It is
	// for tests of disks that fail.
	Create func(path string) (File, error)
	// MaxHeldBytes bounds the logs that are kept for tenants that are held back
	// alone. Beyond it the oldest go: after a crash the sources of these tenants
	// send again. 0: no bound.
	MaxHeldBytes int64
}

func create(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err // not in an interface, which would not be nil
	}
	return f, nil
}

// Log is the commit log in a directory. Make one with Open, Replay what is there,
// Run it. Its methods are safe for concurrent use.
type Log struct {
	dir     string
	create  func(string) (File, error)
	maxHeld int64 // bytes
	logger  *slog.Logger
	metrics *logMetrics
	lock    fileutil.Releaser

	process [16]byte
	first   uint64 // generation of what is appended first
	// As it was when the log was opened.
	durableAtStart uint64
	heldAtStart    held
	replay         []uint64
	indexes        atomic.Uint64 // given out
	entries        sync.Pool     // of *Entry

	work chan struct{} // room for one: something is queued

	mu       sync.Mutex
	durable  uint64           // generations up to this one
	held     held             // but not for these tenants
	letGo    map[uint64]bool  // generations in held whose logs were too much
	sizes    map[uint64]int64 // of what is in replay
	files    map[uint64]*file // by generation
	queue    []segment        // not yet written, in the order of Append
	spare    []segment        // memory for the next queue
	queued   int64            // bytes, with those that are being written
	roomy    chan struct{}    // closed when there is room; nil: nobody waits
	stopped  bool             // nothing is written any more
	newest   uint64           // generation of the newest file
	stateDue bool             // state.json is behind durable
}

// held are tenants, ascending, that generations aren't durable for although others
// are, and newer ones.
type held map[uint64][]string

// segment is a run of entries for one generation.
type segment struct {
	generation uint64
	buf        []byte
	done       []func()
}

// file is the log of one generation. Its fields but the atomic ones are the
// writer's.
type file struct {
	f    File
	path string
	size atomic.Int64 // up to the end of the last record; the writer sets it

	ended  atomic.Bool // no more is written: an error, or the file goes
	marked bool        // as one that has ended early
	dirty  atomic.Bool // written since the last sync
	named  atomic.Bool // the folder was synced since the file is in it
}

type logMetrics struct {
	bytes, ended prometheus.Counter
	heldBytes    prometheus.Gauge
	letGo        prometheus.Counter
	sync         prometheus.Histogram
	samples      prometheus.Counter
	sessions     prometheus.Counter
	duration     prometheus.Gauge
}

func newLogMetrics(reg prometheus.Registerer) *logMetrics {
	m := &logMetrics{
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_commitlog_written_bytes_total", Help: "Bytes written to the commit log.",
		}),
		ended: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_commitlog_ended_total",
			Help: "Generations whose log ended early because it could not be written: until they are flushed, a crash makes sources send again.",
		}),
		heldBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_ingester_commitlog_held_bytes", Help: "Bytes of logs that are kept for tenants that are held back alone.",
		}),
		letGo: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_commitlog_let_go_total",
			Help: "Logs removed although tenants that are held back need them, since these take too many bytes: after a crash their sources send again.",
		}),
		sync: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "epimetheus_ingester_commitlog_sync_duration_seconds", Help: "Time that syncs of the commit log took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 8),
		}),
		samples: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_commitlog_replayed_samples_total", Help: "Samples that came from the commit log at the start.",
		}),
		sessions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_commitlog_replayed_sessions_total", Help: "Sessions of sources that the commit log let go on after the start.",
		}),
		duration: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_ingester_commitlog_replay_duration_seconds", Help: "Time that the replay of the commit log took at the start.",
		}),
	}
	reg.MustRegister(m.bytes, m.ended, m.heldBytes, m.letGo, m.sync, m.samples, m.sessions, m.duration)
	return m
}

// state is state.json.
type state struct {
	Version int    `json:"version"`
	Process string `json:"process"`
	Durable uint64 `json:"durable"`
	Held    held   `json:"held,omitempty"`
}

// Open locks the directory, which it makes, and reads which log it holds. Close
// unlocks it.
func Open(dir string, o Options, logger *slog.Logger, reg prometheus.Registerer) (_ *Log, err error) {
	l := &Log{
		dir: dir, create: o.Create, logger: logger.With("component", "commitlog"), work: make(chan struct{}, 1), files: map[uint64]*file{},
		maxHeld: o.MaxHeldBytes, letGo: map[uint64]bool{}, sizes: map[uint64]int64{},
	}
	if l.create == nil {
		l.create = create
	}
	l.entries.New = func() any { return &Entry{} }
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("commit log: %w", err)
	}
	if l.lock, _, err = fileutil.Flock(filepath.Join(dir, lockName)); err != nil {
		return nil, fmt.Errorf("commit log: %s is in use by another process (%w): give each ingester a data directory of its own", dir, err)
	}
	defer func() {
		if err != nil {
			_ = l.lock.Release() // there is an error already
		}
	}()
	if err := l.readState(); err != nil {
		return nil, err
	}
	if err := l.list(); err != nil {
		return nil, err
	}
	l.metrics = newLogMetrics(reg)
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_commitlog_queued_bytes", Help: "Bytes that wait to be written to the commit log.",
	}, func() float64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return float64(l.queued)
	}), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_commitlog_open", Help: "1 while what is received is logged, 0 after the log of the generation ended early.",
	}, func() float64 {
		if l.Err() != nil {
			return 0
		}
		return 1
	}))
	return l, nil
}

func (l *Log) readState() error {
	path := filepath.Join(l.dir, stateName)
	b, err := os.ReadFile(path)
	if err == nil {
		var s state
		err = json.Unmarshal(b, &s)
		if err == nil && s.Version != version && s.Version != versionHeld {
			return fmt.Errorf("commit log: %s is of version %d, this program knows versions up to %d: stop the ingester with the newer program, which empties the log, or remove %s", path, s.Version, versionHeld, l.dir)
		}
		var id []byte
		if err == nil {
			id, err = hex.DecodeString(s.Process)
		}
		if err == nil && (len(id) != len(l.process) || s.Durable > maxGeneration || !s.Held.valid(s.Durable)) {
			err = errors.New("impossible values")
		}
		if err == nil {
			l.process, l.durable, l.held = [16]byte(id), s.Durable, s.Held
			l.durableAtStart, l.heldAtStart = s.Durable, s.Held
			return nil
		}
	}
	if !errors.Is(err, os.ErrNotExist) {
		l.logger.Warn("state of the commit log can't be read: samples are replayed, sources begin new sessions", "path", path, "err", err)
	}
	if _, err := rand.Read(l.process[:]); err != nil {
		return fmt.Errorf("commit log: process id: %w", err)
	}
	if err := l.writeState(0, nil); err != nil {
		return fmt.Errorf("commit log: %w", err)
	}
	return nil
}

// valid says whether all generations are up to the one given, and have tenants.
func (h held) valid(durable uint64) bool {
	for g, tenants := range h {
		if g == 0 || g > durable || len(tenants) == 0 || !slices.IsSorted(tenants) {
			return false
		}
	}
	return true
}

// writeState replaces state.json.
func (l *Log) writeState(durable uint64, h held) error {
	st := state{Version: version, Process: hex.EncodeToString(l.process[:]), Durable: durable, Held: h}
	if len(h) > 0 {
		st.Version = versionHeld
	}
	b, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	path := filepath.Join(l.dir, stateName)
	f, err := os.Create(path + ".tmp")
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = fileutil.Replace(path+".tmp", path) // syncs the folder
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// list finds the files to be replayed, and removes those that are durable.
func (l *Log) list() error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("commit log: %w", err)
	}
	l.first = l.durable + 1
	for _, e := range entries {
		digits, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok {
			continue
		}
		g, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || g == 0 || g >= maxGeneration || e.Name() != name(g) {
			return fmt.Errorf("commit log: %s is no name of a log: move it elsewhere", filepath.Join(l.dir, e.Name()))
		}
		if g <= l.durable && l.held[g] == nil {
			os.Remove(filepath.Join(l.dir, e.Name()))
			continue
		}
		if err := checkVersion(filepath.Join(l.dir, e.Name())); err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("commit log: %w", err)
		}
		l.sizes[g] = info.Size()
		l.replay = append(l.replay, g)
		l.first = max(l.first, g+1)
	}
	slices.Sort(l.replay)
	return nil
}

func name(generation uint64) string { return fmt.Sprintf("%08d%s", generation, suffix) }

func (l *Log) path(generation uint64) string { return filepath.Join(l.dir, name(generation)) }

// Process names the log, and with it the process in the ship protocol: sessions
// of another one are not in it.
func (l *Log) Process() [16]byte { return l.process }

// First is the generation with which the head is to begin.
func (l *Log) First() uint64 { return l.first }

// Index is a new number for a session in a generation.
func (l *Log) Index() uint64 { return l.indexes.Add(1) }

// Entry is an empty entry.
func (l *Log) Entry() *Entry {
	e := l.entries.Get().(*Entry)
	e.buf, e.err = e.buf[:0], nil
	return e
}

// Wait returns when the queue has room, or ctx ends. Append takes entries all
// the same, so that nobody waits for the disk with a lock held.
func (l *Log) Wait(ctx context.Context) error {
	for {
		l.mu.Lock()
		if l.queued < maxQueued || l.stopped {
			l.mu.Unlock()
			return nil
		}
		if l.roomy == nil {
			l.roomy = make(chan struct{})
		}
		roomy := l.roomy
		l.mu.Unlock()
		select {
		case <-roomy:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Append queues an entry, which it takes over, for the log of a generation. done,
// if not nil, is called when it is written, or when it is clear that it won't be:
// from Append or from Run, so it must not wait for locks that callers of Append
// hold. Entries of a generation are written in the order of the calls.
func (l *Log) Append(generation uint64, e *Entry, done func()) {
	queued := l.enqueue(generation, e, done)
	if cap(e.buf)+cap(e.scratch) < 4<<20 {
		l.entries.Put(e)
	}
	switch {
	case queued:
		select {
		case l.work <- struct{}{}:
		default:
		}
	case done != nil:
		done()
	}
}

func (l *Log) enqueue(generation uint64, e *Entry, done func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped || !l.wanted(generation) {
		return false
	}
	f := l.files[generation]
	if f == nil {
		f = &file{path: l.path(generation)}
		l.files[generation] = f
		l.newest = max(l.newest, generation)
	}
	if e.err != nil {
		l.end(f, e.err)
	}
	if f.ended.Load() {
		return false
	}
	if n := len(l.queue); n == 0 || l.queue[n-1].generation != generation {
		if n < cap(l.queue) {
			l.queue = l.queue[:n+1] // its memory is used again
			s := &l.queue[n]
			s.generation, s.buf, s.done = generation, s.buf[:0], s.done[:0]
		} else {
			l.queue = append(l.queue, segment{generation: generation})
		}
	}
	s := &l.queue[len(l.queue)-1]
	s.buf = append(s.buf, e.buf...)
	if done != nil {
		s.done = append(s.done, done)
	}
	l.queued += int64(len(e.buf))
	return true
}

// wanted says whether the log of a generation is needed. The caller holds l.mu.
func (l *Log) wanted(generation uint64) bool {
	return generation > l.durable || l.held[generation] != nil && !l.letGo[generation]
}

// letGoOfHeld chooses the logs that go since those that are kept for tenants that
// are held back take too much: the oldest. The caller holds l.mu.
func (l *Log) letGoOfHeld() {
	for g := range l.letGo {
		if l.held[g] == nil {
			delete(l.letGo, g)
		}
	}
	kept, bytes := map[uint64]int64{}, int64(0)
	for g := range l.held {
		if !l.wanted(g) || g > l.durable {
			continue
		}
		if kept[g] = l.sizes[g]; l.files[g] != nil {
			kept[g] = l.files[g].size.Load()
		}
		bytes += kept[g]
	}
	for _, g := range slices.Sorted(maps.Keys(kept)) {
		if l.maxHeld == 0 || bytes <= l.maxHeld {
			break
		}
		bytes -= kept[g]
		l.letGo[g] = true
		l.metrics.letGo.Inc()
		l.logger.Warn("commit log let go although tenants need it that are held back, since these logs take too much: nothing is lost, but after a crash their sources have to send again",
			"path", l.path(g), "size_bytes", kept[g], "tenants", len(l.held[g]), "limit_bytes", l.maxHeld)
	}
	l.metrics.heldBytes.Set(float64(bytes))
}

// LetGo is how many generations have tenants that are held back, but no log any
// more, since these logs took too much.
func (l *Log) LetGo() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.letGo)
}

// Open says whether entries for a generation are still taken.
func (l *Log) Open(generation uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.files[generation]
	return !l.stopped && l.wanted(generation) && (f == nil || !f.ended.Load())
}

// Replayed notes what came of a replay, for metrics.
func (l *Log) Replayed(samples, sessions int, d time.Duration) {
	l.metrics.samples.Add(float64(samples))
	l.metrics.sessions.Add(float64(sessions))
	l.metrics.duration.Set(d.Seconds())
}

// Err says why what is received now isn't logged; nil: it is.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.files[l.newest]; f != nil && f.ended.Load() {
		return fmt.Errorf("commit log of generation %d has ended early: until it is flushed, a crash makes sources send again", l.newest)
	}
	return nil
}

// end closes the log of a generation: it stays a prefix of what was received.
func (l *Log) end(f *file, err error) {
	if f.ended.Swap(true) {
		return
	}
	l.metrics.ended.Inc()
	l.logger.Error("commit log can't be written and ends here until the next flush: nothing is lost, but after a crash sources have to send again",
		"path", f.path, "err", err)
	select {
	case l.work <- struct{}{}: // mark it
	default:
	}
}

// mark lets a reader see which logs have ended early, so that what was received is
// not in them: a frame of zeros is no record. It takes no room on a full disk.
func (l *Log) mark() {
	l.mu.Lock()
	var ended []*file
	for _, f := range l.files {
		if f.f != nil && f.ended.Load() && !f.marked {
			f.marked = true
			ended = append(ended, f)
		}
	}
	l.mu.Unlock()
	for _, f := range ended {
		err := f.f.Truncate(f.size.Load()) // what was written of a record
		if err == nil {
			err = f.f.Truncate(f.size.Load() + frameSize)
		}
		if err != nil && !errors.Is(err, os.ErrClosed) { // closed: it is durable meanwhile
			l.logger.Warn("end of the commit log not marked: after a crash answers may lack samples without a warning, for seconds", "path", f.path, "err", err)
		}
	}
}

// Run writes and syncs until ctx ends, then what is queued, and closes the log.
func (l *Log) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		tick := time.NewTicker(syncEvery)
		defer tick.Stop()
		for {
			select {
			case <-gctx.Done():
				return nil
			case <-tick.C:
				l.sync()
			}
		}
	})
	g.Go(func() error {
		for {
			select {
			case <-gctx.Done():
				return nil
			case <-l.work:
				l.writeQueue()
			}
		}
	})
	err := g.Wait()
	l.mu.Lock()
	l.stopped = true
	l.mu.Unlock()
	l.writeQueue()
	l.sync()
	return errors.Join(err, l.Close())
}

// Close lets go of the directory where Run isn't called.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	for _, f := range l.files {
		f.ended.Store(true)
		if f.f != nil {
			f.f.Close()
		}
	}
	if err := l.lock.Release(); err != nil {
		return fmt.Errorf("commit log: unlock: %w", err)
	}
	return nil
}

// writeQueue writes what is queued, a write for each run of entries of one
// generation.
func (l *Log) writeQueue() {
	l.mu.Lock()
	queue := l.queue
	l.queue, l.spare = l.spare[:0], nil
	l.mu.Unlock()
	written := int64(0)
	for i := range queue {
		s := &queue[i]
		l.write(s)
		for j, done := range s.done {
			done()
			s.done[j] = nil
		}
		written += int64(len(s.buf))
		if cap(s.buf) > 4<<20 {
			s.buf = nil // a burst's
		}
	}
	l.mark()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spare = queue
	l.queued -= written
	if l.roomy != nil && l.queued < maxQueued {
		close(l.roomy)
		l.roomy = nil
	}
}

func (l *Log) write(s *segment) {
	l.mu.Lock()
	f := l.files[s.generation]
	l.mu.Unlock()
	if f == nil || f.ended.Load() {
		return // it is durable meanwhile, or there is a hole
	}
	if err := l.writeTo(f, s); err != nil && !bug.Is(bug.HoleInLog) {
		l.end(f, err)
	}
}

func (l *Log) writeTo(f *file, s *segment) error {
	if f.f == nil {
		opened, err := l.create(f.path)
		if err != nil {
			return fmt.Errorf("new log: %w", err)
		}
		l.mu.Lock()
		gone := l.files[s.generation] != f
		f.f = opened
		l.mu.Unlock()
		if gone {
			opened.Close()
			os.Remove(f.path)
			return nil
		}
		s.buf = slices.Insert(s.buf, 0, header(l.process, s.generation, time.Now())...)
		defer func() { s.buf = s.buf[headerSize:] }() // what the queue counts
	}
	n, err := f.f.Write(s.buf)
	if f.ended.Load() {
		return nil // it was removed meanwhile
	}
	if err == nil && n < len(s.buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		// Whole records would be a hole less; but this is simple.
		return fmt.Errorf("write at %d: %w", f.size.Load(), err)
	}
	f.size.Add(int64(n))
	f.dirty.Store(true)
	l.metrics.bytes.Add(float64(n))
	return nil
}

// sync syncs all files written to since the last time.
func (l *Log) sync() {
	l.mu.Lock()
	var dirty []*file
	for _, f := range l.files {
		if f.f != nil && !f.ended.Load() && f.dirty.Swap(false) {
			dirty = append(dirty, f)
		}
	}
	l.mu.Unlock()
	for _, f := range dirty {
		began := time.Now()
		err := f.f.Sync()
		if err == nil && !f.named.Load() {
			err = syncDir(l.dir)
			f.named.Store(err == nil)
		}
		l.metrics.sync.Observe(time.Since(began).Seconds())
		if err != nil {
			l.end(f, fmt.Errorf("sync: %w", err))
		}
	}
}

func syncDir(dir string) error {
	d, err := fileutil.OpenDir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Durable notes that generations up to the one given are durable, except some for
// the tenants held back. After it has returned, sources may be told; Remove removes
// the logs that nobody needs.
func (l *Log) Durable(generation uint64, heldBack map[uint64][]string) {
	l.mu.Lock()
	l.durable = max(l.durable, generation)
	next := held{}
	for g, tenants := range heldBack {
		next[g] = slices.Sorted(slices.Values(tenants))
	}
	// What was replayed is in the first generation now. What could not be, since
	// its log was gone, stays too: the sessions that miss it are to be told apart.
	for _, g := range l.replay {
		if before := l.heldAtStart[g]; before == nil && l.durable >= l.first && next[l.first] != nil {
			next[g] = next[l.first]
		}
	}
	for g, before := range l.heldAtStart {
		if l.durable >= l.first {
			before = slices.DeleteFunc(slices.Clone(before), func(t string) bool { return !slices.Contains(next[l.first], t) })
		}
		if len(before) > 0 {
			next[g] = before
		}
	}
	l.held = next
	generation = l.durable
	stopped := l.stopped
	l.mu.Unlock()
	if stopped {
		return // the directory may be another's
	}
	l.saveState(generation, next)
}

func (l *Log) saveState(generation uint64, h held) {
	if err := l.writeState(generation, h); err != nil {
		// Remove makes room, and tries again.
		l.logger.Warn("state of the commit log not written: after a crash sources may have to send again", "generation", generation, "err", err)
		l.mu.Lock()
		l.stateDue = true
		l.mu.Unlock()
	}
}

// Remove removes the logs that nobody needs.
func (l *Log) Remove() {
	l.mu.Lock()
	if l.stopped {
		l.mu.Unlock()
		return
	}
	durable, heldBack, due := l.durable, l.held, l.stateDue
	l.stateDue = false
	l.letGoOfHeld()
	var gone []*file
	for g, f := range l.files {
		if !l.wanted(g) {
			delete(l.files, g)
			gone = append(gone, f)
		}
	}
	var paths []string
	l.replay = slices.DeleteFunc(l.replay, func(g uint64) bool {
		if l.wanted(g) {
			return false
		}
		paths = append(paths, l.path(g))
		return true
	})
	for _, f := range gone {
		f.ended.Store(true)
		if f.f != nil {
			f.f.Close()
			paths = append(paths, f.path)
		}
	}
	l.mu.Unlock()
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			l.logger.Warn("commit log that is durable not removed", "path", p, "err", err)
		}
	}
	if due {
		l.saveState(durable, heldBack)
	}
}

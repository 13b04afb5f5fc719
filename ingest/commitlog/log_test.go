package commitlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

func open(t testing.TB, dir string, o Options) *Log {
	t.Helper()
	l, err := Open(dir, o, promslog.NewNopLogger(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// start runs a log; the function returned stops it.
func start(t testing.TB, l *Log) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }() // awaited by stop
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// add appends a batch whose columns are the bytes given.
func add(l *Log, generation, seq uint64, columns string, done func()) {
	e := l.Entry()
	e.Batch(1, &shippb.Batch{Seq: seq, Columns: []byte(columns)}, nil, nil)
	l.Append(generation, e, done)
}

// mustAdd waits until the batch is written.
func mustAdd(l *Log, generation, seq uint64, columns string) {
	done := make(chan struct{})
	add(l, generation, seq, columns, func() { close(done) })
	<-done
}

// found gives seq and columns of the batches in the log of a generation.
func found(t testing.TB, l *Log, generation uint64) (out []string, err error) {
	t.Helper()
	err = l.Read(t.Context(), generation, func(Header) {}, func(r *Record) {
		out = append(out, fmt.Sprint(r.Seq, string(r.Columns)))
	})
	return out, err
}

func TestGenerations(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, dir, Options{})
	if l.First() != 1 || len(l.Files()) != 0 {
		t.Errorf("an empty log begins with generation %d, files %v", l.First(), l.Files())
	}
	process := l.Process()
	stop := start(t, l)
	mustAdd(l, 1, 1, "a")
	mustAdd(l, 2, 2, "b")
	mustAdd(l, 1, 3, "c") // it was applied before the rotation, and comes late
	l.Durable(1, nil)
	mustAdd(l, 1, 4, "late") // durable: nobody needs it
	l.Remove()
	mustAdd(l, 1, 5, "later")
	mustAdd(l, 3, 6, "d")
	if got := l.metrics; testutil.ToFloat64(got.ended) != 0 || testutil.ToFloat64(got.bytes) < 100 {
		t.Errorf("%v logs ended, %v bytes", testutil.ToFloat64(got.ended), testutil.ToFloat64(got.bytes))
	}
	stop()

	l = open(t, dir, Options{})
	defer l.Close()
	if l.Process() != process {
		t.Error("another process")
	}
	if d := cmp.Diff([]uint64{2, 3}, l.Files()); d != "" || l.First() != 4 || l.DurableOf("a") != 1 {
		t.Errorf("first %d, durable %d, files %s", l.First(), l.DurableOf("a"), d)
	}
	for g, want := range map[uint64][]string{2: {"2b"}, 3: {"6d"}} {
		got, err := found(t, l, g)
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("generation %d: %v %s", g, err, d)
		}
	}
	// What was found belongs to the first generation of this process.
	l.Durable(4, nil)
	l.Remove()
	if names, _ := filepath.Glob(filepath.Join(dir, "*.log")); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestOneProcessOnly(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{})
	_, err := Open(dir, Options{}, promslog.NewNopLogger(), prometheus.NewRegistry())
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("second process: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, Options{}).Close()
}

func TestStateOfAnotherKind(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{})
	process := l.Process()
	stop := start(t, l)
	mustAdd(l, 1, 1, "a")
	stop()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, text := range []string{"", "{", `{"version":1,"process":"00","durable":0}`, `{"version":1,"process":"` + strings.Repeat("00", 16) + `","durable":4294967296}`} {
		write(stateName, text)
		l = open(t, dir, Options{})
		if l.Process() == process || l.Process() == [16]byte{} || l.First() != 2 {
			t.Errorf("with state %q: process %x, first %d", text, l.Process(), l.First())
		}
		if got, err := found(t, l, 1); len(got) != 1 || err != nil {
			t.Errorf("with state %q: %v, %v", text, got, err)
		}
		l.Close()
	}
	refused := func(text string) {
		t.Helper()
		_, err := Open(dir, Options{}, promslog.NewNopLogger(), prometheus.NewRegistry())
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v does not speak of %q", err, text)
		}
	}
	write("x.log", "")
	refused("x.log")
	os.Remove(filepath.Join(dir, "x.log"))
	write("00000009.log", "EPICLOG2 and what else there may be")
	refused("version '2'")
	os.Remove(filepath.Join(dir, "00000009.log"))
	write(stateName, `{"version":3}`)
	refused("version 3")
}

// sample is the log of one generation with all kinds of records, and where each
// record ends.
func sample(t testing.TB) (data []byte, ends []int) {
	t.Helper()
	data = header([16]byte{7}, 5, time.UnixMilli(1_700_000_000_000))
	ends = []int{len(data)}
	for _, fill := range examples() {
		e := &Entry{}
		fill(e)
		data = append(data, e.buf...)
		ends = append(ends, len(data))
	}
	return data, ends
}

func readAll(t testing.TB, data []byte) (records int, at int64, err error) {
	t.Helper()
	at, err = read(t.Context(), bytes.NewReader(data), int64(len(data)), 5, func(Header) {}, func(*Record) { records++ })
	return records, at, err
}

// A log that was cut anywhere is a prefix.
func TestTornTail(t *testing.T) {
	data, ends := sample(t)
	for n := range len(data) + 1 {
		whole := 0
		for _, end := range ends[1:] {
			if end <= n {
				whole++
			}
		}
		records, at, err := readAll(t, data[:n])
		clean := slices.Contains(ends, n)
		if records != whole || (err == nil) != clean || n >= headerSize && at != int64(ends[whole]) {
			t.Fatalf("cut at %d: %d records of %d, up to %d, %v", n, records, whole, at, err)
		}
		// A crash of the machine may leave zeros.
		zeros := append(bytes.Clone(data[:n]), make([]byte, 50)...)
		if records, _, err := readAll(t, zeros); err == nil || records > len(ends)-1 || records < whole && n >= headerSize {
			t.Fatalf("zeros from %d on: %d records, %v", n, records, err)
		}
	}
}

// Whatever byte is damaged: what is read is a prefix.
func TestDamagedRecord(t *testing.T) {
	data, ends := sample(t)
	for i := range data {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(data)
			bad[i] ^= bit
			before := 0
			for _, end := range ends[1:] {
				if end <= i {
					before++
				}
			}
			if i < headerSize {
				before = 0
			}
			if records, _, err := readAll(t, bad); records != before || err == nil {
				t.Fatalf("byte %d: %d records, want %d, %v", i, records, before, err)
			}
		}
	}
	if _, err := read(t.Context(), bytes.NewReader(data), int64(len(data)), 6, func(Header) {}, func(*Record) {}); err == nil {
		t.Error("the log of another generation was read")
	}
}

// disk is a file system that fails as told.
type disk struct {
	mu       sync.Mutex
	room     int // bytes
	syncErr  error
	blocked  chan struct{} // writes wait until it is closed; nil: they don't
	truncErr error
}

var errFull = errors.New("no space left on device")

type diskFile struct {
	*os.File
	d *disk
}

func (d *disk) create(path string) (File, error) {
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	return &diskFile{f.(*os.File), d}, nil
}

func (f *diskFile) Write(b []byte) (int, error) {
	f.d.mu.Lock()
	blocked := f.d.blocked
	f.d.mu.Unlock()
	if blocked != nil {
		<-blocked
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if len(b) > f.d.room {
		n, _ := f.File.Write(b[:f.d.room])
		f.d.room -= n
		return n, errFull
	}
	f.d.room -= len(b)
	return f.File.Write(b)
}

func (f *diskFile) Truncate(n int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.truncErr != nil {
		return f.d.truncErr
	}
	return f.File.Truncate(n)
}

func (f *diskFile) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.d.syncErr
}

// However much room the disk has: what is there is a prefix, and nobody waits.
func TestFullDisk(t *testing.T) {
	for room := 0; room < 400; room += 7 {
		for _, truncErr := range []error{nil, errFull} {
			d := &disk{room: room, truncErr: truncErr}
			dir := t.TempDir()
			l := open(t, dir, Options{Create: d.create})
			stop := start(t, l)
			const n = 10
			for seq := range uint64(n) {
				mustAdd(l, 1, seq+1, strings.Repeat("x", 30))
				// The disk has room again; but there is a hole.
				if l.Err() != nil {
					d.mu.Lock()
					d.room = 1 << 20
					d.mu.Unlock()
				}
			}
			ended := l.Err() != nil
			if ended != (testutil.ToFloat64(l.metrics.ended) == 1) || ended == l.Open(1) {
				t.Errorf("room %d: ended %v, counted %v, open %v", room, ended, testutil.ToFloat64(l.metrics.ended), l.Open(1))
			}
			d.mu.Lock()
			d.room = 1 << 20
			d.mu.Unlock()
			// The next generation has a log again.
			mustAdd(l, 2, n+1, "y")
			if err := l.Err(); err != nil {
				t.Errorf("room %d: %v", room, err)
			}
			stop()
			l = open(t, dir, Options{})
			got, err := found(t, l, 1)
			if !ended && (len(got) != n || err != nil) {
				t.Errorf("room %d: %d batches, %v", room, len(got), err)
			}
			for i, s := range got {
				if s != fmt.Sprint(i+1, strings.Repeat("x", 30)) {
					t.Errorf("room %d: batch %d is %s", room, i, s)
				}
			}
			if got, err := found(t, l, 2); len(got) != 1 || err != nil {
				t.Errorf("room %d: next generation has %v, %v", room, got, err)
			}
			l.Close()
		}
	}
}

func TestSyncThatFailsEndsTheLog(t *testing.T) {
	d := &disk{room: 1 << 20, syncErr: errFull}
	l := open(t, t.TempDir(), Options{Create: d.create})
	stop := start(t, l)
	defer stop()
	mustAdd(l, 1, 1, "x")
	l.sync()
	if l.Err() == nil || l.Open(1) || testutil.ToFloat64(l.metrics.ended) != 1 {
		t.Errorf("err %v, %v ended", l.Err(), testutil.ToFloat64(l.metrics.ended))
	}
	mustAdd(l, 1, 2, "x")
}

func TestNoNewFile(t *testing.T) {
	l := open(t, t.TempDir(), Options{Create: func(string) (File, error) { return nil, errFull }})
	stop := start(t, l)
	defer stop()
	mustAdd(l, 1, 1, "x")
	mustAdd(l, 1, 2, "x")
	if l.Err() == nil {
		t.Error("no error")
	}
	l.Durable(1, nil)
	l.Remove()
	if l.Err() != nil {
		t.Errorf("after the generation is durable: %v", l.Err())
	}
}

// A slow disk holds back who asks, and nothing else.
func TestSlowDisk(t *testing.T) {
	d := &disk{room: 1 << 30, blocked: make(chan struct{})}
	l := open(t, t.TempDir(), Options{Create: d.create})
	stop := start(t, l)
	var written atomic.Int64
	big := strings.Repeat("x", 1<<20)
	n := 0
	for ; ; n++ {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		err := l.Wait(ctx)
		cancel()
		if err != nil {
			break
		}
		add(l, 1, uint64(n+1), big, func() { written.Add(1) })
	}
	if n < maxQueued>>20-1 || n > maxQueued>>20+1 || written.Load() != 0 {
		t.Errorf("%d MiB taken, %d written", n, written.Load())
	}
	waited := make(chan error, 1)
	go func() { waited <- l.Wait(t.Context()) }()
	close(d.blocked)
	d.mu.Lock()
	d.blocked = nil
	d.mu.Unlock()
	if err := <-waited; err != nil {
		t.Error(err)
	}
	stop()
	if int(written.Load()) != n {
		t.Errorf("%d of %d written", written.Load(), n)
	}
	mustAdd(l, 1, 99, "after the end") // it isn't written, and nobody waits
	if err := l.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// Generations come and go while sessions append.
func TestRotationDuringAppends(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{})
	stop := start(t, l)
	var current atomic.Uint64
	current.Store(1)
	var wg sync.WaitGroup
	const sessions, batches = 4, 500
	var written atomic.Int64
	for range sessions {
		wg.Go(func() {
			for seq := range uint64(batches) {
				if err := l.Wait(t.Context()); err != nil {
					t.Error(err)
				}
				add(l, current.Load(), seq, "columns", func() { written.Add(1) })
				if seq%50 == 0 {
					g := current.Add(1)
					if g > 3 {
						l.sync()
					}
				}
			}
		})
	}
	var last uint64
	for g := uint64(1); g < 12; g++ {
		for current.Load() <= g {
			time.Sleep(100 * time.Microsecond)
		}
		l.Durable(g, nil)
		l.Remove()
		last = g
	}
	wg.Wait()
	stop()
	if written.Load() != sessions*batches {
		t.Errorf("%d calls back, want %d", written.Load(), sessions*batches)
	}
	l = open(t, dir, Options{})
	defer l.Close()
	if l.DurableOf("a") != last || len(l.Files()) > 0 && l.Files()[0] <= last {
		t.Errorf("durable %d, files %v", l.DurableOf("a"), l.Files())
	}
	for _, g := range l.Files() {
		if _, err := found(t, l, g); err != nil {
			t.Error(err)
		}
	}
}

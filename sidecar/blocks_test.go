package sidecar

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
)

// promDB is a real head with short blocks in the harness's directory, and what
// was put into it.
type promDB struct {
	h    *harness
	db   *tsdb.DB
	refs map[string]storage.SeriesRef
	all  map[string]map[int64]string
	now  int64 // ms
	n    float64
}

const dbRange = 2 * 60 * 1000 // ms: of blocks

func (h *harness) openDB() *promDB {
	d := &promDB{h: h, all: map[string]map[int64]string{}, now: time.Now().Add(-3 * time.Hour).Truncate(time.Minute).UnixMilli()}
	d.open()
	h.t.Cleanup(func() { d.db.Close() })
	return d
}

func (d *promDB) open() {
	d.h.t.Helper()
	o := tsdb.DefaultOptions()
	o.MinBlockDuration, o.MaxBlockDuration = dbRange, 9*dbRange
	o.WALSegmentSize = 32 << 10
	o.OutOfOrderTimeWindow = 10 * dbRange
	o.RetentionDuration = 1 << 40
	db, err := tsdb.Open(d.h.promDir, promslog.NewNopLogger(), nil, o, nil)
	if err != nil {
		d.h.t.Fatal(err)
	}
	db.DisableCompactions()
	d.db, d.refs = db, map[string]storage.SeriesRef{}
}

// put appends samples of 50 series, one every 5 s for a time, some of them late.
func (d *promDB) put(span time.Duration) {
	d.h.t.Helper()
	end := d.now + span.Milliseconds()
	for ; d.now < end; d.now += 5000 {
		app := d.db.Appender(context.Background())
		for i := range 50 {
			ls := labels.FromStrings("__name__", "m", "i", fmt.Sprint(i))
			for _, t := range []int64{d.now, d.now - 70_001} {
				if t != d.now && (i%10 != 3 || d.now%15_000 != 0) {
					continue
				}
				d.n++
				ref, err := app.Append(d.refs[ls.String()], ls, t, d.n)
				if err != nil {
					d.h.t.Fatal(err)
				}
				d.refs[ls.String()] = ref
				if d.all[ls.String()] == nil {
					d.all[ls.String()] = map[int64]string{}
				}
				if d.all[ls.String()][t] == "" {
					d.all[ls.String()][t] = fmt.Sprintf("0 %x", math.Float64bits(d.n))
				}
			}
		}
		if err := app.Commit(); err != nil {
			d.h.t.Fatal(err)
		}
	}
}

func (d *promDB) compact() {
	d.h.t.Helper()
	if err := d.db.Compact(context.Background()); err != nil {
		d.h.t.Fatal(err)
	}
}

// At the first start all that is in blocks is sent too, by and by.
func TestBackfill(t *testing.T) {
	for name, age := range map[string]time.Duration{"all": 0, "none": -1} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, 2)
			h.opts.BackfillAge = age
			d := h.openDB()
			d.put(20 * time.Minute)
			d.compact()
			if len(d.db.Blocks()) == 0 {
				t.Fatal("no block")
			}
			d.put(time.Minute)
			// A block that can't be read for a while: somebody is copying it there.
			index := filepath.Join(d.db.Blocks()[0].Dir(), "index")
			if err := os.Rename(index, index+".away"); err != nil {
				t.Fatal(err)
			}
			h.run()
			if age == 0 {
				eventually(t, "the other blocks are durable", func() bool {
					for _, f := range h.ingesters {
						f.flush()
					}
					return len(h.sidecar.Status().Fills) == 1
				})
			}
			if err := os.Rename(index+".away", index); err != nil {
				t.Fatal(err)
			}
			if age < 0 {
				eventually(t, "the tail is sent", func() bool {
					return h.sidecar.Status().Checkpoint.Segment >= 0 && h.metric("epimetheus_sidecar_shipped_samples_total") > 100
				})
				h.settled()
				if n := h.metric("epimetheus_sidecar_block_samples_total"); n != 0 {
					t.Errorf("%v samples of blocks read", n)
				}
				return
			}
			h.want(d.all, false)
			h.settled()
			eventually(t, "all blocks are durable", func() bool {
				for _, f := range h.ingesters {
					f.flush()
				}
				return len(h.sidecar.Status().Fills) == 0
			})
			h.want(d.all, true)

			// What comes later is in the WAL: its blocks are not read.
			n := h.metric("epimetheus_sidecar_block_samples_total")
			d.put(10 * time.Minute)
			h.want(d.all, false)
			h.settled()
			d.compact()
			time.Sleep(5 * h.opts.CheckpointInterval)
			if m := h.metric("epimetheus_sidecar_block_samples_total"); m != n {
				t.Errorf("%v samples of blocks read that came by the WAL", m-n)
			}

			// A block that somebody puts there isn't.
			old := time.Now().Add(-100 * time.Hour).UnixMilli()
			dir := t.TempDir()
			bw, err := tsdb.NewBlockWriter(promslog.NewNopLogger(), dir, dbRange)
			if err != nil {
				t.Fatal(err)
			}
			app := bw.Appender(t.Context())
			ls := labels.FromStrings("__name__", "imported")
			if _, err := app.Append(0, ls, old, 7); err != nil {
				t.Fatal(err)
			}
			if err := app.Commit(); err != nil {
				t.Fatal(err)
			}
			id, err := bw.Flush(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, id.String()), filepath.Join(h.promDir, id.String())); err != nil {
				t.Fatal(err)
			}
			bw.Close()
			d.all[ls.String()] = map[int64]string{old: fmt.Sprintf("0 %x", math.Float64bits(7))}
			h.want(d.all, false)
		})
	}
}

// A record that can't be read, of a later Prometheus perhaps, may hold samples.
func TestGapOfUnreadableRecords(t *testing.T) {
	for name, rec := range map[string][]byte{
		"unknown_record_type": {99, 1, 2, 3},
		"undecodable_record":  {byte(record.Samples), 1},
	} {
		h := newHarness(t, 1)
		w := h.wal()
		w.series(1, 3)
		w.scrape(1, 3, 1000)
		w.log(rec)
		w.scrape(1, 3, 2000)
		h.run()
		h.want(w.all, false)
		h.stop()
		if g := h.sidecar.shipper.blocks.gap; g == nil || g.Reason != name {
			t.Errorf("%s: gap %+v", name, g)
		}
	}
}

// Whatever was truncated while the sidecar was away, and not kept, comes from
// blocks.
func TestGap(t *testing.T) {
	for _, kept := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept=%v", kept), func(t *testing.T) {
			h := newHarness(t, 2)
			h.opts.BackfillAge = -1
			d := h.openDB()
			d.put(time.Minute)
			h.run()
			h.want(d.all, false)
			h.settled()
			h.stop()

			for range 12 {
				d.put(3 * time.Minute)
				d.compact()
			}
			if !kept {
				os.RemoveAll(filepath.Join(h.opts.DataDir, "segments"))
			}
			h.run()
			h.want(d.all, false)
			st := h.sidecar.Status()
			eventually(t, "the gap is open", func() bool { st = h.sidecar.Status(); return st.Gap != nil })
			// Ingesters that die while it is being filled.
			for _, f := range h.ingesters {
				f.kill()
				f.start()
			}
			h.want(d.all, false)
			// It closes once Prometheus has compacted what may have been in it.
			d.now = max(d.now, time.Now().Truncate(time.Minute).Add(time.Minute).UnixMilli())
			for range 4 {
				d.put(3 * time.Minute)
				d.compact()
			}
			eventually(t, "the gap is closed", func() bool {
				for _, f := range h.ingesters {
					f.flush()
				}
				return h.sidecar.Status().Gap == nil
			})
			h.want(d.all, false)
			h.settled()
			h.want(d.all, true)
		})
	}
}

// A gap closes once what may have been in it is known, whatever Prometheus has
// written since and isn't durable yet.
func TestGapCloses(t *testing.T) {
	b, err := loadBlocks(t.TempDir(), promslog.NewNopLogger(), newMetrics(prometheus.NewRegistry()))
	if err != nil {
		t.Fatal(err)
	}
	id := func(n byte) ulid.ULID { return ulid.ULID{15: n} }
	block := func(n byte, mint, maxt int64, sources ...ulid.ULID) backfill.Block {
		if len(sources) == 0 {
			sources = []ulid.ULID{id(n)}
		}
		return backfill.Block{ULID: id(n), MinTime: mint, MaxTime: maxt, Level: len(sources), Sources: sources}
	}
	look := func(open bool, minValid int64, firstWBL int, listed ...backfill.Block) {
		t.Helper()
		b.list(listed, nil, time.Now(), -1)
		b.close(minValid, firstWBL)
		if got := b.gap != nil; got != open {
			t.Fatalf("the gap is open: %v, want %v", got, open)
		}
	}
	look(false, noTime, -1)
	b.open("test", 1000, 4)
	look(true, noTime, 4, block(1, 0, 1000))                                          // the head isn't compacted
	look(true, noTime, 4, block(1, 0, 1000), block(2, 1000, 2000))                    // late samples aren't
	look(true, noTime, 5, block(1, 0, 1000), block(2, 1000, 2000), block(3, 0, 1000)) // nothing of it is durable
	b.know([]ulid.ULID{id(1), id(2)})
	look(true, noTime, 6, block(4, 0, 1000, id(1), id(3)), block(2, 1000, 2000), block(5, 2000, 3000))
	b.open("test", 2500, 6)
	b.know([]ulid.ULID{id(3)})
	look(true, noTime, 7, block(4, 0, 1000, id(1), id(3)), block(2, 1000, 2000), block(5, 2000, 3000)) // it is wider now
	late := block(6, 3000, 4000)
	look(true, noTime, 8, block(4, 0, 1000, id(1), id(3)), block(2, 1000, 2000), block(5, 2000, 3000), late)
	b.know([]ulid.ULID{id(5)})
	look(false, noTime, 9, block(4, 0, 1000, id(1), id(3)), block(2, 1000, 2000), block(5, 2000, 3000), late, block(7, 4000, 5000))
	if !b.filling(id(6)) {
		t.Error("a block that was listed while the gap was open isn't read")
	}
}

// Prometheus compacts while its blocks are listed: what is in none of them then
// isn't taken for compacted.
func TestGapStaysOpenInCompaction(t *testing.T) {
	h := newHarness(t, 1)
	h.opts.BackfillAge = -1
	d := h.openDB()
	d.put(10 * time.Minute)
	s, err := New(h.opts, promslog.NewNopLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sh := s.shipper
	sh.warned = map[string]bool{}
	sh.lookAtBlocks()
	_, last, empty, err := backfill.WBLSegments(sh.dir)
	if err != nil || empty {
		t.Fatalf("out-of-order log: empty is %v, %v", empty, err)
	}
	sh.blocks.open("test", d.now, last)
	d.put(40 * time.Minute)
	list := sh.listBlocks
	sh.listBlocks = func() ([]backfill.Block, []*backfill.BadBlockError, error) {
		listed, bad, err := list()
		d.compact()
		return listed, bad, err
	}
	for range 2 {
		sh.lookAtBlocks()
		if sh.blocks.gap == nil {
			t.Fatal("the gap was closed before anything of it was read")
		}
	}
	if minValid, firstWBL := sh.compacted(); minValid <= sh.blocks.gap.Newest || firstWBL >= 0 && firstWBL <= last {
		t.Errorf("not compacted: %d up to %d, out-of-order log from %d", minValid, sh.blocks.gap.Newest, firstWBL)
	}
	for _, b := range d.db.Blocks() {
		if !sh.blocks.filling(b.Meta().ULID) {
			t.Errorf("block %s will not be read", b.Meta().ULID)
		}
	}
}

// Deleting samples through Prometheus's API, and cleaning up behind that, rewrites blocks. One
// that is still to be read is read in its new form, however compacted it was.
func TestRewrittenBlock(t *testing.T) {
	b, err := loadBlocks(t.TempDir(), promslog.NewNopLogger(), newMetrics(prometheus.NewRegistry()))
	if err != nil {
		t.Fatal(err)
	}
	id := func(n byte) ulid.ULID { return ulid.ULID{15: n} }
	old := backfill.Block{ULID: id(3), MaxTime: 1000, Level: 2, Sources: []ulid.ULID{id(1), id(2)}}
	b.list([]backfill.Block{old}, nil, time.Now(), 0)
	if !b.filling(old.ULID) {
		t.Fatal("no backfill")
	}
	rewritten := backfill.Block{ULID: id(4), MaxTime: 1000, Level: 1, Sources: []ulid.ULID{id(4)}, Rewrites: old.ULID}
	b.list([]backfill.Block{rewritten}, nil, time.Now(), 0)
	if !b.filling(rewritten.ULID) || b.fills[0].reason != reasonBackfill {
		t.Errorf("what a block was rewritten to isn't read: %v", b.fills)
	}
	if n := testutil.ToFloat64(b.metrics.blocksLost); n != 0 || len(b.fills) != 1 {
		t.Errorf("%v blocks lost, %d to be read", n, len(b.fills))
	}
}

// A block whose meta.json can't be read, for a moment or for longer, is not taken for gone, nor
// for one that there is nothing to read of.
func TestUnlistedBlock(t *testing.T) {
	h := newHarness(t, 1)
	s, err := New(h.opts, promslog.NewNopLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sh := s.shipper
	sh.warned = map[string]bool{}
	b := sh.blocks
	id := func(n byte) ulid.ULID { return ulid.ULID{15: n} }
	block := func(n byte) backfill.Block {
		return backfill.Block{ULID: id(n), Dir: id(n).String(), MaxTime: 1000 * int64(n), Level: 1, Sources: []ulid.ULID{id(n)}}
	}
	look := func(listed []backfill.Block, unread ...byte) {
		t.Helper()
		sh.listBlocks = func() (_ []backfill.Block, bad []*backfill.BadBlockError, _ error) {
			for _, n := range unread {
				bad = append(bad, &backfill.BadBlockError{ULID: id(n), Dir: id(n).String(), Err: os.ErrPermission})
			}
			return listed, bad, nil
		}
		sh.lookAtBlocks()
	}
	look([]backfill.Block{block(2)}, 1) // the first start
	look([]backfill.Block{block(1), block(2)})
	if !b.filling(id(1)) || !b.filling(id(2)) {
		t.Fatal("a block is left out of the backfill")
	}
	for range 3 {
		look([]backfill.Block{block(2)}, 1)
	}
	if n := testutil.ToFloat64(b.metrics.blocksLost); n != 0 || !b.filling(id(1)) {
		t.Errorf("the block isn't waited for, %v are lost", n)
	}
	b.know([]ulid.ULID{id(1), id(2)})
	look([]backfill.Block{block(2)}, 1)
	if !b.known[id(1)] {
		t.Error("it isn't remembered that the block was read")
	}
	b.open("test", 2500, -1)
	look([]backfill.Block{block(3)}, 4) // 3 isn't read
	b.know([]ulid.ULID{id(3)})
	look([]backfill.Block{block(3)}, 5)
	if b.gap == nil {
		t.Error("the gap was closed though a block couldn't be listed")
	}
	look([]backfill.Block{block(3), block(5)})
	if !b.filling(id(5)) {
		t.Error("a block of the gap isn't read")
	}
}

// While a segment can't be read the tail stands still, and hasn't read what Prometheus has
// written: nothing is declared, and blocks aren't taken for read.
func TestUnreadableSegment(t *testing.T) {
	h := newHarness(t, 1)
	h.opts.BackfillAge = -1
	d := h.openDB()
	d.put(time.Minute)
	// A socket can't be opened.
	var listening net.ListenConfig
	path := filepath.Join(t.TempDir(), "s")
	socket, err := listening.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := os.Symlink(path, filepath.Join(h.promDir, "wal", "00000001")); err != nil {
		t.Fatal(err)
	}
	h.run()
	h.want(d.all, false)
	if err := os.Mkdir(filepath.Join(h.promDir, "block"), 0o755); err != nil {
		t.Fatal(err)
	}
	id := "01HEZ000000000000000000001"
	meta := `{"ulid":"` + id + `","minTime":1,"maxTime":2,"version":1,"compaction":{"level":1,"sources":["` + id + `"]}}`
	if err := os.WriteFile(filepath.Join(h.promDir, "block", "meta.json"), []byte(meta), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(h.promDir, "block"), filepath.Join(h.promDir, id)); err != nil {
		t.Fatal(err)
	}
	looks := h.metric("epimetheus_sidecar_checkpoints_total")
	eventually(t, "the segment is tried several times", func() bool {
		for _, f := range h.ingesters {
			f.flush()
		}
		return h.metric("epimetheus_sidecar_wal_read_errors_total") > 10 && h.metric("epimetheus_sidecar_checkpoints_total") > looks+10
	})
	h.stop()
	if sh := h.sidecar.shipper; sh.caughtUp || len(sh.blocks.waiting) != 1 {
		t.Errorf("all was read: %v, blocks that aren't %v, that may be %v", sh.caughtUp, sh.blocks.waiting, sh.blocks.seen)
	}
}

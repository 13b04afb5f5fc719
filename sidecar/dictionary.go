package sidecar

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/encoding"
	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// dictionary says what Prometheus's series refs mean: what the last series
// record before a position said. Labels, as Prometheus wrote them, lie in an
// append-only file; in memory a series is one slot and an entry in a page of
// refs. A ref that is defined anew with other labels gets another slot, and the
// old one stays until forget, for ranges that are read again.
//
// The file, dictionary in the sidecar's data directory, is a cache of the WAL:
// if it is damaged or behind the checkpoint, the WAL is read again for series.
//
//	file    = magic record*
//	record  = length (4 bytes, little-endian), CRC32C of payload (4), payload
//	payload = 1, ref, position, labels            a series
//	        | 2, ref, type byte, unit, help       metadata of a series
//	        | 3, position                         all series before it are in the file
//	        | 4, ref                              the series is gone
//	        | 5, position, byte                   a new epoch; see fork
//
// Numbers are uvarints, strings are prefixed by their length.
type dictionary struct {
	path string
	f    *os.File
	buf  []byte // not yet written
	size int64  // of the file, without buf
	live int64  // bytes of records that still mean something
	mark tail.Position

	synced  int64 // bytes of the file that are on disk
	syncing bool  // there is a dictionarySync
	moved   bool  // f has yet to replace the file at path

	pages     map[uint64]*refPage
	recent    *refPage // the page of recentKey, since refs come in runs
	recentKey uint64
	chunks    []*[slotsPerChunk]slot
	places    [maxReplicas - 1][]*[slotsPerChunk]place // of replicas but the first, as chunks; nothing without
	replicas  int
	slots     uint32 // ever used
	free      []uint32
	count     int
	old       map[uint64]*history // refs with more than one definition
	forks     []forkRecord        // that hold for positions that may be asked for

	scratch []byte
	dec     record.Decoder
}

const (
	dictionaryMagic = "EPIDICT1"
	recordHeader    = 8
	maxRecordBytes  = 16 << 20
	// Of labels as Prometheus wrote them: relabelling may make them shorter.
	maxKeptLabelsBytes = 1 << 20

	kindSeries   = 1
	kindMetadata = 2
	kindMark     = 3
	kindGone     = 4
	kindFork     = 5

	refsPerPage   = 64
	slotsPerChunk = 4096
	flushBytes    = 64 << 10
	maxUnwritten  = 32 << 20

	noTime = math.MinInt64
)

// refPage maps 64 adjacent refs to slots. Prometheus counts refs up, so pages
// are mostly full.
type refPage struct {
	slot [refsPerPage]uint32 // 0 for none
	used int
}

// slot is what is in memory of one definition of a series: 48 bytes.
type slot struct {
	off      int64  // of its record in the file; 0 for a free slot
	metadata int64  // of its metadata record, 0 for none
	lastT    int64  // greatest timestamp that the live tail has seen, ms
	token    uint32 // on the ring, under label version ver
	ref      uint32 // in session
	seen     uint32 // segment that last named the series
	session  uint16 // index of the session in which it is announced, 0 for none
	owner    uint16 // index plus one, in the present split, of the owner or the set of owners, 0 for not looked up
	version  uint16 // id of the label version that token and drop are for, 0 for none
	drop     dropReason
	kind     sampleKind // of the sample at lastT
	name     uint32     // nameHash of the metric, valid with version
}

// place is where one replica of a series is announced.
type place struct {
	ref     uint32 // in session
	session uint16 // index of the session, 0 for none
}

// forkRecord is a record of kind 5.
type forkRecord struct {
	from tail.Position
	off  int64 // in the file
}

// history holds the definitions of a ref, ascending in from; slot 0 says that it
// has none from there on. The last is the one that the ref's page names.
type history struct {
	from []tail.Position
	slot []uint32
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openDictionary opens the dictionary in dir, or an empty one if there is none
// or the file is of no use. A damaged end is cut off.
func openDictionary(dir string) (*dictionary, error) {
	d := &dictionary{
		path: filepath.Join(dir, "dictionary"), pages: map[uint64]*refPage{}, old: map[uint64]*history{},
		slots: 1, chunks: []*[slotsPerChunk]slot{new([slotsPerChunk]slot)},
		dec: record.NewDecoder(labels.NewSymbolTable(), nil),
	}
	_ = os.Remove(d.path + ".tmp") // a crash has left it
	f, err := os.OpenFile(d.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open dictionary: %w", err)
	}
	d.f = f
	if err := d.load(); err != nil {
		f.Close()
		return nil, err
	}
	if d.size > 1<<20 && d.live < d.size*3/4 {
		if err := d.compact(); err != nil {
			d.close()
			return nil, err
		}
	}
	return d, nil
}

func (d *dictionary) load() error {
	r := bufio.NewReaderSize(d.f, 256<<10)
	magic := make([]byte, len(dictionaryMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != dictionaryMagic {
		return d.reset()
	}
	d.size = int64(len(magic))
	var header [recordHeader]byte
	for {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			break
		}
		n := binary.LittleEndian.Uint32(header[:])
		if n > maxRecordBytes {
			break
		}
		if cap(d.scratch) < int(n) {
			d.scratch = make([]byte, n)
		}
		b := d.scratch[:n]
		if _, err := io.ReadFull(r, b); err != nil || crc32.Checksum(b, castagnoli) != binary.LittleEndian.Uint32(header[4:]) {
			break
		}
		if !d.replay(b, d.size) {
			break
		}
		d.size += recordHeader + int64(n)
	}
	if err := d.f.Truncate(d.size); err != nil {
		return fmt.Errorf("cut dictionary: %w", err)
	}
	return nil
}

// reset empties the file.
func (d *dictionary) reset() error {
	if err := d.f.Truncate(0); err != nil {
		return fmt.Errorf("empty dictionary: %w", err)
	}
	if _, err := d.f.WriteAt([]byte(dictionaryMagic), 0); err != nil {
		return fmt.Errorf("write dictionary: %w", err)
	}
	d.size = int64(len(dictionaryMagic))
	return nil
}

// replay enters a record that lies at off. It returns false for one that can't be.
func (d *dictionary) replay(b []byte, off int64) bool {
	dec := encoding.Decbuf{B: b}
	size := recordHeader + int64(len(b))
	switch dec.Byte() {
	case kindSeries:
		ref := dec.Uvarint64()
		from := decodePosition(&dec)
		if dec.Err() != nil {
			return false
		}
		i := d.alloc()
		s := d.at(i)
		s.off, s.seen = off, seenIn(from)
		d.live += size
		d.insert(ref, i, from)
	case kindMetadata:
		ref := dec.Uvarint64()
		if dec.Err() != nil {
			return false
		}
		if i, ok := d.current(ref); ok {
			d.at(i).metadata = off
			d.live += size
		}
	case kindMark:
		d.mark = decodePosition(&dec)
	case kindGone:
		ref := dec.Uvarint64()
		if dec.Err() != nil {
			return false
		}
		d.unlink(ref, func(uint32) {})
	case kindFork:
		from := decodePosition(&dec)
		carried := dec.Byte() == 1
		if dec.Err() != nil {
			return false
		}
		d.applyFork(from, carried, off)
	default:
		return false
	}
	return dec.Err() == nil
}

func (d *dictionary) at(i uint32) *slot { return &d.chunks[i/slotsPerChunk][i%slotsPerChunk] }

func (d *dictionary) alloc() uint32 {
	d.count++
	var i uint32
	if n := len(d.free); n > 0 {
		i = d.free[n-1]
		d.free = d.free[:n-1]
	} else {
		i = d.slots
		d.slots++
		if int(i/slotsPerChunk) == len(d.chunks) {
			d.chunks = append(d.chunks, new([slotsPerChunk]slot))
			d.replicate(d.replicas)
		}
	}
	*d.at(i) = slot{lastT: noTime}
	return i
}

func (d *dictionary) release(i uint32) {
	d.count--
	*d.at(i) = slot{}
	for k := 1; k < d.replicas; k++ {
		*d.place(i, k) = place{}
	}
	d.free = append(d.free, i)
}

// replicate makes room for the places of n replicas of each series.
func (d *dictionary) replicate(n int) {
	d.replicas = n
	for k := range max(0, n-1) {
		for len(d.places[k]) < len(d.chunks) {
			d.places[k] = append(d.places[k], new([slotsPerChunk]place))
		}
	}
}

// place is that of replica k, from 1 on, of a slot.
func (d *dictionary) place(i uint32, k int) *place {
	return &d.places[k-1][i/slotsPerChunk][i%slotsPerChunk]
}

// allPlaces calls fn for the places of all slots, used or not.
func (d *dictionary) allPlaces(fn func(*place)) {
	for _, chunks := range d.places {
		for _, chunk := range chunks {
			for i := range chunk {
				fn(&chunk[i])
			}
		}
	}
}

// all calls fn for each slot in use.
func (d *dictionary) all(fn func(i uint32, s *slot)) {
	for i := uint32(1); i < d.slots; i++ {
		if s := d.at(i); s.off != 0 {
			fn(i, s)
		}
	}
}

// current returns the slot of the newest definition of ref.
func (d *dictionary) current(ref uint64) (uint32, bool) {
	p := d.recent
	if key := ref / refsPerPage; p == nil || key != d.recentKey {
		if p = d.pages[key]; p == nil {
			return 0, false
		}
		d.recent, d.recentKey = p, key
	}
	i := p.slot[ref%refsPerPage]
	return i, i != 0
}

// lookup returns the slot of the definition of ref in force at pos. Of a series
// whose record was only seen behind pos the oldest definition counts: the record
// that named it before was gone already.
func (d *dictionary) lookup(ref uint64, pos tail.Position) (uint32, bool) {
	if len(d.old) > 0 {
		if h := d.old[ref]; h != nil {
			i := h.slot[max(0, h.inForce(pos))]
			return i, i != 0
		}
	}
	return d.current(ref)
}

// inForce returns the index of the last definition at or before pos, -1 if all
// are behind it.
func (h *history) inForce(pos tail.Position) int {
	for i, from := range slices.Backward(h.from) {
		if !pos.Before(from) {
			return i
		}
	}
	return -1
}

// insert makes slot i a definition of ref from from on.
func (d *dictionary) insert(ref uint64, i uint32, from tail.Position) {
	p := d.pages[ref/refsPerPage]
	if p == nil {
		p = &refPage{}
		d.pages[ref/refsPerPage] = p
	}
	cur := p.slot[ref%refsPerPage]
	h := d.old[ref]
	if cur == 0 && h == nil {
		p.slot[ref%refsPerPage] = i
		p.used++
		return
	}
	if h == nil {
		h = &history{from: []tail.Position{d.definedAt(cur)}, slot: []uint32{cur}}
		d.old[ref] = h
	}
	at := h.inForce(from) + 1
	h.from = slices.Insert(h.from, at, from)
	h.slot = slices.Insert(h.slot, at, i)
	p.slot[ref%refsPerPage] = h.slot[len(h.slot)-1]
}

// define enters what a series record at from says. It returns the slot, and
// whether it is a new one.
func (d *dictionary) define(ref uint64, ls labels.Labels, from tail.Position) (uint32, bool, error) {
	ls = keptLabels(ls)
	if i, ok := d.lookup(ref, from); ok {
		same, err := d.says(i, ls)
		if err != nil {
			return 0, false, err
		}
		if same {
			s := d.at(i)
			s.seen = max(s.seen, seenIn(from))
			return i, false, nil
		}
	}
	buf := encoding.Encbuf{B: d.scratch[:0]}
	buf.PutByte(kindSeries)
	buf.PutUvarint64(ref)
	encodePosition(&buf, from)
	record.EncodeLabels(&buf, ls)
	d.scratch = buf.Get()
	off, err := d.append(d.scratch)
	if err != nil {
		return 0, false, err
	}
	d.live += recordHeader + int64(len(d.scratch))
	i := d.alloc()
	s := d.at(i)
	s.off, s.seen = off, seenIn(from)
	d.insert(ref, i, from)
	return i, true, nil
}

// keptLabels are the labels that the dictionary has of a series: none, as no series
// of a Prometheus has, where they are too long.
func keptLabels(ls labels.Labels) labels.Labels {
	if ls.ByteSize() > maxKeptLabelsBytes {
		return labels.EmptyLabels()
	}
	return ls
}

// seenIn is the number of the segment, or WAL checkpoint, that p is in.
func seenIn(p tail.Position) uint32 {
	if p.InCheckpoint {
		return uint32(p.Checkpoint)
	}
	return uint32(p.Segment)
}

// says compares the labels of a slot.
func (d *dictionary) says(i uint32, ls labels.Labels) (bool, error) {
	have, err := d.labels(i)
	if err != nil {
		return false, err
	}
	return labels.Equal(have, ls), nil
}

// labels reads the labels of a slot.
func (d *dictionary) labels(i uint32) (labels.Labels, error) {
	b, err := d.read(d.at(i).off)
	if err != nil {
		return labels.EmptyLabels(), err
	}
	dec := encoding.Decbuf{B: b}
	dec.Byte()
	dec.Uvarint64()
	decodePosition(&dec)
	ls := d.dec.DecodeLabels(&dec)
	return ls, dec.Err()
}

// definedAt reads the position of the series record of a slot.
func (d *dictionary) definedAt(i uint32) tail.Position {
	b, err := d.read(d.at(i).off)
	if err != nil {
		return tail.Position{} // then it holds from the beginning
	}
	dec := encoding.Decbuf{B: b}
	dec.Byte()
	dec.Uvarint64()
	return decodePosition(&dec)
}

// describe enters metadata of a series.
func (d *dictionary) describe(i uint32, ref uint64, m record.RefMetadata) error {
	s := d.at(i)
	if s.metadata != 0 {
		old, err := d.metadata(i)
		if err != nil {
			return err
		}
		if old.Type == m.Type && old.Unit == m.Unit && old.Help == m.Help {
			return nil
		}
	}
	buf := encoding.Encbuf{B: d.scratch[:0]}
	buf.PutByte(kindMetadata)
	buf.PutUvarint64(ref)
	buf.PutByte(m.Type)
	buf.PutUvarintStr(m.Unit)
	buf.PutUvarintStr(m.Help)
	d.scratch = buf.Get()
	off, err := d.append(d.scratch)
	if err != nil {
		return err
	}
	s.metadata = off
	d.live += recordHeader + int64(len(d.scratch))
	return nil
}

// metadata reads the metadata of a slot that has some.
func (d *dictionary) metadata(i uint32) (record.RefMetadata, error) {
	b, err := d.read(d.at(i).metadata)
	if err != nil {
		return record.RefMetadata{}, err
	}
	dec := encoding.Decbuf{B: b}
	dec.Byte()
	dec.Uvarint64()
	m := record.RefMetadata{Type: dec.Byte(), Unit: string(dec.UvarintBytes()), Help: string(dec.UvarintBytes())}
	return m, dec.Err()
}

// gone forgets a ref and gives its slots, before they are released, to fn.
func (d *dictionary) gone(ref uint64, fn func(i uint32)) error {
	buf := encoding.Encbuf{B: d.scratch[:0]}
	buf.PutByte(kindGone)
	buf.PutUvarint64(ref)
	d.scratch = buf.Get()
	if _, err := d.append(d.scratch); err != nil {
		return err
	}
	d.unlink(ref, fn)
	return nil
}

func (d *dictionary) unlink(ref uint64, fn func(uint32)) {
	p := d.pages[ref/refsPerPage]
	h := d.old[ref]
	if p == nil || (p.slot[ref%refsPerPage] == 0 && h == nil) {
		return
	}
	slots := []uint32{p.slot[ref%refsPerPage]}
	if h != nil {
		slots = h.slot
		delete(d.old, ref)
	}
	for _, i := range slots {
		if i != 0 {
			fn(i)
			d.dead(i)
		}
	}
	d.vacate(ref)
}

// dead releases a slot and takes its records out of the count of live bytes, by
// an estimate: reading them for that isn't worth it.
func (d *dictionary) dead(i uint32) {
	d.live -= d.live / int64(max(1, d.count))
	d.release(i)
}

// forget drops definitions that no range at or behind pos needs.
func (d *dictionary) forget(pos tail.Position, fn func(i uint32)) {
	d.forks = slices.DeleteFunc(d.forks, func(f forkRecord) bool { return !pos.Before(f.from) })
	for ref, h := range d.old {
		keep := max(0, h.inForce(pos))
		for _, i := range h.slot[:keep] {
			if i != 0 {
				fn(i)
				d.dead(i)
			}
		}
		h.from, h.slot = h.from[keep:], h.slot[keep:]
		if len(h.slot) > 1 {
			continue
		}
		delete(d.old, ref)
		if h.slot[0] == 0 {
			d.vacate(ref)
		}
	}
}

// vacate takes a ref without a definition out of its page.
func (d *dictionary) vacate(ref uint64) {
	p := d.pages[ref/refsPerPage]
	p.slot[ref%refsPerPage] = 0
	if p.used--; p.used == 0 {
		delete(d.pages, ref/refsPerPage)
		d.recent = nil
	}
}

// sweep forgets the refs that WAL checkpoint n no longer names and no segment
// behind it named. Before, the refs that it does name were given to touch.
func (d *dictionary) sweep(n int, fn func(i uint32)) (int, error) {
	var dead []uint64
	for key, p := range d.pages {
		for k, i := range p.slot {
			if i != 0 && int(d.at(i).seen) < n {
				dead = append(dead, key*refsPerPage+uint64(k))
			}
		}
	}
	for _, ref := range dead {
		if err := d.gone(ref, fn); err != nil {
			return 0, err
		}
	}
	if d.size > 1<<20 && d.live < d.size/2 && !d.syncing && !d.moved {
		return len(dead), d.compact()
	}
	return len(dead), nil
}

// touch notes that segment n, or the WAL checkpoint of that number, names ref.
func (d *dictionary) touch(ref uint64, n int) {
	if i, ok := d.current(ref); ok {
		s := d.at(i)
		s.seen = max(s.seen, uint32(n))
	}
}

// fork enters that a new epoch begins at from. Where the log before from is in
// common (carried), what it defined goes on to hold, and what was defined behind
// from's place in epochs before means nothing in the new one; otherwise nothing
// that was defined before does. Ranges of epochs before still find what held
// for them.
func (d *dictionary) fork(from tail.Position, carried bool) error {
	buf := encoding.Encbuf{B: d.scratch[:0]}
	buf.PutByte(kindFork)
	encodePosition(&buf, from)
	if carried {
		buf.PutByte(1)
	} else {
		buf.PutByte(0)
	}
	d.scratch = buf.Get()
	off, err := d.append(d.scratch)
	if err != nil {
		return err
	}
	d.applyFork(from, carried, off)
	return nil
}

func (d *dictionary) applyFork(from tail.Position, carried bool, off int64) {
	d.forks = append(d.forks, forkRecord{from, off})
	place := from
	place.Epoch = 0
	for key, p := range d.pages {
		for k, i := range p.slot {
			if i == 0 {
				continue
			}
			s := d.at(i)
			s.lastT, s.kind = noTime, 0
			at := d.definedAt(i)
			if at.Epoch >= from.Epoch {
				continue
			}
			at.Epoch = 0
			ref := key*refsPerPage + uint64(k)
			h := d.old[ref]
			if carried && !place.Before(at) {
				continue
			}
			if h == nil {
				h = &history{from: []tail.Position{d.definedAt(i)}, slot: []uint32{i}}
				d.old[ref] = h
			}
			// A ref that was defined more than once, first in what is in common,
			// is left without a meaning: that is a gap, which is filled.
			h.from, h.slot = append(h.from, from), append(h.slot, 0)
			p.slot[k] = 0
		}
	}
}

// setMark notes that all series before pos are in the dictionary, and returns what
// brings everything to disk: nil if it is there.
func (d *dictionary) setMark(pos tail.Position) (*dictionarySync, error) {
	if pos != d.mark || len(d.buf) > 0 {
		buf := encoding.Encbuf{B: d.scratch[:0]}
		buf.PutByte(kindMark)
		encodePosition(&buf, pos)
		d.scratch = buf.Get()
		if _, err := d.append(d.scratch); err != nil {
			return nil, err
		}
		d.mark = pos
		if err := d.flush(); err != nil {
			return nil, err
		}
	}
	if d.size == d.synced && !d.moved {
		return nil, nil
	}
	d.syncing = true
	return &dictionarySync{d: d, f: d.f, path: d.path, size: d.size, move: d.moved}, nil
}

// dictionarySync brings to disk what a dictionary held when it was made. There is
// one at a time; meanwhile the dictionary is used, but not compacted. A nil one has
// nothing to do.
type dictionarySync struct {
	d    *dictionary // not for write
	f    *os.File
	path string
	size int64
	move bool // f to path
}

// write may be called by any goroutine.
func (x *dictionarySync) write() error {
	if x == nil {
		return nil
	}
	if err := x.f.Sync(); err != nil {
		return fmt.Errorf("sync dictionary: %w", err)
	}
	if x.move {
		if err := x.replace(); err != nil {
			return fmt.Errorf("compact dictionary: %w", err)
		}
	}
	return nil
}

func (x *dictionarySync) replace() error {
	own, err := x.f.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(x.path); err == nil && os.SameFile(own, there) {
		return syncFolder(filepath.Dir(x.path)) // that failed the last time
	}
	return replaceFile(x.f.Name(), x.path)
}

// end takes in, by the dictionary's owner, that it was written, or the error.
func (x *dictionarySync) end(err error) {
	if x == nil {
		return
	}
	x.d.syncing = false
	if err == nil {
		x.d.synced, x.d.moved = x.size, x.d.moved && !x.move
	}
}

func (d *dictionary) append(payload []byte) (off int64, err error) {
	if len(payload) > maxRecordBytes {
		return 0, fmt.Errorf("dictionary: record of %d bytes, the limit is %d", len(payload), maxRecordBytes)
	}
	off = d.size + int64(len(d.buf))
	d.buf = binary.LittleEndian.AppendUint32(d.buf, uint32(len(payload)))
	d.buf = binary.LittleEndian.AppendUint32(d.buf, crc32.Checksum(payload, castagnoli))
	d.buf = append(d.buf, payload...)
	if len(d.buf) >= flushBytes {
		// A full disk may be empty again soon: until then it stays in memory,
		// and setMark says that no checkpoint can be written.
		if err := d.flush(); err != nil && len(d.buf) >= maxUnwritten {
			return 0, err
		}
	}
	return off, nil
}

func (d *dictionary) flush() error {
	if len(d.buf) == 0 {
		return nil
	}
	if _, err := d.f.WriteAt(d.buf, d.size); err != nil {
		return fmt.Errorf("write dictionary: %w", err)
	}
	d.size += int64(len(d.buf))
	d.buf = d.buf[:0]
	return nil
}

// read returns the payload at off, valid until the next call.
func (d *dictionary) read(off int64) ([]byte, error) {
	if off >= d.size {
		b := d.buf[off-d.size:]
		n := binary.LittleEndian.Uint32(b)
		return b[recordHeader : recordHeader+n], nil
	}
	if cap(d.scratch) < 1024 {
		d.scratch = make([]byte, 1024)
	}
	b := d.scratch[:1024]
	got, err := d.f.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read dictionary at %d: %w", off, err)
	}
	if got < recordHeader {
		return nil, fmt.Errorf("read dictionary at %d: %w", off, io.ErrUnexpectedEOF)
	}
	n := int(binary.LittleEndian.Uint32(b))
	crc := binary.LittleEndian.Uint32(b[4:])
	if n > maxRecordBytes {
		return nil, fmt.Errorf("read dictionary at %d: record of %d bytes", off, n)
	}
	if recordHeader+n > got {
		d.scratch = make([]byte, recordHeader+n)
		b = d.scratch
		if _, err := d.f.ReadAt(b, off); err != nil {
			return nil, fmt.Errorf("read dictionary at %d: %w", off, err)
		}
	}
	payload := b[recordHeader : recordHeader+n]
	if crc32.Checksum(payload, castagnoli) != crc {
		return nil, fmt.Errorf("read dictionary at %d: checksum", off)
	}
	return payload, nil
}

// compact writes a new file that holds what is alive, and takes it. The one before
// stays in its place until the new one is on disk.
func (d *dictionary) compact() error {
	if err := d.flush(); err != nil {
		return err
	}
	type place struct {
		off  int64
		move *int64 // where it is noted
	}
	places := make([]place, 0, d.count)
	d.all(func(_ uint32, s *slot) {
		places = append(places, place{s.off, &s.off})
		if s.metadata != 0 {
			places = append(places, place{s.metadata, &s.metadata})
		}
	})
	for i := range d.forks {
		places = append(places, place{d.forks[i].off, &d.forks[i].off})
	}
	// By place, so that what was written later still comes later.
	slices.SortFunc(places, func(a, b place) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	tmp, err := os.OpenFile(d.path+".tmp", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("compact dictionary: %w", err)
	}
	n := &dictionary{path: d.path, f: tmp}
	err = n.reset()
	offs := make([]int64, len(places))
	for k := 0; err == nil && k < len(places); k++ {
		var b []byte
		if b, err = d.read(places[k].off); err == nil {
			offs[k], err = n.append(b)
		}
	}
	if err == nil {
		_, err = n.setMark(d.mark)
	}
	if err != nil {
		tmp.Close()
		os.Remove(tmp.Name())
		return fmt.Errorf("compact dictionary: %w", err)
	}
	for k, p := range places {
		*p.move = offs[k]
	}
	d.f.Close()
	d.f, d.size, d.live, d.synced, d.moved = tmp, n.size, n.size, 0, true
	return nil
}

func (d *dictionary) close() error {
	return errors.Join(d.flush(), d.f.Close())
}

func encodePosition(buf *encoding.Encbuf, p tail.Position) {
	in := byte(0)
	if p.InCheckpoint {
		in = 1
	}
	buf.PutUvarint32(p.Epoch)
	buf.PutByte(in)
	buf.PutUvarint(p.Checkpoint)
	buf.PutUvarint(p.Segment)
	buf.PutUvarint64(uint64(p.Offset))
}

func decodePosition(dec *encoding.Decbuf) tail.Position {
	return tail.Position{
		Epoch: dec.Uvarint32(), InCheckpoint: dec.Byte() == 1, Checkpoint: dec.Uvarint(),
		Segment: dec.Uvarint(), Offset: int64(dec.Uvarint64()),
	}
}

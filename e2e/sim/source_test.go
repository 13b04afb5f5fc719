package sim

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
)

// source is a model of a Prometheus: it scrapes a changing set of series and logs
// them with Prometheus's own packages.
type source struct {
	w        *world
	id       string
	tenant   string
	dir      string
	interval time.Duration
	segment  int // bytes
	encoder  record.Encoder

	mu         sync.Mutex
	rng        *rand.Rand
	wal        *wlog.WL
	old        []*wlog.WL // of processes that were killed: to be closed at the very end
	active     []*series
	ended      []*series // may come back
	nextRef    uint64
	made       int                  // series ever made
	lastScrape int64                // ms
	refs       map[uint64]explained // by a record in WAL or WAL checkpoint

	// The sidecar beside it. Owned by the schedule.
	sidecar *sidecarProcess
	starts  int
}

// place is the end of a record.
type place struct{ segment, offset int }

// explained is what a ref means. After a restart it may come to mean another series.
type explained struct {
	by *series
	at place
}

func (s *source) knows(x *series) bool { return s.refs[x.ref].by == x }

func (p place) String() string { return fmt.Sprintf("%08d/%d", p.segment, p.offset) }

type series struct {
	ref    uint64
	labels labels.Labels
	id     seriesID
	kind   int // 0 to 2: floats, histograms, float histograms
	count  uint64
	lastT  int64
	fresh  bool // its series record is not logged yet
}

func newSource(w *world, n int, tenant string) (*source, error) {
	s := &source{
		w: w, id: fmt.Sprintf("source-%d", n), tenant: tenant, rng: w.random(100 + uint64(n)), refs: map[uint64]explained{}, nextRef: 1,
	}
	s.dir = filepath.Join(w.dir, s.id)
	s.interval = time.Duration(1+s.rng.IntN(6)) * time.Second
	if s.rng.IntN(4) == 0 {
		s.interval = 15 * time.Second
	}
	s.segment = 32 << 10 << s.rng.IntN(3)
	s.encoder.EnableSTStorage = s.rng.IntN(2) == 0
	// A server has these from the beginning, an agent has not.
	if err := os.MkdirAll(filepath.Join(s.dir, "chunks_head"), 0o755); err != nil {
		return nil, err
	}
	for range 3 + s.rng.IntN(12) {
		s.begin("")
	}
	return s, s.open()
}

func (s *source) open() (err error) {
	s.wal, err = wlog.NewSize(s.w.logger, nil, filepath.Join(s.dir, "wal"), s.segment, compression.Snappy)
	return err
}

// run scrapes until stop is closed.
func (s *source) run(stop <-chan struct{}) {
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			s.do(s.scrape)
		}
	}
}

// do runs fn with the lock held.
func (s *source) do(fn func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := fn(); err != nil {
		s.w.fail(fmt.Errorf("%s: the model of Prometheus: %w", s.id, err))
	}
}

// begin makes a new series, or one that was there before.
func (s *source) begin(padding string) {
	if n := len(s.ended); n > 0 && s.rng.IntN(3) == 0 {
		i := s.rng.IntN(n)
		x := s.ended[i]
		s.ended = slices.Delete(s.ended, i, i+1)
		if !s.knows(x) { // Prometheus has forgotten it
			x.ref, x.fresh = s.nextRef, true
			s.nextRef++
		}
		s.active = append(s.active, x)
		return
	}
	s.made++
	x := &series{ref: s.nextRef, kind: max(0, s.rng.IntN(6)-3), fresh: true}
	s.nextRef++
	x.labels = labels.FromStrings("__name__", fmt.Sprintf("metric_%d", s.made%7), "instance", s.id, "n", fmt.Sprint(s.made))
	if padding != "" {
		x.labels = labels.NewBuilder(x.labels).Set("padding", padding).Labels()
	}
	x.id = seriesID{s.tenant, x.labels.String()}
	s.active = append(s.active, x)
}

// noted is a sample that is about to be logged.
type noted struct {
	x     *series
	value string
}

// log logs a record. The truth has to know its samples before the sidecar can, and
// in which segment they came to lie.
func (s *source) log(rec []byte, t int64, samples ...noted) (at place, err error) {
	all := make([]*sample, len(samples))
	for i, n := range samples {
		n.x.lastT = max(n.x.lastT, t)
		all[i] = &sample{value: n.value, source: s}
		s.w.truth.log(sampleID{n.x.id, t}, all[i])
	}
	if err := s.wal.Log(rec); err != nil {
		return at, err
	}
	if at.segment, at.offset, err = s.wal.LastSegmentAndOffset(); err != nil {
		return at, err
	}
	s.w.truth.mu.Lock()
	defer s.w.truth.mu.Unlock()
	for _, x := range all {
		x.at = at
	}
	return at, nil
}

// scrape logs a sample of each series, as one appender of Prometheus does.
func (s *source) scrape() error {
	now := max(time.Now().UnixMilli(), s.lastScrape+1)
	s.lastScrape = now
	var floats []record.RefSample
	var floatNotes []noted
	if s.rng.IntN(3) == 0 {
		for range s.rng.IntN(3) {
			s.begin("")
		}
		if n := len(s.active); n > 3 && s.rng.IntN(2) == 0 {
			i := s.rng.IntN(n)
			x := s.active[i]
			s.active = slices.Delete(s.active, i, i+1)
			if !x.fresh { // a series without samples has no end
				s.ended = append(s.ended, x)
				floats = append(floats, record.RefSample{Ref: chunks.HeadSeriesRef(x.ref), T: now, V: math.Float64frombits(value.StaleNaN)})
				floatNotes = append(floatNotes, noted{x, stale})
			}
		}
	}
	var fresh []record.RefSeries
	var freshSeries []*series
	for _, x := range s.active {
		if x.fresh {
			x.fresh = false
			freshSeries = append(freshSeries, x)
			fresh = append(fresh, record.RefSeries{Ref: chunks.HeadSeriesRef(x.ref), Labels: x.labels})
		}
	}
	if len(fresh) > 0 {
		at, err := s.log(s.encoder.Series(fresh, nil), now)
		if err != nil {
			return err
		}
		for _, x := range freshSeries {
			s.refs[x.ref] = explained{x, at}
		}
	}
	var hs []record.RefHistogramSample
	var fhs []record.RefFloatHistogramSample
	var hNotes, fhNotes []noted
	for _, x := range s.active {
		ref := chunks.HeadSeriesRef(x.ref)
		if s.rng.IntN(20) == 0 {
			continue // a failed scrape, more or less
		}
		x.count += uint64(s.rng.IntN(10))
		c := float64(x.count)
		switch x.kind {
		case 1:
			h := &histogram.Histogram{
				Schema: 1, ZeroThreshold: 0.001, ZeroCount: 2, Count: 2 + 2*x.count, Sum: c * 1.5,
				PositiveSpans: []histogram.Span{{Offset: 0, Length: 2}}, PositiveBuckets: []int64{int64(x.count), 0},
			}
			hs = append(hs, record.RefHistogramSample{Ref: ref, T: now, H: h})
			hNotes = append(hNotes, noted{x, histogramValue(h)})
		case 2:
			h := &histogram.FloatHistogram{
				Schema: 0, ZeroThreshold: 0.001, ZeroCount: 1, Count: 1 + 2*c, Sum: c / 3,
				PositiveSpans: []histogram.Span{{Offset: 1, Length: 2}}, PositiveBuckets: []float64{c, c},
			}
			fhs = append(fhs, record.RefFloatHistogramSample{Ref: ref, T: now, FH: h})
			fhNotes = append(fhNotes, noted{x, floatHistogramValue(h)})
		default:
			v := c + float64(x.ref%10)/10
			floats = append(floats, record.RefSample{Ref: ref, T: now, V: v})
			floatNotes = append(floatNotes, noted{x, floatValue(v)})
			if s.rng.IntN(50) == 0 { // Prometheus logs it and then takes the first
				floats = append(floats, record.RefSample{Ref: ref, T: now, V: v + 1})
			}
		}
	}
	if len(floats) > 0 {
		if _, err := s.log(s.encoder.Samples(floats, nil), now, floatNotes...); err != nil {
			return err
		}
	}
	if len(hs) > 0 {
		b, _ := s.encoder.HistogramSamples(hs, nil)
		if _, err := s.log(b, now, hNotes...); err != nil {
			return err
		}
	}
	if len(fhs) > 0 {
		b, _ := s.encoder.FloatHistogramSamples(fhs, nil)
		_, err := s.log(b, now, fhNotes...)
		return err
	}
	return nil
}

// late logs a sample of the past, as Prometheus does with out-of-order samples.
func (s *source) late() error {
	if len(s.active) == 0 {
		return nil
	}
	x := s.active[s.rng.IntN(len(s.active))]
	t := time.Now().UnixMilli() - int64(1+s.rng.IntN(90_000))
	if x.kind != 0 || x.fresh || s.w.truth.has(sampleID{x.id, t}) {
		return nil
	}
	v := s.rng.Float64()
	rec := s.encoder.Samples([]record.RefSample{{Ref: chunks.HeadSeriesRef(x.ref), T: t, V: v}}, nil)
	_, err := s.log(rec, t, noted{x, floatValue(v)})
	return err
}

// burst scrapes many new series at once, with records of more than a page.
func (s *source) burst() error {
	n, padding := 1+s.rng.IntN(60), 1+s.rng.IntN(1000)
	for range n {
		b := make([]byte, padding)
		for i := range b {
			b[i] = byte('a' + s.rng.IntN(26)) // not to be compressed away
		}
		s.begin(string(b))
	}
	err := s.scrape()
	// Most end without a marker, as when a target goes while Prometheus is down.
	rest := max(0, len(s.active)-n*9/10)
	s.ended = append(s.ended, s.active[rest:]...)
	s.active = s.active[:rest]
	return err
}

func (s *source) roll() error {
	_, err := s.wal.NextSegment()
	return err
}

// truncate does what Prometheus does after a head compaction, up to segment last
// at most; regardless: its sidecar may not have read what goes.
func (s *source) truncate(last int, regardless bool) error {
	first, end, err := wlog.Segments(s.wal.Dir())
	if err != nil {
		return err
	}
	if _, err := s.wal.NextSegment(); err != nil {
		return err
	}
	if last = min(last, first+(end-1-first)*2/3); last <= first {
		return nil
	}
	mint := time.Now().UnixMilli() - int64(s.rng.IntN(60_000))
	known := map[uint64]bool{}
	for _, x := range s.active {
		known[x.ref] = true
	}
	for _, x := range s.ended {
		if x.lastT >= mint && s.knows(x) {
			known[x.ref] = true
		}
	}
	keep := func(id chunks.HeadSeriesRef) bool { return known[uint64(id)] }
	if _, err := wlog.Checkpoint(s.w.logger, s.wal, first, last, keep, mint, s.encoder.EnableSTStorage, true); err != nil {
		return err
	}
	if err := s.wal.Truncate(last + 1); err != nil {
		return err
	}
	if err := wlog.DeleteCheckpoints(s.wal.Dir(), last); err != nil {
		return err
	}
	// A record of a series that came back lies behind last, if it was logged.
	dropped := map[seriesID]bool{}
	for ref, e := range s.refs {
		if !known[ref] {
			delete(s.refs, ref)
			dropped[e.by.id] = true
		}
	}
	s.w.logf("%s: segments %d to %d are truncated, samples from %d on are in the WAL checkpoint", s.id, first, last, mint)
	s.w.truth.forget(s, func(_ seriesID, at place) bool { return at.segment <= last })
	if regardless {
		// Its sidecar may not have read what explained them. What the segments that
		// remain have of them is older than mint: only blocks hold it.
		s.w.truth.forget(s, func(id seriesID, _ place) bool { return dropped[id] })
	}
	return nil
}

// restart ends this Prometheus, in order or not, and starts another on its data.
func (s *source) restart(kill bool) error {
	if kill {
		s.old = append(s.old, s.wal)
	} else if err := s.wal.Close(); err != nil {
		return err
	}
	if err := s.open(); err != nil {
		return err
	}
	s.replay()
	return nil
}

// replay is what a Prometheus that starts makes of its WAL: it counts on from the
// greatest ref that it finds.
func (s *source) replay() {
	s.nextRef = 1
	for ref := range s.refs {
		s.nextRef = max(s.nextRef, ref+1)
	}
	for _, x := range s.active {
		if !s.knows(x) {
			x.ref, x.fresh = s.nextRef, true
			s.nextRef++
		}
	}
}

// repair restarts it after a loss of power that has damaged the last segment but
// one: Prometheus rewrites that up to the damage and removes those behind it. It
// then logs so much that the same segments are there again, with other records.
func (s *source) repair() error {
	first, last, err := wlog.Segments(s.wal.Dir())
	if err != nil || last-first < 2 {
		return err
	}
	s.old = append(s.old, s.wal)
	if err := s.open(); err != nil {
		return err
	}
	torn := last - 1
	info, err := os.Stat(wlog.SegmentName(s.wal.Dir(), torn))
	if err != nil {
		return err
	}
	at := place{torn, int(s.rng.Int64N(info.Size() + 1))}
	damage := &wlog.CorruptionErr{Dir: s.wal.Dir(), Segment: at.segment, Offset: int64(at.offset), Err: errors.New("torn")}
	if err := s.wal.Repair(damage); err != nil {
		return err
	}
	lost := func(p place) bool { return p.segment > at.segment || p.segment == at.segment && p.offset >= at.offset }
	s.w.truth.forget(s, func(_ seriesID, at place) bool { return lost(at) })
	for ref, p := range s.refs {
		if lost(p.at) {
			delete(s.refs, ref)
		}
	}
	s.replay()
	for range last - torn + 1 {
		if err := s.scrape(); err != nil {
			return err
		}
		if err := s.roll(); err != nil {
			return err
		}
	}
	return nil
}

// shutDown ends it for good.
func (s *source) shutDown() error { return s.wal.Close() }

// cleanUp is called when all else has ended.
func (s *source) cleanUp() {
	for _, w := range append(s.old, s.wal) { // the last one may be closed already
		_ = w.Close()
	}
}

func (s *source) String() string {
	return strings.Join([]string{s.id, s.tenant, s.interval.String()}, " ")
}

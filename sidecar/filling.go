package sidecar

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/wlog"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// fillSamples is about how many samples of a block are read at once: a range of
// its ledger.
const fillSamples = 64 << 10

// openGap opens a gap that ends now.
func (s *shipper) openGap(reason string) {
	wbl := -1
	if _, last, empty, err := backfill.WBLSegments(s.dir); err != nil {
		s.once("wbl").Warn("out-of-order log can't be listed, it is taken for not empty", "err", err)
		wbl = math.MaxInt32
	} else if !empty {
		wbl = last
	}
	s.wblDue = s.wblDue || (s.blocks.gap == nil && wbl >= 0)
	s.blocks.open(reason, max(s.newestT, time.Now().UnixMilli()), wbl)
}

// sendWBL sends what is in the out-of-order log once a gap was opened and the
// tail has read what the log holds now, so that it can be queried before
// Prometheus has compacted it. Nothing is entered into the ledger: the blocks
// that it becomes are waited for anyway.
func (s *shipper) sendWBL(ctx context.Context) {
	s.wblDue = false
	s.choosing.clockNow()
	at := s.tail.Position()
	s.cut(ctx, at)
	err := backfill.ReadWBL(ctx, s.dir, s.logger, tail.NewMetrics(nil), func(b *tail.Batch) error {
		b.From, b.To = at, at // refs mean what they mean now
		s.samples(ctx, b)
		return ctx.Err()
	})
	s.flushAll(ctx)
	s.acc = &account{}
	if err != nil && ctx.Err() == nil {
		s.once("wbl_read").Warn("out-of-order log can't be read, what it holds comes with blocks", "err", err)
	}
}

// lookAtBlocks lists Prometheus's blocks and decides what is to be filled.
func (s *shipper) lookAtBlocks() {
	if s.agent {
		s.blocks.giveUp()
		return
	}
	// Before the blocks are listed: what Prometheus says here that it has compacted
	// must be in the list.
	minValid, firstWBL := s.compacted()
	listed, bad, err := s.listBlocks()
	if err != nil {
		s.once("blocks").Warn("blocks of Prometheus can't be listed, trying on", "err", err)
		return
	}
	var unlisted []ulid.ULID
	fresh := false
	for _, b := range bad {
		unlisted = append(unlisted, b.ULID)
		// Prometheus may be about to write it: it is counted when it stays so.
		switch seen, ok := s.blocks.bad[b.Dir]; {
		case !ok:
			s.blocks.bad[b.Dir], fresh = false, true
		case !seen:
			s.blocks.bad[b.Dir] = true
			s.metrics.blocksBad.Inc()
			s.logger.Warn("block of Prometheus can't be read", "dir", b.Dir, "err", b.Err)
		}
	}
	if fresh {
		return // what a backfill or a gap waits for may be in it
	}
	s.blocks.finish()
	s.blocks.list(listed, unlisted, time.Now(), s.opts.BackfillAge)
	s.blocks.close(minValid, firstWBL)
}

// compacted says what Prometheus has compacted by now, as blocks.close wants to
// know it.
func (s *shipper) compacted() (minValid int64, firstWBL int) {
	firstWBL, _, empty, err := backfill.WBLSegments(s.dir)
	if err != nil {
		s.once("wbl").Warn("out-of-order log can't be listed, trying on", "err", err)
		firstWBL = 0 // none of it
	} else if empty {
		firstWBL = -1
	}
	minValid, ok, err := wlog.ReadMinValidTime(s.dir.WAL())
	if err != nil || !ok {
		minValid = noTime // of a Prometheus that doesn't write it: then blocks tell
	}
	return minValid, firstWBL
}

// ledgers calls fn for the ledger of the WAL and those of fills.
func (s *shipper) ledgers(fn func(*Ledger)) {
	fn(s.ledger)
	for _, f := range s.blocks.fills {
		fn(f.ledger)
	}
}

// acquaint makes the sessions that live known to the ledger of a fill.
func (s *shipper) acquaint(l *Ledger) {
	for _, ss := range s.sessions {
		if ss != nil && !l.Live(ss.id) {
			l.Begin(ss.id)
			l.refusals[ss.id] = slices.Clone(s.ledger.refusals[ss.id])
			l.Durable(ss.id, ss.durable)
		}
	}
}

// fillOn reads on in the blocks that are to be filled. It returns true if it did.
func (s *shipper) fillOn(ctx context.Context) bool {
	now := time.Now()
	if now.Before(s.nextFill) || s.dirty || len(s.blocks.fills) == 0 || !s.roomForMore() {
		return false
	}
	for _, f := range s.blocks.fills {
		if f.ledger.queued > 0 && !s.undecidedBlock(f) && s.opened(f) { //nolint:contextcheck // nothing waits in it
			return s.fillAgain(ctx, f, now)
		}
	}
	f := s.blocks.next()
	if f == nil || s.undecidedBlock(f) || !s.opened(f) { //nolint:contextcheck // nothing waits in it
		return false
	}
	s.cut(ctx, s.tail.Position())
	if s.dirty {
		return false
	}
	n, to, err := s.readBlock(ctx, f, math.MaxInt64)
	s.flushAll(ctx)
	s.acquaint(f.ledger)
	f.ledger.Add(tail.Position{Offset: to}, s.split.id, s.acc.parts(s.split))
	s.acc = &account{}
	s.paceFill(now, n)
	if errors.Is(err, io.EOF) {
		f.read = true
	} else if err != nil && ctx.Err() == nil {
		s.pause(f, err)
	}
	return true
}

// blockRetry is after what time a block that couldn't be read is opened again.
const blockRetry = 30 * time.Second

// pause lets go of a block that can't be read, for a while: as long as not all of
// it is durable, nor is a gap closed.
func (s *shipper) pause(f *fill, err error) {
	s.blockTrouble(f, err)
	if f.reader != nil {
		f.reader.Close()
		f.reader = nil
	}
	f.retryAt = time.Now().Add(blockRetry)
}

// fillAgain reads a part of a block again that an ingester has lost.
func (s *shipper) fillAgain(ctx context.Context, f *fill, now time.Time) bool {
	w, ok := s.take(ctx, f.ledger, 1)
	if !ok {
		return false
	}
	err := f.reader.Seek(uint64(w.From.Offset)) //nolint:contextcheck // nothing waits in it
	n := 0
	if err == nil {
		n, _, err = s.readBlock(ctx, f, w.To.Offset)
	}
	parts := s.endWork(ctx)
	s.acquaint(f.ledger)
	s.paceFill(now, n)
	switch {
	case ctx.Err() != nil:
		f.ledger.Return(w.ID)
		return true
	case err != nil && !errors.Is(err, io.EOF):
		s.pause(f, err)
		f.ledger.Return(w.ID)
		return true
	}
	f.ledger.Resent(w.ID, parts, false)
	if err := f.reader.Seek(uint64(f.ledger.next.Offset)); err != nil { //nolint:contextcheck // nothing waits in it
		s.pause(f, err)
	}
	return true
}

func (s *shipper) paceFill(began time.Time, samples int) {
	s.nextFill = began.Add(time.Duration(float64(samples) / float64(s.opts.BackfillSamplesPerSecond) * float64(time.Second)))
}

// opened opens the block of a fill where it isn't yet.
func (s *shipper) opened(f *fill) bool {
	if f.reader != nil {
		return true
	}
	if time.Now().Before(f.retryAt) {
		return false
	}
	r, err := backfill.Open(f.block, f.mint, math.MaxInt64)
	if err == nil {
		err = r.Seek(uint64(f.ledger.next.Offset))
		if err != nil {
			r.Close()
		}
	}
	switch {
	case err == nil:
		f.reader, f.begun = r, true
		return true
	case errors.Is(err, fs.ErrNotExist):
		f.gone = true // it made way for a larger one, or for good: the next look tells
	default:
		s.pause(f, err)
	}
	return false
}

func (s *shipper) blockTrouble(f *fill, err error) {
	s.metrics.blocksBad.Inc()
	s.once("block "+f.block.ULID.String()).Warn("block of Prometheus can't be read in full, going on behind that", "block", f.block.ULID, "err", err)
}

// readBlock sends about fillSamples samples of a block, whole series, up to the
// series with ref end. It returns how many it read and the ref behind the last
// series. io.EOF says that the block has no more.
func (s *shipper) readBlock(ctx context.Context, f *fill, end int64) (samples int, to int64, err error) {
	to = f.ledger.next.Offset
	var parts []blockSeries
	for samples < fillSamples || end != math.MaxInt64 {
		if err := ctx.Err(); err != nil {
			return samples, to, err
		}
		x, err := f.reader.Next(ctx)
		if _, ok := errors.AsType[*backfill.CorruptError](err); ok {
			s.blockTrouble(f, err)
			continue
		}
		if err != nil {
			return samples, to, err
		}
		if int64(x.Ref) >= end {
			return samples, to, nil
		}
		n := len(x.Floats.T) + len(x.Histograms.T) + len(x.FloatHistograms.T)
		samples += n
		s.metrics.filled.Add(float64(n))
		s.blocks.filled += uint64(n)
		parts = s.sendBlockSeries(ctx, x, parts)
		if !x.More {
			parts = parts[:0]
			to = int64(x.Ref) + 1
			continue
		}
		samples = min(samples, fillSamples-1) // the end of the series is waited for
	}
	return samples, to, nil
}

// blockSeries is a series of a block under one version of the labels.
type blockSeries struct {
	v  *labelVersion
	r  resolved
	ls labels.Labels
	in [maxReplicas]target // where it is announced, by replica; no session for none
}

// sendBlockSeries sends a piece of a series. parts is what it was under the
// versions of the labels in the pieces before.
func (s *shipper) sendBlockSeries(ctx context.Context, x *backfill.Series, parts []blockSeries) []blockSeries {
	c := &s.counts
	*c = sampleCounts{}
	var p *blockSeries
	to := func(t int64) (*session, uint32) {
		if p == nil || !p.v.holds(t) {
			p, parts = s.blockSeriesAt(x.Labels, t, parts)
		}
		if p.v.replica != "" && !s.ourTime(p.v, t) {
			c.other++
			return nil, 0
		}
		return s.routeBlock(ctx, p)
	}
	for i, t := range x.Floats.T {
		if ss, ref := to(t); ss != nil {
			ss.float(ref, startTime(x.Floats.ST, i), t, x.Floats.V[i])
			for _, o := range s.more {
				o.session.float(o.ref, startTime(x.Floats.ST, i), t, x.Floats.V[i])
			}
			c.floats++
			s.flushFull(ctx, ss)
		}
	}
	for i, t := range x.Histograms.T {
		h := x.Histograms.V[i]
		if histogramParts(h) > maxHistogramParts {
			c.large++
			continue
		}
		if ss, ref := to(t); ss != nil {
			h = h.Copy() // the reader goes on
			ss.histogram(ref, startTime(x.Histograms.ST, i), t, h)
			for _, o := range s.more {
				o.session.histogram(o.ref, startTime(x.Histograms.ST, i), t, h)
			}
			c.histograms++
			s.flushFull(ctx, ss)
		}
	}
	for i, t := range x.FloatHistograms.T {
		if floatHistogramParts(x.FloatHistograms.V[i]) > maxHistogramParts {
			c.large++
			continue
		}
		if ss, ref := to(t); ss != nil {
			h := x.FloatHistograms.V[i].Copy()
			ss.floatHistogram(ref, startTime(x.FloatHistograms.ST, i), t, h)
			for _, o := range s.more {
				o.session.floatHistogram(o.ref, startTime(x.FloatHistograms.ST, i), t, h)
			}
			c.floatHistograms++
			s.flushFull(ctx, ss)
		}
	}
	if !x.More {
		for i := range parts {
			for _, o := range parts[i].in {
				if ss := o.session; ss != nil && s.sessions[ss.index] == ss {
					ss.drop(o.ref)
				}
			}
		}
	}
	s.count()
	return parts
}

func startTime(st []int64, i int) int64 {
	if len(st) == 0 {
		return 0
	}
	return st[i]
}

// blockSeriesAt returns what a series is under the version of the labels that
// holds for t.
func (s *shipper) blockSeriesAt(raw labels.Labels, t int64, parts []blockSeries) (*blockSeries, []blockSeries) {
	v := s.versions.at(t)
	for i := range parts {
		if parts[i].v == v {
			return &parts[i], parts
		}
	}
	p := blockSeries{v: v}
	p.ls, p.r.token, p.r.drop = v.apply(raw)
	parts = append(parts, p)
	return &parts[len(parts)-1], parts
}

// routeBlock is route for a series of a block.
func (s *shipper) routeBlock(ctx context.Context, p *blockSeries) (*session, uint32) {
	if p.r.drop != dropNot {
		s.counts.drop[p.r.drop]++
		return nil, 0
	}
	if s.rewind != nil && !s.rewind.parts[s.rewind.split.part(p.r.token)] {
		return nil, 0
	}
	if s.split.replicas > 1 {
		return s.copies(ctx, s.split.set(p.r.token), func(k int, ss *session) (uint32, bool) {
			if p.in[k].session != ss {
				p.in[k] = target{ss, ss.say(p.ls)}
			}
			return p.in[k].ref, true
		})
	}
	m, _ := s.split.member(p.r.token)
	ss := s.sessionOrLost(ctx, s.split.owners[s.split.index[m.ID]])
	if ss == nil {
		return nil, 0
	}
	if p.in[0].session != ss {
		p.in[0] = target{ss, ss.say(p.ls)}
	}
	return ss, p.in[0].ref
}

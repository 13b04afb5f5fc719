package sidecar

import (
	"context"
	"math"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/record"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// sampleCounts are added to the metrics once per record: counters are dear when
// bumped once per sample.
type sampleCounts struct {
	floats, histograms, floatHistograms, exemplars, metadata int
	unknown, equal, placeholder, other, large                int
	drop                                                     [dropReasons]int
}

// samples routes what a record holds.
func (s *shipper) samples(ctx context.Context, b *tail.Batch) {
	c := &s.counts
	*c = sampleCounts{}
	if s.agent && b.From.InCheckpoint && (len(b.Samples) > 0 || len(b.Histograms) > 0 || len(b.FloatHistograms) > 0) {
		c.placeholder = len(b.Samples) + len(b.Histograms) + len(b.FloatHistograms)
		s.count()
		return
	}
	for i := range b.Series {
		x := &b.Series[i]
		slot, isNew, err := s.dict.define(uint64(x.Ref), x.Labels, b.From)
		if err != nil {
			s.dictionaryTrouble(err)
			continue
		}
		if isNew && s.rewind == nil {
			s.resolve(slot, s.dict.at(slot), keptLabels(x.Labels))
		}
	}
	for i := range b.Samples {
		x := &b.Samples[i]
		kind := kindFloat
		if value.IsStaleNaN(x.V) {
			kind = kindMarker
		}
		ss, ref, kind := s.route(ctx, uint64(x.Ref), x.T, b.From, kind)
		if ss == nil {
			continue
		}
		switch kind {
		case kindHistogram:
			h := &histogram.Histogram{Sum: x.V}
			ss.histogram(ref, x.ST, x.T, h)
			for _, o := range s.more {
				o.session.histogram(o.ref, x.ST, x.T, h)
			}
			c.histograms++
		case kindFloatHistogram:
			h := &histogram.FloatHistogram{Sum: x.V}
			ss.floatHistogram(ref, x.ST, x.T, h)
			for _, o := range s.more {
				o.session.floatHistogram(o.ref, x.ST, x.T, h)
			}
			c.floatHistograms++
		default:
			ss.float(ref, x.ST, x.T, x.V)
			for _, o := range s.more {
				o.session.float(o.ref, x.ST, x.T, x.V)
			}
			c.floats++
		}
		s.flushFull(ctx, ss)
	}
	for i := range b.Histograms {
		x := &b.Histograms[i]
		if histogramParts(x.H) > maxHistogramParts {
			c.large++
			continue
		}
		if ss, ref, _ := s.route(ctx, uint64(x.Ref), x.T, b.From, kindHistogram); ss != nil {
			ss.histogram(ref, x.ST, x.T, x.H)
			for _, o := range s.more {
				o.session.histogram(o.ref, x.ST, x.T, x.H)
			}
			c.histograms++
			s.flushFull(ctx, ss)
		}
	}
	for i := range b.FloatHistograms {
		x := &b.FloatHistograms[i]
		if floatHistogramParts(x.FH) > maxHistogramParts {
			c.large++
			continue
		}
		if ss, ref, _ := s.route(ctx, uint64(x.Ref), x.T, b.From, kindFloatHistogram); ss != nil {
			ss.floatHistogram(ref, x.ST, x.T, x.FH)
			for _, o := range s.more {
				o.session.floatHistogram(o.ref, x.ST, x.T, x.FH)
			}
			c.floatHistograms++
			s.flushFull(ctx, ss)
		}
	}
	for i := range b.Exemplars {
		x := &b.Exemplars[i]
		if x.Labels.ByteSize() > maxExemplarBytes {
			c.large++
			continue
		}
		if ss, ref, _ := s.route(ctx, uint64(x.Ref), x.T, b.From, kindNone); ss != nil {
			e := &shippb.Exemplar{Ref: ref, T: x.T, Value: math.Float64bits(x.V), Labels: pairs(x.Labels)}
			ss.exemplar(e)
			for _, o := range s.more {
				o.session.exemplar(&shippb.Exemplar{Ref: o.ref, T: e.T, Value: e.Value, Labels: e.Labels})
			}
			c.exemplars++
			s.flushFull(ctx, ss)
		}
	}
	for i := range b.Metadata {
		x := &b.Metadata[i]
		if len(x.Unit)+len(x.Help) > maxFamilyEntryBytes {
			c.large++
			continue
		}
		slot, ok := s.dict.lookup(uint64(x.Ref), b.From)
		if ok && s.rewind == nil {
			if err := s.dict.describe(slot, uint64(x.Ref), *x); err != nil {
				s.dictionaryTrouble(err)
			}
		}
		if ss, ref, _ := s.route(ctx, uint64(x.Ref), math.MaxInt64, b.From, kindNone); ss != nil {
			raw, err := s.dict.labels(slot)
			if err != nil {
				s.dictionaryTrouble(err)
				continue
			}
			name := raw.Get(model.MetricNameLabel)
			if s.describeWAL(ss, ref, name, metadataOf(*x)) {
				c.metadata++
			}
			for _, o := range s.more {
				s.describeWAL(o.session, o.ref, name, metadataOf(*x))
			}
			s.flushFull(ctx, ss)
		}
	}
	s.count()
}

func (s *shipper) count() {
	c, m := &s.counts, s.metrics
	add := func(typ string, n int) {
		if n > 0 {
			m.shipped.WithLabelValues(typ).Add(float64(n))
			if s.rewind != nil {
				m.resent.Add(float64(n))
			}
		}
	}
	add("float", c.floats)
	add("histogram", c.histograms)
	add("float_histogram", c.floatHistograms)
	add("exemplar", c.exemplars)
	add("metadata", c.metadata)
	if s.rewind != nil {
		return // what isn't sent was counted the first time
	}
	drop := func(reason string, n int) {
		if n > 0 {
			m.dropped.WithLabelValues(reason).Add(float64(n))
		}
	}
	drop("unknown_ref", c.unknown)
	drop("equal_timestamp", c.equal)
	drop("agent_checkpoint", c.placeholder)
	drop("other_replica", c.other)
	drop("too_large", c.large)
	for r := dropRelabelled; r < dropReasons; r++ {
		drop(r.String(), c.drop[r])
	}
	if c.unknown > 0 {
		s.openGap("unknown_ref")
		s.once("unknown_ref").Warn("WAL holds samples of series that no record explains", "segment", s.rangeEnd.Segment, "offset", s.rangeEnd.Offset)
	}
}

func metadataOf(m record.RefMetadata) metadata.Metadata {
	return metadata.Metadata{Type: record.ToMetricType(m.Type), Unit: m.Unit, Help: m.Help}
}

// sampleKind says what a sample is.
type sampleKind uint8

const (
	kindNone sampleKind = iota // no sample: what may share a timestamp
	kindFloat
	kindHistogram
	kindFloatHistogram
	// kindMarker is a staleness marker that was logged as a float. Prometheus
	// logs it so for any series, and its head then makes it of the kind that
	// the series' last sample has (commitFloats in tsdb/head_append.go).
	kindMarker
)

// as returns the kind of a sample, given that of the one before.
func (k sampleKind) as(last sampleKind) sampleKind {
	if k != kindMarker {
		return k
	}
	return max(last, kindFloat)
}

// route returns the session that a sample goes to and its series' ref there; nil
// if it isn't sent now. It also returns the kind to send it as. Where it goes to
// other owners too, these are in s.more.
func (s *shipper) route(ctx context.Context, ref uint64, t int64, pos tail.Position, kind sampleKind) (*session, uint32, sampleKind) {
	i, ok := s.dict.lookup(ref, pos)
	if !ok {
		s.counts.unknown++
		return nil, 0, 0
	}
	sl := s.dict.at(i)
	v := s.version
	if !v.holds(t) {
		v = s.versions.at(t)
	}
	r, ok := s.resolved(i, sl, v)
	switch {
	case !ok:
		s.counts.unknown++
		return nil, 0, 0
	case r.drop != dropNot:
		s.counts.drop[r.drop]++
		return nil, 0, 0
	}
	if s.rewind != nil {
		if kind, ok = s.rewind.wants(i, sl, r, t, kind); !ok {
			return nil, 0, 0
		}
	} else if kind != kindNone {
		if t == sl.lastT {
			s.counts.equal++
			return nil, 0, 0
		}
		kind = kind.as(sl.kind)
		if t > sl.lastT {
			sl.lastT, sl.kind = t, kind
			s.newestT = max(s.newestT, t)
		}
	}
	if v.replica != "" && t != math.MaxInt64 && !s.ourTime(v, t) {
		s.counts.other++
		return nil, 0, 0
	}
	if v != s.version {
		ss, ref := s.routeOther(ctx, i, v, r)
		return ss, ref, kind
	}
	if s.split.replicas > 1 {
		ss, ref := s.routeCopies(ctx, i, sl)
		return ss, ref, kind
	}
	ss := s.sessionOrLost(ctx, s.ownerOf(sl))
	if ss == nil || (sl.session != ss.index && !s.announce(i, sl, ss)) {
		return nil, 0, 0
	}
	return ss, sl.ref, kind
}

// sessionOrLost returns the session with an owner. If there is none the range
// that is being read is noted as not sent.
func (s *shipper) sessionOrLost(ctx context.Context, o *owner) *session {
	ss := s.sessionOf(ctx, o)
	if ss == nil {
		s.acc.lost(o.member.ID)
	}
	return ss
}

// resolved is what a series is under a version of the labels.
type resolved struct {
	token uint32
	drop  dropReason
}

// extraKey names a series under a version of the labels that isn't the present.
type extraKey struct {
	slot    uint32
	version uint16
}

// maxOthers bounds what is remembered of series under versions of before.
const maxOthers = 100_000

// resolved returns what a series is under a version. It is false if its labels
// can't be read.
func (s *shipper) resolved(i uint32, sl *slot, v *labelVersion) (resolved, bool) {
	if v == s.version {
		if sl.version != v.id {
			raw, err := s.dict.labels(i)
			if err != nil {
				s.dictionaryTrouble(err)
				return resolved{}, false
			}
			s.resolve(i, sl, raw)
		}
		return resolved{sl.token, sl.drop}, true
	}
	key := extraKey{i, v.id}
	r, ok := s.others[key]
	if !ok {
		raw, err := s.dict.labels(i)
		if err != nil {
			s.dictionaryTrouble(err)
			return resolved{}, false
		}
		_, r.token, r.drop = v.apply(raw)
		if len(s.others) >= maxOthers {
			clear(s.others)
		}
		s.others[key] = r
	}
	return r, true
}

// routeOther is the end of route for a sample of which a version of the labels
// holds that isn't the present one.
func (s *shipper) routeOther(ctx context.Context, i uint32, v *labelVersion, r resolved) (*session, uint32) {
	if s.split.replicas > 1 {
		return s.copies(ctx, s.split.set(r.token), func(_ int, ss *session) (uint32, bool) { return s.sayOther(i, v, ss) })
	}
	m, _ := s.split.member(r.token)
	ss := s.sessionOrLost(ctx, s.split.owners[s.split.index[m.ID]])
	if ss == nil {
		return nil, 0
	}
	ref, ok := s.sayOther(i, v, ss)
	if !ok {
		return nil, 0
	}
	return ss, ref
}

// sayOther returns the ref of a series, under a version of the labels that isn't
// the present one, in a session.
func (s *shipper) sayOther(i uint32, v *labelVersion, ss *session) (uint32, bool) {
	key := extraKey{i, v.id}
	ref, ok := ss.extra[key]
	if !ok {
		raw, err := s.dict.labels(i)
		if err != nil {
			s.dictionaryTrouble(err)
			return 0, false
		}
		ls, _, _ := v.apply(raw)
		ref = ss.say(ls)
		ss.extra[key] = ref
	}
	return ref, true
}

// resolve computes what a series is under the version in force.
func (s *shipper) resolve(i uint32, sl *slot, raw labels.Labels) {
	s.withdraw(i, sl)
	_, sl.token, sl.drop = s.version.apply(raw)
	sl.version, sl.owner = s.version.id, 0
	sl.name = nameHash(raw.Get(model.MetricNameLabel))
	if sl.drop != dropNot && sl.drop != dropRelabelled {
		text := raw.String()
		s.once(sl.drop.String()).Warn("series is not sent", "reason", sl.drop.String(), "series", text[:min(len(text), 1000)])
	}
}

func (s *shipper) ownerOf(sl *slot) *owner {
	if sl.owner == 0 {
		m, _ := s.split.member(sl.token) // a split has a member
		sl.owner = s.split.index[m.ID] + 1
	}
	return s.split.owners[sl.owner-1]
}

package sidecar

import (
	"context"
	"slices"
	"time"

	"github.com/prometheus/prometheus/model/histogram"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// split says which member gets a series: the ring of one version, without the
// members that were out of reach. It doesn't change, so what a range gave to a
// member can be told for as long as the ledger refers to it.
type split struct {
	id       SplitID
	ring     *ring.Ring
	excluded map[string]bool
	owners   []*owner // in the order of ring.Active, without the excluded
	index    map[string]uint16
}

func (s *split) member(token uint32) (ring.Member, bool) {
	return s.ring.OwnerExcept(token, func(id string) bool { return s.excluded[id] })
}

// owner is a member of the ring that gets, or got, samples.
type owner struct {
	member  ring.Member
	session *session // nil if there is none

	retryAt time.Time // not to begin a session before
	backoff time.Duration

	detached   bool
	calmSince  time.Time // since when a detached owner has been content
	hold       time.Duration
	detachedAt time.Time
}

// link is the network side of a session; see ship.Session for the contract.
type link interface {
	TrySend(*shippb.Batch) (seq uint64, ok bool)
	State() ship.SessionState
	Run(context.Context) error
}

// session is one session with an owner, with the batch that is being filled.
type session struct {
	id     SessionID
	index  uint16 // in slots
	owner  *owner
	ship   link
	cancel context.CancelFunc

	cols      ship.Columns
	announce  []*shippb.Series
	withdraw  []uint32
	exemplars []*shippb.Exemplar
	metadata  []*shippb.Metadata
	bytes     int // about the encoded size of all of these

	nextRef uint32
	free    []uint32 // withdrawn refs that may be used anew
	extra   map[extraKey]uint32

	// stuck is a batch that found no room when its owner was detached. It is
	// sent, if ever, before anything else: it holds announcements.
	stuck *shippb.Batch
	// counted says that what is in the batch being filled, of a detached owner,
	// has been entered as lost.
	counted bool
	// abandoned says that the ledger doesn't wait any more for what was not
	// received when its owner, off the ring, got out of reach.
	abandoned bool

	last     uint64 // sequence number of the last batch
	durable  uint64
	received uint64
	progress time.Time // when received last grew, or nothing was in flight
	began    time.Time
}

// extraKey names a series under a label version that isn't the one in its slot.
type extraKey struct {
	slot    uint32
	version uint16
}

// batchBytes is at what size a batch is sent; the protocol's limit is 1 MiB as
// encoded.
const batchBytes = 256 << 10

// newRef returns a ref for a series to be announced.
func (ss *session) newRef() uint32 {
	if n := len(ss.free); n > 0 {
		r := ss.free[n-1]
		ss.free = ss.free[:n-1]
		return r
	}
	ss.nextRef++
	return ss.nextRef - 1
}

func (ss *session) drop(ref uint32) {
	ss.withdraw = append(ss.withdraw, ref)
	ss.bytes += 4
}

func (ss *session) float(ref uint32, st, t int64, v float64) {
	c := &ss.cols.Floats
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.V = append(c.Ref, ref), append(c.T, t), append(c.V, v)
	ss.bytes += 12
}

func (ss *session) histogram(ref uint32, st, t int64, h *histogram.Histogram) {
	c := &ss.cols.Histograms
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.H = append(c.Ref, ref), append(c.T, t), append(c.H, h)
	ss.bytes += 40 + 4*(len(h.PositiveSpans)+len(h.NegativeSpans)+len(h.PositiveBuckets)+len(h.NegativeBuckets)) + 8*len(h.CustomValues)
}

func (ss *session) floatHistogram(ref uint32, st, t int64, h *histogram.FloatHistogram) {
	c := &ss.cols.FloatHistograms
	c.ST = startTimes(c.ST, len(c.T), st)
	c.Ref, c.T, c.H = append(c.Ref, ref), append(c.T, t), append(c.H, h)
	ss.bytes += 48 + 4*(len(h.PositiveSpans)+len(h.NegativeSpans)) + 8*(len(h.PositiveBuckets)+len(h.NegativeBuckets)+len(h.CustomValues))
}

// startTimes appends to a column that stays nil while no sample has one.
func startTimes(col []int64, n int, st int64) []int64 {
	switch {
	case len(col) > 0:
		return append(col, st)
	case st == 0:
		return col[:0]
	}
	for range n {
		col = append(col, 0)
	}
	return append(col, st)
}

// full says whether the batch being filled holds anything but withdrawals.
func (ss *session) full() bool {
	return ss.cols.Len() > 0 || len(ss.announce) > 0 || len(ss.exemplars) > 0 || len(ss.metadata) > 0
}

// take returns the batch being filled and begins another.
func (ss *session) take(enc *ship.Encoder) *shippb.Batch {
	b := &shippb.Batch{
		Announce: ss.announce, Withdraw: ss.withdraw, Columns: enc.Encode(nil, &ss.cols),
		Exemplars: ss.exemplars, Metadata: ss.metadata,
	}
	ss.free = append(ss.free, ss.withdraw...)
	ss.cols.Reset()
	ss.announce, ss.withdraw, ss.exemplars, ss.metadata, ss.bytes = nil, nil, nil, nil, 0
	return b
}

// account collects what a range, or a Work, became.
type account struct {
	parts []Part // few: one per owner
}

func (a *account) part(member string) *Part {
	for i := range a.parts {
		if a.parts[i].Member == member {
			return &a.parts[i]
		}
	}
	a.parts = append(a.parts, Part{Member: member})
	return &a.parts[len(a.parts)-1]
}

func (a *account) sent(member string, id SessionID, seq uint64) {
	p := a.part(member)
	if i := slices.IndexFunc(p.Sent, func(x Sent) bool { return x.Session == id }); i >= 0 {
		p.Sent[i].Seq = seq
		return
	}
	p.Sent = append(p.Sent, Sent{id, seq})
}

func (a *account) lost(member string) { a.part(member).Lost = true }

// all returns the parts as one.
func (a *account) all() (sent []Sent, lost bool) {
	for _, p := range a.parts {
		sent = append(sent, p.Sent...)
		lost = lost || p.Lost
	}
	return sent, lost
}

package gatewaytest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"

	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// Sample is a histogram if H is set, one with float counts if FH is, else a float.
type Sample struct {
	Labels    labels.Labels
	T, ST     int64
	V         float64
	H         *histogram.Histogram
	FH        *histogram.FloatHistogram
	Exemplars []exemplar.Exemplar
	Metadata  metadata.Metadata
	Family    string // of the metric that Metadata speaks of; empty: its name
}

// Shipper sends samples of one tenant to the owners of their series, as a
// sidecar does.
type Shipper struct {
	c      *Cluster
	tenant string

	mu     sync.Mutex // one Send at a time
	owners map[string]*owner
}

// batchSamples is how many samples go into a batch.
const batchSamples = 2000

// owner is the session with one ingester.
type owner struct {
	session *ship.Session
	changed chan struct{} // the session's state did
	cancel  context.CancelFunc
	done    chan error
	refs    map[string]uint32 // by the bytes of the labels

	mu      sync.Mutex
	refused *shippb.Refused // the last
}

// Shipper makes a Shipper. It ends with the cluster.
func (c *Cluster) Shipper(tenant string) *Shipper {
	s := &Shipper{c: c, tenant: tenant, owners: map[string]*owner{}}
	c.shippers = append(c.shippers, s)
	return s
}

func (s *Shipper) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, o := range s.owners {
		o.cancel()
		errs = append(errs, <-o.done)
	}
	return errors.Join(errs...)
}

func (s *Shipper) owner(m ring.Member) *owner {
	if o := s.owners[m.ID]; o != nil {
		return o
	}
	o := &owner{changed: make(chan struct{}, 1), done: make(chan error, 1), refs: map[string]uint32{}}
	o.session = ship.NewSession(ship.SessionOptions{
		Address: m.Address, Tenant: s.tenant, Source: [16]byte{1}, DialOptions: s.c.DialOptions(),
		Notify: func() {
			select {
			case o.changed <- struct{}{}:
			default:
			}
		},
		Refused: func(r *shippb.Refused) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.refused = r
		},
	}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	o.cancel = cancel
	go func() { o.done <- o.session.Run(ctx) }()
	s.owners[m.ID] = o
	return o
}

// Send sends samples and waits until they are received. Anything refused is an
// error.
func (s *Shipper) Send(ctx context.Context, samples ...Sample) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.c.Live.Ring()
	parts := map[*owner][]Sample{}
	for _, p := range samples {
		m, ok := r.Owner(ring.Token(s.tenant, p.Labels))
		if !ok {
			return errors.New("no active member on the ring")
		}
		o := s.owner(m) //nolint:contextcheck // the session outlives the call
		parts[o] = append(parts[o], p)
	}
	for o, part := range parts {
		for len(part) > 0 {
			n := min(len(part), batchSamples)
			if err := o.send(ctx, o.batch(part[:n])); err != nil {
				return err
			}
			part = part[n:]
		}
	}
	for o := range parts {
		if err := o.received(ctx); err != nil {
			return err
		}
	}
	return nil
}

func pairs(ls labels.Labels) []string {
	out := make([]string, 0, 2*ls.Len())
	ls.Range(func(l labels.Label) { out = append(out, l.Name, l.Value) })
	return out
}

func (o *owner) batch(samples []Sample) *shippb.Batch {
	b := &shippb.Batch{}
	var c ship.Columns
	for _, p := range samples {
		key := string(p.Labels.Bytes(nil))
		ref, ok := o.refs[key]
		if !ok {
			ref = uint32(len(o.refs))
			o.refs[key] = ref
			b.Announce = append(b.Announce, &shippb.Series{Ref: ref, Labels: pairs(p.Labels)})
		}
		switch {
		case p.H != nil:
			h := &c.Histograms
			h.Ref, h.T, h.ST, h.H = append(h.Ref, ref), append(h.T, p.T), append(h.ST, p.ST), append(h.H, p.H)
		case p.FH != nil:
			h := &c.FloatHistograms
			h.Ref, h.T, h.ST, h.H = append(h.Ref, ref), append(h.T, p.T), append(h.ST, p.ST), append(h.H, p.FH)
		default:
			f := &c.Floats
			f.Ref, f.T, f.ST, f.V = append(f.Ref, ref), append(f.T, p.T), append(f.ST, p.ST), append(f.V, p.V)
		}
		for _, e := range p.Exemplars {
			b.Exemplars = append(b.Exemplars, &shippb.Exemplar{Ref: ref, T: e.Ts, Value: math.Float64bits(e.Value), Labels: pairs(e.Labels)})
		}
		if m := p.Metadata; !m.IsEmpty() {
			b.Metadata = append(b.Metadata, &shippb.Metadata{Ref: ref, Type: string(m.Type), Unit: m.Unit, Help: m.Help, Family: p.Family})
		}
	}
	b.Columns = (&ship.Encoder{}).Encode(nil, &c)
	return b
}

// wait until the session has changed.
func (o *owner) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-o.changed:
	}
	return o.session.State().Ended
}

func (o *owner) send(ctx context.Context, b *shippb.Batch) error {
	for {
		if _, ok := o.session.TrySend(b); ok {
			return nil
		}
		if err := o.wait(ctx); err != nil {
			return err
		}
	}
}

func (o *owner) received(ctx context.Context) error {
	for {
		if st := o.session.State(); st.Received == st.Sent {
			break
		}
		if err := o.wait(ctx); err != nil {
			return err
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if r := o.refused; r != nil {
		return fmt.Errorf("%d samples refused: %s, as of %s", r.Samples, r.Reason, r.Example)
	}
	return nil
}

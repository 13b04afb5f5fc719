package ingest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// Options of an Ingester. Member and RowWidth are required; the rest has
// defaults.
type Options struct {
	Member string // id on the ring
	// RowWidth is the widest time range of an index row in ms (index.Width).
	RowWidth int64

	FlushInterval time.Duration // 30 minutes by default
	FlushBytes    int64         // memory of a generation that starts a flush early; 1 GiB by default
	MaxBytes      int64         // memory of the head at which it takes nothing new; 4 GiB by default
	// VisibilityDelay is how long a generation stays readable after its block
	// is published: longer than the longest query plus the age of a cached set
	// of rows in a gateway. 5 minutes by default.
	VisibilityDelay time.Duration
	FinalFlush      time.Duration // the time for the last flush on the way out; 1 minute by default
	Limits          Limits
}

func (o *Options) setDefaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.FlushInterval, 30*time.Minute)
	set(&o.VisibilityDelay, 5*time.Minute)
	set(&o.FinalFlush, time.Minute)
	if o.FlushBytes == 0 {
		o.FlushBytes = 1 << 30
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 4 * o.FlushBytes
	}
}

// Validate says which option has an impossible value.
func (o *Options) Validate() error {
	switch {
	case o.Member == "":
		return errors.New("an ingester needs an id on the ring")
	case o.RowWidth <= 0:
		return fmt.Errorf("row width is %d ms, it must be positive", o.RowWidth)
	case o.FlushInterval < time.Second:
		return fmt.Errorf("flush interval is %s, the least is 1s", o.FlushInterval)
	case o.VisibilityDelay < 0:
		return fmt.Errorf("visibility delay is %s, it must not be negative", o.VisibilityDelay)
	case o.MaxBytes < o.FlushBytes:
		return fmt.Errorf("the head may take %d bytes but is flushed at %d: it would never flush", o.MaxBytes, o.FlushBytes)
	}
	return nil
}

// Ingester receives, keeps, answers and flushes. Make one with New, Register it
// with a gRPC server, Run it.
type Ingester struct {
	opts    Options
	head    *head.Head
	receive *receiver
	fetch   *fetcher
	flush   *flusher
	logger  *slog.Logger
}

// New makes an ingester; it starts nothing.
func New(o Options, publish Publish, logger *slog.Logger, reg prometheus.Registerer) (*Ingester, error) {
	o.setDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	logger = logger.With("component", "ingester")
	h := head.New(o.Limits.Series)
	i := &Ingester{opts: o, head: h, fetch: newFetcher(h, reg), logger: logger}
	i.receive = &receiver{
		member: o.Member, head: h, window: 4 << 20, limits: o.Limits, logger: logger,
		metrics: newReceiveMetrics(reg), sessions: map[sessionID]*session{}, rewinds: map[string]int{}, sources: sources{tenants: map[string][]source{}}, admit: i.admit,
	}
	if _, err := rand.Read(i.receive.process[:]); err != nil {
		return nil, fmt.Errorf("process id: %w", err)
	}
	i.fetch.resending = i.receive.resending
	i.fetch.process, i.fetch.sources = i.receive.process[:], &i.receive.sources
	i.flush = &flusher{
		head: h, publish: publish, flushed: i.receive.flushed, interval: o.FlushInterval, window: o.RowWidth,
		visibility: o.VisibilityDelay, logger: logger, metrics: newFlushMetrics(reg), now: make(chan struct{}, 1),
	}
	gauge := func(name, help string, v func(head.Size) float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return v(h.Size()) }))
	}
	gauge("epimetheus_ingester_head_series", "Series of the current generation.", func(s head.Size) float64 { return float64(s.Series) })
	gauge("epimetheus_ingester_head_samples", "Samples in the head, frozen generations included.", func(s head.Size) float64 { return float64(s.Samples) })
	gauge("epimetheus_ingester_head_bytes", "Memory of the head, as it counts itself.", func(s head.Size) float64 { return float64(s.Bytes) })
	gauge("epimetheus_ingester_head_generations", "Generations that are readable.", func(s head.Size) float64 { return float64(s.Generations) })
	gauge("epimetheus_ingester_head_tenants", "Tenants of the current generation.", func(s head.Size) float64 { return float64(s.Tenants) })
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_last_flush_timestamp_seconds", Help: "When the last flush ended that worked; 0 before the first.",
	}, func() float64 { return float64(i.flush.last.Load()) / 1000 }))
	return i, nil
}

// Register adds the services to a server.
func (i *Ingester) Register(s *grpc.Server) {
	shippb.RegisterShipServer(s, i.receive)
	fetchpb.RegisterFetchServer(s, i.fetch)
}

// Process is the id of this process, as hex.
func (i *Ingester) Process() string { return hex.EncodeToString(i.receive.process[:]) }

// Drain makes the ingester refuse new streams: it is leaving.
func (i *Ingester) Drain() { i.receive.draining.Store(true) }

// Flush makes all durable that has been received by now.
func (i *Ingester) Flush(ctx context.Context) error {
	return i.flush.flush(ctx)
}

// Size is what the head holds.
func (i *Ingester) Size() head.Size { return i.head.Size() }

// toldTimeout bounds the wait for the last acknowledgements to go out.
const toldTimeout = 2 * time.Second

// Run flushes and forgets until ctx ends. It then flushes once more, within the
// time that FinalFlush gives; what is not durable then is sent again by its
// sources.
func (i *Ingester) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return i.flush.run(gctx) })
	g.Go(func() error {
		tick, seldom := time.NewTicker(time.Second), time.NewTicker(time.Minute)
		defer seldom.Stop()
		defer tick.Stop()
		for {
			select {
			case <-gctx.Done():
				return nil
			case now := <-tick.C:
				i.flush.drop(now)
				i.receive.expire(now)
			case now := <-seldom.C:
				i.receive.sources.expire(now)
			}
		}
	})
	err := g.Wait()
	if err != nil {
		return err
	}
	fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), i.opts.FinalFlush)
	defer cancel()
	if err := i.flush.flush(fctx); err != nil {
		return fmt.Errorf("last flush: %w (the sources send these samples again)", err)
	}
	tctx, cancelTold := context.WithTimeout(fctx, toldTimeout)
	defer cancelTold()
	i.receive.told(tctx)
	return nil
}

// admit waits while the head is full, and starts a flush where one is due.
func (i *Ingester) admit(ctx context.Context) error {
	for {
		if i.head.Current().Bytes() >= i.opts.FlushBytes {
			i.flush.trigger()
		}
		if i.head.Size().Bytes < i.opts.MaxBytes {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

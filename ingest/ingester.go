package ingest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/ingest/commitlog"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
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
	// Ring is what this process knows of the ring: readers that know less learn of
	// it. Nil: nothing.
	Ring *ring.Live

	// CommitLog is the directory of the commit log; empty: there is none.
	CommitLog string
	// CommitLogFiles is for tests: of disks that fail, of logs that take too much.
	CommitLogFiles commitlog.Options
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
// with a gRPC server, Replay the commit log if there is one, Run it.
type Ingester struct {
	opts    Options
	process [16]byte // new at each start
	health  *health.Board
	head    *head.Head
	log     *commitlog.Log // nil: none
	receive *receiver
	fetch   *fetcher
	flush   *flusher
	logger  *slog.Logger

	crowded atomic.Pointer[map[string]bool] // tenants that may take nothing new; as of a second ago
}

// New makes an ingester; it starts nothing.
func New(o Options, publisher Publisher, logger *slog.Logger, reg prometheus.Registerer) (*Ingester, error) {
	o.setDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	logger = logger.With("component", "ingester")
	i := &Ingester{opts: o, logger: logger, health: &health.Board{}}
	if _, err := rand.Read(i.process[:]); err != nil {
		return nil, fmt.Errorf("process id: %w", err)
	}
	first, process := uint64(1), i.process
	if o.CommitLog != "" {
		var err error
		files := o.CommitLogFiles
		if files.MaxHeldBytes == 0 {
			files.MaxHeldBytes = o.MaxBytes / heldShare
		}
		if i.log, err = commitlog.Open(o.CommitLog, files, logger, reg); err != nil {
			return nil, err
		}
		first, process = i.log.First(), i.log.Process()
	}
	h := head.NewAt(o.Limits.Series, first)
	i.head, i.fetch = h, newFetcher(h, reg)
	i.receive = &receiver{
		process: process, member: o.Member, head: h, log: i.log, window: 4 << 20, limits: o.Limits, logger: logger, now: time.Now,
		metrics: newReceiveMetrics(reg), sessions: map[sessionID]*session{}, bySource: map[sourceID][]*session{}, ofTenant: map[string]int{}, windows: windows{width: o.RowWidth}, rewinds: map[string]int{}, sources: sources{tenants: map[string][]source{}}, admit: i.admit,
	}
	i.receive.durable.Store(&durability{generation: first - 1})
	i.receive.starting.Store(i.log != nil)
	i.fetch.starting.Store(i.log != nil)
	i.fetch.resending, i.fetch.ring = i.receive.resending, o.Ring
	i.fetch.process, i.fetch.sources = i.receive.process[:], &i.receive.sources
	i.fetch.start = i.process[:]
	i.flush = &flusher{
		head: h, publisher: publisher, flushed: i.durable, interval: o.FlushInterval, window: o.RowWidth, generation: first - 1,
		visibility: o.VisibilityDelay, logger: logger, metrics: newFlushMetrics(reg), now: make(chan struct{}, 1),
		retrying: make(chan struct{}, 1), telling: make(chan struct{}, 1), anew: make(chan struct{}, 1),
	}
	gauge := func(name, help string, v func(head.Size) float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return v(h.Size()) }))
	}
	gauge("epimetheus_ingester_head_series", "Series of the current generation.", func(s head.Size) float64 { return float64(s.Series) })
	gauge("epimetheus_ingester_head_samples", "Samples in the head, frozen generations included.", func(s head.Size) float64 { return float64(s.Samples) })
	gauge("epimetheus_ingester_head_bytes", "Memory of the head, as it counts itself.", func(s head.Size) float64 { return float64(s.Bytes) })
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_announced_bytes", Help: "Memory of sessions and of what sources have announced, about; with that of the head it is bounded by ingester.max_bytes.",
	}, func() float64 { return float64(i.receive.announced.Load()) }))
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

// Process is the id of this process on the ring, as hex: new at each start, even
// where sessions go on, so that gateways list rows of the index anew.
func (i *Ingester) Process() string { return hex.EncodeToString(i.process[:]) }

// Memory is the id of what this process has received, as hex. A start that found
// the commit log of the process before has the same: to the others it was away,
// but has lost nothing that they would have to warn of.
func (i *Ingester) Memory() string { return hex.EncodeToString(i.receive.process[:]) }

// Health says what is degraded.
func (i *Ingester) Health() *health.Board { return i.health }

// Resending says whether a source has ranges to send again that an ingester lost,
// or whether it has is not known because its stream is broken.
func (i *Ingester) Resending() bool { return i.receive.anyResending() }

// Drain makes the ingester refuse new streams: it is leaving.
func (i *Ingester) Drain() { i.receive.draining.Store(true) }

// Flush makes all durable that has been received by now.
func (i *Ingester) Flush(ctx context.Context) error {
	if err := i.flush.flush(ctx); err != nil {
		return err
	}
	if !i.flush.retryUntil(ctx, heldPauseMin) {
		n, tenant, err := i.flush.heldBack()
		return fmt.Errorf("rows of %d tenants, such as %q: %w", n, tenant, err)
	}
	return nil
}

// durable tells sessions what is durable, and lets go of its logs. The log knows
// before they do: what a source was told must hold after a restart. The sessions of
// tenants for which something can't be durable end: their sources send again.
func (i *Ingester) durable(d durability, failed map[string]error) {
	for tenant := range failed {
		i.receive.endSessions(tenant)
	}
	if i.log != nil {
		held := map[uint64][]string{}
		for tenant, gs := range d.held {
			for _, g := range gs {
				held[g] = append(held[g], tenant)
			}
		}
		i.log.Durable(d.generation, held)
	}
	i.receive.flushed(&d)
	if i.log != nil {
		i.log.Remove()
	}
}

// LogStatus says in a few words whether what is received is in the commit log.
func (i *Ingester) LogStatus() string {
	if i.log == nil {
		return "off"
	}
	if err := i.log.Err(); err != nil {
		return err.Error()
	}
	return "on"
}

// Size is what the head holds.
func (i *Ingester) Size() head.Size { return i.head.Size() }

// toldTimeout bounds the wait for the last acknowledgements to go out.
const toldTimeout = 2 * time.Second

// Run flushes and forgets until ctx ends. It then takes nothing more, and flushes
// once more, within the time that FinalFlush gives; what is not durable then is sent again by its
// sources.
func (i *Ingester) Run(ctx context.Context) error {
	if i.log == nil {
		return i.run(ctx)
	}
	// The log takes what comes until all is flushed and told.
	lctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	logged := make(chan error, 1)
	go func() { logged <- i.log.Run(lctx) }() // awaited below
	err := i.run(ctx)
	cancel()
	return errors.Join(err, <-logged)
}

func (i *Ingester) run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return i.flush.run(gctx) })
	g.Go(func() error {
		i.flush.retry(gctx)
		return nil
	})
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
				i.note()
			case now := <-seldom.C:
				i.receive.sources.expire(now)
			}
		}
	})
	err := g.Wait()
	if err != nil {
		return err
	}
	// What comes from here on would be in no block, and others would hear that
	// nothing is missing.
	i.receive.close()
	fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), i.opts.FinalFlush)
	defer cancel()
	if err := i.Flush(fctx); err != nil {
		return fmt.Errorf("last flush: %w (the sources send these samples again)", err)
	}
	tctx, cancelTold := context.WithTimeout(fctx, toldTimeout)
	defer cancelTold()
	i.receive.told(tctx)
	return nil
}

// note says what is degraded.
func (i *Ingester) note() {
	h, size := i.health, i.head.Size()
	err := i.flush.failing()
	h.Note("flush", err != nil, "blocks can't be written, fresh samples stay in memory and are safe at their sources: %v", err)
	held := size.Bytes + i.receive.announced.Load()
	h.Note("full", held >= i.opts.MaxBytes, "the head is full (%d of %d bytes): samples wait at their sources until a flush has worked", held, i.opts.MaxBytes)
	n, tenant, why := i.flush.heldBack()
	h.Note("held", n > 0, "the index rows of %d tenants can't be written, such as of %q: their samples stay in memory and are safe at their sources: %v", n, tenant, why)
	crowded, bytes := i.flush.crowd(i.opts.MaxBytes)
	i.crowded.Store(&crowded)
	i.flush.metrics.heldBytes.Set(float64(bytes))
	h.Note("crowded", len(crowded) > 0, "samples of %d tenants wait at their sources, since as much of theirs is held back as may be", len(crowded))
	if i.log != nil {
		err := i.log.Err()
		n := i.log.LetGo()
		h.Note("heldlog", n > 0, "the commit logs of %d flushes were removed, although tenants that are held back need them, since they took more than %d bytes: a crash would have the sources of these tenants send again", n, i.opts.MaxBytes/heldShare)
		h.Note("log", err != nil, "the commit log is not written until the next flush, a crash would have sources send again: %v", err)
	}
	waiting, ahead := i.receive.clocks()
	i.receive.metrics.clocks.Set(float64(waiting))
	h.Note("clock", waiting > 0, "the clock of this machine says %s; those of %d sources differ, one is %s ahead: their samples would be from the future, and wait until the clocks agree",
		i.receive.now().UTC().Format(time.RFC3339), waiting, ahead.Round(time.Second))
	h.Note("again", i.receive.anyResending(), "a source is sending again what an ingester lost, or has been out of reach for less than %s", sessionTTL)
}

// admit waits while the head is full, or too much of the tenant is held back, and
// starts a flush where one is due.
func (i *Ingester) admit(ctx context.Context, tenant string) error {
	for {
		if i.head.Current().Bytes() >= i.opts.FlushBytes {
			i.flush.trigger()
		}
		crowded := i.crowded.Load()
		if i.head.Size().Bytes+i.receive.announced.Load() < i.opts.MaxBytes && (crowded == nil || !(*crowded)[tenant]) {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

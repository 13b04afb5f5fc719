package ingest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
)

// Publisher makes blocks durable. It is history.History.
type Publisher interface {
	// Publish stores a block and makes it visible: object, then rows, then guard.
	// It may be called again with the same id and bytes after an error. When it
	// returns nil the block is durable, after a *history.RowsError it is for all
	// tenants but those named there.
	Publish(ctx context.Context, id ulid.ULID, data []byte, summary *chunkfmt.Summary) error
	// PublishRows makes a block that is there durable for tenants that Publish has
	// left, but for those that a *history.RowsError names.
	PublishRows(ctx context.Context, id ulid.ULID, summary *chunkfmt.Summary, tenants []string) error
}

// maxBlockBytes is where a flush goes on in another block.
const maxBlockBytes = 128 << 20

// block is what part of a generation became.
type block struct {
	id      ulid.ULID
	data    []byte
	summary *chunkfmt.Summary
}

// encode turns a frozen generation into blocks: one for all tenants, unless it
// would pass maxBytes. window is the width of index rows in ms. A tenant that can't
// be encoded is left out, and costs the others nothing but the time to begin anew.
func encode(g *head.Generation, window int64, maxBytes int64, now time.Time) (out []block, failed map[string]error, _ error) {
	failed = map[string]error{}
	for {
		out, tenant, err := encodeExcept(g, failed, window, maxBytes, now)
		if err == nil || tenant == "" {
			return out, failed, err
		}
		failed[tenant] = err
	}
}

// encodeExcept leaves tenants out. An error that is one tenant's comes with its
// name.
func encodeExcept(g *head.Generation, except map[string]error, window int64, maxBytes int64, now time.Time) ([]block, string, error) {
	var out []block
	var buf *bytes.Buffer
	var w *chunkfmt.Writer
	end := func() error {
		if w == nil {
			return nil
		}
		sum, err := w.Close()
		if err != nil {
			return err
		}
		id, err := ulid.New(ulid.Timestamp(now), rand.Reader)
		if err != nil {
			return fmt.Errorf("new block id: %w", err)
		}
		out = append(out, block{id: id, data: buf.Bytes(), summary: sum})
		w = nil
		return nil
	}
	for _, tenant := range g.Tenants() {
		if except[tenant] != nil {
			continue
		}
		err := g.Walk(tenant, func(s *chunkfmt.Series) error {
			if w != nil && w.Full(maxBytes) {
				if err := end(); err != nil {
					return err
				}
			}
			if w == nil {
				buf = &bytes.Buffer{}
				w = chunkfmt.NewWriter(buf, chunkfmt.WriterOptions{Window: window})
			}
			return w.Add(tenant, s)
		})
		if err != nil {
			return nil, tenant, fmt.Errorf("tenant %q: %w", tenant, err)
		}
	}
	if err := end(); err != nil {
		return nil, "", err
	}
	return out, "", nil
}

// flusher rotates the head and publishes what was in it.
type flusher struct {
	head       *head.Head
	publisher  Publisher
	flushed    func(d durability, failed map[string]error) // failed can't be durable, ever
	interval   time.Duration
	window     int64 // ms
	visibility time.Duration
	logger     *slog.Logger
	metrics    *flushMetrics

	now  chan struct{} // flush at once; room for one
	last atomic.Int64  // unix ms of the last flush that worked

	flushing sync.Mutex // held during a flush
	pending  []*pending // frozen and not published, oldest first

	retrying chan struct{} // room for one: who tries blocks again that are held back
	telling  chan struct{} // room for one: who tells what is durable
	anew     chan struct{} // room for one: there is another one that is held back

	mu         sync.Mutex
	err        error        // of the last attempt to publish; nil if it worked
	generation uint64       // flushed, but for what is held back
	held       []*heldBlock // ascending in generation
	waiting    []published  // until the visibility delay has passed, oldest first
}

// pending is a frozen generation on its way into blocks.
type pending struct {
	g         *head.Generation
	at        time.Time
	encoded   bool
	blocks    []block
	failed    map[string]error // tenants that could not be encoded
	published int              // blocks, held back or not
	held      []*heldBlock
	byTenant  map[string][]ulid.ULID
	size      int // bytes published
}

// published is what a generation has of a tenant, or, if that is empty, of all but
// those held back.
type published struct {
	g      *head.Generation
	tenant string
	held   map[string]bool
	at     time.Time
}

type flushMetrics struct {
	duration         prometheus.Histogram
	samples, bytes   prometheus.Counter
	blocks, failures prometheus.Counter
	unencodable      prometheus.Counter
	held, heldBytes  prometheus.Gauge
}

func newFlushMetrics(reg prometheus.Registerer) *flushMetrics {
	m := &flushMetrics{
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "epimetheus_ingester_flush_duration_seconds",
			Help:    "Time from the rotation of the head to its samples being durable.",
			Buckets: prometheus.ExponentialBuckets(0.01, 4, 9),
		}),
		samples: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_flushed_samples_total", Help: "Samples made durable.",
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_flushed_bytes_total", Help: "Bytes of the blocks made durable.",
		}),
		blocks: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_flushed_blocks_total", Help: "Blocks made durable.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_ingester_flush_failures_total", Help: "Attempts to publish a block that failed, for all or some tenants; they are repeated.",
		}),
	}
	m.unencodable = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "epimetheus_ingester_unencodable_tenants_total", Help: "Times that the samples of a tenant could not be made a block: a bug. Its sources send them again.",
	})
	m.held = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_held_tenants", Help: "Tenants whose rows of the index could not be written at the last flush. They are tried again, and hold back only themselves.",
	})
	m.heldBytes = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "epimetheus_ingester_held_bytes", Help: "Memory of the head that tenants take which are held back, what they have in its current generation included.",
	})
	reg.MustRegister(m.heldBytes, m.duration, m.samples, m.bytes, m.blocks, m.failures, m.unencodable, m.held)
	return m
}

// trigger asks for a flush now.
func (f *flusher) trigger() {
	select {
	case f.now <- struct{}{}:
	default:
	}
}

// run flushes every interval, and when triggered, until ctx ends.
func (f *flusher) run(ctx context.Context) error {
	for {
		// Spread the ingesters' flushes a little.
		timer := time.NewTimer(f.interval - f.interval/20 + mrand.N(f.interval/10+1))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-f.now:
			timer.Stop()
		}
		if err := f.flush(ctx); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// flush makes durable all that Append has returned for, generation after
// generation. It tries until it works or ctx ends; what is left then, the next
// call begins with.
func (f *flusher) flush(ctx context.Context) error {
	f.flushing.Lock()
	defer f.flushing.Unlock()
	f.pending = append(f.pending, &pending{g: f.head.Rotate(), at: time.Now()})
	for len(f.pending) > 0 {
		if err := f.flushOne(ctx, f.pending[0]); err != nil {
			return fmt.Errorf("generation %d: %w", f.pending[0].g.ID(), err)
		}
		f.pending = f.pending[1:]
	}
	return nil
}

func (f *flusher) flushOne(ctx context.Context, p *pending) error {
	if !p.encoded {
		var err error
		if p.blocks, p.failed, err = encode(p.g, f.window, maxBlockBytes, p.at); err != nil {
			return fmt.Errorf("encode: %w", err)
		}
		for tenant, err := range p.failed {
			// A bug: nothing outside could bring a generation into such a state.
			// The others must not suffer for it, and its sources keep the samples.
			f.metrics.unencodable.Inc()
			f.logger.Error("samples of a tenant can't be written, its sources will send them again", "tenant", tenant, "generation", p.g.ID(), "err", err)
		}
		p.encoded, p.byTenant = true, map[string][]ulid.ULID{}
	}
	for p.published < len(p.blocks) {
		b := &p.blocks[p.published]
		held, err := f.publishOne(ctx, b)
		if err != nil {
			return err
		}
		for _, t := range b.summary.Tenants {
			p.byTenant[t.Tenant] = append(p.byTenant[t.Tenant], b.id)
		}
		p.size += len(b.data)
		if held != nil {
			x := &heldBlock{g: p.g, block: *b, tenants: held.Tenants, byTenant: p.byTenant}
			if held.Published {
				x.data = nil
			}
			p.held = append(p.held, x)
		}
		b.data = nil
		p.published++
	}
	held, done := map[string]bool{}, map[string][]ulid.ULID{}
	for _, b := range p.held {
		for tenant := range b.tenants {
			held[tenant] = true
		}
	}
	for tenant, ids := range p.byTenant {
		if !held[tenant] {
			done[tenant] = ids
		}
	}
	f.head.Published(p.g, done)
	f.mu.Lock()
	f.held = append(f.held, p.held...)
	f.generation = p.g.ID()
	f.waiting = append(f.waiting, published{g: p.g, held: held, at: time.Now()})
	f.mu.Unlock()
	f.tell(p.failed)
	if len(held) > 0 {
		select {
		case f.anew <- struct{}{}:
		default:
		}
	}
	f.last.Store(time.Now().UnixMilli())
	f.metrics.duration.Observe(time.Since(p.at).Seconds())
	f.metrics.samples.Add(float64(p.g.Samples()))
	f.metrics.bytes.Add(float64(p.size))
	f.metrics.blocks.Add(float64(len(p.blocks)))
	if len(p.blocks) > 0 {
		f.logger.Info("flushed", "generation", p.g.ID(), "tenants", len(p.byTenant), "held_back", len(held), "samples", p.g.Samples(),
			"blocks", len(p.blocks), "size_bytes", p.size, "duration", time.Since(p.at))
	}
	return nil
}

// publishOne tries with jittered, growing pauses until it works or ctx ends. It
// works too if it does but for the rows of some tenants, or for all rows.
func (f *flusher) publishOne(ctx context.Context, b *block) (held *history.RowsError, _ error) {
	pause := 200 * time.Millisecond
	for try := 1; ; try++ {
		err := f.publisher.Publish(ctx, b.id, b.data, b.summary)
		left := errors.As(err, &held)
		f.mu.Lock()
		if f.err = err; left {
			f.err = nil
		}
		f.mu.Unlock()
		if err == nil {
			return nil, nil
		}
		f.metrics.failures.Inc()
		if left {
			return held, nil
		}
		if err := b.rename(err); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, errors.Join(context.Cause(ctx), err)
		}
		if try == 1 || try%20 == 0 {
			f.logger.Warn("block not published, trying on: nothing is lost, but memory fills up meanwhile",
				"block", b.id, "size_bytes", len(b.data), "attempt", try, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), err)
		case <-time.After(pause/2 + mrand.N(pause)):
		}
		pause = min(2*pause, 10*time.Second)
	}
}

// rename gives a block another id if it wasn't published because a sweeper took
// what an interrupted attempt had left for an orphan.
func (b *block) rename(err error) error {
	if !errors.Is(err, history.ErrCondemned) {
		return nil
	}
	if b.id, err = ulid.New(ulid.Timestamp(time.Now()), rand.Reader); err != nil {
		return fmt.Errorf("new block id: %w", err)
	}
	return nil
}

// failing returns why blocks can't be published at present, or nil.
func (f *flusher) failing() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// drop lets go of generations that every reader finds in blocks by now.
func (f *flusher) drop(now time.Time) {
	f.mu.Lock()
	n := 0
	for n < len(f.waiting) && now.Sub(f.waiting[n].at) >= f.visibility {
		n++
	}
	gone := f.waiting[:n:n]
	f.waiting = f.waiting[n:]
	f.mu.Unlock()
	for _, p := range gone {
		f.head.Drop(p.g, func(tenant string) bool { return p.held[tenant] || p.tenant != "" && p.tenant != tenant })
	}
}

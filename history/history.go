package history

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/cache"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// Options of a History. Objects and Index are needed.
type Options struct {
	Objects object.Store
	Index   *index.Index

	// VisibilityDelay is how long after a flush heads still answer for what was
	// flushed. Rows are kept for at most half of it. 0: rows are not kept.
	VisibilityDelay time.Duration

	// Retentions gives how long what tenants have is kept at present. nil: for ever.
	Retentions func() *Retentions

	PageCacheBytes int64 // default 256 MiB; negative: nothing is kept
	RowCacheBytes  int64 // default 32 MiB; negative: nothing is kept
	MaxGets        int   // at the same time, of all queries; default 128

	// Memcached is asked for pages before the object store; nil: there is none.
	Memcached *memcached.Client

	Now        func() time.Time // default time.Now
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

const (
	defaultPageCacheBytes = 256 << 20
	defaultRowCacheBytes  = 32 << 20
	defaultMaxGets        = 128
)

// Validate reports what is missing or impossible.
func (o *Options) Validate() error {
	switch {
	case o.Objects == nil || o.Index == nil:
		return errors.New("history: an object store and an index are needed")
	case o.VisibilityDelay < 0:
		return fmt.Errorf("history: visibility delay of %s", o.VisibilityDelay)
	case o.MaxGets < 0:
		return fmt.Errorf("history: at most %d GETs", o.MaxGets)
	}
	return nil
}

// History publishes and reads blocks. It is safe for concurrent use, starts
// nothing and needs no closing; the stores are the caller's.
type History struct {
	o       Options
	pages   *cache.Cache[pageKey, page]
	rows    *cache.Cache[rowSetKey, *rowSet]
	gets    chan struct{} // holds one for each GET under way
	metrics *metrics

	known   atomic.Pointer[knownDeletions]
	looking chan struct{} // holds one while somebody looks for changes of deletions

	// For tests.
	now        func() time.Time
	batchBytes int64
}

type metrics struct {
	published      prometheus.Counter
	publishedBytes prometheus.Counter
	publishSeconds prometheus.Histogram
	snapshots      prometheus.Counter
	rowLoads       *prometheus.CounterVec
	corrupt        prometheus.Counter
	missing        prometheus.Counter
}

// New makes a History.
func New(o Options) (*History, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	orDefault := func(v *int64, fallback int64) {
		if *v == 0 {
			*v = fallback
		}
		*v = max(*v, 0)
	}
	orDefault(&o.PageCacheBytes, defaultPageCacheBytes)
	orDefault(&o.RowCacheBytes, defaultRowCacheBytes)
	if o.MaxGets == 0 {
		o.MaxGets = defaultMaxGets
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	o.Logger = o.Logger.With("component", "history")
	h := &History{
		o: o, looking: make(chan struct{}, 1), gets: make(chan struct{}, o.MaxGets), now: o.Now, batchBytes: batchBytes,
		pages: cache.New[pageKey, page](o.PageCacheBytes), rows: cache.New[rowSetKey, *rowSet](o.RowCacheBytes),
		metrics: &metrics{
			published: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "epimetheus_history_published_blocks_total", Help: "Blocks made durable.",
			}),
			publishedBytes: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "epimetheus_history_published_bytes_total", Help: "Bytes of the blocks made durable.",
			}),
			publishSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "epimetheus_history_publish_duration_seconds", Help: "Time that publishing a block took.",
				Buckets: prometheus.ExponentialBuckets(0.005, 4, 9),
			}),
			snapshots: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "epimetheus_history_snapshots_total", Help: "Lists of visible blocks made for queries.",
			}),
			rowLoads: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "epimetheus_history_row_loads_total",
				Help: "Reads of a tenant's block rows, by reason (absent, expired, ring_changed, unseen_block, missing_object).",
			}, []string{"reason"}),
			corrupt: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "epimetheus_history_corrupt_pages_total", Help: "Pages that were not as they were written.",
			}),
			missing: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "epimetheus_history_missing_objects_total", Help: "Reads of a visible block whose object was absent.",
			}),
		},
	}
	m := h.metrics
	for _, c := range []prometheus.Collector{m.published, m.publishedBytes, m.publishSeconds, m.snapshots, m.rowLoads, m.corrupt, m.missing} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("history: %w", err)
		}
	}
	if err := errors.Join(h.pages.Register(o.Registerer, "pages"), h.rows.Register(o.Registerer, "rows")); err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	return h, nil
}

// Stats is what reading from a snapshot has cost so far. It may be read while
// the query runs.
type Stats struct {
	IndexQueries atomic.Int64 // lists of rows read from the index
	IndexCached  atomic.Int64 // lists of rows that were at hand
	Blocks       atomic.Int64 // visible in the snapshot
	ObjectGets   atomic.Int64 // requests to the object store
	ObjectBytes  atomic.Int64 // bytes that these read
	Pages        atomic.Int64 // pages used
	PagesCached  atomic.Int64 // pages that were in memory, or loaded by another query
	// PagesMemcached are pages that memcached had.
	PagesMemcached atomic.Int64
	Series         atomic.Int64 // series found, one for each block that has it
	Samples        atomic.Int64 // samples decoded
	Windows        atomic.Int64 // summaries of windows decoded, instead of samples
}

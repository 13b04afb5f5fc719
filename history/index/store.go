package index

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// ErrConflict is what PutIf wraps when the row holds something else than the caller expected.
var ErrConflict = errors.New("row was changed meanwhile")

// PartialError is what Put may return: rows other than those that it names are
// written. Of any other error of Put nothing follows.
type PartialError struct {
	Left []Key
	Err  error // of one of them
}

func (e *PartialError) Error() string {
	return fmt.Sprintf("%d rows not written, such as that of %.40q: %v", len(e.Left), e.Left[0].Hash, e.Err)
}

func (e *PartialError) Unwrap() error { return e.Err }

// ErrNoTable is what every call wraps when the table is absent.
var ErrNoTable = errors.New("table does not exist")

// Limits of keys and values in bytes, the same for every store.
const (
	MaxHash  = 1024
	MaxRange = 512
	MaxValue = 350 << 10 // DynamoDB counts names and keys too, up to 400 KiB
)

// Key names a row. Rows with the same Hash are ordered by Range as unsigned bytes.
type Key struct {
	Hash  string // valid UTF-8, 1 to MaxHash bytes
	Range []byte // 1 to MaxRange bytes
}

// Item is a row: a key and a value that the store does not look into.
type Item struct {
	Key
	Value []byte
}

// Query asks for the rows of one hash key with From <= Range <= To, in order.
type Query struct {
	Hash     string
	From, To []byte // inclusive; nil is no bound
	Limit    int    // at most so many rows; 0 is no limit

	// Consistent asks for every row whose write has been acknowledged before
	// the call. Without it the newest may be missing.
	Consistent bool
}

// Store is an ordered store of small rows. All calls may run concurrently, each
// row changes atomically, and nothing spans rows. A write is durable when it
// returns nil; when it returns an error any part of it may have happened, and the
// caller repeats it: every call here may be repeated.
type Store interface {
	// Put writes rows, in no particular order, over what is there. Its error may be
	// a *PartialError.
	Put(ctx context.Context, items []Item) error

	// PutIf writes a row only if its value is old, or only if it is absent where
	// old is nil. If the row already holds item.Value the call succeeds too, so
	// that a repeated call does; let a value name its writer where that matters.
	// Otherwise the error wraps ErrConflict and current is what the row holds.
	PutIf(ctx context.Context, item Item, old []byte) (current []byte, err error)

	// Query returns rows, whose slices are the caller's. The list is complete
	// unless it has Limit rows, but no snapshot: of rows that are written
	// meanwhile some may be in it and others not.
	Query(ctx context.Context, q Query) ([]Item, error)

	// Delete removes rows. That a row is absent is not an error.
	Delete(ctx context.Context, keys []Key) error
}

func (k Key) validate() error {
	if k.Hash == "" || len(k.Hash) > MaxHash || !utf8.ValidString(k.Hash) {
		return fmt.Errorf("hash key %.40q of %d bytes: 1 to %d bytes of UTF-8 are possible", k.Hash, len(k.Hash), MaxHash)
	}
	if len(k.Range) == 0 || len(k.Range) > MaxRange {
		return fmt.Errorf("range key of %d bytes below %.40q: 1 to %d are possible", len(k.Range), k.Hash, MaxRange)
	}
	return nil
}

func (i Item) validate() error {
	if len(i.Value) == 0 || len(i.Value) > MaxValue {
		return fmt.Errorf("value of %d bytes below %.40q: 1 to %d are possible", len(i.Value), i.Hash, MaxValue)
	}
	return i.Key.validate()
}

func (q Query) validate() error {
	if q.Limit < 0 {
		return fmt.Errorf("query below %.40q: limit %d", q.Hash, q.Limit)
	}
	return Key{Hash: q.Hash, Range: []byte{0}}.validate()
}

// Operations as they are counted.
const (
	opPut         = "put"
	opPutIf       = "put_if"
	opQuery       = "query"
	opDelete      = "delete"
	opDescribe    = "describe"
	opCreateTable = "create_table"
)

// metrics count what a database bills: each attempt, and capacity units.
type metrics struct {
	requests    *prometheus.CounterVec
	duration    *prometheus.HistogramVec
	rows        *prometheus.CounterVec
	units       *prometheus.CounterVec
	unprocessed prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_index_requests_total",
			Help: "Requests to the index, every attempt counted, by operation and outcome (ok, conflict, throttled, error).",
		}, []string{"operation", "outcome"}),
		duration: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "epimetheus_index_request_duration_seconds",
			Help:    "Time until a request to the index was answered.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"operation"}),
		rows: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_index_rows_total",
			Help: "Rows read, written and deleted.",
		}, []string{"operation"}),
		units: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_index_capacity_units_total",
			Help: "Capacity units that DynamoDB says it has charged, by kind (read, write).",
		}, []string{"kind"}),
		unprocessed: f.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_index_unprocessed_rows_total",
			Help: "Rows of batches that DynamoDB has put back for lack of capacity.",
		}),
	}
}

func (m *metrics) observe(op string, start time.Time, outcome string) {
	m.requests.WithLabelValues(op, outcome).Inc()
	m.duration.WithLabelValues(op).Observe(time.Since(start).Seconds())
}

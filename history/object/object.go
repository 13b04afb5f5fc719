// Package object keeps immutable objects under keys: in S3 or a server that
// speaks its protocol, or as files below a folder.
//
// A Store promises little, so that every object store can keep it: an object is
// visible whole or not at all, what Put has acknowledged is durable, and a read
// after Put sees it. Objects are never changed; putting the same bytes under the
// same key again is how callers retry. All calls may run concurrently.
//
// A store does not know what it holds: names, checksums of pages and the order in
// which things are published are left to package history.
package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// ErrNotExist is what reading an object that is not there wraps.
var ErrNotExist = errors.New("object does not exist")

// ErrKey is what the use of a key that no store accepts wraps.
var ErrKey = errors.New("invalid object key")

// Store keeps objects. Keys are valid by ValidKey, and no key is also another
// key's folder ("a" and "a/b").
//
// An error of Put leaves open whether the object is there: the caller repeats
// the call until it succeeds, or leaves the object to the sweeper of orphans.
type Store interface {
	// Put stores size bytes of r under key. When it returns nil, the object is
	// durable and visible to every reader. It reads r more than once if it has
	// to repeat a request.
	Put(ctx context.Context, key string, r io.ReaderAt, size int64) error

	// GetRange returns the n bytes from offset off on, in a slice that is the
	// caller's. If the object ends before, and only then, the error wraps
	// io.ErrUnexpectedEOF.
	GetRange(ctx context.Context, key string, off, n int64) ([]byte, error)

	// Size returns the length of an object in bytes.
	Size(ctx context.Context, key string) (int64, error)

	// Delete removes an object. That there is none is not an error.
	Delete(ctx context.Context, key string) error

	// List calls fn for every object whose key starts with prefix, in no
	// particular order, until fn returns an error, which List then returns.
	List(ctx context.Context, prefix string, fn func(Info) error) error
}

// Info describes an object in a listing.
type Info struct {
	Key      string
	Size     int64     // bytes
	Modified time.Time // by the clock of the store
}

// maxKeyBytes leaves room for a prefix below S3's limit of 1,024.
const maxKeyBytes = 512

// ValidKey says what is wrong with a key, if anything is: keys are segments of
// letters, digits and -_.=+@ joined by slashes, no segment starts with a dot.
func ValidKey(key string) error {
	if key == "" || len(key) > maxKeyBytes {
		return fmt.Errorf("%w: %d bytes, 1 to %d are possible", ErrKey, len(key), maxKeyBytes)
	}
	for seg := range strings.SplitSeq(key, "/") {
		if seg == "" || seg[0] == '.' {
			return fmt.Errorf("%w: %q has an empty segment or one that starts with a dot", ErrKey, key)
		}
		for i := range len(seg) {
			c := seg[i]
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.=+@", rune(c)) {
				return fmt.Errorf("%w: %q has a %q in it", ErrKey, key, c)
			}
		}
	}
	return nil
}

func checkRange(key string, off, n int64) error {
	if off < 0 || n < 0 || off+n < off {
		return fmt.Errorf("get %s: impossible range of %d bytes at %d", key, n, off)
	}
	return nil
}

// Operations as they are counted: what object stores bill.
const (
	opGet             = "get"
	opHead            = "head"
	opPut             = "put"
	opDelete          = "delete"
	opList            = "list"
	opMultipartCreate = "multipart_create"
	opMultipartPart   = "multipart_part"
	opMultipartFinish = "multipart_finish"
	opMultipartAbort  = "multipart_abort"
)

// metrics count requests as a store would bill them: each attempt, not each call.
type metrics struct {
	requests     *prometheus.CounterVec
	duration     *prometheus.HistogramVec
	readBytes    prometheus.Counter
	writtenBytes prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_object_store_requests_total",
			Help: "Requests to the object store, every attempt counted, by operation and outcome (ok, not_found, error).",
		}, []string{"operation", "outcome"}),
		duration: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "epimetheus_object_store_request_duration_seconds",
			Help:    "Time until a request to the object store was answered.",
			Buckets: []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"operation"}),
		readBytes: f.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_object_store_read_bytes_total",
			Help: "Bytes of objects read.",
		}),
		writtenBytes: f.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_object_store_written_bytes_total",
			Help: "Bytes of objects written.",
		}),
	}
}

func (m *metrics) observe(op string, start time.Time, err error) {
	outcome := "ok"
	switch {
	case errors.Is(err, ErrNotExist):
		outcome = "not_found"
	case err != nil:
		outcome = "error"
	}
	m.requests.WithLabelValues(op, outcome).Inc()
	m.duration.WithLabelValues(op).Observe(time.Since(start).Seconds())
}

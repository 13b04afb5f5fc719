package historytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFiles(t *testing.T) {
	t.Parallel()
	TestObjects(t, func(t testing.TB) object.Store { return Files(t, prometheus.NewRegistry()) })
}

func TestMemory(t *testing.T) {
	t.Parallel()
	TestObjects(t, func(testing.TB) object.Store { return &MemoryObjects{} })
	TestIndex(t, func(testing.TB) index.Store { return &MemoryRows{} })
}

// testS3 runs the contract on one server, each store below a prefix of its own.
func testS3(t *testing.T, server *testenv.S3Server) {
	o := S3Options(t, server)
	o.PartBytes = 5 << 20 // so that the largest object of the suite goes up in parts
	var n atomic.Int32
	TestObjects(t, func(t testing.TB) object.Store {
		o := o
		o.Prefix = "store" + string('a'+n.Add(1)) + "/"
		s, err := object.NewS3(t.Context(), o, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestS3(t *testing.T) {
	t.Parallel()
	testS3(t, testenv.S3(t))
}

func TestS3OverTLS(t *testing.T) {
	t.Parallel()
	testS3(t, testenv.S3TLS(t))
}

// TestS3UnderFaults: every second request of a kind is refused, or loses its
// answer after the effect.
func TestS3UnderFaults(t *testing.T) {
	t.Parallel()
	server := testenv.S3(t)
	for name, fault := range map[string]ProxyFault{
		"throttled": ProxyThrottle, "error before": ProxyErrorBefore, "unavailable": ProxyUnavailable,
		"error after": ProxyErrorAfter, "cut before": ProxyCutBefore, "cut after": ProxyCutAfter,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			calls := map[string]int{}
			o := S3Options(t, server)
			o.Endpoint = S3Proxy(t, server.Endpoint, func(op string) ProxyFault {
				mu.Lock()
				defer mu.Unlock()
				calls[op]++
				if calls[op]%2 == 0 {
					return ProxyPass
				}
				return fault
			})
			o.Prefix, o.PartBytes, o.Timeout = name+"/", 5<<20, time.Minute
			s, err := object.NewS3(t.Context(), o, prometheus.NewRegistry())
			if err != nil {
				t.Fatal(err)
			}
			large := Bytes(6<<20, 1)
			put(t, s, "small", Bytes(1000, 2))
			put(t, s, "large", large)
			if b, err := s.GetRange(t.Context(), "large", 5<<20, 1000); err != nil || !bytes.Equal(b, large[5<<20:5<<20+1000]) {
				t.Errorf("read: %d bytes, %v", len(b), err)
			}
			if size, err := s.Size(t.Context(), "large"); err != nil || size != 6<<20 {
				t.Errorf("size: %d, %v", size, err)
			}
			if err := s.Delete(t.Context(), "large"); err != nil {
				t.Error(err)
			}
			var keys []string
			if err := s.List(t.Context(), "", func(i object.Info) error { keys = append(keys, i.Key); return nil }); err != nil || len(keys) != 1 {
				t.Errorf("list: %v, %v", keys, err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, op := range []string{"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "GetObject", "HeadObject", "DeleteObject", "ListObjectsV2"} {
				if calls[op] < 2 {
					t.Errorf("%d calls of %s", calls[op], op)
				}
			}
		})
	}
}

func TestS3Check(t *testing.T) {
	t.Parallel()
	server := testenv.S3(t)
	check := func(change func(*object.S3Options)) error {
		o := S3Options(t, server)
		o.Timeout = 5 * time.Second
		change(&o)
		s, err := object.NewS3(t.Context(), o, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		return s.Check(t.Context())
	}
	for want, change := range map[string]func(*object.S3Options){
		`bucket "other" does not exist`: func(o *object.S3Options) { o.Bucket = "other" },
		"can't be reached":              func(o *object.S3Options) { o.SecretKey = "wrong" },
		"connection refused":            func(o *object.S3Options) { o.Endpoint = "http://" + testenv.FreeAddr(t) },
	} {
		if err := check(change); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("check: %v, want %q", err, want)
		}
	}
	if err := check(func(*object.S3Options) {}); err != nil {
		t.Error(err)
	}
}

// TestS3Counts holds what dashboards and cost accounting rely on.
func TestS3Counts(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	o := S3Options(t, testenv.S3(t))
	o.PartBytes = 5 << 20
	s, err := object.NewS3(t.Context(), o, reg)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "small", Bytes(1000, 1))
	put(t, s, "large", Bytes(11<<20, 1))
	if _, err := s.GetRange(t.Context(), "small", 10, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetRange(t.Context(), "absent", 10, 100); !errors.Is(err, object.ErrNotExist) {
		t.Fatal(err)
	}
	const want = `
# HELP epimetheus_object_store_read_bytes_total Bytes of objects read.
# TYPE epimetheus_object_store_read_bytes_total counter
epimetheus_object_store_read_bytes_total 100
# HELP epimetheus_object_store_requests_total Requests to the object store, every attempt counted, by operation and outcome (ok, not_found, error).
# TYPE epimetheus_object_store_requests_total counter
epimetheus_object_store_requests_total{operation="get",outcome="not_found"} 1
epimetheus_object_store_requests_total{operation="get",outcome="ok"} 1
epimetheus_object_store_requests_total{operation="multipart_create",outcome="ok"} 1
epimetheus_object_store_requests_total{operation="multipart_finish",outcome="ok"} 1
epimetheus_object_store_requests_total{operation="multipart_part",outcome="ok"} 3
epimetheus_object_store_requests_total{operation="put",outcome="ok"} 1
# HELP epimetheus_object_store_written_bytes_total Bytes of objects written.
# TYPE epimetheus_object_store_written_bytes_total counter
epimetheus_object_store_written_bytes_total 1.1535336e+07
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "epimetheus_object_store_read_bytes_total",
		"epimetheus_object_store_requests_total", "epimetheus_object_store_written_bytes_total"); err != nil {
		t.Error(err)
	}
}

func TestBolt(t *testing.T) {
	t.Parallel()
	TestIndex(t, func(t testing.TB) index.Store { return Bolt(t, prometheus.NewRegistry()) })
}

func TestBoltIsLocked(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "index.db")
	s, err := index.NewBolt(path, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	putRows(t, s, row("h", "r", "v"))
	if _, err := index.NewBolt(path, prometheus.NewRegistry()); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("second open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = index.NewBolt(path, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	wantRows(t, s, index.Query{Hash: "h"}, row("h", "r", "v"))
}

// tables opens stores on tables of their own at one endpoint.
func tables(endpoint string) func(t testing.TB) index.Store {
	var n atomic.Int32
	return func(t testing.TB) index.Store {
		o := DynamoDBOptions(t, endpoint)
		o.Table += string('a' + n.Add(1))
		s, err := index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // a second call finds it there
			if err := s.CreateTable(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
}

func TestDynamoDB(t *testing.T) {
	t.Parallel()
	TestIndex(t, tables(testenv.DynamoDB(t).Endpoint))
}

// TestDynamoDBUnderFaults runs the same contract while every second request is
// throttled, put back in part, or loses its answer after the effect.
func TestDynamoDBUnderFaults(t *testing.T) {
	t.Parallel()
	server := testenv.DynamoDB(t)
	for name, fault := range map[string]ProxyFault{
		"throttled": ProxyThrottle, "unprocessed": ProxyUnprocessed, "error before": ProxyErrorBefore,
		"error after": ProxyErrorAfter, "cut after": ProxyCutAfter,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			calls, faults := map[string]int{}, 0
			url := DynamoDBProxy(t, server.Endpoint, func(op string) ProxyFault {
				mu.Lock()
				defer mu.Unlock()
				calls[op]++
				if op == "CreateTable" || op == "DescribeTable" || calls[op]%2 == 0 {
					return ProxyPass
				}
				faults++
				return fault
			})
			o := DynamoDBOptions(t, url)
			o.Table = "faults-" + strings.ReplaceAll(name, " ", "-")
			reg := prometheus.NewRegistry()
			s, err := index.NewDynamoDB(t.Context(), o, reg)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.CreateTable(t.Context()); err != nil {
				t.Fatal(err)
			}
			t.Run("batches", func(t *testing.T) { testRowBatches(t, s) })
			t.Run("conditions", func(t *testing.T) {
				// A lost answer must not turn a writer's own success into a conflict.
				if err := s.Delete(t.Context(), []index.Key{row("h", "r", "").Key}); err != nil {
					t.Fatal(err)
				}
				testRowConditions(t, s)
			})
			if faults < 10 {
				t.Errorf("only %d faults", faults)
			}
		})
	}
}

func TestDynamoDBGivesUpAtItsDeadline(t *testing.T) {
	t.Parallel()
	server := testenv.DynamoDB(t)
	var on atomic.Bool
	for name, fault := range map[string]ProxyFault{"throttled": ProxyThrottle, "unprocessed": ProxyUnprocessed} {
		on.Store(false)
		url := DynamoDBProxy(t, server.Endpoint, func(op string) ProxyFault {
			if on.Load() && op == "BatchWriteItem" {
				return fault
			}
			return ProxyPass
		})
		o := DynamoDBOptions(t, url)
		o.Table = name
		s, err := index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.CreateTable(t.Context()); err != nil {
			t.Fatal(err)
		}
		if fault == ProxyThrottle {
			o.Timeout = 300 * time.Millisecond
			if s, err = index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry()); err != nil {
				t.Fatal(err)
			}
		}
		on.Store(true)
		items := make([]index.Item, 0, 25)
		for i := range 25 {
			items = append(items, row("h", string(rune('a'+i)), "v"))
		}
		err = s.Put(t.Context(), items)
		// A batch of which half is written each time ends before the deadline.
		if fault == ProxyThrottle && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, want the deadline", name, err)
		}
		if fault == ProxyUnprocessed && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Rows of one hash key that are throttled don't keep others from being written, and
// the error names them.
func TestDynamoDBHotKey(t *testing.T) {
	t.Parallel()
	server := testenv.DynamoDB(t)
	var hot atomic.Bool
	hot.Store(true)
	o := DynamoDBOptions(t, DynamoDBHolding(t, server.Endpoint, func(hash string) bool { return hash == "hot" && hot.Load() }))
	o.Table, o.Timeout = "hot", 6*time.Second // of a busy machine the other rows take seconds
	s, err := index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CreateTable(t.Context()); err != nil {
		t.Fatal(err)
	}
	var items []index.Item
	for i := range 500 {
		hash := fmt.Sprint("h", i)
		if i == 77 {
			hash = "hot"
		}
		items = append(items, row(hash, "r", "v"))
	}
	var partial *index.PartialError
	if err := s.Put(t.Context(), items); !errors.As(err, &partial) || len(partial.Left) != 1 || partial.Left[0].Hash != "hot" {
		t.Fatalf("%v, want the row that is left", err)
	}
	for _, it := range items {
		got, err := s.Query(t.Context(), index.Query{Hash: it.Hash, Consistent: true})
		if err != nil || (len(got) == 1) != (it.Hash != "hot") {
			t.Fatalf("%s: %d rows, %v", it.Hash, len(got), err)
		}
	}
	hot.Store(false)
	if err := s.Put(t.Context(), items[77:78]); err != nil {
		t.Error(err)
	}
}

func TestDynamoDBCheck(t *testing.T) {
	t.Parallel()
	o := DynamoDBOptions(t, testenv.DynamoDB(t).Endpoint)
	s, err := index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	wantMissing := func(err error) {
		t.Helper()
		if !errors.Is(err, index.ErrNoTable) || !strings.Contains(err.Error(), "epimetheus tool create-table") {
			t.Errorf("%v, want ErrNoTable and what to do", err)
		}
	}
	wantMissing(s.Check(t.Context()))
	wantMissing(s.Put(t.Context(), []index.Item{row("h", "r", "v")}))
	_, err = s.Query(t.Context(), index.Query{Hash: "h"})
	wantMissing(err)
	_, err = s.PutIf(t.Context(), row("h", "r", "v"), nil)
	wantMissing(err)
	if err := s.CreateTable(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDynamoDBCounts(t *testing.T) {
	t.Parallel()
	o := DynamoDBOptions(t, testenv.DynamoDB(t).Endpoint)
	creator, err := index.NewDynamoDB(t.Context(), o, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := creator.CreateTable(t.Context()); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	s, err := index.NewDynamoDB(t.Context(), o, reg)
	if err != nil {
		t.Fatal(err)
	}
	putRows(t, s, row("h", "a", "1"), row("h", "b", strings.Repeat("x", 1500)))
	queryRows(t, s, index.Query{Hash: "h"})
	if _, err := s.PutIf(t.Context(), row("h", "a", "2"), nil); !errors.Is(err, index.ErrConflict) {
		t.Fatal(err)
	}
	const want = `
# HELP epimetheus_index_capacity_units_total Capacity units that DynamoDB says it has charged, by kind (read, write).
# TYPE epimetheus_index_capacity_units_total counter
epimetheus_index_capacity_units_total{kind="read"} 2
epimetheus_index_capacity_units_total{kind="write"} 3
# HELP epimetheus_index_requests_total Requests to the index, every attempt counted, by operation and outcome (ok, conflict, throttled, error).
# TYPE epimetheus_index_requests_total counter
epimetheus_index_requests_total{operation="put",outcome="ok"} 1
epimetheus_index_requests_total{operation="put_if",outcome="conflict"} 1
epimetheus_index_requests_total{operation="query",outcome="ok"} 2
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "epimetheus_index_capacity_units_total", "epimetheus_index_requests_total"); err != nil {
		t.Error(err)
	}
}

func TestFaultWrappers(t *testing.T) {
	fault := None
	decide := func(string, string) Fault { return fault }
	t.Run("none", func(t *testing.T) {
		TestObjects(t, func(t testing.TB) object.Store { return &FaultyObjects{Files(t, prometheus.NewRegistry()), decide} })
		TestIndex(t, func(t testing.TB) index.Store { return &FaultyRows{Bolt(t, prometheus.NewRegistry()), decide} })
	})
	o := &FaultyObjects{Files(t, prometheus.NewRegistry()), decide}
	r := &FaultyRows{Bolt(t, prometheus.NewRegistry()), decide}
	b := Bytes(100, 1)
	for f, wantEffect := range map[Fault]bool{Before: false, After: true} {
		fault = f
		if err := o.Put(t.Context(), "k", bytes.NewReader(b), 100); !errors.Is(err, ErrInjected) {
			t.Errorf("put: %v", err)
		}
		if err := r.Put(t.Context(), []index.Item{row("h", "r", "v")}); !errors.Is(err, ErrInjected) {
			t.Errorf("put: %v", err)
		}
		fault = None
		if _, err := o.Size(t.Context(), "k"); (err == nil) != wantEffect {
			t.Errorf("object is there: %v, want %v", err, wantEffect)
		}
		if n := len(queryRows(t, r, index.Query{Hash: "h"})); (n == 1) != wantEffect {
			t.Errorf("%d rows are there, want effect: %v", n, wantEffect)
		}
		if err := errors.Join(o.Delete(t.Context(), "k"), r.Delete(t.Context(), []index.Key{row("h", "r", "").Key})); err != nil {
			t.Fatal(err)
		}
	}
	put(t, o, "k", b)
	fault = Torn
	if got, err := o.GetRange(t.Context(), "k", 0, 100); err != nil || len(got) != 50 {
		t.Errorf("torn read gave %d bytes, %v", len(got), err)
	}
	fault = Corrupt
	if got, err := o.GetRange(t.Context(), "k", 0, 100); err != nil || bytes.Equal(got, b) {
		t.Errorf("corrupt read gave good bytes, %v", err)
	}
}

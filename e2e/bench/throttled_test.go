package bench

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	shipping "github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// throttle lets so many block rows a second through, as a provisioned table does,
// and saves up for a second. Rows of other kinds are few, and pass.
type throttle struct {
	mu     sync.Mutex
	rate   float64 // 0: no bound
	tokens float64
	at     time.Time
	let    int // rows through
}

func (b *throttle) held(hash string) bool {
	if !strings.HasPrefix(hash, "b/") {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.tokens, b.at = min(b.rate, b.tokens+b.rate*now.Sub(b.at).Seconds()), now
	if b.rate > 0 && b.tokens < 1 {
		return true
	}
	b.tokens--
	b.let++
	return false
}

func (b *throttle) passed() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.let
}

// sources are sidecars of many small tenants, as far as an ingester sees: each has
// a session, and sends again what it has when that ends.
type sources struct {
	address string
	batch   *shippb.Batch   // all that each has
	ctx     context.Context //nolint:containedctx // of all sessions
	wg      sync.WaitGroup

	mu       sync.Mutex
	sessions []*shipping.Session
	again    int // sessions that were begun anew
}

func startSources(b *testing.B, address string, tenants, series, samples int) *sources {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &sources{address: address, ctx: ctx, sessions: make([]*shipping.Session, tenants)}
	b.Cleanup(func() {
		cancel()
		s.wg.Wait()
	})
	var cols shipping.Columns
	var enc shipping.Encoder
	batch := &shippb.Batch{}
	for n := range series {
		batch.Announce = append(batch.Announce, &shippb.Series{Ref: uint32(n), Labels: []string{"__name__", "m", "n", fmt.Sprint(n)}}) //nolint:gosec // few
	}
	began := time.Now().Add(-time.Duration(samples) * 15 * time.Second)
	for k := range samples {
		for n := range series {
			f := &cols.Floats
			f.Ref, f.T, f.V = append(f.Ref, uint32(n)), append(f.T, began.Add(time.Duration(k)*15*time.Second).UnixMilli()), append(f.V, float64(k*n)) //nolint:gosec // few
		}
	}
	batch.Columns = enc.Encode(nil, &cols)
	s.batch = batch
	for n := range tenants {
		s.wg.Go(func() { s.source(n) })
	}
	return s
}

func (s *sources) source(n int) {
	for s.ctx.Err() == nil {
		x := shipping.NewSession(shipping.SessionOptions{Address: s.address, Tenant: fmt.Sprint("tenant-", n), Source: [16]byte{byte(n), byte(n >> 8), 1}}, promslog.NewNopLogger())
		x.TrySend(&shippb.Batch{Announce: s.batch.Announce, Columns: s.batch.Columns})
		s.mu.Lock()
		if s.sessions[n] != nil {
			s.again++
		}
		s.sessions[n] = x
		s.mu.Unlock()
		_ = x.Run(s.ctx) // its end is another one's beginning
	}
}

// all says whether a number of all sessions has reached its batch.
func (s *sources) all(of func(shipping.SessionState) uint64) func() bool {
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, x := range s.sessions {
			if x == nil {
				return false
			}
			if st := x.State(); !st.Connected || of(st) < 1 {
				return false
			}
		}
		return true
	}
}

func received(s shipping.SessionState) uint64 { return s.Received }
func durable(s shipping.SessionState) uint64  { return s.Durable }

// BenchmarkThrottledRecovery kills an ingester (-9) of a thousand tenants in the
// middle of a flush, while its index takes 100 rows a second, and starts it again: with
// its commit log, and without, so that its sources send again. It runs once however
// large b.N is.
func BenchmarkThrottledRecovery(b *testing.B) {
	const tenants, series, samples = 1000, 10, 120
	binary := binary(b)
	for _, logged := range []bool{true, false} {
		for _, rate := range []float64{0, 100} {
			b.Run(fmt.Sprintf("log=%v/rows_per_second=%v", logged, rate), func(b *testing.B) {
				limit := &throttle{rate: 100, at: time.Now()}
				yml := storesBehind(b, binary, fmt.Sprintf("ingester: {flush_interval: 20s, commit_log: %v}\n", logged), func(dynamodb string) string {
					return historytest.DynamoDBHolding(b, dynamodb, limit.held)
				})
				address, web := testenv.FreeAddr(b), testenv.FreeAddr(b)
				args := []string{
					"ingester", "--config.file=" + yml, "--data.dir=" + filepath.Join(b.TempDir(), "ingester"), "--gossip.member-id=one",
					"--gossip.listen-address=" + testenv.FreeAddr(b), "--grpc.listen-address=" + address,
				}
				r := startAt(b, web, binary, args...)
				s := startSources(b, address, tenants, series, samples)
				await(b, "all received", time.Minute, 10*time.Millisecond, s.all(received))
				await(b, "a flush", time.Minute, 10*time.Millisecond, func() bool { return limit.passed() > tenants/4 })

				r.Kill()
				killed := time.Now()
				limit.mu.Lock()
				limit.rate = rate
				limit.mu.Unlock()
				startAt(b, web, binary, args...)
				await(b, "all received again", 5*time.Minute, 10*time.Millisecond, s.all(received))
				b.ReportMetric(time.Since(killed).Seconds(), "kill-to-all-queryable-s")
				await(b, "all durable", 5*time.Minute, 10*time.Millisecond, s.all(durable))
				b.ReportMetric(time.Since(killed).Seconds(), "kill-to-all-durable-s")
				b.ReportMetric(float64(limit.passed()), "rows")
				s.mu.Lock()
				b.ReportMetric(float64(s.again), "sessions-anew")
				s.mu.Unlock()
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

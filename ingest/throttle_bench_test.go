package ingest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// bucket lets so many rows a second through, as a provisioned table does, and
// saves up for a second.
type bucket struct {
	mu     sync.Mutex
	rate   float64
	tokens float64
	at     time.Time
	put    int // rows put back
}

func (b *bucket) held(string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate == 0 {
		return false
	}
	now := time.Now()
	b.tokens, b.at = min(b.rate, b.tokens+b.rate*now.Sub(b.at).Seconds()), now
	if b.tokens < 1 {
		b.put++
		return true
	}
	b.tokens--
	return false
}

// BenchmarkThrottledFlush flushes many tenants through a DynamoDB that takes a
// hundred rows a second.
func BenchmarkThrottledFlush(b *testing.B) {
	for _, tenants := range []int{1000, 4000} {
		for _, rate := range []float64{0, 100} {
			b.Run(fmt.Sprintf("tenants=%d/rows_per_second=%v", tenants, rate), func(b *testing.B) {
				limit := &bucket{at: time.Now()}
				o := historytest.DynamoDBOptions(b, historytest.DynamoDBHolding(b, testenv.DynamoDB(b).Endpoint, limit.held))
				o.Table = fmt.Sprintf("rows-%d-%v", tenants, rate)
				rows, err := index.NewDynamoDB(b.Context(), o, prometheus.NewRegistry())
				if err != nil {
					b.Fatal(err)
				}
				if err := rows.CreateTable(b.Context()); err != nil {
					b.Fatal(err)
				}
				h, err := history.New(history.Options{Objects: historytest.Files(b, prometheus.NewRegistry()), Index: index.New(rows)})
				if err != nil {
					b.Fatal(err)
				}
				i, err := New(Options{Member: "m", RowWidth: index.Width}, h, promslog.NewNopLogger(), prometheus.NewRegistry())
				if err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					b.StopTimer()
					for n := range tenants {
						fill(i, fmt.Sprint("tenant-", n), 10)
					}
					limit.rate, limit.tokens = rate, 0
					b.StartTimer()
					began := time.Now()
					if err := i.flush.flush(b.Context()); err != nil {
						b.Fatal(err)
					}
					held, _, _ := i.flush.heldBack()
					b.ReportMetric(time.Since(began).Seconds(), "s/flush")
					b.ReportMetric(float64(held), "held_back")
					if err := i.Flush(b.Context()); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(time.Since(began).Seconds(), "s/durable")
					b.ReportMetric(float64(limit.put), "rows_put_back")
				}
			})
		}
	}
}

package historytest

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
)

// Memcached is a client that runs until the test ends.
type Memcached struct {
	*memcached.Client

	reg *prometheus.Registry
}

// StartMemcached starts a client of the server at address. It waits for answers for
// as long as they take, within reason: a busy machine is no failure.
func StartMemcached(t testing.TB, address string) *Memcached {
	t.Helper()
	return StartImpatientMemcached(t, address, time.Minute)
}

// StartImpatientMemcached starts a client that waits so long.
func StartImpatientMemcached(t testing.TB, address string, patience time.Duration) *Memcached {
	t.Helper()
	m := &Memcached{reg: prometheus.NewRegistry()}
	var err error
	if m.Client, err = memcached.New(t.Context(), memcached.Options{Addresses: []string{address}, Patience: patience, Registerer: m.reg}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m
}

// Idle waits until all values that were to be put are dealt with.
func (m *Memcached) Idle(t testing.TB) {
	t.Helper()
	for m.Metric(t, "epimetheus_memcached_queued_bytes", "") > 0 {
		if t.Context().Err() != nil {
			t.Fatal("values are not put")
		}
		time.Sleep(time.Millisecond)
	}
}

// Metric is the sum of the client's metric over its labels; if result is not empty,
// of those with that result.
func (m *Memcached) Metric(t testing.TB, name, result string) (sum float64) {
	t.Helper()
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, x := range f.GetMetric() {
			got := ""
			for _, l := range x.GetLabel() {
				if l.GetName() == "result" {
					got = l.GetValue()
				}
			}
			if result == "" || got == result {
				sum += x.GetCounter().GetValue() + x.GetGauge().GetValue()
			}
		}
	}
	return sum
}

package memcached

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	gets           [2]getCounters // by Kind
	sets           [2]setCounters
	getSeconds     prometheus.Histogram
	lookupFailures prometheus.Counter
}

type getCounters struct{ hit, missed, damaged, late, failed, skipped prometheus.Counter }

type setCounters struct{ stored, failed, dropped, skipped, oversize prometheus.Counter }

func newMetrics(reg prometheus.Registerer, c *Client) (*metrics, error) {
	gets := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "epimetheus_memcached_gets_total",
		Help: "Values asked of memcached, by kind and result: hit, miss, damaged (not what was put there), late, failed, skipped (the server is down or busy).",
	}, []string{"kind", "result"})
	sets := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "epimetheus_memcached_sets_total",
		Help: "Values for memcached, by kind and result: stored, failed, dropped (the queue is full), skipped (the server is down), oversize.",
	}, []string{"kind", "result"})
	m := &metrics{
		getSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "epimetheus_memcached_get_duration_seconds", Help: "Time that memcached took to answer a request for values.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 3, 9),
		}),
		lookupFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_memcached_lookup_failures_total", Help: "Names of memcached servers that could not be resolved; the servers stay as they were.",
		}),
	}
	for k := range m.gets {
		get := func(result string) prometheus.Counter { return gets.WithLabelValues(Kind(k).String(), result) }
		set := func(result string) prometheus.Counter { return sets.WithLabelValues(Kind(k).String(), result) }
		m.gets[k] = getCounters{get("hit"), get("miss"), get("damaged"), get("late"), get("failed"), get("skipped")}
		m.sets[k] = setCounters{set("stored"), set("failed"), set("dropped"), set("skipped"), set("oversize")}
	}
	servers := func(down bool) func() float64 {
		return func() float64 {
			c.mu.RLock()
			defer c.mu.RUnlock()
			n := 0
			for _, s := range c.servers {
				if s.isDown() == down {
					n++
				}
			}
			return float64(n)
		}
	}
	state := func(s string) prometheus.GaugeOpts {
		return prometheus.GaugeOpts{
			Name: "epimetheus_memcached_servers", Help: "Servers that the addresses stand for, by state: up, down.",
			ConstLabels: prometheus.Labels{"state": s},
		}
	}
	var errs []error
	for _, collector := range []prometheus.Collector{
		gets, sets, m.getSeconds, m.lookupFailures,
		prometheus.NewGaugeFunc(state("up"), servers(false)), prometheus.NewGaugeFunc(state("down"), servers(true)),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "epimetheus_memcached_queued_bytes", Help: "Values that wait to be put into memcached; at most 64 MiB.",
		}, func() float64 { return float64(c.queuedBytes.Load()) }),
	} {
		errs = append(errs, reg.Register(collector))
	}
	return m, errors.Join(errs...)
}

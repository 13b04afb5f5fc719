package compact

import (
	"errors"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

type metrics struct {
	jobs                 *prometheus.CounterVec
	duration             *prometheus.HistogramVec
	read, written, bytes *prometheus.CounterVec
	replaced             prometheus.Counter
	aside                *prometheus.CounterVec
	asideNow             prometheus.Gauge
	pending              *prometheus.GaugeVec
	unfinished, held     prometheus.Gauge
	postponed            prometheus.Gauge
	unreadable           prometheus.Gauge
	cleaning             prometheus.Gauge
	oldest               prometheus.Gauge
	orphans              *prometheus.CounterVec
	failures             prometheus.Counter
}

func levelLabel(l index.Level) string { return strconv.Itoa(int(l)) }

func newMetrics(reg prometheus.Registerer, levels int) (*metrics, error) {
	level := []string{"level"}
	m := &metrics{
		jobs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_jobs_total",
			Help: "Compactions by the level of what they make, and by outcome (done, failed, lost to another compactor).",
		}, []string{"level", "outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "epimetheus_compactor_merge_duration_seconds", Help: "Time that merging took, until the new blocks were visible.",
			Buckets: prometheus.ExponentialBuckets(0.1, 4, 9),
		}, level),
		read: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_read_samples_total", Help: "Samples of the blocks that were merged.",
		}, level),
		written: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_written_samples_total", Help: "Samples of the blocks that were made.",
		}, level),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_written_bytes_total", Help: "Bytes of the blocks that were made.",
		}, level),
		replaced: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_compactor_deleted_blocks_total", Help: "Blocks deleted after others had replaced them.",
		}),
		aside: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_set_aside_blocks_total",
			Help: "Blocks that can't be read and are left as they are, by reason (missing, corrupt, version, too_wide).",
		}, []string{"reason"}),
		asideNow: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_set_aside_blocks", Help: "Blocks that are left as they are at present.",
		}),
		pending: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_pending_blocks", Help: "Blocks of a level that wait for compaction, whether its time has come or not.",
		}, level),
		unfinished: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_unfinished_jobs", Help: "Compactions under way, those included whose sources wait for their removal.",
		}),
		held: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_held_jobs", Help: "Compactions that wait, since index rows of some tenants can't be written or removed, or blocks can't be read. Others go on.",
		}),
		postponed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_postponed_blocks", Help: "Blocks that can't be read at present: they are left out and tried again. Others are compacted.",
		}),
		unreadable: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_unreadable_rows", Help: "Index rows of work, jobs and blocks set aside that can't be read and are left out.",
		}),
		cleaning: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_unclean_blocks", Help: "Blocks that are going to be written again without what is deleted or past the retention.",
		}),
		oldest: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "epimetheus_compactor_oldest_flush_timestamp_seconds", Help: "When the oldest flush was made that isn't compacted; 0 if there is none.",
		}),
		orphans: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_compactor_orphans_total", Help: "Objects that nobody has published, by what was done (condemned, deleted).",
		}, []string{"action"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_compactor_failed_rounds_total", Help: "Looks at what there is to do in which something failed; it is tried again.",
		}),
	}
	for l := range levels {
		m.pending.WithLabelValues(strconv.Itoa(l))
		for _, outcome := range []string{"done", "failed", "lost"} {
			m.jobs.WithLabelValues(strconv.Itoa(l+1), outcome)
		}
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.jobs, m.duration, m.read, m.written, m.bytes, m.replaced, m.aside, m.asideNow, m.pending, m.unfinished, m.held, m.postponed, m.unreadable, m.cleaning, m.oldest, m.orphans, m.failures,
	} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

package sidecar

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	shipped        *prometheus.CounterVec
	shippedBytes   prometheus.Counter
	batches        prometheus.Counter
	resent         prometheus.Counter
	dropped        *prometheus.CounterVec
	refused        *prometheus.CounterVec
	series         prometheus.Gauge
	seriesGone     prometheus.Counter
	dictionary     prometheus.Gauge
	lagBytes       prometheus.Gauge
	newest         prometheus.Gauge
	segment        prometheus.Gauge
	held           prometheus.Gauge
	rangesOpen     prometheus.Gauge
	rangesQueued   prometheus.Gauge
	gaps           prometheus.Counter
	gapsLost       prometheus.Counter
	gapOpen        prometheus.Gauge
	blocksQueued   prometheus.Gauge
	blocksLost     prometheus.Counter
	blocksBad      prometheus.Counter
	filled         prometheus.Counter
	keptFiles      prometheus.Gauge
	keptBytes      prometheus.Gauge
	keptDropped    prometheus.Counter
	sessions       prometheus.Gauge
	sessionsEnded  prometheus.Counter
	detached       prometheus.Gauge
	detachments    prometheus.Counter
	inflight       prometheus.Gauge
	copies         prometheus.Gauge
	skipped        prometheus.Counter
	lacking        prometheus.Counter
	ringErrors     prometheus.Counter
	labelErrors    prometheus.Counter
	metadataErrors prometheus.Counter
	flagErrors     prometheus.Counter
	labelChanges   prometheus.Counter
	claims         *prometheus.CounterVec
	claimErrors    prometheus.Counter
	chosen         prometheus.Gauge
	heldBack       prometheus.Gauge
	readErrors     prometheus.Counter
	checkpoints    prometheus.Counter
	checkpointErr  prometheus.Counter

	mu      sync.Mutex
	reasons map[string]bool // of refusals: they come over the network
}

// maxReasons bounds the values of the label reason of refusals.
const maxReasons = 32

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "epimetheus_sidecar_" + name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return f.NewGauge(prometheus.GaugeOpts{Name: "epimetheus_sidecar_" + name, Help: help})
	}
	m := &metrics{
		shipped: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_shipped_samples_total",
			Help: "Samples handed to sessions with ingesters, by type; those sent again count again.",
		}, []string{"type"}),
		shippedBytes: counter("shipped_bytes_total", "Encoded bytes of batches handed to sessions."),
		batches:      counter("shipped_batches_total", "Batches handed to sessions."),
		resent:       counter("resent_samples_total", "Samples that were read and sent again because an ingester was lost."),
		dropped: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_dropped_samples_total",
			Help: "Samples in the WAL that were not sent, by reason: of a series without a name or with invalid or too long labels, of a series that relabelling drops, of a ref that no series record explained, with the timestamp of the sample before, of a time for which another replica is chosen, too large (a histogram, an exemplar or metadata, which can't be sent in one batch), or from an agent's WAL checkpoint, whose samples are placeholders.",
		}, []string{"reason"}),
		refused: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_refused_samples_total",
			Help: "Samples that ingesters refused for good, by reason.",
		}, []string{"reason"}),
		series:         gauge("series", "Series in the dictionary."),
		seriesGone:     counter("series_removed_total", "Series removed from the dictionary after Prometheus dropped them from its WAL."),
		dictionary:     gauge("dictionary_bytes", "Size of the dictionary file."),
		lagBytes:       gauge("wal_lag_bytes", "Bytes of WAL that are not read yet."),
		newest:         gauge("newest_sample_timestamp_seconds", "Greatest timestamp of a sample that was read."),
		segment:        gauge("wal_segment", "Segment that is being read."),
		held:           gauge("checkpoint_segment", "Segment that the checkpoint is in: what lies before it is durable."),
		rangesOpen:     gauge("open_ranges", "Ranges of WAL that are sent and not yet durable."),
		rangesQueued:   gauge("queued_ranges", "Ranges of WAL that are to be read and sent again."),
		gaps:           counter("gaps_total", "Times that samples of the WAL may not have been read; they are read from Prometheus's blocks."),
		gapsLost:       counter("lost_gaps_total", "Gaps of an agent, which has no blocks to fill them from: these samples are lost."),
		gapOpen:        gauge("gap_open", "1 while a gap is open: Prometheus has yet to compact what may have been in it, or not all of that is durable."),
		blocksQueued:   gauge("blocks_to_send", "Blocks of Prometheus that are to be read and sent: history at the first start, gaps."),
		blocksLost:     counter("lost_blocks_total", "Blocks of Prometheus that were to be read but were deleted before."),
		blocksBad:      counter("bad_blocks_total", "Parts of Prometheus's blocks that can't be read: the folder, a series or a chunk."),
		filled:         counter("block_samples_total", "Samples read from Prometheus's blocks."),
		keptFiles:      gauge("kept_wal_files", "WAL files that are kept because not all of them is durable."),
		keptBytes:      gauge("kept_wal_bytes", "Bytes of WAL that Prometheus has deleted and that are kept."),
		keptDropped:    counter("dropped_wal_files_total", "WAL files that were let go beyond the bound although not all of them was durable."),
		sessions:       gauge("sessions", "Sessions with ingesters."),
		sessionsEnded:  counter("sessions_ended_total", "Sessions that ended for good before all of them was durable."),
		detached:       gauge("detached_owners", "Ingesters that get nothing at present because they are slow or out of reach."),
		detachments:    counter("owner_detachments_total", "Times that an ingester was left out because it was slow or out of reach."),
		inflight:       gauge("inflight_bytes", "Encoded bytes sent, or to be sent, that ingesters have not yet received."),
		copies:         gauge("copies", "The fewest copies, in ingesters that can be reached, of something that is sent and not durable."),
		skipped:        counter("skipped_copies_total", "Ranges of the WAL of which an ingester got no full copy because it was slow or out of reach, with several replicas."),
		lacking:        counter("refused_copies_total", "Batches of which an ingester refused something, with several replicas."),
		ringErrors:     counter("ring_errors_total", "Failed attempts to get the ring from a gateway."),
		labelErrors:    counter("external_label_errors_total", "Failed attempts to get the external labels of Prometheus."),
		flagErrors:     counter("flag_errors_total", "Failed attempts to tell gateways the flags of Prometheus."),
		metadataErrors: counter("metadata_errors_total", "Failed attempts to get metadata of metrics from Prometheus."),
		labelChanges:   counter("external_label_changes_total", "Changes of external labels or relabelling that took effect."),
		claims: f.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_sidecar_ha_requests_total",
			Help: "Requests to gateways about which of several replicas is chosen, by kind: claim, or ask for what is decided.",
		}, []string{"kind"}),
		claimErrors:   counter("ha_request_errors_total", "Of these, those that failed."),
		chosen:        gauge("ha_chosen", "1 if this replica is the chosen one at its newest sample; 1 without replicas too."),
		heldBack:      gauge("ha_held_seconds", "For how long samples have been held because it isn't known which replica is chosen; 0 if they aren't."),
		readErrors:    counter("wal_read_errors_total", "Failed attempts to read the WAL: errors of the file system."),
		checkpoints:   counter("checkpoints_total", "Checkpoints written."),
		checkpointErr: counter("checkpoint_errors_total", "Checkpoints that could not be written."),
		reasons:       map[string]bool{},
	}
	for _, t := range []string{"float", "histogram", "float_histogram", "exemplar", "metadata"} {
		m.shipped.WithLabelValues(t)
	}
	for r := dropRelabelled; r < dropReasons; r++ {
		m.dropped.WithLabelValues(r.String())
	}
	for _, k := range []string{"claim", "ask"} {
		m.claims.WithLabelValues(k)
	}
	for _, r := range []string{"unknown_ref", "equal_timestamp", "agent_checkpoint", "other_replica", "too_large"} {
		m.dropped.WithLabelValues(r)
	}
	return m
}

func (m *metrics) refuse(reason string, samples uint64) {
	if reason == "" {
		reason = "unspecified"
	}
	m.mu.Lock()
	if !m.reasons[reason] {
		if len(m.reasons) >= maxReasons || len(reason) > 64 {
			reason = "other"
		}
		m.reasons[reason] = true
	}
	m.mu.Unlock()
	m.refused.WithLabelValues(reason).Add(float64(samples))
}

package sidecar

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/relabel"
	"google.golang.org/grpc"
)

// Options are the options of a Sidecar. PrometheusDir, DataDir and Gateways are
// required; the zero value of all else is a sane default.
type Options struct {
	// PrometheusDir is the data directory of the Prometheus, server or agent.
	PrometheusDir string
	// DataDir is the sidecar's own: checkpoint and dictionary.
	DataDir string
	// Tenant is "default" if empty.
	Tenant string
	// Gateways are base URLs of gateways; one is asked for the ring.
	Gateways []string
	// PrometheusURL or PrometheusConfigFile is where the external labels come
	// from: the running Prometheus or its configuration file. With neither,
	// samples are sent without external labels. A running Prometheus is asked
	// for metadata of metrics too.
	PrometheusURL        string
	PrometheusConfigFile string
	// RelabelConfigs are applied to each series after the external labels were
	// added, as Prometheus does for remote write.
	RelabelConfigs []*relabel.Config
	// Shards is the number of ingesters that the tenant's series are spread
	// over; 0 for all.
	Shards int
	// Replicas is the number of ingesters, in different zones where there are,
	// that each series is sent to; 1 by default, at most 3.
	Replicas int

	// ReplicaLabel is the external label that tells the Prometheus from others
	// with the same targets, of which one is chosen at a time. It isn't sent. Empty:
	// there are no others, or their samples are kept apart by a label.
	ReplicaLabel string
	// Lease is how far ahead of its samples a chosen replica claims, and so the
	// longest gap when it is gone; a minute by default, MinLease to MaxLease.
	Lease time.Duration

	// PollInterval is how often the WAL is looked at; 100 ms by default. With
	// nothing in it for a while, half as often.
	PollInterval time.Duration
	// RangeBytes and RangeAge bound a range of the ledger; 1 MiB, 5 s.
	RangeBytes int64
	RangeAge   time.Duration
	// DetachAfter is how long an ingester may be out of reach, or keep its
	// window full, before the tail goes on without it; 5 s.
	DetachAfter time.Duration
	// ReattachAfter is how long an ingester that was detached must be content
	// again before it gets samples again; 10 s.
	ReattachAfter time.Duration
	// GiveUp is how long an ingester may be out of reach before all that isn't
	// durable in it is sent to others; 60 s.
	GiveUp time.Duration
	// CheckpointInterval is how often the checkpoint is written; 5 s.
	CheckpointInterval time.Duration
	// LabelsInterval is how often external labels are asked for; 5 s.
	LabelsInterval time.Duration
	// MetadataInterval is how often metadata of metrics is asked for, but for
	// the beginning, when it is asked for more often; 2 min.
	MetadataInterval time.Duration
	// RewindBytesPerSecond bounds how fast ranges are read again, in bytes of
	// WAL; 16 MiB.
	RewindBytesPerSecond int64
	// KeepBytes bounds what is kept, by links or open files, of WAL that Prometheus
	// has deleted before it was durable; 4 GiB.
	KeepBytes int64
	// BackfillAge bounds, at the first start, how old samples in Prometheus's
	// blocks may be to be sent; 0 for all, less than 0 for none of them.
	BackfillAge time.Duration
	// BackfillSamplesPerSecond bounds how fast blocks are read; 500,000.
	BackfillSamplesPerSecond int64
	// RingWait is how long the gateway may hold back its answer; 20 s.
	RingWait time.Duration

	// DialOptions are for the connections to ingesters: credentials. None
	// means plain text.
	DialOptions []grpc.DialOption
	// HTTPClient is for asking gateways for the ring; nil for a plain one. A
	// transport of it may add credentials.
	HTTPClient *http.Client
	// Version names this program to ingesters.
	Version string
}

// Bounds of Options.Lease. Claims must stay within what gateways take for
// possible (ship.MaxFuture), and within the size of a row.
const (
	MinLease = 10 * time.Second
	MaxLease = 5 * time.Minute
)

func (o *Options) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	if o.Tenant == "" {
		o.Tenant = "default"
	}
	if o.Replicas == 0 {
		o.Replicas = 1
	}
	if o.RangeBytes <= 0 {
		o.RangeBytes = 1 << 20
	}
	if o.RewindBytesPerSecond <= 0 {
		o.RewindBytesPerSecond = 16 << 20
	}
	if o.KeepBytes <= 0 {
		o.KeepBytes = 4 << 30
	}
	if o.BackfillSamplesPerSecond <= 0 {
		o.BackfillSamplesPerSecond = 500_000
	}
	if o.Version == "" {
		o.Version = "epimetheus"
	}
	def(&o.Lease, time.Minute)
	def(&o.PollInterval, 100*time.Millisecond)
	def(&o.RangeAge, 5*time.Second)
	def(&o.DetachAfter, 5*time.Second)
	def(&o.ReattachAfter, 10*time.Second)
	def(&o.GiveUp, time.Minute)
	def(&o.CheckpointInterval, 5*time.Second)
	def(&o.LabelsInterval, 5*time.Second)
	def(&o.MetadataInterval, 2*time.Minute)
	def(&o.RingWait, 20*time.Second)
}

// Validate returns all that is wrong with the options.
func (o *Options) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.PrometheusDir == "" {
		bad("Prometheus's data directory is not given")
	}
	if o.DataDir == "" {
		bad("the sidecar's own data directory is not given")
	}
	if o.PrometheusDir != "" && o.DataDir != "" && filepath.Clean(o.PrometheusDir) == filepath.Clean(o.DataDir) {
		bad("the sidecar's own data directory is Prometheus's (%s): give it another", o.DataDir)
	}
	if len(o.Gateways) == 0 {
		bad("no gateway is given")
	}
	for _, g := range o.Gateways {
		if u, err := url.Parse(g); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			bad("gateway %q: not a URL such as http://gateway:9009", g)
		}
	}
	if o.PrometheusURL != "" {
		if u, err := url.Parse(o.PrometheusURL); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			bad("Prometheus's URL %q: not a URL such as http://localhost:9090", o.PrometheusURL)
		}
		if o.PrometheusConfigFile != "" {
			bad("external labels come from Prometheus's URL or from its configuration file: give one of the two")
		}
	}
	for i, c := range o.RelabelConfigs {
		if err := c.Validate(model.UTF8Validation); err != nil {
			bad("relabel configuration %d: %w", i+1, err)
		}
	}
	if o.ReplicaLabel != "" && !model.UTF8Validation.IsValidLabelName(o.ReplicaLabel) {
		bad("replica label %q: not a label name", o.ReplicaLabel)
	}
	if o.ReplicaLabel != "" && o.PrometheusURL == "" && o.PrometheusConfigFile == "" {
		bad("replica label %q: Prometheus's external labels are needed, give its URL or its configuration file", o.ReplicaLabel)
	}
	if o.Lease < MinLease || o.Lease > MaxLease {
		bad("lease %s: must be from %s to %s", o.Lease, MinLease, MaxLease)
	}
	if o.Shards < 0 {
		bad("shards %d: must be 0 (all) or more", o.Shards)
	}
	if o.Replicas < 1 || o.Replicas > maxReplicas {
		bad("replication factor %d: must be from 1 to %d", o.Replicas, maxReplicas)
	}
	return errors.Join(errs...)
}

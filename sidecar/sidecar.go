package sidecar

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/fileutil"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/backfill"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// Sidecar tails one Prometheus and ships what it finds.
type Sidecar struct {
	opts    Options
	logger  *slog.Logger
	lock    fileutil.Releaser
	shipper *shipper
	flags   *flags
	client  *http.Client

	health *health.Board

	mu     sync.Mutex
	status Status
}

// Status says how a sidecar is doing, for its status page.
type Status struct {
	Time            time.Time       `json:"time"` // of this status
	Source          string          `json:"source"`
	Tenant          string          `json:"tenant"`
	PrometheusDir   string          `json:"prometheus_dir"`
	Agent           bool            `json:"agent"` // the Prometheus is an agent
	Position        tail.Position   `json:"position"`
	Checkpoint      tail.Position   `json:"checkpoint"` // all before it is durable
	LagBytes        int64           `json:"lag_bytes"`  // of WAL, not read yet
	NewestSample    time.Time       `json:"newest_sample"`
	KeptBytes       int64           `json:"kept_bytes"`      // of WAL that Prometheus has deleted
	Gap             *GapStatus      `json:"gap,omitempty"`   // that is open
	Fills           []FillStatus    `json:"fills,omitempty"` // blocks of Prometheus to be sent, in this order
	Series          int             `json:"series"`
	DictionaryBytes int64           `json:"dictionary_bytes"`
	OpenRanges      int             `json:"open_ranges"`
	QueuedRanges    int             `json:"queued_ranges"`
	Replicas        int             `json:"replicas"` // ingesters that each series goes to
	Copies          int             `json:"copies"`   // the fewest that ingesters now hold of something not durable
	Ring            string          `json:"ring"`     // version
	RingError       string          `json:"ring_error,omitempty"`
	LabelsKnown     bool            `json:"labels_known"`
	ExternalLabels  labels.Labels   `json:"external_labels"`
	LabelsError     string          `json:"labels_error,omitempty"`
	Replica         *ReplicaStatus  `json:"replica,omitempty"`    // where one of several is chosen
	HeldSince       *time.Time      `json:"held_since,omitempty"` // while it isn't known whether samples are to be sent
	Sessions        []SessionStatus `json:"sessions"`
}

// ReplicaStatus says what a Prometheus is among its replicas.
type ReplicaStatus struct {
	Name   string `json:"name"`
	Chosen bool   `json:"chosen"`          // at its newest sample
	Error  string `json:"error,omitempty"` // of the last request to a gateway
}

// GapStatus is a stretch of the WAL that may not have been read; it is read from
// blocks as Prometheus writes them.
type GapStatus struct {
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Newest time.Time `json:"newest"` // of the samples in it, at most
}

// FillStatus is a block of Prometheus that is, or will be, read and sent.
type FillStatus struct {
	Block   string    `json:"block"`
	Reason  string    `json:"reason"`
	MinTime time.Time `json:"min_time"`
	MaxTime time.Time `json:"max_time"`
	Samples uint64    `json:"samples"`
	Read    uint64    `json:"read"` // samples, since this start
}

// SessionStatus says how a session with an ingester is doing.
type SessionStatus struct {
	Owner         string    `json:"owner"`
	Address       string    `json:"address"`
	Connected     bool      `json:"connected"`
	Detached      bool      `json:"detached"` // left out at present
	Sent          uint64    `json:"sent"`     // sequence numbers
	Received      uint64    `json:"received"`
	Durable       uint64    `json:"durable"`
	InflightBytes int64     `json:"inflight_bytes"`
	LastAnswer    time.Time `json:"last_answer"`
	Began         time.Time `json:"began"`
}

// New checks the options, opens the sidecar's own data directory and takes its
// lock. Run starts it, and releases the lock when it ends.
func New(opts Options, logger *slog.Logger, reg prometheus.Registerer) (*Sidecar, error) {
	opts.setDefaults()
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	dir, err := tail.OpenDir(opts.PrometheusDir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(opts.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("sidecar's data directory: %w", err)
	}
	lock, _, err := fileutil.Flock(filepath.Join(opts.DataDir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("another sidecar uses the data directory %s (or it can't be locked: %w): give each its own", opts.DataDir, err)
	}
	s, err := open(opts, dir, logger, reg)
	if err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	s.lock = lock
	return s, nil
}

func open(opts Options, dir *tail.Dir, logger *slog.Logger, reg prometheus.Registerer) (*Sidecar, error) {
	cp, err := loadCheckpoint(opts.DataDir)
	if err != nil {
		return nil, err
	}
	versions, err := loadLabelVersions(opts.Tenant, cp.Labels)
	if err != nil {
		return nil, err
	}
	dict, err := openDictionary(opts.DataDir)
	if err != nil {
		return nil, err
	}
	dict.replicate(opts.Replicas)
	m := newMetrics(reg)
	tailMetrics := tail.NewMetrics(reg)
	logger = logger.With("component", "sidecar", "tenant", opts.Tenant, "source", cp.Source)
	files, err := tail.NewFiles(dir, filepath.Join(opts.DataDir, "segments"), opts.KeepBytes, logger, tailMetrics)
	if err != nil {
		return nil, err
	}
	blocks, err := loadBlocks(opts.DataDir, logger, m)
	if err != nil {
		return nil, err
	}
	s := &Sidecar{opts: opts, logger: logger, health: &health.Board{}, client: &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}}
	sh := &shipper{
		opts: opts, logger: logger, metrics: m, tailMetrics: tailMetrics, dir: dir, source: cp.source(),
		health: s.health, files: files, blocks: blocks, listBlocks: backfill.NewLister(dir.Path()).List,
		dict: dict, cp: cp, versions: versions, wake: make(chan struct{}, 1), publish: s.setStatus,
	}
	// What was sent between the last checkpoint and a kill isn't in it.
	sh.sentBefore = max(cp.Newest, cp.Updated.Add(2*opts.CheckpointInterval).UnixMilli())
	gatewayClient := s.client
	if opts.HTTPClient != nil {
		gatewayClient = opts.HTTPClient
	}
	sh.ringWatch = &ringWatch{
		gateways: opts.Gateways, tenant: opts.Tenant, wait: opts.RingWait, client: gatewayClient,
		logger: logger, failed: m.ringErrors.Inc, notify: sh.notify,
	}
	sh.external = &externalLabels{
		url: opts.PrometheusURL, file: opts.PrometheusConfigFile, every: opts.LabelsInterval, client: s.client,
		logger: logger, failed: m.labelErrors.Inc, notify: sh.notify,
	}
	sh.families = newFamilies(opts.PrometheusURL, opts.MetadataInterval)
	sh.families.client, sh.families.logger = s.client, logger
	sh.families.failed, sh.families.notify = m.metadataErrors.Inc, sh.notify
	sh.choosing = choosing{groups: map[string]*claims{}, claimer: &claimer{
		gateways: opts.Gateways, tenant: opts.Tenant, source: hex.EncodeToString(sh.source[:]), client: gatewayClient, logger: logger, metrics: m, notify: sh.notify,
		requests: make(chan choice.Request, 1),
	}}
	s.flags = &flags{
		url: opts.PrometheusURL, gateways: opts.Gateways, tenant: opts.Tenant, client: s.client, gateway: gatewayClient,
		logger: logger, failed: m.flagErrors.Inc,
	}
	sh.connect = sh.dial
	s.shipper = sh
	s.setStatus(Status{})
	return s, nil
}

// Run tails and ships until ctx is done. Whatever goes wrong outside of the
// sidecar's own data directory is waited for.
func (s *Sidecar) Run(ctx context.Context) error {
	defer func() { _ = s.lock.Release() }() // the end of the process would do it too
	defer s.shipper.dict.close()
	defer s.shipper.files.Close()
	defer s.shipper.blocks.closeReaders()
	defer s.client.CloseIdleConnections()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		s.shipper.ringWatch.run(ctx)
		return nil
	})
	g.Go(func() error {
		s.shipper.choosing.claimer.run(ctx)
		return nil
	})
	g.Go(func() error {
		s.shipper.external.run(ctx)
		return nil
	})
	g.Go(func() error {
		s.flags.run(ctx)
		return nil
	})
	g.Go(func() error {
		s.shipper.families.run(ctx)
		return nil
	})
	g.Go(func() error { return s.shipper.run(ctx) })
	return g.Wait()
}

func (s *Sidecar) setStatus(st Status) {
	st.Source, st.Tenant, st.PrometheusDir = s.shipper.cp.Source, s.opts.Tenant, s.opts.PrometheusDir
	slices.SortFunc(st.Sessions, func(a, b SessionStatus) int { return strings.Compare(a.Owner, b.Owner) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = st
}

// Status returns the state of about a second ago.
func (s *Sidecar) Status() Status {
	s.mu.Lock()
	st := s.status
	s.mu.Unlock()
	if _, err := s.shipper.ringWatch.present(); err != nil {
		st.RingError = err.Error()
	}
	if err := s.shipper.external.lastError(); err != nil {
		st.LabelsError = err.Error()
	}
	return st
}

// Health says what is degraded.
func (s *Sidecar) Health() *health.Board { return s.health }

// Ready returns nil if the sidecar does its work: it reads the WAL and can send
// what it reads. Otherwise the error says what it lacks.
func (s *Sidecar) Ready() error {
	st := s.Status()
	var errs []error
	if st.Time.IsZero() {
		errs = append(errs, errors.New("no WAL to read yet"))
	}
	if !st.LabelsKnown {
		errs = append(errs, fmt.Errorf("external labels of Prometheus are not known yet: %s", st.LabelsError))
	}
	if st.Ring == "" {
		if st.RingError == "" {
			st.RingError = "none is on it"
		}
		errs = append(errs, fmt.Errorf("no ingester to send to: %s", st.RingError))
	} else if len(st.Sessions) > 0 && !slices.ContainsFunc(st.Sessions, func(x SessionStatus) bool { return x.Connected }) {
		errs = append(errs, errors.New("no ingester can be reached"))
	}
	return errors.Join(errs...)
}

// Position is a place in a source's WAL.
type Position = tail.Position

package gatewaytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/merge"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// Options of a Cluster. The zero value is one ingester with a visibility delay
// of 5 minutes.
type Options struct {
	Ingesters       int
	VisibilityDelay time.Duration
	// Run runs the ingesters: generations are dropped after the visibility delay,
	// and all is flushed at the end. Without, a flush is by Flush only.
	Run bool
	// BeforePublish is called before each block is published. May be nil.
	BeforePublish func()
	// Retentions as in history.Options.
	Retentions func() *history.Retentions
}

// Cluster is ingesters, history and a gateway's storage.
type Cluster struct {
	Live      *ring.Live
	Objects   object.Store
	Index     *index.Index
	History   *history.History
	Heads     *merge.Heads
	Storage   *merge.Storage
	Ingesters []*ingest.Ingester

	members  []ring.Member
	bolt     *index.Bolt
	stops    []func() error
	shippers []*Shipper
	closed   sync.Once

	mu        sync.Mutex
	listeners map[string]*bufconn.Listener // by address
}

// New starts a cluster, which ends with the test, if it isn't closed before.
// Requests are of the tenant that gateway.WithTenant put into their context, or
// of gateway.DefaultTenant.
func New(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Ingesters == 0 {
		o.Ingesters = 1
	}
	if o.VisibilityDelay == 0 {
		o.VisibilityDelay = 5 * time.Minute
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	reg := prometheus.NewRegistry()
	logger := slog.New(slog.DiscardHandler)
	objects, err := object.NewFiles(filepath.Join(dir, "objects"), reg)
	must(err)
	c := &Cluster{Live: &ring.Live{}, listeners: map[string]*bufconn.Listener{}}
	c.bolt, err = index.NewBolt(filepath.Join(dir, "index.db"), reg)
	must(err)
	c.Objects, c.Index = objects, index.New(c.bolt)
	c.History, err = history.New(history.Options{
		Objects: c.Objects, Index: c.Index, VisibilityDelay: o.VisibilityDelay, Retentions: o.Retentions, Registerer: reg,
	})
	must(err)
	for i := range o.Ingesters {
		id := fmt.Sprintf("ingester-%d", i)
		ing, err := ingest.New(ingest.Options{
			Member: id, RowWidth: history.Window, VisibilityDelay: o.VisibilityDelay, FlushInterval: 24 * time.Hour,
		}, publisher{c.History, o.BeforePublish}, logger, prometheus.NewRegistry())
		must(err)
		c.Ingesters = append(c.Ingesters, ing)
		if o.Run {
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- ing.Run(ctx) }()
			c.stops = append(c.stops, func() error { cancel(); return <-done })
		}
		c.Serve(id, ring.Active, ing.Register)
	}
	c.Heads = merge.NewHeads(c.Live, logger, reg, c.DialOptions()...)
	c.Storage = merge.New(c.Heads, c.History, tenant)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func tenant(ctx context.Context) string {
	if t := gateway.TenantOf(ctx); t != "" {
		return t
	}
	return gateway.DefaultTenant
}

// Serve puts a member on the ring whose gRPC server has what register adds. A
// nil register makes one that never accepts a connection.
func (c *Cluster) Serve(id string, state ring.State, register func(*grpc.Server)) {
	m := ring.Member{ID: id, Address: "passthrough:///" + id, State: state, Process: id}
	if register != nil {
		l := bufconn.Listen(256 << 10)
		server := grpc.NewServer(grpc.MaxRecvMsgSize(4 << 20))
		register(server)
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		c.mu.Lock()
		c.listeners[id] = l
		c.mu.Unlock()
		c.stops = append(c.stops, func() error {
			server.Stop()
			if err := <-served; !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun to serve
				return err
			}
			return nil
		})
	}
	c.members = append(c.members, m)
	c.Live.Set(ring.NewSnapshot(slices.Clone(c.members)))
}

// ServeFetch is Serve for a member that answers only queries.
func (c *Cluster) ServeFetch(id string, s fetchpb.FetchServer) {
	c.Serve(id, ring.Active, func(g *grpc.Server) { fetchpb.RegisterFetchServer(g, s) })
}

// SetState changes the state of a member on the ring.
func (c *Cluster) SetState(id string, s ring.State) {
	for i := range c.members {
		if c.members[i].ID == id {
			c.members[i].State = s
		}
	}
	c.Live.Set(ring.NewSnapshot(slices.Clone(c.members)))
}

// DialOptions are those with which the members are reached.
func (c *Cluster) DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, id string) (net.Conn, error) {
			c.mu.Lock()
			l := c.listeners[id]
			c.mu.Unlock()
			if l == nil {
				<-ctx.Done()
				return nil, context.Cause(ctx)
			}
			return l.DialContext(ctx)
		}),
	}
}

// Flush makes all durable that was sent.
func (c *Cluster) Flush(ctx context.Context) error {
	for _, i := range c.Ingesters {
		if err := i.Flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Import publishes a block that no head has had, of a tenant's series. The options' window is set.
func (c *Cluster) Import(ctx context.Context, tenant string, o chunkfmt.WriterOptions, ss ...*chunkfmt.Series) (id ulid.ULID, err error) {
	o.Window = history.Window
	var block bytes.Buffer
	w := chunkfmt.NewWriter(&block, o)
	for _, s := range ss {
		if err := w.Add(tenant, s); err != nil {
			return id, err
		}
	}
	sum, err := w.Close()
	if err != nil {
		return id, err
	}
	id = ulid.Make()
	return id, c.History.Publish(ctx, id, block.Bytes(), sum)
}

// Close ends all.
func (c *Cluster) Close() error {
	var errs []error
	c.closed.Do(func() {
		for _, s := range c.shippers {
			errs = append(errs, s.close())
		}
		errs = append(errs, c.Heads.Close())
		for _, stop := range slices.Backward(c.stops) {
			errs = append(errs, stop())
		}
		errs = append(errs, c.bolt.Close())
	})
	return errors.Join(errs...)
}

// publisher is a History that says when a block is about to be published.
type publisher struct {
	*history.History
	before func() // may be nil
}

// Publish implements ingest.Publisher.
func (p publisher) Publish(ctx context.Context, id ulid.ULID, data []byte, sum *chunkfmt.Summary) error {
	if p.before != nil {
		p.before()
	}
	return p.History.Publish(ctx, id, data, sum)
}

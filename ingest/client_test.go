package ingest

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// env is an ingester behind gRPC, on a history whose stores fail as told.
type env struct {
	*Ingester
	t       *testing.T
	reg     *prometheus.Registry
	conn    *grpc.ClientConn
	server  *grpc.Server
	listen  *bufconn.Listener
	history *history.History

	// decide says what happens to a call of the object or row store; nil: it
	// works.
	decide atomic.Pointer[historytest.Decide]
	index  *index.Index
	held   atomic.Pointer[[]string] // tenants whose rows can't be written
}

func (e *env) hold(tenants ...string) { e.held.Store(&tenants) }

func (e *env) faults(d historytest.Decide) {
	if d == nil {
		e.decide.Store(nil)
		return
	}
	e.decide.Store(&d)
}

func start(t *testing.T, o Options) *env {
	t.Helper()
	return startOn(t, o, newStores(t))
}

// stores are what ingesters of a test have in common.
type stores struct {
	objects object.Store
	rows    index.Store
}

func newStores(t *testing.T) stores {
	t.Helper()
	return stores{historytest.Files(t, prometheus.NewRegistry()), historytest.Bolt(t, prometheus.NewRegistry())}
}

func startOn(t *testing.T, o Options, on stores) *env {
	t.Helper()
	e := &env{t: t, reg: prometheus.NewRegistry()}
	decide := func(op, key string) historytest.Fault {
		if d := e.decide.Load(); d != nil {
			return (*d)(op, key)
		}
		return historytest.None
	}
	objects := &historytest.FaultyObjects{Store: on.objects, Decide: decide}
	rows := &historytest.HeldRows{Store: &historytest.FaultyRows{Store: on.rows, Decide: decide}, Held: func(hash string) bool {
		held := e.held.Load()
		return held != nil && slices.Contains(*held, strings.TrimPrefix(hash, "b/"))
	}}
	e.index = index.New(rows)
	var err error
	e.history, err = history.New(history.Options{
		Objects: objects, Index: e.index, Logger: promslog.NewNopLogger(), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	o.Member, o.RowWidth = "ingester-0", index.Width
	if e.Ingester, err = New(o, e.history, promslog.NewNopLogger(), e.reg); err != nil {
		t.Fatal(err)
	}
	if e.log != nil {
		if err := e.Replay(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		log := e.log
		go func() { ended <- log.Run(ctx) }() // ends with the cleanup, after the server
		t.Cleanup(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	e.serve(t)
	return e
}

// serve puts the ingester behind gRPC.
func (e *env) serve(t *testing.T) {
	t.Helper()
	e.server, e.listen = grpc.NewServer(), bufconn.Listen(1<<20)
	e.Register(e.server)
	served := make(chan error, 1)
	go func() { served <- e.server.Serve(e.listen) }() // ends with the cleanup
	t.Cleanup(func() {
		e.server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	var err error
	e.conn, err = grpc.NewClient("passthrough:ingester", grpc.WithTransportCredentials(insecure.NewCredentials()), dialer(func() *env { return e }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.conn.Close() })
}

// dialer reaches the env that is current when it dials.
func dialer(current func() *env) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return current().listen.DialContext(ctx) })
}

// counted is the value of a counter or gauge of the ingester.
func (e *env) counted(name string) float64 {
	e.t.Helper()
	all, err := e.reg.Gather()
	if err != nil {
		e.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range all {
		if f.GetName() == name {
			for _, m := range f.Metric {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func (e *env) samplesReceived(outcome string) float64 {
	return testutil.ToFloat64(e.receive.metrics.samples.WithLabelValues(outcome))
}

// selected gives what the fetch protocol answers, all generations together.
func (e *env) selected(tenant string) ([]fetch.Series, error) {
	e.t.Helper()
	lists, _, err := fetch.NewClient(e.conn, fetch.NewNames(1<<20, prometheus.NewRegistry()), nil).Select(e.t.Context(), fetch.Query{
		Tenant: tenant, MinT: math.MinInt64, MaxT: math.MaxInt64,
	})
	out := slices.Concat(lists...)
	slices.SortStableFunc(out, func(a, b fetch.Series) int { return labels.Compare(a.Labels, b.Labels) })
	for i := len(out) - 1; i > 0; i-- {
		if labels.Equal(out[i-1].Labels, out[i].Labels) {
			out[i-1].Chunks = append(out[i-1].Chunks, out[i].Chunks...)
			out = slices.Delete(out, i, i+1)
		}
	}
	return out, err
}

// inHead gives times and values of the series that the fetch protocol answers.
func (e *env) inHead(tenant string) map[string][]float64 {
	e.t.Helper()
	found, err := e.selected(tenant)
	if err != nil {
		e.t.Fatal(err)
	}
	out := map[string][]float64{}
	for _, s := range found {
		var d fetch.Decoder
		cols, err := d.Decode(s.Chunks)
		if err != nil {
			e.t.Fatal(err)
		}
		for i, at := range cols.Floats.T {
			out[s.Labels.String()] = append(out[s.Labels.String()], float64(at), cols.Floats.V[i])
		}
	}
	return out
}

// inBlocks is inHead for what history has, and how many blocks there are.
func (e *env) inBlocks(tenant string) (map[string][]float64, int) {
	e.t.Helper()
	ctx := e.t.Context()
	snap, err := e.history.Snapshot(ctx, tenant, 0, math.MaxInt32, nil, time.Now())
	if err != nil {
		e.t.Fatal(err)
	}
	set, err := snap.Select(ctx, []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, ".+")}, 0, math.MaxInt32)
	if err != nil {
		e.t.Fatal(err)
	}
	out := map[string][]float64{}
	for set.Next(ctx) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			e.t.Fatal(err)
		}
		for _, r := range runs {
			for i, at := range r.Floats.T {
				out[set.At().Labels.String()] = append(out[set.At().Labels.String()], float64(at), r.Floats.V[i])
			}
		}
	}
	if err := set.Err(); err != nil {
		e.t.Fatal(err)
	}
	return out, len(snap.Blocks)
}

// client speaks the ship protocol by hand, without the care of ship.Session.
type client struct {
	t       *testing.T
	stream  grpc.BidiStreamingClient[shippb.ToIngester, shippb.ToSidecar]
	welcome *shippb.Welcome
	cancel  context.CancelFunc
	refused []*shippb.Refused // in all acknowledgements so far
	encoder ship.Encoder
}

// hello is one for a new session.
func hello(tenant string) *shippb.Hello {
	h := &shippb.Hello{Version: ship.Version, Tenant: tenant, Source: make([]byte, 16), Session: make([]byte, 16), NextSeq: 1}
	rand.Read(h.Session)
	return h
}

// open sends the hello and awaits the welcome.
func (e *env) open(h *shippb.Hello) (*client, error) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), time.Minute)
	e.t.Cleanup(cancel)
	stream, err := shippb.NewShipClient(e.conn).Stream(ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	c := &client{t: e.t, stream: stream, cancel: cancel}
	if err := stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Hello{Hello: h}}); err != nil && !errors.Is(err, io.EOF) {
		e.t.Fatal(err)
	}
	m, err := stream.Recv() // for io.EOF it has the reason
	if err != nil {
		return nil, err
	}
	c.welcome = m.GetWelcome()
	if c.welcome == nil {
		e.t.Fatalf("no welcome but %v", m)
	}
	return c, nil
}

func (e *env) mustOpen(h *shippb.Hello) *client {
	e.t.Helper()
	c, err := e.open(h)
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

// batch makes a batch of (ref, t, v) after announcements of metrics by name, the
// first of which gets the ref given.
func (c *client) batch(seq uint64, first uint32, announce []string, rtv ...float64) *shippb.Batch {
	b := &shippb.Batch{Seq: seq}
	for i, name := range announce {
		b.Announce = append(b.Announce, &shippb.Series{Ref: first + uint32(i), Labels: []string{model.MetricNameLabel, name}})
	}
	var cols ship.Columns
	for s := range slices.Chunk(rtv, 3) {
		cols.Floats.Ref = append(cols.Floats.Ref, uint32(s[0]))
		cols.Floats.T = append(cols.Floats.T, int64(s[1]))
		cols.Floats.V = append(cols.Floats.V, s[2])
	}
	b.Columns = c.encoder.Encode(nil, &cols)
	return b
}

func (c *client) send(b *shippb.Batch) {
	c.t.Helper()
	if err := c.stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Batch{Batch: b}}); err != nil {
		c.t.Fatal(err)
	}
}

// await reads acknowledgements until they say just as much.
func (c *client) await(received, durable uint64) {
	c.t.Helper()
	if last := c.awaitAtLeast(received, durable); last.Received > received || last.Durable > durable {
		c.t.Fatalf("received %d, durable %d, want %d, %d", last.Received, last.Durable, received, durable)
	}
}

// awaitAtLeast reads acknowledgements until they say as much. They never go back.
func (c *client) awaitAtLeast(received, durable uint64) *shippb.Ack {
	c.t.Helper()
	last := &shippb.Ack{}
	for last.Received < received || last.Durable < durable {
		m, err := c.stream.Recv()
		if err != nil {
			c.t.Fatalf("after received %d, durable %d: %v", last.Received, last.Durable, err)
		}
		ack := m.GetAck()
		if ack == nil || ack.Received < last.Received || ack.Durable < last.Durable || ack.Durable > ack.Received {
			c.t.Fatalf("%v after received %d, durable %d", m, last.Received, last.Durable)
		}
		last = ack
		c.refused = append(c.refused, ack.Refused...)
	}
	return last
}

// ends awaits the end of the stream.
func (c *client) ends(want codes.Code) {
	c.t.Helper()
	for {
		if _, err := c.stream.Recv(); err != nil {
			s, ok := status.FromError(err)
			if !ok {
				s = status.New(codes.Unknown, errors.Unwrap(err).Error())
			}
			if s.Code() != want {
				c.t.Errorf("the stream ended with %v, want %v", s, want)
			}
			return
		}
	}
}

// condemn says of a block what a sweeper says.
func (e *env) condemn(id ulid.ULID) error {
	_, err := e.index.Guard(e.t.Context(), id, index.Condemned)
	return err
}

func queryAll(tenant string) fetch.Query {
	return fetch.Query{Tenant: tenant, MinT: math.MinInt64, MaxT: math.MaxInt64}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

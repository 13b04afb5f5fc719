package worker

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
	"github.com/epimetheus-tsdb/epimetheus/internal/dial"
)

// maxResult bounds the result of a part, in bytes.
const maxResult = 64 << 20

// Peer is a gateway.
type Peer struct {
	ID      string
	Address string // host:port of its gRPC server
}

// Pool implements plan.Workers. Close it after use.
type Pool struct {
	self  string
	peers func() []Peer
	conns *dial.Conns

	logger   *slog.Logger
	requests *prometheus.CounterVec
	hedges   prometheus.Counter
	seconds  prometheus.Histogram

	mu      sync.Mutex
	usual   time.Duration   // that a part takes: a moving average
	failing map[string]bool // gateways, by id, of which the last part failed: that was logged
}

// NewPool makes a pool for the gateway self. peers gives all gateways that are
// there, with or without self.
func NewPool(self string, peers func() []Peer, logger *slog.Logger, reg prometheus.Registerer, options ...grpc.DialOption) *Pool {
	p := &Pool{
		self: self, peers: peers, logger: logger, failing: map[string]bool{},
		conns: dial.New(logger, append(options, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResult+1<<10)))...),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_gateway_worker_requests_total",
			Help: "Parts of queries that other gateways were asked for, by outcome: ok, declined (the engine has to see the data, versions or options differ, or a limit was reached), failed.",
		}, []string{"outcome"}),
		hedges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_gateway_worker_hedges_total", Help: "Parts of queries that a second gateway was asked for since the first was slow.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "epimetheus_gateway_worker_request_duration_seconds", Help: "Time that other gateways took for a part of a query.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}),
	}
	reg.MustRegister(p.requests, p.hedges, p.seconds, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gateway_workers", Help: "Gateways that share parts of long queries, this one included.",
	}, func() float64 { return float64(len(p.inLine(plan.Key{}))) }))
	return p
}

// Close closes the connections.
func (p *Pool) Close() error { return p.conns.Close() }

// inLine gives the gateways in the order in which a part falls to them.
func (p *Pool) inLine(key plan.Key) []Peer {
	type ranked struct {
		Peer
		rank uint64
	}
	var all []ranked
	for _, peer := range append(slices.Clip(p.peers()), Peer{ID: p.self}) {
		if slices.ContainsFunc(all, func(r ranked) bool { return r.ID == peer.ID }) {
			continue
		}
		d := xxhash.New()
		_, _ = d.Write(key[:])          // gives no error
		_, _ = d.Write([]byte(peer.ID)) // gives no error
		all = append(all, ranked{peer, d.Sum64()})
	}
	slices.SortFunc(all, func(a, b ranked) int { return cmp.Or(cmp.Compare(b.rank, a.rank), cmp.Compare(a.ID, b.ID)) })
	out := make([]Peer, len(all))
	for i, r := range all {
		out[i] = r.Peer
	}
	return out
}

// Size implements plan.Workers.
func (p *Pool) Size() int { return len(p.inLine(plan.Key{})) }

// Owner implements plan.Workers.
func (p *Pool) Owner(key plan.Key) string { return p.inLine(key)[0].ID }

// Here implements plan.Workers.
func (p *Pool) Here(key plan.Key) bool { return p.inLine(key)[0].ID == p.self }

// tries is how many other gateways are asked for a part.
const tries = 2

// A part that takes so long at the least, and several times of what parts usually
// take, is asked for again; after twice that the caller computes it, if it has nothing else
// to do.
const (
	hedgeFloor = 500 * time.Millisecond
	hedgeTimes = 5
	hereTimes  = 2
)

// Run implements plan.Workers.
func (p *Pool) Run(ctx context.Context, key plan.Key, t *plan.Task) ([]byte, error) {
	line := p.inLine(key)
	if at := slices.IndexFunc(line, func(x Peer) bool { return x.ID == p.self }); at < tries {
		line = line[:at] // after those it is the caller's
	} else {
		line = line[:tries]
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the slower one
	type answer struct {
		b   []byte
		err error
	}
	answers := make(chan answer, len(line))
	req := request(t)
	asked, failed := 0, 0
	ask := func() {
		peer := line[asked]
		asked++
		go func() { // ends with its answer, which ends with ctx
			b, err := p.one(ctx, peer, req)
			answers <- answer{b, err}
		}()
	}
	for len(line) > 0 {
		if asked == failed {
			if asked == len(line) {
				break
			}
			ask()
		}
		slow := time.NewTimer(p.slow())
		select {
		case <-ctx.Done():
			slow.Stop()
			return nil, context.Cause(ctx)
		case <-slow.C:
			if asked < len(line) {
				p.hedges.Inc()
				ask()
			}
		case a := <-answers:
			slow.Stop()
			switch {
			case ctx.Err() != nil: // perhaps for what they have read
				return nil, context.Cause(ctx)
			case a.err == nil, errors.Is(a.err, plan.ErrGiveUp), errors.Is(a.err, plan.ErrUnlike), errors.Is(a.err, plan.ErrHere):
				return a.b, a.err
			}
			failed++
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, plan.ErrHere
}

// Patience implements plan.Workers.
func (p *Pool) Patience() time.Duration { return hereTimes * p.slow() }

// slow is how long a part may take before another gateway is asked too.
func (p *Pool) slow() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(hedgeFloor, hedgeTimes*p.usual)
}

// one asks one gateway.
func (p *Pool) one(ctx context.Context, peer Peer, req *workpb.RunRequest) ([]byte, error) {
	peers := p.peers()
	c, err := p.conns.To(peer.Address, func(a string) bool { return slices.ContainsFunc(peers, func(x Peer) bool { return x.Address == a }) })
	if err != nil {
		return nil, err
	}
	start := time.Now()
	r, err := workpb.NewWorkClient(c).Run(ctx, req)
	took := time.Since(start)
	if c := told(r, err); c != nil {
		read, costErr := costOf(c)
		if costErr == nil {
			account.From(ctx).AddWorker(peer.ID, read)
		} else if err == nil {
			err = costErr
		}
	}
	switch status.Code(err) {
	case codes.OK:
		p.requests.WithLabelValues("ok").Inc()
		p.seconds.Observe(took.Seconds())
		p.took(took)
		p.fails(peer, nil)
		return r.GetResult(), nil
	case codes.FailedPrecondition:
		p.requests.WithLabelValues("declined").Inc()
		return nil, plan.ErrGiveUp
	case codes.Unimplemented:
		p.requests.WithLabelValues("declined").Inc()
		return nil, plan.ErrUnlike
	case codes.OutOfRange:
		p.requests.WithLabelValues("declined").Inc()
		return nil, plan.ErrHere
	case codes.Canceled:
		p.tookLonger(took)
		return nil, err
	}
	p.requests.WithLabelValues("failed").Inc()
	p.fails(peer, err)
	return nil, err
}

// fails notes whether a gateway fails to compute parts, and logs when it begins to.
func (p *Pool) fails(peer Peer, err error) {
	peers := p.peers()
	p.mu.Lock()
	was := p.failing[peer.ID]
	p.failing[peer.ID] = err != nil
	maps.DeleteFunc(p.failing, func(id string, fails bool) bool {
		return !fails || !slices.ContainsFunc(peers, func(x Peer) bool { return x.ID == id })
	})
	p.mu.Unlock()
	if err != nil && !was {
		p.logger.Warn("another gateway fails to compute parts of queries, they are computed elsewhere", "gateway", peer.ID, "addr", peer.Address, "err", err)
	}
}

// told gives what a gateway says it has read, with a result or an error; nil if it doesn't say.
func told(r *workpb.RunResponse, err error) *workpb.Cost {
	for _, d := range status.Convert(err).Details() {
		if c, ok := d.(*workpb.Cost); ok {
			return c
		}
	}
	return r.GetCost()
}

// took notes how long a part has taken.
func (p *Pool) took(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usual += (d - p.usual) / 16
}

// tookLonger notes that a part would have taken longer than it was waited for.
// Otherwise parts that all take longer would never be waited for long enough.
func (p *Pool) tookLonger(than time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usual += max(0, than-p.usual) / 16
}

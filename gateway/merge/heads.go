package merge

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/util/annotations"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/dial"
)

// headTimeout bounds one request to an ingester: a query is not held up by one
// that hangs. Nor does it take more than half of the time that a query has left,
// so that the rest can still be answered.
const headTimeout = 15 * time.Second

// lostTimeout bounds a request to an ingester that others take for lost.
const lostTimeout = 2 * time.Second

func errLost(m ring.Member) error {
	return fmt.Errorf("ingester %s vanished: its fresh samples are being sent again, some may be missing", m.ID)
}

func timeout(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(headTimeout, time.Until(end)/2)
	}
	return headTimeout
}

// maxAnswer bounds a message of an ingester, in bytes.
const maxAnswer = 64 << 20

// maxNames bounds the labels of series in heads that are kept, in bytes: those of a
// million, about.
const maxNames = 256 << 20

// Heads asks the ingesters of the ring. Close it after use.
type Heads struct {
	names   *fetch.Names
	live    *ring.Live
	conns   *dial.Conns
	logger  *slog.Logger
	failed  prometheus.Counter
	seconds prometheus.Histogram

	covered prometheus.Counter

	mu    sync.Mutex
	local map[string]fetch.Local      // by address
	heard map[string]map[string]heard // by tenant and member; of tenants with several replicas
	noted *ring.Ring                  // whose members are in known
	known map[uint32]time.Time        // digests of members, and when they came to the ring or left it
}

// NewHeads uses the options for each connection: transport security goes there.
func NewHeads(live *ring.Live, logger *slog.Logger, reg prometheus.Registerer, options ...grpc.DialOption) *Heads {
	h := &Heads{
		names: fetch.NewNames(maxNames, reg),
		live:  live, conns: dial.New(logger, append(options, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))...),
		logger: logger, local: map[string]fetch.Local{}, heard: map[string]map[string]heard{}, known: map[uint32]time.Time{},
		failed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_gateway_head_failures_total",
			Help: "Requests to ingesters that failed; the answers carried a warning, if no replicas had all.",
		}),
		covered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_gateway_covered_requests_total",
			Help: "Requests to all ingesters of which some were missing, without a warning: other replicas had all of their fresh samples.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "epimetheus_gateway_head_request_duration_seconds", Help: "Time that requests to ingesters took.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}),
	}
	reg.MustRegister(h.failed, h.covered, h.seconds)
	return h
}

// AddLocal says that the ingester at an address is in this process.
func (h *Heads) AddLocal(address string, l fetch.Local) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.local[address] = l
}

// Close closes the connections. Requests after it fail.
func (h *Heads) Close() error { return h.conns.Close() }

// client gives the client for an address, and closes connections to addresses
// that are no longer on the ring.
func (h *Heads) client(address string, members []ring.Member) (*fetch.Client, error) {
	conn, err := h.conns.To(address, func(a string) bool {
		return slices.ContainsFunc(members, func(m ring.Member) bool { return m.Address == a })
	})
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return fetch.NewClient(conn, h.names, h.local[address]), nil
}

// answer is what one ingester said.
type answer[T any] struct {
	member string // id
	value  T
	header fetch.Header
}

// ask asks all ingesters at once about a tenant. Those that don't answer, or that
// vanished, make warnings, unless others have all of theirs. Rows of the index
// are to be listed after the time that it returns.
func ask[T any](ctx context.Context, h *Heads, tenant string, fn func(context.Context, *fetch.Client) (T, fetch.Header, error)) (_ []answer[T], since time.Time, warnings annotations.Annotations, _ error) {
	r := h.live.Ring()
	members := r.Snapshot().Members
	var mu sync.Mutex
	var wg sync.WaitGroup
	var out []answer[T]
	c := coverage{members: members}
	var missing annotations.Annotations
	resending, restarted := false, false
	miss := func(m ring.Member, err error) {
		mu.Lock()
		defer mu.Unlock()
		c.missing = append(c.missing, m)
		missing.Add(err)
	}
	var last func()
	for _, m := range members {
		if m.State == ring.Left {
			continue
		}
		limit := timeout(ctx)
		if m.State == ring.Lost {
			if slices.ContainsFunc(members, func(x ring.Member) bool { return x.State != ring.Lost && (x.ID == m.ID || x.Address == m.Address) }) {
				// It is there again as another process, or another is in its place.
				miss(m, errLost(m))
				continue
			}
			// It may be out of reach for others only.
			limit = min(limit, lostTimeout)
		}
		if last != nil {
			wg.Go(last)
		}
		last = func() {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			asked := time.Now()
			cl, err := h.client(m.Address, members)
			var v T
			var hd fetch.Header
			if err == nil {
				v, hd, err = fn(ctx, cl)
			}
			if err != nil && m.State == ring.Lost {
				miss(m, errLost(m))
				return
			}
			h.seconds.Observe(time.Since(asked).Seconds())
			if err != nil {
				h.failed.Inc()
				miss(m, fmt.Errorf("ingester %s did not answer, fresh samples may be missing: %w", m.ID, err))
				return
			}
			if other(m.Memory, hd.Process) {
				// The ring will soon say so too. What it has now counts.
				miss(m, errLost(m))
				m.Memory = hex.EncodeToString(hd.Process)
			}
			mu.Lock()
			defer mu.Unlock()
			restarted = restarted || other(m.Process, hd.Start)
			resending = resending || hd.Resending
			c.answers = append(c.answers, heading{m, hd})
			out = append(out, answer[T]{m.ID, v, hd})
		}
	}
	if last != nil { // here: where there is one ingester nobody has to be woken
		last()
	}
	wg.Wait()
	since = r.Since()
	if ctx.Err() != nil {
		return nil, since, nil, context.Cause(ctx)
	}
	now := time.Now()
	c.collect()
	if len(c.answers)+len(c.missing) == 0 {
		warnings.Add(errors.New("this gateway knows no ingester: fresh samples may be missing"))
	}
	before, unknown := h.remember(tenant, &c, now), h.unknown(r, c.answers, now)
	if len(c.missing) > 0 {
		if c.covers(before, now) {
			h.covered.Inc()
			// They can't name the blocks that they have just written.
			for _, x := range before {
				if x.gone.After(since) {
					since = x.gone
				}
			}
		} else {
			warnings.Merge(missing)
		}
	} else if unknown && !c.replicated() {
		warnings.Add(errors.New("this gateway doesn't know all ingesters yet: fresh samples may be missing"))
	} else if lacking, some := c.restarted(); lacking {
		warnings.Add(errors.New("an ingester restarted: samples that it alone had are being sent again, some may be missing"))
	} else if some {
		since = now
	}
	if restarted {
		// It can't name the blocks that it had written before.
		since = now
	}
	if resending {
		warnings.Add(errors.New("samples of an ingester that went away are being sent again, some may be missing"))
	}
	return out, since, warnings, nil
}

// other says whether an id, in hex, is not that which an ingester gave, if both are known.
func other(id string, given []byte) bool {
	var buf [2 * 16]byte // an id of the protocol
	return id != "" && len(given) > 0 && string(hex.AppendEncode(buf[:0], given)) != id
}

// unknown says whether ingesters know of a member that this process has never heard
// of. r is the ring by which they were asked.
func (h *Heads) unknown(r *ring.Ring, answers []heading, now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.noted != r {
		for _, one := range []*ring.Ring{h.noted, r} {
			if one == nil {
				continue
			}
			for _, m := range one.Snapshot().Members {
				h.known[m.Digest()] = now
			}
		}
		h.noted = r
		maps.DeleteFunc(h.known, func(_ uint32, at time.Time) bool { return now.Sub(at) > rememberFor })
	}
	for i := range answers {
		for _, d := range answers[i].Members {
			if _, ok := h.known[d]; !ok {
				return true
			}
		}
	}
	return false
}

// metadata gives what the heads know of a metric's metadata, or of all if metric
// is empty; entries may repeat.
func (h *Heads) metadata(ctx context.Context, tenant, metric string) ([]fetch.MetricMetadata, []ulid.ULID, time.Time, annotations.Annotations, error) {
	as, since, warnings, err := ask(ctx, h, tenant, func(ctx context.Context, c *fetch.Client) ([]fetch.MetricMetadata, fetch.Header, error) {
		return c.Metadata(ctx, tenant, metric, 0)
	})
	var out []fetch.MetricMetadata
	for _, a := range as {
		out = append(out, a.value...)
	}
	return out, blocks(as), since, warnings, err
}

// Stats asks all ingesters what they hold of a tenant; each list of an answer
// has at most limit entries.
func (h *Heads) Stats(ctx context.Context, tenant string, limit int) ([]*fetchpb.StatsResponse, annotations.Annotations, error) {
	as, _, warnings, err := ask(ctx, h, tenant, func(ctx context.Context, c *fetch.Client) (*fetchpb.StatsResponse, fetch.Header, error) {
		s, err := c.Stats(ctx, tenant, limit)
		return s, fetch.Header{}, err
	})
	var out []*fetchpb.StatsResponse
	for _, a := range as {
		out = append(out, a.value)
	}
	return out, warnings, err
}

// Series says how many series each ingester that answers has, by member id.
func (h *Heads) Series(ctx context.Context) map[string]int64 {
	as, _, _, _ := ask(ctx, h, "", func(ctx context.Context, c *fetch.Client) (int64, fetch.Header, error) {
		s, err := c.Stats(ctx, "", 0) // of all tenants
		return int64(s.GetSeries()), fetch.Header{}, err
	})
	out := make(map[string]int64, len(as))
	for _, a := range as {
		out[a.member] = a.value
	}
	return out
}

// exemplars asks all ingesters; series may repeat.
func (h *Heads) exemplars(ctx context.Context, tenant string, mint, maxt int64, sets [][]*labels.Matcher) ([]answer[[]chunkfmt.Series], time.Time, annotations.Annotations, error) {
	return ask(ctx, h, tenant, func(ctx context.Context, c *fetch.Client) ([]chunkfmt.Series, fetch.Header, error) {
		return c.Exemplars(ctx, tenant, mint, maxt, sets)
	})
}

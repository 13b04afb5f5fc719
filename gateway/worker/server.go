package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
)

// Server computes parts of other gateways' queries.
type Server struct {
	workpb.UnimplementedWorkServer
	run    RunFunc
	turns  *turns
	logger *slog.Logger
	parts  *prometheus.CounterVec
	held   atomic.Int64 // bytes of requests
}

// RunFunc computes a part, and says what was read for it, with an error too.
type RunFunc func(context.Context, *plan.Task) ([]byte, account.Cost, error)

// NewServer makes a server.
func NewServer(run RunFunc, logger *slog.Logger, reg prometheus.Registerer) *Server {
	s := &Server{
		run: run, turns: newTurns(runtime.GOMAXPROCS(0), maxWaiting), logger: logger,
		parts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "epimetheus_gateway_worker_parts_total",
			Help: "Parts of other gateways' queries, by outcome: ok, declined, refused (too many were waiting), canceled (the query has ended, or another gateway was faster), failed.",
		}, []string{"outcome"}),
	}
	reg.MustRegister(s.parts, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gateway_worker_waiting_parts", Help: "Parts of other gateways' queries that wait for their turn.",
	}, func() float64 { return float64(s.turns.waiting()) }))
	return s
}

// maxWaiting bounds the parts of one tenant that wait: more than a few queries'.
const maxWaiting = 1000

// maxHeld bounds the bytes of all requests that wait or are worked on: those of shards have
// what heads hold of them, up to 4 MiB.
const maxHeld = 256 << 20

// Register adds the service to a gRPC server.
func (s *Server) Register(g *grpc.Server) { workpb.RegisterWorkServer(g, s) }

// Run implements workpb.WorkServer.
func (s *Server) Run(ctx context.Context, r *workpb.RunRequest) (*workpb.RunResponse, error) {
	var read account.Cost
	fail := func(outcome string, code codes.Code, err error) (*workpb.RunResponse, error) {
		s.parts.WithLabelValues(outcome).Inc()
		st := status.New(code, plan.Excerpt(strings.ToValidUTF8(err.Error(), "?"))) // it may have the query's text
		if read != (account.Cost{}) {
			if with, err := st.WithDetails(cost(read)); err == nil {
				st = with
			}
		}
		return nil, st.Err()
	}
	if r.GetVersion() != plan.Version {
		return fail("declined", codes.Unimplemented, plan.ErrUnlike)
	}
	size := int64(proto.Size(r))
	defer s.held.Add(-size)
	if s.held.Add(size) > maxHeld {
		return fail("refused", codes.ResourceExhausted, errFull)
	}
	done, err := s.turns.wait(ctx, r.GetTenant())
	switch {
	case errors.Is(err, errBusy):
		return fail("refused", codes.ResourceExhausted, err)
	case err != nil:
		return fail("canceled", codes.Canceled, err)
	}
	defer done()
	t, err := task(r) // in its turn: it takes memory
	if err != nil {
		return fail("failed", codes.InvalidArgument, err)
	}
	b, read, err := s.safely(ctx, t)
	switch {
	case errors.Is(err, plan.ErrGiveUp):
		return fail("declined", codes.FailedPrecondition, err)
	case errors.Is(err, plan.ErrUnlike):
		return fail("declined", codes.Unimplemented, err)
	case ctx.Err() != nil:
		return fail("canceled", codes.Canceled, context.Cause(ctx))
	case errors.Is(err, account.ErrLimit), errors.As(err, new(promql.ErrTooManySamples)):
		return fail("declined", codes.OutOfRange, err)
	case err != nil:
		s.logger.Warn("part of a query failed", "tenant", t.Tenant, "query", plan.Excerpt(t.Query), "err", err)
		return fail("failed", codes.Internal, err)
	case len(b) > maxResult:
		return fail("refused", codes.ResourceExhausted, errTooLarge)
	}
	s.parts.WithLabelValues("ok").Inc()
	return &workpb.RunResponse{Result: b, Cost: cost(read)}, nil
}

// safely runs a part. A bug ends the part and not the process.
func (s *Server) safely(ctx context.Context, t *plan.Task) (_ []byte, read account.Cost, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.logger.Error("runtime panic in a part of a query", "err", p, "stacktrace", string(debug.Stack()))
			err = fmt.Errorf("unexpected error: %v", p)
		}
	}()
	return s.run(ctx, t)
}

var errFull = errors.New("parts of queries that wait take 256 MiB already")

var errTooLarge = errors.New("the result of a part is larger than 64 MiB")

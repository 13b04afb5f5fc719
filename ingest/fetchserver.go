package ingest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// messageBytes is about how much a message of an answer holds.
const messageBytes = 256 << 10

// fetcher answers gateways from the head.
type fetcher struct {
	fetchpb.UnimplementedFetchServer
	head      *head.Head
	resending func(tenant string) bool // sources have ranges to send again
	starting  atomic.Bool              // the commit log has not been replayed
	process   []byte
	start     []byte
	ring      *ring.Live // nil: none
	sources   *sources
	requests  map[string]prometheus.Counter // by kind
}

func newFetcher(h *head.Head, reg prometheus.Registerer) *fetcher {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "epimetheus_ingester_fetch_requests_total",
		Help: "Requests of gateways, by kind.",
	}, []string{"kind"})
	reg.MustRegister(requests)
	f := &fetcher{head: h, requests: map[string]prometheus.Counter{}}
	for _, kind := range []string{"select", "read", "series", "local", "labels", "exemplars", "metadata", "stats"} {
		f.requests[kind] = requests.WithLabelValues(kind)
	}
	return f
}

// begin counts a request, and refuses it while the head isn't what it was before
// the restart.
func (f *fetcher) begin(kind string) error {
	f.requests[kind].Inc()
	if f.starting.Load() {
		return errStarting
	}
	return nil
}

func (f *fetcher) Select(req *fetchpb.SelectRequest, ss fetchpb.Fetch_SelectServer) error {
	if err := f.begin("select"); err != nil {
		return err
	}
	ms, err := fetch.ToMatchers(req.Matchers)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	found, hd, err := f.head.Select(ss.Context(), fetch.Query{
		Tenant: req.Tenant, MinT: req.Mint, MaxT: req.Maxt, Matchers: ms, Limit: int(req.Limit), LabelsOnly: req.LabelsOnly,
	})
	if err != nil {
		return toStatus(err)
	}
	if err := ss.Send(&fetchpb.SelectResponse{Header: f.header(req.Tenant, hd)}); err != nil {
		return err
	}
	size := 0
	resp := &fetchpb.SelectResponse{}
	for i, s := range found {
		ps := &fetchpb.Series{Labels: toPairs(s.Labels)}
		size += int(s.Labels.ByteSize()) + 16
		for _, c := range s.Chunks {
			ps.Chunks = append(ps.Chunks, &fetchpb.Chunk{
				Encoding: uint32(c.Encoding), Mint: c.MinT, Maxt: c.MaxT, Data: c.Data,
			})
			size += len(c.Data) + 32
		}
		resp.Series = append(resp.Series, ps)
		if size < messageBytes && i < len(found)-1 {
			continue
		}
		if err := ss.Send(resp); err != nil {
			return err
		}
		resp, size = &fetchpb.SelectResponse{}, 0
	}
	return nil
}

func (f *fetcher) Read(req *fetchpb.ReadRequest, ss fetchpb.Fetch_ReadServer) error {
	if err := f.begin("read"); err != nil {
		return err
	}
	ms, err := fetch.ToMatchers(req.Matchers)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	hd, found := f.head.Read(ss.Context(), fetch.Query{
		Tenant: req.Tenant, MinT: req.Mint, MaxT: req.Maxt, Matchers: ms, Limit: int(req.Limit), LabelsOnly: req.LabelsOnly, Newest: req.Newest,
	}, messageBytes)
	if err := ss.Send(&fetchpb.ReadResponse{Header: f.header(req.Tenant, hd)}); err != nil {
		return err
	}
	m, _ := readResponses.Get().(*fetchpb.ReadResponse)
	defer readResponses.Put(m)
	for c, err := range found {
		if err != nil {
			return toStatus(err)
		}
		c.Fill(m, req.Mint)
		if err := ss.Send(m); err != nil { // which is done with it
			return err
		}
	}
	return nil
}

// readResponses are messages that were sent, for their memory.
//
//nolint:gochecknoglobals // scratch memory
var readResponses = sync.Pool{New: func() any { return new(fetchpb.ReadResponse) }}

// Fetch implements fetch.Local.
func (i *Ingester) Fetch(ctx context.Context, q fetch.Query) ([][]fetch.Series, *fetchpb.Header, error) {
	f := i.fetch
	if err := f.begin("local"); err != nil {
		return nil, nil, err
	}
	found, hd, err := f.head.Lists(ctx, q)
	return found, f.header(q.Tenant, hd), err
}

// FetchLabels implements fetch.Local.
func (i *Ingester) FetchLabels(ctx context.Context, q fetch.Query, name string) ([]string, *fetchpb.Header, error) {
	f := i.fetch
	if err := f.begin("local"); err != nil {
		return nil, nil, err
	}
	values, hd, err := f.head.Labels(ctx, q, name)
	return values, f.header(q.Tenant, hd), err
}

func (f *fetcher) Series(req *fetchpb.SeriesRequest, ss fetchpb.Fetch_SeriesServer) error {
	if err := f.begin("series"); err != nil {
		return err
	}
	if !bytes.Equal(req.Start, f.start) {
		return status.Error(codes.NotFound, "references of before the ingester was restarted")
	}
	var sets fetch.LabelSets
	err := f.head.Series(req.Tenant, req.Generation, req.Refs, func(ls labels.Labels) error {
		if sets.Add(ls); sets.Bytes() < messageBytes {
			return nil
		}
		return ss.Send(sets.Take())
	})
	switch {
	case errors.Is(err, head.ErrGone):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, head.ErrUnknownRef):
		return status.Error(codes.InvalidArgument, err.Error())
	case err != nil:
		return err
	}
	if last := sets.Take(); last != nil {
		return ss.Send(last)
	}
	return nil
}

func (f *fetcher) Labels(ctx context.Context, req *fetchpb.LabelsRequest) (*fetchpb.LabelsResponse, error) {
	if err := f.begin("labels"); err != nil {
		return nil, err
	}
	ms, err := fetch.ToMatchers(req.Matchers)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	values, hd, err := f.head.Labels(ctx, fetch.Query{
		Tenant: req.Tenant, MinT: req.Mint, MaxT: req.Maxt, Matchers: ms, Limit: int(req.Limit),
	}, string(req.Name))
	if err != nil {
		return nil, toStatus(err)
	}
	return &fetchpb.LabelsResponse{Header: f.header(req.Tenant, hd), Values: values}, nil
}

func (f *fetcher) Exemplars(_ context.Context, req *fetchpb.ExemplarsRequest) (*fetchpb.ExemplarsResponse, error) {
	if err := f.begin("exemplars"); err != nil {
		return nil, err
	}
	var sets [][]*labels.Matcher
	for _, s := range req.Matchers {
		ms, err := fetch.ToMatchers(s.Matchers)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		sets = append(sets, ms)
	}
	found, hd := f.head.Exemplars(req.Tenant, req.Mint, req.Maxt, sets)
	resp := &fetchpb.ExemplarsResponse{Header: f.header(req.Tenant, hd)}
	for i := range found {
		resp.Series = append(resp.Series, toExemplars(&found[i]))
	}
	return resp, nil
}

func (f *fetcher) Metadata(_ context.Context, req *fetchpb.MetadataRequest) (*fetchpb.MetadataResponse, error) {
	if err := f.begin("metadata"); err != nil {
		return nil, err
	}
	found, hd := f.head.Metadata(req.Tenant, string(req.Metric), int(req.Limit))
	resp := &fetchpb.MetadataResponse{Header: f.header(req.Tenant, hd)}
	for _, m := range found {
		resp.Metadata = append(resp.Metadata, &fetchpb.Metadata{
			Metric: m.Metric, Type: string(m.Type), Unit: m.Unit, Help: m.Help,
		})
	}
	return resp, nil
}

func (f *fetcher) Stats(_ context.Context, req *fetchpb.StatsRequest) (*fetchpb.StatsResponse, error) {
	if err := f.begin("stats"); err != nil {
		return nil, err
	}
	if req.Tenant == "" {
		return &fetchpb.StatsResponse{Series: uint64(f.head.Size().Series)}, nil
	}
	st := f.head.Stats(req.Tenant, int(req.Limit))
	counts := func(cs []head.Count) []*fetchpb.Count {
		var out []*fetchpb.Count
		for _, c := range cs {
			out = append(out, &fetchpb.Count{Name: c.Name, Value: c.Value})
		}
		return out
	}
	return &fetchpb.StatsResponse{
		Series: st.Series, Chunks: st.Chunks, LabelPairs: st.LabelPairs, Mint: st.MinT, Maxt: st.MaxT,
		SeriesByMetric: counts(st.SeriesByMetric), ValuesByLabel: counts(st.ValuesByLabel),
		BytesByLabel: counts(st.BytesByLabel), SeriesByPair: counts(st.SeriesByPair),
	}, nil
}

func (f *fetcher) header(tenant string, h fetch.Header) *fetchpb.Header {
	p := &fetchpb.Header{HasSamples: h.HasSamples, Oldest: h.Oldest, Newest: h.Newest, Resending: f.resending(tenant), Process: f.process, Start: f.start, Coverage: f.sources.coverage(tenant, time.Now())}
	for _, b := range h.Blocks {
		p.Blocks = append(p.Blocks, b[:])
	}
	if f.ring != nil {
		p.Members = f.ring.Ring().Digests()
	}
	return p
}

func toPairs(ls labels.Labels) []string {
	out := make([]string, 0, 2*ls.Len())
	ls.Range(func(l labels.Label) { out = append(out, l.Name, l.Value) })
	return out
}

func toExemplars(s *chunkfmt.Series) *fetchpb.ExemplarSeries {
	p := &fetchpb.ExemplarSeries{Labels: toPairs(s.Labels)}
	for _, e := range s.Exemplars {
		p.Exemplars = append(p.Exemplars, fetch.FromExemplar(e))
	}
	return p
}

// toStatus is the boundary to gRPC.
func toStatus(err error) error {
	if s := status.FromContextError(err); s.Code() != codes.Unknown {
		return s.Err()
	}
	return status.Error(codes.Internal, fmt.Sprint(err))
}

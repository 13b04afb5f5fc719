package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// Header tells a reader what it needs to have one snapshot of heads and
// history.
type Header struct {
	// Blocks that generations still readable went to, and whose rows are
	// written: refresh rows until these are seen.
	Blocks         []ulid.ULID
	HasSamples     bool
	Oldest, Newest int64 // ms since the epoch, of the tenant's samples; valid with HasSamples
	// Resending: sources of the tenant have ranges to send again, as an ingester
	// went away. Until they have, fresh samples may be missing.
	Resending bool
	Process   []byte // of the ingester; nil of one that doesn't say
	Start     []byte // likewise, but new at each start
	// Coverage is what sources said of their copies.
	Coverage []Coverage
	Members  []uint32 // that may have samples, as the ingester knows the ring: their digests
}

// Coverage is what some sources said of the copies of all that they have sent and
// that isn't durable.
type Coverage struct {
	Sources           []uint64
	Age               time.Duration // since it was said
	ReplicationFactor int           // 1: each series has one owner, and the rest says nothing
	Copies, Zones     int
	Holders           []Holder
}

// Holder is a process that has copies.
type Holder struct {
	Member  string
	Process string // 16 bytes
}

// Series is a series with chunks that may overlap in time.
type Series struct {
	Labels labels.Labels
	Chunks []Chunk
}

// Query names series and a time range, bounds included, in ms since the epoch.
type Query struct {
	Tenant     string
	MinT, MaxT int64
	Matchers   []*labels.Matcher
	Limit      int  // of series or values; 0: none
	LabelsOnly bool // no samples are wanted
	// Took is told, while Select goes on, of bytes of memory that the answer takes, about;
	// nil: nobody wants to know.
	Took func(bytes int64)
	// Keep is told of memory that chunks, and lists of series, lie in: whoever asks is to call
	// release, once, when it uses none of them any more, and may leave it. Label sets and what
	// was decoded don't lie there. nil: nobody says when.
	Keep func(release func())
	// Newest: of each series only the newest of its samples in the time range is
	// wanted. There may be more of them.
	Newest bool
}

// Client reads the head of one ingester. It is safe for concurrent use; the
// caller sets deadlines.
type Client struct {
	rpc   fetchpb.FetchClient
	names *Names
	local Local
	// atOnce is for how many series labels are asked for in one request.
	atOnce int
}

// Local is an ingester in this process.
type Local interface {
	// Fetch is Select of a Client, without the wire. The series share memory with
	// the head.
	Fetch(ctx context.Context, q Query) ([][]Series, *fetchpb.Header, error)
	// FetchLabels is Labels of a Client, without the wire.
	FetchLabels(ctx context.Context, q Query, name string) ([]string, *fetchpb.Header, error)
}

// NewClient uses a connection that the caller owns, and keeps labels in names. What
// takes the most time is asked of local, if that isn't nil.
func NewClient(conn grpc.ClientConnInterface, names *Names, local Local) *Client {
	return &Client{rpc: fetchpb.NewFetchClient(conn), names: names, local: local, atOnce: maxAsked}
}

// errProtocol is wrapped by errors about answers that break the protocol.
var errProtocol = errors.New("fetch protocol broken")

// Select gives the series that match and have samples in the time range, as lists
// that each ascend in labels.
func (c *Client) Select(ctx context.Context, q Query) ([][]Series, Header, error) {
	if c.local != nil {
		out, p, err := c.local.Fetch(ctx, q)
		if err != nil {
			return nil, Header{}, err
		}
		hd, err := toHeader(p)
		return out, hd, err
	}
	out, hd, err := c.read(ctx, q)
	if code := status.Code(err); code != codes.Unimplemented && code != codes.NotFound {
		return out, hd, err
	}
	// The ingester is of an earlier version, or has just dropped what it spoke of.
	all, hd, err := c.whole(ctx, q)
	return [][]Series{all}, hd, err
}

// whole is Select with the labels of all series.
func (c *Client) whole(ctx context.Context, q Query) ([]Series, Header, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.Select(ctx, &fetchpb.SelectRequest{
		Tenant: q.Tenant, Mint: q.MinT, Maxt: q.MaxT, Matchers: FromMatchers(q.Matchers),
		LabelsOnly: q.LabelsOnly, Limit: uint32(q.Limit),
	})
	if err != nil {
		return nil, Header{}, err
	}
	var hd Header
	var out []Series
	for first := true; ; first = false {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) && !first {
			return out, hd, nil
		}
		if err != nil {
			return nil, hd, err
		}
		if first {
			if hd, err = toHeader(m.Header); err != nil {
				return nil, hd, err
			}
		}
		if q.Took != nil {
			q.Took(int64(proto.Size(m)))
		}
		for _, s := range m.Series {
			ls, err := ToLabels(s.Labels)
			if err != nil {
				return nil, hd, err
			}
			if n := len(out); n > 0 && labels.Compare(out[n-1].Labels, ls) >= 0 {
				return nil, hd, fmt.Errorf("%w: series %s after %s", errProtocol, ls, out[n-1].Labels)
			}
			one := Series{Labels: ls}
			for _, ch := range s.Chunks {
				one.Chunks = append(one.Chunks, Chunk{
					Encoding: chunkenc.Encoding(ch.Encoding), MinT: ch.Mint, MaxT: ch.Maxt, Data: ch.Data,
				})
			}
			out = append(out, one)
		}
	}
}

// Labels gives label names (name empty) or the values of the label name,
// sorted.
func (c *Client) Labels(ctx context.Context, q Query, name string) ([]string, Header, error) {
	if c.local != nil {
		out, p, err := c.local.FetchLabels(ctx, q, name)
		if err != nil {
			return nil, Header{}, err
		}
		hd, err := toHeader(p)
		return out, hd, err
	}
	resp, err := c.rpc.Labels(ctx, &fetchpb.LabelsRequest{
		Tenant: q.Tenant, Mint: q.MinT, Maxt: q.MaxT, Name: []byte(name), Matchers: FromMatchers(q.Matchers), Limit: uint32(q.Limit),
	})
	if err != nil {
		return nil, Header{}, err
	}
	hd, err := toHeader(resp.Header)
	return resp.Values, hd, err
}

// Exemplars gives the exemplars in the time range of series that match all
// matchers of any set, as series without samples.
func (c *Client) Exemplars(ctx context.Context, tenant string, mint, maxt int64, sets [][]*labels.Matcher) ([]chunkfmt.Series, Header, error) {
	req := &fetchpb.ExemplarsRequest{Tenant: tenant, Mint: mint, Maxt: maxt}
	for _, ms := range sets {
		req.Matchers = append(req.Matchers, &fetchpb.Matchers{Matchers: FromMatchers(ms)})
	}
	resp, err := c.rpc.Exemplars(ctx, req)
	if err != nil {
		return nil, Header{}, err
	}
	hd, err := toHeader(resp.Header)
	if err != nil {
		return nil, hd, err
	}
	var out []chunkfmt.Series
	for _, s := range resp.Series {
		ls, err := ToLabels(s.Labels)
		if err != nil {
			return nil, hd, err
		}
		one := chunkfmt.Series{Labels: ls}
		for _, e := range s.Exemplars {
			els, err := ToLabels(e.Labels)
			if err != nil {
				return nil, hd, err
			}
			one.Exemplars = append(one.Exemplars, chunkfmt.Exemplar{
				Labels: els, Ts: e.T, HasTs: true, Value: math.Float64frombits(e.Value),
			})
		}
		out = append(out, one)
	}
	return out, hd, nil
}

// MetricMetadata is the metadata of a metric.
type MetricMetadata struct {
	Metric string
	metadata.Metadata
}

// Metadata gives the metadata of a metric, or of all if metric is empty, sorted
// by metric; limit bounds the metrics, 0 means none.
func (c *Client) Metadata(ctx context.Context, tenant, metric string, limit int) ([]MetricMetadata, Header, error) {
	resp, err := c.rpc.Metadata(ctx, &fetchpb.MetadataRequest{Tenant: tenant, Metric: []byte(metric), Limit: uint32(limit)})
	if err != nil {
		return nil, Header{}, err
	}
	hd, err := toHeader(resp.Header)
	if err != nil {
		return nil, hd, err
	}
	var out []MetricMetadata
	for _, m := range resp.Metadata {
		out = append(out, MetricMetadata{m.Metric, metadata.Metadata{Type: model.MetricType(m.Type), Unit: m.Unit, Help: m.Help}})
	}
	return out, hd, nil
}

// Stats gives what the head holds of a tenant; each list has at most limit
// entries.
func (c *Client) Stats(ctx context.Context, tenant string, limit int) (*fetchpb.StatsResponse, error) {
	return c.rpc.Stats(ctx, &fetchpb.StatsRequest{Tenant: tenant, Limit: uint32(limit)})
}

// FromMatchers gives the messages for matchers.
func FromMatchers(ms []*labels.Matcher) []*fetchpb.Matcher {
	out := make([]*fetchpb.Matcher, len(ms))
	for i, m := range ms {
		out[i] = &fetchpb.Matcher{Type: fetchpb.Matcher_Type(m.Type), Name: []byte(m.Name), Value: []byte(m.Value)}
	}
	return out
}

// ToMatchers is the reverse of FromMatchers.
func ToMatchers(ms []*fetchpb.Matcher) ([]*labels.Matcher, error) {
	out := make([]*labels.Matcher, len(ms))
	for i, m := range ms {
		if m.Type < 0 || m.Type > fetchpb.Matcher_NOT_REGEXP {
			return nil, fmt.Errorf("matcher on %q: unknown type %d", m.Name, m.Type)
		}
		var err error
		if out[i], err = labels.NewMatcher(labels.MatchType(m.Type), string(m.Name), string(m.Value)); err != nil {
			return nil, fmt.Errorf("matcher on %q: %w", m.Name, err)
		}
	}
	return out, nil
}

// FromExemplar gives the message for an exemplar.
func FromExemplar(e chunkfmt.Exemplar) *fetchpb.Exemplar {
	p := &fetchpb.Exemplar{T: e.Ts, Value: math.Float64bits(e.Value)}
	e.Labels.Range(func(l labels.Label) { p.Labels = append(p.Labels, l.Name, l.Value) })
	return p
}

func toHeader(p *fetchpb.Header) (Header, error) {
	if p == nil {
		return Header{}, fmt.Errorf("%w: no header", errProtocol)
	}
	h := Header{HasSamples: p.HasSamples, Oldest: p.Oldest, Newest: p.Newest, Resending: p.Resending, Members: p.Members, Start: p.Start}
	if h.Process = p.Process; len(h.Process) != 0 && len(h.Process) != 16 {
		return h, fmt.Errorf("%w: process id of %d bytes", errProtocol, len(h.Process))
	}
	for _, c := range p.Coverage {
		x := Coverage{
			Sources: c.Sources, Age: time.Duration(c.AgeMs) * time.Millisecond, ReplicationFactor: int(c.ReplicationFactor),
			Copies: int(c.Copies), Zones: int(c.Zones),
		}
		for _, o := range c.Holders {
			x.Holders = append(x.Holders, Holder{o.Member, string(o.Process)})
		}
		h.Coverage = append(h.Coverage, x)
	}
	for _, b := range p.Blocks {
		if len(b) != len(ulid.ULID{}) {
			return h, fmt.Errorf("%w: block id of %d bytes", errProtocol, len(b))
		}
		h.Blocks = append(h.Blocks, ulid.ULID(b))
	}
	return h, nil
}

// ToLabels reads name, value, name, value, … as messages have them.
func ToLabels(ss []string) (labels.Labels, error) {
	if len(ss)%2 != 0 {
		return labels.EmptyLabels(), fmt.Errorf("%w: label name without value", errProtocol)
	}
	var b labels.ScratchBuilder
	for i := 0; i < len(ss); i += 2 {
		if i > 0 && ss[i] <= ss[i-2] {
			return labels.EmptyLabels(), fmt.Errorf("%w: label name %q after %q", errProtocol, ss[i], ss[i-2])
		}
		b.Add(ss[i], ss[i+1])
	}
	return b.Labels(), nil
}

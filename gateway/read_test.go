package gateway_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/storage/remote"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
)

// TestRemoteReadLikePrometheus compares remote read: as samples, and as a stream
// of chunks, which are cut elsewhere.
func TestRemoteReadLikePrometheus(t *testing.T) {
	ss := dataset()
	p := toPrometheus(t, ss)
	base := serve(t, toGateway(t, ss))
	c := client(t)
	eq := func(name, value string) *prompb.LabelMatcher {
		return &prompb.LabelMatcher{Type: prompb.LabelMatcher_EQ, Name: name, Value: value}
	}
	all := func(ms ...*prompb.LabelMatcher) *prompb.Query {
		return &prompb.Query{StartTimestampMs: start, EndTimestampMs: end, Matchers: ms}
	}
	streamed := []prompb.ReadRequest_ResponseType{prompb.ReadRequest_STREAMED_XOR_CHUNKS}
	part := all(eq("__name__", "http_requests_total"))
	part.StartTimestampMs, part.EndTimestampMs = start+3*step, start+20*step
	hinted := all(eq("__name__", "up"))
	hinted.Hints = &prompb.ReadHints{Func: "series", StartMs: start, EndMs: end}
	for name, req := range map[string]*prompb.ReadRequest{
		"one":     {Queries: []*prompb.Query{all(eq("__name__", "up"))}},
		"several": {Queries: []*prompb.Query{all(eq("__name__", "odd_values")), all(eq("job", "job-1")), all(eq("__name__", "nothing"))}},
		"all":     {Queries: []*prompb.Query{all(&prompb.LabelMatcher{Type: prompb.LabelMatcher_NEQ, Name: "__name__", Value: ""})}},
		"regexp":  {Queries: []*prompb.Query{all(&prompb.LabelMatcher{Type: prompb.LabelMatcher_RE, Name: "code", Value: "5.."})}},
		"native":  {Queries: []*prompb.Query{all(eq("__name__", "native"))}},
		"part":    {Queries: []*prompb.Query{part}},
		"series":  {Queries: []*prompb.Query{hinted}},
		"none":    {},
		"empty":   {Queries: []*prompb.Query{all()}},
		"bad":     {Queries: []*prompb.Query{all(&prompb.LabelMatcher{Type: prompb.LabelMatcher_RE, Name: "code", Value: "("})}},
	} {
		for _, types := range [][]prompb.ReadRequest_ResponseType{nil, streamed} {
			req.AcceptedResponseTypes = types
			body, err := req.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			ask := func(base string) (answer, []string) {
				t.Helper()
				r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/api/v1/read", bytes.NewReader(s2.EncodeSnappy(nil, body)))
				if err != nil {
					t.Fatal(err)
				}
				r.Header.Set("Content-Encoding", "snappy")
				r.Header.Set("Content-Type", "application/x-protobuf")
				resp, body := do(t, c, r)
				a := toAnswer(t, resp.StatusCode, resp.Header, body)
				switch {
				case resp.StatusCode != http.StatusOK:
					return a, nil
				case types == nil:
					a.Body = ""
					return a, readSamples(t, body)
				default:
					a.Body = ""
					return a, readChunks(t, body)
				}
			}
			wantAnswer, want := ask(p.URL)
			gotAnswer, got := ask(base)
			if d := gocmp.Diff(wantAnswer, gotAnswer); d != "" {
				t.Errorf("%s, %v: Prometheus -, gateway +\n%s", name, types, d)
			}
			if d := gocmp.Diff(want, got); d != "" {
				t.Errorf("%s, %v: Prometheus -, gateway +\n%s", name, types, d)
			}
		}
	}
}

// readSamples gives a line for each sample of a remote read answer.
func readSamples(t *testing.T, body []byte) []string {
	t.Helper()
	plain, err := s2.Decode(nil, body)
	if err != nil {
		t.Fatal(err)
	}
	var r prompb.ReadResponse
	if err := r.Unmarshal(plain); err != nil {
		t.Fatal(err)
	}
	var out []string
	for i, q := range r.Results {
		for _, s := range q.Timeseries {
			ls := fmt.Sprint(i, " ", s.ToLabels(&labels.ScratchBuilder{}, nil))
			for _, p := range s.Samples {
				out = append(out, fmt.Sprint(ls, " ", p.Timestamp, " ", math.Float64bits(p.Value)))
			}
			for _, h := range s.Histograms {
				// Whether a counter was reset isn't known where one sample comes from a
				// block and the next from a head, and is told otherwise at the edges of
				// Prometheus's chunks.
				if h.ResetHint == prompb.Histogram_NO {
					h.ResetHint = prompb.Histogram_UNKNOWN
				}
				out = append(out, fmt.Sprint(ls, " ", h.String()))
			}
			if len(s.Samples)+len(s.Histograms) == 0 {
				out = append(out, ls)
			}
		}
	}
	slices.Sort(out)
	return out
}

// readChunks gives a line for each sample of a streamed answer.
func readChunks(t *testing.T, body []byte) []string {
	t.Helper()
	var out []string
	frames := remote.NewChunkedReader(bytes.NewReader(body), 50<<20, nil)
	for {
		var r prompb.ChunkedReadResponse
		if err := frames.NextProto(&r); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for _, s := range r.ChunkedSeries {
			ls := fmt.Sprint(r.QueryIndex, " ", s.ToLabels(&labels.ScratchBuilder{}, nil))
			for _, c := range s.Chunks {
				chunk, err := chunkenc.FromData(chunkenc.Encoding(c.Type), c.Data)
				if err != nil {
					t.Fatal(err)
				}
				it := chunk.Iterator(nil)
				for vt := it.Next(); vt != chunkenc.ValNone; vt = it.Next() {
					if vt == chunkenc.ValFloat {
						ts, v := it.At()
						v += 0 // the remote write that filled the Prometheus loses the sign of -0
						out = append(out, fmt.Sprint(ls, " ", ts, " ", math.Float64bits(v)))
						continue
					}
					ts, h := it.AtFloatHistogram(nil)
					out = append(out, fmt.Sprint(ls, " ", ts, " ", h))
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

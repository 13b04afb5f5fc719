package gateway

import (
	"bufio"
	"bytes"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	v1 "github.com/prometheus/prometheus/web/api/v1"
	"github.com/stretchr/testify/require"
)

// Answers are byte for byte Prometheus's, whatever is in them.
func TestEncodeLikePrometheus(t *testing.T) {
	values := []float64{
		0, math.Copysign(0, -1), 1, -1, 0.1, 1.0 / 3, 1e-6, 9e-7, 1e21, 9.99e20, math.Inf(1), math.Inf(-1), math.NaN(), math.MaxFloat64, 5e-324,
		-123456, 1 << 53, 1<<53 - 1, -1 << 53, 1 - 1<<53, 1 << 62, -1 << 63, 1 << 63, 1 << 64,
	}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		step := []int64{1, 50, 15_000, 1001}[r.IntN(4)]
		start := []int64{-20_000, 0, 1_700_000_000_000, 1_700_000_000_123}[r.IntN(4)]
		m := promql.Matrix{}
		for range r.IntN(6) {
			s := promql.Series{Metric: labels.FromStrings("__name__", "a", "b", "<\"\\\u2028\xff>"[:1+r.IntN(8)])}
			if r.IntN(4) == 0 {
				s.Metric = labels.EmptyLabels()
			}
			v := 0.0
			for k := range int64(r.IntN(20)) {
				if r.IntN(3) == 0 {
					v = values[r.IntN(len(values))]
				}
				if r.IntN(8) > 0 {
					s.Floats = append(s.Floats, promql.FPoint{T: start + k*step + int64(r.IntN(40)/39), F: v})
				}
			}
			if r.IntN(8) == 0 {
				s.Histograms = append(s.Histograms, promql.HPoint{T: start, H: tsdbutil.GenerateTestFloatHistogram(3)})
			}
			m = append(m, s)
		}
		vector, sets, texts := promql.Vector{}, []labels.Labels{}, []string{}
		for _, s := range m {
			one := promql.Sample{Metric: s.Metric, T: start, F: values[r.IntN(len(values))]}
			if len(s.Histograms) > 0 {
				one.H = s.Histograms[0].H
			}
			vector, sets, texts = append(vector, one), append(sets, s.Metric), append(texts, s.Metric.Get("b"))
		}
		for _, data := range []any{
			&v1.QueryData{ResultType: parser.ValueTypeMatrix, Result: m},
			&v1.QueryData{ResultType: parser.ValueTypeVector, Result: vector}, sets, texts,
		} {
			resp := &v1.Response{Status: "success", Data: data}
			want, err := v1.JSONCodec{}.Encode(resp)
			require.NoError(t, err)
			var got bytes.Buffer
			require.NoError(t, encode(&got, resp))
			require.Equal(t, string(want), got.String(), "seed %d", seed)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	m := make(promql.Matrix, 500)
	for i := range m {
		m[i].Metric = labels.FromStrings("job", "x", "le", "0.5")
		for k := range 60 {
			m[i].Floats = append(m[i].Floats, promql.FPoint{T: 1_700_000_000_000 + 60_000*int64(k), F: float64(i*k) / 285})
		}
	}
	resp := &v1.Response{Status: "success", Data: &v1.QueryData{ResultType: parser.ValueTypeMatrix, Result: m}}
	b.ReportAllocs()
	for b.Loop() {
		if err := encode(io.Discard, resp); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(b.Elapsed().Seconds()*1e9/float64(b.N)/(60*500), "ns/point")
}

// A handler that writes all of its answer at once, as Prometheus's do, gives a slow client no less time
// than one that writes pieces.
func TestSlowReaderOfOneWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, timeout = 96 << 20, time.Second
		dial, stop := ServePipe(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rw := &responseWriter{ResponseWriter: w, answers: &streaming{}, encodings: &encodings{}, timeout: timeout}
			defer rw.close()
			n, err := rw.Write(make([]byte, size))
			if n != size || err != nil {
				t.Errorf("%d bytes written: %v", n, err)
			}
		}))
		defer stop()
		c := dial()
		defer c.Close()
		_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		require.NoError(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		require.NoError(t, err)
		defer resp.Body.Close()
		begin := time.Now()
		n, err := ReadSlowly(resp.Body, 4<<20)
		require.NoError(t, err)
		require.Equal(t, size, n)
		require.Greater(t, time.Since(begin), 2*timeout)
	})
}

// An answer may pause: a deadline is of a write, also where HTTP/2 resets a stream when it passes.
func TestAnswerThatPauses(t *testing.T) {
	const timeout = 300 * time.Millisecond
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rw := &responseWriter{ResponseWriter: w, answers: &streaming{}, encodings: &encodings{}, timeout: timeout}
		defer rw.close()
		for _, piece := range []string{"one", " two", " three"} {
			if _, err := rw.Write([]byte(piece)); err != nil {
				t.Error(err)
			}
			rw.Flush()
			time.Sleep(2 * timeout) // what it reads takes
		}
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
	require.NoError(t, err)
	resp, err := server.Client().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "one two three", string(b))
}

package sidecar

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
)

func TestMembers(t *testing.T) {
	for _, x := range []struct {
		family string
		typ    model.MetricType
		want   string
	}{
		{"x", model.MetricTypeGauge, "x"},
		{"x", model.MetricTypeUnknown, "x"},
		{"x", model.MetricTypeCounter, "x x_total"},
		{"x_total", model.MetricTypeCounter, "x x_total"},
		{"x", model.MetricTypeInfo, "x x_info"},
		{"x", model.MetricTypeHistogram, "x x_bucket x_sum x_count"},
		{"x", model.MetricTypeGaugeHistogram, "x x_bucket x_gsum x_gcount"},
		{"x", model.MetricTypeSummary, "x x_sum x_count"},
	} {
		f := family{name: x.family, metadata: []metadata.Metadata{{Type: x.typ}}}
		if got := strings.Join(f.members(), " "); got != x.want {
			t.Errorf("%s %s: %q, want %q", x.typ, x.family, got, x.want)
		}
		if x.typ == model.MetricTypeCounter || x.typ == model.MetricTypeInfo {
			continue
		}
		for _, m := range f.members() {
			if got := familyOf(m, x.typ); got != x.family {
				t.Errorf("%s %s is of %q, want %q", x.typ, m, got, x.family)
			}
		}
	}
}

func TestReadMetadata(t *testing.T) {
	for name, x := range map[string]struct {
		in, want string
		bad      bool
	}{
		"none":      {in: `{"status":"success","data":{}}`},
		"data last": {in: `{"status":"success","infos":["x"],"data":{"a":[{"type":"gauge","unit":"","help":"A."}]}}`, want: "a gauge  A.;"},
		"sorted": {
			in:   `{"data":{"a":[{"type":"gauge","help":"2"},{"type":"gauge","help":"1"}],"b":[{"type":"counter","unit":"s"}]},"status":"success"}`,
			want: "a gauge  1;a gauge  2;b counter s ;",
		},
		"empty entries": {in: `{"data":{"a":[],"b":[{}],"":[{"type":"gauge"}]}}`},
		"long":          {in: `{"data":{"a":[{"type":"gauge","help":"` + strings.Repeat("x", maxFamilyEntryBytes) + `"}]}}`},
		"torn":          {in: `{"data":{"a":[{"type":"gauge"}],"b":[{"ty`, want: "a gauge  ;", bad: true},
		"no data":       {in: `{"status":"success"}`, bad: true},
		"null":          {in: `{"data":null}`, bad: true},
		"array":         {in: `[]`, bad: true},
		"other type":    {in: `{"data":{"a":{"type":"gauge"}}}`, bad: true},
		"not JSON":      {in: `<html>`, bad: true},
		"empty":         {in: ``, bad: true},
	} {
		var got string
		err := readMetadata(strings.NewReader(x.in), func(f family) {
			for _, m := range f.metadata {
				got += fmt.Sprintf("%s %s %s %s;", f.name, m.Type, m.Unit, m.Help)
			}
		})
		if got != x.want || (err != nil) != x.bad {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// fakePrometheus answers what the sidecar asks of the running Prometheus.
type fakePrometheus struct {
	*httptest.Server
	mu       sync.Mutex
	metadata string // JSON of data
	gzipped  bool
	asked    int
}

func newFakePrometheus(t *testing.T) *fakePrometheus {
	p := &fakePrometheus{metadata: "{}"}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Close)
	return p
}

func (p *fakePrometheus) set(metadata string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.metadata = metadata
}

func (p *fakePrometheus) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch r.URL.Path {
	case "/api/v1/status/config":
		_ = json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": map[string]string{"yaml": "{}"}})
	case "/api/v1/metadata":
		p.asked++
		p.gzipped = strings.Contains(r.Header.Get("Accept-Encoding"), "gzip")
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = io.WriteString(z, `{"status":"success","data":`+p.metadata+`}`)
		_ = z.Close()
	default:
		http.NotFound(w, r)
	}
}

// told returns all metadata that ingesters were told since they were asked last.
func (h *harness) told() (out []string) {
	for _, f := range h.ingesters {
		f.set(func() { out, f.families = append(out, f.families...), nil })
	}
	slices.Sort(out)
	return out
}

// Prometheus's API knows metadata that isn't in the WAL; it arrives with one
// series of each metric, once, and again where it changed or was lost.
func TestMetadataFromAPI(t *testing.T) {
	h := newHarness(t, 2)
	prom := newFakePrometheus(t)
	prom.set(`{"c":[{"type":"counter","unit":"","help":"C."}],"dropped":[{"type":"gauge","unit":"","help":"No series."}],` +
		`"h":[{"type":"histogram","unit":"s","help":"H."}],"g":[{"type":"gauge","unit":"","help":"2"},{"type":"gauge","unit":"","help":"1"}]}`)
	h.opts.PrometheusURL, h.opts.MetadataInterval = prom.URL, 5*time.Millisecond
	w := h.wal()
	var series []record.RefSeries
	for i, ls := range []labels.Labels{
		labels.FromStrings("__name__", "c_total"),
		labels.FromStrings("__name__", "h_bucket", "le", "1"),
		labels.FromStrings("__name__", "h_bucket", "le", "+Inf"),
		labels.FromStrings("__name__", "h_count"),
		labels.FromStrings("__name__", "g"),
		labels.FromStrings("__name__", "g", "x", "y"),
		labels.FromStrings("__name__", "other"),
	} {
		series = append(series, record.RefSeries{Ref: chunks.HeadSeriesRef(i + 1), Labels: ls})
		w.lsets[chunks.HeadSeriesRef(i+1)] = ls.String()
	}
	w.log(w.enc.Series(series, nil))
	h.run()
	w.scrape(1, len(series)+1, 1000)
	h.want(w.all, false)

	// What was told, by metric and with the family's name.
	var got []string
	once := true
	until := func(want ...string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
			got = append(got, h.told()...)
			var metrics []string
			for _, x := range got {
				metric, rest, _ := strings.Cut(strings.TrimPrefix(x, `{__name__="`), `"`)
				_, rest, _ = strings.Cut(rest, "} ")
				metrics = append(metrics, metric+": "+rest)
			}
			if slices.Sort(metrics); !once {
				metrics = slices.Compact(metrics)
			}
			if slices.Equal(metrics, want) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("told %q, want %q", metrics, want)
			}
		}
		got = nil
	}
	all := []string{"c_total: c counter  C.", "g: g gauge  1", "g: g gauge  2", "h_bucket: h histogram s H.", "h_count: h histogram s H."}
	until(all...)
	prom.mu.Lock()
	if !prom.gzipped {
		t.Error("asked for without gzip")
	}
	asked := prom.asked
	prom.metadata = `{"c":[{"type":"counter","unit":"","help":"Changed."}],"h":[{"type":"histogram","unit":"s","help":"H."}]}`
	prom.mu.Unlock()
	until("c_total: c counter  Changed.")
	// A family that was gone is told again when it is back.
	eventually(t, "asked again", func() bool {
		prom.mu.Lock()
		defer prom.mu.Unlock()
		return prom.asked > asked+5
	})
	prom.set(`{"c":[{"type":"counter","unit":"","help":"Changed."}],"g":[{"type":"gauge","unit":"","help":"1"}]}`)
	until("g: g gauge  1")

	// Ingesters that lost what they knew are told all; as many times as one was
	// lost.
	once = false
	for _, f := range h.ingesters {
		f.kill()
		f.start()
	}
	w.scrape(1, len(series)+1, 2000)
	h.want(w.all, false)
	until("c_total: c counter  Changed.", "g: g gauge  1")
	if n := h.metric("epimetheus_sidecar_metadata_errors_total"); n != 0 {
		t.Errorf("%v errors", n)
	}
	prom.Close()
	eventually(t, "errors are counted", func() bool { return h.metric("epimetheus_sidecar_metadata_errors_total") > 0 })
	h.noConflicts()
}

// Metadata in the WAL is told with the name of the family. Of a counter only the
// API knows that.
func TestMetadataFromWAL(t *testing.T) {
	for _, api := range []bool{false, true} {
		t.Run(fmt.Sprintf("api=%v", api), func(t *testing.T) {
			h := newHarness(t, 1)
			if api {
				prom := newFakePrometheus(t)
				prom.set(`{"c":[{"type":"counter","unit":"","help":"C."}]}`)
				h.opts.PrometheusURL, h.opts.MetadataInterval = prom.URL, 5*time.Millisecond
			}
			h.run()
			w := h.wal()
			if api {
				eventually(t, "Prometheus has answered", h.sidecar.shipper.families.knows)
			}
			var series []record.RefSeries
			var meta []record.RefMetadata
			for i, x := range []struct {
				name string
				typ  model.MetricType
			}{{"c_total", model.MetricTypeCounter}, {"h_bucket", model.MetricTypeHistogram}, {"s_sum", model.MetricTypeSummary}, {"g_count", model.MetricTypeGauge}} {
				ref := chunks.HeadSeriesRef(i + 1)
				series = append(series, record.RefSeries{Ref: ref, Labels: labels.FromStrings("__name__", x.name)})
				w.lsets[ref] = series[i].Labels.String()
				meta = append(meta, record.RefMetadata{Ref: ref, Type: record.GetMetricType(x.typ), Help: "x"})
			}
			w.log(w.enc.Series(series, nil), w.enc.Metadata(meta, nil))
			w.scrape(1, len(series)+1, 1000)
			h.want(w.all, false)
			want := []string{
				`{__name__="c_total"} c_total counter  x`, `{__name__="g_count"} g_count gauge  x`, `{__name__="h_bucket"} h histogram  x`, `{__name__="s_sum"} s summary  x`,
			}
			if api {
				want[0] = `{__name__="c_total"} c counter  C.`
			}
			var got []string
			eventually(t, "metadata is told", func() bool {
				got = append(got, h.told()...)
				slices.Sort(got)
				return len(slices.Compact(slices.Clone(got))) >= len(want)
			})
			if got = slices.Compact(got); !slices.Equal(got, want) {
				t.Errorf("told %q, want %q", got, want)
			}
		})
	}
}

// An answer beyond the bound is used as far as it goes.
func TestMetadataBound(t *testing.T) {
	help := bytes.Repeat([]byte("x"), maxFamilyEntryBytes/2)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"status":"success","data":{`)
		for i := range 2 * maxMetadataBytes / len(help) {
			if _, err := fmt.Fprintf(w, `"m%d":[{"type":"gauge","help":"%s"}],`, i, help); err != nil {
				return
			}
		}
		fmt.Fprint(w, `"z":[]}}`)
	}))
	defer srv.Close()
	f := newFamilies(srv.URL, time.Minute)
	f.client, f.logger, f.notify = srv.Client(), promslog.NewNopLogger(), func() {}
	err := f.ask(context.Background())
	if n := len(f.take()); err == nil || n < maxMetadataBytes/len(help)*9/10 || n > maxMetadataBytes/len(help) {
		t.Errorf("%d families, %v", n, err)
	}
}

// A staleness marker, which Prometheus logs as a float, goes out as what the
// series' last sample was.
func TestStalenessMarkers(t *testing.T) {
	h := newHarness(t, 2)
	h.run()
	w := h.wal()
	w.series(1, 5)
	stale := math.Float64frombits(value.StaleNaN)
	asFloat := fmt.Sprintf("0 %x", value.StaleNaN)
	asHistogram := fmt.Sprintf("0 %s %x %v", &histogram.Histogram{Sum: stale}, value.StaleNaN, []float64(nil))
	asFloatHistogram := fmt.Sprintf("0 %s %x %v", &histogram.FloatHistogram{Sum: stale}, value.StaleNaN, []float64(nil))
	hist, fh := tsdbutil.GenerateTestHistogram(1), tsdbutil.GenerateTestFloatHistogram(1)
	samples := func(t int64) {
		w.scrape(1, 2, t)
		x := record.RefHistogramSample{Ref: 2, T: t, H: hist}
		rec, _ := w.enc.HistogramSamples([]record.RefHistogramSample{x}, nil)
		w.log(rec)
		w.remember(w.lsets[2], t, fmt.Sprintf("0 %s %x %v", hist, math.Float64bits(hist.Sum), hist.CustomValues))
		rec, _ = w.enc.FloatHistogramSamples([]record.RefFloatHistogramSample{{Ref: 3, T: t, FH: fh}}, nil)
		w.log(rec)
		w.remember(w.lsets[3], t, fmt.Sprintf("0 %s %x %v", fh, math.Float64bits(fh.Sum), fh.CustomValues))
	}
	markers := func(t int64, want ...string) {
		var s []record.RefSample
		for i, v := range want {
			ref := chunks.HeadSeriesRef(i + 1)
			s = append(s, record.RefSample{Ref: ref, T: t, V: stale})
			w.remember(w.lsets[ref], t, v)
		}
		w.log(w.enc.Samples(s, nil))
	}
	samples(1000)
	markers(2000, asFloat, asHistogram, asFloatHistogram, asFloat)
	markers(3000, asFloat, asHistogram, asFloatHistogram, asFloat)
	h.want(w.all, false)

	// Read again for ingesters that lost all, it goes out the same.
	for _, f := range h.ingesters {
		f.kill()
		f.start()
	}
	h.want(w.all, false)
	h.settled()

	// After a restart it isn't known before the series' next sample.
	h.stop()
	h.run()
	markers(4000, asFloat, asFloat, asFloat, asFloat)
	samples(5000)
	markers(6000, asFloat, asHistogram, asFloatHistogram, asFloat)
	h.want(w.all, false)
}

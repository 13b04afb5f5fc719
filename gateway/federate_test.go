package gateway_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestFederateLikePrometheus compares /federate, over samples of the last minutes.
func TestFederateLikePrometheus(t *testing.T) {
	shift := time.Now().UnixMilli() - end
	var ss []gatewaytest.Sample
	for _, s := range dataset() {
		s.T += shift
		s.Exemplars = nil
		ss = append(ss, s)
	}
	p := toPrometheus(t, ss)
	base := serve(t, toGateway(t, ss))
	c := client(t)
	q := url.QueryEscape
	for _, params := range []string{
		"match[]=up", "match[]=up&match[]=" + q(`{job="job-1"}`), "match[]=" + q(`{__name__!=""}`), "match[]=native", "match[]=odd_values", "match[]=goes_stale",
		"match[]=" + q(`{"métrique.à points"}`), "match[]=nothing", "", "match[]={", "match[]={}", "match[]=up%zz", "match[]=up[5m]",
	} {
		for _, accept := range []string{
			"", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited", "text/plain;version=0.0.4;escaping=allow-utf-8",
			"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text", "application/openmetrics-text;version=1.0.0", "*/*",
		} {
			ask := func(base string) answer {
				t.Helper()
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/federate?"+params, nil)
				if err != nil {
					t.Fatal(err)
				}
				if accept != "" {
					req.Header.Set("Accept", accept)
				}
				resp, body := do(t, c, req)
				if resp.StatusCode == http.StatusOK && strings.Contains(accept, "encoding=delimited") {
					body = []byte(familiesText(t, resp.Header, body))
				}
				a := toAnswer(t, resp.StatusCode, resp.Header, body)
				a.Body = sortedFamilies(a.Body)
				return a
			}
			if d := gocmp.Diff(ask(p.URL), ask(base)); d != "" {
				t.Errorf("%s, %s: Prometheus -, gateway +\n%s", params, accept, d)
			}
		}
	}
	for _, method := range []string{http.MethodPost, http.MethodHead, http.MethodDelete, http.MethodOptions} {
		ask := func(base string) answer {
			t.Helper()
			req, err := http.NewRequestWithContext(t.Context(), method, base+"/federate?match[]=up", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, body := do(t, c, req)
			return toAnswer(t, resp.StatusCode, resp.Header, body)
		}
		if d := gocmp.Diff(ask(p.URL), ask(base)); d != "" {
			t.Errorf("%s: Prometheus -, gateway +\n%s", method, d)
		}
	}
}

// familiesText gives a line for each metric of delimited protocol buffers.
func familiesText(t *testing.T, h http.Header, body []byte) string {
	t.Helper()
	var b strings.Builder
	d := expfmt.NewDecoder(bytes.NewReader(body), expfmt.ResponseFormat(h))
	for {
		var f dto.MetricFamily
		if err := d.Decode(&f); errors.Is(err, io.EOF) {
			return b.String()
		} else if err != nil {
			t.Fatal(err)
		}
		for _, m := range f.Metric {
			text, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, "%s %s %q\n", f.GetName(), f.GetType(), text)
		}
	}
}

// sortedFamilies sorts the lines: Prometheus sorts by metric name only, and has as
// many comments for a metric of several kinds as it happens to change between
// them. How many spaces protobuf puts after a colon differs, on purpose, from one
// binary to the next.
func sortedFamilies(text string) string {
	text = strings.ReplaceAll(text, ":  ", ": ")
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestNotificationsLive: there will be none, which is said so that a client
// doesn't come again.
func TestNotificationsLive(t *testing.T) {
	api := newAPI(t, gatewaytest.New(t, gatewaytest.Options{}), gateway.Options{})
	w := httptest.NewRecorder()
	api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/notifications/live", nil))
	if w.Code != http.StatusNoContent || w.Header().Get("Content-Type") != "text/event-stream" {
		t.Errorf("status %d, %v", w.Code, w.Header())
	}
}

// TestQueryCost: the number of series is that of Prometheus. The number of samples
// is estimated without a look at chunks, which a warning says.
func TestQueryCost(t *testing.T) {
	ss := dataset()
	api := newAPI(t, gatewayOf(t, ss), gateway.Options{Engine: gateway.EngineOptions{Features: []string{"query-cost"}}})
	p := toPrometheus(t, ss, "query-cost")
	base := serve(t, api)
	c := client(t)
	for _, path := range []string{
		"/query_cost?query=up&time=1700000300", "/query_cost?query=sum(rate(http_requests_total[5m]))&time=1700000300", "/query_cost?query=up[&time=1", "/query_cost?query=up&time=x",
		"/query_range_cost?query=up&start=1700000000&end=1700000300&step=15", "/query_range_cost?query=up&start=1700000000&end=1700000300&step=0",
		"/query_range_cost?query=up&start=5&end=1&step=15", "/query?query=up&time=1700000300&max_series=1", "/query?query=up&time=1700000300&cost=x",
	} {
		ask := func(base string) answer {
			t.Helper()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/api/v1"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, body := do(t, c, req)
			a := toAnswer(t, resp.StatusCode, resp.Header, body)
			a.Body = regexp.MustCompile(`("samplesRead":)\d+|,"warnings":\["query cost estimate uses[^]]*\]`).ReplaceAllString(a.Body, "$1")
			return a
		}
		if d := gocmp.Diff(ask(p.URL), ask(base)); d != "" {
			t.Errorf("%s: Prometheus -, gateway +\n%s", path, d)
		}
	}
}

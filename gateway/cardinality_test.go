package gateway_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

// TestCardinalityLikePrometheus: of samples of which half are in blocks alone, the
// numbers are those of a Prometheus that has all in its head.
func TestCardinalityLikePrometheus(t *testing.T) {
	ss := dataset()
	p := toPrometheus(t, ss)
	// Some series are in blocks alone, some in heads alone, some in both.
	cluster := gatewaytest.New(t, gatewaytest.Options{Ingesters: 2, VisibilityDelay: time.Second, Run: true})
	var blocks, heads []gatewaytest.Sample
	for _, s := range ss {
		switch s.Labels.Hash() % 3 {
		case 0:
			blocks = append(blocks, s)
		case 1:
			heads = append(heads, s)
		default:
			blocks, heads = append(blocks, s), append(heads, s)
		}
	}
	send := cluster.Shipper(gateway.DefaultTenant)
	if err := send.Send(t.Context(), blocks...); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := send.Send(t.Context(), heads...); err != nil {
		t.Fatal(err)
	}
	base := serve(t, newAPI(t, cluster, gateway.Options{}))
	c := client(t)
	get := func(base, path string, into any) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/api/v1"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, body := do(t, c, req)
		out := v1.Response{Data: into}
		if err := json.Unmarshal(body, &out); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %s", path, resp.Status, body)
		}
	}
	all := fmt.Sprintf("&start=%d&end=%d", start/1000, end/1000+1)
	var want, got v1.TSDBStatus
	get(p.URL, "/status/tsdb?limit=10000", &want)
	get(base, "/status/tsdb?limit=10000"+all, &got)
	for _, s := range []*v1.TSDBStatus{&want, &got} {
		for _, list := range [][]v1.TSDBStat{s.SeriesCountByMetricName, s.LabelValueCountByLabelName, s.MemoryInBytesByLabelName, s.SeriesCountByLabelValuePair} {
			slices.SortFunc(list, func(a, b v1.TSDBStat) int { return cmp.Or(cmp.Compare(b.Value, a.Value), cmp.Compare(a.Name, b.Name)) })
		}
		s.HeadStats.ChunkCount = 0 // chunks are others
	}
	if d := gocmp.Diff(want, got); d != "" {
		t.Errorf("status/tsdb: Prometheus -, gateway +\n%s", d)
	}

	text := func(path string) string {
		t.Helper()
		var out json.RawMessage
		get(base, path, &out)
		return string(out)
	}
	for path, want := range map[string]string{
		"/status/tsdb?limit=1":                                             `"numSeries":0`,
		"/status/tsdb?match[]=up&limit=1" + all:                            `"seriesCountByMetricName":[{"name":"up","value":6}]`,
		"/status/active_series?limit=2" + all:                              `"by":"__name__","numValues":7,"seriesCount":[{"name":"latency_bucket","value":18},{"name":"http_requests_total","value":12}]`,
		"/status/active_series?by=code&match[]=http_requests_total" + all:  `{"numSeries":12,"by":"code","numValues":2,"seriesCount":[{"name":"200","value":6},{"name":"500","value":6}]}`,
		"/status/active_series?by=nothing" + all:                           `"numValues":0,"seriesCount":[]`,
		"/status/active_series?match[]=up&start=1000&end=2000":             `"numSeries":0`,
		"/status/active_series?match[]=up&match[]={job=%22job-0%22}" + all: `"numSeries":21`,
	} {
		if body := text(path); !strings.Contains(body, want) {
			t.Errorf("%s: %s, want %s", path, body, want)
		}
	}
	for path, want := range map[string]string{
		"/status/active_series?start=x":           `invalid parameter \"start\": cannot parse \"x\" to a valid timestamp`,
		"/status/active_series?start=5&end=1":     `end timestamp must not be before start time`,
		"/status/active_series?match[]={":         `invalid parameter \"match[]\"`,
		"/status/active_series?limit=0":           `limit must be a positive number`,
		"/status/tsdb?start=2020-13-01T00:00:00Z": `cannot parse`,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/api/v1"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, body := do(t, c, req); resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s %s", path, resp.Status, body)
		}
	}
}

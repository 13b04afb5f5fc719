package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestDeletion deletes series through the API, and a tenant by the tool: nothing of
// it is in any answer, at once, after a restart, and when all is sent again; and when
// compaction has been at it, nothing is in any block. What is newer than the deletion,
// and all else, is there.
func TestDeletion(t *testing.T) {
	long(t) // a compactor looks once a minute
	t.Parallel()
	ctx := t.Context()
	s := &stack{dir: t.TempDir()}
	data := filepath.Join(s.dir, "data")
	config := writeFile(t, s.dir, "epimetheus.yml", `
tenancy: header
ingester: {flush_interval: 5s, visibility_delay: 4s}
gateway: {query_timeout: 2s}
compactor: {ranges: [1m]}
`)
	all := s.start(t, testenv.FreeAddr(t), "all", "--config.file="+config, "--data.dir="+data, "--grpc.listen-address="+testenv.FreeAddr(t), "--web.enable-admin-api")
	s.gateways, s.ingesters, s.victim = []*member{all}, []*member{all}, all
	began := time.Now()
	n, gone := startTenant(t, s, "team", ""), startTenant(t, s, "gone", "")
	count := func(tenant, match string, at time.Time) (float64, error) { // of series
		v, err := query(ctx, all.url, tenant, fmt.Sprintf("count(last_over_time({%s}[1h] @ %d.%03d))", match, at.Unix(), at.Nanosecond()/1e6))
		if err != nil || len(v.Result) == 0 {
			return 0, err
		}
		return strconv.ParseFloat(v.Result[0].Value[1].(string), 64)
	}
	const deleted, kept = `__name__=~"test_latency_seconds.*|test_native_seconds"`, `__name__="test_requests_total"`
	eventually(t, time.Minute, "samples in blocks", func() error {
		flushes, err := metric(ctx, all.url, "epimetheus_history_published_blocks_total")
		if err != nil {
			return err
		}
		for _, n := range []*tenant{n, gone} {
			if c, err := count(n.name, deleted, time.Now()); err != nil || c < 10 || flushes < 5 {
				return fmt.Errorf("%v series, %v flushes, %w", c, flushes, errors.Join(err, errors.New("too few")))
			}
		}
		return nil
	})
	gone.sidecar.stop(t)

	admin := func(method, path string, form url.Values) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, method, all.url+"/api/v1/admin/tsdb/"+path+"?"+form.Encode(), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(gateway.TenantHeader, n.name)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var body json.RawMessage
		_ = json.NewDecoder(resp.Body).Decode(&body) // of 204 there is none
		return resp.StatusCode, body
	}
	at := time.Now() // the deletion ends no earlier
	if code, body := admin(http.MethodPost, "delete_series", url.Values{"match[]": {"{" + deleted + "}"}}); code != http.StatusNoContent {
		t.Fatalf("delete_series: %d %s", code, body)
	}
	secs := func(t time.Time) string { return strconv.FormatFloat(float64(t.UnixMilli())/1000, 'f', 3, 64) }
	span := func(form url.Values) url.Values {
		form.Set("start", secs(began.Add(-time.Hour)))
		form.Set("end", secs(at))
		form.Set("step", "1")
		return form
	}
	absent := func(what string) {
		t.Helper()
		for path, form := range map[string]url.Values{
			"query":           {"query": {"last_over_time({" + deleted + "}[1h])"}, "time": {secs(at)}},
			"query_range":     span(url.Values{"query": {"{" + deleted + "}"}}),
			"series":          span(url.Values{"match[]": {"{" + deleted + "}"}}),
			"query_exemplars": span(url.Values{"query": {"{" + deleted + "}"}}),
		} {
			code, r, err := get(ctx, all.url, "/api/v1/"+path, n.name, form)
			if err != nil || code != http.StatusOK {
				t.Errorf("%s: %s: %d %s, %v", what, path, code, r.Error, err)
			}
			if strings.Contains(string(r.Data), "test_") {
				t.Errorf("%s: %s gives %.300s", what, path, r.Data)
			}
		}
		if c, err := count(n.name, kept, at); err != nil || c < 1 {
			t.Errorf("%s: of what is kept there are %v series, %v", what, c, err)
		}
	}
	absent("at once")

	// The process is started again, with the other tenant deleted meanwhile.
	all.stop(t)
	tool := func(args ...string) (string, error) {
		return s.runTool(t, append(args, gone.name, "--config.file="+config, "--data.dir="+data)...)
	}
	if out, err := tool("tenant", "verify-deleted"); err == nil || !strings.Contains(out, "block row") || !strings.Contains(out, "object") {
		t.Errorf("a tenant that isn't deleted: %v\n%s", err, out)
	}
	if out, err := tool("tenant", "delete"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	all.restart(t)
	absent("after a restart")
	if c, err := count(gone.name, `__name__!=""`, time.Now()); err != nil || c != 0 {
		t.Errorf("of the tenant that is deleted there are %v series, %v", c, err)
	}

	// All is sent again, as by a new sidecar.
	n.sidecar.stop(t)
	wipe(t, n.sidecarDir(s))
	n.startSidecar(t, s)
	eventually(t, time.Minute, "sent again", func() error { return caughtUp(ctx, n) })
	absent("sent again")
	eventually(t, time.Minute, "newer samples", func() error {
		v, err := query(ctx, all.url, n.name, "test_latency_seconds_count")
		if err == nil && len(v.Result) != 1 {
			err = fmt.Errorf("%d series: what is newer than the deletion is to be kept", len(v.Result))
		}
		return err
	})

	if code, body := admin(http.MethodPut, "clean_tombstones", nil); code != http.StatusNoContent {
		t.Fatalf("clean_tombstones: %d %s", code, body)
	}
	eventually(t, 10*time.Minute, "nothing left in blocks", func() error {
		code, body := admin(http.MethodGet, "deletions", nil)
		var list struct{ Data []struct{ Gone string } }
		if err := json.Unmarshal(body, &list); err != nil || code != http.StatusOK || len(list.Data) != 1 {
			return fmt.Errorf("%d %s, %w", code, body, errors.Join(err, errors.New("want one deletion")))
		}
		if list.Data[0].Gone == "" {
			return errors.New("it isn't gone")
		}
		return nil
	})
	absent("removed")
	n.sidecar.stop(t)
	all.stop(t)
	if out, err := tool("tenant", "verify-deleted"); err != nil || !strings.Contains(out, "no block row") {
		t.Errorf("the tenant that is deleted: %v\n%s", err, out)
	}
	left, others := inBlocks(t, data, n.name, at, labels.MustNewMatcher(labels.MatchRegexp, "__name__", "test_latency_seconds.*|test_native_seconds")),
		inBlocks(t, data, n.name, at, labels.MustNewMatcher(labels.MatchEqual, "__name__", "test_requests_total"))
	if left != 0 || others == 0 {
		t.Errorf("in blocks there are %d samples of what is deleted, %d of what isn't", left, others)
	}
}

// inBlocks counts the samples, up to a time, that blocks in a data directory have,
// whatever is deleted.
func inBlocks(t *testing.T, data, tenant string, until time.Time, m *labels.Matcher) (n int) {
	t.Helper()
	objects, err := object.NewFiles(filepath.Join(data, "objects"), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	rows, err := index.NewBolt(filepath.Join(data, "index.db"), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	x := index.New(rows)
	h, err := history.New(history.Options{Objects: objects, Index: x})
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := x.AllBlocks(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	set, err := h.Open(tenant, math.MinInt64, until.UnixMilli(), history.Blocks(blocks), nil).
		Select(t.Context(), []*labels.Matcher{m}, math.MinInt64, until.UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	for set.Next(t.Context()) {
		runs, err := set.At().Runs(&history.Buffer{})
		if err != nil {
			t.Fatal(err)
		}
		if len(runs) > 0 {
			one := chunkfmt.Merge(runs...)
			n += len(one.Floats.T) + len(one.Histograms.T)
		}
	}
	if err := set.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/history/choice"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

func TestClaim(t *testing.T) {
	rows := &historytest.MemoryRows{}
	broken := false
	faulty := &historytest.FaultyRows{Store: rows, Decide: func(string, string) historytest.Fault {
		if broken {
			return historytest.Before
		}
		return historytest.None
	}}
	c := gatewaytest.New(t, gatewaytest.Options{Ingesters: 1})
	api := newAPI(t, c, gateway.Options{Tenancy: gateway.Header, Choices: choice.New(index.New(faulty))})
	post := func(api *gateway.API, tenant, body string) (int, string, []choice.Interval) {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/api/v1/ha/claim", strings.NewReader(body))
		if tenant != "" {
			r.Header.Set(gateway.TenantHeader, tenant)
		}
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		var a struct {
			Status, Error string
			Data          choice.Answer
		}
		if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil || (a.Status == "success") != (w.Code == http.StatusOK) {
			t.Errorf("answer %d %s: %v", w.Code, w.Body, err)
		}
		return w.Code, a.Error, a.Data.Intervals
	}
	want := func(tenant, body string, want ...choice.Interval) {
		t.Helper()
		code, text, got := post(api, tenant, body)
		if code != http.StatusOK || gocmp.Diff(want, got) != "" && len(want)+len(got) > 0 {
			t.Errorf("%s: %d %s, %v, want %v", body, code, text, got, want)
		}
	}
	refused := func(tenant, body string, status int, hint string) {
		t.Helper()
		if code, text, _ := post(api, tenant, body); code != status || !strings.Contains(text, hint) {
			t.Errorf("%.100s: %d %s, want %d and %q", body, code, text, status, hint)
		}
	}
	is := func(from, until int64, replica string) choice.Interval {
		return choice.Interval{From: from, Until: until, Replica: replica}
	}
	want("x", `{"group":"g","from":1000,"until":5000}`)
	want("x", `{"group":"g","replica":"a","from":1000,"until":2000}`, is(1000, 2000, "a"))
	want("x", `{"group":"g","replica":"b","from":2000,"until":2500}`, is(1000, 2000, "a"), is(2000, 2500, "b"))
	want("x", `{"group":"g","from":1000,"until":5000}`, is(1000, 2000, "a"), is(2000, 2500, "b"))
	want("y", `{"group":"g","replica":"b","from":1500,"until":2500}`, is(1500, 2500, "b"))
	refused("", `{"group":"g","replica":"b","from":1500,"until":2500}`, http.StatusUnauthorized, "X-Scope-OrgID")
	refused("x", `{`, http.StatusBadRequest, "claim")
	refused("x", `{"group":"`+strings.Repeat("g", 100<<10)+`"}`, http.StatusBadRequest, "large")
	refused("x", `{"group":"g","replica":"b","from":5,"until":5}`, http.StatusBadRequest, "interval")
	soon := time.Now().Add(9 * time.Minute).UnixMilli()
	want("x", fmt.Sprintf(`{"group":"future","replica":"b","from":%d,"until":%d}`, soon-1, soon), is(soon-1, soon, "b"))
	late := time.Now().Add(11 * time.Minute).UnixMilli()
	refused("x", fmt.Sprintf(`{"group":"future","replica":"b","from":%d,"until":%d}`, late-1, late), http.StatusBadRequest, "clock")
	refused("x", `{"group":"future","replica":"b","from":1,"until":9223372036854775807}`, http.StatusBadRequest, "clock")
	broken = true
	refused("x", `{"group":"g","replica":"b","from":1500,"until":2500}`, http.StatusServiceUnavailable, "injected")
	if code, text, _ := post(newAPI(t, c, gateway.Options{}), "", `{"group":"g","from":1,"until":2}`); code != http.StatusNotImplemented {
		t.Errorf("a gateway without an index: %d %s", code, text)
	}
	slow := slowChoices{make(chan struct{})}
	api = newAPI(t, c, gateway.Options{Choices: slow})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/api/v1/ha/claim", strings.NewReader(`{"from":1,"until":2}`))
		api.ServeHTTP(httptest.NewRecorder(), r)
	}()
	<-slow.asked
	cancel()
	<-done // it doesn't wait for what nobody wants
}

type slowChoices struct{ asked chan struct{} }

func (slowChoices) Claim(context.Context, string, string, string, int64, int64) ([]choice.Interval, error) {
	return nil, errors.New("not to be called")
}

func (s slowChoices) Decided(ctx context.Context, _, _ string, _, _ int64) ([]choice.Interval, error) {
	close(s.asked)
	<-ctx.Done()
	return nil, ctx.Err()
}

package sidecar

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
)

// A gateway that knows of another sidecar with this one's name is listened to, until
// it says otherwise.
func TestRivalIsNoticed(t *testing.T) {
	rival := "other"
	var asked choice.Request
	g := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			t.Error(err)
		}
		answer := rival
		if asked.Replica == "" {
			answer = ""
		}
		fmt.Fprintf(w, `{"status": "success", "data": {"intervals": [], "rival": %q}}`, answer)
	}))
	defer g.Close()
	answered := make(chan struct{}, 1)
	c := &claimer{
		gateways: []string{g.URL}, tenant: "t", source: "mine", client: g.Client(), logger: promslog.NewNopLogger(),
		metrics: newMetrics(prometheus.NewRegistry()), notify: func() { answered <- struct{}{} }, requests: make(chan choice.Request, 1),
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.run(ctx) })
	defer wg.Wait()
	defer cancel()
	claim := func(replica, want string) {
		t.Helper()
		c.ask(choice.Request{Group: "g", Replica: replica, From: 1, Until: 2})
		<-answered
		if asked.Source != "mine" || c.rivalSource() != want {
			t.Errorf("source %q, rival %q, want %q", asked.Source, c.rivalSource(), want)
		}
	}
	claim("a", "other")
	claim("", "other") // only claims tell
	rival = ""
	claim("a", "")
}

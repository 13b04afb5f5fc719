package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// members is a model of the gossip: what happens to a member shows after a while,
// and to the gateway that answers queries even later.
type members struct {
	live  ring.Live // as ingesters see it, and the gateway that sidecars ask
	late  ring.Live // as the gateway sees it that answers queries
	delay time.Duration
	lag   time.Duration // of late

	mu           sync.Mutex
	all, allLate map[string]ring.Member // by id
}

// settle is how long a new member waits before it is active, as in ingest/gossip.
const settle = 3 * time.Second

// change makes fn's change visible after wait and the delay of the gossip.
func (m *members) change(wait time.Duration, fn func(all map[string]ring.Member)) {
	apply := func(to *ring.Live, all map[string]ring.Member) func() {
		return func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			fn(all)
			to.Set(ring.NewSnapshot(slices.Collect(maps.Values(all))))
		}
	}
	after := func(d time.Duration, do func()) {
		if d == 0 {
			do()
			return
		}
		time.AfterFunc(d, do)
	}
	wait += m.delay
	after(wait, apply(&m.live, m.all))
	after(wait+m.lag, apply(&m.late, m.allLate))
}

// state changes the state of a process that is still the one of its id.
func (m *members) state(wait time.Duration, id, process string, s ring.State) {
	m.change(wait, func(all map[string]ring.Member) {
		if x, ok := all[id]; ok && x.Process == process {
			x.State = s
			all[id] = x
		}
	})
}

// forget takes a process off the ring.
func (m *members) forget(wait time.Duration, id, process string) {
	m.change(wait, func(all map[string]ring.Member) {
		if all[id].Process == process {
			delete(all, id)
		}
	})
}

// gateway is the place in the network that answers for the ring and queries.
const gateway = "gateway"

// ringEndpoint is the gateway's ring endpoint, as a sidecar reaches it.
type ringEndpoint struct {
	w    *world
	from string // the sidecar's place
}

// RoundTrip implements http.RoundTripper.
func (e ringEndpoint) RoundTrip(req *http.Request) (*http.Response, error) {
	l := e.w.net.link(e.from, gateway)
	if err := l.pass(req.Context().Done()); err != nil {
		return nil, err
	}
	wait, err := time.ParseDuration(req.URL.Query().Get("wait"))
	if err != nil {
		return nil, fmt.Errorf("ring endpoint: %w", err)
	}
	ctx, cancel := context.WithTimeout(req.Context(), wait)
	defer cancel()
	r := e.w.members.live.Wait(ctx, req.URL.Query().Get("version"))
	if err := l.pass(req.Context().Done()); err != nil {
		return nil, err
	}
	b, err := json.Marshal(r.Snapshot())
	if err != nil {
		return nil, err
	}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: req,
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b)),
	}, nil
}

package sidecar

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// ringWatch follows the ring over a gateway: it asks for a version other than
// the one it has, and the gateway answers when there is one or some time passed.
type ringWatch struct {
	gateways []string // base URLs, taken in turn when one fails
	tenant   string
	wait     time.Duration // that the gateway may take to answer
	client   *http.Client
	logger   *slog.Logger
	failed   func()
	notify   func()

	mu      sync.Mutex
	ring    *ring.Ring // nil before the first answer
	err     error
	answers time.Time // when the last answer came
}

const maxRingBytes = 16 << 20

func (w *ringWatch) run(ctx context.Context) {
	var failing bool
	version, next := "", 0
	for pause := 100 * time.Millisecond; ctx.Err() == nil; {
		asked := time.Now()
		s, err := w.get(ctx, w.gateways[next%len(w.gateways)], version)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.failed()
			w.mu.Lock()
			w.err = err
			w.mu.Unlock()
			if !failing {
				failing = true
				w.logger.Warn("ring can't be had from the gateway, trying on", "gateway", w.gateways[next%len(w.gateways)], "err", err)
			}
			next++
			sleep(ctx, pause/2+rand.N(pause))
			pause = min(2*pause, 5*time.Second)
			continue
		}
		if failing {
			failing = false
			w.logger.Info("ring can be had from the gateway again", "gateway", w.gateways[next%len(w.gateways)])
		}
		pause = 100 * time.Millisecond
		same := s.Version == version
		w.mu.Lock()
		w.err, w.answers = nil, time.Now()
		if !same {
			w.ring = ring.New(s)
		}
		w.mu.Unlock()
		version = s.Version
		if !same {
			w.notify()
		} else if time.Since(asked) < w.wait/2 {
			// A gateway that doesn't wait must not be asked in a tight loop.
			sleep(ctx, time.Second)
		}
	}
}

func (w *ringWatch) get(ctx context.Context, gateway, version string) (ring.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, w.wait+10*time.Second)
	defer cancel()
	u := strings.TrimSuffix(gateway, "/") + "/api/v1/ring?" + url.Values{"version": {version}, "wait": {w.wait.String()}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return ring.Snapshot{}, fmt.Errorf("ask for the ring: %w", err)
	}
	req.Header.Set("X-Scope-OrgID", w.tenant)
	resp, err := w.client.Do(req)
	if err != nil {
		return ring.Snapshot{}, fmt.Errorf("ask for the ring: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return ring.Snapshot{}, fmt.Errorf("ask for the ring: %s answered %s: %s", gateway, resp.Status, strings.TrimSpace(string(b)))
	}
	var s ring.Snapshot
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxRingBytes)).Decode(&s); err != nil {
		return ring.Snapshot{}, fmt.Errorf("ring that %s answered: %w", gateway, err)
	}
	return s, nil
}

// present returns the newest ring, nil if none is known.
func (w *ringWatch) present() (*ring.Ring, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ring, w.err
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

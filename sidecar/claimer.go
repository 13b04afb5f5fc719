package sidecar

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/choice"
)

// claimer asks a gateway for claims, one request at a time. What fails is
// forgotten: by then something else may be due.
type claimer struct {
	gateways []string // base URLs, taken in turn when one fails
	tenant   string
	source   string
	client   *http.Client
	logger   *slog.Logger
	metrics  *metrics
	notify   func()

	requests chan choice.Request // cap 1

	mu      sync.Mutex
	busy    bool
	answers []claimAnswer
	err     error
	rival   string // another source that claims by our name
}

type claimAnswer struct {
	request   choice.Request
	intervals []choice.Interval
}

// ask has a request made, unless one is under way.
func (c *claimer) ask(q choice.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.busy {
		c.busy = true
		c.requests <- q
	}
}

// take returns the answers since the last call.
func (c *claimer) take() []claimAnswer {
	c.mu.Lock()
	defer c.mu.Unlock()
	as := c.answers
	c.answers = nil
	return as
}

func (c *claimer) lastError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// rivalSource is another source that claims by our name, or "".
func (c *claimer) rivalSource() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rival
}

func (c *claimer) run(ctx context.Context) {
	failing, next, rival := false, 0, ""
	pause := 100 * time.Millisecond
	for {
		var q choice.Request
		select {
		case <-ctx.Done():
			return
		case q = <-c.requests:
		}
		answer, err := c.post(ctx, c.gateways[next%len(c.gateways)], q)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.metrics.claimErrors.Inc()
			if !failing {
				failing = true
				c.logger.Warn("which replica is chosen can't be asked for, trying on: samples wait in the WAL where that isn't known",
					"gateway", c.gateways[next%len(c.gateways)], "err", err)
			}
			c.mu.Lock()
			c.err = err
			c.mu.Unlock()
			next++
			sleep(ctx, pause/2+rand.N(pause))
			pause = min(2*pause, 5*time.Second)
		} else {
			if failing {
				failing = false
				c.logger.Info("which replica is chosen can be asked for again", "gateway", c.gateways[next%len(c.gateways)])
			}
			pause = 100 * time.Millisecond
			if q.Replica != "" && answer.Rival != rival {
				if rival = answer.Rival; rival != "" {
					c.logger.Error("another sidecar claims by this replica's name: samples are doubled; give each Prometheus a replica label of its own",
						"replica", q.Replica, "source", rival)
				}
			}
		}
		c.mu.Lock()
		c.busy = false
		c.rival = rival
		if err == nil {
			c.err = nil
			c.answers = append(c.answers, claimAnswer{q, answer.Intervals})
		}
		c.mu.Unlock()
		c.notify()
	}
}

func (c *claimer) post(ctx context.Context, gateway string, q choice.Request) (choice.Answer, error) {
	q.Source = c.source
	kind := "claim"
	if q.Replica == "" {
		kind = "ask"
	}
	c.metrics.claims.WithLabelValues(kind).Inc()
	var answer choice.Answer
	if err := postToGateway(ctx, c.client, gateway, "/api/v1/ha/claim", c.tenant, q, &answer); err != nil {
		return choice.Answer{}, fmt.Errorf("claim: %w", err)
	}
	last := int64(noTime)
	for _, x := range answer.Intervals {
		if x.From < last || x.Until <= x.From || x.Replica == "" {
			return choice.Answer{}, fmt.Errorf("claims that %s answered: interval from %d until %d ms of replica %q", gateway, x.From, x.Until, x.Replica)
		}
		last = x.Until
	}
	return answer, nil
}

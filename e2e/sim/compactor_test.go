package sim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// compactor is one process of a compactor. Its stores fail as those of ingesters do,
// and not at all any more once it is dead.
type compactor struct {
	dead   atomic.Bool
	reg    *prometheus.Registry
	cancel context.CancelFunc
	ended  chan struct{}
}

func (w *world) startCompactor() error {
	c := &compactor{ended: make(chan struct{}), reg: prometheus.NewRegistry()}
	decide := w.decide(&c.dead)
	o := w.compaction
	o.Objects = &historytest.FaultyObjects{Store: &w.objects, Decide: decide}
	o.Index = index.New(&heldRows{historytest.HeldRows{Store: &historytest.FaultyRows{Store: &w.rows, Decide: decide}, Held: w.faults.held}, &w.faults})
	o.Dir = filepath.Join(w.dir, fmt.Sprintf("compactor-%d", len(w.compactors)))
	o.Logger, o.Registerer = w.logger, c.reg
	p, err := compact.New(o)
	if err != nil {
		return err
	}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(context.Background())
	go func() { // ends with ctx; close waits
		defer close(c.ended)
		if err := p.Run(ctx); err != nil {
			w.fail(fmt.Errorf("compactor: %w", err))
		}
		_ = os.RemoveAll(o.Dir)
	}()
	w.compactors = append(w.compactors, c)
	return nil
}

func (c *compactor) kill() {
	c.dead.Store(true)
	c.cancel()
}

// killCompactor kills one; another starts later.
func (w *world) killCompactor() string {
	var alive []*compactor
	for _, c := range w.compactors {
		if !c.dead.Load() {
			alive = append(alive, c)
		}
	}
	if len(alive) == 0 {
		return ""
	}
	pick(w.rng, alive...).kill()
	d := between(w.rng, 0, 30*time.Second)
	w.later(d, "a compactor starts", func() {
		if err := w.startCompactor(); err != nil {
			w.fail(err)
		}
	})
	return fmt.Sprintf("a compactor is killed, another comes in %v", d)
}

// compacted is how many compactions went well.
func (w *world) compacted() int {
	n := 0.0
	for _, c := range w.compactors {
		all, err := c.reg.Gather()
		if err != nil {
			w.fail(err)
			continue
		}
		for _, f := range all {
			if f.GetName() != "epimetheus_compactor_jobs_total" {
				continue
			}
			for _, m := range f.Metric {
				for _, l := range m.Label {
					if l.GetValue() == "done" {
						n += m.GetCounter().GetValue()
					}
				}
			}
		}
	}
	return int(n)
}

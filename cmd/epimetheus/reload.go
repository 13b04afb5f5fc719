package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

// reloadInterval is how often the configuration file is looked at; SIGHUP makes it
// at once.
const reloadInterval = 30 * time.Second

// settings are what follows the configuration file at run time.
type settings struct {
	retentions atomic.Pointer[history.Retentions]
}

func (s *settings) set(c *Config) {
	s.retentions.Store(c.Retention.retentions())
}

// reloader reads the configuration file again when it has changed: all of it must be
// valid, and of what has changed only settings are taken.
type reloader struct {
	p    *process
	path string
	good prometheus.Gauge

	mu    sync.Mutex
	last  []byte // as it was taken last, valid or not
	seen  []byte // as it was at the last look
	err   error
	since time.Time
}

// addReload follows the file, if there is one.
func (p *process) addReload(path string) error {
	if path == "" {
		return nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	r := &reloader{p: p, path: path, last: text, good: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "epimetheus_config_last_reload_successful", Help: "1 if the configuration file is valid, as it was read last.",
	})}
	r.good.Set(1)
	p.reg.MustRegister(r.good)
	p.health = append(p.health, r.conditions)
	p.addRun("configuration", r.run, nil)
	return nil
}

func (r *reloader) run(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			r.look(true)
		case <-time.After(reloadInterval):
			r.look(false)
		}
	}
}

// look takes a file that has changed if somebody says that it is to be read, or if it
// is the same twice: what was seen of one that is being written could be valid, and
// lack the retention of a tenant.
func (r *reloader) look(told bool) {
	text, err := os.ReadFile(r.path)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil && bytes.Equal(text, r.last) {
		return
	}
	if err == nil && !told && !bytes.Equal(text, r.seen) {
		r.seen = text
		return
	}
	var c Config
	if err == nil {
		r.last = text
		c, err = parseConfig(r.path, text)
	} else {
		r.last = nil // should it come back as it was, that ends the error
	}
	if err != nil {
		if r.err == nil {
			r.since = time.Now()
		}
		if r.err == nil || r.err.Error() != err.Error() {
			r.p.logger.Error("the configuration file is not valid any more: what was read before holds", "err", err)
		}
		r.err = err
		r.good.Set(0)
		return
	}
	r.err = nil
	r.good.Set(1)
	r.p.settings.set(&c)
	r.p.logger.Info("configuration read again: retention is as it says, all else with the next start", "file", r.path)
}

func (r *reloader) conditions() []health.Condition {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		return nil
	}
	return []health.Condition{{Since: r.since, What: fmt.Sprintf("the configuration file can't be read again: %v", r.err)}}
}

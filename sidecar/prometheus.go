package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"go.yaml.in/yaml/v2"
)

// externalLabels watches the external labels of the Prometheus beside us: asked
// of the running one, or read from its configuration file. It polls, so that
// they follow a reload.
type externalLabels struct {
	url    string // of the Prometheus; empty if file is used
	file   string
	every  time.Duration
	client *http.Client
	logger *slog.Logger
	failed func()
	notify func()

	mu     sync.Mutex
	known  bool
	labels labels.Labels
	err    error // of the last attempt
}

const maxConfigBytes = 64 << 20

func (e *externalLabels) run(ctx context.Context) {
	if e.url == "" && e.file == "" {
		e.set(labels.EmptyLabels())
		return
	}
	var failing bool
	var pause time.Duration
	for ; ctx.Err() == nil; sleep(ctx, pause) {
		pause = e.every
		ls, err := e.get(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			e.failed()
			e.mu.Lock()
			e.err = err
			known := e.known
			e.mu.Unlock()
			if !known {
				pause = min(pause, time.Second)
			}
			if !failing {
				failing = true
				e.logger.Warn("external labels of Prometheus can't be had, trying on", "err", err)
			}
			continue
		}
		if failing {
			failing = false
			e.logger.Info("external labels of Prometheus found again", "external_labels", ls.String())
		}
		e.set(ls)
	}
}

func (e *externalLabels) set(ls labels.Labels) {
	e.mu.Lock()
	changed := !e.known || !labels.Equal(e.labels, ls)
	e.known, e.labels, e.err = true, ls, nil
	e.mu.Unlock()
	if changed {
		e.notify()
	}
}

// present returns the labels last found, and whether any were.
func (e *externalLabels) present() (labels.Labels, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.labels, e.known
}

func (e *externalLabels) lastError() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

func (e *externalLabels) get(ctx context.Context) (labels.Labels, error) {
	if e.file != "" {
		b, err := os.ReadFile(e.file)
		if err != nil {
			return labels.EmptyLabels(), fmt.Errorf("read Prometheus's configuration file: %w", err)
		}
		// Prometheus expands variables when it loads the file; what its API
		// shows has been expanded.
		return parseExternalLabels(b, true)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(e.url, "/")+"/api/v1/status/config", nil)
	if err != nil {
		return labels.EmptyLabels(), fmt.Errorf("ask Prometheus for its configuration: %w", err)
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return labels.EmptyLabels(), fmt.Errorf("ask Prometheus for its configuration: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return labels.EmptyLabels(), fmt.Errorf("ask Prometheus for its configuration: %s answered %s", req.URL, resp.Status)
	}
	var body struct {
		Data struct {
			YAML *string `json:"yaml"`
		} `json:"data"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxConfigBytes)).Decode(&body); err != nil {
		return labels.EmptyLabels(), fmt.Errorf("configuration that Prometheus answered: %w", err)
	}
	if body.Data.YAML == nil {
		return labels.EmptyLabels(), errors.New("configuration that Prometheus answered: no data.yaml in it")
	}
	return parseExternalLabels([]byte(*body.Data.YAML), false)
}

// parseExternalLabels takes the external labels out of a configuration of
// Prometheus, and nothing else: the rest may be of a version that we don't know.
func parseExternalLabels(b []byte, expand bool) (labels.Labels, error) {
	var c struct {
		Global struct {
			ExternalLabels map[string]string `yaml:"external_labels"`
		} `yaml:"global"`
	}
	if err := yaml.Unmarshal(b, &c); err != nil {
		return labels.EmptyLabels(), fmt.Errorf("configuration of Prometheus: %w", err)
	}
	if expand {
		for n, v := range c.Global.ExternalLabels {
			c.Global.ExternalLabels[n] = os.Expand(v, func(s string) string {
				if s == "$" {
					return "$"
				}
				return os.Getenv(s)
			})
		}
	}
	return labels.FromMap(c.Global.ExternalLabels), nil
}

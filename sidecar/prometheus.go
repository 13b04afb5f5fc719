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
	loaded time.Time // when Prometheus took them, as far as it can be told; else zero
	err    error     // of the last attempt
}

const maxConfigBytes = 64 << 20

func (e *externalLabels) run(ctx context.Context) {
	if e.url == "" && e.file == "" {
		e.set(labels.EmptyLabels(), time.Time{})
		return
	}
	var failing bool
	var pause time.Duration
	for ; ctx.Err() == nil; sleep(ctx, pause) {
		pause = e.every
		ls, loaded, err := e.get(ctx)
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
		e.set(ls, loaded)
	}
}

func (e *externalLabels) set(ls labels.Labels, loaded time.Time) {
	e.mu.Lock()
	changed := !e.known || !labels.Equal(e.labels, ls)
	if changed {
		e.labels, e.loaded = ls, loaded
	}
	e.known, e.err = true, nil
	e.mu.Unlock()
	if changed {
		e.notify()
	}
}

// present returns the labels last found, when Prometheus took them (zero if that
// isn't known), and whether any were found.
func (e *externalLabels) present() (ls labels.Labels, loaded time.Time, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.labels, e.loaded, e.known
}

func (e *externalLabels) lastError() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

func (e *externalLabels) get(ctx context.Context) (labels.Labels, time.Time, error) {
	none := labels.EmptyLabels()
	if e.file != "" {
		b, err := os.ReadFile(e.file)
		if err != nil {
			return none, time.Time{}, fmt.Errorf("read Prometheus's configuration file: %w", err)
		}
		// Prometheus expands variables when it loads the file; what its API
		// shows has been expanded. When it does so isn't known.
		ls, err := parseExternalLabels(b, true)
		return ls, time.Time{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	text, err := askConfig(ctx, e.client, e.url)
	if err != nil {
		return none, time.Time{}, err
	}
	ls, err := parseExternalLabels([]byte(text), false)
	if err != nil {
		return none, time.Time{}, err
	}
	e.mu.Lock()
	same := e.known && labels.Equal(e.labels, ls)
	e.mu.Unlock()
	if same {
		return ls, time.Time{}, nil
	}
	var info struct {
		Data struct {
			LastConfigTime time.Time `json:"lastConfigTime"`
		} `json:"data"`
	}
	if err := ask(ctx, e.client, e.url, "/api/v1/status/runtimeinfo", &info); err != nil {
		// A Prometheus that doesn't tell: then they hold from now on.
		e.logger.Debug("time of Prometheus's last reload can't be had", "err", err)
		return ls, time.Time{}, nil
	}
	return ls, info.Data.LastConfigTime, nil
}

// askConfig gives the configuration that the Prometheus at url runs with, as YAML.
func askConfig(ctx context.Context, client *http.Client, url string) (string, error) {
	var config struct {
		Data struct {
			YAML *string `json:"yaml"`
		} `json:"data"`
	}
	if err := ask(ctx, client, url, "/api/v1/status/config", &config); err != nil {
		return "", fmt.Errorf("ask Prometheus for its configuration: %w", err)
	}
	if config.Data.YAML == nil {
		return "", errors.New("configuration that Prometheus answered: no data.yaml in it")
	}
	return *config.Data.YAML, nil
}

// ask decodes what the Prometheus at url answers to a GET.
func ask(ctx context.Context, client *http.Client, url, path string, to any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", req.URL, resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxConfigBytes)).Decode(to)
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

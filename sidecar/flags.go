package sidecar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v2"
)

// flagsInterval is how often Prometheus is asked for its flags, which change when it
// is started anew, and its evaluation interval.
const flagsInterval = time.Minute

// flags tells gateways with which flags, and what of its configuration, Prometheus
// evaluates queries, so that they mean the same there: POST /api/v1/engine of docs/api.md.
type flags struct {
	url      string   // of the Prometheus; empty: nothing is told
	gateways []string // base URLs, taken in turn when one fails
	tenant   string
	client   *http.Client // for Prometheus
	gateway  *http.Client
	logger   *slog.Logger
	failed   func()
}

// engineFlags is the body of a report.
type engineFlags struct {
	LookbackDelta      string   `json:"lookback_delta"`
	EnableFeatures     []string `json:"enable_features"`
	EvaluationInterval string   `json:"evaluation_interval"`
}

func (f *flags) run(ctx context.Context) {
	if f.url == "" {
		return
	}
	var told *engineFlags
	failing, next := false, 0
	for pause := time.Second; ; {
		got, err := f.get(ctx)
		if err == nil && got != nil && (told == nil || got.LookbackDelta != told.LookbackDelta || got.EvaluationInterval != told.EvaluationInterval || !slices.Equal(got.EnableFeatures, told.EnableFeatures)) {
			if err = postToGateway(ctx, f.gateway, f.gateways[next%len(f.gateways)], "/api/v1/engine", f.tenant, got, nil); err == nil {
				told = got
			} else {
				next++
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.failed()
			if !failing {
				failing = true
				f.logger.Warn("gateways can't be told Prometheus's flags for queries, trying on: they use what they know", "err", err)
			}
			sleep(ctx, pause)
			pause = min(2*pause, flagsInterval)
		default:
			if failing {
				failing = false
				f.logger.Info("gateways know Prometheus's flags for queries again")
			}
			pause = time.Second
			sleep(ctx, flagsInterval)
		}
	}
}

// get returns the flags and the evaluation interval of the running Prometheus; nil for an agent, which evaluates
// no queries.
func (f *flags) get(ctx context.Context) (*engineFlags, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var answer struct {
		Data map[string]string `json:"data"`
	}
	if err := ask(ctx, f.client, f.url, "/api/v1/status/flags", &answer); err != nil {
		return nil, fmt.Errorf("ask Prometheus for its flags: %w", err)
	}
	if answer.Data == nil {
		return nil, errors.New("flags that Prometheus answered: no data in them")
	}
	e := &engineFlags{LookbackDelta: answer.Data["query.lookback-delta"], EnableFeatures: []string{}}
	if e.LookbackDelta == "" || answer.Data["agent"] == "true" {
		return nil, nil
	}
	for name := range strings.SplitSeq(answer.Data["enable-feature"], ",") {
		if name = strings.TrimSpace(name); name != "" {
			e.EnableFeatures = append(e.EnableFeatures, name)
		}
	}
	text, err := askConfig(ctx, f.client, f.url)
	if err != nil {
		return nil, err
	}
	var c struct {
		Global struct {
			EvaluationInterval string `yaml:"evaluation_interval"`
		} `yaml:"global"`
	}
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		return nil, fmt.Errorf("configuration of Prometheus: %w", err)
	}
	e.EvaluationInterval = cmp.Or(c.Global.EvaluationInterval, "1m") // which is Prometheus's default
	return e, nil
}

package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/url"

	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/rules"
	"github.com/prometheus/prometheus/scrape"
	"github.com/prometheus/prometheus/tsdb"
)

// noScraping stands for what a gateway has none of: targets, rules, alerts.
type noScraping struct{}

func (noScraping) ScrapePools() []string                      { return []string{} }
func (noScraping) TargetsActive() map[string][]*scrape.Target { return map[string][]*scrape.Target{} }

func (noScraping) TargetsDropped() map[string][]*scrape.Target { return map[string][]*scrape.Target{} }
func (noScraping) TargetsDroppedCounts() map[string]int        { return map[string]int{} }
func (noScraping) ScrapePoolConfig(pool string) (*config.ScrapeConfig, error) {
	return nil, fmt.Errorf("scrape pool %q not found", pool)
}
func (noScraping) Alertmanagers() []*url.URL            { return nil }
func (noScraping) DroppedAlertmanagers() []*url.URL     { return nil }
func (noScraping) RuleGroups() []*rules.Group           { return nil }
func (noScraping) AlertingRules() []*rules.AlertingRule { return nil }

// noTSDB stands for the local database that a gateway hasn't. Of the admin API, what
// is off or our own doesn't call it.
type noTSDB struct{}

var errNoTSDB = errors.New("a gateway has no database of its own")

func (noTSDB) CleanTombstones() error { return errNoTSDB }
func (noTSDB) Delete(context.Context, int64, int64, ...*labels.Matcher) error {
	return errNoTSDB
}
func (noTSDB) Snapshot(string, bool) error                    { return errNoTSDB }
func (noTSDB) Stats(string, int) (*tsdb.Stats, error)         { return nil, errNoTSDB }
func (noTSDB) BlockMetas() ([]tsdb.BlockMeta, error)          { return []tsdb.BlockMeta{}, nil }
func (noTSDB) WALReplayStatus() (tsdb.WALReplayStatus, error) { return tsdb.WALReplayStatus{}, nil }

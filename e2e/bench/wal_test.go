package bench

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/util/compression"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// source is a data directory that Prometheus's own tsdb package writes, as the
// Prometheus of a tenant would.
type source struct {
	dir     string
	db      *tsdb.DB
	config  gen.Config
	targets [][]scraped
	scrapes int // so far
}

// scraped is one series of a target.
type scraped struct {
	labels labels.Labels
	ref    storage.SeriesRef
	it     *gen.Iter
}

// wide is the data set "wide": 100,000 series of 100 targets, scraped every
// 15 s, none of which comes or goes.
func wide(start time.Time, span time.Duration) gen.Config {
	c := gen.Config{Series: 100_000, Targets: 100, Start: start.UnixMilli(), Interval: 15_000, Seed: 1}
	c.End = c.Start + span.Milliseconds()
	return c
}

func newSource(tb testing.TB, c gen.Config) *source {
	tb.Helper()
	return newSourceAt(tb, tb.TempDir(), c)
}

func newSourceAt(tb testing.TB, dir string, c gen.Config) *source {
	tb.Helper()
	opts := tsdb.DefaultOptions()
	opts.WALCompression = compression.Snappy
	s := &source{dir: dir, config: c, targets: make([][]scraped, c.Targets)}
	db, err := tsdb.Open(s.dir, promslog.NewNopLogger(), nil, opts, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = db.Close() })
	db.DisableCompactions()
	s.db = db
	for _, g := range c.AllSeries() {
		b := labels.NewScratchBuilder(len(g.Labels))
		for _, l := range g.Labels {
			b.Add(l.Name, l.Value)
		}
		s.targets[g.Target] = append(s.targets[g.Target], scraped{labels: b.Labels(), it: g.Iter(c)})
	}
	return s
}

// scrape appends the next scrape of every target, each in a commit of its own,
// and returns the number of samples.
func (s *source) scrape(tb testing.TB) int {
	tb.Helper()
	n := 0
	defer func() { s.scrapes++ }()
	for _, series := range s.targets {
		app := s.db.Appender(context.Background())
		for i := range series {
			one := &series[i]
			if one.it.K() != s.scrapes {
				continue // not there yet, or gone
			}
			t, v, ok := one.it.Next()
			if !ok {
				continue
			}
			ref, err := app.Append(one.ref, one.labels, t, v)
			if err != nil {
				tb.Fatalf("append %s at %d: %v", one.labels, t, err)
			}
			one.ref = ref
			n++
		}
		if err := app.Commit(); err != nil {
			tb.Fatal(err)
		}
	}
	return n
}

// append adds one sample at the present time, in a commit of its own.
func (s *source) append(tb testing.TB, ls labels.Labels, v float64) {
	tb.Helper()
	app := s.db.Appender(context.Background())
	if _, err := app.Append(0, ls, time.Now().UnixMilli(), v); err != nil {
		tb.Fatal(err)
	}
	if err := app.Commit(); err != nil {
		tb.Fatal(err)
	}
}

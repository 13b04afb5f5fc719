package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// TestReload: a changed retention is taken at run time; from a file that is invalid,
// nothing is.
func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "epimetheus.yml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("retention: {raw: 30d, tenants: {a: {raw: 1y}, b: {}}}")
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{config: c, logger: slog.New(slog.DiscardHandler), reg: prometheus.NewRegistry()}
	p.settings.set(&c)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &reloader{p: p, path: path, last: text, good: prometheus.NewGauge(prometheus.GaugeOpts{})}
	const day = 24 * time.Hour
	check := func(tenant string, want time.Duration) {
		t.Helper()
		if got := p.settings.retentions.Load().Of(tenant).Raw; got != want {
			t.Errorf("retention of %s is %s, want %s", tenant, got, want)
		}
	}
	check("a", 365*day)
	check("b", 0) // for ever
	check("c", 30*day)
	was := p.settings.retentions.Load()
	r.look(true)
	if p.settings.retentions.Load() != was {
		t.Error("a file that hasn't changed is taken for another")
	}

	write("retention: {raw: 60d}")
	r.look(false) // it may be being written
	check("a", 365*day)
	r.look(false)
	check("a", 60*day)

	write("retention: {raw: 1h}\nnonsense: true")
	r.look(true)
	r.look(true)
	check("a", 60*day)
	if len(r.conditions()) != 1 || testutil.ToFloat64(r.good) != 0 {
		t.Errorf("an invalid file: %v", r.conditions())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.look(true)
	check("a", 60*day)

	write("{}")
	r.look(true)
	check("a", 0)
	if len(r.conditions()) != 0 || testutil.ToFloat64(r.good) != 1 {
		t.Errorf("a valid file: %v", r.conditions())
	}

	// It is away for a moment.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.look(false)
	if len(r.conditions()) != 1 {
		t.Errorf("no file: %v", r.conditions())
	}
	write("{}")
	r.look(false)
	r.look(false)
	if len(r.conditions()) != 0 || testutil.ToFloat64(r.good) != 1 {
		t.Errorf("the file that there was before: %v", r.conditions())
	}
}

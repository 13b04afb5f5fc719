package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
)

// TestConfigFixtures: each *.bad.yml says in its comments what the error must
// speak of; each *.good.yml loads.
func TestConfigFixtures(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yml")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d fixtures, %v", len(files), err)
	}
	for _, f := range files {
		_, err := loadConfig(f)
		if strings.HasSuffix(f, ".good.yml") {
			if err != nil {
				t.Errorf("%s: %v", f, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s was taken", f)
			continue
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error has more than one line: %q", f, err)
		}
		text, readErr := os.ReadFile(f)
		if readErr != nil {
			t.Fatal(readErr)
		}
		for line := range strings.Lines(string(text)) {
			if want, ok := strings.CutPrefix(strings.TrimSpace(line), "# error: "); ok && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not speak of %q", f, err, want)
			}
		}
	}
}

func TestNoConfigFileIsDefault(t *testing.T) {
	c, err := loadConfig("")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.validate(); err != nil {
		t.Errorf("the defaults are invalid: %v", err)
	}
}

// A tenant with limits of its own has no more queries at a time than others, if it doesn't
// say so.
func TestLimitsOfATenant(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yml")
	if err := os.WriteFile(file, []byte("gateway: {tenants: {a: {limits: {query_series: 5}}, b: {limits: {queries: 0}}}}"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := loadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	limits := c.Gateway.tenantLimits()
	if l := limits["a"]; l.Queries != gateway.DefaultQueries || l.Series != 5 || c.Gateway.Limits.Queries != gateway.DefaultQueries {
		t.Errorf("%+v, %+v", l, c.Gateway.Limits)
	}
	if l := limits["b"]; l.Queries != 0 {
		t.Errorf("%+v", l)
	}
}

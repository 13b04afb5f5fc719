package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// transferHours is how much there is in the blocks of TestTransfer.
const transferHours = 16

// promBlocks has promtool make blocks of two hours that end before now, and
// returns their folder and the time of the first and last sample.
func promBlocks(t *testing.T) (dir string, from, to time.Time) {
	t.Helper()
	to = time.Now().UTC().Truncate(2 * time.Hour).Add(-6 * time.Hour)
	from = to.Add(-transferHours * time.Hour)
	var text bytes.Buffer
	text.WriteString("# TYPE requests counter\n")
	for s := range 40 {
		for i := 0; from.Add(time.Duration(i) * 15 * time.Second).Before(to); i++ {
			fmt.Fprintf(&text, "requests_total{job=\"web\",pod=\"pod-%02d\"} %g %d\n", s, float64(i)*1.25+float64(s), from.Unix()+int64(i)*15)
		}
	}
	text.WriteString("# EOF\n")
	dir = filepath.Join(t.TempDir(), "blocks")
	file := writeFile(t, t.TempDir(), "samples.om", text.String())
	if out, err := exec.CommandContext(t.Context(), testenv.Tool(t, "bin/promtool"), "tsdb", "create-blocks-from", "openmetrics", file, dir).CombinedOutput(); err != nil {
		t.Fatalf("promtool: %v\n%s", err, out)
	}
	return dir, from, to
}

// TestTransfer imports what promtool has made, is killed again and again while it
// does, exports it, and lets a real Prometheus serve both: they and the gateway have
// the same samples.
func TestTransfer(t *testing.T) {
	t.Parallel()
	blocks, from, to := promBlocks(t)
	serve := func(t *testing.T, dir string) string {
		t.Helper()
		return testenv.Prometheus(t, dir, "global: {}\n", "--storage.tsdb.retention.time=10y").URL
	}
	for _, stores := range []string{"local", "aws"} {
		t.Run(stores, func(t *testing.T) {
			t.Parallel()
			s := &stack{dir: t.TempDir()}
			data, source := filepath.Join(s.dir, "data"), blocks
			text := commonConfig
			more := []string{}
			if stores == "aws" {
				s3, db := testenv.S3(t), testenv.DynamoDB(t)
				s.env = s3.Env()
				text += fmt.Sprintf(`
objects:
  type: s3
  s3: {bucket: %q, prefix: history/, endpoint: %q, region: %q, path_style: true}
index:
  type: dynamodb
  dynamodb: {table: rows, endpoint: %q, region: %q}
`, s3.Bucket, s3.Endpoint, s3.Region, db.Endpoint, db.Region)
				o := historytest.S3Options(t, s3)
				o.Prefix = "thanos/acme/"
				bucket, err := object.NewS3(t.Context(), o, prometheus.NewRegistry())
				if err != nil {
					t.Fatal(err)
				}
				upload(t, bucket, blocks)
				source = "s3://" + s3.Bucket + "/thanos/acme"
				more = []string{"--s3.endpoint=" + s3.Endpoint, "--s3.region=" + s3.Region, "--s3.path-style"}
			}
			config := writeFile(t, s.dir, "epimetheus.yml", text)
			common := []string{"--config.file=" + config, "--data.dir=" + data, "--tenant=acme"}
			if stores == "aws" {
				if out, err := s.runTool(t, "create-table", "--config.file="+config); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			killed, out := 0, ""
			for {
				n := 1 // lines of blocks that are done, until it is killed
				if killed >= 4 {
					n = 1000
				}
				var done bool
				if done, out = s.importUntil(t, n, append(append(append([]string{}, more...), common...), source)...); done {
					break
				}
				if killed++; killed > 20 {
					t.Fatal("it doesn't come to an end")
				}
			}
			t.Logf("it was killed %d times", killed)
			if killed == 0 { // on a busy machine it goes on for a while before it is
				t.Error("it was never killed")
			}
			m := regexp.MustCompile(`(\d+) blocks imported .*, (\d+) were imported before, 0 skipped, 0 failed`).FindStringSubmatch(out)
			if m == nil || m[2] == "0" {
				t.Errorf("the last run started from zero, or says otherwise:\n%s", out)
			}
			s.loseIndex(t, stores, data, config, common)
			exported := filepath.Join(s.dir, "exported")
			if out, err := s.runTool(t, append([]string{"export", "--block-range=2h", exported}, common...)...); err != nil {
				t.Fatalf("export: %v\n%s", err, out)
			} else if want := fmt.Sprintf("%d blocks, %d samples", transferHours/2, 40*transferHours*240); !strings.Contains(out, want) {
				t.Errorf("want %q:\n%s", want, out)
			}
			all := s.start(t, testenv.FreeAddr(t), "all", "--config.file="+config, "--data.dir="+data, "--grpc.listen-address="+testenv.FreeAddr(t))
			for _, dir := range []string{copyOf(t, blocks), exported} {
				out, err := s.runTool(t, "audit", "--prometheus="+serve(t, dir), "--gateway="+all.url, "--tenant=acme", "--window=1h",
					"--from="+from.Add(-time.Hour).Format(time.RFC3339), "--to="+to.Add(time.Hour).Format(time.RFC3339))
				if err != nil || !strings.Contains(out, fmt.Sprintf("%d samples compared: 0 missing, 0 extra, 0 different", 40*transferHours*240)) {
					t.Errorf("audit: %v\n%s", err, out)
				}
			}
		})
	}
}

// loseIndex looks at the blocks, deletes the index, and has it made again.
func (s *stack) loseIndex(t *testing.T, stores, data, config string, common []string) {
	t.Helper()
	run := func(want string, args ...string) string {
		t.Helper()
		out, err := s.runTool(t, append(args, common[:2]...)...)
		if err != nil || !strings.Contains(out, want) {
			t.Fatalf("%v: %v, want %q\n%s", args, err, want, out)
		}
		return out
	}
	before := run("visible", "blocks", "ls", "--tenant=acme")
	id := regexp.MustCompile(`(?m)^01\w{24}`).FindString(before)
	run("data", "blocks", "inspect", id)
	run(" 0 faults", "blocks", "verify", "--tenant=acme")
	switch stores {
	case "local":
		if err := os.Remove(filepath.Join(data, "index.db")); err != nil {
			t.Fatal(err)
		}
	default:
		text, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Dir(config), filepath.Base(config), strings.Replace(string(text), "table: rows", "table: again", 1))
		if out, err := s.runTool(t, "create-table", "--config.file="+config); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	run("nothing was written", "reindex")
	run(" 0 unreadable", "reindex", "--write")
	if after := run("visible", "blocks", "ls", "--tenant=acme"); after != before {
		t.Errorf("the index was:\n%s\nand is:\n%s", before, after)
	}
	run(" 0 faults", "blocks", "verify", "--tenant=acme")
}

// importUntil runs an import and kills it when n blocks are imported. It says
// whether the import came to its end before.
func (s *stack) importUntil(t *testing.T, n int, args ...string) (done bool, output string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, append([]string{"tool", "import"}, args...)...)
	cmd.Env = append(os.Environ(), s.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		out.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), "samples imported") {
			if n--; n == 0 {
				if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
					t.Fatal(err)
				}
			}
		}
	}
	err = cmd.Wait()
	if err != nil && n > 0 {
		t.Fatalf("import: %v\n%s%s", err, out.String(), stderr.String())
	}
	return err == nil, out.String()
}

// upload puts the files below dir into a bucket.
func upload(t *testing.T, to object.Store, dir string) {
	t.Helper()
	each(t, dir, func(name string, content []byte) {
		if err := to.Put(t.Context(), name, bytes.NewReader(content), int64(len(content))); err != nil {
			t.Fatal(err)
		}
	})
}

// copyOf is a copy of a folder, for those who write into it.
func copyOf(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	each(t, dir, func(name string, content []byte) {
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	return to
}

func each(t *testing.T, dir string, fn func(name string, content []byte)) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		fn(name, content)
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

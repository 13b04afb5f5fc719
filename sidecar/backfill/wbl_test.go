package backfill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/common/promslog"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

func readWBL(t testing.TB, dir string) (floats, hists, floatHists int, times map[int64]bool) {
	t.Helper()
	d, err := tail.OpenDir(dir)
	must(t, err)
	times = map[int64]bool{}
	must(t, ReadWBL(t.Context(), d, promslog.NewNopLogger(), tail.NewMetrics(nil), func(b *tail.Batch) error {
		floats += len(b.Samples)
		hists += len(b.Histograms)
		floatHists += len(b.FloatHistograms)
		for _, s := range b.Samples {
			times[s.T] = true
		}
		return nil
	}))
	return floats, hists, floatHists, times
}

func TestOutOfOrderLog(t *testing.T) {
	for _, st := range []bool{false, true} {
		t.Run(fmt.Sprintf("st=%v", st), func(t *testing.T) {
			d := openDB(t, st)
			segments := func() (first, last int, empty bool) {
				t.Helper()
				dir, err := tail.OpenDir(d.dir)
				must(t, err)
				first, last, empty, err = WBLSegments(dir)
				must(t, err)
				return first, last, empty
			}
			d.write(t0+2*hour, t0+4*hour)
			if _, _, empty := segments(); !empty {
				t.Error("not empty before anything was late")
			}
			if f, h, fh, _ := readWBL(t, d.dir); f+h+fh > 0 {
				t.Errorf("%d %d %d", f, h, fh)
			}
			d.write(t0+hour, t0+hour+9*60_000)
			if first, last, empty := segments(); first != 0 || last != 0 || empty {
				t.Error(first, last, empty)
			}
			f, h, fh, times := readWBL(t, d.dir)
			if f < 30 || h < 30 || fh < 30 || !times[t0+hour] || !times[t0+hour+9*60_000] || times[t0+2*hour] {
				t.Errorf("%d %d %d, %v", f, h, fh, times)
			}

			t.Run("torn, corrupt, gone", func(t *testing.T) {
				path := t.TempDir()
				must(t, os.MkdirAll(filepath.Join(path, "wal"), 0o755))
				must(t, os.CopyFS(filepath.Join(path, "wbl"), os.DirFS(filepath.Join(d.dir, "wbl"))))
				log := filepath.Join(path, "wbl", "00000000")
				raw, err := os.ReadFile(log)
				must(t, err)
				must(t, os.Truncate(log, int64(len(raw)-3)))
				f2, h2, fh2, _ := readWBL(t, path)
				if n := f2 + h2 + fh2; n >= f+h+fh || n == 0 {
					t.Errorf("torn: %d of %d", n, f+h+fh)
				}
				raw[len(raw)/2] ^= 1
				must(t, os.WriteFile(log, raw, 0o644))
				f3, h3, fh3, _ := readWBL(t, path)
				if n := f3 + h3 + fh3; n >= f+h+fh {
					t.Errorf("corrupt: %d of %d", n, f+h+fh)
				}
				// The part behind the corruption that the next segment has is read.
				must(t, os.CopyFS(filepath.Join(path, "next"), os.DirFS(filepath.Join(d.dir, "wbl"))))
				must(t, os.Rename(filepath.Join(path, "next", "00000000"), filepath.Join(path, "wbl", "00000001")))
				f4, h4, fh4, _ := readWBL(t, path)
				if want := f3 + h3 + fh3 + f + h + fh; f4+h4+fh4 != want {
					t.Errorf("behind the corruption: %d of %d", f4+h4+fh4, want)
				}
				must(t, os.RemoveAll(filepath.Join(path, "wbl")))
				if f, h, fh, _ := readWBL(t, path); f+h+fh > 0 {
					t.Error("read what is gone")
				}
				dir, err := tail.OpenDir(path)
				must(t, err)
				if first, last, empty, err := WBLSegments(dir); first != -1 || last != -1 || !empty || err != nil {
					t.Error(first, last, empty, err)
				}
			})
			t.Run("stopped", func(t *testing.T) {
				dir, err := tail.OpenDir(d.dir)
				must(t, err)
				stop := errors.New("stop")
				if err := ReadWBL(t.Context(), dir, promslog.NewNopLogger(), tail.NewMetrics(nil), func(*tail.Batch) error { return stop }); !errors.Is(err, stop) {
					t.Error(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if err := ReadWBL(ctx, dir, promslog.NewNopLogger(), tail.NewMetrics(nil), nil); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})

			must(t, d.db.CompactOOOHead(t.Context()))
			if first, last, empty := segments(); first != 1 || last != 1 || !empty {
				t.Error(first, last, empty)
			}
			if f, h, fh, _ := readWBL(t, d.dir); f+h+fh > 0 {
				t.Errorf("%d %d %d", f, h, fh)
			}
		})
	}
}

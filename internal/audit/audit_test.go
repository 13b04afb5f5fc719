package audit

import (
	"context"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
)

// memory is a Source: samples by series.
type memory map[string][]sample

func (memory) Close() error { return nil }

func (m memory) Read(_ context.Context, mint, maxt int64, fn func(labels.Labels, chunkenc.Iterator) error) error {
	for name, ss := range m {
		ls := labels.FromStrings(model.MetricNameLabel, name)
		var in []chunks.Sample
		for _, s := range ss {
			if s.t >= mint && s.t <= maxt {
				in = append(in, walSample{s})
			}
		}
		if err := fn(ls, storage.NewListSeries(ls, in).Iterator(nil)); err != nil {
			return err
		}
	}
	return nil
}

func floats(tv ...float64) []sample {
	var out []sample
	for i := 0; i < len(tv); i += 2 {
		out = append(out, sample{t: int64(tv[i]), v: tv[i+1]})
	}
	return out
}

func TestDifferencesAreFound(t *testing.T) {
	stale := math.Float64frombits(value.StaleNaN)
	otherNaN := math.Float64frombits(value.NormalNaN)
	h, h2 := tsdbutil.GenerateTestHistogram(1), tsdbutil.GenerateTestHistogram(2)
	roomy := h.Copy() // the same, with an empty span
	roomy.PositiveSpans = append(roomy.PositiveSpans, histogram.Span{Offset: 3})
	for _, c := range []struct {
		name       string
		want, have memory
		logged     Source
		result     Result
	}{
		{"same", memory{"a": floats(1, 1, 2000, stale, 3000, otherNaN)}, memory{"a": floats(1, 1, 2000, stale, 3000, otherNaN)}, nil, Result{Series: 1, Compared: 3}},
		{"sample missing", memory{"a": floats(1, 1, 2, 2)}, memory{"a": floats(2, 2)}, nil, Result{Series: 1, Compared: 1, Missing: 1}},
		{"series missing", memory{"a": floats(1, 1), "b": floats(1, 1)}, memory{"a": floats(1, 1)}, nil, Result{Series: 2, Compared: 1, Missing: 1}},
		{"sample extra", memory{"a": floats(1, 1)}, memory{"a": floats(1, 1, 2, 2)}, nil, Result{Series: 1, Compared: 1, Extra: 1}},
		{"series extra", memory{}, memory{"b": floats(1, 1)}, nil, Result{Series: 1, Extra: 1}},
		{"rejected", memory{"a": floats(1, 1)}, memory{"a": floats(1, 1, 2, 2, 3, 3)}, memory{"a": floats(1, 1, 2, 2, 3, 4)}, Result{Series: 1, Compared: 1, Extra: 1, Rejected: 1}},
		{"another value", memory{"a": floats(1, 1)}, memory{"a": floats(1, math.Nextafter(1, 2))}, nil, Result{Series: 1, Compared: 1, Different: 1}},
		{"another zero", memory{"a": floats(1, 0)}, memory{"a": floats(1, math.Copysign(0, -1))}, nil, Result{Series: 1, Compared: 1, Different: 1}},
		{"another NaN", memory{"a": floats(1, stale)}, memory{"a": floats(1, otherNaN)}, nil, Result{Series: 1, Compared: 1, Different: 1}},
		{"marker of another kind", memory{"a": floats(1, stale)}, memory{"a": {{t: 1, h: &histogram.Histogram{Sum: stale}}}}, nil, Result{Series: 1, Compared: 1}},
		{"histograms", memory{"a": {{t: 1, h: h}, {t: 2, h: h}}}, memory{"a": {{t: 1, h: roomy}, {t: 2, h: h2}}}, nil, Result{Series: 1, Compared: 2, Different: 1}},
		{"histogram and float", memory{"a": {{t: 1, h: h}}}, memory{"a": floats(1, 1)}, nil, Result{Series: 1, Compared: 1, Different: 1}},
		{"another timestamp", memory{"a": floats(1, 1)}, memory{"a": floats(2, 1)}, nil, Result{Series: 1, Missing: 1, Extra: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			reported := 0
			got, err := Run(t.Context(), c.want, c.have, Options{
				MinT: 0, MaxT: 5000, Window: time.Second, Logged: c.logged,
				Report: func(d Difference) { reported++; t.Log(d) },
			})
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.result, got); d != "" {
				t.Error(d)
			}
			if n := got.Missing + got.Extra + got.Different; got.OK() != (n == 0) || reported != int(n+got.Rejected) {
				t.Errorf("OK is %v, %d reported: %+v", got.OK(), reported, got)
			}
		})
	}
}

// A data directory gives the same whether read as a database or as a log, with
// external labels added where they are not set.
func TestDirAndWAL(t *testing.T) {
	dir := t.TempDir()
	db, err := tsdb.Open(dir, slog.New(slog.DiscardHandler), nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		t.Fatal(err)
	}
	app := db.Appender(t.Context())
	for i := range int64(50) {
		for _, ls := range []labels.Labels{labels.FromStrings("__name__", "x"), labels.FromStrings("__name__", "y", "env", "mine")} {
			if _, err := app.Append(0, ls, 1000+i, float64(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := app.Commit(); err != nil {
		t.Fatal(err)
	}
	external := labels.FromStrings("env", "prod")
	asDir, err := NewDir(dir, external)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), asDir, NewWAL(dir, external), Options{MaxT: 10_000})
	if err != nil || !r.OK() || r.Compared != 100 || r.Series != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	var seen []string
	if err := asDir.Read(t.Context(), 0, 10_000, func(ls labels.Labels, _ chunkenc.Iterator) error {
		seen = append(seen, ls.String())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(seen)
	if d := cmp.Diff([]string{`{__name__="x", env="prod"}`, `{__name__="y", env="mine"}`}, seen); d != "" {
		t.Error(d)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := NewDir(filepath.Join(dir, "absent"), external); err == nil {
		t.Error("a folder that isn't there was taken")
	}
}

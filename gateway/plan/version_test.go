package plan_test

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
)

var versionUpdate = flag.Bool("version.update", false, "write what is new in testdata/results.vN.txt")

// TestVersionOfResults: results are kept, in memcached for days and by programs of before and
// after an update, under a key with the version of their form. So whatever changes them, the
// form or what a kernel computes, has a version of its own. What they are in this one is in testdata.
func TestVersionOfResults(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("results are compared to the last bit, and other processors multiply and add in one")
	}
	file := fmt.Sprintf("testdata/results.v%d.txt", plan.PartialVersion)
	text, err := os.ReadFile(file)
	if err != nil && (!*versionUpdate || !errors.Is(err, fs.ErrNotExist)) {
		t.Fatalf("%v: with a new version run this test with -version.update", err)
	}
	was := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, hash, ok := strings.Cut(strings.TrimSpace(line), "\t")
		require.True(t, ok, line)
		was[name] = hash
	}
	check := func(name string, result []byte) {
		t.Helper()
		hash := fmt.Sprintf("%x", sha256.Sum256(result))[:16]
		switch old, ok := was[name]; {
		case ok && old != hash:
			t.Errorf("%s gives another result than it did, which caches have: raise partialVersion in wire.go (and the version of the result in docs/protocols/work.md), and run this test with -version.update", name)
		case !ok && *versionUpdate:
			text = fmt.Appendf(text, "%s\t%s\n", name, hash)
		case !ok:
			t.Errorf("%s is not in %s: run this test with -version.update", name, file)
		}
	}

	form, err := plan.PartialForm()
	require.NoError(t, err)
	check("form", form)

	const n, interval = 480, 15_000
	s := gatewaytest.NewShipped(gatewaytest.New(t, gatewaytest.Options{}), gatewaytest.Splits[0], true)
	app := s.AppenderV2(t.Context())
	for i := range 4 {
		for j := range int64(n) {
			ts, id := j*interval+int64(i), fmt.Sprint(i)
			counter, gauge := float64(j*j%(977+int64(i)))*0.1, math.Remainder(float64(j)*0.37*float64(i+1), 7)
			switch {
			case j%97 == 96:
				gauge = math.Float64frombits(value.StaleNaN)
			case j%89 == 88:
				gauge = math.Inf(i - 1)
			}
			of := func(name string) labels.Labels {
				return labels.FromStrings("__name__", name, "i", id, "odd", fmt.Sprint(i%2))
			}
			_, err := app.Append(0, of("c_total"), 0, ts, counter, nil, nil, storage.AppendV2Options{})
			require.NoError(t, err)
			_, err = app.Append(0, of("g"), 0, ts, gauge, nil, nil, storage.AppendV2Options{})
			require.NoError(t, err)
			_, err = app.Append(0, of("h"), 0, ts, 0, tsdbutil.GenerateTestHistogram(j%200+int64(i)), nil, storage.AppendV2Options{})
			require.NoError(t, err)
			_, err = app.Append(0, of("f"), 0, ts, 0, nil, tsdbutil.GenerateTestFloatHistogram(j%150+int64(i)).Mul(0.7), storage.AppendV2Options{})
			require.NoError(t, err)
		}
	}
	require.NoError(t, app.Commit())

	o := suiteOptions
	o.MaxSamples = 50_000_000
	inner := promqltest.NewTestEngineWithOpts(t, o)
	for from, e := range map[string]*plan.Engine{
		"samples": plan.New(inner, o, plan.Spread{}), "windows": plan.Summarised(plan.New(inner, o, plan.Spread{})),
	} {
		run := func(expr string) {
			t.Helper()
			ctx, plans := plan.WithExplanation(t.Context())
			q, err := e.NewRangeQuery(ctx, s, nil, expr, time.Unix(600, 0), time.Unix(7200, 0), 5*time.Minute)
			require.NoError(t, err)
			require.NoError(t, q.Exec(ctx).Err)
			q.Close()
			if len(plans.Leaves) == 0 {
				return // no kernel computes it
			}
			q, err = e.NewRangeQuery(t.Context(), s, nil, expr, time.Unix(600, 0), time.Unix(7200, 0), 5*time.Minute)
			require.NoError(t, err)
			defer q.Close()
			r := q.Exec(t.Context())
			require.NoError(t, r.Err, expr)
			check(from+" "+expr, []byte(r.Value.String()))
		}
		for _, f := range overTime {
			for _, name := range []string{"c_total", "g", "h", "f"} {
				var args []string
				for _, a := range f.ArgTypes {
					if a == parser.ValueTypeMatrix {
						args = append(args, name+"[10m]")
					} else {
						args = append(args, "0.3")
					}
				}
				run(fmt.Sprintf("%s(%s)", f.Name, strings.Join(args, ", ")))
			}
		}
		for _, agg := range []string{"sum", "avg", "min", "max", "count", "group", "stddev", "stdvar", "topk", "bottomk", "quantile"} {
			param := map[string]string{"topk": "2, ", "bottomk": "2, ", "quantile": "0.3, "}[agg]
			for _, inner := range []string{"g", "h", "rate(c_total[10m])", "rate(h[10m])", "increase(f[10m])", "avg_over_time(g[10m])"} {
				run(fmt.Sprintf("%s by (odd) (%s%s)", agg, param, inner))
			}
		}
	}
	if *versionUpdate && !t.Failed() {
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		slices.Sort(lines)
		require.NoError(t, os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600))
	}
}

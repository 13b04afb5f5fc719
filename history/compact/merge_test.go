package compact

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	minute = int64(60_000)
	hour   = 60 * minute
)

// content is what blocks hold: by tenant and series.
type content map[string]map[string]*chunkfmt.Series

func (c content) add(tenant string, s *chunkfmt.Series) {
	if c[tenant] == nil {
		c[tenant] = map[string]*chunkfmt.Series{}
	}
	key := s.Labels.String()
	if had := c[tenant][key]; had != nil {
		s = chunkfmt.Merge(had, s)
	}
	c[tenant][key] = s
}

func put(t testing.TB, objects object.Store, o chunkfmt.WriterOptions, c content) index.BlockRef {
	t.Helper()
	data, sum := encodeWith(t, o, c)
	id := ulid.Make()
	if err := objects.Put(t.Context(), history.ObjectKey(id), bytes.NewReader(data), sum.Size); err != nil {
		t.Fatal(err)
	}
	return index.BlockRef{Block: id, Object: history.ObjectKey(id), ObjectSize: sum.Size}
}

func encode(t testing.TB, c content) ([]byte, *chunkfmt.Summary) {
	t.Helper()
	return encodeWith(t, chunkfmt.WriterOptions{}, c)
}

func encodeWith(t testing.TB, o chunkfmt.WriterOptions, c content) ([]byte, *chunkfmt.Summary) {
	t.Helper()
	o.Window = history.Window
	var buf bytes.Buffer
	w := chunkfmt.NewWriter(&buf, o)
	for _, name := range slices.Sorted(maps.Keys(c)) {
		var all []*chunkfmt.Series
		for _, s := range c[name] {
			all = append(all, s)
		}
		slices.SortFunc(all, func(a, b *chunkfmt.Series) int {
			return compareKeys(a.Labels.Get(model.MetricNameLabel), a.Labels, b.Labels.Get(model.MetricNameLabel), b.Labels)
		})
		for _, s := range all {
			if err := w.Add(name, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), sum
}

// collect is a sink that keeps all.
type collect struct {
	content content
	name    string
}

func (c *collect) tenant(_ context.Context, tenant string, _ int64) error {
	c.name = tenant
	return nil
}

func (c *collect) series(_ context.Context, s *chunkfmt.Series, _ *chunkfmt.Summaries) error {
	if len(s.Floats.T)+len(s.Histograms.T)+len(s.FloatHistograms.T)+len(s.Exemplars) == 0 {
		return nil // windows alone
	}
	out := &chunkfmt.Series{Labels: s.Labels.Copy(), Metadata: s.Metadata, Family: s.Family}
	out.Floats = chunkfmt.Floats{T: slices.Clone(s.Floats.T), ST: slices.Clone(s.Floats.ST), V: slices.Clone(s.Floats.V)}
	out.Histograms = chunkfmt.Histograms{T: slices.Clone(s.Histograms.T), ST: slices.Clone(s.Histograms.ST), H: slices.Clone(s.Histograms.H)}
	out.FloatHistograms = chunkfmt.FloatHistograms{T: slices.Clone(s.FloatHistograms.T), ST: slices.Clone(s.FloatHistograms.ST), H: slices.Clone(s.FloatHistograms.H)}
	out.Exemplars = slices.Clone(s.Exemplars)
	c.content.add(c.name, out)
	return nil
}

// read gives what blocks hold in mint to maxt.
func read(t testing.TB, objects object.Store, blocks []index.BlockRef, readBytes, mint, maxt int64) content {
	t.Helper()
	m := &merger{}
	for _, b := range blocks {
		s, err := openSource(t.Context(), objects, b, readBytes)
		if err != nil {
			t.Fatal(err)
		}
		m.sources = append(m.sources, s)
	}
	out := &collect{content: content{}}
	if err := m.merge(t.Context(), mint, maxt, out); err != nil {
		t.Fatal(err)
	}
	return out.content
}

var cmpContent = cmp.Options{
	cmp.Comparer(func(a, b labels.Labels) bool { return labels.Equal(a, b) }),
	cmp.Comparer(func(a, b float64) bool { return chunkfmt.CompareFloats(a, b) == 0 }),
	cmp.Comparer(func(a, b *histogram.Histogram) bool { return chunkfmt.CompareHistograms(a, b) == 0 }),
	cmp.Comparer(func(a, b *histogram.FloatHistogram) bool { return chunkfmt.CompareFloatHistograms(a, b) == 0 }),
	cmpopts.EquateEmpty(),
}

// someSeries makes a series with samples in mint to maxt.
func someSeries(r *rand.Rand, name string, i int, mint, maxt int64) *chunkfmt.Series {
	s := &chunkfmt.Series{Labels: labels.FromStrings(model.MetricNameLabel, name, "i", fmt.Sprint(i))}
	if i%3 == 0 {
		s.Metadata = metadata.Metadata{Type: model.MetricTypeCounter, Help: "helps with " + name}
	}
	step := (maxt - mint) / int64(1+r.IntN(60))
	for t := mint + r.Int64N(1+(maxt-mint)/4); t <= maxt; t += 1 + step {
		at := t - t%1000
		if at < mint || len(s.Floats.T) > 0 && s.Floats.T[len(s.Floats.T)-1] >= at {
			continue
		}
		// What a sample is follows from its time, so that blocks repeat each other;
		// now and then they disagree.
		k := at/1000%7 + r.Int64N(50)/49
		switch kind := i % 5; {
		case kind == 3 && at/hour%2 == 0:
			s.Histograms.T = append(s.Histograms.T, at)
			s.Histograms.H = append(s.Histograms.H, tsdbutil.GenerateTestHistogram(k))
		case kind == 4:
			s.FloatHistograms.T = append(s.FloatHistograms.T, at)
			s.FloatHistograms.H = append(s.FloatHistograms.H, tsdbutil.GenerateTestFloatHistogram(k))
		default:
			v := float64(k) * 1.5
			if k == 3 && r.IntN(2) == 0 {
				v = math.Float64frombits(value.StaleNaN)
			}
			s.Floats.T, s.Floats.V = append(s.Floats.T, at), append(s.Floats.V, v)
			if kind == 2 {
				s.Floats.ST = append(s.Floats.ST, at-1)
			}
		}
		if i%4 == 1 && r.IntN(3) == 0 {
			s.Exemplars = append(s.Exemplars, exemplar.Exemplar{Labels: labels.FromStrings("trace", fmt.Sprint(at%5)), Value: 1, Ts: at, HasTs: true})
		}
	}
	return s
}

func someContent(r *rand.Rand, tenants, series int, mint, maxt int64) content {
	c := content{}
	for t := range tenants {
		if r.IntN(4) == 0 {
			continue
		}
		for i := range series {
			if r.IntN(3) > 0 {
				s := someSeries(r, fmt.Sprintf("m%d", i%4), i, mint, maxt)
				if len(s.Floats.T)+len(s.Histograms.T)+len(s.FloatHistograms.T) > 0 {
					c.add(fmt.Sprintf("tenant-%d", t), s)
				}
			}
		}
	}
	return c
}

// TestMergeRandom sees that blocks with overlapping, repeated and contradicting
// samples of all kinds become outputs that hold just what chunkfmt.Merge makes of
// them, each in one window and within its size.
func TestMergeRandom(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			objects := &historytest.MemoryObjects{}
			var blocks []index.BlockRef
			want := content{}
			for range 1 + r.IntN(6) {
				from := r.Int64N(3*day) - day
				c := someContent(r, 4, 1+r.IntN(30), from, from+1+r.Int64N(2*day))
				if len(c) == 0 {
					continue
				}
				for tenant, all := range c {
					for _, s := range all {
						want.add(tenant, s)
					}
				}
				b := put(t, objects, chunkfmt.WriterOptions{PageBytes: 100 + r.IntN(4000), PageSeries: 1 + r.IntN(20), ChunkSamples: 1 + r.IntN(50)}, c)
				blocks = append(blocks, b)
			}
			width := []int64{2 * hour, day, history.Window}[r.IntN(3)]
			o := &outputs{
				objects: objects, dir: t.TempDir(), width: width, level: 1, maxBytes: 1000 + r.Int64N(30_000), ownBytes: 500 + r.Int64N(20_000),
				now: time.Now, entropy: crand.Reader, beat: func(context.Context) error { return nil }, shared: map[int64]*output{}, own: map[int64]*output{},
				writer: chunkfmt.WriterOptions{Window: history.Window, PageBytes: 1000},
			}
			m := &merger{}
			for _, b := range blocks {
				s, err := openSource(t.Context(), objects, b, 1+r.Int64N(5000))
				if err != nil {
					t.Fatal(err)
				}
				m.sources = append(m.sources, s)
			}
			passes := plan(m.sources, width, 1+r.IntN(20))
			for _, p := range passes {
				if err := m.merge(t.Context(), p.MinT, p.MaxT, o); err != nil {
					t.Fatal(err)
				}
				if err := o.finish(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := o.abandon(); err != nil {
				t.Fatal(err)
			}
			if files, err := os.ReadDir(o.dir); err != nil || len(files) > 0 {
				t.Errorf("%d files are left: %v", len(files), err)
			}
			got := content{}
			for _, row := range o.done {
				if row.ObjectSize > o.maxBytes+60_000 {
					t.Errorf("block of %d bytes, at most %d", row.ObjectSize, o.maxBytes)
				}
				b := read(t, objects, []index.BlockRef{row.BlockRef}, 1<<20, -10*day, 10*day)
				for tenant, all := range b {
					if row.Tenant != "" && tenant != row.Tenant {
						t.Errorf("block of tenant %s has tenant %s", row.Tenant, tenant)
					}
					for _, s := range all {
						if mint, maxt := times(s); mint <= row.End-width || maxt > row.End {
							t.Errorf("samples of %d to %d in the window to %d", mint, maxt, row.End)
						}
						got.add(tenant, s)
					}
				}
			}
			if d := cmp.Diff(want, got, cmpContent, cmpopts.IgnoreFields(chunkfmt.Series{}, "Metadata", "Family")); d != "" {
				t.Errorf("-want +got\n%s", d)
			}
		})
	}
}

// TestMergeCorrupt sees that a flipped bit anywhere is an error that names the
// block, or does no harm.
func TestMergeCorrupt(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	objects := &historytest.MemoryObjects{}
	good := put(t, objects, chunkfmt.WriterOptions{}, someContent(r, 4, 10, 0, hour))
	bad := put(t, objects, chunkfmt.WriterOptions{PageBytes: 500, PageSeries: 4}, someContent(r, 4, 30, 0, hour))
	data, err := objects.GetRange(t.Context(), bad.Object, 0, bad.ObjectSize)
	if err != nil {
		t.Fatal(err)
	}
	want := read(t, objects, []index.BlockRef{good, bad}, 3000, 0, day)
	for i := 0; i < len(data); i += 1 + r.IntN(40) {
		broken := bytes.Clone(data)
		broken[i] ^= 1 << r.IntN(8)
		if err := objects.Put(t.Context(), bad.Object, bytes.NewReader(broken), bad.ObjectSize); err != nil {
			t.Fatal(err)
		}
		m := &merger{}
		got := &collect{content: content{}}
		err := func() error {
			for _, b := range []index.BlockRef{good, bad} {
				s, err := openSource(t.Context(), objects, b, 3000)
				if err != nil {
					return err
				}
				m.sources = append(m.sources, s)
			}
			return m.merge(t.Context(), 0, day, got)
		}()
		var be *BlockError
		if err == nil { // label pages aren't read, nor is the first magic
			if n := len(got.content["tenant-0"]) + len(got.content["tenant-1"]); n != len(want["tenant-0"])+len(want["tenant-1"]) {
				t.Fatalf("bit flipped at %d of %d: %d series", i, len(data), n)
			}
		} else if !errors.As(err, &be) || be.Block != bad.Block || unreadable(err) == "" {
			t.Fatalf("bit flipped at %d of %d: %v", i, len(data), err)
		}
	}
}

package chunkfmt

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/rollup"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

var update = flag.Bool("update", false, "write missing golden files; those that exist are kept for ever")

// goldenSeries are two tenants: one with several series pages, a label page and
// all kinds of samples, one whose only series page comes with its directory.
func goldenSeries() []tenantSeries {
	in := randomBlock(rand.New(rand.NewPCG(2026, 1)), 1, 60)
	c := gen.Config{Series: 120, Targets: 3, Start: 1_700_000_000_000, End: 1_700_000_000_000 + 15000*400, Interval: 15000, Churn: 1, Seed: 1}
	var of []*Series
	for _, g := range c.AllSeries() {
		s := &Series{}
		b := labels.NewScratchBuilder(len(g.Labels))
		for _, l := range g.Labels {
			b.Add(l.Name, l.Value)
		}
		b.Sort()
		s.Labels = b.Labels()
		for it := g.Iter(c); ; {
			t, v, ok := it.Next()
			if !ok {
				break
			}
			s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, v)
		}
		of = append(of, s)
	}
	sortSeries(of)
	for _, s := range of {
		in = append(in, tenantSeries{"tenant-1", s})
	}
	return in
}

// written has what the writer makes: it changes when encodings are chosen otherwise, and
// with -update. Blocks are kept as they were written first.
const written = "testdata/written"

// kept reads a block that was written once; with -update it is block, if there is none.
func kept(t *testing.T, name string, block []byte) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if os.IsNotExist(err) && *update {
		b = block
		err = os.WriteFile(name, block, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGolden reads blocks of each version of the format, and checks that the
// writer makes the same of the same series as last time.
func TestGolden(t *testing.T) {
	in := goldenSeries()
	var sum rollup.Summariser
	var sums []string
	for name, o := range map[string]WriterOptions{
		"testdata/block-v1": {Uncompressed: true, PageSeries: 40, PageBytes: 20000, ChunkSamples: 300, Window: 3600_000},
		// Read only: windows are written in groups of columns now.
		"testdata/block-v1-rollups": {PageSeries: 40, PageBytes: 20000, ChunkSamples: 300, Window: 3600_000, Rollups: true},
		"testdata/block-v1-groups":  {Uncompressed: true, PageSeries: 40, PageBytes: 20000, ChunkSamples: 300, Window: 3600_000, Rollups: true},
		// Another release of the compressor may pack otherwise: read only.
		"testdata/block-v1-zstd": {PageSeries: 40, PageBytes: 20000, ChunkSamples: 300},
	} {
		block, _ := writeBlock(t, in, o)
		golden := kept(t, name, block)
		if o.Uncompressed {
			sums = append(sums, fmt.Sprintf("%s %x\n", name, sha256.Sum256(block)))
		}
		out, err := readBlock(golden, nil, math.MinInt64, math.MaxInt64)
		if err != nil || len(out) != len(in) {
			t.Fatalf("%s: %v, %d series of %d", name, err, len(out), len(in))
		}
		for i := range in {
			if in[i].tenant != out[i].tenant || !equalSeries(in[i].s, out[i].s) {
				t.Fatalf("%s: series %d %s differs", name, i, in[i].s.Labels)
			}
		}
		if !o.Rollups {
			continue
		}
		// What is said of old samples stays true, however it is made now.
		long := readWindows(t, golden, rollup.Long, rollup.AllColumns)
		for i := range in {
			if got := long[in[i].tenant+in[i].s.Labels.String()]; got != nil {
				var short, want rollup.Windows
				sum.Summarise(&short, in[i].s.Samples(), rollup.Short)
				rollup.Widen(&want, &short, rollup.Long)
				if d := sameWindows(&want, got); d != "" {
					t.Errorf("%s: windows of series %d: %s", name, i, d)
				}
			}
		}
		if len(long) < 100 {
			t.Errorf("%s: %d series have windows", name, len(long))
		}
	}
	slices.Sort(sums)
	now := strings.Join(sums, "")
	if *update {
		if err := os.WriteFile(written, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if was, err := os.ReadFile(written); err != nil || string(was) != now {
		t.Errorf("the writer makes other bytes than last time: go test ./chunkfmt -run TestGolden -update, if it is to (%v)", err)
	}
}

// TestDamage flips bits all over a block: every read gives an error or, where
// the bit is in no page that is read, the right answer.
func TestDamage(t *testing.T) {
	in := randomBlock(rand.New(rand.NewPCG(5, 1)), 2, 30)
	block, _ := writeBlock(t, in, WriterOptions{PageSeries: 10})
	r := rand.New(rand.NewPCG(6, 1))
	for range 2000 {
		bad := bytes.Clone(block)
		i := r.IntN(len(bad))
		bad[i] ^= 1 << r.IntN(8)
		out, err := readBlock(bad, nil, math.MinInt64, math.MaxInt64)
		if err != nil {
			continue
		}
		if len(out) != len(in) {
			t.Fatalf("bit in byte %d: %d series of %d", i, len(out), len(in))
		}
		for k := range in {
			if !equalSeries(in[k].s, out[k].s) {
				t.Fatalf("bit in byte %d: series %d differs", i, k)
			}
		}
	}
}

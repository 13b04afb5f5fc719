package chunkfmt

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"

	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// benchSet are the series of one kind, or of all kinds, in the writer's order.
type benchSet struct {
	kind   string
	series []*Series
}

func (s *benchSet) samples() (n int) {
	for _, x := range s.series {
		n += len(x.Floats.T)
	}
	return n
}

func sortSeries(ss []*Series) {
	slices.SortFunc(ss, func(a, b *Series) int {
		return cmp.Or(cmp.Compare(a.Labels.Get(model.MetricNameLabel), b.Labels.Get(model.MetricNameLabel)), labels.Compare(a.Labels, b.Labels))
	})
}

// benchSets makes the mix, that is the generator's data set, with perChunk
// samples of each series, then each kind of it, then what the generator lacks.
func benchSets(perChunk int) []benchSet {
	c := gen.Config{Series: 1000, Targets: 10, Churn: 0.1, Seed: 1, Interval: 15000, Start: 1_700_000_000_000}
	if perChunk < 1000 {
		c.Series, c.Targets, c.Churn = 20000, 40, 1
	}
	c.End = c.Start + c.Interval*int64(perChunk)
	mix := benchSet{kind: "mix"}
	kinds := map[gen.Kind][]*Series{}
	for _, g := range c.AllSeries() {
		s := &Series{}
		b := labels.NewScratchBuilder(len(g.Labels))
		for _, l := range g.Labels {
			b.Add(l.Name, l.Value)
		}
		b.Sort()
		s.Labels = b.Labels()
		it := g.Iter(c)
		for {
			t, v, ok := it.Next()
			if !ok {
				break
			}
			s.Floats.T, s.Floats.V = append(s.Floats.T, t), append(s.Floats.V, v)
		}
		mix.series = append(mix.series, s)
		kinds[g.Kind] = append(kinds[g.Kind], s)
	}
	sortSeries(mix.series)
	out := []benchSet{mix}
	for _, k := range gen.Kinds() {
		sortSeries(kinds[k])
		out = append(out, benchSet{k.String(), kinds[k]})
	}
	return append(out, oddSets(perChunk)...)
}

// oddSets are what the generator lacks: irregular times, gaps, floats of other
// kinds. 10 targets with 20 series each.
func oddSets(n int) []benchSet {
	r := rand.New(rand.NewPCG(1, 2))
	walk := func() func(int) float64 { x := 100.0; return func(int) float64 { x += r.NormFloat64(); return x } }
	counter := func() func(int) float64 {
		x := float64(r.IntN(1e6))
		return func(int) float64 { x += float64(r.IntN(500)); return x }
	}
	grid := func(_ int, t int64) int64 { return t + 15000 }
	sets := []struct {
		kind  string
		times func(i int, t int64) int64
		value func() func(i int) float64
	}{
		{"x-random-walk", grid, walk},
		{"x-decimal-walk", grid, func() func(int) float64 {
			f := walk()
			return func(i int) float64 { return math.Round(f(i)*1000) / 1000 }
		}},
		{"x-noise", grid, func() func(int) float64 { return func(int) float64 { return r.NormFloat64() } }},
		{"x-float32", grid, func() func(int) float64 {
			f := walk()
			return func(i int) float64 { return float64(float32(f(i))) }
		}},
		{"x-resets", grid, func() func(int) float64 {
			x := 0.0
			return func(int) float64 {
				if x += float64(r.IntN(100)); r.IntN(60) == 0 {
					x = 0
				}
				return x
			}
		}},
		{"x-jittered-times", func(i int, _ int64) int64 { return 1_700_000_000_000 + int64(i)*15000 + int64(r.IntN(20)) }, counter},
		{"x-gaps", func(i int, t int64) int64 {
			if t += 15000; r.IntN(50) == 0 {
				t += 15000 * int64(1+r.IntN(100))
			}
			return t
		}, counter},
		{"x-random-times", func(_ int, t int64) int64 { return t + 1 + int64(r.ExpFloat64()*15000) }, counter},
		{"x-stale-between", grid, func() func(int) float64 {
			f := counter()
			return func(i int) float64 {
				if v := f(i); r.IntN(40) > 0 {
					return v
				}
				return gen.StaleNaN
			}
		}},
		{"x-nan-gauge", grid, func() func(int) float64 {
			f := walk()
			return func(i int) float64 {
				if v := f(i); r.IntN(4) > 0 {
					return v
				}
				return math.NaN()
			}
		}},
	}
	var out []benchSet
	for _, k := range sets {
		set := benchSet{kind: k.kind}
		for target := range 10 {
			t := []int64{1_700_000_000_000 + int64(r.IntN(15000))}
			for i := 1; i < n; i++ {
				t = append(t, k.times(i, t[i-1]))
			}
			for j := range 20 {
				s := &Series{Labels: labels.FromStrings(model.MetricNameLabel, "m", "instance", fmt.Sprint(target), "j", fmt.Sprint(j))}
				f := k.value()
				s.Floats.T = t
				for i := range n {
					s.Floats.V = append(s.Floats.V, f(i))
				}
				set.series = append(set.series, s)
			}
		}
		sortSeries(set.series)
		out = append(out, set)
	}
	return out
}

var cachedSets = map[int]func() []benchSet{
	120:  sync.OnceValue(func() []benchSet { return benchSets(120) }),
	5760: sync.OnceValue(func() []benchSet { return benchSets(5760) }),
}

// encodePages writes the data pages of a set and returns them, and the bytes
// that they and the locations of the chunks take.
func encodePages(tb testing.TB, set benchSet) (pages [][]byte, size int) {
	tb.Helper()
	var in []tenantSeries
	for _, s := range set.series {
		in = append(in, tenantSeries{"t", s})
	}
	block, sum := writeBlock(tb, in, WriterOptions{Uncompressed: true})
	d, err := ParseDirectory(at(block, sum.Tenants[0].Directory))
	if err != nil {
		tb.Fatal(err)
	}
	for _, ref := range d.Pages(nil, math.MinInt64, math.MaxInt64) {
		body, err := onlyPage(at(block, ref.Location), pageSeries)
		if err != nil {
			tb.Fatal(err)
		}
		p, err := ParseSeriesPage(at(block, ref.Location))
		if err != nil {
			tb.Fatal(err)
		}
		// The chunk part is the last: there is neither metadata nor exemplars.
		columns := appendColumns(p)
		size += len(body) - columns
		for _, l := range p.chunks.pages {
			pages = append(pages, at(block, l))
			size += int(l.Size)
		}
	}
	return pages, size
}

// appendColumns is the size of what comes before the parts of a series page.
func appendColumns(p *SeriesPage) int {
	b := appendText(nil, "")
	b = append(b, byte(p.series>>7)) // two varints, the second of one byte
	n := len(b)
	if p.series >= 1<<7 {
		n++
	}
	for _, l := range p.names {
		n += len(appendAscending(appendText(nil, l.name), l.values)) + len(l.ids)
	}
	return n - 1
}

type promChunk interface {
	chunkenc.Chunk
	Compact()
}

func encodeProm(tb testing.TB, set benchSet, mk func() promChunk) (chunks []chunkenc.Chunk, size int) {
	tb.Helper()
	for _, s := range set.series {
		c := mk()
		app, err := c.Appender()
		if err != nil {
			tb.Fatal(err)
		}
		for i, t := range s.Floats.T {
			app.Append(0, t, s.Floats.V[i])
		}
		c.Compact()
		chunks = append(chunks, c)
		size += len(c.Bytes())
	}
	return chunks, size
}

func newXOR() promChunk  { return chunkenc.NewXORChunk() }
func newXOR2() promChunk { return chunkenc.NewXOR2Chunk() }

func parsePages(tb testing.TB, pages [][]byte) []*DataPage {
	tb.Helper()
	out := make([]*DataPage, len(pages))
	for i, b := range pages {
		p, err := ParseDataPage(b)
		if err != nil {
			tb.Fatal(err)
		}
		out[i] = p
	}
	return out
}

// decodePages decodes all floats, timestamps and values, to slices.
func decodePages(tb testing.TB, pages []*DataPage, dst *Floats) (samples int) {
	var d Decoder
	for _, p := range pages {
		for i := range p.Len() {
			dst.T, dst.V = dst.T[:0], dst.V[:0]
			if err := d.Floats(p, i, dst); err != nil {
				tb.Fatal(err)
			}
			samples += len(dst.V)
		}
	}
	return samples
}

func iterate(tb testing.TB, chunks []chunkenc.Chunk) (samples int) {
	var it chunkenc.Iterator
	var sum float64
	for _, c := range chunks {
		it = c.Iterator(it)
		for it.Next() != chunkenc.ValNone {
			t, v := it.At()
			sum += v + float64(t)
			samples++
		}
		if it.Err() != nil {
			tb.Fatal(it.Err())
		}
	}
	return samples
}

// TestSizes holds the format to its bars against Prometheus's chunks.
func TestSizes(t *testing.T) {
	if testing.Short() {
		t.Skip("encodes some 20 M samples")
	}
	for _, n := range []int{120, 5760} {
		t.Logf("%d samples per chunk: B/sample as Epimetheus, XOR, XOR2", n)
		for _, set := range cachedSets[n]() {
			samples := float64(set.samples())
			_, ours := encodePages(t, set)
			_, xor := encodeProm(t, set, newXOR)
			_, xor2 := encodeProm(t, set, newXOR2)
			t.Logf("%-18s %7.3f %7.3f %7.3f  %5.2f of the smaller", set.kind,
				float64(ours)/samples, float64(xor)/samples, float64(xor2)/samples, float64(ours)/float64(min(xor, xor2)))
			switch {
			case n == 5760 && set.kind == "mix" && float64(ours) > 0.42*float64(min(xor, xor2)):
				t.Errorf("%s: more than 0.42 of the smaller", set.kind)
			case n == 120 && float64(ours) > 1.1*float64(xor2), n == 120 && set.kind == "mix" && ours >= min(xor, xor2):
				t.Errorf("%s: too large at %d samples per chunk", set.kind, n)
			}
		}
	}
}

// BenchmarkDecode decodes to slices, and iterates Prometheus's chunks.
func BenchmarkDecode(b *testing.B) {
	for _, n := range []int{120, 5760} {
		for _, set := range cachedSets[n]() {
			run := func(codec string, size int, f func() int) {
				b.Run(fmt.Sprintf("samples=%d/set=%s/codec=%s", n, set.kind, codec), func(b *testing.B) {
					b.ReportAllocs()
					total := 0
					for b.Loop() {
						total += f()
					}
					b.ReportMetric(float64(total)/b.Elapsed().Seconds()/1e6, "Msamples/s")
					b.ReportMetric(float64(size)/float64(set.samples()), "B/sample")
				})
			}
			pages, size := encodePages(b, set)
			var dst Floats
			parsed := parsePages(b, pages)
			run("epimetheus", size, func() int { return decodePages(b, parsed, &dst) })
			// With the checksums of the pages, which the others leave to their callers.
			run("epimetheus-crc", size, func() int { return decodePages(b, parsePages(b, pages), &dst) })
			chunks, size := encodeProm(b, set, newXOR)
			run("xor", size, func() int { return iterate(b, chunks) })
			chunks, size = encodeProm(b, set, newXOR2)
			run("xor2", size, func() int { return iterate(b, chunks) })
		}
	}
}

// BenchmarkWrite writes the mix as a block.
func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{120, 5760} {
		set := cachedSets[n]()[0]
		b.Run(fmt.Sprintf("samples=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			var size int64
			for b.Loop() {
				w := NewWriter(discard{}, WriterOptions{})
				for _, s := range set.series {
					if err := w.Add("t", s); err != nil {
						b.Fatal(err)
					}
				}
				sum, err := w.Close()
				if err != nil {
					b.Fatal(err)
				}
				size = sum.Size
			}
			samples := float64(set.samples())
			b.ReportMetric(float64(b.Elapsed())/float64(time.Second)/float64(b.N)/samples*1e6, "s/Msamples")
			b.ReportMetric(float64(size)/samples, "B/sample")
		})
	}
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

package codec

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

var lengths = []int{0, 1, 2, 7, 8, 9, 63, 64, 65, 119, 120, 255, 256, 257, 258, 1000, 5760}

func checkInts(t testing.TB, e *Encoder, d *Decoder, v []int64) {
	t.Helper()
	b := e.AppendInts(nil, v)
	got, rest, err := d.Ints([]int64{42}, append(b, 7), len(v))
	if err != nil || len(rest) != 1 {
		t.Fatalf("%v, %d bytes left of %d; first %v", err, len(rest), len(b), v[:min(10, len(v))])
	}
	for i, x := range v {
		if got[i+1] != x {
			t.Fatalf("form %d: value %d is %d, want %d", b[0], i, got[i+1], x)
		}
	}
}

func checkFloats(t testing.TB, e *Encoder, d *Decoder, v []float64) {
	t.Helper()
	b := e.AppendFloats(nil, v)
	got, rest, err := d.Floats([]float64{42}, append(b, 7), len(v))
	if err != nil || len(rest) != 1 {
		t.Fatalf("%v, %d bytes left of %d", err, len(rest), len(b))
	}
	for i, x := range v {
		if math.Float64bits(got[i+1]) != math.Float64bits(x) {
			t.Fatalf("head %#x: value %d is %v, want %v", b[0], i, got[i+1], x)
		}
	}
	if d.Rises() && !ascends(v) {
		t.Fatalf("head %#x: said to rise: %v", b[0], v)
	}
	for _, from := range []int{1, len(v) / 3, blockLen, blockLen + 1, len(v) - 1} {
		if from > 0 && from < len(v) {
			checkFrom(t, d, b, len(v), from, nil)
			if _, _, err := d.FloatsOn(nil, b, len(v), from, nil, nil, false); err != nil {
				t.Fatal(err)
			} else if d.Rises() && !ascends(v[from:]) {
				t.Fatalf("head %#x: said to rise from %d on: %v", b[0], from, v)
			}
		}
	}
}

// checkFrom decodes bytes, whatever they are, with and without the first from of n values: alone, as a base, and on base,
// if that isn't nil. The others are the same.
func checkFrom(t testing.TB, d *Decoder, b []byte, n, from int, base []int64) {
	t.Helper()
	for _, base := range [][]int64{nil, base} {
		for _, sums := range []bool{false, true} {
			if base != nil && !sums {
				continue
			}
			var sum, sumFrom []int64
			if sums {
				sum, sumFrom = make([]int64, n), make([]int64, n)
			}
			all, rest, err := d.FloatsOn(nil, b, n, 0, sum, base, false)
			some, restFrom, errFrom := d.FloatsOn(nil, b, n, from, sumFrom, base, false)
			if (err == nil) != (errFrom == nil) || len(rest) != len(restFrom) {
				t.Fatalf("%v, %d bytes left; from %d on %v, %d bytes left", err, len(rest), from, errFrom, len(restFrom))
			}
			if err != nil {
				continue
			}
			for i := from; i < n; i++ {
				if math.Float64bits(all[i]) != math.Float64bits(some[i]) || sums && sum[i] != sumFrom[i] {
					t.Fatalf("value %d of %d is %v, from %d on %v", i, n, all[i], from, some[i])
				}
			}
		}
	}
}

// ascends reports whether each value is no less than the one before, and none is NaN.
func ascends(v []float64) bool {
	for i, x := range v {
		if x != x || i > 0 && x < v[i-1] {
			return false
		}
	}
	return true
}

func checkTimes(t testing.TB, e *Encoder, d *Decoder, v []int64) {
	t.Helper()
	b := e.AppendTimes(nil, v)
	got, rest, err := d.Times([]int64{42}, append(b, 7), len(v))
	if err != nil || len(rest) != 1 {
		t.Fatalf("%v, %d bytes left of %d", err, len(rest), len(b))
	}
	for i, x := range v {
		if got[i+1] != x {
			t.Fatalf("time %d is %d, want %d", i, got[i+1], x)
		}
	}
}

func TestInts(t *testing.T) {
	var e Encoder
	var d Decoder
	r := rand.New(rand.NewPCG(1, 1))
	kinds := map[string]func(i int, prev int64) int64{
		"any":        func(int, int64) int64 { return int64(r.Uint64()) },
		"extremes":   func(int, int64) int64 { return []int64{math.MinInt64, math.MaxInt64, 0, -1}[r.IntN(4)] },
		"const":      func(int, int64) int64 { return -5 },
		"counter":    func(_ int, p int64) int64 { return p + int64(r.IntN(1000)) },
		"resets":     func(i int, p int64) int64 { return (p + int64(r.IntN(1000))) * int64(min(1, i%300)) },
		"sparse":     func(_ int, p int64) int64 { return p + int64(r.IntN(100)/99) },
		"half":       func(_ int, p int64) int64 { return p + int64(r.IntN(2)*r.IntN(200)) },
		"multiples":  func(_ int, p int64) int64 { return p + 4096*int64(r.IntN(200)-100) },
		"two-sided":  func(i int, _ int64) int64 { return int64(r.IntN(16)) + int64(r.IntN(21)/20*(r.IntN(3)-1))<<50 },
		"far apart":  func(i int, _ int64) int64 { return int64(i%2) * math.MaxInt64 },
		"far apart2": func(i int, _ int64) int64 { return int64(i%2)*math.MinInt64 + int64(r.IntN(2)) },
	}
	for name, next := range kinds {
		for _, n := range lengths {
			v := make([]int64, n)
			var p int64
			for i := range v {
				p = next(i, p)
				v[i] = p
			}
			checkInts(t, &e, &d, v)
		}
		_ = name
	}
	for w := range 65 {
		for _, n := range lengths {
			v := make([]int64, n)
			for i := range v {
				v[i] = int64(r.Uint64()>>1>>min(63, 64-w)) - 3
			}
			checkInts(t, &e, &d, v)
		}
	}
}

func TestFloats(t *testing.T) {
	var e Encoder
	var d Decoder
	r := rand.New(rand.NewPCG(1, 2))
	stale := math.Float64frombits(staleBits)
	odd := []float64{0, math.Copysign(0, -1), math.NaN(), stale, math.Inf(1), math.Inf(-1), 5e-324, math.MaxFloat64, math.Float64frombits(0xfff8000000001234)}
	kinds := map[string]func(i int) float64{
		"any":       func(int) float64 { return math.Float64frombits(r.Uint64()) },
		"odd":       func(int) float64 { return odd[r.IntN(len(odd))] },
		"ints":      func(i int) float64 { return float64(i * 17) },
		"big":       func(i int) float64 { return float64(int64(1)<<61 + int64(i)<<20) },
		"cents":     func(i int) float64 { return float64(r.IntN(10000)) / 100 },
		"negative":  func(i int) float64 { return -float64(r.IntN(10000)) / 1000 },
		"nano":      func(i int) float64 { return float64(int64(i)*1e9+int64(r.IntN(1e9))) / 1e9 },
		"noise":     func(int) float64 { return r.Float64() },
		"norm":      func(int) float64 { return r.NormFloat64() },
		"stale end": func(i int) float64 { return []float64{float64(i), stale}[min(1, i/118)] },
		"stale 1st": func(i int) float64 { return []float64{stale, float64(i)}[min(1, i)] },
		"some odd":  func(i int) float64 { return []float64{float64(i), odd[r.IntN(len(odd))]}[r.IntN(20)/19] },
		"all stale": func(int) float64 { return stale },
		"rare odd":  func(i int) float64 { return []float64{0.3, odd[r.IntN(len(odd))]}[r.IntN(50)/49] },
	}
	for _, next := range kinds {
		for _, n := range lengths {
			v := make([]float64, n)
			for i := range v {
				v[i] = next(i)
			}
			checkFloats(t, &e, &d, v)
		}
	}
}

func TestFloatsOnBase(t *testing.T) {
	var e Encoder
	var d Decoder
	r := rand.New(rand.NewPCG(1, 3))
	for _, n := range lengths[2:] {
		a, b := make([]float64, n), make([]float64, n)
		var x, y float64
		for i := range a {
			x, y = x+float64(r.IntN(1000)), y+float64(r.IntN(4))
			a[i], b[i] = x, x+y
		}
		b[n/2] = math.Float64frombits(staleBits)
		a[n-1] = math.NaN()
		first, ints, _ := e.AppendFloatsOn(nil, a, nil)
		ints = append([]int64(nil), ints...)
		second, _, base := e.AppendFloatsOn(nil, b, [][]int64{ints})
		if n > 50 && base != 0 {
			t.Fatalf("%d: base %d", n, base)
		}
		var sum []int64
		if base == 0 {
			sum = make([]int64, n)
			if err := d.BaseInts(sum, first, 0, true); err != nil {
				t.Fatal(err)
			}
			if _, _, err := d.Floats(nil, second, n); err == nil {
				t.Fatal("decoded without its base")
			}
		}
		got, _, err := d.FloatsOn(nil, second, n, 0, sum, sum, d.IntsRise())
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			if math.Float64bits(got[i]) != math.Float64bits(b[i]) {
				t.Fatal(i, got[i], b[i])
			}
		}
	}
}

// What is said to rise does, on bases too, and of most counters that do it is said.
func TestRises(t *testing.T) {
	var e Encoder
	var d Decoder
	r := rand.New(rand.NewPCG(1, 5))
	seen, said, fell, based := 0, 0, 0, 0
	for range 4000 {
		n := 2 + r.IntN(700)
		busy, resets, scale := 1+r.IntN(30), r.IntN(2), []float64{1, 1, 1, 60, 100, 1e9}[r.IntN(6)]
		a, b := make([]float64, n), make([]float64, n)
		x, y := int64(r.IntN(1000)), int64(r.IntN(100))
		for i := range a {
			if r.IntN(busy) == 0 {
				x += int64(r.IntN(500))
				y += int64(r.IntN(4)) - int64(r.IntN(20)/19)
			}
			if resets > 0 && r.IntN(n) == 0 {
				x, y = int64(r.IntN(5)), 0
			}
			if a[i], b[i] = float64(x), float64(x+y); scale > 1 {
				a[i] /= scale
			}
		}
		if r.IntN(20) == 0 {
			b[r.IntN(n)] = []float64{math.Float64frombits(staleBits), math.Inf(1), -1}[r.IntN(3)]
		}
		checkFloats(t, &e, &d, a)
		if ascends(a) {
			if seen++; d.Rises() {
				said++
			}
		}
		if scale > 1 {
			continue
		}
		first, ints, _ := e.AppendFloatsOn(nil, a, nil)
		if ints == nil {
			continue
		}
		ints = slices.Clone(ints)
		second, _, base := e.AppendFloatsOn(nil, b, [][]int64{ints})
		if base < 0 {
			continue
		}
		sum := make([]int64, n)
		if err := d.BaseInts(sum, first, 0, true); err != nil {
			t.Fatal(err)
		}
		rises := d.IntsRise()
		if rises != slices.IsSorted(ints) {
			t.Fatalf("the base is said to rise, %v: %v", rises, ints)
		}
		from := r.IntN(n)
		checkFrom(t, &d, second, n, from, slices.Clone(sum))
		if _, _, err := d.FloatsOn(nil, second, n, from, make([]int64, n), sum, rises); err != nil {
			t.Fatal(err)
		} else if d.Rises() && !ascends(b[from:]) {
			t.Fatalf("said to rise from %d on: %v", from, b)
		}
		got, _, err := d.FloatsOn(nil, second, n, 0, sum, sum, rises)
		if err != nil {
			t.Fatal(err)
		}
		based++
		if d.Rises() && !ascends(got) || d.IntsRise() && !slices.IsSorted(sum) {
			t.Fatalf("said to rise: %v, %v", got, sum)
		}
		if ascends(got) && !d.Rises() && d.IntsRise() {
			t.Fatalf("not said to rise: %v", got)
		}
		if !ascends(got) {
			fell++
		}
	}
	t.Logf("%d of %d said to rise; %d on bases, of which %d don't", said, seen, based, fell)
	if said < seen*3/4 || based < 300 || fell < 50 {
		t.Error("not much of a test")
	}
}

func TestTimes(t *testing.T) {
	var e Encoder
	var d Decoder
	r := rand.New(rand.NewPCG(1, 4))
	kinds := map[string]func(i int, prev int64) int64{
		"grid":      func(_ int, p int64) int64 { return p + 15000 },
		"late":      func(i int, _ int64) int64 { return int64(i)*15000 + int64(r.IntN(25)/24*r.IntN(40)) },
		"jitter":    func(i int, _ int64) int64 { return int64(i)*15000 + int64(r.IntN(40)) },
		"gaps":      func(_ int, p int64) int64 { return p + 15000*int64(1+r.IntN(200)/199*r.IntN(100)) },
		"shifts":    func(_ int, p int64) int64 { return p + 15000 + int64(r.IntN(200)/199*r.IntN(100)) },
		"irregular": func(_ int, p int64) int64 { return p + 1 + int64(r.Uint64()>>(16+r.IntN(47)))/100000 },
		"repeats":   func(_ int, p int64) int64 { return p + int64(r.IntN(2)*r.IntN(100)) },
		"early":     func(i int, _ int64) int64 { return int64(i)*15000 - int64(i%7/6*50) },
	}
	for _, next := range kinds {
		for _, n := range lengths {
			v := make([]int64, n)
			p := int64(-1e15)
			for i := range v {
				p = next(i, p)
				v[i] = p
			}
			checkTimes(t, &e, &d, v)
		}
	}
	checkTimes(t, &e, &d, []int64{math.MinInt64, 0, math.MaxInt64})
	checkTimes(t, &e, &d, []int64{math.MinInt64, math.MaxInt64})
	checkTimes(t, &e, &d, []int64{math.MinInt64, math.MinInt64 + 1, math.MinInt64 + 2, math.MaxInt64 - 1, math.MaxInt64})
}

func BenchmarkUnpack(b *testing.B) {
	var d Decoder
	dst := make([]int64, blockLen)
	for _, w := range []uint{1, 4, 7, 12, 20, 33, 51, 57, 64} {
		b.Run(fmt.Sprint(w), func(b *testing.B) {
			src := append(pack([]byte{byte(w), 0}, make([]int64, blockLen), &frame{width: w}), make([]byte, 8)...)
			for b.Loop() {
				if _, err := d.block(dst, src); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*blockLen/b.Elapsed().Seconds()/1e6, "Mvalues/s")
		})
	}
}

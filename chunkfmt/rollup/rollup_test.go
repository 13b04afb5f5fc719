package rollup

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/value"
)

var (
	stale = math.Float64frombits(value.StaleNaN)
	nan   = math.NaN()
	inf   = math.Inf(1)
)

// bitwise compares floats by their bits.
var bitwise = cmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })

func TestSummarise(t *testing.T) {
	const width = 10
	negZero := math.Copysign(0, -1)
	s := &Samples{
		T:               []int64{-10, -9, 1, 2, 3, 10, 11, 25, 31, 32, 33, 34, 41, 43, 51, 52},
		V:               []float64{7, 0.1, 3, 5, 2, 2, stale, 1e300, negZero, nan, 0, nan, -inf, inf, 0.1, 0.2},
		ST:              []int64{0, 0, 0, 0, 0, 9, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		StaleHistograms: []int64{26, 61}, Histograms: []int64{42},
	}
	want := &Windows{
		End:     []int64{-10, 0, 10, 20, 30, 40, 50, 60, 70},
		Count:   []uint32{1, 1, 4, 0, 1, 4, 2, 2, 0},
		Flags:   []Flags{0, 0, StartTimestamps, Stale, Huge | Stale, 0, NativeHistograms, 0, Stale},
		FirstT:  []int64{-10, -9, 1, 20, 25, 31, 41, 51, 70},
		FirstV:  []float64{7, 0.1, 3, 0, 1e300, negZero, -inf, 0.1, 0},
		PrevT:   []int64{-10, -9, 3, 20, 25, 33, 41, 51, 70},
		PrevV:   []float64{7, 0.1, 2, 0, 1e300, 0, -inf, 0.1, 0},
		LastT:   []int64{-10, -9, 10, 20, 25, 34, 43, 52, 70},
		LastV:   []float64{7, 0.1, 2, 0, 1e300, nan, inf, 0.2, 0},
		Sum:     []float64{7, 0.1, 12, 0, nan, nan, nan, 0.3, 0},
		Min:     []float64{7, 0.1, 2, 0, 1e300, negZero, -inf, 0.1, 0},
		Max:     []float64{7, 0.1, 5, 0, 1e300, negZero, inf, 0.2, 0},
		Resets:  []uint32{0, 0, 1, 0, 0, 0, 0, 0, 0},
		Reset:   []float64{0, 0, 5, 0, nan, 0, 0, 0, 0},
		Changes: []uint32{0, 0, 2, 0, 0, 3, 1, 1, 0},
		M2:      []float64{0, 0, 6, 0, nan, nan, nan, 0.005000000000002558, 0},
	}
	var sum Summariser
	got := &Windows{}
	sum.Summarise(got, s, width)
	numbers := cmp.Comparer(func(a, b float64) bool { return a == b && math.Signbit(a) == math.Signbit(b) || a != a && b != b })
	if diff := cmp.Diff(want, got, numbers); diff != "" {
		t.Error(diff)
	}
}

// TestWiden compares with what Summarise makes of the same samples.
func TestWiden(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		s := randomSeries(r)
		var sum Summariser
		var short, want, got Windows
		sum.Summarise(&short, s, Short)
		sum.Summarise(&want, s, Long)
		Widen(&got, &short, Long)
		for i := range want.Sum {
			if !close(got.Sum[i], want.Sum[i], 1e-14, greatest(&want, i)*float64(want.Count[i])) {
				t.Fatalf("sum %v, want %v", got.Sum[i], want.Sum[i])
			}
			if n := float64(want.Count[i]); !close(math.Sqrt(got.M2[i]/n), math.Sqrt(want.M2[i]/n), 1e-12, greatest(&want, i)*1e-3) {
				t.Fatalf("second moment %v, want %v, of %+v", got.M2[i], want.M2[i], want)
			}
			if want.Changes[i] == 0 && (got.M2[i] != 0) != (want.M2[i] != 0) {
				t.Fatalf("second moment %v, want %v", got.M2[i], want.M2[i])
			}
		}
		if len(got.Sum) == len(want.Sum) {
			copy(got.Sum, want.Sum)
			copy(got.M2, want.M2)
		}
		for i := range want.Reset {
			if close(got.Reset[i], want.Reset[i], 1e-14, want.Reset[i]) {
				got.Reset[i] = want.Reset[i]
			}
		}
		if diff := cmp.Diff(want, got, bitwise); diff != "" {
			t.Fatal(diff)
		}
	}
}

// greatest magnitude of a window.
func greatest(w *Windows, i int) float64 {
	return max(math.Abs(w.Min[i]), math.Abs(w.Max[i]))
}

// close: a and b are the same or differ by at most eps of the greater of b and scale.
func close(a, b, eps, scale float64) bool {
	if a == b || a != a && b != b {
		return true
	}
	return math.Abs(a-b) <= eps*max(math.Abs(b), scale)
}

// randomSeries has some hours of samples of some kind.
func randomSeries(r *rand.Rand) *Samples {
	interval := []int64{1000, 15000, 15000, 30000, 60000, 400000, 5000000}[r.IntN(7)]
	kind := r.IntN(9)
	jitter := r.IntN(3) == 0
	odd := r.IntN(3)     // how often odd values are
	missing := r.IntN(3) // and gaps
	s := &Samples{}
	t := r.Int64N(3*Long) - Long
	if r.IntN(2) == 0 {
		t -= t % interval
	}
	end := t + 2*interval + min(r.Int64N(8*Long), 2000*interval)
	x, phase := float64(r.IntN(100)), int64(0)
	if jitter {
		phase = interval/20 + 1
	}
	for n := 0; t < end; n++ {
		v := 0.
		switch kind {
		case 0: // counter
			x += float64(r.IntN(5))
			if r.IntN(200) == 0 {
				x = float64(r.IntN(3))
			}
			v = x
		case 1: // counter of seconds
			x += r.Float64()
			if r.IntN(50) == 0 {
				x = 0
			}
			v = x
		case 2: // gauge with decimals
			v = float64(r.IntN(100000)-30000) / 100
		case 3: // any floats
			v = r.NormFloat64() * math.Pow(10, float64(r.IntN(20)-10))
		case 4: // constant
			v = 0.1
		case 5: // few values
			v = float64(r.IntN(3) - 1)
		case 6: // large, with little between
			v = 1e9 + float64(r.IntN(1000))/1000
		case 7: // bytes
			v = float64(r.Int64N(1 << 45))
		case 8: // huge
			v = r.NormFloat64() * math.Pow(2, float64(r.IntN(2000)-1000))
		}
		if odd > 0 && r.IntN(40*odd) == 0 {
			v = []float64{stale, stale, nan, inf, -inf, math.Copysign(0, -1), 0, -v, math.Float64frombits(0x7ff8000000000007)}[r.IntN(9)]
		}
		if odd == 2 && r.IntN(300) == 0 {
			v = math.MaxFloat64
		}
		s.T, s.V = append(s.T, t), append(s.V, v)
		step := interval
		if missing > 0 && r.IntN(50*missing) == 0 {
			step += interval * r.Int64N(30)
		}
		if phase > 0 {
			step += r.Int64N(2*phase) - phase
		}
		t += max(1, step)
	}
	return s
}

// TestUselessWindows: steps in whose range there is a window that tells too little need
// the samples, and no others do.
func TestUselessWindows(t *testing.T) {
	for _, c := range []struct {
		fn     string
		flag   Flags
		starts bool
		raw    bool
	}{
		{"rate", NativeHistograms, false, true},
		{"", NativeHistograms, false, true},
		{"count_over_time", NativeHistograms, false, true},
		{"rate", StartTimestamps, false, false},
		{"rate", StartTimestamps, true, true},
		{"irate", StartTimestamps, true, true},
		{"resets", StartTimestamps, true, true},
		{"delta", StartTimestamps, true, false},
		{"max_over_time", StartTimestamps, true, false},
		{"rate", Huge, false, true},
		{"sum_over_time", Huge, false, true},
		{"stdvar_over_time", Huge, false, true},
		{"delta", Huge, false, false},
		{"max_over_time", Huge, false, false},
	} {
		s := &Samples{}
		for i := range int64(8) {
			s.T, s.V = append(s.T, i*Long/2+1), append(s.V, float64(i))
		}
		var sum Summariser
		var w Windows
		sum.Summarise(&w, s, Long)
		w.Flags[1] |= c.flag // of the window that ends at 2 h
		e, ok := NewEvaluator(Query{Function: c.fn, Range: 2 * Long, Start: Long, Step: Long, Steps: 4, StartTimestamps: c.starts}, Long)
		if !ok {
			t.Fatal(c.fn)
		}
		var out Result
		e.Eval(&w, &out)
		var raw []int32
		points := []int32{0, 1, 2, 3}
		if c.raw {
			raw, points = []int32{1, 2}, []int32{0, 3}
		}
		if diff := cmp.Diff(raw, out.Raw) + cmp.Diff(points, out.Step); diff != "" {
			t.Errorf("%s, %d: %s", c.fn, c.flag, diff)
		}
	}
}

// TestWidth: windows as wide as the times of a query allow.
func TestWidth(t *testing.T) {
	const minute = 60_000
	for _, c := range []struct {
		fn               string
		rng, start, step int64
		want             int64
	}{
		{"rate", Long, Long, Long, Long},
		{"rate", Long + 15_000, 0, Long, Long},
		{"rate", Long + 30*minute, 0, Long, Short},
		{"rate", Long + 30*minute + 3*minute, 0, Long, 0},
		{"rate", Short, Long, Long, Short},
		{"rate", Long, Short, Long, Short},
		{"rate", Long, 7, Long, 0},
		{"rate", minute, 0, Long, 0},
		{"rate", Long, -Long, minute, 0},
		{"", Short, Long, Long, Long},
		{"", 3 * minute, Short, Short, Short},
		{"irate", 2 * minute, Long, Long, Long},
		{"stddev_over_time", Long, Long, Long, Long},
		{"stddev_over_time", Short, Long, Long, 0},
		{"quantile_over_time", Long, Long, Long, 0},
	} {
		q := Query{Function: c.fn, Range: c.rng, Start: c.start, Step: c.step, Steps: 5}
		if got := q.Width(); got != c.want {
			t.Errorf("%s: %d, want %d", q.String(), got, c.want)
		}
	}
}

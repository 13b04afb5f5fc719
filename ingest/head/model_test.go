package head

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/tsdbutil"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

var seed = flag.Uint64("seed", 0, "seed of TestModel; 0: several")

// plain is what a head should hold: by generation, tenant, series and time.
type plain struct {
	generations []map[string]map[string]map[int64]sample
}

func newPlain() *plain { return &plain{[]map[string]map[string]map[int64]sample{{}}} }

func (m *plain) add(tenant, series string, s sample) {
	g := m.generations[len(m.generations)-1]
	if g[tenant] == nil {
		g[tenant] = map[string]map[int64]sample{}
	}
	if g[tenant][series] == nil {
		g[tenant][series] = map[int64]sample{}
	}
	put(g[tenant][series], s)
}

// put keeps the winner of those with one timestamp.
func put(to map[int64]sample, s sample) {
	if old, ok := to[s.t]; ok {
		s = samples(chunkfmt.Merge(columns([]sample{old}), columns([]sample{s})))[0]
	}
	to[s.t] = s
}

// all merges generations for a tenant and a time range.
func (m *plain) all(gens []map[string]map[string]map[int64]sample, tenant string, mint, maxt int64) map[string]map[int64]sample {
	out := map[string]map[int64]sample{}
	for _, g := range gens {
		for name, ss := range g[tenant] {
			for t, s := range ss {
				if t < mint || t > maxt {
					continue
				}
				if out[name] == nil {
					out[name] = map[int64]sample{}
				}
				put(out[name], s)
			}
		}
	}
	return out
}

// within drops what chunks hold beside what was asked for.
func within(s *chunkfmt.Series, mint, maxt int64) map[int64]sample {
	out := map[int64]sample{}
	for _, one := range samples(s) {
		if one.t >= mint && one.t <= maxt {
			out[one.t] = one
		}
	}
	return out
}

func compare(t *testing.T, what string, got, want map[string]map[int64]sample) {
	t.Helper()
	for name := range got {
		if len(want[name]) == 0 && len(got[name]) > 0 {
			t.Fatalf("%s: unexpected series %s", what, name)
		}
	}
	for name, ss := range want {
		if len(got[name]) != len(ss) {
			t.Fatalf("%s: %s has %d samples, want %d", what, name, len(got[name]), len(ss))
		}
		for at, s := range ss {
			g, ok := got[name][at]
			if !ok || !same(&g, &s) {
				t.Fatalf("%s: %s at %d: %+v (there: %v), want %+v", what, name, at, g, ok, s)
			}
		}
	}
}

// TestModel compares a head with a plain map, over random appends of several
// sessions, rotations, flushes and drops. -seed repeats a failure.
func TestModel(t *testing.T) {
	seeds := []uint64{1, 2, 3, 4}
	if *seed != 0 {
		seeds = []uint64{*seed}
	} else if !testing.Short() {
		seeds = append(seeds, rand.Uint64())
	}
	for _, s := range seeds {
		t.Run(fmt.Sprint("seed=", s), func(t *testing.T) { runModel(t, s) })
	}
}

func runModel(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	h, m := New(0), newPlain()
	tenants := []string{"a", "b"}
	type session struct {
		tenant string
		refs   Refs
		names  []labels.Labels // by ref; empty: withdrawn
		clock  int64
	}
	var sessions []*session
	open := func() *session { return &session{tenant: tenants[r.IntN(2)], clock: 1_000_000} }
	for range 3 {
		sessions = append(sessions, open())
	}
	var frozen []*Generation
	random := func(s *session) sample {
		s.clock += int64(r.IntN(3)) * 500
		at := s.clock
		switch r.IntN(10) {
		case 0: // late
			at -= int64(r.IntN(400)) * 500
		case 1: // far away
			at = int64(r.IntN(100)-50) * 1_000_000
		}
		out := sample{t: at, v: float64(r.IntN(4))}
		switch r.IntN(40) {
		case 0:
			out.v = math.Float64frombits(value.StaleNaN)
		case 1:
			out.v = math.Copysign(0, -1)
		case 2:
			out.st = at - 1000
		case 3:
			out.v, out.h = 0, tsdbutil.GenerateTestHistogram(int64(r.IntN(5)))
		case 4:
			out.v, out.fh = 0, tsdbutil.GenerateTestFloatHistogram(int64(r.IntN(5)))
		case 5:
			out.v, out.h = 0, tsdbutil.GenerateTestCustomBucketsHistogram(int64(r.IntN(5)))
		case 6:
			out.v = math.Float64frombits(r.Uint64())
		}
		return out
	}
	for range 1500 {
		switch k := r.IntN(100); {
		case k < 80: // a batch
			s := sessions[r.IntN(len(sessions))]
			c := &ship.Columns{}
			// The model gets them in the order of Append: by kind.
			var fs, hs, fhs []func()
			for range 1 + r.IntN(30) {
				ref := uint32(r.IntN(8))
				for int(ref) >= len(s.names) {
					s.names = append(s.names, labels.Labels{})
				}
				for n := range s.names {
					if s.names[n].IsEmpty() {
						name := ls("__name__", fmt.Sprint("m", r.IntN(3)), "i", fmt.Sprint(r.IntN(5)))
						if !s.refs.Announce(uint32(n), name, false) {
							t.Fatal("announcement refused")
						}
						s.names[n] = name
					}
				}
				one, name := random(s), s.names[ref].String()
				add := func() { m.add(s.tenant, name, one) }
				switch {
				case one.h != nil:
					c.Histograms.Ref, c.Histograms.T = append(c.Histograms.Ref, ref), append(c.Histograms.T, one.t)
					c.Histograms.H = append(c.Histograms.H, one.h.Copy())
					hs = append(hs, add)
				case one.fh != nil:
					c.FloatHistograms.Ref, c.FloatHistograms.T = append(c.FloatHistograms.Ref, ref), append(c.FloatHistograms.T, one.t)
					c.FloatHistograms.H = append(c.FloatHistograms.H, one.fh.Copy())
					fhs = append(fhs, add)
				default:
					f := &c.Floats
					f.Ref, f.T, f.V, f.ST = append(f.Ref, ref), append(f.T, one.t), append(f.V, one.v), append(f.ST, one.st)
					fs = append(fs, add)
				}
			}
			if res := h.Append(s.tenant, &s.refs, &Batch{Columns: c}); res.Refused != nil || res.Appended+res.Late+res.Duplicates != c.Len() {
				t.Fatalf("batch of %d samples: %+v", c.Len(), res)
			}
			for _, add := range slices.Concat(fs, hs, fhs) {
				add()
			}
		case k < 84: // another session takes the place of one
			sessions[r.IntN(len(sessions))] = open()
		case k < 88: // a series is withdrawn
			s := sessions[r.IntN(len(sessions))]
			if n := len(s.names); n > 0 {
				ref := r.IntN(n)
				if !s.names[ref].IsEmpty() && !s.refs.Withdraw(uint32(ref)) {
					t.Fatalf("ref %d can't be withdrawn", ref)
				}
				s.names[ref] = labels.Labels{}
			}
		case k < 90: // rotate, and look at what a flush would take
			g := h.Rotate()
			frozen = append(frozen, g)
			for _, tenant := range tenants {
				got := map[string]map[int64]sample{}
				last := ""
				err := g.Walk(tenant, func(s *chunkfmt.Series) error {
					key := s.Labels.Get(model.MetricNameLabel) + "\xff" + s.Labels.String()
					if key <= last {
						t.Errorf("%q after %q", key, last)
					}
					last = key
					got[s.Labels.String()] = within(clone(s), math.MinInt64, math.MaxInt64)
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				compare(t, fmt.Sprintf("flush of generation %d, tenant %s", g.ID(), tenant), got,
					m.all(m.generations[len(m.generations)-1:], tenant, math.MinInt64, math.MaxInt64))
			}
			m.generations = append(m.generations, map[string]map[string]map[int64]sample{})
		case k < 92: // drop the oldest
			if len(frozen) > 0 {
				h.Drop(frozen[0], nil)
				frozen, m.generations = frozen[1:], m.generations[1:]
			}
		default: // read
			tenant := tenants[r.IntN(2)]
			mint, maxt := int64(math.MinInt64), int64(math.MaxInt64)
			if r.IntN(2) == 0 {
				mint = 1_000_000 + int64(r.IntN(1000))*1000
				maxt = mint + int64(r.IntN(300))*1000
			}
			found, _, err := h.Select(context.Background(), fetch.Query{Tenant: tenant, MinT: mint, MaxT: maxt})
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]map[int64]sample{}
			for _, s := range found {
				var d fetch.Decoder
				cols, err := d.Decode(s.Chunks)
				if err != nil {
					t.Fatal(err)
				}
				got[s.Labels.String()] = within(cols, mint, maxt)
			}
			want := m.all(m.generations, tenant, mint, maxt)
			compare(t, fmt.Sprintf("select %s [%d, %d]", tenant, mint, maxt), got, want)
			newest := map[string]map[int64]sample{}
			for name, s := range want {
				if len(s) > 0 {
					at := slices.Max(slices.Collect(maps.Keys(s)))
					newest[name] = map[int64]sample{at: s[at]}
				}
			}
			compare(t, fmt.Sprintf("newest of %s [%d, %d]", tenant, mint, maxt), readNewest(t, h, tenant, mint, maxt, 1+r.IntN(2000)), newest)
		}
	}
	held := int64(0)
	for _, g := range m.generations {
		for ss := range maps.Values(g) {
			for s := range maps.Values(ss) {
				held += int64(len(s))
			}
		}
	}
	if got := h.Size().Samples; got < held {
		t.Errorf("the head counts %d samples, it holds %d", got, held)
	}
}

// readNewest gives the newest sample of each series, as a reader of columns has it.
func readNewest(t *testing.T, h *Head, tenant string, mint, maxt int64, bytes int) map[string]map[int64]sample {
	t.Helper()
	ctx := context.Background()
	_, found := h.Read(ctx, fetch.Query{Tenant: tenant, MinT: mint, MaxT: maxt, Newest: true}, bytes)
	chunks := map[string][]fetch.Chunk{}
	generation, last := uint64(0), labels.EmptyLabels()
	for c, err := range found {
		if err != nil {
			t.Fatal(err)
		}
		if c.Generation != generation {
			generation, last = c.Generation, labels.EmptyLabels()
		}
		i, from, data := 0, uint32(0), c.Data // from which they are sent
		err := h.Series(tenant, c.Generation, c.Refs, func(ls labels.Labels) error {
			if labels.Compare(last, ls) >= 0 {
				t.Fatalf("%s after %s", ls, last)
			}
			for _, x := range c.Chunks[from : from+c.Counts[i]] {
				n := len(x.Data)
				x.Data, data = slices.Clone(data[:n]), data[n:]
				chunks[ls.String()] = append(chunks[ls.String()], x)
			}
			from += c.Counts[i]
			last = ls
			i++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	out := map[string]map[int64]sample{}
	for name, cs := range chunks {
		var d fetch.Decoder
		cols, err := d.Decode(cs)
		if err != nil {
			t.Fatal(err)
		}
		all := within(cols, mint, maxt)
		if len(all) == 0 {
			continue
		}
		at := slices.Max(slices.Collect(maps.Keys(all)))
		out[name] = map[int64]sample{at: all[at]}
	}
	return out
}

// clone copies what is valid during a call only.
func clone(s *chunkfmt.Series) *chunkfmt.Series {
	c := *s
	c.Floats = chunkfmt.Floats{T: slices.Clone(s.Floats.T), ST: slices.Clone(s.Floats.ST), V: slices.Clone(s.Floats.V)}
	c.Histograms.T, c.Histograms.ST, c.Histograms.H = slices.Clone(s.Histograms.T), slices.Clone(s.Histograms.ST), slices.Clone(s.Histograms.H)
	for i, h := range c.Histograms.H {
		c.Histograms.H[i] = h.Copy()
	}
	f := &c.FloatHistograms
	f.T, f.ST, f.H = slices.Clone(f.T), slices.Clone(f.ST), slices.Clone(f.H)
	for i, h := range f.H {
		f.H[i] = h.Copy()
	}
	return &c
}

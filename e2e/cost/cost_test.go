package cost

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// Prices in dollars: AWS, us-east-1, on demand, 2026.
var (
	fullFlag    = flag.Bool("cost.full", false, "simulate the whole fleets, for 16 days; otherwise less of them, for 4 days")
	priceWrite  = flag.Float64("cost.million-writes", 0.625, "dollars for a million write units of DynamoDB")
	priceRead   = flag.Float64("cost.million-reads", 0.125, "dollars for a million read units of DynamoDB")
	priceRows   = flag.Float64("cost.index-gb-month", 0.25, "dollars for a GB in DynamoDB, a month")
	pricePut    = flag.Float64("cost.million-puts", 5, "dollars for a million PUTs of S3")
	priceGet    = flag.Float64("cost.million-gets", 0.4, "dollars for a million GETs of S3")
	priceObject = flag.Float64("cost.object-gb-month", 0.023, "dollars for a GB in S3, a month")
)

const (
	ingesters     = 6
	flushInterval = 30 * time.Minute
	scrape        = 15 * time.Second
	months        = 13
	month         = 730*time.Hour + 30*time.Minute // 365.25 days / 12
	grace         = 10 * time.Minute
)

// fleet is what is simulated, and what that stands for.
type fleet struct {
	name string
	// Of the fleet meant. names are metric names, of a tenant.
	tenants, series, names int
	owners                 int // ingesters that a tenant's series are on
	// Simulated: so many tenants, each with so many series.
	simTenants, simSeries int

	maxWrites, maxPuts float64 // for a million samples: the bars
}

func fleets() []fleet {
	one := fleet{name: "one tenant, 1 M series", tenants: 1, series: 1_000_000, names: 2000, owners: ingesters, simTenants: 1, simSeries: 2000, maxWrites: 1, maxPuts: 0.2}
	many := fleet{name: "10,000 tenants, 1,000 series each", tenants: 10_000, series: 1000, names: 300, owners: 2, simTenants: 600, simSeries: 4, maxWrites: 40, maxPuts: 1}
	if !*fullFlag {
		one.simSeries, many.simTenants = 400, 100
	}
	return []fleet{one, many}
}

// TestCost: what the fleets cost is known and stays below the bars. Both are
// simulated side by side: encoders that a process makes once may belong to no bubble
// of time, or to one.
func TestCost(t *testing.T) {
	warmUp, period := 9*24*time.Hour+12*time.Hour, 7*24*time.Hour
	if !*fullFlag {
		warmUp, period = 2*24*time.Hour+12*time.Hour, 24*time.Hour
	}
	all := fleets()
	results := make([]result, len(all))
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		// Weeks of blocks begin on a Thursday; so does the simulation.
		week := 7 * 24 * time.Hour
		time.Sleep(week - time.Duration(time.Now().UnixMilli())*time.Millisecond%week)
		for i, f := range all {
			w := newWorld(t, f, warmUp+period)
			wg.Go(func() { results[i] = w.run(warmUp, period) })
		}
	})
	for _, r := range results {
		if *fullFlag {
			fmt.Printf("\n%s", r.table())
		} else {
			t.Log("\n" + r.table())
		}
		if got := total(r.bill.writes) / r.million; got > r.fleet.maxWrites {
			t.Errorf("%s: %.2f write units for a million samples, at most %v are wanted", r.fleet.name, got, r.fleet.maxWrites)
		}
		if got := total(r.bill.puts) / r.million; got > r.fleet.maxPuts {
			t.Errorf("%s: %.3f PUTs for a million samples, at most %v are wanted", r.fleet.name, got, r.fleet.maxPuts)
		}
	}
}

// result is for a period in which each level was compacted as often as it is in the
// long run.
type result struct {
	fleet   fleet
	bill    *bill
	period  time.Duration
	million float64 // samples of the fleet in the period
	// Of the fleet at the end of the simulation, by level of the block.
	blockBytes, blockSamples map[index.Level]float64
	rowBytes, rowDays        float64
}

// stream is a series of a tenant, with its samples to come.
type stream struct {
	labels labels.Labels
	iter   *gen.Iter
	end    bool
	t      int64
	v      float64
}

func (s *stream) next() {
	var ok bool
	if s.t, s.v, ok = s.iter.Next(); !ok {
		s.end = true
	}
}

// streams makes the series of a tenant, sorted.
func streams(f fleet, tenant int, c gen.Config) []*stream {
	// Few of a tenant's many series are simulated: they are taken from all over.
	c.Series, c.Targets, c.Seed = max(f.simSeries, 1000), 10, uint64(tenant+1) //nolint:gosec // small
	all := c.AllSeries()
	r := rand.New(rand.NewPCG(uint64(tenant), 1)) //nolint:gosec // small
	from := 0
	if len(all) > f.simSeries {
		from = r.IntN(len(all) - f.simSeries)
	}
	names := map[string]bool{}
	for _, s := range all {
		names[s.Name()] = true
	}
	groups := max(1, f.names/len(names))
	var out []*stream
	for i, s := range all[from:min(len(all), from+f.simSeries)] {
		b := labels.NewScratchBuilder(len(s.Labels))
		for _, l := range s.Labels {
			if l.Name == model.MetricNameLabel {
				l.Value += fmt.Sprintf("_%d", i%groups)
			}
			b.Add(l.Name, l.Value)
		}
		b.Sort()
		one := &stream{labels: b.Labels(), iter: s.Iter(c)}
		one.next()
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b *stream) int {
		if c := strings.Compare(a.labels.Get(model.MetricNameLabel), b.labels.Get(model.MetricNameLabel)); c != 0 {
			return c
		}
		return labels.Compare(a.labels, b.labels)
	})
	return out
}

type world struct {
	t        *testing.T
	f        fleet
	bill     *bill
	memory   *historytest.MemoryObjects
	rows     *rows
	tenants  []string
	series   [][]*stream // by tenant
	scale    float64     // series meant for each simulated
	entropy  io.Reader
	ingester []*history.History
}

func newWorld(t *testing.T, f fleet, length time.Duration) *world {
	begin := time.Now()
	scale := float64(f.tenants) * float64(f.series) / (float64(f.simTenants) * float64(f.simSeries))
	w := &world{t: t, f: f, scale: scale, memory: &historytest.MemoryObjects{}, entropy: crand.Reader}
	w.bill = newBill(float64(f.tenants)/float64(f.simTenants), scale)
	w.rows = &rows{Store: &historytest.MemoryRows{}, bill: w.bill, size: map[string]int{}}
	c := gen.Config{Start: begin.UnixMilli(), End: begin.Add(length + time.Hour).UnixMilli(), Interval: scrape.Milliseconds()}
	for i := range f.simTenants {
		w.tenants = append(w.tenants, fmt.Sprintf("tenant-%05d", i))
		w.series = append(w.series, streams(f, i, c))
	}
	for range ingesters {
		h, err := history.New(history.Options{
			Objects: &objects{w.memory, w.bill, "flushed blocks"}, Index: index.New(w.rows), Registerer: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			panic(err)
		}
		w.ingester = append(w.ingester, h)
	}
	return w
}

// run lets time pass, and returns what it cost after a while.
func (w *world) run(warmUp, period time.Duration) result {
	ctx, stop := context.WithCancel(w.t.Context())
	compactor, err := compact.New(compact.Options{
		Objects: &objects{w.memory, w.bill, "compacted blocks"}, Index: index.New(w.rows), Dir: w.t.TempDir(), Grace: grace,
		MaxBlockBytes: max(1, int64(512<<20/w.scale)), OwnBlockBytes: max(1, int64(64<<20/w.scale)),
	})
	if err != nil {
		panic(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := compactor.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	for i := range ingesters {
		wg.Go(func() {
			// Ingesters flush one after the other, not all at once.
			time.Sleep(flushInterval * time.Duration(i) / ingesters)
			for ctx.Err() == nil {
				select {
				case <-ctx.Done():
				case <-time.After(flushInterval):
					w.flush(ctx, i)
				}
			}
		})
	}
	time.Sleep(warmUp)
	before := w.bill.snapshot()
	rowsBefore := w.rows.stored()
	time.Sleep(period)
	r := result{
		fleet: w.f, bill: w.bill.snapshot().since(before), period: period,
		million:    float64(w.f.tenants) * float64(w.f.series) * float64(period/scrape) / 1e6,
		blockBytes: map[index.Level]float64{}, blockSamples: map[index.Level]float64{},
		rowBytes: w.rows.stored() - rowsBefore, rowDays: period.Hours() / 24,
	}
	w.blocks(&r)
	stop()
	wg.Wait()
	return r
}

// flush writes what an ingester has of the series that hash to it.
func (w *world) flush(ctx context.Context, ingester int) {
	var buf bytes.Buffer
	b := chunkfmt.NewWriter(&buf, chunkfmt.WriterOptions{Window: history.Window})
	until := time.Now().UnixMilli()
	for i, tenant := range w.tenants {
		first := i % ingesters // of the ingesters that the tenant is on
		var mine []*stream
		for j, s := range w.series[i] {
			if (first+j%w.f.owners)%ingesters == ingester {
				mine = append(mine, s)
			}
		}
		if len(mine) == 0 {
			continue
		}
		for _, s := range mine {
			x := chunkfmt.Series{Labels: s.labels}
			for ; !s.end && s.t < until; s.next() {
				x.Floats.T, x.Floats.V = append(x.Floats.T, s.t), append(x.Floats.V, s.v)
			}
			if len(x.Floats.T) == 0 {
				continue
			}
			if err := b.Add(tenant, &x); err != nil {
				panic(err)
			}
		}
	}
	summary, err := b.Close()
	if err != nil {
		panic(err)
	}
	if len(summary.Tenants) == 0 {
		return
	}
	id := ulid.MustNew(ulid.Timestamp(time.Now()), w.entropy)
	if err := w.ingester[ingester].Publish(ctx, id, buf.Bytes(), summary); err != nil && ctx.Err() == nil {
		w.t.Error(err)
	}
}

// blocks says what there is in the object store, by level.
func (w *world) blocks(r *result) {
	x := index.New(w.rows)
	seen := map[ulid.ULID]bool{}
	for _, tenant := range w.tenants {
		all, err := x.AllBlocks(w.t.Context(), tenant)
		if err != nil {
			panic(err)
		}
		for i := range all {
			b := &all[i]
			if !seen[b.Block] {
				seen[b.Block] = true
				r.blockBytes[b.Level] += float64(b.ObjectSize) * w.bill.bytes
			}
			// A block whose samples lie in two weeks has two rows of a tenant.
			r.blockSamples[b.Level] += float64(b.Samples) * w.scale
		}
	}
}

func (r *result) table() string {
	var b strings.Builder
	f := r.fleet
	perMonth := float64(month) / float64(r.period)
	fmt.Fprintf(&b, "%s: %.0f M samples a month. Simulated: %d of %d tenants, %d of %d series each, %.0f days.\n\n",
		f.name, r.million*perMonth, f.simTenants, f.tenants, f.simSeries, f.series, r.period.Hours()/24)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "item\ta month\ta million samples\tdollars a month\t")
	sum := 0.0
	line := func(item string, n, dollars float64) {
		sum += dollars
		fmt.Fprintf(w, "%s\t%.3g\t%.4f\t%.2f\t\n", item, n*perMonth, n/r.million, dollars)
	}
	list := func(prefix string, m map[string]float64, price float64) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			line(prefix+k, m[k], m[k]*perMonth*price/1e6)
		}
	}
	list("write units: ", r.bill.writes, *priceWrite)
	list("read units: ", r.bill.reads, *priceRead)
	list("PUTs: ", r.bill.puts, *pricePut)
	line("GETs", r.bill.gets, r.bill.gets*perMonth**priceGet/1e6)
	for _, l := range slices.Sorted(maps.Keys(r.blockBytes)) {
		if n := r.blockSamples[l]; n > 0 {
			fmt.Fprintf(w, "bytes a sample, level %d\t\t%.3f\t\t\n", l, r.blockBytes[l]/n)
		}
	}
	top := slices.Max(slices.Collect(maps.Keys(r.blockBytes)))
	stored := r.blockBytes[top] / r.blockSamples[top] * r.million * 1e6 * perMonth * months
	d := stored / 1e9 * *priceObject
	sum += d
	fmt.Fprintf(w, "GB in S3 after %d months\t%.3g\t\t%.2f\t\n", months, stored/1e9, d)
	rowBytes := r.rowBytes * perMonth * months
	d = rowBytes / 1e9 * *priceRows
	sum += d
	fmt.Fprintf(w, "GB in DynamoDB after %d months\t%.3g\t\t%.2f\t\n", months, rowBytes/1e9, d)
	fmt.Fprintf(w, "all\t\t\t%.2f\t\n", sum)
	fmt.Fprintf(w, "write units in all\t\t%.3f\t\t\n", total(r.bill.writes)/r.million)
	fmt.Fprintf(w, "PUTs in all\t\t%.3f\t\t\n", total(r.bill.puts)/r.million)
	chunks := r.million * 1e6 / 120
	fmt.Fprintf(w, "one row and one object for each chunk of 120 samples\t%.3g\t%.0f\t%.2f\t\n",
		chunks*perMonth, chunks/r.million, chunks*perMonth*(*priceWrite+*pricePut)/1e6)
	if err := w.Flush(); err != nil {
		panic(err) // a strings.Builder takes all
	}
	return b.String()
}

package ingest

import (
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
	"github.com/epimetheus-tsdb/epimetheus/internal/gen"
)

// cpu is the user and system time of the process: what runs beside the
// benchmark, as the garbage collector, counts.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// scrapes are half an hour of data of real shape, 20,000 series of 20 targets: a
// column per target and scrape, and what announces its refs.
func scrapes() (announce func(*head.Refs), batches []*ship.Columns, samples int) {
	c := gen.Config{Series: 20_000, Targets: 20, Start: 1_700_000_000_000, Interval: 15_000, Seed: 1}
	c.End = c.Start + 120*c.Interval
	var all []labels.Labels
	type one struct {
		ref uint32
		it  *gen.Iter
	}
	targets := make([][]one, c.Targets)
	for _, s := range c.AllSeries() {
		b := labels.NewScratchBuilder(len(s.Labels))
		for _, l := range s.Labels {
			b.Add(l.Name, l.Value)
		}
		targets[s.Target] = append(targets[s.Target], one{uint32(len(all)), s.Iter(c)})
		all = append(all, b.Labels())
	}
	for range c.Steps() {
		for _, series := range targets {
			f := ship.Floats{}
			for _, s := range series {
				if t, v, ok := s.it.Next(); ok {
					f.Ref, f.T, f.V = append(f.Ref, s.ref), append(f.T, t), append(f.V, v)
				}
			}
			samples += len(f.T)
			batches = append(batches, &ship.Columns{Floats: f})
		}
	}
	return func(r *head.Refs) {
		for i, ls := range all {
			r.Announce(uint32(i), ls, false)
		}
	}, batches, samples
}

// BenchmarkAppend fills a head from decoded batches.
func BenchmarkAppend(b *testing.B) {
	announce, batches, samples := scrapes()
	b.ReportAllocs()
	began := cpu(b)
	for b.Loop() {
		h, refs := head.New(0), &head.Refs{}
		announce(refs)
		for _, c := range batches {
			h.Append("a", refs, &head.Batch{Columns: c})
		}
	}
	b.ReportMetric((cpu(b)-began).Seconds()/float64(samples*b.N)*1e6, "cpu-s/Msamples")
}

// BenchmarkEncode turns a generation into a block.
func BenchmarkEncode(b *testing.B) {
	announce, batches, samples := scrapes()
	h, refs := head.New(0), &head.Refs{}
	announce(refs)
	for _, c := range batches {
		h.Append("a", refs, &head.Batch{Columns: c})
	}
	g := h.Rotate()
	b.ReportAllocs()
	size := 0
	began := cpu(b)
	for b.Loop() {
		blocks, _, err := encode(g, index.Width, maxBlockBytes, time.Now())
		if err != nil {
			b.Fatal(err)
		}
		size = 0
		for _, block := range blocks {
			size += len(block.data)
		}
	}
	b.ReportMetric((cpu(b)-began).Seconds()/float64(samples*b.N)*1e6, "cpu-s/Msamples")
	b.ReportMetric(float64(size)/float64(samples), "B/sample")
}

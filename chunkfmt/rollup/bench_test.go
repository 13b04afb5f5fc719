package rollup

import "testing"

// year of a counter's samples.
func year() *Samples {
	s := &Samples{}
	for i := range int64(365 * 24 * 60 * 4) {
		s.T, s.V = append(s.T, i*15000+7), append(s.V, float64(i%1000000))
	}
	return s
}

func BenchmarkSummarise(b *testing.B) {
	s := year()
	var summariser Summariser
	var short, long Windows
	b.ReportAllocs()
	for b.Loop() {
		short.Clear()
		long.Clear()
		summariser.Summarise(&short, s, Short)
		Widen(&long, &short, Long)
	}
	b.ReportMetric(float64(b.N)*float64(len(s.T))/b.Elapsed().Seconds()/1e6, "Msamples/s")
}

func BenchmarkEvaluate(b *testing.B) {
	var summariser Summariser
	var w Windows
	summariser.Summarise(&w, year(), Long)
	for _, bb := range []struct {
		name string
		q    Query
	}{
		{"rate1h", Query{Function: "rate", Range: Long, Step: Long}},
		{"rate1h15s", Query{Function: "rate", Range: Long + 15000, Step: Long}},
		{"rate1d", Query{Function: "rate", Range: 24 * Long, Step: Long}},
		{"instant", Query{Range: Short, Step: Long}},
		{"max1h", Query{Function: "max_over_time", Range: Long, Step: Long}},
		{"max1d", Query{Function: "max_over_time", Range: 24 * Long, Step: Long}},
		{"avg1h", Query{Function: "avg_over_time", Range: Long, Step: Long}},
		{"avg1d", Query{Function: "avg_over_time", Range: 24 * Long, Step: Long}},
		{"stddev1h", Query{Function: "stddev_over_time", Range: Long, Step: Long}},
		{"stddev1d", Query{Function: "stddev_over_time", Range: 24 * Long, Step: Long}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			q := bb.q
			q.Start, q.Steps = 24*Long, 364*24
			e, ok := NewEvaluator(q, Long)
			if !ok {
				b.Fatal("not covered")
			}
			var out Result
			b.ReportAllocs()
			for b.Loop() {
				e.Eval(&w, &out)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(w.Len()), "ns/window")
		})
	}
}

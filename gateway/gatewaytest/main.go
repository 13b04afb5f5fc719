package gatewaytest

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// Main is a TestMain that finds goroutines left over. It also writes and reads a
// block: the compressors that are made on first use would otherwise belong to
// the first bubble (package testing/synctest), and no other test could use them.
func Main(m *testing.M) {
	var b bytes.Buffer
	w := chunkfmt.NewWriter(&b, chunkfmt.WriterOptions{})
	for i := range 100 { // as many as are worth compressing
		if err := w.Add("tenant", &chunkfmt.Series{
			Labels: labels.FromStrings("__name__", fmt.Sprintf("metric_%03d", i)),
			Floats: chunkfmt.Floats{T: []int64{1}, V: []float64{1}},
		}); err != nil {
			panic(err)
		}
	}
	sum, err := w.Close()
	if err != nil {
		panic(err)
	}
	at := func(l chunkfmt.Location) []byte { return b.Bytes()[l.Offset : l.Offset+l.Size] }
	d, err := chunkfmt.ParseDirectory(at(sum.Tenants[0].Directory))
	if err != nil {
		panic(err)
	}
	for _, p := range d.Pages(nil, 0, 1) {
		if _, err := chunkfmt.ParseSeriesPage(at(p.Location)); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

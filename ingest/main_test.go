package ingest

import (
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"go.uber.org/goleak"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

func TestMain(m *testing.M) {
	// chunkfmt makes its compressor with the first block, and it has channels: it
	// must not belong to the time bubble of one of the tests.
	w := chunkfmt.NewWriter(io.Discard, chunkfmt.WriterOptions{})
	for i := range 100 {
		s := chunkfmt.Series{Labels: labels.FromStrings(model.MetricNameLabel, fmt.Sprintf("m%03d", i)), Floats: chunkfmt.Floats{T: []int64{1}, V: []float64{1}}}
		if err := w.Add("a", &s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if _, err := w.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

package chunkfmt

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
)

// TestManyLabels: a block that ends when it is full can be read, however much text the
// labels of a tenant have.
func TestManyLabels(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	r := rand.NewChaCha8([32]byte{1})
	texts := make([]string, 80_000) // of 1 KiB, which can't be packed much
	for i := range texts {
		b := make([]byte, 768)
		_, _ = r.Read(b) // it never fails
		texts[i] = base64.StdEncoding.EncodeToString(b)
	}
	slices.Sort(texts)
	for name, of := range map[string]func(i int) labels.Labels{
		"metrics": func(i int) labels.Labels { return labels.FromStrings(model.MetricNameLabel, texts[i]) },
		"values":  func(i int) labels.Labels { return labels.FromStrings(model.MetricNameLabel, "m", "l", texts[i]) },
		"names": func(i int) labels.Labels {
			return labels.FromStrings(model.MetricNameLabel, fmt.Sprintf("m%06d", i), fmt.Sprintf("l%06d", i), texts[i])
		},
	} {
		t.Run(name, func(t *testing.T) {
			var buf *bytes.Buffer
			var w *Writer
			series := 0
			end := func() {
				sum, err := w.Close()
				if err != nil {
					t.Fatal(err)
				}
				at := sum.Tenants[0].Directory
				d, err := ParseDirectory(buf.Bytes()[at.Offset:at.End()])
				if err != nil {
					t.Fatal(err)
				}
				p, err := ParseLabelPage(buf.Bytes()[d.Labels.Offset:d.Labels.End()])
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range p.Names() {
					if v, at := p.Values(name); v == nil {
						if _, err := p.ParseValues(buf.Bytes()[at.Offset:at.End()]); err != nil {
							t.Fatal(err)
						}
					}
				}
				series += int(d.Series) //nolint:gosec // few
				w = nil
			}
			for i := range texts {
				if w != nil && w.Full(512<<20) {
					end()
				}
				if w == nil {
					buf = &bytes.Buffer{}
					w = NewWriter(buf, WriterOptions{})
				}
				if err := w.Add("t", &Series{Labels: of(i), Floats: Floats{T: []int64{1}, V: []float64{1}}}); err != nil {
					t.Fatal(err)
				}
			}
			end()
			if series != len(texts) {
				t.Errorf("%d series", series)
			}
		})
	}
}

package tail

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/record"
)

// Batch is one decoded record. All that it holds is valid until the next call of
// the reader that returned it.
type Batch struct {
	Type     record.Type
	From, To Position // the end of the record before, and of this one; in one file

	// Of these, the one that Type names is filled.
	Series          []record.RefSeries
	Samples         []record.RefSample
	Histograms      []record.RefHistogramSample
	FloatHistograms []record.RefFloatHistogramSample
	Exemplars       []record.RefExemplar
	Metadata        []record.RefMetadata
}

var errUnknownType = errors.New("unknown record type")

// decoder turns records into batches, reusing one batch.
type decoder struct {
	dec        record.Decoder
	b          Batch
	seriesOnly bool
}

func newDecoder(logger *slog.Logger) *decoder {
	return &decoder{dec: record.NewDecoder(labels.NewSymbolTable(), logger)}
}

// decode decodes rec. It returns nil without an error for records that carry
// nothing for us, errUnknownType for those that this version doesn't know.
func (d *decoder) decode(rec []byte) (b *Batch, err error) {
	defer func() {
		// Prometheus's decoder makes slices of lengths that it reads from the
		// record before it has looked at what is left of it.
		if r := recover(); r != nil {
			b, err = nil, fmt.Errorf("decode record of type %v: %v", d.b.Type, r)
		}
	}()
	b = &d.b
	b.Series, b.Samples, b.Exemplars, b.Metadata = b.Series[:0], b.Samples[:0], b.Exemplars[:0], b.Metadata[:0]
	// What a histogram slice points to must not be kept alive by its capacity.
	clear(b.Histograms)
	clear(b.FloatHistograms)
	b.Histograms, b.FloatHistograms = b.Histograms[:0], b.FloatHistograms[:0]

	b.Type = d.dec.Type(rec)
	if d.seriesOnly && b.Type != record.Series && b.Type != record.Unknown {
		return nil, nil
	}
	switch b.Type {
	case record.Series:
		b.Series, err = keep(d.dec.Series(rec, b.Series))
	case record.Samples, record.SamplesV2:
		b.Samples, err = keep(d.dec.Samples(rec, b.Samples))
	case record.HistogramSamples, record.CustomBucketsHistogramSamples, record.HistogramSamplesV2:
		b.Histograms, err = keep(d.dec.HistogramSamples(rec, b.Histograms))
	case record.FloatHistogramSamples, record.CustomBucketsFloatHistogramSamples, record.FloatHistogramSamplesV2:
		b.FloatHistograms, err = keep(d.dec.FloatHistogramSamples(rec, b.FloatHistograms))
	case record.Exemplars:
		b.Exemplars, err = keep(d.dec.Exemplars(rec, b.Exemplars))
	case record.Metadata:
		b.Metadata, err = keep(d.dec.Metadata(rec, b.Metadata))
	case record.Tombstones, record.MmapMarkers, record.MinValidTime:
		return nil, nil
	default:
		var t byte
		if len(rec) > 0 {
			t = rec[0]
		}
		return nil, fmt.Errorf("%w %d", errUnknownType, t)
	}
	if err != nil {
		return nil, fmt.Errorf("decode record of type %v: %w", b.Type, err)
	}
	return b, nil
}

// keep is there because Prometheus's decoder returns nil with an error, which
// would lose the buffer.
func keep[T any](s []T, err error) ([]T, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

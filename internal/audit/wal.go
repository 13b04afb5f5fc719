package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/tsdb/record"
	"github.com/prometheus/prometheus/tsdb/wlog"
)

// walSource reads the WAL of a data directory as it was logged: Prometheus logs
// samples before its head looks at them, and may then reject some.
type walSource struct {
	dir      string
	external labels.Labels
}

// NewWAL reads the WAL in the data directory dir. The external labels are added
// as NewDir does it. A series comes in as many pieces as it has samples that
// don't ascend in time.
func NewWAL(dir string, external labels.Labels) Source { return &walSource{dir, external} }

func (*walSource) Close() error { return nil }

func (s *walSource) Read(ctx context.Context, mint, maxt int64, fn func(labels.Labels, chunkenc.Iterator) error) error {
	dec := record.NewDecoder(labels.NewSymbolTable(), slog.New(slog.DiscardHandler))
	series := map[chunks.HeadSeriesRef]labels.Labels{}
	found := map[chunks.HeadSeriesRef][]chunks.Sample{}
	add := func(ref chunks.HeadSeriesRef, one walSample) {
		if one.s.t >= mint && one.s.t <= maxt {
			found[ref] = append(found[ref], one)
		}
	}
	b := labels.NewBuilder(labels.EmptyLabels())
	read := func(dir string) error {
		sr, err := wlog.NewSegmentsReader(dir)
		if err != nil {
			return err
		}
		defer sr.Close()
		r := wlog.NewReader(sr)
		for r.Next() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			rec := r.Record()
			switch dec.Type(rec) {
			case record.Series:
				refs, err := dec.Series(rec, nil)
				if err != nil {
					return err
				}
				for _, x := range refs {
					b.Reset(x.Labels)
					s.external.Range(func(l labels.Label) {
						if !x.Labels.Has(l.Name) {
							b.Set(l.Name, l.Value)
						}
					})
					series[x.Ref] = b.Labels()
				}
			case record.Samples, record.SamplesV2:
				xs, err := dec.Samples(rec, nil)
				if err != nil {
					return err
				}
				for _, x := range xs {
					add(x.Ref, walSample{sample{t: x.T, v: x.V}})
				}
			case record.HistogramSamples, record.CustomBucketsHistogramSamples, record.HistogramSamplesV2:
				xs, err := dec.HistogramSamples(rec, nil)
				if err != nil {
					return err
				}
				for _, x := range xs {
					add(x.Ref, walSample{sample{t: x.T, h: x.H}})
				}
			case record.FloatHistogramSamples, record.CustomBucketsFloatHistogramSamples, record.FloatHistogramSamplesV2:
				xs, err := dec.FloatHistogramSamples(rec, nil)
				if err != nil {
					return err
				}
				for _, x := range xs {
					add(x.Ref, walSample{sample{t: x.T, fh: x.FH}})
				}
			}
		}
		// The end of a WAL in use may be torn.
		if err := r.Err(); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			if _, corrupt := errors.AsType[*wlog.CorruptionErr](err); !corrupt {
				return err
			}
		}
		return nil
	}
	wal := filepath.Join(s.dir, "wal")
	checkpoint, _, err := wlog.LastCheckpoint(wal)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return fmt.Errorf("%s: %w", wal, err)
	}
	dirs := []string{wal}
	if checkpoint != "" {
		dirs = slices.Insert(dirs, 0, checkpoint)
	}
	for _, d := range dirs {
		if err := read(d); err != nil {
			return fmt.Errorf("%s: %w", d, err)
		}
	}
	for ref, all := range found {
		// Pieces that ascend.
		for from := 0; from < len(all); {
			to := from + 1
			for to < len(all) && all[to].T() > all[to-1].T() {
				to++
			}
			one := storage.NewListSeries(series[ref], all[from:to])
			if err := fn(series[ref], one.Iterator(nil)); err != nil {
				return err
			}
			from = to
		}
	}
	return nil
}

// walSample is a chunks.Sample.
type walSample struct{ s sample }

func (w walSample) T() int64                      { return w.s.t }
func (walSample) ST() int64                       { return 0 }
func (w walSample) F() float64                    { return w.s.v }
func (w walSample) H() *histogram.Histogram       { return w.s.h }
func (w walSample) FH() *histogram.FloatHistogram { return w.s.fh }
func (w walSample) Copy() chunks.Sample           { return w }

func (w walSample) Type() chunkenc.ValueType {
	switch {
	case w.s.h != nil:
		return chunkenc.ValHistogram
	case w.s.fh != nil:
		return chunkenc.ValFloatHistogram
	}
	return chunkenc.ValFloat
}

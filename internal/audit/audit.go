// Package audit compares what a Prometheus holds with what a gateway returns,
// sample by sample: floats bit for bit, native histograms by their content,
// timestamps exactly. It is how a user, and a test, gets proof that nothing was
// lost and nothing was made up.
//
// Both sides are read in windows of time, so that memory is bounded by what one
// window of one side takes.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"time"

	config_util "github.com/prometheus/common/config"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/storage/remote"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
)

// Source gives all series with their samples in [mint, maxt] (ms since the
// epoch). A series may come in several pieces.
type Source interface {
	Read(ctx context.Context, mint, maxt int64, fn func(labels.Labels, chunkenc.Iterator) error) error
	Close() error
}

// remoteSource reads a Prometheus API by remote read, which gives samples as
// they are stored.
type remoteSource struct{ client remote.ReadClient }

// NewRemote reads the server at base, such as http://localhost:9090. Headers are
// added to each request.
func NewRemote(base string, headers map[string]string) (Source, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("%q is not a URL such as http://localhost:9090", base)
	}
	c, err := remote.NewReadClient("audit", &remote.ClientConfig{
		URL: &config_util.URL{URL: u.JoinPath("api/v1/read")}, Timeout: model.Duration(5 * time.Minute),
		HTTPClientConfig: config_util.DefaultHTTPClientConfig, ChunkedReadLimit: 256 << 20, Headers: headers,
	})
	if err != nil {
		return nil, fmt.Errorf("client for %s: %w", base, err)
	}
	return &remoteSource{c}, nil
}

func (s *remoteSource) Close() error { return nil }

func (s *remoteSource) Read(ctx context.Context, mint, maxt int64, fn func(labels.Labels, chunkenc.Iterator) error) error {
	set, err := s.client.Read(ctx, &prompb.Query{
		StartTimestampMs: mint, EndTimestampMs: maxt,
		Matchers: []*prompb.LabelMatcher{{Type: prompb.LabelMatcher_RE, Name: model.MetricNameLabel, Value: ".+"}},
		Hints:    &prompb.ReadHints{StartMs: mint, EndMs: maxt},
	}, false)
	if err != nil {
		return err
	}
	return each(set, fn)
}

func each(set storage.SeriesSet, fn func(labels.Labels, chunkenc.Iterator) error) error {
	var it chunkenc.Iterator
	for set.Next() {
		s := set.At()
		it = s.Iterator(it)
		if err := fn(s.Labels(), it); err != nil {
			return err
		}
		if err := it.Err(); err != nil {
			return fmt.Errorf("series %s: %w", s.Labels(), err)
		}
	}
	if ws := set.Warnings(); len(ws) > 0 {
		return fmt.Errorf("incomplete answer: %w", ws.AsErrors()[0])
	}
	return set.Err()
}

// dirSource reads a data directory of Prometheus, of which it changes nothing.
type dirSource struct {
	dir      string
	external labels.Labels
}

// NewDir reads the blocks and the WAL in dir. The external labels are added to
// series that haven't got them, as Prometheus does when it sends samples.
func NewDir(dir string, external labels.Labels) (Source, error) {
	s := &dirSource{dir, external}
	db, err := tsdb.OpenDBReadOnly(dir, "", slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return s, db.Close()
}

func (*dirSource) Close() error { return nil }

func (s *dirSource) Read(ctx context.Context, mint, maxt int64, fn func(labels.Labels, chunkenc.Iterator) (err error)) (err error) {
	db, err := tsdb.OpenDBReadOnly(s.dir, "", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	q, err := db.Querier(mint, maxt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	set := q.Select(ctx, false, nil, labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, ".+"))
	b := labels.NewBuilder(labels.EmptyLabels())
	return each(set, func(ls labels.Labels, it chunkenc.Iterator) error {
		b.Reset(ls)
		s.external.Range(func(l labels.Label) {
			if !ls.Has(l.Name) {
				b.Set(l.Name, l.Value)
			}
		})
		return fn(b.Labels(), it)
	})
}

// sample is one sample of any kind.
type sample struct {
	t  int64
	v  float64
	h  *histogram.Histogram
	fh *histogram.FloatHistogram
}

func (s sample) String() string {
	switch {
	case s.h != nil:
		return s.h.String()
	case s.fh != nil:
		return s.fh.String()
	case value.IsStaleNaN(s.v):
		return "staleness marker"
	}
	return fmt.Sprintf("%v (%#x)", s.v, math.Float64bits(s.v))
}

// stale says whether the sample is a staleness marker.
func (s *sample) stale() bool {
	switch {
	case s.h != nil:
		return value.IsStaleNaN(s.h.Sum)
	case s.fh != nil:
		return value.IsStaleNaN(s.fh.Sum)
	}
	return value.IsStaleNaN(s.v)
}

// equal compares what samples say. A staleness marker is one whatever its kind:
// Prometheus logs that of a histogram as a float, and makes a histogram of it in
// its head. Histograms are compared without empty buckets and spans, which
// depend on where a chunk was cut.
func equal(a, b *sample) bool {
	switch {
	case a.stale() || b.stale():
		return a.stale() && b.stale()
	case a.h != nil && b.h != nil:
		return a.h.Copy().Compact(0).Equals(b.h.Copy().Compact(0))
	case a.fh != nil && b.fh != nil:
		return a.fh.Copy().Compact(0).Equals(b.fh.Copy().Compact(0))
	case a.h != nil || a.fh != nil || b.h != nil || b.fh != nil:
		return false
	}
	return math.Float64bits(a.v) == math.Float64bits(b.v)
}

func read(it chunkenc.Iterator, to []sample) []sample {
	for {
		s := sample{}
		switch it.Next() {
		case chunkenc.ValNone:
			return to
		case chunkenc.ValFloat:
			s.t, s.v = it.At()
		case chunkenc.ValHistogram:
			s.t, s.h = it.AtHistogram(nil)
		case chunkenc.ValFloatHistogram:
			s.t, s.fh = it.AtFloatHistogram(nil)
		}
		to = append(to, s)
	}
}

// Options of Run.
type Options struct {
	MinT, MaxT int64         // ms since the epoch, inclusive
	Window     time.Duration // read at once; 30 minutes by default
	// Logged gives what Prometheus's WAL holds: samples that are in it, but not
	// in its head, were rejected there after they had been logged. nil: unknown.
	Logged Source
	// Report is called for each difference, up to MaxReports (20 by default).
	Report     func(Difference)
	MaxReports int
	// Progress is called after each window.
	Progress func(done float64, r Result)
}

// Kind of a difference.
type Kind string

// The kinds of differences.
const (
	Missing   Kind = "missing"   // in Prometheus, not at the gateway
	Extra     Kind = "extra"     // at the gateway, not in Prometheus
	Different Kind = "different" // another value
	Rejected  Kind = "rejected"  // extra, but logged by Prometheus before its head rejected it
)

// Difference is one sample that differs.
type Difference struct {
	Kind       Kind
	Labels     labels.Labels
	T          int64 // ms since the epoch
	Want, Have string
}

func (d Difference) String() string {
	at := time.UnixMilli(d.T).UTC().Format("2006-01-02T15:04:05.000Z")
	switch d.Kind {
	case Missing:
		return fmt.Sprintf("missing    %s @ %s: %s", d.Labels, at, d.Want)
	case Different:
		return fmt.Sprintf("different  %s @ %s: Prometheus has %s, the gateway %s", d.Labels, at, d.Want, d.Have)
	}
	return fmt.Sprintf("%-10s %s @ %s: %s", d.Kind, d.Labels, at, d.Have)
}

// Result counts samples.
type Result struct {
	Series                                        int // of the window with the most
	Compared, Missing, Extra, Different, Rejected uint64
}

// OK says that nothing is missing, extra or different.
func (r Result) OK() bool { return r.Missing == 0 && r.Extra == 0 && r.Different == 0 }

// Run compares.
func Run(ctx context.Context, prom, gateway Source, o Options) (Result, error) {
	if o.Window <= 0 {
		o.Window = 30 * time.Minute
	}
	if o.MaxReports == 0 {
		o.MaxReports = 20
	}
	var r Result
	reported := 0
	report := func(k Kind, ls labels.Labels, want, have *sample) {
		d := Difference{Kind: k, Labels: ls}
		if want != nil {
			d.T, d.Want = want.t, want.String()
		}
		if have != nil {
			d.T, d.Have = have.t, have.String()
		}
		if reported < o.MaxReports && o.Report != nil {
			o.Report(d)
		}
		reported++
	}
	width := o.Window.Milliseconds()
	for mint := o.MinT; mint <= o.MaxT; mint += width {
		maxt := min(mint+width-1, o.MaxT)
		want, err := load(ctx, prom, mint, maxt)
		if err != nil {
			return r, fmt.Errorf("read Prometheus: %w", err)
		}
		have, err := load(ctx, gateway, mint, maxt)
		if err != nil {
			return r, fmt.Errorf("read gateway: %w", err)
		}
		r.Series = max(r.Series, len(want), len(have))
		var extras []extra
		for key, w := range want {
			h := have[key]
			delete(have, key)
			compare(w, h, &r, report, &extras)
		}
		for _, h := range have {
			compare(&series{labels: h.labels}, h, &r, report, &extras)
		}
		if err := classify(ctx, extras, o.Logged, mint, maxt, &r, report); err != nil {
			return r, err
		}
		if o.Progress != nil {
			o.Progress(float64(maxt-o.MinT+1)/float64(o.MaxT-o.MinT+1), r)
		}
	}
	return r, nil
}

type series struct {
	labels  labels.Labels
	samples []sample
}

type extra struct {
	labels labels.Labels
	sample sample
}

func load(ctx context.Context, s Source, mint, maxt int64) (map[string]*series, error) {
	out := map[string]*series{}
	err := s.Read(ctx, mint, maxt, func(ls labels.Labels, it chunkenc.Iterator) error {
		key := string(ls.Bytes(nil))
		one := out[key]
		if one == nil {
			one = &series{labels: ls.Copy()}
			out[key] = one
		}
		before := len(one.samples)
		one.samples = read(it, one.samples)
		for i := max(before, 1); i < len(one.samples); i++ {
			if one.samples[i].t <= one.samples[i-1].t {
				return fmt.Errorf("series %s: sample at %d after %d", ls, one.samples[i].t, one.samples[i-1].t)
			}
		}
		if len(one.samples) == 0 {
			delete(out, key)
		}
		return nil
	})
	return out, err
}

func compare(want, have *series, r *Result, report func(Kind, labels.Labels, *sample, *sample), extras *[]extra) {
	ws := want.samples
	var hs []sample
	if have != nil {
		hs = have.samples
	}
	for len(ws) > 0 || len(hs) > 0 {
		switch {
		case len(hs) == 0 || len(ws) > 0 && ws[0].t < hs[0].t:
			r.Missing++
			report(Missing, want.labels, &ws[0], nil)
			ws = ws[1:]
		case len(ws) == 0 || hs[0].t < ws[0].t:
			*extras = append(*extras, extra{want.labels, hs[0]})
			hs = hs[1:]
		default:
			r.Compared++
			if !equal(&ws[0], &hs[0]) {
				r.Different++
				report(Different, want.labels, &ws[0], &hs[0])
			}
			ws, hs = ws[1:], hs[1:]
		}
	}
}

// classify tells extra samples that Prometheus logged from those that it never
// had.
func classify(ctx context.Context, extras []extra, logged Source, mint, maxt int64, r *Result, report func(Kind, labels.Labels, *sample, *sample)) error {
	if len(extras) == 0 {
		return nil
	}
	wal := map[string]map[int64][]sample{}
	if logged != nil {
		err := logged.Read(ctx, mint, maxt, func(ls labels.Labels, it chunkenc.Iterator) error {
			key := string(ls.Bytes(nil))
			if wal[key] == nil {
				wal[key] = map[int64][]sample{}
			}
			for _, s := range read(it, nil) {
				wal[key][s.t] = append(wal[key][s.t], s)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read WAL: %w", err)
		}
	}
	for i := range extras {
		e := &extras[i]
		kind := Extra
		for _, s := range wal[string(e.labels.Bytes(nil))][e.sample.t] {
			if equal(&s, &e.sample) {
				kind = Rejected
			}
		}
		if kind == Rejected {
			r.Rejected++
		} else {
			r.Extra++
		}
		report(kind, e.labels, nil, &e.sample)
	}
	return nil
}

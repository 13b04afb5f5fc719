package history

import (
	"cmp"
	"context"
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt"
)

// labelReadRuns keeps label names, label values and series at three GETs per
// block, if it isn't too large: directory, label page, series pages.
const labelReadRuns = 1

// Series returns the labels of the series that match all of ms and have samples, or
// summaries, in mint to maxt, both included, sorted, each once. It reads no samples.
func (s *Snapshot) Series(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) ([]labels.Labels, error) {
	var out []labels.Labels
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		fs, err := s.find(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll)
		if err != nil {
			return err
		}
		var set labelSets
		for _, f := range fs {
			for i := range f.entries {
				if len(f.entries[i].Chunks)+len(f.entries[i].Gone) > 0 {
					set.add(f.entries[i].Labels)
				}
			}
		}
		out = set.sorted()
		return nil
	})
	return out, err
}

// labelSets collects label sets, each once. The zero value is ready.
type labelSets struct {
	at  map[string]int
	all []labels.Labels
	buf []byte
}

// add returns the index of the label set in all, and whether it is new.
func (l *labelSets) add(ls labels.Labels) (i int, added bool) {
	l.buf = ls.Bytes(l.buf)
	i, ok := l.at[string(l.buf)]
	if ok {
		return i, false
	}
	if l.at == nil {
		l.at = map[string]int{}
	}
	i = len(l.all)
	l.at[string(l.buf)] = i
	l.all = append(l.all, ls)
	return i, true
}

func (l *labelSets) sorted() []labels.Labels {
	slices.SortFunc(l.all, labels.Compare)
	return l.all
}

// LabelNames returns the names of the labels of the series that match all of ms,
// sorted; with no matchers, of all series in blocks of that time.
func (s *Snapshot) LabelNames(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) ([]string, error) {
	var out []string
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		set := map[string]struct{}{}
		if len(ms) > 0 {
			fs, err := s.find(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll)
			if err != nil {
				return err
			}
			for _, f := range fs {
				for i := range f.entries {
					f.entries[i].Labels.Range(func(l labels.Label) { set[l.Name] = struct{}{} })
				}
			}
			out = sortedKeys(set)
			return nil
		}
		lps, err := s.allLabelPages(ctx, bs)
		if err != nil {
			return err
		}
		for _, lp := range lps {
			if lp == nil {
				continue
			}
			for _, name := range lp.Names() {
				set[name] = struct{}{}
			}
		}
		out = sortedKeys(set)
		return nil
	})
	return out, err
}

// LabelValues returns the values of a label among the series that match all of
// ms, sorted; with no matchers, among all series in blocks of that time.
func (s *Snapshot) LabelValues(ctx context.Context, name string, ms []*labels.Matcher, mint, maxt int64) ([]string, error) {
	var out []string
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		set := map[string]struct{}{}
		metric, byPages := onlyMetric(ms)
		if !byPages {
			fs, err := s.find(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll)
			if err != nil {
				return err
			}
			for _, f := range fs {
				for i := range f.entries {
					if v := f.entries[i].Labels.Get(name); v != "" {
						set[v] = struct{}{}
					}
				}
			}
			out = sortedKeys(set)
			return nil
		}
		values, err := s.allLabelValues(ctx, bs, name)
		if err != nil {
			return err
		}
		for _, v := range values {
			vs := v.Values()
			switch {
			case metric == "":
			case name != model.MetricNameLabel:
				vs = v.Of(metric)
			default: // the list of metrics itself
				i, ok := slices.BinarySearch(vs, metric)
				vs = vs[:0:0]
				if ok {
					vs = v.Values()[i : i+1]
				}
			}
			for _, value := range vs {
				set[value] = struct{}{}
			}
		}
		out = sortedKeys(set)
		return nil
	})
	return out, err
}

// onlyMetric says whether label pages can answer for the matchers: there are
// none, or just one that names a metric.
func onlyMetric(ms []*labels.Matcher) (metric string, ok bool) {
	switch {
	case len(ms) == 0:
		return "", true
	case len(ms) == 1 && ms[0].Name == model.MetricNameLabel && ms[0].Type == labels.MatchEqual && ms[0].Value != "":
		return ms[0].Value, true
	default:
		return "", false
	}
}

// allLabelPages gives a label page for each block: its own, or that of its only
// series page; nil if it has none, which only an empty block does.
func (s *Snapshot) allLabelPages(ctx context.Context, bs []*Block) ([]*chunkfmt.LabelPage, error) {
	dirs, err := s.directories(ctx, bs)
	if err != nil {
		return nil, err
	}
	lps, err := s.labelPages(ctx, bs, dirs, func(int) bool { return true })
	if err != nil {
		return nil, err
	}
	var wants []want
	var of []int
	for i, b := range bs {
		if lps[i] != nil {
			continue
		}
		for _, r := range dirs[i].Pages(nil, b.Ranges[0].MinT, b.Ranges[len(b.Ranges)-1].MaxT) { // one at most
			w, err := b.want(seriesPage, r.Location)
			if err != nil {
				return nil, err
			}
			w.bytes = r.Bytes
			wants, of = append(wants, w), append(of, i)
		}
	}
	pages, err := s.fetch(ctx, labelReadRuns, wants)
	if err != nil {
		return nil, err
	}
	for j, i := range of {
		lps[i] = pages[j].series.LabelPage()
	}
	return lps, nil
}

// allLabelValues gives what each block knows of a label's values.
func (s *Snapshot) allLabelValues(ctx context.Context, bs []*Block, name string) ([]*chunkfmt.LabelValues, error) {
	lps, err := s.allLabelPages(ctx, bs)
	if err != nil {
		return nil, err
	}
	var out []*chunkfmt.LabelValues
	var wants []want
	for i, lp := range lps {
		if lp == nil {
			continue
		}
		values, at := lp.Values(name)
		switch {
		case values != nil:
			out = append(out, values)
		case at.Size > 0: // in pages of their own
			w, err := bs[i].want(labelValuesPage, at)
			if err != nil {
				return nil, err
			}
			w.labels = lp
			wants = append(wants, w)
		}
	}
	pages, err := s.fetch(ctx, 0, wants)
	if err != nil {
		return nil, err
	}
	for i := range pages {
		out = append(out, pages[i].values)
	}
	return out, nil
}

func sortedKeys(set map[string]struct{}) []string {
	out := make([]string, 0, len(set))
	for k := range set {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// MetricMetadata is what a source said of a metric.
type MetricMetadata struct {
	Metric string
	metadata.Metadata
}

// Metadata returns what the series in mint to maxt say of a metric, or of all if
// metric is empty, sorted, each once. It reads series pages. Metric is the name
// of the metric family: "x" for what series of x_bucket say.
func (s *Snapshot) Metadata(ctx context.Context, metric string, mint, maxt int64) ([]MetricMetadata, error) {
	var ms []*labels.Matcher
	if metric != "" {
		ms = []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, familyMembers(metric))}
	}
	var out []MetricMetadata
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		fs, err := s.find(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll)
		if err != nil {
			return err
		}
		set := map[MetricMetadata]struct{}{}
		for _, f := range fs {
			for i := range f.entries {
				e := &f.entries[i]
				if e.Metadata.IsEmpty() {
					continue
				}
				m := MetricMetadata{e.Family, e.Metadata}
				if m.Metric == "" {
					m.Metric = e.Labels.Get(model.MetricNameLabel)
				}
				if metric == "" || m.Metric == metric {
					set[m] = struct{}{}
				}
			}
		}
		out = make([]MetricMetadata, 0, len(set))
		for m := range set {
			out = append(out, m)
		}
		slices.SortFunc(out, func(a, b MetricMetadata) int {
			return cmp.Or(cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Type, b.Type), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Help, b.Help))
		})
		return nil
	})
	return out, err
}

// familyMembers is a pattern of the names that metrics of a family have. A
// family may be named as its counter is, or without _total.
func familyMembers(family string) string {
	base := strings.TrimSuffix(strings.TrimSuffix(family, "_total"), "_info")
	return regexp.QuoteMeta(family) + "|" + regexp.QuoteMeta(base) + "(|_bucket|_sum|_count|_gsum|_gcount|_total|_info)"
}

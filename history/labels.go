package history

import (
	"cmp"
	"context"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

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
		held := tally{s: s}
		defer held.release()
		var set labelSets
		err := s.entries(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll, func(_ int, es []chunkfmt.Entry) {
			bytes := int64(0)
			for i := range es {
				if len(es[i].Chunks)+len(es[i].Gone) == 0 {
					continue
				}
				if _, added := set.add(es[i].Labels); added {
					bytes += textBytes + 2*int64(es[i].Labels.ByteSize()) //nolint:gosec // bytes in memory
				}
			}
			held.add(bytes)
		})
		out = set.sorted()
		return err
	})
	return out, err
}

// labelSets collects label sets, each once. The zero value is ready.
type labelSets struct {
	at   map[uint64]int // by hash: the last one that was added
	next []int          // of the same hash, -1 for none
	all  []labels.Labels
}

// newLabelSets has room for so many.
func newLabelSets(n int) labelSets {
	return labelSets{at: make(map[uint64]int, n), next: make([]int, 0, n), all: make([]labels.Labels, 0, n)}
}

// add returns the index of the label set in all, and whether it is new.
func (l *labelSets) add(ls labels.Labels) (i int, added bool) {
	if l.at == nil {
		l.at = map[uint64]int{}
	}
	hash := ls.Hash()
	next, ok := l.at[hash]
	if !ok {
		next = -1
	}
	for i := next; i >= 0; i = l.next[i] {
		if labels.Equal(l.all[i], ls) {
			return i, false
		}
	}
	i = len(l.all)
	l.at[hash] = i
	l.next, l.all = append(l.next, next), append(l.all, ls)
	return i, true
}

func (l *labelSets) sorted() []labels.Labels {
	slices.SortFunc(l.all, labels.Compare)
	return l.all
}

// texts collects strings, each once, and holds them.
type texts struct {
	held tally
	set  map[string]struct{}
	more int64 // bytes that the tally wasn't told of yet
}

// textBytes is about what a string in a set, and in a slice, takes beside its text.
const textBytes = 80

func (t *texts) add(text string) {
	if _, ok := t.set[text]; !ok {
		t.set[strings.Clone(text)] = struct{}{} // it may be part of a larger one
		t.more += textBytes + int64(len(text))
	}
}

// tell tells the tally of what was added.
func (t *texts) tell() {
	t.held.add(t.more)
	t.more = 0
}

func (t *texts) sorted() []string {
	out := make([]string, 0, len(t.set))
	for k := range t.set {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// texts gives, sorted and each once, what read adds.
func (s *Snapshot) texts(ctx context.Context, mint, maxt int64, read func(bs []*Block, into *texts) error) ([]string, error) {
	var out []string
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		into := texts{held: tally{s: s}, set: map[string]struct{}{}}
		defer into.held.release()
		err := read(bs, &into)
		out = into.sorted()
		return err
	})
	return out, err
}

// LabelNames returns the names of the labels of the series that match all of ms,
// sorted; with no matchers, of all series in blocks of that time.
func (s *Snapshot) LabelNames(ctx context.Context, ms []*labels.Matcher, mint, maxt int64) ([]string, error) {
	return s.texts(ctx, mint, maxt, func(bs []*Block, into *texts) error {
		if len(ms) > 0 {
			return s.textsOf(ctx, bs, ms, mint, maxt, into, func(ls labels.Labels) {
				ls.Range(func(l labels.Label) { into.add(l.Name) })
			})
		}
		return s.labelPagesOfAll(ctx, bs, func(_ []*Block, lps []*chunkfmt.LabelPage) error {
			for _, lp := range lps {
				for _, name := range lp.Names() {
					into.add(name)
				}
			}
			into.tell()
			return nil
		})
	})
}

// LabelValues returns the values of a label among the series that match all of
// ms, sorted; with no matchers, among all series in blocks of that time.
func (s *Snapshot) LabelValues(ctx context.Context, name string, ms []*labels.Matcher, mint, maxt int64) ([]string, error) {
	return s.texts(ctx, mint, maxt, func(bs []*Block, into *texts) error {
		metric, byPages := onlyMetric(ms)
		if !byPages {
			return s.textsOf(ctx, bs, ms, mint, maxt, into, func(ls labels.Labels) {
				if v := ls.Get(name); v != "" {
					into.add(v)
				}
			})
		}
		add := func(v *chunkfmt.LabelValues) {
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
				into.add(value)
			}
			into.tell()
		}
		return s.labelPagesOfAll(ctx, bs, func(bs []*Block, lps []*chunkfmt.LabelPage) error {
			var wants []want
			for i, lp := range lps {
				values, at := lp.Values(name)
				switch {
				case values != nil:
					add(values)
				case at.Size > 0: // in pages of their own
					w, err := bs[i].want(labelValuesPage, at)
					if err != nil {
						return err
					}
					w.labels = lp
					wants = append(wants, w)
				}
			}
			return s.inBatches(ctx, wants, func(_ int, pages []page) error {
				for i := range pages {
					add(pages[i].values)
				}
				return nil
			})
		})
	})
}

// textsOf calls add with the labels of the series that match all of ms.
func (s *Snapshot) textsOf(ctx context.Context, bs []*Block, ms []*labels.Matcher, mint, maxt int64, into *texts, add func(labels.Labels)) error {
	return s.entries(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll, func(_ int, es []chunkfmt.Entry) {
		for i := range es {
			add(es[i].Labels)
		}
		into.tell()
	})
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

// labelPagesOfAll calls read with label pages and the blocks that they are of, some at a
// time: of each block its own, or that of its only series page. An empty block has none.
func (s *Snapshot) labelPagesOfAll(ctx context.Context, bs []*Block, read func(bs []*Block, lps []*chunkfmt.LabelPage) error) error {
	held := tally{s: s}
	defer held.release()
	dirs, err := s.directories(ctx, bs, &held)
	if err != nil {
		return err
	}
	var wants []want
	var of []*Block
	for i, b := range bs {
		if at := dirs[i].Labels; at.Size > 0 {
			w, err := b.want(labelPage, at)
			if err != nil {
				return err
			}
			wants, of = append(wants, w), append(of, b)
			continue
		}
		for _, r := range dirs[i].Pages(nil, b.Ranges[0].MinT, b.Ranges[len(b.Ranges)-1].MaxT) { // one at most
			w, err := b.want(seriesPage, r.Location)
			if err != nil {
				return err
			}
			w.bytes = r.Bytes
			wants, of = append(wants, w), append(of, b)
		}
	}
	return s.inBatches(ctx, wants, func(from int, pages []page) error {
		lps := make([]*chunkfmt.LabelPage, len(pages))
		for i := range pages {
			if lps[i] = pages[i].labels; lps[i] == nil {
				lps[i] = pages[i].series.LabelPage()
			}
		}
		return read(of[from:from+len(pages)], lps)
	})
}

// inBatches fetches pages and calls read with some at a time, of about 64 MiB of memory, which
// it holds meanwhile, and with the index of the first.
func (s *Snapshot) inBatches(ctx context.Context, wants []want, read func(from int, pages []page) error) error {
	for from := 0; from < len(wants); {
		held := tally{s: s}
		to, memory := from, int64(0)
		for ; to < len(wants) && (to == from || memory+wants[to].memory() <= 2*s.h.batchBytes); to++ {
			memory += wants[to].memory()
		}
		held.add(memory)
		pages, err := s.fetch(ctx, labelReadRuns, wants[from:to])
		if err == nil {
			err = read(from, pages)
		}
		if err == nil && ctx.Err() != nil { // perhaps for what has been read
			err = context.Cause(ctx)
		}
		held.release()
		if err != nil {
			return err
		}
		from = to
	}
	return nil
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
		if !utf8.ValidString(metric) {
			return nil, nil // there is none, nor a pattern for it
		}
		ms = []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, model.MetricNameLabel, familyMembers(metric))}
	}
	var out []MetricMetadata
	err := s.attempt(ctx, mint, maxt, func(bs []*Block) error {
		held := tally{s: s}
		defer held.release()
		set := map[MetricMetadata]struct{}{}
		err := s.entries(ctx, bs, ms, mint, maxt, labelReadRuns, s.Hidden.OfAll, func(_ int, es []chunkfmt.Entry) {
			bytes := int64(0)
			for i := range es {
				e := &es[i]
				if e.Metadata.IsEmpty() {
					continue
				}
				m := MetricMetadata{e.Family, e.Metadata}
				if m.Metric == "" {
					m.Metric = e.Labels.Get(model.MetricNameLabel)
				}
				if metric != "" && m.Metric != metric {
					continue
				}
				if _, ok := set[m]; !ok {
					set[m] = struct{}{}
					bytes += textBytes + int64(len(m.Metric)+len(m.Unit)+len(m.Help))
				}
			}
			held.add(bytes)
		})
		out = make([]MetricMetadata, 0, len(set))
		for m := range set {
			out = append(out, m)
		}
		slices.SortFunc(out, func(a, b MetricMetadata) int {
			return cmp.Or(cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Type, b.Type), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Help, b.Help))
		})
		return err
	})
	return out, err
}

// familyMembers is a pattern of the names that metrics of a family have. A
// family may be named as its counter is, or without _total.
func familyMembers(family string) string {
	base := strings.TrimSuffix(strings.TrimSuffix(family, "_total"), "_info")
	return regexp.QuoteMeta(family) + "|" + regexp.QuoteMeta(base) + "(|_bucket|_sum|_count|_gsum|_gcount|_total|_info)"
}

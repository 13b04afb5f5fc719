package sidecar

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/metadata"
)

// families asks the running Prometheus what it knows of metrics: metadata is in
// its WAL only where it runs with the feature metadata-wal-records. What was
// sent of a metric family is remembered as a hash.
type families struct {
	url    string // of the Prometheus; nothing is asked if empty
	every  time.Duration
	client *http.Client
	logger *slog.Logger
	failed func()
	notify func()

	again chan struct{} // cap 1: to ask soon

	mu       sync.Mutex
	answered bool
	sent     map[uint64]uint64 // hash of a family's name → of its metadata
	news     []family          // of the last answer, not sent as they are
}

// family is a metric family as Prometheus's metadata API has it. A family may
// have several entries, of targets that disagree.
type family struct {
	name     string
	metadata []metadata.Metadata // sorted, at least one
}

const (
	// What is read of one answer: about 100,000 families.
	maxMetadataBytes = 16 << 20
	// As many entries of a family as ingesters keep, and texts that fit into a
	// batch.
	maxFamilyEntries    = 8
	maxFamilyEntryBytes = 64 << 10

	firstMetadataPause = time.Second
	metadataTimeout    = 30 * time.Second
)

func newFamilies(url string, every time.Duration) *families {
	return &families{url: url, every: every, again: make(chan struct{}, 1), sent: map[uint64]uint64{}}
}

// run asks at once, then ever less often, since targets are scraped and series
// announced by and by, until it is as often as it should be.
func (f *families) run(ctx context.Context) {
	if f.url == "" {
		return
	}
	failing := false
	next := min(firstMetadataPause, f.every)
	for ctx.Err() == nil {
		err := f.ask(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.failed()
			if !failing {
				f.logger.Warn("metadata of metrics can't be had from Prometheus, trying on", "err", err)
			}
		case failing:
			f.logger.Info("metadata of metrics can be had from Prometheus again")
		}
		failing = err != nil
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-f.again:
			// Not at once: a new session has to have announced series first.
			next = min(firstMetadataPause, f.every)
			sleep(ctx, next)
		case <-timer.C:
		}
		timer.Stop()
		next = min(2*next, f.every)
	}
}

// ask gets all metadata and keeps what differs from what was sent.
func (f *families) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(f.url, "/")+"/api/v1/metadata", nil)
	if err != nil {
		return fmt.Errorf("ask Prometheus for metadata: %w", err)
	}
	// The transport asks for gzip, and what is bounded is what comes out of it.
	resp, err := f.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask Prometheus for metadata: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask Prometheus for metadata: %s answered %s", req.URL, resp.Status)
	}
	f.mu.Lock()
	sent := maps.Clone(f.sent)
	f.mu.Unlock()
	var news []family
	seen := map[uint64]bool{}
	body := &io.LimitedReader{R: resp.Body, N: maxMetadataBytes}
	err = readMetadata(body, func(x family) {
		h := xxhash.Sum64String(x.name)
		seen[h] = true
		if sent[h] != x.hash() {
			news = append(news, x)
		}
	})
	if err != nil && body.N <= 0 {
		err = fmt.Errorf("more than %d bytes, the rest is left out", maxMetadataBytes)
	}
	f.mu.Lock()
	if err == nil {
		maps.DeleteFunc(f.sent, func(h, _ uint64) bool { return !seen[h] })
	}
	f.answered, f.news = true, news
	f.mu.Unlock()
	if len(news) > 0 {
		f.notify()
	}
	if err != nil {
		return fmt.Errorf("metadata that Prometheus answered: %w", err)
	}
	return nil
}

// readMetadata gives the families of an answer to fn, one by one.
func readMetadata(r io.Reader, fn func(family)) error {
	dec := json.NewDecoder(r)
	open := func() error {
		if t, err := dec.Token(); err != nil {
			return err
		} else if t != json.Delim('{') {
			return fmt.Errorf("%v where an object is expected", t)
		}
		return nil
	}
	if err := open(); err != nil {
		return err
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		if key != "data" {
			var skipped json.RawMessage
			if err := dec.Decode(&skipped); err != nil {
				return err
			}
			continue
		}
		if err := open(); err != nil {
			return err
		}
		for dec.More() {
			name, err := dec.Token()
			if err != nil {
				return err
			}
			var entries []struct {
				Type model.MetricType `json:"type"`
				Unit string           `json:"unit"`
				Help string           `json:"help"`
			}
			if err := dec.Decode(&entries); err != nil {
				return err
			}
			x := family{name: name.(string)} // the decoder has seen to it
			for _, e := range entries {
				m := metadata.Metadata{Type: e.Type, Unit: e.Unit, Help: e.Help}
				if !m.IsEmpty() && len(e.Type)+len(e.Unit)+len(e.Help) <= maxFamilyEntryBytes {
					x.metadata = append(x.metadata, m)
				}
			}
			slices.SortFunc(x.metadata, func(a, b metadata.Metadata) int {
				return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Help, b.Help))
			})
			if x.metadata = x.metadata[:min(len(x.metadata), maxFamilyEntries)]; len(x.metadata) > 0 && x.name != "" {
				fn(x)
			}
		}
		if _, err := dec.Token(); err != nil {
			return err
		}
		return nil
	}
	return errors.New("no data in it")
}

func (x *family) hash() uint64 {
	d := xxhash.New()
	for _, m := range x.metadata {
		for _, text := range []string{string(m.Type), m.Unit, m.Help} {
			_, _ = d.WriteString(text) // can't fail
			_, _ = d.Write([]byte{0xff})
		}
	}
	return d.Sum64()
}

// take returns what is to be sent. What is sent is told to done.
func (f *families) take() []family {
	f.mu.Lock()
	defer f.mu.Unlock()
	news := f.news
	f.news = nil
	return news
}

func (f *families) done(x *family) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent[xxhash.Sum64String(x.name)] = x.hash()
}

// forget makes all be sent again: an ingester that knew some of it is gone.
func (f *families) forget() {
	f.mu.Lock()
	clear(f.sent)
	f.mu.Unlock()
	select {
	case f.again <- struct{}{}:
	default:
	}
}

// knows says whether Prometheus tells by which name a metric's family goes.
func (f *families) knows() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.answered
}

// members returns the names that metrics of the family may have, as Prometheus's
// scraping has them (isSeriesPartOfFamily in scrape/scrape.go).
func (x *family) members() []string {
	names := []string{x.name}
	switch x.metadata[0].Type {
	case model.MetricTypeCounter:
		base := strings.TrimSuffix(x.name, "_total")
		names = []string{base, base + "_total"}
	case model.MetricTypeInfo:
		base := strings.TrimSuffix(x.name, "_info")
		names = []string{base, base + "_info"}
	case model.MetricTypeHistogram:
		names = append(names, x.name+"_bucket", x.name+"_sum", x.name+"_count")
	case model.MetricTypeGaugeHistogram:
		names = append(names, x.name+"_bucket", x.name+"_gsum", x.name+"_gcount")
	case model.MetricTypeSummary:
		names = append(names, x.name+"_sum", x.name+"_count")
	}
	return names
}

// familyOf returns the name of the family that a metric of that type belongs to,
// as far as the two tell: a counter x_total may be of a family x or x_total.
func familyOf(metric string, typ model.MetricType) string {
	var suffixes []string
	switch typ {
	case model.MetricTypeHistogram:
		suffixes = []string{"_bucket", "_sum", "_count"}
	case model.MetricTypeGaugeHistogram:
		suffixes = []string{"_bucket", "_gsum", "_gcount"}
	case model.MetricTypeSummary:
		suffixes = []string{"_sum", "_count"}
	}
	for _, suffix := range suffixes {
		if base, ok := strings.CutSuffix(metric, suffix); ok && base != "" {
			return base
		}
	}
	return metric
}

// nameHash is what a slot keeps of a metric's name.
func nameHash(metric string) uint32 { return uint32(xxhash.Sum64String(metric)) }

// describeWAL sends a metadata record of the WAL along with its series. Where
// only Prometheus knows the family's name it is left to sendFamilies.
func (s *shipper) describeWAL(ss *session, ref uint32, metric string, m metadata.Metadata) bool {
	switch {
	case m.Type == model.MetricTypeCounter && strings.HasSuffix(metric, "_total"),
		m.Type == model.MetricTypeInfo && strings.HasSuffix(metric, "_info"):
		if s.families.knows() {
			return false
		}
	}
	ss.describe(ref, familyOf(metric, m.Type), m)
	return true
}

// sendFamilies sends what Prometheus's API told, with one announced series of
// each metric of the family. A family without one stays news.
func (s *shipper) sendFamilies(ctx context.Context) {
	news := s.families.take()
	if len(news) == 0 {
		return
	}
	slots := map[uint32]uint32{} // of metrics asked for, by hash of their name
	for i := range news {
		for _, name := range news[i].members() {
			slots[nameHash(name)] = 0
		}
	}
	s.dict.all(func(i uint32, sl *slot) {
		if have, asked := slots[sl.name]; asked && have == 0 && s.listener(sl) != nil {
			slots[sl.name] = i
		}
	})
	n := 0
	for i := range news {
		found := false
		for _, name := range news[i].members() {
			slot := slots[nameHash(name)]
			if slot == 0 {
				continue
			}
			sl := s.dict.at(slot)
			ss := s.listener(sl) // the last flush may have cost it
			if ss == nil {
				continue
			}
			raw, err := s.dict.labels(slot)
			if err != nil {
				s.dictionaryTrouble(err)
				return
			}
			if raw.Get(model.MetricNameLabel) != name {
				continue
			}
			found, ss.told = true, true
			s.more = s.more[:0]
			for k := 1; k < s.opts.Replicas; k++ {
				p := s.dict.place(slot, k)
				if o := s.listening(p.session); o != nil {
					o.told = true
					s.more = append(s.more, target{o, p.ref})
				}
			}
			for _, m := range news[i].metadata {
				ss.describe(sl.ref, news[i].name, m)
				for _, o := range s.more {
					o.session.describe(o.ref, news[i].name, m)
				}
				n++
			}
			s.flushFull(ctx, ss)
		}
		if found {
			s.families.done(&news[i])
		}
	}
	s.metrics.shipped.WithLabelValues("metadata").Add(float64(n))
}

// listener returns the session that a series is announced in, if it takes more.
func (s *shipper) listener(sl *slot) *session { return s.listening(sl.session) }

func (s *shipper) listening(index uint16) *session {
	if index == 0 {
		return nil
	}
	if ss := s.sessions[index]; !ss.owner.detached && ss.stuck == nil {
		return ss
	}
	return nil
}

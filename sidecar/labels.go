package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship"
)

// maxLabelsBytes bounds the labels of one series: what goes into a batch must
// fit into it.
const maxLabelsBytes = 64 << 10

// dropReason says why nothing is sent of a series.
type dropReason uint8

const (
	dropNot dropReason = iota
	dropRelabelled
	dropNoName
	dropInvalid
	dropDuplicateLabel
	dropTooLong
	dropReasons
)

func (r dropReason) String() string {
	return [dropReasons]string{"", "relabelled", "no_metric_name", "invalid_labels", "duplicate_label_name", "labels_too_long"}[r]
}

// labelVersion is one version of what makes a series' labels out of those that
// Prometheus wrote: external labels, where the series doesn't have them, and
// relabelling. It holds for samples with a timestamp from since to until,
// wherever they are read: so a sample has the same labels whenever it is sent,
// from the WAL, again, or from a block.
type labelVersion struct {
	id       uint16
	since    int64 // ms; noTime for the first
	until    int64 // ms, exclusive; the since of the next
	external labels.Labels
	relabel  []*relabel.Config
	replica  string // name among the replicas of which one is chosen; empty: nothing is chosen
	tenant   string

	builder *labels.Builder
	claims  *claims // of the group, once they were asked for
}

func (v *labelVersion) holds(t int64) bool { return t >= v.since && t < v.until }

// labelVersionFile is a labelVersion in the checkpoint file.
type labelVersionFile struct {
	Since    *int64            `json:"since,omitempty"` // ms; absent: from the beginning
	External labels.Labels     `json:"external_labels"`
	Replica  string            `json:"replica,omitempty"`
	Relabel  []*relabel.Config `json:"relabel_configs,omitempty"`
}

// apply returns the labels under which a series is sent, its token, or why it is
// not sent.
func (v *labelVersion) apply(raw labels.Labels) (labels.Labels, uint32, dropReason) {
	if raw.IsEmpty() {
		return raw, 0, dropTooLong // see keptLabels
	}
	// What Prometheus wrote is sorted; a log from elsewhere may not be.
	prev, reason := "", dropNot
	raw.Range(func(l labels.Label) {
		switch {
		case l.Name == prev && prev != "":
			reason = dropDuplicateLabel
		case l.Name < prev:
			reason = max(reason, dropInvalid)
		}
		prev = l.Name
	})
	if reason != dropNot {
		return labels.EmptyLabels(), 0, reason
	}
	ls := raw
	if !v.external.IsEmpty() || len(v.relabel) > 0 {
		b := v.builder
		b.Reset(raw)
		v.external.Range(func(l labels.Label) {
			if b.Get(l.Name) == "" {
				b.Set(l.Name, l.Value)
			}
		})
		if !relabel.ProcessBuilder(b, v.relabel...) {
			return labels.EmptyLabels(), 0, dropRelabelled
		}
		ls = b.Labels()
	}
	ls = ls.WithoutEmpty()
	switch {
	case ls.Get(model.MetricNameLabel) == "":
		return labels.EmptyLabels(), 0, dropNoName
	case !ls.IsValid(model.UTF8Validation):
		return labels.EmptyLabels(), 0, dropInvalid
	case ls.ByteSize() > maxLabelsBytes:
		return labels.EmptyLabels(), 0, dropTooLong
	}
	return ls, ring.Token(v.tenant, ls), dropNot
}

// maxLabelVersions bounds how many versions are kept: of older ones, the samples
// take the labels of the oldest that is.
const maxLabelVersions = 200

// labelVersions are the versions that there have been.
type labelVersions struct {
	tenant  string
	list    []*labelVersion // ascending in since
	present *labelVersion   // the last of list; nil if none is known yet
	chosen  bool            // some have a replica
}

// add makes a version hold from a time on, in ms. The first holds for all time
// before too.
func (vs *labelVersions) add(since int64, external labels.Labels, replica string, rc []*relabel.Config) {
	id := uint16(1)
	if p := vs.present; p != nil {
		if id = p.id + 1; id == math.MaxUint16 {
			id = 1
		}
		if since <= p.since {
			since = p.since + 1
		}
		p.until = since
	} else {
		since = noTime
	}
	vs.present = &labelVersion{
		id: id, since: since, until: math.MaxInt64, external: external, relabel: rc, replica: replica,
		tenant: vs.tenant, builder: labels.NewBuilder(labels.EmptyLabels()),
	}
	vs.list = append(vs.list, vs.present)
	vs.chosen = vs.chosen || replica != ""
	if n := len(vs.list) - maxLabelVersions; n > 0 {
		vs.list = vs.list[n:]
		vs.list[0].since = noTime
	}
}

// undo makes what add has changed be as it was before.
func (vs *labelVersions) undo(before labelVersions) {
	if *vs = before; vs.present != nil {
		vs.present.until = math.MaxInt64
	}
}

// at returns the version that holds for a sample's time.
func (vs *labelVersions) at(t int64) *labelVersion {
	for i := len(vs.list) - 1; i > 0; i-- {
		if t >= vs.list[i].since {
			return vs.list[i]
		}
	}
	return vs.list[0]
}

func (vs *labelVersions) file() []labelVersionFile {
	var out []labelVersionFile
	for _, v := range vs.list {
		f := labelVersionFile{External: v.external, Replica: v.replica, Relabel: v.relabel}
		if v.since != noTime {
			f.Since = &v.since
		}
		out = append(out, f)
	}
	return out
}

// loadLabelVersions takes the versions of a checkpoint file.
func loadLabelVersions(tenant string, file []labelVersionFile) (*labelVersions, error) {
	vs := &labelVersions{tenant: tenant}
	for i, v := range file {
		for _, c := range v.Relabel {
			if err := c.Validate(model.UTF8Validation); err != nil {
				return nil, fmt.Errorf("checkpoint: relabelling of version %d of the labels: %w", i+1, err)
			}
		}
		since := int64(noTime)
		if v.Since != nil {
			since = *v.Since
		}
		vs.add(since, v.External, v.Replica, v.Relabel)
	}
	return vs, nil
}

// sameRelabel compares by what a checkpoint file would hold.
func sameRelabel(a, b []*relabel.Config) bool {
	if len(a) != len(b) {
		return false
	}
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// labelsSince returns from what time on, in ms, labels hold that Prometheus took
// at loaded: not before what was sent under others, up to newest, or that would be
// there twice when it is sent again. No sample that is further ahead of the clock
// than ship.MaxFuture can be, since ingesters refuse it.
func labelsSince(loaded, now time.Time, newest int64) int64 {
	return max(loaded.UnixMilli(), min(newest, now.Add(ship.MaxFuture).UnixMilli())+1)
}

// takeLabels makes changed external labels or relabelling hold from the time on
// at which Prometheus took them, but for what was sent under those before.
func (s *shipper) takeLabels(ctx context.Context, ls labels.Labels, loaded time.Time) {
	ls, replica, err := splitReplica(ls, s.opts.ReplicaLabel)
	if s.choosing.lack = ""; err != nil {
		s.choosing.lack = err.Error()
		s.once("replica").Warn("external labels are not used", "err", err)
		return // those before hold on
	}
	p := s.versions.present
	if p != nil && p.replica == replica && labels.Equal(p.external, ls) && sameRelabel(p.relabel, s.opts.RelabelConfigs) {
		return
	}
	now := time.Now()
	if now.Before(s.nextLabels) {
		return
	}
	if loaded.IsZero() || loaded.After(now) {
		loaded = now
	}
	since := labelsSince(loaded, now, max(s.newestT, s.sentBefore))
	if s.split != nil {
		s.cut(ctx, s.tail.Position())
	}
	before := *s.versions
	s.versions.add(since, ls, replica, s.opts.RelabelConfigs)
	// Nothing is sent under labels that a start wouldn't know: it would send it
	// again under those before.
	if err := s.saveCheckpoint(); err != nil {
		s.versions.undo(before)
		s.nextLabels = now.Add(time.Second)
		s.once("labels").Warn("external labels can't be written down, those before hold on", "err", err)
		return
	}
	s.metrics.labelChanges.Inc()
	s.logger.Info("external labels", "external_labels", ls.String(), "replica", replica, "relabel_configs", len(s.opts.RelabelConfigs),
		"since", time.UnixMilli(max(since, 0)).UTC())
	s.version = s.versions.present
}

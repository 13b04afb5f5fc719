package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
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
// relabelling. It holds for the samples from From on.
type labelVersion struct {
	id       uint16
	from     tail.Position
	external labels.Labels
	relabel  []*relabel.Config
	tenant   string

	builder *labels.Builder
}

// labelVersionFile is a labelVersion in the checkpoint file.
type labelVersionFile struct {
	From     tail.Position     `json:"from"`
	External labels.Labels     `json:"external_labels"`
	Relabel  []*relabel.Config `json:"relabel_configs,omitempty"`
}

// apply returns the labels under which a series is sent, its token, or why it is
// not sent.
func (v *labelVersion) apply(raw labels.Labels) (labels.Labels, uint32, dropReason) {
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

// labelVersions are the versions in force at or after the checkpoint.
type labelVersions struct {
	tenant  string
	list    []*labelVersion // ascending in from
	present *labelVersion   // the last of list; nil if none is known yet
}

// add makes a version hold from a position on, unless it is the present one. It
// returns true if it was taken.
func (vs *labelVersions) add(from tail.Position, external labels.Labels, rc []*relabel.Config) bool {
	id := uint16(1)
	if p := vs.present; p != nil {
		if labels.Equal(p.external, external) && sameRelabel(p.relabel, rc) {
			return false
		}
		if id = p.id + 1; id == math.MaxUint16 {
			id = 1
		}
		if from.Before(p.from) {
			from = p.from
		}
		if p.from == from {
			vs.list = vs.list[:len(vs.list)-1] // it never held for a sample
		}
	}
	vs.present = &labelVersion{id: id, from: from, external: external, relabel: rc, tenant: vs.tenant, builder: labels.NewBuilder(labels.EmptyLabels())}
	vs.list = append(vs.list, vs.present)
	return true
}

// at returns the version in force at a position.
func (vs *labelVersions) at(pos tail.Position) *labelVersion {
	for i := len(vs.list) - 1; i > 0; i-- {
		if !pos.Before(vs.list[i].from) {
			return vs.list[i]
		}
	}
	return vs.list[0]
}

// forget drops the versions that hold for nothing at or behind pos.
func (vs *labelVersions) forget(pos tail.Position) {
	for len(vs.list) > 1 && !pos.Before(vs.list[1].from) {
		vs.list = vs.list[1:]
	}
}

func (vs *labelVersions) file() []labelVersionFile {
	var out []labelVersionFile
	for _, v := range vs.list {
		out = append(out, labelVersionFile{From: v.from, External: v.external, Relabel: v.relabel})
	}
	return out
}

// loadLabelVersions takes the versions of a checkpoint file.
func loadLabelVersions(tenant string, file []labelVersionFile) (*labelVersions, error) {
	vs := &labelVersions{tenant: tenant}
	for _, v := range file {
		for _, c := range v.Relabel {
			if err := c.Validate(model.UTF8Validation); err != nil {
				return nil, fmt.Errorf("checkpoint: relabelling in force at %v: %w", v.From, err)
			}
		}
		vs.add(v.From, v.External, v.Relabel)
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

// takeLabels makes changed external labels or relabelling hold from here on.
func (s *shipper) takeLabels(ctx context.Context, ls labels.Labels) {
	p := s.versions.present
	if p != nil && labels.Equal(p.external, ls) && s.resumeAt == (tail.Position{}) {
		return
	}
	if p == nil || !labels.Equal(p.external, ls) || !sameRelabel(p.relabel, s.opts.RelabelConfigs) {
		// What was read before this start was sent under the labels of then.
		from := s.tail.Position()
		if from.Before(s.resumeAt) {
			from = s.resumeAt
		}
		if s.split != nil {
			s.cut(ctx, s.tail.Position())
		}
		if s.versions.add(from, ls, s.opts.RelabelConfigs) {
			s.metrics.labelChanges.Inc()
			s.logger.Info("external labels", "external_labels", ls.String(), "relabel_configs", len(s.opts.RelabelConfigs), "position", from.String())
		}
	}
	s.resumeAt = tail.Position{}
}

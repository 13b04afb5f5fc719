package main

import (
	"fmt"
	"time"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"
)

// duration is a time in Prometheus's notation, such as 1h30m.
type duration time.Duration

// UnmarshalYAML returns a yaml.TypeError where the value is wrong, so that the
// decoder goes on and tells of all that is wrong.
func (d *duration) UnmarshalYAML(unmarshal func(any) error) error {
	var s string
	if err := unmarshal(&s); err != nil {
		return err
	}
	v, err := model.ParseDuration(s)
	if err != nil {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("%q is not a duration such as 30s or 1h30m", s)}}
	}
	*d = duration(v)
	return nil
}

// MarshalYAML is for the status page.
func (d duration) MarshalYAML() (any, error) { return d.String(), nil }

func (d duration) String() string { return model.Duration(d).String() }

// size is a number of bytes, such as 512MiB.
type size int64

// UnmarshalYAML is as that of duration.
func (b *size) UnmarshalYAML(unmarshal func(any) error) error {
	var s string
	if err := unmarshal(&s); err != nil {
		return err
	}
	v, err := units.ParseBase2Bytes(s)
	if err != nil {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("%q is not a size such as 512MiB or 4GiB", s)}}
	}
	*b = size(v)
	return nil
}

// MarshalYAML is for the status page.
func (b size) MarshalYAML() (any, error) { return b.String(), nil }

func (b size) String() string { return units.Base2Bytes(b).String() }

const (
	mib size = 1 << 20
	gib size = 1 << 30
)

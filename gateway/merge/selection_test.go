package merge

import (
	"testing"

	"github.com/prometheus/prometheus/model/labels"
)

// TestShardOf: gateways of several versions have to agree on the shards of series.
func TestShardOf(t *testing.T) {
	for _, c := range []struct {
		ls   labels.Labels
		want uint64
	}{
		{labels.FromStrings("__name__", "up"), 376921},
		{labels.FromStrings("__name__", "up", "a", "1"), 615637},
		{labels.FromStrings("__name__", "down", "__type__", "gauge", "__unit__", "s", "a", "1"), 615637},
		{labels.FromStrings("a", "2"), 296101},
	} {
		got, _ := shardOf(c.ls, 1_000_000, nil)
		if got != c.want {
			t.Errorf("%s: %d, want %d", c.ls, got, c.want)
		}
	}
}

package main

import (
	"runtime"
	"testing"
)

func TestPercentAfter(t *testing.T) {
	for _, c := range []struct {
		percent int
		share   float64
		want    int
	}{
		{busyPercent, 0, calmPercent},
		{busyPercent, 0.03, busyPercent}, // at calmPercent it would be twice as much
		{busyPercent, 0.5, busyPercent},
		{calmPercent, 0.03, calmPercent},
		{calmPercent, 0.06, busyPercent},
	} {
		if got := percentAfter(c.percent, c.share); got != c.want {
			t.Errorf("at %d%%, share %g: %d, want %d", c.percent, c.share, got, c.want)
		}
	}
}

func TestCollected(t *testing.T) {
	before := collected()
	runtime.GC()
	if after := collected(); after <= before {
		t.Errorf("%g CPU-s before a collection, %g after", before, after)
	}
}

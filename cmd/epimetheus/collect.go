package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// How much garbage may come together before it is collected, in percent of what is alive.
// What a process holds is mostly long-lived, so that collecting more often than by Go's
// default of 100 costs little. While there is little to do it costs next to nothing: the
// garbage of a head that only receives comes together over minutes. It is much while an
// ingester takes all that was written in hours, or replays its log.
const (
	busyPercent = 50
	calmPercent = 25
)

// collectEvery is how often it is looked at what collecting has cost.
const collectEvery = 15 * time.Second

// addCollect adjusts the garbage collector, unless the environment says how much there may be. The
// start counts as busy.
func (p *process) addCollect() {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(busyPercent)
	p.addRun("garbage collector", func(ctx context.Context) error {
		tick := time.NewTicker(collectEvery)
		defer tick.Stop()
		percent, before := busyPercent, collected()
		for {
			select {
			case <-ctx.Done():
				debug.SetGCPercent(busyPercent) // an ingester flushes at its end
				return nil
			case <-tick.C:
			}
			now := collected()
			if next := percentAfter(percent, (now-before)/collectEvery.Seconds()); next != percent {
				percent = next
				debug.SetGCPercent(percent)
			}
			before = now
		}
	}, nil)
}

// percentAfter is the percentage to go on with where collecting has taken such a share of
// one processor. With twice as much garbage it takes half.
func percentAfter(percent int, share float64) int {
	const much, little = 0.05, 0.02
	switch {
	case share > much:
		return busyPercent
	case share < little:
		return calmPercent
	}
	return percent
}

// collected is the CPU time that collecting has taken so far, in seconds.
func collected() float64 {
	s := []metrics.Sample{{Name: "/cpu/classes/gc/total:cpu-seconds"}}
	metrics.Read(s)
	return s[0].Value.Float64()
}

package sim

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

var (
	seedFlag    = flag.Uint64("sim.seed", 0, "run this seed only")
	stepsFlag   = flag.Int("sim.steps", 40, "steps of a simulation")
	seedsFlag   = flag.Int("sim.n", 20, "how many seeds to run, from 1 on")
	rateFlag    = flag.Bool("sim.rate", false, "TestBites counts the seeds that find each bug")
	verboseFlag = flag.Bool("sim.v", false, "show what the components log")
)

func TestMain(m *testing.M) { gatewaytest.Main(m) }

// config is a simulation.
type config struct {
	seed   uint64
	steps  int
	bug    *bug
	logger *slog.Logger
}

// run runs a simulation and returns the first violation, and the world as it was.
func run(t *testing.T, c config) (w *world, err error) {
	t.Helper()
	if c.logger == nil {
		c.logger = slog.New(slog.DiscardHandler)
		if *verboseFlag {
			c.logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
	}
	dir := t.TempDir()
	synctest.Test(t, func(*testing.T) {
		if w, err = newWorld(dir, c); w == nil {
			return
		}
		defer w.close()
		for i := 0; err == nil && i < c.steps; i++ {
			w.step(i)
			err = w.failed()
		}
		if err == nil {
			if err = w.drain(); err != nil {
				w.fail(err)
			}
		}
	})
	return w, err
}

func TestSim(t *testing.T) {
	first, last := uint64(1), uint64(*seedsFlag)
	if *seedFlag > 0 {
		first, last = *seedFlag, *seedFlag
	}
	for seed := first; seed <= last; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			w, err := run(t, config{seed: seed, steps: *stepsFlag})
			if w == nil {
				t.Fatal(err)
			}
			if err != nil || *seedFlag > 0 {
				t.Log("\n" + strings.Join(w.log, "\n"))
			}
			t.Log(w.summary())
			if err != nil {
				t.Errorf("%v\nagain with: make sim SEED=%d STEPS=%d", err, seed, *stepsFlag)
			}
		})
	}
}

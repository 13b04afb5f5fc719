package sim

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history/historytest"
)

// faults is how the stores behave at present.
type faults struct {
	mu    sync.Mutex
	rng   *rand.Rand
	delay time.Duration // each call takes up to so much, whatever else

	// Per mille of the calls that fail before or after the effect, or take slow.
	before, after, torn, slow int
	slowness                  time.Duration
	// Per mille of the reads that give bytes other than those written.
	damaged int

	// The rows of this tenant can't be written, nor, with whole, what is written with them.
	tenant string
	whole  bool
}

func (f *faults) held(hash string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tenant != "" && hash == "b/"+f.tenant
}

func (f *faults) set(change func(*faults)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *faults) off() {
	f.set(func(f *faults) { f.before, f.after, f.torn, f.slow, f.damaged = 0, 0, 0, 0, 0 })
}

// write waits as long as a call takes and says what becomes of it, and whether it
// takes effect although its process died meanwhile.
func (f *faults) write(string) (fault historytest.Fault, late bool) {
	f.mu.Lock()
	d := time.Duration(f.rng.Int64N(int64(f.delay)))
	if f.rng.IntN(1000) < f.slow {
		d += time.Duration(f.rng.Int64N(int64(f.slowness)))
	}
	late = f.rng.IntN(2) == 0
	switch x := f.rng.IntN(1000); {
	case x < f.before:
		fault = historytest.Before
	case x < f.before+f.after:
		fault = historytest.After
	case x < f.before+f.after+f.torn:
		fault = historytest.Torn
	}
	f.mu.Unlock()
	time.Sleep(d)
	return fault, late
}

// read is write for the gateway.
func (f *faults) read(op, _ string) historytest.Fault {
	fault, _ := f.write(op)
	if fault == historytest.Torn || fault == historytest.After {
		fault = historytest.Before
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if op == "GetRange" && f.rng.IntN(1000) < f.damaged {
		return []historytest.Fault{historytest.Torn, historytest.Corrupt, historytest.Missing}[f.rng.IntN(3)]
	}
	return fault
}

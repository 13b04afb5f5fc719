package sim

import (
	"fmt"
	"math"
	"time"
)

// action is something that happens. do returns what it was, or "" if it could not
// happen in this world.
type action struct {
	name   string
	weight int
	do     func(*world) string
}

// actions is what a step draws from.
var actions = []action{
	{"nothing", 8, func(*world) string { return "nothing" }},
	{"check history", 4, (*world).lookAtHistory},
	{"kill ingester", 4, (*world).killNode},
	{"stop ingester", 2, (*world).stopNode},
	{"add ingester", 2, (*world).growRing},
	{"kill sidecar", 4, (*world).killASidecar},
	{"stop sidecar", 1, (*world).stopASidecar},
	{"network", 6, (*world).disturbNetwork},
	{"ring endpoint", 1, (*world).disturbRing},
	{"disk", 5, (*world).disturbDisk},
	{"stores", 5, (*world).disturbStores},
	{"rows of a tenant", 3, (*world).holdRows},
	{"kill compactor", 2, (*world).killCompactor},
	{"segment", 2, (*world).rollSegment},
	{"truncate", 2, (*world).truncateWAL},
	{"burst", 2, (*world).burst},
	{"late samples", 3, (*world).lateSamples},
	{"restart Prometheus", 1, (*world).restartSource},
	{"repair", 2, (*world).repairWAL},
}

// step does one thing and lets some time pass.
func (w *world) step(i int) {
	w.steps = i
	total := 0
	for _, a := range actions {
		total += a.weight
	}
	what := ""
	for what == "" {
		x := w.rng.IntN(total)
		for _, a := range actions {
			if x -= a.weight; x < 0 {
				if what = a.do(w); what != "" {
					w.logf("step %d: %s", i, what)
				}
				break
			}
		}
	}
	w.sleep(time.Duration(w.rng.Int64N(int64(4 * time.Second))))
}

func (w *world) lookAtHistory() string {
	t := pick(w.rng, w.tenants...)
	if err := w.checkHistory(t, false); err != nil {
		w.fail(err)
	}
	return "history of " + t
}

// ingesters

// active are the nodes that live and mean to stay.
func (w *world) active() []*node {
	var out []*node
	for _, n := range w.alive() {
		if !n.leaving {
			out = append(out, n)
		}
	}
	return out
}

// killNode kills a process. Another starts under its id, at its address or not, or
// under a new id, or not at all.
func (w *world) killNode() string {
	nodes := w.alive()
	if len(nodes) == 0 {
		return ""
	}
	return w.kill(pick(w.rng, nodes...))
}

func (w *world) kill(n *node) string {
	with, err := w.crash(n)
	if err != nil {
		w.fail(err)
	}
	n.vanish(w.detect)
	d := between(w.rng, 0, 20*time.Second)
	x := w.rng.IntN(6)
	if n.left != "" && w.disks.IntN(4) > 0 { // it is soon there again, where its disk is
		x, d = 0, between(w.disks, 0, 4*time.Second)
	}
	switch {
	case x < 2:
		w.later(d, n.String()+" is there again", func() { w.start(n.id, n.address) })
		return fmt.Sprintf("%v is killed%s and starts again in %v", n, with, d)
	case x < 4:
		w.later(d, n.id+" is there again", func() { w.addNodeAs(n.id) })
		return fmt.Sprintf("%v is killed%s and starts elsewhere in %v", n, with, d)
	case x < 5 || len(w.alive()) == 0:
		w.later(d, "another ingester starts", w.addNode)
		return fmt.Sprintf("%v is killed and gets replaced in %v", n, d)
	default:
		return fmt.Sprintf("%v is killed", n)
	}
}

func (w *world) stopNode() string {
	nodes := w.active()
	if len(nodes) < 2 && (len(nodes) == 0 || w.rng.IntN(2) == 0) {
		return ""
	}
	n := pick(w.rng, nodes...)
	n.leave()
	if len(nodes) > 1 && w.rng.IntN(2) == 0 {
		return fmt.Sprintf("%v is stopped", n)
	}
	d := between(w.rng, 5*time.Second, 20*time.Second)
	id := pick(w.rng, n.id, "")
	w.later(d, "an ingester comes for it", func() {
		for _, x := range w.alive() {
			if x.id == id { // it takes its time; an orchestrator waits
				id = ""
			}
		}
		w.addNodeAs(id)
	})
	return fmt.Sprintf("%v is stopped, another comes in %v as %q", n, d, id)
}

func (w *world) growRing() string {
	if len(w.active()) >= 5 {
		return ""
	}
	w.addNode()
	return fmt.Sprintf("%v starts", w.nodes[len(w.nodes)-1])
}

func (w *world) addNode() { w.addNodeAs("") }

// addNodeAs starts a node at a new address, under a new id if it is empty.
func (w *world) addNodeAs(id string) {
	w.ids++
	if id == "" {
		id = fmt.Sprintf("ingester-%d", w.ids)
	}
	w.start(id, fmt.Sprintf("address-%d", w.ids))
}

func (w *world) start(id, address string) {
	if err := w.startNode(id, address); err != nil {
		w.fail(err)
	}
}

// sidecars

func (w *world) withSidecar() *source {
	var up []*source
	for _, s := range w.sources {
		if s.sidecar != nil {
			up = append(up, s)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return pick(w.rng, up...)
}

func (w *world) killASidecar() string {
	s := w.withSidecar()
	if s == nil {
		return ""
	}
	dir, err := w.killSidecar(s)
	if err != nil {
		w.fail(err)
	}
	torn := ""
	if w.rng.IntN(5) == 0 {
		torn = ", its dictionary is damaged"
		if err := tearDictionary(dir, w.rng.Int64N(1000)); err != nil {
			w.fail(err)
		}
	}
	d := between(w.rng, 0, 15*time.Second)
	w.sidecarAgain(s, dir, d)
	return fmt.Sprintf("sidecar of %s is killed%s and starts again in %v", s.id, torn, d)
}

func (w *world) stopASidecar() string {
	s := w.withSidecar()
	if s == nil {
		return ""
	}
	p := s.sidecar
	s.sidecar = nil
	p.cancel()
	<-p.ended
	d := between(w.rng, 0, 15*time.Second)
	w.sidecarAgain(s, p.dir, d)
	return fmt.Sprintf("sidecar of %s is stopped and starts again in %v", s.id, d)
}

func (w *world) sidecarAgain(s *source, dir string, d time.Duration) {
	w.later(d, "sidecar of "+s.id+" is there again", func() {
		if err := w.startSidecar(s, dir); err != nil {
			w.fail(err)
		}
	})
}

// network and stores

// disturbNetwork makes the way to an ingester bad for a while, for one sidecar, for
// all, or for the gateway.
func (w *world) disturbNetwork() string {
	nodes := w.alive()
	if len(nodes) == 0 {
		return ""
	}
	to := pick(w.rng, nodes...).address
	var from []string
	switch s := w.withSidecar(); {
	case w.rng.IntN(4) == 0:
		from = []string{gateway}
	case w.rng.IntN(3) == 0:
		for _, s := range w.sources {
			if s.sidecar != nil {
				from = append(from, s.sidecar.place)
			}
		}
	case s != nil:
		from = []string{s.sidecar.place}
	}
	if len(from) == 0 {
		return ""
	}
	how := pick(w.rng, "cut", "cut for a moment", "silent", "stalled", "stalled", "slow")
	d := between(w.rng, 100*time.Millisecond, 20*time.Second)
	if how == "cut for a moment" {
		d = 0
	}
	slow := between(w.rng, 5*time.Millisecond, 300*time.Millisecond)
	for _, f := range from {
		w.net.link(f, to).set1(how, slow)
		if d == 0 {
			w.net.link(f, to).set1("", 0)
			continue
		}
		w.later(d, fmt.Sprintf("%s to %s is well again", f, to), func() {
			if !w.net.over(f) {
				w.net.link(f, to).set1("", 0)
			}
		})
	}
	return fmt.Sprintf("%v to %s is %s for %v", from, to, how, d)
}

// set1 brings a link into a state.
func (l *link) set1(how string, delay time.Duration) {
	l.set(func() {
		l.cut = how == "cut" || how == "cut for a moment" || how == "silent"
		l.silent, l.stalled, l.delay = how == "silent", how == "stalled", 0
		if how == "slow" {
			l.delay = delay
		}
	})
}

func (n *network) over(place string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ended[place]
}

func (w *world) disturbRing() string {
	s := w.withSidecar()
	if s == nil {
		return ""
	}
	from, d := s.sidecar.place, between(w.rng, time.Second, 30*time.Second)
	how := pick(w.rng, "cut", "stalled")
	w.net.link(from, gateway).set1(how, 0)
	w.later(d, from+" reaches the gateway again", func() {
		if !w.net.over(from) {
			w.net.link(from, gateway).set1("", 0)
		}
	})
	return fmt.Sprintf("%s to the gateway is %s for %v", from, how, d)
}

func (w *world) disturbStores() string {
	d := between(w.rng, time.Second, 30*time.Second)
	how := pick(w.rng, "down", "losing answers", "slow", "flaky", "damaging")
	w.faults.off()
	w.faults.set(func(f *faults) {
		switch how {
		case "down":
			f.before = 1000
		case "losing answers":
			f.after = 500
		case "slow":
			f.slow, f.slowness = 500, 15*time.Second
		case "flaky":
			f.before, f.after, f.torn, f.slow, f.slowness = 150, 150, 100, 200, 3*time.Second
		case "damaging":
			f.damaged = 300
		}
	})
	w.later(d, "stores are well again", w.faults.off)
	return fmt.Sprintf("stores are %s for %v", how, d)
}

// holdRows lets writes of the rows of one tenant fail, for long.
func (w *world) holdRows() string {
	t, d := pick(w.rng, w.tenants...), between(w.rng, 5*time.Second, 90*time.Second)
	whole := w.rng.IntN(3) == 0
	w.faults.set(func(f *faults) { f.tenant, f.whole = t, whole })
	w.later(d, "rows of "+t+" can be written again", func() { w.faults.set(func(f *faults) { f.tenant = "" }) })
	return fmt.Sprintf("rows of %s can't be written for %v, nor those with them: %v", t, d, whole)
}

// sources

func (w *world) rollSegment() string {
	s := pick(w.rng, w.sources...)
	s.do(s.roll)
	return s.id + " begins a segment"
}

// truncateWAL truncates a WAL, mostly only what its sidecar has done with.
func (w *world) truncateWAL() string {
	s := pick(w.rng, w.sources...)
	last, how, regardless := math.MaxInt, "regardless of its sidecar", true
	if w.rng.IntN(4) > 0 {
		if s.sidecar == nil {
			return ""
		}
		c := s.sidecar.Status().Checkpoint
		if c.InCheckpoint {
			return ""
		}
		last, how, regardless = c.Segment-1, "up to where its sidecar is", false
	}
	s.do(func() error { return s.truncate(last, regardless) })
	return s.id + " truncates its WAL " + how
}

func (w *world) burst() string {
	s := pick(w.rng, w.sources...)
	s.do(s.burst)
	return s.id + " scrapes many series"
}

func (w *world) lateSamples() string {
	s := pick(w.rng, w.sources...)
	for range between(w.rng, 1, 10) {
		s.do(s.late)
	}
	return s.id + " logs late samples"
}

func (w *world) restartSource() string {
	s := pick(w.rng, w.sources...)
	kill := w.rng.IntN(2) == 0
	s.do(func() error { return s.restart(kill) })
	return fmt.Sprintf("%s restarts, killed: %v", s.id, kill)
}

func (w *world) repairWAL() string {
	s := pick(w.rng, w.sources...)
	s.do(s.repair)
	return s.id + " repairs its WAL"
}

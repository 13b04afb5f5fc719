package sidecar

import (
	"fmt"
	"math/rand"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

func at(offset int64) tail.Position { return tail.Position{Offset: offset} }

func part(owners string, copies ...Copy) Part { return Part{owners, copies} }

func copyOf(s ...Sent) Copy { return Copy{Sent: s} }

func sent(id SessionID, seq uint64) Sent { return Sent{id, seq, seq} }

func TestLedgerCheckpoint(t *testing.T) {
	l := NewLedger(at(0))
	l.Begin(1)
	l.Begin(2)
	l.Add(at(10), 7, []Part{part("a", copyOf(sent(1, 1))), part("b", copyOf(sent(2, 1)))})
	l.Add(at(20), 7, []Part{part("a", copyOf(sent(1, 2)))})
	l.Add(at(30), 7, nil) // nothing in it
	check := func(what string, want int64) {
		t.Helper()
		if got := l.Checkpoint(); got != at(want) {
			t.Errorf("%s: checkpoint %v, want %d", what, got, want)
		}
	}
	check("nothing durable", 0)
	l.Durable(1, 2)
	check("one session of two", 0)
	l.Durable(2, 1)
	check("all durable", 30)
	l.Add(at(40), 8, []Part{part("b", copyOf(sent(2, 1)))})
	check("durable before it was added", 40)
	l.Durable(9, 5)
	l.End(9)
	l.Detach(9, 0)
	check("an unknown session changes nothing", 40)
	l.Skip(tail.Position{Segment: 1})
	if got := l.Checkpoint(); got != (tail.Position{Segment: 1}) {
		t.Errorf("checkpoint %v behind a skip", got)
	}
}

func TestLedgerEnd(t *testing.T) {
	l := NewLedger(at(0))
	l.Begin(1)
	l.Begin(2)
	for i := range int64(6) {
		seq := uint64(i + 1)
		l.Add(at((i+1)*10), 7, []Part{part("a", copyOf(sent(1, seq))), part("b", copyOf(sent(2, seq)))})
	}
	l.Durable(1, 2)
	l.Durable(2, 4)
	l.End(1)
	if st := l.Stats(); st.Queued != 4 || st.Open != 4 {
		t.Errorf("stats %+v", st)
	}
	// Adjacent ranges come as one, but no more than asked for.
	w, ok := l.Take(20)
	if d := cmp.Diff(Work{ID: 1, From: at(20), To: at(40), Split: 7, Owners: []string{"a"}}, w); !ok || d != "" {
		t.Fatal(d)
	}
	w2, ok := l.Take(1000)
	if d := cmp.Diff(Work{ID: 2, From: at(40), To: at(60), Split: 7, Owners: []string{"a"}}, w2); !ok || d != "" {
		t.Fatal(d)
	}
	if _, ok := l.Take(1000); ok {
		t.Fatal("taken twice")
	}
	l.Begin(3)
	l.Resent(w2.ID, []Part{part("b", copyOf(sent(3, 1))), part("c", copyOf(sent(2, 7)))}, false)
	l.Durable(2, 7)
	l.Durable(3, 1)
	if got := l.Checkpoint(); got != at(20) {
		t.Errorf("checkpoint %v while the first is being read again", got)
	}
	// What it went out in has ended meanwhile: back to the queue.
	l.End(3)
	l.Resent(w.ID, []Part{part("b", copyOf(sent(3, 2)))}, false)
	w, ok = l.Take(1000)
	if !ok || w.From != at(20) || w.To != at(40) {
		t.Fatalf("%+v, %v", w, ok)
	}
	l.Resent(w.ID, nil, false) // nothing in it for anyone
	if got := l.Checkpoint(); got != at(60) {
		t.Errorf("checkpoint %v", got)
	}
}

func TestLedgerDetach(t *testing.T) {
	l := NewLedger(at(0))
	l.Begin(1)
	l.Add(at(10), 7, []Part{part("a", copyOf(sent(1, 3)))})
	l.Add(at(20), 7, []Part{part("a", copyOf(sent(1, 5)))})
	l.Detach(1, 3) // the first is received, so it may become durable yet
	if w, ok := l.Take(1000); !ok || w.From != at(10) || w.To != at(20) {
		t.Errorf("%+v, %v", w, ok)
	}
	l.Durable(1, 3)
	if got := l.Checkpoint(); got != at(10) {
		t.Errorf("checkpoint %v", got)
	}
}

// Of a part with several copies one is enough, the others may be lost.
func TestLedgerCopies(t *testing.T) {
	l := NewLedger(at(0))
	for id := SessionID(1); id <= 3; id++ {
		l.Begin(id)
	}
	l.Add(at(10), 7, []Part{part("ab", copyOf(sent(1, 1)), copyOf(sent(2, 1))), part("bc", copyOf(sent(2, 1)), copyOf(sent(3, 1)))})
	l.Add(at(20), 7, []Part{part("ab", copyOf(sent(1, 2)), Copy{Lost: true})})
	check := func(what string, want int64, queued int) {
		t.Helper()
		if got, st := l.Checkpoint(), l.Stats(); got != at(want) || st.Queued != queued {
			t.Errorf("%s: checkpoint %v, want %d; %+v", what, got, want, st)
		}
	}
	l.Durable(1, 1)
	check("one of two parts", 0, 0)
	l.End(3)
	check("the other has a copy yet", 0, 0)
	l.Durable(2, 1)
	check("the lowest over parts", 10, 0)
	l.End(1)
	check("the last copy lost", 10, 1)
	w, ok := l.Take(100)
	if !ok || w.From != at(10) || len(w.Owners) != 1 || w.Owners[0] != "ab" {
		t.Fatalf("%+v, %v", w, ok)
	}
	l.Begin(4)
	l.Begin(5)
	l.Resent(w.ID, []Part{part("bd", copyOf(sent(2, 5)), copyOf(sent(4, 1))), part("de", copyOf(sent(4, 1)), copyOf(sent(5, 1)))}, false)
	l.Durable(2, 5)
	check("one part of two of what was sent again", 10, 0)
	l.End(4)
	check("the other has a copy yet", 10, 0)
	l.Durable(5, 1)
	check("all sent again", 20, 0)
}

// A copy of which something was refused counts only if all were.
func TestLedgerRefused(t *testing.T) {
	add := func() *Ledger {
		l := NewLedger(at(0))
		l.Begin(1)
		l.Begin(2)
		l.Add(at(10), 7, []Part{part("ab", copyOf(Sent{1, 1, 3}), copyOf(Sent{2, 1, 4}))})
		return l
	}
	l := add()
	l.Refused(1, 2)
	l.Durable(1, 3)
	if got := l.Checkpoint(); got != at(0) {
		t.Errorf("checkpoint %v, with the copy that lacks something", got)
	}
	l.Durable(2, 4)
	if got := l.Checkpoint(); got != at(10) {
		t.Errorf("checkpoint %v, with the full copy durable", got)
	}
	l = add()
	l.Refused(1, 2)
	l.End(2)
	if st := l.Stats(); st.Queued != 1 {
		t.Errorf("the full copy is lost: %+v", st)
	}
	l = add()
	l.Refused(1, 2)
	l.Refused(2, 4)
	l.Durable(1, 3)
	if got := l.Checkpoint(); got != at(0) {
		t.Errorf("checkpoint %v, with one of two that lack something", got)
	}
	l.Durable(2, 4)
	if got := l.Checkpoint(); got != at(10) {
		t.Errorf("checkpoint %v, with both", got)
	}
	// It is told before the range ends.
	l = NewLedger(at(0))
	l.Begin(1)
	l.Begin(2)
	l.Refused(2, 1)
	for seq := uint64(9); seq < 9+5*maxRefusals; seq += 2 {
		l.Refused(1, seq)
	}
	l.Durable(1, 2000)
	l.Add(at(10), 7, []Part{part("ab", copyOf(Sent{1, 9, 10}), copyOf(sent(2, 2)))})
	l.Add(at(20), 7, []Part{part("ab", copyOf(sent(1, 7)), copyOf(sent(2, 3)))})
	if len(l.ranges) != 1 || len(l.refusals[1]) > maxRefusals {
		t.Errorf("%d ranges, %d refusals kept", len(l.ranges), len(l.refusals[1]))
	}
}

// ledgerModel is a world in which the ledger is tried: what it says is durable
// must be, whatever happens, and in the end all is.
type ledgerModel struct {
	rnd      *rand.Rand
	l        *Ledger
	wal      []tail.Position // sample i lies behind wal[i], up to end[i]
	end      []tail.Position
	durable  map[int]bool
	sessions map[SessionID]*modelSession
	members  []string
	splits   map[SplitID]map[int]uint32 // token → set of owners
	sp       *split                     // names the sets
	replicas int
	picky    map[string]map[int]bool // samples that a member refuses
	split    SplitID
	last     SessionID
	pos      tail.Position
	works    []Work
}

type modelSession struct {
	member   string
	batches  [][]int // samples by sequence number less one
	received uint64
	durable  uint64
}

const modelTokens = 5

func (m *ledgerModel) token(i int) int { return (i * 7) % modelTokens }

func (m *ledgerModel) newSplit() {
	m.split++
	s := map[int]uint32{}
	for k := range modelTokens {
		s[k] = uint32(m.rnd.Intn(len(m.sp.sets)))
	}
	m.splits[m.split] = s
}

// allSets are all sets of so many members.
func (m *ledgerModel) allSets() {
	m.sp = &split{replicas: m.replicas}
	for _, id := range m.members {
		m.sp.owners = append(m.sp.owners, &owner{member: ring.Member{ID: id}})
	}
	var add func(set ownerSet, from int)
	add = func(set ownerSet, from int) {
		if len(set.owners) == m.replicas {
			m.sp.sets = append(m.sp.sets, ownerSet{set.name, slices.Clone(set.owners)})
			return
		}
		for k := from; k < len(m.members); k++ {
			add(ownerSet{set.name + m.members[k], append(set.owners, uint16(k))}, k+1)
		}
	}
	add(ownerSet{}, 0)
}

// session returns a live session with a member.
func (m *ledgerModel) session(member string) SessionID {
	for id, s := range m.sessions {
		if s.member == member {
			return id
		}
	}
	m.last++
	m.sessions[m.last] = &modelSession{member: member}
	m.l.Begin(m.last)
	return m.last
}

// send sends samples by the present split, and returns what went where. Some may
// not be sent; some sessions end in the middle.
func (m *ledgerModel) send(samples []int, faults bool) []Part {
	acc := &account{}
	for _, i := range samples {
		set := m.splits[m.split][m.token(i)]
		acc.use(set)
		for _, k := range m.sp.sets[set].owners {
			member := m.members[k]
			if faults && m.rnd.Intn(60) == 0 {
				acc.lost(member)
				continue
			}
			id := m.session(member)
			s := m.sessions[id]
			if n := len(s.batches); n > int(s.received) && n > 0 && m.rnd.Intn(2) == 0 && len(acc.member(member).Sent) > 0 {
				s.batches[n-1] = append(s.batches[n-1], i) // still being filled
			} else {
				s.batches = append(s.batches, []int{i})
			}
			acc.sent(member, id, uint64(len(s.batches)))
			if faults && m.rnd.Intn(80) == 0 {
				m.end1(id)
			}
		}
	}
	return acc.parts(m.sp)
}

func (m *ledgerModel) end1(id SessionID) {
	delete(m.sessions, id)
	m.l.End(id)
}

func (m *ledgerModel) any() (SessionID, *modelSession) {
	n := m.rnd.Intn(max(1, len(m.sessions)))
	for id := SessionID(1); id <= m.last; id++ {
		if s := m.sessions[id]; s != nil {
			if n == 0 {
				return id, s
			}
			n--
		}
	}
	return 0, nil
}

func (m *ledgerModel) makeDurable(id SessionID, s *modelSession, to uint64) {
	m.receive(id, s, to)
	for k := s.durable; k < to; k++ {
		for _, i := range s.batches[k] {
			m.durable[i] = m.durable[i] || !m.picky[s.member][i]
		}
	}
	s.durable = max(s.durable, to)
	m.l.Durable(id, s.durable)
}

// receive makes batches received; what is refused is told.
func (m *ledgerModel) receive(id SessionID, s *modelSession, to uint64) {
	for ; s.received < to; s.received++ {
		if slices.ContainsFunc(s.batches[s.received], func(i int) bool { return m.picky[s.member][i] }) {
			m.l.Refused(id, s.received+1)
		}
	}
}

func (m *ledgerModel) read(faults bool) {
	if m.rnd.Intn(10) == 0 {
		m.pos = tail.Position{Epoch: m.pos.Epoch, Segment: m.pos.Segment + 1}
		m.l.Skip(m.pos)
	}
	var samples []int
	for range m.rnd.Intn(6) {
		if m.rnd.Intn(30) == 0 {
			m.picky[m.members[m.rnd.Intn(len(m.members))]][len(m.wal)] = true
		}
		samples = append(samples, len(m.wal))
		m.wal = append(m.wal, m.pos)
		m.pos.Offset += 10
		m.end = append(m.end, m.pos)
	}
	parts := m.send(samples, faults)
	m.l.Add(m.pos, m.split, parts)
}

func (m *ledgerModel) rewind() bool {
	w, ok := m.l.Take(int64(1 + m.rnd.Intn(100)))
	if !ok {
		return false
	}
	m.works = append(m.works, w)
	return true
}

func (m *ledgerModel) finish(faults bool) {
	k := m.rnd.Intn(len(m.works))
	w := m.works[k]
	m.works = append(m.works[:k], m.works[k+1:]...)
	if faults && m.rnd.Intn(10) == 0 {
		m.l.Return(w.ID)
		return
	}
	wanted := map[string]bool{}
	for _, x := range w.Owners {
		wanted[x] = true
	}
	var samples []int
	for i, p := range m.wal {
		if !p.Before(w.From) && p.Before(w.To) && wanted[m.nameOf(m.splits[w.Split][m.token(i)])] {
			samples = append(samples, i)
		}
	}
	m.l.Resent(w.ID, m.send(samples, faults), false)
}

func (m *ledgerModel) nameOf(set uint32) string { return m.sp.sets[set].name }

func (m *ledgerModel) check() error {
	cp := m.l.Checkpoint()
	for i, p := range m.wal {
		refused := 0 // with one replica, by any; with more, no set of owners refuses it as one
		for _, x := range m.members {
			if m.picky[x][i] {
				refused++
			}
		}
		if p.Before(cp) && !m.durable[i] && refused < m.replicas {
			return fmt.Errorf("checkpoint %v, but sample %d at %v isn't durable", cp, i, p)
		}
	}
	queued := 0
	for _, r := range m.l.ranges {
		queued += len(r.queued())
		if m.splits[r.split] == nil {
			return fmt.Errorf("split %d is unknown", r.split)
		}
	}
	if queued != m.l.queued {
		return fmt.Errorf("%d parts queued, %d counted", queued, m.l.queued)
	}
	return nil
}

func TestLedgerModel(t *testing.T) {
	steps := 1500
	if testing.Short() {
		steps = 300
	}
	for replicas := 1; replicas <= maxReplicas; replicas++ {
		for seed := range int64(12) {
			ledgerWorld(t, replicas, seed, steps)
		}
	}
}

func ledgerWorld(t *testing.T, replicas int, seed int64, steps int) {
	t.Helper()
	m := &ledgerModel{
		rnd: rand.New(rand.NewSource(seed)), l: NewLedger(at(0)), durable: map[int]bool{}, sessions: map[SessionID]*modelSession{},
		members: []string{"a", "b", "c", "d"}, splits: map[SplitID]map[int]uint32{},
		replicas: replicas, picky: map[string]map[int]bool{},
	}
	for _, id := range m.members {
		m.picky[id] = map[int]bool{}
	}
	m.allSets()
	m.newSplit()
	for step := range steps {
		switch m.rnd.Intn(8) {
		case 0, 1, 2:
			m.read(true)
		case 3:
			if id, s := m.any(); s != nil && len(s.batches) > 0 {
				m.makeDurable(id, s, s.durable+uint64(m.rnd.Intn(len(s.batches)-int(s.durable)+1)))
			}
		case 4:
			if m.rnd.Intn(4) == 0 {
				m.newSplit()
			} else if id, s := m.any(); s != nil && m.rnd.Intn(3) == 0 {
				m.end1(id)
			}
		case 5:
			if id, s := m.any(); s != nil {
				m.receive(id, s, s.received+uint64(m.rnd.Intn(len(s.batches)-int(s.received)+1)))
				if m.rnd.Intn(4) == 0 {
					m.l.Detach(id, s.received)
				}
			}
		case 6:
			m.rewind()
		case 7:
			if len(m.works) > 0 {
				m.finish(true)
			}
		}
		if err := m.check(); err != nil {
			t.Fatalf("%d replicas, seed %d, step %d: %v", replicas, seed, step, err)
		}
	}
	// Faults end: all becomes durable.
	for range 10 { // what is refused by then is sent again
		for len(m.works) > 0 || m.rewind() {
			m.finish(false)
		}
		for id := SessionID(1); id <= m.last; id++ {
			if s := m.sessions[id]; s != nil {
				m.makeDurable(id, s, uint64(len(s.batches)))
			}
		}
	}
	if err := m.check(); err != nil {
		t.Fatalf("%d replicas, seed %d: %v", replicas, seed, err)
	}
	if st := m.l.Stats(); m.l.Checkpoint() != m.pos || st != (LedgerStats{}) || len(m.l.Splits()) != 0 {
		t.Fatalf("%d replicas, seed %d: in the end checkpoint %v, tail %v, %+v", replicas, seed, m.l.Checkpoint(), m.pos, st)
	}
}

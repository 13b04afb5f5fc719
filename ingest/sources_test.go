package ingest

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

func TestSources(t *testing.T) {
	s := sources{tenants: map[string][]source{}}
	now := time.Unix(1_700_000_000, 0)
	id := func(n uint64) (b [16]byte) {
		binary.BigEndian.PutUint64(b[:], n)
		return b
	}
	says := func(copies uint32) *shippb.Heartbeat {
		return &shippb.Heartbeat{Coverage: &shippb.Coverage{
			ReplicationFactor: 2, Copies: copies, Zones: copies, Holders: []*shippb.Holder{{Member: "a", Process: make([]byte, 16)}},
		}}
	}
	s.hear("t", id(1), nil, now)
	if got := s.coverage("t", now); len(got) != 1 || got[0].ReplicationFactor != 1 || len(got[0].Sources) != 0 {
		t.Errorf("a source that has said nothing yet: %v", got)
	}
	s.hear("t", id(1), says(2), now)
	s.hear("t", id(2), says(2), now.Add(time.Second))
	s.hear("t", id(3), says(1), now)
	s.hear("other", id(4), &shippb.Heartbeat{}, now)
	got := s.coverage("t", now.Add(2*time.Second))
	if len(got) != 2 || len(got[0].Sources) != 2 || got[0].AgeMs != 2000 || got[1].Copies != 1 || got[1].Sources[0] != 3 {
		t.Errorf("two that say the same, and one: %v", got)
	}
	// One falls silent: it is told apart.
	s.hear("t", id(2), nil, now.Add(20*time.Second))
	if got := s.coverage("t", now.Add(20*time.Second)); len(got) != 3 {
		t.Errorf("with a silent one: %v", got)
	}
	// One sends to a single ingester from now on.
	s.hear("t", id(2), &shippb.Heartbeat{}, now.Add(21*time.Second))
	if got := s.coverage("t", now.Add(21*time.Second)); len(got) != 3 || got[1].ReplicationFactor != 1 {
		t.Errorf("with a single one: %v", got)
	}
	s.expire(now.Add(sourceTTL + 10*time.Second))
	if got := s.coverage("t", now.Add(sourceTTL)); len(got) != 1 || len(s.tenants) != 1 {
		t.Errorf("left: %v, %d tenants", got, len(s.tenants))
	}
	// However many there are, little is kept, and it says so.
	for n := range uint64(3 * maxSources) {
		s.hear("many", id(n+1), says(2), now)
	}
	single := false
	for _, c := range s.coverage("many", now) {
		single = single || c.ReplicationFactor == 1
	}
	if n := len(s.tenants["many"]); n != maxSources+1 || !single {
		t.Errorf("%d sources kept, %v", n, single)
	}
}

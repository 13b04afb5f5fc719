package ingest

import (
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

const (
	// sourceTTL is how long a source is remembered that isn't heard of any more:
	// longer than its samples wait for a flush.
	sourceTTL = time.Hour
	// maxSources and maxHolders bound what is remembered of a tenant, and of one
	// source.
	maxSources = 1000
	maxHolders = 1000
)

// sources remembers what the sources of each tenant said of their copies, for
// gateways. It is safe for concurrent use.
type sources struct {
	mu      sync.Mutex
	tenants map[string][]source
}

type source struct {
	id       [16]byte
	heard    time.Time
	coverage *shippb.Coverage // nil: each series has one owner
}

// hear notes that a source was heard of. Without a heartbeat, what it said before
// holds.
func (s *sources) hear(tenant string, id [16]byte, beat *shippb.Heartbeat, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.tenants[tenant]
	i := slices.IndexFunc(list, func(x source) bool { return x.id == id })
	if i < 0 {
		if len(list) > maxSources {
			return // the last place says that there are more
		}
		i = len(list)
		list = append(list, source{id: id, heard: now})
		s.tenants[tenant] = list
		if i == maxSources {
			list[i].id = [16]byte{} // it stands for all that don't fit
			return
		}
	}
	x := &list[i]
	x.heard = now
	if beat == nil {
		return
	}
	x.coverage = nil
	if c := beat.Coverage; c != nil && c.ReplicationFactor > 1 && len(c.Holders) <= maxHolders {
		x.coverage = c
	}
}

// expire forgets sources that were not heard of for long.
func (s *sources) expire(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for tenant, list := range s.tenants {
		list = slices.DeleteFunc(list, func(x source) bool { return now.Sub(x.heard) > sourceTTL })
		if len(list) == 0 {
			delete(s.tenants, tenant)
			continue
		}
		s.tenants[tenant] = list
	}
}

// coverage is what the sources of a tenant said, those that said the same as one.
func (s *sources) coverage(tenant string, now time.Time) []*fetchpb.Coverage {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*fetchpb.Coverage
	var said []*shippb.Coverage
	for _, x := range s.tenants[tenant] {
		id, age := binary.BigEndian.Uint64(x.id[:]), now.Sub(x.heard).Milliseconds()
		i := slices.IndexFunc(said, func(c *shippb.Coverage) bool { return c == x.coverage || proto.Equal(c, x.coverage) })
		if i >= 0 && x.coverage == nil {
			continue
		}
		if i >= 0 && (age < staleAfter) == (out[i].AgeMs < staleAfter) {
			out[i].Sources = append(out[i].Sources, id)
			out[i].AgeMs = max(out[i].AgeMs, age)
			continue
		}
		c := &fetchpb.Coverage{ReplicationFactor: 1}
		if x.coverage != nil {
			c.Sources, c.AgeMs = []uint64{id}, age
			c.ReplicationFactor, c.Copies, c.Zones = x.coverage.ReplicationFactor, x.coverage.Copies, x.coverage.Zones
			for _, h := range x.coverage.Holders {
				c.Holders = append(c.Holders, &fetchpb.Holder{Member: h.Member, Process: h.Process})
			}
		}
		out, said = append(out, c), append(said, x.coverage)
	}
	return out
}

// staleAfter, in ms, keeps those that are silent apart from those that speak.
const staleAfter = 6000

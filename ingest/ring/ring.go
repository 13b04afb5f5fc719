// Package ring says who owns a series. It is pure: a Snapshot of the members
// goes in, owners of tokens come out. Spreading snapshots is left to package
// ingest/gossip (among ingesters and gateways) and to the ring endpoint of the
// gateway (for sidecars, which don't gossip).
//
// A series' token is a 32-bit hash of its tenant and its full label set, so
// that no metric name can hot-spot a shard. Each member owns the arcs that end
// in its virtual nodes; these are a pure function of the member's id, so two
// processes with the same list of members have the same ring.
package ring

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/prometheus/model/labels"
)

// TokensPerMember is the number of virtual nodes of a member. With 256 the
// largest share of ten members is within about 15 % of the mean.
const TokensPerMember = 256

// State of a member.
type State string

// The states of a member. New samples go to active members only; reads ask all
// members but those that have left.
const (
	Joining State = "joining" // up, not yet ready to receive
	Active  State = "active"
	Leaving State = "leaving" // flushing; takes nothing new, still answers reads
	Left    State = "left"    // gone on purpose, all of it flushed
	Lost    State = "lost"    // gone without leaving; what it held is re-sent by the sources
)

// Member is one ingester.
type Member struct {
	ID      string `json:"id"`
	Address string `json:"address"` // host:port of its gRPC server
	Zone    string `json:"zone,omitempty"`
	State   State  `json:"state"`
	// Process is new at each start of the member, so that a list before a
	// restart and one after differ in version.
	Process string `json:"process,omitempty"`
	// Memory names what the member has received: a process that found the commit
	// log of the one before has the same. Empty: the process names it.
	Memory string `json:"memory,omitempty"`
}

// Snapshot is the list of members at one moment, sorted by id and process: a
// member that restarted may be there twice, once as lost. Version is a digest of
// it: equal versions mean equal lists.
type Snapshot struct {
	Version string   `json:"version"`
	Members []Member `json:"members"`
}

// NewSnapshot sorts members and computes the version. It keeps the slice.
func NewSnapshot(members []Member) Snapshot {
	slices.SortFunc(members, func(a, b Member) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Process, b.Process), strings.Compare(string(a.State), string(b.State)))
	})
	var buf []byte
	for _, m := range members {
		for _, s := range []string{m.ID, m.Address, m.Zone, string(m.State), m.Process, m.Memory} {
			buf = binary.AppendUvarint(buf, uint64(len(s)))
			buf = append(buf, s...)
		}
	}
	return Snapshot{
		Version: hex.EncodeToString(binary.BigEndian.AppendUint64(nil, xxhash.Sum64(buf))),
		Members: members,
	}
}

// Token is the place of a series on the ring: a hash of the tenant and of the
// full label set (labels.StableHash).
func Token(tenant string, ls labels.Labels) uint32 {
	var buf [136]byte
	b := append(buf[:0], tenant...)
	b = append(b, 0xff)
	b = binary.BigEndian.AppendUint64(b, labels.StableHash(ls))
	return uint32(xxhash.Sum64(b))
}

// Ring answers who owns a token. It is immutable and safe for concurrent use.
type Ring struct {
	snapshot Snapshot
	since    time.Time
	members  []Member // active ones
	digests  []uint32 // of those that may have samples
	tokens   []token  // sorted by value
}

type token struct {
	value  uint32
	member int32 // index in members
}

// New builds the ring of the active members of s.
func New(s Snapshot) *Ring {
	r := &Ring{snapshot: s}
	for _, m := range s.Members {
		if m.State == Active {
			r.members = append(r.members, m)
		}
		if m.State == Active || m.State == Leaving {
			r.digests = append(r.digests, m.Digest())
		}
	}
	r.build()
	return r
}

func (r *Ring) build() {
	r.tokens = make([]token, 0, len(r.members)*TokensPerMember)
	var buf []byte
	for i, m := range r.members {
		for n := range TokensPerMember {
			buf = append(buf[:0], m.ID...)
			buf = append(buf, 0xff)
			buf = strconv.AppendInt(buf, int64(n), 10)
			r.tokens = append(r.tokens, token{uint32(xxhash.Sum64(buf)), int32(i)})
		}
	}
	slices.SortFunc(r.tokens, func(a, b token) int {
		if a.value != b.value {
			if a.value < b.value {
				return -1
			}
			return 1
		}
		// Two members share a virtual node: the lesser id has it everywhere.
		return strings.Compare(r.members[a.member].ID, r.members[b.member].ID)
	})
}

// Snapshot is what the ring was built from.
func (r *Ring) Snapshot() Snapshot { return r.snapshot }

// Version is the version of the snapshot that the ring was built from.
func (r *Ring) Version() string { return r.snapshot.Version }

// Since is when a Live got the ring; zero if it isn't from one.
func (r *Ring) Since() time.Time { return r.since }

// Active are the members that take new samples. The slice is not to be changed.
func (r *Ring) Active() []Member { return r.members }

// Digests are those of the members that are active or leaving. The slice is not to
// be changed.
func (r *Ring) Digests() []uint32 { return r.digests }

// Owner is the member whose virtual node is the first at or after tok. It is
// false if the ring has no active member.
func (r *Ring) Owner(tok uint32) (Member, bool) {
	return r.OwnerExcept(tok, nil)
}

// OwnerExcept is the first owner at or after tok that skip doesn't name by its
// id: where samples go while an owner can't be reached. Any ingester accepts
// any series. It is false if no member is left.
func (r *Ring) OwnerExcept(tok uint32, skip func(id string) bool) (Member, bool) {
	n := len(r.tokens)
	if n == 0 {
		return Member{}, false
	}
	start := sort.Search(n, func(i int) bool { return r.tokens[i].value >= tok })
	for i := range n {
		m := r.members[r.tokens[(start+i)%n].member]
		if skip == nil || !skip(m.ID) {
			return m, true
		}
	}
	return Member{}, false
}

// Owners are the n members that keep the copies of a series with the token tok,
// fewer if there aren't so many that skip, which may be nil, doesn't name by
// their ids. They are distinct, the first is OwnerExcept(tok, skip), and the
// rest follow clockwise: each in a zone that has none yet as long as there is
// one, then in any. A member without a zone is a zone of its own. A member that
// comes takes the place of at most one of them, and one that goes and was none of
// them changes nothing.
func (r *Ring) Owners(tok uint32, n int, skip func(id string) bool) []Member {
	if n == 1 {
		if m, ok := r.OwnerExcept(tok, skip); ok {
			return []Member{m}
		}
		return nil
	}
	owners := make([]Member, 0, n)
	var spare []Member // passed by because of their zones, in order
	seen := make(map[int32]bool, 2*n)
	start := sort.Search(len(r.tokens), func(i int) bool { return r.tokens[i].value >= tok })
	for i := 0; i < len(r.tokens) && len(owners) < n && len(seen) < len(r.members); i++ {
		k := r.tokens[(start+i)%len(r.tokens)].member
		if seen[k] {
			continue
		}
		seen[k] = true
		m := r.members[k]
		switch {
		case skip != nil && skip(m.ID):
		case slices.ContainsFunc(owners, func(o Member) bool { return o.Failure() == m.Failure() }):
			spare = append(spare, m)
		default:
			owners = append(owners, m)
		}
	}
	return append(owners, spare[:min(len(spare), n-len(owners))]...)
}

// Digest stands for the member and its memory.
func (m *Member) Digest() uint32 {
	return uint32(xxhash.Sum64String(m.ID + "\x00" + cmp.Or(m.Memory, m.Process))) //nolint:gosec // its lower half
}

// Failure names what the member fails together with: its zone, or itself if it
// has none.
func (m *Member) Failure() string {
	if m.Zone != "" {
		return "zone " + m.Zone
	}
	return "member " + m.ID
}

// Subset is the shuffle shard of a tenant: a ring of n of the active members,
// the same ones as long as the members are the same, and mostly the same ones
// when a member comes or goes. With n of zero, or not below the number of
// active members, it is the ring itself. For more than one replica of each
// series it has at least that many members, and zones have the same number of
// them, as far as there are as many.
func (r *Ring) Subset(tenant string, n, replicas int) *Ring {
	if n > 0 {
		n = max(n, replicas)
	}
	if n <= 0 || n >= len(r.members) {
		return r
	}
	taken := make(map[string]bool, n)
	inZone, left := map[string]int{}, map[string]int{} // members taken, and not, by zone
	for i := range r.members {
		left[r.members[i].Failure()]++
	}
	unfair := func(m *Member) bool { // a zone that has some left has fewer in
		for z, k := range left {
			if k > 0 && inZone[z] < inZone[m.Failure()] {
				return true
			}
		}
		return false
	}
	byID := make(map[string]*Member, len(r.members))
	for i := range r.members {
		byID[r.members[i].ID] = &r.members[i]
	}
	sub := &Ring{snapshot: r.snapshot, since: r.since}
	var buf []byte
	for i := 0; len(sub.members) < n; i++ {
		buf = append(buf[:0], tenant...)
		buf = append(buf, 0xfe)
		buf = strconv.AppendInt(buf, int64(i), 10)
		m, _ := r.OwnerExcept(uint32(xxhash.Sum64(buf)), func(id string) bool {
			return taken[id] || replicas > 1 && unfair(byID[id])
		})
		taken[m.ID] = true
		inZone[m.Failure()]++
		left[m.Failure()]--
		sub.members = append(sub.members, m)
	}
	slices.SortFunc(sub.members, func(a, b Member) int { return strings.Compare(a.ID, b.ID) })
	sub.build()
	return sub
}

// Shares says, by member id, which part of the token space each active member
// owns. They add up to 1.
func (r *Ring) Shares() map[string]float64 {
	shares := make(map[string]float64, len(r.members))
	if len(r.members) == 1 {
		shares[r.members[0].ID] = 1
		return shares
	}
	for i, t := range r.tokens {
		prev := r.tokens[(i+len(r.tokens)-1)%len(r.tokens)].value
		shares[r.members[t.member].ID] += float64(t.value-prev) / (1 << 32) // wraps around at 0
	}
	return shares
}

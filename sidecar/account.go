package sidecar

import (
	"slices"
)

// account collects what a range, or a Work, became.
type account struct {
	members []memberCopy // few: one per owner
	// used are the sets of owners that samples went to, as bits by their index in
	// the split; nothing where each series has one owner.
	used    []uint64
	changed bool // something was lost since it was last looked at
}

// memberCopy is what one owner got, of all its sets.
type memberCopy struct {
	member string
	Copy
}

func (a *account) member(id string) *memberCopy {
	for i := range a.members {
		if a.members[i].member == id {
			return &a.members[i]
		}
	}
	a.members = append(a.members, memberCopy{member: id})
	return &a.members[len(a.members)-1]
}

func (a *account) sent(member string, id SessionID, seq uint64) {
	m := a.member(member)
	if i := slices.IndexFunc(m.Sent, func(x Sent) bool { return x.Session == id }); i >= 0 {
		m.Sent[i].Seq = seq
		return
	}
	m.Sent = append(m.Sent, Sent{id, seq, seq})
}

func (a *account) lost(member string) {
	m := a.member(member)
	a.changed = a.changed || !m.Lost
	m.Lost = true
}

func (a *account) isLost(member string) bool {
	return slices.ContainsFunc(a.members, func(m memberCopy) bool { return m.member == member && m.Lost })
}

// use notes that samples go to a set of owners.
func (a *account) use(set uint32) {
	for int(set/64) >= len(a.used) {
		a.used = append(a.used, 0)
	}
	a.used[set/64] |= 1 << (set % 64)
}

// sets calls fn for each set of owners in use.
func (a *account) sets(sp *split, fn func(*ownerSet)) {
	for i, word := range a.used {
		for b := range 64 {
			if word&(1<<b) != 0 {
				fn(&sp.sets[i*64+b])
			}
		}
	}
}

// parts returns the account as the ledger wants it.
func (a *account) parts(sp *split) []Part {
	if len(a.members) == 0 && len(a.used) == 0 {
		return nil
	}
	parts := make([]Part, 0, len(a.members))
	if sp.replicas == 1 {
		copies := make([]Copy, len(a.members))
		for i, m := range a.members {
			copies[i] = m.Copy
			parts = append(parts, Part{Owners: m.member, Copies: copies[i : i+1]})
		}
		return parts
	}
	a.sets(sp, func(set *ownerSet) {
		if slices.ContainsFunc(parts, func(p Part) bool { return p.Owners == set.name }) {
			return // the same owners in another order
		}
		p := Part{Owners: set.name}
		for _, k := range set.owners {
			id := sp.owners[k].member.ID
			i := slices.IndexFunc(a.members, func(m memberCopy) bool { return m.member == id })
			if i < 0 {
				p.Copies = append(p.Copies, Copy{Lost: true}) // nothing was sent
				continue
			}
			p.Copies = append(p.Copies, a.members[i].Copy)
		}
		parts = append(parts, p)
	})
	return parts
}

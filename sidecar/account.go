package sidecar

import (
	"slices"
)

// account collects what a range, or a Work, became.
type account struct {
	parts []Part // few: one per owner
}

func (a *account) part(member string) *Part {
	for i := range a.parts {
		if a.parts[i].Member == member {
			return &a.parts[i]
		}
	}
	a.parts = append(a.parts, Part{Member: member})
	return &a.parts[len(a.parts)-1]
}

func (a *account) sent(member string, id SessionID, seq uint64) {
	p := a.part(member)
	if i := slices.IndexFunc(p.Sent, func(x Sent) bool { return x.Session == id }); i >= 0 {
		p.Sent[i].Seq = seq
		return
	}
	p.Sent = append(p.Sent, Sent{id, seq})
}

func (a *account) lost(member string) { a.part(member).Lost = true }

// all returns the parts as one.
func (a *account) all() (sent []Sent, lost bool) {
	for _, p := range a.parts {
		sent = append(sent, p.Sent...)
		lost = lost || p.Lost
	}
	return sent, lost
}

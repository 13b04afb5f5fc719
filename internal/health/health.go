// Package health says in words what is wrong with a process at present, and since
// when. Components note conditions on a Board; a page shows them.
package health

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Condition is something that is wrong.
type Condition struct {
	What  string    `json:"what"`
	Since time.Time `json:"since"`
}

// Board holds the conditions of a component. The zero value is ready, and safe
// for concurrent use; a nil Board takes everything and shows nothing.
type Board struct {
	mu         sync.Mutex
	conditions map[string]Condition
}

// Note says whether the condition named key holds, and in words what that means
// for an operator. Since counts from the first Note in a row that says it does.
func (b *Board) Note(key string, holds bool, format string, args ...any) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !holds {
		delete(b.conditions, key)
		return
	}
	c, ok := b.conditions[key]
	if !ok {
		c.Since = time.Now()
	}
	c.What = fmt.Sprintf(format, args...)
	if b.conditions == nil {
		b.conditions = map[string]Condition{}
	}
	b.conditions[key] = c
}

// Conditions returns what holds now, the longest-standing first.
func (b *Board) Conditions() []Condition {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []Condition
	for _, c := range b.conditions {
		out = append(out, c)
	}
	slices.SortFunc(out, func(x, y Condition) int { return cmp.Or(x.Since.Compare(y.Since), cmp.Compare(x.What, y.What)) })
	return out
}

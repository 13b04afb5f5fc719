package index

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"time"
)

const choiceVersion = 1

// ChoiceDay is the time that a choice row speaks of, in ms.
const ChoiceDay = int64(24 * time.Hour / time.Millisecond)

// MaxChoices bounds the intervals of a choice row.
const MaxChoices = 16384

// Choice is an interval of time for which a replica is chosen.
type Choice struct {
	From    int64  `json:"from"`  // ms since the epoch
	Until   int64  `json:"until"` // ms, exclusive
	Replica string `json:"replica"`
}

// ChoiceRow says which of the replicas of a group is chosen when, within a day.
// What is once in a row stays in it.
type ChoiceRow struct {
	Tenant string
	Group  string // by what the replicas of a group name it
	Day    int64  // days since the epoch, may be negative

	// Choices are disjoint and ascending, not empty, and within the day.
	Choices []Choice

	value []byte // as it was read; nil for a row that isn't there
}

// choiceHash doesn't hold the group as it is, which may be longer than a key.
func choiceHash(tenant, group string) string {
	sum := sha256.Sum256([]byte(group))
	return "c/" + hex.EncodeToString(sum[:16]) + "/" + tenant
}

func (r *ChoiceRow) key() Key {
	return Key{Hash: choiceHash(r.Tenant, r.Group), Range: timeKey(r.Day)}
}

func (r *ChoiceRow) validate() error {
	const lastDay = math.MaxInt64/ChoiceDay - 1
	if r.Tenant == "" || r.Day > lastDay || r.Day < -lastDay || len(r.Choices) == 0 || len(r.Choices) > MaxChoices {
		return fmt.Errorf("choice row of tenant %q, day %d: %d intervals, 1 to %d are possible", r.Tenant, r.Day, len(r.Choices), MaxChoices)
	}
	last, end := r.Day*ChoiceDay, (r.Day+1)*ChoiceDay
	for _, c := range r.Choices {
		if c.From < last || c.Until <= c.From || c.Until > end || c.Replica == "" {
			return fmt.Errorf("choice row of tenant %q, day %d: interval from %d to %d ms of replica %q", r.Tenant, r.Day, c.From, c.Until, c.Replica)
		}
		last = c.Until
	}
	return nil
}

func (r *ChoiceRow) encode() (Item, error) {
	if err := r.validate(); err != nil {
		return Item{}, err
	}
	var names []string
	number := map[string]int{}
	for _, c := range r.Choices {
		if _, ok := number[c.Replica]; !ok {
			number[c.Replica] = len(names)
			names = append(names, c.Replica)
		}
	}
	b := []byte{choiceVersion}
	b = binary.AppendUvarint(b, uint64(len(names)))
	for _, n := range names {
		b = appendText(b, n)
	}
	b = binary.AppendUvarint(b, uint64(len(r.Choices)))
	last := r.Day * ChoiceDay
	for _, c := range r.Choices {
		b = binary.AppendUvarint(b, uint64(c.From-last))       //nolint:gosec // validated
		b = binary.AppendUvarint(b, uint64(c.Until-c.From))    //nolint:gosec // validated
		b = binary.AppendUvarint(b, uint64(number[c.Replica])) //nolint:gosec // few
		last = c.Until
	}
	return seal(r.key(), b), nil
}

func decodeChoiceRow(tenant, group string, it Item) (ChoiceRow, error) {
	r := ChoiceRow{Tenant: tenant, Group: group, value: it.Value}
	if len(it.Range) != 8 {
		return r, fmt.Errorf("%w: range key of %d bytes", ErrCorrupt, len(it.Range))
	}
	r.Day = int64(binary.BigEndian.Uint64(it.Range) ^ 1<<63) //nolint:gosec // bits
	d, err := open(it, choiceVersion)
	if err != nil {
		return r, err
	}
	names := make([]string, d.Count(1))
	for i := range names {
		names[i] = d.Text()
	}
	r.Choices = make([]Choice, d.Count(3))
	last := r.Day * ChoiceDay
	for i := range r.Choices {
		c := &r.Choices[i]
		c.From = last + d.within(ChoiceDay)
		c.Until = c.From + d.within(ChoiceDay)
		last = c.Until
		n := d.Uvarint()
		if n >= uint64(len(names)) {
			d.Fail("unknown replica")
			break
		}
		c.Replica = names[n]
	}
	if err := d.End(); err != nil {
		return r, err
	}
	if err := r.validate(); err != nil {
		return r, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return r, nil
}

// within reads a number of at most limit.
func (d *decoder) within(limit int64) int64 {
	v := d.Uvarint()
	if v > uint64(limit) { //nolint:gosec // positive
		d.Fail("number too large")
		return 0
	}
	return int64(v) //nolint:gosec // bounded
}

// Choices returns the rows of a group for days from to to, both included, in
// order; days without one are left out.
func (x *Index) Choices(ctx context.Context, tenant, group string, from, to int64, consistent bool) ([]ChoiceRow, error) {
	items, err := x.store.Query(ctx, Query{Hash: choiceHash(tenant, group), From: timeKey(from), To: timeKey(to), Consistent: consistent})
	if err != nil {
		return nil, fmt.Errorf("choice rows of tenant %s: %w", tenant, err)
	}
	rows := make([]ChoiceRow, len(items))
	for i, it := range items {
		if rows[i], err = decodeChoiceRow(tenant, group, it); err != nil {
			return nil, rowError(it, err)
		}
	}
	return rows, nil
}

// PutChoices replaces a row that was returned by Choices or PutChoices, or makes
// one, by the row with these choices, if it hasn't changed since. It returns the
// row that holds then; where that is another's the error wraps ErrConflict.
func (x *Index) PutChoices(ctx context.Context, r ChoiceRow, choices []Choice) (ChoiceRow, error) {
	old := r.value
	r.Choices = choices
	it, err := r.encode()
	if err != nil {
		return ChoiceRow{}, err
	}
	current, err := x.store.PutIf(ctx, it, old)
	if err == nil {
		r.value = it.Value
		return r, nil
	}
	err = fmt.Errorf("choice row of tenant %s, day %d: %w", r.Tenant, r.Day, err)
	if !errors.Is(err, ErrConflict) {
		return ChoiceRow{}, err
	}
	if current == nil { // it is gone: somebody has removed it
		return ChoiceRow{Tenant: r.Tenant, Group: r.Group, Day: r.Day}, err
	}
	it.Value = current
	got, derr := decodeChoiceRow(r.Tenant, r.Group, it)
	if derr != nil {
		return ChoiceRow{}, rowError(it, derr)
	}
	return got, err
}

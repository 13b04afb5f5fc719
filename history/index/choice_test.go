package index

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestChoiceRow(t *testing.T) {
	const day = 20_000
	at := func(from, until int64, replica string) Choice {
		return Choice{From: day*ChoiceDay + from, Until: day*ChoiceDay + until, Replica: replica}
	}
	row := ChoiceRow{Tenant: "acme", Group: `{cluster="eu"}`, Day: day, Choices: []Choice{
		at(0, 1, "a"), at(1, 60_000, "b"), at(70_000, 80_001, "a"), at(ChoiceDay-1, ChoiceDay, "ä"),
	}}
	past := ChoiceRow{Tenant: "acme", Day: -1, Choices: []Choice{{From: -5, Until: 0, Replica: "a"}}}
	for _, want := range []ChoiceRow{row, past} {
		it, err := want.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeChoiceRow(want.Tenant, want.Group, it)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(ChoiceRow{})); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	for name, choices := range map[string][]Choice{
		"none":       {},
		"too many":   make([]Choice, MaxChoices+1),
		"before":     {at(-1, 5, "a")},
		"behind":     {at(5, ChoiceDay+1, "a")},
		"empty":      {at(5, 5, "a")},
		"overlap":    {at(5, 10, "a"), at(9, 20, "b")},
		"backwards":  {at(50, 60, "a"), at(9, 20, "b")},
		"no replica": {at(5, 10, "")},
	} {
		bad := row
		bad.Choices = choices
		if _, err := bad.encode(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}

	it, err := row.encode()
	if err != nil {
		t.Fatal(err)
	}
	wantErr := func(name string, it Item, want error) {
		t.Helper()
		if _, err := decodeChoiceRow(row.Tenant, row.Group, it); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	for i := range it.Value {
		bad := it
		bad.Value = append([]byte(nil), it.Value...)
		bad.Value[i] ^= 1
		wantErr("flipped bit", bad, ErrCorrupt)
		bad.Value = it.Value[:i]
		wantErr("cut", bad, ErrCorrupt)
	}
	other := seal(it.Key, append([]byte{choiceVersion + 1}, it.Value[1:len(it.Value)-checksumSize]...))
	wantErr("other version", other, ErrVersion)
	moved := it
	moved.Hash = choiceHash("acme", "another")
	wantErr("another group's", moved, ErrCorrupt)

	// Sealed bytes that mean nothing: an error, never more.
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		body := append([]byte(nil), it.Value[:len(it.Value)-checksumSize]...)
		for range 1 + rnd.IntN(4) {
			body[1+rnd.IntN(len(body)-1)] = byte(rnd.Uint32())
		}
		if r, err := decodeChoiceRow(row.Tenant, row.Group, seal(it.Key, body[:1+rnd.IntN(len(body))])); err == nil {
			if err := r.validate(); err != nil {
				t.Fatalf("a row was read that can't be written: %v", err)
			}
		}
	}
}

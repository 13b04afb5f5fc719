package health

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestBoard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Board
		b.Note("a", true, "a is %d", 1)
		began := time.Now()
		time.Sleep(time.Second)
		b.Note("b", true, "b")
		b.Note("a", true, "a is %d", 2)
		got := b.Conditions()
		if len(got) != 2 || got[0].What != "a is 2" || !got[0].Since.Equal(began) || got[1].What != "b" {
			t.Fatalf("%+v", got)
		}
		b.Note("a", false, "")
		time.Sleep(time.Second)
		b.Note("a", true, "again")
		if got := b.Conditions(); len(got) != 2 || got[1].What != "again" || !got[1].Since.Equal(began.Add(2*time.Second)) {
			t.Fatalf("%+v", got)
		}
		var none *Board
		none.Note("a", true, "a")
		if none.Conditions() != nil {
			t.Fatal("a nil board shows something")
		}
	})
}

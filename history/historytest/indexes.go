package historytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
)

// TestIndex runs the contract of index.Store against stores that open makes;
// each is empty and of its own.
func TestIndex(t *testing.T, open func(t testing.TB) index.Store) {
	t.Helper()
	for name, test := range map[string]func(*testing.T, index.Store){
		"round trip":      testRowRoundTrip,
		"order and range": testRowOrder,
		"paging":          testRowPaging,
		"batches":         testRowBatches,
		"conditions":      testRowConditions,
		"one winner":      testRowOneWinner,
		"delete":          testRowDelete,
		"impossible":      testRowImpossible,
		"cancelled":       testRowCancelled,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func row(hash, rng, value string) index.Item {
	return index.Item{Key: index.Key{Hash: hash, Range: []byte(rng)}, Value: []byte(value)}
}

func putRows(t testing.TB, s index.Store, items ...index.Item) {
	t.Helper()
	if err := s.Put(t.Context(), items); err != nil {
		t.Fatal(err)
	}
}

func queryRows(t testing.TB, s index.Store, q index.Query) []index.Item {
	t.Helper()
	q.Consistent = true
	items, err := s.Query(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return items
}

func wantRows(t testing.TB, s index.Store, q index.Query, want ...index.Item) {
	t.Helper()
	got := queryRows(t, s, q)
	if len(got) == 0 && len(want) == 0 || reflect.DeepEqual(got, want) {
		return // cmp is slow on megabytes
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("query %+v (-want +got):\n%s", q, d)
	}
}

func testRowRoundTrip(t *testing.T, s index.Store) {
	putRows(t, s)
	a, b := row("t/ä", "\x00", "1"), row("t/ä", "\xff\x00", "2\x00")
	other := row("t/äa", "x", "3") // its hash key starts with the other's
	putRows(t, s, b, a, other)
	wantRows(t, s, index.Query{Hash: "t/ä"}, a, b)
	wantRows(t, s, index.Query{Hash: "t/äa"}, other)
	wantRows(t, s, index.Query{Hash: "t"})
	a.Value = []byte("changed")
	putRows(t, s, a, a)
	wantRows(t, s, index.Query{Hash: "t/ä"}, a, b)
	got := queryRows(t, s, index.Query{Hash: "t/ä"})
	clear(got[0].Value) // ours
	clear(got[0].Range)
	wantRows(t, s, index.Query{Hash: "t/ä"}, a, b)
	// Without consistency the answer may be older, but is an answer.
	if _, err := s.Query(t.Context(), index.Query{Hash: "t/ä"}); err != nil {
		t.Error(err)
	}
}

func testRowOrder(t *testing.T, s index.Store) {
	var all []index.Item
	for _, r := range []string{"\x00", "\x00\x00", "\x01", "A", "a", "a\x00", "ab", "b", "\x7f", "\x80", "\xff", "\xff\xff"} {
		all = append(all, row("h", r, "v"+r))
	}
	for i := range all { // written in another order
		putRows(t, s, all[(i*5)%len(all)])
	}
	wantRows(t, s, index.Query{Hash: "h"}, all...)
	between := func(from, to []byte) (out []index.Item) {
		for _, it := range all {
			if bytes.Compare(it.Range, from) >= 0 && (to == nil || bytes.Compare(it.Range, to) <= 0) {
				out = append(out, it)
			}
		}
		return out
	}
	for _, from := range [][]byte{nil, {}, {0}, []byte("a"), []byte("aa"), {0x80}, {0xff, 0xff, 0xff}} {
		for _, to := range [][]byte{nil, {}, {0}, []byte("a"), []byte("az"), {0x80}, {0xff, 0xff, 0xff}} {
			wantRows(t, s, index.Query{Hash: "h", From: from, To: to}, between(from, to)...)
		}
	}
	for _, n := range []int{1, 3, len(all), len(all) + 1} {
		wantRows(t, s, index.Query{Hash: "h", From: []byte("A"), Limit: n}, between([]byte("A"), nil)[:min(n, len(all)-3)]...)
	}
}

// testRowPaging has more than the 1 MB that DynamoDB gives in one answer.
func testRowPaging(t *testing.T, s index.Store) {
	var items []index.Item
	for i := range 60 {
		items = append(items, row("big", fmt.Sprintf("%04d", i), string(Bytes(50_000, uint64(i)))))
	}
	putRows(t, s, items...)
	wantRows(t, s, index.Query{Hash: "big"}, items...)
	wantRows(t, s, index.Query{Hash: "big", Limit: 45}, items[:45]...)
	wantRows(t, s, index.Query{Hash: "big", From: []byte("0010"), To: []byte("0050")}, items[10:51]...)
	largest := row("big", "z", string(Bytes(index.MaxValue, 1)))
	putRows(t, s, largest)
	wantRows(t, s, index.Query{Hash: "big", From: []byte("z")}, largest)
}

// testRowBatches writes more than one batch, some rows twice: the last one counts.
func testRowBatches(t *testing.T, s index.Store) {
	var items, want []index.Item
	var keys []index.Key
	for i := range 130 {
		r := row("h", fmt.Sprintf("%04d", i), fmt.Sprint(i))
		items = append(items, row("h", fmt.Sprintf("%04d", i), "old"), row("other", fmt.Sprint(i), "x"))
		want = append(want, r)
		keys = append(keys, r.Key, r.Key)
	}
	putRows(t, s, append(items, want...)...)
	wantRows(t, s, index.Query{Hash: "h"}, want...)
	if err := s.Delete(t.Context(), keys); err != nil {
		t.Fatal(err)
	}
	wantRows(t, s, index.Query{Hash: "h"})
	if n := len(queryRows(t, s, index.Query{Hash: "other"})); n != 130 {
		t.Errorf("%d rows left of the other hash key, want 130", n)
	}
}

func testRowConditions(t *testing.T, s index.Store) {
	putIf := func(value, old, wantCurrent string, wantConflict bool) {
		t.Helper()
		var o []byte
		if old != "" {
			o = []byte(old)
		}
		got, err := s.PutIf(t.Context(), row("h", "r", value), o)
		if errors.Is(err, index.ErrConflict) != wantConflict || (err != nil && !wantConflict) {
			t.Errorf("put %q if %q: %v, want conflict: %v", value, old, err, wantConflict)
		}
		if string(got) != wantCurrent {
			t.Errorf("put %q if %q: current is %q, want %q", value, old, got, wantCurrent)
		}
	}
	putIf("2", "1", "", true) // absent
	putIf("1", "", "1", false)
	putIf("1", "", "1", false) // repeated
	putIf("x", "", "1", true)
	putIf("2", "1", "2", false)
	putIf("2", "1", "2", false) // repeated
	putIf("3", "1", "2", true)
	wantRows(t, s, index.Query{Hash: "h"}, row("h", "r", "2"))
}

func testRowOneWinner(t *testing.T, s index.Store) {
	const n = 16
	current, won := make([]string, n), make([]bool, n)
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			got, err := s.PutIf(t.Context(), row("h", "r", fmt.Sprintf("writer %d", i)), nil)
			if err != nil && !errors.Is(err, index.ErrConflict) {
				return err
			}
			current[i], won[i] = string(got), err == nil
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	winner := -1
	for i := range n {
		if won[i] {
			if winner >= 0 {
				t.Fatalf("writers %d and %d won both", winner, i)
			}
			winner = i
		}
	}
	for i := range n {
		if want := fmt.Sprintf("writer %d", winner); current[i] != want {
			t.Errorf("writer %d saw %q, the winner is %q", i, current[i], want)
		}
	}
}

func testRowDelete(t *testing.T, s index.Store) {
	a, b := row("h", "a", "1"), row("h", "b", "2")
	putRows(t, s, a, b)
	for range 2 {
		if err := s.Delete(t.Context(), []index.Key{a.Key}); err != nil {
			t.Fatal(err)
		}
	}
	wantRows(t, s, index.Query{Hash: "h"}, b)
	if err := s.Delete(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if _, err := s.PutIf(t.Context(), a, nil); err != nil {
		t.Errorf("a deleted row is not absent: %v", err)
	}
}

func testRowImpossible(t *testing.T, s index.Store) {
	for name, it := range map[string]index.Item{
		"no hash":        row("", "r", "v"),
		"long hash":      row(strings.Repeat("h", index.MaxHash+1), "r", "v"),
		"hash not UTF-8": row("\xff", "r", "v"),
		"no range":       row("h", "", "v"),
		"long range":     row("h", strings.Repeat("r", index.MaxRange+1), "v"),
		"no value":       row("h", "r", ""),
		"large value":    row("h", "r", strings.Repeat("v", index.MaxValue+1)),
	} {
		if err := s.Put(t.Context(), []index.Item{row("h", "good", "v"), it}); err == nil {
			t.Errorf("put with %s: no error", name)
		}
		if _, err := s.PutIf(t.Context(), it, nil); err == nil || errors.Is(err, index.ErrConflict) {
			t.Errorf("put if absent with %s: %v", name, err)
		}
	}
	largest := row(strings.Repeat("h", index.MaxHash), strings.Repeat("r", index.MaxRange), "v")
	putRows(t, s, largest)
	wantRows(t, s, index.Query{Hash: largest.Hash}, largest)
}

func testRowCancelled(t *testing.T, s index.Store) {
	a := row("h", "a", "1")
	putRows(t, s, a)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, putIfErr := s.PutIf(ctx, row("h", "b", "2"), nil)
	_, queryErr := s.Query(ctx, index.Query{Hash: "h"})
	for name, err := range map[string]error{
		"put": s.Put(ctx, []index.Item{row("h", "c", "3")}), "put if": putIfErr, "query": queryErr, "delete": s.Delete(ctx, []index.Key{a.Key}),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", name, err)
		}
	}
	wantRows(t, s, index.Query{Hash: "h"}, a)
}

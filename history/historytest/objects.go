package historytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// TestObjects runs the contract of object.Store against stores that open makes;
// each is empty and of its own.
func TestObjects(t *testing.T, open func(t testing.TB) object.Store) {
	t.Helper()
	for name, test := range map[string]func(*testing.T, object.Store){
		"round trip":            testObjectRoundTrip,
		"ranges":                testObjectRanges,
		"absent":                testObjectAbsent,
		"put again":             testObjectPutAgain,
		"delete":                testObjectDelete,
		"list":                  testObjectList,
		"list more than a page": testObjectListMany,
		"invalid keys":          testObjectKeys,
		"short source":          testObjectShortSource,
		"cancelled":             testObjectCancelled,
		"concurrent":            testObjectConcurrent,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func put(t testing.TB, s object.Store, key string, b []byte) {
	t.Helper()
	if err := s.Put(t.Context(), key, bytes.NewReader(b), int64(len(b))); err != nil {
		t.Fatal(err)
	}
}

func wantObject(t testing.TB, s object.Store, key string, want []byte) {
	t.Helper()
	size, err := s.Size(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if size != int64(len(want)) {
		t.Fatalf("size of %s is %d, want %d", key, size, len(want))
	}
	got, err := s.GetRange(t.Context(), key, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s holds other bytes than were put", key)
	}
}

// Bytes are n bytes that no compression or mix-up of offsets leaves unnoticed,
// the same for every call with the same seed.
func Bytes(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // no secret
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func testObjectRoundTrip(t *testing.T, s object.Store) {
	for i, n := range []int{0, 1, 100, 70_000, 11 << 20} {
		key := fmt.Sprintf("blocks/%d-bytes", n)
		b := Bytes(n, uint64(i))
		put(t, s, key, b)
		wantObject(t, s, key, b)
	}
}

func testObjectRanges(t *testing.T, s object.Store) {
	b := Bytes(1000, 7)
	put(t, s, "r", b)
	for _, r := range [][2]int64{{0, 1000}, {0, 1}, {999, 1}, {10, 20}, {0, 0}, {500, 0}} {
		got, err := s.GetRange(t.Context(), "r", r[0], r[1])
		if err != nil {
			t.Fatalf("%d bytes at %d: %v", r[1], r[0], err)
		}
		if !bytes.Equal(got, b[r[0]:r[0]+r[1]]) {
			t.Fatalf("%d bytes at %d are wrong", r[1], r[0])
		}
	}
	for _, r := range [][2]int64{{0, 1001}, {999, 2}, {1000, 1}, {5000, 10}, {0, 1 << 40}} {
		if _, err := s.GetRange(t.Context(), "r", r[0], r[1]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d bytes at %d of 1000: %v, want unexpected EOF", r[1], r[0], err)
		}
	}
	for _, r := range [][2]int64{{-1, 10}, {0, -1}, {1 << 62, 1 << 62}} {
		if _, err := s.GetRange(t.Context(), "r", r[0], r[1]); err == nil {
			t.Fatalf("%d bytes at %d: no error", r[1], r[0])
		}
	}
	got, err := s.GetRange(t.Context(), "r", 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	clear(got) // ours
	wantObject(t, s, "r", b)
}

func testObjectAbsent(t *testing.T, s object.Store) {
	put(t, s, "folder/a", []byte("x"))
	for _, key := range []string{"absent", "folder", "folder/b", "other/a"} {
		if _, err := s.GetRange(t.Context(), key, 0, 1); !errors.Is(err, object.ErrNotExist) {
			t.Errorf("get %s: %v, want ErrNotExist", key, err)
		}
		if _, err := s.Size(t.Context(), key); !errors.Is(err, object.ErrNotExist) {
			t.Errorf("size of %s: %v, want ErrNotExist", key, err)
		}
		if err := s.Delete(t.Context(), key); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	wantObject(t, s, "folder/a", []byte("x"))
}

func testObjectPutAgain(t *testing.T, s object.Store) {
	put(t, s, "k", []byte("first and longer"))
	put(t, s, "k", []byte("second"))
	wantObject(t, s, "k", []byte("second"))
}

func testObjectDelete(t *testing.T, s object.Store) {
	put(t, s, "d/one", []byte("1"))
	put(t, s, "d/two", []byte("2"))
	for range 2 {
		if err := s.Delete(t.Context(), "d/one"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.GetRange(t.Context(), "d/one", 0, 1); !errors.Is(err, object.ErrNotExist) {
		t.Fatalf("deleted object: %v", err)
	}
	wantObject(t, s, "d/two", []byte("2"))
	put(t, s, "d/one", []byte("again"))
	wantObject(t, s, "d/one", []byte("again"))
}

func list(t testing.TB, s object.Store, prefix string) []string {
	t.Helper()
	keys := []string{}
	err := s.List(t.Context(), prefix, func(i object.Info) error {
		if i.Size != int64(len(i.Key)) {
			t.Errorf("%s is listed with %d bytes, want %d", i.Key, i.Size, len(i.Key))
		}
		if i.Modified.IsZero() {
			t.Errorf("%s is listed without a time", i.Key)
		}
		keys = append(keys, i.Key)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(keys)
	return keys
}

func testObjectList(t *testing.T, s object.Store) {
	all := []string{"a", "b/1", "b/2", "b/deep/3", "ba", "c-1"}
	for _, k := range all {
		put(t, s, k, []byte(k))
	}
	for prefix, want := range map[string][]string{
		"": all, "b": {"b/1", "b/2", "b/deep/3", "ba"}, "b/": {"b/1", "b/2", "b/deep/3"}, "b/d": {"b/deep/3"}, "x/": {}, "c-1": {"c-1"},
	} {
		if got := list(t, s, prefix); !slices.Equal(got, want) {
			t.Errorf("list %q = %q, want %q", prefix, got, want)
		}
	}
	stop := errors.New("stop")
	n := 0
	err := s.List(t.Context(), "", func(object.Info) error { n++; return stop })
	if !errors.Is(err, stop) || n != 1 {
		t.Errorf("list that is stopped: %v after %d", err, n)
	}
}

func testObjectListMany(t *testing.T, s object.Store) {
	const n = 1100 // S3 lists 1,000 at a time
	var g errgroup.Group
	g.SetLimit(16)
	for i := range n {
		key := fmt.Sprintf("many/%05d", i)
		g.Go(func() error { return s.Put(t.Context(), key, strings.NewReader(key), int64(len(key))) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s, "many/"); len(got) != n || got[n-1] != "many/01099" {
		t.Fatalf("%d objects listed, want %d", len(got), n)
	}
}

func testObjectKeys(t *testing.T, s object.Store) {
	for _, key := range []string{"", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/a", "a b", "a\x00", "ä", strings.Repeat("k", 513)} {
		if err := s.Put(t.Context(), key, strings.NewReader("x"), 1); !errors.Is(err, object.ErrKey) {
			t.Errorf("put %q: %v, want ErrKey", key, err)
		}
		if _, err := s.GetRange(t.Context(), key, 0, 1); !errors.Is(err, object.ErrKey) {
			t.Errorf("get %q: %v, want ErrKey", key, err)
		}
		if _, err := s.Size(t.Context(), key); !errors.Is(err, object.ErrKey) {
			t.Errorf("size of %q: %v, want ErrKey", key, err)
		}
		if err := s.Delete(t.Context(), key); !errors.Is(err, object.ErrKey) {
			t.Errorf("delete %q: %v, want ErrKey", key, err)
		}
	}
	key := strings.Repeat("k", 255) + "/AZ.09_=+@-" + strings.Repeat("x", 200)
	put(t, s, key, []byte(key))
	if got := list(t, s, ""); !slices.Equal(got, []string{key}) {
		t.Errorf("listed %q", got)
	}
}

func testObjectShortSource(t *testing.T, s object.Store) {
	if err := s.Put(t.Context(), "short", strings.NewReader("12345"), 10); err == nil {
		t.Fatal("no error for a source that ends early")
	}
	if _, err := s.Size(t.Context(), "short"); !errors.Is(err, object.ErrNotExist) {
		t.Fatalf("an object was made of half a source: %v", err)
	}
}

func testObjectCancelled(t *testing.T, s object.Store) {
	put(t, s, "c", []byte("c"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, getErr := s.GetRange(ctx, "c", 0, 1)
	_, sizeErr := s.Size(ctx, "c")
	for name, err := range map[string]error{
		"put": s.Put(ctx, "c2", strings.NewReader("x"), 1), "get": getErr, "size": sizeErr, "delete": s.Delete(ctx, "c"),
		"list": s.List(ctx, "", func(object.Info) error { return nil }),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", name, err)
		}
	}
	wantObject(t, s, "c", []byte("c"))
}

// testObjectConcurrent lets readers and writers of one key meet: they see one
// of the objects whole, never a mixture.
func testObjectConcurrent(t *testing.T, s object.Store) {
	const size = 300_000
	versions := make([][]byte, 4)
	for i := range versions {
		versions[i] = bytes.Repeat([]byte{byte('a' + i)}, size)
	}
	put(t, s, "shared", versions[0])
	var g errgroup.Group
	for _, v := range versions {
		g.Go(func() error {
			for range 5 {
				if err := s.Put(t.Context(), "shared", bytes.NewReader(v), size); err != nil {
					return err
				}
			}
			return nil
		})
		g.Go(func() error {
			for range 10 {
				b, err := s.GetRange(t.Context(), "shared", 0, size)
				if err != nil {
					return err
				}
				if !bytes.Equal(b, bytes.Repeat(b[:1], size)) {
					return errors.New("a read saw two objects mixed")
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

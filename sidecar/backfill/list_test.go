package backfill

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestList(t *testing.T) {
	_, b := oneBlock(t, false)
	dir := t.TempDir()
	meta, err := os.ReadFile(filepath.Join(b.Dir, "meta.json"))
	must(t, err)
	mk := func(name, meta string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		if meta != "" {
			must(t, os.WriteFile(filepath.Join(dir, name, "meta.json"), []byte(meta), 0o644))
		}
	}
	const (
		absent  = "01HEZ000000000000000000001"
		broken  = "01HEZ000000000000000000002"
		version = "01HEZ000000000000000000003"
		empty   = "01HEZ000000000000000000004"
		older   = "01HEZ000000000000000000005"
		ooo     = "01HEZ000000000000000000006"
	)
	mk(b.ULID.String(), string(meta))
	mk(absent, "")
	mk(broken, string(meta[:len(meta)/2]))
	mk(version, `{"ulid":"`+version+`","minTime":1,"maxTime":2,"version":2}`)
	mk(empty, "{}")
	mk(older, `{"ulid":"`+older+`","minTime":-5,"maxTime":2,"version":1,"compaction":{"level":3,"sources":["`+absent+`","`+broken+`"],"hints":["from-stale-series"]},"stats":{"numSamples":7,"numSeries":3}}`)
	mk(ooo, `{"ulid":"`+ooo+`","minTime":1,"maxTime":2,"version":1,"compaction":{"level":1,"hints":["a-new-hint","from-out-of-order"]},"something":"new"}`)
	mk("01HEZ000000000000000000007.tmp-for-creation", string(meta))
	mk("01HEZ000000000000000000007.tmp-for-deletion", string(meta))
	mk("wal", "")
	must(t, os.WriteFile(filepath.Join(dir, "01HEZ000000000000000000008"), nil, 0o644))

	l := NewLister(dir)
	list := func(want, wantBad []string) []Block {
		t.Helper()
		blocks, bad, err := l.List()
		must(t, err)
		var got, gotBad []string
		for _, b := range blocks {
			got = append(got, b.ULID.String())
		}
		for _, b := range bad {
			gotBad = append(gotBad, filepath.Base(b.Dir))
		}
		if !equal(got, want) || !equal(gotBad, wantBad) {
			t.Fatalf("listed %v, bad %v", got, bad)
		}
		return blocks
	}
	bad := []string{absent, broken, version, empty}
	blocks := list([]string{b.ULID.String(), ooo, older}, bad)
	if o := blocks[1]; !o.OutOfOrder || o.Stale {
		t.Errorf("%+v", o)
	}
	if o := blocks[2]; o.OutOfOrder || !o.Stale || o.Level != 3 || len(o.Sources) != 2 || o.MinTime != -5 || o.MaxTime != 2 || o.NumSamples != 7 || o.NumSeries != 3 {
		t.Errorf("%+v", o)
	}
	// Known ones aren't read again, bad ones are.
	must(t, os.Remove(filepath.Join(dir, ooo, "meta.json")))
	mk(absent, `{"ulid":"`+absent+`","minTime":0,"maxTime":1,"version":1}`)
	list([]string{b.ULID.String(), ooo, older, absent}, bad[1:])
	must(t, os.RemoveAll(filepath.Join(dir, ooo)))
	list([]string{b.ULID.String(), older, absent}, bad[1:])
	mk(ooo, "")
	_, errs, _ := l.List()
	if len(errs) != 4 || !errors.Is(errs[3], fs.ErrNotExist) {
		t.Errorf("%v", errs)
	}

	if _, _, err := NewLister(filepath.Join(dir, "none")).List(); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func equal(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
